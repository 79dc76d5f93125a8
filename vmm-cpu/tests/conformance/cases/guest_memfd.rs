//! Memory in a guest_memfd, and memory that is private to the guest.

use std::sync::Arc;

use iced_x86::code_asm::{qword_ptr, rax, rbx};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_cpu::vmm_memory::{Backing, GuestMemfdRange, GuestRegion, PAGE_SIZE, RegionConfig};
use vmm_cpu::{Error, GuestAccess, GuestMemfdKind, GuestMemfds, Halt, Vm};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::Machine;
use crate::suite::program::{Image, Program};

cases![
    memory_that_the_host_maps_is_the_guests_and_the_devices,
    a_region_with_a_private_half_begins_shared,
    a_guest_gets_the_half_that_it_wants,
    impossible_files_and_regions_are_refused,
];

const GPA: u64 = 16 << 20;
const SIZE: u64 = 4 * PAGE_SIZE;

fn memfds(vm: &dyn Vm) -> Outcome<Arc<dyn GuestMemfds>> {
    vm.guest_memfds().ok_or_else(|| Stop::skipped("no guest_memfd"))
}

/// Adds 1 to a word of the region, and reads it.
fn image() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(rbx, GPA + PAGE_SIZE)?;
    for _ in 0..3 {
        p.add(qword_ptr(rbx), 1)?;
        p.mov(rax, qword_ptr(rbx))?;
        p.checkpoint()?;
    }
    p.assemble()
}

/// Adds the region to RAM, and maps it as `map_ram` does.
fn add(machine: &Machine, config: RegionConfig) -> Outcome<Arc<GuestRegion>> {
    let region = machine.ram.add_region(config)?;
    let range =
        machine.ram.guest_memfd(GuestAddress(GPA)).ok_or_else(|| Stop::failed("RAM forgot the file"))?;
    memfds(&*machine.vm)?.map(Arc::clone(&region), GuestAccess::ReadWrite, &range)?;
    Ok(region)
}

fn memory_that_the_host_maps_is_the_guests_and_the_devices(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &image()?)?;
    let memfd = match memfds(&*machine.vm)?.create(2 * SIZE, GuestMemfdKind::Mappable) {
        Err(Error::Unsupported { why, .. }) => return Err(Stop::skipped(why)),
        other => other?,
    };
    let range = GuestMemfdRange::new(memfd, SIZE);
    let region =
        add(&machine, RegionConfig::new(GuestAddress(GPA), SIZE).backing(Backing::GuestMemfd(range)))?;
    region.write_obj(40_u64, MemoryRegionAddress(PAGE_SIZE))?;
    machine.run_to_end()?;
    assert_eq!((machine.word(GPA + PAGE_SIZE)?, machine.vcpu.registers()?.rax), (41, 41));
    machine.ram.discard(GuestAddress(GPA), SIZE)?;
    machine.run_to_end()?;
    assert_eq!((machine.word(GPA + PAGE_SIZE)?, machine.vcpu.registers()?.rax), (1, 1));
    if let Some(log) = machine.vm.dirty_log() {
        let error = log.start(GuestAddress(GPA));
        assert!(matches!(error, Err(Error::Unsupported { .. })), "{error:?}");
    }
    machine.vm.unmap_memory(GuestAddress(GPA))?;
    Ok(())
}

/// A machine with a region of two halves.
fn halves(backend: &Backend) -> Outcome<(Machine, Arc<GuestRegion>)> {
    let machine = Machine::new(backend, &image()?)?;
    let memfds = memfds(&*machine.vm)?;
    if machine.vm.private_memory().is_none() {
        return Err(Stop::skipped("no private memory"));
    }
    let range = GuestMemfdRange::new(memfds.create(SIZE, GuestMemfdKind::Private)?, 0);
    let region = add(&machine, RegionConfig::new(GuestAddress(GPA), SIZE).guest_memfd(range))?;
    Ok((machine, region))
}

fn a_region_with_a_private_half_begins_shared(backend: &Backend) -> Outcome {
    let (mut machine, _) = halves(backend)?;
    machine.write(GPA + PAGE_SIZE, &40_u64.to_le_bytes())?;
    machine.run_to_end()?;
    assert_eq!((machine.word(GPA + PAGE_SIZE)?, machine.vcpu.registers()?.rax), (41, 41));
    Ok(())
}

fn a_guest_gets_the_half_that_it_wants(backend: &Backend) -> Outcome {
    let (mut machine, _) = halves(backend)?;
    let private = machine.vm.private_memory().ok_or_else(|| Stop::skipped("no private memory"))?;
    let page = GuestAddress(GPA + PAGE_SIZE);
    machine.write(page.0, &40_u64.to_le_bytes())?;
    machine.run_to_end()?;
    private.set_private(page, PAGE_SIZE)?;
    // A software-protected guest wants what the attributes say, so there is no fault.
    machine.run_to_end()?;
    assert_eq!(
        (machine.word(page.0)?, machine.vcpu.registers()?.rax),
        (41, 1),
        "the shared half stays as it was"
    );
    private.set_shared(page, PAGE_SIZE)?;
    let halt = machine.run()?;
    assert!(matches!(halt, Halt::Interrupted | Halt::MemoryFault(_)), "{halt:?}");
    for (gpa, len) in
        [(0, PAGE_SIZE), (GPA, SIZE + PAGE_SIZE), (GPA + 1, PAGE_SIZE), (GPA, 0), (u64::MAX - 0xfff, 0x2000)]
    {
        let error = private.set_private(GuestAddress(gpa), len);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{gpa:#x}+{len:#x}: {error:?}");
    }
    Ok(())
}

fn impossible_files_and_regions_are_refused(backend: &Backend) -> Outcome {
    let machine = Machine::new(backend, &image()?)?;
    let memfds = memfds(&*machine.vm)?;
    for size in [0, PAGE_SIZE + 1, 1 << 63, u64::MAX - 0xfff] {
        let error = memfds.create(size, GuestMemfdKind::Private);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{size:#x}: {error:?}");
    }
    let memfd = memfds.create(SIZE, GuestMemfdKind::Private)?;
    assert_eq!((memfd.size(), memfd.is_mappable()), (SIZE, false));
    let region = machine.ram.add_region(RegionConfig::new(GuestAddress(GPA), SIZE))?;
    for offset in [PAGE_SIZE, 1, u64::MAX - 0xfff] {
        let range = GuestMemfdRange::new(Arc::clone(&memfd), offset);
        let error = memfds.map(Arc::clone(&region), GuestAccess::ReadWrite, &range);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{offset:#x}: {error:?}");
    }
    let range = GuestMemfdRange::new(memfd, 0);
    let error = memfds.map(region, GuestAccess::ReadOnly, &range);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}
