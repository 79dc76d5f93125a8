use std::sync::Mutex;

use super::*;
use crate::interrupt::lock;
use crate::testkit::{Driver, DriverQueue, LineRecorder, Memory, MmioDriver, StartError, guest_memory};
use crate::virtio::{ActivateError, Activation, DeviceType, DriverLink, Progress, Worker, feature};

const SIZES: [u16; 2] = [16, 256];

/// A device that does nothing but say what it was told.
#[derive(Default)]
struct Told {
    link: Option<Arc<dyn DriverLink>>,
    features: u64,
    queues: Vec<Option<u16>>,
    activations: u32,
    resets: u32,
    calls: u32,
    stopped: u32,
    generation: u32,
}

#[derive(Clone, Default)]
struct Dummy(Arc<Mutex<Told>>);

struct Idler(Arc<Mutex<Told>>);

impl Worker for Idler {
    fn queues(&self) -> Vec<u16> {
        vec![0, 1]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        lock(&self.0).calls += 1;
        Ok(Progress::Idle)
    }

    fn stop(&mut self) {
        lock(&self.0).stopped += 1;
    }
}

impl VirtioDevice<Memory> for Dummy {
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }

    fn features(&self) -> u64 {
        0b1011
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn accepts(&self, features: u64) -> bool {
        // The second is nothing without the first.
        features & 0b11 != 0b10
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (offset..8).zip(data) {
            *byte = 0x10 + u8::try_from(index).unwrap();
        }
    }

    fn config_generation(&self) -> u32 {
        lock(&self.0).generation
    }

    fn activate(&mut self, activation: Activation<Memory>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let mut told = lock(&self.0);
        told.activations += 1;
        told.features = activation.features;
        told.queues =
            activation.queues.iter().map(|queue| queue.as_ref().map(|queue| queue.size())).collect();
        told.link = Some(activation.link);
        Ok(vec![Box::new(Idler(Arc::clone(&self.0)))])
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        let mut told = lock(&self.0);
        told.resets += 1;
        assert_eq!(workers.len(), usize::from(told.link.take().is_some()));
    }
}

struct Test {
    device: Dummy,
    driver: MmioDriver,
    line: LineRecorder,
    memory: Memory,
    failures: Arc<Mutex<Vec<String>>>,
}

fn test() -> Test {
    let (device, line, memory) = (Dummy::default(), LineRecorder::default(), guest_memory(1 << 20).unwrap());
    let failures = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&failures);
    let transport = VirtioMmio::builder(device.clone(), memory.clone(), line.clone())
        .on_failure(move |why| lock(&heard).push(why.to_string()))
        .build()
        .unwrap();
    Test { device, driver: MmioDriver::new(Arc::new(Mutex::new(transport))), line, memory, failures }
}

impl Test {
    fn queue(&self, at: u64, size: u16) -> DriverQueue<Memory> {
        DriverQueue::new(self.memory.clone(), at, size).unwrap()
    }
}

#[test]
fn identity() {
    let Test { driver, .. } = test();
    let found = [0, 4, 8, 0xc].map(|register| driver.read(register));
    assert_eq!(found, [0x7472_6976, 2, 42, VENDOR]);
    assert_eq!(driver.device_features(), 0b1011 | feature::OFFERED);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0, "no features beyond 64");
    assert_eq!([0, 1, 2, 0xffff].map(|queue| driver.queue_max_size(queue)), [16, 256, 0, 0]);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|register| driver.read(register)), [u32::MAX; 4]);
}

#[test]
fn a_device_starts_and_is_reset() {
    let t = test();
    let queue = t.queue(0x1000, 8);
    for round in 1..=2 {
        t.driver.start(0b1001 | feature::EVENT_IDX, &[(1, &queue)]).unwrap();
        t.driver.notify(1);
        t.driver.notify(2);
        let told = lock(&t.device.0);
        assert_eq!(told.features, 0b1001 | feature::EVENT_IDX | feature::VERSION_1);
        assert_eq!(told.queues, [None, Some(8)]);
        assert_eq!((told.activations, told.calls), (round, round));
        drop(told);
        t.driver.set_status(0);
        assert_eq!((t.driver.status(), lock(&t.device.0).stopped), (0, round));
        t.driver.notify(1);
        assert_eq!(lock(&t.device.0).calls, round, "nobody is there");
    }
}

#[test]
fn features_are_agreed_upon() {
    let t = test();
    for wanted in [0b100, 0b10, 1 << 40] {
        let refused = t.driver.start::<Memory>(wanted, &[]);
        assert!(matches!(refused, Err(StartError::Features { .. })), "{wanted:#b}");
        // DRIVER_OK in spite of it.
        t.driver.set_status(0x0f);
        assert_eq!(t.driver.status() & 0x44, 0x40);
    }
    assert_eq!(lock(&t.device.0).activations, 0);
    t.driver.set_status(0);
    t.driver.set_driver_features(0b1);
    t.driver.set_status(0x0b);
    assert_eq!(t.driver.status(), 0x03, "a driver from before version 1");
    t.driver.start::<Memory>(0b11, &[]).unwrap();
    t.driver.set_driver_features(0);
    assert_eq!(lock(&t.device.0).features & 0b11, 0b11);
}

/// Nothing of a queue changes once the device runs.
#[test]
fn cve_2026_5747_queues_cannot_be_changed_after_driver_ok() {
    let t = test();
    let queue = t.queue(0x1000, 8);
    t.driver.start(0, &[(0, &queue)]).unwrap();
    for (register, value) in
        [(0x38, 16), (0x44, 0), (0x80, 0), (0x84, 1), (0x90, 0), (0x94, 1), (0xa0, 0), (0xa4, 1)]
    {
        t.driver.write(0x30, 0);
        t.driver.write(register, value);
        t.driver.write(0x30, 1);
        t.driver.write(register, value);
    }
    t.driver.write(0x30, 1);
    t.driver.write(0x44, 1);
    assert_eq!(t.driver.read(0x44), 0, "no further queue either");
    t.driver.write(0x30, 0);
    assert_eq!(t.driver.read(0x44), 1);
}

/// A queue that there is not.
#[test]
fn cloud_hypervisor_7917_any_queue_can_be_selected() {
    let t = test();
    for queue in [2, 3, 0xff, 0xffff, 0x1_0000, u32::MAX] {
        t.driver.write(0x30, queue);
        for register in (0..0x100).step_by(4) {
            t.driver.read(register);
            if !matches!(register, 0x30 | 0x70) {
                t.driver.write(register, u32::MAX);
            }
        }
        assert_eq!((t.driver.read(0x34), t.driver.read(0x44)), (0, 0));
    }
    t.driver.write(0x30, 0);
    assert_eq!(t.driver.read(0x44), 0);
}

#[test]
fn rings_that_cannot_be_stop_the_device() {
    for (size, rings) in [
        (8, [1 << 30, 0x2000, 0x3000]),
        (8, [0x1000, 1 << 30, 0x3000]),
        (8, [0x1000, 0x2000, (1 << 20) - 4]),
        // Not aligned (2.7).
        (8, [0x1008, 0x2000, 0x3000]),
        (8, [0x1000, 0x2001, 0x3000]),
        (8, [0x1000, 0x2000, 0x3002]),
    ] {
        let t = test();
        t.driver.start::<Memory>(0, &[]).unwrap();
        t.driver.set_status(0);
        t.driver.set_status(3);
        t.driver.set_driver_features(feature::VERSION_1);
        t.driver.set_status(0xb);
        t.driver.set_queue(0, size, rings);
        t.driver.enable_queue(0);
        t.driver.set_status(0xf);
        assert_eq!(t.driver.status(), 0x4f, "{rings:x?}");
        assert_eq!((t.line.is_asserted(), t.driver.interrupt_status()), (true, 2));
        assert_eq!(lock(&t.failures).len(), 1);
        assert_eq!(lock(&t.device.0).activations, 1, "not the second time");
        t.driver.set_status(0);
        assert_eq!((t.driver.status(), t.line.is_asserted()), (0, false));
        t.driver.start::<Memory>(0, &[]).unwrap();
    }
}

#[test]
fn sizes_that_cannot_be_are_forgotten() {
    let t = test();
    let queue = t.queue(0x1000, 16);
    t.driver.set_status(3);
    t.driver.set_driver_features(feature::VERSION_1);
    t.driver.set_status(0xb);
    t.driver.set_queue(0, 16, queue.rings());
    for size in [0, 3, 32, 0x8000, 0x1_0008, u32::MAX] {
        t.driver.write(0x38, size);
    }
    t.driver.enable_queue(0);
    t.driver.set_status(0xf);
    assert_eq!(lock(&t.device.0).queues, [Some(16), None]);
}

#[test]
fn causes_of_the_interrupt_come_and_go() {
    let t = test();
    let queue = t.queue(0x1000, 8);
    t.driver.start(0, &[(0, &queue)]).unwrap();
    let link = lock(&t.device.0).link.clone().unwrap();
    link.used(0);
    link.config_changed();
    link.used(1);
    assert_eq!((t.driver.interrupt_status(), t.line.take()), (3, vec![true]));
    t.driver.acknowledge(1);
    assert_eq!((t.driver.interrupt_status(), t.line.take()), (2, vec![]));
    t.driver.acknowledge(u32::MAX);
    assert_eq!((t.driver.interrupt_status(), t.line.take()), (0, vec![false]));
    link.needs_reset(&io_error());
    link.needs_reset(&io_error());
    assert_eq!((t.driver.status(), t.driver.interrupt_status()), (0x4f, 2));
    assert_eq!(*lock(&t.failures), ["it is broken"]);
    t.driver.set_status(0);
    link.config_changed();
    assert_eq!((t.driver.interrupt_status(), t.line.is_asserted()), (0, false), "nobody is there to hear it");
}

fn io_error() -> std::io::Error {
    std::io::Error::other("it is broken")
}

#[test]
fn the_configuration_is_read_at_any_width() {
    let t = test();
    let read = |offset, len| {
        let mut data = vec![0xaa; len];
        t.driver.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), Vec::from_iter(0x10..0x18));
    assert_eq!(read(3, 2), [0x13, 0x14]);
    assert_eq!(read(6, 4), [0x16, 0x17, 0, 0], "beyond its end are zeros");
    assert_eq!(read(0xff, 1), [0]);
    assert_eq!(t.driver.config_generation(), 0);
    lock(&t.device.0).generation = 7;
    assert_eq!(t.driver.config_generation(), 7);
}

/// Registers have 32 bits; other accesses read zeros and write nothing.
#[test]
fn registers_are_words() {
    let t = test();
    let mut transport = VirtioMmio::new(t.device.clone(), t.memory.clone(), LineRecorder::default()).unwrap();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfc, 8), (0xff, 1), (3, 0)] {
        let mut data = vec![0xaa; len];
        transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len], "{len} bytes at {offset:#x}");
        transport.write(offset, &data);
    }
    transport.write(0x70, &[3]);
    transport.write(0x70, &[3, 0]);
    let mut status = [0; 4];
    transport.read(0x70, &mut status);
    assert_eq!(status, [0; 4]);
}
