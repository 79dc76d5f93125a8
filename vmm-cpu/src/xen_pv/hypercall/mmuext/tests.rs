use super::super::super::abi::mmu::entry;
use super::super::super::abi::nr::MMUEXT_OP;
use super::super::super::abi::{PAGE_SIZE, domid};
use super::super::super::test_support::{DIRECT, FRAMES, FREE, Guest, L1, L2, L3, L4};
use super::*;

const SELF: u64 = domid::SELF as u64;

fn op(guest: &mut Guest, cmd: u32, arg1: u64, arg2: u64) -> Result<u64, Errno> {
    let list = guest.put(&MmuextOp { cmd, arg1, arg2, ..Default::default() });
    guest.call(MMUEXT_OP, &[list, 1, 0, SELF])
}

/// A top-level table of its own, which shares the direct map.
fn new_root(guest: &Guest, frame: u64) {
    guest.store(frame, (DIRECT >> 39) & 511, (L3 * PAGE_SIZE) | 3);
}

#[test]
fn a_root_is_pinned_and_used() {
    let mut guest = Guest::new();
    new_root(&guest, FREE);
    assert_eq!(op(&mut guest, mmuext::PIN_L4_TABLE, FREE, 0), Ok(0));
    assert_eq!(op(&mut guest, mmuext::PIN_L4_TABLE, FREE, 0), Err(Errno::EINVAL), "pinned already");
    assert_eq!(op(&mut guest, mmuext::NEW_BASEPTR, FREE, 0), Ok(0));
    assert_eq!(guest.engine.kernel_root, FREE * PAGE_SIZE);
    assert_eq!(guest.engine.prepared, [(FREE * PAGE_SIZE, GuestMode::Kernel)]);
    assert_eq!(op(&mut guest, mmuext::NEW_BASEPTR, L4, 0), Ok(0));
    assert_eq!(op(&mut guest, mmuext::NEW_BASEPTR, FREE, 0), Ok(0));
    assert_eq!(guest.engine.prepared.len(), 1, "neither is prepared twice");
    assert_eq!(op(&mut guest, mmuext::UNPIN_TABLE, FREE, 0), Ok(0));
    assert_eq!(op(&mut guest, mmuext::UNPIN_TABLE, FREE, 0), Err(Errno::EINVAL));
}

#[test]
fn the_user_root_comes_and_goes() {
    let mut guest = Guest::new();
    assert_eq!(op(&mut guest, mmuext::NEW_USER_BASEPTR, FREE, 0), Ok(0));
    assert_eq!(guest.engine.user_root, Some(FREE * PAGE_SIZE));
    assert_eq!(guest.engine.prepared, [(FREE * PAGE_SIZE, GuestMode::User)]);
    assert_eq!(op(&mut guest, mmuext::NEW_USER_BASEPTR, 0, 0), Ok(0));
    assert_eq!(guest.engine.user_root, None);
}

#[test]
fn a_root_that_changes_its_mode_is_prepared_anew() {
    let mut guest = Guest::new();
    new_root(&guest, FREE);
    for (cmd, prepared) in [
        (mmuext::NEW_BASEPTR, 1),
        (mmuext::NEW_USER_BASEPTR, 2),
        (mmuext::NEW_USER_BASEPTR, 2),
        (mmuext::NEW_BASEPTR, 3),
    ] {
        assert_eq!(op(&mut guest, cmd, FREE, 0), Ok(0));
        assert_eq!(guest.engine.prepared.len(), prepared);
    }
}

#[test]
fn frames_that_are_no_ram_are_refused() {
    let mut guest = Guest::new();
    for frame in [FRAMES, FRAMES + 1, 1 << 40, u64::MAX] {
        for cmd in [
            mmuext::PIN_L1_TABLE,
            mmuext::PIN_L4_TABLE,
            mmuext::UNPIN_TABLE,
            mmuext::NEW_BASEPTR,
            mmuext::NEW_USER_BASEPTR,
            mmuext::CLEAR_PAGE,
            mmuext::COPY_PAGE,
        ] {
            assert_eq!(op(&mut guest, cmd, frame, 0), Err(Errno::EINVAL), "command {cmd}, frame {frame:#x}");
        }
    }
    assert_eq!(op(&mut guest, mmuext::COPY_PAGE, FREE, FRAMES), Err(Errno::EINVAL));
    assert_eq!(guest.engine.kernel_root, L4 * PAGE_SIZE);
}

#[test]
fn pinning_brings_entries_into_form() {
    let mut guest = Guest::new();
    guest.store(FREE, 7, ((FREE + 1) * PAGE_SIZE) | 3);
    guest.store(FREE + 1, 8, ((FREE + 2) * PAGE_SIZE) | 3);
    guest.store(FREE + 2, 9, ((FREE + 3) * PAGE_SIZE) | 3);
    guest.store(FREE + 3, 10, (5 * PAGE_SIZE) | entry::PRESENT | entry::GLOBAL);
    // What a guest has in the platform's slots is not looked at.
    guest.store(FREE, 256, u64::MAX);
    assert_eq!(op(&mut guest, mmuext::PIN_L4_TABLE, FREE, 0), Ok(0));
    for (offset, level) in [(0, 4), (1, 3), (2, 2), (3, 1)] {
        assert_eq!(guest.domain.tables.level(FREE + offset), level);
    }
    assert_eq!(guest.load(FREE, 7), ((FREE + 1) * PAGE_SIZE) | 7);
    assert_eq!(guest.load(FREE + 3, 10), (5 * PAGE_SIZE) | entry::PRESENT | entry::USER);
}

#[test]
fn tables_of_the_wrong_level_are_refused() {
    let mut guest = Guest::new();
    assert_eq!(op(&mut guest, mmuext::PIN_L4_TABLE, L4, 0), Err(Errno::EINVAL), "the initial root is pinned");
    assert_eq!(op(&mut guest, mmuext::PIN_L1_TABLE, L4, 0), Err(Errno::EINVAL));
    guest.store(FREE, 0, (L1 * PAGE_SIZE) | 3);
    assert_eq!(
        op(&mut guest, mmuext::PIN_L4_TABLE, FREE, 0),
        Err(Errno::EINVAL),
        "level 1 where level 3 is due"
    );
    guest.store(FREE, 0, (L2 * PAGE_SIZE) | 3 | entry::LARGE);
    assert_eq!(op(&mut guest, mmuext::PIN_L1_TABLE + 2, FREE, 0), Err(Errno::EINVAL), "a large page");
    guest.store(FREE, 0, (FRAMES * PAGE_SIZE) | 3);
    assert_eq!(op(&mut guest, mmuext::PIN_L1_TABLE + 1, FREE, 0), Err(Errno::EINVAL), "no RAM");
}

#[test]
fn flushes() {
    let mut guest = Guest::new();
    let both = guest.put(&3_u64);
    let other = guest.put(&2_u64);
    for (cmd, arg1, arg2, expected) in [
        (mmuext::TLB_FLUSH_LOCAL, 0, 0, Some(None)),
        (mmuext::INVLPG_LOCAL, DIRECT, 0, Some(Some(DIRECT))),
        (mmuext::TLB_FLUSH_ALL, 0, 0, Some(None)),
        (mmuext::INVLPG_ALL, DIRECT, 0, Some(Some(DIRECT))),
        (mmuext::TLB_FLUSH_MULTI, 0, both, Some(None)),
        (mmuext::INVLPG_MULTI, DIRECT, both, Some(Some(DIRECT))),
        (mmuext::TLB_FLUSH_MULTI, 0, other, None),
        // What the engine keeps for itself is no address to flush alone.
        (mmuext::INVLPG_LOCAL, 0xffff_8100_0000_0000, 0, Some(None)),
    ] {
        guest.engine.flushed.clear();
        assert_eq!(op(&mut guest, cmd, arg1, arg2), Ok(0), "command {cmd}");
        assert_eq!(guest.engine.flushed.first().copied(), expected, "command {cmd}");
    }
    assert_eq!(op(&mut guest, mmuext::TLB_FLUSH_MULTI, 0, 8), Err(Errno::EFAULT));
}

/// Other virtual processors find an entry that was written before they are told to forget the old one.
#[test]
fn entries_are_published_before_others_flush() {
    let mut guest = Guest::new();
    let other = guest.put(&2_u64);
    for (cmd, arg2, published) in [
        (mmuext::TLB_FLUSH_LOCAL, 0, false),
        (mmuext::TLB_FLUSH_ALL, 0, true),
        (mmuext::TLB_FLUSH_MULTI, other, true),
        (mmuext::INVLPG_MULTI, other, true),
    ] {
        (guest.engine.live_stores, guest.engine.published) = (vec![(0, 0)], 0);
        assert_eq!(op(&mut guest, cmd, DIRECT, arg2), Ok(0));
        assert_eq!(guest.engine.published == 1, published, "command {cmd}");
    }
}

#[test]
fn pages_are_cleared_and_copied() {
    let mut guest = Guest::new();
    guest.store(FREE, 0, 7);
    guest.store(FREE, 511, 8);
    assert_eq!(op(&mut guest, mmuext::COPY_PAGE, FREE + 1, FREE), Ok(0));
    assert_eq!((guest.load(FREE + 1, 0), guest.load(FREE + 1, 511)), (7, 8));
    assert_eq!(op(&mut guest, mmuext::CLEAR_PAGE, FREE, 0), Ok(0));
    assert_eq!((guest.load(FREE, 0), guest.load(FREE, 511)), (0, 0));
    assert_eq!(op(&mut guest, mmuext::CLEAR_PAGE, L3, 0), Err(Errno::EINVAL), "a page table");
    assert_eq!(op(&mut guest, mmuext::COPY_PAGE, L3, FREE), Err(Errno::EINVAL));
}

#[test]
fn what_is_not_offered_says_so() {
    let mut guest = Guest::new();
    assert_eq!(op(&mut guest, mmuext::SET_LDT, 0, 0), Ok(0), "no LDT");
    assert_eq!(op(&mut guest, mmuext::SET_LDT, DIRECT, 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(op(&mut guest, mmuext::FLUSH_CACHE, 0, 0), Err(Errno::EACCES));
    assert_eq!(op(&mut guest, mmuext::MARK_SUPER, 0, 0), Err(Errno::EOPNOTSUPP));
    for cmd in [14, 21, u32::MAX] {
        assert_eq!(op(&mut guest, cmd, 0, 0), Err(Errno::ENOSYS));
    }
    assert_eq!(guest.domain.unknown_hypercalls(MMUEXT_OP), 6);
    let list = guest.put(&MmuextOp::default());
    assert_eq!(guest.call(MMUEXT_OP, &[list, 1, 0, 5]), Err(Errno::ESRCH));
    assert_eq!(guest.call(MMUEXT_OP, &[8, 1, 0, SELF]), Err(Errno::EFAULT));
}

#[test]
fn lists_say_how_far_they_came() {
    let mut guest = Guest::new();
    let flush = MmuextOp { cmd: mmuext::TLB_FLUSH_LOCAL, ..Default::default() };
    let bad = MmuextOp { cmd: mmuext::MARK_SUPER, ..Default::default() };
    let list = guest.put(&[flush, flush, bad, flush]);
    let done = guest.put(&0_u32);
    assert_eq!(guest.call(MMUEXT_OP, &[list, 4, done, SELF]), Err(Errno::EOPNOTSUPP));
    assert_eq!(guest.get::<u32>(done), 2);
    let list = guest.put(vec![flush; 2500].as_slice());
    assert_eq!(guest.call(MMUEXT_OP, &[list, 2500, done, SELF]), Ok(0));
    assert_eq!(guest.get::<u32>(done), 2500);
}

#[test]
fn a_large_tree_is_read_in_parts() {
    let mut guest = Guest::new();
    // 600 tables of level 1 under two of level 2.
    let first = FREE + 3;
    for index in 0..600 {
        guest.store(FREE + 1 + index / 512, index % 512, ((first + index) * PAGE_SIZE) | 3);
        guest.store(first + index, 0, (5 * PAGE_SIZE) | 1);
    }
    guest.store(FREE, 0, ((FREE + 1) * PAGE_SIZE) | 3);
    guest.store(FREE, 1, ((FREE + 2) * PAGE_SIZE) | 3);
    let flush = MmuextOp { cmd: mmuext::TLB_FLUSH_LOCAL, ..Default::default() };
    let pin = MmuextOp { cmd: mmuext::PIN_L1_TABLE + 2, arg1: FREE, ..Default::default() };
    let list = guest.put(&[flush, pin, flush]);
    let done = guest.put(&0_u32);
    let rip = guest.engine.context.general.rip;
    guest.syscall(MMUEXT_OP, &[list, 3, done, SELF]);
    assert_eq!(guest.engine.context.general.rip, rip - 2, "the call is made again");
    assert_eq!(guest.get::<u32>(done), 1);
    guest.engine.context.general.rip = rip;
    let general = guest.engine.context.general;
    assert_eq!(guest.call(MMUEXT_OP, &[general.rdi, general.rsi, done, SELF]), Ok(0));
    assert_eq!(guest.get::<u32>(done), 3);
    assert!((0..600).all(|index| guest.load(first + index, 0) == (5 * PAGE_SIZE) | 5));
    assert_eq!(op(&mut guest, mmuext::UNPIN_TABLE, FREE, 0), Ok(0), "it is pinned");
}
