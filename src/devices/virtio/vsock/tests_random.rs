//! Whatever a guest and host processes do, in whatever order.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::testing::*;
use crate::devices::virtio::testing::readable;
use crate::generated::{inputs, prop_oneof, properties};

#[derive(Debug, Clone)]
enum Step {
    /// A packet with this operation, type and payload, to one of a few connections.
    Packet {
        connection: usize,
        op: u16,
        kind: u16,
        flags: u32,
        data: usize,
        buf_alloc: u32,
        fwd_cnt: u32,
    },
    /// A header of any bytes.
    Garbage(Vec<u8>),
    Dial(bool),
    HostWrites(usize, usize),
    HostReads(usize),
    HostFinishes(usize, bool),
    HostLeaves(usize),
    Post(u16),
    DeviceReset,
}

fn step() -> impl Strategy<Value = Step> {
    let op = prop_oneof![8 => 1..8u16, 1 => any::<u16>()];
    let kind = prop_oneof![20 => Just(1u16), 1 => any::<u16>()];
    let number = || prop_oneof![Just(1u32 << 16), 0..3000u32, any::<u32>()];
    let packet = (0..6usize, op, kind, 0..4u32, 0..3000usize, number(), number());
    prop_oneof![
        12 => packet.prop_map(|(connection, op, kind, flags, data, buf_alloc, fwd_cnt)| Step::Packet {
            connection, op, kind, flags, data: if op == DATA { data } else { 0 }, buf_alloc, fwd_cnt
        }),
        1 => prop::collection::vec(any::<u8>(), 44).prop_map(Step::Garbage),
        4 => any::<bool>().prop_map(Step::Dial),
        4 => (0..6usize, 1..9000usize).prop_map(|(peer, length)| Step::HostWrites(peer, length)),
        4 => (0..6usize).prop_map(Step::HostReads),
        1 => (0..6usize, any::<bool>()).prop_map(|(peer, write)| Step::HostFinishes(peer, write)),
        2 => (0..6usize).prop_map(Step::HostLeaves),
        4 => (1..16u16).prop_map(Step::Post),
        1 => Just(Step::DeviceReset),
    ]
}

struct World {
    rig: Rig,
    listener: std::os::unix::net::UnixListener,
    peers: Vec<UnixStream>,
    posted: u16,
}

impl World {
    fn new() -> Self {
        let rig = Rig::new();
        let listener = rig.listen(70);
        listener.set_nonblocking(true).unwrap();
        Self { rig, listener, peers: Vec::new(), posted: 0 }
    }

    fn peer(&mut self, index: usize) -> Option<&mut UnixStream> {
        let count = self.peers.len();
        self.peers.get_mut(index % count.max(1))
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        if self.peers.len() == 6 {
            self.peers.remove(0);
        }
        self.peers.push(stream);
    }

    fn take(&mut self, step: &Step) {
        match step {
            &Step::Packet { connection, op, kind, flags, data, buf_alloc, fwd_cnt } => {
                // Half of them the guest's, half of them the host's first ones.
                let (host_port, guest_port) = if connection < 3 {
                    (70, 1000 + connection as u32)
                } else {
                    ((1 << 30) + connection as u32 - 3, 52)
                };
                let fields = Fields { kind, flags, buf_alloc, fwd_cnt, ..Fields::new(host_port, guest_port, op) };
                let fields = Fields { length: data as u32, ..fields };
                self.rig.send_fields(&fields, &vec![5; data]);
            }
            Step::Garbage(bytes) => {
                self.rig.guest.put(PACKET, bytes);
                self.rig.offer(&[readable(PACKET, 44)]);
                self.rig.guest.kick();
            }
            &Step::Dial(whole) => {
                let stream = self.rig.dial(if whole { "CONNECT 52\n" } else { "CONN" });
                self.keep(stream);
            }
            &Step::HostWrites(peer, length) => _ = self.peer(peer).map(|peer| peer.write(&vec![6; length])),
            &Step::HostReads(peer) => _ = self.peer(peer).map(|peer| peer.read(&mut [0; 20_000])),
            &Step::HostFinishes(peer, write) => {
                let how = if write { Shutdown::Write } else { Shutdown::Read };
                let _ = self.peer(peer).map(|peer| peer.shutdown(how));
            }
            &Step::HostLeaves(peer) => {
                if !self.peers.is_empty() {
                    self.peers.remove(peer % self.peers.len());
                }
            }
            &Step::Post(count) => {
                let count = count.min(16 - self.posted);
                self.rig.post(count);
                self.posted += count;
            }
            Step::DeviceReset => self.reset(),
        }
        self.rig.run();
        while let Ok((stream, _)) = self.listener.accept() {
            self.keep(stream);
        }
        if self.rig.needs_reset() {
            self.reset();
        }
        self.posted = self.posted.min(16);
        if self.posted == 16 {
            // Every packet is well-formed, and its buffer is posted again.
            self.rig.seen();
        }
    }

    fn reset(&mut self) {
        self.rig.guest.reset();
        self.rig.boot();
        self.posted = 0;
    }
}

properties! {
    #![proptest_config(inputs(60))]

    #[test]
    fn no_random_sequence_of_packets_and_peers_breaks_the_vsock(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
        }
        // It comes to rest, and still works.
        prop_assert!((0..100).any(|_| world.rig.guest.turn(Duration::from_millis(5)) == 0), "it spins");
        world.reset();
        world.rig.post(16);
        let (mut stream, port) = world.rig.open_from_host();
        world.rig.send_data(port, 52, b"fine\n");
        prop_assert_eq!(read_line(&mut stream), "fine");
    }
}
