//! The endpoint as a guest on its link sees it, with segments made by hand: every byte counts.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::{Value, json};

use super::endpoint::MAX_FRAME;
use super::frames::MAC;
use super::stack::{IDLE, MAX_CONNECTIONS};
use super::*;

pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub(super) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn shared(value: Value) -> Shared {
    let mut mmds = Mmds::new(2 << 20);
    mmds.store.put(value).unwrap();
    Arc::new(Mutex::new(mmds))
}

pub(super) fn endpoint(value: Value) -> Endpoint {
    Endpoint::new(ADDRESS, shared(value))
}

/// A segment that the service sent.
#[derive(Debug, Clone)]
struct Segment {
    port: u16,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    options: Vec<u8>,
    payload: Vec<u8>,
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Takes a frame of the service's apart; its checksums must be right.
fn segment(frame: &[u8]) -> Segment {
    assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&GUEST_MAC[..], &MAC[..], &[8, 0][..]));
    let ip = &frame[14..];
    let header = usize::from(ip[0] & 0xf) * 4;
    assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
    assert_eq!(folded(words(&ip[..header])), 0xffff, "checksum of IP");
    let tcp = &ip[header..];
    assert_eq!(folded(words(&ip[12..20]) + 6 + tcp.len() as u32 + words(tcp)), 0xffff, "checksum of TCP");
    let data = usize::from(tcp[12] >> 4) * 4;
    let long = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
    Segment {
        port: u16::from_be_bytes([tcp[2], tcp[3]]),
        sequence: long(4),
        acknowledgement: long(8),
        flags: tcp[13],
        options: tcp[20..data].to_vec(),
        payload: tcp[data..].to_vec(),
    }
}

/// A guest that makes its segments by hand.
struct Hand {
    endpoint: Endpoint,
    /// The hardware address that it sends to.
    to: [u8; 6],
    now: Duration,
    port: u16,
    window: u16,
    sequence: u32,
    acknowledgement: u32,
}

impl Hand {
    /// A guest that the service knows by its ARP request, whose first sequence number is `sequence`.
    fn new(endpoint: Endpoint, sequence: u32) -> Self {
        let now = Duration::from_secs(1);
        let mut guest = Self { endpoint, to: MAC, now, port: 40_000, window: 0xffff, sequence, acknowledgement: 0 };
        let arp = [&[0xff; 6][..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &GUEST_MAC, &GUEST.octets(), &[0; 6]];
        let mut arp = [&arp.concat()[..], &ADDRESS.octets()].concat();
        assert!(guest.endpoint.claims(&arp));
        guest.endpoint.receive(&mut arp, now);
        let reply = guest.frame().unwrap();
        assert_eq!((&reply[..6], &reply[6..12], &reply[20..22]), (&GUEST_MAC[..], &MAC[..], &[0, 2][..]));
        assert_eq!((&reply[22..28], &reply[28..32]), (&MAC[..], &ADDRESS.octets()[..]));
        guest
    }

    fn frame(&mut self) -> Option<Vec<u8>> {
        let mut buffer = [0; MAX_FRAME];
        let length = self.endpoint.transmit(&mut buffer, self.now)?;
        Some(buffer[..length].to_vec())
    }

    /// Sends a segment as it is, its checksums left out, as an offloading driver does.
    fn raw(&mut self, flags: u8, options: &[u8], payload: &[u8]) {
        let tcp = 20 + options.len();
        let total = (20 + tcp + payload.len()) as u16;
        let mut bytes = [&self.to[..], &GUEST_MAC, &[8, 0, 0x45, 0], &total.to_be_bytes()].concat();
        bytes.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        bytes.extend(GUEST.octets().iter().chain(&ADDRESS.octets()));
        bytes.extend(self.port.to_be_bytes());
        bytes.extend(80u16.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledgement.to_be_bytes());
        bytes.extend([(tcp * 4) as u8, flags]);
        bytes.extend(self.window.to_be_bytes());
        bytes.extend([0x12, 0x34, 0, 0]);
        bytes.extend(options);
        bytes.extend(payload);
        assert!(self.endpoint.claims(&bytes[..bytes.len().min(endpoint::HEADER)]));
        self.endpoint.receive(&mut bytes, self.now);
    }

    fn send(&mut self, flags: u8, payload: &[u8]) {
        self.raw(flags, &[], payload);
        let phantom = u32::from(flags & (SYN | FIN) != 0);
        self.sequence = self.sequence.wrapping_add(payload.len() as u32 + phantom);
    }

    /// What the service sends now.
    fn segments(&mut self) -> Vec<Segment> {
        std::iter::from_fn(|| self.frame()).map(|frame| segment(&frame)).collect()
    }

    /// Opens a connection with these TCP options.
    fn connect(&mut self, options: &[u8]) -> Segment {
        self.raw(SYN, options, &[]);
        self.sequence = self.sequence.wrapping_add(1);
        let answer = self.segments();
        assert_eq!((answer.len(), answer[0].flags), (1, SYN | ACK), "{answer:?}");
        assert_eq!((answer[0].acknowledgement, answer[0].port), (self.sequence, self.port));
        self.acknowledgement = answer[0].sequence.wrapping_add(1);
        self.send(ACK, &[]);
        assert_eq!(self.segments().len(), 0);
        answer[0].clone()
    }

    /// Takes all that comes, acknowledging as it goes; returns it and whether a FIN came.
    fn read(&mut self) -> (Vec<u8>, bool) {
        let (mut bytes, mut end) = (Vec::new(), false);
        loop {
            let segments = self.segments();
            let news = segments.iter().any(|segment| !segment.payload.is_empty() || segment.flags & FIN != 0);
            for segment in segments {
                assert_eq!(segment.flags & RST, 0);
                if segment.sequence == self.acknowledgement {
                    bytes.extend(&segment.payload);
                    let fin = u32::from(segment.flags & FIN != 0);
                    self.acknowledgement = self.acknowledgement.wrapping_add(segment.payload.len() as u32 + fin);
                    end |= fin == 1;
                }
            }
            // An acknowledgement is not acknowledged.
            if !news {
                return (bytes, end);
            }
            self.send(ACK, &[]);
        }
    }

    /// The body of the answer to a GET.
    fn get(&mut self, path: &str) -> String {
        self.send(ACK, format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes());
        let (bytes, end) = self.read();
        assert!(!end);
        body(&bytes)
    }
}

pub(super) fn body(response: &[u8]) -> String {
    let text = std::str::from_utf8(response).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    body.to_owned()
}

#[test]
fn nothing_is_made_before_the_first_frame_and_nothing_is_said_unasked() {
    let mut endpoint = endpoint(json!({}));
    let mut buffer = [0; MAX_FRAME];
    assert_eq!(endpoint.transmit(&mut buffer, Duration::ZERO), None);
    assert_eq!(endpoint.delay(Duration::ZERO), None);
}

#[test]
fn a_guest_asks_twice_on_one_connection_and_closes_it() {
    let mut guest = Hand::new(endpoint(json!({"a": "one", "b": {"c": "two"}, "empty": ""})), 7);
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one");
    assert_eq!(guest.get("/b/c"), "two");
    assert_eq!(guest.get("/empty"), "", "an empty value");
    guest.send(FIN | ACK, &[]);
    let (rest, end) = guest.read();
    assert!(rest.is_empty() && end);
    assert_eq!(guest.endpoint.delay(guest.now), None, "nothing is left under way");
}

#[test]
fn a_connection_that_is_to_close_is_closed_by_the_service() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    for _ in 0..2 * MAX_CONNECTIONS {
        guest.port += 1;
        guest.connect(&[]);
        guest.send(ACK, b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\n");
        let (bytes, end) = guest.read();
        assert!(body(&bytes) == "one" && end);
        guest.send(FIN | ACK, &[]);
        guest.read();
    }
    assert_eq!(guest.endpoint.delay(guest.now), None);
}

#[test]
fn half_a_close_still_gets_its_answer() {
    let mut guest = Hand::new(endpoint(json!({"a": "x".repeat(100_000)})), 7);
    guest.connect(&[]);
    guest.send(FIN | ACK, b"GET /a HTTP/1.1\r\n\r\n");
    let (bytes, end) = guest.read();
    assert_eq!(body(&bytes).len(), 100_000);
    assert!(end);
}

#[test]
fn sequence_numbers_wrap_and_lengths_pass_65536() {
    let lengths = [65_535, 65_536, 65_537, 131_072, 1 << 20];
    let store: Value = lengths.iter().map(|length| (length.to_string(), json!("y".repeat(*length)))).collect();
    for first in [0, u32::MAX - 1, u32::MAX - 10, 0x7fff_fff0, 0xffff_0000 - 20] {
        let mut guest = Hand::new(endpoint(store.clone()), first);
        // Window scaling, as every guest offers it, and none.
        guest.connect(if first == 0 { &[] } else { &[3, 3, 7, 1] });
        for length in lengths {
            assert_eq!(guest.get(&format!("/{length}")).len(), length, "{first:#x}");
        }
    }
}

#[test]
fn the_maximum_segment_size_is_kept() {
    for mss in [1, 88, 536, 1460, 8960, 65_535] {
        let mut guest = Hand::new(endpoint(json!({"a": "z".repeat(3000)})), 7);
        let bytes = u16::to_be_bytes(mss);
        let answer = guest.connect(&[2, 4, bytes[0], bytes[1]]);
        assert_eq!(answer.options[..4], [2, 4, 5, 180], "ours is 1460");
        guest.send(ACK, b"GET /a HTTP/1.1\r\n\r\n");
        let sizes: Vec<_> = guest.segments().iter().map(|segment| segment.payload.len()).collect();
        assert!(sizes.iter().all(|size| *size <= usize::from(mss).clamp(48, 1460)), "{mss}: {sizes:?}");
        assert!(sizes.iter().sum::<usize>() >= 3000);
    }
}

#[test]
fn odd_tcp_options_do_not_disturb_and_broken_ones_open_nothing() {
    for good in [
        &[1, 1, 1, 1][..],
        &[0, 0, 0, 0],
        &[2, 4, 2, 24, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7],
        &[254, 4, 1, 2],
        &[1, 1, 1, 0, 9, 9, 9, 9],
    ] {
        let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
        guest.connect(good);
        assert_eq!(guest.get("/a"), "one", "{good:?}");
    }
    for bad in [
        &[2, 0, 0, 0][..],
        &[2, 1, 0, 0],
        &[2, 3, 5, 0],
        &[2, 5, 5, 180, 0, 0, 0, 0],
        &[2, 40, 5, 180],
        &[3, 255, 1, 1],
        &[254, 1, 0, 0],
        &[254, 0, 0, 0],
        &[1, 1, 1, 2],
        &[5, 255, 1, 1],
    ] {
        let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
        guest.raw(SYN, bad, &[]);
        assert!(guest.segments().iter().all(|segment| segment.flags & SYN == 0), "{bad:?}");
        guest.port += 1;
        guest.connect(&[]);
        assert_eq!(guest.get("/a"), "one", "the next is served");
    }
}

#[test]
fn a_window_that_closes_and_opens_again_loses_nothing() {
    let mut guest = Hand::new(endpoint(json!({"a": "w".repeat(20_000)})), 7);
    guest.connect(&[]);
    guest.window = 0;
    guest.send(ACK, b"GET /a HTTP/1.1\r\n\r\n");
    guest.now += Duration::from_secs(2);
    let early: usize = guest.segments().iter().map(|segment| segment.payload.len()).sum();
    assert!(early <= 1, "at most a probe");
    guest.window = 1000;
    guest.send(ACK, &[]);
    assert_eq!(body(&guest.read().0).len(), 20_000);
}

#[test]
fn what_the_guest_lost_is_sent_again() {
    let mut guest = Hand::new(endpoint(json!({"a": "r".repeat(3000)})), 7);
    guest.connect(&[2, 4, 5, 180]);
    guest.send(ACK, b"GET /a HTTP/1.1\r\n\r\n");
    let lost = guest.segments();
    assert_eq!(lost.len(), 3);
    let delay = guest.endpoint.delay(guest.now).unwrap();
    assert!(delay <= Duration::from_secs(3), "{delay:?}");
    guest.now += delay;
    assert_eq!(body(&guest.read().0).len(), 3000);
}

#[test]
fn a_guest_that_asked_long_ago_is_answered_and_one_that_never_did() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    guest.now += Duration::from_secs(3600);
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one");

    guest.endpoint.reset();
    guest.port += 1;
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one", "although it answers no ARP");
}

#[test]
fn a_guest_that_sends_to_its_gateway_is_answered() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    guest.to = [2, 0, 0, 0, 0, 9];
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one");
}

#[test]
fn a_segment_longer_than_any_frame_is_taken_in() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    guest.connect(&[]);
    // Segmentation left to us: four requests of 1,000 bytes in one piece.
    let request = format!("GET /a HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(976));
    guest.send(ACK, request.repeat(4).as_bytes());
    let text = String::from_utf8(guest.read().0).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 4, "{text}");
}

#[test]
fn fragments_other_ports_and_other_protocols_are_swallowed_or_refused() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    let frame = |ethertype: [u8; 2], body: &[u8]| [&MAC[..], &GUEST_MAC, &ethertype, body].concat();
    let ip = |flags: u8, protocol: u8, payload: &[u8]| {
        let length = (20 + payload.len()) as u16;
        let head = [&[0x45, 0], &length.to_be_bytes()[..], &[0, 0, flags, 0, 64, protocol, 0, 0]].concat();
        frame([8, 0], &[&head[..], &GUEST.octets(), &ADDRESS.octets(), payload].concat())
    };
    let other_port = [0x9c, 0x40, 0, 22, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0];
    let http = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0];
    for (mut frame, answered) in [
        (frame([0x86, 0xdd], &[0x60; 60]), false),
        (frame([0x81, 0], &[0; 60]), false),
        (frame([0x88, 0xcc], &[]), false),
        (ip(0x20, 6, &http), false),
        (ip(0x20, 17, &[0; 8]), false),
        (ip(0, 6, &other_port), true),
        (ip(0, 6, &other_port[..10]), false),
    ] {
        assert!(guest.endpoint.claims(&frame));
        guest.endpoint.receive(&mut frame, guest.now);
        let answer: Vec<_> = std::iter::from_fn(|| guest.frame()).collect();
        assert_eq!(!answer.is_empty(), answered, "{frame:x?}");
        if answered {
            assert_eq!(segment(&answer[0]).flags, RST | ACK, "nobody listens there");
        }
    }
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one");
}

#[test]
fn a_connection_left_alone_is_aborted_and_forgotten() {
    let mut guest = Hand::new(endpoint(json!({"a": "q".repeat(100_000)})), 7);
    guest.connect(&[]);
    guest.send(ACK, b"GET /a HTTP/1.1\r\n\r\n");
    // It never acknowledges.
    let start = guest.now;
    let mut reset = false;
    while let Some(delay) = guest.endpoint.delay(guest.now) {
        guest.now += delay;
        reset |= guest.segments().iter().any(|segment| segment.flags & RST != 0);
        assert!(guest.now <= start + 2 * IDLE);
    }
    assert!(reset);
    guest.port += 1;
    guest.connect(&[]);
    assert_eq!(guest.get("/a").len(), 100_000);
}

#[test]
fn a_guest_that_hoards_connections_makes_room_only_by_leaving_them_alone() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    for _ in 0..MAX_CONNECTIONS {
        guest.port += 1;
        guest.connect(&[]);
    }
    guest.port += 1;
    guest.raw(SYN, &[], &[]);
    assert_eq!(guest.segments().len(), 0, "all are in use: try again");
    guest.now += Duration::from_millis(1100);
    guest.connect(&[]);
    assert_eq!(guest.get("/a"), "one");
    guest.endpoint.reset();
    assert_eq!(guest.endpoint.delay(guest.now), None);
}

#[test]
fn a_guest_that_does_not_read_its_ring_costs_a_bounded_amount() {
    let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
    let frame = [&MAC[..], &GUEST_MAC, &[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0], &GUEST.octets()].concat();
    let mut frame =
        [&frame[..], &ADDRESS.octets(), &[0x9c, 0x40, 0, 22], &[0; 8], &[0x50, SYN, 0, 0, 0, 0, 0, 0]].concat();
    for _ in 0..10_000 {
        guest.endpoint.receive(&mut frame, guest.now);
    }
    assert!(guest.segments().len() <= 256);
}

pub(crate) mod random;
