//! Clones of one snapshot that are alive at the same time.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use common::snapshot::Snapshot;
use common::tap::{Tap, mac};
use common::{Guest, MicroVm, Mode, PATIENCE, artefact};
use serde_json::json;

/// Reaches the host, and finds on its drive what it wrote.
fn is_well(clone: &mut MicroVm, tap: &Tap) {
    clone.ok(&format!("ping -c 1 -W 10 {}", tap.host()));
    assert_eq!(clone.ok("head -n 1 /dev/vda"), format!("clone {}", tap.net));
}

/// As many as `VESICLE_CLONES` says.
#[test]
fn clones_that_live_at_once_share_no_address_no_disk_and_no_random_numbers() {
    let count = std::env::var("VESICLE_CLONES").map_or(4, |count| count.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::write(&data, [0; 1 << 20]).unwrap();
    let tap = Tap::new();
    let guest = Guest::tuned().mode(Mode::Plain).argument("--allow-path=/");
    let guest = guest.drive("data", &data, json!({ "overlay": {} })).interface("net0", &tap.name, mac(tap.net));
    let mut origin = guest.boot();
    origin.ok("echo before >/dev/vda; sync");
    let snapshot = Snapshot::of(&origin);
    origin.kill();

    let start = |_| {
        let tap = Tap::new();
        let clone = origin.sibling(&[]);
        let mut load = snapshot.load();
        let address = &mac(tap.net)["guest_mac"];
        load["network_overrides"] = json!([{ "iface_id": "net0", "host_dev_name": tap.name, "guest_mac": address }]);
        load["drive_overrides"] = json!([{ "drive_id": "data", "overlay": {} }]);
        clone.put("/snapshot/load", &load);
        (clone, tap)
    };
    let mut clones: Vec<_> = (0..count).map(start).collect();
    let mut drawn = HashSet::new();
    for (clone, tap) in &mut clones {
        assert_eq!(clone.ok("head -n 1 /dev/vda"), "before");
        clone.ok(&format!("echo clone {} >/dev/vda; sync", tap.net));
        // A driver that was running is told of its address.
        clone.ok(&format!("ip link set eth0 address {}", mac(tap.net)["guest_mac"].as_str().unwrap()));
        tap.set_up(clone, "eth0");
        drawn.insert(clone.ok("cat /proc/sys/kernel/random/uuid"));
    }
    assert_eq!(drawn.len(), count);
    clones.iter_mut().for_each(|(clone, tap)| is_well(clone, tap));
    let (mut killed, _) = clones.swap_remove(count / 2);
    killed.kill();
    clones.iter_mut().for_each(|(clone, tap)| is_well(clone, tap));
    assert!(fs::read(&data).unwrap().iter().all(|&byte| byte == 0), "the base is never written");
}

#[test]
fn a_prepared_process_takes_another_drive_tap_and_vsock_with_its_load() {
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str| {
        let path = dir.path().join(name);
        fs::write(&path, format!("{name:4096}")).unwrap();
        path
    };
    let (old, new) = (Tap::new(), Tap::new());
    let mut origin = Guest::tuned()
        .mode(Mode::Plain)
        .argument("--allow-path=/")
        .drive("data", &image("one"), json!({}))
        .drive("tool", &artefact("vsock"), json!({ "is_read_only": true }))
        .interface("net0", &old.name, mac(old.net))
        .configure();
    origin.put("/vsock", &json!({ "guest_cid": 3, "uds_path": origin.dir().join("v.sock") }));
    origin.start();
    origin.wait_until_ready();
    origin.ok("cat /dev/vdb >/run/vsock && chmod +x /run/vsock");
    origin.ok("/run/vsock serve 5000 echo >/run/5000 2>&1 & until grep -q listening /run/5000; do sleep 0.05; done");
    let snapshot = Snapshot::of(&origin);
    origin.kill();

    let mut clone = origin.sibling(&["--allow-path=/", "--prepare", snapshot.state.to_str().unwrap()]);
    let (mut load, address) = (snapshot.load(), &mac(new.net)["guest_mac"]);
    load["drive_overrides"] = json!([{ "drive_id": "data", "path_on_host": image("two") }]);
    load["network_overrides"] = json!([{ "iface_id": "net0", "host_dev_name": new.name, "guest_mac": address }]);
    load["vsock_override"] = json!({ "uds_path": clone.dir().join("own.sock") });
    clone.put("/snapshot/load", &load);
    assert_eq!(clone.ok("dd if=/dev/vda bs=4k count=1 iflag=direct 2>/dev/null | head -c 3"), "two");
    clone.ok(&format!("ip link set eth0 address {}", address.as_str().unwrap()));
    new.set_up(&mut clone, "eth0");
    clone.ok(&format!("ping -c 1 -W 10 {}", new.host()));
    let mut stream = UnixStream::connect(clone.dir().join("own.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 5000\nhello\n").unwrap();
    let lines: Vec<_> = BufReader::new(stream).lines().take(2).map(Result::unwrap).collect();
    assert!(lines[0].starts_with("OK ") && lines[1] == "hello", "{lines:?}");
}
