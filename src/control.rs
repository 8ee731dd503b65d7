//! What the API thread asks of the vmm thread, and when it may.
//!
//! ```text
//!  Configuring ──Start──▶ Running ⇄ Paused          (Pause, Resume)
//!       └──────────────────┴─────────┴───▶ Exited   (guest reset, shutdown, fault, signal)
//! ```
//!
//! The vmm thread answers every [`Request`] exactly once. A refused command changes nothing.

use std::io;
use std::sync::{Arc, mpsc};

use serde_json::Value;
use tokio::sync::{broadcast, oneshot, watch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{
    BootSource, ConfigError, CpuConfig, DriveConfig, DriveUpdate, HugePages, LoggerConfig, MachineConfig,
    MetricsConfig, MmdsConfig, NetConfig, NetUpdate, SerialConfig, SnapshotCreate, SnapshotLoad, SnapshotReset,
    VmConfig, VsockConfig,
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
    /// The machine configuration.
    GetMachine,
    /// Replace the boot source.
    SetBootSource(BootSource),
    /// Replace the machine configuration (a PATCH arrives merged by [`Command::PatchMachine`]).
    SetMachine(MachineConfig),
    /// Change some fields of the machine configuration.
    PatchMachine(MachineUpdate),
    /// Replace what the guest sees of its CPU.
    SetCpu(CpuConfig),
    /// Add or replace a drive.
    SetDrive(Box<DriveConfig>),
    /// Change a drive of a running microVM.
    UpdateDrive(DriveUpdate),
    /// Add or replace a network interface.
    SetNetworkInterface(Box<NetConfig>),
    /// Change a network interface of a running microVM.
    UpdateNetworkInterface(NetUpdate),
    /// Set or replace the vsock device.
    SetVsock(VsockConfig),
    /// Replace the serial configuration.
    SetSerial(SerialConfig),
    /// Configure the log.
    SetLogger(LoggerConfig),
    /// Replace the configuration of the metadata service.
    SetMmds(MmdsConfig),
    /// The metadata.
    GetMetadata,
    /// Replace the metadata.
    PutMetadata(Value),
    /// Change the metadata by a merge patch.
    PatchMetadata(Value),
    /// Configure the metrics file, once.
    SetMetrics(MetricsConfig),
    /// Write a snapshot.
    CreateSnapshot(SnapshotCreate),
    /// Become the microVM of a snapshot.
    LoadSnapshot(Box<SnapshotLoad>),
    /// Go back to the snapshot that was loaded, in place.
    Reset(SnapshotReset),
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

impl Command {
    /// Whether the phase allows it.
    ///
    /// # Errors
    /// The sentence the client reads.
    pub fn permitted(&self, lifecycle: Lifecycle) -> Result<(), Refusal> {
        let configuring = lifecycle == Lifecycle::Configuring;
        match self {
            Self::SetBootSource(_)
            | Self::SetMachine(_)
            | Self::PatchMachine(_)
            | Self::SetCpu(_)
            | Self::SetDrive(_)
            | Self::SetNetworkInterface(_)
            | Self::SetVsock(_)
            | Self::SetSerial(_)
            | Self::SetLogger(_)
            | Self::SetMetrics(_)
            | Self::SetMmds(_)
            | Self::LoadSnapshot(_)
            | Self::Start
                if !configuring =>
            {
                Err(Refusal("The requested operation is not supported after starting the microVM.".into()))
            }
            Self::UpdateDrive(_)
            | Self::UpdateNetworkInterface(_)
            | Self::FlushMetrics
            | Self::SendCtrlAltDel
            | Self::CreateSnapshot(_)
            | Self::Reset(_)
            | Self::Pause
            | Self::Resume
                if configuring =>
            {
                Err(Refusal("The requested operation is not supported before starting the microVM.".into()))
            }
            Self::CreateSnapshot(request) if lifecycle == Lifecycle::Running && !request.live => {
                Err(Refusal("The microVM is running: pause it with PATCH /vm before a snapshot of it is made.".into()))
            }
            _ => Ok(()),
        }
    }

    /// Whether it waits until a live snapshot is complete.
    pub fn needs_rest(&self) -> bool {
        matches!(self, Self::CreateSnapshot(_) | Self::Reset(_) | Self::Pause | Self::Resume)
    }
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
    pub huge_pages: Option<HugePages>,
}

impl MachineUpdate {
    /// `base` with the change.
    ///
    /// # Errors
    /// The result would not be legal; nothing changed then.
    pub fn apply(&self, base: &MachineConfig) -> Result<MachineConfig, ConfigError> {
        MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(base.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(base.mem_size_mib),
            smt: self.smt.unwrap_or(base.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(base.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(base.huge_pages),
        }
        .checked()
    }
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
    /// Answer to [`Command::GetMachine`].
    Machine(MachineConfig),
    /// Answer to [`Command::GetMetadata`].
    Metadata(Value),
    /// Metadata that would be over its limit; nothing changed (413).
    DoesNotFit(Refusal),
}

/// Why a command was refused: one sentence that names the field or path and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl From<ConfigError> for Refusal {
    fn from(error: ConfigError) -> Self {
        Self(error.to_string())
    }
}

/// The one answer to a command.
pub type Answer = Result<Reply, Refusal>;

/// A command on its way to the vmm thread.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Where the answer goes; a client that went away is no error.
    pub reply: oneshot::Sender<Answer>,
}

/// The API thread's end of the channel of commands.
#[derive(Debug, Clone)]
pub struct CommandSender {
    requests: mpsc::Sender<Request>,
    wake: Arc<EventFd>,
}

/// The vmm thread's end of the channel of commands.
#[derive(Debug)]
pub struct CommandReceiver {
    requests: mpsc::Receiver<Request>,
    wake: Arc<EventFd>,
}

/// The vmm thread is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The VMM is shutting down.")]
pub struct Gone;

/// A channel of commands.
///
/// # Errors
/// No eventfd could be made.
pub fn channel() -> io::Result<(CommandSender, CommandReceiver)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, requests) = mpsc::channel();
    Ok((CommandSender { requests: sender, wake: Arc::clone(&wake) }, CommandReceiver { requests, wake }))
}

impl CommandSender {
    /// Sends a command and wakes the vmm thread; the answer comes out of what is returned.
    ///
    /// # Errors
    /// Nobody will answer.
    pub fn send(&self, command: Command) -> Result<oneshot::Receiver<Answer>, Gone> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request { command, reply }).map_err(|_| Gone)?;
        // It fails only if the counter would overflow: then the thread is being woken anyway.
        let _ = self.wake.write(1);
        Ok(answer)
    }
}

impl CommandReceiver {
    /// Readable when commands may be waiting.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The next command, if there is one. Call it until there is none, after reading [`Self::wake`].
    pub fn next(&self) -> Option<Request> {
        self.requests.try_recv().ok()
    }
}

/// The vmm thread's end of the lifecycle events. The API ends when it is dropped.
#[derive(Debug, Clone)]
pub struct Publisher {
    events: broadcast::Sender<Event>,
    /// Held for its end: whoever waits for the end of `events` is woken by each of them.
    _open: watch::Sender<()>,
}

/// The API thread's end of the lifecycle events.
#[derive(Debug)]
pub struct Subscription {
    /// Those from now on.
    pub events: broadcast::Receiver<Event>,
    /// Changes only by ending, with the events.
    pub open: watch::Receiver<()>,
}

/// A channel of lifecycle events, of which a slow reader may lag `backlog` behind.
pub fn events(backlog: usize) -> (Publisher, Subscription) {
    let (sender, events) = broadcast::channel(backlog);
    let (held, open) = watch::channel(());
    (Publisher { events: sender, _open: held }, Subscription { events, open })
}

impl Publisher {
    /// Tells an event to whoever listens.
    pub fn publish(&self, event: Event) {
        // Nobody may be listening.
        let _ = self.events.send(event);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn commands() -> Vec<(Command, &'static str)> {
        let drive_update = DriveUpdate { drive_id: "d".into(), path_on_host: None, rate_limiter: None };
        let interface_update = NetUpdate {
            iface_id: "i".into(),
            rx_rate_limiter: Default::default(),
            tx_rate_limiter: Default::default(),
        };
        vec![
            (Command::GetInstance, "BA"),
            (Command::GetConfig, "BA"),
            (Command::GetMachine, "BA"),
            (Command::GetMetadata, "BA"),
            (Command::PutMetadata(Value::Null), "BA"),
            (Command::PatchMetadata(Value::Null), "BA"),
            (Command::SetMachine(MachineConfig::default()), "B"),
            (Command::PatchMachine(MachineUpdate::default()), "B"),
            (Command::SetVsock(VsockConfig { guest_cid: 3.try_into().unwrap(), uds_path: "v".into() }), "B"),
            (Command::SetCpu(CpuConfig::default()), "B"),
            (Command::SetSerial(SerialConfig::default()), "B"),
            (Command::SetLogger(LoggerConfig::default()), "B"),
            (Command::SetMetrics(MetricsConfig::default()), "B"),
            (Command::LoadSnapshot(Box::default()), "B"),
            (Command::Start, "B"),
            (Command::UpdateDrive(drive_update), "A"),
            (Command::UpdateNetworkInterface(interface_update), "A"),
            (Command::Reset(SnapshotReset { resume_vm: true, keep_drive_writes: false }), "A"),
            (Command::FlushMetrics, "A"),
            (Command::SendCtrlAltDel, "A"),
            (Command::Pause, "A"),
            (Command::Resume, "A"),
        ]
    }

    #[test]
    fn a_command_out_of_phase_is_told_so_in_the_documented_words() {
        for (command, phases) in commands() {
            let before = command.permitted(Lifecycle::Configuring);
            assert_eq!(before.is_ok(), phases.contains('B'), "{command:?}");
            if let Err(Refusal(text)) = before {
                assert_eq!(text, "The requested operation is not supported before starting the microVM.");
            }
            for lifecycle in [Lifecycle::Running, Lifecycle::Paused] {
                let after = command.permitted(lifecycle);
                assert_eq!(after.is_ok(), phases.contains('A'), "{command:?}");
                if let Err(Refusal(text)) = after {
                    assert_eq!(text, "The requested operation is not supported after starting the microVM.");
                }
            }
        }
    }

    #[test]
    fn a_patch_changes_what_it_names_or_nothing() {
        let base = MachineConfig { vcpu_count: 2, smt: true, ..Default::default() };
        let patched = MachineUpdate { mem_size_mib: Some(256), ..Default::default() }.apply(&base).unwrap();
        assert_eq!(patched, MachineConfig { mem_size_mib: 256, ..base.clone() });
        let odd = MachineUpdate { mem_size_mib: Some(512), vcpu_count: Some(3), ..Default::default() };
        assert_eq!(odd.apply(&base), Err(ConfigError::OddVcpuCount(3)));
    }

    #[test]
    fn a_command_wakes_the_vmm_thread_and_its_answer_comes_back() {
        let (sender, receiver) = channel().unwrap();
        let mut answer = sender.send(Command::Pause).unwrap();
        assert_eq!(receiver.wake().read().unwrap(), 1);
        let request = receiver.next().unwrap();
        assert!(matches!(request.command, Command::Pause));
        request.reply.send(Ok(Reply::Done)).unwrap();
        assert!(matches!(answer.try_recv(), Ok(Ok(Reply::Done))));
        assert!(receiver.next().is_none());
        drop(receiver);
        assert_eq!(sender.send(Command::Resume).unwrap_err(), Gone);
    }
}
