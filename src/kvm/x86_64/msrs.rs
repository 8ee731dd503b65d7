//! Model-specific registers at reset (Intel SDM vol. 4, AMD APM vol. 2 appendix A).

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::config::MsrModifier;
use crate::kvm::{Error, ioctl};

const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, default type write-back: RAM is cached although no variable range says so.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// What a boot loader leaves behind, and all that Linux wants to find.
const AT_BOOT: [(u32, u64); 11] = [
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (STAR, 0),
    (CSTAR, 0),
    (KERNEL_GS_BASE, 0),
    (SYSCALL_MASK, 0),
    (LSTAR, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
];

/// Those of the memory types, which KVM does not list (Intel SDM vol. 3, 12.11).
pub fn memory_types() -> impl Iterator<Item = u32> {
    (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([IA32_MTRR_DEF_TYPE])
}

/// Sets the MSRs. CPUID must be set already: it decides which of them exist.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = AT_BOOT.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::TooMany("the MSR list"))?;
    // KVM stops at the first MSR it refuses and says only how many it took.
    let set = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
    match AT_BOOT.get(set) {
        Some((refused, _)) => Err(Error::Msr(*refused)),
        None => Ok(()),
    }
}

/// Changes what a vCPU begins with.
///
/// # Errors
/// An MSR that does not exist here, or a value it cannot have.
pub fn modify(vcpu: &VcpuFd, modifiers: &[MsrModifier]) -> Result<(), Error> {
    for modifier in modifiers {
        let index = modifier.address;
        let one = |data| {
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            Msrs::from_entries(&[entry]).map_err(|_| Error::TooMany("the MSR list"))
        };
        let mut msrs = one(0)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        let data = msrs.as_slice().first().filter(|_| read == 1).ok_or(Error::NoMsr(index))?.data;
        let set = vcpu.set_msrs(&one(modifier.bitmap.apply(data))?).map_err(ioctl("KVM_SET_MSRS"))?;
        if set != 1 {
            return Err(Error::Msr(index));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::config::BitMap;

    const EFER: u32 = 0xc000_0080;

    #[test]
    fn a_value_that_an_msr_cannot_have_is_refused_by_its_number() {
        let vcpu = match Kvm::new().and_then(|kvm| kvm.create_vm()).and_then(|vm| vm.create_vcpu(0)) {
            Ok(vcpu) => vcpu,
            Err(error) => return eprintln!("SKIPPED: KVM: {error}"),
        };
        let modifier = |value| MsrModifier { address: EFER, bitmap: BitMap { mask: 1 << 63, value, width: 64 } };
        modify(&vcpu, &[modifier(0)]).unwrap();
        let refused = modify(&vcpu, &[modifier(0), modifier(1 << 63)]);
        assert!(matches!(refused, Err(Error::Msr(EFER))), "{refused:?}");
    }
}
