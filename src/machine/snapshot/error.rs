//! What can be wrong with a snapshot.

use std::error::Error;
use std::path::{Path, PathBuf};

/// What a memory file is called where it cannot be used.
pub(super) const MEMORY_FILE: &str = "the memory file";

/// Why a snapshot cannot be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state file, the memory file or the working set is none, or another snapshot's, or cannot be written; or
    /// nobody serves guest memory.
    #[error("{what} {path:?} cannot be used")]
    Unusable {
        /// Which of them.
        what: &'static str,
        /// The file, or the socket.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A page that was given up would come back as whatever the handler thinks.
    #[error(
        "guest memory comes from a page fault handler, which is not asked twice for a page: load the snapshot into \
         another process"
    )]
    Served,
    /// A file cannot be read or written.
    #[error("cannot {what} {path:?}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// It would be overwritten while this microVM uses it.
    #[error("{0:?} is in use by this microVM; choose another path")]
    InUse(PathBuf),
    /// From a host with another make of CPU.
    #[error("the snapshot is from a host whose CPU is of another maker; load it where it was made")]
    Cpu,
    /// The parts of the state do not fit each other.
    #[error("the snapshot has the state of {found} {what}, and its configuration has {expected}")]
    Parts {
        /// Which parts.
        what: &'static str,
        /// With state.
        found: usize,
        /// Configured.
        expected: usize,
    },
    /// A device does not take its state.
    #[error("the state of virtio device {index} does not fit")]
    Device {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: crate::devices::virtio::StateError,
    },
    /// What a guest wrote to an overlay cannot be copied, or dropped.
    #[error("the overlay of drive {id:?} cannot be copied or emptied")]
    Layer {
        /// The drive.
        id: String,
        /// Why.
        #[source]
        source: crate::devices::virtio::block::Error,
    },
    /// Something to be overridden that is not there.
    #[error("the snapshot has no {0}, and so none to override")]
    Override(String),
    /// Prepared for another.
    #[error("this process was prepared for another snapshot than that of {0:?}")]
    PreparedOther(PathBuf),
    /// Prepared for the same, but not so.
    #[error(
        "track_dirty_pages, huge_pages and backend_type cannot be changed in a process that was prepared with --prepare"
    )]
    PreparedOtherwise,
    /// It was booted.
    #[error("this microVM was not loaded from a snapshot that it could go back to")]
    NoOrigin,
    /// A Diff would leave a mixture of two guests there.
    #[error(
        "mem_file_path {0:?} belongs to another snapshot than this Diff follows: name a new file, or the one that was \
         loaded or saved last, or make a Full"
    )]
    OtherBase(PathBuf),
    /// They were filled from the memory file, not mapped from it.
    #[error(
        "a microVM with huge_pages 2M cannot be reset, for its memory is a copy of the snapshot's: load it in another \
         process"
    )]
    HugePages,
    /// The guest would find what its memory does not know of.
    #[error(
        "drive {0:?} is writable: a reset would leave the guest with a disk that its memory does not know; make it \
         read-only, give it an overlay, or set keep_drive_writes"
    )]
    WritableDrive(String),
    /// What the last snapshot had of them would stay in a file that it is merged into.
    #[error(
        "a reset has taken back what the last snapshot has, and there is no record of which pages: make a Full; with \
         track_dirty_pages in the load there is a record"
    )]
    Rewound,
    /// Nobody knows what is written meanwhile.
    #[error("a live snapshot needs track_dirty_pages, in PUT /machine-config or in the load")]
    NotTracked,
    /// There was no /proc when the machine was made.
    #[error("this process cannot see which of its pages were touched: it was started without /proc, or --proc-fd")]
    NoPagemap,
    /// A vCPU has ended.
    #[error("vCPU {0} has ended and has no state")]
    Ended(usize),
}

impl SnapshotError {
    /// [`Self::Unusable`], for its cause.
    pub fn unusable<E: Error + Send + Sync + 'static>(what: &'static str, path: &Path) -> impl Fn(E) -> Self {
        move |source| Self::Unusable { what, path: path.to_owned(), source: source.into() }
    }
}
