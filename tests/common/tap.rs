//! A network to a guest.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::{Value, json};

use super::{MicroVm, Mode};

/// A TAP with an address, which nobody else has. It goes when this is dropped.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// Its number, which is in its addresses too.
    pub net: u8,
}

/// Runs a command of the host, which must succeed.
pub fn host(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Tap {
    /// Makes it.
    pub fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let net = NEXT.fetch_add(1, Ordering::SeqCst);
        let tap = Self { name: format!("test{net}"), net };
        let name = &tap.name;
        let user = Mode::chosen().user();
        host(&format!(
            "ip tuntap add dev {name} mode tap vnet_hdr user {user} && ip addr add {}/24 dev {name}",
            tap.host()
        ));
        host(&format!("ip link set {name} up"));
        tap
    }

    /// With another MTU.
    pub fn mtu(self, mtu: u16) -> Self {
        host(&format!("ip link set {} mtu {mtu}", self.name));
        self
    }

    /// The host's address.
    pub fn host(&self) -> String {
        format!("10.77.{}.1", self.net)
    }

    /// The guest's address.
    pub fn guest(&self) -> String {
        format!("10.77.{}.2", self.net)
    }

    /// What the host's kernel has counted.
    pub fn statistic(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    /// Has the guest take its address on `device`.
    pub fn set_up(&self, vm: &mut MicroVm, device: &str) {
        vm.ok(&format!("ip addr add {}/24 dev {device} && ip link set {device} up", self.guest()));
    }

    /// Tells host and guest each other's address, so that none has to ask for it through a limit or a flood.
    pub fn introduce(&self, vm: &mut MicroVm) {
        let ours = host(&format!("cat /sys/class/net/{}/address", self.name));
        vm.ok(&format!("arp -s {} {}", self.host(), ours.trim()));
        let guest = &mac(self.net)["guest_mac"];
        host(&format!("ip neigh replace {} lladdr {} dev {}", self.guest(), guest.as_str().unwrap(), self.name));
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
    }
}

/// The address of the guest's interface, as a body of PUT /network-interfaces has it.
pub fn mac(net: u8) -> Value {
    json!({ "guest_mac": format!("06:00:0a:4d:{net:02x}:02") })
}

/// `iperf3 -s`, which listens when this is there.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Starts it on the host's address.
    pub fn start(tap: &Tap, port: u16) -> Self {
        let mut child = Command::new("iperf3")
            .args(["-s", "--forceflush", "-B", &tap.host(), "-p", &port.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while !lines.next().unwrap().unwrap().contains("listening") {}
        // What else it says nobody wants to know, but it must not be held up.
        std::thread::spawn(move || lines.for_each(drop));
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
