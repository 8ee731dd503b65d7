//! What KVM holds of vCPUs: taken out for a snapshot, put back by a load.
//!
//! The order of putting back is KVM's: CPUID decides which MSRs there are; the local APIC must be in
//! its timer mode before a deadline means something, and the TSC must run before a deadline is
//! compared with it; pending events come last, when nothing can clear them any more. What goes on by
//! itself is put back apart from the rest, so that a prepared machine can wait without its clocks running.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::config::at_most;
use crate::kvm::{Error, ioctl};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// KVM takes no more MSRs in one call.
const MSRS_AT_ONCE: usize = 256;
/// KVM lists not half as many.
const MAX_MSRS: usize = 1024;
/// A host clock this close, in millionths, needs no scaling: the guest's own error is larger.
const TSC_TOLERANCE_PPM: u64 = 250;

/// An MSR's index and value.
type Msr = (u32, u64);

/// A vCPU that is not in the guest, with its last exit completed.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    #[serde(deserialize_with = "at_most::<_, _, KVM_MAX_CPUID_ENTRIES>")]
    cpuid: Vec<kvm_cpuid_entry2>,
    /// In the order in which they are to be set.
    #[serde(deserialize_with = "at_most::<_, _, MAX_MSRS>")]
    msrs: Vec<Msr>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

impl VcpuState {
    /// Reads it. `msrs` are the indices that this KVM saves.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, Error> {
        // First, since reading it makes KVM take pending INIT and SIPI into account.
        let mp_state = vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?,
            lapic: Box::new(vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?),
            tsc_khz: vcpu.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?,
            cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_CPUID2"))?.as_slice().to_vec(),
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts it into a vCPU that has not run yet, or is parked; all but what goes on by itself, which is
    /// for [`Self::restore_time`].
    ///
    /// # Errors
    /// KVM refuses: the state is not one that this host's CPU can be in.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| Error::TooMany("the CPUID list"))?;
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        self.match_tsc(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        // SAFETY: no dynamic extended feature was asked for with arch_prctl(2), so the state that
        // KVM reads is no larger than `kvm_xsave`.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        let (_, others) = split_msrs(&self.msrs);
        write_msrs(vcpu, others)
    }

    /// Starts what runs although the vCPU does not, shortly before it does: its TSC, the timer of its
    /// local APIC, and what is pending, which that timer adds to.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore_time(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        vcpu.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        let (timed, _) = split_msrs(&self.msrs);
        write_msrs(vcpu, timed)?;
        vcpu.set_vcpu_events(&self.events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }

    /// The guest's TSC goes on at the rate it knows.
    fn match_tsc(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let here = u64::from(vcpu.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?);
        if here.abs_diff(self.tsc_khz.into()) * 1_000_000 <= here * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(ioctl("KVM_SET_TSC_KHZ"))
    }
}

/// CPU maker and signature of this host (CPUID leaves 0 and 1).
pub fn host_cpu() -> [u32; 4] {
    use std::arch::x86_64::__cpuid;
    let maker = __cpuid(0);
    [maker.ebx, maker.edx, maker.ecx, __cpuid(1).eax]
}

/// Reads what can be read of `indices`, in the order in which it is to be set.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> = chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::TooMany("the MSR list"))?;
        // KVM stops at the first MSR that it lists but this vCPU does not have.
        let count = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice()[..count].iter().map(|msr| (msr.index, msr.data)));
        let skipped = usize::from(count < chunk.len());
        rest = &rest[count + skipped..];
    }
    Ok(ordered(found))
}

/// The TSC before the deadline that is compared with it, and both before the others.
fn ordered(mut found: Vec<Msr>) -> Vec<Msr> {
    let tsc = found.iter().find(|(index, _)| *index == IA32_TSC).map_or(0, |(_, tsc)| *tsc);
    for (index, value) in &mut found {
        // A deadline that has just passed reads as 0, and setting 0 would switch the timer off: let
        // it pass again at once.
        if *index == IA32_TSC_DEADLINE && *value == 0 {
            *value = tsc;
        }
    }
    found.sort_by_key(|(index, _)| match *index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 1,
        _ => 2,
    });
    found
}

/// The MSRs that go on by themselves, in order, and the others.
fn split_msrs(msrs: &[Msr]) -> (&[Msr], &[Msr]) {
    let count = msrs.iter().take_while(|(index, _)| is_timed(*index)).count();
    msrs.split_at(count)
}

fn is_timed(msr: u32) -> bool {
    matches!(msr, IA32_TSC | IA32_TSC_DEADLINE)
}

/// Sets `msrs`. One that KVM refuses is no error if it has that value anyway: some can only be read.
fn write_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> =
            chunk.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| Error::TooMany("the MSR list"))?;
        let count = vcpu.set_msrs(&entries).map_err(ioctl("KVM_SET_MSRS"))?;
        let Some(&(index, value)) = chunk.get(count) else {
            rest = &rest[count..];
            continue;
        };
        if read_msrs(vcpu, &[index])? != [(index, value)] {
            return Err(Error::Msr(index));
        }
        rest = &rest[count + 1..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    const EFER: u32 = 0xc000_0080;
    const STAR: u32 = 0xc000_0081;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const PERF_STATUS: u32 = 0x198;

    #[test]
    fn the_tsc_is_set_before_the_deadline_that_is_compared_with_it_and_both_apart_from_the_others() {
        let found = vec![(STAR, 1), (IA32_TSC_DEADLINE, 700), (EFER, 2), (IA32_TSC, 500)];
        let msrs = ordered(found);
        assert_eq!(msrs, [(IA32_TSC, 500), (IA32_TSC_DEADLINE, 700), (STAR, 1), (EFER, 2)]);
        assert_eq!(split_msrs(&msrs), (&msrs[..2], &msrs[2..]));
        assert_eq!(split_msrs(&msrs[2..]), (&[][..], &msrs[2..]));
        assert_eq!(split_msrs(&[]), (&[][..], &[][..]));
    }

    #[test]
    fn a_deadline_that_has_just_passed_passes_again() {
        let msrs = ordered(vec![(IA32_TSC_DEADLINE, 0), (STAR, 0), (IA32_TSC, 500)]);
        assert_eq!(msrs, [(IA32_TSC, 500), (IA32_TSC_DEADLINE, 500), (STAR, 0)]);
    }

    /// A vCPU, if this host makes one.
    fn vcpu() -> Option<VcpuFd> {
        let vcpu = Kvm::new().and_then(|kvm| kvm.create_vm()).and_then(|vm| vm.create_vcpu(0));
        vcpu.inspect_err(|error| eprintln!("SKIPPED: KVM: {error}")).ok()
    }

    #[test]
    fn an_msr_that_kvm_refuses_is_named() {
        let Some(vcpu) = vcpu() else { return };
        let refused = write_msrs(&vcpu, &[(KERNEL_GS_BASE, 0x1000), (EFER, 1 << 63), (STAR, 0)]);
        assert_eq!(refused.unwrap_err().to_string(), "KVM refused to set MSR 0xc0000080");
        assert_eq!(read_msrs(&vcpu, &[KERNEL_GS_BASE]).unwrap(), [(KERNEL_GS_BASE, 0x1000)]);
    }

    #[test]
    fn an_msr_that_can_only_be_read_is_no_obstacle_if_it_is_the_same() {
        let Some(vcpu) = vcpu() else { return };
        let status = read_msrs(&vcpu, &[PERF_STATUS]).unwrap()[0];
        write_msrs(&vcpu, &[status, (KERNEL_GS_BASE, 0x1000)]).unwrap();
        assert_eq!(read_msrs(&vcpu, &[KERNEL_GS_BASE]).unwrap(), [(KERNEL_GS_BASE, 0x1000)]);
        let refused = write_msrs(&vcpu, &[(PERF_STATUS, !status.1)]);
        assert!(matches!(refused, Err(Error::Msr(PERF_STATUS))), "{refused:?}");
    }
}
