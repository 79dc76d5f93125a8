//! Random lives of two guests that are joined, against a model of what each has sent: nothing is lost, nothing comes in another order,
//! credit is kept.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Send {
        side: bool,
        which: u8,
        len: u16,
        end: bool,
    },
    Take {
        side: bool,
        count: u8,
        room: u16,
    },
    /// Frees what was taken, and says so.
    Forward {
        side: bool,
        which: u8,
    },
    Poll {
        side: bool,
    },
    Close {
        side: bool,
        which: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<bool>(), 0..3_u8, 0..30_000_u16, any::<bool>())
            .prop_map(|(side, which, len, end)| Step::Send { side, which, len, end }),
        3 => (any::<bool>(), 1..8_u8, 1..9000_u16).prop_map(|(side, count, room)| Step::Take { side, count, room }),
        2 => (any::<bool>(), 0..3_u8).prop_map(|(side, which)| Step::Forward { side, which }),
        2 => any::<bool>().prop_map(|side| Step::Poll { side }),
        1 => (any::<bool>(), 0..3_u8).prop_map(|(side, which)| Step::Close { side, which }),
    ]
}

/// One direction of a connection.
#[derive(Default)]
struct Way {
    /// Sent and not come yet.
    bytes: VecDeque<u8>,
    /// Ends of messages among these, from the beginning of time.
    ends: VecDeque<u64>,
    sent: u64,
    came: u64,
    forwarded: u64,
    /// What the sender knows of the receiver: buffer and what has left it.
    alloc: u32,
    told: u32,
    closed: bool,
    ended: bool,
}

struct Lives {
    guests: [Guest; 2],
    keys: Vec<[Ends; 2]>,
    /// By connection and sending side.
    ways: Vec<[Way; 2]>,
    next: u8,
}

impl Lives {
    fn new(buffer: u32) -> Self {
        let (switch, gatekeeper) = (Switch::new(), Gatekeeper::new(AllowAll));
        let mut guests = [3, 4].map(|cid| {
            let seat = switch.join(cid, reachable(&gatekeeper, cid)).unwrap();
            let builder = Vsock::builder(cid, || 0).gatekeeper(vm(cid), gatekeeper.clone());
            Guest::new(builder.buffer(buffer).switch(seat).build().unwrap())
        });
        let mut keys = Vec::new();
        for (port, kind) in (80..).zip([Kind::Stream, Kind::SeqPacket, Kind::Stream]) {
            let [a, b] = &mut guests;
            let key = Ends { guest_port: 1000, cid: 4, port, kind };
            a.say(key, operation::REQUEST);
            let theirs = b.accept();
            a.poll();
            assert_eq!(a.next_op(), Some(operation::RESPONSE));
            keys.push([key, theirs]);
        }
        let way = || Way { alloc: buffer, ..Way::default() };
        let ways = keys.iter().map(|_| [way(), way()]).collect();
        Self { guests, keys, ways, next: 0 }
    }

    fn packet(&mut self, side: usize, which: usize, op: u16, flags: u32, data: &[u8]) {
        let key = self.keys[which][side];
        let fwd_cnt = self.ways[which][1 - side].forwarded as u32;
        let header = Header { flags, fwd_cnt, ..self.guests[side].header(key, op, data.len()) };
        self.guests[side].send_raw(&header, data);
    }

    fn take(&mut self, side: usize) -> usize {
        let mut count = 0;
        while let Some((header, data)) = self.guests[side].packet() {
            count += 1;
            let which = self.keys.iter().position(|keys| {
                keys[side].port == header.src_port && keys[side].guest_port == header.dst_port
            });
            let which = which.unwrap();
            let out = &mut self.ways[which][side];
            (out.alloc, out.told) = (header.buf_alloc, header.fwd_cnt);
            let kind = self.keys[which][side].kind;
            let way = &mut self.ways[which][1 - side];
            match header.op {
                operation::RW => {
                    assert!(!way.ended, "data behind the end");
                    for byte in data {
                        assert_eq!(Some(byte), way.bytes.pop_front());
                        way.came += 1;
                        if kind == Kind::SeqPacket {
                            assert!(way.ends.front().is_none_or(|end| *end >= way.came), "an end is missing");
                        }
                    }
                    assert!(way.came - way.forwarded <= u64::from(CREDIT), "credit");
                    if header.flags & boundary::MESSAGE != 0 {
                        assert_eq!(way.ends.pop_front(), Some(way.came));
                    }
                }
                operation::SHUTDOWN => {
                    assert!(way.closed && way.bytes.is_empty(), "the end before the last");
                    assert_eq!(header.flags, shutdown::SEND);
                    way.ended = true;
                }
                operation::CREDIT_REQUEST => self.packet(side, which, operation::CREDIT_UPDATE, 0, &[]),
                op => assert_eq!(op, operation::CREDIT_UPDATE),
            }
        }
        count
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Send { side, which, len, end } => {
                let (side, which) = (usize::from(side), usize::from(which));
                let way = &mut self.ways[which][side];
                let free = way.alloc.saturating_sub((way.sent as u32).wrapping_sub(way.told));
                if way.closed {
                    return;
                }
                let len = u64::from(len).min(free.into());
                let data: Vec<u8> = (0..len)
                    .map(|_| {
                        self.next = self.next.wrapping_mul(5).wrapping_add(1);
                        self.next
                    })
                    .collect();
                let way = &mut self.ways[which][side];
                way.bytes.extend(&data);
                way.sent += len;
                let mut flags = 0;
                if self.keys[which][side].kind == Kind::SeqPacket && end {
                    way.ends.push_back(way.sent);
                    flags = boundary::MESSAGE;
                }
                self.packet(side, which, operation::RW, flags, &data);
            }
            Step::Take { side, count, room } => {
                let side = usize::from(side);
                self.guests[side].give(count.into(), room.into());
                self.take(side);
            }
            Step::Forward { side, which } => {
                let (side, which) = (usize::from(side), usize::from(which));
                let way = &mut self.ways[which][1 - side];
                way.forwarded = way.came;
                self.packet(side, which, operation::CREDIT_UPDATE, 0, &[]);
            }
            Step::Poll { side } => self.guests[usize::from(side)].poll(),
            Step::Close { side, which } => {
                let (side, which) = (usize::from(side), usize::from(which));
                // A message that has not ended has no end any more.
                let way = &mut self.ways[which][side];
                let seqpacket = self.keys[which][side].kind == Kind::SeqPacket;
                if !way.closed && !seqpacket && !self.ways[which][1 - side].closed {
                    self.ways[which][side].closed = true;
                    self.packet(side, which, operation::SHUTDOWN, shutdown::SEND, &[]);
                }
            }
        }
    }

    /// Everybody reads: all comes.
    fn settle(&mut self) {
        for _ in 0..400 {
            for side in 0..2 {
                for which in 0..3 {
                    let way = &mut self.ways[which][1 - side];
                    if way.forwarded != way.came {
                        way.forwarded = way.came;
                        self.packet(side, which, operation::CREDIT_UPDATE, 0, &[]);
                    }
                }
                self.guests[side].give(16, 8000);
                self.take(side);
            }
            let over = |way: &Way| way.bytes.is_empty() && way.ends.is_empty() && way.closed == way.ended;
            if self.ways.iter().flatten().all(over) {
                return;
            }
        }
        let left: Vec<_> = self
            .ways
            .iter()
            .flatten()
            .map(|way| (way.bytes.len(), way.ends.len(), way.closed, way.ended))
            .collect();
        panic!("not all came: {left:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_between_two_guests(steps in prop::collection::vec(step(), 1..120), small in any::<bool>()) {
        let mut lives = Lives::new(if small { 16 << 10 } else { 256 << 10 });
        for step in &steps {
            lives.step(step);
        }
        lives.settle();
        let [a, b] = &lives.guests;
        prop_assert_eq!((a.handle.counters().breaches, b.handle.counters().breaches), (0, 0));
        prop_assert_eq!((a.driver.status(), b.driver.status()), (0xf, 0xf));
    }
}
