//! What goes over the wire about snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Overlay;

/// PUT /snapshot/create.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateParams {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file.
    pub mem_file_path: PathBuf,
    /// What the memory file holds.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Of a microVM that runs.
    #[serde(default)]
    pub live: bool,
    /// Have both files on disk before the answer, which they always are.
    #[serde(default = "yes")]
    pub sync_snapshot_files: bool,
}

/// See [`SnapshotCreateParams::snapshot_type`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// Everything.
    #[default]
    Full,
    /// What changed.
    Diff,
}

/// PUT /snapshot/load.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoadParams {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// Where guest memory comes from.
    pub mem_backend: Option<MemoryBackend>,
    /// Deprecated: the memory file.
    pub mem_file_path: Option<PathBuf>,
    /// Deprecated: track_dirty_pages.
    pub enable_diff_snapshots: Option<bool>,
    /// Keep a record of the pages the guest writes.
    pub track_dirty_pages: Option<bool>,
    /// Run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other TAPs and addresses.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another path for vsock.
    pub vsock_override: Option<VsockOverride>,
    /// Other drive files.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// The guest's clock catches up.
    #[serde(default)]
    pub clock_realtime: bool,
    /// The backing of guest RAM.
    pub huge_pages: Option<SnapshotHugePages>,
    /// Which pages a first run touches.
    pub working_set_path: Option<PathBuf>,
}

/// See [`SnapshotLoadParams::huge_pages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotHugePages {
    /// As it was.
    Snapshot,
    /// Base pages.
    None,
    /// `MADV_HUGEPAGE`.
    Transparent,
    /// 2 MiB pages from hugetlbfs.
    #[serde(rename = "2M")]
    Size2M,
}

/// See [`SnapshotLoadParams::mem_backend`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// Its kind.
    pub backend_type: MemoryBackendType,
    /// The memory file, or the socket of the page fault handler.
    pub backend_path: PathBuf,
}

/// See [`MemoryBackend::backend_type`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file is mapped.
    File,
    /// A process serves page faults.
    Uffd,
}

/// See [`SnapshotLoadParams::network_overrides`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// Its TAP.
    pub host_dev_name: String,
    /// Its address.
    pub guest_mac: Option<String>,
}

/// See [`SnapshotLoadParams::vsock_override`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Where host processes connect.
    pub uds_path: PathBuf,
}

/// See [`SnapshotLoadParams::drive_overrides`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Which drive.
    pub drive_id: String,
    /// Its file.
    pub path_on_host: Option<PathBuf>,
    /// Where this guest's writes go.
    pub overlay: Option<Overlay>,
}

/// PUT /snapshot/reset.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotResetParams {
    /// Run at once.
    #[serde(default = "yes")]
    pub resume_vm: bool,
    /// Leave on the drives what the guest wrote.
    #[serde(default)]
    pub keep_drive_writes: bool,
}

fn yes() -> bool {
    true
}
