//! BAR 2: where the guest sees the memory.

use super::*;

fn alone(access: Access) -> (Machine, Region) {
    let region = region("alone");
    let (map, _) = rights(&Gatekeeper::new(AllowAll), "alone", access);
    (Machine::ready(region.attach(map).unwrap()), region)
}

fn writer(region: &Region) -> Machine {
    let (map, _) = rights(&Gatekeeper::new(AllowAll), region.name(), Access::ReadWrite);
    Machine::ready(region.attach(map).unwrap())
}

fn move_to(machine: &Machine, base: u64) {
    machine.configure(0x18, &(base as u32).to_le_bytes());
    machine.configure(0x1c, &((base >> 32) as u32).to_le_bytes());
}

#[test]
fn it_is_where_the_bar_is() {
    let (machine, region) = alone(Access::ReadWrite);
    let home = machine.bar(2);
    assert_eq!(machine.guest.told.take(), [format!("map {home:#x} ReadWrite")]);
    let other = writer(&region);
    other.write(2, 0x10, &7_u64.to_le_bytes());
    assert_eq!(machine.guest.load(home + 0x10), Some(7));
    move_to(&machine, home + 0x10_0000);
    assert_eq!(
        machine.guest.told.take(),
        [format!("unmap {home:#x}"), format!("map {:#x} ReadWrite", home + 0x10_0000)]
    );
    assert_eq!((machine.guest.load(home + 0x10), machine.guest.load(home + 0x10_0010)), (None, Some(7)));
    machine.configure(COMMAND, &[0, 0]);
    assert_eq!(machine.guest.told.take(), [format!("unmap {:#x}", home + 0x10_0000)]);
    machine.configure(COMMAND, &DECODE.to_le_bytes());
    assert_eq!(machine.guest.told.take().len(), 1);
    machine.bridge.remove(crate::pci::FunctionAddress::new(1, 0).unwrap()).unwrap();
    assert_eq!(machine.guest.told.take(), [format!("unmap {:#x}", home + 0x10_0000)], "unplugged");
}

#[test]
fn a_guest_that_moves_it_all_the_time_sees_it_in_one_place() {
    let (machine, _) = alone(Access::ReadWrite);
    let home = machine.bar(2);
    for n in 0..2000 {
        move_to(&machine, home + (n * 0x1235 % 0x100) * SIZE);
        assert!(lock(&machine.guest.sees).len() <= 1);
    }
    assert_eq!(machine.figures().map_failures, 0);
    let mapped = lock(&machine.guest.sees).first().map(|(region, _)| region.start_addr().0);
    assert_eq!(mapped, Some(machine.bar(2)));
}

#[test]
fn by_the_bus_it_is_the_same_memory() {
    let region = region("bus");
    let (map, _) = rights(&Gatekeeper::new(AllowAll), "bus", Access::ReadWrite);
    // No mapper: every access comes by the bus.
    let mut device =
        Ivshmem::builder(region.attach(map).unwrap(), Recorder::<(u64, u32)>::default()).build().unwrap();
    use crate::pci::PciFunction as _;
    device.bar_write(2, 8, &[1, 2, 3]);
    let mut data = [0xff; 4];
    device.bar_read(2, 7, &mut data);
    assert_eq!(data, [0, 1, 2, 3]);
    // Beyond the end there are ones, and what is stored there is nowhere.
    device.bar_write(2, SIZE - 2, &[5; 8]);
    let mut data = [0xff; 8];
    device.bar_read(2, SIZE - 3, &mut data);
    assert_eq!(data, [0, 5, 5, 0xff, 0xff, 0xff, 0xff, 0xff]);
    for offset in [SIZE, u64::MAX] {
        let mut data = [0xff; 8];
        device.bar_read(2, offset, &mut data);
        device.bar_write(2, offset, &data);
        assert_eq!(data, [0xff; 8], "{offset:#x}");
    }
}

#[test]
fn read_only_is_read_only() {
    let (machine, region) = alone(Access::ReadOnly);
    let home = machine.bar(2);
    assert_eq!(machine.guest.told.take(), [format!("map {home:#x} ReadOnly")]);
    let mapped = lock(&machine.guest.sees)[0].0.clone();
    assert!(vmm_memory::is_read_only(&mapped), "on the host as well");
    // A store traps, and comes by the bus.
    machine.write(2, 0, &[1]);
    assert_eq!((machine.read(2, 0), machine.figures().stores_dropped), ([0], 1));
    writer(&region).write(2, 0, &[9]);
    assert_eq!((machine.read(2, 0), machine.guest.load(home)), ([9], Some(9)));
    let sealed = SharedMemory::create("sealed", SIZE).unwrap().into_read_only().unwrap();
    let sealed = Region::read_only("sealed", sealed).unwrap();
    let (map, _) = rights(&Gatekeeper::new(AllowAll), "sealed", Access::ReadWrite);
    assert!(matches!(sealed.attach(map), Err(IvshmemError::Access { .. })));
}

#[test]
fn sizes_that_no_bar_has_are_refused() {
    let memory = SharedMemory::create("odd", 0x3000).unwrap();
    let error = Region::new("odd", memory).unwrap_err();
    assert_eq!(error.to_string(), "region \"odd\" of 0x3000 bytes; allowed are powers of two from 0x1000 on");
    for vectors in [0, MAX_VECTORS + 1] {
        assert!(matches!(Hub::new(region("v"), vectors), Err(IvshmemError::Vectors { .. })));
    }
}

#[test]
fn memory_that_cannot_be_mapped_comes_by_the_bus_and_is_told() {
    let hub = Hub::new(region("failing"), 1).unwrap();
    let heard = Recorder::<bool>::default();
    let hears = heard.clone();
    let machine = Machine::with(join(&hub), |builder| {
        builder.on_failure(move |error| hears.record(error.to_string() == "it overlaps"))
    });
    // Something of the machine's own is in the way.
    let base = machine.bar(2);
    let ram = vmm_memory::GuestRam::builder()
        .region(vmm_memory::RegionConfig::new(GuestAddress(base), SIZE))
        .build()
        .unwrap();
    lock(&machine.guest.sees).push((ram.regions().remove(0), Access::ReadWrite));
    machine.start();
    assert_eq!((heard.take(), lock(&machine.function).mapped_at()), (vec![true], None));
    machine.write(2, 0, &[3]);
    assert_eq!((machine.read(2, 0), machine.figures().map_failures), ([3], 1));
    lock(&machine.guest.sees).clear();
}
