//! What a guest finds when it starts: kernel, initrd, command line, boot parameters, tables.
//!
//! Everything below 1 MiB that is ours has a fixed place, proved here not to overlap:
//!
//! ```text
//!  0x0_1000  GDT                              0x2_0000  command line
//!  0x0_6000  PVH start info, modules, map     0x9_FC00  MP table (the EBDA, reserved)
//!  0x0_7000  zero page                        0xE_0000  RSDP and the ACPI tables (reserved)
//!  0x0_8000  stack, growing down from 0x9000  0xF_F000  VM generation ID (reserved)
//!  0x0_9000  page tables                      0xF_FFF0  reset vector (reserved)
//!                                             0x10_0000 the kernel may go from here up
//! ```

pub mod acpi;
pub mod cmdline;
pub mod kernel;
pub mod mptable;
pub mod params;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestMemory, GuestRam, MmioDevice, io_apic_pins};

pub use kernel::{Entry, Images};

/// Global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x1000;
/// PVH start info, its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// The zero page, `struct boot_params` (Linux boot protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer of the boot vCPU; one page below it is free.
pub const STACK_TOP: u64 = 0x9000;
/// Six pages: a PML4, a PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the room for the command line.
pub const CMDLINE_END: u64 = CMDLINE + crate::config::MAX_CMDLINE as u64 + 1;
/// The last KiB of base memory, where a guest looks for the MP table (MP specification 1.4 §4).
pub const EBDA: u64 = 0x9_FC00;
/// End of base memory; video memory in a PC, nothing here.
pub const EBDA_END: u64 = 0xA_0000;
/// The BIOS area, where a guest looks for the RSDP (ACPI 6.5 §5.2.5.1). The tables follow it.
pub const ACPI: u64 = 0xE_0000;
/// End of the room for the ACPI tables.
pub const ACPI_END: u64 = crate::memory::VM_GENERATION_ID;
/// Where a processor in real mode begins after a reset.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// End of the BIOS area.
pub const BIOS_END: u64 = 0x10_0000;
/// Images are loaded from here up.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// 16-bit code that pulses the reset line through the i8042: `mov al, 0xfe; out 0x64, al; hlt;
/// jmp $-1`. A kernel built with EFI takes a hardware-reduced machine for an EFI one, and failing
/// that restarts through the BIOS: without this it would run through zeroes for ever.
const RESET_CODE: [u8; 7] = [0xB0, 0xFE, 0xE6, 0x64, 0xF4, 0xEB, 0xFD];

const fn follows(start: u64, end: u64, next: u64) -> bool {
    start < end && end <= next
}

const _: () = {
    use crate::memory::{PAGE_SIZE, VM_GENERATION_ID};
    assert!(follows(GDT, GDT + PAGE_SIZE, PVH_START_INFO));
    assert!(follows(PVH_START_INFO, PVH_START_INFO + PAGE_SIZE, ZERO_PAGE));
    assert!(follows(ZERO_PAGE, ZERO_PAGE + PAGE_SIZE, STACK_TOP - PAGE_SIZE));
    assert!(follows(STACK_TOP - PAGE_SIZE, STACK_TOP, PAGE_TABLES));
    assert!(follows(PAGE_TABLES, PAGE_TABLES + 6 * PAGE_SIZE, CMDLINE));
    assert!(follows(CMDLINE, CMDLINE_END, EBDA));
    assert!(follows(EBDA, EBDA_END, ACPI));
    assert!(follows(ACPI, ACPI_END, VM_GENERATION_ID));
    assert!(follows(VM_GENERATION_ID, VM_GENERATION_ID + 16, RESET_VECTOR));
    assert!(follows(RESET_VECTOR, RESET_VECTOR + RESET_CODE.len() as u64, BIOS_END));
    assert!(follows(RESET_VECTOR, BIOS_END, HIGH_MEMORY));
};

/// Why a guest cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or initrd cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Guest memory ends below what must be in it.
    #[error("cannot write the {what} to guest memory")]
    Write {
        /// Which table.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Puts everything the boot vCPU needs into fresh guest RAM and says where it starts: kernel,
/// initrd, `cmdline` (from [`cmdline::build`]), firmware tables for `vcpus` vCPUs and `devices`,
/// boot parameters, and for a 64-bit entry its page tables and GDT.
///
/// # Errors
/// The images are not bootable in this RAM; nothing was written then. Or the host fails.
pub fn fill(
    ram: &GuestRam,
    images: &Images<'_>,
    cmdline: &str,
    vcpus: u8,
    devices: &[MmioDevice],
) -> Result<Entry, Error> {
    let wrote = |what| move |source| Error::Write { what, source };
    let memory = ram.memory();
    let loaded = kernel::load(ram, images)?;
    let line = [cmdline.as_bytes(), b"\0"].concat();
    put(memory, &line, CMDLINE, CMDLINE_END).map_err(wrote("command line"))?;
    mptable::write(memory, vcpus, io_apic_pins(devices.len())).map_err(wrote("MP table"))?;
    let rsdp = acpi::write_tables(memory, vcpus, devices).map_err(wrote("ACPI tables"))?;
    put(memory, &RESET_CODE, RESET_VECTOR, BIOS_END).map_err(wrote("reset vector"))?;
    params::write(ram, &loaded, rsdp).map_err(wrote("boot parameters"))?;
    if matches!(loaded.entry, Entry::Linux64 { .. }) {
        params::write_long_mode_tables(memory).map_err(wrote("page tables"))?;
    }
    Ok(loaded.entry)
}

/// Writes `bytes` at `gpa` into the area that ends at `end`.
fn put(memory: &GuestMemory, bytes: &[u8], gpa: u64, end: u64) -> Result<(), GuestMemoryError> {
    if gpa + bytes.len() as u64 > end {
        return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(end)));
    }
    memory.write_slice(bytes, GuestAddress(gpa))
}

#[cfg(test)]
mod tests;
