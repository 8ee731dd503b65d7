//! Which Ethernet frames are the service's, read off their first bytes.

use std::net::Ipv4Addr;

/// The service's hardware address: locally administered, and nobody else's on the guest's link.
pub const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// The service's port.
pub const PORT: u16 = 80;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// VLAN tags (IEEE 802.1Q, 802.1ad and what came before).
const TAGS: [[u8; 2]; 3] = [[0x81, 0x00], [0x88, 0xa8], [0x91, 0x00]];
const PROTOCOL_TCP: u8 = 6;

/// The bytes at `at` of an Ethernet payload, after any VLAN tags, whose type is `ethertype`.
fn field<const N: usize>(frame: &[u8], ethertype: [u8; 2], at: usize) -> Option<[u8; N]> {
    let mut rest = frame.get(12..)?;
    while TAGS.iter().any(|tag| rest.starts_with(tag)) {
        rest = rest.get(4..)?;
    }
    let payload = rest.strip_prefix(&ethertype)?;
    payload.get(at..at + N)?.try_into().ok()
}

/// Whether a frame that begins like this is for the service at `address`, whatever is in it: sent
/// to its hardware address, to its IP address, or asking who has that.
pub fn is_for(address: Ipv4Addr, header: &[u8]) -> bool {
    header.starts_with(&MAC)
        || field(header, ETHERTYPE_IPV4, 16) == Some(address.octets())
        || field(header, ETHERTYPE_ARP, 24) == Some(address.octets())
}

/// Has a frame for one host be for the service: who reaches it through a gateway sends to the gateway.
pub fn readdress(frame: &mut [u8]) {
    if let Some(to) = frame.first_chunk_mut::<6>()
        && to[0] & 1 == 0
    {
        *to = MAC;
    }
}

/// The ARP reply with which the sender of an IPv4 frame would say where it is.
pub fn introduction(frame: &[u8]) -> Option<Vec<u8>> {
    let sender = frame.get(6..12)?;
    let [source, destination]: [[u8; 4]; 2] = [field(frame, ETHERTYPE_IPV4, 12)?, field(frame, ETHERTYPE_IPV4, 16)?];
    let head = [&MAC, sender, &ETHERTYPE_ARP, &[0, 1, 8, 0, 6, 4, 0, 2]].concat();
    Some([&head, sender, &source, &MAC, &destination].concat())
}

/// Whether an IPv4 frame is part of a fragmented datagram (RFC 791).
pub fn is_fragment(frame: &[u8]) -> bool {
    field(frame, ETHERTYPE_IPV4, 6).is_some_and(|flags| u16::from_be_bytes(flags) & 0x3fff != 0)
}

/// Whether a frame opens a connection to the service's port.
pub fn is_syn(frame: &[u8]) -> bool {
    let header = |at| field::<1>(frame, ETHERTYPE_IPV4, at).map(|[byte]| byte);
    let (Some(length), Some(PROTOCOL_TCP)) = (header(0), header(9)) else { return false };
    let tcp = usize::from(length & 0xf) * 4;
    field(frame, ETHERTYPE_IPV4, tcp + 2) == Some(PORT.to_be_bytes())
        && header(tcp + 13).is_some_and(|flags| flags & 0x12 == 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    fn frame(mac: [u8; 6], tags: &[u8], ethertype: [u8; 2], at: usize, address: [u8; 4]) -> Vec<u8> {
        let mut frame = [&mac[..], &[2; 6], tags, &ethertype, &[0; 28]].concat();
        let start = 14 + tags.len() + at;
        frame[start..start + 4].copy_from_slice(&address);
        frame
    }

    #[test]
    fn whatever_is_for_the_address_is_claimed_in_every_form() {
        let (ours, other) = (ADDRESS.octets(), [10, 0, 0, 1]);
        let broadcast = [0xff; 6];
        for (frame, claimed) in [
            (frame(broadcast, &[], ETHERTYPE_ARP, 24, ours), true),
            (frame(broadcast, &[], ETHERTYPE_ARP, 24, other), false),
            (frame(broadcast, &[], ETHERTYPE_IPV4, 16, ours), true),
            (frame([2; 6], &[], ETHERTYPE_IPV4, 16, other), false),
            // From it, not to it.
            (frame([2; 6], &[], ETHERTYPE_IPV4, 12, ours), false),
            // By its hardware address, whatever else.
            (frame(MAC, &[], ETHERTYPE_IPV4, 16, other), true),
            (frame(MAC, &[], [0x86, 0xdd], 16, other), true),
            // Behind tags.
            (frame([2; 6], &[0x81, 0, 0, 7], ETHERTYPE_IPV4, 16, ours), true),
            (frame(broadcast, &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8], ETHERTYPE_ARP, 24, ours), true),
            (frame([2; 6], &[0x81, 0, 0, 7], ETHERTYPE_IPV4, 16, other), false),
        ] {
            assert_eq!(is_for(ADDRESS, &frame), claimed, "{frame:x?}");
        }
        let whole = frame([2; 6], &[], ETHERTYPE_IPV4, 16, ours);
        for end in 0..34 {
            assert!(!is_for(ADDRESS, &whole[..end]), "a frame without an address is for nobody");
        }
    }

    #[test]
    fn fragments_and_opening_segments_are_told_apart() {
        let mut syn = [&MAC[..], &[2; 6], &ETHERTYPE_IPV4, &[0; 60]].concat();
        (syn[14], syn[23]) = (0x46, PROTOCOL_TCP);
        syn[14 + 24 + 3] = 80;
        for (flags, opens) in [(0x02, true), (0xc2, true), (0x12, false), (0x10, false), (0x04, false)] {
            syn[14 + 24 + 13] = flags;
            assert_eq!(is_syn(&syn), opens, "{flags:#x}");
        }
        syn[14 + 24 + 13] = 2;
        for end in 0..52 {
            assert!(!is_syn(&syn[..end]));
        }
        for (bytes, fragment) in [([0x40, 0], false), ([0x20, 0], true), ([0, 1], true), ([0x1f, 0xff], true)] {
            syn[20..22].copy_from_slice(&bytes);
            assert_eq!(is_fragment(&syn), fragment);
        }
    }
}
