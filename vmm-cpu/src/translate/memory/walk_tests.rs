use super::*;
use crate::translate::test_support::Guest;

const VA: u64 = 0x9000;
/// Entries on the way to it in [`Guest::long`].
const ENTRIES: [u64; 4] = [0x4000, 0x5000, 0x6000, 0x7000 + 9 * 8];
const WRITE: u32 = code::WRITE;
const USER_MODE: u32 = code::USER;
const PROTECTION: u32 = code::PROTECTION;

struct Walker {
    guest: Guest,
    paging: Paging,
}

impl Walker {
    fn new() -> Self {
        let guest = Guest::long();
        let mut paging = guest.core.paging();
        paging.efer |= efer::NXE;
        paging.cr0 |= cr0::WP;
        Self { guest, paging }
    }

    fn set(&mut self, entry: u64, on: u64, off: u64) {
        let old = self.guest.read::<8>(entry);
        self.guest.write::<8>(entry, old & !off | on);
    }

    fn go(&self, access: Access) -> Result<Translation, u32> {
        walk(self.guest.core.map(), &self.paging, VA, access).map_err(|fault| fault.error)
    }

    fn error(&self, access: Access) -> u32 {
        self.go(access).unwrap_err()
    }
}

#[test]
fn accessed_and_dirty_bits_are_set_as_needed() {
    let mut walker = Walker::new();
    let page = walker.go(Access::Read).unwrap();
    assert_eq!((page.gpa, page.writable, page.size), (VA, false, PAGE));
    let bits = |walker: &Walker| ENTRIES.map(|entry| walker.guest.read::<8>(entry) & (ACCESSED | DIRTY));
    assert_eq!(bits(&walker), [ACCESSED; 4]);
    assert!(walker.go(Access::Write).unwrap().writable);
    assert_eq!(bits(&walker), [ACCESSED, ACCESSED, ACCESSED, ACCESSED | DIRTY]);
    // A refused access marks no page.
    walker.set(ENTRIES[3], 0, ACCESSED | DIRTY | WRITABLE);
    assert_eq!(walker.error(Access::Write), PROTECTION | WRITE);
    assert_eq!(bits(&walker)[3], 0);
}

#[test]
fn each_level_may_refuse() {
    for (depth, entry) in ENTRIES.into_iter().enumerate() {
        let mut walker = Walker::new();
        walker.set(entry, 0, PRESENT);
        // Reserved bits of what is not present do not matter.
        walker.set(entry, 1 << 51, 0);
        assert_eq!(walker.error(Access::Read), 0, "{depth}");
        walker.set(entry, PRESENT, 0);
        assert_eq!(walker.error(Access::Write), PROTECTION | code::RESERVED | WRITE, "{depth}");
        walker.set(entry, 0, 1 << 51 | WRITABLE);
        assert_eq!(walker.error(Access::Write), PROTECTION | WRITE, "{depth}");
        walker.paging.cr0 &= !cr0::WP;
        assert!(walker.go(Access::Write).is_ok());
        walker.paging.user = true;
        assert_eq!(walker.error(Access::Write), PROTECTION | WRITE | USER_MODE, "{depth}");
        assert!(walker.go(Access::Read).is_ok());
        walker.set(entry, 0, USER);
        assert_eq!(walker.error(Access::Read), PROTECTION | USER_MODE, "{depth}");
        walker.paging.user = false;
        assert!(walker.go(Access::Execute).is_ok());
        walker.set(entry, NO_EXECUTE, 0);
        assert_eq!(walker.error(Access::Execute), PROTECTION | code::FETCH, "{depth}");
        assert!(walker.go(Access::Read).is_ok());
        // Without NXE the bit is reserved, and fetches are not told apart.
        walker.paging.efer &= !efer::NXE;
        assert_eq!(walker.error(Access::Execute), PROTECTION | code::RESERVED, "{depth}");
    }
}

#[test]
fn supervisors_keep_out_of_the_pages_of_programs() {
    let mut walker = Walker::new();
    walker.paging.cr4 |= cr4::SMEP | cr4::SMAP;
    walker.paging.smap_lifted = false;
    assert_eq!(walker.error(Access::Execute), PROTECTION | code::FETCH);
    assert_eq!(walker.error(Access::Read), PROTECTION);
    walker.paging.smap_lifted = true;
    let page = walker.go(Access::Write).unwrap();
    assert!(page.readable && page.writable && !page.executable);
    // One level without the bit makes it the supervisor's.
    walker.set(ENTRIES[1], 0, USER);
    walker.paging.smap_lifted = false;
    assert!(walker.go(Access::Execute).is_ok() && walker.go(Access::Read).is_ok());
}

#[test]
fn protection_keys_close_data_of_user_pages() {
    let mut walker = Walker::new();
    walker.set(ENTRIES[3], 5 << 59, 0);
    // Access and writes disabled for key 5; without PKE nobody looks.
    let (no_access, no_writes) = (1 << 10, 1 << 11);
    walker.paging.pkru = no_access;
    assert!(walker.go(Access::Write).is_ok());
    walker.paging.cr4 |= cr4::PKE;
    for user in [true, false] {
        walker.paging.user = user;
        let mode = if user { USER_MODE } else { 0 };
        walker.paging.pkru = no_access;
        assert_eq!(walker.error(Access::Read), PROTECTION | code::KEY | mode);
        assert_eq!(walker.error(Access::Write), PROTECTION | code::KEY | mode | WRITE);
        assert!(walker.go(Access::Execute).is_ok_and(|page| !page.readable && !page.writable));
        walker.paging.pkru = no_writes;
        assert!(walker.go(Access::Read).is_ok_and(|page| !page.writable));
        assert_eq!(walker.error(Access::Write), PROTECTION | code::KEY | mode | WRITE);
    }
    // Of the supervisor's writes, CR0.WP decides.
    walker.paging.cr0 &= !cr0::WP;
    assert!(walker.go(Access::Write).is_ok());
    // Another key, or a page of the supervisor's.
    walker.paging = Paging { user: true, pkru: no_access | no_access << 2, ..walker.paging };
    walker.set(ENTRIES[3], 1 << 59, 5 << 59);
    assert!(walker.go(Access::Write).is_ok());
    walker.set(ENTRIES[3], 5 << 59, USER);
    walker.paging.user = false;
    assert!(walker.go(Access::Write).is_ok());
}

#[test]
fn large_pages_have_reserved_bits_of_their_own() {
    for (entry, shift) in [(ENTRIES[1], 30), (ENTRIES[2], 21)] {
        let mut walker = Walker::new();
        walker.guest.write::<8>(entry, LARGE | 7);
        let page = walker.go(Access::Write).unwrap();
        assert_eq!((page.gpa, page.size), (VA, 1 << shift));
        // Bit 12 is PAT, bit 13 is reserved.
        walker.set(entry, 1 << 12, 0);
        assert_eq!(walker.go(Access::Write).unwrap().gpa, VA);
        walker.set(entry, 1 << 13, 0);
        assert_eq!(walker.error(Access::Read), PROTECTION | code::RESERVED);
    }
    let mut walker = Walker::new();
    walker.set(ENTRIES[0], LARGE, 0);
    assert_eq!(walker.error(Access::Read), PROTECTION | code::RESERVED);
}

#[test]
fn global_pages_need_pge() {
    let mut walker = Walker::new();
    walker.set(ENTRIES[3], GLOBAL, 0);
    assert!(!walker.go(Access::Read).unwrap().global);
    walker.paging.cr4 |= cr4::PGE;
    assert!(walker.go(Access::Read).unwrap().global);
}

#[test]
fn pages_of_32_bit_paging() {
    let mut guest = Guest::protected();
    let mut paging = guest.core.paging();
    (paging.cr0, paging.cr3) = (cr0::PG | cr0::PE | cr0::WP, 0x4000);
    guest.write::<4>(0x4000, 0x5000 | 7);
    guest.write::<4>(0x5000 + 9 * 4, 0xa000 | 7);
    let go = |guest: &Guest, paging: &Paging, va| walk(guest.core.map(), paging, va, Access::Write);
    assert_eq!(go(&guest, &paging, VA).unwrap().gpa, 0xa000);
    assert_eq!(guest.read::<4>(0x5000 + 9 * 4), 0xa067);
    // 4 MiB at 0x1_0040_0000; bits 13 and up of the entry extend the address. Without PSE the bit means nothing.
    guest.write::<4>(0x4004, 0x0040_2000 | LARGE | 7);
    let huge = |paging: &Paging| go(&guest, paging, 0x0040_1000);
    assert_ne!(huge(&paging).map(|page| page.size), Ok(4 << 20));
    paging.cr4 |= cr4::PSE;
    assert_eq!(huge(&paging).map(|page| (page.gpa, page.size)), Ok((0x1_0040_1000, 4 << 20)));
    // PAE has other tables: three levels, the first with four entries.
    paging.cr4 = cr4::PAE;
    guest.write::<8>(0x4000 + 3 * 8, 0x5000 | 1);
    guest.write::<8>(0x5000, LARGE | 7);
    assert_eq!(go(&guest, &paging, 0xc000_3000).map(|page| (page.gpa, page.size)), Ok((0x3000, 2 << 20)));
    guest.write::<8>(0x4000 + 3 * 8, 0x5000 | 3);
    assert_eq!(go(&guest, &paging, 0xc000_3000).unwrap_err().error, PROTECTION | code::RESERVED | WRITE);
}

#[test]
fn fetches_are_told_apart_where_they_can_be_forbidden() {
    let mut walker = Walker::new();
    walker.set(ENTRIES[3], 0, PRESENT);
    // NXE, PAE, SMEP.
    for (nxe, pae, smep, told) in [
        (true, true, false, true),
        (true, false, false, false),
        (false, true, false, false),
        (false, false, true, true),
    ] {
        walker.paging.efer = if nxe { efer::NXE } else { 0 };
        walker.paging.cr4 = if pae { cr4::PAE } else { 0 } | if smep { cr4::SMEP } else { 0 };
        // 32-bit and PAE paging find nothing at all there.
        walker.paging.cr3 = 0x3_0000;
        assert_eq!(walker.error(Access::Execute), if told { code::FETCH } else { 0 }, "{nxe} {pae} {smep}");
    }
}
