//! ARP, IPv4 and TCP behind [`Endpoint`](super::Endpoint), and the connections it has.
//!
//! ```text
//!  listening ──SYN──▶ waiting for a request ⇄ answering ──▶ closing ──▶ gone
//!                          └─ no progress for IDLE, or room needed ──▶ aborted
//! ```
//!
//! Sockets are made as connections arrive, up to [`MAX_CONNECTIONS`], each with small buffers; the
//! responses under way are bounded together. So a guest cannot pin more than a few MiB, whatever it
//! leaves unread.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use super::endpoint::MAX_FRAME;
use super::frames::{self, MAC, PORT};
use super::{Mmds, http};
use crate::metrics::METRICS;

/// Most connections at once.
pub const MAX_CONNECTIONS: usize = 128;
/// Bytes on their way from and to the guest, per connection.
const RECEIVE_BUFFER: usize = http::MAX_REQUEST;
const SEND_BUFFER: usize = 8 << 10;
/// Replies of the lower layers that wait for the guest's receive queue.
const MAX_REPLIES: usize = 256;
/// A connection without progress for so long is aborted.
pub const IDLE: Duration = Duration::from_secs(30);
/// One without progress for so long makes room for a new one.
const EXPENDABLE: Duration = Duration::from_secs(1);
/// Largest documents that are under way together; another request waits.
const DOCUMENTS: usize = 4;
/// Shortest delay: a guest may stop reading, and then nothing is gained by asking often.
const SHORTEST_DELAY: Duration = Duration::from_millis(1);

struct Connection {
    handle: SocketHandle,
    /// What was received of the next request.
    request: Vec<u8>,
    /// The response, and how much of it is on its way.
    response: Vec<u8>,
    sent: usize,
    close: bool,
    /// Whether the guest has opened it.
    open: bool,
    /// When it made progress.
    active: Duration,
}

/// See the module.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    replies: VecDeque<Vec<u8>>,
}

impl Stack {
    /// A host at `address`, without connections.
    pub fn new(address: Ipv4Addr, now: Duration) -> Self {
        let mut config = Config::new(EthernetAddress(MAC).into());
        // Initial sequence numbers; a guest that guesses them deceives itself.
        config.random_seed = crate::random::bytes().map(u128::from_ne_bytes).unwrap_or_default() as u64;
        let mut nowhere = Wire { received: None, replies: &mut VecDeque::new(), buffer: None, written: None };
        let mut interface = Interface::new(config, &mut nowhere, instant(now));
        // Whatever addresses the guest has, they are on this link.
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address, 0)));
        });
        Self { interface, sockets: SocketSet::new(Vec::new()), connections: Vec::new(), replies: VecDeque::new() }
    }

    /// Takes a frame. Who opens a connection is known by that: it need not ask first, nor answer if it was asked.
    pub fn receive(&mut self, frame: &[u8], mmds: &mut Mmds, now: Duration) {
        // Replies are only lost to a guest that does not read them, and TCP repeats what matters.
        if self.replies.len() >= MAX_REPLIES || frames::is_syn(frame) && !self.make_room(now) {
            METRICS.mmds.rx_accepted_err.inc();
            return;
        }
        if frames::is_syn(frame)
            && let Some(introduction) = frames::introduction(frame)
        {
            self.take(&introduction, now);
        }
        self.take(frame, now);
        self.serve(mmds, now);
    }

    fn take(&mut self, frame: &[u8], now: Duration) {
        let mut wire = Wire { received: Some(frame), replies: &mut self.replies, buffer: None, written: None };
        self.interface.poll_ingress_single(instant(now), &mut wire, &mut self.sockets);
    }

    /// Writes the next frame into `buffer`.
    pub fn transmit(&mut self, buffer: &mut [u8], mmds: &mut Mmds, now: Duration) -> Option<usize> {
        if buffer.len() < MAX_FRAME {
            return None;
        }
        if let Some(reply) = self.replies.pop_front() {
            buffer[..reply.len()].copy_from_slice(&reply);
            return Some(reply.len());
        }
        if self.abort_idle(now) {
            self.serve(mmds, now);
        }
        let mut wire = Wire { received: None, replies: &mut self.replies, buffer: Some(buffer), written: None };
        self.interface.poll_egress(instant(now), &mut wire, &mut self.sockets);
        let written = wire.written;
        if written.is_none() {
            self.bury();
        }
        written
    }

    /// See [`Endpoint::delay`](super::Endpoint::delay).
    pub fn delay(&mut self, now: Duration) -> Option<Duration> {
        let stack = self.interface.poll_delay(instant(now), &self.sockets).map(Duration::from);
        let idle = self.connections.iter().filter(|connection| connection.open);
        let idle = idle.map(|connection| (connection.active + IDLE).saturating_sub(now)).min();
        let delay = [stack, idle].into_iter().flatten().min()?;
        Some(delay.max(SHORTEST_DELAY))
    }

    /// See [`Endpoint::is_quiet`](super::Endpoint::is_quiet).
    pub fn is_quiet(&self) -> bool {
        self.replies.is_empty() && self.connections.iter().all(|connection| !connection.open)
    }

    /// Bytes of responses under way.
    fn held(&self) -> usize {
        self.connections.iter().map(|connection| connection.response.len()).sum()
    }

    /// Sees to it that a socket listens. At the limit the connection that has been without progress
    /// for longest goes, unless all of them are busy: then the guest has to try again.
    fn make_room(&mut self, now: Duration) -> bool {
        if self.connections.iter().any(|connection| !connection.open) {
            return true;
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.iter().enumerate().min_by_key(|(_, connection)| connection.active);
            match oldest {
                Some((index, oldest)) if now.saturating_sub(oldest.active) >= EXPENDABLE => self.remove(index),
                _ => return false,
            }
        }
        let buffer = |size| SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        // The guest is next door: there is nothing to save by waiting.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        if socket.listen(PORT).is_err() {
            return false;
        }
        let handle = self.sockets.add(socket);
        self.connections.push(Connection {
            handle,
            request: Vec::new(),
            response: Vec::new(),
            sent: 0,
            close: false,
            open: false,
            active: now,
        });
        true
    }

    fn remove(&mut self, index: usize) {
        let connection = self.connections.swap_remove(index);
        self.sockets.remove(connection.handle);
        if connection.open {
            METRICS.mmds.connections_destroyed.inc();
        }
        if connection.sent < connection.response.len() {
            METRICS.mmds.tx_errors.inc();
        }
    }

    /// Removes the connections that are over. Only when nothing is left to send: an
    /// acknowledgement or a reset may still have been due.
    fn bury(&mut self) {
        for index in (0..self.connections.len()).rev() {
            let connection = &self.connections[index];
            let state = self.sockets.get::<Socket<'_>>(connection.handle).state();
            // Nothing can be lost between the guest and us, so nobody waits in TIME-WAIT.
            if matches!(state, State::Closed | State::TimeWait) {
                self.remove(index);
            }
        }
    }

    /// Aborts the connections without progress; whether there were any.
    fn abort_idle(&mut self, now: Duration) -> bool {
        let mut any = false;
        for connection in self.connections.iter_mut().filter(|connection| connection.open) {
            if now.saturating_sub(connection.active) >= IDLE {
                self.sockets.get_mut::<Socket<'_>>(connection.handle).abort();
                connection.active = now;
                any = true;
            }
        }
        any
    }

    /// Forgets the responses of connections that were reset: another may be waiting for their room.
    fn let_go(&mut self) {
        for connection in &mut self.connections {
            if self.sockets.get::<Socket<'_>>(connection.handle).state() == State::Closed {
                if !connection.response.is_empty() {
                    METRICS.mmds.tx_errors.inc();
                }
                (connection.response, connection.sent, connection.close) = (Vec::new(), 0, true);
            }
        }
    }

    /// Moves every connection on as far as it goes.
    fn serve(&mut self, mmds: &mut Mmds, now: Duration) {
        self.let_go();
        let room = DOCUMENTS.saturating_mul(mmds.store.limit());
        let mut held = self.held();
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
            if !connection.open && socket.state() != State::Listen {
                connection.open = true;
                connection.active = now;
                METRICS.mmds.connections_created.inc();
            }
            held -= connection.response.len();
            connection.serve(socket, mmds, held < room.max(1), now);
            held += connection.response.len();
        }
    }
}

impl Connection {
    /// Sends what is left of a response, then answers the next request if that `may` be.
    fn serve(&mut self, socket: &mut Socket<'_>, mmds: &mut Mmds, may: bool, now: Duration) {
        loop {
            self.send(socket, now);
            if !self.response.is_empty() || self.close {
                return;
            }
            self.fill(socket, now);
            if !may {
                return;
            }
            let Some(answer) = http::answer(&self.request, mmds, now) else { break };
            METRICS.mmds.rx_count.inc();
            METRICS.mmds.tx_count.inc();
            self.request.drain(..answer.consumed);
            (self.response, self.sent, self.close) = (answer.bytes, 0, answer.close);
        }
        // The guest will not finish its request: there is nothing to wait for.
        if !socket.may_recv() && socket.state() != State::Listen && socket.state() != State::SynReceived {
            socket.close();
        }
    }

    /// Hands over as much of the response as there is room for.
    fn send(&mut self, socket: &mut Socket<'_>, now: Duration) {
        if self.response.is_empty() {
            return;
        }
        // A connection that is over takes nothing; it will be buried.
        let count = socket.send_slice(&self.response[self.sent..]).unwrap_or(0);
        if count > 0 {
            self.sent += count;
            self.active = now;
        }
        if self.sent == self.response.len() {
            (self.response, self.sent) = (Vec::new(), 0);
            if self.close {
                socket.close();
            }
        }
    }

    /// Takes what has arrived of the next request.
    fn fill(&mut self, socket: &mut Socket<'_>, now: Duration) {
        while socket.can_recv() && self.request.len() < http::MAX_REQUEST {
            let room = http::MAX_REQUEST - self.request.len();
            let request = &mut self.request;
            let taken = socket.recv(|bytes| {
                let count = bytes.len().min(room);
                request.extend_from_slice(&bytes[..count]);
                (count, count)
            });
            if !matches!(taken, Ok(1..)) {
                return;
            }
            self.active = now;
        }
        if self.request.is_empty() {
            // An idle connection holds no buffer.
            self.request = Vec::new();
        }
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// One frame in or one frame out, as the interface wants to see it.
struct Wire<'a> {
    received: Option<&'a [u8]>,
    replies: &'a mut VecDeque<Vec<u8>>,
    buffer: Option<&'a mut [u8]>,
    written: Option<usize>,
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Where a frame goes: behind the replies, or into the caller's buffer.
enum Slot<'a> {
    Reply(&'a mut VecDeque<Vec<u8>>),
    Buffer(&'a mut [u8], &'a mut Option<usize>),
}

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        match self {
            Self::Buffer(buffer, written) if length <= buffer.len() => {
                *written = Some(length);
                f(&mut buffer[..length])
            }
            // The interface keeps to the MTU it was told, so a frame fits.
            Self::Buffer(..) => f(&mut vec![0; length]),
            Self::Reply(replies) => {
                let mut frame = vec![0; length];
                let result = f(&mut frame);
                replies.push_back(frame);
                result
            }
        }
    }
}

impl Device for Wire<'_> {
    type RxToken<'t>
        = Received<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Slot<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Slot<'_>)> {
        Some((Received(self.received.take()?), Slot::Reply(self.replies)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Slot<'_>> {
        if self.written.is_some() {
            return None;
        }
        Some(Slot::Buffer(self.buffer.as_deref_mut()?, &mut self.written))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        // Made for what we send, not checked in what we get: nothing is damaged on the way, and the
        // guest may have left its own to us.
        let mut checksums = ChecksumCapabilities::default();
        (checksums.ipv4, checksums.tcp, checksums.icmpv4) = (Checksum::Tx, Checksum::Tx, Checksum::Tx);
        capabilities.checksum = checksums;
        capabilities
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mmds::tests::{ADDRESS, GUEST, GUEST_MAC};

    const QUESTION: &str = "GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n";

    fn segment(port: u16, flags: u8, sequence: u32, acknowledgement: [u8; 4], payload: &str) -> Vec<u8> {
        let length = (40 + payload.len()) as u16;
        let ip = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 0, 0x40, 0, 64, 6, 0, 0]].concat();
        let ports = [port.to_be_bytes(), PORT.to_be_bytes()].concat();
        let tcp = [&ports[..], &sequence.to_be_bytes(), &acknowledgement, &[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]];
        let head = [&MAC[..], &GUEST_MAC, &[8, 0], &ip, &GUEST.octets(), &ADDRESS.octets()].concat();
        [&head[..], &tcp.concat(), payload.as_bytes()].concat()
    }

    /// A service whose document is as long as it may be.
    fn stack(now: Duration) -> (Stack, Mmds) {
        let mut mmds = Mmds::new(100_000);
        mmds.store.put(json!("d".repeat(99_998))).unwrap();
        (Stack::new(ADDRESS, now), mmds)
    }

    /// The frames with which a guest asks for the document without reading any of it.
    fn ask(stack: &mut Stack, mmds: &mut Mmds, port: u16, now: Duration) {
        let mut buffer = [0; MAX_FRAME];
        let mut acknowledgement = [0; 4];
        for (flags, sequence, payload) in [(2, 1, ""), (16, 2, QUESTION)] {
            stack.receive(&segment(port, flags, sequence, acknowledgement, payload), mmds, now);
            while let Some(length) = stack.transmit(&mut buffer, mmds, now) {
                // The answer to the SYN.
                if length == 58 {
                    let number: [u8; 4] = buffer[38..42].try_into().unwrap();
                    acknowledgement = (u32::from_be_bytes(number) + 1).to_be_bytes();
                }
            }
        }
    }

    #[test]
    fn a_guest_that_asks_for_much_and_reads_nothing_pins_little() {
        let now = Duration::from_secs(1);
        let (mut stack, mut mmds) = stack(now);
        for port in 0..200 {
            ask(&mut stack, &mut mmds, 40_000 + port, now);
        }
        let unread = stack.connections.iter().filter(|connection| !connection.response.is_empty()).count();
        assert_eq!((stack.connections.len(), unread), (MAX_CONNECTIONS, DOCUMENTS));
        assert!(stack.held() < DOCUMENTS * 101_000);
    }

    #[test]
    fn a_request_that_waits_for_room_is_answered_once_a_connection_that_has_it_is_reset() {
        let now = Duration::from_secs(1);
        let (mut stack, mut mmds) = stack(now);
        for port in 0..=DOCUMENTS as u16 {
            ask(&mut stack, &mut mmds, 40_000 + port, now);
        }
        assert!(stack.connections[DOCUMENTS].response.is_empty(), "it waits");
        let rst = segment(40_000, 4, 2 + QUESTION.len() as u32, [0; 4], "");
        stack.receive(&rst, &mut mmds, now);
        let mut buffer = [0; MAX_FRAME];
        assert!(stack.transmit(&mut buffer, &mut mmds, now).is_some());
        assert_eq!(buffer[36..38], (40_000 + DOCUMENTS as u16).to_be_bytes());
        while stack.transmit(&mut buffer, &mut mmds, now).is_some() {}
        assert_eq!(stack.connections.len(), DOCUMENTS);
    }
}
