//! What the vmm thread does with each command.

use std::os::fd::AsRawFd;
use std::sync::{MutexGuard, PoisonError};

use serde_json::{Map, Value};
use vmm_sys_util::timerfd::TimerFd;

use super::lifecycle::{METRICS_PERIOD, Metrics, Vmm, refuse, watch};
use super::{Error, chain, devices};
use crate::config::{MetricsConfig, VsockConfig};
use crate::control::{Answer, Command, Event, Lifecycle, Refusal, Reply};
use crate::event_loop::{Token, When};
use crate::log;
use crate::metrics::JsonLines;
use crate::mmds::Mmds;
use crate::mmds::store::ChangeError;
use crate::socket::{self, Existing};

impl Vmm {
    /// Executes a command now; for a configuration file, before the event loop runs.
    pub fn execute(&mut self, command: Command) -> Answer {
        command.permitted(self.state)?;
        match command {
            Command::GetInstance => return Ok(Reply::Instance { id: self.id.clone(), state: self.state }),
            Command::GetConfig => return Ok(Reply::Config(Box::new(self.config.clone()))),
            Command::GetMachine => return Ok(Reply::Machine(self.config.machine.clone())),
            Command::SetBootSource(source) => {
                self.files.set_boot_source(&source).map_err(refuse)?;
                self.config.boot_source = Some(source);
            }
            Command::SetMachine(machine) => self.config.machine = machine,
            Command::PatchMachine(update) => self.config.machine = update.apply(&self.config.machine)?,
            Command::SetCpu(cpu) => self.config.cpu = Some(cpu),
            Command::SetDrive(drive) => {
                let mut config = self.config.clone();
                config.set_drive((*drive).clone())?;
                self.files.set_drive(&drive).map_err(refuse)?;
                self.config = config;
            }
            Command::UpdateDrive(update) => {
                devices::update_drive(&mut self.config, self.machine.as_ref(), &update)?;
            }
            Command::SetNetworkInterface(interface) => {
                let mut config = self.config.clone();
                config.set_network_interface((*interface).clone())?;
                self.files.set_interface(&interface, &self.host.passed).map_err(refuse)?;
                self.config = config;
            }
            Command::UpdateNetworkInterface(update) => {
                devices::update_interface(&mut self.config, self.machine.as_ref(), &update)?;
            }
            Command::SetVsock(vsock) => self.set_vsock(vsock)?,
            Command::SetSerial(serial) => {
                self.files.set_serial(serial.serial_out_path.as_deref()).map_err(refuse)?;
                self.config.serial = Some(serial);
            }
            Command::SetLogger(logger) => {
                log::configure(&logger).map_err(|source| {
                    let path = logger.log_path.clone().unwrap_or_default();
                    refuse(Error::Open { what: "log_path", path, source })
                })?;
                self.config.logger = Some(logger.over(self.config.logger.take().unwrap_or_default()));
            }
            Command::SetMetrics(config) => {
                self.metrics = Some(self.open_metrics(&config).map_err(refuse)?);
                self.config.metrics = Some(config);
            }
            Command::SetMmds(config) => {
                self.config.set_mmds(config.clone())?;
                self.mmds().configure(&config);
            }
            Command::GetMetadata => {
                let metadata = self.mmds().store.value().cloned();
                return Ok(Reply::Metadata(metadata.unwrap_or_else(|| Value::Object(Map::new()))));
            }
            Command::PutMetadata(value) => return changed(self.mmds().store.put(value)),
            Command::PatchMetadata(patch) => return changed(self.mmds().store.patch(patch)),
            Command::Start => self.start()?,
            Command::FlushMetrics => self.flush_metrics()?,
            Command::SendCtrlAltDel => self.press_ctrl_alt_del()?,
            Command::CreateSnapshot(request) => self.create_snapshot(&request).map_err(refuse)?,
            Command::LoadSnapshot(request) => self.load(&request)?,
            Command::Reset(request) => {
                self.check_reset(&request)?;
                self.reset_in_place(&request)?;
            }
            // A running one is paused by way of `serve`.
            Command::Pause => {}
            Command::Resume if self.state == Lifecycle::Running => {}
            Command::Resume => self.due.run = Some(Event::Resumed),
        }
        Ok(Reply::Done)
    }

    fn mmds(&self) -> MutexGuard<'_, Mmds> {
        // A document is replaced whole, so it is whole even if a thread died with the lock.
        self.mmds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_vsock(&mut self, vsock: VsockConfig) -> Result<(), Refusal> {
        let mut config = self.config.clone();
        config.set_vsock(vsock.clone())?;
        let same = self.config.vsock.as_ref().is_some_and(|before| before.uds_path == vsock.uds_path);
        if !(same && self.vsock.as_ref().is_some_and(|(_, file)| file.is_ours())) {
            let bound = socket::bind(&vsock.uds_path, Existing::Refused)
                .map_err(|source| Refusal(format!("uds_path: {}.", chain(&source))))?;
            self.vsock = Some(bound);
        }
        self.config = config;
        Ok(())
    }

    /// Removes the sockets that were bound, as far as they are still ours.
    pub fn remove_sockets(&mut self) {
        self.vsock = None;
    }

    fn open_metrics(&self, config: &MetricsConfig) -> Result<Metrics, Error> {
        if self.metrics.is_some() {
            return Err(Error::MetricsTwice);
        }
        let open = |source| Error::Open { what: "metrics_path", path: config.metrics_path.clone(), source };
        let lines = JsonLines::open(config, &self.id).map_err(open)?;
        let mut timer = TimerFd::new().map_err(|error| watch(error.into()))?;
        timer.reset(METRICS_PERIOD, Some(METRICS_PERIOD)).map_err(|error| watch(error.into()))?;
        self.events.add(timer.as_raw_fd(), When::BecameReadable, Token::Metrics).map_err(watch)?;
        Ok(Metrics { lines, _timer: timer })
    }

    /// Writes a line: on demand, now and then, and at the end. A reader that went away is counted in the metrics; without
    /// a metrics file there is nothing to do, and that is no error.
    pub(super) fn flush_metrics(&mut self) -> Result<(), Refusal> {
        let Some(metrics) = &mut self.metrics else { return Ok(()) };
        metrics.lines.write().map_err(|error| Refusal(format!("Cannot write the metrics: {error}.")))
    }

    fn press_ctrl_alt_del(&self) -> Result<(), Refusal> {
        match &self.machine {
            Some(machine) if machine.bus.i8042().press_ctrl_alt_del() => Ok(()),
            _ => Err(Refusal("The guest has not read the last keys yet: try again.".into())),
        }
    }
}

fn changed(metadata: Result<(), ChangeError>) -> Answer {
    match metadata {
        Ok(()) => Ok(Reply::Done),
        Err(error @ ChangeError::LimitExceeded(_)) => Ok(Reply::DoesNotFit(Refusal(format!("{error}.")))),
        Err(error) => Err(Refusal(format!("{error}."))),
    }
}
