//! Content for a shell: a kernel, its arguments and tables, and the boot vCPU at its entry.

use std::fs::File;

use super::Error;
use super::shell::Shell;
use crate::boot::{self, EntryKind, Images, cmdline};
use crate::config::{BootSource, DriveConfig};
use crate::kvm::x86_64::regs;
use crate::memory::MmioDevice;

/// Puts `kernel` and `initrd`, opened from what `source` names, into the shell.
pub fn fill(
    shell: &Shell,
    source: &BootSource,
    kernel: &File,
    initrd: Option<&File>,
    drives: &[DriveConfig],
) -> Result<(), Error> {
    let devices: Vec<_> = (0..shell.bus.virtio.len()).filter_map(MmioDevice::nth).collect();
    let root = drives.first().filter(|drive| drive.is_root_device);
    let cmdline = cmdline::build(source.boot_args.as_deref(), root, &devices)?;
    let mapping = source.image_mapping.unwrap_or_default();
    let images = Images { kernel, initrd, mapping, entry: EntryKind::Auto };
    let vcpus = u8::try_from(shell.vcpu_fds.len()).unwrap_or(u8::MAX);
    let entry = boot::fill(&shell.ram, &images, &cmdline, vcpus, &devices)?;
    if let Some(boot_vcpu) = shell.vcpu_fds.first() {
        regs::set_entry(boot_vcpu, entry)?;
    }
    Ok(())
}
