//! Random frames and buffers against a model of what a driver sees: frames whole and in order, each in the first buffers that were offered.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Offer(u32),
    Give(usize),
    Send(usize),
}

/// Buffers that a driver has in the queue at most, which are fewer than the device can hold.
const MOST: usize = 60;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (12..4000_u32).prop_map(Step::Offer),
        2 => (12..40_u32).prop_map(Step::Offer),
        3 => prop_oneof![14..2000_usize, 14..9000_usize].prop_map(Step::Give),
        1 => (0..3000_usize).prop_map(Step::Send),
    ]
}

/// What the driver is to see next: the frame that is first, in parts. Frames that fit nowhere are dropped, and counted.
fn expected(
    buffers: &mut VecDeque<usize>,
    coming: &mut VecDeque<Vec<u8>>,
    mergeable: bool,
    dropped: &mut u64,
) -> Option<Vec<Vec<u8>>> {
    loop {
        let mut left = &coming.front()?[..];
        if !mergeable && *buffers.front()? < HEADER + left.len() {
            coming.pop_front();
            *dropped += 1;
            continue;
        }
        if buffers.iter().sum::<usize>() < HEADER + left.len() {
            return None;
        }
        let mut parts = Vec::new();
        let mut header = HEADER;
        while !left.is_empty() || header > 0 {
            let room = buffers.pop_front()? - std::mem::take(&mut header);
            let (part, rest) = left.split_at(left.len().min(room));
            parts.push(part.to_vec());
            left = rest;
        }
        coming.pop_front();
        return Some(parts);
    }
}

proptest! {
    #[test]
    fn frames_are_whole_and_in_order(steps in prop::collection::vec(step(), 1..150), mergeable in any::<bool>()) {
        let mut rig = Rig::new(if mergeable { ALL } else { ALL & !feature::MRG_RXBUF });
        let (mut buffers, mut coming, mut dropped) = (VecDeque::new(), VecDeque::new(), 0);
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Offer(len) if rig.buffers.len() < MOST => {
                    rig.offer(len);
                    buffers.push_back(len as usize);
                }
                Step::Offer(_) => {}
                Step::Give(len) => {
                    let mut bytes = frame(MAC, len);
                    bytes[13] = u8::try_from(number).unwrap();
                    rig.network.give(TestFrame::new(bytes.clone()));
                    coming.push_back(bytes);
                }
                Step::Send(len) => {
                    rig.send_raw(&[0; HEADER], &vec![0x33; len]);
                    prop_assert_eq!(rig.network.take_sent().len(), usize::from(len >= 14));
                }
            }
            while let Some(parts) = expected(&mut buffers, &mut coming, mergeable, &mut dropped) {
                prop_assert_eq!(rig.receive().map(|(_, parts)| parts), Some(parts));
            }
            prop_assert_eq!(rig.receive(), None);
            prop_assert_eq!(rig.handle.counters().receive_dropped, dropped);
        }
        prop_assert_eq!(rig.driver.status(), 0xf);
    }
}
