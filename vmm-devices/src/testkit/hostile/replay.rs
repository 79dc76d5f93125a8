//! Does what a sequence of actions says, and looks after each whether the device still keeps what every device must.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemoryError};

use super::layout::{Layout, MAX_QUEUES, MAX_SIZE, MIN_MEMORY};
use super::{Action, Buffer, Entry};
use crate::testkit::{Driver, DriverQueue, Memory};
use crate::virtio::feature;

/// Device status bits (Virtio 1.3, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

const INDIRECT: u16 = 4;

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replayed {
    /// Chains that the device gave back, as far as rings could be believed: with none, not much was tested.
    pub used: u64,
    /// How often the device was started.
    pub starts: u64,
    /// How often it gave up until it was reset.
    pub failures: u64,
}

/// What no device may do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The test is at fault: a replay needs more memory, or the device has no queue.
    #[error("a replay needs {MIN_MEMORY:#x} bytes of RAM in one region at 0, and a device with a queue")]
    NoRoom,
    /// Memory of the rings is not there any more.
    #[error("after action {step}: rings are not in RAM")]
    Memory {
        /// Which action.
        step: usize,
        /// Why.
        source: GuestMemoryError,
    },
    /// Bits in the status that nobody has set, bits that went without a reset, or DRIVER_OK without FEATURES_OK.
    #[error(
        "after action {step}: the status is {status:#x}, was {before:#x}, and the driver wrote {written:#x}"
    )]
    Status {
        /// Which action.
        step: usize,
        /// The status.
        status: u8,
        /// The status before.
        before: u8,
        /// All bits that were written since the last reset.
        written: u8,
    },
    /// More chains were used than made available.
    #[error("after action {step}: queue {queue} has used {used} chains of {available}")]
    UsedAhead {
        /// Which action.
        step: usize,
        /// Which queue.
        queue: u16,
        /// Chains used since the start.
        used: u64,
        /// Chains made available since the start.
        available: u64,
    },
    /// Guest memory changed though the device was reset.
    #[error("before action {step}: the device wrote {gpa:#x} after it was reset")]
    WriteAfterReset {
        /// Which action.
        step: usize,
        /// The first address that changed.
        gpa: u64,
    },
}

/// Does `actions` to the device that `driver` drives, whose memory is `memory`; then resets it.
///
/// After each action these must hold, whatever the device: the status has the bits that were written, and DEVICE_NEEDS_RESET;
/// the used ring is not ahead of the available ring; after a reset nothing is written to memory. That nothing panics or
/// hangs is for the test's own frame to see. A device that takes guest memory away, as a balloon does, is given a
/// recorder to take it with: a ring that reads as zeros tells nothing.
///
/// Where the driver lets the device write over rings, the used ring is not looked at until the next start. The other rules hold
/// all the same.
///
/// # Errors
/// The first rule that was broken.
pub fn replay(driver: &dyn Driver, memory: &Memory, actions: &[Action]) -> Result<Replayed, Violation> {
    let count = (0..MAX_QUEUES).find(|queue| driver.queue_max_size(*queue) == 0).unwrap_or(MAX_QUEUES);
    let layout = Layout::of(memory, count).filter(|_| count > 0).ok_or(Violation::NoRoom)?;
    let mut replay = Replay {
        driver,
        memory,
        layout,
        count,
        queues: Vec::new(),
        step: 0,
        before: driver.status(),
        written: u8::MAX,
        trusted: false,
        quiet: None,
        done: Replayed::default(),
    };
    for action in actions.iter().chain([&Action::Reset, &Action::Notify(0), &Action::Status(0)]) {
        replay.check_quiet()?;
        let step = replay.step;
        replay.perform(action).map_err(|source| Violation::Memory { step, source })?;
        replay.check()?;
        replay.step += 1;
    }
    replay.check_quiet()?;
    Ok(replay.done)
}

struct Replay<'a> {
    driver: &'a dyn Driver,
    memory: &'a Memory,
    layout: Layout,
    /// How many queues the device has, as far as they are used here.
    count: u16,
    queues: Vec<Side>,
    step: usize,
    /// The status after the last action, and the bits that were written since the last reset.
    before: u8,
    written: u8,
    /// No buffer that the device knows lies over the rings.
    trusted: bool,
    /// All memory at the last reset, as long as nobody else has written it.
    quiet: Option<Vec<u8>>,
    done: Replayed,
}

/// A queue, and how far it was seen to go.
struct Side {
    queue: DriverQueue<Memory>,
    available: Count,
    used: Count,
}

/// An index of 16 bits that only goes on.
#[derive(Default)]
struct Count {
    index: u16,
    total: u64,
}

impl Count {
    fn follow(&mut self, index: u16) -> u64 {
        let more = index.wrapping_sub(self.index);
        self.index = index;
        self.total += u64::from(more);
        more.into()
    }
}

type MemoryResult<T> = Result<T, GuestMemoryError>;

impl Replay<'_> {
    fn perform(&mut self, action: &Action) -> MemoryResult<()> {
        match action {
            Action::Start { features, size } => return self.start(*features, *size),
            Action::Reset | Action::Status(0) => self.reset(),
            Action::Status(status) => self.set_status(*status),
            Action::Features(features) => self.driver.set_driver_features(*features),
            Action::Configure { queue, size, rings } => {
                self.quiet = None;
                self.trusted = false;
                let rings = rings.map(|place| self.layout.address(place));
                self.driver.set_queue(*queue, *size, rings);
            }
            Action::Enable(queue) => self.driver.enable_queue(*queue),
            Action::Kick(queue) => self.driver.notify(u16::from(*queue) % self.count),
            Action::Notify(queue) => self.driver.notify(*queue),
            Action::ReadConfig { offset, len } => {
                let mut data = [0xaa; 16];
                let len = usize::from(*len).min(data.len());
                self.driver.read_config((*offset).into(), data.get_mut(..len).unwrap_or_default());
            }
            Action::WriteConfig { offset, data, len } => {
                let len = usize::from(*len).min(data.len());
                self.driver.write_config((*offset).into(), data.get(..len).unwrap_or_default());
            }
            _ => return self.write(action),
        }
        Ok(())
    }

    /// Actions that write memory.
    fn write(&mut self, action: &Action) -> MemoryResult<()> {
        self.quiet = None;
        match action {
            Action::Chain { queue, buffers, table } => self.submit(*queue, buffers, *table),
            Action::Descriptor { queue, index, entry } => {
                let gpa = self.judge_entry(entry);
                let Some(side) = self.side(*queue) else { return Ok(()) };
                let index = index % side.queue.size();
                side.queue.write_descriptor(index, gpa, entry.len, entry.flags, entry.next)
            }
            Action::Table { offset, entry } => {
                let gpa = self.judge_entry(entry);
                let word = u64::from(entry.len) | u64::from(entry.flags) << 32 | u64::from(entry.next) << 48;
                let place = GuestAddress(Layout::table(*offset));
                self.memory.memory().write_obj([gpa.to_le(), word.to_le()], place)
            }
            Action::Available { queue, head } => {
                self.side(*queue).map_or(Ok(()), |side| side.queue.make_available(*head))
            }
            Action::Jump { queue, by } => {
                let Some(side) = self.side(*queue) else { return Ok(()) };
                side.queue.write_available_index(side.available.index.wrapping_add(*by))
            }
            Action::Suppress { queue, flags, event } => {
                let Some(side) = self.side(*queue) else { return Ok(()) };
                side.queue.write_available_flags(*flags)?;
                side.queue.write_used_event(*event)
            }
            Action::Memory { at, bytes } => {
                let gpa = self.layout.address(*at);
                self.judge(gpa, bytes.len() as u64);
                // What finds no RAM is not written.
                let (Ok(()) | Err(_)) = self.memory.memory().write_slice(bytes, GuestAddress(gpa));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn side(&mut self, queue: u8) -> Option<&mut Side> {
        let index = usize::from(queue).checked_rem(self.queues.len())?;
        self.queues.get_mut(index)
    }

    fn set_status(&mut self, status: u8) {
        self.quiet = None;
        self.written |= status;
        self.driver.set_status(status);
    }

    fn reset(&mut self) {
        self.driver.set_status(0);
        (self.before, self.written, self.trusted) = (0, 0, false);
        self.quiet = Some(self.snapshot());
    }

    fn start(&mut self, features: u64, size: u8) -> MemoryResult<()> {
        self.reset();
        self.quiet = None;
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.driver.set_driver_features(features & self.driver.device_features() | feature::VERSION_1);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let tables = Layout::tables();
        let zeros = vec![0; usize::try_from(tables.end - tables.start).unwrap_or(0)];
        self.memory.memory().write_slice(&zeros, GuestAddress(tables.start))?;
        let wanted = 1 << size.min(8);
        self.queues.clear();
        for index in 0..MAX_QUEUES {
            let size = self.driver.queue_max_size(index).min(MAX_SIZE).min(wanted);
            if size == 0 {
                break;
            }
            let queue = DriverQueue::new(self.memory.clone(), Layout::rings(index), size)?;
            self.driver.set_queue(index, size, queue.rings());
            self.driver.enable_queue(index);
            self.queues.push(Side { queue, available: Count::default(), used: Count::default() });
        }
        self.trusted = true;
        self.done.starts += 1;
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(())
    }

    fn submit(&mut self, queue: u8, buffers: &[Buffer], table: Option<u16>) -> MemoryResult<()> {
        let buffers: Vec<_> = buffers.iter().take(32).map(|b| (self.layout.address(b.at), *b)).collect();
        for (gpa, buffer) in &buffers {
            self.judge(*gpa, buffer.len.into());
        }
        let Some(side) = self.side(queue) else { return Ok(()) };
        let chain = buffers.iter().fold(side.queue.chain(), |chain, (gpa, buffer)| {
            if buffer.writable { chain.writable(*gpa, buffer.len) } else { chain.readable(*gpa, buffer.len) }
        });
        match table {
            Some(offset) => chain.submit_indirect(Layout::table(offset)),
            None => chain.submit(),
        }
        .map(drop)
    }

    fn judge(&mut self, gpa: u64, len: u64) {
        self.trusted &= !Layout::is_structure(gpa, len);
    }

    /// The address of what a descriptor names. A table that lies where device or driver write anything may hold any buffer.
    fn judge_entry(&mut self, entry: &Entry) -> u64 {
        let gpa = self.layout.address(entry.at);
        let tables = Layout::tables();
        if entry.flags & INDIRECT == 0 {
            self.judge(gpa, entry.len.into());
        } else {
            self.trusted &= gpa >= tables.start && gpa.saturating_add(entry.len.into()) <= tables.end;
        }
        gpa
    }

    fn check(&mut self) -> Result<(), Violation> {
        let (step, before, written) = (self.step, self.before, self.written);
        let status = self.driver.status();
        // A device that was just reset needs no other one.
        let allowed = if written == 0 { 0 } else { written | NEEDS_RESET };
        let unset = status & !allowed;
        let early = status & DRIVER_OK != 0 && status & FEATURES_OK == 0;
        if unset != 0 || before & !status != 0 || early {
            return Err(Violation::Status { step, status, before, written });
        }
        self.done.failures += u64::from(status & !before & NEEDS_RESET != 0);
        self.before = status;
        if !self.trusted {
            return Ok(());
        }
        for (queue, side) in (0..).zip(&mut self.queues) {
            let memory = |source| Violation::Memory { step, source };
            // In this order: one that is used in between was available before.
            let more = side.used.follow(side.queue.used_index().map_err(memory)?);
            side.available.follow(side.queue.available_index().map_err(memory)?);
            let (used, available) = (side.used.total, side.available.total);
            if used > available {
                return Err(Violation::UsedAhead { step, queue, used, available });
            }
            self.done.used += more;
        }
        Ok(())
    }

    fn check_quiet(&self) -> Result<(), Violation> {
        let Some(before) = &self.quiet else { return Ok(()) };
        let now = self.snapshot();
        if *before == now {
            return Ok(());
        }
        let Some(mut at) = before.iter().zip(&now).position(|(before, now)| before != now) else {
            return Ok(());
        };
        for region in self.layout.regions() {
            let len = usize::try_from(region.end - region.start).unwrap_or(usize::MAX);
            if at < len {
                let gpa = region.start + at as u64;
                return Err(Violation::WriteAfterReset { step: self.step, gpa });
            }
            at -= len;
        }
        Ok(())
    }

    /// All memory, region after region.
    fn snapshot(&self) -> Vec<u8> {
        let memory = self.memory.memory();
        let mut all = Vec::new();
        for region in self.layout.regions() {
            let start = all.len();
            let len = usize::try_from(region.end - region.start).unwrap_or(0);
            all.resize(start + len, 0);
            // A region that was taken away reads as zeros.
            let (Ok(()) | Err(_)) =
                memory.read_slice(all.get_mut(start..).unwrap_or_default(), GuestAddress(region.start));
        }
        all
    }
}
