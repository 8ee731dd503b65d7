//! A VMM process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal};

use crate::{Client, scratch};

/// A running VMM process with an API socket. It is killed when this is dropped.
#[derive(Debug)]
pub struct Vesicle {
    child: Child,
    process: Arc<OwnedFd>,
    api: Client,
    _dir: tempfile::TempDir,
}

impl Vesicle {
    /// Starts `command`, a `vesicle` with its arguments and streams, and hands it a socket that listens already: the
    /// first request may be sent at once, and waits in the socket until it is served. Should this process die, the VMM
    /// gets SIGTERM (from the thread's end on, if the thread that calls this ends first).
    ///
    /// # Errors
    /// If the process or its socket cannot be made.
    pub fn spawn(mut command: Command) -> io::Result<Self> {
        let dir = scratch::directory("vesicle-", &std::env::temp_dir())?;
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket)?;
        let inherited = listener.as_raw_fd();
        command.arg("--api-sock").arg(format!("fd:{inherited}"));
        let prepare = move || {
            // SAFETY: the descriptor is open: `listener` lives until after the spawn.
            let listener = unsafe { BorrowedFd::borrow_raw(inherited) };
            fcntl_setfd(listener, FdFlags::empty())?;
            set_parent_process_death_signal(Some(Signal::TERM))?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure only makes two system calls, without allocation or locks.
        unsafe { command.pre_exec(prepare) };
        let mut child = command.spawn()?;
        let process = open_process(&child).inspect_err(|_| drop(child.kill()))?;
        Ok(Self { child, process: Arc::new(process), api: Client::new(socket), _dir: dir })
    }

    /// The client of its API socket.
    pub fn api(&self) -> &Client {
        &self.api
    }

    /// The process itself, for its streams and its id.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it signals, from any thread and without ever hitting another process.
    pub fn signaller(&self) -> Signaller {
        Signaller(Arc::clone(&self.process))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If waiting fails.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Waits for its end, `timeout` at most; `None` if it still runs then.
    ///
    /// # Errors
    /// If waiting fails.
    pub fn wait_timeout(&mut self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut ended = [PollFd::new(&*self.process, PollFlags::IN)];
        while let Err(error) = poll(&mut ended, Some(&timeout)) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        self.child.try_wait()
    }
}

impl Drop for Vesicle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open_process(child: &Child) -> io::Result<OwnedFd> {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pidfd_open(id, PidfdFlags::empty())?)
}

/// Sends signals to one VMM process.
#[derive(Debug, Clone)]
pub struct Signaller(Arc<OwnedFd>);

impl Signaller {
    /// Asks it to end (SIGTERM). A process that has ended is not an error.
    pub fn terminate(&self) {
        let _ = pidfd_send_signal(&*self.0, Signal::TERM);
    }

    /// The same, as a terminal asks for it (SIGINT).
    pub fn interrupt(&self) {
        let _ = pidfd_send_signal(&*self.0, Signal::INT);
    }

    /// Ends it (SIGKILL). A process that has ended is not an error.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&*self.0, Signal::KILL);
    }
}
