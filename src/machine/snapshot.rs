//! Save and load: the machine as data, and the steps that take it apart and put it together.
//!
//! ```text
//!  create   (paused)        KVM, devices ──▶ State ──▶ state file;  touched pages ──▶ memory file
//!  load     (configuring)   state file ──▶ configuration ──▶ Shell, RAM mapped, State applied ──▶ paused or running
//! ```
//!
//! A load replays the configuration that was saved, with its overrides, through the same checks as
//! the API's requests: what the file says is hostile until then.

mod error;
pub(super) mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests_random;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use self::error::MEMORY_FILE;
pub use self::error::SnapshotError;
use self::files::{Files, MemoryFile, check_request, new_id, pages_of};
use super::Error;
use super::console::Console;
use super::files::open_image;
use super::handler;
use super::layers;
use super::lifecycle::{Ending, Vmm, refuse};
use super::populate::map_ahead;
use super::running::Machine;
use super::shell::{Layout, Shell, renew_generation_id};
use crate::config::{
    BootSource, MAX_VCPUS, MAX_VIRTIO_DEVICES, MemoryBackendType, SnapshotCreate, SnapshotLoad, SnapshotReset,
    VmConfig, at_most,
};
use crate::control::{Command, Event, Lifecycle, Refusal};
use crate::devices::boot_timer::BootTimer;
use crate::devices::bus::Bus;
use crate::devices::i8042::I8042State;
use crate::devices::io_apic::IoApicState;
use crate::devices::serial::SerialState;
use crate::devices::virtio::VirtioState;
use crate::kvm::EmptyVm;
use crate::kvm::x86_64::state::{VcpuState, host_cpu};
use crate::memory::{MIB, VM_GENERATION_IRQ};
use crate::sandbox::Sandbox;
use crate::snapshot::memory;
use crate::snapshot::working_set::{self, Run};
use crate::snapshot::{Id, format};

/// Everything but guest RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// CPU maker and signature of the host.
    cpu: [u32; 4],
    /// Where the memory file was written.
    mem_file_path: PathBuf,
    config: VmConfig,
    clock: kvm_clock_data,
    #[serde(deserialize_with = "at_most::<_, _, { MAX_VCPUS as usize }>")]
    vcpus: Vec<VcpuState>,
    io_apic: IoApicState,
    serial: SerialState,
    i8042: I8042State,
    #[serde(deserialize_with = "at_most::<_, _, MAX_VIRTIO_DEVICES>")]
    virtio: Vec<VirtioState>,
}

impl State {
    /// The configuration that was saved.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Bytes of guest RAM.
    pub fn ram_size(&self) -> u64 {
        self.config.machine.mem_size_mib.saturating_mul(MIB)
    }

    /// How many vCPUs have a state.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The virtio devices, in the order of their places.
    pub fn devices(&self) -> &[VirtioState] {
        &self.virtio
    }

    /// The state of a machine whose vCPUs are parked and whose devices are quiet.
    fn save(machine: &mut Machine, config: &VmConfig, mem_file_path: &Path) -> Result<Self, Error> {
        machine.take_handles()?;
        let msrs = machine.kvm.msrs()?;
        Ok(Self {
            cpu: host_cpu(),
            // Whoever prepares for it may be in another directory.
            mem_file_path: machine.directory.join(mem_file_path),
            config: config.clone(),
            vcpus: machine.handles.iter().map(|vcpu| VcpuState::save(vcpu, &msrs)).collect::<Result<_, _>>()?,
            clock: machine.vm.clock()?,
            io_apic: machine.bus.io_apic.save(),
            serial: machine.bus.serial().save(),
            i8042: machine.bus.i8042().save(),
            virtio: machine.bus.virtio().iter().map(|device| device.save()).collect(),
        })
    }

    /// Puts into the vCPUs, which do not run, what stands still while they do not.
    fn apply(&self, vcpus: &[VcpuFd]) -> Result<(), Error> {
        same("vCPUs", self.vcpus.len(), vcpus.len())?;
        for (state, vcpu) in self.vcpus.iter().zip(vcpus) {
            state.restore(vcpu)?;
        }
        Ok(())
    }

    /// The rest: devices, clocks, and what makes this guest another than the one that was saved. There are handles.
    fn wake(&self, machine: &Machine, realtime: bool) -> Result<(), Error> {
        machine.vm.set_clock(self.clock, realtime)?;
        for (state, vcpu) in self.vcpus.iter().zip(&machine.handles) {
            state.restore_time(vcpu)?;
        }
        self.restore_devices(&machine.bus)?;
        renew_generation_id(&machine.ram)?;
        machine.bus.io_apic.pulse(VM_GENERATION_IRQ);
        Ok(())
    }

    fn restore_devices(&self, bus: &Bus) -> Result<(), SnapshotError> {
        same("virtio devices", self.virtio.len(), bus.virtio().len())?;
        same("I/O APIC pins", self.io_apic.pins(), bus.io_apic.pins())?;
        bus.io_apic.restore(&self.io_apic);
        bus.serial().restore(&self.serial);
        bus.i8042().restore(&self.i8042);
        for (index, (device, state)) in bus.virtio().iter().zip(&self.virtio).enumerate() {
            device.restore(state).map_err(|source| SnapshotError::Device { index, source })?;
        }
        Ok(())
    }

    /// The configuration with what a load overrides; `id` is the snapshot's.
    fn overridden(&self, request: &SnapshotLoad, id: Id) -> Result<VmConfig, SnapshotError> {
        let mut config = self.config.clone();
        config.machine.track_dirty_pages = request.track_dirty_pages;
        config.machine.huge_pages = request.huge_pages.unwrap_or(config.machine.huge_pages);
        for over in &request.network_overrides {
            let interface = config.network_interfaces.iter_mut().find(|interface| interface.iface_id == over.iface_id);
            let missing = || SnapshotError::Override(format!("interface {:?}", over.iface_id));
            let interface = interface.ok_or_else(missing)?;
            interface.host_device = over.host_device.clone();
            interface.guest_mac = over.guest_mac.or(interface.guest_mac);
        }
        layers::override_drives(&mut config.drives, request, id)?;
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
    state: Box<State>,
    realtime: bool,
}

fn same(what: &'static str, found: usize, expected: usize) -> Result<(), SnapshotError> {
    if found == expected { Ok(()) } else { Err(SnapshotError::Parts { what, found, expected }) }
}

/// A saved configuration, if it is one that could arrive over the API.
fn checked(config: VmConfig) -> Result<VmConfig, Refusal> {
    let mut checked = VmConfig { machine: config.machine.checked()?, serial: config.serial, ..VmConfig::default() };
    checked.boot_source = config.boot_source.map(BootSource::checked).transpose()?;
    config.drives.into_iter().try_for_each(|drive| checked.set_drive(drive.checked()?))?;
    for interface in config.network_interfaces {
        checked.set_network_interface(interface.checked()?)?;
    }
    config.vsock.map_or(Ok(()), |vsock| checked.set_vsock(vsock.checked()?))?;
    config.mmds.map_or(Ok(()), |mmds| checked.set_mmds(mmds.checked()?))?;
    Ok(checked)
}

impl Vmm {
    /// Writes both files of a snapshot, on disk before it returns; the machine is paused.
    pub(super) fn create_snapshot(&mut self, request: &SnapshotCreate) -> Result<(), Error> {
        let (Some(machine), events) = (&mut self.machine, &self.events) else { return Ok(()) };
        machine.console.write_output(&machine.bus.serial, events);
        check_request(request, machine, &self.config)?;
        let id = new_id()?;
        let files = Files::draft(machine, &self.config, request, id)?;
        let memory = MemoryFile::open(request, machine)?;
        memory.begin(machine)?;
        let has_base = machine.begin_saving();
        // Taken in any case: the next Diff begins here.
        let written = machine.take_written()?.filter(|_| has_base);
        let written =
            memory::write(&machine.ram, pages_of(request.kind, written), machine.pagemap()?, id, memory.file());
        written.map_err(|source| memory.error(source))?;
        files.publish(memory)?;
        machine.has_been_saved(id);
        Ok(())
    }

    /// Does all of a load that does not depend on the clone, so that the load itself has little to do. Pages that a
    /// working set says will be written are copied by then.
    ///
    /// # Errors
    /// The snapshot cannot be loaded, or the working set is not its.
    pub fn prepare(&mut self, path: &Path, working_set: Option<&Path>) -> Result<(), Refusal> {
        let snapshot = Opened::open(path, None).map_err(refuse)?;
        let layout = Layout::from(&checked(snapshot.state.config.clone())?);
        let vm = self.spare.take(self.host.kvm.as_ref()).map_err(refuse)?;
        let mut prepared =
            Prepared::new(snapshot, layout, self.boot_timer.clone(), vm, &self.host.sandbox).map_err(refuse)?;
        prepared.machine.provide(self.host.proc.as_ref().map(AsFd::as_fd));
        let size = prepared.machine.ram.size();
        let runs = working_set.map(|path| read_working_set(path, prepared.id, size)).transpose().map_err(refuse)?;
        prepared.machine.start_vcpus(&self.host.sandbox, true).map_err(refuse)?;
        prepared.machine.take_handles().map_err(refuse)?;
        if let Some(vcpu) = prepared.machine.handles.first() {
            map_ahead(&prepared.machine.ram, vcpu, &runs.unwrap_or_default());
        }
        self.prepared = Some(prepared);
        Ok(())
    }

    /// Becomes the microVM of a snapshot, and runs it if asked to.
    pub(super) fn load_snapshot(&mut self, request: &SnapshotLoad) -> Result<(), Refusal> {
        let prepared = match self.prepared.take() {
            Some(prepared) => {
                prepared.check(request).map_err(refuse)?;
                let config = prepared.state.overridden(request, prepared.id).map_err(refuse)?;
                if Layout::from(&config) != prepared.layout {
                    return Err(refuse(SnapshotError::PreparedOtherwise));
                }
                self.configure_again(config)?;
                prepared
            }
            None => {
                let snapshot = Opened::open(&request.snapshot_path, Some(request)).map_err(refuse)?;
                let config = snapshot.state.overridden(request, snapshot.id).map_err(refuse)?;
                self.configure_again(config)?;
                let layout = Layout::from(&self.config);
                let vm = self.spare.take(self.host.kvm.as_ref()).map_err(refuse)?;
                Prepared::new(snapshot, layout, self.boot_timer.clone(), vm, &self.host.sandbox).map_err(refuse)?
            }
        };
        let (machine, origin) = self.wake(prepared, request).map_err(refuse)?;
        let files = [&*request.snapshot_path, &*request.backend_path];
        self.install(machine, if request.backend == MemoryBackendType::File { &files } else { &files[..1] })?;
        self.origin = Some(origin);
        self.enter(Lifecycle::Paused, Event::Paused);
        self.due.run = request.resume_vm.then_some(Event::Resumed);
        Ok(())
    }

    /// Gives a prepared machine its devices and starts its clocks.
    fn wake(&self, prepared: Prepared, request: &SnapshotLoad) -> Result<(Machine, Origin), Error> {
        let Prepared { id, state, mut machine, .. } = prepared;
        let devices = self.devices()?;
        same("virtio devices", state.virtio.len(), devices.len())?;
        machine.plug(devices)?;
        machine.console = self.console()?;
        machine.has_been_loaded(id);
        if let Some(path) = &request.working_set_path {
            machine.working_set = read_working_set(path, id, machine.ram.size())?;
        }
        state.wake(&machine, request.clock_realtime)?;
        Ok((machine, Origin { state, realtime: request.clock_realtime }))
    }

    /// Whether a reset would be right.
    pub(super) fn check_reset(&self, request: &SnapshotReset) -> Result<(), Refusal> {
        let (Some(machine), Some(_)) = (&self.machine, &self.origin) else {
            return Err(refuse(SnapshotError::NoOrigin));
        };
        if machine.ram.is_served() {
            return Err(refuse(SnapshotError::Served));
        }
        machine.pagemap().map_err(refuse)?;
        if machine.pristine.is_none() {
            return Err(refuse(SnapshotError::HugePages));
        }
        match self.config.drives.iter().find(|drive| !drive.is_read_only && drive.overlay.is_none()) {
            Some(drive) if !request.keep_drive_writes => {
                Err(refuse(SnapshotError::WritableDrive(drive.drive_id.clone())))
            }
            _ => Ok(()),
        }
    }

    /// Goes back to the snapshot in this very process; the machine is paused. One that fails half way
    /// is no machine any more.
    pub(super) fn reset_in_place(&mut self, request: &SnapshotReset) -> Result<(), Refusal> {
        let (Some(machine), Some(origin)) = (&mut self.machine, &self.origin) else { return Ok(()) };
        machine.stop_populating();
        if let Err(error) = origin.reset(machine) {
            let refusal = refuse(error);
            self.doom = Some(Ending::doomed("the reset failed", &refusal));
            return Err(refusal);
        }
        machine.has_been_reset();
        self.due.run = request.resume_vm.then_some(Event::Resumed);
        Ok(())
    }

    /// Takes on a saved configuration, as if its parts arrived over the API one by one.
    fn configure_again(&mut self, config: VmConfig) -> Result<(), Refusal> {
        let config = checked(config)?;
        let mut commands = vec![Command::SetMachine(config.machine)];
        commands.extend(config.drives.into_iter().map(Box::new).map(Command::SetDrive));
        commands.extend(config.network_interfaces.into_iter().map(Box::new).map(Command::SetNetworkInterface));
        commands.extend(config.vsock.map(Command::SetVsock));
        commands.extend(config.mmds.map(Command::SetMmds));
        commands.extend(config.serial.map(Command::SetSerial));
        for command in commands {
            self.execute(command)?;
        }
        // Only to be shown: the kernel has been in memory for long.
        self.config.boot_source = config.boot_source;
        Ok(())
    }
}

/// A snapshot's two files.
struct Opened {
    id: Id,
    file: File,
    state: Box<State>,
    memory: Memory,
    files: [Identity; 2],
}

/// Where guest memory comes from.
enum Memory {
    File(File),
    Handler(PathBuf),
}

/// Which file it is, whatever its name.
pub(super) type Identity = (u64, u64);

pub(super) fn identity(file: &File) -> std::io::Result<Identity> {
    file.metadata().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Opened {
    /// Opens and checks both; the memory file is where it was written, if no load says where it is.
    fn open(path: &Path, load: Option<&SnapshotLoad>) -> Result<Self, Error> {
        let fail = |source| SnapshotError::File { what: "read", path: path.to_owned(), source };
        let (file, id, state) = open_state(path)?;
        if state.cpu[..3] != host_cpu()[..3] {
            return Err(SnapshotError::Cpu.into());
        }
        if state.cpu != host_cpu() {
            log::warn!(
                "The snapshot is from a host with another model of CPU; its guest may find instructions missing."
            );
        }
        let path = load.map_or(&state.mem_file_path, |load| &load.backend_path);
        let identified = identity(&file).map_err(fail)?;
        if load.is_some_and(|load| load.backend == MemoryBackendType::Uffd) {
            return Ok(Self { id, file, memory: Memory::Handler(path.clone()), state, files: [identified; 2] });
        }
        let size = state.ram_size();
        let memory = open_memory(path, size, id).or_else(|error| {
            // One that was to take its place was not completed.
            open_memory(&memory::previous(path), size, id).map_err(|_| error)
        })?;
        let files = [identified, identity(&memory).map_err(fail)?];
        Ok(Self { id, file, state, memory: Memory::File(memory), files })
    }
}

fn read_working_set(path: &Path, id: Id, size: u64) -> Result<Vec<Run>, Error> {
    let file = open_image("working_set_path", path)?;
    Ok(working_set::read(&file, id, size).map_err(SnapshotError::unusable("working_set_path", path))?)
}

fn open_memory(path: &Path, size: u64, id: Id) -> Result<File, Error> {
    let file = open_image("mem_file_path", path)?;
    // Held before it is looked at: until then another process may change it.
    let usable = memory::hold(&file, false).and_then(|()| memory::check(&file, size, Some(id)));
    usable.map_err(SnapshotError::unusable(MEMORY_FILE, path))?;
    Ok(file)
}

/// A machine of a snapshot, complete but for its devices, with its clocks not yet running.
pub struct Prepared {
    id: Id,
    state: Box<State>,
    files: [Identity; 2],
    /// Both, as long as they may be asked for: other files could get their numbers otherwise.
    _held: (File, Option<File>),
    layout: Layout,
    machine: Machine,
}

impl Prepared {
    fn new(
        snapshot: Opened,
        layout: Layout,
        boot_timer: Option<BootTimer>,
        vm: EmptyVm,
        sandbox: &Sandbox,
    ) -> Result<Self, Error> {
        let Opened { id, file, state, memory, files } = snapshot;
        let mut shell = Shell::new(&layout, state.virtio.len(), boot_timer, vm)?;
        let (handler_gone, held) = match memory {
            Memory::File(memory) => {
                let held = memory.try_clone().map_err(|source| Error::Event("duplicate a descriptor", source))?;
                shell.ram.load(memory)?;
                (None, Some(held))
            }
            Memory::Handler(path) => (Some(handler::attach(&path, &mut shell, sandbox.clone())?), None),
        };
        state.apply(&shell.vcpu_fds)?;
        let mut machine = Machine::assemble(shell, Console::new(None, None));
        machine.handler_gone = handler_gone;
        Ok(Self { id, state, files, _held: (file, held), layout, machine })
    }

    /// Whether a load asks for what was prepared.
    fn check(&self, request: &SnapshotLoad) -> Result<(), SnapshotError> {
        if request.backend != MemoryBackendType::File {
            return Err(SnapshotError::PreparedOtherwise);
        }
        for (path, expected) in [&request.snapshot_path, &request.backend_path].into_iter().zip(self.files) {
            let fail = |source| SnapshotError::File { what: "look at", path: path.clone(), source };
            let metadata = fs::metadata(path).map_err(fail)?;
            if (metadata.dev(), metadata.ino()) != expected {
                return Err(SnapshotError::PreparedOther(path.clone()));
            }
        }
        Ok(())
    }
}

impl Origin {
    fn reset(&self, machine: &mut Machine) -> Result<(), Error> {
        let fail = SnapshotError::unusable(MEMORY_FILE, Path::new("of the snapshot"));
        let pristine = machine.pristine.as_ref().ok_or(SnapshotError::NoOrigin)?;
        memory::take_back(&machine.ram, pristine, machine.pagemap()?).map_err(fail)?;
        layers::clear(machine)?;
        machine.take_handles()?;
        self.state.apply(&machine.handles)?;
        self.state.wake(machine, self.realtime)
    }
}

/// The state in a file, and the snapshot it is of.
///
/// # Errors
/// It cannot be read, or is no state of this release.
pub fn read_state(path: &Path) -> Result<(Id, Box<State>), SnapshotError> {
    open_state(path).map(|(_, id, state)| (id, state))
}

fn open_state(path: &Path) -> Result<(File, Id, Box<State>), SnapshotError> {
    let fail = SnapshotError::unusable("snapshot_path", path);
    let (file, content) = format::read(path).map_err(&fail)?;
    let (header, state) = format::decode(&content).map_err(&fail)?;
    Ok((file, header.id, state))
}
