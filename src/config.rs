//! The validated configuration: plain data that can only hold legal values, and every limit.
//!
//! Paths are data here; the vmm thread opens them when it accepts the configuration.

mod cpu;
mod error;
mod list;
mod mmds;
mod net;
mod sandbox;
mod snapshot;
mod vsock;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use cpu::{BitMap, Capability, CpuConfig, CpuidModifier, CpuidRegister, MsrModifier, parse_number};
pub use error::ConfigError;
pub use list::at_most;
pub use mmds::{DEFAULT_MMDS_ADDRESS, MmdsConfig, MmdsVersion};
pub use net::{HostDevice, MAX_INTERFACE_NAME, MIN_MTU, MacAddress, NetConfig, NetUpdate};
pub use sandbox::{AllowedPath, LandlockConfig, SandboxConfig, SeccompConfig};
pub use snapshot::{
    DriveOverride, MemoryBackendType, NetOverride, SnapshotCreate, SnapshotLoad, SnapshotReset, SnapshotType,
};
pub use vsock::{GuestCid, VsockConfig};

/// Whether `id` may name a resource: `[A-Za-z0-9_]+`.
///
/// # Errors
/// [`ConfigError::ResourceId`], naming the JSON field `field`.
pub fn check_resource_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    if !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Ok(());
    }
    Err(ConfigError::ResourceId { field, id: id.to_owned() })
}

fn check_path(field: &'static str, path: &std::path::Path) -> Result<(), ConfigError> {
    if path.as_os_str().is_empty() { Err(ConfigError::EmptyPath(field)) } else { Ok(()) }
}

/// Most vCPUs a microVM may have.
pub const MAX_VCPUS: u8 = 32;
/// Most guest memory in MiB: beyond it no host of today could back it, and arithmetic stays exact.
pub const MAX_MEM_SIZE_MIB: u64 = 16 << 20;
/// Most virtio devices: one I/O APIC pin each, from [`FIRST_IRQ`] to pin 23.
pub const MAX_VIRTIO_DEVICES: usize = 19;
/// The I/O APIC pin of the first virtio device; the ones below belong to ISA devices.
pub const FIRST_IRQ: u32 = 5;
/// Longest kernel command line in bytes, without the terminating NUL (`COMMAND_LINE_SIZE` of x86 Linux).
pub const MAX_CMDLINE: usize = 2047;
/// Kernel arguments when the boot source names none.
pub const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// How the guest's RAM is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// Base pages; whatever the host's transparent huge page policy does.
    #[default]
    None,
    /// `MADV_HUGEPAGE` on guest RAM.
    Transparent,
    /// 2 MiB pages from hugetlbfs.
    Size2M,
}

/// vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// 1 to [`MAX_VCPUS`]; even or 1 when `smt` is set.
    pub vcpu_count: u8,
    /// Guest RAM in MiB, 1 to [`MAX_MEM_SIZE_MIB`].
    pub mem_size_mib: u64,
    /// Show the guest two threads per core.
    pub smt: bool,
    /// Keep a record of the pages the guest writes.
    pub track_dirty_pages: bool,
    /// Backing of guest RAM.
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128, smt: false, track_dirty_pages: false, huge_pages: HugePages::None }
    }
}

impl MachineConfig {
    /// The same if it is legal.
    ///
    /// # Errors
    /// What is out of range.
    pub fn checked(self) -> Result<Self, ConfigError> {
        if self.vcpu_count == 0 || self.vcpu_count > MAX_VCPUS {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        if self.smt && self.vcpu_count > 1 && self.vcpu_count % 2 == 1 {
            return Err(ConfigError::OddVcpuCount(self.vcpu_count));
        }
        if self.mem_size_mib == 0 || self.mem_size_mib > MAX_MEM_SIZE_MIB {
            return Err(ConfigError::MemSize(self.mem_size_mib));
        }
        if self.huge_pages == HugePages::Size2M && self.mem_size_mib % 2 == 1 {
            return Err(ConfigError::OddMemSize(self.mem_size_mib));
        }
        Ok(self)
    }
}

/// How kernel and initrd get into guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ImageMapping {
    /// Page-aligned pieces are mapped from their files, copy-on-write.
    #[default]
    Shared,
    /// Everything is copied.
    Private,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// An ELF vmlinux or a bzImage.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    pub initrd_path: Option<PathBuf>,
    /// Kernel arguments as the client gave them; `None` means [`DEFAULT_BOOT_ARGS`].
    pub boot_args: Option<String>,
    /// Map or copy; `None` leaves the choice to the release.
    pub image_mapping: Option<ImageMapping>,
}

impl BootSource {
    /// The same if it is legal; the files are not looked at.
    ///
    /// # Errors
    /// An empty path, or arguments the kernel could not take.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_path("kernel_image_path", &self.kernel_image_path)?;
        self.initrd_path.as_deref().map_or(Ok(()), |path| check_path("initrd_path", path))?;
        if let Some(args) = &self.boot_args {
            if let Some(character) = args.chars().find(|c| !matches!(c, ' '..='~')) {
                return Err(ConfigError::BootArgsCharacter(character));
            }
            if args.len() > MAX_CMDLINE {
                return Err(ConfigError::BootArgsLength(args.len()));
            }
        }
        Ok(self)
    }
}

/// One token bucket: `size` tokens, refilled evenly over `refill_time_ms`. Neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64, u64)", into = "(u64, u64, u64)")]
pub struct TokenBucketConfig {
    /// Capacity in tokens (bytes or operations).
    pub size: u64,
    /// Milliseconds to refill an empty bucket.
    pub refill_time_ms: u64,
    /// Extra tokens spent first and never refilled.
    pub one_time_burst: u64,
}

impl TokenBucketConfig {
    /// A bucket, or `None` if `size` or `refill_time_ms` is 0: that means no limit.
    pub fn new(size: u64, refill_time_ms: u64, one_time_burst: u64) -> Option<Self> {
        (size != 0 && refill_time_ms != 0).then_some(Self { size, refill_time_ms, one_time_burst })
    }
}

/// As it is in a snapshot, where it may be anything.
impl TryFrom<(u64, u64, u64)> for TokenBucketConfig {
    type Error = &'static str;

    fn try_from((size, refill_time_ms, one_time_burst): (u64, u64, u64)) -> Result<Self, Self::Error> {
        Self::new(size, refill_time_ms, one_time_burst).ok_or("a token bucket without size or refill time")
    }
}

impl From<TokenBucketConfig> for (u64, u64, u64) {
    fn from(bucket: TokenBucketConfig) -> Self {
        (bucket.size, bucket.refill_time_ms, bucket.one_time_burst)
    }
}

/// Limits of one direction of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    pub ops: Option<TokenBucketConfig>,
}

/// A change to one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BucketUpdate {
    /// Leave it as it is.
    #[default]
    Keep,
    /// Switch it off.
    Off,
    /// Replace it.
    Set(TokenBucketConfig),
}

/// A change to a rate limiter: what is left out stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimiterUpdate {
    /// Bytes.
    pub bandwidth: BucketUpdate,
    /// Operations.
    pub ops: BucketUpdate,
}

impl BucketUpdate {
    /// Changes `bucket`, which `make` makes of its configuration.
    pub fn apply<B>(self, bucket: &mut Option<B>, make: impl FnOnce(TokenBucketConfig) -> B) {
        match self {
            Self::Keep => {}
            Self::Off => *bucket = None,
            Self::Set(config) => *bucket = Some(make(config)),
        }
    }
}

impl RateLimiterUpdate {
    /// Changes `limits`.
    pub fn apply(&self, limits: &mut RateLimiterConfig) {
        self.bandwidth.apply(&mut limits.bandwidth, |config| config);
        self.ops.apply(&mut limits.ops, |config| config);
    }
}

/// What FLUSH means to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CacheType {
    /// FLUSH is not offered; the host writes back when it likes.
    #[default]
    Unsafe,
    /// FLUSH is offered and reaches the disk.
    Writeback,
}

/// How a drive's requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum IoEngine {
    /// `preadv`/`pwritev` on the vmm thread.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// A virtio-block drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveConfig {
    /// Resource id, `[A-Za-z0-9_]+`.
    pub drive_id: String,
    /// The root drive is vda and adds `root=` to the kernel arguments.
    pub is_root_device: bool,
    /// A raw image or a block device.
    pub path_on_host: PathBuf,
    /// The guest cannot write.
    pub is_read_only: bool,
    /// Boot from this partition of the root drive.
    pub partuuid: Option<String>,
    /// Meaning of FLUSH.
    pub cache_type: CacheType,
    /// Sync or Async.
    pub io_engine: IoEngine,
    /// Limits; none if both buckets are `None`.
    pub rate_limiter: RateLimiterConfig,
    /// Offer discard and write-zeroes.
    pub discard: bool,
    /// The guest's writes go to a layer; the file at `path_on_host` is only read.
    pub overlay: Option<OverlayConfig>,
}

/// Where a drive's writes go instead of its file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OverlayConfig {
    /// A layer that lasts; without it a temporary file that nobody else finds.
    pub layer_path: Option<PathBuf>,
    /// The drive comes out of a snapshot, whose guest has written nothing to it yet.
    #[serde(skip)]
    pub fresh: bool,
    /// What the snapshot's guest had written, and the snapshot's id.
    #[serde(skip)]
    pub lower: Option<(PathBuf, [u8; 16])>,
}

impl DriveConfig {
    /// The same if it is legal; the file is not looked at.
    ///
    /// # Errors
    /// A bad id, path or partition UUID, or options that exclude each other.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_resource_id("drive_id", &self.drive_id)?;
        check_path("path_on_host", &self.path_on_host)?;
        if let Some(partuuid) = &self.partuuid {
            // It goes into the kernel command line: nothing that could end the argument.
            if partuuid.is_empty() || !partuuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
                return Err(ConfigError::PartUuid(partuuid.clone()));
            }
        }
        if self.discard && self.is_read_only {
            return Err(ConfigError::DiscardReadOnly(self.drive_id));
        }
        if let Some(overlay) = &self.overlay {
            if self.is_read_only {
                return Err(ConfigError::OverlayReadOnly(self.drive_id));
            }
            overlay.layer_path.as_deref().map_or(Ok(()), |path| check_path("layer_path", path))?;
        }
        Ok(self)
    }
}

/// A change to a drive of a running microVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// Reopen with this file; capacity and configuration interrupt follow.
    pub path_on_host: Option<PathBuf>,
    /// New limits.
    pub rate_limiter: Option<RateLimiterUpdate>,
}

impl DriveUpdate {
    /// The same if it is legal and changes something.
    ///
    /// # Errors
    /// A bad id or path, or nothing to change.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_resource_id("drive_id", &self.drive_id)?;
        self.path_on_host.as_deref().map_or(Ok(()), |path| check_path("path_on_host", path))?;
        if self.path_on_host.is_none() && self.rate_limiter.is_none() {
            return Err(ConfigError::EmptyUpdate("name path_on_host or rate_limiter"));
        }
        Ok(self)
    }
}

/// Where the serial port's output goes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SerialConfig {
    /// A file or FIFO; standard output if `None`.
    pub serial_out_path: Option<PathBuf>,
    /// Bytes over the limit are dropped and counted.
    pub rate_limiter: Option<TokenBucketConfig>,
}

/// The log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoggerConfig {
    /// A file or FIFO; standard error if `None`.
    pub log_path: Option<PathBuf>,
    /// Least severe level that is written.
    pub level: Option<::log::LevelFilter>,
    /// Write the level.
    pub show_level: Option<bool>,
    /// Write file and line.
    pub show_log_origin: Option<bool>,
    /// Only records whose module path starts so.
    pub module: Option<String>,
}

/// The metrics file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MetricsConfig {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
    /// Put the instance id in every line.
    pub emit_id: bool,
    /// Put these in every line.
    pub properties: Vec<(String, String)>,
}

/// Everything configured so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmConfig {
    /// vCPUs and memory.
    pub machine: MachineConfig,
    /// What the guest sees of its CPU.
    #[serde(skip)]
    pub cpu: Option<CpuConfig>,
    /// Kernel and initrd.
    pub boot_source: Option<BootSource>,
    /// The root drive is first, the others in the order they were configured.
    #[serde(deserialize_with = "at_most::<_, _, MAX_VIRTIO_DEVICES>")]
    pub drives: Vec<DriveConfig>,
    /// In the order they were configured; their devices follow the drives'.
    #[serde(deserialize_with = "at_most::<_, _, MAX_VIRTIO_DEVICES>")]
    pub network_interfaces: Vec<NetConfig>,
    /// Vsock.
    pub vsock: Option<VsockConfig>,
    /// Serial port.
    pub serial: Option<SerialConfig>,
    /// Log; the process's own, in no snapshot.
    #[serde(skip)]
    pub logger: Option<LoggerConfig>,
    /// Metrics; as the log.
    #[serde(skip)]
    pub metrics: Option<MetricsConfig>,
    /// Metadata service.
    pub mmds: Option<MmdsConfig>,
}

impl VmConfig {
    /// How many virtio devices are configured.
    pub fn virtio_devices(&self) -> usize {
        self.drives.len() + self.network_interfaces.len() + usize::from(self.vsock.is_some())
    }

    /// Adds an interface, or replaces the one of the same id.
    ///
    /// # Errors
    /// An address that another one has, or more devices than interrupt lines; nothing changed then.
    pub fn set_network_interface(&mut self, interface: NetConfig) -> Result<(), ConfigError> {
        let mut others = self.network_interfaces.iter().filter(|other| other.iface_id != interface.iface_id);
        if let Some(mac) = interface.guest_mac
            && let Some(other) = others.find(|other| other.guest_mac == Some(mac))
        {
            return Err(ConfigError::DuplicateMac { mac, other: other.iface_id.clone() });
        }
        match self.network_interfaces.iter().position(|other| other.iface_id == interface.iface_id) {
            Some(index) => self.network_interfaces[index] = interface,
            None if self.virtio_devices() >= MAX_VIRTIO_DEVICES => {
                return Err(ConfigError::TooManyDevices(interface.iface_id));
            }
            None => self.network_interfaces.push(interface),
        }
        Ok(())
    }

    /// Replaces the configuration of the metadata service.
    ///
    /// # Errors
    /// It names an interface that does not exist; nothing changed then.
    pub fn set_mmds(&mut self, mmds: MmdsConfig) -> Result<(), ConfigError> {
        let exists = |id: &String| self.network_interfaces.iter().any(|interface| interface.iface_id == *id);
        if let Some(id) = mmds.network_interfaces.iter().find(|id| !exists(id)) {
            return Err(ConfigError::MmdsInterface(id.clone()));
        }
        self.mmds = Some(mmds);
        Ok(())
    }

    /// Sets or replaces the vsock device.
    ///
    /// # Errors
    /// It would be one device too many; nothing changed then.
    pub fn set_vsock(&mut self, vsock: VsockConfig) -> Result<(), ConfigError> {
        if self.vsock.is_none() && self.virtio_devices() >= MAX_VIRTIO_DEVICES {
            return Err(ConfigError::TooManyDevices("vsock".to_owned()));
        }
        self.vsock = Some(vsock);
        Ok(())
    }

    /// Adds a drive, or replaces the one of the same id. The root drive moves to the front: it is vda.
    ///
    /// # Errors
    /// A second root drive, or more drives than interrupt lines; nothing changed then.
    pub fn set_drive(&mut self, drive: DriveConfig) -> Result<(), ConfigError> {
        let root = self.drives.iter().find(|other| other.is_root_device && other.drive_id != drive.drive_id);
        if let (true, Some(root)) = (drive.is_root_device, root) {
            return Err(ConfigError::SecondRoot { id: drive.drive_id, root: root.drive_id.clone() });
        }
        match self.drives.iter().position(|other| other.drive_id == drive.drive_id) {
            None if self.virtio_devices() >= MAX_VIRTIO_DEVICES => {
                return Err(ConfigError::TooManyDevices(drive.drive_id));
            }
            Some(index) if !drive.is_root_device => self.drives[index] = drive,
            index => {
                index.map(|index| self.drives.remove(index));
                let at = if drive.is_root_device { 0 } else { self.drives.len() };
                self.drives.insert(at, drive);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
