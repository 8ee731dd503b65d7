//! The virtio devices that a configuration asks for, and changes to them while they run.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::files::{self, Files};
use super::running::Machine;
use super::{Error, lifecycle::refuse};
use crate::config::{DriveUpdate, NetUpdate, VmConfig};
use crate::control::Refusal;
use crate::devices::bus::Bus;
use crate::devices::virtio::{Block, Device, Net, VirtioMmio, Vsock, block};
use crate::metrics;
use crate::mmds::{self, Endpoint};

/// Makes them, in the order the guest sees them: drives, network interfaces, vsock, which listens on `listener`.
pub fn build(
    config: &VmConfig,
    files: &Files,
    mmds: &mmds::Shared,
    listener: Option<&UnixListener>,
) -> Result<Vec<Device>, Error> {
    let mut devices = Vec::new();
    for drive in &config.drives {
        let fail = |source| Error::Open { what: "path_on_host", path: drive.path_on_host.clone(), source };
        let file = files.drive(&drive.drive_id).unwrap_or_else(missing).map_err(fail)?;
        let block = Block::new(drive, file, metrics::register_block(&drive.drive_id))
            .map_err(|source| Error::Drive { id: drive.drive_id.clone(), source })?;
        devices.push(Device::Block(Box::new(block)));
    }
    for interface in &config.network_interfaces {
        let fail = |source| Error::Event("duplicate a TAP's descriptor", source);
        let tap = files.tap(&interface.iface_id).unwrap_or_else(missing).map_err(fail)?;
        let fail = |source| Error::Net { id: interface.iface_id.clone(), source };
        let mut net = Net::new(interface, tap, metrics::register_net(&interface.iface_id)).map_err(fail)?;
        if let Some(service) = config.mmds.as_ref().filter(|mmds| mmds.network_interfaces.contains(&interface.iface_id))
        {
            net.serve(Endpoint::new(service.ipv4_address, Arc::clone(mmds))).map_err(fail)?;
        }
        devices.push(Device::Net(Box::new(net)));
    }
    if let (Some(vsock), Some(listener)) = (&config.vsock, listener) {
        let device = listener.try_clone().and_then(|listener| Vsock::new(vsock, listener));
        let fail = |source| Error::Event("make the vsock device's descriptors", source);
        devices.push(Device::Vsock(Box::new(device.map_err(fail)?)));
    }
    Ok(devices)
}

/// Nothing was opened for a device: it was not configured.
fn missing<T>() -> io::Result<T> {
    Err(io::ErrorKind::NotFound.into())
}

fn device_at(machine: Option<&Machine>, index: usize) -> Option<&VirtioMmio> {
    machine?.bus.virtio().get(index).map(AsRef::as_ref)
}

/// Calls `each` with every drive in turn; nothing of theirs is in flight.
///
/// # Errors
/// The first of `each`.
pub fn each_drive<E>(bus: &Bus, mut each: impl FnMut(&mut Block) -> Result<(), E>) -> Result<(), E> {
    bus.virtio().iter().try_for_each(|device| {
        device.update(|device| match device {
            Device::Block(block) => each(block),
            _ => Ok(()),
        })
    })
}

/// What the guest wrote is there for the next process.
pub fn finish(bus: &Bus) {
    let Ok(()) = each_drive(bus, |drive| {
        drive.finish();
        Ok::<_, Infallible>(())
    });
}

/// Changes a drive. What can fail comes first, so that a refused PATCH changes nothing.
pub fn update_drive(config: &mut VmConfig, machine: Option<&Machine>, update: &DriveUpdate) -> Result<(), Refusal> {
    let unknown = || Refusal(format!("drive_id {:?} names no drive: see GET /vm/config", update.drive_id));
    let index = config.drives.iter().position(|d| d.drive_id == update.drive_id).ok_or_else(unknown)?;
    let device = device_at(machine, index).ok_or_else(unknown)?;
    let drive = &mut config.drives[index];
    if let Some(path) = &update.path_on_host {
        let refused = |source| refuse(Error::Drive { id: update.drive_id.clone(), source });
        if drive.overlay.is_some() {
            return Err(refused(block::Error::HasOverlay));
        }
        let file = files::open_drive(path, drive.is_read_only).map_err(refuse)?;
        let updated = device.update(|device| match device {
            Device::Block(block) => block.update_backend(file),
            _ => Ok(()),
        });
        updated.map_err(refused)?;
        device.config_changed();
        drive.path_on_host.clone_from(path);
    }
    if let Some(limits) = &update.rate_limiter {
        device.adjust(|device| {
            if let Device::Block(block) = device {
                block.update_rate_limiter(limits);
            }
        });
        limits.apply(&mut drive.rate_limiter);
    }
    Ok(())
}

/// Changes a network interface.
pub fn update_interface(config: &mut VmConfig, machine: Option<&Machine>, update: &NetUpdate) -> Result<(), Refusal> {
    let unknown = || Refusal(format!("iface_id {:?} names no interface: see GET /vm/config", update.iface_id));
    let position = config.network_interfaces.iter().position(|i| i.iface_id == update.iface_id).ok_or_else(unknown)?;
    let device = device_at(machine, config.drives.len() + position).ok_or_else(unknown)?;
    device.adjust(|device| {
        if let Device::Net(net) = device {
            net.update_rate_limiters(update);
        }
    });
    let interface = &mut config.network_interfaces[position];
    update.rx_rate_limiter.apply(&mut interface.rx_rate_limiter);
    update.tx_rate_limiter.apply(&mut interface.tx_rate_limiter);
    Ok(())
}
