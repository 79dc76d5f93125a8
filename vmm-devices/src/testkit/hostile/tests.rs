use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::testkit::{Interposed, Memory, MmioDriver, guest_memory, guest_memory_of};
use crate::virtio::balloon::{Balloon, MemoryRelease};
use crate::virtio::{
    ActivateError, Activation, DeviceType, Progress, QueueError, Rng, VirtioDevice, Virtqueue, Worker,
};

/// Regions that touch, a hole, and a small one behind it.
fn memory() -> Memory {
    guest_memory_of(&[(0, MIN_MEMORY), (MIN_MEMORY, 0x1000), (2 * MIN_MEMORY, 0x1000)]).unwrap()
}

fn is_ram(gpa: u64, len: u64) -> bool {
    let within = |start, end| gpa >= start && gpa + len <= end;
    within(0, MIN_MEMORY)
        || within(MIN_MEMORY, MIN_MEMORY + 0x1000)
        || within(2 * MIN_MEMORY, 2 * MIN_MEMORY + 0x1000)
}

fn mmio(device: impl VirtioDevice<Memory> + 'static, memory: &Memory) -> MmioDriver {
    MmioDriver::of(device, memory).unwrap().0
}

/// Counts pages; every range must lie in one region of RAM.
#[derive(Clone, Default)]
struct Counted(Arc<AtomicU64>);

impl MemoryRelease for Counted {
    fn release(&self, gpa: GuestAddress, len: u64) -> std::io::Result<()> {
        assert!(is_ram(gpa.0, len), "{gpa:?} {len:#x}");
        self.0.fetch_add(len / 4096, Ordering::Relaxed);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_entropy_device_keeps_the_rules(actions in hostile_queue(16)) {
        let memory = memory();
        replay(&mmio(Rng::new(std::io::repeat(0x5a)), &memory), &memory, &actions).unwrap();
    }

    #[test]
    fn the_balloon_keeps_the_rules(actions in hostile_queue(8)) {
        let memory = memory();
        let balloon = Balloon::new(Counted::default());
        let handle = balloon.handle();
        let driver = mmio(balloon, &memory);
        handle.set_target(9);
        replay(&driver, &memory, &actions).unwrap();
        prop_assert_eq!((handle.is_active(), handle.actual(), handle.target()), (false, 0, 9));
    }
}

/// What is drawn reaches the devices: chains come back, pages are released, devices give up and are started again.
#[test]
fn sequences_reach_deep() {
    let mut runner = TestRunner::deterministic();
    let (strategy, released) = (hostile_queue(16), Counted::default());
    let mut sums = [Replayed::default(); 2];
    for _ in 0..100 {
        let actions = strategy.new_tree(&mut runner).unwrap().current();
        let memory = memory();
        let drivers =
            [mmio(Rng::new(std::io::repeat(1)), &memory), mmio(Balloon::new(released.clone()), &memory)];
        for (sum, driver) in sums.iter_mut().zip(drivers) {
            let one = replay(&driver, &memory, &actions).unwrap();
            sum.used += one.used;
            sum.starts += one.starts;
            sum.failures += one.failures;
        }
    }
    for sum in sums {
        assert!(sum.used > 200 && sum.starts > 150 && sum.failures > 20, "{sum:?}");
    }
    assert!(released.0.load(Ordering::Relaxed) > 50);
}

#[test]
fn a_replay_needs_room() {
    let actions = [Action::Notify(0)];
    for memory in [guest_memory(0x1_0000).unwrap(), guest_memory_of(&[(0x1000, 1 << 20)]).unwrap()] {
        let driver = mmio(Rng::new(std::io::empty()), &memory);
        assert!(matches!(replay(&driver, &memory, &actions), Err(Violation::NoRoom)));
    }
}

/// What a device does that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Uses a chain twice.
    UsesTwice,
    /// Writes memory when its configuration is written, driver or none.
    WritesLater,
}

struct Device {
    wrong: Wrong,
    memory: Memory,
}

struct Server {
    queue: Virtqueue<Memory>,
    wrong: Wrong,
}

impl Worker for Server {
    fn queues(&self) -> Vec<u16> {
        vec![0]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        while let Some(chain) = self.queue.pop(&*memory)? {
            self.queue.complete(chain.head(), 0)?;
            if self.wrong == Wrong::UsesTwice {
                self.queue.complete(chain.head(), 0)?;
            }
        }
        Ok(Progress::Idle)
    }
}

impl VirtioDevice<Memory> for Device {
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        if self.wrong == Wrong::WritesLater {
            self.memory.memory().write_obj(1_u8, GuestAddress(MIN_MEMORY + 5)).unwrap();
        }
    }

    fn activate(
        &mut self,
        mut activation: Activation<Memory>,
    ) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        Ok(vec![Box::new(Server { queue: activation.take_queue(0)?, wrong: self.wrong })])
    }
}

fn replay_wrong(wrong: Wrong, actions: &[Action]) -> Result<Replayed, Violation> {
    let memory = memory();
    replay(&mmio(Device { wrong, memory: memory.clone() }, &memory), &memory, actions)
}

const CHAIN: [Buffer; 1] = [Buffer { at: Place::Data(0), len: 8, writable: true }];

fn chain() -> Action {
    Action::Chain { queue: 0, buffers: CHAIN.to_vec(), table: None }
}

#[test]
fn a_chain_used_twice_is_found() {
    let actions = [Action::Start { features: 0, size: 4 }, chain(), chain(), Action::Notify(0)];
    assert_eq!(replay_wrong(Wrong::Nothing, &actions).unwrap().used, 2);
    let found = replay_wrong(Wrong::UsesTwice, &actions).unwrap_err();
    assert!(matches!(found, Violation::UsedAhead { step: 3, queue: 0, used: 4, available: 2 }), "{found}");
}

#[test]
fn a_write_after_reset_is_found() {
    let write = Action::WriteConfig { offset: 0, data: [0; 16], len: 4 };
    let actions =
        [Action::Start { features: 0, size: 4 }, write.clone(), Action::Reset, write, Action::Notify(0)];
    replay_wrong(Wrong::Nothing, &actions).unwrap();
    replay_wrong(Wrong::WritesLater, &actions[..3]).unwrap();
    let memory = memory();
    let driver = mmio(Device { wrong: Wrong::WritesLater, memory: memory.clone() }, &memory);
    let found = replay(&driver, &memory, &actions[2..]).unwrap_err();
    assert!(matches!(found, Violation::WriteAfterReset { step: 2, gpa } if gpa == MIN_MEMORY + 5), "{found}");
}

#[test]
fn a_status_that_cannot_be_is_found() {
    // A bit from nowhere, one that goes, one that is there too early, and one that stays after the reset at the end.
    type Lie = fn(u8) -> u8;
    let lies: [(Lie, usize); 4] =
        [(|s| s | 0x80, 1), (|s| s & !1, 1), (|s| s & !8, 1), (|s| if s == 0 { 0x40 } else { s }, 3)];
    for (lie, at) in lies {
        let memory = memory();
        let driver = mmio(Device { wrong: Wrong::Nothing, memory: memory.clone() }, &memory);
        // After two honest answers.
        let honest = Cell::new(2_u32);
        let driver = Interposed::new(driver).status_as(|status| {
            let left = honest.get();
            honest.set(left.saturating_sub(1));
            if left == 0 { lie(status) } else { status }
        });
        let actions = [Action::Start { features: 0, size: 4 }, Action::Notify(0), Action::Notify(0)];
        let found = replay(&driver, &memory, &actions).unwrap_err();
        assert!(matches!(found, Violation::Status { step, .. } if step == at), "{at}: {found}");
    }
}

/// Rings that the driver lets the device write over tell nothing, and start to tell again with the next start.
#[test]
fn rings_under_buffers_are_not_believed() {
    let over = Buffer { at: Place::Rings { queue: 0, offset: 0 }, len: 0x2000, writable: true };
    let start = Action::Start { features: 0, size: 4 };
    let actions = [
        start.clone(),
        Action::Chain { queue: 0, buffers: vec![over], table: None },
        Action::Notify(0),
        start,
        chain(),
        Action::Notify(0),
    ];
    let memory = memory();
    let done = replay(&mmio(Rng::new(std::io::repeat(0xff)), &memory), &memory, &actions).unwrap();
    assert_eq!((done.used, done.starts), (1, 2));
}
