//! Stories of guests, good and bad, and host processes.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::connection::BUF_ALLOC;
use super::testing::*;
use crate::devices::virtio::testing::{HIGH_RAM, HIGH_RAM_START, LOW_RAM, readable, writable};

#[test]
fn the_configuration_space_is_the_cid() {
    let rig = Rig::new();
    let space: Vec<u32> = (0x100..0x110).step_by(4).map(|register| rig.guest.read(register)).collect();
    assert_eq!(space, [CID as u32, 0, 0, 0]);
}

#[test]
fn a_host_process_connects_and_both_sides_talk() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    stream.write_all(b"ping").unwrap();
    let packet = rig.one();
    assert_eq!((packet.op, packet.host_port, packet.guest_port, &packet.data[..]), (DATA, port, 52, &b"ping"[..]));
    rig.send_data(port, 52, b"pong\n");
    assert_eq!(read_line(&mut stream), "pong");
}

#[test]
fn the_guest_connects_and_both_sides_talk() {
    let rig = Rig::ready();
    let mut stream = rig.open_from_guest();
    rig.send_data(70, 1000, b"ping\n");
    assert_eq!(read_line(&mut stream), "ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(rig.data(), b"pong");
}

#[test]
fn who_is_not_listened_for_is_refused() {
    let rig = Rig::ready();
    rig.send(71, 1000, REQUEST);
    let packet = rig.one();
    assert_eq!((packet.op, packet.host_port, packet.guest_port), (RESET, 71, 1000));

    let mut stream = rig.dial("CONNECT 53\n");
    let port = rig.one().host_port;
    rig.send(port, 53, RESET);
    assert_eq!(rest(&mut stream), b"", "closed without a word");
    assert_eq!(rig.ops(), [0; 0]);
}

#[test]
fn a_guest_that_asks_for_a_socket_whose_backlog_is_full_is_refused_until_somebody_accepts() {
    let rig = Rig::ready();
    let listener = rig.listen(70);
    // SAFETY: the descriptor is open.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let ask = |guest_port| {
        rig.send(70, guest_port, REQUEST);
        rig.one().op
    };
    assert_eq!((ask(1000), ask(1001), ask(1002)), (RESPONSE, RESET, RESET));
    let _accepted = listener.accept().unwrap();
    assert_eq!((ask(1001), rig.connections()), (RESPONSE, 2));
}

#[test]
fn data_comes_with_the_line_that_asks_and_waits_for_the_answer() {
    let rig = Rig::ready();
    let mut stream = rig.dial("CONNECT 52\nearly");
    let port = rig.one().host_port;
    assert_eq!(rig.ops(), [0; 0]);
    rig.send(port, 52, RESPONSE);
    assert_eq!(rig.data(), b"early");
    assert_eq!(read_line(&mut stream), format!("OK {port}"));
}

#[test]
fn the_end_comes_with_the_line_that_asks_too() {
    let rig = Rig::ready();
    let mut stream = UnixStream::connect(rig.path()).unwrap();
    stream.write_all(b"CONNECT 52\nquestion").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    rig.run();
    let port = rig.one().host_port;
    rig.send(port, 52, RESPONSE);
    let seen = rig.seen();
    assert_eq!(seen.iter().map(|packet| (packet.op, packet.flags)).collect::<Vec<_>>(), [(DATA, 0), (SHUTDOWN, 2)]);
    assert_eq!(read_line(&mut stream), format!("OK {port}"));
}

#[test]
fn a_large_message_fills_many_buffers_in_order() {
    let rig = Rig::ready();
    let (mut stream, _) = rig.open_from_host();
    let data: Vec<u8> = (0..40_000u32).map(|i| (i / 7) as u8).collect();
    stream.write_all(&data).unwrap();
    assert!(rig.data() == data);
    // It knows by now that there is much at a time.
    stream.write_all(&data[..20_000]).unwrap();
    assert!(rig.data() == data[..20_000]);
}

#[test]
fn a_packet_may_lie_in_any_number_of_descriptors() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    let fields = Fields { length: 9, ..Fields::new(port, 52, DATA) };
    rig.place(&fields, b"fragments and more");
    let mut chain: Vec<_> = (0..4).map(|part| readable(PACKET + 11 * part, 11)).collect();
    chain.extend((0..9).map(|byte| readable(PAYLOAD + byte, 1)));
    chain.push(readable(PAYLOAD, 3));
    rig.offer(&chain);
    rig.guest.kick();
    stream.shutdown(Shutdown::Write).unwrap();
    rig.send_shutdown(port, 52, 3);
    assert_eq!(rest(&mut stream), b"fragments", "as long as the header says");
    assert!(!rig.needs_reset());
}

#[test]
fn each_side_may_finish_first() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let seen = rig.seen();
    assert_eq!(seen.iter().map(|packet| (packet.op, packet.flags)).collect::<Vec<_>>(), [(DATA, 0), (SHUTDOWN, 2)]);
    rig.send_data(port, 52, b"answer");
    rig.send_shutdown(port, 52, 3);
    assert_eq!(rest(&mut stream), b"answer");
    assert_eq!(rig.ops(), [RESET]);

    let (mut stream, port) = rig.open_from_host();
    rig.send_data(port, 52, b"question");
    rig.send_shutdown(port, 52, 2);
    assert_eq!(rest(&mut stream), b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(rig.data(), b"answer");
    drop(stream);
    let packet = rig.one();
    assert_eq!((packet.op, packet.flags), (SHUTDOWN, 3));
    rig.send(port, 52, RESET);
    assert_eq!(rig.ops(), [0; 0]);
}

#[test]
fn a_guest_that_receives_no_more_is_not_written_to() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    rig.send_shutdown(port, 52, 1);
    assert_eq!(stream.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    rig.send_data(port, 52, b"still sends\n");
    assert_eq!(read_line(&mut stream), "still sends");
    drop(stream);
    assert_eq!(rig.one().flags, 3);
}

#[test]
fn a_host_process_that_leaves_takes_its_descriptor_along() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    let seen = rig.seen();
    assert_eq!(seen.iter().map(|packet| (packet.op, packet.flags)).collect::<Vec<_>>(), [(DATA, 0), (SHUTDOWN, 3)]);
    // What the guest sent meanwhile goes nowhere, and does it no harm.
    for _ in 0..10 {
        rig.send_data(port, 52, &[0; 1000]);
    }
    assert_eq!(rig.ops(), [0; 0]);
    rig.send_shutdown(port, 52, 3);
    assert_eq!(rig.ops(), [RESET]);
}

#[test]
fn a_host_process_that_does_not_read_is_buffered_for_up_to_the_credit() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    let chunk = [7; 4096];
    let mut announced = 0;
    let mut sent = 0u32;
    // The guest goes on for as long as it has credit.
    while sent - announced + 4096 <= BUF_ALLOC {
        rig.send_data(port, 52, &chunk);
        sent += 4096;
        announced = rig.seen().last().map_or(announced, |packet| packet.fwd_cnt);
    }
    // It may not: the device ends what would grow without bound.
    let metrics = crate::metrics::METRICS.vsock.conns_killed.get();
    let mut received = vec![0; 4096];
    std::io::Read::read_exact(&mut stream, &mut received).unwrap();
    rig.send_data(port, 52, &chunk);
    assert_eq!(rig.ops(), [RESET]);
    assert!(crate::metrics::METRICS.vsock.conns_killed.get() > metrics);
    assert!(rest(&mut stream).len() < sent as usize);
}

#[test]
fn a_backlog_goes_out_as_the_host_process_reads_and_then_the_end() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    let (mut sent, mut announced) = (0u32, 0);
    while sent - announced + 4096 <= BUF_ALLOC {
        rig.send_data(port, 52, &vec![(sent / 4096) as u8; 4096]);
        sent += 4096;
        announced = rig.seen().last().map_or(announced, |packet| packet.fwd_cnt);
    }
    rig.send_shutdown(port, 52, 3);
    assert_eq!(rig.ops(), [0; 0], "there is something left to hand on");
    let mut received = Vec::new();
    let mut part = [0; 30_000];
    loop {
        match std::io::Read::read(&mut stream, &mut part).unwrap() {
            0 => break,
            count => received.extend_from_slice(&part[..count]),
        }
        rig.run();
    }
    assert_eq!(received.len(), sent as usize);
    assert!(received.chunks(4096).enumerate().all(|(i, chunk)| chunk.iter().all(|&byte| byte == i as u8)));
    assert_eq!(rig.ops(), [RESET]);
}

#[test]
fn a_guest_without_buffers_costs_nothing_and_loses_nothing() {
    let rig = Rig::new();
    let mut streams: Vec<_> = (0..20).map(|_| rig.dial("CONNECT 52\n")).collect();
    assert_eq!(rig.guest.turn(Duration::from_millis(50)), 0, "nobody spins");
    rig.post(1);
    assert_eq!(rig.guest.turn(Duration::from_millis(50)), 0, "nobody spins");
    rig.post(15);
    let requests = rig.seen();
    assert_eq!(requests.len(), 20);
    for (request, stream) in requests.iter().zip(&mut streams) {
        rig.send(request.host_port, 52, RESPONSE);
        assert_eq!(read_line(stream), format!("OK {}", request.host_port));
    }
}

#[test]
fn a_guest_without_credit_is_asked_once_and_then_waited_for() {
    let rig = Rig::ready();
    let mut stream = rig.dial("CONNECT 52\n0123456789");
    let port = rig.one().host_port;
    let credit = |buf_alloc, fwd_cnt, op| Fields { buf_alloc, fwd_cnt, ..Fields::new(port, 52, op) };
    rig.send_fields(&credit(4, 0, RESPONSE), b"");
    let seen = rig.seen();
    assert_eq!((seen[0].op, &seen[0].data[..]), (DATA, &b"0123"[..]));
    assert_eq!((seen[1].op, seen.len()), (CREDIT_REQUEST, 2));
    stream.write_all(b"!").unwrap();
    assert_eq!(rig.ops(), [0; 0]);
    rig.send_fields(&credit(4, 4, CREDIT_UPDATE), b"");
    assert_eq!(rig.seen()[0].data, b"4567");
    rig.send_fields(&credit(100, 8, CREDIT_UPDATE), b"");
    assert_eq!(rig.data(), b"89!");
    rig.send(port, 52, CREDIT_REQUEST);
    assert_eq!(rig.ops(), [CREDIT_UPDATE]);
}

#[test]
fn one_interrupt_tells_of_a_batch_in_both_queues() {
    let rig = Rig::ready();
    let (mut stream, port) = rig.open_from_host();
    rig.settle();
    let fields = Fields { length: 1, ..Fields::new(port, 52, DATA) };
    let chain = rig.place(&fields, b"x");
    for _ in 0..3 {
        rig.offer(&chain);
    }
    rig.send_fields(&Fields::new(port, 52, CREDIT_REQUEST), b"");
    assert_eq!(rig.interrupts(), 1, "for the answer, and what was taken by the way");
    assert_eq!(rig.guest.turn(Duration::from_millis(50)), 0, "and nothing is left to tell");
    rig.settle();
    stream.write_all(&[0; 5000]).unwrap();
    rig.run();
    assert_eq!(rig.interrupts(), 1);
    assert_eq!(rig.ops(), [DATA; 5]);
}

#[test]
fn that_packets_were_taken_is_told_soon_or_when_they_are_many() {
    let rig = Rig::ready();
    let (_stream, port) = rig.open_from_host();
    rig.settle();
    rig.send_data(port, 52, b"x");
    assert_eq!(rig.interrupts(), 0);
    assert_eq!(rig.guest.turn(Duration::from_secs(10)), 1);
    assert_eq!(rig.interrupts(), 1);
    assert_eq!(rig.guest.turn(Duration::from_millis(50)), 0, "once");
    rig.settle();
    // What is told by the way is not told again, but what came after that is.
    rig.send(port, 52, CREDIT_REQUEST);
    rig.send_data(port, 52, b"x");
    rig.send(port, 52, CREDIT_REQUEST);
    rig.await_interrupt();
    rig.send_data(port, 52, b"x");
    assert_eq!(rig.interrupts(), 0);
    while rig.guest.turn(Duration::from_millis(50)) > 0 {}
    assert_eq!(rig.interrupts(), 1);
    rig.settle();
    let chain = rig.place(&Fields::new(port, 52, CREDIT_UPDATE), b"");
    for _ in 0..4 {
        rig.offer(&chain[..1]);
    }
    rig.guest.kick();
    assert_eq!(rig.interrupts(), 1, "a quarter of the queue");
}

/// A guest that answers, after it has given credit for what it read.
struct Polite {
    rig: Rig,
    host: UnixStream,
    port: u32,
    /// Packets it has sent, and questions it was asked.
    sent: u16,
    asked: u32,
}

impl Polite {
    fn new() -> Self {
        let rig = Rig::ready();
        let (host, port) = rig.open_from_host();
        Self { rig, host, port, sent: 1, asked: 0 }
    }

    /// The host asks. Whether the guest is to notify of its next packet.
    fn ask(&mut self) -> bool {
        self.host.write_all(b"ask").unwrap();
        self.asked += 1;
        self.rig.run();
        let event = self.rig.guest.select(TX).available_event();
        assert!(event == self.sent || event == self.sent + 1, "{event}");
        event == self.sent
    }

    /// The guest gives credit, and notifies of that if it is to, and answers.
    fn answer(&mut self, notify: bool) {
        self.rig.guest.put(CREDIT, &Fields::new(self.port, 52, CREDIT_UPDATE).bytes());
        self.rig.offer(&[readable(CREDIT, 44)]);
        if notify {
            self.rig.guest.kick();
        }
        self.rig.send_data(self.port, 52, b"answer");
        self.sent += 2;
        self.expect_answer();
    }

    fn expect_answer(&mut self) {
        let mut answer = [0; 6];
        self.host.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        self.rig.seen();
    }

    /// Asks and answers until the guest is not to notify of its next packet. On a busy host it is soon to notify again.
    fn until_held_back(&mut self) {
        for _ in 0..1000 {
            let notify = self.ask();
            if !notify {
                return;
            }
            self.answer(notify);
        }
        panic!("it always has to notify of its next packet");
    }
}

/// Where it has its packet of credit.
const CREDIT: u64 = PACKET + 0x800;

#[test]
fn a_guest_that_gives_credit_before_it_answers_is_to_notify_of_both_at_once() {
    let mut guest = Polite::new();
    for _ in 0..4 {
        let notify = guest.ask();
        assert!(notify, "nothing is known of it yet");
        guest.answer(notify);
    }
    for _ in 0..5 {
        guest.until_held_back();
        guest.answer(false);
    }
}

#[test]
fn a_packet_that_was_not_to_be_notified_of_is_found_soon_and_the_next_one_is_notified_of() {
    let mut guest = Polite::new();
    guest.until_held_back();
    let chain = guest.rig.place(&Fields { length: 6, ..Fields::new(guest.port, 52, DATA) }, b"answer");
    guest.rig.offer(&chain);
    guest.sent += 1;
    assert_eq!(guest.rig.guest.turn(Duration::from_secs(10)), 1);
    guest.expect_answer();
    assert!(guest.ask(), "it answered without giving credit");
}

#[test]
fn a_guest_that_does_not_answer_is_not_looked_at_again_and_again() {
    let mut guest = Polite::new();
    guest.until_held_back();
    let looks = (0..10).take_while(|_| guest.rig.guest.turn(Duration::from_millis(50)) > 0).count();
    assert!((1..=2).contains(&looks), "{looks}");
    assert_eq!(guest.rig.guest.select(TX).available_event(), guest.sent);
}

#[test]
fn a_guest_whose_credit_somebody_may_wait_for_is_to_notify_of_it() {
    let mut guest = Polite::new();
    guest.until_held_back();
    guest.answer(false);
    // It can take the first byte of what comes next.
    let exhausted = Fields { buf_alloc: 3 * guest.asked + 1, ..Fields::new(guest.port, 52, CREDIT_UPDATE) };
    guest.rig.send_fields(&exhausted, b"");
    guest.sent += 1;
    assert!(guest.ask());
    guest.answer(true);
    guest.until_held_back();
    guest.answer(false);
    // There is another connection.
    let (_other, port) = guest.rig.open_from_host();
    assert_ne!(port, guest.port);
    guest.sent += 1;
    for _ in 0..20 {
        assert!(guest.ask());
        guest.answer(true);
    }
}

#[test]
fn packets_that_go_nowhere_are_dropped_and_strange_ones_reset() {
    let rig = Rig::ready();
    let good = Fields::new(70, 1000, DATA);
    for bogus in [
        Fields { source: 4, ..good },
        Fields { source: CID | 1 << 40, ..good },
        Fields { destination: 0, ..good },
        Fields { destination: 1, ..good },
        Fields { destination: CID, ..good },
        Fields { destination: u64::MAX, ..good },
        Fields { op: RESET, ..good },
    ] {
        rig.send_fields(&bogus, b"");
        assert_eq!(rig.ops(), [0; 0], "{bogus:?}");
    }
    for strange in [
        good,
        Fields { kind: 0, ..good },
        Fields { kind: 2, op: REQUEST, ..good },
        Fields { op: 0, ..good },
        Fields { op: 8, ..good },
        Fields { op: u16::MAX, ..good },
        Fields { op: RESPONSE, ..good },
        Fields { op: SHUTDOWN, ..good },
        Fields { op: CREDIT_REQUEST, ..good },
    ] {
        rig.send_fields(&strange, b"");
        let packet = rig.one();
        assert_eq!((packet.op, packet.host_port, packet.guest_port), (RESET, 70, 1000), "{strange:?}");
    }
    assert!(!rig.needs_reset());
}

#[test]
fn a_strange_packet_ends_its_connection_only() {
    let rig = Rig::ready();
    let mut good = rig.open_from_guest();
    let (mut bad, port) = rig.open_from_host();
    rig.send_fields(&Fields { op: 99, ..Fields::new(port, 52, DATA) }, b"");
    assert_eq!(rig.ops(), [RESET]);
    assert_eq!(rest(&mut bad), b"");
    rig.send_data(70, 1000, b"fine\n");
    assert_eq!(read_line(&mut good), "fine");
}

#[test]
fn a_packet_without_header_or_with_less_than_it_says_breaks_the_device() {
    let packet = |length| Fields { length, ..Fields::new(70, 1000, DATA) };
    for (fields, chain) in [
        (packet(0), vec![readable(PACKET, 43)]),
        (packet(0), vec![writable(PACKET, 44)]),
        (packet(6), vec![readable(PACKET, 44), readable(PAYLOAD, 5)]),
        (packet(u32::MAX), vec![readable(PACKET, 44), readable(PAYLOAD, 5)]),
    ] {
        let rig = Rig::ready();
        let mut stream = rig.open_from_guest();
        rig.place(&fields, b"fives");
        rig.offer(&chain);
        rig.guest.kick();
        assert!(rig.needs_reset());
        assert_eq!(rest(&mut stream), b"", "its connections are gone");
        rig.boot();
        rig.post(16);
        let (mut stream, _) = rig.open_from_host();
        stream.write_all(b"a reset mends it").unwrap();
        assert_eq!(rig.data(), b"a reset mends it");
    }
}

#[test]
fn a_buffer_outside_of_ram_breaks_the_device_in_either_queue() {
    for (address, length) in [
        (LOW_RAM, 44),
        (LOW_RAM - 43, 44),
        (u64::MAX - 10, 44),
        (HIGH_RAM_START + HIGH_RAM, 100),
        (HIGH_RAM_START + HIGH_RAM - 99, 100),
        (PACKET, u32::MAX),
    ] {
        for (queue, flags) in [(TX, 0), (RX, 2)] {
            let rig = Rig::new();
            rig.guest.select(queue).descriptor(0, address, length, flags, 0);
            rig.guest.select(queue).offer(0);
            let _stream = rig.dial("CONNECT 52\n");
            rig.guest.kick();
            assert!(rig.needs_reset(), "queue {queue}: {length} bytes at {address:#x}");
        }
    }
}

#[test]
fn a_buffer_that_could_not_hold_a_packet_breaks_the_device() {
    for length in [0, 1, 43, 44] {
        let rig = Rig::new();
        rig.guest.select(RX).descriptor(0, POSTED, length, 2, 0);
        rig.guest.select(RX).offer(0);
        let _stream = rig.dial("CONNECT 52\n");
        rig.guest.kick();
        assert!(rig.needs_reset(), "{length} bytes");
    }
}

#[test]
fn a_storm_of_packets_for_nobody_is_held_back_until_the_guest_takes_the_resets() {
    let rig = Rig::new();
    let chain = rig.place(&Fields::new(70, 1000, DATA), b"");
    let mut taken = 0;
    for _ in 0..100 {
        for _ in 0..16 {
            rig.offer(&chain[..1]);
        }
        rig.guest.kick();
        let used = rig.guest.select(TX).used().len();
        taken += used;
        if used < 16 {
            break;
        }
    }
    assert_eq!(taken, 64, "as many as are remembered");
    assert_eq!(rig.guest.turn(Duration::from_millis(50)), 0, "nobody spins");
    let mut resets = 0;
    rig.post(16);
    while resets < 80 {
        let seen = rig.ops();
        assert!(!seen.is_empty() && seen.iter().all(|&op| op == RESET), "{seen:?} after {resets}");
        resets += seen.len();
    }
    assert_eq!(resets, 80);
}

#[test]
fn requests_and_resets_without_end_leave_nothing_behind() {
    let rig = Rig::new();
    let listener = rig.listen(70);
    for round in 0..2000 {
        rig.send(70, 1000, REQUEST);
        drop(listener.accept().unwrap());
        rig.send(70, 1000, RESET);
        assert_eq!(rig.guest.select(TX).used().len(), 2, "round {round}");
    }
    rig.post(16);
    assert_eq!(rig.ops(), [0; 0], "nothing is owed for what is gone");
}

#[test]
fn a_reset_of_the_device_closes_every_connection() {
    let rig = Rig::ready();
    let (mut first, _) = rig.open_from_host();
    let mut second = rig.open_from_guest();
    let _greeting = rig.dial("CONN");
    let mmio = std::sync::Arc::clone(&rig.guest.mmio);
    let vcpu = std::thread::spawn(move || mmio.write(0x70, &0u32.to_le_bytes()));
    while !vcpu.is_finished() {
        rig.guest.turn(Duration::from_millis(10));
    }
    assert_eq!((rest(&mut first), rest(&mut second)), (vec![], vec![]));
    assert_eq!(rig.guest.status(), 0);
    rig.boot();
    rig.post(16);
    rig.open_from_host();
}

/// A device whose process has no descriptor left is one on a thread that may not accept.
#[test]
fn who_could_not_be_accepted_is_later_though_nothing_else_happens() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
    let rig = Rig::ready();
    let filter = SeccompFilter::new(
        [(libc::SYS_accept4, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EMFILE as u32),
        TargetArch::x86_64,
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    let without = std::thread::spawn(move || {
        apply_filter(&filter).unwrap();
        let stream = rig.dial("CONNECT 52\n");
        (rig, stream)
    });
    let (rig, _stream) = without.join().unwrap();
    assert_eq!(rig.connections(), 0);
    assert_eq!(rig.guest.turn(Duration::from_secs(60)), 1, "the timer");
    assert_eq!(rig.ops(), [REQUEST]);
}

/// Closes a connection for good: a child that another test forks at this moment still has its descriptor.
fn hang_up(stream: std::os::unix::net::UnixStream) {
    stream.shutdown(std::net::Shutdown::Both).unwrap();
}

#[test]
fn a_thousand_connections_a_hundred_times_leave_nothing_behind() {
    let rig = Rig::ready();
    // Both ends of each are in this process.
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for reading and writing.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max.min(1 << 14);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    let mut ports = std::collections::HashSet::new();
    for round in 0..100 {
        let connections: Vec<_> = (0..1000).map(|_| rig.open_from_host()).collect();
        assert!(connections.iter().all(|(_, port)| ports.insert(*port)), "no port is used again so soon");
        if round == 0 {
            let more: Vec<_> = (0..23).map(|_| rig.open_from_host()).collect();
            let mut refused = std::os::unix::net::UnixStream::connect(rig.path()).unwrap();
            rig.run();
            assert_eq!(rest(&mut refused), b"", "one too many");
            let _listener = rig.listen(70);
            rig.send(70, 1000, REQUEST);
            assert_eq!(rig.ops(), [RESET], "one too many from the guest as well");
            for (stream, port) in more {
                hang_up(stream);
                assert_eq!(rig.one().op, SHUTDOWN);
                rig.send(port, 52, RESET);
            }
        }
        for (index, (stream, port)) in connections.into_iter().enumerate() {
            // Either side may be the first to close.
            if index % 2 == 0 {
                hang_up(stream);
                assert_eq!(rig.one().op, SHUTDOWN);
                rig.send(port, 52, RESET);
            } else {
                rig.send_shutdown(port, 52, 3);
                assert_eq!(rig.one().op, RESET);
            }
        }
        assert_eq!(rig.connections(), 0);
    }
}

#[test]
fn a_guest_out_of_a_snapshot_meets_no_port_of_its_past() {
    let rig = Rig::ready();
    rig.guest.mmio.restore(&rig.guest.mmio.save()).unwrap();
    rig.guest.mmio.resume();
    // It is told of the reset, and reads that.
    for _ in 0..2 {
        rig.guest.select(EVENT).offer(rig.guest.chain(&[writable(HIGH_RAM_START, 4)]));
        rig.guest.kick();
        rig.settle();
    }
    assert_ne!(rig.open_from_host().1, 1 << 30);
}

#[test]
fn a_guest_out_of_a_snapshot_hears_that_its_connections_are_gone_before_anything_else() {
    const NEWS: u64 = HIGH_RAM_START;
    let rig = Rig::ready();
    let (mut old, port) = rig.open_from_host();
    rig.guest.select(TX).used();
    rig.guest.mmio.quiesce();
    // Sent, and not looked at before it is saved.
    rig.send_data(port, 52, b"too late");
    let state = rig.guest.mmio.save();
    assert_eq!(rig.guest.select(TX).used(), []);
    rig.guest.mmio.restore(&state).unwrap();
    assert_eq!(rest(&mut old), b"", "nobody is there to whom it could go");
    rig.guest.mmio.resume();
    assert_eq!(rig.guest.select(TX).used().len(), 1, "the guest has its buffer back all the same");

    let offer = || {
        rig.guest.put(NEWS, &[0xff; 4]);
        rig.guest.select(EVENT).offer(rig.guest.chain(&[writable(NEWS, 4)]));
        rig.guest.kick();
    };
    let _new = rig.dial("CONNECT 52\n");
    assert_eq!(rig.ops(), [0; 0], "there is no room for the news");
    offer();
    assert_eq!((rig.guest.select(EVENT).used().len(), rig.guest.get(NEWS, 4)), (1, vec![0; 4]));
    assert_eq!(rig.ops(), [0; 0], "the news is there and was not read yet");
    offer();
    let seen = rig.seen();
    let seen: Vec<_> = seen.iter().map(|packet| (packet.op, packet.host_port == port)).collect();
    assert_eq!(seen, [(RESET, true), (REQUEST, false)]);
}
