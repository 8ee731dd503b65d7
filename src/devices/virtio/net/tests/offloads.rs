//! What the host leaves to the guest is what the guest said it can do.

use super::*;

const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GTSO: u32 = 0x1e;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_FEATURES: u32 = 4;

/// A command of ethtool(8) about the host's interface; the answer is in the same place.
fn ethtool(words: &mut [u32]) {
    // SAFETY: SIOCETHTOOL takes an ifreq whose data begins with the command and has room for the answer.
    unsafe {
        let socket = OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0));
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..4].copy_from_slice(&b"tap0".map(u8::cast_signed));
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        const SIOCETHTOOL: libc::Ioctl = 0x8946;
        assert_eq!(libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request), 0, "{}", io::Error::last_os_error());
    }
}

/// Whether the interface leaves something to the device.
fn host_feature(command: u32) -> bool {
    let mut value = [command, 0];
    ethtool(&mut value);
    value[1] != 0
}

/// Whether it leaves UDP segmentation to it, which has a name and no command.
fn host_leaves_uso() -> bool {
    let mut names = [0; 3 + 8 * 256];
    names[..2].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES]);
    ethtool(&mut names);
    let is_uso = |name: &[u32]| {
        let bytes: Vec<_> = name.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.starts_with(b"tx-udp-segmentation\0")
    };
    let Some(index) = names[3..].chunks(8).position(is_uso) else { return false };
    // For each 32 features: available, requested, active, never changed.
    let mut blocks = [0; 2 + 4 * 8];
    blocks[..2].copy_from_slice(&[ETHTOOL_GFEATURES, 8]);
    ethtool(&mut blocks);
    blocks[2 + index / 32 * 4 + 2] >> (index % 32) & 1 != 0
}

#[test]
fn the_offloads_of_the_tap_follow_what_the_guest_acknowledges() {
    let Some(cable) = Cable::new(all) else { return };
    let bits = |bits: &[u32]| VERSION_1 | bits.iter().fold(0, |all, bit| all | 1u64 << bit);
    let (csum, tso4, tso6, ufo) =
        (VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO);
    let (uso4, uso6) = (VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6);
    let has_uso = cable.host.tap.has_uso();
    for (features, checksum, tcp, udp) in [
        (bits(&[]), false, false, false),
        (bits(&[csum]), true, false, false),
        (bits(&[csum, tso4]), true, true, false),
        (bits(&[csum, tso4, tso6]), true, true, false),
        // The host takes it, and since Linux 4.14 has no use for it.
        (bits(&[csum, ufo]), true, false, false),
        // Not without checksums, and not half of USO: the TAP would refuse.
        (bits(&[tso4, tso6, ufo, uso4, uso6]), false, false, false),
        (bits(&[csum, uso4]), true, false, false),
        (bits(&[csum, uso4, uso6]), true, false, has_uso),
        (cable.guest.offered(), true, true, has_uso),
    ] {
        cable.guest.boot(features & cable.guest.offered());
        assert_eq!(cable.guest.status(), 0xf);
        let host = (host_feature(ETHTOOL_GTXCSUM), host_feature(ETHTOOL_GTSO), host_leaves_uso());
        assert_eq!(host, (checksum, tcp, udp), "{features:#x}");
    }
}

#[test]
fn a_guest_out_of_a_snapshot_has_the_offloads_that_it_acknowledged() {
    let Some(cable) = Cable::new(all) else { return };
    cable.guest.mmio.quiesce();
    let state = cable.guest.mmio.save();
    // A process that loads sets up the TAP anew.
    let tap = Tap::adopt(cable.host.tap.as_fd()).unwrap();
    assert!(!host_feature(ETHTOOL_GTXCSUM) && !host_feature(ETHTOOL_GTSO) && !host_leaves_uso());
    let net = Net::new(&config(), tap, Arc::default()).unwrap();
    let guest = Guest::new(Device::Net(Box::new(net)));
    guest.mmio.restore(&state).unwrap();
    guest.mmio.resume();
    assert_eq!(guest.status(), 0xf);
    assert!(host_feature(ETHTOOL_GTXCSUM) && host_feature(ETHTOOL_GTSO));
    assert_eq!(host_leaves_uso(), cable.host.tap.has_uso());
}
