//! Wire types to configuration types, once and fallibly; and back for what GET answers.

mod cpu;

use super::types;
use crate::config::{self, ConfigError};
use crate::control::{Lifecycle, MachineUpdate};

/// Conversions between two enums of the same variants.
macro_rules! same_variants {
    ($($name:ident { $($variant:ident),+ })+) => { $(
        impl From<types::$name> for config::$name {
            fn from(value: types::$name) -> Self {
                match value { $(types::$name::$variant => Self::$variant),+ }
            }
        }
        impl From<config::$name> for types::$name {
            fn from(value: config::$name) -> Self {
                match value { $(config::$name::$variant => Self::$variant),+ }
            }
        }
    )+ };
}

same_variants! {
    HugePages { None, Transparent, Size2M }
    ImageMapping { Shared, Private }
    CacheType { Unsafe, Writeback }
    IoEngine { Sync, Async }
    MmdsVersion { V1, V2 }
    CpuidRegister { Eax, Ebx, Ecx, Edx }
    SnapshotType { Full, Diff }
    MemoryBackendType { File, Uffd }
}

/// Only the template `None` is available.
fn check_template(template: Option<types::CpuTemplate>) -> Result<(), ConfigError> {
    match template {
        None | Some(types::CpuTemplate::None) => Ok(()),
        Some(template) => Err(ConfigError::CpuTemplate(format!("{template:?}"))),
    }
}

impl TryFrom<types::MachineConfiguration> for config::MachineConfig {
    type Error = ConfigError;

    fn try_from(body: types::MachineConfiguration) -> Result<Self, ConfigError> {
        check_template(body.cpu_template)?;
        Self {
            vcpu_count: body.vcpu_count,
            mem_size_mib: body.mem_size_mib,
            smt: body.smt,
            track_dirty_pages: body.track_dirty_pages,
            huge_pages: body.huge_pages.into(),
        }
        .checked()
    }
}

impl From<&config::MachineConfig> for types::MachineConfiguration {
    fn from(machine: &config::MachineConfig) -> Self {
        Self {
            vcpu_count: machine.vcpu_count,
            mem_size_mib: machine.mem_size_mib,
            smt: machine.smt,
            track_dirty_pages: machine.track_dirty_pages,
            huge_pages: machine.huge_pages.into(),
            cpu_template: None,
        }
    }
}

impl TryFrom<types::MachineConfigurationUpdate> for MachineUpdate {
    type Error = ConfigError;

    fn try_from(body: types::MachineConfigurationUpdate) -> Result<Self, ConfigError> {
        check_template(body.cpu_template)?;
        let update = Self {
            vcpu_count: body.vcpu_count,
            mem_size_mib: body.mem_size_mib,
            smt: body.smt,
            track_dirty_pages: body.track_dirty_pages,
            huge_pages: body.huge_pages.map(Into::into),
        };
        if update == Self::default() && body.cpu_template.is_none() {
            return Err(ConfigError::EmptyUpdate("name at least one field of the machine configuration"));
        }
        Ok(update)
    }
}

impl TryFrom<types::BootSource> for config::BootSource {
    type Error = ConfigError;

    fn try_from(body: types::BootSource) -> Result<Self, ConfigError> {
        Self {
            kernel_image_path: body.kernel_image_path,
            initrd_path: body.initrd_path,
            boot_args: body.boot_args,
            image_mapping: body.image_mapping.map(Into::into),
        }
        .checked()
    }
}

impl From<&config::BootSource> for types::BootSource {
    fn from(source: &config::BootSource) -> Self {
        Self {
            kernel_image_path: source.kernel_image_path.clone(),
            initrd_path: source.initrd_path.clone(),
            boot_args: source.boot_args.clone(),
            image_mapping: source.image_mapping.map(Into::into),
        }
    }
}

fn bucket(bucket: types::TokenBucket) -> Option<config::TokenBucketConfig> {
    config::TokenBucketConfig::new(bucket.size, bucket.refill_time, bucket.one_time_burst.unwrap_or(0))
}

fn bucket_update(bucket_update: Option<types::TokenBucket>) -> config::BucketUpdate {
    match bucket_update.map(bucket) {
        None => config::BucketUpdate::Keep,
        Some(None) => config::BucketUpdate::Off,
        Some(Some(config)) => config::BucketUpdate::Set(config),
    }
}

impl From<types::RateLimiter> for config::RateLimiterConfig {
    fn from(body: types::RateLimiter) -> Self {
        Self { bandwidth: body.bandwidth.and_then(bucket), ops: body.ops.and_then(bucket) }
    }
}

impl From<types::RateLimiter> for config::RateLimiterUpdate {
    fn from(body: types::RateLimiter) -> Self {
        Self { bandwidth: bucket_update(body.bandwidth), ops: bucket_update(body.ops) }
    }
}

impl From<config::TokenBucketConfig> for types::TokenBucket {
    fn from(bucket: config::TokenBucketConfig) -> Self {
        let one_time_burst = Some(bucket.one_time_burst).filter(|&burst| burst != 0);
        Self { size: bucket.size, one_time_burst, refill_time: bucket.refill_time_ms }
    }
}

fn limiter(limits: config::RateLimiterConfig) -> Option<types::RateLimiter> {
    (limits != config::RateLimiterConfig::default())
        .then(|| types::RateLimiter { bandwidth: limits.bandwidth.map(Into::into), ops: limits.ops.map(Into::into) })
}

impl TryFrom<types::Drive> for config::DriveConfig {
    type Error = ConfigError;

    fn try_from(body: types::Drive) -> Result<Self, ConfigError> {
        if body.socket.is_some() {
            return Err(ConfigError::Unavailable("socket: vhost-user drives are not supported; use path_on_host"));
        }
        Self {
            drive_id: body.drive_id,
            is_root_device: body.is_root_device,
            path_on_host: body.path_on_host.unwrap_or_default(),
            is_read_only: body.is_read_only.unwrap_or(false),
            partuuid: body.partuuid,
            cache_type: body.cache_type.into(),
            io_engine: body.io_engine.unwrap_or_default().into(),
            rate_limiter: body.rate_limiter.unwrap_or_default().into(),
            discard: body.discard.unwrap_or(false),
            overlay: body.overlay.map(Into::into),
        }
        .checked()
    }
}

impl From<types::Overlay> for config::OverlayConfig {
    fn from(body: types::Overlay) -> Self {
        Self { layer_path: body.layer_path, ..Self::default() }
    }
}

impl From<&config::DriveConfig> for types::Drive {
    fn from(drive: &config::DriveConfig) -> Self {
        Self {
            drive_id: drive.drive_id.clone(),
            is_root_device: drive.is_root_device,
            path_on_host: Some(drive.path_on_host.clone()),
            is_read_only: Some(drive.is_read_only),
            partuuid: drive.partuuid.clone(),
            cache_type: drive.cache_type.into(),
            io_engine: Some(drive.io_engine.into()),
            rate_limiter: limiter(drive.rate_limiter),
            discard: drive.discard.then_some(true),
            socket: None,
            overlay: drive.overlay.as_ref().map(|over| types::Overlay { layer_path: over.layer_path.clone() }),
        }
    }
}

impl TryFrom<types::PartialDrive> for config::DriveUpdate {
    type Error = ConfigError;

    fn try_from(body: types::PartialDrive) -> Result<Self, ConfigError> {
        Self {
            drive_id: body.drive_id,
            path_on_host: body.path_on_host,
            rate_limiter: body.rate_limiter.map(Into::into),
        }
        .checked()
    }
}

impl TryFrom<types::NetworkInterface> for config::NetConfig {
    type Error = ConfigError;

    fn try_from(body: types::NetworkInterface) -> Result<Self, ConfigError> {
        Self {
            iface_id: body.iface_id,
            host_device: body.host_dev_name.parse()?,
            guest_mac: body.guest_mac.map(|mac| mac.parse()).transpose()?,
            mtu: body.mtu,
            rx_rate_limiter: body.rx_rate_limiter.unwrap_or_default().into(),
            tx_rate_limiter: body.tx_rate_limiter.unwrap_or_default().into(),
        }
        .checked()
    }
}

impl From<&config::NetConfig> for types::NetworkInterface {
    fn from(interface: &config::NetConfig) -> Self {
        Self {
            iface_id: interface.iface_id.clone(),
            host_dev_name: interface.host_device.to_string(),
            guest_mac: interface.guest_mac.map(|mac| mac.to_string()),
            mtu: interface.mtu,
            rx_rate_limiter: limiter(interface.rx_rate_limiter),
            tx_rate_limiter: limiter(interface.tx_rate_limiter),
        }
    }
}

impl TryFrom<types::PartialNetworkInterface> for config::NetUpdate {
    type Error = ConfigError;

    fn try_from(body: types::PartialNetworkInterface) -> Result<Self, ConfigError> {
        Self {
            iface_id: body.iface_id,
            rx_rate_limiter: body.rx_rate_limiter.unwrap_or_default().into(),
            tx_rate_limiter: body.tx_rate_limiter.unwrap_or_default().into(),
        }
        .checked()
    }
}

impl TryFrom<types::Vsock> for config::VsockConfig {
    type Error = ConfigError;

    fn try_from(body: types::Vsock) -> Result<Self, ConfigError> {
        Self { guest_cid: body.guest_cid.try_into()?, uds_path: body.uds_path }.checked()
    }
}

impl From<&config::VsockConfig> for types::Vsock {
    fn from(vsock: &config::VsockConfig) -> Self {
        Self { guest_cid: vsock.guest_cid.into(), uds_path: vsock.uds_path.clone(), vsock_id: None }
    }
}

impl From<types::SerialDevice> for config::SerialConfig {
    fn from(body: types::SerialDevice) -> Self {
        Self { serial_out_path: body.serial_out_path, rate_limiter: body.rate_limiter.and_then(bucket) }
    }
}

impl From<&config::SerialConfig> for types::SerialDevice {
    fn from(serial: &config::SerialConfig) -> Self {
        Self { serial_out_path: serial.serial_out_path.clone(), rate_limiter: serial.rate_limiter.map(Into::into) }
    }
}

impl From<types::Logger> for config::LoggerConfig {
    fn from(body: types::Logger) -> Self {
        Self {
            log_path: body.log_path,
            level: body.level.map(|types::LogLevel(level)| level),
            show_level: body.show_level,
            show_log_origin: body.show_log_origin,
            module: body.module,
        }
    }
}

impl From<&config::LoggerConfig> for types::Logger {
    fn from(logger: &config::LoggerConfig) -> Self {
        Self {
            log_path: logger.log_path.clone(),
            level: logger.level.map(types::LogLevel),
            show_level: logger.show_level,
            show_log_origin: logger.show_log_origin,
            module: logger.module.clone(),
        }
    }
}

impl From<types::Metrics> for config::MetricsConfig {
    fn from(body: types::Metrics) -> Self {
        Self {
            metrics_path: body.metrics_path,
            emit_id: body.emit_id,
            properties: body.properties.into_iter().collect(),
        }
    }
}

impl From<&config::MetricsConfig> for types::Metrics {
    fn from(metrics: &config::MetricsConfig) -> Self {
        Self {
            metrics_path: metrics.metrics_path.clone(),
            emit_id: metrics.emit_id,
            properties: metrics.properties.iter().cloned().collect(),
        }
    }
}

impl TryFrom<types::MmdsConfig> for config::MmdsConfig {
    type Error = ConfigError;

    fn try_from(body: types::MmdsConfig) -> Result<Self, ConfigError> {
        Self {
            network_interfaces: body.network_interfaces,
            version: body.version.into(),
            ipv4_address: body.ipv4_address.unwrap_or(config::DEFAULT_MMDS_ADDRESS),
            imds_compat: body.imds_compat,
        }
        .checked()
    }
}

impl From<&config::MmdsConfig> for types::MmdsConfig {
    fn from(mmds: &config::MmdsConfig) -> Self {
        Self {
            network_interfaces: mmds.network_interfaces.clone(),
            version: mmds.version.into(),
            ipv4_address: Some(mmds.ipv4_address),
            imds_compat: mmds.imds_compat,
        }
    }
}

impl From<&config::VmConfig> for types::FullVmConfiguration {
    fn from(config: &config::VmConfig) -> Self {
        Self {
            boot_source: config.boot_source.as_ref().map(Into::into),
            machine_config: Some((&config.machine).into()),
            cpu_config: config.cpu.as_ref().map(|cpu| types::CpuConfigSource::Body(cpu.into())),
            drives: config.drives.iter().map(Into::into).collect(),
            network_interfaces: config.network_interfaces.iter().map(Into::into).collect(),
            vsock: config.vsock.as_ref().map(Into::into),
            serial: config.serial.as_ref().map(Into::into),
            // Published clients take the path for granted.
            logger: config.logger.as_ref().filter(|logger| logger.log_path.is_some()).map(Into::into),
            metrics: config.metrics.as_ref().map(Into::into),
            mmds_config: config.mmds.as_ref().map(Into::into),
            ..Self::default()
        }
    }
}

impl From<Lifecycle> for types::InstanceState {
    fn from(state: Lifecycle) -> Self {
        match state {
            Lifecycle::Configuring => Self::NotStarted,
            Lifecycle::Running => Self::Running,
            Lifecycle::Paused => Self::Paused,
        }
    }
}

impl TryFrom<types::SnapshotCreateParams> for config::SnapshotCreate {
    type Error = ConfigError;

    fn try_from(body: types::SnapshotCreateParams) -> Result<Self, ConfigError> {
        let (kind, live) = (body.snapshot_type.into(), body.live);
        Self { snapshot_path: body.snapshot_path, mem_file_path: body.mem_file_path, kind, live }.checked()
    }
}

/// `None` for those of the snapshot.
fn other_pages(pages: types::SnapshotHugePages) -> Option<config::HugePages> {
    match pages {
        types::SnapshotHugePages::Snapshot => None,
        types::SnapshotHugePages::None => Some(config::HugePages::None),
        types::SnapshotHugePages::Transparent => Some(config::HugePages::Transparent),
        types::SnapshotHugePages::Size2M => Some(config::HugePages::Size2M),
    }
}

impl TryFrom<types::SnapshotLoadParams> for config::SnapshotLoad {
    type Error = ConfigError;

    fn try_from(body: types::SnapshotLoadParams) -> Result<Self, ConfigError> {
        let (backend, backend_path) = match (body.mem_backend, body.mem_file_path) {
            (Some(from), None) => (from.backend_type.into(), from.backend_path),
            (None, Some(path)) => (config::MemoryBackendType::File, path),
            _ => return Err(ConfigError::SnapshotMemory),
        };
        Self {
            snapshot_path: body.snapshot_path,
            backend_path,
            backend,
            resume_vm: body.resume_vm,
            track_dirty_pages: body.track_dirty_pages == Some(true) || body.enable_diff_snapshots == Some(true),
            network_overrides: body.network_overrides.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            drive_overrides: body.drive_overrides.into_iter().map(Into::into).collect(),
            vsock_override: body.vsock_override.map(|over| over.uds_path),
            clock_realtime: body.clock_realtime,
            huge_pages: body.huge_pages.and_then(other_pages),
            working_set_path: body.working_set_path,
        }
        .checked()
    }
}

impl TryFrom<types::NetworkOverride> for config::NetOverride {
    type Error = ConfigError;

    fn try_from(body: types::NetworkOverride) -> Result<Self, ConfigError> {
        Ok(Self {
            iface_id: body.iface_id,
            host_device: body.host_dev_name.parse()?,
            guest_mac: body.guest_mac.map(|mac| mac.parse()).transpose()?,
        })
    }
}

impl From<types::DriveOverride> for config::DriveOverride {
    fn from(body: types::DriveOverride) -> Self {
        Self { drive_id: body.drive_id, path_on_host: body.path_on_host, overlay: body.overlay.map(Into::into) }
    }
}

impl From<types::SnapshotResetParams> for config::SnapshotReset {
    fn from(body: types::SnapshotResetParams) -> Self {
        Self { resume_vm: body.resume_vm, keep_drive_writes: body.keep_drive_writes }
    }
}
