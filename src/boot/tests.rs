use std::fs::File;
use std::io::Write;

use super::*;
use crate::config::{HugePages, ImageMapping};
use crate::memory::MIB;

/// A bzImage's first sectors, enough to be loaded.
fn bzimage() -> File {
    let mut image = vec![0u8; 0x4000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[3]); // setup_sects
    put(0x1fe, &[0x55, 0xAA, 0xEB, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // loadflags
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &3u16.to_le_bytes()); // xloadflags
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn string_at(ram: &GuestRam, gpa: u64) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes.into_iter().take_while(|&byte| byte != 0).collect()
}

#[test]
fn everything_a_guest_looks_for_is_where_it_looks() {
    let (ram, kernel) = (GuestRam::new(32 * MIB, HugePages::None).unwrap(), bzimage());
    let images = Images { kernel: &kernel, initrd: None, mapping: ImageMapping::Shared };
    let devices = [MmioDevice::nth(0).unwrap()];
    let entry = fill(&ram, &images, "console=ttyS0 quiet", 2, &devices).unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x100_0200 });
    assert_eq!(string_at(&ram, CMDLINE), b"console=ttyS0 quiet");
    assert_eq!(string_at(&ram, 0x9_FC00)[..4], *b"_MP_");
    assert_eq!(string_at(&ram, 0xE_0000)[..8], *b"RSD PTR ");
    assert_eq!(string_at(&ram, 0xF_FFF0), RESET_CODE);
    assert_eq!(string_at(&ram, ZERO_PAGE + 0x202)[..4], *b"HdrS");
    let pml4: u64 = ram.memory().read_obj(GuestAddress(PAGE_TABLES)).unwrap();
    assert_eq!(pml4, PAGE_TABLES + 0x1000 + 3);
}

#[test]
fn a_refused_kernel_leaves_ram_untouched() {
    let (ram, kernel) = (GuestRam::new(16 * MIB, HugePages::None).unwrap(), bzimage());
    let images = Images { kernel: &kernel, initrd: None, mapping: ImageMapping::Shared };
    let refusal = fill(&ram, &images, "quiet", 1, &[]).unwrap_err();
    assert!(matches!(refusal, Error::Kernel(kernel::Error::MemoryTooSmall { needed_mib: 17, have_mib: 16 })));
    let mut all = vec![0; 16 << 20];
    ram.memory().read_slice(&mut all, GuestAddress(0)).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));
}

#[test]
fn a_command_line_never_runs_into_what_follows() {
    let (ram, kernel) = (GuestRam::new(32 * MIB, HugePages::None).unwrap(), bzimage());
    let images = Images { kernel: &kernel, initrd: None, mapping: ImageMapping::Shared };
    let longest = "x".repeat(crate::config::MAX_CMDLINE);
    fill(&ram, &images, &longest, 1, &[]).unwrap();
    let refusal = fill(&ram, &images, &(longest + "x"), 1, &[]).unwrap_err();
    assert!(matches!(refusal, Error::Write { what: "command line", .. }));
}
