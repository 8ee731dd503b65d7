//! One connection's state, without any I/O: packets and counts go in, what is to be done comes out.
//!
//! ```text
//!  host asks                                              guest asks
//!     │ REQUEST owed                                           │ RESPONSE owed
//!     ▼                                                        ▼
//!  Requested ────────────── RESPONSE ─────────────────────▶  Open ⟲ data, credit, half-close
//!     │ RST                                                    │ RST
//!     │                                                        │ guest gave up both directions and all it sent
//!     │ host gives up, or the guest breaks the protocol        │ was forwarded; or it breaks the protocol
//!     ▼                                                        ▼
//!   Gone ◀───────────────── the RST owed is out ──────────── Over
//! ```
//!
//! Half-close: each side says in which directions it has finished ([`Done`]), by SHUTDOWN on the guest's side and
//! shutdown(2) or close(2) on the host's. Flow control (virtio 1.2 §5.10.6.3): neither side sends more than the other
//! said it can take. What the guest sends and the host peer does not take at once is the backlog: it is never
//! longer than the [`BUF_ALLOC`] that was announced, or the connection is reset.

use std::num::Wrapping;

use super::packet::{Credit, Done, Op, Packet, Ports};

/// Bytes the guest may have under way to the host, in each connection.
pub const BUF_ALLOC: u32 = 128 << 10;

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered.
    Requested,
    /// Data flows.
    Open,
    /// A reset is owed.
    Over,
    /// Nothing is owed: forget it.
    Gone,
}

/// What a packet from the guest means to the host peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing at once; directions may be finished, see [`Connection::finished_for_host`].
    Nothing,
    /// The guest accepted the connection: say so.
    Accepted,
    /// The payload is to be handed on, or kept as backlog.
    Deliver,
    /// The connection is over.
    Ended,
    /// It is, because the guest broke the protocol.
    Breach,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Connection {
    ports: Ports,
    phase: Phase,
    guest_done: Done,
    host_done: Done,
    /// REQUEST or RESPONSE, as long as it is not out.
    opening: Option<Op>,
    owes_shutdown: bool,
    owes_credit: bool,
    /// The guest was asked for credit, or is about to be.
    asked: bool,
    owes_question: bool,
    /// Bytes from the guest: all, those the host peer took, and those the guest knows it took.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// Bytes to the guest, and what it can take.
    sent: Wrapping<u32>,
    guest_credit: Credit,
}

impl Connection {
    fn new(ports: Ports, phase: Phase, opening: Op, guest_credit: Credit) -> Self {
        Self {
            ports,
            phase,
            guest_done: Done::default(),
            host_done: Done::default(),
            opening: Some(opening),
            owes_shutdown: false,
            owes_credit: false,
            asked: false,
            owes_question: false,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            guest_credit,
        }
    }

    /// A connection that a host peer asks for.
    pub fn from_host(ports: Ports) -> Self {
        Self::new(ports, Phase::Requested, Op::Request, Credit::default())
    }

    /// The connection that the guest asked for with `request` and a host peer accepted.
    pub fn from_guest(request: &Packet) -> Self {
        Self::new(request.ports, Phase::Open, Op::Response, request.credit)
    }

    /// Its ends.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host peer has nothing to do with it any more: its socket and its backlog can go.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over | Phase::Gone)
    }

    /// The guest has nothing to do with it any more either.
    pub fn is_gone(&self) -> bool {
        self.phase == Phase::Gone
    }

    /// Handles a packet from the guest. The payload of what is not [`Verdict::Deliver`] is dropped.
    pub fn on_packet(&mut self, packet: &Packet) -> Verdict {
        if packet.op == Some(Op::Reset) {
            let ended = !self.is_over();
            self.phase = Phase::Gone;
            return if ended { Verdict::Ended } else { Verdict::Nothing };
        }
        if self.is_over() {
            return Verdict::Nothing;
        }
        self.guest_credit = packet.credit;
        if self.credit_left() > 0 {
            (self.asked, self.owes_question) = (false, false);
        }
        match (self.phase, packet.op) {
            (Phase::Requested, Some(Op::Response)) if self.opening.is_none() => {
                self.phase = Phase::Open;
                Verdict::Accepted
            }
            (Phase::Open, Some(Op::Data)) => self.on_data(packet.length),
            (Phase::Open, Some(Op::Shutdown(done))) => {
                self.guest_done = self.guest_done.and(done);
                self.end_if_finished();
                if self.is_over() { Verdict::Ended } else { Verdict::Nothing }
            }
            (Phase::Open, Some(Op::CreditRequest)) => {
                self.owes_credit = true;
                Verdict::Nothing
            }
            (Phase::Open | Phase::Requested, Some(Op::CreditUpdate)) => Verdict::Nothing,
            _ => self.breach(),
        }
    }

    fn on_data(&mut self, length: u32) -> Verdict {
        let under_way = (self.received - self.announced).0;
        if self.guest_done.send || length > BUF_ALLOC - under_way.min(BUF_ALLOC) {
            return self.breach();
        }
        self.received += length;
        if self.host_done.receive {
            // It was sent before the guest could know that nobody wants it.
            self.on_forwarded(length);
            return Verdict::Nothing;
        }
        Verdict::Deliver
    }

    fn breach(&mut self) -> Verdict {
        self.phase = Phase::Over;
        Verdict::Breach
    }

    /// Bytes from the guest that the host peer has not taken yet.
    pub fn backlog(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// The host peer took `bytes` of the backlog, or never will. The guest is told when it may think that half of
    /// the buffer is taken.
    pub fn on_forwarded(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.backlog());
        self.forwarded += bytes;
        let known_free = BUF_ALLOC - (self.received - self.announced).0.min(BUF_ALLOC);
        if self.forwarded != self.announced && known_free < BUF_ALLOC / 2 {
            self.owes_credit = true;
        }
        self.end_if_finished();
    }

    /// The guest gave up both directions, and nothing it sent is left here: the reset tells it so (§5.10.6.5).
    fn end_if_finished(&mut self) {
        if self.phase == Phase::Open && self.guest_done == Done::BOTH && self.backlog() == 0 {
            self.phase = Phase::Over;
        }
    }

    /// The host peer has finished in some directions. A backlog it will not receive is dropped.
    pub fn on_host_done(&mut self, done: Done) {
        if self.phase == Phase::Requested {
            return self.abort();
        }
        let before = self.host_done;
        self.host_done = before.and(done);
        self.owes_shutdown |= self.host_done != before;
        if self.host_done.receive {
            self.on_forwarded(self.backlog());
        }
    }

    /// Ends it from the host's side at once.
    pub fn abort(&mut self) {
        if self.is_over() {
            return;
        }
        // The guest does not know of a connection whose REQUEST is not out.
        let unknown = self.opening == Some(Op::Request);
        self.phase = if unknown { Phase::Gone } else { Phase::Over };
    }

    /// In which directions the host peer's socket has nothing to expect from the guest: it shall receive no more
    /// once all the guest sent is out, and send no more if the guest receives no more.
    pub fn finished_for_host(&self) -> Done {
        Done { receive: self.guest_done.send && self.backlog() == 0, send: self.guest_done.receive }
    }

    /// What the host peer has finished.
    pub fn host_done(&self) -> Done {
        self.host_done
    }

    /// Whether the guest still receives, and the host peer still sends.
    pub fn flows(&self) -> bool {
        self.phase == Phase::Open && !self.guest_done.receive && !self.host_done.send
    }

    /// Bytes the guest can take now; 0 if none are wanted, or none will come.
    pub fn window(&self) -> u32 {
        if self.flows() && self.opening.is_none() { self.credit_left() } else { 0 }
    }

    /// There is data for the guest: if nothing but credit keeps it back, the guest is asked for some, once.
    pub fn ask_for_credit(&mut self) {
        let lacks = self.flows() && self.credit_left() == 0;
        self.owes_question |= lacks && !self.asked;
        self.asked |= lacks;
    }

    fn credit_left(&self) -> u32 {
        // A guest that claims to have received more than was sent gets nothing.
        let under_way = (self.sent - Wrapping(self.guest_credit.fwd_cnt)).0;
        self.guest_credit.buf_alloc.saturating_sub(under_way)
    }

    /// `bytes` of data, at most [`Self::window`], were sent to the guest.
    pub fn on_sent(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.window());
        self.sent += bytes;
    }

    /// The next packet without data that is owed to the guest, which is then taken to be out.
    pub fn take_owed(&mut self) -> Option<Op> {
        match self.phase {
            Phase::Gone => None,
            Phase::Over => {
                self.phase = Phase::Gone;
                Some(Op::Reset)
            }
            _ => self.take_opening_or_later(),
        }
    }

    fn take_opening_or_later(&mut self) -> Option<Op> {
        if let Some(opening) = self.opening.take() {
            return Some(opening);
        }
        if std::mem::take(&mut self.owes_shutdown) {
            return Some(Op::Shutdown(self.host_done));
        }
        if std::mem::take(&mut self.owes_credit) {
            return Some(Op::CreditUpdate);
        }
        std::mem::take(&mut self.owes_question).then_some(Op::CreditRequest)
    }

    /// Whether [`Self::take_owed`] has something.
    pub fn owes(&self) -> bool {
        let later = self.opening.is_some() || self.owes_shutdown || self.owes_credit || self.owes_question;
        !self.is_gone() && (self.is_over() || later)
    }

    /// The credit that the next packet's header tells the guest of.
    pub fn announce(&mut self) -> Credit {
        self.announced = self.forwarded;
        self.owes_credit = false;
        Credit { buf_alloc: BUF_ALLOC, fwd_cnt: self.forwarded.0 }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
