use proptest::prelude::*;
use vmm_memory::vm_memory::GuestAddressSpace;

use super::*;
use crate::testkit::{DriverQueue, LinkRecorder, Memory, guest_memory, guest_memory_of};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AT: u64 = 0x1000;

fn queue(memory: &Memory, size: u16) -> (DriverQueue<Memory>, Virtqueue<Memory>, LinkRecorder) {
    let driver = DriverQueue::new(memory.clone(), AT, size).unwrap();
    let link = LinkRecorder::default();
    let device = driver.device_side().unwrap();
    let device = Virtqueue::new(device, 3, memory.clone(), Arc::new(link.clone())).unwrap();
    (driver, device, link)
}

fn pop(queue: &mut Virtqueue<Memory>) -> Result<Option<Chain<<Memory as GuestAddressSpace>::T>>, QueueError> {
    let memory = queue.memory();
    queue.pop(memory)
}

#[test]
fn chains_come_in_their_order_and_go_back() {
    let memory = guest_memory(1 << 20).unwrap();
    let (mut driver, mut device, link) = queue(&memory, 8);
    assert!(pop(&mut device).unwrap().is_none());
    let first = driver.chain().readable(0x8000, 4).readable(0x9000, 6).writable(0xa000, 10).submit().unwrap();
    let second = driver.chain().writable(0xb000, 1).submit_indirect(0xf000).unwrap();
    assert_eq!(device.available().unwrap(), 2);
    memory.memory().write_slice(b"abcd", GuestAddress(0x8000)).unwrap();
    memory.memory().write_slice(b"efghij", GuestAddress(0x9000)).unwrap();
    let chain = pop(&mut device).unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable_len(), chain.writable_len()), (first, 10, 10));
    let mut bytes = [0; 16];
    assert_eq!(chain.read(2, &mut bytes).unwrap(), 8);
    assert_eq!(bytes[..8], *b"cdefghij");
    assert_eq!(chain.read(10, &mut bytes).unwrap(), 0);
    assert_eq!(chain.read(u64::MAX, &mut bytes).unwrap(), 0);
    assert_eq!(chain.write(9, b"xyz").unwrap(), 1);
    let other = pop(&mut device).unwrap().unwrap();
    assert_eq!((other.head(), other.readable_len(), other.writable_len()), (second, 0, 1));
    // In another order than they came.
    device.complete(second, 1).unwrap();
    device.complete(first, 10).unwrap();
    device.interrupt().unwrap();
    assert_eq!(driver.take_used().unwrap(), Some((second.into(), 1)));
    assert_eq!(driver.take_used().unwrap(), Some((first.into(), 10)));
    assert_eq!(driver.take_used().unwrap(), None);
    assert_eq!(link.take_used(), [3]);
}

#[test]
fn interrupts_and_doorbells_can_be_declined() {
    let memory = guest_memory(1 << 20).unwrap();
    let (mut driver, mut device, link) = queue(&memory, 8);
    driver.write_available_flags(1).unwrap();
    let head = driver.chain().writable(0x8000, 1).submit().unwrap();
    assert_eq!(device.rest().unwrap(), Progress::More, "one is there already");
    pop(&mut device).unwrap().unwrap();
    device.complete(head, 0).unwrap();
    device.interrupt().unwrap();
    assert!(link.take_used().is_empty());
    driver.write_available_flags(0).unwrap();
    device.interrupt().unwrap();
    assert!(link.take_used().is_empty(), "what it declined does not come later");
    assert_eq!(device.rest().unwrap(), Progress::Idle);
    assert_eq!(driver.used_flags().unwrap(), 0);
    device.decline_doorbells().unwrap();
    assert_eq!(driver.used_flags().unwrap(), 1);
}

/// VIRTIO_F_EVENT_IDX: the driver names the entry that is worth an interrupt.
#[test]
fn one_interrupt_for_many_chains() {
    let memory = guest_memory(1 << 20).unwrap();
    let driver = DriverQueue::new(memory.clone(), AT, 8).unwrap();
    let mut queue = driver.device_side().unwrap();
    queue.set_event_idx(true);
    let (link, mut driver) = (LinkRecorder::default(), driver);
    let mut device = Virtqueue::new(queue, 0, memory, Arc::new(link.clone())).unwrap();
    driver.write_used_event(2).unwrap();
    for (completed, interrupts) in [(1, 0), (2, 0), (3, 1), (4, 0)] {
        driver.chain().writable(0x8000, 1).submit().unwrap();
        let chain = pop(&mut device).unwrap().unwrap();
        device.complete(chain.head(), 0).unwrap();
        device.interrupt().unwrap();
        assert_eq!(link.take_used().len(), interrupts, "after {completed}");
    }
}

/// Who rests before it has served all, as at a rate limit, is rung for what is added then, not for what was there.
#[test]
fn a_driver_rings_for_what_it_adds_to_chains_that_wait() {
    let memory = guest_memory(1 << 20).unwrap();
    let mut driver = DriverQueue::new(memory.clone(), AT, 8).unwrap();
    let mut queue = driver.device_side().unwrap();
    queue.set_event_idx(true);
    let mut device = Virtqueue::new(queue, 0, memory.clone(), Arc::new(LinkRecorder::default())).unwrap();
    let [.., used] = driver.rings();
    let event = || memory.memory().read_obj::<u16>(GuestAddress(used + 4 + 8 * 8)).unwrap();
    for _ in 0..3 {
        driver.chain().writable(0x8000, 1).submit().unwrap();
    }
    pop(&mut device).unwrap().unwrap();
    assert_eq!(device.rest().unwrap(), Progress::More);
    assert_eq!(event(), driver.submitted(), "the next entry is worth a doorbell");
    while pop(&mut device).unwrap().is_some() {}
    assert_eq!(device.rest().unwrap(), Progress::Idle);
    assert_eq!(event(), driver.submitted());
}

/// A chain that is none ends the queue with an error that names it.
#[test]
fn broken_chains() {
    type Expected = fn(&QueueError) -> bool;
    /// Address, length, flags, next.
    type Descriptors = &'static [(u64, u32, u16, u16)];
    let chain: Expected = |e| matches!(e, QueueError::Chain { index: 3, head: 0 });
    let cases: [(&str, Descriptors, Expected); 8] = [
        ("a circle", &[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)], chain),
        ("itself", &[(0x8000, 1, NEXT, 0)], chain),
        ("beyond the table", &[(0x8000, 1, NEXT, 8)], chain),
        ("far beyond the table", &[(0x8000, 1, NEXT, 0xffff)], chain),
        ("more than 4 GiB", &[(0x8000, u32::MAX, NEXT, 1), (0x8000, u32::MAX, 0, 0)], chain),
        ("a table of half an entry", &[(0x8000, 24, INDIRECT, 0)], chain),
        ("a table of nothing", &[(0x8000, 0, INDIRECT, 0)], chain),
        ("readable behind writable", &[(0x8000, 1, WRITE | NEXT, 1), (0x9000, 1, 0, 0)], |e| {
            matches!(e, QueueError::Order { index: 3, head: 0 })
        }),
    ];
    for (name, descriptors, expected) in cases {
        let memory = guest_memory(1 << 20).unwrap();
        let (mut driver, mut device, _) = queue(&memory, 8);
        for (index, (gpa, len, flags, next)) in (0..).zip(descriptors) {
            driver.write_descriptor(index, *gpa, *len, *flags, *next).unwrap();
        }
        driver.make_available(0).unwrap();
        let error = pop(&mut device).unwrap_err();
        assert!(expected(&error), "{name}: {error}");
    }
}

#[test]
fn tables_within_tables_and_tables_that_are_too_long() {
    let memory = guest_memory(1 << 20).unwrap();
    let (mut driver, mut device, _) = queue(&memory, 4);
    let five = (0..5).fold(driver.chain(), |chain, n| chain.writable(0x8000 + n, 1));
    five.submit_indirect(0xf000).unwrap();
    assert!(matches!(pop(&mut device), Err(QueueError::Chain { .. })), "longer than the queue");
    let inner = [0x9000_u64, 16 | u64::from(INDIRECT) << 32];
    memory.memory().write_obj(inner, GuestAddress(0xe000)).unwrap();
    driver.write_descriptor(0, 0xe000, 16, INDIRECT, 0).unwrap();
    driver.make_available(0).unwrap();
    assert!(matches!(pop(&mut device), Err(QueueError::Chain { .. })), "a table within a table");
}

/// The same chain twice, before it was given back.
#[test]
fn cve_2026_45782_a_chain_in_flight_is_not_taken_again() {
    let memory = guest_memory(1 << 20).unwrap();
    let (mut driver, mut device, _) = queue(&memory, 128);
    let head = driver.chain().writable(0x8000, 1).submit().unwrap();
    pop(&mut device).unwrap().unwrap();
    driver.make_available(head).unwrap();
    assert!(matches!(pop(&mut device), Err(QueueError::InFlight { head: h, .. }) if h == head));
    let (mut driver, mut device, _) = queue(&memory, 128);
    for _ in 0..3 {
        let head = driver.chain().writable(0x8000, 1).submit().unwrap();
        assert_eq!(pop(&mut device).unwrap().unwrap().head(), head);
        device.complete(head, 0).unwrap();
        driver.make_available(head).unwrap();
        assert_eq!(pop(&mut device).unwrap().unwrap().head(), head, "given back meanwhile");
        device.complete(head, 0).unwrap();
    }
}

#[test]
fn more_chains_than_descriptors_are_refused() {
    let memory = guest_memory(1 << 20).unwrap();
    let (driver, mut device, _) = queue(&memory, 8);
    driver.write_available_index(9).unwrap();
    assert!(matches!(pop(&mut device), Err(QueueError::Ring { index: 3, .. })));
    driver.write_available_index(0x8000).unwrap();
    assert!(matches!(pop(&mut device), Err(QueueError::Ring { .. })));
}

#[test]
fn rings_outside_of_the_ram_are_refused() {
    let memory = guest_memory(0x10000).unwrap();
    let driver = DriverQueue::new(memory.clone(), AT, 8).unwrap();
    let [descriptors, available, used] = driver.rings();
    for rings in [
        [0xfff0, available, used],
        [descriptors, 0xfffe, used],
        [descriptors, available, 0xfffc],
        [!0xf, available, used],
        [descriptors, available, 1 << 40],
    ] {
        let mut queue = driver.device_side().unwrap();
        queue.try_set_desc_table_address(GuestAddress(rings[0])).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(rings[1])).unwrap();
        queue.try_set_used_ring_address(GuestAddress(rings[2])).unwrap();
        let link = Arc::new(LinkRecorder::default());
        let error = Virtqueue::new(queue, 1, memory.clone(), link).unwrap_err();
        assert!(matches!(error, QueueError::Place { index: 1, .. }), "{rings:x?}: {error}");
    }
}

/// A buffer that lies in two regions is one buffer; one that ends in no region is an error.
#[test]
fn cve_2019_18960_buffers_may_lie_across_regions() {
    let memory = guest_memory_of(&[(0, 0x10000), (0x10000, 0x1000)]).unwrap();
    let (mut driver, mut device, _) = queue(&memory, 8);
    driver.chain().readable(0xfffe, 4).writable(0xfffc, 8).submit().unwrap();
    driver.chain().readable(0x10ffe, 4).writable(0x10ffe, 4).submit().unwrap();
    memory.memory().write_slice(b"abcd", GuestAddress(0xfffe)).unwrap();
    let chain = pop(&mut device).unwrap().unwrap();
    let mut bytes = [0; 4];
    assert_eq!((chain.read(0, &mut bytes).unwrap(), &bytes), (4, b"abcd"));
    assert_eq!(chain.write(0, &[9; 8]).unwrap(), 8);
    let chain = pop(&mut device).unwrap().unwrap();
    chain.read(0, &mut bytes).unwrap_err();
    chain.write(0, &[1; 4]).unwrap_err();
}

/// A stream keeps what lies before the end of the RAM.
#[test]
fn what_lies_in_ram_can_be_had_to_the_byte() {
    let memory = guest_memory_of(&[(0, 0x10000), (0x10000, 0x1000)]).unwrap();
    let (mut driver, mut device, _) = queue(&memory, 8);
    driver
        .chain()
        .readable(0xffff, 2)
        .readable(0x10ffe, 4)
        .readable(0x8000, 2)
        .writable(0x8000, 3)
        .writable(0x10fff, 4)
        .writable(0x9000, 2)
        .submit()
        .unwrap();
    memory.memory().write_slice(b"ab", GuestAddress(0xffff)).unwrap();
    memory.memory().write_slice(b"cd", GuestAddress(0x10ffe)).unwrap();
    let chain = pop(&mut device).unwrap().unwrap();
    let mut bytes = [0; 8];
    assert_eq!((chain.read_some(0, &mut bytes), &bytes), (4, b"abcd\0\0\0\0"));
    assert_eq!((chain.read_some(1, &mut bytes[..2]), &bytes[..2]), (2, &b"bc"[..]));
    assert_eq!(chain.read_some(4, &mut bytes), 0);
    assert_eq!(chain.read_some(6, &mut bytes), 2, "what lies behind is still there for who asks for it");
    assert_eq!(chain.write_some(0, b"123456789"), 4);
    let mut written = [0; 4];
    memory.memory().read_slice(&mut written[..3], GuestAddress(0x8000)).unwrap();
    memory.memory().read_slice(&mut written[3..], GuestAddress(0x10fff)).unwrap();
    assert_eq!(&written, b"1234");
}

proptest! {
    /// Whatever stands in rings and descriptors: no panic, no endless chain, and what comes out keeps the rules.
    #[test]
    fn whatever_stands_in_memory(bytes in proptest::collection::vec(any::<u8>(), 0x400), size in 0_u32..5) {
        let size = 1 << size;
        let memory = guest_memory(0x2000).unwrap();
        let (driver, mut device, _) = queue(&memory, size);
        memory.memory().write_slice(&bytes, GuestAddress(AT)).unwrap();
        driver.write_available_index(u16::from(bytes[0]) % (size + 2)).unwrap();
        for _ in 0..64 {
            match pop(&mut device) {
                Ok(Some(chain)) => {
                    prop_assert!(chain.head() < size);
                    prop_assert!(chain.readable().len() + chain.writable().len() <= usize::from(size));
                    let mut bytes = [0; 64];
                    let (Ok(_) | Err(_)) = chain.read(0, &mut bytes);
                    let (Ok(_) | Err(_)) = chain.write(0, &bytes);
                    device.complete(chain.head(), 1).unwrap();
                }
                Ok(None) => break,
                Err(_) => break,
            }
        }
        device.interrupt().unwrap();
    }
}
