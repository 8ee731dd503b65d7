//! `vesiclectl run --net`, on a machine of its own: a network namespace, with another one for the world outside.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use vesiclectl::{Job, Script, Vesicle};

use common::{artefact, told, vesicle};

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `job` in a thread of its own, in a network namespace.
fn within<T: Send + 'static>(name: &str, job: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    let namespace = File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        job()
    })
}

/// A host at 192.0.2.1, and 192.0.2.2 outside, where an HTTP server tells who asks. Outside knows no way to guests.
struct Host {
    name: String,
    outside: String,
}

impl Host {
    fn new(name: &str) -> Self {
        let host = Self { name: format!("host-{name}"), outside: format!("out-{name}") };
        let Self { name, outside } = &host;
        ip(&format!("netns add {name}"));
        ip(&format!("netns add {outside}"));
        ip(&format!("-n {name} link add eth0 type veth peer name eth0 netns {outside}"));
        for (namespace, address) in [(name, "192.0.2.1"), (outside, "192.0.2.2")] {
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} address add {address}/24 dev eth0"));
            ip(&format!("-n {namespace} link set eth0 up"));
        }
        // ip lays this over the machine's own for what it runs in the namespace.
        fs::create_dir_all(format!("/etc/netns/{name}")).unwrap();
        fs::write(format!("/etc/netns/{name}/resolv.conf"), "nameserver 127.0.0.53\nnameserver 192.0.2.2\n").unwrap();
        let listener = within(outside, || TcpListener::bind("192.0.2.2:80").unwrap()).join().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\nyou are {}\n", stream.peer_addr().unwrap().ip());
            }
        });
        host
    }

    fn command(&self, more: &[&str]) -> Command {
        let vesiclectl = env!("CARGO_BIN_EXE_vesiclectl");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, vesiclectl, "run", "--net", "--memory", "64", "--vesicle"]);
        command.arg(vesicle());
        command.arg("--kernel").arg(artefact("kernel-tuned")).arg("--initramfs").arg(artefact("initramfs-tuned"));
        command.args(more).stdin(Stdio::null());
        command
    }

    fn run(&self, more: &[&str]) -> (String, i32) {
        told(self.command(more).output().unwrap())
    }

    /// Starts a guest that serves on port 7 until it is ended.
    fn start(&self) -> Child {
        let script = "echo ready; exec nc -ll -p 7 -e echo served";
        let mut child = self.command(&["--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        child
    }

    /// From now on the host takes connections to port 7, and closes them.
    fn serve(&self) {
        let listener = within(&self.name, || TcpListener::bind("0.0.0.0:7").unwrap()).join().unwrap();
        std::thread::spawn(move || listener.incoming().for_each(drop));
    }

    /// What a guest's port 7 says to its own host.
    fn asked(&self, address: &'static str) -> String {
        let ask = move || {
            let mut said = String::new();
            let until = Instant::now() + Duration::from_secs(120);
            while said.is_empty() && Instant::now() < until {
                if let Ok(mut stream) = TcpStream::connect((address, 7)) {
                    let _ = stream.read_to_string(&mut said);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            said
        };
        within(&self.name, ask).join().unwrap()
    }

    /// The interfaces and tables that runs have here.
    fn left(&self) -> (String, String) {
        let said = |words: &[&str]| {
            let mut command = Command::new("ip");
            let (said, status) = told(command.args(["netns", "exec", &self.name]).args(words).output().unwrap());
            assert_eq!(status, 0, "{said}");
            said
        };
        let links = said(&["ip", "-o", "link"]);
        let links = links.lines().filter_map(|line| Some(line.split_once("vesicle")?.1.split(':').next()?.to_owned()));
        (links.collect::<Vec<_>>().join(" "), said(&["nft", "list", "tables"]).trim().to_owned())
    }

    fn wait_for_no_link(&self) {
        let until = Instant::now() + Duration::from_secs(120);
        while !self.left().0.is_empty() {
            assert!(Instant::now() < until, "{:?}", self.left());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in [&self.name, &self.outside] {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
        let _ = fs::remove_dir_all(format!("/etc/netns/{}", self.name));
    }
}

fn end(child: Child, signal: &str) -> Option<i32> {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap().status.code()
}

#[test]
fn a_guest_reaches_out_and_nothing_is_left_behind() {
    let host = Host::new("reach");
    let script = "wget -qO- http://192.0.2.2/ && cat /etc/resolv.conf && ping -c 1 -W 5 10.201.0.1 >/dev/null; exit $?";
    let reached = "you are 192.0.2.1\nnameserver 192.0.2.2\n";
    let switched = "vesiclectl: this machine did not forward packets; net.ipv4.ip_forward is 1 from now on\n";
    assert_eq!(host.run(&["--", "sh", "-c", script]), (format!("{reached}{switched}"), 0));
    assert_eq!(host.left(), Default::default());

    // The same from a root file system that cannot be written to, where the resolver's file is there, or a link.
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir_all(tree.join("bin")).unwrap();
    let dump = format!("dump -p /bin/busybox {}", tree.join("bin/sh").display());
    assert!(Command::new("debugfs").args(["-R", &dump]).arg(artefact("rootfs")).output().unwrap().status.success());
    for link in [false, true] {
        if link {
            fs::create_dir(tree.join("etc")).unwrap();
            std::os::unix::fs::symlink("../run/resolver/stub.conf", tree.join("etc/resolv.conf")).unwrap();
        }
        let mut build = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
        build.args(["image", "build", "--output"]).arg(&image).arg(&tree);
        assert_eq!(told(build.output().unwrap()), (String::new(), 0));
        assert_eq!(host.run(&["--rootfs", image.to_str().unwrap(), "--", "sh", "-c", script]), (reached.into(), 0));
    }
    // Nor is anything left of a run that fails.
    let (said, status) = host.run(&["--kernel", "/etc/passwd", "--", "true"]);
    assert!(status == 125 && said.contains("/boot-source"), "{status}: {said}");
    assert_eq!(host.left(), Default::default());
}

#[test]
fn guests_are_apart_from_each_other_and_from_the_host() {
    let host = Host::new("apart");
    let first = host.start();
    assert_eq!(host.asked("10.201.0.2"), "served\n");
    host.serve();
    // The second goes out, yet comes neither to the first, nor to the host under any address, nor with a false one.
    let script = "
        ip -4 -o addr show eth0 | grep -o 10.201[^/]*/30
        wget -qO- http://192.0.2.2/
        for there in 10.201.0.2 10.201.0.5 10.201.0.1 192.0.2.1; do nc -w 5 $there 7 </dev/null 2>/dev/null && echo reached $there; done
        ip addr add 10.201.0.9/32 dev eth0
        ip route replace default via 10.201.0.5 src 10.201.0.9 && timeout 8 wget -qO- http://192.0.2.2/ 2>/dev/null && echo false
        exit 3";
    assert_eq!(host.run(&["--", "sh", "-c", script]), ("10.201.0.6/30\nyou are 192.0.2.1\n".into(), 3));
    assert_eq!(host.left(), ("0".into(), "table inet vesicle0".into()));

    assert_eq!(end(first, "-TERM"), Some(128 + 15));
    assert_eq!(host.left(), Default::default());
}

#[test]
fn a_killed_launcher_leaves_nothing_that_lasts() {
    let host = Host::new("killed");
    assert_eq!(end(host.start(), "-KILL"), None);
    // The VMM ends of it, and with it the TAP. The table that is left has no interface, and the next run takes it over.
    host.wait_for_no_link();
    assert_eq!(host.left().1, "table inet vesicle0");
    let (said, status) = host.run(&["--", "wget", "-qO-", "http://192.0.2.2/"]);
    assert_eq!((said.as_str(), status), ("you are 192.0.2.1\n", 0));
    assert_eq!(host.left(), Default::default());
}

/// The shell blocks below a heading of the recipes.
fn recipe(heading: &str) -> String {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/networking.md")).unwrap();
    let section = text.split("\n## ").find(|section| section.lines().next() == Some(heading)).unwrap();
    section.split("```sh\n").skip(1).map(|block| block.split_once("```").unwrap().0).collect()
}

impl Host {
    fn shell(&self, script: &str) {
        let output = Command::new("ip").args(["netns", "exec", &self.name, "sh", "-ec", script]).output().unwrap();
        let (said, status) = told(output);
        assert_eq!(status, 0, "{script}: {said}");
    }

    /// What `script` says in a guest whose interface is that of a recipe.
    fn guest(&self, vmm: &str, interface: Value, argument: &str, script: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("output");
        let job = Job::create(dir.path().join("job"), Script::from(script)).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "sh", "-c", vmm, "sh"]);
        command.arg(vesicle());
        command.stdin(Stdio::null()).stdout(File::create(&output).unwrap());
        let mut vesicle = Vesicle::spawn(command).unwrap();
        let boot_args = format!("console=ttyS0 quiet loglevel=1 reboot=k panic=-1 vesicle.net={argument}");
        for (path, body) in [
            (
                "/boot-source",
                json!({ "kernel_image_path": artefact("kernel-tuned"), "boot_args": boot_args,
                "initrd_path": artefact("initramfs-tuned") }),
            ),
            ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64 })),
            ("/drives/job", json!({ "drive_id": "job", "path_on_host": job.path(), "is_root_device": false })),
            ("/network-interfaces/eth0", interface),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ] {
            vesicle.api().must_put(path, &body).unwrap();
        }
        let ended = vesicle.wait_timeout(Duration::from_secs(120)).unwrap();
        let said = fs::read_to_string(output).unwrap();
        assert!(ended.is_some(), "the guest does not end, and said {said}");
        said
    }
}

/// Whether it comes to the world, to the host by ping, and to a service of the host's.
const REACH: &str = "
    timeout 8 wget -qO- http://192.0.2.2/ 2>/dev/null || echo no world
    gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')
    ping -c 1 -W 3 ${gateway:-192.0.2.1} >/dev/null 2>&1 && echo ping
    for host in $gateway 192.0.2.1; do nc -w 5 $host 7 </dev/null >/dev/null 2>&1 && echo host; done
    true";

#[test]
fn the_documented_recipes_reach_what_they_say_and_no_more() {
    let tap = || json!({ "iface_id": "eth0", "host_dev_name": "tap0" });
    for (heading, argument, reached) in [
        ("NAT", "172.20.0.2/30,172.20.0.1", "you are 192.0.2.1\nping\n"),
        ("Routed", "198.51.100.10/30,198.51.100.9", "you are 198.51.100.10\nping\nhost\nhost\n"),
        ("Host only", "172.20.0.2/30,172.20.0.1", "no world\nping\nhost\nhost\n"),
        ("Isolated", "172.20.0.2/30,172.20.0.1", "no world\n"),
    ] {
        let host = Host::new(&heading.to_lowercase().replace(' ', "-"));
        ip(&format!("-n {} route add 198.51.100.8/30 via 192.0.2.1", host.outside));
        host.serve();
        host.shell(&recipe(heading).replace("user vm", "user nobody"));
        assert_eq!(host.guest("exec \"$@\"", tap(), argument, REACH), reached, "{heading}");
    }

    let host = Host::new("macvtap");
    host.serve();
    let (set_up, start) = recipe("macvtap").split_once("cat ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    host.shell(&set_up);
    let redirection = start.split_once("3<>").unwrap().1.split_once(" &").unwrap().0;
    // The API's socket has a low number already.
    let vmm = format!("exec \"$@\" --pass-fd 9 9<>{redirection}");
    let mut address = Command::new("ip");
    address.args(["netns", "exec", &host.name, "cat", "/sys/class/net/macvtap0/address"]);
    let mac = told(address.output().unwrap()).0.trim().to_owned();
    let interface = json!({ "iface_id": "eth0", "host_dev_name": "fd:9", "guest_mac": mac });
    assert_eq!(host.guest(&vmm, interface, "192.0.2.3/24,192.0.2.2", REACH), "you are 192.0.2.3\nping\n");
}
