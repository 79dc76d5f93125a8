//! Guest memory of the host's huge pages is memory like any other.

use std::sync::Arc;

use iced_x86::code_asm::{qword_ptr, rbx, rcx};
use vmm_cpu::GuestAccess;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_cpu::vmm_memory::{
    Backing, GuestRegion, HugePageSize, PAGE_SIZE, PageBitmap, RegionConfig, ReservedHugePages,
    host_page_size,
};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::Machine;
use crate::suite::program::{Image, Program};

cases![guests_read_and_write_it, dirty_pages_stay_small, discarded_pages_read_as_zero, pages_of_one_gibibyte,];

const HUGE: HugePageSize = HugePageSize::TwoMib;
const SIZE: u64 = 4 << 20;

/// Huge pages for a case. Without the right to have some, or room, it is skipped.
fn reserve(page_size: HugePageSize, pages: u64) -> Outcome<ReservedHugePages> {
    ReservedHugePages::reserve(page_size, pages).map_err(|error| Stop::skipped(error.to_string()))
}

fn backings() -> [Backing; 2] {
    [Backing::HugeTlb { page_size: HUGE }, Backing::HugeTlbMemfd { page_size: HUGE }]
}

/// A machine with a region of huge pages at `gpa`.
fn machine(
    backend: &Backend,
    image: &Image,
    gpa: u64,
    size: u64,
    backing: Backing,
) -> Outcome<(Machine, Arc<GuestRegion>)> {
    let machine = Machine::new(backend, image)?;
    let region = machine.ram.add_region(RegionConfig::new(GuestAddress(gpa), size).backing(backing))?;
    machine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite)?;
    Ok((machine, region))
}

const LOW: u64 = 16 << 20;

/// Adds its number, from the last to the first, to a word of each of `pages` pages from `gpa` on.
fn numbering(gpa: u64, pages: u64, step: u64) -> Outcome<Image> {
    let mut p = Program::new()?;
    for _ in 0..2 {
        p.mov(rbx, gpa)?;
        p.mov(rcx, pages)?;
        let again = p.here()?;
        p.add(qword_ptr(rbx), rcx)?;
        p.add(rbx, i32::try_from(step)?)?;
        p.dec(rcx)?;
        p.jnz(again)?;
        p.checkpoint()?;
    }
    p.assemble()
}

fn guests_read_and_write_it(backend: &Backend) -> Outcome {
    let _pages = reserve(HUGE, 2)?;
    let pages = SIZE / PAGE_SIZE;
    for backing in backings() {
        for ring_3 in [false, true] {
            let image = numbering(LOW, pages, PAGE_SIZE)?;
            let (mut machine, region) = machine(backend, &image, LOW, SIZE, backing.clone())?;
            assert_eq!(host_page_size(&region), HUGE.bytes());
            if ring_3 {
                machine.enter_ring_3()?;
            }
            for times in [1, 2] {
                machine.run_to_end()?;
                for page in 0..pages {
                    let word: u64 = region.read_obj(MemoryRegionAddress(page * PAGE_SIZE))?;
                    assert_eq!(word, times * (pages - page), "page {page} of {backing:?}, ring 3: {ring_3}");
                }
            }
        }
    }
    Ok(())
}

fn dirty_pages_stay_small(backend: &Backend) -> Outcome {
    let _pages = reserve(HUGE, 2)?;
    for backing in backings() {
        // Every third page.
        let image = numbering(LOW, 300, 3 * PAGE_SIZE)?;
        let (mut machine, region) = machine(backend, &image, LOW, SIZE, backing)?;
        let log = machine.vm.dirty_log().ok_or_else(|| Stop::skipped("no dirty log"))?;
        log.start(GuestAddress(LOW))?;
        for _ in 0..2 {
            machine.run_to_end()?;
            let mut dirty = PageBitmap::for_region(&region);
            log.harvest(&region, &mut dirty).map_err(|error| Stop::failed(error.to_string()))?;
            let expected: Vec<_> = (0..300).map(|page| 3 * page..3 * page + 1).collect();
            assert!(dirty.ranges().eq(expected), "{} pages", dirty.count());
        }
    }
    Ok(())
}

fn discarded_pages_read_as_zero(backend: &Backend) -> Outcome {
    let _pages = reserve(HUGE, 2)?;
    let pages = SIZE / PAGE_SIZE;
    for backing in backings() {
        let image = numbering(LOW, pages, PAGE_SIZE)?;
        let (mut machine, region) = machine(backend, &image, LOW, SIZE, backing.clone())?;
        machine.run_to_end()?;
        // The whole second page of the host's, and two of the guest's before it.
        let first = pages / 2 - 2;
        machine.ram.discard(GuestAddress(LOW + first * PAGE_SIZE), SIZE - first * PAGE_SIZE)?;
        machine.run_to_end()?;
        for page in 0..pages {
            let times = if page < first { 2 } else { 1 };
            let word: u64 = region.read_obj(MemoryRegionAddress(page * PAGE_SIZE))?;
            assert_eq!(word, times * (pages - page), "page {page} of {backing:?}");
        }
    }
    Ok(())
}

fn pages_of_one_gibibyte(backend: &Backend) -> Outcome {
    const PAGE: HugePageSize = HugePageSize::OneGib;
    let _page = reserve(PAGE, 1)?;
    let gpa = PAGE.bytes();
    let image = numbering(gpa, 100, 8 << 20)?;
    let (mut machine, region) =
        machine(backend, &image, gpa, PAGE.bytes(), Backing::HugeTlb { page_size: PAGE })?;
    machine.run_to_end()?;
    for at in 0..100 {
        assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(at * (8 << 20)))?, 100 - at);
    }
    Ok(())
}
