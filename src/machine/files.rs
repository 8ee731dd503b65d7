//! Opening what the configuration names, when it is named: a bad path is refused at once, and the
//! file that is used later is the one that was checked.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Error;
use crate::boot::kernel;
use crate::config::{BootSource, DriveConfig, HostDevice, NetConfig, OverlayConfig, VmConfig};
use crate::devices::virtio::block::{Backend, OverlayFiles};
use crate::devices::virtio::net::Tap;
use crate::os::checked;
use crate::sandbox::Sandbox;
use crate::sandbox::landlock::{Grants, restricts_paths};

/// What the process was started with, for as long as it takes to build a machine.
#[derive(Debug, Default)]
pub struct Host {
    /// `/dev/kvm`, if the launcher passed it in.
    pub kvm: Option<OwnedFd>,
    /// `/proc/self`, if the launcher passed it in.
    pub proc: Option<OwnedFd>,
    /// What else it passed in, under its own number: a configuration may name it.
    pub passed: Vec<OwnedFd>,
    /// The API's socket, if it is to be removed at the end.
    pub api_socket: Option<PathBuf>,
    /// What its threads give up.
    pub sandbox: Sandbox,
}

/// The opened files of a configuration.
#[derive(Debug, Default)]
pub struct Files {
    /// Kernel image.
    pub kernel: Option<File>,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Destination of the serial port.
    pub serial: Option<File>,
    drives: HashMap<String, Backend>,
    interfaces: HashMap<String, (HostDevice, Tap)>,
}

impl Files {
    /// Opens kernel and initrd; keeps what there was if either cannot be used.
    pub fn set_boot_source(&mut self, source: &BootSource) -> Result<(), Error> {
        let image = open_image("kernel_image_path", &source.kernel_image_path)?;
        kernel::inspect(&image)
            .map_err(|error| Error::Kernel { path: source.kernel_image_path.clone(), source: error })?;
        let initrd = source.initrd_path.as_deref().map(|path| open_image("initrd_path", path)).transpose()?;
        (self.kernel, self.initrd) = (Some(image), initrd);
        Ok(())
    }

    /// Opens the files of a drive.
    pub fn set_drive(&mut self, drive: &DriveConfig) -> Result<(), Error> {
        let file = open_drive(&drive.path_on_host, drive.is_read_only || drive.overlay.is_some())?;
        let overlay = drive.overlay.as_ref().map(open_overlay).transpose()?;
        self.drives.insert(drive.drive_id.clone(), Backend { file, overlay });
        Ok(())
    }

    /// Descriptors of its own for the device of drive `id`: a start that fails can be tried again.
    pub fn drive(&self, id: &str) -> Option<io::Result<Backend>> {
        self.drives.get(id).map(Backend::try_clone)
    }

    /// Opens the TAP of an interface, or takes one that was `passed` in. One that it has already is kept: a TAP opens
    /// once.
    pub fn set_interface(&mut self, interface: &NetConfig, passed: &[OwnedFd]) -> Result<(), Error> {
        let id = &interface.iface_id;
        if self.interfaces.get(id).is_some_and(|(device, _)| *device == interface.host_device) {
            return Ok(());
        }
        let fail = |source| Error::Tap { id: id.clone(), device: interface.host_device.to_string(), source };
        let tap = match &interface.host_device {
            HostDevice::Named(name) => Tap::open(name).map_err(fail)?,
            HostDevice::Passed(fd) => {
                let user = self.interfaces.iter().find(|(_, (device, _))| *device == interface.host_device);
                if let Some((other, _)) = user {
                    return Err(Error::DescriptorInUse { id: id.clone(), fd: *fd, other: other.clone() });
                }
                let passed = passed.iter().find(|passed| passed.as_raw_fd() == *fd);
                let passed = passed.ok_or_else(|| Error::Undeclared { id: id.clone(), fd: *fd })?;
                Tap::adopt(passed.as_fd()).map_err(fail)?
            }
        };
        self.interfaces.insert(id.clone(), (interface.host_device.clone(), tap));
        Ok(())
    }

    /// A descriptor of its own for the device of interface `id`.
    pub fn tap(&self, id: &str) -> Option<io::Result<Tap>> {
        self.interfaces.get(id).map(|(_, tap)| tap.try_clone())
    }

    /// Opens where the serial port writes to: a file, made if missing, or a FIFO with a reader.
    pub fn set_serial(&mut self, path: Option<&Path>) -> Result<(), Error> {
        let open = |path: &Path| {
            let file = crate::log::open_append(path);
            file.map_err(|source| Error::Open { what: "serial_out_path", path: path.to_owned(), source })
        };
        self.serial = path.map(open).transpose()?;
        Ok(())
    }
}

/// What stays in reach once the machine runs: the directories of drives, where another file may take the place of the one
/// there is, and of vsock, where host processes listen; and those of the `snapshot` that was loaded. A snapshot may be put
/// beside that, or where a drive is written.
pub fn grants(config: &VmConfig, snapshot: &[&Path]) -> Grants {
    let mut grants = Grants::default();
    for file in snapshot {
        grants.siblings(file, true);
    }
    for drive in &config.drives {
        grants.siblings(&drive.path_on_host, !drive.is_read_only && drive.overlay.is_none());
    }
    if let Some(vsock) = &config.vsock {
        grants.socket(&vsock.uds_path);
    }
    grants
}

/// Opens a drive's backing file: raw, never probed, a regular file or a block device.
pub fn open_drive(path: &Path, read_only: bool) -> Result<File, Error> {
    open(OpenOptions::new().read(true).write(!read_only), "path_on_host", path, true)
}

/// Opens what takes a drive's writes, and what a snapshot's guest wrote.
fn open_overlay(overlay: &OverlayConfig) -> Result<OverlayFiles, Error> {
    let (upper, lasting) = match &overlay.layer_path {
        Some(path) => {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            (open(&mut options, "layer_path", path, false)?, Some(open_image("layer_path", path)?))
        }
        None => (temporary_file()?, None),
    };
    let lower =
        overlay.lower.as_ref().map(|(path, id)| Ok::<_, Error>((open_image("layer", path)?, *id))).transpose()?;
    Ok(OverlayFiles { upper, lasting, fresh: overlay.fresh, lower })
}

/// A file without a name in the directory for temporary files or, where there is none, as in many a
/// jail, in the working directory.
fn temporary_file() -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    let directory = std::env::temp_dir();
    match options.open(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => options.open("."),
        result => result,
    }
    .map_err(|source| unopened("a temporary file for an overlay in", &directory, source))
}

/// Opens an image to be read: a regular file.
pub fn open_image(what: &'static str, path: &Path) -> Result<File, Error> {
    open(OpenOptions::new().read(true), what, path, false)
}

/// Opens a regular file, or a block device if that will do as well.
fn open(options: &mut OpenOptions, what: &'static str, path: &Path, or_device: bool) -> Result<File, Error> {
    let fail = |source| unopened(what, path, source);
    // Without O_NONBLOCK a FIFO would hold up the vmm thread.
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map_err(fail)?;
    let kind = file.metadata().map_err(fail)?.file_type();
    if kind.is_file() || or_device && kind.is_block_device() {
        // io_uring heeds the flag on any file: where the file system or the disk below cannot tell whether it would
        // wait, every request would end with EAGAIN.
        // SAFETY: the call takes no memory.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) }).map_err(fail)?;
        return Ok(file);
    }
    let wanted = if or_device { "it must be a regular file or a block device" } else { "it must be a regular file" };
    Err(Error::Kind { what, path: path.to_owned(), wanted })
}

fn unopened(what: &'static str, path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied if restricts_paths() => {
            Error::OutOfReach { what, path: path.to_owned(), source }
        }
        _ => Error::Open { what, path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// io_uring would take the flag for a wish not to wait for the disk.
    #[test]
    fn what_a_drive_works_on_waits_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        std::fs::write(&base, [0; 512]).unwrap();
        let overlay = |layer_path| OverlayConfig { layer_path, fresh: false, lower: Some((base.clone(), [0; 16])) };
        let mut files = vec![open_drive(&base, true).unwrap(), open_drive(&base, false).unwrap()];
        for layer_path in [None, Some(dir.path().join("layer"))] {
            let overlay = open_overlay(&overlay(layer_path)).unwrap();
            files.extend([overlay.upper, overlay.lower.unwrap().0].into_iter().chain(overlay.lasting));
        }
        for file in &files {
            // SAFETY: the call takes no memory.
            let flags = checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) }).unwrap();
            assert_eq!(flags as i32 & libc::O_NONBLOCK, 0, "{file:?}");
        }
    }
}
