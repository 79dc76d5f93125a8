//! Disks, with requests in flight.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::*;
use crate::ManualClock;
use crate::testkit::{DriverQueue, FaultyDisk};
use crate::virtio::block::{Backend, Block, BlockBuilder, ConcurrentDisk, MemoryDisk, Pooled, ThreadPool};
use crate::virtio::rate::{Limits, Rate, RateLimiter};

const SECTORS: u16 = 400;
const DISK: u64 = SECTORS as u64 * 512;
/// Requests that the driver has under way at most, and their place in memory.
const SLOTS: u16 = 64;
const AT: u64 = 0x1_0000;
const STRIDE: u64 = 0x400;
const PATIENCE: Duration = Duration::from_secs(20);

/// A driver that writes each sector once, with its number.
struct Stream {
    queue: DriverQueue<Memory>,
    /// By slot, the head of what is under way, and its sector.
    under_way: Vec<Option<(u16, u16)>>,
    next: u16,
    done: u16,
}

impl Stream {
    fn new(machine: &Machine) -> Self {
        let queue = DriverQueue::new(machine.memory.clone(), 0x1000, 256).unwrap();
        machine.driver.start(0, &[(0, &queue)]).unwrap();
        Self { queue, under_way: vec![None; SLOTS.into()], next: 0, done: 0 }
    }

    fn slot(sector: u16) -> (usize, u64) {
        let slot = sector % SLOTS;
        (slot.into(), AT + u64::from(slot) * STRIDE)
    }

    /// Makes requests, as long as there are slots.
    fn submit(&mut self, most: u16) {
        for _ in 0..most {
            let sector = self.next;
            let (slot, at) = Self::slot(sector);
            if sector == SECTORS || self.under_way[slot].is_some() {
                break;
            }
            let mut header = [0; 16];
            header[0] = 1;
            header[8..10].copy_from_slice(&sector.to_le_bytes());
            self.queue.put(at, &header).unwrap();
            self.queue.put(at + 0x10, &pattern(sector)).unwrap();
            self.queue.put(at + 0x210, &[0xee]).unwrap();
            let chain = self.queue.chain().readable(at, 16).readable(at + 0x10, 512).writable(at + 0x210, 1);
            self.under_way[slot] = Some((chain.submit().unwrap(), sector));
            self.next += 1;
        }
    }

    /// What has ended: each once.
    fn take(&mut self) {
        while let Some((head, _)) = self.queue.take_used().unwrap() {
            let is = |place: &Option<(u16, u16)>| place.is_some_and(|(own, _)| u32::from(own) == head);
            let slot = self.under_way.iter().position(is).expect("it was under way");
            let (_, sector) = self.under_way[slot].take().unwrap();
            assert_eq!(self.queue.get(Self::slot(sector).1 + 0x210, 1).unwrap(), [0], "sector {sector}");
            self.done += 1;
        }
    }

    fn moved_to(&mut self, machine: &Machine) {
        self.queue = self.queue.moved_to(machine.memory.clone());
    }

    fn finish(&mut self, machine: &Machine) {
        let begun = std::time::Instant::now();
        while self.done < SECTORS {
            self.submit(SLOTS);
            machine.driver.notify(0);
            self.take();
            assert!(begun.elapsed() < PATIENCE, "{} of {SECTORS} requests have ended", self.done);
            std::thread::yield_now();
        }
        assert_eq!(self.queue.used_index().unwrap(), SECTORS);
    }
}

fn pattern(sector: u16) -> [u8; 512] {
    let mut bytes = [sector.to_le_bytes()[0]; 512];
    bytes[..2].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn check(read: impl Fn(u64, &mut [u8])) {
    for sector in 0..SECTORS {
        let mut bytes = [0; 512];
        read(u64::from(sector) * 512, &mut bytes);
        assert_eq!(bytes, pattern(sector));
    }
}

fn limits(operations: u64) -> Limits {
    Limits { bytes: None, operations: Rate::new(operations, operations) }
}

/// The stream goes on through moves, at each of which `steps` requests more are under way.
fn stream(bus: Bus, executor: &Arc<dyn Executor>, device: impl Fn() -> Block) {
    let mut machine = Machine::with(bus, device(), guest_memory(RAM).unwrap(), Arc::clone(executor));
    let mut stream = Stream::new(&machine);
    for step in [1, 2, 3, 5, 8, 13, 21, 34, 55, 64] {
        stream.submit(step);
        machine.driver.notify(0);
        if step % 2 == 0 {
            stream.take();
        }
        machine = machine.moved_paused(device(), Arc::clone(executor));
        stream.moved_to(&machine);
        // Nobody hears it now, and nothing is lost by that.
        stream.submit(1);
        machine.driver.notify(0);
        machine.resume();
    }
    stream.finish(&machine);
}

/// An executor, and what it is to be kept with.
type Kept = (Arc<dyn Executor>, Box<dyn std::any::Any>);

fn executors() -> Vec<Kept> {
    let executors: Vec<Kept> = vec![(Arc::new(Inline), Box::new(()))];
    #[cfg(feature = "event-loop")]
    let executors = executors.into_iter().chain(threads()).collect();
    executors
}

#[cfg(feature = "event-loop")]
fn threads() -> [Kept; 2] {
    use crate::virtio::{EventLoop, ThreadPerQueue};
    let thread = EventLoop::new(|| 0).unwrap().spawn("disks").unwrap();
    [(thread.executor(), Box::new(thread)), (Arc::new(ThreadPerQueue::new(|| 0)), Box::new(()))]
}

#[test]
fn a_stream_of_requests_goes_on() {
    for bus in BUSES {
        for (executor, _kept) in executors() {
            let disk = Arc::new(MemoryDisk::new(DISK));
            stream(bus, &executor, || Block::builder(disk.clone()).build().unwrap());
            check(|offset, bytes| disk.read(offset, bytes).unwrap());
        }
    }
}

#[test]
fn a_stream_of_requests_that_threads_do_goes_on() {
    let pool = ThreadPool::new(NonZeroUsize::new(3).unwrap()).unwrap();
    for bus in BUSES {
        for (executor, _kept) in executors() {
            let disk = Arc::new(MemoryDisk::new(DISK));
            let pooled = Arc::new(Pooled::new(disk.clone(), Arc::clone(&pool)));
            stream(bus, &executor, || Block::concurrent(pooled.clone()).build().unwrap());
            check(|offset, bytes| disk.read(offset, bytes).unwrap());
        }
    }
}

#[cfg(all(feature = "io-uring", feature = "event-loop"))]
#[test]
fn a_stream_of_requests_that_the_kernel_does_goes_on() {
    use std::os::unix::fs::FileExt as _;

    use crate::virtio::block::{RawFile, UringFile};
    if !UringFile::is_available() {
        println!("skipped: no io_uring");
        return;
    }
    let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
    for bus in BUSES {
        for (executor, _kept) in threads() {
            let file = tempfile::tempfile().unwrap();
            file.set_len(DISK).unwrap();
            let device = || {
                let raw = RawFile::new(file.try_clone().unwrap(), false).unwrap();
                Block::concurrent(Arc::new(UringFile::new(raw, Arc::clone(&pool)))).build().unwrap()
            };
            stream(bus, &executor, device);
            check(|offset, bytes| file.read_exact_at(bytes, offset).unwrap());
        }
    }
}

#[test]
fn what_the_disk_has_is_waited_for_and_what_waits_for_a_limit_goes_on_elsewhere() {
    for bus in BUSES {
        let disk = FaultyDisk::new(DISK);
        let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap()).unwrap();
        let pooled: Arc<dyn ConcurrentDisk> = Arc::new(Pooled::new(Arc::new(disk.clone()), pool));
        let clock = Arc::new(ManualClock::new(0));
        let limited = |builder: BlockBuilder| builder.rate(RateLimiter::new(Arc::clone(&clock), limits(5)));
        let device = limited(Block::concurrent(Arc::clone(&pooled))).build().unwrap();
        let machine = Machine::new(bus, device);
        let mut stream = Stream::new(&machine);
        let blocked = disk.block();
        stream.submit(20);
        machine.driver.notify(0);
        disk.await_blocked(2);
        assert!(matches!(machine.try_save(), Err(VirtioStateError::Running)));
        let heads = (0..6).map(|request| (0, 3 * request));
        assert_eq!(machine.transport.in_flight(), Vec::from_iter(heads), "the sixth one waits");
        std::thread::scope(|scope| {
            let transport = machine.transport.clone();
            let pause = scope.spawn(move || transport.pause());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!pause.is_finished(), "requests are at work");
            drop(blocked);
        });
        stream.take();
        assert_eq!(stream.done, 5);
        let mut saved = machine.save();
        assert_eq!(saved.device().queues[0].in_flight, [15], "the descriptors of five come before");
        assert_eq!(machine.transport.in_flight(), [(0, 15)]);
        // Here it can go on as well.
        machine.resume();
        clock.advance(200_000_000);
        machine.driver.notify(0);
        machine.pause();
        stream.take();
        assert_eq!(stream.done, 6);
        let machine = machine.moved(Block::concurrent(pooled).build().unwrap());
        stream.moved_to(&machine);
        stream.finish(&machine);
        check(|offset, bytes| disk.contents().read(offset, bytes).unwrap());
        let writes = disk.take_calls().len();
        assert_eq!(writes, usize::from(SECTORS), "none was written twice");
    }
}

#[test]
fn chains_in_flight_keep_their_order_and_their_interrupt() {
    use virtio_queue::Queue;

    use crate::testkit::LinkRecorder;
    use crate::virtio::Virtqueue;
    let memory = guest_memory(RAM).unwrap();
    let mut driver = DriverQueue::new(memory.clone(), 0x1000, 16).unwrap();
    let link = LinkRecorder::default();
    let queue = driver.device_side().unwrap();
    let mut queue = Virtqueue::new(queue, 0, memory.clone(), Arc::new(link.clone())).unwrap();
    let mut heads = Vec::new();
    for index in 0..5 {
        let chain = driver.chain().readable(0x8000 + index, 1).writable(0x9000, 2);
        heads.push(
            if index % 2 == 0 { chain.submit() } else { chain.submit_indirect(0xa000 + 64 * index) }.unwrap(),
        );
    }
    for _ in 0..4 {
        queue.pop(queue.memory()).unwrap().unwrap();
    }
    queue.complete(heads[1], 2).unwrap();
    let position = Arc::clone(queue.position());
    assert_eq!(position.in_flight(), [heads[0], heads[2], heads[3]]);
    let [next_available, next_used, told] = position.indices();
    assert_eq!((next_available, next_used, told), (4, 1, 0));
    drop(queue);

    let mut state = driver.device_side().unwrap().state();
    (state.next_avail, state.next_used) = (next_available, next_used);
    let queue = Queue::try_from(state).unwrap();
    let in_flight = position.in_flight();
    let mut queue =
        Virtqueue::restored(queue, 0, memory.clone(), Arc::new(link.clone()), (told, &in_flight)).unwrap();
    assert_eq!((queue.left_in_flight(), queue.position().in_flight()), (3, in_flight));
    queue.interrupt().unwrap();
    assert_eq!(link.take_used(), [0], "which was owed");
    for (index, left) in [(0, 2), (2, 1), (3, 0), (4, 0)] {
        let chain = queue.pop(queue.memory()).unwrap().unwrap();
        assert_eq!((chain.head(), queue.left_in_flight()), (heads[index], left));
        let readable: Vec<_> = chain.readable().collect();
        assert_eq!(readable, [(GuestAddress(0x8000 + index as u64), 1)]);
        assert_eq!(chain.writable_len(), 2);
    }
    assert!(queue.pop(queue.memory()).unwrap().is_none());
    for index in [4, 3, 2, 0] {
        queue.complete(heads[index], 0).unwrap();
    }
    assert!(queue.position().in_flight().is_empty());
    assert_eq!(driver.used_index().unwrap(), 5);
    // A driver that makes one available again, which comes again as well, is found out.
    let queue = Queue::try_from(state).unwrap();
    let mut queue =
        Virtqueue::restored(queue, 0, memory, Arc::new(link), (told, &[heads[4], heads[0], heads[2]]))
            .unwrap();
    for _ in 0..3 {
        queue.pop(queue.memory()).unwrap().unwrap();
    }
    let error = queue.pop(queue.memory()).unwrap_err();
    assert!(error.to_string().ends_with("is made available twice"), "{error}");
}

#[test]
fn another_disk_is_refused() {
    for bus in BUSES {
        let device = |disk: Arc<dyn Backend>| Block::builder(disk).serial("first");
        let disk = || -> Arc<dyn Backend> { Arc::new(MemoryDisk::new(DISK)) };
        let machine = Machine::new(bus, device(disk()).build().unwrap());
        let stream = Stream::new(&machine);
        machine.pause();
        let saved = machine.save();
        let others = [
            (device(Arc::new(MemoryDisk::new(DISK + 512))), "sectors is 0x190"),
            (device(disk()).serial("other"), "serial (its first four bytes) is 0x66697273"),
            (device(disk()).read_only(true), "read_only is 0x0"),
        ];
        for (other, problem) in others {
            let there =
                Machine::with(bus, other.build().unwrap(), copy_of(&machine.memory), Arc::new(Inline));
            let before = there.save();
            let error = there.restore(&saved).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
            assert_eq!(there.save(), before);
        }
        drop(stream);
    }
}

#[test]
fn the_cache_mode_that_the_driver_chose_stays() {
    use crate::virtio::block::feature::{CONFIG_WCE, FLUSH};
    for bus in BUSES {
        let disk = Arc::new(MemoryDisk::new(DISK));
        let device = || Block::builder(disk.clone()).build().unwrap();
        let machine = Machine::new(bus, device());
        let queue = DriverQueue::new(machine.memory.clone(), 0x1000, 16).unwrap();
        machine.driver.start(FLUSH | CONFIG_WCE, &[(0, &queue)]).unwrap();
        machine.driver.write_config(32, &[0]);
        let generation = machine.driver.config_generation();
        let machine = machine.moved(device());
        let mut mode = [9];
        machine.driver.read_config(32, &mut mode);
        assert_eq!(mode, [0]);
        assert_ne!(machine.driver.config_generation(), generation);
        machine.driver.set_status(0);
        machine.driver.read_config(32, &mut mode);
        assert_eq!(mode, [1]);
    }
}
