//! The vmm thread: collects the configuration, then runs the machine, pauses and ends it.
//!
//! Parking vCPUs is a state of the event loop, never a wait: commands that arrive meanwhile are
//! answered when the pause is complete.
//!
//! What the guest waits for and a client need not follows the answer: all threads give up what the
//! machine does not need, and then the guest runs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use vmm_sys_util::timerfd::TimerFd;

use super::console::Console;
use super::files::{self, Files, Host};
use super::handler;
use super::live::Live;
use super::running::Machine;
use super::shell::{Layout, Shell};
use super::snapshot::{Origin, Prepared};
use super::{Error, chain, devices, fill};
use crate::config::{SnapshotLoad, SnapshotReset, VmConfig};
use crate::control::{Answer, Command, CommandReceiver, Event, Lifecycle, Publisher, Refusal, Reply, Request};
use crate::devices::boot_timer::BootTimer;
use crate::devices::virtio::Device;
use crate::event_loop::{EventLoop, Token, When};
use crate::kvm::{EmptyVm, Report, Run, Wish};
use crate::metrics::{JsonLines, METRICS};
use crate::mmds::{self, Mmds};
use crate::sandbox::landlock::Grants;
use crate::sandbox::seccomp::ThreadKind;
use crate::signals::Termination;
use crate::socket::SocketFile;

/// How the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Exit status.
    pub status: u8,
    /// A sentence a person can act on.
    pub reason: String,
}

impl Ending {
    fn clean(reason: &str) -> Self {
        Self { status: 0, reason: reason.to_owned() }
    }

    /// After what cannot be tried again; the client reads the same.
    pub(super) fn doomed(what: &str, refusal: &Refusal) -> Self {
        Self::failure(format!("{what}: {}", refusal.0.trim_end_matches('.')))
    }

    fn failure(reason: String) -> Self {
        Self { status: 1, reason }
    }
}

/// Who waits for the vCPUs to park, and what for.
pub(super) struct Parking {
    pub(super) purpose: Purpose,
    pub(super) reply: oneshot::Sender<Answer>,
}

/// See [`Parking`].
pub(super) enum Purpose {
    /// To be paused.
    Pause,
    /// To go back to the snapshot.
    Reset(SnapshotReset),
    /// To complete a live snapshot.
    Snapshot(Box<Live>),
}

/// What is left to do when the request at hand has its answer. The guest would take the processor from whoever waits
/// for that.
#[derive(Default)]
pub(super) struct Due {
    /// All threads have to be confined; this one keeps these paths.
    pub(super) confinement: Option<Grants>,
    /// The guest is to run; this is what to call it.
    pub(super) run: Option<Event>,
}

/// A process that is started ahead of its job makes the VM, a fifth of a load, as soon as it has nothing else to do.
pub(super) enum Spare {
    /// When nothing happens for [`IDLE`].
    Due,
    /// It waits.
    Vm(EmptyVm),
    /// It was needed, or cannot be had now.
    Over,
}

impl Spare {
    /// The VM for this process's one machine.
    pub(super) fn take(&mut self, kvm: Option<&OwnedFd>) -> Result<EmptyVm, Error> {
        match std::mem::replace(self, Self::Over) {
            Self::Vm(vm) => Ok(vm),
            Self::Due | Self::Over => Ok(EmptyVm::new(kvm)?),
        }
    }
}

/// Longer than a client takes between two requests, shorter than it waits for its next guest.
const IDLE: Duration = Duration::from_millis(2);

/// The metrics file and when to write it.
pub(super) struct Metrics {
    pub(super) lines: JsonLines,
    pub(super) _timer: TimerFd,
}

/// Between two lines of the metrics file.
pub(super) const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// The vmm thread's state.
pub struct Vmm {
    pub(super) id: String,
    pub(super) boot_timer: Option<BootTimer>,
    pub(super) state: Lifecycle,
    pub(super) config: VmConfig,
    pub(super) mmds: mmds::Shared,
    pub(super) files: Files,
    pub(super) machine: Option<Machine>,
    pub(super) host: Host,
    /// Where host processes connect to the guest. The file is removed at the end.
    pub(super) vsock: Option<(UnixListener, SocketFile)>,
    pub(super) events: EventLoop,
    pub(super) commands: CommandReceiver,
    /// `None` after the last event.
    pub(super) subscribers: Option<Publisher>,
    pub(super) metrics: Option<Metrics>,
    /// Watched as long as the vmm thread lives.
    _termination: Termination,
    /// What happens when the vCPUs are parked.
    pub(super) parking: Option<Parking>,
    /// A live snapshot that is being copied, and who waits for it.
    pub(super) live: Option<(Live, oneshot::Sender<Answer>)>,
    /// What arrived meanwhile.
    pub(super) deferred: VecDeque<Request>,
    /// What failed and cannot be tried again ends the process, once its client was told.
    pub(super) doom: Option<Ending>,
    pub(super) due: Due,
    pub(super) spare: Spare,
    /// A machine that only waits for the load of its snapshot.
    pub(super) prepared: Option<Prepared>,
    /// The snapshot that this microVM came from.
    pub(super) origin: Option<Origin>,
}

impl Vmm {
    /// A vmm thread without a machine. `boot_timer` measures from the start to the guest's signal;
    /// metadata may be `mmds_limit` bytes of JSON.
    pub fn new(
        id: String,
        boot_timer: Option<BootTimer>,
        mmds_limit: usize,
        commands: CommandReceiver,
        subscribers: Publisher,
        termination: Termination,
        host: Host,
    ) -> Result<Self, Error> {
        let events = EventLoop::new().map_err(watch)?;
        events.add(commands.wake().as_raw_fd(), When::BecameReadable, Token::Command).map_err(watch)?;
        events.add(termination.as_raw_fd(), When::Readable, Token::Signal).map_err(watch)?;
        Ok(Self {
            id,
            boot_timer,
            state: Lifecycle::Configuring,
            config: VmConfig::default(),
            mmds: Arc::new(Mutex::new(Mmds::new(mmds_limit))),
            files: Files::default(),
            machine: None,
            host,
            vsock: None,
            events,
            commands,
            subscribers: Some(subscribers),
            metrics: None,
            _termination: termination,
            parking: None,
            live: None,
            deferred: VecDeque::new(),
            doom: None,
            due: Due::default(),
            spare: Spare::Due,
            prepared: None,
            origin: None,
        })
    }

    /// Serves commands and devices until the microVM ends.
    pub fn run(&mut self) -> Ending {
        self.follow_up();
        loop {
            if let Some(ending) = self.doom.take() {
                return self.end(ending);
            }
            let patience = match (&self.live, &self.spare) {
                (Some(_), _) => Some(Duration::ZERO),
                (None, Spare::Due) => Some(IDLE),
                (None, _) => None,
            };
            let mut tokens = match self.events.wait(patience) {
                Ok(tokens) => tokens.peekable(),
                Err(error) => return self.end(Ending::failure(format!("cannot wait for events: {error}"))),
            };
            if matches!(self.spare, Spare::Due) && tokens.peek().is_none() {
                // Whoever needs it and cannot have it says why.
                self.spare = EmptyVm::new(self.host.kvm.as_ref()).map_or(Spare::Over, Spare::Vm);
            }
            for token in tokens {
                if let Some(ending) = self.dispatch(token).or_else(|| self.doom.take()) {
                    return self.end(ending);
                }
            }
            self.go_on_live();
        }
    }

    fn dispatch(&mut self, token: Token) -> Option<Ending> {
        match token {
            Token::Command => self.serve_commands(),
            Token::Signal => return Some(Ending::clean("stopped by a signal")),
            Token::HandlerGone => return Some(Ending::failure(handler::GONE.into())),
            Token::Metrics => _ = self.flush_metrics(),
            _ => {}
        }
        let machine = self.machine.as_mut()?;
        let (serial, events) = (&machine.bus.serial, &self.events);
        match token {
            Token::Device(index, tag) => {
                if let Some(device) = machine.bus.virtio().get(usize::from(index)) {
                    device.on_event(tag);
                }
            }
            Token::Vcpu => return self.vcpus_changed(),
            Token::Reset => return Some(Ending::clean("the guest reset the machine")),
            Token::Serial => {
                machine.console.write_output(serial, events);
                machine.console.resume_input(events);
            }
            Token::OutputReady => machine.console.write_output(serial, events),
            Token::Input => machine.console.read_input(serial, events),
            Token::Command | Token::Signal | Token::Metrics | Token::HandlerGone => {}
        }
        None
    }

    /// Serves what was asked, up to what ends the process: after that nothing may run the guest.
    fn serve_commands(&mut self) {
        while self.doom.is_none()
            && let Some(request) = self.commands.next()
        {
            if self.parking.is_some() || self.live.is_some() && request.command.needs_rest() {
                self.deferred.push_back(request);
            } else {
                self.serve(request);
            }
        }
    }

    fn serve(&mut self, request: Request) {
        let Request { command, reply } = request;
        if self.state == Lifecycle::Running {
            match command {
                Command::Pause => return self.park(Parking { purpose: Purpose::Pause, reply }),
                Command::CreateSnapshot(request) if request.live => return self.begin_live(request, reply),
                Command::Reset(reset) => {
                    return match self.check_reset(&reset) {
                        Ok(()) => self.park(Parking { purpose: Purpose::Reset(reset), reply }),
                        Err(refusal) => _ = reply.send(Err(refusal)),
                    };
                }
                _ => {}
            }
        }
        // The client may have gone away; what it asked for is done all the same.
        let _ = reply.send(self.execute(command));
        self.follow_up();
    }

    /// Does what is due. A failure ends the process.
    fn follow_up(&mut self) {
        let Due { confinement, run } = std::mem::take(&mut self.due);
        if let Some(grants) = confinement
            && let Err(error) = self.confine(&grants)
        {
            // A guest that nothing confines must not run.
            self.doom = Some(Ending::failure(format!("the guest cannot run confined: {}", chain(&error))));
        } else if let Some(event) = run {
            self.resume(event);
        }
        if let Some(populating) = self.machine.as_mut().and_then(|machine| machine.populating.as_mut()) {
            populating.begin();
        }
    }

    /// Has all threads give up what the machine does not need; this one, and those that it starts for the vCPUs, keep the
    /// paths of `grants`. Until the last has, none may run the guest: it could take over one that has not.
    fn confine(&mut self, grants: &Grants) -> Result<(), Error> {
        let (Some(machine), Host { sandbox, proc, .. }) = (&mut self.machine, std::mem::take(&mut self.host)) else {
            return Ok(());
        };
        // Whoever waits for the answer goes first, also where there is one processor. The scheduler may think that this
        // thread has still to catch up, so it is asked again later.
        std::thread::yield_now();
        machine.provide(proc.as_ref().map(AsFd::as_fd));
        std::thread::yield_now();
        sandbox.confine_paths(grants)?;
        std::thread::yield_now();
        machine.start_populating(&sandbox);
        machine.start_vcpus(&sandbox, false)?;
        sandbox.filter(ThreadKind::Vmm)?;
        machine.confining.wait();
        Ok(())
    }

    pub(super) fn start(&mut self) -> Result<(), Refusal> {
        if let Some(timer) = &self.boot_timer {
            timer.start();
        }
        let machine = self.build().map_err(refuse)?;
        self.install(machine, &[])?;
        self.due.run = Some(Event::Started);
        Ok(())
    }

    /// Makes a machine that was built the one that the event loop serves. The process is due to give up what it does not
    /// need; `snapshot` are the files it came from.
    pub(super) fn install(&mut self, machine: Machine, snapshot: &[&Path]) -> Result<(), Refusal> {
        self.watch_machine(&machine).map_err(refuse)?;
        // What the machine has taken over is not needed any more.
        self.files = Files::default();
        self.host.passed.clear();
        self.machine.insert(machine).console.open_input(&self.events);
        let mut grants = files::grants(&self.config, snapshot);
        if let Some(socket) = &self.host.api_socket {
            grants.removal(socket);
        }
        self.due.confinement = Some(grants);
        Ok(())
    }

    /// Loads a snapshot into a process that was not configured otherwise. One that fails has changed
    /// too much for another try.
    pub(super) fn load(&mut self, request: &SnapshotLoad) -> Result<(), Refusal> {
        let VmConfig { logger, metrics, .. } = self.config.clone();
        if self.config != (VmConfig { logger, metrics, ..VmConfig::default() }) {
            return Err(Refusal(
                "Loading a snapshot is not supported after something else than logger and metrics was configured: \
                 start another process for it."
                    .into(),
            ));
        }
        self.load_snapshot(request).inspect_err(|refusal| {
            self.doom = Some(Ending::doomed("the snapshot could not be loaded", refusal));
        })
    }

    /// Shell, fill: everything up to the first instruction. What was made goes away on failure.
    fn build(&mut self) -> Result<Machine, Error> {
        let (Some(source), Some(kernel)) = (&self.config.boot_source, &self.files.kernel) else {
            return Err(Error::NoBootSource);
        };
        let layout = Layout::from(&self.config);
        let devices = self.devices()?;
        let vm = self.spare.take(self.host.kvm.as_ref())?;
        let shell = Shell::new(&layout, devices.len(), self.boot_timer.clone(), vm)?;
        fill::fill(&shell, source, kernel, self.files.initrd.as_ref(), &self.config, layout.topology)?;
        let mut machine = Machine::assemble(shell, self.console()?);
        machine.plug(devices)?;
        Ok(machine)
    }

    /// The devices that are configured.
    pub(super) fn devices(&self) -> Result<Vec<Device>, Error> {
        let listener = self.vsock.as_ref().map(|(listener, _)| listener);
        devices::build(&self.config, &self.files, &self.mmds, listener)
    }

    /// The host's side of the serial port, as configured.
    pub(super) fn console(&self) -> Result<Console, Error> {
        let serial = self.config.serial.clone().unwrap_or_default();
        let file = self.files.serial.as_ref().map(|file| file.try_clone()).transpose();
        let file = file.map_err(|source| Error::Event("duplicate the serial port's descriptor", source))?;
        Ok(Console::new(file, serial.rate_limiter.as_ref()))
    }

    fn watch_machine(&self, machine: &Machine) -> Result<(), Error> {
        let mut fds = vec![
            (machine.vcpu_event.as_raw_fd(), Token::Vcpu),
            (machine.bus.i8042().reset_fd().as_raw_fd(), Token::Reset),
            (machine.bus.serial().wake_fd().as_raw_fd(), Token::Serial),
        ];
        fds.extend(machine.handler_gone.iter().map(|event| (event.as_raw_fd(), Token::HandlerGone)));
        for (index, device) in (0..).zip(machine.bus.virtio()) {
            fds.extend(device.sources().into_iter().map(|source| (source.fd, Token::Device(index, source.tag))));
        }
        for (fd, token) in fds {
            self.events.add(fd, When::BecameReadable, token).map_err(watch)?;
        }
        Ok(())
    }

    /// Has the vCPUs park; the rest follows when they have.
    pub(super) fn park(&mut self, parking: Parking) {
        self.parking = Some(parking);
        self.machine.iter().for_each(Machine::stop_populating);
        for vcpu in self.machine.iter().flat_map(|machine| &machine.vcpus) {
            vcpu.wish(Wish::Park);
        }
    }

    /// Runs the guest, which `event` tells.
    pub(super) fn resume(&mut self, event: Event) {
        let Some(machine) = &self.machine else { return };
        for device in machine.bus.virtio() {
            device.resume();
        }
        for vcpu in &machine.vcpus {
            vcpu.wish(Wish::Run);
        }
        self.enter(Lifecycle::Running, event);
    }

    /// A vCPU parked or ended: completes a pause, or ends the machine.
    fn vcpus_changed(&mut self) -> Option<Ending> {
        let machine = self.machine.as_ref()?;
        let mut parked = true;
        for (id, vcpu) in machine.vcpus.iter().enumerate() {
            match vcpu.state() {
                Run::Parked => {}
                Run::Running => parked = false,
                Run::Exited(Some(Report::Failure(reason))) => {
                    METRICS.vcpu.failures.inc();
                    return Some(Ending::failure(format!("vCPU {id}: {reason}")));
                }
                Run::Exited(Some(Report::GuestEnd(how))) => {
                    return Some(Ending::clean(&format!("the guest ended: {how}")));
                }
                Run::Exited(None) => return Some(Ending::clean("the vCPUs were stopped")),
            }
        }
        if parked && let Some(Parking { purpose, reply }) = self.parking.take() {
            for device in machine.bus.virtio() {
                device.quiesce();
            }
            self.enter(Lifecycle::Paused, Event::Paused);
            let done = match purpose {
                Purpose::Pause => Ok(Reply::Done),
                Purpose::Reset(request) => self.reset_in_place(&request).map(|()| Reply::Done),
                Purpose::Snapshot(live) => self.finish_live(*live),
            };
            let _ = reply.send(done);
            self.follow_up();
            self.serve_deferred();
        }
        None
    }

    /// Serves what had to wait, as long as it has not to wait again.
    pub(super) fn serve_deferred(&mut self) {
        while self.doom.is_none()
            && self.parking.is_none()
            && self.live.is_none()
            && let Some(request) = self.deferred.pop_front()
        {
            self.serve(request);
        }
    }

    pub(super) fn enter(&mut self, state: Lifecycle, event: Event) {
        self.state = state;
        if let Some(subscribers) = &self.subscribers {
            subscribers.publish(event);
        }
    }

    /// The last things a machine does: its output, its figures, its reason. The API thread ends
    /// when it has passed that on.
    fn end(&mut self, ending: Ending) -> Ending {
        // What is half written goes with it.
        (self.live, self.parking) = (None, None);
        if let Some(machine) = &mut self.machine {
            machine.stop_populating();
            for device in machine.bus.virtio() {
                device.quiesce();
            }
            devices::finish(&machine.bus);
            machine.console.finish(&machine.bus.serial);
        }
        self.remove_sockets();
        super::restore_terminal();
        if ending.status == 0 {
            ::log::info!("The microVM ended: {}.", ending.reason);
        } else {
            ::log::error!("The microVM ended: {}.", ending.reason);
        }
        let _ = self.flush_metrics();
        if let Some(subscribers) = self.subscribers.take() {
            subscribers.publish(Event::Exited { status: ending.status, reason: ending.reason.clone() });
        }
        ending
    }
}

pub(super) fn refuse(error: impl Into<Error>) -> Refusal {
    Refusal(format!("{}.", chain(&error.into())))
}

pub(super) fn watch(source: io::Error) -> Error {
    Error::Event("watch a descriptor", source)
}
