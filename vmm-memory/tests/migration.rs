//! A migration as a monitor does it: copy RAM while devices write and regions come and go, then pause
//! and copy the rest.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryRegion};
use vmm_memory::{Backing, DirtyPages, DirtyTracker, GuestRam, PAGE_SIZE, RegionConfig};

const RAM: u64 = 2 << 20;
const HOTPLUG: GuestAddress = GuestAddress(1 << 32);
const HOTPLUG_SIZE: u64 = 16 * PAGE_SIZE;

/// Pages by address.
type Copy = BTreeMap<u64, Vec<u8>>;

fn page(ram: &GuestRam, gpa: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).ok()?;
    Some(bytes)
}

fn receive(target: &mut Copy, ram: &GuestRam, pages: &DirtyPages) {
    assert!(pages.untracked_regions().is_empty());
    for (start, length) in pages.ranges() {
        for gpa in (start.0..start.0 + length).step_by(4096) {
            // A page whose region went away after the harvest is no longer the guest's.
            if let Some(bytes) = page(ram, gpa) {
                target.insert(gpa, bytes);
            }
        }
    }
}

#[test]
fn target_equals_source() {
    let ram = GuestRam::builder().ram(RAM).backing(Backing::Memfd).track_dirty(true).build().unwrap();
    let tracker = DirtyTracker::new(&ram);
    let mut target = Copy::new();
    for gpa in (0..RAM).step_by(4096) {
        target.insert(gpa, page(&ram, gpa).unwrap());
    }
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        for device in 0..2u64 {
            let (memory, running) = (ram.address_space(), &running);
            scope.spawn(move || {
                let mut count = 0;
                while running.load(Ordering::Relaxed) {
                    count += 1;
                    let gpa = (count * 0x1_0010 % (RAM - 8) + device * 8) & !7;
                    memory.memory().write_obj(count, GuestAddress(gpa)).unwrap();
                    // The region may be away just now.
                    let _away =
                        memory.memory().write_obj(count, GuestAddress(HOTPLUG.0 + gpa % HOTPLUG_SIZE));
                }
            });
        }
        let hotplug = scope.spawn(|| {
            for round in 0..50u64 {
                let region = ram.add_region(RegionConfig::new(HOTPLUG, HOTPLUG_SIZE)).unwrap();
                ram.memory().write_obj(round, GuestAddress(HOTPLUG.0 + HOTPLUG_SIZE - 8)).unwrap();
                thread::yield_now();
                if round != 49 {
                    ram.remove_region(region.start_addr()).unwrap();
                }
            }
        });
        while !hotplug.is_finished() {
            receive(&mut target, &ram, &tracker.harvest().unwrap());
        }
        running.store(false, Ordering::Relaxed);
    });
    receive(&mut target, &ram, &tracker.harvest().unwrap());
    assert!(tracker.harvest().unwrap().is_empty());

    let mut compared = 0;
    for region in ram.regions() {
        let start = region.start_addr().0;
        for gpa in (start..start + region.len()).step_by(4096) {
            assert!(target.get(&gpa) == page(&ram, gpa).as_ref(), "page {gpa:#x} differs");
            compared += 1;
        }
    }
    assert_eq!(compared, (RAM + HOTPLUG_SIZE) / PAGE_SIZE);
}
