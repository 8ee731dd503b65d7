//! Guest memory that another process serves, page fault by page fault (userfaultfd(2)).
//!
//! The handler listens on a Unix socket. It is sent one message, a JSON array of [`Mapping`]s with the userfaultfd as
//! ancillary data (SCM_RIGHTS), and keeps the connection open for as long as it serves: its end is taken for the
//! handler's.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::{GuestRam, Slot};
use crate::os::{checked, poll, retried};

/// Why no handler serves guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host does not let this user.
    #[error("cannot create a userfaultfd: give this user /dev/userfaultfd, or set vm.unprivileged_userfaultfd")]
    Create(#[source] io::Error),
    /// A call failed.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// A piece of guest memory, as the handler is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Where it begins in this process.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the memory file.
    pub offset: u64,
    /// Bytes that a page fault is about.
    pub page_size: u64,
    /// The same, in bytes as well, for older handlers.
    pub page_size_kib: u64,
}

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32);

/// A handler that serves page faults, and its userfaultfd: held on to, since without it missing pages would be zero.
#[derive(Debug)]
pub struct Handler {
    stream: UnixStream,
    _faults: OwnedFd,
}

impl Handler {
    /// Has the handler that listens at `path` serve all of `ram`, which nobody has touched.
    ///
    /// # Errors
    /// There is none, or the host has no userfaultfd for this user.
    pub fn connect(path: &Path, ram: &GuestRam) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).map_err(|source| Error::Io("connect to it", source))?;
        let faults = create().map_err(Error::Create)?;
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one `Api`.
        check(unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_API, &raw mut api) }, "set up the userfaultfd")?;
        let (mut mappings, mut offset, page_size) = (Vec::new(), 0, ram.page_size());
        for Slot { host, size, .. } in ram.slots() {
            let mut register = Register { start: host, len: size, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the ioctl reads and writes one `Register`; the range is a mapping of guest RAM, whose pages
            // no Rust reference points into.
            let done = unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
            check(done, "register guest memory with the userfaultfd")?;
            mappings.push(Mapping { base_host_virt_addr: host, size, offset, page_size, page_size_kib: page_size });
            offset += size;
        }
        let told = serde_json::to_vec(&mappings).map_err(|error| Error::Io("describe guest memory", error.into()))?;
        let sent = stream.send_with_fd(&told[..], faults.as_raw_fd());
        match sent.map_err(|error| Error::Io("tell it", error.into()))? {
            count if count == told.len() => Ok(Self { stream, _faults: faults }),
            _ => Err(Error::Io("tell it all", io::ErrorKind::WriteZero.into())),
        }
    }

    /// Waits until the handler has gone.
    pub fn wait(&self) {
        let _ = retried(|| poll(self.stream.as_raw_fd(), libc::POLLRDHUP, -1));
    }
}

/// Sleeps, with a system call that waiting makes as well.
pub fn sleep(duration: Duration) {
    let _ = poll(-1, 0, duration.as_millis() as libc::c_int);
}

/// A userfaultfd for faults of this process and of the kernel on its behalf: KVM's are such.
fn create() -> io::Result<OwnedFd> {
    const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the ioctl takes flags, and makes a descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) },
        // SAFETY: the call takes flags, and makes a descriptor.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) as RawFd },
    };
    checked(fd)?;
    // SAFETY: the descriptor was just made, for this alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(done: libc::c_int, what: &'static str) -> Result<(), Error> {
    checked(done).map(drop).map_err(|source| Error::Io(what, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ours shares the type with the VMM, and would not notice.
    #[test]
    fn a_handler_that_others_wrote_finds_the_names_it_looks_for() {
        let mapping = Mapping { base_host_virt_addr: 1, size: 2, offset: 3, page_size: 4096, page_size_kib: 4096 };
        let told = r#"[{"base_host_virt_addr":1,"size":2,"offset":3,"page_size":4096,"page_size_kib":4096}]"#;
        assert_eq!(serde_json::to_string(&[mapping]).unwrap(), told);
    }
}
