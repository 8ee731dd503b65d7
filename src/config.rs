//! The validated configuration: plain data that can only hold legal values, and every limit.
//!
//! Paths are data here; the vmm thread opens them when it accepts the configuration.

use std::path::PathBuf;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// How kernel and initrd get into guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageMapping {
    /// Page-aligned pieces are mapped from their files, copy-on-write.
    #[default]
    Shared,
    /// Everything is copied.
    Private,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// One token bucket: `size` tokens, refilled evenly over `refill_time_ms`. Neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucketConfig {
    /// Capacity in tokens (bytes or operations).
    pub size: u64,
    /// Milliseconds to refill an empty bucket.
    pub refill_time_ms: u64,
    /// Extra tokens spent first and never refilled.
    pub one_time_burst: u64,
}

/// Limits of one direction of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

/// What FLUSH means to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheType {
    /// FLUSH is not offered; the host writes back when it likes.
    #[default]
    Unsafe,
    /// FLUSH is offered and reaches the disk.
    Writeback,
}

/// How a drive's requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoEngine {
    /// `preadv`/`pwritev` on the vmm thread.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// A virtio-block drive.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// Where the serial port's output goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmConfig {
    /// vCPUs and memory.
    pub machine: MachineConfig,
    /// Kernel and initrd.
    pub boot_source: Option<BootSource>,
    /// The root drive is first, the others in the order they were configured.
    pub drives: Vec<DriveConfig>,
    /// Serial port.
    pub serial: Option<SerialConfig>,
    /// Log.
    pub logger: Option<LoggerConfig>,
    /// Metrics.
    pub metrics: Option<MetricsConfig>,
}
