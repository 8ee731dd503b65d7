//! Boot parameters: the memory map, the zero page or PVH start info, and the state a 64-bit
//! entry expects of the processor's tables.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::kernel::{Entry, Loaded};
use super::{ACPI, ACPI_END, CMDLINE, EBDA, EBDA_END, GDT, HIGH_MEMORY, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::memory::{GuestMemory, GuestRam, MMIO_GAP_START, PAGE_SIZE};

/// e820 type of usable memory.
const E820_RAM: u32 = 1;
/// e820 type of memory to leave alone.
const E820_RESERVED: u32 = 2;

/// `boot_flag`, `header` and `version` of `struct setup_header` (Linux boot protocol 2.15).
const BOOT_FLAG: u16 = 0xAA55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const PROTOCOL: u16 = 0x020f;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
const LOADED_HIGH: u8 = 1;
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

/// A range of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// e820 type: 1 usable, 2 reserved.
    pub kind: u32,
}

/// The processor tables a 64-bit entry starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongMode {
    /// Guest physical address of the PML4.
    pub cr3: u64,
    /// Guest physical address of the GDT.
    pub gdt_base: u64,
    /// Its size in bytes, less one.
    pub gdt_limit: u16,
}

/// What [`write_long_mode_tables`] makes.
pub const LONG_MODE: LongMode =
    LongMode { cr3: PAGE_TABLES, gdt_base: GDT, gdt_limit: (size_of_val(&GDT_ENTRIES) - 1) as u16 };

/// The memory map: RAM without what the tables occupy. Between [`EBDA_END`] and [`ACPI`] nothing
/// is announced, as in every PC.
pub fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    let entry = |start, end, kind| MapEntry { start, size: end - start, kind };
    let mut map =
        vec![entry(0, EBDA, E820_RAM), entry(EBDA, EBDA_END, E820_RESERVED), entry(ACPI, ACPI_END, E820_RESERVED)];
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
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind };
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
        let entry = hvm_memmap_table_entry { addr: entry.start, size: entry.size, type_: entry.kind, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

/// Writes a GDT and page tables that map the first 4 GiB to themselves in pages of 2 MiB.
///
/// # Errors
/// RAM ends below the tables.
pub fn write_long_mode_tables(memory: &GuestMemory) -> Result<LongMode, GuestMemoryError> {
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
    write(&GDT_ENTRIES, GDT)?;
    Ok(LONG_MODE)
}
