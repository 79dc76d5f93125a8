//! Rings, descriptors and page numbers change while the device looks at them.

use super::*;
use crate::testkit::Racer;

/// What is released must be RAM, whatever else the device was made to believe.
struct Strict(u64);

impl MemoryRelease for Strict {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        assert!(gpa.0.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0);
        assert!(gpa.0 < self.0 && len <= self.0 - gpa.0, "{gpa:?} {len:#x}");
        Ok(())
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.release(gpa, len)
    }
}

#[test]
fn cve_2015_8550_numbers_and_rings_that_race() {
    let mut t = Test::new(Balloon::new(Strict(MIB)), guest_memory(MIB).unwrap());
    // Numbers alone first: the device has no reason to give up. Then all that is there.
    for (rounds, ranges) in [(400, &[(NUMBERS, 0x400)][..]), (400, &[(0x1000, 0x5000), (NUMBERS, 0x400)])] {
        t.queues = queues(&t.memory);
        t.write_numbers(&(0..256).map(|n| n % 0x100).collect::<Vec<_>>());
        t.start(feature::PAGE_REPORTING | feature::STATS_VQ, &[0, 1, 2, 4]);
        let racer = Racer::start(&t.memory, ranges).unwrap();
        for _ in 0..rounds {
            racer.wait_for(racer.flips() + 1);
            for queue in [0, 1, 2] {
                t.queues[queue].chain().readable(NUMBERS, 0x400).submit().unwrap();
                t.driver.notify(queue.try_into().unwrap());
            }
            t.queues[4].chain().writable(0x4_0000, 0x4000).writable(0x5_0000, 0x1000).submit().unwrap();
            t.driver.notify(4);
            t.handle.request_statistics();
            assert_eq!(t.driver.status() & !0x40, 0xf);
            if t.driver.status() != 0xf {
                assert!(ranges.len() > 1, "numbers are no reason to give up");
                t.queues = queues(&t.memory);
                t.start(feature::PAGE_REPORTING | feature::STATS_VQ, &[0, 1, 2, 4]);
            }
        }
        assert!(racer.stop() >= rounds);
    }
    let counters = t.handle.counters();
    assert!(counters.inflated > 1000 && counters.reported > 1000, "{counters:?}");
}
