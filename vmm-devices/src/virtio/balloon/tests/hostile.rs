//! Page numbers and ranges that are not what they should be, or are too many.

use super::*;

/// Numbers that are no RAM, those of the device's own registers among them.
#[test]
fn cve_2021_3929_what_is_no_ram_is_left_out() {
    let memory = guest_memory_of(&[(0, MIB), (2 * MIB, 0x2000), (2 * MIB + 0x2000, 0x1000)]).unwrap();
    let (mut t, ledger) = test(memory);
    t.start(0, &[0, 1]);
    t.send(0, &[0xff, 0x100, 0xd_0000, u32::MAX, 0x1ff, 0x200, 0x201, 0x202, 0x203, u32::MAX - 1]);
    assert_eq!(ledger.take(), [(0xff, 1), (0x200, 2), (0x202, 1)], "one call for each region");
    let counters = t.handle.counters();
    assert_eq!((counters.inflated, counters.skipped), (4, 6));
    // Numbers that cannot be read.
    for (gpa, len) in [(MIB - 4, 8), (0xd000_0000, 4), (u64::MAX - 1, 4)] {
        let head = t.queues[0].chain().readable(gpa, len).submit().unwrap();
        t.driver.notify(0);
        assert_eq!(t.queues[0].take_used().unwrap(), Some((head.into(), 0)));
    }
    assert_eq!((t.handle.counters().unreadable, ledger.take()), (3, vec![]));
    assert_eq!(t.driver.status(), 0xf);
}

/// Reported ranges that lie in two regions, or partly in none.
#[test]
fn cve_2019_18960_reports_are_cut_to_whole_pages_of_ram() {
    let memory = guest_memory_of(&[(0, MIB), (MIB, 0x4000), (4 * MIB, 0x4000)]).unwrap();
    let (mut t, ledger) = test(memory);
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    t.report(&[(0x2_0000, 0x3000), (0x3_0000, 0x1000)]);
    assert_eq!(ledger.take(), [(0x20, 3), (0x30, 1)]);
    t.report(&[(MIB - 0x2000, 0x4000)]);
    assert_eq!(ledger.take(), [(0xfe, 2), (0x100, 2)]);
    assert_eq!(t.handle.counters().skipped, 0);
    t.report(&[(MIB + 0x3000, 0x40_0000)]);
    assert_eq!(ledger.take(), [(0x103, 1), (0x400, 4)]);
    let skipped = t.handle.counters().skipped;
    assert_eq!(skipped, 0x400 - 5);
    // Half pages, less than a page, nothing, the end of addresses.
    t.report(&[
        (0x2_0800, 0x1800),
        (0x3_0001, 0xfff),
        (0x4_0800, 0x10),
        (0x5_0800, 0),
        (u64::MAX - 8, 0x1000),
    ]);
    assert_eq!(ledger.take(), [(0x21, 1)]);
    assert_eq!(t.handle.counters().skipped, skipped + 4);
    assert_eq!(t.handle.counters().reported, 4 + 4 + 5 + 1);
}

/// CVE-2023-5088, a reset with work in flight. Four gigabytes of page numbers in one chain: each call does its share, and what is
/// left is given up at a reset.
#[test]
fn cve_2023_5088_a_chain_without_end_is_given_up_at_a_reset() {
    let memory = guest_memory(64 * MIB).unwrap();
    let ledger = Ledger::default();
    let mut balloon = Balloon::new(ledger.clone());
    let handle = balloon.handle();
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 64).unwrap();
    let other = DriverQueue::new(memory.clone(), 0x4000, 64).unwrap();
    let link = Arc::new(LinkRecorder::default());
    let side = |queue: &DriverQueue<Memory>, index| {
        let side = queue.device_side().unwrap();
        Some(Virtqueue::new(side, index, memory.clone(), link.clone()).unwrap())
    };
    let activation = Activation {
        features: 0,
        queues: vec![side(&queue, 0), side(&other, 1)],
        link: link.clone(),
        doorbells: Arc::new(Doorbells::new(5)),
    };
    let mut workers = balloon.activate(activation).unwrap();
    // Every second page, so that no two make a run, over and over.
    let numbers: Vec<u8> = (0..2048_u32).flat_map(|n| (1024 + 2 * (n % 1024)).to_le_bytes()).collect();
    for start in (8 * MIB..16 * MIB).step_by(numbers.len()) {
        memory.memory().write_slice(&numbers, GuestAddress(start)).unwrap();
    }
    let chain = queue.chain().readable(8 * MIB, 8 << 20);
    let chain = (0..63).fold(chain, |chain, _| chain.readable(0, 64 << 20));
    chain.submit().unwrap();
    let mut calls = 0;
    for _ in 0..20 {
        assert_eq!(workers[0].process().unwrap(), Progress::More);
        calls += ledger.take().len();
        assert!(calls > 0);
    }
    assert!(calls <= 20 * 16384 / 32, "{calls} releases in 20 calls");
    assert_eq!(queue.take_used().unwrap(), None);
    assert_eq!(handle.counters().requests, 0);
    // The other queue has its turn meanwhile.
    assert_eq!(workers[1].process().unwrap(), Progress::Idle);
    workers[0].stop();
    let before = handle.counters();
    // An executor would not call it any more; there is nothing left to go on with.
    assert_eq!(workers[0].process().unwrap(), Progress::Idle);
    VirtioDevice::<Memory>::reset(&mut balloon, workers);
    assert_eq!((ledger.take(), handle.counters()), (vec![], before));
}

/// One buffer of nearly 4 GiB, of which little is RAM.
#[test]
fn a_report_of_everything() {
    let memory = guest_memory(256 * MIB).unwrap();
    let (mut t, ledger) = test(memory);
    t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
    t.report(&[(0x10_0000, 0xfff0_0000)]);
    let released = ledger.take();
    assert!(released.iter().all(|(_, pages)| *pages <= 16384), "{released:?}");
    assert_eq!(released.iter().map(|(_, pages)| pages).sum::<u64>(), 255 * MIB / PAGE);
    let counters = t.handle.counters();
    assert_eq!((counters.reported, counters.skipped), (0xff00, 0xf_0000));
}

/// A guest that gives its own rings away finds zeros there, and no more comes of it.
#[test]
fn rings_in_the_balloon_are_the_guests_own_affair() {
    let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), MIB)).build().unwrap();
    let mut t = Test::new(Balloon::new(ram.clone()), ram.address_space());
    for _ in 0..3 {
        t.queues =
            (0..5).map(|i| DriverQueue::new(t.memory.clone(), 0x1000 * (i + 1), 64).unwrap()).collect();
        t.start(feature::PAGE_REPORTING, &[0, 1, 4]);
        for numbers in [[1, 2, 5, 8], [1, 1, 1, 1]] {
            t.write_numbers(&numbers);
            t.queues[0].chain().readable(NUMBERS, 16).submit().unwrap();
            t.driver.notify(0);
        }
        t.queues[4].chain().writable(0, u32::MAX).submit().unwrap();
        t.driver.notify(4);
        t.driver.notify(0);
        assert_eq!(t.driver.status() & 0xf, 0xf);
        t.driver.set_status(0);
        assert_eq!(t.driver.status(), 0);
    }
}
