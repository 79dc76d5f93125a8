use super::super::super::abi::nr::{MMU_UPDATE, UPDATE_VA_MAPPING, UPDATE_VA_MAPPING_OTHERDOMAIN};
use super::super::super::test_support::{DIRECT, FRAMES, FREE, Guest, L1, L2, L3, L4};
use super::super::super::vcpu_abi::Action;
use super::*;
use std::sync::atomic::Ordering;

const SELF: u64 = domid::SELF as u64;

fn update(guest: &mut Guest, ptr: u64, val: u64) -> Result<u64, Errno> {
    let list = guest.put(&MmuUpdate { ptr, val });
    guest.call(MMU_UPDATE, &[list, 1, 0, SELF])
}

fn at(table: u64, index: u64) -> u64 {
    table * PAGE_SIZE + index * 8
}

#[test]
fn an_entry_of_a_live_table_goes_through_the_engine() {
    let mut guest = Guest::new();
    let value =
        ((FREE + 5) * PAGE_SIZE) | entry::PRESENT | entry::WRITABLE | entry::GLOBAL | entry::NO_EXECUTE;
    assert_eq!(update(&mut guest, at(L1 + 2, 9), value), Ok(0));
    let stored = (value | entry::USER) & !entry::GLOBAL;
    assert_eq!(guest.load(L1 + 2, 9), stored);
    assert_eq!(guest.engine.live_stores, [(at(L1 + 2, 9), stored)]);
}

#[test]
fn absent_entries_are_stored_as_they_are() {
    let mut guest = Guest::new();
    let swap = 0x1234_5678_9abc_def0 & !entry::PRESENT;
    assert_eq!(update(&mut guest, at(L1 + 2, 9), swap), Ok(0));
    assert_eq!(guest.load(L1 + 2, 9), swap);
}

#[test]
fn memory_that_is_no_table_is_stored_to_directly() {
    let mut guest = Guest::new();
    assert_eq!(update(&mut guest, at(FREE, 3), (FREE * PAGE_SIZE) | 1), Ok(0));
    assert_eq!(guest.load(FREE, 3), (FREE * PAGE_SIZE) | 1 | entry::USER);
    assert!(guest.engine.live_stores.is_empty());
}

#[test]
fn accessed_and_dirty_bits_are_kept_on_demand() {
    let mut guest = Guest::new();
    let value = (FREE * PAGE_SIZE) | entry::PRESENT | entry::USER;
    guest.store(L1 + 2, 9, value | entry::ACCESSED | entry::DIRTY | entry::WRITABLE);
    assert_eq!(update(&mut guest, at(L1 + 2, 9) | mmu::PT_UPDATE_PRESERVE_AD, value), Ok(0));
    assert_eq!(guest.load(L1 + 2, 9), value | entry::ACCESSED | entry::DIRTY);
    assert_eq!(update(&mut guest, at(L1 + 2, 9) | mmu::PT_UPDATE_NO_TRANSLATE, value), Ok(0));
    assert_eq!(guest.load(L1 + 2, 9), value);
}

#[test]
fn machine_to_physical_entries_are_written() {
    let mut guest = Guest::new();
    assert_eq!(update(&mut guest, (5 * PAGE_SIZE) | mmu::MACHPHYS_UPDATE, 77), Ok(0));
    let m2p = guest.domain.memory.layout().m2p_entry(5).unwrap();
    assert_eq!(guest.load(0, m2p.0 / 8), 77);
    assert_eq!(update(&mut guest, (FRAMES * PAGE_SIZE) | mmu::MACHPHYS_UPDATE, 77), Err(Errno::EINVAL));
    assert_eq!(update(&mut guest, !3 | mmu::MACHPHYS_UPDATE, 77), Err(Errno::EINVAL));
}

#[test]
fn frames_outside_of_the_domain_are_refused() {
    let mut guest = Guest::new();
    let end = guest.domain.memory.layout().abi_frames().end;
    for frame in [end, end + 1, 1 << 39, (1 << 40) - 1] {
        for table in [L1 + 2, FREE] {
            let result = update(&mut guest, at(table, 9), (frame * PAGE_SIZE) | 7);
            assert_eq!(result, Err(Errno::EINVAL), "frame {frame:#x}, table {table}");
        }
    }
    assert_eq!(update(&mut guest, at(L1 + 2, 9), ((end - 1) * PAGE_SIZE) | 7), Ok(0));
    // Upper levels name RAM only.
    assert_eq!(update(&mut guest, at(L2, 9), (FRAMES * PAGE_SIZE) | 7), Err(Errno::EINVAL));
    // So do the tables themselves.
    for table in [FRAMES, end, 1 << 40, u64::MAX >> 12] {
        assert_eq!(update(&mut guest, at(table, 0) & !3, 0), Err(Errno::EINVAL), "table {table:#x}");
    }
}

#[test]
fn slots_of_the_platform_are_refused() {
    let mut guest = Guest::new();
    for slot in [256, 259, 271] {
        assert_eq!(update(&mut guest, at(L4, slot), (L3 * PAGE_SIZE) | 7), Err(Errno::EINVAL), "slot {slot}");
        assert_eq!(update(&mut guest, at(L4, slot), 0), Err(Errno::EINVAL), "slot {slot}");
    }
    for slot in [0, 255, 272, 511] {
        assert_eq!(update(&mut guest, at(L4, slot), (L3 * PAGE_SIZE) | 7), Ok(0), "slot {slot}");
    }
}

#[test]
fn large_pages_are_refused() {
    let mut guest = Guest::new();
    let value = 0x20_0000 | 7 | entry::LARGE;
    assert_eq!(update(&mut guest, at(L2, 9), value), Err(Errno::EINVAL));
    assert_eq!(update(&mut guest, at(L3, 9), value), Err(Errno::EINVAL));
    // On level 1 the bit is another.
    assert_eq!(update(&mut guest, at(L1 + 2, 9), (FREE * PAGE_SIZE) | 7 | entry::LARGE), Ok(0));
}

#[test]
fn a_link_makes_tables_known() {
    let mut guest = Guest::new();
    let (table, page) = (FREE + 1, FREE + 2);
    guest.store(table, 4, (page * PAGE_SIZE) | entry::PRESENT | entry::GLOBAL);
    assert_eq!(update(&mut guest, at(L2, 9), (table * PAGE_SIZE) | 3), Ok(0));
    assert_eq!(guest.domain.tables.level(table), 1);
    assert_eq!(guest.load(table, 4), (page * PAGE_SIZE) | entry::PRESENT | entry::USER);
    // From then on its entries are live.
    guest.engine.live_stores.clear();
    assert_eq!(update(&mut guest, at(table, 5), (page * PAGE_SIZE) | 7), Ok(0));
    assert_eq!(guest.engine.live_stores.len(), 1);
    // A table with a bad entry is not linked, nor known.
    guest.store(FREE + 3, 0, (1 << 51) | 1);
    assert_eq!(update(&mut guest, at(L2, 10), ((FREE + 3) * PAGE_SIZE) | 3), Err(Errno::EINVAL));
    assert_eq!(guest.domain.tables.level(FREE + 3), 0);
    assert_eq!(guest.load(L2, 10), 0);
}

#[test]
fn a_table_that_contains_itself_is_no_loop() {
    let mut guest = Guest::new();
    for index in 0..512 {
        guest.store(FREE, index, (FREE * PAGE_SIZE) | 7);
    }
    // Its own entries make it a table of level 2 and of level 1.
    assert_eq!(update(&mut guest, at(L3, 9), (FREE * PAGE_SIZE) | 7), Err(Errno::EINVAL));
}

#[test]
fn writable_memory_is_no_table() {
    let mut guest = Guest::new();
    assert_eq!(update(&mut guest, at(L2, 9), (FREE * PAGE_SIZE) | 7), Ok(0));
    assert_eq!(guest.domain.tables.level(FREE), 1);
    assert_eq!(update(&mut guest, at(L1 + 2, 0), (FREE * PAGE_SIZE) | entry::PRESENT), Ok(0));
    assert_eq!(guest.domain.tables.level(FREE), 1);
    assert_eq!(update(&mut guest, at(L1 + 2, 0), (FREE * PAGE_SIZE) | 3), Ok(0));
    assert_eq!(guest.domain.tables.level(FREE), 0);
    // The pinned root is never given writable.
    assert_eq!(update(&mut guest, at(L1, L4), (L4 * PAGE_SIZE) | 3), Err(Errno::EINVAL));
}

#[test]
fn lists_stop_at_the_first_error_and_say_where() {
    let mut guest = Guest::new();
    let good = MmuUpdate { ptr: at(L1 + 2, 9), val: 0 };
    let bad = MmuUpdate { ptr: at(1 << 40, 0), val: 0 };
    let list = guest.put(&[good, good, bad, good]);
    let done = guest.put(&99_u32);
    assert_eq!(guest.call(MMU_UPDATE, &[list, 4, done, SELF]), Err(Errno::EINVAL));
    assert_eq!(guest.get::<u32>(done), 2);
}

#[test]
fn long_lists_are_taken_in_parts() {
    let mut guest = Guest::new();
    let updates: Vec<_> = (0..3000)
        .map(|n| MmuUpdate { ptr: ((n % FRAMES) * PAGE_SIZE) | mmu::MACHPHYS_UPDATE, val: n })
        .collect();
    let list = guest.put(updates.as_slice());
    let done = guest.put(&0_u32);
    let rip = guest.engine.context.general.rip;
    let (action, _) = guest.syscall(MMU_UPDATE, &[list, 3000, done, SELF]);
    assert_eq!(action, Action::Continue);
    assert_eq!(guest.engine.context.general.rip, rip - 2, "the call is made again");
    guest.engine.context.general.rip = rip;
    assert_eq!(guest.call(MMU_UPDATE, &[list, 3000, done, SELF]), Ok(0));
    assert_eq!(guest.get::<u32>(done), 3000);
    let m2p = guest.domain.memory.layout().m2p_entry(2999 - FRAMES).unwrap();
    assert_eq!(guest.load(0, m2p.0 / 8), 2999);
}

#[test]
fn a_list_in_no_memory_faults() {
    let mut guest = Guest::new();
    let done = guest.put(&0_u32);
    for list in [0, u64::MAX - 15, 0xffff_8000_0000_0000, 0x8000_0000_0000_0000] {
        assert_eq!(guest.call(MMU_UPDATE, &[list, 2, done, SELF]), Err(Errno::EFAULT), "{list:#x}");
    }
    assert_eq!(guest.call(MMU_UPDATE, &[0, 0, 0, SELF]), Ok(0));
    let list = guest.put(&MmuUpdate { ptr: (5 * PAGE_SIZE) | mmu::MACHPHYS_UPDATE, val: 5 });
    assert_eq!(guest.call(MMU_UPDATE, &[list, 1, 3, SELF]), Err(Errno::EFAULT), "no place for the count");
}

#[test]
fn other_domains_are_refused() {
    let mut guest = Guest::new();
    let list = guest.put(&MmuUpdate { ptr: at(L1 + 2, 9), val: 0 });
    for (foreign, errno) in [(0, Errno::ESRCH), (1, Errno::ESRCH), (u64::from(domid::IO), Errno::EPERM)] {
        assert_eq!(guest.call(MMU_UPDATE, &[list, 1, 0, foreign]), Err(errno), "{foreign:#x}");
    }
    assert_eq!(guest.call(MMU_UPDATE, &[list, 1, 0, SELF | 2 << 16]), Err(Errno::ESRCH));
    assert_eq!(guest.call(MMU_UPDATE, &[list, 1, 0, SELF | (SELF + 1) << 16]), Ok(0));
}

#[test]
fn a_mapping_is_updated_by_address() {
    let mut guest = Guest::new();
    let va = DIRECT + FREE * PAGE_SIZE;
    let value = ((FREE + 9) * PAGE_SIZE) | 3;
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, value, uvmf::INVLPG]), Ok(0));
    assert_eq!(guest.load(L1 + 2, 0), value | entry::USER);
    assert_eq!(guest.engine.flushed, [Some(va)]);
    guest.engine.flushed.clear();
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, value, uvmf::TLB_FLUSH | uvmf::ALL]), Ok(0));
    assert_eq!(guest.engine.flushed, [None]);
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, value, 0]), Ok(0));
    assert_eq!(guest.engine.flushed.len(), 1);
    assert_eq!(guest.call(UPDATE_VA_MAPPING_OTHERDOMAIN, &[va, 0, 0, SELF]), Ok(0));
    assert_eq!(guest.load(L1 + 2, 0), 0);
    assert_eq!(guest.call(UPDATE_VA_MAPPING_OTHERDOMAIN, &[va, 0, 0, 0]), Err(Errno::ESRCH));
}

#[test]
fn addresses_without_tables_cannot_be_updated() {
    let mut guest = Guest::new();
    for va in
        [0, 0xffff_8000_0000_0000, 0xffff_8180_0000_0000, 0x8000_0000_0000_0000, u64::MAX, DIRECT + (1 << 30)]
    {
        assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, 0, 0]), Err(Errno::EINVAL), "{va:#x}");
    }
    let end = guest.domain.memory.layout().abi_frames().end;
    let va = DIRECT + FREE * PAGE_SIZE;
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, (end * PAGE_SIZE) | 1, 0]), Err(Errno::EINVAL));
    assert!(guest.engine.flushed.is_empty());
}

#[test]
fn flushes_reach_the_virtual_processors_of_a_mask() {
    use super::super::super::test_support::TestHandle;
    let mut guest = Guest::new();
    let other = std::sync::Arc::new(TestHandle::default());
    guest.domain.set_handle(1, std::sync::Arc::<TestHandle>::clone(&other)).unwrap();
    let va = DIRECT + FREE * PAGE_SIZE;
    // The address of a bitmap takes the place of the scope, so it is aligned.
    let bitmap = guest.put(&2_u64);
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, 0, uvmf::INVLPG | bitmap]), Ok(0));
    assert_eq!(other.flushes.load(Ordering::SeqCst), 1);
    assert!(guest.engine.flushed.is_empty(), "not this one");
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, 0, uvmf::INVLPG | uvmf::ALL]), Ok(0));
    assert_eq!(other.flushes.load(Ordering::SeqCst), 2);
    assert_eq!(guest.call(UPDATE_VA_MAPPING, &[va, 0, uvmf::INVLPG | 8]), Err(Errno::EFAULT));
}
