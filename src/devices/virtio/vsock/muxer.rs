//! The connections of a guest and the host processes behind them: who is waiting for what.
//!
//! ```text
//!  listener ──accept──▶ Greeting ──CONNECT port──▶ Connected ◀──REQUEST── guest
//!                          │ too slow, too long, wrong      │ both sides are done with it
//!                          ▼                                ▼
//!                        closed                           freed
//! ```
//!
//! All descriptors are in one epoll instance, edge-triggered: what an event said is remembered until it was acted
//! on, so a guest without buffers costs nothing. A peer is watched for writing only as long as it has a backlog.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Verdict};
use super::host::{Greeting, Peer};
use super::packet::{Done, Op, Packet, Ports};
use crate::devices::virtio::IoVecs;
use crate::metrics::METRICS;
use crate::random;
use crate::warn_limited;

/// Most connections, those included that wait for their CONNECT line.
pub const MAX_CONNECTIONS: usize = 1023;
/// Most host peers that have not sent their CONNECT line; more wait to be accepted.
const MAX_GREETINGS: usize = 64;
/// How long they may take.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Most resets owed for connections that do not exist: then nothing more is taken from the guest.
const MAX_RESETS: usize = 64;
/// The first port on the host's side of connections from there.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Events taken per wait.
const EVENTS: usize = 32;

/// Tokens of what is not a connection.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// A place for a connection, by number.
#[derive(Debug, Default)]
struct Slot {
    /// In the list of those that may have something for the guest.
    ready: bool,
    occupant: Option<Occupant>,
}

#[derive(Debug)]
enum Occupant {
    Greeting(Peer, Instant),
    Connected(Link),
}

/// A connection with its host peer.
#[derive(Debug)]
pub struct Link {
    /// Its state.
    pub connection: Connection,
    /// `None` once it has nothing to do with the connection any more.
    pub peer: Option<Peer>,
    /// The peer may have data, or the end of them.
    pub readable: bool,
    /// The end of its data is behind what is there: no event will say so again.
    pub ending: bool,
    /// It has closed its socket.
    pub hung_up: bool,
    /// The guest buffers that what it sends at a time has filled lately.
    pub appetite: usize,
    watched_for_writing: bool,
}

impl Link {
    fn new(connection: Connection, peer: Peer) -> Self {
        Self {
            connection,
            peer: Some(peer),
            readable: false,
            ending: false,
            hung_up: false,
            appetite: 1,
            watched_for_writing: false,
        }
    }

    fn note_end(&mut self, events: EventSet) {
        self.ending |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        self.hung_up |= events.intersects(EventSet::HANG_UP | EventSet::ERROR);
    }

    /// Something for the guest that may be sent.
    pub fn has_something(&self) -> bool {
        self.connection.owes() || self.readable && self.connection.window() > 0
    }

    /// What the peer's state means to the connection where it has nothing to say any more.
    fn look_at_peer(&mut self) {
        if self.readable && self.hung_up && !self.connection.flows() {
            self.connection.on_host_done(Done::BOTH);
        }
        if self.readable {
            self.connection.ask_for_credit();
        }
        if self.connection.is_over() || self.connection.host_done() == Done::BOTH {
            (self.peer, self.readable) = (None, false);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Muxer {
    uds_path: PathBuf,
    epoll: Epoll,
    listener: UnixListener,
    /// The listener may have more.
    accepting: bool,
    timer: TimerFd,
    timer_runs: bool,
    greetings: usize,
    slots: Vec<Slot>,
    free: Vec<u16>,
    by_ports: HashMap<Ports, u16>,
    ready: VecDeque<u16>,
    resets: VecDeque<Ports>,
    next_port: u32,
}

impl Muxer {
    /// Host processes reach it through `listener` at `uds_path`; the guest's connections go to sockets beside it.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn new(uds_path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new()?;
        for (fd, token) in [(listener.as_raw_fd(), LISTENER), (timer.as_raw_fd(), TIMER)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token))?;
        }
        Ok(Self {
            uds_path,
            epoll,
            listener,
            accepting: false,
            timer,
            timer_runs: false,
            greetings: 0,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
        })
    }

    /// Becomes readable when [`Self::poll`] may have something to do.
    pub fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes note of what happened on the host's side. Returns whether there may be more.
    pub fn poll(&mut self) -> bool {
        let mut events = [EpollEvent::default(); EVENTS];
        // It fails when interrupted only: then there is another time.
        let Ok(count) = self.epoll.wait(0, &mut events) else { return true };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accepting = true,
                TIMER => self.end_slow_greetings(),
                slot => self.on_peer_event(slot as u16, event.event_set()),
            }
        }
        let more = self.accept();
        more || count == EVENTS
    }

    fn on_peer_event(&mut self, slot: u16, events: EventSet) {
        match self.occupant(slot) {
            Some(Occupant::Greeting(..)) => self.greet(slot, events),
            Some(Occupant::Connected(link)) => {
                link.readable |= events != EventSet::OUT;
                link.note_end(events);
                if events.contains(EventSet::OUT) {
                    flush(link);
                }
                self.settle(slot);
            }
            None => {}
        }
    }

    /// Accepts who waits. Returns whether there may be more.
    fn accept(&mut self) -> bool {
        for _ in 0..EVENTS {
            if !self.accepting || self.greetings == MAX_GREETINGS {
                return false;
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.begin_greeting(Peer::new(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.accepting = false,
                // Who waits is tried again when something else has happened, or after a while: a descriptor may be
                // free then.
                Err(error) => {
                    warn_limited!("vsock: a host process cannot be accepted: {error}");
                    self.start_timer();
                    return false;
                }
            }
        }
        self.accepting
    }

    fn begin_greeting(&mut self, peer: Peer) {
        let Some(slot) = self.vacant() else { return METRICS.vsock.conns_refused.inc() };
        if watch(&self.epoll, &peer, slot, ControlOperation::Add, EventSet::empty()).is_err() {
            return METRICS.vsock.conns_refused.inc();
        }
        self.slots[usize::from(slot)].occupant = Some(Occupant::Greeting(peer, Instant::now()));
        self.free.pop();
        self.greetings += 1;
        self.start_timer();
    }

    /// Looks whether a host peer has said what it wants.
    fn greet(&mut self, slot: u16, events: EventSet) {
        let Some(Occupant::Greeting(peer, _)) = self.occupant(slot) else { return };
        let greeting = peer.greeting();
        if greeting == Greeting::Incomplete {
            return;
        }
        let occupant = self.slots[usize::from(slot)].occupant.take();
        self.greetings -= 1;
        let (Greeting::Port(guest), Some(Occupant::Greeting(peer, _))) = (greeting, occupant) else {
            METRICS.vsock.conns_refused.inc();
            return self.free.push(slot);
        };
        let ports = Ports { host: self.unused_port(guest), guest };
        let mut link = Link::new(Connection::from_host(ports), peer);
        // More than the line may have come with it, and the end.
        link.readable = true;
        link.note_end(events);
        self.insert(slot, link);
    }

    /// After a load: the guest still knows connections of its past, and may have packets of theirs under way. New ones
    /// begin at ports that those hardly had, so that they are not taken for each other.
    pub fn leave_ports(&mut self) {
        let [a, b, c, d, ..] = random::bytes().unwrap_or_default();
        self.next_port = FIRST_HOST_PORT + u32::from_ne_bytes([a, b, c, d]) % (u32::MAX - FIRST_HOST_PORT);
    }

    /// The next port on the host's side; one that was used is not used again for long.
    fn unused_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).filter(|&port| port != u32::MAX).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn start_timer(&mut self) {
        if !self.timer_runs {
            self.timer_runs = self.timer.reset(GREETING_TIME, None).is_ok();
        }
    }

    fn end_slow_greetings(&mut self) {
        self.timer_runs = false;
        for slot in 0..self.slots.len() {
            if let Some(Occupant::Greeting(_, since)) = &self.slots[slot].occupant
                && since.elapsed() >= GREETING_TIME
            {
                METRICS.vsock.conns_refused.inc();
                self.slots[slot].occupant = None;
                self.free.push(slot as u16);
                self.greetings -= 1;
            }
        }
        if self.greetings > 0 {
            self.start_timer();
        }
    }

    /// Whether packets from the guest may be handled: what they can cause is bounded.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Handles a packet from the guest with its payload.
    ///
    /// # Safety
    ///
    /// The guest memory that the payload is in is alive.
    pub unsafe fn on_packet(&mut self, packet: &Packet, payload: &mut IoVecs) {
        let Some(&slot) = self.by_ports.get(&packet.ports) else {
            match packet.op {
                Some(Op::Request) => self.connect(packet),
                Some(Op::Reset) => {}
                _ => self.resets.push_back(packet.ports),
            }
            return;
        };
        let Some(Occupant::Connected(link)) = self.occupant(slot) else { return };
        match link.connection.on_packet(packet) {
            // SAFETY: by this function's contract.
            Verdict::Deliver => unsafe { deliver(link, payload) },
            Verdict::Accepted => {
                let accepted = link.peer.as_mut().map(|peer| peer.accepted(packet.ports.host));
                if !matches!(accepted, Some(Ok(()))) {
                    link.connection.abort();
                }
            }
            Verdict::Breach => METRICS.vsock.conns_killed.inc(),
            Verdict::Nothing | Verdict::Ended => {}
        }
        self.settle(slot);
    }

    /// The guest asks for a connection to a host process.
    fn connect(&mut self, request: &Packet) {
        let mut path = self.uds_path.clone().into_os_string();
        path.push(format!("_{}", request.ports.host));
        let place = self.vacant();
        let connected = place.and_then(|slot| {
            let peer = Peer::connect(path.as_ref()).ok()?;
            watch(&self.epoll, &peer, slot, ControlOperation::Add, EventSet::empty()).ok()?;
            Some((slot, peer))
        });
        match connected {
            Some((slot, peer)) => {
                self.free.pop();
                self.insert(slot, Link::new(Connection::from_guest(request), peer));
            }
            None => {
                METRICS.vsock.conns_refused.inc();
                self.resets.push_back(request.ports);
            }
        }
    }

    fn insert(&mut self, slot: u16, link: Link) {
        METRICS.vsock.conns_added.inc();
        self.by_ports.insert(link.connection.ports(), slot);
        self.slots[usize::from(slot)].occupant = Some(Occupant::Connected(link));
        self.settle(slot);
    }

    /// Brings everything in line with a connection's state after it may have changed.
    pub fn settle(&mut self, slot: u16) {
        let epoll = &self.epoll;
        let entry = &mut self.slots[usize::from(slot)];
        let Some(Occupant::Connected(link)) = &mut entry.occupant else { return };
        link.look_at_peer();
        if link.connection.is_gone() {
            self.by_ports.remove(&link.connection.ports());
            entry.occupant = None;
            METRICS.vsock.conns_removed.inc();
            return self.free.push(slot);
        }
        if let Some(peer) = &mut link.peer {
            peer.finish(link.connection.finished_for_host());
            if peer.has_backlog() != link.watched_for_writing {
                link.watched_for_writing = peer.has_backlog();
                let events = if link.watched_for_writing { EventSet::OUT } else { EventSet::empty() };
                if let Err(error) = watch(epoll, peer, slot, ControlOperation::Modify, events) {
                    warn_limited!("vsock: a host process cannot be watched: {error}");
                    link.connection.abort();
                }
            }
        }
        if link.has_something() && !entry.ready {
            entry.ready = true;
            self.ready.push_back(slot);
        }
    }

    /// The next connection that does not exist and that the guest has to be told so of.
    pub fn owed_reset(&self) -> Option<Ports> {
        self.resets.front().copied()
    }

    /// It was told.
    pub fn reset_sent(&mut self) {
        self.resets.pop_front();
    }

    /// The connection that has waited longest to send something to the guest.
    pub fn first_ready(&self) -> Option<u16> {
        self.ready.front().copied()
    }

    /// It had its turn. Those that have more come last.
    pub fn had_turn(&mut self, slot: u16) {
        if self.ready.front() == Some(&slot) {
            self.ready.pop_front();
            self.slots[usize::from(slot)].ready = false;
        }
        self.settle(slot);
    }

    /// Whether there is one connection, whose host peer has sent nothing that the guest does not have.
    pub fn is_lone_and_drained(&mut self) -> bool {
        if self.by_ports.len() != 1 {
            return false;
        }
        let slot = self.by_ports.values().next().copied();
        slot.and_then(|slot| self.link(slot)).is_some_and(|link| !link.readable)
    }

    /// The connection in `slot`.
    pub fn link(&mut self, slot: u16) -> Option<&mut Link> {
        match self.occupant(slot) {
            Some(Occupant::Connected(link)) => Some(link),
            _ => None,
        }
    }

    /// Closes everything, as the guest forgot it. Port numbers stay used.
    pub fn clear(&mut self) {
        METRICS.vsock.conns_removed.add(self.by_ports.len() as u64);
        self.slots = Vec::new();
        self.free = Vec::new();
        self.by_ports = HashMap::new();
        self.ready = VecDeque::new();
        self.resets = VecDeque::new();
        self.greetings = 0;
    }

    /// Whether there is nothing to close.
    pub fn is_clear(&self) -> bool {
        self.slots.is_empty() && self.resets.is_empty()
    }

    /// Places in use; a place that is not is in the list of free ones.
    #[cfg(any(test, fuzzing))]
    pub fn connections(&self) -> usize {
        assert_eq!(self.slots.iter().filter(|slot| slot.occupant.is_none()).count(), self.free.len());
        self.slots.len() - self.free.len()
    }

    fn occupant(&mut self, slot: u16) -> Option<&mut Occupant> {
        self.slots.get_mut(usize::from(slot))?.occupant.as_mut()
    }

    /// A slot that is free; it is the last in the list of those.
    fn vacant(&mut self) -> Option<u16> {
        if self.free.is_empty() && self.slots.len() < MAX_CONNECTIONS {
            self.free.push(self.slots.len() as u16);
            self.slots.push(Slot::default());
        }
        self.free.last().copied()
    }
}

fn watch(epoll: &Epoll, peer: &Peer, slot: u16, how: ControlOperation, more: EventSet) -> io::Result<()> {
    let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED | more;
    epoll.ctl(how, peer.as_raw_fd(), EpollEvent::new(events, slot.into()))
}

/// Hands a payload on to the host peer.
///
/// # Safety
///
/// The guest memory that the payload is in is alive.
unsafe fn deliver(link: &mut Link, payload: &mut IoVecs) {
    let Some(peer) = &mut link.peer else { return };
    METRICS.vsock.tx_bytes_count.add(payload.len());
    // SAFETY: by this function's contract.
    let taken = unsafe { peer.write(payload) };
    forwarded(link, taken);
}

/// Hands the backlog on.
fn flush(link: &mut Link) {
    let Some(peer) = &mut link.peer else { return };
    let taken = peer.flush();
    forwarded(link, taken);
}

fn forwarded(link: &mut Link, taken: io::Result<u32>) {
    match taken {
        Ok(bytes) => link.connection.on_forwarded(bytes),
        Err(_) => {
            METRICS.vsock.tx_write_fails.inc();
            if let Some(peer) = &mut link.peer {
                peer.forget_backlog();
            }
            link.connection.on_host_done(Done::RECEIVE);
        }
    }
}
