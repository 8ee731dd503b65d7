//! The limits, at both ends.

use super::*;

fn drive(id: &str, root: bool) -> DriveConfig {
    DriveConfig {
        drive_id: id.into(),
        is_root_device: root,
        path_on_host: "/disk".into(),
        is_read_only: false,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        io_engine: IoEngine::Sync,
        rate_limiter: RateLimiterConfig::default(),
        discard: false,
        overlay: None,
    }
}

fn ids(config: &VmConfig) -> Vec<&str> {
    config.drives.iter().map(|drive| drive.drive_id.as_str()).collect()
}

#[test]
fn the_root_drive_is_first_whenever_it_comes() {
    let mut config = VmConfig::default();
    for (id, root) in [("a", false), ("root", true), ("b", false)] {
        config.set_drive(drive(id, root)).unwrap();
    }
    assert_eq!(ids(&config), ["root", "a", "b"]);
}

#[test]
fn a_second_root_is_refused_and_nothing_changes() {
    let mut config = VmConfig::default();
    config.set_drive(drive("root", true)).unwrap();
    config.set_drive(drive("data", false)).unwrap();
    let before = config.clone();
    for id in ["data", "new"] {
        assert!(matches!(config.set_drive(drive(id, true)), Err(ConfigError::SecondRoot { .. })));
    }
    assert_eq!(config, before);
}

#[test]
fn a_drive_is_replaced_by_its_id_and_may_become_or_cease_to_be_the_root() {
    let mut config = VmConfig::default();
    config.set_drive(drive("a", true)).unwrap();
    config.set_drive(drive("b", false)).unwrap();
    config.set_drive(drive("a", false)).unwrap();
    config.set_drive(drive("b", true)).unwrap();
    assert_eq!(ids(&config), ["b", "a"]);
    config.set_drive(DriveConfig { path_on_host: "/other".into(), ..drive("a", false) }).unwrap();
    assert_eq!(config.drives[1].path_on_host, PathBuf::from("/other"));
}

fn interface(id: &str, mac: u8) -> NetConfig {
    NetConfig {
        iface_id: id.into(),
        host_device: HostDevice::Named(id.into()),
        guest_mac: Some(MacAddress([2, 0, 0, 0, 0, mac])),
        mtu: None,
        rx_rate_limiter: RateLimiterConfig::default(),
        tx_rate_limiter: RateLimiterConfig::default(),
    }
}

#[test]
fn no_two_interfaces_have_one_address() {
    let mut config = VmConfig::default();
    config.set_network_interface(interface("a", 1)).unwrap();
    config.set_network_interface(interface("b", 2)).unwrap();
    let other = "a".to_owned();
    let mac = MacAddress([2, 0, 0, 0, 0, 1]);
    assert_eq!(config.set_network_interface(interface("b", 1)), Err(ConfigError::DuplicateMac { mac, other }));
    config.set_network_interface(interface("a", 1)).unwrap();
    config.set_network_interface(NetConfig { guest_mac: None, ..interface("c", 0) }).unwrap();
    config.set_network_interface(NetConfig { guest_mac: None, ..interface("d", 0) }).unwrap();
    let ids: Vec<_> = config.network_interfaces.iter().map(|interface| interface.iface_id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c", "d"]);
}

#[test]
fn drives_and_interfaces_share_the_interrupt_lines() {
    let mut config = VmConfig::default();
    for n in 0..MAX_VIRTIO_DEVICES as u8 - 1 {
        config.set_network_interface(interface(&format!("i{n}"), n)).unwrap();
    }
    config.set_drive(drive("d", false)).unwrap();
    assert!(matches!(config.set_drive(drive("more", false)), Err(ConfigError::TooManyDevices(_))));
    assert!(matches!(config.set_network_interface(interface("more", 99)), Err(ConfigError::TooManyDevices(_))));
}

#[test]
fn there_are_as_many_drives_as_interrupt_lines() {
    let mut config = VmConfig::default();
    for n in 0..MAX_VIRTIO_DEVICES {
        config.set_drive(drive(&format!("d{n}"), false)).unwrap();
    }
    assert!(matches!(config.set_drive(drive("more", false)), Err(ConfigError::TooManyDevices(_))));
    config.set_drive(drive("d3", true)).unwrap();
    assert_eq!(config.drives.len(), MAX_VIRTIO_DEVICES);
}

#[test]
fn machine_limits_hold_at_both_ends() {
    let with = |vcpu_count, mem_size_mib, smt, huge_pages| {
        MachineConfig { vcpu_count, mem_size_mib, smt, huge_pages, ..Default::default() }.checked()
    };
    for (vcpus, mem) in [(1, 1), (32, MAX_MEM_SIZE_MIB), (3, 129)] {
        assert!(with(vcpus, mem, false, HugePages::None).is_ok());
    }
    assert_eq!(with(0, 128, false, HugePages::None), Err(ConfigError::VcpuCount(0)));
    assert_eq!(with(33, 128, false, HugePages::None), Err(ConfigError::VcpuCount(33)));
    assert_eq!(with(1, 0, false, HugePages::None), Err(ConfigError::MemSize(0)));
    assert_eq!(with(1, u64::MAX, false, HugePages::None), Err(ConfigError::MemSize(u64::MAX)));
    assert_eq!(with(3, 128, true, HugePages::None), Err(ConfigError::OddVcpuCount(3)));
    assert!(with(1, 128, true, HugePages::None).is_ok());
    assert_eq!(with(1, 129, false, HugePages::Size2M), Err(ConfigError::OddMemSize(129)));
}

#[test]
fn a_partition_uuid_cannot_smuggle_kernel_arguments() {
    let with = |partuuid: &str| DriveConfig { partuuid: Some(partuuid.into()), ..drive("d", true) }.checked();
    assert!(with("0eaa91a0-01").is_ok());
    for bad in ["", "0eaa init=/bin/sh", "0eaa\"", "g"] {
        assert!(matches!(with(bad), Err(ConfigError::PartUuid(_))), "{bad}");
    }
}

#[test]
fn boot_arguments_are_what_a_kernel_can_take() {
    let with = |args: String| {
        let (initrd_path, image_mapping) = (None, None);
        BootSource { kernel_image_path: "k".into(), initrd_path, boot_args: Some(args), image_mapping }.checked()
    };
    assert!(with("x".repeat(MAX_CMDLINE)).is_ok());
    assert_eq!(with("x".repeat(MAX_CMDLINE + 1)), Err(ConfigError::BootArgsLength(MAX_CMDLINE + 1)));
    assert_eq!(with("a\0b".into()), Err(ConfigError::BootArgsCharacter('\0')));
    assert_eq!(with("é".into()), Err(ConfigError::BootArgsCharacter('é')));
}

#[test]
fn a_rate_limiter_update_leaves_alone_what_it_does_not_name() {
    let bucket = |size| TokenBucketConfig::new(size, 100, 0).unwrap();
    let mut limits = RateLimiterConfig { bandwidth: Some(bucket(1)), ops: Some(bucket(2)) };
    RateLimiterUpdate { bandwidth: BucketUpdate::Off, ops: BucketUpdate::Keep }.apply(&mut limits);
    assert_eq!(limits, RateLimiterConfig { bandwidth: None, ops: Some(bucket(2)) });
    RateLimiterUpdate { bandwidth: BucketUpdate::Set(bucket(3)), ops: BucketUpdate::Keep }.apply(&mut limits);
    assert_eq!(limits, RateLimiterConfig { bandwidth: Some(bucket(3)), ops: Some(bucket(2)) });
    assert_eq!(TokenBucketConfig::new(0, 100, 5), None);
    assert_eq!(TokenBucketConfig::new(100, 0, 5), None);
}
