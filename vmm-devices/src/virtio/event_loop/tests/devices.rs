//! A real device on each executor, with threads, through its transport.

use std::sync::atomic::AtomicU32;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::pci::{FunctionAddress, HostBridge, PciLayout};
use crate::testkit::PciDriver;
use crate::testkit::{Driver as _, DriverQueue, Memory, MmioDriver, guest_memory};
use crate::virtio::{
    ActivateError, Activation, DeviceType, DoorbellHost, GuestDoorbell, Inline, Rng, VirtioDevice,
    VirtioMmio, VirtioPci,
};
use crate::{MmioBus, PioBus};

/// Executors under test, with what keeps them going.
pub(super) fn executors() -> Vec<(&'static str, Arc<dyn Executor>, Option<LoopThread>)> {
    let thread = EventLoop::new(|| 0).unwrap().spawn("loop").unwrap();
    vec![
        ("Inline", Arc::new(Inline), None),
        ("EventLoop", thread.executor(), Some(thread)),
        ("ThreadPerQueue", Arc::new(ThreadPerQueue::new(|| 0)), None),
    ]
}

/// A kernel that rings what it was told of.
#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<Vec<GuestDoorbell>>>);

impl DoorbellHost for Kernel {
    fn attach(&mut self, doorbell: &GuestDoorbell) -> bool {
        lock(&self.0).push(doorbell.clone());
        true
    }

    fn detach(&mut self, doorbell: &GuestDoorbell) {
        let mut all = lock(&self.0);
        let place = all.iter().position(|other| other.gpa == doorbell.gpa).unwrap();
        all.remove(place);
    }
}

impl Kernel {
    fn places(&self) -> Vec<u64> {
        lock(&self.0).iter().map(|doorbell| doorbell.gpa.0).collect()
    }

    fn ring(&self) {
        lock(&self.0).iter().for_each(|doorbell| poller::signal(&doorbell.fd));
    }
}

struct Guest {
    kernel: Kernel,
    driver: MmioDriver,
    memory: Memory,
    interrupts: Receiver<()>,
}

impl Guest {
    fn new(device: impl VirtioDevice<Memory> + 'static, executor: Arc<dyn Executor>) -> Self {
        let memory = guest_memory(1 << 20).unwrap();
        let (interrupt, interrupts) = channel();
        let line = move |level: bool| {
            if level {
                // A test that has ended hears nothing.
                let (Ok(()) | Err(_)) = interrupt.send(());
            }
        };
        let kernel = Kernel::default();
        let transport = VirtioMmio::builder(device, memory.clone(), line)
            .executor(executor)
            .doorbells(GuestAddress(0xd000_0000), kernel.clone())
            .build()
            .unwrap();
        Self { kernel, driver: MmioDriver::new(Arc::new(Mutex::new(transport))), memory, interrupts }
    }

    /// Makes `count` requests, rings by `ring`, and waits until all have come back.
    fn request(&self, queue: &mut DriverQueue<Memory>, count: u16, ring: impl Fn()) {
        for index in 0..u64::from(count) {
            queue.chain().writable(0x8000 + 64 * index, 64).submit().unwrap();
        }
        ring();
        let mut left = count;
        while left > 0 {
            self.interrupts.recv().unwrap();
            self.driver.acknowledge(self.driver.interrupt_status());
            while let Some((_, written)) = queue.take_used().unwrap() {
                assert_eq!(written, 64);
                left -= 1;
            }
        }
    }
}

#[test]
fn the_entropy_device_works_on_each() {
    for (name, executor, _thread) in executors() {
        println!("{name}");
        let guest = Guest::new(Rng::new(io::repeat(7)), executor);
        for _ in 0..3 {
            let mut queue = DriverQueue::new(guest.memory.clone(), 0x1000, 16).unwrap();
            guest.driver.start(0, &[(0, &queue)]).unwrap();
            for round in 0..200 {
                guest.request(&mut queue, 1 + round % 16, || guest.driver.notify(0));
            }
            guest.driver.set_status(0);
        }
    }
}

/// The same in the monitor's own loop, on the thread that polls for other things as well.
#[test]
fn a_loop_within_another_serves_a_device() {
    let mut event_loop = EventLoop::new(|| 0).unwrap();
    let guest = Guest::new(Rng::new(io::repeat(7)), event_loop.executor());
    let (ended, end) = pipe();
    thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let mut polled =
                    [PollFd::new(&event_loop, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
                poll(&mut polled, None).unwrap();
                if !polled[1].revents().is_empty() {
                    break;
                }
                event_loop.run_once(NOW).unwrap();
            }
        });
        let mut queue = DriverQueue::new(guest.memory.clone(), 0x1000, 16).unwrap();
        guest.driver.start(0, &[(0, &queue)]).unwrap();
        for _ in 0..200 {
            guest.request(&mut queue, 16, || guest.driver.notify(0));
        }
        guest.driver.set_status(0);
        drop(end);
    });
}

/// What the kernel does at a write that matches: it signals, and the transport sees nothing.
#[test]
fn a_kernel_may_ring_by_eventfd() {
    for (name, executor, _thread) in executors().split_off(1) {
        println!("{name}");
        let guest = Guest::new(Rng::new(io::repeat(7)), executor);
        let bell = lock(&guest.kernel.0)[0].clone();
        assert_eq!((bell.queue, bell.gpa.0, bell.width, bell.value), (0, 0xd000_0050, 4, 0));
        for _ in 0..3 {
            // Nobody is there.
            guest.kernel.ring();
            let mut queue = DriverQueue::new(guest.memory.clone(), 0x1000, 16).unwrap();
            guest.driver.start(0, &[(0, &queue)]).unwrap();
            for _ in 0..200 {
                guest.request(&mut queue, 16, || guest.kernel.ring());
                guest.request(&mut queue, 16, || guest.driver.notify(0));
            }
            guest.driver.set_status(0);
        }
        let kernel = guest.kernel.clone();
        assert_eq!(kernel.places().len(), 1);
        drop(guest);
        assert!(kernel.places().is_empty(), "the device has gone");
    }
    let guest = Guest::new(Rng::new(io::empty()), Arc::new(Inline));
    assert!(guest.kernel.places().is_empty(), "nobody would hear them");
}

/// Where the guest puts the BAR, there the kernel rings, and nowhere else.
#[test]
fn a_kernel_follows_the_bar() {
    let thread = EventLoop::new(|| 0).unwrap().spawn("loop").unwrap();
    let (mmio, pio): (Arc<MmioBus>, Arc<PioBus>) = Default::default();
    let bridge = HostBridge::new(PciLayout::default(), &mmio, &pio).unwrap();
    let (kernel, memory) = (Kernel::default(), guest_memory(1 << 20).unwrap());
    let function = VirtioPci::builder(Rng::new(io::repeat(7)), memory.clone(), |_: u64, _: u32| {})
        .executor(thread.executor())
        .doorbells(kernel.clone())
        .build()
        .unwrap();
    let function = Arc::new(Mutex::new(function));
    let address = bridge.add(function.clone()).unwrap();
    assert_eq!((address, kernel.places()), (FunctionAddress::new(1, 0).unwrap(), vec![]));
    let ecam = PciLayout::default().ecam_range().base + (1 << 15);
    let store =
        |offset: u64, value: u32| assert!(mmio.write(GuestAddress(ecam + offset), &value.to_le_bytes()));
    let base = u64::from({
        let mut bar = [0; 4];
        assert!(mmio.read(GuestAddress(ecam + 0x10), &mut bar));
        u32::from_le_bytes(bar) & !0xf
    });
    store(4, 6);
    assert_eq!(kernel.places(), [base + 0x3000]);
    let driver = PciDriver::new(function.clone()).unwrap();
    for moved in [0, 0x10_0000] {
        store(0x10, u32::try_from(base + moved).unwrap());
        assert_eq!(kernel.places(), [base + moved + 0x3000]);
        let mut queue = DriverQueue::new(memory.clone(), 0x1000, 16).unwrap();
        driver.start(0, &[(0, &queue)]).unwrap();
        queue.chain().writable(0x8000, 64).submit().unwrap();
        kernel.ring();
        while queue.take_used().unwrap().is_none() {
            thread::yield_now();
        }
    }
    let doorbell = lock(&kernel.0)[0].clone();
    assert_eq!((doorbell.queue, doorbell.width, doorbell.value), (0, 2, 0));
    store(4, 0);
    assert!(kernel.places().is_empty(), "no decoding, no doorbells");
    store(4, 6);
    assert_eq!(kernel.places().len(), 1);
    drop(bridge.remove(address).unwrap());
    assert!(kernel.places().is_empty());
}

/// A vCPU resets with the transport locked, while the worker interrupts through it.
#[test]
fn a_device_is_reset_in_the_middle_of_its_work() {
    for (name, executor, _thread) in executors() {
        println!("{name}");
        let guest = Guest::new(Rng::new(io::repeat(7)), executor);
        let quiet = vec![0xee; 0x8000];
        let mut found = vec![0; 0x8000];
        guest.memory.memory().write_slice(&quiet, GuestAddress(0x1000)).unwrap();
        for round in 0..1000_u64 {
            // As the reset of the last round has left it.
            guest.memory.memory().read_slice(&mut found, GuestAddress(0x1000)).unwrap();
            assert_eq!(found, quiet, "nothing is written after a reset");
            let mut queue = DriverQueue::new(guest.memory.clone(), 0x1000, 64).unwrap();
            guest.driver.start(0, &[(0, &queue)]).unwrap();
            for index in 0..64 {
                queue.chain().writable(0x4000 + 64 * index, 64).submit().unwrap();
                if index % 16 == round % 16 {
                    guest.driver.notify(0);
                }
            }
            guest.driver.set_status(0);
            assert_eq!((guest.driver.status(), guest.driver.interrupt_status()), (0, 0));
            guest.memory.memory().write_slice(&quiet, GuestAddress(0x1000)).unwrap();
        }
    }
}

/// Its worker panics in the first activation and works in the second.
#[derive(Clone, Default)]
struct Moody(Arc<AtomicU32>);

impl VirtioDevice<Memory> for Moody {
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn activate(&mut self, activation: Activation<Memory>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let first = self.0.fetch_add(1, Ordering::SeqCst) == 0;
        let link = activation.link;
        let (worker, _) = Probe::new(&[0], move || {
            assert!(!first, "it is in no mood");
            link.used(0);
            Ok(Progress::Idle)
        });
        Ok(vec![worker])
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        // The driver resets before it starts, and it gets back the one that panicked as well.
        assert_eq!(workers.len(), usize::from(self.0.load(Ordering::SeqCst) > 0));
    }
}

#[test]
fn a_panic_costs_one_device_a_reset_and_others_nothing() {
    for (name, executor, _thread) in executors().split_off(1) {
        println!("{name}");
        let moody = Guest::new(Moody::default(), Arc::clone(&executor));
        let rng = Guest::new(Rng::new(io::repeat(7)), executor);
        let mut queue = DriverQueue::new(rng.memory.clone(), 0x1000, 16).unwrap();
        rng.driver.start(0, &[(0, &queue)]).unwrap();
        let its_queue = DriverQueue::new(moody.memory.clone(), 0x1000, 16).unwrap();
        // It may have panicked before this returns, or after.
        let (Ok(()) | Err(_)) = moody.driver.start(0, &[(0, &its_queue)]);
        moody.interrupts.recv().unwrap();
        assert_eq!((moody.driver.status(), moody.driver.interrupt_status()), (0x4f, 2));
        rng.request(&mut queue, 16, || rng.driver.notify(0));
        moody.driver.start(0, &[(0, &its_queue)]).unwrap();
        moody.driver.notify(0);
        moody.interrupts.recv().unwrap();
        assert_eq!((moody.driver.status(), moody.driver.interrupt_status()), (0x0f, 1));
    }
}
