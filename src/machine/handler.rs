//! A thread that waits for the end of who serves guest memory: without that, whoever touches a page that is not there
//! waits for ever, the vmm thread too.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::shell::Shell;
use super::snapshot::SnapshotError;
use super::{Error, chain};
use crate::sandbox::Sandbox;
use crate::sandbox::seccomp::ThreadKind;
use crate::snapshot::uffd::{self, Handler};

/// Why the process ends without its handler.
pub const GONE: &str = "the page fault handler is gone, and with it the guest memory that was not loaded yet";
/// What the vmm thread has to end in good order, unless it waits for such memory itself.
const GRACE: Duration = Duration::from_secs(2);
/// The thread makes system calls, and writes a line to the log.
const STACK_SIZE: usize = 64 << 10;

/// Has the handler at `path` serve the shell's RAM; what is returned is signalled when it is gone.
pub fn attach(path: &Path, shell: &mut Shell, sandbox: Sandbox) -> Result<Arc<EventFd>, Error> {
    let handler = Handler::connect(path, &shell.ram);
    let handler = handler.map_err(SnapshotError::unusable("the page fault handler at", path))?;
    shell.ram.set_served();
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let gone = Arc::new(event.map_err(|source| Error::Event("create an eventfd", source))?);
    let (signal, confining) = (Arc::clone(&gone), shell.confining.thread());
    let watch = move || {
        if let Err(error) = sandbox.confine_thread(ThreadKind::Memory) {
            ::log::error!("The page fault handler cannot be watched: {}.", chain(&error));
            end();
        }
        drop(confining);
        handler.wait();
        ::log::error!("The microVM has to end: {GONE}.");
        let _ = signal.write(1);
        uffd::sleep(GRACE);
        end();
    };
    let thread = std::thread::Builder::new().name("memory".into()).stack_size(STACK_SIZE).spawn(watch);
    thread.map_err(|source| Error::Event("start the thread for the page fault handler", source))?;
    Ok(gone)
}

/// Ends the process, whatever its threads wait for.
fn end() -> ! {
    // SAFETY: the call does not return.
    unsafe { libc::_exit(1) }
}
