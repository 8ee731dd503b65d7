//! A TAP: the host's end of an Ethernet cable (Documentation/networking/tuntap.rst of Linux).
//!
//! Every frame has the header of virtio-net in front (`IFF_VNET_HDR`), in the 12 bytes that
//! virtio 1.2 §5.1.6 gives it, so that checksums and segmentation are passed on as they are.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use libc::{Ioctl, c_int, c_uint, c_ulong, ifreq, iovec};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::HEADER_SIZE;
use crate::os::checked;

/// UDP segmentation offload, of both versions of IP.
const USO: c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why there is no TAP.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name does not fit.
    #[error("{0:?} is no name of an interface")]
    Name(String),
    /// The kernel has no TAPs, or none for us.
    #[error("cannot open /dev/net/tun")]
    Open(#[source] io::Error),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A descriptor of something else.
    #[error("it is not the descriptor of a TAP")]
    NotATap(#[source] io::Error),
    /// A TUN, or a TAP with other framing.
    #[error("it was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Framing,
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// An open TAP, which never blocks.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// The host segments UDP.
    uso: bool,
}

impl Tap {
    /// Opens the TAP `name`; it is made if there is none and we may.
    ///
    /// # Errors
    ///
    /// [`Error`]: there is none and we must not, it is in use, or it is another kind of interface.
    pub fn open(name: &str) -> Result<Self, Error> {
        let name = CString::new(name).map_err(|_| Error::Name(name.to_owned()))?;
        let file = open_with(&name, FLAGS)?;
        Self::set_up(file)
    }

    /// The TAP behind `fd`, which somebody else opened.
    ///
    /// # Errors
    ///
    /// [`Error`] if it is none, or has other framing.
    pub fn adopt(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        let mut request = no_request();
        ioctl(&fd, libc::TUNGETIFF, &mut request).map_err(Error::NotATap)?;
        // SAFETY: the kernel has filled in the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & (FLAGS | libc::IFF_TUN) != FLAGS {
            return Err(Error::Framing);
        }
        // SAFETY: F_GETFL and F_SETFL take and give flags, of a descriptor that is open.
        let set = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            checked(flags).and_then(|_| checked(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)))
        };
        set.map_err(system("cannot set O_NONBLOCK"))?;
        let own = fd.try_clone_to_owned().map_err(system("cannot duplicate the descriptor"))?;
        Self::set_up(File::from(own))
    }

    fn set_up(file: File) -> Result<Self, Error> {
        let mut size = HEADER_SIZE as c_int;
        ioctl(&file, libc::TUNSETVNETHDRSZ, &mut size).map_err(system("cannot set the size of its header"))?;
        let uso = offload(&file, libc::TUN_F_CSUM | USO).is_ok();
        offload(&file, 0).map_err(system("cannot set its offloads"))?;
        Ok(Self { file, uso })
    }

    /// Another descriptor of the same TAP.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, uso: self.uso })
    }

    /// Whether the host segments UDP (Linux 6.2).
    pub fn has_uso(&self) -> bool {
        self.uso
    }

    /// Has the host leave to the guest what the guest, by its `features`, can do itself.
    ///
    /// # Errors
    ///
    /// The interface is gone.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let accepted = |bits: &[u32]| bits.iter().all(|bit| features & 1 << bit != 0);
        let mut offloads = 0;
        // The host wants both versions of UDP segmentation or none, and nothing without checksums.
        for (bits, flags) in [
            (&[VIRTIO_NET_F_GUEST_CSUM][..], libc::TUN_F_CSUM),
            (&[VIRTIO_NET_F_GUEST_TSO4], libc::TUN_F_TSO4),
            (&[VIRTIO_NET_F_GUEST_TSO6], libc::TUN_F_TSO6),
            (&[VIRTIO_NET_F_GUEST_UFO], libc::TUN_F_UFO),
            (&[VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6], USO),
        ] {
            if accepted(&[VIRTIO_NET_F_GUEST_CSUM]) && accepted(bits) {
                offloads |= flags;
            }
        }
        offload(&self.file, offloads)
    }

    /// Reads a frame. `WouldBlock` if there is none.
    ///
    /// # Safety
    ///
    /// The buffers are memory that stays mapped for the call and that anybody may write to: guest
    /// RAM, or memory that the caller alone uses.
    pub unsafe fn read(&self, buffers: &[iovec]) -> io::Result<usize> {
        // SAFETY: the list is valid for reading, the buffers for writing, by this function's contract.
        checked(unsafe { libc::readv(self.file.as_raw_fd(), buffers.as_ptr(), buffers.len() as c_int) })
    }

    /// Writes a frame.
    ///
    /// # Safety
    ///
    /// The buffers are memory that stays mapped for the call.
    pub unsafe fn write(&self, buffers: &[iovec]) -> io::Result<usize> {
        // SAFETY: the list and the buffers are valid for reading, by this function's contract.
        checked(unsafe { libc::writev(self.file.as_raw_fd(), buffers.as_ptr(), buffers.len() as c_int) })
    }
}

#[cfg(any(test, fuzzing))]
impl Tap {
    /// What is no TAP at all.
    pub fn of_file(file: File) -> Self {
        Self { file, uso: true }
    }

    /// As on a host before Linux 6.2.
    pub fn without_uso(&mut self) {
        self.uso = false;
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Attaches to the interface `name`, which is of the kind that `flags` say.
pub(super) fn open_with(name: &CStr, flags: c_int) -> Result<File, Error> {
    let mut request = no_request();
    if name.to_bytes_with_nul().len() > request.ifr_name.len() {
        return Err(Error::Name(name.to_string_lossy().into_owned()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = from.cast_signed();
    }
    // They fit 16 bits.
    request.ifr_ifru.ifru_flags = flags as i16;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(Error::Open)?;
    ioctl(&file, libc::TUNSETIFF, &mut request).map_err(system("cannot attach to the interface"))?;
    Ok(file)
}

fn no_request() -> ifreq {
    // SAFETY: an ifreq is numbers and pointers, for all of which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// An ioctl of a TAP that reads or writes `argument`.
fn ioctl<T>(fd: &impl AsRawFd, request: Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every request made here is one of /dev/net/tun, which takes a pointer to an ifreq or
    // an int, as `T` is; on any other descriptor it is an error.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(argument)) }).map(drop)
}

fn offload(file: &File, flags: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) }).map(drop)
}
