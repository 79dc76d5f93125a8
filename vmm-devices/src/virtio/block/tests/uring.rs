//! io_uring, where this kernel grants it; and what is done where not.

use std::num::NonZeroUsize;

use rustix::event::{PollFd, PollFlags, poll};

use super::*;

fn disk() -> UringFile {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS as u64 * 512).unwrap();
    UringFile::new(RawFile::new(file, false).unwrap(), ThreadPool::new(NonZeroUsize::MIN).unwrap())
}

fn skipped() -> bool {
    let skipped = !UringFile::is_available();
    if skipped {
        println!("skipped: no io_uring");
    }
    skipped
}

#[test]
fn sources_are_readable_when_requests_have_ended() {
    if skipped() {
        return;
    }
    let disk = Arc::new(disk());
    disk.disk().write_at(&[VolatileSlice::from(&mut *pattern(SECTORS))], 0, false).unwrap();
    let (memory, mut queue, mut worker, _) = bare(Block::concurrent(disk), ALL);
    let memory = memory.memory();
    memory.write_slice(&header(kind::IN, 3), GuestAddress(HEADER)).unwrap();
    memory.write_slice(&header(kind::FLUSH, 0), GuestAddress(HEADER + 16)).unwrap();
    let read = queue.chain().readable(HEADER, 16).writable(DATA, 1024).writable(STATUS, 1).submit().unwrap();
    let flush = queue.chain().readable(HEADER + 16, 16).writable(STATUS + 1, 1).submit().unwrap();
    assert!(worker.process().is_ok());
    while queue.used_index().unwrap() < 2 {
        let sources = worker.sources();
        assert_eq!(sources.len(), 1);
        poll(&mut [PollFd::new(&sources[0], PollFlags::IN)], None).unwrap();
        assert!(worker.process().is_ok());
    }
    let mut used: Vec<_> = std::iter::from_fn(|| queue.take_used().unwrap()).collect();
    used.sort_unstable();
    assert_eq!(used, [(read.into(), 1025), (flush.into(), 1)]);
    let mut data = vec![0; 1024];
    memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert_eq!(data, pattern(SECTORS)[3 * 512..5 * 512]);
}

/// What a ring does not do goes to the pool, and holds nobody up meanwhile: a file system may have no zeros, which takes long then.
#[test]
fn threads_do_what_the_ring_does_not() {
    if skipped() {
        return;
    }
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let hangs = faulty(512);
    let mut other = Rig::new(Block::concurrent(Arc::new(Pooled::new(hangs.clone(), pool.clone()))), ALL);
    let closed = hangs.block();
    other.put_header(kind::OUT, 0);
    other.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    other.driver.notify(0);
    hangs.await_blocked(1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS as u64 * 512).unwrap();
    let disk = Arc::new(UringFile::new(RawFile::new(file, false).unwrap(), pool));
    disk.disk().write_at(&[VolatileSlice::from(&mut *pattern(SECTORS))], 0, false).unwrap();
    let (memory, mut queue, mut worker, _) = bare(Block::concurrent(disk.clone()), ALL);
    let memory = memory.memory();
    for (i, kind) in [(0, kind::WRITE_ZEROES), (1, kind::DISCARD), (2, kind::IN)] {
        let at = HEADER + 64 * i;
        memory.write_slice(&header(kind, 0), GuestAddress(at)).unwrap();
        memory.write_slice(&segment(2 * i, 1, 0), GuestAddress(at + 16)).unwrap();
        let chain = queue.chain();
        let chain = if i == 2 { chain.readable(at, 16).writable(DATA, 512) } else { chain.readable(at, 32) };
        chain.writable(STATUS + i, 1).submit().unwrap();
    }
    while queue.used_index().unwrap() == 0 {
        assert!(worker.process().is_ok());
        std::thread::yield_now();
    }
    assert_eq!(queue.used_index().unwrap(), 1);
    drop(closed);
    while queue.used_index().unwrap() < 3 {
        assert!(worker.process().is_ok());
        std::thread::yield_now();
    }
    let mut statuses = [POISON; 3];
    memory.read_slice(&mut statuses, GuestAddress(STATUS)).unwrap();
    assert_eq!(statuses, [OK; 3]);
    let mut expected = pattern(3);
    expected[..512].fill(0);
    expected[1024..].fill(0);
    let mut bytes = vec![0; 3 * 512];
    disk.disk().read_at(&[VolatileSlice::from(&mut *bytes)], 0).unwrap();
    assert_eq!(bytes, expected);
}

/// CVE-2023-5088, with the kernel in the place of threads: after a stop nothing is written, neither to memory nor to the disk.
#[test]
fn cve_2023_5088_nothing_is_touched_after_a_stop() {
    if skipped() {
        return;
    }
    for _ in 0..50 {
        let disk = Arc::new(disk());
        let (memory, mut queue, mut worker, _) = bare(Block::concurrent(disk.clone()), ALL);
        let memory = memory.memory();
        for i in 0..20 {
            let (at, kind) = (HEADER + 16 * i, if i % 2 == 0 { kind::IN } else { kind::OUT });
            memory.write_slice(&header(kind, i), GuestAddress(at)).unwrap();
            let (chain, data) = (queue.chain().readable(at, 16), DATA + 512 * i);
            let chain = if i % 2 == 0 { chain.writable(data, 512) } else { chain.readable(data, 512) };
            chain.writable(STATUS + i, 1).submit().unwrap();
        }
        memory.write_slice(&[1; 20 * 512], GuestAddress(DATA)).unwrap();
        assert!(worker.process().is_ok());
        worker.stop();
        let used = queue.used_index().unwrap();
        memory.write_slice(&[POISON; 20 * 512], GuestAddress(DATA)).unwrap();
        let contents = || {
            let mut bytes = vec![0; SECTORS * 512];
            disk.disk().read_at(&[VolatileSlice::from(&mut *bytes)], 0).unwrap();
            bytes
        };
        let before = contents();
        drop(worker);
        assert_eq!(queue.used_index().unwrap(), used);
        let mut data = vec![0; 20 * 512];
        memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert!(data.iter().all(|byte| *byte == POISON));
        // Each sector was written where it was to be, or not at all.
        for (sector, bytes) in before.chunks(512).enumerate() {
            let may = sector < 20 && sector % 2 == 1;
            assert!(bytes.iter().all(|byte| *byte == bytes[0]) && (bytes[0] == 0 || may && bytes[0] == 1));
        }
        assert_eq!(contents(), before);
    }
}

#[test]
fn more_requests_than_a_ring_holds_wait_for_their_place() {
    let disk = Arc::new(disk());
    let (memory, line) = (memory(), LineRecorder::default());
    let block = Block::concurrent(disk).queue_size(2048).build().unwrap();
    let transport = VirtioMmio::new(block, memory.clone(), line).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let mut queue = DriverQueue::new(memory.clone(), 0x30000, 2048).unwrap();
    driver.start(ALL, &[(0, &queue)]).unwrap();
    memory.memory().write_slice(&header(kind::IN, 0), GuestAddress(HEADER)).unwrap();
    for i in 0..600 {
        let status = 0x60000 + i;
        queue.chain().readable(HEADER, 16).writable(DATA, 512).writable(status, 1).submit().unwrap();
    }
    while queue.used_index().unwrap() < 600 {
        driver.notify(0);
        std::thread::yield_now();
    }
    let mut statuses = vec![POISON; 600];
    memory.memory().read_slice(&mut statuses, GuestAddress(0x60000)).unwrap();
    assert_eq!(statuses, [OK; 600]);
}

#[test]
fn a_file_that_cannot_be_written_fails_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, pattern(2)).unwrap();
    // Opened for reading, and said to be writable.
    let file = RawFile::new(std::fs::File::open(&path).unwrap(), false).unwrap();
    let disk = UringFile::new(file, ThreadPool::new(NonZeroUsize::MIN).unwrap());
    let mut rig = Rig { patient: true, ..Rig::new(Block::concurrent(Arc::new(disk)), ALL) };
    assert_eq!(rig.give(kind::OUT, 0, &[1; 512]), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 0, 1, 0), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 0, 0, 0), (OK, 1));
    assert_eq!(rig.read(0, 1024), pattern(2));
}

#[test]
fn without_leave_threads_do_it() {
    let disk = Arc::new(disk().forbidden());
    let queue = disk.clone().queue(8, Arc::new(|| ())).unwrap();
    assert!(queue.source().is_none());
    let mut rig = Rig { patient: true, ..Rig::new(Block::concurrent(disk), ALL) };
    assert_eq!(rig.write(2, &pattern(3)), OK);
    assert_eq!(rig.read(2, 3 * 512), pattern(3));
}
