//! The kernel command line.

use std::fmt::Write;

use crate::config::{DEFAULT_BOOT_ARGS, DriveConfig, MAX_CMDLINE};
use crate::memory::{MmioDevice, VIRTIO_MMIO_SIZE};

/// Why there is no command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A byte that is not a printable ASCII character.
    #[error("boot_args must be printable ASCII, byte {position} is {byte:#04x}")]
    NotPrintable {
        /// Where it is.
        position: usize,
        /// What it is.
        byte: u8,
    },
    /// A partition id that would not stay one argument.
    #[error("partuuid {0:?} is empty or has spaces, quotes or unprintable characters")]
    PartUuid(String),
    /// Too long for the kernel.
    #[error("the kernel command line is {len} bytes long with the arguments of the devices, at most {MAX_CMDLINE} fit")]
    TooLong {
        /// Its length.
        len: usize,
    },
}

/// The whole command line: `boot_args` ([`DEFAULT_BOOT_ARGS`] if `None`), the root file system,
/// and the virtio-mmio devices for kernels that do not read ACPI. What follows a lone `--` is
/// for init and stays last.
///
/// # Errors
/// Something unprintable, or more than [`MAX_CMDLINE`] bytes.
pub fn build(boot_args: Option<&str>, root: Option<&DriveConfig>, devices: &[MmioDevice]) -> Result<String, Error> {
    let boot_args = boot_args.unwrap_or(DEFAULT_BOOT_ARGS);
    if let Some((position, byte)) = boot_args.bytes().enumerate().find(|(_, b)| !matches!(b, b' '..=b'~')) {
        return Err(Error::NotPrintable { position, byte });
    }
    let (kernel, init) = boot_args.split_at(init_args(boot_args));
    let mut line = kernel.trim_end().to_owned();
    if let Some(root) = root {
        line += &root_args(root)?;
    }
    for device in devices {
        // Writing to a string cannot fail.
        let _ = write!(line, " virtio_mmio.device={}K@{:#x}:{}", VIRTIO_MMIO_SIZE >> 10, device.base, device.irq);
    }
    if !init.is_empty() {
        line.push(' ');
        line += init;
    }
    let line = line.trim_start();
    if line.len() > MAX_CMDLINE {
        return Err(Error::TooLong { len: line.len() });
    }
    Ok(line.to_owned())
}

fn root_args(root: &DriveConfig) -> Result<String, Error> {
    let mode = if root.is_read_only { "ro" } else { "rw" };
    match &root.partuuid {
        None => Ok(format!(" root=/dev/vda {mode}")),
        Some(id) if !id.is_empty() && id.bytes().all(|b| b.is_ascii_graphic() && b != b'"') => {
            Ok(format!(" root=PARTUUID={id} {mode}"))
        }
        Some(id) => Err(Error::PartUuid(id.clone())),
    }
}

/// Where the arguments for init begin: at the first unquoted `--`, or at the end.
fn init_args(args: &str) -> usize {
    let (mut quoted, mut start) = (false, 0);
    for (at, byte) in args.bytes().chain([b' ']).enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b' ' if !quoted => {
                if args.get(start..at) == Some("--") {
                    return start;
                }
                start = at + 1;
            }
            _ => {}
        }
    }
    args.len()
}
