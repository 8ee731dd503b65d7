//! The header of a packet (virtio 1.2 §5.10.6), checked once, after it was copied out of guest memory.

/// Bytes of a header.
pub const HEADER_SIZE: usize = 44;
/// The host's CID (§5.10.4).
pub const HOST_CID: u64 = 2;

/// VIRTIO_VSOCK_TYPE_STREAM.
const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
const SHUTDOWN_SEND: u32 = 2;

/// The two ends of a connection: what it is known by. Both CIDs are always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host's side.
    pub host: u32,
    /// On the guest's side.
    pub guest: u32,
}

/// Directions in which an end of a connection will not use it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Done {
    /// It receives no more.
    pub receive: bool,
    /// It sends no more.
    pub send: bool,
}

impl Done {
    /// Both directions.
    pub const BOTH: Self = Self { receive: true, send: true };
    /// Receives no more.
    pub const RECEIVE: Self = Self { receive: true, send: false };
    /// Sends no more.
    pub const SEND: Self = Self { receive: false, send: true };

    /// This and that: a direction that was given up stays so.
    pub fn and(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// What a packet is for (§5.10.6, `op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Gives up directions of one.
    Shutdown(Done),
    /// Carries data.
    Data,
    /// Says how much may be sent.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16, flags: u32) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown(Done { receive: flags & SHUTDOWN_RECEIVE != 0, send: flags & SHUTDOWN_SEND != 0 }),
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> (u16, u32) {
        match self {
            Self::Request => (1, 0),
            Self::Response => (2, 0),
            Self::Reset => (3, 0),
            Self::Shutdown(done) => {
                let flag = |given_up: bool, flag| if given_up { flag } else { 0 };
                (4, flag(done.receive, SHUTDOWN_RECEIVE) | flag(done.send, SHUTDOWN_SEND))
            }
            Self::Data => (5, 0),
            Self::CreditUpdate => (6, 0),
            Self::CreditRequest => (7, 0),
        }
    }
}

/// What the sender of a packet can take (§5.10.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Credit {
    /// Bytes of its receive buffer.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

/// A packet from the guest to the host, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The connection.
    pub ports: Ports,
    /// `None` for a type or an operation that does not exist: it is answered with a reset.
    pub op: Option<Op>,
    /// Bytes of payload.
    pub length: u32,
    /// The guest's.
    pub credit: Credit,
}

impl Packet {
    /// Reads a header that the guest with `guest_cid` sent. `None` if it is not from that guest, or not to the
    /// host: such a packet goes nowhere (§5.10.6.1).
    pub fn parse(bytes: &[u8; HEADER_SIZE], guest_cid: u64) -> Option<Self> {
        let short = |at| u16::from_le_bytes(field(bytes, at));
        let word = |at| u32::from_le_bytes(field(bytes, at));
        let long = |at| u64::from_le_bytes(field(bytes, at));
        if (long(0), long(8)) != (guest_cid, HOST_CID) {
            return None;
        }
        let op = Op::from_wire(short(30), word(32)).filter(|_| short(28) == TYPE_STREAM);
        Some(Self {
            ports: Ports { guest: word(16), host: word(20) },
            op,
            length: word(24),
            credit: Credit { buf_alloc: word(36), fwd_cnt: word(40) },
        })
    }
}

/// The header of a packet from the host to the guest.
pub fn header(guest_cid: u64, ports: Ports, op: Op, length: u32, credit: Credit) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    let (op, flags) = op.to_wire();
    put(0, &HOST_CID.to_le_bytes());
    put(8, &guest_cid.to_le_bytes());
    put(16, &ports.host.to_le_bytes());
    put(20, &ports.guest.to_le_bytes());
    put(24, &length.to_le_bytes());
    put(28, &TYPE_STREAM.to_le_bytes());
    put(30, &op.to_le_bytes());
    put(32, &flags.to_le_bytes());
    put(36, &credit.buf_alloc.to_le_bytes());
    put(40, &credit.fwd_cnt.to_le_bytes());
    bytes
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[offset..offset + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports { host: 0x1122_3344, guest: 0x5566_7788 };
    const CREDIT: Credit = Credit { buf_alloc: 0x99aa_bbcc, fwd_cnt: 0xddee_ff01 };

    /// The same packet as if the guest had sent it.
    fn turned(mut bytes: [u8; HEADER_SIZE]) -> [u8; HEADER_SIZE] {
        let (ends, ports) = bytes.split_at_mut(16);
        let (host, guest) = ends.split_at_mut(8);
        host.swap_with_slice(guest);
        let (host, rest) = ports.split_at_mut(4);
        host.swap_with_slice(&mut rest[..4]);
        bytes
    }

    #[test]
    fn a_header_has_its_fields_where_the_specification_has_them() {
        let bytes = header(0x0102_0304_0506, PORTS, Op::Shutdown(Done::SEND), 9, CREDIT);
        let expected = [
            &[2, 0, 0, 0, 0, 0, 0, 0][..],
            &[6, 5, 4, 3, 2, 1, 0, 0],
            &[0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55, 9, 0, 0, 0, 1, 0, 4, 0, 2, 0, 0, 0],
            &[0xcc, 0xbb, 0xaa, 0x99, 0x01, 0xff, 0xee, 0xdd],
        ];
        assert_eq!(bytes[..], expected.concat());
    }

    #[test]
    fn every_operation_survives_the_wire() {
        let none = Done::default();
        let shutdowns = [none, Done::SEND, Done::RECEIVE, Done::BOTH].map(Op::Shutdown);
        let others = [Op::Request, Op::Response, Op::Reset, Op::Data, Op::CreditUpdate, Op::CreditRequest];
        for op in shutdowns.into_iter().chain(others) {
            let packet = Packet { ports: PORTS, op: Some(op), length: 7, credit: CREDIT };
            assert_eq!(Packet::parse(&turned(header(3, PORTS, op, 7, CREDIT)), 3), Some(packet));
        }
    }

    #[test]
    fn what_is_not_from_this_guest_to_the_host_is_nothing() {
        let bytes = turned(header(3, PORTS, Op::Data, 7, CREDIT));
        assert!(Packet::parse(&bytes, 3).is_some());
        assert_eq!(Packet::parse(&bytes, 4), None);
        for index in 0..16 {
            let mut bogus = bytes;
            bogus[index] ^= 0x80;
            assert_eq!(Packet::parse(&bogus, 3), None, "{index}");
        }
    }

    #[test]
    fn unknown_types_and_operations_are_told_from_known_ones() {
        let bytes = turned(header(3, PORTS, Op::Data, 7, CREDIT));
        for (offset, value) in [(28, 0), (28, 2), (29, 1), (30, 0), (30, 8), (31, 1)] {
            let mut bogus = bytes;
            bogus[offset] = value;
            let packet = Packet::parse(&bogus, 3).unwrap();
            assert_eq!((packet.op, packet.ports), (None, PORTS), "{offset} {value}");
        }
    }
}
