//! States and credit by themselves.

use proptest::prelude::*;

use super::super::backlog::Backlog;
use super::super::connection::{Connection, Patience, Phase, Receipt};
use super::super::credit::Credit;
use super::*;

const PATIENCE: Patience = Patience { connect_ns: 100, close_ns: 1000 };

fn packet(op: u16) -> Header {
    Header { kind: 1, op, buf_alloc: 1000, ..Header::default() }
}

fn data(len: u32) -> Header {
    Header { len, ..packet(operation::RW) }
}

fn open() -> Connection {
    let mut connection = Connection::dialing(Kind::Stream, &packet(operation::REQUEST), 64, PATIENCE, 0);
    connection.accepted();
    assert_eq!(connection.next_control(0), Some((operation::RESPONSE, 0)));
    connection
}

#[test]
fn an_answer_comes_in_time_or_the_connection_is_over() {
    let mut dialing = Connection::dialing(Kind::Stream, &packet(operation::REQUEST), 64, PATIENCE, 5);
    assert_eq!((dialing.deadline(), dialing.next_control(5)), (Some(105), None));
    assert!(!dialing.expire(104) && dialing.expire(105));
    assert_eq!(dialing.next_control(105), Some((operation::RST, 0)));
    assert_eq!((dialing.phase(), dialing.next_control(105)), (Phase::Over, None));

    let mut requested = Connection::requested(Kind::Stream, 64, PATIENCE, 5);
    assert_eq!(requested.next_control(5), Some((operation::REQUEST, 0)));
    assert_eq!(requested.receive(&packet(operation::RESPONSE)), Receipt::Accepted);
    assert_eq!((requested.deadline(), requested.phase()), (None, Phase::Open));
}

#[test]
fn what_does_not_go_with_the_state_ends_it() {
    use operation::{CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RW, SHUTDOWN};
    let dialing = Connection::dialing(Kind::Stream, &packet(REQUEST), 64, PATIENCE, 0);
    let mut requested = Connection::requested(Kind::Stream, 64, PATIENCE, 0);
    let mut unheard = requested.clone();
    assert_eq!(requested.next_control(0), Some((REQUEST, 0)));
    unheard.reset();
    assert_eq!((unheard.phase(), unheard.next_control(0)), (Phase::Over, None));
    let cases = [
        (&dialing, &[REQUEST, RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xffff][..]),
        (&requested, &[REQUEST, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8][..]),
        (&open(), &[REQUEST, RESPONSE, 0, 8, 0xffff][..]),
    ];
    for (connection, operations) in cases {
        for op in operations {
            let mut connection = connection.clone();
            assert!(matches!(connection.receive(&packet(*op)), Receipt::Breach(_)), "{op}");
            assert_eq!(connection.next_control(0), Some((operation::RST, 0)));
            assert_eq!(connection.next_control(0), None);
        }
        let mut connection = connection.clone();
        let other = Header { kind: 2, ..packet(RW) };
        assert!(matches!(connection.receive(&other), Receipt::Breach(_)));
        let mut connection = connection.clone();
        connection.receive(&packet(operation::RST));
        // A reset is not answered.
        assert_eq!((connection.phase(), connection.next_control(0)), (Phase::Over, None));
        assert_eq!(connection.receive(&packet(REQUEST)), Receipt::Nothing);
    }
}

#[test]
fn halves_close_one_by_one() {
    let mut connection = open();
    connection.far_ended(shutdown::SEND);
    assert_eq!(connection.next_control(0), Some((operation::SHUTDOWN, shutdown::SEND)));
    assert_eq!((connection.next_control(0), connection.deadline()), (None, None));
    assert_eq!(connection.receive(&data(3)), Receipt::Data);
    assert!(!connection.may_send());
    connection.far_ended(shutdown::BOTH);
    assert_eq!(connection.next_control(7), Some((operation::SHUTDOWN, shutdown::RECEIVE)));
    assert_eq!((connection.phase(), connection.deadline()), (Phase::Closing, Some(1007)));
    assert_eq!(connection.receive(&data(3)), Receipt::Stale);
    assert!(connection.expire(1007));

    let mut connection = open();
    let shut = Header { flags: shutdown::SEND | 0xf0, ..packet(operation::SHUTDOWN) };
    assert_eq!(connection.receive(&shut), Receipt::Shut);
    assert_eq!(connection.guest_off(), shutdown::SEND);
    assert!(connection.may_send());
    assert!(matches!(connection.receive(&data(1)), Receipt::Breach(_)));
}

#[test]
fn more_than_there_is_credit_for_is_a_breach() {
    let mut connection = open();
    assert_eq!(connection.receive(&data(60)), Receipt::Data);
    assert_eq!(connection.receive(&data(4)), Receipt::Data);
    assert_eq!(connection.receive(&data(0)), Receipt::Data);
    let mut full = connection.clone();
    assert!(matches!(full.receive(&data(1)), Receipt::Breach(_)));
    let mut full = connection.clone();
    assert!(matches!(full.receive(&data(u32::MAX)), Receipt::Breach(_)));
    connection.forwarded(20);
    // It takes nothing for free: it is told of the room.
    assert_eq!(connection.next_control(0), Some((operation::CREDIT_UPDATE, 0)));
    assert_eq!(connection.receive(&data(20)), Receipt::Data);
}

#[test]
fn credit_is_asked_for_once() {
    let mut connection = open();
    connection.credit.send(1000);
    assert_eq!(connection.credit.available(), 0);
    connection.want_credit();
    assert_eq!(connection.next_control(0), Some((operation::CREDIT_REQUEST, 0)));
    connection.want_credit();
    assert_eq!(connection.next_control(0), None);
    let more = Header { fwd_cnt: 10, ..packet(operation::CREDIT_UPDATE) };
    assert_eq!(connection.receive(&more), Receipt::Credit);
    assert_eq!((connection.credit.available(), connection.has_control()), (10, false));
    assert_eq!(connection.receive(&packet(operation::CREDIT_REQUEST)), Receipt::Credit);
    assert_eq!(connection.next_control(0), Some((operation::CREDIT_UPDATE, 0)));
}

/// What a guest says of its buffer may be anything: nothing overflows, and the device never sends more than one buffer ahead.
#[test]
fn credit_overflow_lies_about_credit_give_none() {
    let mut credit = Credit::new(64);
    credit.hear(100, 0);
    credit.send(100);
    assert_eq!(credit.available(), 0);
    // In flight are more than the buffer holds now: no underflow.
    credit.hear(50, 0);
    assert_eq!(credit.available(), 0);
    credit.hear(100, 101);
    assert_eq!(credit.available(), 0, "more has left than came");
    credit.hear(u32::MAX, u32::MAX);
    assert_eq!(credit.available(), u32::MAX - 100);
    credit.hear(100, 60);
    credit.hear(100, 30);
    assert_eq!(credit.available(), 60, "an earlier word comes late");
}

proptest! {
    /// Counters wrap, and both sides agree all the same: what may be sent is what the other has room for.
    #[test]
    fn two_accounts_agree(steps in prop::collection::vec((0..3_u8, 0..5000_u32), 1..400), far in 0..20_u32) {
        // As a connection through which nearly 2^32 bytes have gone.
        let mut device = Credit::new(4096);
        device.hear(u32::MAX, 0);
        let begin = u32::MAX - 1000 * far;
        device.send(begin);
        device.hear(4096, begin);
        let (mut sent, mut forwarded) = (begin, begin);
        for (what, amount) in steps {
            match what {
                0 => {
                    let may = device.available();
                    prop_assert_eq!(may, 4096 - sent.wrapping_sub(forwarded));
                    let now = amount.min(may);
                    device.send(now);
                    sent = sent.wrapping_add(now);
                }
                1 => {
                    let now = amount.min(sent.wrapping_sub(forwarded));
                    forwarded = forwarded.wrapping_add(now);
                    device.hear(4096, forwarded);
                }
                // A lie changes nothing for the worse.
                _ => {
                    device.hear(4096, sent.wrapping_add(1 + amount));
                    prop_assert!(device.available() <= 4096);
                }
            }
        }
    }

    /// A backlog gives what was put in, with the ends where they were.
    #[test]
    fn a_backlog_keeps_bytes_and_ends(steps in prop::collection::vec((0..4_u8, 0..300_usize), 1..200)) {
        let mut backlog = Backlog::default();
        let mut model: std::collections::VecDeque<Option<bool>> = Default::default();
        let mut bytes: std::collections::VecDeque<u8> = Default::default();
        let mut next = 0_u8;
        let mut lens: std::collections::VecDeque<usize> = Default::default();
        let mut open = 0;
        for (what, amount) in steps {
            match what {
                0 | 1 => {
                    let filled = backlog.append(amount as u32, |room| {
                        for byte in room {
                            *byte = next;
                            bytes.push_back(next);
                            next = next.wrapping_add(1);
                        }
                        true
                    });
                    let unfilled = backlog.append(7, |_| false);
                    prop_assert!(filled && !unfilled);
                    open += amount;
                }
                2 => {
                    let closed = backlog.close_message(amount % 2 == 0, 8);
                    prop_assert_eq!(closed, lens.len() < 8);
                    if closed { lens.push_back(open); model.push_back(Some(amount % 2 == 0)); open = 0; }
                }
                _ => {
                    let most = lens.front().copied().unwrap_or(open);
                    let now = amount.min(most);
                    backlog.take(now);
                    bytes.drain(..now);
                    match lens.front_mut() {
                        Some(len) => {
                            *len -= now;
                            if *len == 0 { lens.pop_front(); model.pop_front(); backlog.take_end(); }
                        }
                        None => open -= now,
                    }
                }
            }
            prop_assert_eq!(backlog.bytes(), bytes.make_contiguous());
            prop_assert_eq!(backlog.first_end().map(|end| (end.len(), Some(end.is_record()))),
                lens.front().map(|len| (*len, *model.front().unwrap())));
            prop_assert_eq!(backlog.unfinished() as usize, open);
            prop_assert_eq!(backlog.is_empty(), bytes.is_empty() && lens.is_empty());
        }
    }
}
