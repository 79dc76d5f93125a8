//! Deadlines, and clocks that go on, stand still or are set.

use super::*;

#[test]
fn deadlines_are_those_of_the_clock() {
    const HOUR: u64 = 3_600_000_000_000;
    let mut driven = Driven::new();
    let ((worker, told), (other, of_other)) = (Probe::idle(&[0]), Probe::idle(&[1]));
    *lock(&told.deadline) = Some(2 * HOUR);
    *lock(&of_other.deadline) = Some(HOUR);
    let (doorbells, running) = driven.start(vec![worker, other]);
    driven.settle();
    let (before, other_before) = (told.calls(), of_other.calls());
    driven.clock.set(HOUR - 1);
    driven.event_loop.executor().wake();
    assert_eq!(driven.settle(), 0);
    driven.clock.set(HOUR);
    *lock(&of_other.deadline) = Some(3 * HOUR);
    driven.event_loop.executor().wake();
    assert_eq!(driven.settle(), 1);
    assert_eq!(driven.event_loop.shared.earliest(), Some(2 * HOUR));
    // Asked for after each call.
    *lock(&told.deadline) = None;
    doorbells.ring(0);
    assert_eq!(driven.settle(), 1);
    driven.clock.set(3 * HOUR - 1);
    driven.event_loop.executor().wake();
    assert_eq!(driven.settle(), 0);
    assert_eq!((told.calls() - before, of_other.calls() - other_before), (1, 1));
    drop(running.stop());
    assert_eq!(driven.event_loop.shared.earliest(), None, "resets leave nothing behind");
}

/// The timer is set anew, or this waits for an hour.
#[test]
fn a_clock_that_was_set_is_slept_by() {
    const HOUR: u64 = 3_600_000_000_000;
    let mut driven = Driven::new();
    let (worker, told) = Probe::idle(&[0]);
    *lock(&told.deadline) = Some(HOUR);
    let (_doorbells, _running) = driven.start(vec![worker]);
    driven.settle();
    driven.clock.set(HOUR - 1);
    driven.event_loop.executor().wake();
    driven.event_loop.run_once(NOW).unwrap();
    let before = told.calls();
    poll(&mut [PollFd::new(&driven.event_loop, PollFlags::IN)], None).unwrap();
    assert_eq!(driven.event_loop.run_once(None).unwrap(), 0, "the clock has stopped before");
    driven.clock.set(HOUR);
    assert_eq!(driven.event_loop.run_once(None).unwrap(), 1, "it is looked at again");
    assert_eq!(told.calls() - before, 1);
}

/// The timer makes the descriptor readable, and the loop comes by itself.
#[test]
fn a_deadline_of_a_clock_that_goes_on_comes() {
    let begin = std::time::Instant::now();
    let clock = Arc::new(move || u64::try_from(begin.elapsed().as_nanos()).unwrap());
    let mut event_loop = EventLoop::new(Arc::clone(&clock)).unwrap();
    let deadline = clock.now_ns() + 2_000_000;
    let due = Arc::new(Mutex::new(None));
    let (theirs, at) = (Arc::clone(&due), Arc::clone(&clock));
    let (worker, told) = Probe::new(&[0], move || {
        *lock(&theirs) = Some(at.now_ns());
        Ok(Progress::Idle)
    });
    *lock(&told.deadline) = Some(deadline);
    let link = LinkRecorder::default();
    let doorbells = Arc::new(Doorbells::new(1));
    let _running = event_loop.executor().start(Arc::new(link), &doorbells, vec![worker]).unwrap();
    while lock(&due).is_none_or(|at| at < deadline) {
        let mut polled = [PollFd::new(&event_loop, PollFlags::IN)];
        poll(&mut polled, None).unwrap();
        event_loop.run_once(NOW).unwrap();
    }
}

#[test]
fn a_clock_that_stands_still_is_looked_at_ever_less_often() {
    let naps = [1, 2, 3, 8, 9, 1000].map(|times| nap(1, times));
    assert_eq!(naps, [1, 2, 4, 128, 128, 128].map(|ms| ms * MILLISECOND));
    assert_eq!(nap(1, 0), 1);
    assert_eq!(nap(7 * MILLISECOND, 1), 7 * MILLISECOND);
    assert_eq!(nap(u64::MAX, 0), MAX_NAP);
}
