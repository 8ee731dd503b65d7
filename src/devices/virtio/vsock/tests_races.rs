//! A guest that changes a packet while the device looks at it.

use std::io::{ErrorKind, Read};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::testing::*;
use crate::devices::virtio::testing::readable;

/// Long enough for a header that is read twice to be found.
const TIME: Duration = Duration::from_secs(1);
/// In one byte each: what is copied need not be copied in words.
const LENGTHS: [u32; 2] = [8, 200];

/// A header is copied once: what is delivered and what is counted are what one of the guest's headers says.
#[test]
fn a_header_that_changes_meanwhile_is_one_or_the_other() {
    let rig = Rig::ready();
    let mut stream = rig.open_from_guest();
    rig.guest.select(TX).used();
    stream.set_nonblocking(true).unwrap();
    // A message begins with 255, and goes on with how far it is.
    let message: Vec<_> = (0..200u32).map(|at| if at == 0 { 255 } else { at as u8 }).collect();
    rig.place(&Fields::new(70, 1000, DATA), &message);
    // Length, type and operation.
    let word = |length: u32, op: u16| u64::from(length) | 1 << 32 | u64::from(op) << 48;
    let headers =
        [word(LENGTHS[0], DATA), word(LENGTHS[1], DATA), word(0, CREDIT_UPDATE), word(LENGTHS[1], CREDIT_UPDATE)];
    let (memory, start) = (rig.guest.memory.clone(), Instant::now());
    let mut delivered = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while start.elapsed() < TIME {
                for header in headers {
                    memory.store(header, GuestAddress(PACKET + 24), Ordering::Relaxed).unwrap();
                }
            }
        });
        while start.elapsed() < TIME {
            for _ in 0..4 {
                rig.offer(&[readable(PACKET, 44), readable(PAYLOAD, 200)]);
            }
            rig.guest.kick();
            assert_eq!(rig.guest.select(TX).used().len(), 4);
            let error = stream.read_to_end(&mut delivered).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            assert!(rig.ops().iter().all(|&op| op == CREDIT_UPDATE));
        }
    });
    let mut seen = [false; 2];
    for rest in delivered.split(|&byte| byte == 255).skip(1) {
        let length = LENGTHS.iter().position(|&length| length as usize == 1 + rest.len());
        assert!(length.is_some() && *rest == message[1..=rest.len()], "{} bytes", rest.len());
        seen[length.unwrap()] = true;
    }
    assert_eq!(seen, [true; 2], "neither length was met");
    rig.send(70, 1000, CREDIT_REQUEST);
    assert_eq!(rig.one().fwd_cnt, delivered.len() as u32);
    assert!(!rig.needs_reset() && rig.connections() == 1);
}
