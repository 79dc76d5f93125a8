//! Memory regions: read-only ones, and those that come and go while the guest runs.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{dword_ptr, eax, ptr, qword_ptr, rax, rbx};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_cpu::vmm_memory::{Backing, GuestRam, GuestRegion, PAGE_SIZE, RegionConfig};
use vmm_cpu::{Error, GuestAccess, Halt, MappedRegion};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;
use crate::suite::recorder::Access;

cases![
    write_to_a_read_only_region_goes_to_the_vmm,
    region_without_write_permission_is_mapped_read_only,
    region_comes_and_goes_while_the_guest_runs,
    mapped_region_is_revoked_by_dropping_it,
    two_regions_side_by_side,
    overlapping_regions_are_refused,
    region_that_is_no_whole_pages_is_refused,
    unmapping_what_is_not_mapped,
    region_outlives_the_ram_it_came_from,
    memory_that_the_host_has_lost_is_named,
];

/// Where regions come and go.
const PLUG: u64 = 0x4000_0000;

fn region(gpa: u64, size: u64) -> Outcome<Arc<GuestRegion>> {
    let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(gpa), size)).build()?;
    ram.regions().first().cloned().ok_or_else(|| Stop::failed("RAM without its region"))
}

fn write_to_a_read_only_region_goes_to_the_vmm(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, PLUG)?;
    p.mov(rax, qword_ptr(rbx + 8))?;
    p.mov(dword_ptr(rbx + 8), 0x55aa)?;
    p.add(dword_ptr(rbx + 0x10), 1)?;
    p.mov(rbx, qword_ptr(rbx + 8))?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let region = region(PLUG, PAGE_SIZE)?;
    region.write_obj(0x1122_3344_5566_7788_u64, MemoryRegionAddress(8))?;
    machine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadOnly)?;
    machine.run_to_end()?;
    let expected = [
        Access::Store { gpa: PLUG + 8, data: vec![0xaa, 0x55, 0, 0] },
        Access::Store { gpa: PLUG + 0x10, data: vec![1, 0, 0, 0] },
    ];
    assert_eq!(machine.bus.log, expected);
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rax, registers.rbx), (0x1122_3344_5566_7788, 0x1122_3344_5566_7788));
    assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(0x10))?, 0);
    Ok(())
}

fn region_without_write_permission_is_mapped_read_only(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, PLUG)?;
    p.mov(dword_ptr(rbx), 1)?;
    p.mov(eax, dword_ptr(rbx))?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let rom = GuestRam::builder()
        .region(RegionConfig::new(GuestAddress(PLUG), PAGE_SIZE).read_only(true))
        .build()?;
    machine.vm.map_ram(&rom)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, [Access::Store { gpa: PLUG, data: vec![1, 0, 0, 0] }]);
    assert_eq!(machine.vcpu.registers()?.rax, 0);
    Ok(())
}

/// A guest in a loop copies the word at [`PLUG`] to the data area, while the region there comes and goes.
fn region_comes_and_goes_while_the_guest_runs(backend: &Backend) -> Outcome {
    const ROUNDS: u64 = 100;
    const POISON: u64 = u64::MAX;
    let mut p = Program::new()?;
    p.mov(rbx, PLUG)?;
    let again = p.here()?;
    p.mov(rax, qword_ptr(rbx))?;
    p.mov(ptr(layout::DATA), rax)?;
    p.cmp(dword_ptr(layout::DATA + 8), 0)?;
    p.je(again)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let loads = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&loads);
    machine.bus.hook = Some(Box::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    machine.bus.mmio = |_| 0x77;
    let (vm, ram) = (Arc::clone(&machine.vm), machine.ram.clone());
    let seen = move || ram.memory().read_obj::<u64>(GuestAddress(layout::DATA));
    let plugger = thread::spawn(move || -> Outcome {
        let region = region(PLUG, 4 * PAGE_SIZE)?;
        for round in 1..=ROUNDS {
            region.write_obj(round, MemoryRegionAddress(0))?;
            vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite)?;
            until(|| Ok(seen()? == round), || format!("round {round}: the guest never sees the region"))?;
            let back = vm.unmap_memory(GuestAddress(PLUG))?;
            assert!(Arc::ptr_eq(&back, &region));
            // Nobody may see this any more.
            region.write_obj(POISON, MemoryRegionAddress(0))?;
            let before = loads.load(Ordering::SeqCst);
            until(
                || {
                    assert_ne!(seen()?, POISON, "round {round}: the region was reached after its removal");
                    Ok(loads.load(Ordering::SeqCst) > before + 1)
                },
                || format!("round {round}: no load reaches the VMM"),
            )?;
        }
        Ok(())
    });
    // The guest ends when the other thread is done, whatever came of it.
    let memory = machine.ram.clone();
    let ender = thread::spawn(move || {
        let outcome = plugger.join();
        memory.memory().write_obj(1_u64, GuestAddress(layout::DATA + 8)).expect("the data area is memory");
        outcome
    });
    machine.run_until(&Halt::Interrupted)?;
    ender.join().expect("the ending thread ends").unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Waits for a condition, for ten seconds at most.
fn until(condition: impl Fn() -> Outcome<bool>, what: impl Fn() -> String) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition()? {
        if Instant::now() > deadline {
            return Err(Stop::failed(what()));
        }
        thread::yield_now();
    }
    Ok(())
}

fn mapped_region_is_revoked_by_dropping_it(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, PLUG)?;
    p.mov(rax, qword_ptr(rbx))?;
    p.checkpoint()?;
    p.mov(rax, qword_ptr(rbx))?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let region = region(PLUG, PAGE_SIZE)?;
    let mapped = MappedRegion::new(Arc::clone(&machine.vm), Arc::clone(&region), GuestAccess::ReadWrite)?;
    assert_eq!(mapped.gpa(), GuestAddress(PLUG));
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, []);
    drop(mapped);
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, [Access::Load { gpa: PLUG, bytes: 8 }]);
    let mapped = MappedRegion::new(Arc::clone(&machine.vm), Arc::clone(&region), GuestAccess::ReadWrite)?;
    assert!(Arc::ptr_eq(&mapped.revoke()?, &region));
    assert!(matches!(machine.vm.unmap_memory(GuestAddress(PLUG)), Err(Error::NoSuchRegion { .. })));
    Ok(())
}

fn two_regions_side_by_side(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, PLUG + PAGE_SIZE - 4)?;
    p.mov(rax, 0x1122_3344_5566_7788_u64)?;
    p.mov(qword_ptr(rbx), rax)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let (first, second) = (region(PLUG, PAGE_SIZE)?, region(PLUG + PAGE_SIZE, PAGE_SIZE)?);
    machine.vm.map_memory(Arc::clone(&second), GuestAccess::ReadWrite)?;
    machine.vm.map_memory(Arc::clone(&first), GuestAccess::ReadWrite)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, []);
    assert_eq!(first.read_obj::<u32>(MemoryRegionAddress(PAGE_SIZE - 4))?, 0x5566_7788);
    assert_eq!(second.read_obj::<u32>(MemoryRegionAddress(0))?, 0x1122_3344);
    Ok(())
}

fn idle(backend: &Backend) -> Outcome<Machine> {
    let mut p = Program::new()?;
    p.end()?;
    Machine::new(backend, &p.assemble()?)
}

fn overlapping_regions_are_refused(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    let there = region(PLUG, 4 * PAGE_SIZE)?;
    machine.vm.map_memory(Arc::clone(&there), GuestAccess::ReadWrite)?;
    let cases =
        [(0, 4), (0, 1), (3, 1), (3, 4), (1, 2)].map(|(offset, pages)| (PLUG + offset * PAGE_SIZE, pages));
    for (gpa, pages) in cases.into_iter().chain([(PLUG - PAGE_SIZE, 2), (PLUG - PAGE_SIZE, 8)]) {
        let error = machine.vm.map_memory(region(gpa, pages * PAGE_SIZE)?, GuestAccess::ReadOnly);
        let Err(Error::RegionOverlap { gpa: refused, len, other_gpa, other_len }) = error else {
            return Err(Stop::failed(format!("{gpa:#x}, {pages} pages: {error:?}")));
        };
        assert_eq!((refused.0, len), (gpa, pages * PAGE_SIZE));
        assert_eq!((other_gpa, other_len), (there.start_addr(), there.len()));
    }
    // What was refused left nothing behind.
    machine.vm.map_memory(region(PLUG - PAGE_SIZE, PAGE_SIZE)?, GuestAccess::ReadWrite)?;
    machine.vm.map_memory(region(PLUG + 4 * PAGE_SIZE, PAGE_SIZE)?, GuestAccess::ReadWrite)?;
    machine.run_to_end()
}

fn region_that_is_no_whole_pages_is_refused(backend: &Backend) -> Outcome {
    use vmm_cpu::vmm_memory::vm_memory::mmap::MmapRegionBuilder;
    let machine = idle(backend)?;
    for (gpa, size) in [(PLUG, 0x800), (PLUG + 0x800, 0x1000)] {
        let mapping = MmapRegionBuilder::new_with_bitmap(size, None).build()?;
        let region = GuestRegion::new(mapping, GuestAddress(gpa)).ok_or_else(|| Stop::failed("a region"))?;
        let error = machine.vm.map_memory(Arc::new(region), GuestAccess::ReadWrite);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{gpa:#x}+{size:#x}: {error:?}");
    }
    Ok(())
}

fn unmapping_what_is_not_mapped(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    for gpa in [PLUG, PAGE_SIZE, u64::MAX].map(GuestAddress) {
        let error = machine.vm.unmap_memory(gpa);
        assert!(matches!(error, Err(Error::NoSuchRegion { gpa: g }) if g == gpa), "{error:?}");
    }
    machine.run_to_end()
}

fn region_outlives_the_ram_it_came_from(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    // The virtual machine holds the mapping.
    machine.ram = GuestRam::builder().build()?;
    machine.run_to_end()
}

/// A file that nobody else finds.
fn unnamed_file() -> Outcome<File> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lost-memory-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// Behind the region is a file that became shorter. Backends that access memory in this process end it then, by SIGBUS.
fn memory_that_the_host_has_lost_is_named(backend: &Backend) -> Outcome {
    if backend.hypervisor.name() != "kvm" {
        return Err(Stop::skipped("the guest's accesses are this process's"));
    }
    let mut p = Program::new()?;
    p.mov(rbx, PLUG + PAGE_SIZE)?;
    p.mov(rax, qword_ptr(rbx))?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let file = Arc::new(unnamed_file()?);
    file.set_len(2 * PAGE_SIZE)?;
    let backing = Backing::File { file: Arc::clone(&file), offset: 0 };
    let config = RegionConfig::new(GuestAddress(PLUG), 2 * PAGE_SIZE).backing(backing);
    machine.vm.map_memory(machine.ram.add_region(config)?, GuestAccess::ReadWrite)?;
    // At privilege level 0, KVM without virtualization hardware executes the load itself and takes it for MMIO.
    machine.enter_ring_3()?;
    file.set_len(0)?;
    match machine.vcpu.run(&mut machine.bus) {
        Err(Error::NoHostMemory { index: 0, gpa, .. }) => {
            assert_eq!(gpa.0 & !(PAGE_SIZE - 1), PLUG + PAGE_SIZE)
        }
        // Kernels that do not tell where.
        Err(Error::Host { operation: "KVM_RUN", source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(libc::EFAULT))
        }
        other => panic!("{other:?}"),
    }
    // With its memory back the guest goes on.
    file.set_len(2 * PAGE_SIZE)?;
    machine.run_to_end()
}
