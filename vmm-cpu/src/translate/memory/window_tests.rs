#![allow(unsafe_code, reason = "what the host lets a pointer do is tried")]

use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, GuestRegion, RegionConfig};

use super::*;
use crate::translate::segment::low8;

fn pointer(address: u64) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap())
}

/// Shared memory of so many pages, the first byte of each its number.
fn memory(pages: u64) -> (GuestRam, Arc<GuestRegion>) {
    let config = RegionConfig::new(GuestAddress(0), pages * PAGE).backing(Backing::Memfd);
    let ram = GuestRam::builder().region(config).build().unwrap();
    let region = ram.regions().remove(0);
    for page in 0..pages {
        // SAFETY: the region has that byte.
        unsafe { host(&region, page).write(low8(page)) };
    }
    (ram, region)
}

fn host(region: &GuestRegion, page: u64) -> *mut u8 {
    region.get_host_address(MemoryRegionAddress(page * PAGE)).unwrap()
}

struct Rig {
    window: Window,
    regions: Box<[u64; REGIONS]>,
    region: Arc<GuestRegion>,
    _ram: GuestRam,
}

impl Rig {
    fn new(pages: u64, limit: usize, exact: bool) -> Self {
        let mut regions: Box<[u64; REGIONS]> = vec![0; REGIONS].try_into().unwrap();
        let window = Window::new(limit, exact, &mut regions).unwrap();
        let (ram, region) = memory(pages);
        Self { window, regions, region, _ram: ram }
    }

    fn activate(&mut self, root: u64) {
        self.window.activate(root, &mut self.regions, |_, _| panic!("nothing is mapped"));
    }

    fn map(&mut self, va: u64, page: u64, writable: bool) {
        let host = host(&self.region, page).expose_provenance() as u64;
        self.window.map(va, page * PAGE, host, writable, PAGE, &mut self.regions).unwrap();
    }

    /// As translated code computes it.
    fn place(&self, va: u64) -> u64 {
        va.wrapping_add(self.regions[(va >> 32) as usize & 0xffff])
    }

    /// What is at `va`, if anything can be read.
    fn read(&self, va: u64) -> Option<u8> {
        let (mut reader, writer) = std::io::pipe().unwrap();
        // SAFETY: the kernel says whether it can read there.
        let done = unsafe { libc::write(writer.as_raw_fd(), pointer(self.place(va)), 1) };
        let mut byte = [0];
        (done == 1).then(|| std::io::Read::read_exact(&mut reader, &mut byte).map(|()| byte[0]).unwrap())
    }

    /// Stores a zero at `va`; whether that is allowed.
    fn write(&self, va: u64) -> bool {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the kernel says whether it can write there; what may be there is guest memory.
        unsafe { libc::read(zero.as_raw_fd(), pointer(self.place(va)), 1) == 1 }
    }
}

#[test]
fn no_address_leads_elsewhere_than_into_the_window() {
    let mut rig = Rig::new(1, 16, false);
    rig.activate(0x1000);
    for region in [0, 1, 0x55d0, 0x7fff] {
        rig.map(region << 32 | 0x7000, 0, true);
    }
    let start = rig.window.reserve.address();
    let window = start..start + u64::from(SLOTS) * STRIDE;
    let addresses = (0..REGIONS as u64).flat_map(|region| {
        [0, 0xffff_ffff, 0x1234_5678].into_iter().flat_map(move |low| {
            [0, 1, 0x4000, 0x7fff, 0x8000, 0xc000, 0xffff].map(|high| high << 48 | region << 32 | low)
        })
    });
    for va in addresses {
        let sum = rig.place(va);
        let last = sum.wrapping_add(15 + NEAR as u64);
        let sum = sum.wrapping_sub(NEAR as u64);
        let is_user = |address: u64| address < END;
        assert!(
            window.contains(&sum) && window.contains(&last) || !is_user(sum) && !is_user(last),
            "{va:#x} leads to {sum:#x}"
        );
    }
}

#[test]
fn pages_are_what_they_were_made() {
    let mut rig = Rig::new(4, 16, false);
    rig.activate(0x1000);
    let (low, high) = (0x40_0000, 0x7ffd_1234_5000);
    assert_eq!(rig.read(low), None);
    rig.map(low, 1, false);
    rig.map(high, 2, true);
    assert_eq!((rig.read(low), rig.read(high + 1)), (Some(1), Some(0)));
    assert_eq!(rig.read(low + PAGE), None);
    assert!(!rig.write(low) && rig.write(high));
    // SAFETY: the region has that byte.
    assert_eq!(unsafe { host(&rig.region, 2).read() }, 0, "the store has reached the guest's memory");

    rig.map(low, 1, true);
    assert!(rig.write(low));
    // Another page in its place.
    rig.map(low, 3, false);
    assert_eq!(rig.read(low), Some(3));
    assert!(!rig.write(low));
    rig.window.flush_page(low, &mut rig.regions);
    assert_eq!(rig.read(low), None);
    assert_eq!(rig.read(high), Some(0));
}

#[test]
fn stores_to_a_page_that_is_watched_fault_wherever_it_is() {
    let mut rig = Rig::new(2, 16, false);
    rig.activate(0x1000);
    rig.map(0x1000, 1, true);
    rig.activate(0x2000);
    rig.map(0x5000, 1, true);
    rig.map(0x6000, 1, true);
    rig.map(0x7000, 0, true);
    rig.window.protect(PAGE);
    assert!(!rig.write(0x5000) && !rig.write(0x6000) && rig.write(0x7000));
    rig.window.activate(0x1000, &mut rig.regions, |va, writable| {
        assert!(!writable, "{va:#x}");
        Some((PAGE, PAGE))
    });
    assert!(!rig.write(0x1000));
    assert_eq!(rig.read(0x1000), Some(1));
}

#[test]
fn an_address_space_comes_back_with_what_still_holds() {
    let mut rig = Rig::new(4, 16, false);
    rig.activate(0x1000);
    for page in 0..4 {
        rig.map(0x1_0000_0000 + page * PAGE, page, page == 3);
    }
    rig.window.suspend(&mut rig.regions);
    assert_eq!(rig.read(0x1_0000_0000), None);
    rig.activate(0x2000);
    assert_eq!(rig.read(0x1_0000_0000), None);
    // Page 1 has another translation, page 3 is clean again.
    rig.window.activate(0x1000, &mut rig.regions, |va, writable| match (va >> 12 & 3, writable) {
        (1, _) => Some((0, PAGE)),
        (3, true) => None,
        (page, _) => Some((page * PAGE, PAGE)),
    });
    let read: Vec<_> = (0..4).map(|page| rig.read(0x1_0000_0000 + page * PAGE)).collect();
    assert_eq!(read, [Some(0), None, Some(2), None]);
}

#[test]
fn what_it_has_is_bounded() {
    let mut rig = Rig::new(8, 6, false);
    // More address spaces than are kept, more regions than there are slots, more pages than may be mapped.
    for root in 1..=2 * SPACES as u64 {
        rig.activate(root << 12);
        for region in 0..u64::from(SLOTS) + 8 {
            rig.map(region << 32 | root << 12, region % 8, true);
            assert_eq!(rig.read(region << 32 | root << 12), Some(low8(region % 8)));
            assert!(rig.window.spaces.iter().map(|space| space.pages.len()).sum::<usize>() <= 6);
            assert!(rig.window.spaces.len() <= SPACES);
        }
    }
    rig.window.clear(&mut rig.regions);
    assert!(rig.window.places.is_empty() && rig.window.free.len() == SLOTS as usize - 1);
    assert_eq!(rig.read(0x8000), None);
}

#[test]
fn an_address_space_of_another_program_is_forgotten() {
    let mut rig = Rig::new(16, 32, false);
    rig.activate(0x1000);
    for page in 0..16 {
        rig.map(page * PAGE, page, true);
    }
    rig.window.suspend(&mut rig.regions);
    let same = |last: u64| move |va: u64, _| (va < last * PAGE).then_some((va, PAGE));
    assert!(rig.window.activate(0x1000, &mut rig.regions, same(10)));
    assert_eq!((rig.read(9 * PAGE), rig.read(10 * PAGE)), (Some(9), None));
    assert!(!rig.window.activate(0x1000, &mut rig.regions, same(4)));
    assert!(!rig.window.is_active() && rig.window.spaces.is_empty());
    assert_eq!(rig.read(0), None);
}

#[test]
fn faults_pages_and_changes_cost() {
    let mut rig = Rig::new(2, 16, false);
    rig.activate(0x1000);
    assert_eq!(rig.window.take_cost(), CHANGE);
    rig.window.note_fault();
    rig.map(0, 0, true);
    rig.map(0, 0, true);
    assert_eq!(rig.window.take_cost(), FAULT + MAPPING);
    rig.window.activate(0x1000, &mut rig.regions, |_, _| Some((0, PAGE)));
    assert_eq!(rig.window.take_cost(), CHANGE + CHECK);
}

#[test]
fn private_memory_is_refused() {
    let mut rig = Rig::new(1, 16, false);
    let private = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), PAGE)).build().unwrap();
    let region = private.regions().remove(0);
    // Pages that exist.
    // SAFETY: the region has that byte.
    unsafe { host(&region, 0).write(1) };
    rig.activate(0x1000);
    let address = host(&region, 0).expose_provenance() as u64;
    let error = rig.window.map(0x1000, 0, address, true, PAGE, &mut rig.regions).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(rig.read(0x1000), None);
}

#[test]
fn one_page_can_be_at_many_addresses() {
    let mut rig = Rig::new(1, 8192, false);
    rig.activate(0x1000);
    for n in 0..8192 {
        rig.map(0x1_0000_0000 + n * PAGE, 0, true);
    }
    rig.window.protect(0);
    assert!((0..8192).all(|n| !rig.write(0x1_0000_0000 + n * PAGE)));
    rig.window.activate(0x1000, &mut rig.regions, |_, _| None);
    assert!(rig.window.places.is_empty());
}

#[test]
fn pages_that_are_gone_leave_a_bounded_number_of_tables() {
    let mut rig = Rig::new(1, 16, false);
    rig.activate(0x1000);
    for n in 0..100 {
        let va = 0x1_0000_0000 + n * 8 * TABLE;
        rig.map(va, 0, true);
        assert_eq!(rig.read(va), Some(0));
        rig.window.forget_page(va);
        assert_eq!(rig.read(va), None);
        assert!(rig.window.tables.len() <= 16);
    }
}
