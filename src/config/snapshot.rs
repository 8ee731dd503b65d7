//! Requests that make and load snapshots.

use std::path::PathBuf;

use super::{ConfigError, HostDevice, HugePages, MacAddress, OverlayConfig, check_path, check_resource_id};

/// What a memory file is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SnapshotType {
    /// Everything: it can be loaded by itself.
    #[default]
    Full,
    /// What changed since the microVM was loaded, or everything if it was booted.
    Diff,
}

/// PUT /snapshot/create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCreate {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file.
    pub mem_file_path: PathBuf,
    /// What it is to hold.
    pub kind: SnapshotType,
    /// Of a microVM that runs: it is paused only for what it writes while its memory is copied. A paused one stays so.
    pub live: bool,
}

impl SnapshotCreate {
    /// The same if it is legal; the files are not looked at.
    ///
    /// # Errors
    /// A path is empty, or both are the same.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_path("snapshot_path", &self.snapshot_path)?;
        check_path("mem_file_path", &self.mem_file_path)?;
        if self.snapshot_path == self.mem_file_path {
            return Err(ConfigError::SnapshotOneFile(self.snapshot_path));
        }
        Ok(self)
    }
}

/// What a load changes of a drive; what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveOverride {
    /// Which drive.
    pub drive_id: String,
    /// Its file: as long, and with the same content, as the snapshot's.
    pub path_on_host: Option<PathBuf>,
    /// Where this guest's writes go.
    pub overlay: Option<OverlayConfig>,
}

/// What a load changes of a network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOverride {
    /// Which interface.
    pub iface_id: String,
    /// Its TAP.
    pub host_device: HostDevice,
    /// Its address from now on; `None` leaves it as it was.
    pub guest_mac: Option<MacAddress>,
}

/// Where guest memory comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MemoryBackendType {
    /// The memory file is mapped.
    #[default]
    File,
    /// A process serves page faults.
    Uffd,
}

/// PUT /snapshot/load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotLoad {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file, or the socket of the page fault handler.
    pub backend_path: PathBuf,
    /// Which of both.
    pub backend: MemoryBackendType,
    /// Run at once.
    pub resume_vm: bool,
    /// Keep a record of the pages the guest writes.
    pub track_dirty_pages: bool,
    /// Other TAPs and addresses.
    pub network_overrides: Vec<NetOverride>,
    /// Other drive files.
    pub drive_overrides: Vec<DriveOverride>,
    /// Another path for the vsock device.
    pub vsock_override: Option<PathBuf>,
    /// The guest's clock catches up with the time that went by.
    pub clock_realtime: bool,
    /// Other backing of guest RAM than the snapshot's.
    pub huge_pages: Option<HugePages>,
    /// The pages to populate beside the running vCPUs.
    pub working_set_path: Option<PathBuf>,
}

impl SnapshotLoad {
    /// The same if it is legal; the files are not looked at.
    ///
    /// # Errors
    /// A path is empty, or an id is none.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_path("snapshot_path", &self.snapshot_path)?;
        check_path("backend_path", &self.backend_path)?;
        for over in &self.network_overrides {
            check_resource_id("iface_id", &over.iface_id)?;
        }
        for over in &self.drive_overrides {
            check_resource_id("drive_id", &over.drive_id)?;
            over.path_on_host.as_deref().map_or(Ok(()), |path| check_path("path_on_host", path))?;
            if over.path_on_host.is_none() && over.overlay.is_none() {
                return Err(ConfigError::EmptyUpdate("name path_on_host or overlay"));
            }
        }
        self.vsock_override.as_deref().map_or(Ok(()), |path| check_path("uds_path", path))?;
        self.working_set_path.as_deref().map_or(Ok(()), |path| check_path("working_set_path", path))?;
        Ok(self)
    }
}

/// PUT /snapshot/reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotReset {
    /// Run at once.
    pub resume_vm: bool,
    /// What the guest wrote to its drives since stays there, although its memory knows nothing of it.
    pub keep_drive_writes: bool,
}
