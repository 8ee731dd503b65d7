//! Unix sockets that appear in the file system when they listen, without a moment in which a client could find them
//! deaf: the API's and vsock's.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::random;

/// Longest path of a socket in bytes (`sun_path` without the terminating NUL, unix(7)).
const MAX_PATH: usize = 107;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// What happens to a socket that exists already and that nobody listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced.
    Replaced,
    /// It is refused like anything else that exists.
    Refused,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel could not hold the path.
    #[error("the socket path {path} is {length} bytes long; at most {MAX_PATH} are possible")]
    PathTooLong {
        /// The path, or the temporary one beside it.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// Something else lives there.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// Something lives there, which is not replaced.
    #[error("{0} exists; remove it or choose another path")]
    Exists(PathBuf),
    /// Another process serves it.
    #[error("{0} is in use by another process; stop it or choose another path")]
    InUse(PathBuf),
    /// A system call failed.
    #[error("cannot {what} the socket {path}")]
    System {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// `fd:N` is no listening Unix stream socket.
    #[error("descriptor {0} is not a listening Unix stream socket")]
    BadDescriptor(RawFd),
}

/// The socket's file; removed on drop if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Whether the path still leads to our socket.
    pub fn is_ours(&self) -> bool {
        let ours = |found: fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        fs::metadata(&self.path).is_ok_and(ours)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours() {
            // Nobody is left to be told.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket at `path`, mode 0600. It appears there once it listens; `existing` says what becomes of a
/// socket that nobody listens on any more.
///
/// # Errors
/// The path is too long, in use, or no socket; or a system call failed.
pub fn bind(path: &Path, existing: Existing) -> Result<(UnixListener, SocketFile), SocketError> {
    let system = |what| move |source| SocketError::System { what, path: path.to_owned(), source };
    let final_address = address(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(system("create"))?;
    // Linux takes the mode of the file to be from the socket (unix(7)): there is no moment in which
    // it is open to others, and no umask, which all threads share, to change.
    let file = fs::File::from(OwnedFd::from(socket));
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(system("restrict"))?;
    let socket = Socket::from(OwnedFd::from(file));
    let temporary = bind_beside(&socket, path)?;
    let failed = system("publish");
    let publish = || {
        socket.listen(BACKLOG).map_err(failed)?;
        let metadata = fs::symlink_metadata(&temporary).map_err(failed)?;
        match existing {
            Existing::Replaced => {
                check_vacant(path, &final_address)?;
                fs::rename(&temporary, path).map_err(failed)?;
            }
            // Unlike a rename it fails where there is something.
            Existing::Refused => {
                fs::hard_link(&temporary, path).map_err(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => SocketError::Exists(path.to_owned()),
                    _ => failed(error),
                })?;
                fs::remove_file(&temporary).map_err(failed)?;
            }
        }
        Ok(SocketFile { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    };
    let file = publish().inspect_err(|_| _ = fs::remove_file(&temporary))?;
    Ok((OwnedFd::from(socket).into(), file))
}

/// Binds under a name nobody else has, in the same directory; returns it. Who has one may be a process of another
/// container, and even of the same id.
fn bind_beside(socket: &Socket, path: &Path) -> Result<PathBuf, SocketError> {
    let failed = |source| SocketError::System { what: "bind", path: path.to_owned(), source };
    loop {
        let [a, b, c, ..] = random::bytes().map_err(failed)?;
        let temporary = path.with_file_name(format!(".{a:02x}{b:02x}{c:02x}"));
        match socket.bind(&address(&temporary)?) {
            Ok(()) => return Ok(temporary),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

fn address(path: &Path) -> Result<SockAddr, SocketError> {
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_PATH {
        return Err(SocketError::PathTooLong { path: path.to_owned(), length });
    }
    SockAddr::unix(path).map_err(|source| SocketError::System { what: "name", path: path.to_owned(), source })
}

/// Whether the path is free, or holds a socket that nobody listens on.
fn check_vacant(path: &Path, address: &SockAddr) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        // Connecting says more than an error here could.
        _ => {}
    }
    let system = |source| SocketError::System { what: "probe", path: path.to_owned(), source };
    // Non-blocking: a live one with a full backlog would make it wait.
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(system)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Ok(()) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse(path.to_owned())),
        Err(error) => Err(system(error)),
    }
}

/// Takes over a listening socket that the launcher passed in as descriptor `fd`.
///
/// # Errors
/// It is not a listening Unix stream socket.
///
/// # Safety
/// Nothing else in this process uses or closes `fd`.
pub unsafe fn adopt(fd: RawFd) -> Result<UnixListener, SocketError> {
    let bad = |_| SocketError::BadDescriptor(fd);
    // SAFETY: `fcntl` only looks the number up; it fails for one that is not open.
    if fd <= libc::STDERR_FILENO || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(SocketError::BadDescriptor(fd));
    }
    // SAFETY: the descriptor is open, as just seen, and by the caller's promise nobody else's.
    let socket = unsafe { Socket::from_raw_fd(fd) };
    let listens = socket.is_listener().map_err(bad)? && socket.domain().map_err(bad)? == Domain::UNIX;
    if !listens || socket.r#type().map_err(bad)? != Type::STREAM {
        return Err(SocketError::BadDescriptor(fd));
    }
    socket.set_cloexec(true).map_err(bad)?;
    socket.set_nonblocking(true).map_err(bad)?;
    Ok(OwnedFd::from(socket).into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn the_socket_listens_when_it_appears_and_goes_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (listener, file) = bind(&path, Existing::Replaced).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn a_process_of_the_same_id_in_another_container_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join(format!(".{}", std::process::id()));
        let listener = UnixListener::bind(&other).unwrap();
        let _ours = bind(&dir.path().join("api.sock"), Existing::Replaced).unwrap();
        UnixStream::connect(&other).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, file) = bind(&path, Existing::Replaced).unwrap();
        assert!(matches!(bind(&path, Existing::Replaced), Err(SocketError::InUse(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
        drop(file);
    }

    #[test]
    fn what_must_not_be_replaced_is_refused_whatever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        let refused = bind(&path, Existing::Refused).unwrap_err();
        assert!(matches!(refused, SocketError::Exists(_)) && refused.to_string().contains("v.sock"), "{refused}");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &path).unwrap();
        assert!(matches!(bind(&path, Existing::Refused), Err(SocketError::Exists(_))));
        fs::remove_file(&path).unwrap();
        let (_listener, file) = bind(&path, Existing::Refused).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
        assert!(file.is_ours());
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_with_a_full_backlog_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let live = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        live.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        live.listen(0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path, Existing::Replaced), Err(SocketError::InUse(_))));
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert!(matches!(bind(path, Existing::Replaced), Err(SocketError::NotASocket(_))), "{path:?}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        let datagram = dir.path().join("datagram");
        let _other = UnixDatagram::bind(&datagram).unwrap();
        assert!(matches!(bind(&datagram, Existing::Replaced), Err(SocketError::System { what: "probe", .. })));
    }

    #[test]
    fn a_path_too_long_or_in_no_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let fitting = MAX_PATH - dir.path().as_os_str().len() - 1;
        drop(bind(&dir.path().join("x".repeat(fitting)), Existing::Replaced).unwrap());
        let long = bind(&dir.path().join("x".repeat(fitting + 1)), Existing::Replaced).unwrap_err();
        assert!(matches!(long, SocketError::PathTooLong { length: 108, .. }), "{long}");
        let nowhere = bind(&dir.path().join("missing/api.sock"), Existing::Replaced).unwrap_err();
        assert!(matches!(nowhere, SocketError::System { what: "bind", .. }), "{nowhere}");
    }

    #[test]
    fn a_successor_at_the_same_path_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (listener, file) = bind(&path, Existing::Replaced).unwrap();
        drop(listener);
        let successor = bind(&path, Existing::Replaced).unwrap();
        drop(file);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }

    #[test]
    fn a_passed_descriptor_must_be_a_listening_unix_stream_socket() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("a")).unwrap();
        let datagram = UnixDatagram::bind(dir.path().join("b")).unwrap();
        let unconnected = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let file = tempfile::tempfile().unwrap();
        for bad in [datagram.into_raw_fd(), unconnected.into_raw_fd(), internet.into_raw_fd(), file.into_raw_fd(), -1] {
            // SAFETY: the descriptor was just given up by its owner, or is no descriptor.
            assert!(matches!(unsafe { adopt(bad) }, Err(SocketError::BadDescriptor(_))));
        }
        // SAFETY: the descriptor was just given up by its owner.
        let adopted = unsafe { adopt(listener.into_raw_fd()) }.unwrap();
        UnixStream::connect(dir.path().join("a")).unwrap();
        adopted.accept().unwrap();
        // A number no test will ever reach.
        // SAFETY: nobody uses it.
        assert!(unsafe { adopt(1 << 20) }.is_err());
    }
}
