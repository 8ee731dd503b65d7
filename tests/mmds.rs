//! The metadata service as guests read it and launchers write it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use common::{Guest, MicroVm};
use serde_json::{Value, json};

const URL: &str = "http://169.254.169.254";

/// A TAP that leads nowhere. It goes when this is dropped.
struct Tap(String);

impl Tap {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let name = format!("mmds{}", NEXT.fetch_add(1, Ordering::SeqCst));
        let user = common::Mode::chosen().user();
        let script = format!("ip tuntap add dev {name} mode tap vnet_hdr user {user} && ip link set {name} up");
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
        Self(name)
    }

    /// Frames of the guest that came this far.
    fn frames(&self) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/rx_packets", self.0);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

/// A guest with a route to the service, which has this metadata and configuration.
fn boot(guest: Guest, tap: &Tap, metadata: &Value, mut config: Value) -> MicroVm {
    config["network_interfaces"] = json!(["net0"]);
    let guest = guest.argument("--http-api-max-payload-size").argument("2000000");
    let mut vm = guest.interface("net0", &tap.0, json!({})).configure();
    vm.put("/mmds/config", &config);
    vm.put("/mmds", metadata);
    vm.start();
    vm.wait_until_ready();
    vm.ok("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ip route add 169.254.0.0/16 dev eth0");
    vm
}

/// A guest with curl.
fn with_curl() -> Guest {
    Guest::tuned().memory(160).root_from("rootfs-net")
}

/// The status and the body that curl gets.
fn curl(vm: &mut MicroVm, arguments: &str) -> (u16, String) {
    let output = vm.ok(&format!("curl -sS --max-time 230 -w '\\n%{{http_code}}' {arguments}"));
    let (body, status) = output.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

fn token(vm: &mut MicroVm, seconds: u32) -> String {
    let (status, token) =
        curl(vm, &format!("-X PUT -H 'X-metadata-token-ttl-seconds: {seconds}' {URL}/latest/api/token"));
    assert_eq!(status, 200, "{token}");
    token
}

#[test]
fn a_guest_reads_metadata_in_a_session() {
    let tap = Tap::new();
    let metadata = json!({"latest": {"meta-data": {"ami-id": "ami-1", "empty": "", "count": 3}}});
    let mut vm = boot(with_curl(), &tap, &metadata, json!({"version": "V2"}));
    let token_header = format!("-H 'X-metadata-token: {}'", token(&mut vm, 600));
    let get = |vm: &mut MicroVm, path: &str, more: &str| curl(vm, &format!("{token_header} {more} {URL}{path}"));
    assert_eq!(get(&mut vm, "/latest/", ""), (200, "meta-data/".into()));
    assert_eq!(get(&mut vm, "/latest/meta-data", ""), (200, "ami-id\ncount\nempty".into()));
    assert_eq!(get(&mut vm, "/latest/meta-data/ami-id", ""), (200, "ami-1".into()));
    assert_eq!(get(&mut vm, "/latest/meta-data/empty", ""), (200, String::new()));
    let (status, json) = get(&mut vm, "/", "-H 'Accept: application/json'");
    assert_eq!((status, serde_json::from_str::<Value>(&json).unwrap()), (200, metadata));
    assert_eq!(get(&mut vm, "/nope", "").0, 404);
    assert_eq!(get(&mut vm, "/latest/meta-data/count", "").0, 501);
    assert_eq!(get(&mut vm, "/latest", "-X DELETE").0, 405);

    // Without a token, with one that is wrong, and with one that was right.
    let path = format!("{URL}/latest/meta-data/ami-id");
    let (status, body) = curl(&mut vm, &path);
    assert!(status == 401 && body.starts_with("No MMDS token provided."), "{body}");
    assert_eq!(curl(&mut vm, &format!("-H 'X-metadata-token: nonsense' {path}")).0, 401);
    let short = token(&mut vm, 1);
    vm.ok("sleep 1.1");
    let expired = (401, "MMDS token not valid.".to_owned());
    assert_eq!(curl(&mut vm, &format!("-H 'X-aws-ec2-metadata-token: {short}' {path}")), expired);
    for header in ["X-Forwarded-For: 1.2.3.4", "x-forwarded-FOR: 1.2.3.4"] {
        let arguments = format!("-X PUT -H 'X-metadata-token-ttl-seconds: 60' -H '{header}' {URL}/latest/api/token");
        assert_eq!(curl(&mut vm, &arguments).0, 400);
    }
    let none = format!("-X PUT -H 'X-metadata-token-ttl-seconds: 21601' {URL}/latest/api/token");
    assert_eq!(curl(&mut vm, &none).0, 400);

    // What the launcher changes is there at once.
    vm.patch("/mmds", &json!({"latest": {"meta-data": {"ami-id": "ami-2", "count": null}}}));
    assert_eq!(get(&mut vm, "/latest/meta-data/ami-id", ""), (200, "ami-2".into()));
    assert_eq!(get(&mut vm, "/latest/meta-data", ""), (200, "ami-id\nempty".into()));
    assert_eq!(vm.get("/mmds"), json!({"latest": {"meta-data": {"ami-id": "ami-2", "empty": ""}}}));
    vm.shut_down();
}

#[test]
fn a_guest_without_sessions_reads_metadata_at_an_address_of_its_own() {
    let tap = Tap::new();
    let config = json!({"ipv4_address": "169.254.42.1", "imds_compat": true});
    let mut vm = boot(Guest::debian("6.12"), &tap, &json!({"a": {"b": "text"}}), config);
    assert_eq!(vm.ok("wget -q -O - http://169.254.42.1/a/b"), "text");
    assert_eq!(vm.ok("wget -q -O - --header 'Accept: application/json' http://169.254.42.1/a"), "b");
    vm.pause();
    vm.put("/mmds", &json!({"a": "changed"}));
    vm.resume();
    assert_eq!(vm.ok("wget -q -O - http://169.254.42.1/a"), "changed");
    // The usual address is nobody's now.
    let (output, status) = vm.run(&format!("timeout 2 wget -q -O - {URL}/a; [ $? = 143 ]"));
    assert_eq!(status, 0, "{output}");
    // A guest that has a default route only sends to its gateway, which is the host.
    let gateway = Command::new("ip").args(["addr", "add", "10.9.0.1/24", "dev", &tap.0]).status();
    assert!(gateway.unwrap().success());
    vm.ok("ip route del 169.254.0.0/16 dev eth0 && ip route add default via 10.9.0.1 dev eth0");
    assert_eq!(vm.ok("wget -q -O - http://169.254.42.1/a"), "changed");
    vm.shut_down();
}

#[test]
fn a_mebibyte_of_metadata_and_a_hundred_requests_at_once_are_answered_and_the_tap_sees_nothing() {
    let tap = Tap::new();
    let large: String =
        (0..1 << 20).map(|i: u32| char::from(b'a' + (i.wrapping_mul(2_654_435_761) >> 27) as u8 % 26)).collect();
    let mut metadata: Value = (1..=100).map(|n| (format!("key{n}"), json!(format!("value {n}")))).collect();
    metadata["large"] = json!(large);
    let mut vm = boot(with_curl().vcpus(2), &tap, &metadata, json!({"version": "V2"}));
    let header = format!("-H 'X-metadata-token: {}'", token(&mut vm, 600));
    vm.ok(&format!("curl -sS --max-time 230 {header} -o /tmp/large {URL}/large"));
    let file = vm.dir().join("large");
    fs::write(&file, &large).unwrap();
    let sum = Command::new("sha256sum").arg(&file).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    assert_eq!(vm.ok("sha256sum </tmp/large").split(' ').next(), sum.split(' ').next());

    let parallel = "-Z --parallel-immediate --parallel-max 100";
    vm.ok(&format!("curl -sS --max-time 230 {parallel} {header} -o '/tmp/key#1' '{URL}/key[1-100]'"));
    assert_eq!(vm.ok("for n in $(seq 100); do [ \"$(cat /tmp/key$n)\" = \"value $n\" ] || echo $n; done"), "");
    // All of the large one, several times at once.
    let large: String = (0..3).map(|n| format!(" -o /tmp/large{n} {URL}/large")).collect();
    vm.ok(&format!("curl -sS --max-time 230 {parallel} {header}{large}"));
    assert_eq!(vm.ok("cat /tmp/large?* | wc -c"), (3 << 20).to_string());
    assert!(tap.frames() < 50, "{}", tap.frames());
    let metrics = vm.api().get("/metrics").unwrap().body;
    assert!(metrics.contains("vesicle_mmds_tx_errors_total 0\n"), "{metrics}");
    vm.shut_down();
}

#[test]
fn metadata_has_a_limit_and_a_configuration_that_is_checked() {
    let dir = common::tempdir();
    let file = dir.path().join("metadata");
    fs::write(&file, r#"{"from": "file"}"#).unwrap();
    let limited = Guest::tuned().argument("--mmds-size-limit").argument("100");
    let vm = limited.argument("--metadata").argument(file.to_str().unwrap()).launch();
    assert_eq!(vm.get("/mmds"), json!({"from": "file"}));
    let reply = vm.api().put("/mmds", &json!({"a": "x".repeat(100)})).unwrap();
    assert!(reply.status == 413 && reply.fault().contains("100 bytes"), "{}", reply.body);
    let reply = vm.api().patch("/mmds", &json!({"a": "x".repeat(90)})).unwrap();
    assert_eq!(reply.status, 413, "{}", reply.body);
    vm.patch("/mmds", &json!({"from": null, "to": 1}));
    assert_eq!(vm.get("/mmds"), json!({"to": 1}));
    let fault = vm.refused_put("/mmds/config", &json!({"network_interfaces": ["eth0"]}));
    assert!(fault.contains("`eth0`, which does not exist"), "{fault}");

    let empty = Guest::tuned().launch();
    assert_eq!(empty.get("/mmds"), json!({}));
    let reply = empty.api().patch("/mmds", &json!({"a": 1})).unwrap();
    assert!(reply.status == 400 && reply.fault().contains("PUT /mmds first"), "{}", reply.body);
}
