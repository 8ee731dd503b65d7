//! System-call filters, one per kind of thread.
//!
//! They come from `resources/seccomp/x86_64.json`, which has a reason beside every rule, and are compiled when Vesicle
//! is built. What a filter does not allow ends the process (see [`crate::signals`]): there is no call that one of our
//! threads makes and that the filter refuses, so whoever makes one is not us any more.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use seccompiler::{BpfMap, TargetArch, apply_filter, compile_from_json, sock_filter};

include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// In a filter this stands for the id of the process, which is known only when the filter is installed. No process has it
/// (PID_MAX_LIMIT in linux/threads.h is 2^22).
const THIS_PROCESS: u32 = i32::MAX as u32;
/// A comparison with a number (linux/bpf_common.h).
const JUMP_EQUAL: u16 = 0x15;

/// Largest file that is read as a filter, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// What a thread does, and so which system calls it makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves the API.
    Api,
    /// Runs the event loop and does device I/O.
    Vmm,
    /// Runs guest code.
    Vcpu,
    /// Populates guest memory, or waits for the end of who serves it.
    Memory,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Api, Self::Vmm, Self::Vcpu, Self::Memory];

    /// Its name in the filters' file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Vmm => "vmm",
            Self::Vcpu => "vcpu",
            Self::Memory => "memory",
        }
    }
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file of `--seccomp-filter`.
    #[error("the system-call filters in {path:?} cannot be read")]
    Read {
        /// Where.
        path: PathBuf,
        /// The errno.
        #[source]
        source: std::io::Error,
    },
    /// What is in it.
    #[error("the system-call filters in {path:?} are not well-formed")]
    Compile {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<seccompiler::Error>,
    },
    /// A kind of thread that it leaves out.
    #[error("{path:?} has no filter for the threads called {thread:?}")]
    Missing {
        /// Where.
        path: PathBuf,
        /// Which kind.
        thread: &'static str,
    },
    /// The kernel refuses the filter.
    #[error("the system-call filter of the {thread} thread cannot be installed")]
    Install {
        /// Which kind.
        thread: &'static str,
        /// Why.
        #[source]
        source: Box<seccompiler::Error>,
    },
}

/// A filter for each kind of thread.
#[derive(Debug)]
pub enum Filters {
    /// The ones that were built in.
    BuiltIn,
    /// From a file in the same format.
    Loaded(BpfMap),
}

impl Filters {
    /// Reads and compiles a file.
    ///
    /// # Errors
    /// It cannot be read, is not well-formed, or leaves out a kind of thread.
    #[cold]
    pub fn load(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let programs = compile_from_json(file.take(MAX_FILE), TargetArch::x86_64)
            .map_err(|source| Error::Compile { path: path.to_owned(), source: Box::new(source) })?;
        for kind in ThreadKind::ALL {
            if !programs.contains_key(kind.name()) {
                return Err(Error::Missing { path: path.to_owned(), thread: kind.name() });
            }
        }
        Ok(Self::Loaded(programs))
    }

    /// Puts the calling thread, and those it starts from now on, under the filter of `kind`, for good. It also gives up
    /// ever gaining privileges by executing a program.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn install(&self, kind: ThreadKind) -> Result<(), Error> {
        let mut program = self.program(kind).to_vec();
        for statement in program.iter_mut().filter(|it| it.code == JUMP_EQUAL && it.k == THIS_PROCESS) {
            statement.k = std::process::id();
        }
        apply_filter(&program).map_err(|source| Error::Install { thread: kind.name(), source: Box::new(source) })
    }

    fn program(&self, kind: ThreadKind) -> &[sock_filter] {
        match (self, kind) {
            (Self::BuiltIn, ThreadKind::Api) => &API,
            (Self::BuiltIn, ThreadKind::Vmm) => &VMM,
            (Self::BuiltIn, ThreadKind::Vcpu) => &VCPU,
            (Self::BuiltIn, ThreadKind::Memory) => &MEMORY,
            // `load` has seen to it that there is one; an empty one would be refused.
            (Self::Loaded(programs), kind) => programs.get(kind.name()).map_or(&[], Vec::as_slice),
        }
    }
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
