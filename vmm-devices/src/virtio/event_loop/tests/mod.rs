//! What executors promise, seen by workers that are made for it. Nothing is decided by how long something takes: a loop is driven
//! turn by turn, or a channel is waited at.

mod devices;
mod disks;
mod storms;
mod threads;
mod time;

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::ManualClock;
use crate::interrupt::lock;
use crate::testkit::LinkRecorder;
use crate::virtio::QueueError;

const NOW: Option<Duration> = Some(Duration::ZERO);

type Process = Box<dyn FnMut() -> Result<Progress, QueueError> + Send>;

/// A worker that does what a test wants, and counts.
struct Probe {
    queues: Vec<u16>,
    sources: Vec<OwnedFd>,
    process: Process,
    told: Arc<Told>,
}

/// What a test sees of its worker.
#[derive(Default)]
struct Told {
    calls: AtomicUsize,
    stops: AtomicUsize,
    dropped: AtomicBool,
    deadline: Mutex<Option<u64>>,
}

impl Told {
    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn stops(&self) -> usize {
        self.stops.load(Ordering::SeqCst)
    }
}

impl Probe {
    fn new(
        queues: &[u16],
        process: impl FnMut() -> Result<Progress, QueueError> + Send + 'static,
    ) -> (Box<Self>, Arc<Told>) {
        let told = Arc::new(Told::default());
        let (queues, process) = (queues.to_vec(), Box::new(process));
        (Box::new(Self { queues, sources: Vec::new(), process, told: Arc::clone(&told) }), told)
    }

    fn idle(queues: &[u16]) -> (Box<Self>, Arc<Told>) {
        Self::new(queues, || Ok(Progress::Idle))
    }
}

impl Worker for Probe {
    fn queues(&self) -> Vec<u16> {
        self.queues.clone()
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        assert_eq!(self.told.stops(), 0, "it was stopped");
        self.told.calls.fetch_add(1, Ordering::SeqCst);
        (self.process)()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.sources.iter().map(AsFd::as_fd).collect()
    }

    fn deadline(&self) -> Option<u64> {
        *lock(&self.told.deadline)
    }

    fn stop(&mut self) {
        self.told.stops.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.told.dropped.store(true, Ordering::SeqCst);
    }
}

/// The ends for reading and writing.
fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    (reader.into(), writer.into())
}

/// A loop that a test drives.
struct Driven {
    event_loop: EventLoop,
    clock: Arc<ManualClock>,
    link: LinkRecorder,
}

impl Driven {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::default());
        Self { event_loop: EventLoop::new(Arc::clone(&clock)).unwrap(), clock, link: LinkRecorder::default() }
    }

    fn start(&self, workers: Vec<Box<dyn Worker>>) -> (Arc<Doorbells>, Box<dyn Running>) {
        let doorbells = Arc::new(Doorbells::new(4));
        let running =
            self.event_loop.executor().start(Arc::new(self.link.clone()), &doorbells, workers).unwrap();
        (doorbells, running)
    }

    /// Turns until nothing is left to do: how many calls that took.
    fn settle(&mut self) -> usize {
        let mut calls = 0;
        while self.is_readable() {
            calls += self.event_loop.run_once(NOW).unwrap();
        }
        assert_eq!(self.event_loop.run_once(NOW).unwrap(), 0, "the descriptor says when there is something");
        calls
    }

    /// How often the loop was woken since this was asked last: what rings have cost.
    fn kicks(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.event_loop.shared.inbox.kick, &mut count) {
            Err(rustix::io::Errno::AGAIN) => 0,
            read => {
                assert_eq!(read.unwrap(), 8);
                u64::from_ne_bytes(count)
            }
        }
    }

    /// As the monitor's own loop sees it.
    fn is_readable(&self) -> bool {
        let mut polled = [PollFd::new(&self.event_loop, PollFlags::IN)];
        poll(&mut polled, Some(&rustix::event::Timespec::default())).unwrap() == 1
    }
}

#[test]
fn workers_are_called_at_the_doorbells_of_their_queues() {
    let mut driven = Driven::new();
    assert!(!driven.is_readable());
    let ((a, of_a), (b, of_b)) = (Probe::idle(&[0, 2]), Probe::idle(&[1]));
    let (doorbells, running) = driven.start(vec![a, b]);
    driven.settle();
    driven.kicks();
    let (at_start_a, at_start_b) = (of_a.calls(), of_b.calls());
    for queue in [0, 2, 2, 2, 3, 4, u16::MAX] {
        doorbells.ring(queue);
    }
    assert!(driven.is_readable());
    assert_eq!(driven.event_loop.run_once(None).unwrap(), 1, "rings before the call are as one");
    assert_eq!(driven.kicks(), 1);
    doorbells.ring(1);
    doorbells.ring(0);
    assert_eq!(driven.settle(), 2);
    assert_eq!((of_a.calls() - at_start_a, of_b.calls() - at_start_b), (2, 1));
    assert_eq!(running.stop().len(), 2);
    assert_eq!((of_a.stops(), of_b.stops()), (1, 1));
    for queue in 0..4 {
        doorbells.ring(queue);
    }
    assert_eq!(driven.settle(), 0, "nobody is there");
}

#[test]
fn who_rings_early_is_heard() {
    let mut driven = Driven::new();
    let doorbells = Arc::new(Doorbells::new(1));
    doorbells.ring(0);
    let (worker, told) = Probe::idle(&[0]);
    let executor = driven.event_loop.executor();
    let _running = executor.start(Arc::new(driven.link.clone()), &doorbells, vec![worker]).unwrap();
    driven.settle();
    assert!(told.calls() >= 1);
}

#[test]
fn who_has_more_to_do_starves_nobody() {
    let mut driven = Driven::new();
    let (greedy, of_greedy) = Probe::new(&[0], || Ok(Progress::More));
    let (other, of_other) = Probe::idle(&[1]);
    let (doorbells, _running) = driven.start(vec![greedy, other]);
    driven.event_loop.run_once(None).unwrap();
    let (greedy_before, other_before) = (of_greedy.calls(), of_other.calls());
    for turn in 1..=100 {
        doorbells.ring(1);
        assert!(driven.is_readable());
        assert_eq!(driven.event_loop.run_once(None).unwrap(), 2, "one call each");
        assert_eq!((of_greedy.calls() - greedy_before, of_other.calls() - other_before), (turn, turn));
    }
    assert!(driven.is_readable(), "there is more to do");
    assert_eq!(driven.event_loop.run_once(None).unwrap(), 1);
}

#[test]
fn a_worker_that_fails_is_not_called_again() {
    let mut driven = Driven::new();
    let fail = || Err(QueueError::InFlight { index: 0, head: 7 });
    let ((mut bad, of_bad), (good, of_good)) = (Probe::new(&[0], fail), Probe::idle(&[1]));
    let (reader, writer) = pipe();
    bad.sources.push(reader);
    let (doorbells, running) = driven.start(vec![bad, good]);
    driven.settle();
    assert_eq!(driven.link.failures(), ["queue 0: descriptor 7 is made available twice"]);
    let before = of_good.calls();
    for _ in 0..3 {
        doorbells.ring(0);
        doorbells.ring(1);
        assert_eq!(driven.settle(), 1);
    }
    assert_eq!((of_bad.calls(), of_good.calls() - before), (1, 3));
    assert_eq!(driven.link.failures().len(), 1);
    rustix::io::write(&writer, &[1]).unwrap();
    assert!(!driven.is_readable(), "its sources wake nobody");
    assert_eq!((running.stop().len(), of_bad.stops(), of_good.stops()), (2, 1, 1));
}

#[test]
fn a_worker_that_panics_has_failed() {
    let mut driven = Driven::new();
    let (bad, of_bad) = Probe::new(&[0], || panic!("a mistake in line {}", 1));
    let (good, of_good) = Probe::idle(&[0]);
    let (doorbells, running) = driven.start(vec![bad, good]);
    driven.settle();
    assert_eq!(driven.link.failures(), ["its worker panicked: a mistake in line 1"]);
    let before = of_good.calls();
    doorbells.ring(0);
    assert_eq!(driven.settle(), 1);
    assert_eq!((of_bad.calls(), of_good.calls() - before), (1, 1));
    assert_eq!((running.stop().len(), of_bad.stops()), (2, 1));
}

/// A source that is not read must not keep the loop awake: there may be no room for what it has.
#[test]
fn sources_are_told_of_once() {
    let mut driven = Driven::new();
    let ((reader, writer), (other_reader, other_writer)) = (pipe(), pipe());
    rustix::io::write(&writer, &[1]).unwrap();
    let (mut worker, told) = Probe::idle(&[0]);
    worker.sources.push(reader.try_clone().unwrap());
    worker.sources.push(other_reader);
    // Two may wait for the same thing.
    let (mut second, of_second) = Probe::idle(&[1]);
    second.sources.push(reader);
    let (_doorbells, running) = driven.start(vec![worker, second]);
    driven.settle();
    assert!(told.calls() >= 1 && of_second.calls() >= 1, "what was there at the start");
    let (before, second_before) = (told.calls(), of_second.calls());
    rustix::io::write(&writer, &[1]).unwrap();
    assert_eq!(driven.settle(), 2);
    rustix::io::write(&other_writer, &[1]).unwrap();
    assert_eq!(driven.settle(), 1);
    drop(other_writer);
    assert_eq!(driven.settle(), 1, "the end is told, and told once");
    assert_eq!((told.calls() - before, of_second.calls() - second_before), (3, 1));
    let workers = running.stop();
    rustix::io::write(&writer, &[1]).unwrap();
    assert_eq!(driven.settle(), 0);
    drop(workers);
    assert!(rustix::io::write(&writer, &[1]).is_err(), "the loop keeps no descriptor of a source");
}

/// It could wait for itself only for ever.
#[test]
fn a_worker_that_stops_its_own_device_is_left_out() {
    let mut driven = Driven::new();
    let running: Arc<Mutex<Option<Box<dyn Running>>>> = Arc::default();
    let theirs = Arc::clone(&running);
    let (worker, told) = Probe::new(&[0], move || {
        let stopped = lock(&theirs).take().map(Running::stop);
        if let Some(workers) = stopped {
            assert_eq!(workers.len(), 1, "the other one");
        }
        Ok(Progress::More)
    });
    let (other, of_other) = Probe::idle(&[1]);
    let (doorbells, started) = driven.start(vec![worker, other]);
    *lock(&running) = Some(started);
    driven.settle();
    assert_eq!(driven.link.failures().len(), 1);
    assert!(driven.link.failures()[0].contains("stopped by its own worker"), "{:?}", driven.link.failures());
    assert_eq!((told.calls(), told.stops(), of_other.stops()), (1, 1, 1));
    assert!(told.dropped.load(Ordering::SeqCst));
    doorbells.ring(0);
    assert_eq!(driven.settle(), 0);
}

#[test]
fn a_loop_that_has_ended_starts_nothing_and_gives_back_what_it_has() {
    let mut driven = Driven::new();
    let (worker, told) = Probe::idle(&[0]);
    let (doorbells, running) = driven.start(vec![worker]);
    driven.settle();
    let executor = driven.event_loop.executor();
    drop(driven.event_loop);
    let (late, of_late) = Probe::idle(&[0]);
    let refused = executor.start(Arc::new(driven.link), &Arc::new(Doorbells::new(1)), vec![late]);
    assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(of_late.calls(), 0);
    doorbells.ring(0);
    assert_eq!((running.stop().len(), told.stops()), (1, 1));
}

/// As after an epoll that a seccomp filter forbids.
#[test]
fn a_loop_that_fails_tells_every_device() {
    let mut driven = Driven::new();
    let ((a, _), (b, of_b)) = (Probe::idle(&[0]), Probe::idle(&[1]));
    let (_, running_a) = driven.start(vec![a]);
    let (_, running_b) = driven.start(vec![b]);
    driven.settle();
    drop(running_a.stop());
    driven.event_loop.shared.fail(&io::Error::from(io::ErrorKind::PermissionDenied));
    assert_eq!(driven.link.failures(), ["permission denied"]);
    assert_eq!((running_b.stop().len(), of_b.stops()), (1, 1));
}

#[test]
fn a_source_that_cannot_be_polled_refuses_to_start() {
    let mut driven = Driven::new();
    let ((good, of_good), (mut bad, of_bad)) = (Probe::idle(&[0]), Probe::idle(&[1]));
    bad.sources.push(tempfile::tempfile().unwrap().into());
    let executor = driven.event_loop.executor();
    let refused =
        executor.start(Arc::new(driven.link.clone()), &Arc::new(Doorbells::new(2)), vec![good, bad]);
    assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!((driven.settle(), of_good.calls(), of_bad.calls()), (0, 0, 0));
}

/// Wake-ups are counted at the clock, which is looked at once in each turn.
#[test]
fn a_loop_with_nothing_to_do_sleeps() {
    let turns = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&turns);
    let clock = move || counter.fetch_add(1, Ordering::SeqCst);
    let thread = EventLoop::new(clock).unwrap().spawn("test").unwrap();
    let (called, calls) = channel();
    let (reader, writer) = pipe();
    let (mut worker, _) = Probe::new(&[0], move || {
        called.send(()).unwrap();
        Ok(Progress::Idle)
    });
    worker.sources.push(reader);
    let doorbells = Arc::new(Doorbells::new(1));
    let executor = thread.executor();
    let running = executor.start(Arc::new(LinkRecorder::default()), &doorbells, vec![worker]).unwrap();
    for round in 0..1000 {
        calls.recv().unwrap();
        if round % 2 == 0 {
            doorbells.ring(0);
        } else {
            rustix::io::write(&writer, &[1]).unwrap();
        }
    }
    drop(running.stop());
    drop(thread);
    // Each event is a turn, as are the start and the end. One event may be told of in two turns: once it is found in the inbox,
    // once by its kick.
    let turns = turns.load(Ordering::SeqCst);
    assert!((1000..=2100).contains(&turns), "{turns} turns for 1000 events");
}
