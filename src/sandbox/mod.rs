//! Confinement of the process by itself, from within: system-call filters ([`seccomp`]) and Landlock ([`landlock`]).
//!
//! Each thread confines itself as its last step before it serves. What the jailer does from without (its own root,
//! namespaces, another user) comes on top; `SECURITY.md` says which layer stops what.

pub mod landlock;
pub mod seccomp;
pub mod syscalls;

use std::convert::Infallible;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use crate::config::{SandboxConfig, SeccompConfig};
use crate::metrics::METRICS;

use self::landlock::{Grants, Landlock};
use self::seccomp::{Filters, ThreadKind};

/// Why the process cannot be confined as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// System-call filters.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// Landlock.
    #[error(transparent)]
    Landlock(#[from] landlock::Error),
}

/// What the process's threads give up. A copy refers to the same.
#[derive(Debug, Clone, Default)]
pub struct Sandbox(Arc<Layers>);

/// None of both is what tests have, and what `--no-seccomp --no-landlock` asks for.
#[derive(Debug, Default)]
struct Layers {
    filters: Option<Filters>,
    landlock: Option<Landlock>,
}

impl Sandbox {
    /// Prepares what is asked for; nothing is given up yet.
    ///
    /// # Errors
    /// The host cannot do it, or a file that is named is not right.
    pub fn new(config: &SandboxConfig) -> Result<Self, Error> {
        let filters = match &config.seccomp {
            SeccompConfig::BuiltIn => Some(Filters::BuiltIn),
            SeccompConfig::File(path) => Some(Filters::load(path)?),
            SeccompConfig::Off => None,
        };
        let landlock = config.landlock.as_ref().map(Landlock::new).transpose()?;
        METRICS.sandbox.landlock_abi.set(landlock.as_ref().map_or(0, |landlock| landlock.abi().into()));
        Ok(Self(Arc::new(Layers { filters, landlock })))
    }

    /// Before there are other threads: what no part of the process needs, save for `needed` and for what is below `proc`.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_process(&self, needed: &Grants, proc: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let Some(landlock) = &self.0.landlock else { return Ok(()) };
        landlock.confine_process(needed, proc)?;
        METRICS.sandbox.landlock_layers.inc();
        Ok(())
    }

    /// On a thread that needs no path, before it serves: all paths, and what the filter does not allow.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_thread(&self, kind: ThreadKind) -> Result<(), Error> {
        if let Some(landlock) = &self.0.landlock {
            landlock.confine_thread()?;
            METRICS.sandbox.landlock_layers.inc();
        }
        self.filter(kind)
    }

    /// On the vmm thread, once the machine is built: paths outside of `grants` are given up, here and by the threads it
    /// starts from now on.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_paths(&self, grants: &Grants) -> Result<(), Error> {
        let Some(landlock) = &self.0.landlock else { return Ok(()) };
        landlock.confine_vmm(grants)?;
        METRICS.sandbox.landlock_layers.inc();
        Ok(())
    }

    /// Puts the calling thread under its filter. What it starts afterwards is under the same.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn filter(&self, kind: ThreadKind) -> Result<(), Error> {
        let Some(filters) = &self.0.filters else { return Ok(()) };
        filters.install(kind)?;
        METRICS.sandbox.seccomp_filters.inc();
        Ok(())
    }
}

/// Threads that have still to confine themselves.
#[derive(Debug)]
pub struct Confining {
    held: Option<Sender<Infallible>>,
    dropped: Receiver<Infallible>,
}

impl Default for Confining {
    fn default() -> Self {
        let (held, dropped) = mpsc::channel();
        Self { held: Some(held), dropped }
    }
}

impl Confining {
    /// What another thread drops when it is confined.
    pub fn thread(&self) -> impl Send + use<> {
        self.held.clone()
    }

    /// Returns when all are confined, or gone.
    pub fn wait(&mut self) {
        self.held = None;
        let _ = self.dropped.recv();
    }
}

/// What is in force, for the log.
impl fmt::Display for Sandbox {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.landlock {
            Some(landlock) => write!(formatter, "Landlock ABI {}", landlock.abi())?,
            None => formatter.write_str("no Landlock")?,
        }
        formatter.write_str(match &self.0.filters {
            Some(Filters::BuiltIn) => ", system-call filters",
            Some(Filters::Loaded(_)) => ", system-call filters from a file",
            None => ", no system-call filters",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_waited_for_until_the_last_is_confined_or_gone() {
        let mut confining = Confining::default();
        let (confined, late) = (confining.thread(), confining.thread());
        let (waiting, began) = mpsc::channel();
        let (told, done) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            waiting.send(()).unwrap();
            confining.wait();
            told.send(()).unwrap();
        });
        began.recv().unwrap();
        drop(confined);
        assert_eq!(done.recv_timeout(std::time::Duration::from_millis(50)), Err(mpsc::RecvTimeoutError::Timeout));
        drop(late);
        done.recv().unwrap();
        waiter.join().unwrap();
    }
}
