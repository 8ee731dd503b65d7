//! What the API thread asks of the vmm thread, and when it may.
//!
//! ```text
//!  Configuring ──Start──▶ Running ⇄ Paused          (Pause, Resume)
//!       └──────────────────┴─────────┴───▶ Exited   (guest reset, shutdown, fault, signal)
//! ```
//!
//! The vmm thread answers every [`Request`] exactly once. A refused command changes nothing.

use crate::config::{
    BootSource, DriveConfig, DriveUpdate, LoggerConfig, MachineConfig, MetricsConfig, SerialConfig, VmConfig,
};

/// Where the microVM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// No machine yet: the configuration is being collected.
    Configuring,
    /// vCPUs run.
    Running,
    /// vCPUs are parked, devices are quiet.
    Paused,
}

/// One thing to do; each gets one [`Answer`].
#[derive(Debug)]
pub enum Command {
    /// Instance information.
    GetInstance,
    /// The whole configuration.
    GetConfig,
    /// Replace the boot source.
    SetBootSource(BootSource),
    /// Replace the machine configuration (a PATCH arrives merged by [`Command::PatchMachine`]).
    SetMachine(MachineConfig),
    /// Change some fields of the machine configuration.
    PatchMachine(MachineUpdate),
    /// Add or replace a drive.
    SetDrive(DriveConfig),
    /// Change a drive of a running microVM.
    UpdateDrive(DriveUpdate),
    /// Replace the serial configuration.
    SetSerial(SerialConfig),
    /// Configure the log.
    SetLogger(LoggerConfig),
    /// Configure the metrics file, once.
    SetMetrics(MetricsConfig),
    /// Build the machine and run it.
    Start,
    /// Write the metrics now.
    FlushMetrics,
    /// Press Ctrl-Alt-Del on the i8042.
    SendCtrlAltDel,
    /// Park the vCPUs and quiet the devices.
    Pause,
    /// Run again.
    Resume,
}

/// A change to the machine configuration; what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineUpdate {
    /// See [`MachineConfig::vcpu_count`].
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig::mem_size_mib`].
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfig::smt`].
    pub smt: Option<bool>,
    /// See [`MachineConfig::track_dirty_pages`].
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig::huge_pages`].
    pub huge_pages: Option<crate::config::HugePages>,
}

/// What a command that succeeded brings back.
#[derive(Debug)]
pub enum Reply {
    /// Done, nothing to say (204).
    Done,
    /// Answer to [`Command::GetInstance`].
    Instance {
        /// The process's `--id`.
        id: String,
        /// Where it is.
        state: Lifecycle,
    },
    /// Answer to [`Command::GetConfig`].
    Config(Box<VmConfig>),
}

/// Why a command was refused: one sentence that names the field or path and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// The one answer to a command.
pub type Answer = Result<Reply, Refusal>;

/// A command on its way to the vmm thread.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Where the answer goes; a client that went away is no error.
    pub reply: tokio::sync::oneshot::Sender<Answer>,
}

/// A lifecycle change, as `GET /events` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// InstanceStart succeeded.
    Started,
    /// vCPUs are parked.
    Paused,
    /// vCPUs run again.
    Resumed,
    /// The end, and why.
    Exited {
        /// Exit status of the process.
        status: u8,
        /// A sentence a person can act on.
        reason: String,
    },
}
