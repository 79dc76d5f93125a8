//! Frames come out as they went in, and a hostile other side gets nowhere.

use std::thread;

use proptest::prelude::*;
use vmm_memory::vm_memory::VolatileSlice;

use super::*;

fn push(producer: &mut Producer, info: u8, frame: &[u8]) -> Result<bool, RingError> {
    let mut frame = frame.to_vec();
    producer.push(&[info; HEADER], frame.len(), [VolatileSlice::from(&mut frame[..])])
}

fn take(consumer: &mut Consumer) -> Result<Option<(u8, Vec<u8>)>, RingError> {
    let Some(front) = consumer.front()? else { return Ok(None) };
    let mut frame = vec![0; front.len];
    copy(consumer.frame(&front)?, &[VolatileSlice::from(&mut frame[..])]);
    consumer.pop(&front)?;
    Ok(Some((front.info[5], frame)))
}

proptest! {
    // Large ones, of which few say as much as many.
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Beside a queue of so many bytes.
    #[test]
    fn what_goes_in_comes_out(steps in prop::collection::vec((0usize..MAX_FRAME, 0usize..3), 1..200)) {
        let (mut producer, mut consumer) = ring(LEAST).unwrap();
        let (mut model, mut bytes) = (std::collections::VecDeque::new(), 0);
        for (number, (len, takes)) in (0..=u8::MAX).cycle().zip(steps) {
            let frame: Vec<u8> = (0..251).cycle().take(len).map(|byte: u8| byte ^ number).collect();
            let fits = bytes + record(len) <= LEAST as u64;
            prop_assert_eq!(push(&mut producer, number, &frame), Ok(fits));
            if fits {
                bytes += record(len);
                model.push_back((number, frame));
            }
            for _ in 0..takes {
                let taken = take(&mut consumer).unwrap();
                prop_assert_eq!(&taken, &model.pop_front());
                bytes -= taken.map_or(0, |(_, frame)| record(frame.len()));
            }
        }
    }
}

#[test]
fn a_sleeper_is_woken_once_and_never_missed() {
    let (mut producer, mut consumer) = ring(LEAST).unwrap();
    push(&mut producer, 1, b"first").unwrap();
    assert!(producer.wakes().unwrap(), "who has never looked sleeps");
    assert!(!producer.wakes().unwrap());
    assert!(!consumer.sleep().unwrap(), "there is a frame");
    push(&mut producer, 1, b"second").unwrap();
    assert!(!producer.wakes().unwrap(), "it is awake");
    while take(&mut consumer).unwrap().is_some() {}
    assert!(consumer.sleep().unwrap());
    push(&mut producer, 1, b"third").unwrap();
    assert!(producer.wakes().unwrap());
    consumer.clear().unwrap();
    assert_eq!(take(&mut consumer), Ok(None));

    assert!(producer.wait(100).unwrap(), "there is room");
    while push(&mut producer, 1, &[0; 50_000]).unwrap() {}
    assert!(!producer.wait(50_000).unwrap());
    assert!(take(&mut consumer).unwrap().is_some());
    assert!(consumer.wakes().unwrap() && !consumer.wakes().unwrap());
    assert!(push(&mut producer, 1, &[0; 50_000]).unwrap());
}

/// Two threads that sleep whenever they can: neither sleeps for ever, and nothing is lost.
#[test]
fn nobody_sleeps_through_a_frame() {
    let (mut producer, mut consumer) = ring(LEAST).unwrap();
    let (frames, sleeper) = std::sync::mpsc::channel::<()>();
    let (room, waiter) = std::sync::mpsc::channel::<()>();
    let reader = thread::spawn(move || {
        for expected in 0..20_000_u32 {
            let frame = loop {
                if let Some((_, frame)) = take(&mut consumer).unwrap() {
                    break frame;
                }
                if consumer.sleep().unwrap() {
                    sleeper.recv().unwrap();
                }
            };
            assert_eq!(frame[..4], expected.to_le_bytes());
            if consumer.wakes().unwrap() {
                room.send(()).unwrap();
            }
        }
    });
    for number in 0..20_000_u32 {
        let mut frame = vec![0; 4 + usize::try_from(number % 7 * 3000).unwrap()];
        frame[..4].copy_from_slice(&number.to_le_bytes());
        while !push(&mut producer, 0, &frame).unwrap() {
            if !producer.wait(frame.len()).unwrap() {
                waiter.recv().unwrap();
            }
        }
        if producer.wakes().unwrap() {
            // It may have seen the last frame by itself.
            let (Ok(()) | Err(_)) = frames.send(());
        }
    }
    reader.join().unwrap();
}

#[test]
fn cve_2015_8550_positions_that_cannot_be_end_the_ring() {
    for (word, value) in
        [(PRODUCED, LEAST as u64 + 1), (PRODUCED, u64::MAX), (CONSUMED, 17), (CONSUMED, u64::MAX)]
    {
        let (mut producer, mut consumer) = ring(LEAST).unwrap();
        consumer.place.store(word, value, Ordering::SeqCst).unwrap();
        let broken = if word == PRODUCED {
            take(&mut consumer).unwrap_err()
        } else {
            // Looked at when there seems to be no room.
            loop {
                match push(&mut producer, 0, &[0; 60_000]) {
                    Ok(true) => {}
                    Ok(false) => panic!("{value:#x} was believed"),
                    Err(error) => break error,
                }
                consumer.place.store(word, value.max(LEAST as u64 * 2), Ordering::SeqCst).unwrap();
            }
        };
        assert!(matches!(broken, RingError::Position { .. }), "{broken}");
    }
    // What was taken back is not given again.
    let (mut producer, mut consumer) = ring(LEAST).unwrap();
    push(&mut producer, 1, b"one").unwrap();
    take(&mut consumer).unwrap();
    consumer.place.store(PRODUCED, 0, Ordering::SeqCst).unwrap();
    assert!(matches!(take(&mut consumer), Err(RingError::Position { .. })));
}

#[test]
fn cve_2020_14364_lengths_that_cannot_be_end_the_ring() {
    for len in [u32::MAX, u32::try_from(MAX_FRAME + 1).unwrap(), 32] {
        let (mut producer, mut consumer) = ring(LEAST).unwrap();
        push(&mut producer, 1, &[7; 16]).unwrap();
        consumer.memory().get_slice(CONTROL, 4).unwrap().copy_from(&len.to_le_bytes());
        assert!(matches!(take(&mut consumer), Err(RingError::Length { .. })), "{len}");
    }
    let (mut producer, _consumer) = ring(LEAST).unwrap();
    assert!(matches!(push(&mut producer, 0, &vec![0; MAX_FRAME + 1]), Err(RingError::Length { .. })));
}

#[test]
fn a_ring_lies_within_its_memory() {
    let memory = Arc::new(MmapRegion::new(2 * CONTROL + LEAST).unwrap());
    let at = |base, size| Producer::new(Arc::clone(&memory), base, size).map(drop);
    assert_eq!((at(0, LEAST), at(CONTROL, LEAST)), (Ok(()), Ok(())));
    for base in [2 * CONTROL, 64, usize::MAX & !(CONTROL - 1)] {
        assert!(matches!(at(base, LEAST), Err(RingError::Place { .. })), "{base:#x}");
    }
    for size in [0, LEAST / 2, LEAST + 4096, MOST * 2] {
        assert_eq!(at(0, size), Err(RingError::Size { size }));
    }
}
