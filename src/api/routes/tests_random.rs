//! Any request at all, and any configuration.

use proptest::prelude::*;

use super::tests::{PUBLISHED, configure, fault};
use super::*;
use crate::config::*;
use crate::generated::{change, changes, inputs, prop_oneof, properties};

fn bucket() -> impl Strategy<Value = Option<TokenBucketConfig>> {
    any::<(u64, u64, u64)>().prop_map(|(size, refill, burst)| TokenBucketConfig::new(size, refill, burst))
}

fn limiter() -> impl Strategy<Value = RateLimiterConfig> {
    (bucket(), bucket()).prop_map(|(bandwidth, ops)| RateLimiterConfig { bandwidth, ops })
}

prop_compose! {
    fn drive()(
        drive_id in "[A-Za-z0-9_]{1,8}",
        path_on_host in "\\PC{1,12}",
        partuuid in proptest::option::of("[0-9a-f-]{1,8}"),
        (is_read_only, writeback, asynchronous, discard) in any::<(bool, bool, bool, bool)>(),
        rate_limiter in limiter(),
        layer_path in proptest::option::of(proptest::option::of("\\PC{1,12}")),
    ) -> DriveConfig {
        DriveConfig {
            drive_id,
            is_root_device: false,
            path_on_host: path_on_host.into(),
            is_read_only,
            partuuid,
            cache_type: if writeback { CacheType::Writeback } else { CacheType::Unsafe },
            io_engine: if asynchronous { IoEngine::Async } else { IoEngine::Sync },
            rate_limiter,
            discard: discard && !is_read_only,
            overlay: layer_path
                .filter(|_| !is_read_only)
                .map(|path| OverlayConfig { layer_path: path.map(Into::into), ..OverlayConfig::default() }),
        }
    }
}

prop_compose! {
    fn interface()(
        iface_id in "[A-Za-z0-9_]{1,8}",
        (name, fd, passed) in ("[a-z0-9._-]{1,15}", 0i32.., any::<bool>()),
        guest_mac in proptest::option::of(any::<[u8; 6]>().prop_map(MacAddress)),
        mtu in proptest::option::of(MIN_MTU..),
        (rx_rate_limiter, tx_rate_limiter) in (limiter(), limiter()),
    ) -> NetConfig {
        let host_device = if passed { HostDevice::Passed(fd) } else { HostDevice::Named(name) };
        NetConfig { iface_id, host_device, guest_mac, mtu, rx_rate_limiter, tx_rate_limiter }
    }
}

prop_compose! {
    fn vm_config()(
        (vcpu_count, mem_size_mib) in (1..=MAX_VCPUS, 1..=MAX_MEM_SIZE_MIB / 2),
        (track_dirty_pages, huge, emit_id, root) in any::<(bool, bool, bool, bool)>(),
        drives in proptest::collection::vec(drive(), 0..5),
        interfaces in proptest::collection::vec(interface(), 0..4),
        kernel in "\\PC{1,12}",
        boot_args in proptest::option::of("[ -~]{0,40}"),
        initrd in proptest::option::of("\\PC{1,12}"),
        mapping in proptest::option::of(any::<bool>()),
        serial in proptest::option::of((proptest::option::of("\\PC{1,12}"), bucket())),
        properties in proptest::collection::btree_map("\\PC{0,8}", "\\PC{0,8}", 0..3),
        module in proptest::option::of("\\PC{0,8}"),
        mmds in proptest::option::of(any::<(bool, bool, u8)>()),
        cpu in proptest::option::of(any::<(u32, u32, bool)>()),
    ) -> VmConfig {
        let huge_pages = if huge { HugePages::Size2M } else { HugePages::Transparent };
        let mut config = VmConfig {
            machine: MachineConfig {
                vcpu_count, mem_size_mib: 2 * mem_size_mib, smt: vcpu_count % 2 == 0, track_dirty_pages, huge_pages,
            },
            boot_source: Some(BootSource {
                kernel_image_path: kernel.into(),
                initrd_path: initrd.map(Into::into),
                boot_args,
                image_mapping: mapping.map(|shared| if shared { ImageMapping::Shared } else { ImageMapping::Private }),
            }),
            serial: serial.map(|(path, rate_limiter)| SerialConfig { serial_out_path: path.map(Into::into), rate_limiter }),
            logger: module.map(|module| LoggerConfig {
                log_path: Some("l".into()),
                module: Some(module),
                level: Some(log::LevelFilter::Warn),
                ..Default::default()
            }),
            metrics: Some(MetricsConfig {
                metrics_path: "m".into(), emit_id, properties: properties.into_iter().collect(),
            }),
            cpu: cpu.map(|(leaf, number, set)| CpuConfig {
                cpuid_modifiers: vec![CpuidModifier {
                    leaf, subleaf: number, flags: number,
                    registers: vec![(CpuidRegister::Ebx, BitMap::parse(if set { "0b1x" } else { "0b0x" }, 32).unwrap())],
                }],
                msr_modifiers: vec![MsrModifier { address: leaf, bitmap: BitMap::parse("0b1xxx0", 64).unwrap() }],
                kvm_capabilities: vec![if set { Capability::Required(number) } else { Capability::Waived(number) }],
            }),
            mmds: mmds.map(|(v2, imds_compat, host)| MmdsConfig {
                network_interfaces: vec!["eth0".into()],
                version: if v2 { MmdsVersion::V2 } else { MmdsVersion::V1 },
                ipv4_address: std::net::Ipv4Addr::new(169, 254, 1, host),
                imds_compat,
            }),
            ..Default::default()
        };
        for (index, drive) in drives.into_iter().enumerate() {
            config.set_drive(DriveConfig { is_root_device: root && index == 0, ..drive }).unwrap();
        }
        for interface in interfaces {
            config.set_network_interface(interface).unwrap();
        }
        config
    }
}

/// JSON with the fields and values that bodies have, and others.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<u64>().prop_map(Into::into),
        any::<u64>().prop_map(|bits| f64::from_bits(bits).into()),
        "\\PC{0,8}".prop_map(Into::into),
        proptest::sample::select(vec!["a", "Paused", "InstanceStart", "2M", "None", "Sync", "Writeback", "Warn"])
            .prop_map(Into::into),
    ];
    let field = proptest::sample::select(vec![
        "vcpu_count",
        "mem_size_mib",
        "smt",
        "drive_id",
        "iface_id",
        "host_dev_name",
        "guest_mac",
        "mtu",
        "rx_rate_limiter",
        "tx_rate_limiter",
        "network-interfaces",
        "is_root_device",
        "path_on_host",
        "rate_limiter",
        "ops",
        "bandwidth",
        "size",
        "refill_time",
        "action_type",
        "state",
        "kernel_image_path",
        "boot_args",
        "level",
        "metrics_path",
        "properties",
        "serial_out_path",
        "socket",
        "overlay",
        "drives",
        "machine-config",
        "pmem",
    ]);
    let mut json = leaf.boxed();
    for _ in 0..3 {
        json = prop_oneof![
            1 => json.clone(),
            1 => proptest::collection::vec(json.clone(), 0..4).prop_map(Into::into),
            2 => proptest::collection::btree_map(field.clone(), json, 0..6).prop_map(|map| map
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect::<serde_json::Map<_, _>>()
                .into()),
        ]
        .boxed();
    }
    json
}

fn method() -> impl Strategy<Value = Method> {
    proptest::sample::select(vec![Method::GET, Method::PUT, Method::PATCH, Method::DELETE, Method::POST, Method::HEAD])
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => (0..ENDPOINTS.len()).prop_map(|index| {
            format!("/{}", ENDPOINTS[index].path.replace("{drive_id}", "a").replace("{iface_id}", "a"))
        }),
        1 => (proptest::sample::select(vec!["", "drives", "vm", "mmds", "snapshot"]), "/?\\PC{0,8}")
            .prop_map(|(start, rest)| format!("/{start}{rest}")),
        1 => "\\PC{0,8}",
    ]
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => json().prop_map(|json| json.to_string().into_bytes()),
        1 => proptest::collection::vec(any::<u8>(), 0..64),
        1 => Just(b"[".repeat(1000)),
    ]
}

/// Requests that are understood.
const VALID: [(Method, &str, &str); 10] = [
    (Method::PATCH, "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64,"smt":true,"huge_pages":"2M"}"#),
    (Method::PUT, "/drives/a", r#"{"drive_id":"a","is_root_device":true,"path_on_host":"/d","partuuid":"0-a"}"#),
    (Method::PATCH, "/drives/a", r#"{"drive_id":"a","rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#),
    (
        Method::PUT,
        "/network-interfaces/a",
        r#"{"iface_id":"a","host_dev_name":"fd:3","guest_mac":"06:00:ac:10:00:02"}"#,
    ),
    (Method::PATCH, "/network-interfaces/a", r#"{"iface_id":"a","rx_rate_limiter":{"bandwidth":null}}"#),
    (
        Method::PUT,
        "/cpu-config",
        r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0b1","flags":0,"modifiers":[{"register":"eax","bitmap":"0b0x1"}]}],
        "msr_modifiers":[{"addr":"0x10","bitmap":"0b1_0"}],"kvm_capabilities":["!56","171"]}"#,
    ),
    (Method::PUT, "/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#),
    (Method::PUT, "/snapshot/create", r#"{"snapshot_path":"/s","mem_file_path":"/m","snapshot_type":"Diff"}"#),
    (
        Method::PUT,
        "/snapshot/load",
        r#"{"snapshot_path":"/s","mem_backend":{"backend_type":"Uffd","backend_path":"/m"},"vsock_override":{"uds_path":
        "/v"},"network_overrides":[{"iface_id":"a","host_dev_name":"b"}],"drive_overrides":[{"drive_id":"a","overlay":{}}]}"#,
    ),
    (Method::PUT, "/mmds/config", r#"{"network_interfaces":["a"],"version":"V2","ipv4_address":"169.254.1.2"}"#),
];

properties! {
    #![proptest_config(inputs(2000))]

    #[test]
    fn any_request_is_understood_or_refused_in_the_documented_shape(
        method in method(),
        path in path(),
        body in body(),
        (verb, place, valid) in proptest::sample::select(VALID.to_vec()),
        changes in changes(),
    ) {
        let [mut nearly, mut file] = [valid, PUBLISHED].map(|text| text.as_bytes().to_vec());
        change(&mut nearly, &changes);
        change(&mut file, &changes);
        let understood = route(&verb, place, &nearly);
        prop_assert!(understood.is_ok() || !changes.is_empty());
        let taken = config_commands(&file).map(configure);
        if let Ok(Ok(config)) = &taken {
            prop_assert_eq!(&configure(config_commands(&full_config(config)).unwrap()).unwrap(), config);
        }
        let others = [route(&method, &path, &body).err(), config_commands(&body).err()];
        others.into_iter().chain([understood.err(), taken.err()]).flatten().for_each(|error| _ = fault(&error));
    }

    #[test]
    fn what_is_shown_can_be_fed_back(config in vm_config()) {
        let shown = full_config(&config);
        prop_assert_eq!(configure(config_commands(&shown).unwrap()), Ok(config));
    }
}
