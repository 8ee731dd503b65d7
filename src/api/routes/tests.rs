//! The routes as a client sees them.

use serde_json::json;

use super::*;
use crate::config::*;
use crate::control::MachineUpdate;

fn command(method: Method, path: &str, body: &str) -> Command {
    match route(&method, path, body.as_bytes()) {
        Ok(Action::Ask(ask)) => ask.command,
        other => panic!("{method} {path} {body}: {other:?}"),
    }
}

fn refusal(method: Method, path: &str, body: &str) -> String {
    match route(&method, path, body.as_bytes()) {
        Err(error) => fault(&error),
        Ok(action) => panic!("{method} {path} {body}: {action:?}"),
    }
}

/// The message of a refusal, which must have the documented shape.
pub(super) fn fault(error: &ApiError) -> String {
    assert_eq!(error.status(), hyper::StatusCode::BAD_REQUEST);
    let body: types::Error = serde_json::from_slice(&error.body()).unwrap();
    assert!(!body.fault_message.is_empty());
    body.fault_message
}

#[test]
fn a_machine_configuration_resets_what_it_omits_and_a_patch_keeps_it() {
    let Command::SetMachine(machine) =
        command(Method::PUT, "/machine-config", r#"{"vcpu_count":4,"mem_size_mib":512}"#)
    else {
        panic!()
    };
    assert_eq!(machine, MachineConfig { vcpu_count: 4, mem_size_mib: 512, ..Default::default() });
    let Command::PatchMachine(update) = command(Method::PATCH, "/machine-config", r#"{"huge_pages":"2M"}"#) else {
        panic!()
    };
    assert_eq!(update, MachineUpdate { huge_pages: Some(HugePages::Size2M), ..Default::default() });
}

#[test]
fn a_machine_configuration_out_of_range_is_refused_by_field() {
    for (body, named) in [
        (r#"{"mem_size_mib":128}"#, "missing field `vcpu_count` at line 1 column 20."),
        (r#"{"vcpu_count":0,"mem_size_mib":128}"#, "vcpu_count is 0"),
        (r#"{"vcpu_count":33,"mem_size_mib":128}"#, "vcpu_count is 33"),
        (r#"{"vcpu_count":256,"mem_size_mib":128}"#, "`256`"),
        (r#"{"vcpu_count":-1,"mem_size_mib":128}"#, "`-1`"),
        (r#"{"vcpu_count":1,"mem_size_mib":0}"#, "mem_size_mib is 0"),
        (r#"{"vcpu_count":1,"mem_size_mib":18446744073709551616}"#, "expected u64"),
        (r#"{"vcpu_count":3,"mem_size_mib":128,"smt":true}"#, "with smt"),
        (r#"{"vcpu_count":1,"mem_size_mib":127,"huge_pages":"2M"}"#, "must be even"),
        (r#"{"vcpu_count":1,"mem_size_mib":128,"huge_pages":"1G"}"#, "unknown variant `1G`"),
        (r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2"}"#, "cpu_template `T2` is not available"),
        (r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T3"}"#, "unknown variant `T3`"),
        (r#"{"vcpu_count":1,"mem_size_mib":128,"gdb":1}"#, "unknown field `gdb`"),
        (r#"{"vcpu_count":1,"vcpu_count":2,"mem_size_mib":128}"#, "duplicate field `vcpu_count`"),
        (r#"{"vcpu_count":1,"mem_size_mib":128} x"#, "trailing characters"),
    ] {
        let message = refusal(Method::PUT, "/machine-config", body);
        assert!(message.contains(named) && message.contains("PUT /machine-config"), "{message}");
    }
    assert!(refusal(Method::PATCH, "/machine-config", "{}").contains("nothing to change"));
}

#[test]
fn the_deprecated_template_none_is_taken_and_marked() {
    for (method, body) in [
        (Method::PUT, r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"None"}"#),
        (Method::PATCH, r#"{"cpu_template":"None"}"#),
    ] {
        let Ok(Action::Ask(ask)) = route(&method, "/machine-config", body.as_bytes()) else { panic!("{body}") };
        assert!(ask.deprecated);
    }
}

#[test]
fn a_drive_has_the_defaults_of_the_contract() {
    let body = r#"{"drive_id":"rootfs","is_root_device":true,"path_on_host":"/img","partuuid":null,"socket":null}"#;
    let Command::SetDrive(drive) = command(Method::PUT, "/drives/rootfs", body) else { panic!() };
    let expected = DriveConfig {
        drive_id: "rootfs".into(),
        is_root_device: true,
        path_on_host: "/img".into(),
        is_read_only: false,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        io_engine: IoEngine::Sync,
        rate_limiter: RateLimiterConfig::default(),
        discard: false,
        overlay: None,
    };
    assert_eq!(*drive, expected);
}

#[test]
fn a_drive_that_makes_no_sense_is_refused() {
    let with = |id: &str, rest: &str| {
        let body = format!(r#"{{"drive_id":"d","is_root_device":false{rest}}}"#);
        refusal(Method::PUT, &format!("/drives/{id}"), &body)
    };
    let path = r#","path_on_host":"/img""#;
    for (id, rest, named) in [
        ("d", "", "path_on_host is empty"),
        ("d", r#","path_on_host":"""#, "path_on_host is empty"),
        ("e", path, "the path names `e`, but drive_id in the body is `d`"),
        ("", path, "Invalid request method or path: PUT /drives/."),
        ("a-b", path, "drive_id `a-b`"),
        ("d%2F", path, "drive_id `d%2F`"),
        ("d", &format!(r#"{path},"socket":"/s""#), "vhost-user"),
        ("d", &format!(r#"{path},"overlay":{{}},"is_read_only":true"#), "read-only and needs no overlay"),
        ("d", &format!(r#"{path},"overlay":{{"layer_path":""}}"#), "layer_path is empty"),
        ("d", &format!(r#"{path},"overlay":{{"path":"/l"}}"#), "unknown field `path`"),
        ("d", &format!(r#"{path},"is_read_only":true,"discard":true"#), "read-only and cannot offer discard"),
        ("d", &format!(r#"{path},"partuuid":"x y""#), "partuuid `x y`"),
        ("d", &format!(r#"{path},"io_engine":"Fast""#), "unknown variant `Fast`"),
        ("d", &format!(r#"{path},"rate_limiter":{{"ops":{{"size":1}}}}"#), "missing field `refill_time`"),
    ] {
        let message = with(id, rest);
        assert!(message.contains(named), "{id} {rest}: {message}");
    }
    assert!(refusal(Method::PUT, "/drives", "{}").contains("Invalid request method or path"));
    assert!(refusal(Method::PUT, "/drives/a/b", "{}").contains("Invalid request method or path"));
}

#[test]
fn a_patch_of_a_drive_keeps_switches_off_or_sets_each_bucket() {
    let body = r#"{"drive_id":"d","rate_limiter":{"bandwidth":{"size":0,"refill_time":100}}}"#;
    let Command::UpdateDrive(update) = command(Method::PATCH, "/drives/d", body) else { panic!() };
    assert_eq!(update.rate_limiter, Some(RateLimiterUpdate { bandwidth: BucketUpdate::Off, ops: BucketUpdate::Keep }));
    let body = r#"{"drive_id":"d","rate_limiter":{"ops":{"size":5,"refill_time":100,"one_time_burst":7}}}"#;
    let Command::UpdateDrive(update) = command(Method::PATCH, "/drives/d", body) else { panic!() };
    let bucket = TokenBucketConfig { size: 5, refill_time_ms: 100, one_time_burst: 7 };
    let expected = RateLimiterUpdate { bandwidth: BucketUpdate::Keep, ops: BucketUpdate::Set(bucket) };
    assert_eq!(update.rate_limiter, Some(expected));
    assert!(refusal(Method::PATCH, "/drives/d", r#"{"drive_id":"d"}"#).contains("nothing to change"));
    let read_only = r#"{"drive_id":"d","path_on_host":"x","is_read_only":true}"#;
    assert!(refusal(Method::PATCH, "/drives/d", read_only).contains("unknown field `is_read_only`"));
}

#[test]
fn a_vsock_has_a_cid_of_a_guest_and_a_path() {
    let put = |body| command(Method::PUT, "/vsock", body);
    let Command::SetVsock(vsock) = put(r#"{"guest_cid":3,"uds_path":"/run/v.sock"}"#) else { panic!() };
    assert_eq!((u64::from(vsock.guest_cid), vsock.uds_path.to_str()), (3, Some("/run/v.sock")));
    for (body, named) in [
        (r#"{"guest_cid":3}"#, "missing field `uds_path`"),
        (r#"{"uds_path":"v"}"#, "missing field `guest_cid`"),
        (r#"{"guest_cid":2,"uds_path":"v"}"#, "guest_cid is 2; it must be 3 to 4294967294"),
        (r#"{"guest_cid":-3,"uds_path":"v"}"#, "`-3`"),
        (r#"{"guest_cid":4294967295,"uds_path":"v"}"#, "guest_cid is 4294967295"),
        (r#"{"guest_cid":4294967299,"uds_path":"v"}"#, "guest_cid is 4294967299"),
        (r#"{"guest_cid":3,"uds_path":""}"#, "uds_path is empty"),
        (r#"{"guest_cid":3,"uds_path":"v","port":1}"#, "unknown field `port`"),
    ] {
        let message = refusal(Method::PUT, "/vsock", body);
        assert!(message.contains(named), "{body}: {message}");
    }
    for (body, expected) in [
        (r#"{"guest_cid":3,"uds_path":"v","vsock_id":"v"}"#, true),
        (r#"{"guest_cid":4294967294,"uds_path":"v"}"#, false),
    ] {
        let Ok(Action::Ask(ask)) = route(&Method::PUT, "/vsock", body.as_bytes()) else { panic!("{body}") };
        assert_eq!(ask.deprecated, expected);
    }
}

#[test]
fn a_load_names_its_memory_once() {
    const BACKEND: &str = r#""mem_backend":{"backend_type":"File","backend_path":"m"}"#;
    const FILE: &str = r#""mem_file_path":"m""#;
    let load = |memory: &str| format!(r#"{{"snapshot_path":"s"{memory}}}"#);
    for (memory, expected) in [(BACKEND, false), (FILE, true)] {
        let body = load(&format!(",{memory}"));
        let Ok(Action::Ask(ask)) = route(&Method::PUT, "/snapshot/load", body.as_bytes()) else { panic!("{body}") };
        let Command::LoadSnapshot(request) = ask.command else { panic!("{body}") };
        assert_eq!((request.backend, request.backend_path.to_str()), (MemoryBackendType::File, Some("m")));
        assert_eq!(ask.deprecated, expected, "{body}");
    }
    for body in [load(""), load(&format!(",{BACKEND},{FILE}"))] {
        let message = refusal(Method::PUT, "/snapshot/load", &body);
        assert!(message.contains("name the memory file once, in mem_backend"), "{body}: {message}");
    }
}

#[test]
fn a_load_keeps_the_pages_of_the_snapshot_unless_it_names_others() {
    for (pages, expected) in [
        ("null", None),
        (r#""Snapshot""#, None),
        (r#""None""#, Some(HugePages::None)),
        (r#""Transparent""#, Some(HugePages::Transparent)),
        (r#""2M""#, Some(HugePages::Size2M)),
    ] {
        let body = format!(r#"{{"snapshot_path":"s","mem_file_path":"m","huge_pages":{pages}}}"#);
        let Command::LoadSnapshot(request) = command(Method::PUT, "/snapshot/load", &body) else { panic!("{body}") };
        assert_eq!(request.huge_pages, expected, "{body}");
    }
}

#[test]
fn dirty_pages_are_tracked_if_either_name_of_the_field_says_so() {
    for (fields, tracked, deprecated) in [
        (r#""track_dirty_pages":false"#, false, false),
        (r#""track_dirty_pages":true,"enable_diff_snapshots":false"#, true, false),
        (r#""track_dirty_pages":false,"enable_diff_snapshots":true"#, true, true),
        (r#""enable_diff_snapshots":true"#, true, true),
    ] {
        let body =
            format!(r#"{{"snapshot_path":"s","mem_backend":{{"backend_type":"File","backend_path":"m"}},{fields}}}"#);
        let Ok(Action::Ask(ask)) = route(&Method::PUT, "/snapshot/load", body.as_bytes()) else { panic!("{body}") };
        let Command::LoadSnapshot(request) = ask.command else { panic!("{body}") };
        assert_eq!((request.track_dirty_pages, ask.deprecated), (tracked, deprecated), "{body}");
    }
}

#[test]
fn files_that_need_not_be_synced_are_synced_all_the_same() {
    let create = |sync| format!(r#"{{"snapshot_path":"s","mem_file_path":"m"{sync}}}"#);
    for sync in ["", r#","sync_snapshot_files":true"#, r#","sync_snapshot_files":false"#] {
        assert!(
            matches!(command(Method::PUT, "/snapshot/create", &create(sync)), Command::CreateSnapshot(_)),
            "{sync}"
        );
    }
}

#[test]
fn actions_and_states_are_commands() {
    let action = |name| command(Method::PUT, "/actions", &format!(r#"{{"action_type":"{name}"}}"#));
    assert!(matches!(action("InstanceStart"), Command::Start));
    assert!(matches!(action("FlushMetrics"), Command::FlushMetrics));
    assert!(matches!(action("SendCtrlAltDel"), Command::SendCtrlAltDel));
    assert!(matches!(command(Method::PATCH, "/vm", r#"{"state":"Paused"}"#), Command::Pause));
    assert!(matches!(command(Method::PATCH, "/vm/", r#"{"state":"Resumed"}"#), Command::Resume));
}

#[test]
fn a_log_level_is_read_in_any_case() {
    for (name, level) in
        [("warning", log::LevelFilter::Warn), ("WARN", log::LevelFilter::Warn), ("oFF", log::LevelFilter::Off)]
    {
        let Command::SetLogger(logger) = command(Method::PUT, "/logger", &format!(r#"{{"level":"{name}"}}"#)) else {
            panic!()
        };
        assert_eq!(logger.level, Some(level));
    }
}

#[test]
fn a_cpu_configuration_is_read_as_it_is_published() {
    let body = r#"{
        "kvm_capabilities": ["171", "!56"],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
            {"register": "eax", "bitmap": "0bxxxx000000000011xx00_011011110010"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0"}]
    }"#;
    let Command::SetCpu(cpu) = command(Method::PUT, "/cpu-config", body) else { panic!() };
    assert_eq!(cpu.kvm_capabilities, [Capability::Required(171), Capability::Waived(56)]);
    assert_eq!((cpu.cpuid_modifiers[0].leaf, cpu.msr_modifiers[0].address), (1, 0x10a));
    assert_eq!(cpu.cpuid_modifiers[0].registers[0].1.apply(0xffff_ffff), 0xf003_c6f2);
    assert_eq!(cpu.msr_modifiers[0].bitmap.apply(3), 2);
    assert!(matches!(command(Method::PUT, "/cpu-config", "{}"), Command::SetCpu(cpu) if cpu == CpuConfig::default()));

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, body).unwrap();
    let config = json!({ "cpu-config": file.path() }).to_string();
    let commands = config_commands(config.as_bytes()).unwrap();
    assert!(matches!(&commands[..], [Command::SetCpu(read)] if *read == cpu));

    for (body, named) in [
        (r#"{"kvm_capabilities": ["x"]}"#, "kvm_capabilities holds `x`"),
        (r#"{"msr_modifiers": [{"addr": "7", "bitmap": "0b0"}]}"#, "addr `7` is not a number of 32 bits"),
        (r#"{"msr_modifiers": [{"addr": "0x7", "bitmap": "0b2"}]}"#, "bitmap `0b2` is not 0b and then at most 64"),
        (
            r#"{"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "ekx", "bitmap": "0b1"}]}]}"#,
            "unknown variant `ekx`, expected one of `eax`, `ebx`, `ecx`, `edx`",
        ),
        (r#"{"reg_modifiers": []}"#, "unknown field `reg_modifiers`"),
    ] {
        let message = refusal(Method::PUT, "/cpu-config", body);
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn metadata_is_any_json_and_its_configuration_is_checked() {
    for body in ["{}", "null", "[1]", r#"{"a":{"b":""}}"#] {
        assert!(matches!(command(Method::PUT, "/mmds", body), Command::PutMetadata(_)));
        assert!(matches!(command(Method::PATCH, "/mmds", body), Command::PatchMetadata(_)));
    }
    assert!(refusal(Method::PUT, "/mmds", "{").contains("EOF"));
    let config = |body: &str| match route(&Method::PUT, "/mmds/config", body.as_bytes()) {
        Ok(Action::Ask(Ask { command: Command::SetMmds(config), deprecated, .. })) => (config, deprecated),
        other => panic!("{body}: {other:?}"),
    };
    let (mmds, deprecated) = config(r#"{"network_interfaces":["eth0"]}"#);
    assert_eq!((mmds.version, mmds.ipv4_address, deprecated), (MmdsVersion::V1, DEFAULT_MMDS_ADDRESS, true));
    let all = r#"{"network_interfaces":["a","b"],"version":"V2","ipv4_address":"169.254.1.1","imds_compat":true}"#;
    let (mmds, deprecated) = config(all);
    assert_eq!((mmds.version, mmds.imds_compat, deprecated), (MmdsVersion::V2, true, false));
    for (body, named) in [
        (r#"{"network_interfaces":[]}"#, "network_interfaces is empty"),
        (r#"{"network_interfaces":["a"],"ipv4_address":"10.0.0.1"}"#, "10.0.0.1 is not link-local"),
        (r#"{"network_interfaces":["a"],"ipv4_address":"169.254.0.255"}"#, "169.254.0.255 is not link-local"),
        (r#"{"network_interfaces":["a"],"ipv4_address":"169.254.255.0"}"#, "169.254.255.0 is not link-local"),
        (r#"{"network_interfaces":["a"],"ipv4_address":"x"}"#, "IPv4"),
        (r#"{"network_interfaces":["a"],"version":"V3"}"#, "unknown variant `V3`"),
        (r#"{"network_interfaces":["a"],"v":1}"#, "unknown field `v`"),
    ] {
        let message = refusal(Method::PUT, "/mmds/config", body);
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn what_this_release_does_not_do_is_said_plainly() {
    for (method, path, said) in [
        (Method::PATCH, "/balloon/statistics", "outside the scope"),
        (Method::PUT, "/entropy", "outside the scope"),
        (Method::PUT, "/pmem/p", "outside the scope"),
        (Method::GET, "/hotplug/memory", "outside the scope"),
        (Method::DELETE, "/drives/d", "unplugging devices is not supported"),
        (Method::PATCH, "/boot-source", "Invalid request method or path: PATCH /boot-source."),
        (Method::POST, "/actions", "Invalid request method or path: POST /actions."),
        (Method::GET, "/nope", "Invalid request method or path: GET /nope."),
        (Method::OPTIONS, "*", "Invalid request method or path: OPTIONS *."),
        (Method::PUT, "//actions", "Invalid request method or path: PUT //actions."),
    ] {
        let message = refusal(method, path, "{}");
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn requests_and_refusals_are_counted() {
    let counters = &METRICS.patch_api_requests;
    let before = (counters.drive_count.get(), counters.drive_fails.get());
    refusal(Method::PATCH, "/drives/counted", "{}");
    command(Method::PATCH, "/drives/counted", r#"{"drive_id":"counted","path_on_host":"x"}"#);
    assert!(counters.drive_count.get() >= before.0 + 2);
    assert!(counters.drive_fails.get() > before.1);
}

/// What the vmm thread keeps of the commands of a configuration file.
pub(super) fn configure(commands: Vec<Command>) -> Result<VmConfig, ConfigError> {
    let mut config = VmConfig::default();
    for command in commands {
        match command {
            Command::SetMachine(machine) => config.machine = machine,
            Command::SetBootSource(source) => config.boot_source = Some(source),
            Command::SetDrive(drive) => config.set_drive(*drive)?,
            Command::SetNetworkInterface(interface) => config.set_network_interface(*interface)?,
            Command::SetVsock(vsock) => config.set_vsock(vsock)?,
            Command::SetSerial(serial) => config.serial = Some(serial),
            Command::SetLogger(logger) => config.logger = Some(logger),
            Command::SetMetrics(metrics) => config.metrics = Some(metrics),
            Command::SetMmds(mmds) => config.mmds = Some(mmds),
            Command::SetCpu(cpu) => config.cpu = Some(cpu),
            other => panic!("{other:?}"),
        }
    }
    Ok(config)
}

pub(super) const PUBLISHED: &str = r#"{
    "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0", "initrd_path": null},
    "drives": [
        {"drive_id": "data", "partuuid": null, "is_root_device": false, "cache_type": "Writeback",
         "is_read_only": false, "path_on_host": "data.img", "io_engine": "Async", "socket": null,
         "rate_limiter": {"bandwidth": {"size": 1000, "one_time_burst": null, "refill_time": 100}, "ops": null}},
        {"drive_id": "rootfs", "is_root_device": true, "path_on_host": "rootfs.ext4"}
    ],
    "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false},
    "cpu-config": null, "balloon": null, "vsock": null, "logger": null,
    "network-interfaces": [
        {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02", "mtu": null,
         "rx_rate_limiter": null, "tx_rate_limiter": {"ops": {"size": 10, "refill_time": 1}}},
        {"iface_id": "eth1", "host_dev_name": "fd:5", "mtu": 9000}
    ],
    "metrics": null, "mmds-config": null, "entropy": null, "pmem": [], "memory-hotplug": null
}"#;

#[test]
fn a_published_configuration_file_is_understood() {
    let config = configure(config_commands(PUBLISHED.as_bytes()).unwrap()).unwrap();
    assert_eq!(config.machine.vcpu_count, 2);
    assert_eq!(config.drives[0].drive_id, "rootfs");
    assert_eq!(config.drives[1].io_engine, IoEngine::Async);
    let [eth0, eth1] = &config.network_interfaces[..] else { panic!() };
    assert_eq!(eth0.guest_mac, Some(MacAddress([6, 0, 0xac, 0x10, 0, 2])));
    assert_eq!(eth0.tx_rate_limiter.ops.unwrap().size, 10);
    assert_eq!((&eth1.host_device, eth1.mtu), (&HostDevice::Passed(5), Some(9000)));
    assert_eq!(config.boot_source.unwrap().boot_args.as_deref(), Some("console=ttyS0"));
    assert!(config_commands(b"{}").unwrap().is_empty());
}

#[test]
fn a_log_is_shown_as_all_requests_together_left_it_if_it_has_a_path() {
    let put = |body: &str, before: Option<LoggerConfig>| {
        let Command::SetLogger(logger) = command(Method::PUT, "/logger", body) else { panic!("{body}") };
        Some(logger.over(before.unwrap_or_default()))
    };
    let shown = |logger: &Option<LoggerConfig>| {
        let config = VmConfig { logger: logger.clone(), ..Default::default() };
        json!(types::FullVmConfiguration::from(&config))["logger"].clone()
    };
    let logger = put(r#"{"level":"Error","module":"vesicle"}"#, None);
    assert!(shown(&logger).is_null());
    let logger = put(r#"{"log_path":"/x","level":"Debug"}"#, logger);
    let logger = put(r#"{"show_level":true}"#, logger);
    let expected = json!({"log_path":"/x","level":null,"show_level":true,"show_log_origin":null,"module":"vesicle"});
    assert_eq!(shown(&logger), expected);
}

#[test]
fn a_configuration_file_with_what_is_not_there_is_refused() {
    for (file, named) in [
        (r#"{"network-interfaces": [{}]}"#, "missing field `iface_id`"),
        (r#"{"vsock": {"guest_cid": 3}}"#, "missing field `uds_path`"),
        (r#"{"vsock": {"guest_cid": 2, "uds_path": "v"}}"#, "guest_cid is 2"),
        (r#"{"cpu-config": "/nonexistent/t.json"}"#, "cpu-config \"/nonexistent/t.json\" cannot be used"),
        (r#"{"cpu-config": {"cpuid": []}}"#, "unknown field `cpuid`"),
        (r#"{"cpu-config": 7}"#, "expected a CPU configuration, or the path of a file with one"),
        (r#"{"mmds-config": {}}"#, "missing field `network_interfaces`"),
        (r#"{"balloon": {}}"#, "balloon is outside the scope"),
        (r#"{"entropy": {}}"#, "entropy is outside the scope"),
        (r#"{"pmem": [1]}"#, "pmem is outside the scope"),
        (r#"{"memory-hotplug": {}}"#, "memory-hotplug is outside the scope"),
        (r#"{"surprise": 1}"#, "unknown field `surprise`"),
        (r#"{"machine-config": {"vcpu_count": 0, "mem_size_mib": 1}}"#, "vcpu_count is 0"),
        ("", "EOF"),
        ("[", "EOF"),
    ] {
        let message = fault(&config_commands(file.as_bytes()).unwrap_err());
        assert!(message.contains(named), "{file}: {message}");
    }
}

#[test]
fn the_shown_configuration_names_everything_published_clients_look_for() {
    let mut config = VmConfig::default();
    let Command::SetDrive(drive) =
        command(Method::PUT, "/drives/d", r#"{"drive_id":"d","is_root_device":false,"path_on_host":"/img"}"#)
    else {
        panic!()
    };
    config.set_drive(*drive).unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&full_config(&config)).unwrap();
    let expected = json!({
        "boot-source": null, "cpu-config": null, "logger": null, "metrics": null, "serial": null, "balloon": null,
        "mmds-config": null, "vsock": null, "entropy": null, "memory-hotplug": null, "pmem": [],
        "network-interfaces": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
            "huge_pages": "None"},
        "drives": [{"drive_id": "d", "partuuid": null, "is_root_device": false, "cache_type": "Unsafe",
            "is_read_only": false, "path_on_host": "/img", "rate_limiter": null, "io_engine": "Sync", "socket": null}],
    });
    assert_eq!(shown, expected);
}
