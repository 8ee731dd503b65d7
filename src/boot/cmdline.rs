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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{CacheType, IoEngine, RateLimiterConfig};

    fn root(is_read_only: bool, partuuid: Option<&str>) -> DriveConfig {
        DriveConfig {
            drive_id: "rootfs".into(),
            is_root_device: true,
            path_on_host: "/images/root.ext4".into(),
            is_read_only,
            partuuid: partuuid.map(str::to_owned),
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            rate_limiter: RateLimiterConfig::default(),
            discard: false,
            overlay: None,
        }
    }

    fn devices(count: usize) -> Vec<MmioDevice> {
        (0..).map_while(MmioDevice::nth).take(count).collect()
    }

    #[test]
    fn nobody_said_anything() {
        assert_eq!(build(None, None, &[]).unwrap(), DEFAULT_BOOT_ARGS);
        assert_eq!(build(Some(""), None, &[]).unwrap(), "");
    }

    #[test]
    fn a_root_drive_is_mounted_as_it_may_be() {
        let line = |drive| build(Some("quiet"), Some(&drive), &[]).unwrap();
        assert_eq!(line(root(true, None)), "quiet root=/dev/vda ro");
        assert_eq!(line(root(false, None)), "quiet root=/dev/vda rw");
        assert_eq!(line(root(false, Some("0eaa91a0-01"))), "quiet root=PARTUUID=0eaa91a0-01 rw");
        for id in ["", "a b", "a\"b", "a\nb", "ü"] {
            let refused = build(Some(""), Some(&root(true, Some(id))), &[]);
            assert_eq!(refused, Err(Error::PartUuid(id.into())));
        }
    }

    #[test]
    fn devices_are_named_for_kernels_without_acpi() {
        let line = build(Some("quiet"), None, &devices(2)).unwrap();
        assert_eq!(line, "quiet virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6");
        assert_eq!(build(Some(""), None, &devices(1)).unwrap(), "virtio_mmio.device=4K@0xc0001000:5");
    }

    #[test]
    fn what_is_for_init_stays_last() {
        let line = |args| build(Some(args), Some(&root(true, None)), &[]).unwrap();
        assert_eq!(line("quiet -- /init -c x"), "quiet root=/dev/vda ro -- /init -c x");
        assert_eq!(line("-- x"), "root=/dev/vda ro -- x");
        assert_eq!(line("quiet --"), "quiet root=/dev/vda ro --");
        assert_eq!(line("quiet  --  a -- b"), "quiet root=/dev/vda ro --  a -- b");
        assert_eq!(line("a--b --c d-- ---"), "a--b --c d-- --- root=/dev/vda ro", "none of these is alone");
        assert_eq!(line("x=\"a -- b\" y"), "x=\"a -- b\" y root=/dev/vda ro", "quoted");
        assert_eq!(line("x=\"a\" -- \"b"), "x=\"a\" root=/dev/vda ro -- \"b");
    }

    #[test]
    fn the_kernel_gets_what_it_can_read_and_no_more() {
        let fits = "x".repeat(MAX_CMDLINE);
        assert_eq!(build(Some(&fits), None, &[]).unwrap(), fits);
        assert_eq!(build(Some(&(fits.clone() + "x")), None, &[]), Err(Error::TooLong { len: MAX_CMDLINE + 1 }));
        assert!(matches!(build(Some(&fits), None, &devices(1)), Err(Error::TooLong { .. })));
        for (args, position, byte) in [("a\0b", 1, 0), ("ab\n", 2, b'\n'), ("\tq", 0, b'\t'), ("é", 0, 0xC3)] {
            assert_eq!(build(Some(args), None, &[]), Err(Error::NotPrintable { position, byte }));
        }
    }

    proptest! {
        #[test]
        fn every_line_is_printable_and_keeps_its_order(args in "[ -~]{0,80}( -- [ -~]{0,20})?", n in 0usize..19) {
            let line = build(Some(&args), Some(&root(true, None)), &devices(n)).unwrap();
            prop_assert!(line.bytes().all(|b| (b' '..=b'~').contains(&b)));
            let words = |s: &str| s.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect::<Vec<_>>();
            let added = |w: &String| w.starts_with("virtio_mmio.device=") || w == "root=/dev/vda" || w == "ro";
            let (given, mut kept) = (words(&args), words(&line));
            kept.retain(|w| !added(w));
            prop_assert_eq!(kept, given.into_iter().filter(|w| !added(w)).collect::<Vec<_>>());
        }
    }
}
