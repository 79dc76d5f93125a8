use super::super::super::abi::nr::MEMORY_OP;
use super::super::super::test_support::{FRAMES, FREE, Guest};
use super::*;

const SELF: u16 = domid::SELF;

fn m2p(guest: &Guest, frame: u64) -> u64 {
    let at = guest.domain.memory.layout().m2p_entry(frame).unwrap();
    guest.load(0, at.0 / 8)
}

#[test]
fn sizes_are_told() {
    let mut guest = Guest::new();
    let own = guest.put(&SELF);
    let other = guest.put(&0_u16);
    assert_eq!(guest.call(MEMORY_OP, &[memop::MAXIMUM_RAM_PAGE, 0]), Ok(FRAMES - 1));
    for (command, value) in [
        (memop::CURRENT_RESERVATION, FRAMES),
        (memop::MAXIMUM_RESERVATION, FRAMES),
        (memop::MAXIMUM_GPFN, FRAMES - 1),
    ] {
        assert_eq!(guest.call(MEMORY_OP, &[command, own]), Ok(value));
        assert_eq!(guest.call(MEMORY_OP, &[command, other]), Err(Errno::ESRCH));
        assert_eq!(guest.call(MEMORY_OP, &[command, 8]), Err(Errno::EFAULT));
    }
}

#[test]
fn maps_are_given() {
    let mut guest = Guest::new();
    let buffer = guest.put(&[0_u8; 40]);
    let at = guest.put(&MemoryMap { nr_entries: 2, buffer, ..Default::default() });
    assert_eq!(guest.call(MEMORY_OP, &[memop::MEMORY_MAP, at]), Ok(0));
    assert_eq!(guest.get::<MemoryMap>(at).nr_entries, 1);
    let ram: E820Entry = guest.get(buffer);
    assert_eq!(({ ram.address }, { ram.size }, { ram.kind }), (0, FRAMES * PAGE_SIZE, E820_RAM));
    let at = guest.put(&MemoryMap { nr_entries: 0, buffer, ..Default::default() });
    assert_eq!(guest.call(MEMORY_OP, &[memop::MEMORY_MAP, at]), Err(Errno::EINVAL));
    let at = guest.put(&MemoryMap { nr_entries: 1, buffer: 8, ..Default::default() });
    assert_eq!(guest.call(MEMORY_OP, &[memop::MEMORY_MAP, at]), Err(Errno::EFAULT));
    let at = guest.put(&MachphysMapping::default());
    assert_eq!(guest.call(MEMORY_OP, &[memop::MACHPHYS_MAPPING, at]), Ok(0));
    let mapping: MachphysMapping = guest.get(at);
    assert_eq!((mapping.v_start, mapping.max_mfn), (M2P_VA, FRAMES - 1));
    assert!(mapping.v_end - mapping.v_start >= FRAMES * 8);
    assert_eq!(guest.call(MEMORY_OP, &[memop::MACHPHYS_MAPPING, 8]), Err(Errno::EFAULT));
}

fn reservation(guest: &mut Guest, command: u64, frames: &[u64], order: u32) -> Result<u64, Errno> {
    let extent_start = guest.put(frames);
    let at = guest.put(&Reservation {
        extent_start,
        nr_extents: frames.len() as u64,
        extent_order: order,
        domid: SELF,
        ..Default::default()
    });
    guest.call(MEMORY_OP, &[command, at])
}

#[test]
fn the_balloon_gives_and_takes() {
    let mut guest = Guest::new();
    assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE, FREE + 1], 0), Ok(2));
    assert_eq!(
        (m2p(&guest, FREE), m2p(&guest, FREE + 1), m2p(&guest, FREE + 2)),
        (u64::MAX, u64::MAX, FREE + 2)
    );
    assert_eq!(reservation(&mut guest, memop::POPULATE_PHYSMAP, &[FREE + 1], 0), Ok(1));
    assert_eq!(m2p(&guest, FREE + 1), FREE + 1);
    assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE], 9), Ok(1));
    assert_eq!(m2p(&guest, FREE + 511), u64::MAX);
    assert_eq!(reservation(&mut guest, memop::INCREASE_RESERVATION, &[0], 0), Ok(0), "there is no more");
}

#[test]
fn a_list_ends_at_the_first_bad_frame() {
    let mut guest = Guest::new();
    for bad in [FRAMES, u64::MAX, 1 << 52] {
        assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE, bad, FREE + 1], 0), Ok(1));
        assert_eq!(m2p(&guest, FREE + 1), FREE + 1);
    }
    assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE + 1], 1), Ok(0), "not aligned");
    assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE], 10), Err(Errno::EPERM));
    assert_eq!(reservation(&mut guest, memop::DECREASE_RESERVATION, &[FREE], u32::MAX), Err(Errno::EPERM));
    let at = guest.put(&Reservation { domid: 3, ..Default::default() });
    for command in [memop::DECREASE_RESERVATION, memop::POPULATE_PHYSMAP, memop::INCREASE_RESERVATION] {
        assert_eq!(guest.call(MEMORY_OP, &[command, at]), Err(Errno::ESRCH));
        assert_eq!(guest.call(MEMORY_OP, &[command, 8]), Err(Errno::EFAULT));
    }
}

#[test]
fn an_endless_list_is_taken_in_parts() {
    let mut guest = Guest::new();
    let frames: Vec<_> = (0..2000).map(|n| n % FRAMES).collect();
    assert_eq!(reservation(&mut guest, memop::POPULATE_PHYSMAP, &frames, 0), Ok(2000));
    let at = guest.put(&Reservation {
        extent_start: Guest::va(0),
        nr_extents: u64::MAX,
        domid: SELF,
        ..Default::default()
    });
    // It ends where memory does, or at a word that is no frame.
    assert!(guest.call(MEMORY_OP, &[memop::POPULATE_PHYSMAP, at]).unwrap() < RAM_WORDS);
    assert_eq!(guest.call(MEMORY_OP, &[memop::POPULATE_PHYSMAP | u64::MAX << 6, at]), Err(Errno::EFAULT));
}

const RAM_WORDS: u64 = 2 * FRAMES * 512;

#[test]
fn what_is_not_there_says_so() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(MEMORY_OP, &[memop::EXCHANGE, 0]), Err(Errno::EPERM));
    for command in [5, 7, 8, 10, 13, 15, 26, 63] {
        assert_eq!(guest.call(MEMORY_OP, &[command, 0]), Err(Errno::ENOSYS), "command {command}");
    }
    assert_eq!(guest.domain.unknown_hypercalls(MEMORY_OP), 9);
}
