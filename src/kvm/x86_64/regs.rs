//! Registers, FPU and local APIC at the kernel's entry point.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::boot::params::{CODE_SELECTOR, DATA_SELECTOR, GDT_LIMIT, TSS_SELECTOR};
use crate::boot::{self, Entry};
use crate::kvm::{Error, ioctl};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads as one.
const RFLAGS_RESERVED: u64 = 2;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4;
const DELIVERY_EXTINT: u32 = 7;

/// A flat 4 GiB segment; `type_` 0xb is code, 3 is data.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Sets the bootstrap processor to `entry`: 64-bit mode with the tables of [`boot`] (Linux
/// boot protocol, "64-bit boot protocol"), or 32-bit protected mode without paging (PVH).
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    sregs.gdt.base = boot::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let long = match entry {
        Entry::Linux64 { rip } => {
            regs.rip = rip;
            regs.rsi = boot::ZERO_PAGE;
            regs.rsp = boot::STACK_TOP;
            regs.rbp = boot::STACK_TOP;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = boot::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            true
        }
        Entry::Pvh { eip } => {
            regs.rip = u64::from(eip);
            regs.rbx = boot::PVH_START_INFO;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
            false
        }
    };
    sregs.cs = flat(CODE_SELECTOR, 0xb, long);
    let data = flat(DATA_SELECTOR, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, db: 0, g: 0, ..flat(TSS_SELECTOR, 0xb, false) };
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))
}

/// x87 and SSE control words as after FNINIT.
pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), Error> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(ioctl("KVM_SET_FPU"))
}

/// LINT0 takes the PIC's interrupts, LINT1 NMIs, as the MP table says.
pub fn set_lint(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
    for (register, mode) in [(APIC_LVT_LINT0, DELIVERY_EXTINT), (APIC_LVT_LINT1, DELIVERY_NMI)] {
        let bytes = [0, 1, 2, 3].map(|i| lapic.regs[register + i] as u8);
        let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = byte as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))
}
