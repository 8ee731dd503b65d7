//! virtio-net as Linux guests use it, with the host at the other end of a TAP.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::rest::wait_until_at_rest;
use common::snapshot::Snapshot;
use common::tap::{Server, Tap, mac};
use common::{Guest, MicroVm, Mode, PATIENCE, wait_until};
use serde_json::{Value, json};

#[test]
fn host_and_guest_ping_each_other() {
    for guest in Guest::of_each_kernel() {
        let tap = Tap::new();
        let mut vm = guest.interface("net0", &tap.name, mac(tap.net)).boot();
        tap.set_up(&mut vm, "eth0");
        vm.ok(&format!("ping -c 3 -W 10 {}", tap.host()));
        vm.ok(&format!("ping -c 3 -W 10 -s 8000 {}", tap.host()));
        assert_eq!(vm.ok("cat /sys/class/net/eth0/address"), mac(tap.net)["guest_mac"].as_str().unwrap());
        vm.shut_down();
    }
}

/// iperf3 on the host; returns what a client in the guest measures with `options` in kbit/s at the receiving end.
fn iperf(vm: &mut MicroVm, tap: &Tap, port: u16, options: &str) -> f64 {
    let _server = Server::start(tap, port);
    let command = format!("iperf3 -c {} -p {port} -f k {options} | grep receiver", tap.host());
    let line = vm.ok(&command);
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    let unit = words.iter().position(|word| *word == "Kbits/sec").unwrap_or_else(|| panic!("{line}"));
    words[unit - 1].parse().unwrap()
}

/// A guest with iperf3 and one interface.
fn iperf_guest(tap: &Tap, vcpus: u8, mut more: Value) -> MicroVm {
    more["guest_mac"] = mac(tap.net)["guest_mac"].clone();
    let guest = Guest::tuned().vcpus(vcpus).memory(160).root_from("rootfs-net");
    let mut vm = guest.interface("net0", &tap.name, more).boot();
    tap.set_up(&mut vm, "eth0");
    vm
}

#[test]
fn tcp_and_udp_flow_in_both_directions_at_every_mtu() {
    for (vcpus, mtu) in [(1, 1500), (2, 1500), (1, 9000), (2, 9000)] {
        let tap = Tap::new().mtu(mtu);
        let mut vm = iperf_guest(&tap, vcpus, json!({ "mtu": mtu }));
        assert_eq!(vm.ok("cat /sys/class/net/eth0/mtu"), mtu.to_string());
        // Whether it flows, not how fast: everything may be emulated here, and others at work beside. So little UDP fits
        // into the TAP's queue even if the guest gets no turn meanwhile.
        for options in ["-n 4M", "-n 4M -R", "-n 4M -P 3", "-n 500K -u -b 20M", "-n 500K -u -b 20M -R"] {
            let rate = iperf(&mut vm, &tap, 5201, options);
            assert!(rate > 0.0, "{vcpus} vCPUs, MTU {mtu}, {options}: {rate} kbit/s");
        }
        assert_eq!(vm.metric("vesicle_net_tx_fails_total{iface_id=\"net0\"}"), 0);
        assert_eq!(vm.metric("vesicle_net_rx_fails_total{iface_id=\"net0\"}"), 0);
        vm.ok(&format!("ping -c 2 -W 10 -s {} {}", mtu - 28, tap.host()));
        vm.shut_down();
    }
}

/// CVE-2020-16843 as a guest would have it: the TAP's queue and the guest's ring are full, and then there is peace.
#[test]
fn traffic_flows_after_a_flood_that_filled_every_ring() {
    let seconds = std::env::var("VESICLE_FLOOD_SECONDS").map_or(6, |seconds| seconds.parse().unwrap());
    for vcpus in [1, 2] {
        let tap = Tap::new();
        let mut vm = iperf_guest(&tap, vcpus, json!({}));
        let servers: Vec<_> = (5201..5204).map(|port| Server::start(&tap, port)).collect();
        let client = format!("iperf3 -c {} -t {seconds}", tap.host());
        vm.begin(&format!(
            "{client} -p 5201 -u -b 0 -R >/dev/null 2>&1 & {client} -p 5202 -u -b 0 -l 100 >/dev/null 2>&1 & \
             {client} -p 5203 >/dev/null 2>&1 & wait; echo over"
        ));
        // The host adds a flood of its own, which nothing slows down, until the TAP's queue and the guest's ring were full.
        let flood = Flood::start(&tap);
        std::thread::sleep(Duration::from_secs(seconds));
        wait_until(|| tap.statistic("tx_dropped") > 0);
        wait_until(|| vm.metric("vesicle_net_no_rx_avail_buffer_total{iface_id=\"net0\"}") > 0);
        flood.stop();
        let (output, _) = vm.finish(PATIENCE);
        assert!(output.ends_with("over\n"), "{output}");
        drop(servers);
        vm.ok(&format!("ping -c 3 -W 10 {}", tap.host()));
        assert!(iperf(&mut vm, &tap, 5201, "-n 1M -R") > 0.0);
        assert_eq!(vm.metric("vesicle_net_needs_reset_total{iface_id=\"net0\"}"), 0);
        vm.shut_down();
    }
}

/// UDP datagrams to a port where nobody is, as fast as they go.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Flood {
    fn start(tap: &Tap) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (until, guest) = (Arc::clone(&stop), tap.guest());
        let thread = std::thread::spawn(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            while !until.load(Ordering::Relaxed) {
                // An answer that nobody is there is an error of the next call.
                let _ = socket.send_to(&[7; 1200], (guest.as_str(), 9));
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

#[test]
fn a_tap_that_was_passed_in_takes_no_privilege() {
    let tap = Tap::new();
    let open = vesicle::devices::virtio::net::Tap::open(&tap.name).unwrap();
    let fd = open.as_fd().try_clone_to_owned().unwrap();
    drop(open);
    let name = format!("fd:{}", fd.as_raw_fd());
    let not_passed = format!("fd:{}", fd.as_raw_fd() + 1000);
    let socket: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
    let no_tap = format!("fd:{}", socket.as_raw_fd());
    let unused = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
    let has_unused = |vm: &mut MicroVm| {
        let mut open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        open.any(|fd| std::fs::read_link(fd.unwrap().path()).is_ok_and(|file| file == unused))
    };

    let guest = Guest::tuned().unprivileged().pass(fd).pass(socket).interface("net0", &name, mac(tap.net));
    let mut vm = guest.configure();
    let put = |vm: &MicroVm, device: &str| {
        vm.refused_put("/network-interfaces/other", &json!({ "iface_id": "other", "host_dev_name": device }))
    };
    assert!(put(&vm, &name).contains("is in use by interface"));
    assert!(put(&vm, &not_passed).contains("was not passed in"));
    assert!(put(&vm, &no_tap).contains("not the descriptor of a TAP"));
    let other = Tap::new();
    assert!(put(&vm, &other.name).contains("not permitted"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000") && status.contains("Uid:\t65534"), "{status}");

    assert!(has_unused(&mut vm));
    vm.start();
    vm.wait_until_ready();
    assert!(!has_unused(&mut vm), "a guest has no use of a descriptor that no device took");
    tap.set_up(&mut vm, "eth0");
    vm.ok(&format!("ping -c 3 -W 10 {}", tap.host()));
    assert_eq!(vm.get("/vm/config")["network-interfaces"][0]["host_dev_name"], json!(name));
    vm.shut_down();
}

#[test]
fn two_interfaces_are_told_apart_and_come_in_the_order_they_were_configured() {
    let (first, second) = (Tap::new(), Tap::new());
    // Ids that would sort the other way round.
    let guest = Guest::tuned().interface("z", &first.name, mac(first.net)).interface("a", &second.name, json!({}));
    let vm = guest.configure();
    let interface =
        |id: &str, device: &str, mac: &Value| json!({ "iface_id": id, "host_dev_name": device, "guest_mac": mac });
    let taken = &mac(first.net)["guest_mac"];
    let fault = vm.refused_put("/network-interfaces/a", &interface("a", &second.name, taken));
    assert!(fault.contains("is in use by interface `z`"), "{fault}");
    let fault = vm.refused_put("/network-interfaces/b", &interface("b", &second.name, &Value::Null));
    assert!(fault.contains(&second.name), "a TAP opens once: {fault}");
    let fault = vm.refused_put("/network-interfaces/b", &interface("b", "no/such", &Value::Null));
    assert!(fault.contains("host_dev_name `no/such`"), "{fault}");
    // The same again changes nothing. Jails made without root have no /dev/net/tun to open a TAP by name.
    if Mode::chosen() != Mode::Rootless {
        vm.put("/network-interfaces/z", &interface("z", &first.name, taken));
    }
    let mut vm = vm;
    vm.start();
    vm.wait_until_ready();
    first.set_up(&mut vm, "eth0");
    second.set_up(&mut vm, "eth1");
    vm.ok(&format!("ping -c 2 -W 10 {} && ping -c 2 -W 10 {}", first.host(), second.host()));
    assert_eq!(vm.ok("cat /sys/class/net/eth0/address"), taken.as_str().unwrap());
    let random = vm.ok("cat /sys/class/net/eth1/address; cat /sys/class/net/eth1/addr_assign_type");
    assert!(random.ends_with("\n1"), "without guest_mac the guest has chosen: {random}");
    vm.shut_down();
}

const KIB: u64 = 1 << 10;

/// A limit of so many a second, in pieces of 100 ms.
fn per_second(rate: u64) -> Value {
    json!({ "size": rate / 10, "refill_time": 100 })
}

/// One direction of a guest's interface, in which there is more to send than any limit lets through.
struct Direction<'a> {
    vm: &'a MicroVm,
    tap: &'a Tap,
    /// tx or rx, as the guest sees it.
    name: &'a str,
    /// What the host's kernel calls that.
    received: &'a str,
}

impl Direction<'_> {
    fn patch(&self, limits: Value) {
        let field = format!("{}_rate_limiter", self.name);
        self.vm.patch("/network-interfaces/net0", &json!({ "iface_id": "net0", field: limits }));
    }

    fn throttled(&self) -> u64 {
        let name = format!("vesicle_net_{}_rate_limiter_throttled_total{{iface_id=\"net0\"}}", self.name);
        self.vm.metric(&name)
    }

    /// Bytes or packets that have crossed the TAP.
    fn crossed(&self, what: &str) -> u64 {
        self.tap.statistic(&format!("{}_{what}", self.received))
    }

    /// The limit of so many bytes or packets a second is in force: it is reached, and over seconds no more than that
    /// crosses, save what a full bucket lets through at once and a frame on its way. How much less it is may be the
    /// machine's fault; tools/bench measures that where it is not.
    fn holds_to(&self, limit: u64, what: &str) {
        let frame = if what == "bytes" { 64 * KIB } else { 1 };
        for _ in 0..2 {
            let throttled = self.throttled();
            let (start, before) = (Instant::now(), self.crossed(what));
            std::thread::sleep(Duration::from_secs(3));
            wait_until(|| self.throttled() >= throttled + 3);
            let crossed = self.crossed(what) - before;
            let allowed = limit as f64 * start.elapsed().as_secs_f64() + (limit / 10 + frame) as f64;
            assert!(crossed as f64 <= allowed, "{} {what}: {crossed}, where {allowed} are allowed", self.name);
            assert!(crossed > 0, "{}: nothing gets through", self.name);
        }
    }

    /// Waits until more crosses than a limit of so much would let through.
    fn exceeds(&self, limit: u64, what: &str) {
        wait_until(|| {
            let (start, before) = (Instant::now(), self.crossed(what));
            std::thread::sleep(Duration::from_secs(1));
            let crossed = self.crossed(what) - before;
            crossed as f64 > 1.5 * limit as f64 * start.elapsed().as_secs_f64()
        });
    }
}

#[test]
fn limits_are_never_exceeded_and_are_changed_while_the_guest_runs() {
    let tap = Tap::new();
    let limits = json!({ "bandwidth": per_second(128 * KIB) });
    let mut vm = iperf_guest(&tap, 1, json!({ "tx_rate_limiter": limits, "rx_rate_limiter": limits }));
    tap.introduce(&mut vm);
    let _server = Server::start(&tap, 5201);
    let mut flood = None;
    for (name, received) in [("tx", "rx"), ("rx", "tx")] {
        if name == "tx" {
            vm.ok(&format!("iperf3 -c {} -p 5201 -u -b 60M -t 86400 >/dev/null 2>&1 &", tap.host()));
        } else {
            vm.ok("killall -9 iperf3");
            flood = Some(Flood::start(&tap));
        }
        let direction = Direction { vm: &vm, tap: &tap, name, received };
        direction.holds_to(128 * KIB, "bytes");
        direction.patch(json!({ "bandwidth": per_second(256 * KIB) }));
        direction.holds_to(256 * KIB, "bytes");
        direction.exceeds(128 * KIB, "bytes");
        direction.patch(json!({ "ops": per_second(20), "bandwidth": { "size": 0, "refill_time": 0 } }));
        direction.holds_to(20, "packets");
        direction.patch(json!({ "ops": { "size": 0, "refill_time": 0 } }));
        direction.exceeds(20, "packets");
        let throttled = direction.throttled();
        direction.exceeds(20, "packets");
        assert_eq!(direction.throttled(), throttled, "{name}: nothing is limited any more");
    }
    flood.unwrap().stop();
    let shown = &vm.get("/vm/config")["network-interfaces"][0];
    assert!(shown["tx_rate_limiter"].is_null() && shown["rx_rate_limiter"].is_null(), "{shown}");
    let fault = vm.api().patch("/network-interfaces/none", &json!({ "iface_id": "none" })).unwrap();
    assert_eq!(fault.status, 400);
    vm.shut_down();
}

#[test]
fn a_throttled_interface_uses_no_processor() {
    let tap = Tap::new();
    let stopped = json!({ "bandwidth": { "size": 1, "refill_time": 86_400_000u64 } });
    let mut vm = iperf_guest(&tap, 1, json!({ "tx_rate_limiter": stopped, "rx_rate_limiter": stopped }));
    // Neither side can ask for the other's address.
    tap.introduce(&mut vm);
    let flood = Flood::start(&tap);
    vm.ok(&format!("ping -A -w 600 {} >/dev/null &", tap.host()));
    wait_until(|| tap.statistic("tx_dropped") > 0);
    wait_until_at_rest(vm.pid());
    flood.stop();
    vm.shut_down();
}

#[test]
fn an_interface_survives_pauses() {
    let tap = Tap::new();
    let mut vm = iperf_guest(&tap, 2, json!({}));
    let _server = Server::start(&tap, 5201);
    vm.begin(&format!("iperf3 -c {} -p 5201 -t 5 --bidir >/dev/null; echo $?", tap.host()));
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(200));
        vm.pause();
        std::thread::sleep(Duration::from_millis(50));
        vm.resume();
    }
    assert_eq!(vm.finish(PATIENCE), ("0\n".to_owned(), 0));
    vm.shut_down();
}

#[test]
fn a_clone_has_a_tap_and_an_address_of_its_own() {
    let [tap, own, spare] = [Tap::new(), Tap::new(), Tap::new()];
    let (guest, own_name) = Guest::tuned().argument("--allow-path=/").reach(&own.name);
    let guest = guest.interface("net0", &tap.name, mac(tap.net)).interface("net1", &spare.name, mac(spare.net));
    let mut vm = guest.boot();
    tap.set_up(&mut vm, "eth0");
    vm.ok(&format!("ping -c 1 -W 10 {}", tap.host()));
    let snapshot = Snapshot::of(&vm);
    vm.kill();

    let load = |id: &str, mac: &Value| {
        let mut body = snapshot.load();
        body["network_overrides"] = json!([{ "iface_id": id, "host_dev_name": own_name, "guest_mac": mac }]);
        body
    };
    let [old_mac, new_mac, taken] = [&tap, &own, &spare].map(|tap| mac(tap.net)["guest_mac"].clone());
    for (id, mac, reason) in
        [("net2", &new_mac, "no interface \"net2\""), ("net0", &taken, "in use by interface `net0`")]
    {
        vm = vm.successor();
        let refusal = vm.refused_put("/snapshot/load", &load(id, mac));
        assert!(refusal.contains(reason), "{refusal}");
        assert_eq!(vm.wait_exit().code(), Some(1));
    }

    let mut vm = vm.successor();
    let refusal = vm.refused_put("/snapshot/load", &load("net0", &json!("06:00")));
    assert!(refusal.contains("`06:00`"), "{refusal}");
    let sent = tap.statistic("rx_packets");
    vm.put("/snapshot/load", &load("net0", &new_mac));
    let shown = &vm.get("/vm/config")["network-interfaces"];
    assert_eq!((&shown[0]["guest_mac"], &shown[0]["host_dev_name"]), (&new_mac, &json!(own_name)));
    assert_eq!((&shown[1]["guest_mac"], &shown[1]["host_dev_name"]), (&taken, vm.guest().interface_name("net1")));
    // The driver goes on with what it knows until it looks at the device again.
    vm.ok(&format!("ip addr show eth0 | grep -q {}", tap.guest()));
    assert_eq!(vm.ok("cat /sys/class/net/eth0/address"), old_mac.as_str().unwrap());
    vm.ok("device=$(basename $(readlink -f /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net && \
         echo $device >unbind && echo $device >bind");
    assert_eq!(vm.ok("cat /sys/class/net/eth0/address"), new_mac.as_str().unwrap());
    own.set_up(&mut vm, "eth0");
    vm.ok(&format!("ping -c 3 -W 10 {}", own.host()));
    assert_eq!(tap.statistic("rx_packets"), sent, "nothing goes where the guest was before");
    vm.shut_down();
}
