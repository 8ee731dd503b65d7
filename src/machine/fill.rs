//! Content for a shell: a kernel, its arguments and tables, and vCPUs of which the first is at its entry.

use std::fs::File;

use super::Error;
use super::shell::{Shell, renew_generation_id};
use crate::boot::{self, Images, cmdline};
use crate::config::{BootSource, VmConfig};
use crate::kvm::ioctl;
use crate::kvm::x86_64::cpuid::{self, Topology};
use crate::kvm::x86_64::{msrs, regs};
use crate::memory::MmioDevice;

/// Puts `kernel` and `initrd`, opened from what `source` names, into the shell, and its vCPUs into
/// the state of a reset.
pub fn fill(
    shell: &Shell,
    source: &BootSource,
    kernel: &File,
    initrd: Option<&File>,
    config: &VmConfig,
    topology: Topology,
) -> Result<(), Error> {
    let devices: Vec<_> = (0..shell.kicks.len()).filter_map(MmioDevice::nth).collect();
    let root = config.drives.first().filter(|drive| drive.is_root_device);
    let cmdline = cmdline::build(source.boot_args.as_deref(), root, &devices)?;
    let mapping = source.image_mapping.unwrap_or_default();
    let images = Images { kernel, initrd, mapping };
    let vcpus = u8::try_from(shell.vcpu_fds.len()).unwrap_or(u8::MAX);
    shell.ram.keep_low_pages_small();
    let entry = boot::fill(&shell.ram, &images, &cmdline, vcpus, &devices)?;
    renew_generation_id(&shell.ram)?;
    let changes = config.cpu.clone().unwrap_or_default();
    let supported = shell.kvm.supported_cpuid()?;
    for (id, vcpu) in (0..).zip(&shell.vcpu_fds) {
        // CPUID first: it decides which MSRs there are.
        let mut cpuid = cpuid::for_vcpu(&supported, topology, id)?;
        cpuid::modify(&mut cpuid, &changes.cpuid_modifiers)?;
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        msrs::set_boot_msrs(vcpu)?;
        msrs::modify(vcpu, &changes.msr_modifiers)?;
        regs::set_fpu(vcpu)?;
        regs::set_lint(vcpu)?;
    }
    if let Some(boot_vcpu) = shell.vcpu_fds.first() {
        regs::set_entry(boot_vcpu, entry)?;
    }
    Ok(())
}
