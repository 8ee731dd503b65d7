//! Clones of one snapshot that are alive at the same time.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::fs;

use common::snapshot::Snapshot;
use common::tap::{Tap, mac};
use common::{Guest, MicroVm, Mode};
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
