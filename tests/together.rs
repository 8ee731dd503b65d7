//! One guest with all its devices at work at once: none of them stalls, and none stalls another.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::tap::{Tap, mac};
use common::{Guest, MicroVm, PATIENCE, artefact};
use serde_json::json;

/// What is moved, in bytes.
const WORK: [&str; 5] = ["read from the drive", "written to it", "sent by TCP", "received by TCP", "echoed over vsock"];

/// What the host's ends of the connections have moved.
#[derive(Default)]
struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
    echoed: AtomicU64,
}

fn moved(vm: &MicroVm, moved: &Moved) -> [u64; WORK.len()] {
    let drive = |what: &str| vm.metric(&format!("vesicle_block_{what}_bytes_total{{drive_id=\"data\"}}"));
    let [sent, received, echoed] = [&moved.sent, &moved.received, &moved.echoed].map(|n| n.load(Ordering::Relaxed));
    [drive("read"), drive("write"), sent, received, echoed]
}

/// The host's ends of two TCP connections, one for each direction. They end with the guest.
fn serve_tcp(tap: &Tap, moved: &Arc<Moved>) {
    let serve = |port: u16, serve: fn(TcpStream, &Moved)| {
        let (listener, moved) = (TcpListener::bind((tap.host(), port)).unwrap(), Arc::clone(moved));
        std::thread::spawn(move || serve(listener.accept().unwrap().0, &moved));
    };
    serve(6001, |mut stream, moved| {
        let mut buffer = vec![1; 64 << 10];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            assert!(buffer[..count].iter().all(|byte| *byte == 0), "the guest sends zeroes");
            moved.sent.fetch_add(count as u64, Ordering::Relaxed);
        }
    });
    serve(6002, |mut stream, moved| {
        while let Ok(count) = stream.write(&[7; 64 << 10]) {
            moved.received.fetch_add(count as u64, Ordering::Relaxed);
        }
    });
}

/// A host process that has its messages sent back by the guest, one after the other, and compares. It ends with the
/// guest.
fn talk(path: PathBuf, moved: &Arc<Moved>) {
    let moved = Arc::clone(moved);
    std::thread::spawn(move || {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(b"CONNECT 5000\n").unwrap();
        let mut byte = [0];
        while byte != [b'\n'] {
            stream.read_exact(&mut byte).unwrap();
        }
        let mut message: Vec<u8> = (0..32 << 10).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
        let mut answer = vec![0; message.len()];
        while stream.write_all(&message).and_then(|()| stream.read_exact(&mut answer)).is_ok() {
            assert!(answer == message, "the guest sent back something else");
            moved.echoed.fetch_add(2 * message.len() as u64, Ordering::Relaxed);
            message.rotate_left(1);
        }
    });
}

/// A guest whose drive, interface and vsock are all at work when this returns.
fn boot(vcpus: u8, engine: &str, image: &Path, tap: &Tap, work: &Arc<Moved>) -> MicroVm {
    let guest = Guest::tuned().vcpus(vcpus).memory(128).drive("data", image, json!({ "io_engine": engine }));
    let guest = guest.drive("tool", &artefact("vsock"), json!({ "is_read_only": true }));
    let mut vm = guest.interface("net0", &tap.name, mac(tap.net)).configure();
    let socket = vm.dir().join("v.sock");
    vm.put("/vsock", &json!({ "guest_cid": 3, "uds_path": socket }));
    vm.start();
    vm.wait_until_ready();
    tap.set_up(&mut vm, "eth0");
    serve_tcp(tap, work);
    vm.ok(&format!("nc {} 6001 </dev/zero & nc {} 6002 >/dev/null &", tap.host(), tap.host()));
    vm.ok("cat /dev/vdb >/run/vsock && chmod +x /run/vsock");
    vm.ok("/run/vsock serve 5000 echo >/run/echo & until grep -q listening /run/echo; do usleep 20000; done");
    talk(socket, work);
    let copy = |options: &str| format!("while :; do dd {options} bs=64k count=128 2>/dev/null; done &");
    vm.ok(&copy("if=/dev/zero of=/dev/vda seek=128 oflag=direct"));
    vm.ok(&copy("if=/dev/vda of=/dev/null iflag=direct"));
    // They begin at their own pace.
    wait_for_all(&vm, work, [0; WORK.len()]);
    vm
}

/// Waits until everything has been moved on since it was at `last`. On a machine that has more to do that may take longer
/// than a second; what hangs does so for ever.
fn wait_for_all(vm: &MicroVm, work: &Moved, last: [u64; WORK.len()]) -> [u64; WORK.len()] {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = moved(vm, work);
        let still: Vec<_> = (0..WORK.len()).filter(|&index| now[index] == last[index]).map(|i| WORK[i]).collect();
        if still.is_empty() {
            return now;
        }
        assert!(Instant::now() < end, "nothing {still:?} any more, at {now:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Looks after every second, until `seconds` are over, that nothing stands still. Returns what was moved in a second.
fn watch(vm: &MicroVm, work: &Moved, seconds: u64) -> [u64; WORK.len()] {
    let (start, before) = (Instant::now(), moved(vm, work));
    let mut last = before;
    while start.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_secs(1));
        last = wait_for_all(vm, work, last);
    }
    let elapsed = start.elapsed().as_secs().max(1);
    std::array::from_fn(|index| (last[index] - before[index]) / elapsed)
}

/// VESICLE_SECONDS says for how long.
#[test]
fn net_block_and_vsock_are_busy_together_and_none_of_them_stalls() {
    let seconds: u64 = std::env::var("VESICLE_SECONDS").map_or(8, |seconds| seconds.parse().unwrap());
    for (vcpus, engine) in [(1, "Sync"), (2, "Async")] {
        let dir = common::tempdir();
        let image = dir.path().join("data");
        File::create_new(&image).unwrap().set_len(16 << 20).unwrap();
        let (tap, work) = (Tap::new(), Arc::new(Moved::default()));
        let vm = boot(vcpus, engine, &image, &tap, &work);
        let rates = watch(&vm, &work, seconds).map(|bytes| bytes >> 10);
        // Not captured: how much it was is worth a line.
        let _ = writeln!(std::io::stderr(), "{vcpus} vCPUs, {engine}, {seconds} s: KiB/s {WORK:?}: {rates:?}");
        assert_eq!(vm.metric("vesicle_net_needs_reset_total{iface_id=\"net0\"}"), 0);
        vm.shut_down();
    }
}
