//! The metadata service between a guest's queues and its TAP.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Instant;

use super::*;
use crate::mmds::Mmds;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: [u8; 4] = [10, 0, 0, 2];
const GUEST_MAC: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
const SERVICE_MAC: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];
const SYN: u8 = 2;
const SYN_ACK: u8 = 18;

/// A cable whose guest may have metadata, and what sees every frame that reaches the host.
fn cable() -> Option<(Cable, Host)> {
    let host = Host::new()?;
    let metrics = Arc::new(metrics::Net::default());
    let mut net = Net::new(&config(), host.tap.try_clone().unwrap(), Arc::clone(&metrics)).unwrap();
    net.serve(Endpoint::new(ADDRESS, Arc::new(Mutex::new(Mmds::new(1000))))).unwrap();
    let guest = Guest::new(Device::Net(Box::new(net)));
    guest.boot(guest.offered());
    // SAFETY: the descriptor is new and ours; the address is of the kind and size it says it is.
    let socket = unsafe {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol.into());
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: libc::if_nametoindex(c"tap0".as_ptr()) as i32,
            ..std::mem::zeroed()
        };
        assert_eq!(libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32), 0);
        OwnedFd::from_raw_fd(fd)
    };
    let everything = Host { socket, tap: host.tap.try_clone().unwrap() };
    Some((Cable { host, guest, metrics, sent: Cell::new(0) }, everything))
}

fn ethernet(to: [u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&to[..], &GUEST_MAC, &ethertype, payload].concat()
}

fn arp() -> Vec<u8> {
    let request = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &GUEST_MAC, &GUEST, &[0; 6], &ADDRESS.octets()].concat();
    ethernet([0xff; 6], [8, 6], &request)
}

fn ip(to: [u8; 6], flags: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len()) as u16;
    let head = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 0, flags, 0, 64, protocol, 0, 0]].concat();
    ethernet(to, [8, 0], &[&head[..], &GUEST, &ADDRESS.octets(), payload].concat())
}

/// A segment that opens a connection, its checksum left to the device.
fn syn() -> Vec<u8> {
    ip(SERVICE_MAC, 0, 6, &[0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0x12, 0x34, 0, 0])
}

impl Cable {
    /// The frames that the guest got since the last call, given `next` buffers were used before.
    fn answers(&self, next: &mut usize) -> Vec<Vec<u8>> {
        self.settle();
        let used = self.guest.select(RX).used();
        let new: Vec<_> = (*next..*next + used.len()).zip(&used).collect();
        *next += used.len();
        new.iter()
            .map(|(index, (_, length))| {
                let bytes = self.guest.get(slot(*index), *length as usize);
                assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "a header that asks for nothing");
                bytes[12..].to_vec()
            })
            .collect()
    }
}

#[test]
fn the_service_answers_and_the_host_never_hears_of_it() {
    let Some((cable, everything)) = cable() else { return };
    let mut next = 0;
    cable.post(64, 2048);
    cable.transmit(&arp());
    cable.guest.kick();
    let answers = cable.answers(&mut next);
    assert_eq!(answers.len(), 1);
    assert_eq!((&answers[0][..6], &answers[0][6..12]), (&GUEST_MAC[..], &SERVICE_MAC[..]));
    cable.transmit(&syn());
    cable.guest.kick();
    let answers = cable.answers(&mut next);
    assert_eq!((answers.len(), answers[0][47]), (1, SYN_ACK));
    // In every other form.
    for frame in [
        ip(SERVICE_MAC, 0x20, 6, &[0; 100]),
        ip([0xff; 6], 0, 17, &[0; 20]),
        ip([2; 6], 0, 1, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]),
        ip([2; 6], 0, 6, &[0; 3]),
        ethernet(SERVICE_MAC, [0x86, 0xdd], &[0x60; 60]),
        ethernet(SERVICE_MAC, TYPE.to_be_bytes(), &[1; 60]),
        ethernet([2; 6], [0x81, 0], &[&[0, 7][..], &ip([0; 6], 0, 6, &[0; 20])[12..]].concat()),
        ethernet(SERVICE_MAC, [0x88, 0xcc], &[]),
    ] {
        cable.transmit(&frame);
    }
    // The one that is not.
    cable.transmit(&frame(60, 1));
    cable.guest.kick();
    cable.settle();
    assert!(everything.received() == [frame(60, 1)]);
    assert!(!cable.needs_reset());
    assert_eq!(cable.metrics.tx_fails.get(), 0);
}

#[test]
fn what_is_not_for_the_service_passes_unchanged() {
    let Some((cable, _)) = cable() else { return };
    let lengths = [15, 60, 64, 75, 76, 77, 78, 700, 1514];
    for length in lengths {
        cable.transmit(&frame(length, 3));
    }
    let whole = frame(1000, 4);
    cable.guest.put(slot(1), &[0; HEADER_SIZE]);
    cable.guest.put(slot(1) + 12, &whole);
    let pieces = [readable(slot(1), 5), readable(slot(1) + 5, 20), readable(slot(1) + 25, 987)];
    cable.guest.select(TX);
    cable.guest.offer(cable.guest.chain(&pieces));
    cable.guest.kick();
    let expected: Vec<_> = lengths.iter().map(|length| frame(*length, 3)).chain([whole]).collect();
    assert!(cable.host.received() == expected);
}

#[test]
fn a_frame_for_the_service_may_come_in_pieces() {
    let Some((cable, everything)) = cable() else { return };
    cable.post(4, 2048);
    let frame = arp();
    cable.guest.put(slot(1), &[0; HEADER_SIZE]);
    cable.guest.put(slot(1) + 12, &frame);
    let pieces = [readable(slot(1), 14), readable(slot(1) + 14, 1), readable(slot(1) + 15, frame.len() as u32 - 3)];
    cable.guest.select(TX);
    cable.guest.offer(cable.guest.chain(&pieces));
    cable.guest.kick();
    assert_eq!(cable.answers(&mut 0).len(), 1);
    assert!(everything.received().is_empty());
}

#[test]
fn answers_wait_for_buffers_and_come_before_the_taps() {
    let Some((cable, _)) = cable() else { return };
    cable.transmit(&arp());
    cable.host.send(&frame(100, 1));
    cable.guest.kick();
    cable.settle();
    assert_eq!(cable.guest.select(RX).used(), []);
    cable.post(4, 2048);
    let answers = cable.answers(&mut 0);
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0][12..14], [8, 6]);
    assert!(answers[1] == frame(100, 1));
}

#[test]
fn an_answer_goes_over_buffers_that_are_small() {
    let Some((cable, _)) = cable() else { return };
    cable.post(8, 30);
    cable.transmit(&arp());
    cable.guest.kick();
    cable.settle();
    let used = cable.guest.select(RX).used();
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [30, 24]);
    assert_eq!(cable.guest.get(slot(0), 12)[10..], [2, 0], "num_buffers");
}

#[test]
fn what_the_guest_does_not_acknowledge_is_sent_again_and_a_reset_forgets_it() {
    let Some((cable, _)) = cable() else { return };
    let mut next = 0;
    cable.post(16, 2048);
    for frame in [arp(), syn()] {
        cable.transmit(&frame);
    }
    cable.guest.kick();
    assert_eq!(cable.answers(&mut next).len(), 2);
    let start = Instant::now();
    let again = loop {
        assert!(start.elapsed() < Duration::from_secs(60), "never sent again");
        let answers = cable.answers(&mut next);
        if !answers.is_empty() {
            break answers;
        }
    };
    assert_eq!(again[0][47], SYN_ACK);
    cable.guest.set_status(0);
    cable.guest.mmio.update(|device| match device {
        Device::Net(net) => assert!(net.service.as_ref().is_some_and(|service| !service.may_speak())),
        _ => unreachable!(),
    });
}

/// What was not acknowledged is due again, and there is nowhere to put it: asking every millisecond gains nothing.
#[test]
fn a_guest_without_buffers_is_not_woken_for() {
    let Some((cable, _)) = cable() else { return };
    let mut next = 0;
    cable.post(3, 2048);
    for frame in [arp(), syn()] {
        cable.transmit(&frame);
    }
    cable.guest.kick();
    assert_eq!(cable.answers(&mut next).len(), 2);
    // It takes the last buffer.
    cable.host.send(&frame(100, 1));
    cable.settle();
    assert_eq!(cable.guest.select(RX).used().len(), 1);
    assert_eq!(cable.guest.turn(Duration::from_secs(60)), 1, "the timer");
    assert_eq!(cable.guest.turn(Duration::from_millis(100)), 0);
    cable.post(1, 2048);
    cable.settle();
    let used = cable.guest.select(RX).used();
    assert_eq!(used.len(), 1);
    assert_eq!(cable.guest.get(slot(0), used[0].1 as usize)[12 + 47], SYN_ACK);
}
