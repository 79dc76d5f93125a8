use std::io;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_memory::{Backing, GuestRam, RegionConfig};

use super::*;
use crate::interrupt::lock;
use crate::testkit::{
    Driver, DriverQueue, LineRecorder, LinkRecorder, Memory, MmioDriver, StartError, guest_memory,
    guest_memory_of,
};
use crate::virtio::metrics::Totals;
use crate::virtio::{Doorbells, Progress, VirtioMmio, Virtqueue};

mod hostile;
mod model;
mod race;
mod statistics;

const MIB: u64 = 1 << 20;
/// Page numbers that a driver has written go here.
const NUMBERS: u64 = 0x8000;

/// Writes down what it is given.
#[derive(Clone, Default)]
struct Ledger(Arc<Lists>);

#[derive(Default)]
struct Lists {
    released: Mutex<Vec<(u64, u64)>>,
    reclaimed: Mutex<Vec<(u64, u64)>>,
    refuse: AtomicBool,
}

impl Ledger {
    /// First page and number of pages of each call.
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *lock(&self.0.released))
    }

    fn note(&self, list: &Mutex<Vec<(u64, u64)>>, gpa: GuestAddress, len: u64) -> io::Result<()> {
        assert!(gpa.0.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0);
        if self.0.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        lock(list).push((gpa.0 / PAGE, len / PAGE));
        Ok(())
    }
}

impl MemoryRelease for Ledger {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.note(&self.0.released, gpa, len)
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.note(&self.0.reclaimed, gpa, len)
    }
}

/// A balloon with its driver, whose queues lie in the first pages.
struct Test {
    driver: MmioDriver,
    handle: BalloonHandle,
    line: LineRecorder,
    memory: Memory,
    queues: Vec<DriverQueue<Memory>>,
}

/// One for each number, in a page of its own.
fn queues(memory: &Memory) -> Vec<DriverQueue<Memory>> {
    (1..6).map(|page| DriverQueue::new(memory.clone(), 0x1000 * page, 64).unwrap()).collect()
}

impl Test {
    fn new(balloon: Balloon, memory: Memory) -> Self {
        let (handle, line) = (balloon.handle(), LineRecorder::default());
        let transport = VirtioMmio::new(balloon, memory.clone(), line.clone()).unwrap();
        let queues = queues(&memory);
        Self { driver: MmioDriver::new(Arc::new(Mutex::new(transport))), handle, line, memory, queues }
    }

    fn start(&self, features: u64, queues: &[u16]) {
        let queues: Vec<_> = queues.iter().map(|index| (*index, &self.queues[usize::from(*index)])).collect();
        self.driver.start(features, &queues).unwrap();
    }

    fn write_numbers(&self, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.memory.memory().write_slice(&bytes, GuestAddress(NUMBERS)).unwrap();
    }

    /// Sends page numbers, and waits until the device has used them.
    fn send(&mut self, queue: u16, numbers: &[u32]) {
        self.write_numbers(numbers);
        let len = u32::try_from(4 * numbers.len()).unwrap();
        let driver = &mut self.queues[usize::from(queue)];
        let head = driver.chain().readable(NUMBERS, len).submit().unwrap();
        self.driver.notify(queue);
        assert_eq!(driver.take_used().unwrap(), Some((head.into(), 0)));
    }

    /// Reports free pages. CVE-2024-8612: nothing is written, and so it is said.
    fn report(&mut self, buffers: &[(u64, u32)]) {
        let driver = &mut self.queues[4];
        let chain = buffers.iter().fold(driver.chain(), |chain, (gpa, len)| chain.writable(*gpa, *len));
        let head = chain.submit().unwrap();
        self.driver.notify(4);
        assert_eq!(driver.take_used().unwrap(), Some((head.into(), 0)));
    }
}

fn test(memory: Memory) -> (Test, Ledger) {
    let ledger = Ledger::default();
    (Test::new(Balloon::new(ledger.clone()), memory), ledger)
}

fn read<const N: usize>(driver: &MmioDriver, offset: u64) -> [u8; N] {
    let mut data = [0xaa; N];
    driver.read_config(offset, &mut data);
    data
}

#[test]
fn the_size_asked_for_is_a_change_of_configuration() {
    let (t, _) = test(guest_memory(MIB).unwrap());
    t.handle.set_target(5);
    assert_eq!(t.line.take(), [], "no driver is there");
    t.start(0, &[0, 1]);
    assert!(t.handle.is_active());
    assert_eq!(read(&t.driver, 0), 5_u32.to_le_bytes());
    let generation = t.driver.config_generation();
    t.handle.set_target(5);
    assert_eq!((t.driver.config_generation(), t.line.take()), (generation, vec![]), "it is the same");
    let handle = t.handle.clone();
    std::thread::spawn(move || handle.set_target(0x1234_5678)).join().unwrap();
    assert_ne!(t.driver.config_generation(), generation);
    assert_eq!((t.line.take(), t.driver.interrupt_status()), (vec![true], 2));
    assert_eq!(read(&t.driver, 0), [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0]);
    t.driver.write_config(4, &77_u32.to_le_bytes());
    assert_eq!((t.handle.actual(), t.handle.target()), (77, 0x1234_5678));
    t.driver.set_status(0);
    assert_eq!((t.handle.actual(), t.handle.target(), t.handle.is_active()), (0, 0x1234_5678, false));
}

#[test]
fn the_configuration_is_written_at_any_width_and_place() {
    let (t, _) = test(guest_memory(MIB).unwrap());
    for (offset, data) in [(5, &[1, 2][..]), (0, &[9; 5]), (7, &[3, 9, 9, 9, 9, 4, 5, 6]), (16, &[9; 8])] {
        t.driver.write_config(offset, data);
    }
    assert_eq!(read(&t.driver, 0), [0, 0, 0, 0, 9, 1, 2, 3]);
    assert_eq!(read(&t.driver, 8), [0, 0, 0, 0, 4, 5, 6, 0]);
    t.driver.write_config(15, &[7, 9]);
    assert_eq!(read(&t.driver, 13), [5, 6, 7, 0, 0, 0, 0, 0]);
    t.driver.write_config(0xff, &[1; 8]);
    assert_eq!(read(&t.driver, 0xff), [0; 8]);
    assert_eq!(t.handle.actual(), 0x0302_0109);
}

#[test]
fn numbers_become_runs() {
    let (mut t, ledger) = test(guest_memory(MIB).unwrap());
    t.start(0, &[0, 1]);
    t.send(0, &[0x50, 0x20, 0x22, 0x21, 0x50, 0x1f, 0x51, 0x20]);
    assert_eq!(ledger.take(), [(0x1f, 4), (0x50, 2)]);
    t.send(1, &[0x21, 0x20]);
    assert_eq!(ledger.take(), []);
    assert_eq!(*lock(&ledger.0.reclaimed), [(0x20, 2)]);
    let counters = t.handle.counters();
    assert_eq!((counters.inflated, counters.deflated, counters.requests), (6, 2, 2));
    assert_eq!((t.line.is_asserted(), t.driver.interrupt_status()), (true, 1));
}

/// In pieces that split a number, and with half a number at the end.
#[test]
fn numbers_may_lie_in_pieces() {
    let (mut t, ledger) = test(guest_memory(MIB).unwrap());
    t.start(0, &[0, 1]);
    t.write_numbers(&[0x40, 0x1_0080, 0x7]);
    t.memory.memory().write_slice(&[0x01, 0, 0, 0x77], GuestAddress(NUMBERS + 0x100)).unwrap();
    let chain = t.queues[0].chain().readable(NUMBERS, 5).readable(NUMBERS + 0x100, 1);
    chain.readable(NUMBERS + 0x101, 2).readable(NUMBERS + 8, 3).writable(0x9000, 4).submit().unwrap();
    t.driver.notify(0);
    assert_eq!(t.queues[0].take_used().unwrap(), Some((0, 0)));
    // 0x40, then 80 01 00 00, then three bytes.
    assert_eq!(ledger.take(), [(0x40, 1)]);
    assert_eq!(t.handle.counters().skipped, 1);
}

#[test]
fn poisoned_pages_are_kept() {
    let (mut t, ledger) = test(guest_memory(MIB).unwrap());
    t.start(feature::PAGE_REPORTING | feature::PAGE_POISON, &[0, 1, 4]);
    t.report(&[(0x2_0000, 0x1000)]);
    t.driver.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
    t.report(&[(0x3_0000, 0x2000)]);
    t.send(0, &[0x40]);
    assert_eq!(ledger.take(), [(0x20, 1), (0x40, 1)], "what is in the balloon holds nothing");
    assert_eq!(t.handle.counters().poisoned, 2);
    // Without the feature the value means nothing; a reset forgets it.
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    t.driver.write_config(12, &1_u32.to_le_bytes());
    t.queues = queues(&t.memory);
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    t.report(&[(0x3_0000, 0x2000)]);
    assert_eq!((ledger.take(), read(&t.driver, 12)), (vec![(0x30, 2)], [0; 4]));
}

/// Linux numbers the queues that it uses one after the other; 5.5.2 leaves out those that it does not.
#[test]
fn queues_are_found_in_either_numbering() {
    let (stats, report) = (feature::STATS_VQ, feature::PAGE_REPORTING);
    for (features, queues, expected) in [
        (0, &[0, 1][..], [None, None]),
        (stats, &[0, 1, 2], [Some(2), None]),
        (stats | report, &[0, 1, 2, 4], [Some(2), Some(4)]),
        (stats | report, &[0, 1, 2, 3], [Some(2), Some(3)]),
        (report, &[0, 1, 4], [None, Some(4)]),
        (report, &[0, 1, 2], [None, Some(2)]),
        (stats | report, &[0, 1, 2], [Some(2), None]),
        (stats | report, &[0, 1], [None, None]),
        (0, &[0, 1, 2, 3, 4], [None, None]),
    ] {
        let memory = guest_memory(MIB).unwrap();
        let link = Arc::new(LinkRecorder::default());
        let mut activation = Activation {
            features,
            queues: (0..5).map(|_| None).collect(),
            link: link.clone(),
            doorbells: Arc::new(Doorbells::new(5)),
        };
        for index in queues {
            let queue = DriverQueue::new(memory.clone(), 0x1000 * u64::from(index + 1), 64).unwrap();
            let queue = queue.device_side().unwrap();
            let queue = Virtqueue::new(queue, *index, memory.clone(), link.clone()).unwrap();
            activation.queues[usize::from(*index)] = Some(queue);
        }
        assert_eq!(optional_queues(&activation), expected, "{features:#x} {queues:?}");
        let workers = Balloon::new(Ledger::default()).activate(activation).unwrap();
        let mut served: Vec<_> = workers.iter().flat_map(|worker| worker.queues()).collect();
        served.sort_unstable();
        assert_eq!(served, [vec![0, 1], expected.into_iter().flatten().collect()].concat());
    }
    let (t, _) = test(guest_memory(MIB).unwrap());
    let one_missing = t.driver.start(0, &[(0, &t.queues[0])]);
    assert!(one_missing.is_err());
}

#[test]
fn features_are_what_the_builder_says() {
    let features = |balloon: &Balloon| VirtioDevice::<Memory>::features(balloon);
    assert_eq!(features(&Balloon::new(Ledger::default())), 0b11_0110);
    let none =
        Balloon::builder(Ledger::default()).deflate_on_oom(false).statistics(false).page_reporting(false);
    assert_eq!(features(&none.build()), 0);
    let all = Balloon::builder(Ledger::default()).must_tell_host(true).target(9).build();
    assert_eq!((features(&all), all.handle().target()), (0b11_0111, 9));
}

/// 5.5.3.2: a driver that would use pages without a word is told so before it starts.
#[test]
fn who_must_tell_and_does_not_is_refused() {
    let must = Balloon::builder(Ledger::default()).must_tell_host(true).build();
    let t = Test::new(must, guest_memory(MIB).unwrap());
    let queues = [(0, &t.queues[0]), (1, &t.queues[1])];
    assert!(matches!(t.driver.start(0, &queues), Err(StartError::Features { .. })));
    t.driver.start(feature::MUST_TELL_HOST, &queues).unwrap();
    let (t, _) = test(guest_memory(MIB).unwrap());
    t.driver.start(0, &[(0, &t.queues[0]), (1, &t.queues[1])]).unwrap();
}

#[test]
fn a_release_that_fails_is_counted_and_the_guest_goes_on() {
    let (mut t, ledger) = test(guest_memory(MIB).unwrap());
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    ledger.0.refuse.store(true, Ordering::SeqCst);
    t.send(0, &[0x20, 0x21, 0x40]);
    t.send(1, &[0x20]);
    t.report(&[(0x5_0000, 0x2000)]);
    let failed = t.handle.counters();
    assert_eq!((failed.failed, failed.inflated, failed.deflated, failed.reported), (6, 0, 0, 0));
    ledger.0.refuse.store(false, Ordering::SeqCst);
    t.send(0, &[0x20]);
    assert_eq!(ledger.take(), [(0x20, 1)]);
    assert_eq!(t.driver.status(), 0xf);
}

/// Resident pages of the regions, by their memfd.
fn blocks(ram: &GuestRam) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = ram.regions();
    files.iter().map(|r| r.file_offset().unwrap().file().metadata().unwrap().blocks() / 8).sum()
}

#[test]
fn memory_goes_back_to_the_host() {
    let ram = GuestRam::builder()
        .region(RegionConfig::new(GuestAddress(0), 4 * MIB).backing(Backing::Memfd))
        .region(RegionConfig::new(GuestAddress(4 * MIB), 4 * MIB).backing(Backing::Memfd))
        .prefault(NonZeroUsize::MIN)
        .build()
        .unwrap();
    let mut t = Test::new(Balloon::new(ram.clone()), ram.address_space());
    assert_eq!(blocks(&ram), 2048);
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    t.send(0, &(0x380..0x480).collect::<Vec<_>>());
    assert_eq!(blocks(&ram), 2048 - 0x100);
    t.report(&[(6 * MIB, 1 << 20)]);
    assert_eq!(blocks(&ram), 2048 - 0x200);
    // What the host has not is given away again at no gain, and comes back when it is written.
    t.report(&[(6 * MIB, 1 << 20)]);
    t.send(0, &[0x600, 0x601]);
    t.memory.memory().write_slice(&[1; 0x2000], GuestAddress(6 * MIB)).unwrap();
    assert_eq!(blocks(&ram), 2048 - 0x200 + 2);
    assert_eq!(t.handle.counters().failed, 0);
}

#[test]
fn memory_that_is_not_to_be_given_back_stays() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(MIB).unwrap();
    let backing = Backing::File { file, offset: 0 };
    let ram = GuestRam::builder()
        .region(RegionConfig::new(GuestAddress(0), MIB))
        .region(RegionConfig::new(GuestAddress(MIB), MIB).backing(backing))
        .region(RegionConfig::new(GuestAddress(2 * MIB), MIB).read_only(true))
        .build()
        .unwrap();
    let mut t = Test::new(Balloon::new(ram.clone()), ram.address_space());
    t.start(0, &[0, 1]);
    t.memory.memory().write_obj(7_u8, GuestAddress(MIB)).unwrap();
    t.send(0, &[0xff, 0x100, 0x200]);
    let counters = t.handle.counters();
    assert_eq!((counters.inflated, counters.failed, counters.skipped), (1, 1, 1));
    assert_eq!(t.memory.memory().read_obj::<u8>(GuestAddress(MIB)).unwrap(), 7);
}

/// Takes its time.
struct Slow(Arc<crate::ManualClock>);

impl MemoryRelease for Slow {
    fn release(&self, gpa: GuestAddress, _: u64) -> io::Result<()> {
        self.0.advance(500);
        if gpa.0 == 0x6_6000 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }
}

#[test]
fn requests_are_measured() {
    let clock = Arc::new(crate::ManualClock::new(100));
    let metrics = Arc::new(crate::virtio::metrics::DeviceMetrics::default());
    let balloon = Balloon::builder(Slow(Arc::clone(&clock)));
    let balloon = balloon.metrics(Arc::clone(&metrics) as Arc<_>, Arc::clone(&clock)).build();
    let mut t = Test::new(balloon, guest_memory(MIB).unwrap());
    let features = feature::STATS_VQ | feature::PAGE_REPORTING | feature::PAGE_POISON;
    t.start(features, &[0, 1, 2, 4]);
    t.send(0, &[0x20, 0x21, 0x40]);
    // One page stays, and one is no RAM, which is no fault of anybody's.
    t.send(0, &[0x66, 0x68, 0x10_0000]);
    t.send(1, &[0x20]);
    t.report(&[(0x3_0000, 0x4000)]);
    t.driver.write_config(12, &1_u32.to_le_bytes());
    t.report(&[(0x3_0000, 0x4000)]);
    t.queues[0].chain().readable(MIB, 4).submit().unwrap();
    t.driver.notify(0);
    t.queues[2].chain().readable(NUMBERS, 10).submit().unwrap();
    t.driver.notify(2);

    let counted = metrics.snapshot();
    let totals = |requests, pages: u64, errors| Totals { requests, bytes: pages * PAGE, errors };
    assert_eq!(counted.write, totals(5, 3 + 1 + 4, 2));
    assert_eq!(counted.read, totals(1, 1, 0));
    assert_eq!(counted.other, Totals { requests: 1, bytes: 10, errors: 0 });
    // Two runs, two runs, one run.
    assert_eq!(counted.latency_total_ns, 5 * 500);
}
