//! Whatever a guest sends to the service, in whatever order.

use proptest::prelude::*;

use super::*;
use crate::generated::{change, changes, prop_oneof, properties};

/// What nearly is a request, or two.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let requests = [
        "GET http://h//a?b HTTP/1.1\r\nAccept: application/json\r\nX-metadata-token: a\r\nConnection: close\r\n\r\n",
        "PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 1\r\n\r\na",
    ];
    (prop::sample::select(requests.to_vec()), changes()).prop_map(|(request, changes)| {
        let mut bytes = request.repeat(2).into_bytes();
        change(&mut bytes, &changes);
        bytes
    })
}

properties! {
    /// Whatever a guest sends, valid or nearly so, ends nothing and is answered in whole frames; and
    /// afterwards the service still works.
    #[test]
    fn random_frames_break_nothing(
        frames in prop::collection::vec(
            (prop_oneof![Just(ACK), any::<u8>()], prop::collection::vec(any::<u8>(), 0..40),
             prop_oneof![request(), prop::collection::vec(any::<u8>(), 0..80)],
             prop_oneof![Just(None), (0usize..120, any::<u8>()).prop_map(Some)], 0u64..3_000, any::<u32>(), any::<bool>()),
            1..60,
        ),
    ) {
        let mut guest = Hand::new(endpoint(json!({"a": "one"})), 7);
        guest.connect(&[]);
        for (flags, options, payload, change, pause, sequence, in_order) in frames {
            guest.now += Duration::from_millis(pause);
            if !in_order {
                guest.sequence = sequence;
                guest.acknowledgement = guest.acknowledgement.wrapping_add(u32::from(flags));
            }
            let options = &options[..options.len() / 4 * 4];
            match change {
                None if in_order => guest.send(flags, &payload),
                None => guest.raw(flags, options, &payload),
                Some((at, value)) => {
                    let mut frame = [&MAC[..], &GUEST_MAC, &[8, 0, 0x45, 0, 0, 120, 0, 0, 0, 0, 64, 6, 0, 0]].concat();
                    frame.extend(GUEST.octets().iter().chain(&ADDRESS.octets()));
                    frame.extend([0x9c, 0x40, 0, 80].iter().chain(options).chain(&payload));
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = value;
                    }
                    guest.endpoint.receive(&mut frame, guest.now);
                }
            }
            for _ in 0..3 {
                if let Some(frame) = guest.frame() {
                    prop_assert!((42..=MAX_FRAME).contains(&frame.len()));
                }
            }
        }
        while guest.frame().is_some() {}
        guest.now += 2 * IDLE;
        while guest.frame().is_some() {}
        let mut again = Hand::new(guest.endpoint, 99);
        again.port = 39_999;
        again.now = guest.now;
        again.connect(&[]);
        prop_assert_eq!(again.get("/a"), "one");
    }

    /// No bytes at all break it.
    #[test]
    fn random_bytes_break_nothing(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..40)) {
        let mut guest = Hand::new(endpoint(json!({})), 7);
        for mut frame in frames {
            guest.endpoint.claims(&frame);
            guest.endpoint.receive(&mut frame, guest.now);
            guest.frame();
        }
    }
}
