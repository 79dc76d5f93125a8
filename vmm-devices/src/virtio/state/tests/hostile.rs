//! States that no device can be in, or not this one.

use super::*;
use crate::testkit::DriverQueue;
use crate::virtio::block::{Block, MemoryDisk};
use crate::virtio::{DeviceState, Rng};

fn disk() -> Block {
    Block::builder(Arc::new(MemoryDisk::new(1 << 20))).build().unwrap()
}

/// A paused machine whose driver has a disk.
fn machine(bus: Bus) -> Machine {
    let machine = Machine::new(bus, disk());
    let queue = DriverQueue::new(machine.memory.clone(), 0x1000, 16).unwrap();
    machine.driver.start(0, &[(0, &queue)]).unwrap();
    machine.pause();
    machine
}

type Change = fn(&mut VirtioState);

const CHANGES: [(Change, &str); 20] = [
    (|state| state.device_type = 4, "device_type is 0x4"),
    (|state| state.status |= 0x10, "status is 0x1f"),
    (|state| state.status &= !8, "status is 0x7"),
    (|state| state.features |= 1 << 63, "features is 0x8000000100000000"),
    (|state| state.features = 0, "features is 0x0"),
    (|state| state.config.resize(257, 1), "length of config is 0x101"),
    (|state| state.queues.clear(), "number of queues is 0x0"),
    (|state| state.queues.push(VirtqueueState::default()), "number of queues is 0x2"),
    (|state| state.queues[0].max_size = 128, "max_size is 0x80"),
    (|state| state.queues[0].size = 12, "size is 0xc"),
    (|state| state.queues[0].size = 0, "size is 0x0"),
    (|state| state.queues[0].size = 512, "size is 0x200"),
    (|state| state.queues[0].next_available = 5, "in_flight is 0x0"),
    (|state| state.queues[0].in_flight = vec![0], "in_flight is 0x1"),
    (
        |state| (state.queues[0].next_available, state.queues[0].in_flight) = (2, vec![1, 1]),
        "in_flight is 0x1; allowed is descriptors of the queue",
    ),
    (
        |state| (state.queues[0].next_available, state.queues[0].in_flight) = (1, vec![16]),
        "in_flight is 0x10",
    ),
    (|state| (state.queues[0].ready, state.queues[0].told) = (false, 1), "indices is 0x1"),
    (|state| state.queues[0].ready = false, "cannot go on from its state"),
    (|state| state.queues[0].used = 0x1000_0000, "cannot go on from its state"),
    (|state| state.device = DeviceState::Stateless, "state of block device: kind of state"),
];

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    for bus in BUSES {
        let from = machine(bus);
        let saved = from.save();
        for (index, (change, problem)) in CHANGES.into_iter().enumerate() {
            let there = Machine::with(bus, disk(), copy_of(&from.memory), Arc::new(Inline));
            let before = there.save();
            let mut bad = saved.clone();
            change(bad.device());
            let error = there.restore(&bad).unwrap_err();
            assert!(error.to_string().contains(problem), "{index}: {error}");
            assert_eq!((there.save(), there.driver.status()), (before, 0), "{index}");
            assert!(!there.line.is_asserted() && there.messages.take().is_empty());
            // It is as good as new.
            there.restore(&saved).unwrap();
            assert!(matches!(there.restore(&saved), Err(VirtioStateError::InUse)));
            there.resume();
            assert_eq!(there.driver.status(), 15);
        }
    }
}

#[test]
fn interrupts_that_cannot_be_are_refused() {
    let from = machine(Bus::Mmio);
    let Saved::Mmio(mut state) = from.save() else { panic!("which it is") };
    state.interrupt_status = 4;
    let there = Machine::with(Bus::Mmio, disk(), copy_of(&from.memory), Arc::new(Inline));
    let error = there.restore(&Saved::Mmio(state)).unwrap_err().to_string();
    assert_eq!(error, "state of virtio: interrupt_status is 0x4; allowed is bits 0 and 1");

    let from = machine(Bus::Pci);
    let Saved::Pci(saved) = from.save() else { panic!("which it is") };
    type Change = fn(&mut VirtioPciState);
    let changes: [(Change, &str); 7] = [
        (|state| state.isr = 4, "isr is 0x4"),
        (|state| state.config_vector = 2, "vector is 0x2"),
        (|state| state.queue_vectors[0] = 0xfffe, "vector is 0xfffe"),
        (|state| state.queue_vectors.push(0), "number of queue_vectors is 0x2"),
        (|state| state.msix.entries.clear(), "number of vectors is 0x0"),
        (|state| state.msix.entries[1].address = 2, "address is 0x2"),
        (|state| state.config.ids = 0, "ids is 0x0"),
    ];
    for (change, problem) in changes {
        let there = Machine::with(Bus::Pci, disk(), copy_of(&from.memory), Arc::new(Inline));
        let before = there.save();
        let mut bad = saved.clone();
        change(&mut bad);
        let error = there.restore(&Saved::Pci(bad)).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
        assert_eq!(there.save(), before);
    }
    // And where the device refuses, configuration space is what it was.
    let there = Machine::with(Bus::Pci, disk(), guest_memory(RAM).unwrap(), Arc::new(Inline));
    let before = there.save();
    let mut bad = saved.clone();
    (bad.config.registers[0].1, bad.device.device_type) = (4, 1);
    assert!(there.restore(&Saved::Pci(bad)).is_err());
    assert_eq!(there.save(), before);
}

#[test]
fn a_ring_that_is_elsewhere_than_the_state_says_stops_the_device_alone() {
    for bus in BUSES {
        let from = machine(bus);
        for (next_available, next_used) in [(100, 100), (0x8000, 0x8000), (3, 2), (0xffff, 0xffff)] {
            let mut state = from.save();
            let queue = &mut state.device().queues[0];
            (queue.next_available, queue.next_used, queue.told) = (next_available, next_used, 7);
            if next_available != next_used {
                // A descriptor in which zeros are: a chain that is none of the driver's.
                queue.in_flight = vec![9];
            }
            let there = Machine::with(bus, disk(), copy_of(&from.memory), Arc::new(Inline));
            there.restore(&state).unwrap();
            there.resume();
            there.driver.notify(0);
            // The index of the ring is 0 or so far away that there cannot be so many; or the chain is answered, as any.
            let status = there.driver.status();
            assert!(matches!(status, 0x4f | 0xf), "{status:#x}");
            there.driver.set_status(0);
            assert_eq!(there.driver.status(), 0);
        }
    }
}

#[test]
fn a_device_that_does_not_know_how_says_so() {
    struct Other(Rng);
    impl<M: crate::virtio::DeviceMemory> VirtioDevice<M> for Other {
        fn device_type(&self) -> crate::virtio::DeviceType {
            crate::virtio::DeviceType(42)
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn activate(
            &mut self,
            activation: crate::virtio::Activation<M>,
        ) -> Result<Vec<Box<dyn crate::virtio::Worker>>, ActivateError> {
            self.0.activate(activation)
        }
    }
    let there = Machine::new(Bus::Mmio, Other(Rng::new(std::io::empty())));
    let error = there.try_save().unwrap_err();
    assert_eq!(error.to_string(), "a virtio device of type 42 that cannot be saved");
    let from = Machine::new(Bus::Mmio, Rng::new(std::io::empty()));
    let mut state = from.save();
    state.device().device_type = 42;
    state.device().queues[0].max_size = 16;
    state.device().queues[0].size = 16;
    let error = there.restore(&state).unwrap_err();
    assert_eq!(error.to_string(), "state of virtio: kind of state is 0x0; allowed is its own");
}
