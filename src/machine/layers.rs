//! Overlays of drives in snapshots: what a guest wrote is kept beside the state file, and every clone
//! reads that and writes to a layer of its own.

use std::path::{Path, PathBuf};

use super::running::Machine;
use super::snapshot::SnapshotError;
use super::snapshot::files::file_error;
use super::{Error, devices};
use crate::config::{DriveConfig, DriveOverride, OverlayConfig, SnapshotCreate, SnapshotLoad, VmConfig};
use crate::devices::virtio::{Block, block};
use crate::snapshot::Id;
use crate::snapshot::draft::Draft;

/// Where the snapshot of a state file has what its guest wrote to the overlay of a drive.
fn layer_path(snapshot: &Path, drive_id: &str) -> PathBuf {
    let mut path = snapshot.as_os_str().to_owned();
    path.push(format!(".{drive_id}.layer"));
    path.into()
}

/// The layers that a snapshot will have.
pub fn paths(config: &VmConfig, request: &SnapshotCreate) -> Vec<PathBuf> {
    let overlays = config.drives.iter().filter(|drive| drive.overlay.is_some());
    overlays.map(|drive| layer_path(&request.snapshot_path, &drive.drive_id)).collect()
}

/// The layers that drives are made of.
pub fn in_use(config: &VmConfig) -> impl Iterator<Item = &PathBuf> {
    let overlays = config.drives.iter().filter_map(|drive| drive.overlay.as_ref());
    overlays
        .flat_map(|OverlayConfig { layer_path, lower, .. }| layer_path.iter().chain(lower.iter().map(|(path, _)| path)))
}

/// Writes the layer of each overlay; to be published.
pub fn write(machine: &Machine, request: &SnapshotCreate, id: Id) -> Result<Vec<(PathBuf, Draft)>, Error> {
    let mut drafts = Vec::new();
    devices::each_drive(&machine.bus, |drive| {
        if !drive.has_overlay() {
            return Ok::<_, Error>(());
        }
        let path = &layer_path(&request.snapshot_path, drive.drive_id());
        let draft = Draft::create(path).map_err(file_error("create", path))?;
        drive.copy_overlay(draft.file(), id).map_err(|source| failed(drive, source))?;
        drafts.push((path.clone(), draft));
        Ok(())
    })?;
    Ok(drafts)
}

/// Has the layers on disk; until then nothing of the snapshot may be in its place.
pub fn sync(layers: &[(PathBuf, Draft)]) -> Result<(), Error> {
    layers.iter().try_for_each(|(path, layer)| layer.sync().map_err(file_error("write", path)))
}

/// Puts the layers in their places.
pub fn publish(layers: Vec<(PathBuf, Draft)>) -> Result<(), Error> {
    let publish = |(path, layer): (PathBuf, Draft)| layer.publish().map_err(file_error("create", &path));
    layers.into_iter().try_for_each(publish)
}

/// Drops what was written since the load.
pub fn clear(machine: &Machine) -> Result<(), SnapshotError> {
    devices::each_drive(&machine.bus, |drive| drive.clear_overlay().map_err(|source| failed(drive, source)))
}

fn failed(drive: &Block, source: block::Error) -> SnapshotError {
    SnapshotError::Layer { id: drive.drive_id().to_owned(), source }
}

/// What a load of snapshot `id` makes of the drives in its configuration.
pub fn override_drives(drives: &mut [DriveConfig], request: &SnapshotLoad, id: Id) -> Result<(), SnapshotError> {
    for drive in &mut *drives {
        if let Some(overlay) = &mut drive.overlay {
            let lower = Some((layer_path(&request.snapshot_path, &drive.drive_id), id));
            *overlay = OverlayConfig { layer_path: None, fresh: true, lower };
        }
    }
    for DriveOverride { drive_id, path_on_host, overlay } in &request.drive_overrides {
        let drive = drives.iter_mut().find(|drive| drive.drive_id == *drive_id);
        let drive = drive.ok_or_else(|| SnapshotError::Override(format!("drive {drive_id:?}")))?;
        if let Some(path) = path_on_host {
            drive.path_on_host.clone_from(path);
        }
        if let Some(OverlayConfig { layer_path, .. }) = overlay {
            let lower = drive.overlay.take().and_then(|overlay| overlay.lower);
            drive.overlay = Some(OverlayConfig { layer_path: layer_path.clone(), fresh: true, lower });
        }
    }
    Ok(())
}
