//! Rights that are taken back while guests run.

use std::time::{Duration, Instant};

use crate::guest::{Guest, Place, packages};

/// Until loads give all ones.
const UNTIL_IT_IS_GONE: &str = "ivshmem store 0 1; ivshmem await 8 0xffffffffffffffff 120; ivshmem store 8 5; ivshmem word 8; ivshmem position";

#[test]
fn a_guest_that_is_disconnected_sees_ones() {
    if !packages("disconnected") {
        return;
    }
    let place = Place::new(usize::MAX);
    let guest = Guest::start(&place.path(), "", UNTIL_IT_IS_GONE);
    crate::guest::wait_for("the guest", || (place.word(0) == 1).then_some(()));
    let begun = Instant::now();
    assert!(place.server.disconnect(0));
    let disconnected = begun.elapsed();
    assert_eq!(guest.output(), format!("{}\n0\n", u64::MAX));
    println!("the server took {disconnected:?}, the guest had seen it within {:?}", begun.elapsed());
    assert_eq!(place.word(8), 0, "what it stored then is nowhere");
}

/// The server's end is that of the device, unless it is said otherwise.
#[test]
fn a_guest_without_its_server_sees_ones_or_goes_on() {
    if !packages("without a server") {
        return;
    }
    let place = Place::new(usize::MAX);
    let leaves = Guest::start(&place.path(), "", UNTIL_IT_IS_GONE);
    place.has(1);
    let stays =
        Guest::start(&place.path(), ",keep", "ivshmem store 16 1; ivshmem await 24 1 120; ivshmem word 24");
    crate::guest::wait_for("the guests", || (place.word(0) == 1 && place.word(16) == 1).then_some(()));
    let Place { server, memory, .. } = place;
    drop(server);
    assert_eq!(leaves.output(), format!("{}\n0\n", u64::MAX));
    std::thread::sleep(Duration::from_millis(100));
    use vmm_memory::vm_memory::{Bytes as _, MemoryRegionAddress};
    memory.region().write_obj(1_u64, MemoryRegionAddress(24)).unwrap();
    assert_eq!(stays.output(), "1\n");
}

#[test]
fn a_guest_that_may_read_does_not_write() {
    if !packages("read-only") {
        return;
    }
    let place = Place::new(1);
    let writer = Guest::start(&place.path(), "", "ivshmem store 0 7; ivshmem await 8 1 120; ivshmem word 0");
    place.has(1);
    let reads = "ivshmem await 0 7 120; ivshmem store 0 9; ivshmem word 0; ivshmem ring 0 0; ivshmem store 16 1; ivshmem word 16";
    let reader = Guest::start(&place.path(), "", reads);
    assert_eq!(reader.output(), "7\n0\n");
    assert_eq!((place.word(0), place.word(16)), (7, 0));
    use vmm_memory::vm_memory::{Bytes as _, MemoryRegionAddress};
    place.memory.region().write_obj(1_u64, MemoryRegionAddress(8)).unwrap();
    assert_eq!(writer.output(), "7\n");
}
