//! CVE-2024-3446: work that a device puts off escapes the guard that keeps it from being entered again. Here a worker rings its own
//! doorbell while it is called, as often as it is, under every executor: it is never called within a call, no ring is lost, and
//! the thread that rang comes back.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vmm_devices::ManualClock;
use vmm_devices::testkit::{Driver, DriverQueue, LineRecorder, Memory, MmioDriver, guest_memory};
use vmm_devices::virtio::{
    ActivateError, Activation, DeviceType, Doorbells, EventLoop, Executor, Inline, Progress, QueueError,
    ThreadPerQueue, VirtioDevice, VirtioMmio, Virtqueue, Worker,
};

/// Long enough for any host; a test that passes does not wait for it.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Calls {
    within: AtomicBool,
    entered_again: AtomicBool,
    count: AtomicU32,
}

/// A device that takes one chain at a call, and then rings for itself and for its other queue.
struct Ringer {
    calls: Arc<Calls>,
    /// It rings though there was no chain.
    never_ceases: bool,
}

struct RingerWorker {
    queue: Virtqueue<Memory>,
    doorbells: Arc<Doorbells>,
    calls: Arc<Calls>,
    never_ceases: bool,
}

impl VirtioDevice<Memory> for Ringer {
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 8]
    }

    fn activate(
        &mut self,
        mut activation: Activation<Memory>,
    ) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        Ok(vec![Box::new(RingerWorker {
            queue: activation.take_queue(0)?,
            doorbells: activation.doorbells,
            calls: Arc::clone(&self.calls),
            never_ceases: self.never_ceases,
        })])
    }
}

impl Worker for RingerWorker {
    fn queues(&self) -> Vec<u16> {
        vec![0, 1]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        if self.calls.within.swap(true, Ordering::SeqCst) {
            self.calls.entered_again.store(true, Ordering::SeqCst);
        }
        let memory = self.queue.memory();
        let chain = self.queue.pop(&*memory)?;
        if chain.is_some() || self.never_ceases {
            self.doorbells.ring(0);
            self.doorbells.ring(1);
        }
        if let Some(chain) = chain {
            self.queue.complete(chain.head(), 0)?;
            self.queue.interrupt()?;
        }
        self.calls.count.fetch_add(1, Ordering::SeqCst);
        self.calls.within.store(false, Ordering::SeqCst);
        Ok(Progress::Idle)
    }
}

fn a_worker_that_rings(executor: Arc<dyn Executor>) {
    let (calls, memory) = (Arc::<Calls>::default(), guest_memory(1 << 20).unwrap());
    let device = Ringer { calls: Arc::clone(&calls), never_ceases: false };
    let builder = VirtioMmio::builder(device, memory.clone(), LineRecorder::default());
    let transport = Arc::new(Mutex::new(builder.executor(executor).build().unwrap()));
    let driver = Arc::new(MmioDriver::new(transport));
    let mut queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    for _ in 0..4 {
        queue.chain().writable(0x8000, 8).submit().unwrap();
    }
    let (done, rung) = mpsc::channel();
    let theirs = Arc::clone(&driver);
    std::thread::spawn(move || {
        theirs.notify(0);
        done.send(()).unwrap();
    });
    assert!(rung.recv_timeout(PATIENCE).is_ok(), "the one who rang comes back");
    for _ in 0..4 {
        assert!(queue.await_used(PATIENCE).unwrap().is_some(), "a ring within a call is lost");
    }
    assert!(!calls.entered_again.load(Ordering::SeqCst), "the worker was entered again");
    driver.set_status(0);
    let count = calls.count.load(Ordering::SeqCst);
    driver.notify(0);
    assert_eq!(calls.count.load(Ordering::SeqCst), count, "after the reset");
}

#[test]
fn cve_2024_3446_a_worker_rings_inline() {
    a_worker_that_rings(Arc::new(Inline));
}

#[test]
fn cve_2024_3446_a_worker_rings_on_an_event_loop() {
    let thread = EventLoop::new(ManualClock::new(0)).unwrap().spawn("ringer").unwrap();
    a_worker_that_rings(thread.executor());
}

#[test]
fn cve_2024_3446_a_worker_rings_on_its_own_thread() {
    a_worker_that_rings(Arc::new(ThreadPerQueue::new(ManualClock::new(0))));
}

/// Chains whose buffers are the doorbell, and a worker that rings for ever: the guest's thread comes back.
#[test]
fn cve_2024_3446_a_worker_that_never_ceases_lets_the_processor_go() {
    let (calls, memory) = (Arc::<Calls>::default(), guest_memory(1 << 20).unwrap());
    let device = Ringer { calls: Arc::clone(&calls), never_ceases: true };
    let transport = VirtioMmio::new(device, memory.clone(), LineRecorder::default()).unwrap();
    let driver = Arc::new(MmioDriver::new(Arc::new(Mutex::new(transport))));
    let queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    let (done, rung) = mpsc::channel();
    std::thread::spawn(move || {
        driver.notify(0);
        driver.set_status(0);
        done.send(()).unwrap();
    });
    assert!(rung.recv_timeout(PATIENCE).is_ok(), "the one who rang comes back");
    assert!(!calls.entered_again.load(Ordering::SeqCst));
}
