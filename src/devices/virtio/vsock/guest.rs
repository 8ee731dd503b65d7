//! The guest's side: packets out of the tx queue, packets and data into the rx queue.

use std::io;

use super::muxer::{Link, Muxer};
use super::packet::{Credit, Done, HEADER_SIZE, Op, Packet, header};
use crate::devices::virtio::{Buffers, IoVecs, Position, Progress, Violation, Virtqueue};
use crate::metrics::METRICS;

/// Packets taken from the guest before other devices run.
const TX_BUDGET: usize = 64;
/// Buffers given to the guest before other devices run.
const RX_BUDGET: usize = 256;
/// Buffers filled for one connection before the next has its turn.
const TURN: usize = 32;
/// How often in a row a guest has to begin its answers to data with credit until that is expected of it.
const CREDITS_FIRST: u8 = 4;

/// What the driver handed over, and what is kept to use it without allocating.
pub struct Queues {
    rx: Virtqueue,
    tx: Virtqueue,
    event: Virtqueue,
    /// The guest is to be told that its connections are gone, and until it has heard of it nothing
    /// may reach it: it would take new data for that of old connections.
    reset: Reset,
    packet: Buffers,
    /// Buffers of the guest that are being filled.
    chains: Vec<Chain>,
    payload: IoVecs,
    /// The driver was told of what was used, since this was set to false.
    pub announced: bool,
    /// Data went to the guest, and no packet has come from it since.
    unanswered: bool,
    /// How often in a row the first packet after data was one of credit.
    credits_first: u8,
    /// The guest was asked not to notify of its next packet, and what it sent was not looked for since.
    pub holds_back: bool,
}

#[derive(Default)]
struct Chain {
    head: u16,
    buffers: Buffers,
}

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7): a `le32`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How far the news of a reset has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reset {
    /// There is none.
    None,
    /// It waits for a buffer.
    Due,
    /// It was sent when the driver's index was this. The driver moves it on when it gives the buffer
    /// back, having read the news.
    Sent(u16),
}

/// Whether the guest had room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Enough,
    /// It will notify when it has.
    Lacking,
}

impl Queues {
    /// Of the queues rx, tx and event.
    pub fn new(queues: Vec<Virtqueue>) -> Option<Self> {
        let [rx, tx, event] = queues.try_into().ok()?;
        Some(Self {
            rx,
            tx,
            event,
            reset: Reset::None,
            packet: Buffers::default(),
            chains: Vec::new(),
            payload: IoVecs::default(),
            announced: false,
            unanswered: false,
            credits_first: 0,
            holds_back: false,
        })
    }

    /// How far the queues have got.
    pub fn positions(&self) -> [Position; 3] {
        [self.rx.position(0), self.tx.position(0), self.event.position(0)]
    }

    /// The guest's connections are gone: it is told before anything else is.
    pub fn reset_transport(&mut self) {
        self.reset = Reset::Due;
    }

    /// Whether the guest knows of the last reset of the transport, which it is told here.
    pub fn knows_of_reset(&mut self) -> Result<bool, Violation> {
        match self.reset {
            Reset::None => return Ok(true),
            Reset::Sent(index) if self.event.await_more()? == index => return Ok(false),
            Reset::Sent(_) => {
                self.reset = Reset::None;
                return Ok(true);
            }
            Reset::Due => {}
        }
        let Some(head) = self.event.pop(&mut self.packet)? else { return Ok(false) };
        if self.packet.writable.len() < TRANSPORT_RESET.len() as u64 {
            return Err(Violation::Packet(head));
        }
        self.reset = Reset::Sent(self.event.await_more()?);
        // SAFETY: the buffers are fresh from the queue, which keeps the memory.
        unsafe { self.packet.writable.write(&TRANSPORT_RESET) };
        self.event.add_used(head, TRANSPORT_RESET.len() as u32);
        self.event.announce();
        Ok(false)
    }

    /// Handles packets from the guest until there is none, the batch is full, or too much is owed to it.
    pub fn take_packets(&mut self, muxer: &mut Muxer, guest_cid: u64) -> Result<Progress, Violation> {
        self.holds_back = false;
        for _ in 0..TX_BUDGET {
            if !muxer.takes_packets() {
                return Ok(Progress::Idle);
            }
            let Some(head) = self.tx.pop(&mut self.packet)? else { return Ok(Progress::Idle) };
            let payload = &mut self.packet.readable;
            // SAFETY: the buffers are fresh from the queue, which keeps the memory.
            let Some(bytes) = (unsafe { payload.read::<HEADER_SIZE>() }) else { return Err(Violation::Packet(head)) };
            METRICS.vsock.tx_packets_count.inc();
            if let Some(packet) = Packet::parse(&bytes, guest_cid) {
                if u64::from(packet.length) > payload.len() {
                    return Err(Violation::Packet(head));
                }
                payload.truncate(packet.length.into());
                if std::mem::take(&mut self.unanswered) {
                    let credit = packet.op == Some(Op::CreditUpdate);
                    self.credits_first = if credit { (self.credits_first + 1).min(CREDITS_FIRST) } else { 0 };
                }
                // SAFETY: as above.
                unsafe { muxer.on_packet(&packet, payload) };
            }
            self.tx.add_used(head, 0);
        }
        Ok(Progress::More)
    }

    /// Sends what is owed and what host peers have sent, until there is nothing, the batch is full, or the guest has
    /// no room.
    pub fn send_packets(&mut self, muxer: &mut Muxer, guest_cid: u64) -> Result<Progress, Violation> {
        let mut budget = RX_BUDGET;
        while budget > 0 {
            if let Some(ports) = muxer.owed_reset() {
                if self.reserve(1)? == 0 {
                    return Ok(Progress::Idle);
                }
                self.fill(0, &header(guest_cid, ports, Op::Reset, 0, Credit::default()), 0);
                muxer.reset_sent();
                budget -= 1;
                continue;
            }
            let Some(slot) = muxer.first_ready() else { return Ok(Progress::Idle) };
            let room = match muxer.link(slot) {
                Some(link) => self.serve(link, guest_cid, &mut budget)?,
                None => Room::Enough,
            };
            if room == Room::Lacking {
                return Ok(Progress::Idle);
            }
            muxer.had_turn(slot);
        }
        Ok(Progress::More)
    }

    /// A guest that has read all there is gives credit at once (Linux since 6.7), and then it answers. If that is what
    /// it did lately it is asked not to notify of the first packet: one exit from the guest and one wake of this thread
    /// do for both. Whoever calls this looks for what is held back so before long, for it may stay alone.
    pub fn await_answer(&mut self, muxer: &mut Muxer) -> Result<Progress, Violation> {
        let expected = self.unanswered && self.credits_first == CREDITS_FIRST;
        if !expected || self.holds_back || !muxer.is_lone_and_drained() {
            return Ok(Progress::Idle);
        }
        self.holds_back = true;
        Ok(if self.tx.await_second()? { Progress::More } else { Progress::Idle })
    }

    /// The guest had time to answer.
    pub fn expect_no_answer(&mut self) {
        self.unanswered = false;
    }

    /// Interrupts the driver, at most once, for what was used. That packets were taken from it is no news that it
    /// waits for, unless they fill the queue: it may be told `later` if there is no occasion now. Returns whether it
    /// has to be.
    pub fn announce(&mut self, later: bool) -> bool {
        if self.rx.announce_with(&mut self.tx) {
            self.announced = true;
            return false;
        }
        let defer = later && (1..self.tx.size() / 4).contains(&self.tx.unannounced());
        if !defer && self.tx.unannounced() > 0 {
            self.announced = true;
            self.tx.announce();
        }
        defer
    }

    /// Sends what a connection owes, then data, as far as one turn goes.
    fn serve(&mut self, link: &mut Link, guest_cid: u64, budget: &mut usize) -> Result<Room, Violation> {
        while link.connection.owes() {
            if self.reserve(1)? == 0 {
                return Ok(Room::Lacking);
            }
            let Some(op) = link.connection.take_owed() else {
                self.give_back(1);
                break;
            };
            let credit = link.connection.announce();
            self.fill(0, &header(guest_cid, link.connection.ports(), op, 0, credit), 0);
            *budget = budget.saturating_sub(1);
        }
        let mut burst = 0;
        while link.has_something() && burst < TURN && *budget > 0 {
            let reserved = self.reserve(link.appetite.min(TURN - burst).min(*budget))?;
            if reserved == 0 {
                return Ok(Room::Lacking);
            }
            let filled = self.receive(link, reserved, guest_cid);
            self.give_back(reserved - filled);
            burst += filled;
            *budget -= filled;
            // What is sent at a time tends to be as much as the last time: it is read at once then.
            link.appetite = if link.readable { link.appetite * 4 } else { burst }.clamp(1, TURN);
            if filled == 0 {
                break;
            }
        }
        Ok(Room::Enough)
    }

    /// Reads from the host peer into the first `reserved` chains. Returns how many it filled.
    fn receive(&mut self, link: &mut Link, reserved: usize, guest_cid: u64) -> usize {
        let Some(peer) = &link.peer else { return 0 };
        self.payload.clear();
        for chain in &self.chains[..reserved] {
            self.payload.append_from(&chain.buffers.writable, HEADER_SIZE);
        }
        self.payload.truncate(link.connection.window().into());
        // SAFETY: the buffers are fresh from the queue, which keeps the memory.
        let (count, drained) = match unsafe { peer.read(&self.payload) } {
            Ok((0, _)) => {
                link.readable = false;
                link.connection.on_host_done(if link.hung_up { Done::BOTH } else { Done::SEND });
                return 0;
            }
            Ok(read) => read,
            Err(error) => {
                link.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    METRICS.vsock.rx_read_fails.inc();
                    link.connection.on_host_done(Done::BOTH);
                }
                return 0;
            }
        };
        link.readable = !drained || link.ending;
        link.connection.on_sent(count as u32);
        self.unanswered = true;
        METRICS.vsock.rx_bytes_count.add(count as u64);
        let (ports, credit) = (link.connection.ports(), link.connection.announce());
        let (mut left, mut filled) = (count as u64, 0);
        while left > 0 && filled < reserved {
            let length = left.min(self.chains[filled].buffers.writable.len() - HEADER_SIZE as u64);
            self.fill(filled, &header(guest_cid, ports, Op::Data, length as u32, credit), length as u32);
            left -= length;
            filled += 1;
        }
        filled
    }

    /// Takes up to `count` buffers of the guest. Returns how many there were.
    fn reserve(&mut self, count: usize) -> Result<usize, Violation> {
        self.chains.resize_with(count.max(self.chains.len()), Chain::default);
        for (taken, chain) in self.chains[..count].iter_mut().enumerate() {
            let Some(head) = self.rx.pop(&mut chain.buffers)? else { return Ok(taken) };
            if chain.buffers.writable.len() <= HEADER_SIZE as u64 {
                return Err(Violation::Packet(head));
            }
            chain.head = head;
        }
        Ok(count)
    }

    /// Gives the last `count` buffers back that were not filled.
    fn give_back(&mut self, count: usize) {
        for _ in 0..count {
            self.rx.undo_pop();
        }
    }

    /// Completes a packet whose `length` bytes of data are in place.
    fn fill(&mut self, chain: usize, header: &[u8; HEADER_SIZE], length: u32) {
        let Chain { head, buffers } = &mut self.chains[chain];
        // SAFETY: the buffers came from the queue, which keeps the memory.
        unsafe { buffers.writable.write(header) };
        self.rx.add_used(*head, HEADER_SIZE as u32 + length);
        METRICS.vsock.rx_packets_count.inc();
    }
}
