//! What goes over the wire: one type per schema of `resources/openapi.yaml`, serde only.
//!
//! Every type refuses fields it does not know. Nothing here is checked beyond its JSON type;
//! `convert` turns it into the configuration types, which are.

mod cpu;
mod logger;
mod snapshot;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use cpu::{CpuConfig, CpuConfigSource, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier, MsrModifier};
pub use logger::{LogLevel, Logger};
pub use snapshot::{
    DriveOverride, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotCreateParams, SnapshotHugePages,
    SnapshotLoadParams, SnapshotResetParams, SnapshotType, VsockOverride,
};

/// The body of every refusal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Error {
    /// One sentence that names the field or path and says what to do.
    pub fault_message: String,
}

/// GET /.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceInfo {
    /// `--id`.
    pub id: String,
    /// Where it is in its life.
    pub state: InstanceState,
    /// This release.
    pub vmm_version: String,
    /// This program.
    pub app_name: String,
}

/// See [`InstanceInfo::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs are parked.
    Paused,
}

/// GET /version.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// The API version this release is compatible with.
    pub firecracker_version: String,
    /// This release.
    pub vesicle_version: String,
}

/// PUT /actions.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceAction {
    /// What to do.
    pub action_type: ActionType,
}

/// See [`InstanceAction::action_type`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Write the metrics now.
    FlushMetrics,
    /// Build the machine and run it.
    InstanceStart,
    /// Press the keys.
    SendCtrlAltDel,
}

/// PATCH /vm.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state to reach.
    pub state: VmState,
}

/// See [`Vm::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Park the vCPUs.
    Paused,
    /// Run them again.
    Resumed,
}

/// PUT /boot-source.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF vmlinux or a bzImage.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    pub initrd_path: Option<PathBuf>,
    /// Kernel arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Map the images or copy them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_mapping: Option<ImageMapping>,
}

/// See [`BootSource::image_mapping`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageMapping {
    /// Mapped from the file, copy-on-write.
    Shared,
    /// Copied.
    Private,
}

/// GET and PUT /machine-config.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// 1 to 32.
    pub vcpu_count: u8,
    /// Guest RAM in MiB.
    pub mem_size_mib: u64,
    /// Two threads per core.
    #[serde(default)]
    pub smt: bool,
    /// Keep a record of the pages the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Backing of guest RAM.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Deprecated; only `None` is available.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

/// PATCH /machine-config.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigurationUpdate {
    /// See [`MachineConfiguration`].
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfiguration`].
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfiguration`].
    pub smt: Option<bool>,
    /// See [`MachineConfiguration`].
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfiguration`].
    pub huge_pages: Option<HugePages>,
    /// See [`MachineConfiguration`].
    pub cpu_template: Option<CpuTemplate>,
}

/// See [`MachineConfiguration::huge_pages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// Base pages.
    #[default]
    None,
    /// `MADV_HUGEPAGE`.
    Transparent,
    /// 2 MiB pages from hugetlbfs.
    #[serde(rename = "2M")]
    Size2M,
}

/// See [`MachineConfiguration::cpu_template`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "names of instance types")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// PUT /drives/{drive_id}.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Resource id.
    pub drive_id: String,
    /// Boot from it.
    pub is_root_device: bool,
    /// A raw image or a block device.
    pub path_on_host: Option<PathBuf>,
    /// The guest cannot write.
    pub is_read_only: Option<bool>,
    /// Boot from this partition.
    pub partuuid: Option<String>,
    /// Meaning of FLUSH.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Sync or Async.
    pub io_engine: Option<IoEngine>,
    /// Limits.
    pub rate_limiter: Option<RateLimiter>,
    /// Offer discard and write-zeroes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<bool>,
    /// Outside the scope: a vhost-user backend. Only null is accepted.
    pub socket: Option<Value>,
    /// Writes go to a layer instead of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

/// See [`Drive::overlay`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// A layer that lasts; a temporary file otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_path: Option<PathBuf>,
}

/// See [`Drive::cache_type`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CacheType {
    /// FLUSH is not offered.
    #[default]
    Unsafe,
    /// FLUSH reaches the disk.
    Writeback,
}

/// See [`Drive::io_engine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum IoEngine {
    /// System calls on the vmm thread.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// PATCH /drives/{drive_id}.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// Which drive.
    pub drive_id: String,
    /// Reopen with this file.
    pub path_on_host: Option<PathBuf>,
    /// New limits; a bucket that is left out stays.
    pub rate_limiter: Option<RateLimiter>,
}

/// PUT /network-interfaces/{iface_id}.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Resource id.
    pub iface_id: String,
    /// The name of a TAP, or `fd:N` for a descriptor that was passed in.
    pub host_dev_name: String,
    /// The guest's address.
    pub guest_mac: Option<String>,
    /// The largest packet, as the guest is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// PATCH /network-interfaces/{iface_id}.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// Which interface.
    pub iface_id: String,
    /// New limits of what the guest receives; a bucket that is left out stays.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits of what the guest sends; a bucket that is left out stays.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Limits of a device.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    pub ops: Option<TokenBucket>,
}

/// A bucket; a size or refill time of 0 means no limit.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Capacity in tokens.
    pub size: u64,
    /// Extra tokens, never refilled.
    pub one_time_burst: Option<u64>,
    /// Milliseconds to refill an empty bucket.
    pub refill_time: u64,
}

/// PUT /vsock.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// 3 to 2^32 - 2.
    pub guest_cid: u64,
    /// Where host processes connect.
    pub uds_path: PathBuf,
    /// Deprecated; not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// PUT /serial.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialDevice {
    /// A file or FIFO.
    pub serial_out_path: Option<PathBuf>,
    /// Bytes over the limit are dropped.
    pub rate_limiter: Option<TokenBucket>,
}

/// PUT /metrics.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
    /// Put the instance id in every line.
    #[serde(default)]
    pub emit_id: bool,
    /// Put these in every line.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

/// PUT /mmds/config.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// The interfaces through which the guest reaches the service.
    pub network_interfaces: Vec<String>,
    /// Whether the guest needs a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// Where the guest finds the service.
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer in text whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// See [`MmdsConfig::version`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// No token; deprecated.
    #[default]
    V1,
    /// A token.
    V2,
}

/// GET /vm/config and `--config-file`: the endpoints' bodies under their names.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FullVmConfiguration {
    /// PUT /boot-source.
    pub boot_source: Option<BootSource>,
    /// PUT /machine-config.
    pub machine_config: Option<MachineConfiguration>,
    /// PUT /drives, each.
    pub drives: Vec<Drive>,
    /// PUT /serial.
    pub serial: Option<SerialDevice>,
    /// PUT /logger.
    pub logger: Option<Logger>,
    /// PUT /metrics.
    pub metrics: Option<Metrics>,
    /// PUT /cpu-config, or the path of a file that holds it.
    pub cpu_config: Option<CpuConfigSource>,
    /// PUT /network-interfaces, each.
    pub network_interfaces: Vec<NetworkInterface>,
    /// PUT /vsock.
    pub vsock: Option<Vsock>,
    /// PUT /mmds/config.
    pub mmds_config: Option<MmdsConfig>,
    /// Outside the scope.
    pub balloon: Option<Value>,
    /// Outside the scope.
    pub entropy: Option<Value>,
    /// Outside the scope.
    pub pmem: Vec<Value>,
    /// Outside the scope.
    pub memory_hotplug: Option<Value>,
}

/// The data of a GET /events message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LifecycleEvent {
    /// The state that was reached.
    pub state: EventState,
    /// Exit status of the process, once it exits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// Why it exits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// See [`LifecycleEvent::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventState {
    /// vCPUs run.
    Running,
    /// vCPUs are parked.
    Paused,
    /// The end.
    Exited,
}
