//! Requests that go on while others are made.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::*;
use crate::ManualClock;
use crate::virtio::Progress;
use crate::virtio::metrics::Ended;

fn pooled(threads: usize) -> (Rig, Arc<FaultyDisk>) {
    let probe = faulty(SECTORS as u64 * 512);
    let pool = ThreadPool::new(NonZeroUsize::new(threads).unwrap()).unwrap();
    (Rig::new(Block::concurrent(Arc::new(Pooled::new(probe.clone(), pool))), ALL), probe)
}

/// Waits until the device has used so many chains; the guest looks at its ring.
fn await_used(rig: &Rig, used: u16) {
    while rig.queue.used_index().unwrap() != used {
        std::thread::yield_now();
    }
}

#[test]
fn requests_overtake_each_other() {
    let (mut rig, probe) = pooled(2);
    probe.contents().write(0, &pattern(SECTORS)).unwrap();
    let closed = probe.block();
    for i in 0..2 {
        let (at, data) = (HEADER + 32 * i, DATA + 1024 * i);
        rig.put(at, &header(kind::IN, 5 + i));
        rig.queue.chain().readable(at, 16).writable(data, 512).writable(STATUS + i, 1).submit().unwrap();
    }
    rig.driver.notify(0);
    probe.await_blocked(2);
    assert_eq!(rig.queue.take_used().unwrap(), None);
    // What needs no disk does not wait for it.
    rig.put(HEADER + 64, &header(kind::GET_ID, 0));
    let head = rig
        .queue
        .chain()
        .readable(HEADER + 64, 16)
        .writable(DATA + 4096, 20)
        .writable(STATUS + 2, 1)
        .submit();
    rig.driver.notify(0);
    assert_eq!(rig.queue.take_used().unwrap(), Some((head.unwrap().into(), 21)));
    drop(closed);
    await_used(&rig, 3);
    let ended: Vec<_> = std::iter::from_fn(|| rig.queue.take_used().unwrap()).collect();
    assert!(ended.iter().all(|(_, written)| *written == 513), "{ended:?}");
    assert_eq!(rig.get(DATA, 512), pattern(SECTORS)[5 * 512..6 * 512]);
    assert_eq!(rig.get(DATA + 1024, 512), pattern(SECTORS)[6 * 512..7 * 512]);
    assert_eq!(rig.get(STATUS, 2), [OK, OK]);
}

#[test]
fn a_disk_is_cut_off_when_nothing_writes_there_any_more() {
    let (mut rig, probe) = pooled(2);
    assert!(rig.handle.settle(Duration::ZERO), "it never was larger");
    let closed = probe.block();
    for (i, sector) in [(0, 60), (1, 1)] {
        rig.put(HEADER + 16 * i, &header(kind::OUT, sector));
        let chain = rig.queue.chain().readable(HEADER + 16 * i, 16).readable(DATA, 512);
        chain.writable(STATUS, 1).submit().unwrap();
    }
    rig.driver.notify(0);
    probe.await_blocked(2);
    rig.handle.set_capacity(10 * 512).unwrap();
    assert!(!rig.handle.settle(Duration::ZERO));
    // What comes later goes to the new end, and is not waited for.
    rig.put(HEADER + 32, &header(kind::OUT, 2));
    rig.queue.chain().readable(HEADER + 32, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(0);
    let handle = rig.handle.clone();
    let waiter = std::thread::spawn(move || handle.settle(Duration::from_secs(60)));
    assert!(!rig.handle.settle(Duration::from_millis(20)));
    assert!(!waiter.is_finished());
    drop(closed);
    assert!(waiter.join().unwrap());
    let mut calls = calls(&probe);
    calls[..2].sort_unstable();
    assert_eq!(calls[..2], ["write 30720 512", "write 512 512"]);
    // Nobody is left at all.
    rig.driver.set_status(0);
    rig.handle.set_capacity(512).unwrap();
    assert!(rig.handle.settle(Duration::ZERO));
}

#[test]
fn what_comes_after_a_disk_has_become_smaller_is_not_waited_for() {
    let (mut rig, probe) = pooled(1);
    rig.handle.set_capacity(10 * 512).unwrap();
    let _closed = probe.block();
    rig.put_header(kind::OUT, 9);
    rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(0);
    probe.await_blocked(1);
    assert!(rig.handle.settle(Duration::ZERO));
}

#[test]
fn who_waits_for_itself_waits_no_longer_than_it_says() {
    let probe = faulty(SECTORS as u64 * 512);
    let mut rig = Rig::new(Block::builder(probe.clone()), ALL);
    let (handle, heard) = (rig.handle.clone(), Arc::new(AtomicBool::new(true)));
    let tell = Arc::clone(&heard);
    let during = move || {
        handle.set_capacity(512).unwrap();
        tell.store(handle.settle(Duration::from_millis(20)), Ordering::SeqCst);
    };
    probe.during(during);
    assert_eq!(rig.write(60, &[1; 512]), OK);
    assert!(!heard.load(Ordering::SeqCst));
    assert!(rig.handle.settle(Duration::ZERO));
}

#[test]
fn failures_come_back_too() {
    let (mut rig, probe) = pooled(1);
    probe.fail(Some(io::ErrorKind::Other));
    rig.put_header(kind::OUT, 0);
    rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(0);
    await_used(&rig, 1);
    assert_eq!(rig.get(STATUS, 1), [IO_ERROR]);
}

#[test]
fn a_backend_that_panics_fails_its_request() {
    struct Panics;
    impl Backend for Panics {
        fn size(&self) -> io::Result<u64> {
            Ok(1 << 20)
        }
        fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<usize> {
            panic!("the test wants it")
        }
        fn write_at(&self, buffers: &[VolatileSlice<'_>], _: u64, _: bool) -> io::Result<usize> {
            Ok(buffers.iter().map(VolatileSlice::len).sum())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let mut rig = Rig::new(Block::concurrent(Arc::new(Pooled::new(Arc::new(Panics), pool))), 0);
    for (used, (kind, status)) in (1..).zip([(kind::IN, IO_ERROR), (kind::OUT, OK), (kind::IN, IO_ERROR)]) {
        rig.put_header(kind, 0);
        let chain = rig.queue.chain().readable(HEADER, 16);
        let chain = if kind == kind::IN { chain.writable(DATA, 512) } else { chain.readable(DATA, 512) };
        chain.writable(STATUS, 1).submit().unwrap();
        rig.driver.notify(0);
        await_used(&rig, used);
        assert_eq!(rig.get(STATUS, 1), [status]);
    }
}

#[test]
fn a_panic_of_who_is_told_ends_no_thread() {
    struct Panics(AtomicBool);
    impl Metrics for Panics {
        fn ended(&self, _: Ended) {
            assert!(self.0.swap(true, Ordering::SeqCst), "the test wants it");
        }
    }
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let probe = faulty(512);
    let disk = Arc::new(Pooled::new(probe.clone(), pool));
    let metrics = Arc::new(Panics(AtomicBool::new(false)));
    let mut rig = Rig::new(Block::concurrent(disk).metrics(metrics.clone(), ManualClock::new(0)), ALL);
    rig.put_header(kind::OUT, 0);
    for used in 0..2 {
        rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
        let closed = probe.block();
        rig.driver.notify(0);
        drop(closed);
        // Who is told of the first, by the thread that has ended it, panics, and the guest never hears of that request.
        while !metrics.0.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        // The panic may still be under way, in which nobody answers.
        while rig.queue.used_index().unwrap() != used {
            rig.driver.notify(0);
            std::thread::yield_now();
        }
    }
}

/// A disk that hangs holds the pool's threads, and what waits for them there. That is no reason to hold up another disk's reset.
#[test]
fn what_has_not_begun_is_given_up_at_once() {
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let probes = [0, 1].map(|_| faulty(512));
    let mut rigs = probes
        .each_ref()
        .map(|probe| Rig::new(Block::concurrent(Arc::new(Pooled::new(probe.clone(), pool.clone()))), ALL));
    let closed = probes[0].block();
    for rig in &mut rigs {
        rig.put_header(kind::OUT, 0);
        rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
        rig.driver.notify(0);
    }
    probes[0].await_blocked(1);
    let [_first, second] = rigs;
    let (tell, told) = std::sync::mpsc::channel();
    let resetter = std::thread::spawn(move || {
        second.driver.set_status(0);
        tell.send(()).unwrap();
    });
    let told = told.recv_timeout(Duration::from_secs(20));
    drop(closed);
    resetter.join().unwrap();
    assert_eq!(told, Ok(()));
    assert!(calls(&probes[1]).is_empty());
}

#[test]
fn a_host_that_takes_no_more_is_asked_again_soon() {
    #[derive(Debug)]
    struct Stuck(Option<u16>, u32);
    impl IoQueue for Stuck {
        fn submit(&mut self, job: Job) {
            self.0 = Some(job.tag);
        }
        fn reap(&mut self, ended: &mut Vec<JobEnd>) -> Progress {
            if self.0.is_none() || self.1 > 0 {
                self.1 = self.1.saturating_sub(1);
                return if self.0.is_some() { Progress::More } else { Progress::Idle };
            }
            ended.extend(self.0.take().map(|tag| JobEnd { tag, result: Ok(()) }));
            Progress::Idle
        }
        fn drain(&mut self) {}
        fn cancel(&mut self) {}
    }
    struct Disk;
    impl ConcurrentDisk for Disk {
        fn disk(&self) -> Arc<dyn Backend> {
            faulty(512)
        }
        fn queue(&self, _: u16, _: Waker) -> io::Result<Box<dyn IoQueue>> {
            Ok(Box::new(Stuck(None, 6)))
        }
    }
    // Nobody calls a worker in vain that says it has nothing to do.
    let mut rig = Rig::new(Block::concurrent(Arc::new(Disk)), ALL);
    assert_eq!(rig.give(kind::FLUSH, 0, &[]), (OK, 1));
}

/// Each chain may be as long as the queue, and there may be as many: all of them at once would be too much to remember.
#[test]
fn what_is_under_way_is_bounded_and_all_is_served() {
    type Jobs = Arc<Mutex<(Vec<Job>, bool)>>;
    struct Keeps(Jobs);
    impl fmt::Debug for Keeps {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Keeps")
        }
    }
    impl IoQueue for Keeps {
        fn submit(&mut self, job: Job) {
            self.0.lock().unwrap().0.push(job);
        }
        fn reap(&mut self, ended: &mut Vec<JobEnd>) -> Progress {
            let (jobs, end) = &mut *self.0.lock().unwrap();
            if *end {
                ended.extend(jobs.drain(..).map(|job| JobEnd { tag: job.tag, result: Ok(()) }));
            }
            Progress::Idle
        }
        fn drain(&mut self) {
            self.0.lock().unwrap().1 = true;
        }
        fn cancel(&mut self) {
            self.0.lock().unwrap().0.clear();
        }
    }
    struct Disk(Jobs);
    impl ConcurrentDisk for Disk {
        fn disk(&self) -> Arc<dyn Backend> {
            faulty(1 << 20)
        }
        fn queue(&self, _: u16, _: Waker) -> io::Result<Box<dyn IoQueue>> {
            Ok(Box::new(Keeps(Arc::clone(&self.0))))
        }
    }
    let jobs = Jobs::default();
    let disk = Block::concurrent(Arc::new(Disk(Arc::clone(&jobs))));
    let (memory, mut queue, mut worker, _) = bare_in(memory(), 1024, disk, ALL);
    memory.memory().write_slice(&header(kind::IN, 0), GuestAddress(0xb0000)).unwrap();
    for _ in 0..1024 {
        let mut chain = queue.chain().readable(0xb0000, 16);
        // A sector in all, so that this is what ends a turn.
        for i in 0..510 {
            chain = chain.writable(DATA, if i < 508 { 1 } else { 2 });
        }
        chain.writable(0xb1000, 1).submit_indirect(0xc0000).unwrap();
    }
    while worker.process().unwrap() == Progress::More {}
    let under_way = jobs.lock().unwrap().0.len();
    assert_eq!(under_way, 128);
    assert_eq!((worker.process().unwrap(), jobs.lock().unwrap().0.len()), (Progress::Idle, under_way));
    // One wake-up is enough: from there on it goes on by itself, though what it takes has ended before it looks again.
    jobs.lock().unwrap().1 = true;
    while worker.process().unwrap() == Progress::More {}
    assert_eq!(queue.used_index().unwrap(), 1024);
}

#[test]
fn a_pool_serves_all_queues_of_all_disks() {
    let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap()).unwrap();
    let mut rigs: Vec<_> = (0..3)
        .map(|_| {
            let probe = faulty(SECTORS as u64 * 512);
            let disk = Arc::new(Pooled::new(probe.clone(), Arc::clone(&pool)));
            (Rig::new(Block::concurrent(disk), ALL), probe)
        })
        .collect();
    drop(pool);
    for round in 0..20u8 {
        for (i, (rig, _)) in (0..).zip(&mut rigs) {
            rig.put_header(kind::OUT, u64::from(round));
            rig.put(DATA, &[round + i; 512]);
            rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
            rig.driver.notify(0);
        }
        for (rig, _) in &rigs {
            await_used(rig, u16::from(round) + 1);
        }
    }
    for (i, (rig, probe)) in (0..).zip(rigs) {
        // The threads end with the last disk.
        drop(rig);
        let mut bytes = vec![0; 20 * 512];
        probe.contents().read(0, &mut bytes).unwrap();
        assert!((0..20).all(|round| bytes[usize::from(round) * 512..][..512] == [round + i; 512]));
    }
}
