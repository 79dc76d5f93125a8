//! Public flaws of device models; `tests/escapes.md` says which flaw is tested where.

use super::*;

/// CVE-2020-14364, a length that is stored before it is validated: a state that is refused changes nothing, whatever is wrong with it.
#[test]
fn cve_2020_14364_a_refused_state_changes_nothing() {
    let hub = Hub::new(region("state"), 2).unwrap();
    let machine = Machine::ready(join(&hub));
    machine.set_register(0, 1);
    let good = lock(&machine.function).state();
    for wrong in 0..4 {
        let mut state = good.clone();
        state.mask = 0xffff;
        match wrong {
            0 => state.position = 1,
            1 => state.config.ids = 7,
            2 => state.msix.as_mut().unwrap().entries[1].address = 3,
            _ => state.msix.as_mut().unwrap().entries.clear(),
        }
        lock(&machine.function).restore(&state).unwrap_err();
        assert_eq!(lock(&machine.function).state(), good, "{wrong}");
    }
}

/// A peer or vector beyond the table, as in QEMU's ivshmem ("Fix potential OOB r/w access", 2014): each value of the doorbell leads
/// to a bell that there is, or is counted.
#[test]
fn ivshmem_vectors_out_of_bounds_ring_nobody() {
    let hub = Hub::new(region("bounds"), 3).unwrap();
    let (machine, other) = (Machine::ready(join(&hub)), Machine::ready(join(&hub)));
    let near = [0, 1, 2, 3, 4, 62, 63, 64, 65, 0x7f, 0xff, 0x100, 0x7fff, 0x8000, 0xfffe, 0xffff];
    let mut expected = 0;
    for peer in near {
        for vector in near {
            machine.ring(peer, vector);
            expected += u64::from(peer < 2 && vector < 3);
        }
    }
    let figures = machine.figures();
    assert_eq!((figures.rung, machine.heard().len() + other.heard().len()), (expected, expected as usize));
    assert_eq!(figures.no_peer + figures.no_vector, (near.len() * near.len()) as u64 - expected);
}

/// CVE-2021-3929, a device that reaches its own registers: the memory's BAR over those of the device, over its neighbour's, and
/// over RAM. It is mapped nowhere but where the bridge lets it be.
#[test]
fn cve_2021_3929_the_memory_covers_nothing_else() {
    let hub = Hub::new(region("aliases"), 1).unwrap();
    let machine = Machine::ready(join(&hub));
    let layout = PciLayout::default();
    let second = Arc::new(Mutex::new(
        Ivshmem::builder(join(&hub), machine.messages.clone()).mapper(machine.guest.clone()).build().unwrap(),
    ));
    machine.bridge.add(second.clone()).unwrap();
    let theirs = lock(&second).config_space().bar_base(2).unwrap();
    let there = machine.config_at() + (1 << 15) + COMMAND;
    machine.mmio.write(GuestAddress(there), &DECODE.to_le_bytes());
    machine.guest.told.take();
    let registers = machine.bar(0) & !(SIZE - 1);
    let places =
        [0, 0x10_0000, 0x1_0000_0000, registers, theirs, layout.ecam.0, 0xfec0_0000, 0xfee0_0000, !0 << 20];
    for place in places {
        machine.configure(0x18, &(place as u32).to_le_bytes());
        machine.configure(0x1c, &((place >> 32) as u32).to_le_bytes());
        let sees = lock(&machine.guest.sees).len();
        assert_eq!((lock(&machine.function).mapped_at(), sees), (None, 1), "{place:#x}");
    }
    assert_eq!(lock(&second).mapped_at(), Some(theirs));
    assert!(machine.bridge.refusals() > 0);
}

/// CVE-2023-5088, what is under way when a device is reset: a reset takes the memory out of the guest's sight, and the vectors.
#[test]
fn cve_2023_5088_a_reset_leaves_nothing_mapped() {
    let hub = Hub::new(region("reset"), 1).unwrap();
    let (machine, other) = (Machine::ready(join(&hub)), Machine::ready(join(&hub)));
    machine.set_vector(0, true);
    other.ring(0, 0);
    machine.bridge.reset();
    assert_eq!((lock(&machine.guest.sees).len(), lock(&machine.function).mapped_at()), (0, None));
    other.ring(0, 0);
    machine.start();
    machine.set_vector(0, false);
    assert_eq!(
        machine.heard(),
        Vec::<u32>::new(),
        "rings of before the reset, and those while there were no messages"
    );
    assert_eq!(lock(&machine.guest.sees).len(), 1);
}

/// crosvm 002cd87a0, MSI-X out of bounds: each offset of each BAR with each size.
#[test]
fn crosvm_002cd87a0_every_bar_is_swept() {
    let hub = Hub::new(region("sweep"), 3).unwrap();
    let machine = Machine::ready(join(&hub));
    for (bar, size) in [(0, 0x100), (1, 0x1000), (2, SIZE)] {
        let step = if bar == 2 { 0x3f9 } else { 1 };
        for offset in (0..size).step_by(step).chain(size - 9..size) {
            for width in [1, 2, 3, 4, 8] {
                let mut data = vec![0xaa; width];
                machine.mmio.read(GuestAddress(machine.bar(bar) + offset), &mut data);
                machine.write(bar, offset, &data);
                machine.write(bar, offset, &vec![0xff; width]);
            }
        }
    }
    machine.start();
    machine.ring(0, 2);
    assert_eq!(machine.heard().last(), Some(&2));
}

/// CVE-2024-3446, a device that enters itself: a ring for oneself whose message is a ring for oneself. The message goes to the
/// sink, and whatever that does comes by the bus, with the device locked no more.
#[test]
fn cve_2024_3446_a_ring_for_oneself_enters_nothing() {
    let hub = Hub::new(region("self"), 1).unwrap();
    let machine = Machine::ready(join(&hub));
    // A message to the doorbell's own address: the device asks the sink for it, and writes nothing itself.
    let doorbell = machine.bar(0) + 12;
    for (register, value) in [(0, doorbell as u32), (4, (doorbell >> 32) as u32), (8, 0_u32)] {
        machine.write(1, register, &value.to_le_bytes());
    }
    for _ in 0..100 {
        machine.ring(0, 0);
    }
    let messages = machine.messages.take();
    assert_eq!(messages, vec![(doorbell, 0); 100]);
    assert_eq!(machine.figures().rung, 100);
}
