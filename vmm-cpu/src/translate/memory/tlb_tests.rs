use vmm_memory::GuestRam;

use super::super::map::Slot;
use super::*;
use crate::vm::GuestAccess;

const RAM: u64 = 64 << 20;

fn tlb() -> Tlb {
    let ram = GuestRam::builder().ram(RAM).build().unwrap();
    let mut map = MemoryMap::default();
    map.insert(Slot::new(ram.regions().remove(0), GuestAccess::ReadWrite)).unwrap();
    Tlb::new(Arc::new(map))
}

fn page(gpa: u64, global: bool) -> Translation {
    Translation { gpa, readable: true, writable: true, executable: true, global, size: PAGE }
}

#[test]
fn the_list_of_local_entries_stays_small() {
    let mut tlb = tlb();
    for index in 0..ENTRIES as u64 {
        tlb.fill(index * PAGE, &page(index * PAGE, false), true);
    }
    // Entries that are replaced by global ones and back are listed anew each time.
    for _ in 0..4 * ENTRIES {
        tlb.fill(0, &page(0, true), true);
        tlb.fill(0, &page(0, false), true);
    }
    assert!(tlb.local.len() <= LOCAL + 1, "{}", tlb.local.len());
}

#[test]
fn what_is_not_global_goes_with_the_address_space() {
    let mut tlb = tlb();
    tlb.fill(0x1000, &page(0x1000, false), true);
    tlb.fill(0x2000, &page(0x2000, true), true);
    let generation = tlb.generation();
    tlb.flush_local();
    assert!(tlb.generation() > generation);
    assert_eq!((tlb.load::<u8>(0x1000), tlb.load::<u8>(0x2000)), (None, Some(0)));
    tlb.flush_all();
    assert_eq!(tlb.load::<u8>(0x2000), None);
}

#[test]
fn one_page_goes_with_all_parts_of_a_large_one() {
    let mut tlb = tlb();
    let large = |gpa| Translation { size: 2 << 20, ..page(gpa, true) };
    for gpa in [0x20_0000, 0x20_5000, 0x3f_f000, 0x40_0000] {
        tlb.fill(gpa, &large(gpa), true);
    }
    tlb.flush_page(0x28_1234);
    for (va, present) in [(0x20_0000, false), (0x20_5000, false), (0x3f_f000, false), (0x40_0000, true)] {
        assert_eq!(tlb.load::<u8>(va).is_some(), present, "{va:#x}");
    }
}

#[test]
fn entries_serve_the_rights_that_they_were_made_with() {
    let mut tlb = tlb();
    tlb.set_reach(Reach::Supervisor);
    tlb.fill(0x1000, &page(0x1000, false), true);
    for (reach, hit) in [(Reach::User, false), (Reach::SupervisorAll, false), (Reach::Supervisor, true)] {
        tlb.set_reach(reach);
        assert_eq!(tlb.load::<u32>(0x1ffc).is_some(), hit, "{reach:?}");
    }
    // Not even one byte of the next page.
    assert_eq!(tlb.load::<u32>(0x1ffd), None);
    assert!(!tlb.store(0x1ffd, 0_u32) && tlb.store(0x1ffc, 1_u32));
}

#[test]
fn watched_pages_can_be_read_only() {
    let mut tlb = tlb();
    // Two linear addresses of one page, and another page.
    for (va, gpa) in [(0x1000, 0x5000), (0x2000, 0x5000), (0x3000, 0x6000)] {
        tlb.fill(va, &page(gpa, false), true);
    }
    tlb.watch_stores(0x5abc);
    assert!(!tlb.store(0x1000, 1_u8) && !tlb.store(0x2000, 1_u8) && tlb.store(0x3000, 1_u8));
    assert_eq!(tlb.load::<u8>(0x1000), Some(0));
    tlb.watch_all_stores();
    assert!(!tlb.store(0x3000, 1_u8));
}

#[test]
fn accesses_at_the_top_do_not_wrap() {
    let mut tlb = tlb();
    tlb.fill(!0xfff, &page(0x1000, false), true);
    tlb.fill(0, &page(0x2000, false), true);
    assert_eq!(tlb.load::<u64>(u64::MAX - 3), None);
    assert_eq!(tlb.load::<u64>(u64::MAX - 7), Some(0));
}

#[test]
fn an_empty_entry_serves_no_address() {
    let mut tlb = tlb();
    for reach in [Reach::User, Reach::Supervisor, Reach::SupervisorAll, Reach::UserAligned] {
        tlb.set_reach(reach);
        for page in 0..2 * ENTRIES as u64 {
            for va in [page * PAGE, page * PAGE + 4095, (page * PAGE).wrapping_sub(1), !(page * PAGE)] {
                assert_eq!((tlb.load::<u64>(va), tlb.load::<u8>(va)), (None, None), "{va:#x}");
                assert!(!tlb.store(va, 0_u32) && !tlb.load_bytes(va, &mut [0; 16], Order::Ascending));
            }
        }
    }
}
