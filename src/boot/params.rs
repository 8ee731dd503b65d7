//! Boot parameters: the memory map, the zero page or PVH start info, and the state a 64-bit
//! entry expects of the processor's tables.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::kernel::{Entry, Loaded};
use super::{ACPI, BIOS_END, CMDLINE, EBDA, EBDA_END, GDT, HIGH_MEMORY, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::memory::{GuestMemory, GuestRam, MMIO_GAP_START, PAGE_SIZE};

/// e820 type of usable memory.
const E820_RAM: u32 = 1;
/// e820 type of memory to leave alone.
const E820_RESERVED: u32 = 2;

/// `boot_flag`, `header` and `version` of `struct setup_header` (Linux boot protocol 2.15).
pub(super) const BOOT_FLAG: u16 = 0xAA55;
pub(super) const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const PROTOCOL: u16 = 0x020f;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
/// Bit of `loadflags`: the protected-mode part goes to high memory.
pub(super) const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// "xEn3" with the top bit of the E set (`XEN_HVM_START_MAGIC_VALUE`).
const PVH_MAGIC: u32 = 0x336e_c578;
/// Version 1 brought the memory map.
const PVH_VERSION: u32 = 1;
const PVH_MODULES: u64 = PVH_START_INFO + size_of::<hvm_start_info>() as u64;
const PVH_MEMORY_MAP: u64 = PVH_MODULES + size_of::<hvm_modlist_entry>() as u64;
/// At most four fixed ranges, RAM below the gap and eight slots above it.
const MAX_RANGES: u64 = 16;
const _: () = assert!(PVH_MEMORY_MAP + MAX_RANGES * size_of::<hvm_memmap_table_entry>() as u64 <= ZERO_PAGE);
const _: () = assert!(size_of::<boot_params>() as u64 == PAGE_SIZE);

/// Selector of the flat 64-bit code segment (`__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
pub const TSS_SELECTOR: u16 = 0x20;
/// Null, null, 64-bit code, data, busy TSS of 104 bytes at 0 (its upper half is zero).
const GDT_ENTRIES: [u64; 6] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0];

/// Bits of page table entries: present, writable, a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const ENTRIES: usize = 512;
/// Page directories: one for each GiB below 4 GiB.
const DIRECTORIES: u64 = 4;

/// The size of the GDT at [`GDT`] in bytes, less one.
pub const GDT_LIMIT: u16 = (size_of_val(&GDT_ENTRIES) - 1) as u16;

/// The memory map: RAM without what the tables occupy. Between [`EBDA_END`] and [`ACPI`] nothing
/// is announced, as in every PC.
pub fn memory_map(ram: &GuestRam) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, end, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
    let mut map =
        vec![entry(0, EBDA, E820_RAM), entry(EBDA, EBDA_END, E820_RESERVED), entry(ACPI, BIOS_END, E820_RESERVED)];
    if ram.low_end() > HIGH_MEMORY {
        map.push(entry(HIGH_MEMORY, ram.low_end(), E820_RAM));
    }
    let high = ram.slots().filter(|slot| slot.gpa > MMIO_GAP_START);
    map.extend(high.map(|slot| entry(slot.gpa, slot.gpa + slot.size, E820_RAM)));
    map
}

/// Writes the parameters the chosen entry point reads.
///
/// # Errors
/// RAM ends below 1 MiB.
pub fn write(ram: &GuestRam, loaded: &Loaded, rsdp: u64) -> Result<(), GuestMemoryError> {
    match loaded.entry {
        Entry::Linux64 { .. } => write_zero_page(ram, loaded, rsdp),
        Entry::Pvh { .. } => write_start_info(ram, loaded, rsdp),
    }
}

fn write_zero_page(ram: &GuestRam, loaded: &Loaded, rsdp: u64) -> Result<(), GuestMemoryError> {
    // A kernel without a setup header is told what its own would say.
    let mut hdr = loaded.setup_header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL,
        loadflags: LOADED_HIGH,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    });
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.setup_data = 0;
    hdr.cmd_line_ptr = CMDLINE as u32;
    // Images lie below the MMIO gap: 32 bits hold their addresses.
    let (image, size) = loaded.initrd.unwrap_or_default();
    (hdr.ramdisk_image, hdr.ramdisk_size) = (image as u32, size as u32);

    let mut params = boot_params { hdr, acpi_rsdp_addr: rsdp, ..Default::default() };
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(ram)) {
        *slot = boot_e820_entry { addr: entry.addr, size: entry.size, r#type: entry.type_ };
        params.e820_entries += 1;
    }
    ram.memory().write_obj(params, GuestAddress(ZERO_PAGE))
}

fn write_start_info(ram: &GuestRam, loaded: &Loaded, rsdp: u64) -> Result<(), GuestMemoryError> {
    let map = memory_map(ram);
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        nr_modules: u32::from(loaded.initrd.is_some()),
        modlist_paddr: PVH_MODULES,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let memory = ram.memory();
    memory.write_obj(info, GuestAddress(PVH_START_INFO))?;
    if let Some((paddr, size)) = loaded.initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        memory.write_obj(module, GuestAddress(PVH_MODULES))?;
    }
    let mut at = PVH_MEMORY_MAP;
    for entry in map {
        memory.write_obj(entry, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

/// Writes a GDT and page tables that map the first 4 GiB to themselves in pages of 2 MiB.
///
/// # Errors
/// RAM ends below the tables.
pub fn write_long_mode_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let write = |entries: &[u64], at: u64| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(at))
    };
    let pdpt = PAGE_TABLES + PAGE_SIZE;
    let directory = |n: u64| pdpt + PAGE_SIZE + n * PAGE_SIZE;
    write(&[pdpt | PRESENT_WRITABLE], PAGE_TABLES)?;
    let directories: Vec<u64> = (0..DIRECTORIES).map(|n| directory(n) | PRESENT_WRITABLE).collect();
    write(&directories, pdpt)?;
    let pages = (0..DIRECTORIES * ENTRIES as u64).map(|n| n << 21 | PRESENT_WRITABLE | LARGE_PAGE);
    write(&pages.collect::<Vec<_>>(), directory(0))?;
    write(&GDT_ENTRIES, GDT)
}

#[cfg(test)]
mod tests {
    use vm_memory::ByteValued;

    use super::*;
    use crate::config::HugePages;
    use crate::memory::{MIB, MMIO_GAP_END};

    const GIB: u64 = 1 << 30;
    const RAM: u32 = E820_RAM;

    fn ram(size: u64) -> GuestRam {
        GuestRam::new(size, HugePages::None).unwrap()
    }

    fn loaded(entry: Entry, initrd: Option<(u64, u64)>) -> Loaded {
        Loaded { entry, initrd, kernel_end: 0x200_0000, setup_header: None }
    }

    fn read<T: ByteValued>(ram: &GuestRam, gpa: u64) -> T {
        ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Usable ranges from 1 MiB up.
    fn high_ram(size: u64) -> Vec<(u64, u64)> {
        let map = memory_map(&ram(size));
        assert!(map.windows(2).all(|w| w[0].addr + w[0].size <= w[1].addr), "sorted, no overlap: {map:x?}");
        let usable = map.iter().filter(|e| e.type_ == RAM && e.addr >= MIB);
        usable.map(|e| (e.addr, e.addr + e.size)).collect()
    }

    #[test]
    fn the_map_shows_all_ram_and_no_gap() {
        assert_eq!(high_ram(16 * MIB), [(MIB, 16 * MIB)]);
        assert_eq!(high_ram(128 * MIB), [(MIB, 128 * MIB)]);
        assert_eq!(high_ram(3 * GIB), [(MIB, 3 * GIB)]);
        assert_eq!(high_ram(5 * GIB), [(MIB, 3 * GIB), (MMIO_GAP_END, 6 * GIB)]);
        assert_eq!(high_ram(MIB), []);
    }

    #[test]
    fn tables_are_in_reserved_ranges_and_low_structures_in_ram() {
        let map = memory_map(&ram(16 * MIB));
        let kind = |gpa| map.iter().find(|e| (e.addr..e.addr + e.size).contains(&gpa)).map(|e| e.type_);
        for reserved in [EBDA, EBDA_END - 1, ACPI, BIOS_END - 1] {
            assert_eq!(kind(reserved), Some(E820_RESERVED), "{reserved:#x}");
        }
        for usable in [ZERO_PAGE, PVH_START_INFO, CMDLINE, PAGE_TABLES, EBDA - 1, HIGH_MEMORY] {
            assert_eq!(kind(usable), Some(RAM), "{usable:#x}");
        }
        assert_eq!(kind(EBDA_END), None, "video memory");
    }

    #[test]
    fn the_largest_machine_fits_both_maps() {
        let map = memory_map(&ram(crate::config::MAX_MEM_SIZE_MIB * MIB));
        assert!(map.len() as u64 <= MAX_RANGES);
        assert!(map.len() <= boot_params::default().e820_table.len());
    }

    #[test]
    fn an_elf_kernel_gets_a_zero_page() {
        let ram = ram(64 * MIB);
        let initrd = Some((0x300_0000, 12345));
        write(&ram, &loaded(Entry::Linux64 { rip: 0x100_0000 }, initrd), 0xE_0000).unwrap();
        let params: boot_params = read(&ram, ZERO_PAGE);
        let hdr = params.hdr;
        assert_eq!(({ hdr.boot_flag }, { hdr.header.to_le_bytes() }), (0xAA55, *b"HdrS"));
        assert_eq!(({ hdr.cmd_line_ptr }, hdr.type_of_loader), (0x2_0000, 0xFF));
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x300_0000, 12345));
        assert_eq!({ params.acpi_rsdp_addr }, 0xE_0000);
        let entries = params.e820_table;
        let map: Vec<_> = entries[..params.e820_entries.into()].iter().map(|e| (e.addr, e.size, e.r#type)).collect();
        assert_eq!(map, memory_map(&ram).iter().map(|e| (e.addr, e.size, e.type_)).collect::<Vec<_>>());
        // Where the boot protocol says they are, whatever the structure above thinks.
        assert_eq!(read::<[u8; 4]>(&ram, ZERO_PAGE + 0x202), *b"HdrS");
        assert_eq!(read::<u8>(&ram, ZERO_PAGE + 0x1e8), params.e820_entries);
        assert_eq!(read::<u64>(&ram, ZERO_PAGE + 0x70), 0xE_0000);
        assert_eq!(read::<u64>(&ram, ZERO_PAGE + 0x2d0 + 8), EBDA);
    }

    #[test]
    fn a_bzimage_keeps_its_own_header() {
        let ram = ram(64 * MIB);
        let header = setup_header {
            version: 0x020c,
            init_size: 0x123_4000,
            setup_data: 0xBAD,
            ramdisk_size: 0xBAD,
            ..Default::default()
        };
        let loaded = Loaded { setup_header: Some(header), ..loaded(Entry::Linux64 { rip: 0x100_0200 }, None) };
        write(&ram, &loaded, 0).unwrap();
        let hdr = read::<boot_params>(&ram, ZERO_PAGE).hdr;
        assert_eq!(({ hdr.version }, { hdr.init_size }), (0x020c, 0x123_4000));
        assert_eq!(({ hdr.setup_data }, { hdr.ramdisk_size }), (0, 0), "not for the file to say");
    }

    #[test]
    fn a_pvh_kernel_gets_a_start_info() {
        let ram = ram(5 * GIB);
        let entry = Entry::Pvh { eip: 0x100_0000 };
        write(&ram, &loaded(entry, Some((0x300_0000, 777))), 0xE_0000).unwrap();
        let info: hvm_start_info = read(&ram, PVH_START_INFO);
        assert_eq!((info.magic, info.version, info.flags, info.nr_modules), (0x336e_c578, 1, 0, 1));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (0x2_0000, 0xE_0000));
        let module: hvm_modlist_entry = read(&ram, info.modlist_paddr);
        assert_eq!((module.paddr, module.size), (0x300_0000, 777));
        let size = size_of::<hvm_memmap_table_entry>() as u64;
        let entries = (0..info.memmap_entries).map(|n| info.memmap_paddr + u64::from(n) * size);
        let map: Vec<hvm_memmap_table_entry> = entries.map(|at| read(&ram, at)).collect();
        assert_eq!(map, memory_map(&ram));

        write(&ram, &loaded(entry, None), 0).unwrap();
        assert_eq!(read::<hvm_start_info>(&ram, PVH_START_INFO).nr_modules, 0);
    }

    /// Walks the page tables as the processor does.
    fn translate(ram: &GuestRam, cr3: u64, address: u64) -> u64 {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let entry: u64 = read(ram, table + (address >> shift & 511) * 8);
            assert_eq!(entry & 3, 3, "present and writable: {address:#x}");
            if entry & LARGE_PAGE != 0 {
                assert_eq!(shift, 21);
                return (entry & !0x1F_FFFF) | (address & 0x1F_FFFF);
            }
            table = entry & !0xFFF;
        }
        panic!("no large page for {address:#x}");
    }

    #[test]
    fn the_first_four_gib_are_mapped_to_themselves() {
        let ram = ram(2 * MIB);
        write_long_mode_tables(ram.memory()).unwrap();
        for address in [0, 0x7123, 0x1F_FFFF, 0x20_0000, 0x100_0000, 0xC000_1000, 0xFEE0_0030, 0xFFFF_FFFF] {
            assert_eq!(translate(&ram, PAGE_TABLES, address), address);
        }
        let beyond: u64 = read(&ram, PAGE_TABLES + PAGE_SIZE + 4 * 8);
        assert_eq!(beyond, 0);
    }

    #[test]
    fn the_gdt_has_flat_segments_where_linux_wants_them() {
        let ram = ram(2 * MIB);
        write_long_mode_tables(ram.memory()).unwrap();
        let descriptor = |selector: u16| read::<u64>(&ram, GDT + u64::from(selector));
        let (code, data, tss) = (descriptor(CODE_SELECTOR), descriptor(DATA_SELECTOR), descriptor(TSS_SELECTOR));
        let access = |d: u64| d >> 40 & 0xFF;
        assert_eq!((access(code), access(data), access(tss)), (0x9B, 0x93, 0x8B));
        assert_eq!((code >> 52 & 0xF, data >> 52 & 0xF), (0xA, 0xC), "64-bit code, 32-bit data");
        assert_eq!((code & 0xF_0000_0000_FFFF, data & 0xF_0000_0000_FFFF), (0xF_0000_0000_FFFF, 0xF_0000_0000_FFFF));
        const { assert!(GDT_LIMIT >= TSS_SELECTOR + 15, "a TSS descriptor has 16 bytes in long mode") };
    }
}
