use std::io::Write;

use vm_memory::Bytes;

use super::*;

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn bytes_at(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

fn layout(size: u64) -> Vec<(u64, u64)> {
    let ram = GuestRam::new(size, HugePages::None).unwrap();
    assert_eq!(ram.size(), size);
    ram.slots().map(|slot| (slot.gpa, slot.size)).collect()
}

#[test]
fn ram_makes_way_for_devices_below_four_gib() {
    const GIB: u64 = 1 << 30;
    assert_eq!(layout(MIB), [(0, MIB)]);
    assert_eq!(layout(3 * GIB), [(0, 3 * GIB)]);
    assert_eq!(layout(3 * GIB + MIB), [(0, 3 * GIB), (MMIO_GAP_END, MIB)]);
    assert_eq!(layout(5 * GIB), [(0, 3 * GIB), (MMIO_GAP_END, 2 * GIB)]);
}

#[test]
fn terabytes_are_only_addresses_until_touched() {
    const TIB: u64 = 1 << 40;
    assert_eq!(layout(TIB).len(), 2);
    let slots = layout(9 * TIB);
    assert!(slots.iter().all(|&(_, size)| size / PAGE_SIZE < 1 << 31), "KVM refuses larger slots: {slots:x?}");
    assert!(slots.windows(2).skip(1).all(|w| w[0].0 + w[0].1 == w[1].0), "without holes: {slots:x?}");
}

#[test]
fn slots_say_where_the_memory_really_is() {
    let ram = GuestRam::new(MMIO_GAP_START + 4 * MIB, HugePages::None).unwrap();
    for (index, slot) in (7u32..).zip(ram.slots()) {
        ram.memory().write_obj(index, GuestAddress(slot.gpa + 8)).unwrap();
        // SAFETY: the slot is mapped as long as `ram` lives.
        assert_eq!(unsafe { *((slot.host + 8) as *const u32) }, index);
    }
}

#[test]
fn ram_is_whole_pages() {
    for size in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, u64::MAX] {
        assert!(matches!(GuestRam::new(size, HugePages::None), Err(Error::Size { .. })), "{size}");
    }
    assert!(matches!(GuestRam::new(MIB, HugePages::Size2M), Err(Error::Size { page_size: HUGE_PAGE_SIZE, .. })));
}

#[test]
fn more_than_the_host_can_address_is_refused() {
    assert!(matches!(GuestRam::new(1 << 50, HugePages::None), Err(Error::Reserve { .. })));
}

/// The flags of the mapping that holds `host`, from /proc/self/smaps.
fn vm_flags(host: u64) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        if let Some((start, end)) = range {
            let hex = |s| u64::from_str_radix(s, 16);
            if let (Ok(start), Ok(end)) = (hex(start), hex(end)) {
                inside = (start..end).contains(&host);
            }
        }
        if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return flags.to_owned() + " ";
        }
    }
    panic!("{host:#x} is not mapped");
}

#[test]
fn ram_is_never_in_a_core_dump() {
    let ram = GuestRam::new(4 * MIB, HugePages::Transparent).unwrap();
    let host = ram.slots().next().unwrap().host;
    ram.map_file(MIB, &file_of(&[1; 8192]), 0, 8192).unwrap();
    for address in [host, host + MIB, host + 3 * MIB] {
        assert!(vm_flags(address).contains(" dd "), "{}", vm_flags(address));
    }
    assert!(vm_flags(host).contains(" hg "), "transparent huge pages were asked for");
}

#[test]
fn a_mapped_file_reads_as_itself_and_is_never_written() {
    let ram = GuestRam::new(MIB, HugePages::None).unwrap();
    let content: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    let file = file_of(&content);
    ram.memory().write_slice(&[0xFF; 16], GuestAddress(0x8000 + 10_000)).unwrap();
    ram.map_file(0x8000, &file, 0, 10_000).unwrap();
    assert_eq!(bytes_at(&ram, 0x8000, 10_000), content);
    assert_eq!(bytes_at(&ram, 0x8000 + 10_000, 0x3000 - 10_000), vec![0; 0x3000 - 10_000], "zero to the page's end");

    ram.memory().write_slice(b"guest was here", GuestAddress(0x8000)).unwrap();
    let mut host = vec![0; 10_000];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut host, 0).unwrap();
    assert_eq!(host, content);
}

#[test]
fn what_would_fault_or_shift_is_not_mapped() {
    let ram = GuestRam::new(MIB, HugePages::None).unwrap();
    let file = file_of(&[1; 0x2800]);
    let refused = |gpa, offset, len| matches!(ram.map_file(gpa, &file, offset, len), Err(Error::Unmappable { .. }));
    assert!(refused(0, 0, 0x3000), "past the end of the file");
    assert!(refused(0, 0, 0x1800), "would show the rest of the page");
    assert!(refused(0, 0, 0), "nothing");
    assert!(refused(0x10, 0, 0x1000) && refused(0, 0x10, 0x1000), "not aligned");
    assert!(refused(0, u64::MAX - 0xFFF, 0x1000), "overflows");
    assert!(matches!(ram.map_file(MIB - 0x1000, &file, 0, 0x2000), Err(Error::OutsideRam { .. })));
    assert!(matches!(ram.map_file(u64::MAX - 0xFFF, &file, 0, 0x2000), Err(Error::OutsideRam { .. })));
}

#[test]
fn a_file_is_read_to_the_byte() {
    let ram = GuestRam::new(MIB, HugePages::None).unwrap();
    let file = file_of(b"0123456789");
    ram.read_file(0x1003, &file, 2, 5).unwrap();
    assert_eq!(bytes_at(&ram, 0x1000, 10), b"\0\0\x0023456\0\0");
    ram.read_file(MIB, &file, 0, 0).unwrap();
    assert!(matches!(ram.read_file(0, &file, 8, 5), Err(Error::File { .. })), "the file ends early");
    assert!(matches!(ram.read_file(0, &file, u64::MAX, 1), Err(Error::File { .. })));
    assert!(matches!(ram.read_file(MIB - 1, &file, 0, 2), Err(Error::OutsideRam { .. })));
}

#[test]
fn populated_ram_is_there_before_it_is_touched() {
    let ram = GuestRam::new(4 * MIB, HugePages::None).unwrap();
    ram.populate(MIB + 5, MIB).unwrap();
    ram.populate(4 * MIB, 1).unwrap_err();
    ram.populate(u64::MAX, 1).unwrap_err();
    assert_eq!(bytes_at(&ram, MIB, 4096), vec![0; 4096]);
}

#[test]
fn devices_get_windows_and_pins_of_their_own() {
    let all: Vec<_> = (0..).map_while(MmioDevice::nth).collect();
    assert_eq!(all.len(), MAX_VIRTIO_DEVICES);
    assert_eq!(all[0], MmioDevice { base: 0xC000_1000, irq: 5 });
    assert_eq!(all[18], MmioDevice { base: 0xC001_3000, irq: 23 });
    assert_eq!(MmioDevice::nth(usize::MAX), None);
}
