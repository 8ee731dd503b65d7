//! Save and load: the machine as data, and the steps that take it apart and put it together.
//!
//! ```text
//!  create   (paused)        KVM, devices ──▶ State ──▶ state file;  touched pages ──▶ memory file
//!  load     (configuring)   state file ──▶ configuration ──▶ Shell, RAM mapped, State applied ──▶ paused or running
//! ```
//!
//! A load replays the configuration that was saved, with its overrides, through the same checks as
//! the API's requests: what the file says is hostile until then.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::lifecycle::{Ending, Machine, Vmm, refuse};
use super::shell::{Layout, Parts, renew_generation_id};
use super::{Error, files};
use crate::config::{SnapshotCreate, SnapshotKind, SnapshotLoad, SnapshotReset, VmConfig};
use crate::control::{Command, Event, Lifecycle, Refusal};
use crate::devices::i8042::I8042State;
use crate::devices::serial::SerialState;
use crate::devices::virtio::VirtioState;
use crate::kvm::x86_64::state::{VcpuState, VmState, host_cpu};
use crate::memory::VM_GENERATION_IRQ;
use crate::random;
use crate::snapshot::draft::Draft;
use crate::snapshot::memory::{self, Pagemap, Pages};
use crate::snapshot::{Id, format};

/// Everything but guest RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// CPU maker and signature of the host.
    cpu: [u32; 4],
    config: VmConfig,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    serial: SerialState,
    i8042: I8042State,
    virtio: Vec<VirtioState>,
}

/// Why a snapshot cannot be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state file is none.
    #[error("snapshot_path {path:?} cannot be used")]
    Format {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        #[source]
        source: format::Error,
    },
    /// The memory file is none, or not this snapshot's, or cannot be written.
    #[error("the memory file {path:?} cannot be used")]
    Memory {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        #[source]
        source: memory::Error,
    },
    /// A file cannot be read or written.
    #[error("cannot {what} {path:?}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// It would be overwritten while this microVM uses it.
    #[error("{0:?} is in use by this microVM; choose another path")]
    InUse(std::path::PathBuf),
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
    /// Something to be overridden that is not there.
    #[error("the snapshot has no {0}, and so none to override")]
    Override(String),
    /// It was booted.
    #[error("this microVM was not loaded from a snapshot that it could go back to")]
    NoOrigin,
    /// The guest would find what its memory does not know of.
    #[error(
        "drive {0:?} is writable: a reset would leave the guest with a disk that its memory does not know; make it \
         read-only, or set keep_drive_writes"
    )]
    WritableDrive(String),
    /// A vCPU has ended.
    #[error("vCPU {0} has ended and has no state")]
    Ended(usize),
}

impl State {
    /// The state of a machine whose vCPUs are parked and whose devices are quiet.
    fn save(machine: &mut Machine, config: &VmConfig) -> Result<Self, Error> {
        machine.take_handles()?;
        let msrs = machine.kvm.msrs()?;
        Ok(Self {
            cpu: host_cpu(),
            config: config.clone(),
            vcpus: machine.handles.iter().map(|vcpu| VcpuState::save(vcpu, &msrs)).collect::<Result<_, _>>()?,
            vm: machine.vm.save()?,
            serial: machine.bus.serial().save(),
            i8042: machine.bus.i8042().save(),
            virtio: machine.bus.virtio.iter().map(|device| device.save()).collect(),
        })
    }

    /// Puts the state into a machine whose RAM is there already and whose vCPUs do not run.
    fn apply(&self, parts: &Parts<'_>, realtime: bool) -> Result<(), Error> {
        same("vCPUs", self.vcpus.len(), parts.vcpus.len())?;
        same("virtio devices", self.virtio.len(), parts.bus.virtio.len())?;
        // The interrupt controllers of the VM come first: local APICs refer to them.
        parts.vm.restore(&self.vm, realtime)?;
        for (state, vcpu) in self.vcpus.iter().zip(parts.vcpus) {
            state.restore(vcpu)?;
        }
        parts.bus.serial().restore(&self.serial);
        parts.bus.i8042().restore(&self.i8042);
        for (index, (device, state)) in parts.bus.virtio.iter().zip(&self.virtio).enumerate() {
            device.restore(state).map_err(|source| SnapshotError::Device { index, source })?;
        }
        // The guest notices that it is not the one that was saved.
        renew_generation_id(parts.ram)?;
        parts.vm.pulse(VM_GENERATION_IRQ);
        Ok(())
    }

    /// The configuration with what a load overrides.
    fn overridden(&self, request: &SnapshotLoad) -> Result<VmConfig, SnapshotError> {
        let mut config = self.config.clone();
        config.machine.track_dirty_pages = request.track_dirty_pages;
        config.machine.huge_pages = request.huge_pages.unwrap_or(config.machine.huge_pages);
        for (id, device) in &request.network_overrides {
            let interface = config.network_interfaces.iter_mut().find(|interface| interface.iface_id == *id);
            let missing = || SnapshotError::Override(format!("interface {id:?}"));
            interface.ok_or_else(missing)?.host_device = device.clone();
        }
        for (id, path) in &request.drive_overrides {
            let drive = config.drives.iter_mut().find(|drive| drive.drive_id == *id);
            drive.ok_or_else(|| SnapshotError::Override(format!("drive {id:?}")))?.path_on_host.clone_from(path);
        }
        if let Some(path) = &request.vsock_override {
            let vsock = config.vsock.as_mut().ok_or_else(|| SnapshotError::Override("vsock device".into()))?;
            vsock.uds_path.clone_from(path);
        }
        Ok(config)
    }
}

/// What a reset goes back to.
#[derive(Debug)]
pub struct Origin {
    state: State,
    realtime: bool,
    pagemap: Pagemap,
}

fn same(what: &'static str, found: usize, expected: usize) -> Result<(), SnapshotError> {
    if found == expected { Ok(()) } else { Err(SnapshotError::Parts { what, found, expected }) }
}

impl Vmm {
    /// Writes both files of a snapshot, on disk before it returns; the machine is paused.
    pub(super) fn create_snapshot(&mut self, request: &SnapshotCreate) -> Result<(), Error> {
        let (Some(machine), events) = (&mut self.machine, &self.events) else { return Ok(()) };
        machine.console.write_output(&machine.bus.serial, events);
        for path in [&request.snapshot_path, &request.mem_file_path] {
            check_unused(path, machine, &self.config)?;
        }
        let id = random::bytes().map_err(|source| Error::Event("draw random bytes", source))?;
        let state = State::save(machine, &self.config)?;
        let path = &request.snapshot_path;
        let content =
            format::encode(id, &state).map_err(|source| SnapshotError::Format { path: path.clone(), source })?;
        let fail = |what| move |source| SnapshotError::File { what, path: path.clone(), source };
        let draft = Draft::create(path).map_err(fail("create"))?;
        draft.file().write_all_at(&content, 0).map_err(fail("write"))?;
        draft.sync().map_err(fail("write"))?;
        write_memory(machine, request, id)?;
        Ok(draft.publish().map_err(fail("create"))?)
    }

    /// Becomes the microVM of a snapshot, and runs it if asked to.
    pub(super) fn load_snapshot(&mut self, request: &SnapshotLoad) -> Result<(), Refusal> {
        let (id, state) = read_state(&request.snapshot_path).map_err(|error| refuse(error.into()))?;
        if state.cpu[..3] != host_cpu()[..3] {
            return Err(refuse(SnapshotError::Cpu.into()));
        }
        if state.cpu != host_cpu() {
            log::warn!(
                "The snapshot is from a host with another model of CPU; its guest may find instructions missing."
            );
        }
        let config = state.overridden(request).map_err(|error| refuse(error.into()))?;
        self.configure_again(config)?;
        let machine = self.put_together(request, id, &state).map_err(refuse)?;
        self.install(machine)?;
        let pagemap = Pagemap::open()
            .map_err(|source| refuse(SnapshotError::Memory { path: request.mem_file_path.clone(), source }.into()))?;
        self.origin = Some(Origin { state, realtime: request.clock_realtime, pagemap });
        self.enter(Lifecycle::Paused, Event::Paused);
        if request.resume_vm {
            self.resume();
        }
        Ok(())
    }

    /// Whether a reset would be right.
    pub(super) fn check_reset(&self, request: &SnapshotReset) -> Result<(), Refusal> {
        if self.origin.is_none() || self.machine.as_ref().is_none_or(|machine| machine.ram.base().is_none()) {
            return Err(refuse(SnapshotError::NoOrigin.into()));
        }
        match self.config.drives.iter().find(|drive| !drive.is_read_only) {
            Some(drive) if !request.keep_drive_writes => {
                Err(refuse(SnapshotError::WritableDrive(drive.drive_id.clone()).into()))
            }
            _ => Ok(()),
        }
    }

    /// Goes back to the snapshot in this very process; the machine is paused. One that fails half way
    /// is no machine any more.
    pub(super) fn reset_in_place(&mut self, request: &SnapshotReset) -> Result<(), Refusal> {
        let (Some(machine), Some(origin)) = (&mut self.machine, &self.origin) else { return Ok(()) };
        if let Err(error) = origin.reset(machine) {
            let refusal = refuse(error);
            self.doom = Some(Ending::failure(format!("the reset failed: {}", refusal.0.trim_end_matches('.'))));
            return Err(refusal);
        }
        if request.resume_vm {
            self.resume();
        }
        Ok(())
    }

    /// Takes on a saved configuration, as if its parts arrived over the API one by one.
    fn configure_again(&mut self, config: VmConfig) -> Result<(), Refusal> {
        let mut commands = vec![Command::SetMachine(config.machine.checked()?)];
        for drive in config.drives {
            commands.push(Command::SetDrive(drive.checked()?));
        }
        for interface in config.network_interfaces {
            commands.push(Command::SetNetworkInterface(Box::new(interface.checked()?)));
        }
        if let Some(vsock) = config.vsock {
            commands.push(Command::SetVsock(vsock.checked()?));
        }
        if let Some(mmds) = config.mmds {
            commands.push(Command::SetMmds(mmds.checked()?));
        }
        commands.extend(config.serial.map(Command::SetSerial));
        for command in commands {
            self.execute(command)?;
        }
        // Only to be shown: the kernel has been in memory for long.
        self.config.boot_source = config.boot_source;
        Ok(())
    }

    fn put_together(&self, request: &SnapshotLoad, id: Id, state: &State) -> Result<Machine, Error> {
        let layout = Layout::from(&self.config);
        let path = &request.mem_file_path;
        let fail = |source| SnapshotError::Memory { path: path.clone(), source };
        let file = files::open_image("mem_file_path", path)?;
        memory::check(&file, layout.ram_bytes, Some(id)).map_err(fail)?;
        let mut shell = self.shell(&layout)?;
        shell.ram.load(file)?;
        state.apply(&shell.parts(), request.clock_realtime)?;
        self.assemble(shell)
    }
}

impl Origin {
    fn reset(&self, machine: &mut Machine) -> Result<(), Error> {
        let fail = |source| SnapshotError::Memory { path: "of the snapshot".into(), source };
        memory::forget(&machine.ram, &self.pagemap).map_err(fail)?;
        machine.take_handles()?;
        let Machine { handles, bus, vm, ram, .. } = machine;
        self.state.apply(&Parts { vcpus: handles, bus, vm, ram }, self.realtime)
    }
}

fn write_memory(machine: &Machine, request: &SnapshotCreate, id: Id) -> Result<(), Error> {
    let path = &request.mem_file_path;
    let fail = |source| SnapshotError::Memory { path: path.clone(), source };
    let file_error = |what| move |source| SnapshotError::File { what, path: path.clone(), source };
    let pagemap = Pagemap::open().map_err(fail)?;
    let pages = match request.kind {
        SnapshotKind::Full => Pages::All,
        SnapshotKind::Diff => Pages::Changed,
    };
    if request.kind == SnapshotKind::Diff && path.exists() {
        // In place: the whole of it is only there again when this is done.
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(file_error("open"))?;
        memory::check(&file, machine.ram.size(), None).map_err(fail)?;
        memory::write(&machine.ram, pages, &pagemap, id, &file).map_err(fail)?;
        return Ok(file.sync_all().map_err(file_error("write"))?);
    }
    let draft = Draft::create(path).map_err(file_error("create"))?;
    memory::write(&machine.ram, pages, &pagemap, id, draft.file()).map_err(fail)?;
    draft.sync().map_err(file_error("write"))?;
    Ok(draft.publish().map_err(file_error("create"))?)
}

fn read_state(path: &Path) -> Result<(Id, State), SnapshotError> {
    let fail = |source| SnapshotError::File { what: "read", path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let mut content = Vec::new();
    let read = file.and_then(|file| file.take(format::MAX_LENGTH).read_to_end(&mut content));
    read.map_err(fail)?;
    let decoded = format::decode(&content);
    let (header, state) = decoded.map_err(|source| SnapshotError::Format { path: path.to_owned(), source })?;
    Ok((header.id, state))
}

/// Refuses to write over what the running guest is made of: its memory file, its images, its drives.
fn check_unused(path: &Path, machine: &Machine, config: &VmConfig) -> Result<(), SnapshotError> {
    let Ok(target) = fs::metadata(path) else { return Ok(()) };
    let is_target = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == (target.dev(), target.ino());
    let base = machine.ram.base().and_then(|base| base.metadata().ok());
    let source = config
        .boot_source
        .iter()
        .flat_map(|source| [Some(&source.kernel_image_path), source.initrd_path.as_ref()].into_iter().flatten());
    let drives = config.drives.iter().map(|drive| &drive.path_on_host);
    let named = source.chain(drives).filter_map(|path| fs::metadata(path).ok());
    if base.into_iter().chain(named).any(is_target) {
        return Err(SnapshotError::InUse(path.to_owned()));
    }
    Ok(())
}
