use std::io::Write;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;
use crate::generated::{change, changes, properties};

const LOAD: u64 = 0x100_0000;

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A segment of a test kernel: where it goes, its content, and zeroes after it.
#[derive(Debug, Clone)]
struct Part {
    gpa: u64,
    content: Vec<u8>,
    zeroes: u64,
    /// File offset modulo the page size.
    skew: u64,
}

fn part(gpa: u64, len: usize, zeroes: u64) -> Part {
    let content = (0..len).map(|n| (n % 251) as u8 | 1).collect();
    Part { gpa, content, zeroes, skew: gpa % PAGE_SIZE }
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut header = Elf64_Nhdr::default();
    (header.n_namesz, header.n_descsz, header.n_type) = (name.len() as u32, desc.len() as u32, kind);
    let mut bytes = header.as_slice().to_vec();
    for field in [name, desc] {
        bytes.extend_from_slice(field);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// An ELF kernel with these segments and notes, the notes in a segment of their own.
fn elf(entry: u64, parts: &[Part], notes: &[u8]) -> Vec<u8> {
    let mut header = Elf64_Ehdr::default();
    header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (header.e_type, header.e_machine, header.e_entry) = (2, 62, entry);
    (header.e_phoff, header.e_phentsize, header.e_phnum) = (64, 56, parts.len() as u16 + 1);
    let (mut table, mut body) = (Vec::new(), Vec::new());
    let start = 0x1000;
    for p in parts {
        let at = (start + body.len() as u64).next_multiple_of(PAGE_SIZE) + p.skew;
        body.resize((at - start) as usize, 0xEE);
        body.extend_from_slice(&p.content);
        let size = p.content.len() as u64;
        table.extend_from_slice(
            Elf64_Phdr {
                p_type: PT_LOAD,
                p_offset: at,
                p_paddr: p.gpa,
                p_filesz: size,
                p_memsz: size + p.zeroes,
                ..Default::default()
            }
            .as_slice(),
        );
    }
    let at = start + body.len() as u64;
    body.extend_from_slice(notes);
    let notes = Elf64_Phdr { p_type: PT_NOTE, p_offset: at, p_filesz: notes.len() as u64, ..Default::default() };
    table.extend_from_slice(notes.as_slice());
    let mut file = [header.as_slice(), &table].concat();
    file.resize(start as usize, 0);
    file.extend_from_slice(&body);
    file
}

fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 3,
        syssize: 0x3000 / 16,
        boot_flag: 0xAA55,
        jump: 0x66eb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        relocatable_kernel: 1,
        xloadflags: 3,
        pref_address: LOAD,
        init_size: 0x80_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut file = vec![0; 0x1f1];
    file.extend_from_slice(header.as_slice());
    file.resize(4 * 512, 0);
    file.extend((0..0x3000u32).map(|n| (n % 249) as u8 | 1));
    file
}

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib * MIB, HugePages::None).unwrap()
}

fn images<'a>(kernel: &'a File, initrd: Option<&'a File>, mapping: ImageMapping) -> Images<'a> {
    Images { kernel, initrd, mapping }
}

fn load_in(mib: u64, kernel: &[u8], initrd: Option<&[u8]>, mapping: ImageMapping) -> Result<(Loaded, Vec<u8>), Error> {
    let (ram, initrd) = (ram(mib), initrd.map(file_of));
    let loaded = load(&ram, &images(&file_of(kernel), initrd.as_ref(), mapping))?;
    let mut bytes = vec![0; (mib * MIB) as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    Ok((loaded, bytes))
}

fn entry_of(kernel: &[u8]) -> Entry {
    load(&ram(32), &images(&file_of(kernel), None, ImageMapping::Shared)).unwrap().entry
}

#[test]
fn a_vmlinux_lands_where_it_wants_to_be() {
    let parts = [part(LOAD, 0x2800, 0), part(LOAD + 0x3000, 0x1000, 0x5000)];
    let (loaded, bytes) = load_in(32, &elf(LOAD + 0x40, &parts, &[]), None, ImageMapping::Shared).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { rip: LOAD + 0x40 });
    assert_eq!(loaded.kernel_end, LOAD + 0x9000);
    let mut expected = vec![0; bytes.len()];
    for p in &parts {
        expected[p.gpa as usize..][..p.content.len()].copy_from_slice(&p.content);
    }
    assert!(bytes == expected, "the segments, and zeroes everywhere else");
}

#[test]
fn a_linux_kernel_starts_in_long_mode_and_another_with_a_pvh_note_in_pvh() {
    let parts = [part(LOAD, 0x2000, 0)];
    let pvh = note(b"Xen\0", 18, &(LOAD as u32 + 0x80).to_le_bytes());
    let pvh_wide = note(b"Xen\0", 18, &(LOAD + 0x80).to_le_bytes());
    let other = note(b"GNU\0", 18, &[1, 2, 3, 4, 5]);
    let linux = note(b"Linux\0", 0x100, b"salt\0");
    let (as_linux, as_pvh) = (Entry::Linux64 { rip: LOAD }, Entry::Pvh { eip: LOAD as u32 + 0x80 });

    let both = elf(LOAD, &parts, &[other.clone(), linux, pvh.clone()].concat());
    assert_eq!(entry_of(&both), as_linux);

    let unikernel = elf(LOAD, &parts, &[other, pvh_wide].concat());
    assert_eq!(entry_of(&unikernel), as_pvh);

    // Its ELF entry is a virtual address: only the note helps.
    let freebsd = elf(0xffff_ffff_8100_0000, &parts, &pvh);
    assert_eq!(entry_of(&freebsd), as_pvh);

    let flat = elf(LOAD, &parts, &[]);
    assert_eq!(entry_of(&flat), as_linux);
    let nowhere = elf(LOAD + 0x2000, &parts, &note(b"Xen\0", 18, &[0; 4]));
    assert!(matches!(inspect(&file_of(&nowhere)), Err(Error::NoEntry)));
}

#[test]
fn notes_that_lead_astray_are_ignored() {
    let parts = [part(LOAD, 0x2000, 0)];
    let good = note(b"Xen\0", 18, &(LOAD as u32).to_le_bytes());
    for at in [0, 4] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(inspect(&file_of(&elf(LOAD, &parts, &bad))).unwrap().pvh, None);
    }
    assert_eq!(inspect(&file_of(&elf(LOAD, &parts, &good[..good.len() - 1]))).unwrap().pvh, None);
    let huge = vec![0; 65 << 10];
    assert!(matches!(inspect(&file_of(&elf(LOAD, &parts, &huge))), Err(Error::Header { what: "size of notes", .. })));
}

#[test]
fn a_bzimage_brings_its_header_and_room_to_unpack() {
    let kernel = bzimage(|_| {});
    let (loaded, bytes) = load_in(32, &kernel, Some(b"cpio"), ImageMapping::Shared).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { rip: LOAD + 0x200 });
    assert_eq!(loaded.kernel_end, LOAD + 0x80_0000);
    assert_eq!(&bytes[LOAD as usize..][..0x3000], &kernel[2048..]);
    let header = loaded.setup_header.unwrap();
    assert_eq!({ header.init_size }, 0x80_0000);
    assert_eq!(loaded.initrd, Some((32 * MIB - PAGE_SIZE, 4)));
}

#[test]
fn fields_after_the_end_of_a_setup_header_are_not_its() {
    // A header that ends right after init_size, as the jump at its start says; code follows it.
    let kernel = bzimage(|h| (h.jump, h.handover_offset) = (0x62eb, 0x1234_5678));
    let header = inspect(&file_of(&kernel)).unwrap().setup_header.unwrap();
    assert_eq!(({ header.init_size }, { header.handover_offset }), (0x80_0000, 0));
    let kernel = bzimage(|h| h.jump = 0x20eb);
    assert!(matches!(inspect(&file_of(&kernel)), Err(Error::Header { what: "setup header length", .. })));
}

#[test]
fn kernels_too_old_or_broken_are_told_apart() {
    type Change = fn(&mut setup_header);
    let refuse = |change: Change| inspect(&file_of(&bzimage(change))).unwrap_err();
    assert!(matches!(refuse(|h| h.header = 0), Error::UnknownFormat));
    assert!(matches!(refuse(|h| h.boot_flag = 0), Error::UnknownFormat));
    assert!(matches!(refuse(|h| h.version = 0x020b), Error::OldBzImage { .. }));
    assert!(matches!(refuse(|h| h.xloadflags = 2), Error::OldBzImage { .. }), "32 bits only");
    assert!(matches!(refuse(|h| h.loadflags = 0), Error::OldBzImage { .. }), "a zImage");
    assert!(matches!(refuse(|h| h.syssize = 0x302), Error::Header { .. }), "cut short");
    assert!(matches!(refuse(|h| h.setup_sects = 255), Error::Header { .. }), "all setup");
    assert!(matches!(refuse(|h| h.init_size = 0x1000), Error::Header { .. }), "no room for itself");
    assert!(matches!(refuse(|h| h.init_size = 0), Error::NoEntry));
    assert!(matches!(refuse(|h| h.pref_address = 0x1000), Error::SegmentOutside { .. }));
    assert!(matches!(refuse(|h| h.pref_address = u64::MAX), Error::SegmentOutside { .. }));
    for bytes in [&b""[..], b"\x7fEL", b"#!/bin/sh\n", &[0; 8192]] {
        assert!(matches!(inspect(&file_of(bytes)), Err(Error::UnknownFormat)), "{:?}", &bytes[..bytes.len().min(9)]);
    }
    assert!(matches!(inspect(&File::open("/").unwrap()), Err(Error::NotAFile { .. })));
    assert!(matches!(inspect(&File::open("/dev/zero").unwrap()), Err(Error::NotAFile { .. })));
}

#[test]
fn elf_headers_that_lie_are_refused() {
    let refuse = |change: fn(&mut Elf64_Ehdr, &mut Elf64_Phdr)| {
        let mut bytes = elf(LOAD, &[part(LOAD, 0x2000, 0)], &[]);
        let (mut header, mut p) = (Elf64_Ehdr::default(), Elf64_Phdr::default());
        header.as_mut_slice().copy_from_slice(&bytes[..64]);
        p.as_mut_slice().copy_from_slice(&bytes[64..120]);
        change(&mut header, &mut p);
        bytes[..64].copy_from_slice(header.as_slice());
        bytes[64..120].copy_from_slice(p.as_slice());
        inspect(&file_of(&bytes)).unwrap_err()
    };
    assert!(matches!(refuse(|h, _| h.e_ident[4] = 1), Error::WrongElf), "32 bits");
    assert!(matches!(refuse(|h, _| h.e_ident[5] = 2), Error::WrongElf), "big-endian");
    assert!(matches!(refuse(|h, _| h.e_machine = 183), Error::WrongElf), "aarch64");
    assert!(matches!(refuse(|h, _| h.e_type = 1), Error::WrongElf), "an object file");
    assert!(matches!(refuse(|h, _| h.e_phnum = 0), Error::Header { .. }));
    assert!(matches!(refuse(|h, _| h.e_phnum = 0xFFFF), Error::Header { .. }));
    assert!(matches!(refuse(|h, _| h.e_phentsize = 32), Error::Header { .. }));
    assert!(matches!(refuse(|h, _| h.e_phoff = u64::MAX), Error::Read { .. } | Error::Header { .. }));
    assert!(matches!(refuse(|h, _| h.e_phoff = 0x10_0000), Error::Read { .. }), "after the end");
    assert!(matches!(refuse(|_, p| p.p_filesz += 0x10_0000), Error::Header { .. }), "larger than in memory");
    assert!(matches!(refuse(|_, p| p.p_offset = u64::MAX), Error::Header { .. }));
    assert!(matches!(refuse(|_, p| p.p_offset += 0x1000), Error::Header { .. }), "the file is cut short");
    assert!(matches!(refuse(|_, p| p.p_paddr = 0x7000), Error::SegmentOutside { .. }), "over the zero page");
    assert!(matches!(refuse(|_, p| p.p_memsz = u64::MAX), Error::SegmentOutside { .. }));
    assert!(matches!(refuse(|_, p| p.p_paddr = 0xFEE0_0000), Error::SegmentOutside { .. }), "over the local APIC");
    let twice = elf(LOAD, &[part(LOAD, 0x2000, 0), part(LOAD + 0x1800, 0x1000, 0)], &[]);
    assert!(matches!(inspect(&file_of(&twice)), Err(Error::SegmentsOverlap { gpa }) if gpa == LOAD + 0x1800));
}

#[test]
fn too_little_memory_says_how_much_is_enough() {
    let kernel = elf(LOAD, &[part(LOAD, 0x2000, 6 * MIB)], &[]);
    let refusal = |mib, initrd| load_in(mib, &kernel, initrd, ImageMapping::Shared).unwrap_err();
    assert!(matches!(refusal(22, None), Error::MemoryTooSmall { needed_mib: 23, have_mib: 22 }));
    let text = refusal(1, None).to_string();
    assert!(text.contains("at least 23 MiB") && text.contains("mem_size_mib is 1"), "{text}");
    load_in(23, &kernel, None, ImageMapping::Shared).unwrap();

    let initrd = vec![7; 3 * MIB as usize + 1];
    assert!(matches!(refusal(23, Some(&initrd)), Error::MemoryTooSmall { needed_mib: 26, .. }));
    let (loaded, bytes) = load_in(26, &kernel, Some(&initrd), ImageMapping::Shared).unwrap();
    let (gpa, len) = loaded.initrd.unwrap();
    assert!(gpa >= loaded.kernel_end && gpa % PAGE_SIZE == 0);
    assert!(bytes[gpa as usize..][..len as usize] == initrd, "the initrd is whole");

    let bzimage = bzimage(|_| {});
    let too_small = load_in(23, &bzimage, None, ImageMapping::Shared);
    assert!(matches!(too_small, Err(Error::MemoryTooSmall { needed_mib: 24, .. })), "unpacking needs init_size");
}

#[test]
fn the_initrd_stays_where_the_kernel_can_see_it() {
    let place = |mib, initrd_addr_max| {
        let kernel = inspect(&file_of(&bzimage(|h| h.initrd_addr_max = initrd_addr_max))).unwrap();
        place_initrd(&ram(mib), &kernel, 5000).map(|piece| piece.gpa)
    };
    assert_eq!(place(64, 0x7fff_ffff).unwrap(), 64 * MIB - 0x2000);
    assert_eq!(place(5 << 10, 0x7fff_ffff).unwrap(), 0x8000_0000 - 0x2000);
    assert_eq!(place(5 << 10, 0xffff_ffff).unwrap(), MMIO_GAP_START - 0x2000);
    assert_eq!(place(64, 0x37f_f000).unwrap(), 0x37f_d000, "an odd limit");
    assert!(matches!(place(64, 0x100_0000), Err(Error::TooLarge { .. })), "memory would not help");
    for len in [PAGE_SIZE as usize, 3 * PAGE_SIZE as usize - 1, 3 * PAGE_SIZE as usize + 1] {
        let initrd = vec![7; len];
        let (loaded, bytes) = load_in(32, &bzimage(|_| {}), Some(&initrd), ImageMapping::Shared).unwrap();
        let (gpa, _) = loaded.initrd.unwrap();
        assert!(bytes[gpa as usize..][..len] == initrd, "{len} bytes, up to the end of RAM");
    }
    let empty = load_in(32, &bzimage(|_| {}), Some(b""), ImageMapping::Shared);
    assert!(matches!(empty, Err(Error::EmptyInitrd)));
    let endless = place_initrd(&ram(64), &inspect(&file_of(&bzimage(|_| {}))).unwrap(), i64::MAX as u64);
    assert!(matches!(endless, Err(Error::TooLarge { .. })));
}

#[test]
fn huge_pages_are_copied_to() {
    let kernel = file_of(&elf(LOAD, &[part(LOAD, 0x3000, 0)], &[]));
    let is_mapped = |huge_pages| {
        let ram = GuestRam::new(32 * MIB, huge_pages).unwrap();
        load(&ram, &images(&kernel, None, ImageMapping::Shared)).unwrap();
        let start = format!("{:x}-", ram.slots().next().unwrap().host + LOAD);
        std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| line.starts_with(&start))
    };
    assert!(is_mapped(HugePages::None));
    assert!(!is_mapped(HugePages::Transparent));
}

properties! {
    /// Whatever the alignment of segments in memory and in the file, mapped is as good as copied.
    #[test]
    fn mapping_and_copying_give_the_same_memory(
        lens in prop::collection::vec((1usize..0x4000, 0u64..0x2000, 0u64..0x1800, any::<bool>()), 1..5),
        initrd in prop::collection::vec(any::<u8>(), 1..0x3000),
    ) {
        let (mut gpa, mut parts) = (HIGH_MEMORY, Vec::new());
        for (len, zeroes, gap, congruent) in lens {
            gpa += gap;
            let mut p = part(gpa, len, zeroes);
            p.skew = if congruent { p.skew } else { 0x123 };
            gpa += len as u64 + zeroes;
            parts.push(p);
        }
        let kernel = elf(parts[0].gpa, &parts, &[]);
        let (_, mapped) = load_in(2, &kernel, Some(&initrd), ImageMapping::Shared).unwrap();
        let (_, copied) = load_in(2, &kernel, Some(&initrd), ImageMapping::Private).unwrap();
        prop_assert!(mapped == copied);
        for p in &parts {
            prop_assert!(mapped[p.gpa as usize..][..p.content.len()] == p.content);
        }
    }

    /// Any bytes in the headers and notes are loaded or refused, whatever they say.
    #[test]
    fn hostile_headers_never_panic(
        elf_kernel in any::<bool>(),
        (in_header, in_notes) in (changes(), changes()),
        cut in prop::option::of(0usize..0x3000),
    ) {
        let names: [(&[u8], u32); 3] = [(b"Linux\0", 0x100), (b"GNU\0", 3), (b"Xen\0", 18)];
        let mut notes = names.map(|(name, kind)| note(name, kind, &(LOAD as u32).to_le_bytes())).concat();
        change(&mut notes, &in_notes);
        let (header, mut bytes) = match elf_kernel {
            true => (0..64 + 2 * 56, elf(LOAD, &[part(LOAD, 0x2000, 64)], &notes)),
            false => (0x1f1..0x1f1 + size_of::<setup_header>(), bzimage(|_| {})),
        };
        let mut changed = bytes[header.clone()].to_vec();
        change(&mut changed, &in_header);
        changed.resize(header.len(), 0);
        bytes[header].copy_from_slice(&changed);
        bytes.truncate(cut.unwrap_or(usize::MAX));
        let (ram, kernel) = (ram(32), file_of(&bytes));
        if let Ok(loaded) = load(&ram, &images(&kernel, Some(&kernel), ImageMapping::Shared)) {
            prop_assert!(loaded.kernel_end <= ram.low_end());
        }
    }
}
