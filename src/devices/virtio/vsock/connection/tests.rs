//! Every state and every operation, then whatever order of them.

use proptest::prelude::*;

use super::*;
use crate::generated::{prop_oneof, properties};

const PORTS: Ports = Ports { host: 1 << 30, guest: 52 };
const ROOM: Credit = Credit { buf_alloc: 1000, fwd_cnt: 0 };

fn packet(op: Op) -> Packet {
    Packet { ports: PORTS, op: Some(op), length: 0, credit: ROOM }
}

fn data(length: u32) -> Packet {
    Packet { length, ..packet(Op::Data) }
}

fn asking() -> Connection {
    Connection::from_host(PORTS)
}

fn asked() -> Connection {
    let mut connection = asking();
    assert_eq!(connection.take_owed(), Some(Op::Request));
    connection
}

fn open() -> Connection {
    let mut connection = Connection::from_guest(&packet(Op::Request));
    assert_eq!(connection.take_owed(), Some(Op::Response));
    connection
}

fn half_closed(done: Done) -> Connection {
    let mut connection = open();
    assert_eq!(connection.on_packet(&packet(Op::Shutdown(done))), Verdict::Nothing);
    connection
}

/// The guest has closed, and the host peer has not taken all of what it sent.
fn draining() -> Connection {
    let mut connection = open();
    assert_eq!(connection.on_packet(&data(10)), Verdict::Deliver);
    assert_eq!(connection.on_packet(&packet(Op::Shutdown(Done::BOTH))), Verdict::Nothing);
    connection
}

fn over() -> Connection {
    let mut connection = open();
    connection.abort();
    connection
}

fn gone() -> Connection {
    let mut connection = open();
    connection.on_packet(&packet(Op::Reset));
    connection
}

#[test]
fn every_operation_in_every_state_means_what_it_should() {
    use Verdict::{Accepted, Breach, Deliver, Ended, Nothing};
    let shutdown = Op::Shutdown(Done::BOTH);
    let ops = [Op::Request, Op::Response, Op::Reset, shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest].map(Some);
    let states: [(&str, Connection, [Verdict; 8]); 9] = [
        ("asking", asking(), [Breach, Breach, Ended, Breach, Breach, Nothing, Breach, Breach]),
        ("asked", asked(), [Breach, Accepted, Ended, Breach, Breach, Nothing, Breach, Breach]),
        ("open", open(), [Breach, Breach, Ended, Ended, Deliver, Nothing, Nothing, Breach]),
        ("sends no more", half_closed(Done::SEND), [Breach, Breach, Ended, Ended, Breach, Nothing, Nothing, Breach]),
        (
            "receives no more",
            half_closed(Done::RECEIVE),
            [Breach, Breach, Ended, Ended, Deliver, Nothing, Nothing, Breach],
        ),
        ("draining", draining(), [Breach, Breach, Ended, Nothing, Breach, Nothing, Nothing, Breach]),
        ("over", over(), [Nothing; 8]),
        ("gone", gone(), [Nothing; 8]),
        (
            "host is done",
            {
                let mut connection = open();
                connection.on_host_done(Done::BOTH);
                connection
            },
            [Breach, Breach, Ended, Ended, Nothing, Nothing, Nothing, Breach],
        ),
    ];
    for (name, state, verdicts) in states {
        for (op, expected) in ops.into_iter().chain([None]).zip(verdicts) {
            let mut connection = state.clone();
            let verdict = connection.on_packet(&Packet { op, length: 5, ..packet(Op::Data) });
            assert_eq!(verdict, expected, "{name}: {op:?}");
            assert_eq!(connection.is_over(), matches!(verdict, Ended | Breach) || state.is_over(), "{name}: {op:?}");
            assert_eq!(connection.is_gone(), op == Some(Op::Reset) || state.is_gone(), "{name}: {op:?}");
            if verdict == Breach {
                assert_eq!((connection.take_owed(), connection.is_gone()), (Some(Op::Reset), true), "{name}: {op:?}");
            }
        }
    }
}

#[test]
fn a_connection_of_the_host_is_asked_for_accepted_and_used() {
    let mut connection = asking();
    assert_eq!((connection.window(), connection.owes()), (0, true));
    assert_eq!(connection.take_owed(), Some(Op::Request));
    assert_eq!(connection.take_owed(), None);
    assert_eq!(connection.on_packet(&packet(Op::Response)), Verdict::Accepted);
    assert_eq!((connection.window(), connection.owes()), (1000, false));
    assert_eq!(connection.on_packet(&packet(Op::Response)), Verdict::Breach, "once");
}

#[test]
fn no_data_overtakes_the_response() {
    let mut connection = Connection::from_guest(&packet(Op::Request));
    assert_eq!(connection.window(), 0);
    assert_eq!(connection.take_owed(), Some(Op::Response));
    assert_eq!(connection.window(), 1000);
}

#[test]
fn a_host_that_gives_up_before_the_answer_leaves_nothing_behind() {
    let mut early = asking();
    early.on_host_done(Done::BOTH);
    assert_eq!((early.is_gone(), early.take_owed()), (true, None), "the guest never heard of it");
    let mut late = asked();
    late.on_host_done(Done::BOTH);
    assert_eq!((late.is_over(), late.take_owed(), late.is_gone()), (true, Some(Op::Reset), true));
}

#[test]
fn the_guest_sends_what_was_announced_and_no_more() {
    let mut connection = open();
    assert_eq!(connection.announce(), Credit { buf_alloc: BUF_ALLOC, fwd_cnt: 0 });
    assert_eq!(connection.on_packet(&data(BUF_ALLOC)), Verdict::Deliver);
    assert_eq!(connection.clone().on_packet(&data(1)), Verdict::Breach);
    // What it was not told of it cannot use.
    connection.on_forwarded(BUF_ALLOC);
    assert_eq!(connection.clone().on_packet(&data(1)), Verdict::Breach);
    assert_eq!(connection.take_owed(), Some(Op::CreditUpdate));
    assert_eq!(connection.announce().fwd_cnt, BUF_ALLOC);
    assert_eq!(connection.on_packet(&data(BUF_ALLOC)), Verdict::Deliver);
    assert_eq!(connection.clone().on_packet(&data(u32::MAX)), Verdict::Breach);
}

#[test]
fn credit_is_told_when_half_of_it_is_gone_or_when_asked_or_with_any_packet() {
    let mut connection = open();
    connection.on_packet(&data(BUF_ALLOC / 2));
    connection.on_forwarded(BUF_ALLOC / 2);
    assert!(!connection.owes());
    assert_eq!(connection.on_packet(&packet(Op::CreditRequest)), Verdict::Nothing);
    assert_eq!(connection.take_owed(), Some(Op::CreditUpdate));
    connection.on_packet(&data(1));
    connection.on_forwarded(1);
    assert_eq!(connection.take_owed(), Some(Op::CreditUpdate));
    connection.on_packet(&packet(Op::CreditRequest));
    connection.announce();
    assert!(!connection.owes(), "a packet with data has told it");
}

#[test]
fn the_guest_gets_no_more_than_it_can_take_and_is_asked_once() {
    let mut connection = open();
    connection.on_sent(1000);
    assert_eq!(connection.window(), 0);
    for expected in [Some(Op::CreditRequest), None] {
        connection.ask_for_credit();
        assert_eq!(connection.take_owed(), expected);
    }
    connection.on_packet(&Packet { credit: Credit { buf_alloc: 1000, fwd_cnt: 400 }, ..packet(Op::CreditUpdate) });
    connection.ask_for_credit();
    assert_eq!((connection.window(), connection.owes()), (400, false));
    connection.on_sent(400);
    connection.ask_for_credit();
    assert_eq!(connection.take_owed(), Some(Op::CreditRequest), "again, since it had some");
}

#[test]
fn lies_about_credit_starve_the_liar() {
    for (buf_alloc, fwd_cnt, window) in
        [(0, 0, 0), (1000, 1, 0), (u32::MAX, u32::MAX, u32::MAX - 1), (5, 0, 5), (u32::MAX, 1, 0)]
    {
        let mut connection = open();
        connection.on_packet(&Packet { credit: Credit { buf_alloc, fwd_cnt }, ..packet(Op::CreditUpdate) });
        assert_eq!(connection.window(), window, "{buf_alloc} {fwd_cnt}");
    }
    let mut shrunk = open();
    shrunk.on_sent(600);
    shrunk.on_packet(&Packet { credit: Credit { buf_alloc: 500, fwd_cnt: 0 }, ..packet(Op::CreditUpdate) });
    assert_eq!(shrunk.window(), 0);
}

#[test]
fn the_guest_closes_one_direction_after_the_other() {
    let mut connection = open();
    connection.on_packet(&data(10));
    connection.on_packet(&packet(Op::Shutdown(Done::SEND)));
    assert_eq!(connection.finished_for_host(), Done::default(), "first what it sent");
    connection.on_forwarded(10);
    assert_eq!(connection.finished_for_host(), Done::RECEIVE);
    assert_eq!(connection.window(), 1000, "the host goes on");
    assert_eq!(connection.on_packet(&packet(Op::Shutdown(Done::RECEIVE))), Verdict::Ended);
    assert_eq!((connection.take_owed(), connection.is_gone()), (Some(Op::Reset), true));
}

#[test]
fn what_the_guest_sent_before_it_closed_is_forwarded_first() {
    let mut connection = draining();
    assert!(!connection.is_over());
    connection.on_forwarded(9);
    assert!(!connection.is_over());
    connection.on_forwarded(1);
    assert_eq!((connection.is_over(), connection.take_owed()), (true, Some(Op::Reset)));
}

#[test]
fn the_host_closes_one_direction_after_the_other() {
    let mut connection = open();
    connection.on_host_done(Done::SEND);
    connection.ask_for_credit();
    assert_eq!((connection.window(), connection.flows()), (0, false));
    assert_eq!(connection.take_owed(), Some(Op::Shutdown(Done::SEND)));
    connection.on_host_done(Done::SEND);
    assert_eq!(connection.take_owed(), None, "that was said");
    assert_eq!(connection.on_packet(&data(5)), Verdict::Deliver, "the guest goes on");
    connection.on_host_done(Done::BOTH);
    assert_eq!(connection.backlog(), 0, "nobody is left to take it");
    assert_eq!(connection.take_owed(), Some(Op::Shutdown(Done::BOTH)));
    assert_eq!(connection.on_packet(&packet(Op::Reset)), Verdict::Ended);
    assert!(connection.is_gone());
}

#[test]
fn data_for_a_host_that_has_left_costs_no_credit() {
    let mut connection = open();
    connection.on_host_done(Done::RECEIVE);
    assert_eq!(connection.take_owed(), Some(Op::Shutdown(Done::RECEIVE)));
    for _ in 0..10 {
        assert_eq!(connection.on_packet(&data(BUF_ALLOC)), Verdict::Nothing);
        assert_eq!(connection.take_owed(), Some(Op::CreditUpdate));
        connection.announce();
    }
}

#[test]
fn both_closing_at_once_end_it() {
    let mut connection = open();
    connection.on_host_done(Done::BOTH);
    assert_eq!(connection.on_packet(&packet(Op::Shutdown(Done::BOTH))), Verdict::Ended);
    assert_eq!((connection.take_owed(), connection.is_gone()), (Some(Op::Reset), true));
}

#[derive(Debug, Clone)]
enum Step {
    Packet(Option<Op>, u32, Credit),
    Forward(u32),
    Send(u32),
    HostDone(Done),
    TakeOwed,
    AskForCredit,
    Abort,
}

fn done() -> impl Strategy<Value = Done> {
    (any::<bool>(), any::<bool>()).prop_map(|(receive, send)| Done { receive, send })
}

fn credit() -> impl Strategy<Value = Credit> {
    let number = || prop_oneof![0..2000u32, any::<u32>()];
    (number(), number()).prop_map(|(buf_alloc, fwd_cnt)| Credit { buf_alloc, fwd_cnt })
}

fn step() -> impl Strategy<Value = Step> {
    let others = prop_oneof![
        Just(Some(Op::Request)),
        Just(Some(Op::Reset)),
        Just(None),
        done().prop_map(|done| Some(Op::Shutdown(done))),
    ];
    let ops = prop_oneof![
        8 => Just(Some(Op::Data)),
        2 => Just(Some(Op::Response)),
        2 => Just(Some(Op::CreditUpdate)),
        1 => Just(Some(Op::CreditRequest)),
        1 => others,
    ];
    let length = prop_oneof![4 => 0..BUF_ALLOC / 4, 1 => any::<u32>()];
    prop_oneof![
        6 => (ops, length, credit()).prop_map(|(op, length, credit)| Step::Packet(op, length, credit)),
        4 => any::<u32>().prop_map(Step::Forward),
        4 => any::<u32>().prop_map(Step::Send),
        1 => done().prop_map(Step::HostDone),
        4 => Just(Step::TakeOwed),
        2 => Just(Step::AskForCredit),
        1 => Just(Step::Abort),
    ]
}

properties! {
    #[test]
    fn no_order_of_steps_breaks_a_bound(from_host in any::<bool>(), steps in prop::collection::vec(step(), 1..200)) {
        let mut connection = if from_host { asking() } else { Connection::from_guest(&packet(Op::Request)) };
        let (mut over, mut resets, mut opened) = (false, 0, 0);
        let mut told = Credit { buf_alloc: BUF_ALLOC, fwd_cnt: 0 };
        for step in steps {
            let before = connection.clone();
            match step {
                Step::Packet(op, length, credit) => {
                    let verdict = connection.on_packet(&Packet { ports: PORTS, op, length, credit });
                    if verdict == Verdict::Deliver {
                        // Not beyond what the guest was told.
                        prop_assert!((connection.received - Wrapping(told.fwd_cnt)).0 <= told.buf_alloc);
                    }
                    opened += u32::from(verdict == Verdict::Accepted);
                }
                Step::Forward(bytes) => connection.on_forwarded(bytes % (connection.backlog() + 1)),
                Step::Send(bytes) => {
                    let window = connection.window();
                    connection.on_sent(bytes.min(window));
                    prop_assert!(connection.window() <= window);
                }
                Step::HostDone(done) => connection.on_host_done(done),
                Step::TakeOwed => {
                    let owed = connection.take_owed();
                    prop_assert_eq!(before.owes(), owed.is_some());
                    if owed.is_some() {
                        told = connection.announce();
                    }
                    resets += u32::from(owed == Some(Op::Reset));
                }
                Step::AskForCredit => connection.ask_for_credit(),
                Step::Abort => connection.abort(),
            }
            prop_assert!(connection.backlog() <= BUF_ALLOC);
            prop_assert!(connection.is_over() || !over, "what is over stays over");
            over = connection.is_over();
            prop_assert!(resets <= 1 && opened <= 1);
            prop_assert!(!connection.is_gone() || !connection.owes());
            prop_assert!(!(over || connection.host_done().send) || connection.window() == 0);
        }
    }
}
