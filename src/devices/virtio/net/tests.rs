//! Stories of guests, good and bad, and the hosts at the other end of their TAPs.
//!
//! Each has a network namespace of its own, which takes root; who is not root sees that they are
//! skipped.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::config::{HostDevice, MacAddress, RateLimiterConfig};
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{BUFFERS, Guest, VERSION_1, readable, writable};

const RX: usize = 0;
const TX: usize = 1;
/// An Ethernet type for experiments: the host's stack leaves such frames alone.
const TYPE: u16 = 0x88b5;

mod limits;
mod offloads;
pub(crate) mod random;
mod service;

/// The host's side: the interface of a TAP, and a socket that sends and receives whole frames there.
struct Host {
    socket: OwnedFd,
    tap: Tap,
}

impl Host {
    /// `None`, visibly, where there can be no namespace.
    fn new() -> Option<Self> {
        // SAFETY: this thread gets a network namespace of its own.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("SKIPPED: a network namespace: {}", io::Error::last_os_error());
            return None;
        }
        // The host says nothing of its own accord.
        let quiet = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        assert!(quiet.is_ok() || !fs::exists("/proc/sys/net/ipv6").unwrap(), "{quiet:?}");
        let tap = match Tap::open("tap0") {
            Ok(tap) => tap,
            Err(error) => {
                eprintln!("SKIPPED: a TAP: {error}");
                return None;
            }
        };
        // SAFETY: the descriptor is new and ours.
        let socket = unsafe {
            let protocol = i32::from(TYPE.to_be());
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        let host = Self { socket, tap };
        host.configure(9000, true);
        // SAFETY: the address is of the kind and size it says it is.
        unsafe {
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: TYPE.to_be(),
                sll_ifindex: libc::if_nametoindex(c"tap0".as_ptr()) as i32,
                ..std::mem::zeroed()
            };
            let size = size_of_val(&address) as u32;
            assert_eq!(libc::bind(host.socket.as_raw_fd(), (&raw const address).cast(), size), 0);
        }
        Some(host)
    }

    /// Sets the interface's MTU, and up or down.
    fn configure(&self, mtu: i32, up: bool) {
        // SAFETY: each request gets an ifreq with the name and the member that it takes.
        unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            request.ifr_name[..4].copy_from_slice(&b"tap0".map(u8::cast_signed));
            request.ifr_ifru.ifru_mtu = mtu;
            assert_eq!(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFMTU as _, &request), 0);
            request.ifr_ifru.ifru_flags = if up { libc::IFF_UP as i16 } else { 0 };
            assert_eq!(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request), 0);
        }
    }

    fn send(&self, frame: &[u8]) {
        assert!(self.try_send(frame), "{}", io::Error::last_os_error());
    }

    /// Whether there was room for it.
    fn try_send(&self, frame: &[u8]) -> bool {
        // SAFETY: the frame is valid for reading.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        sent == frame.len() as isize
    }

    /// What has arrived.
    fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0u8; 1 << 17];
        loop {
            // SAFETY: the buffer is valid for writing.
            let length = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let Ok(length) = usize::try_from(length) else {
                // That the interface was down meanwhile is said once.
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::ENETDOWN) => continue,
                    _ => return frames,
                }
            };
            frames.push(buffer[..length].to_vec());
        }
    }
}

/// A broadcast frame of `length` bytes whose payload depends on `seed`.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(TYPE.to_be_bytes());
    frame.extend((14..length).map(|i| (i * 7 + i / 251) as u8 ^ seed));
    frame
}

pub(crate) fn config() -> NetConfig {
    NetConfig {
        iface_id: "eth0".into(),
        host_device: HostDevice::Named("tap0".into()),
        guest_mac: Some(MacAddress([6, 0, 0xac, 0x10, 0, 2])),
        mtu: Some(1400),
        rx_rate_limiter: RateLimiterConfig::default(),
        tx_rate_limiter: RateLimiterConfig::default(),
    }
}

/// Both ends.
pub(crate) struct Cable {
    host: Host,
    pub(crate) guest: Guest,
    metrics: Arc<metrics::Net>,
    sent: Cell<usize>,
}

impl Cable {
    pub(crate) fn new(features: impl Fn(u64) -> u64) -> Option<Self> {
        Self::with(&config(), features)
    }

    fn with(config: &NetConfig, features: impl Fn(u64) -> u64) -> Option<Self> {
        let host = Host::new()?;
        let metrics = Arc::new(metrics::Net::default());
        let net = Net::new(config, host.tap.try_clone().unwrap(), Arc::clone(&metrics)).unwrap();
        let guest = Guest::new(Device::Net(Box::new(net)));
        guest.boot(features(guest.offered()));
        assert_eq!(guest.status(), 0xf);
        Some(Self { host, guest, metrics, sent: Cell::new(0) })
    }

    /// Offers `count` receive buffers of `size` bytes each, from `BUFFERS` on, and notifies.
    fn post(&self, count: usize, size: u32) {
        self.guest.select(RX);
        for index in 0..count {
            self.guest.offer(self.guest.chain(&[writable(slot(index), size)]));
        }
        self.guest.kick();
    }

    /// Offers `frame` behind a header of zeroes.
    fn transmit(&self, frame: &[u8]) {
        let at = slot(300 + self.sent.replace(self.sent.get() + 1));
        self.guest.put(at, &[0; HEADER_SIZE]);
        self.guest.put(at + HEADER_SIZE as u64, frame);
        self.guest.select(TX);
        self.guest.offer(self.guest.chain(&[readable(at, (HEADER_SIZE + frame.len()) as u32)]));
    }

    /// Lets the device work until nothing happens any more.
    fn settle(&self) {
        while self.guest.turn(Duration::from_millis(20)) > 0 {}
    }

    fn needs_reset(&self) -> bool {
        self.guest.status() & 64 != 0
    }

    fn update(&self, update: &NetUpdate) {
        self.guest.mmio.adjust(|device| match device {
            Device::Net(net) => net.update_rate_limiters(update),
            _ => unreachable!(),
        });
    }
}

/// Where the buffers of the tests are: room for 8 KiB each.
fn slot(index: usize) -> u64 {
    BUFFERS + 0x2000 * index as u64
}

fn all(offered: u64) -> u64 {
    offered
}

fn without(bit: u32) -> impl Fn(u64) -> u64 {
    move |offered| offered & !(1 << bit)
}

#[test]
fn frames_cross_in_both_directions_with_one_interrupt_a_batch() {
    let Some(cable) = Cable::new(all) else { return };
    cable.post(16, 2048);
    for seed in 0..5 {
        cable.transmit(&frame(60 + 100 * usize::from(seed), seed));
    }
    cable.guest.notify();
    cable.settle();
    let expected: Vec<_> = (0..5).map(|seed| frame(60 + 100 * usize::from(seed), seed)).collect();
    assert!(cable.host.received() == expected);
    assert_eq!(cable.guest.select(TX).used().len(), 5);
    assert_eq!(cable.guest.interrupts.swap(0, std::sync::atomic::Ordering::SeqCst), 1);

    for seed in 0..5 {
        cable.host.send(&frame(1000 + usize::from(seed), seed));
    }
    cable.settle();
    let used = cable.guest.select(RX).used();
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [1012, 1013, 1014, 1015, 1016]);
    for (index, seed) in (0..5).enumerate() {
        let bytes = cable.guest.get(slot(index), 1012 + index);
        assert_eq!(bytes[10..12], [1, 0], "num_buffers");
        assert!(bytes[12..] == frame(1000 + index, seed));
    }
    assert_eq!(cable.guest.interrupts.load(std::sync::atomic::Ordering::SeqCst), 1);
    let metrics = &cable.metrics;
    assert_eq!((metrics.tx_packets_count.get(), metrics.tx_bytes_count.get()), (5, 60 + 160 + 260 + 360 + 460));
    assert_eq!((metrics.rx_packets_count.get(), metrics.rx_bytes_count.get()), (5, 5010));
    assert!(metrics.rx_tap_event_count.get() > 0 && metrics.queue_event_count.get() > 0);
    assert_eq!(metrics.tx_fails.get() + metrics.rx_fails.get() + metrics.tap_read_fails.get(), 0);
}

#[test]
fn the_guest_reads_its_address_and_mtu_and_nothing_is_offered_that_was_not_configured() {
    let Some(cable) = Cable::new(all) else { return };
    let mut space = [0; 14];
    cable.guest.mmio.read(0x100, &mut space);
    assert_eq!(space, [6, 0, 0xac, 0x10, 0, 2, 0, 0, 0, 0, 0x78, 5, 0, 0]);
    let offered = cable.guest.offered();
    for bit in FEATURES.iter().chain(&[VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU]) {
        assert!(offered & 1 << bit != 0, "{bit}");
    }
    let plain = NetConfig { guest_mac: None, mtu: None, ..config() };
    let net = Net::new(&plain, cable.host.tap.try_clone().unwrap(), Arc::default()).unwrap();
    assert_eq!(net.features() & (1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU), 0);
    let mut old_host = cable.host.tap.try_clone().unwrap();
    old_host.without_uso();
    let net = Net::new(&plain, old_host, Arc::default()).unwrap();
    assert_eq!(net.features() >> 50, 0);
}

#[test]
fn a_frame_goes_over_several_buffers_only_if_the_guest_merges_them() {
    let Some(cable) = Cable::new(all) else { return };
    cable.post(8, 1500);
    cable.host.send(&frame(4000, 1));
    cable.settle();
    let used = cable.guest.select(RX).used();
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [1500, 1500, 1012]);
    let bytes: Vec<u8> = (0..3).flat_map(|i| cable.guest.get(slot(i), used[i].1 as usize)).collect();
    assert_eq!(bytes[10..12], [3, 0], "num_buffers");
    assert!(bytes[12..] == frame(4000, 1));

    let Some(cable) = Cable::new(without(VIRTIO_NET_F_MRG_RXBUF)) else { return };
    cable.post(8, 1500);
    cable.host.send(&frame(4000, 1));
    cable.host.send(&frame(1488, 2));
    cable.settle();
    assert_eq!(cable.metrics.rx_fails.get(), 1, "dropped and counted, not tried again");
    assert_eq!(cable.guest.select(RX).used(), [(0, 1500)]);
    let bytes = cable.guest.get(slot(0), 1500);
    assert_eq!(bytes[10..12], [1, 0], "num_buffers is 1");
    assert!(bytes[12..] == frame(1488, 2));
}

#[test]
fn a_buffer_in_pieces_takes_a_frame_and_gives_one() {
    let Some(cable) = Cable::new(all) else { return };
    let pieces =
        [writable(slot(0), 5), writable(slot(0) + 5, 6), writable(slot(0) + 11, 50), writable(slot(0) + 61, 3000)];
    cable.guest.select(RX);
    cable.guest.offer(cable.guest.chain(&pieces));
    cable.guest.kick();
    cable.host.send(&frame(700, 9));
    cable.settle();
    assert_eq!(cable.guest.used(), [(0, 712)]);
    let bytes = cable.guest.get(slot(0), 712);
    assert_eq!(bytes[10..12], [1, 0], "num_buffers");
    assert!(bytes[12..] == frame(700, 9));

    cable.guest.put(slot(1), &[0; HEADER_SIZE]);
    cable.guest.put(slot(1) + 12, &frame(700, 8));
    let pieces = [readable(slot(1), 3), readable(slot(1) + 3, 20), readable(slot(1) + 23, 689)];
    cable.guest.select(TX);
    cable.guest.offer(cable.guest.chain(&pieces));
    cable.guest.kick();
    assert!(cable.host.received() == [frame(700, 8)]);
}

#[test]
fn a_frame_waits_for_buffers_and_what_spilled_is_not_lost() {
    let Some(cable) = Cable::new(all) else { return };
    cable.post(2, 1000);
    for seed in 0..4 {
        cable.host.send(&frame(3500, seed));
    }
    cable.settle();
    assert_eq!(cable.guest.select(RX).used(), [], "no frame is cut");
    assert!(cable.metrics.no_rx_avail_buffer.get() > 0);
    // The rest of the first, and two more.
    for index in 2..12 {
        cable.guest.offer(cable.guest.chain(&[writable(slot(index), 1000)]));
    }
    cable.guest.kick();
    let used = cable.guest.used();
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [1000, 1000, 1000, 512].repeat(3));
    for seed in 0..3 {
        let at = 4 * usize::from(seed);
        let bytes: Vec<u8> = (at..at + 4).flat_map(|i| cable.guest.get(slot(i), used[i].1 as usize)).collect();
        assert_eq!(bytes[10..12], [4, 0], "num_buffers");
        assert!(bytes[12..] == frame(3500, seed));
    }
}

/// CVE-2020-16843: the queue of the TAP and the guest's ring both full, and nobody speaks again.
#[test]
fn receiving_goes_on_after_tap_and_ring_were_both_full() {
    for event_idx in [true, false] {
        let Some(cable) = Cable::new(without(if event_idx { 63 } else { 29 })) else { return };
        cable.post(256, 1600);
        let flood = || {
            for seed in 0..1500u32 {
                // What the TAP has no room for is dropped by the host.
                cable.host.send(&frame(200, seed as u8));
            }
        };
        flood();
        cable.settle();
        assert_eq!(cable.guest.select(RX).used().len(), 256);
        flood();
        cable.settle();
        assert_eq!(cable.guest.used().len(), 0);
        // The guest gives buffers back, and hears of more though the host sends no more.
        let mut received = 0;
        for _ in 0..3 {
            cable.post(128, 1600);
            cable.settle();
            received += cable.guest.select(RX).used().len();
        }
        assert_eq!(received, 384);
        assert!(!cable.needs_reset());
    }
}

#[test]
fn a_frame_that_no_ring_can_hold_is_dropped_and_counted() {
    let Some(host) = Host::new() else { return };
    let metrics = Arc::new(metrics::Net::default());
    let net = Net::new(&config(), host.tap.try_clone().unwrap(), Arc::clone(&metrics)).unwrap();
    let mut guest = Guest::new(Device::Net(Box::new(net)));
    guest.queue_size = 4;
    guest.boot(guest.offered());
    let cable = Cable { host, guest, metrics, sent: Cell::new(0) };
    cable.post(4, 100);
    cable.host.send(&frame(500, 1));
    cable.host.send(&frame(300, 2));
    cable.settle();
    assert_eq!(cable.metrics.rx_fails.get(), 1);
    let used = cable.guest.select(RX).used();
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [100, 100, 100, 12]);
    assert_eq!(cable.guest.get(slot(0), 12)[10..], [4, 0]);
}

#[test]
fn transmit_chains_without_room_for_a_header_break_the_device_and_a_reset_mends_it() {
    for length in [0, 1, 11] {
        let Some(cable) = Cable::new(all) else { return };
        cable.guest.select(TX);
        cable.guest.offer(cable.guest.chain(&[readable(slot(0), length)]));
        cable.guest.kick();
        assert!(cable.needs_reset(), "{length}");
        assert_eq!(cable.metrics.needs_reset.get(), 1);
        cable.guest.boot(cable.guest.offered());
        cable.transmit(&frame(60, 3));
        cable.guest.kick();
        assert!(cable.host.received() == [frame(60, 3)]);
    }
}

#[test]
fn receive_buffers_that_cannot_hold_a_header_break_the_device() {
    for buffer in [writable(slot(0), 11), readable(slot(0), 1600)] {
        let Some(cable) = Cable::new(all) else { return };
        cable.guest.select(RX);
        cable.guest.offer(cable.guest.chain(&[buffer]));
        cable.guest.kick();
        assert!(cable.needs_reset(), "{buffer:?}");
    }
}

/// What the guest claims to send must not be allocated.
#[test]
fn frames_of_impossible_length_are_dropped_without_being_read() {
    let Some(cable) = Cable::new(all) else { return };
    cable.guest.select(TX);
    for length in [12, MAX_FRAME as u32 + 1, 7 << 20] {
        cable.guest.offer(cable.guest.chain(&[readable(slot(0), length)]));
    }
    // The same RAM again and again, to just below 4 GiB.
    let pieces: Vec<_> = (0..200).map(|_| readable(slot(0), 7 << 20)).collect();
    cable.guest.offer(cable.guest.chain(&pieces));
    cable.guest.kick();
    assert_eq!(cable.guest.used().len(), 4);
    assert_eq!(cable.metrics.tx_malformed_frames.get(), 4);
    assert_eq!(cable.metrics.tx_fails.get(), 4);
    cable.transmit(&frame(60, 3));
    cable.guest.kick();
    assert!(cable.host.received() == [frame(60, 3)]);
}

#[test]
fn what_the_host_refuses_is_lost_as_on_a_wire_and_counted() {
    let Some(cable) = Cable::new(all) else { return };
    // Too short for Ethernet; a header that makes no sense.
    cable.transmit(&[0; 5]);
    cable.guest.kick();
    cable.transmit(&frame(60, 1));
    cable.guest.put(slot(301), &[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    cable.guest.kick();
    cable.host.configure(9000, false);
    cable.transmit(&frame(60, 2));
    cable.guest.kick();
    assert_eq!(cable.guest.select(TX).used().len(), 3);
    assert_eq!((cable.metrics.tap_write_fails.get(), cable.metrics.tx_fails.get()), (3, 3));
    cable.host.configure(9000, true);
    cable.transmit(&frame(60, 3));
    cable.guest.kick();
    assert!(cable.host.received() == [frame(60, 3)]);
    assert!(!cable.needs_reset());
}

#[test]
fn a_tap_that_refuses_what_was_acknowledged_leaves_a_device_that_needs_a_reset() {
    // Not even a TAP, but something that can be waited for.
    // SAFETY: the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
    let net = Net::new(&config(), Tap::of_file(fd.into()), Arc::default());
    let guest = Guest::new(Device::Net(Box::new(net.unwrap())));
    guest.boot(guest.offered());
    guest.kick();
    assert_eq!(guest.status() & 64, 64);
}

#[test]
fn one_wake_moves_a_bounded_amount_and_comes_back_for_the_rest() {
    let Some(cable) = Cable::new(all) else { return };
    for seed in 0..200 {
        cable.transmit(&frame(60, seed));
    }
    cable.guest.notify();
    assert_eq!(cable.guest.turn(Duration::ZERO), 1);
    assert_eq!(cable.guest.select(TX).used().len(), MAX_FRAMES_PER_WAKE);
    cable.settle();
    assert_eq!(cable.guest.used().len(), 200 - MAX_FRAMES_PER_WAKE);
}

#[test]
fn a_reset_forgets_buffers_and_the_next_driver_receives_into_its_own() {
    let Some(cable) = Cable::new(all) else { return };
    cable.post(8, 1000);
    cable.host.send(&frame(20, 1));
    cable.settle();
    assert_eq!(cable.guest.select(RX).used().len(), 1);
    cable.guest.set_status(0);
    cable.host.send(&frame(60, 2));
    cable.settle();
    cable.guest.put(slot(0), &[0xee; 8192]);
    cable.guest.boot(cable.guest.offered());
    cable.guest.select(RX);
    cable.guest.offer(cable.guest.chain(&[writable(slot(50), 1000)]));
    cable.guest.kick();
    assert_eq!(cable.guest.used(), [(0, 72)]);
    assert!(cable.guest.get(slot(50) + 12, 60) == frame(60, 2));
    assert!(cable.guest.get(slot(0), 8192) == [0xee; 8192]);
}

#[test]
fn what_arrives_during_a_pause_is_there_afterwards() {
    let Some(cable) = Cable::new(all) else { return };
    cable.post(8, 1000);
    cable.guest.mmio.quiesce();
    cable.host.send(&frame(60, 1));
    cable.transmit(&frame(60, 2));
    cable.guest.notify();
    cable.settle();
    assert_eq!(cable.guest.select(RX).used(), []);
    cable.guest.mmio.resume();
    cable.settle();
    assert_eq!(cable.guest.used(), [(0, 72)]);
    assert!(cable.host.received() == [frame(60, 2)]);
}

#[test]
fn only_a_tap_with_the_right_framing_is_taken_over() {
    let Some(host) = Host::new() else { return };
    assert!(Tap::adopt(host.tap.as_fd()).is_ok());
    assert!(matches!(Tap::adopt(host.socket.as_fd()), Err(TapError::NotATap(_))));
    assert!(matches!(Tap::adopt(tempfile::tempfile().unwrap().as_fd()), Err(TapError::NotATap(_))));
    for flags in [libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, libc::IFF_TAP | libc::IFF_NO_PI, libc::IFF_TAP]
    {
        let other = tap::open_with(c"other0", flags).unwrap();
        assert!(matches!(Tap::adopt(other.as_fd()), Err(TapError::Framing)), "{flags:#x}");
    }
    assert!(matches!(Tap::open("tap0"), Err(TapError::System { .. })), "it is in use");
    assert!(matches!(Tap::open("sixteen_letters_"), Err(TapError::Name(_))));
}
