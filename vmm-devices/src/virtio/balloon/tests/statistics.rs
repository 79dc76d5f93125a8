//! Statistics: asked for at any time, answered by a driver that may be anything.

use super::*;

const BUFFER: u64 = 0x9000;

/// A balloon that writes down what its callback gets.
fn balloon() -> (Test, Arc<Mutex<Vec<Statistics>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    let balloon = Balloon::builder(Ledger::default())
        .on_statistics(move |statistics| lock(&list).push(statistics.clone()))
        .build();
    (Test::new(balloon, guest_memory(MIB).unwrap()), told)
}

impl Test {
    /// What a driver does to tell: a buffer with them, and the doorbell.
    fn tell(&mut self, entries: &[(u16, u64)], more: &[u8]) -> u16 {
        let bytes = entries.iter().flat_map(|(tag, value)| {
            let (tag, value) = (tag.to_le_bytes(), value.to_le_bytes());
            tag.into_iter().chain(value)
        });
        let bytes: Vec<u8> = bytes.chain(more.iter().copied()).collect();
        self.memory.memory().write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let head = self.queues[2].chain().readable(BUFFER, len).submit().unwrap();
        self.driver.notify(2);
        head
    }
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut t, told) = balloon();
    assert!(!t.handle.request_statistics(), "no driver is there");
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    let first = t.tell(&[(4, 100), (5, 200), (0xfffe, u64::MAX)], &[1, 2, 3]);
    let statistics = t.handle.statistics().unwrap();
    assert_eq!(statistics.get(Statistic::MEMFREE), Some(100));
    assert_eq!(statistics.get(Statistic(0xfffe)), Some(u64::MAX), "tags without a name are numbers");
    assert_eq!(statistics.get(Statistic::AVAIL), None);
    assert_eq!(format!("{statistics:?}"), format!("{{MEMFREE: 100, MEMTOT: 200, 65534: {}}}", u64::MAX));
    assert_eq!(lock(&told).len(), 1);
    assert_eq!(t.queues[2].take_used().unwrap(), None, "the device keeps the buffer");
    let handle = t.handle.clone();
    assert!(std::thread::spawn(move || handle.request_statistics()).join().unwrap());
    assert_eq!(t.queues[2].take_used().unwrap(), Some((first.into(), 0)));
    assert_eq!((t.driver.interrupt_status(), lock(&told).len()), (1, 1));
    t.tell(&[(4, 101), (4, 102)], &[]);
    assert_eq!(t.handle.statistics().unwrap().get(Statistic::MEMFREE), Some(102));
    assert_eq!(t.handle.statistics().unwrap().iter().len(), 2);
    t.driver.set_status(0);
    assert_eq!((t.handle.statistics(), t.handle.request_statistics()), (None, false));
}

#[test]
fn a_request_waits_for_a_buffer() {
    let (mut t, told) = balloon();
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    assert!(t.handle.request_statistics());
    assert!(t.handle.request_statistics());
    // One that is empty, as the first may be; it goes back at once, and so does one request only.
    let first = t.tell(&[], &[]);
    assert_eq!(t.queues[2].take_used().unwrap(), Some((first.into(), 0)));
    assert_eq!(t.handle.statistics(), None);
    t.tell(&[(7, 7)], &[]);
    assert_eq!(t.queues[2].take_used().unwrap(), None);
    assert_eq!(lock(&told).len(), 1);
}

#[test]
fn a_request_does_not_outlive_its_driver() {
    let (mut t, told) = balloon();
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    assert!(t.handle.request_statistics());
    t.queues[2] = DriverQueue::new(t.memory.clone(), 0x3000, 64).unwrap();
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    t.tell(&[(7, 7)], &[]);
    assert_eq!(t.queues[2].take_used().unwrap(), None);
    t.start(0, &[0, 1]);
    assert!(!t.handle.request_statistics(), "a driver that does not tell");
    assert_eq!(lock(&told).len(), 1);
}

#[test]
fn a_driver_that_tells_too_much() {
    let (mut t, told) = balloon();
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    let many: Vec<_> = (0..500).map(|tag| (tag, u64::from(tag))).collect();
    let first = t.tell(&many, &[]);
    let statistics = t.handle.statistics().unwrap();
    assert_eq!(statistics.iter().len(), MAX_STATISTICS);
    assert_eq!(statistics.iter().last(), Some((Statistic(63), 63)));
    // A second buffer unasked: the device keeps one.
    let second = t.tell(&[(1, 1)], &[]);
    assert_eq!(t.queues[2].take_used().unwrap(), Some((first.into(), 0)));
    assert_eq!(lock(&told).len(), 2);
    // One that is not in RAM tells nothing, and is kept like any other.
    let third = t.queues[2].chain().readable(0xd000_0000, 100).submit().unwrap();
    t.driver.notify(2);
    assert_eq!(t.queues[2].take_used().unwrap(), Some((second.into(), 0)));
    let counters = t.handle.counters();
    assert_eq!((lock(&told).len(), counters.unreadable, counters.requests), (2, 1, 3));
    assert!(t.handle.request_statistics());
    assert_eq!(t.queues[2].take_used().unwrap(), Some((third.into(), 0)));
    assert_eq!(t.driver.status(), 0xf);
}

#[test]
fn names_are_those_of_the_specification() {
    assert_eq!(Statistic::DIRECT_RECLAIM.name(), Some("DIRECT_RECLAIM"));
    assert_eq!(Statistic(16).name(), None);
    assert_eq!(format!("{:?} {:?}", Statistic(3), Statistic(99)), "MINFLT 99");
}

/// A monitor that asks again at each answer, and for another size, in the callback: the guest answers in its own time.
#[test]
fn the_callback_may_use_the_handle() {
    let handle = Arc::new(std::sync::OnceLock::<BalloonHandle>::new());
    let own = Arc::clone(&handle);
    let balloon = Balloon::builder(Ledger::default()).on_statistics(move |statistics| {
        let handle = own.get().unwrap();
        assert_eq!(handle.statistics().as_ref(), Some(statistics));
        handle.set_target(u32::try_from(statistics.get(Statistic::MEMFREE).unwrap()).unwrap());
        assert!(handle.request_statistics());
    });
    let balloon = balloon.build();
    handle.get_or_init(|| balloon.handle());
    let mut t = Test::new(balloon, guest_memory(MIB).unwrap());
    t.start(feature::STATS_VQ, &[0, 1, 2]);
    for free in 1..20 {
        let head = t.tell(&[(4, free)], &[]);
        assert_eq!(t.queues[2].take_used().unwrap(), Some((head.into(), 0)), "it is asked again");
        assert_eq!(u64::from(t.handle.target()), free);
    }
}
