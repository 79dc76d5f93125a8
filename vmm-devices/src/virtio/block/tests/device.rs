//! Configuration, features, and what the monitor changes while the driver is there.

use super::*;
use crate::ManualClock;
use crate::virtio::metrics::{DeviceMetrics, Totals};
use crate::virtio::rate::{Limits, Rate};

fn config<const N: usize>(rig: &Rig, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    rig.driver.read_config(offset, &mut bytes);
    bytes
}

fn capacity(rig: &Rig) -> u64 {
    u64::from_le_bytes(config(rig, 0))
}

#[test]
fn the_configuration_is_that_of_the_specification() {
    struct Blocks(MemoryDisk);
    impl Backend for Blocks {
        fn size(&self) -> io::Result<u64> {
            Ok(0x1_0000_0200 * 512)
        }
        fn block_sizes(&self) -> BlockSizes {
            BlockSizes { logical: 1024, physical: 8192, optimal: 65536 }
        }
        fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
            self.0.read_at(buffers, offset)
        }
        fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
            self.0.write_at(buffers, offset, durable)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn can_discard(&self) -> bool {
            true
        }
    }
    let disk = Arc::new(Blocks(MemoryDisk::new(512)));
    let builder = Block::builder(disk).queues(NonZeroU16::new(3).unwrap()).queue_size(64);
    let rig = Rig::new(builder, ALL | feature::MQ);
    assert_eq!(config(&rig, 0), 0x1_0000_0200u64.to_le_bytes());
    assert_eq!(config(&rig, 8), (1u32 << 20).to_le_bytes(), "size_max");
    assert_eq!(config(&rig, 12), 62u32.to_le_bytes(), "seg_max");
    assert_eq!(config(&rig, 16), [0; 4], "no geometry");
    assert_eq!(config(&rig, 20), 1024u32.to_le_bytes(), "blk_size");
    assert_eq!(config(&rig, 24), [3, 0, 8, 0, 64, 0, 0, 0], "topology in logical blocks");
    assert_eq!(config(&rig, 32), [1, 0, 3, 0], "writeback, num_queues");
    assert_eq!(config(&rig, 36), (1u32 << 21).to_le_bytes());
    assert_eq!(config(&rig, 40), 1u32.to_le_bytes());
    assert_eq!(config(&rig, 44), 16u32.to_le_bytes());
    assert_eq!(config(&rig, 48), (1u32 << 15).to_le_bytes());
    assert_eq!(config(&rig, 52), 1u32.to_le_bytes());
    assert_eq!(config(&rig, 56), [1, 0, 0, 0]);
    assert_eq!(config(&rig, 60), [0; 8]);
    assert_eq!(config(&rig, 0xf8), [0; 8]);
    assert_eq!(config(&rig, 57), [0; 8]);
    assert_eq!(rig.driver.queue_max_size(2), 64);
    assert_eq!(rig.driver.queue_max_size(3), 0);
}

#[test]
fn without_flush_every_write_is_durable() {
    for (features, cache, call) in [
        (feature::FLUSH, CacheMode::WriteBack, "write 0 512"),
        (feature::FLUSH, CacheMode::WriteThrough, "write durably 0 512"),
        (0, CacheMode::WriteBack, "write durably 0 512"),
        (feature::CONFIG_WCE, CacheMode::WriteBack, "write durably 0 512"),
    ] {
        let probe = faulty(512);
        let mut rig = Rig::new(Block::builder(probe.clone()).cache(cache), features);
        assert_eq!(rig.write(0, &[1; 512]), OK);
        assert_eq!(calls(&probe), [call], "{features:#x} {cache:?}");
        assert_eq!(config(&rig, 32), [u8::from(!call.contains("durably"))]);
        // Only who has agreed on it chooses, and without a flush the choice changes nothing.
        rig.driver.write_config(32, &[1]);
        assert_eq!(rig.write(0, &[1; 512]), OK);
        assert_eq!(calls(&probe), [call]);
    }
}

#[test]
fn the_driver_chooses_the_cache_mode() {
    let (mut rig, probe) = probed(ALL);
    for (mode, call) in [(0, "write durably 0 512"), (1, "write 0 512"), (0, "write durably 0 512")] {
        rig.driver.write_config(32, &[mode]);
        assert_eq!(config(&rig, 32), [mode]);
        assert_eq!(rig.write(0, &[1; 512]), OK);
        assert_eq!(calls(&probe), [call]);
    }
    // Other fields are not the driver's, nor are other widths.
    for (offset, bytes) in [(0, &[0xff; 8][..]), (31, &[1, 1]), (32, &[1, 1]), (33, &[1]), (0xff, &[1])] {
        rig.driver.write_config(offset, bytes);
    }
    assert_eq!((config(&rig, 32), capacity(&rig)), ([0, 0], SECTORS as u64));
    rig.driver.set_status(0);
    assert_eq!(config(&rig, 32), [1], "as the monitor had it");
}

#[test]
fn the_cache_mode_may_be_chosen_before_the_driver_is_ready() {
    for (features, chosen, call) in [
        (ALL, Some(0), "write durably 0 512"),
        (ALL, Some(1), "write 0 512"),
        (ALL, None, "write 0 512"),
        // Without the feature it is not the driver's to choose, and without a flush it changes nothing.
        (ALL & !feature::CONFIG_WCE, Some(0), "write 0 512"),
        (ALL & !feature::FLUSH, Some(1), "write durably 0 512"),
    ] {
        let (mut rig, probe) = probed(features);
        // Another driver's choice is forgotten.
        rig.driver.write_config(32, &[0]);
        rig.driver.set_status(0);
        rig.driver.set_status(1 | 2);
        rig.driver.set_driver_features(features | crate::virtio::feature::VERSION_1);
        rig.driver.set_status(1 | 2 | 8);
        assert_eq!(rig.driver.status(), 1 | 2 | 8);
        if let Some(mode) = chosen {
            rig.driver.write_config(32, &[mode]);
            assert_eq!(config(&rig, 32), [mode]);
        }
        rig.queue = DriverQueue::new(rig.memory.clone(), 0x1000, 64).unwrap();
        rig.driver.set_queue(0, rig.queue.size(), rig.queue.rings());
        rig.driver.enable_queue(0);
        rig.driver.set_status(1 | 2 | 8 | 4);
        assert_eq!(rig.write(0, &[1; 512]), OK);
        assert_eq!(calls(&probe), [call], "{features:#x} {chosen:?}");
    }
}

#[test]
fn a_request_goes_by_the_cache_mode_that_it_was_sent_in() {
    let probe = faulty(512);
    let (memory, mut queue, mut worker, mut block) = bare(Block::builder(probe.clone()), ALL);
    memory.memory().write_slice(&header(kind::OUT, 0), GuestAddress(HEADER)).unwrap();
    queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    let queue = Arc::new(Mutex::new(queue));
    let theirs = Arc::clone(&queue);
    // While the device serves the first, the driver chooses another mode and sends the second.
    let during = move || {
        VirtioDevice::<Memory>::write_config(&mut block, 32, &[0]);
        let mut queue = theirs.lock().unwrap();
        queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    };
    probe.during(during);
    assert!(worker.process().is_ok());
    assert_eq!(queue.lock().unwrap().used_index().unwrap(), 2);
    assert_eq!(calls(&probe), ["write 0 512", "write durably 0 512"]);
}

#[test]
fn it_grows_and_shrinks_while_it_is_used() {
    let (mut rig, probe) = probed(ALL);
    let generation = rig.driver.config_generation();
    rig.driver.acknowledge(3);
    rig.handle.resize().unwrap();
    assert_eq!((rig.driver.config_generation(), rig.driver.interrupt_status()), (generation, 0));
    assert_eq!(rig.write(SECTORS as u64, &[1; 512]), IO_ERROR);
    rig.driver.acknowledge(3);
    probe.contents().set_size(100 * 512).unwrap();
    assert_eq!(rig.write(SECTORS as u64, &[1; 512]), IO_ERROR, "nobody has told the driver");
    rig.driver.acknowledge(3);
    rig.handle.resize().unwrap();
    assert_eq!((rig.driver.interrupt_status(), rig.line.is_asserted()), (2, true));
    assert_ne!(rig.driver.config_generation(), generation);
    assert_eq!(capacity(&rig), 100);
    assert_eq!(rig.write(99, &[1; 512]), OK);
    rig.handle.set_capacity(50 * 512).unwrap();
    assert_eq!(capacity(&rig), 50);
    assert_eq!(rig.write(50, &[1; 512]), IO_ERROR);
    let refused = rig.handle.set_capacity(101 * 512).unwrap_err().to_string();
    assert!(refused.contains("51712") && refused.contains("51200"), "{refused}");
    assert!(matches!(rig.handle.set_capacity(513), Err(ResizeError::Sectors { bytes: 513 })));
    assert_eq!(capacity(&rig), 50);
    // A driver that is not there learns of it when it comes.
    rig.driver.set_status(0);
    rig.handle.resize().unwrap();
    assert_eq!((rig.driver.interrupt_status(), capacity(&rig)), (0, 100));
}

#[test]
fn a_request_for_what_was_just_added_is_served() {
    let probe = faulty(512);
    let (memory, mut queue, mut worker, block) = bare(Block::builder(probe.clone()), ALL);
    for sector in [0, 1] {
        let at = HEADER + 16 * sector;
        memory.memory().write_slice(&header(kind::OUT, sector), GuestAddress(at)).unwrap();
    }
    queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    let queue = Arc::new(Mutex::new(queue));
    let (theirs, disk) = (Arc::clone(&queue), Arc::clone(&probe));
    // While the device serves the first, the disk becomes larger, and the driver has read of it.
    let during = move || {
        disk.contents().set_size(1024).unwrap();
        block.handle().resize().unwrap();
        let mut queue = theirs.lock().unwrap();
        queue.chain().readable(HEADER + 16, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    };
    probe.during(during);
    assert!(worker.process().is_ok());
    assert_eq!(queue.lock().unwrap().used_index().unwrap(), 2);
    assert_eq!(calls(&probe), ["write 0 512", "write 512 512"]);
}

#[test]
fn the_disk_is_asked_for_its_size_where_it_matters() {
    struct Asked(MemoryDisk, AtomicU64);
    impl Backend for Asked {
        fn size(&self) -> io::Result<u64> {
            self.1.fetch_add(1, Ordering::SeqCst);
            self.0.size()
        }
        fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
            self.0.read_at(buffers, offset)
        }
        fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
            self.0.write_at(buffers, offset, durable)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let disk = Arc::new(Asked(MemoryDisk::new(4096), AtomicU64::new(0)));
    let mut rig = Rig::new(Block::builder(disk.clone()), feature::FLUSH);
    disk.1.store(0, Ordering::SeqCst);
    assert_eq!(rig.give(kind::FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.ask(kind::GET_ID, 0, 20).0, OK);
    rig.driver.notify(0);
    assert_eq!(disk.1.load(Ordering::SeqCst), 0);
    rig.put_header(kind::IN, 1);
    for _ in 0..5 {
        rig.queue.chain().readable(HEADER, 16).writable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    }
    rig.driver.notify(0);
    assert_eq!(disk.1.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reader_that_sees_half_of_a_change_sees_another_generation() {
    let (rig, probe) = probed(ALL);
    probe.claim_size(Some(0x1_0000_0000 * 512));
    // Both halves differ between the two sizes.
    let sizes = [0x1_0000_0000u64, 0x0000_0001];
    rig.handle.set_capacity(sizes[0] * 512).unwrap();
    let handle = rig.handle.clone();
    let changer = std::thread::spawn(move || {
        for i in 0..2000 {
            handle.set_capacity(sizes[i % 2] * 512).unwrap();
        }
    });
    for _ in 0..2000 {
        let before = rig.driver.config_generation();
        let low: [u8; 4] = config(&rig, 0);
        let high: [u8; 4] = config(&rig, 4);
        let seen = u64::from(u32::from_le_bytes(high)) << 32 | u64::from(u32::from_le_bytes(low));
        if rig.driver.config_generation() == before {
            assert!(sizes.contains(&seen), "{seen:#x}");
        }
    }
    changer.join().unwrap();
}

#[test]
fn each_queue_has_its_worker() {
    let probe = faulty(SECTORS as u64 * 512);
    let builder = Block::builder(probe.clone()).queues(NonZeroU16::new(4).unwrap());
    let mut rig = Rig::new(builder, ALL | feature::MQ);
    // A driver may leave queues out (5.2.5).
    let mut third = DriverQueue::new(rig.memory.clone(), 0x3000, 8).unwrap();
    rig.queue = DriverQueue::new(rig.memory.clone(), 0x1000, 64).unwrap();
    rig.driver.start(ALL | feature::MQ, &[(0, &rig.queue), (2, &third)]).unwrap();
    rig.put_header(kind::OUT, 1);
    let head = third.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(1);
    rig.driver.notify(3);
    rig.driver.notify(2);
    assert_eq!(third.take_used().unwrap(), Some((head.into(), 1)));
    assert_eq!(rig.write(2, &[1; 512]), OK);
    // Without the feature there is the first one only.
    rig.queue = DriverQueue::new(rig.memory.clone(), 0x1000, 64).unwrap();
    let mut third = DriverQueue::new(rig.memory.clone(), 0x3000, 8).unwrap();
    rig.driver.start(ALL, &[(0, &rig.queue), (2, &third)]).unwrap();
    third.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    rig.driver.notify(2);
    assert_eq!(third.take_used().unwrap(), None);
    assert_eq!(rig.write(2, &[1; 512]), OK);
    // And without the first there is no device.
    assert!(rig.driver.start(ALL, &[(2, &third)]).is_err());
}

#[test]
fn mistakes_of_the_operator_are_named() {
    let build = |change: fn(BlockBuilder) -> BlockBuilder| {
        change(Block::builder(faulty(512))).build().unwrap_err().to_string()
    };
    assert!(build(|b| b.queue_size(2)).contains("2 descriptors"));
    assert!(build(|b| b.queue_size(48)).contains("48 descriptors"));
    assert!(build(|b| b.serial([b'x'; 21])).contains("21 bytes"));
    let unknown = faulty(512);
    unknown.claim_size(Some(5));
    assert!(matches!(
        Block::builder(unknown).build(),
        Err(BlockError::Size(ResizeError::Sectors { bytes: 5 }))
    ));
}

#[test]
fn limits_hold_requests_back_until_their_time() {
    let (clock, probe, metrics) =
        (Arc::new(ManualClock::new(0)), faulty(1 << 20), Arc::new(DeviceMetrics::default()));
    let limits = Limits { bytes: Rate::new(512_000, 1000), operations: None };
    let rate = RateLimiter::new(clock.clone(), limits);
    let builder = Block::builder(probe.clone()).rate(rate).metrics(metrics.clone(), clock.clone());
    let (memory, mut queue, mut worker, block) = bare(builder, ALL);
    let handle = block.handle();
    memory.memory().write_slice(&header(kind::OUT, 0), GuestAddress(HEADER)).unwrap();
    for _ in 0..4 {
        queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    }
    assert_eq!(worker.process().unwrap(), crate::virtio::Progress::Idle);
    // 24 bytes are owed, and one is to be there.
    assert_eq!((queue.used_index().unwrap(), worker.deadline()), (2, Some(48_829)));
    // What the driver makes of the header meanwhile is not looked at again.
    memory.memory().write_slice(&header(kind::OUT, 7), GuestAddress(HEADER)).unwrap();
    clock.set(48_828);
    assert_eq!(worker.process().unwrap(), crate::virtio::Progress::Idle);
    assert_eq!((queue.used_index().unwrap(), worker.deadline()), (2, Some(48_829)));
    clock.set(48_829);
    assert_eq!(worker.process().unwrap(), crate::virtio::Progress::Idle);
    assert_eq!((queue.used_index().unwrap(), worker.deadline()), (3, Some(1_048_829)));
    assert_eq!(calls(&probe), ["write 0 512"; 3]);
    let snapshot = metrics.snapshot();
    assert_eq!(snapshot.write, Totals { requests: 3, bytes: 1536, errors: 0 });
    assert_eq!((snapshot.latency_total_ns, snapshot.throttled), (48_829, 2));
    // The fourth was read when it was taken, and the disk becomes too small for it while it waits.
    handle.set_capacity(7 * 512).unwrap();
    assert!(handle.set_limits(Limits::default()));
    assert_eq!(worker.process().unwrap(), crate::virtio::Progress::Idle);
    assert_eq!((queue.used_index().unwrap(), worker.deadline()), (4, None));
    assert!(calls(&probe).is_empty());
    assert_eq!(metrics.snapshot().write, Totals { requests: 4, bytes: 1536, errors: 1 });
}

#[test]
fn limits_that_disks_share_are_changed_for_all() {
    let limits = Limits { bytes: None, operations: Rate::new(1, 1) };
    let rate = RateLimiter::new(ManualClock::new(0), limits);
    let mut rigs = [0, 1].map(|_| {
        let builder = Block::builder(faulty(512)).rate(rate.clone());
        Rig::new(builder, ALL)
    });
    assert_eq!(rigs[0].write(0, &[1; 512]), OK);
    let [first, second] = &mut rigs;
    second.put_header(kind::OUT, 0);
    second.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    second.driver.notify(0);
    assert_eq!(second.queue.used_index().unwrap(), 0);
    assert!(first.handle.set_limits(Limits::default()));
    assert_eq!(second.queue.used_index().unwrap(), 1);
}

#[test]
fn what_waits_for_a_limit_is_given_up_at_a_stop() {
    let clock = Arc::new(ManualClock::new(0));
    let probe = faulty(1 << 20);
    let limits = Limits { bytes: None, operations: Rate::new(1, 1) };
    let builder = Block::builder(probe.clone()).rate(RateLimiter::new(clock.clone(), limits));
    let (memory, mut queue, mut worker, _) = bare(builder, ALL);
    memory.memory().write_slice(&header(kind::OUT, 0), GuestAddress(HEADER)).unwrap();
    for _ in 0..2 {
        queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    }
    assert!(worker.process().is_ok());
    worker.stop();
    assert_eq!((worker.deadline(), queue.used_index().unwrap(), calls(&probe).len()), (None, 1, 1));
}
