//! ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, MADT and a DSDT with the devices.
//!
//! The platform is hardware-reduced (§4.1): there is no PM timer, no SCI, no legacy PIC or PIT
//! that a guest would have to probe. Linux then gives I/O APIC pins no fixed interrupt numbers,
//! so every device with an interrupt is in the DSDT, the serial port and the i8042 too.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path, ResourceTemplate,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::GuestMemoryError;

use super::{ACPI, ACPI_END, put};
use crate::config::MAX_VIRTIO_DEVICES;
use crate::memory::{
    GuestMemory, IO_APIC, LOCAL_APIC, MmioDevice, VIRTIO_MMIO_SIZE, VM_GENERATION_ID, VM_GENERATION_IRQ,
};

const OEM_ID: [u8; 6] = *b"VESICL";
const OEM_TABLE_ID: [u8; 8] = *b"VESICLE ";
const OEM_REVISION: u32 = 1;

/// DSDT revision 2 and later has 64-bit integers (§19.6.29).
const DSDT_REVISION: u8 = 2;
const TABLE_HEADER_LEN: u32 = 36;
/// The tables follow the RSDP at multiples of this.
const ALIGNMENT: u64 = 16;

/// IA-PC boot architecture flags of the FADT (§5.2.9.3): there is an i8042; there is no VGA to
/// probe, no PCI that could send MSIs, and no CMOS clock.
const BOOT_ARCH: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;

/// Command port of the i8042, and the command that pulses the processor's reset line.
const I8042_COMMAND: u16 = 0x64;
const I8042_DATA: u16 = 0x60;
const I8042_RESET: u8 = 0xFE;
const I8042_IRQ: u32 = 1;
const COM1: u16 = 0x3F8;
const COM1_IRQ: u32 = 4;

/// Writes the tables from [`ACPI`] up, for `vcpus` vCPUs whose local APIC ids count from 0, and
/// returns the guest physical address of the RSDP.
///
/// # Errors
/// RAM or the BIOS area ends before the tables do.
pub fn write_tables(memory: &GuestMemory, vcpus: u8, devices: &[MmioDevice]) -> Result<u64, GuestMemoryError> {
    let mut next = ACPI + (Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut write = |table: &dyn Aml| {
        let (at, bytes) = (next, bytes_of(table));
        put(memory, &bytes, at, ACPI_END)?;
        next = (at + bytes.len() as u64).next_multiple_of(ALIGNMENT);
        Ok::<u64, GuestMemoryError>(at)
    };
    let dsdt = write(&dsdt(devices))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(write(&fadt(dsdt))?);
    xsdt.add_entry(write(&madt(vcpus))?);
    let xsdt = write(&xsdt)?;
    put(memory, &bytes_of(&Rsdp::new(OEM_ID, xsdt)), ACPI, ACPI_END)?;
    Ok(ACPI)
}

/// A hardware-reduced platform that is reset through its i8042. It has neither power nor sleep
/// button among its fixed hardware, which is what those flags mean.
fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, I8042_COMMAND.into());
    fadt.reset_value = I8042_RESET;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

/// Local APICs 0 to `vcpus` - 1, and the I/O APIC with pin n as global system interrupt n. There
/// are no overrides: every ISA interrupt is at its own pin, edge-triggered and active high.
fn madt(vcpus: u8) -> MADT {
    let address = LocalInterruptController::Address(LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC as u32, 0));
    madt
}

fn dsdt(devices: &[MmioDevice]) -> Sdt {
    let mut aml = device("COM1", &EISAName::new("PNP0501"), 0, &[&IO::new(COM1, COM1, 1, 8), &interrupt(COM1_IRQ)]);
    aml.extend(device(
        "PS2_",
        &EISAName::new("PNP0303"),
        0,
        &[&io_port(I8042_DATA), &io_port(I8042_COMMAND), &interrupt(I8042_IRQ)],
    ));
    for (index, place) in (0u8..MAX_VIRTIO_DEVICES as u8).zip(devices) {
        let window = Memory32Fixed::new(true, place.base as u32, VIRTIO_MMIO_SIZE as u32);
        aml.extend(device(&format!("V{index:03}"), &"LNRO0005", index, &[&window, &interrupt(place.irq)]));
    }
    aml.extend(generation_id());
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_LEN, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// The VM generation ID, and the generic event device (§5.6.9) that turns its interrupt into a
/// notification, since a hardware-reduced platform has no SCI.
fn generation_id() -> Vec<u8> {
    let id = Path::new("\\_SB_.VGEN");
    let address: [u32; 2] = [VM_GENERATION_ID as u32, (VM_GENERATION_ID >> 32) as u32];
    let mut aml = bytes_of(&Device::new(
        Path::new("\\_SB_.VGEN"),
        vec![
            &name("_HID", &"VSCL0001"),
            &name("_CID", &"VM_Gen_Counter"),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&address[0], &address[1]])),
        ],
    ));
    let notify = Notify::new(&id, &0x80u8);
    let changed = Method::new(Path::new("_EVT"), 1, true, vec![&notify]);
    aml.extend(bytes_of(&Device::new(
        Path::new("\\_SB_.GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt(VM_GENERATION_IRQ)])),
            &changed,
        ],
    )));
    aml
}

/// `\_SB.place`, whose memory accesses are coherent as all are here.
fn device(place: &str, hid: &dyn Aml, uid: u8, resources: &[&dyn Aml]) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new(&format!("\\_SB_.{place}")),
        vec![
            &name("_HID", hid),
            &name("_UID", &uid),
            &name("_CCA", &ONE),
            &name("_CRS", &ResourceTemplate::new(resources.to_vec())),
        ],
    ))
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// Edge-triggered and active high: a pulse, nobody acknowledges.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn io_port(port: u16) -> IO {
    IO::new(port, port, 1, 1)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
