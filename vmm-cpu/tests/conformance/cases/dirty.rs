//! The dirty log, as it is and merged with what devices wrote.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use iced_x86::code_asm::{dword_ptr, ecx, ptr, qword_ptr, rax, rbx, rcx};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{DirtyPages, DirtyTracker, GuestRegion, PAGE_SIZE, PageBitmap, RegionConfig};
use vmm_cpu::{Error, GuestAccess, GuestDirtyLog};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, copy_ram, guest_ram, layout};
use crate::suite::program::{Image, Program};

cases![
    pages_written_since_the_last_harvest,
    merged_with_the_writes_of_devices,
    nothing_before_start_and_after_stop,
    no_write_is_lost_while_harvesting,
    region_that_is_not_mapped,
    more_pages_than_a_ring_holds,
    all_backends_find_the_same_pages,
    a_ring_that_is_full_again_and_again_loses_nothing,
];

/// Where a region of many pages is.
const LARGE: u64 = 16 << 20;
const LARGE_PAGES: u64 = 4096;

fn page(index: u64) -> u64 {
    layout::DATA + index * PAGE_SIZE
}

/// The guest writes pages 0, 3, and with one store 5 and 6; then, run again, page 9.
fn writing_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(dword_ptr(page(0)), 1)?;
    p.mov(dword_ptr(page(3) + 0xffc), 1)?;
    p.mov(rbx, page(6) - 4)?;
    p.mov(qword_ptr(rbx), -1)?;
    p.mov(rax, ptr(page(1)))?;
    p.checkpoint()?;
    p.mov(dword_ptr(page(9)), 1)?;
    p.end()?;
    p.assemble()
}

fn logged(backend: &Backend, image: &Image) -> Outcome<(Machine, Arc<dyn GuestDirtyLog>, DirtyTracker)> {
    let machine = Machine::new(backend, image)?;
    let log = machine.vm.dirty_log().ok_or_else(|| Stop::skipped("no dirty log"))?;
    let tracker = DirtyTracker::new(&machine.ram);
    tracker.add_log(log.clone());
    log.start(GuestAddress(0))?;
    // What the machine's setup wrote.
    tracker.harvest()?;
    Ok((machine, log, tracker))
}

/// Which of the first 16 pages of the data area are reported.
fn reported(pages: &DirtyPages) -> Vec<u64> {
    (0..16).filter(|index| pages.contains(GuestAddress(page(*index)))).collect()
}

/// What the log alone says: the pages among those 16, and how many there are in all of RAM.
fn logged_pages(log: &dyn GuestDirtyLog, machine: &Machine) -> Outcome<(Vec<u64>, u64)> {
    let region =
        machine.ram.regions().into_iter().next().ok_or_else(|| Stop::failed("RAM without a region"))?;
    let mut pages = PageBitmap::for_region(&region);
    log.harvest(&region, &mut pages).map_err(|error| Stop::failed(error.to_string()))?;
    let of_data = (0..16).filter(|index| pages.contains(page(*index) / PAGE_SIZE)).collect();
    Ok((of_data, pages.count()))
}

fn pages_written_since_the_last_harvest(backend: &Backend) -> Outcome {
    let (mut machine, log, _) = logged(backend, &writing_guest()?)?;
    machine.run_to_end()?;
    let (of_data, all) = logged_pages(&*log, &machine)?;
    assert_eq!(of_data, [0, 3, 5, 6]);
    assert!(all < 32, "of {all} pages most were not written");
    assert_eq!(logged_pages(&*log, &machine)?, (vec![], 0));
    machine.run_to_end()?;
    assert_eq!(logged_pages(&*log, &machine)?.0, [9]);
    Ok(())
}

fn merged_with_the_writes_of_devices(backend: &Backend) -> Outcome {
    let (mut machine, _log, tracker) = logged(backend, &writing_guest()?)?;
    machine.run_to_end()?;
    machine.write(page(3), &[1])?;
    machine.write(page(11) - 1, &[1, 1])?;
    assert_eq!(reported(&tracker.harvest()?), [0, 3, 5, 6, 10, 11]);
    Ok(())
}

fn nothing_before_start_and_after_stop(backend: &Backend) -> Outcome {
    let (mut machine, log, _) = logged(backend, &writing_guest()?)?;
    log.stop(GuestAddress(0))?;
    machine.run_to_end()?;
    assert_eq!(logged_pages(&*log, &machine)?, (vec![], 0));
    log.start(GuestAddress(0))?;
    assert_eq!(logged_pages(&*log, &machine)?, (vec![], 0), "a log begins empty");
    machine.run_to_end()?;
    assert_eq!(logged_pages(&*log, &machine)?.0, [9]);
    Ok(())
}

/// A copy that follows the log while the guest writes is the same in the end.
fn no_write_is_lost_while_harvesting(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(ecx, 3000)?;
    let again = p.here()?;
    p.mov(rbx, rcx)?;
    // One of 16 pages, and a place in it.
    p.and(rbx, 0xf)?;
    p.imul_3(rbx, rbx, 0x1008)?;
    p.add(rbx, i32::try_from(layout::DATA)?)?;
    p.add(qword_ptr(rbx), 1)?;
    p.mov(qword_ptr(rbx + 8), rcx)?;
    p.dec(ecx)?;
    p.jnz(again)?;
    p.end()?;
    let (mut machine, _log, tracker) = logged(backend, &p.assemble()?)?;
    let (source, copy) = (machine.ram.clone(), guest_ram()?);
    copy_ram(&source, &copy)?;
    let done = Arc::new(AtomicBool::new(false));
    let follower = thread::spawn({
        let (done, copy) = (Arc::clone(&done), copy.clone());
        move || -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
            let mut copied = 0;
            loop {
                let last = done.load(Ordering::SeqCst);
                for (gpa, length) in tracker.harvest()?.ranges() {
                    let mut bytes = vec![0; usize::try_from(length)?];
                    source.memory().read_slice(&mut bytes, gpa)?;
                    copy.memory().write_slice(&bytes, gpa)?;
                    copied += length / PAGE_SIZE;
                }
                if last {
                    return Ok(copied);
                }
            }
        }
    });
    machine.run_to_end()?;
    done.store(true, Ordering::SeqCst);
    let copied =
        follower.join().expect("the following thread ends").map_err(|e| Stop::failed(e.to_string()))?;
    assert!(copied >= 16, "{copied}");
    let copied_bytes = |index: u64| -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        copy.memory().read_slice(&mut bytes, GuestAddress(page(index)))?;
        Ok(bytes)
    };
    for index in 0..17 {
        assert!(
            copied_bytes(index)? == machine.bytes(page(index), PAGE_SIZE as usize)?,
            "page {index} of the data"
        );
    }
    Ok(())
}

fn region_that_is_not_mapped(backend: &Backend) -> Outcome {
    let (machine, log, tracker) = logged(backend, &writing_guest()?)?;
    for gpa in [GuestAddress(PAGE_SIZE), GuestAddress(layout::MMIO)] {
        assert!(matches!(log.start(gpa), Err(Error::NoSuchRegion { gpa: g }) if g == gpa));
        assert!(matches!(log.stop(gpa), Err(Error::NoSuchRegion { gpa: g }) if g == gpa));
    }
    machine.vm.unmap_memory(GuestAddress(0))?;
    assert!(tracker.harvest()?.is_empty(), "a region that went has nothing to report");
    Ok(())
}

/// Adds a region of many pages; what its log says is asked for by itself.
fn add_large_region(machine: &Machine) -> Outcome<Arc<GuestRegion>> {
    let config = RegionConfig::new(GuestAddress(LARGE), LARGE_PAGES * PAGE_SIZE);
    let region = machine.ram.add_region(config)?;
    machine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite)?;
    Ok(region)
}

fn harvested(log: &dyn GuestDirtyLog, region: &GuestRegion) -> Outcome<PageBitmap> {
    let mut pages = PageBitmap::for_region(region);
    log.harvest(region, &mut pages).map_err(|error| Stop::failed(error.to_string()))?;
    Ok(pages)
}

/// Writes every `step`th page from page `first` on, to the end.
fn sweep(p: &mut Program, first: u64, step: u64) -> Outcome {
    p.mov(rbx, LARGE + first * PAGE_SIZE)?;
    p.mov(rcx, (LARGE_PAGES - first).div_ceil(step))?;
    let again = p.here()?;
    p.add(qword_ptr(rbx), 1)?;
    p.add(rbx, i32::try_from(step * PAGE_SIZE)?)?;
    p.dec(rcx)?;
    p.jnz(again)?;
    Ok(())
}

/// At privilege level 0 and at 3: what runs a guest may do it in different ways.
fn more_pages_than_a_ring_holds(backend: &Backend) -> Outcome {
    for ring_3 in [false, true] {
        let mut p = Program::new()?;
        for (first, step) in [(0, 1), (0, 1), (1, 2)] {
            sweep(&mut p, first, step)?;
            p.checkpoint()?;
        }
        let (mut machine, log, _) = logged(backend, &p.assemble()?)?;
        let region = add_large_region(&machine)?;
        log.start(GuestAddress(LARGE))?;
        if ring_3 {
            machine.enter_ring_3()?;
        }
        for expected in [LARGE_PAGES, LARGE_PAGES, LARGE_PAGES / 2] {
            machine.run_to_end()?;
            let pages = harvested(&*log, &region)?;
            assert_eq!(pages.count(), expected, "ring 3: {ring_3}");
            assert!(pages.contains(1) && pages.contains(LARGE_PAGES - 1));
            assert_eq!(harvested(&*log, &region)?.count(), 0);
        }
        assert_eq!(machine.word(LARGE + PAGE_SIZE)?, 3);
    }
    Ok(())
}

/// The pages that a guest writes that jumps about, harvest by harvest.
fn random_pages(backend: &Backend) -> Outcome<Vec<PageBitmap>> {
    let mut p = Program::new()?;
    p.mov(rax, 1_u64)?;
    for _ in 0..3 {
        p.mov(ecx, 1500)?;
        let again = p.here()?;
        p.imul_3(rax, rax, 0x0019_660d)?;
        p.add(rax, 0x3c6e_f35f)?;
        p.mov(rbx, rax)?;
        p.and(rbx, i32::try_from((LARGE_PAGES - 1) * PAGE_SIZE)?)?;
        p.add(rbx, i32::try_from(LARGE)?)?;
        p.mov(qword_ptr(rbx + 8), rcx)?;
        p.dec(ecx)?;
        p.jnz(again)?;
        p.checkpoint()?;
    }
    let (mut machine, log, _) = logged(backend, &p.assemble()?)?;
    let region = add_large_region(&machine)?;
    log.start(GuestAddress(LARGE))?;
    (0..3)
        .map(|_| {
            machine.run_to_end()?;
            harvested(&*log, &region)
        })
        .collect()
}

fn all_backends_find_the_same_pages(backend: &Backend) -> Outcome {
    let own = random_pages(backend)?;
    assert!(own.iter().all(|pages| (1000..1500).contains(&pages.count())), "{own:?}");
    for other in backend.others() {
        match random_pages(&other) {
            Err(Stop::Skipped(_)) => {}
            pages => assert!(pages? == own, "{other:?} and {backend:?}"),
        }
    }
    Ok(())
}

/// Without virtualization hardware, the kernel may write over a ring that is full. That is an error then, and all pages count.
fn a_ring_that_is_full_again_and_again_loses_nothing(backend: &Backend) -> Outcome {
    let small = backend.with_small_rings().ok_or_else(|| Stop::skipped("no dirty rings"))??;
    for ring_3 in [false, true] {
        let mut p = Program::new()?;
        for (first, step) in [(0, 1), (1, 2), (0, 1)] {
            sweep(&mut p, first, step)?;
            p.checkpoint()?;
        }
        let (mut machine, log, _) = logged(&small, &p.assemble()?)?;
        let region = add_large_region(&machine)?;
        log.start(GuestAddress(LARGE))?;
        if ring_3 {
            machine.enter_ring_3()?;
        }
        for expected in [LARGE_PAGES, LARGE_PAGES / 2, LARGE_PAGES] {
            let ran = machine.run_to_end();
            let mut pages = PageBitmap::for_region(&region);
            let harvested = log.harvest(&region, &mut pages);
            match (ran, harvested) {
                (Ok(()), Ok(())) => assert_eq!(pages.count(), expected, "ring 3: {ring_3}"),
                (ran, Err(error)) if small.is_kvm_without_hardware() => {
                    println!(
                        "ring 3: {ring_3}: {error}; the run: {}",
                        if ran.is_ok() { "ok" } else { "the same" }
                    );
                    assert!(error.to_string().contains("overrun"), "{error}");
                    assert_eq!(pages.count(), LARGE_PAGES, "all pages count");
                    log.harvest(&region, &mut pages).expect_err("it stays so");
                    break;
                }
                (Err(error), _) => return Err(error),
                (_, Err(error)) => return Err(Stop::failed(error.to_string())),
            }
        }
        let full =
            machine.vcpu.exit_counts().iter().find(|(name, _)| *name == "dirty-ring-full").map(|at| at.1);
        println!("ring 3: {ring_3}: {full:?} times full");
    }
    Ok(())
}
