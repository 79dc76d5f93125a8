//! Whoever follows the guest's memory by dirty pages misses none that a disk was read into.

use std::num::NonZeroUsize;

use vmm_memory::{DirtyTracker, GuestRam};

use super::*;

/// Memory whose dirty pages are known, and a worker in it for which a read into [`DATA`] waits.
fn waiting(disk: BlockBuilder) -> (DirtyTracker, DriverQueue<Memory>, Box<dyn Worker>) {
    let ram = GuestRam::builder().ram(1 << 20).track_dirty(true).build().unwrap();
    let (memory, mut queue, worker, _) = bare_in(ram.address_space(), 64, disk, ALL);
    memory.memory().write_slice(&header(kind::IN, 0), GuestAddress(HEADER)).unwrap();
    queue.chain().readable(HEADER, 16).writable(DATA, 8192).writable(STATUS, 1).submit().unwrap();
    let tracker = DirtyTracker::new(&ram);
    tracker.harvest().unwrap();
    (tracker, queue, worker)
}

fn data_is_dirty(tracker: &DirtyTracker) -> bool {
    let pages = [DATA, DATA + 4096];
    let dirty = tracker.harvest().unwrap();
    pages.iter().all(|page| dirty.ranges().any(|(at, len)| (at.0..at.0 + len).contains(page)))
}

#[test]
fn what_was_read_is_dirty() {
    let (tracker, queue, mut worker) = waiting(Block::builder(faulty(8192)));
    assert!(worker.process().is_ok());
    assert_eq!(queue.used_index().unwrap(), 1);
    assert!(data_is_dirty(&tracker));
}

#[test]
fn so_is_what_was_read_by_others() {
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let disk = Arc::new(Pooled::new(faulty(8192), pool));
    let (tracker, queue, mut worker) = waiting(Block::concurrent(disk));
    while queue.used_index().unwrap() == 0 {
        assert!(worker.process().is_ok());
        std::thread::yield_now();
    }
    assert!(data_is_dirty(&tracker));
}

#[test]
fn so_is_what_was_being_read_at_a_stop() {
    let probe = faulty(8192);
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let disk = Arc::new(Pooled::new(probe.clone(), pool));
    let (tracker, queue, mut worker) = waiting(Block::concurrent(disk));
    let closed = probe.block();
    assert!(worker.process().is_ok());
    probe.await_blocked(1);
    drop(closed);
    worker.stop();
    assert_eq!((queue.used_index().unwrap(), calls(&probe).len()), (0, 1));
    assert!(data_is_dirty(&tracker));
}
