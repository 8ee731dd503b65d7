//! The machine and the steps of its life: [`shell`] builds it empty, [`fill`] puts a kernel in,
//! [`lifecycle`] runs, pauses and ends it, on the vmm thread.

mod commands;
mod console;
mod devices;
mod files;
mod fill;
mod handler;
mod layers;
pub mod lifecycle;
mod live;
mod populate;
mod running;
mod shell;
pub(crate) mod snapshot;

pub use console::restore_terminal;
pub use files::Host;
pub use snapshot::{SnapshotError, State, read_state};

use std::path::PathBuf;

/// Why the machine could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::Error),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    /// Kernel, initrd or tables.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] crate::boot::cmdline::Error),
    /// Nothing to boot.
    #[error("there is no kernel to boot: PUT /boot-source first")]
    NoBootSource,
    /// A drive.
    #[error("drive {id:?}")]
    Drive {
        /// Its id.
        id: String,
        /// What failed.
        #[source]
        source: crate::devices::virtio::block::Error,
    },
    /// A network interface.
    #[error("interface {id:?}: cannot create a timer")]
    Net {
        /// The interface.
        id: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A TAP.
    #[error("interface {id:?}: host_dev_name {device:?} cannot be used")]
    Tap {
        /// The interface's id.
        id: String,
        /// As configured.
        device: String,
        /// What failed.
        #[source]
        source: crate::devices::virtio::net::TapError,
    },
    /// A descriptor that nobody declared.
    #[error("interface {id:?}: descriptor {fd} was not passed in; start the process with --pass-fd {fd}")]
    Undeclared {
        /// The interface's id.
        id: String,
        /// The number.
        fd: std::os::fd::RawFd,
    },
    /// A descriptor that another interface has.
    #[error("interface {id:?}: descriptor {fd} is in use by interface {other:?}")]
    DescriptorInUse {
        /// The interface's id.
        id: String,
        /// The number.
        fd: std::os::fd::RawFd,
        /// Who has it.
        other: String,
    },
    /// A file that the configuration names.
    #[error("cannot open {what} {path:?}")]
    Open {
        /// The field.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The errno.
        #[source]
        source: std::io::Error,
    },
    /// A file that this user may not open, or that was given up.
    #[error(
        "cannot open {what} {path:?}: besides this user's rights, only what lies in the directories of what was \
         configured is in reach; start the process with --allow-path to add others"
    )]
    OutOfReach {
        /// The field.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The errno.
        #[source]
        source: std::io::Error,
    },
    /// The confinement.
    #[error(transparent)]
    Sandbox(#[from] crate::sandbox::Error),
    /// A file of the wrong kind.
    #[error("{what} {path:?} cannot be used: {wanted}")]
    Kind {
        /// The field.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What it should be.
        wanted: &'static str,
    },
    /// Not a kernel.
    #[error("kernel_image_path {path:?}")]
    Kernel {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: crate::boot::kernel::Error,
    },
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    /// The file is set once.
    #[error("the metrics file is set already and cannot be changed")]
    MetricsTwice,
    /// More devices than interrupt lines.
    #[error("at most {} virtio devices fit: remove some", crate::config::MAX_VIRTIO_DEVICES)]
    TooManyDevices,
    /// A descriptor could not be made or watched.
    #[error("cannot {0}")]
    Event(&'static str, #[source] std::io::Error),
}

/// The whole chain of causes in one sentence, printed once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some libraries say the cause themselves, too.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}
