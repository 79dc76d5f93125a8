//! Public flaws of disks and of their like (see also those of the queues, which every device stands on).

use std::num::NonZeroUsize;

use super::*;

/// CVE-2024-8612: a used length that exceeded what was written, so that the driver took what it had itself left in its buffers
/// for the device's.
#[test]
fn cve_2024_8612_the_used_length_is_what_was_written() {
    let (mut rig, probe) = probed(ALL);
    assert_eq!(rig.ask(kind::IN, 0, 1024).1, 1025);
    // The disk fails, or ends within the data: the status is written, and what lies before it is not said to be.
    for state in [(Some(io::ErrorKind::Other), None), (None, Some(0))] {
        probe.fail(state.0);
        probe.shorten(state.1);
        assert_eq!(rig.ask(kind::IN, 0, 1024), (IO_ERROR, 0, vec![POISON; 1024]));
    }
    assert_eq!(rig.ask(kind::OUT, 0, 1024).1, 0, "a write that has room for data");
    assert_eq!(rig.ask(kind::FLUSH, 0, 8).1, 0);
    assert_eq!(rig.ask(77, 0, 1024).1, 0);
}

/// CVE-2023-5088: a reset while a request was in flight made it write the first sector. Here a reset waits until it has ended
/// where it was to; those that had not begun never do, and the driver that has gone hears of none.
#[test]
fn cve_2023_5088_a_reset_with_io_in_flight_misdirects_no_write() {
    let probe = faulty(SECTORS as u64 * 512);
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let disk = Arc::new(Pooled::new(probe.clone(), pool));
    let mut rig = Rig::new(Block::concurrent(disk), ALL);
    let closed = probe.block();
    rig.put(DATA, &[0xaa; 512]);
    for (header_at, sector) in [(HEADER, 40), (HEADER + 16, 10)] {
        rig.put(header_at, &header(kind::OUT, sector));
        rig.queue.chain().readable(header_at, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    }
    rig.driver.notify(0);
    probe.await_blocked(1);
    let driver = Arc::new(rig.driver);
    let (resetting, theirs) = (Arc::new(AtomicBool::new(true)), Arc::clone(&driver));
    let flag = Arc::clone(&resetting);
    let resetter = std::thread::spawn(move || {
        theirs.set_status(0);
        flag.store(false, Ordering::SeqCst);
    });
    // However long this is, the reset has not ended; without the wait it would have, as a rule.
    std::thread::sleep(std::time::Duration::from_millis(150));
    let waited = resetting.load(Ordering::SeqCst);
    drop(closed);
    resetter.join().unwrap();
    assert!(waited, "it waits for the write that goes on");
    assert_eq!(driver.status(), 0);
    // The second write was begun before the reset came, or never.
    let begun = calls(&probe);
    assert_eq!(begun[0], "write 20480 512");
    assert!(begun[1..].is_empty() || begun[1..] == ["write 5120 512"], "{begun:?}");
    let mut bytes = vec![0; SECTORS * 512];
    probe.contents().read(0, &mut bytes).unwrap();
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        let written = sector == 40 || sector == 10 && begun.len() > 1;
        assert_eq!(bytes, [if written { 0xaa } else { 0 }; 512], "sector {sector}");
    }
    // Nobody is left who would touch anything.
    let used = rig.queue.used_index().unwrap();
    rig.memory.memory().write_obj(POISON, GuestAddress(STATUS)).unwrap();
    driver.notify(0);
    assert_eq!(rig.queue.used_index().unwrap(), used);
    assert_eq!(rig.memory.memory().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), POISON);
    assert!(calls(&probe).is_empty());
}

/// CVE-2026-45782: a head that was made available again while its request was in flight. The driver has broken the rules: the
/// device stops, and what was in flight ends once.
#[test]
fn cve_2026_45782_a_head_in_flight_is_not_taken_again() {
    let probe = faulty(SECTORS as u64 * 512);
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    let mut rig = Rig::new(Block::concurrent(Arc::new(Pooled::new(probe.clone(), pool))), ALL);
    let closed = probe.block();
    rig.put_header(kind::IN, 0);
    let head =
        rig.queue.chain().readable(HEADER, 16).writable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(0);
    probe.await_blocked(1);
    rig.queue.make_available(head).unwrap();
    rig.driver.notify(0);
    assert_eq!(rig.driver.status() & 0x40, 0x40);
    drop(closed);
    rig.driver.set_status(0);
    assert_eq!((calls(&probe).len(), rig.queue.used_index().unwrap()), (1, 0));
}

/// CVE-2021-3929 and CVE-2024-3446: descriptors that point at the registers of the device itself, or of any other. Those are
/// no RAM: nothing reaches them.
#[test]
fn cve_2021_3929_buffers_reach_no_registers() {
    let (mut rig, probe) = probed(ALL);
    let registers = 0xd000_0000;
    let status = rig.driver.status();
    for (kind, readable) in [(kind::IN, false), (kind::OUT, true), (kind::GET_ID, false)] {
        for register in [0x50, 0x70] {
            rig.put_header(kind, 0);
            rig.put(STATUS, &[POISON]);
            let chain = rig.queue.chain().readable(HEADER, 16);
            let chain = if readable {
                chain.readable(registers + register, 512)
            } else {
                chain.writable(registers + register, 512)
            };
            let head = chain.writable(STATUS, 1).submit().unwrap();
            assert_eq!(rig.ended(head), (IO_ERROR, u32::from(readable)));
        }
    }
    let head = rig.queue.chain().readable(registers, 16).writable(STATUS, 1).submit().unwrap();
    assert_eq!(rig.ended(head).0, IO_ERROR);
    assert!(calls(&probe).is_empty());
    assert_eq!(rig.driver.status(), status);
}

/// CVE-2019-18960: buffers across two regions of memory. Each byte goes where its address says.
#[test]
fn cve_2019_18960_data_may_lie_across_regions() {
    let (mut rig, _) = probed(ALL);
    let data = pattern(4);
    assert_eq!(rig.write(2, &data), OK);
    rig.put_header(kind::IN, 2);
    rig.put(0x1ff00, &vec![POISON; 4096]);
    let chain = rig.queue.chain().readable(HEADER, 16).writable(0x1ffff - 1000, 2048).writable(STATUS, 1);
    let head = chain.submit().unwrap();
    assert_eq!(rig.ended(head), (OK, 2049));
    assert_eq!(rig.get(0x1ffff - 1000, 2048), data);
    assert_eq!(rig.get(0x1ffff - 1000 + 2048, 1), [POISON]);
}

/// CVE-2020-14364: a length that was kept before it was checked. A refused request leaves device and disk as they were.
#[test]
fn cve_2020_14364_a_refused_request_leaves_no_trace() {
    let (mut rig, probe) = probed(ALL);
    let data = pattern(SECTORS);
    assert_eq!(rig.write(0, &data), OK);
    let mut config = [[0; 8]; 8];
    (0..).step_by(8).zip(&mut config).for_each(|(at, bytes)| rig.driver.read_config(at, bytes));
    let generation = rig.driver.config_generation();
    calls(&probe);
    for _ in 0..3 {
        rig.give(kind::OUT, SECTORS as u64, &[1; 512]);
        rig.give(kind::OUT, u64::MAX, &[1; 512]);
        rig.give(kind::OUT, 0, &[1; 100]);
        rig.segment(kind::WRITE_ZEROES, 0, u32::MAX, 0);
        rig.segment(kind::WRITE_ZEROES, 0, 1, 8);
        rig.segment(kind::DISCARD, SECTORS as u64 - 1, 2, 0);
        rig.ask(kind::GET_ID, 0, 3);
        rig.give(99, 0, &[1; 512]);
    }
    assert!(calls(&probe).is_empty());
    assert_eq!(rig.read(0, data.len()), data);
    for (at, bytes) in (0..).step_by(8).zip(config) {
        let mut now = [0; 8];
        rig.driver.read_config(at, &mut now);
        assert_eq!(now, bytes);
    }
    assert_eq!(rig.driver.config_generation(), generation);
}

/// CVE-2023-41051: a memory whose slices are shorter than what was asked for, which was trusted. What is not all there is not
/// RAM.
#[test]
fn cve_2023_41051_short_slices_are_not_trusted() {
    let memory = short::memory();
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    let probe = faulty(4096);
    let line = LineRecorder::default();
    let block = Block::builder(probe.clone()).build().unwrap();
    let transport = VirtioMmio::new(block, memory.clone(), line).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    driver.start(ALL, &[(0, &queue)]).unwrap();
    for kind in [kind::IN, kind::OUT] {
        memory.write_slice(&header(kind, 0), GuestAddress(HEADER)).unwrap();
        let chain = queue.chain().readable(HEADER, 16);
        let chain = match kind {
            kind::IN => chain.writable(short::PAGE, 4096),
            _ => chain.readable(short::PAGE, 4096),
        };
        let head = chain.writable(STATUS, 1).submit().unwrap();
        driver.notify(0);
        let used = queue.take_used().unwrap();
        assert_eq!(used, Some((head.into(), if kind == kind::IN { 0 } else { 1 })));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IO_ERROR);
    }
    assert!(calls(&probe).is_empty());
}

/// A memory with a page whose slices are short.
mod short {
    use vmm_memory::vm_memory::bitmap::BS;
    use vmm_memory::vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
    use vmm_memory::vm_memory::{
        GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap, Permissions, VolatileSlice,
    };

    use super::*;

    pub(super) const PAGE: u64 = 0x10000;

    pub(super) struct Short(GuestMemoryMmap<()>);

    pub(super) fn memory() -> Arc<Short> {
        Arc::new(Short(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20000)]).unwrap()))
    }

    struct Slices<I>(I, bool);

    impl<'a, I: Iterator<Item = Result<VolatileSlice<'a>>>> Iterator for Slices<I> {
        type Item = Result<VolatileSlice<'a>>;

        fn next(&mut self) -> Option<Self::Item> {
            let slice = self.0.next()?;
            Some(slice.map(|slice| if self.1 { slice.subslice(0, slice.len() / 2).unwrap() } else { slice }))
        }
    }

    impl<'a, I: Iterator<Item = Result<VolatileSlice<'a>>>> std::iter::FusedIterator for Slices<I> {}
    impl<'a, I: Iterator<Item = Result<VolatileSlice<'a>>>> GuestMemorySliceIterator<'a, ()> for Slices<I> {}

    impl GuestMemory for Short {
        type PhysicalMemory = GuestMemoryMmap<()>;
        type Bitmap = <GuestRegionMmap<()> as vmm_memory::vm_memory::GuestMemoryRegion>::B;

        fn check_range(&self, gpa: GuestAddress, len: usize, access: Permissions) -> bool {
            GuestMemory::check_range(&self.0, gpa, len, access)
        }

        fn get_slices<'a>(
            &'a self,
            gpa: GuestAddress,
            len: usize,
            access: Permissions,
        ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
            let slices = GuestMemory::get_slices(&self.0, gpa, len, access)?;
            Ok(Slices(slices, gpa.0 == PAGE))
        }
    }
}
