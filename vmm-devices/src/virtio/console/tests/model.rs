//! A driver and a monitor that do anything, beside a model of what must arrive.

use std::io;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Action {
    Enqueue(u16),
    /// Buffers of these sizes in one chain; the last may be beyond the RAM.
    Give(Vec<u16>, bool),
    Put(Vec<u16>),
    Notify(u16),
    /// What the writer does next: takes a part, is interrupted, is full.
    Writer(u8),
    Resume,
    /// The driver starts again, having lost its buffers.
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    let sizes = || prop::collection::vec(prop_oneof![0..20_u16, 0..3000_u16], 1..4);
    prop_oneof![
        4 => (0..2000_u16).prop_map(Action::Enqueue),
        4 => (sizes(), prop::bool::weighted(0.1)).prop_map(|(sizes, broken)| Action::Give(sizes, broken)),
        4 => sizes().prop_map(Action::Put),
        8 => (0..2_u16).prop_map(Action::Notify),
        4 => any::<u8>().prop_map(Action::Writer),
        2 => Just(Action::Resume),
        1 => Just(Action::Reset),
    ]
}

/// The bytes number `from` to `from + len` of an endless text without short periods.
fn text(from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0]).collect()
}

/// Takes what the device gave back of input, which must be what comes next.
fn receive(guest: &mut Guest, given: &mut Vec<(u32, Vec<u16>)>, received: &mut u64) {
    while let Some((head, len)) = guest.queues[0].take_used().unwrap() {
        let (at, sizes) = given.remove(given.iter().position(|(at, _)| *at == head).unwrap());
        let mut left = usize::try_from(len).unwrap();
        let mut bytes = Vec::new();
        for (part, size) in (0..).zip(sizes) {
            let mut piece = vec![0; left.min(size.into())];
            guest
                .memory
                .memory()
                .read_slice(&mut piece, GuestAddress(place(0, at.into()) + 0x1000 * part))
                .unwrap();
            left -= piece.len();
            bytes.extend(piece);
        }
        assert_eq!(left, 0, "more was written than there was room for");
        assert_eq!(bytes, text(*received, bytes.len()), "from byte {received} on");
        *received += bytes.len() as u64;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every byte that was taken arrives once and in order, whatever buffers the driver offers, whatever the writer does.
    #[test]
    fn every_byte_arrives_once_and_in_order(actions in prop::collection::vec(action(), 1..120), capacity in 1..3000_usize) {
        let (mut guest, port, screen, _) = single(|port| port.input_capacity(capacity));
        let (mut enqueued, mut received) = (0, 0);
        let (mut put, mut lost) = (0_u64, 0);
        let mut given = Vec::new();
        let mut output = Vec::new();
        // Chains of output that the driver has made available, and their lengths.
        let mut sent = std::collections::VecDeque::new();
        for action in actions.into_iter().chain([Action::Writer(7), Action::Resume]) {
            match action {
                Action::Enqueue(len) => {
                    let room = port.room();
                    let taken = port.enqueue(&text(enqueued, len.into()));
                    prop_assert_eq!(taken, room.min(len.into()));
                    enqueued += taken as u64;
                }
                Action::Give(sizes, broken) => {
                    if given.len() >= 16 {
                        continue;
                    }
                    let ring = &mut guest.queues[0];
                    let head = ring.next_head();
                    let mut chain = ring.chain();
                    for (part, size) in (0..).zip(&sizes) {
                        chain = chain.writable(place(0, head.into()) + 0x1000 * part, (*size).into());
                    }
                    if broken {
                        chain = chain.writable(u64::MAX - 5, 100);
                    }
                    prop_assert_eq!(chain.submit().unwrap(), head);
                    given.push((head.into(), sizes));
                }
                Action::Put(sizes) => {
                    if sent.len() >= 16 {
                        continue;
                    }
                    let memory = guest.memory.memory();
                    let ring = &mut guest.queues[1];
                    let head = ring.next_head();
                    let mut chain = ring.chain();
                    let mut total = 0;
                    for (part, size) in (0..).zip(&sizes) {
                        let gpa = place(1, head.into()) + 0x1000 * part;
                        memory.write_slice(&text(put + total, (*size).into()), GuestAddress(gpa)).unwrap();
                        chain = chain.readable(gpa, (*size).into());
                        total += u64::from(*size);
                    }
                    chain.submit().unwrap();
                    sent.push_back(total);
                    put += total;
                }
                Action::Notify(queue) => guest.driver.notify(queue),
                Action::Writer(what) => match what % 8 {
                    0 => screen.block(true),
                    1 => screen.answer([Err(io::ErrorKind::WouldBlock)]),
                    2 => screen.answer([Err(io::ErrorKind::Interrupted)]),
                    3..7 => screen.answer([Ok(usize::from(what))]),
                    _ => screen.block(false),
                },
                Action::Resume => port.resume(),
                Action::Reset => {
                    receive(&mut guest, &mut given, &mut received);
                    output.extend(screen.take());
                    guest.start(0);
                    given.clear();
                    // What was not given back is lost, and so is what lies behind what was in flight.
                    let rest = put - output.len() as u64;
                    prop_assert!(port.counters().output_discarded <= lost + rest);
                    lost = port.counters().output_discarded;
                    sent.clear();
                    output.clear();
                    put = 0;
                }
            }
            while let Some((_, len)) = guest.queues[1].take_used().unwrap() {
                prop_assert_eq!(len, 0);
                prop_assert!(sent.pop_front().is_some());
            }
            receive(&mut guest, &mut given, &mut received);
            output.extend(screen.take());
            prop_assert_eq!(&output, &text(0, output.len()));
            prop_assert!(output.len() as u64 <= put);
        }
        // To the end.
        for _ in 0..1000 {
            port.resume();
            guest.driver.notify(1);
            if received < enqueued && given.is_empty() {
                let head = guest.give(0, 4096);
                given.push((head.into(), vec![4096]));
            }
            guest.driver.notify(0);
            receive(&mut guest, &mut given, &mut received);
        }
        output.extend(screen.take());
        prop_assert_eq!(output.len() as u64, put, "all that was output");
        prop_assert_eq!(&output, &text(0, output.len()));
        prop_assert_eq!(received, enqueued, "all that was taken as input");
        prop_assert_eq!((port.counters().input, port.counters().output_discarded), (received, lost));
        prop_assert!(guest.works());
    }
}
