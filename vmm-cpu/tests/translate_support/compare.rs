//! Whether a guest sees the same, and comes to the same, whatever executes it.
//!
//! Where time is counted by instructions, everything follows from the input: each run's end, the state there, the count
//! of instructions, every call of the VMM's with its data, and memory at the end.

use std::time::Duration;

use vmm_cpu::state::CpuState;
use vmm_cpu::{ExactStop, Halt, Result, Vcpu};

use super::arena::EXTENTS;
use super::exercise::{Tally, exercise_on};
use super::guest::{Guest, Tier};

/// Instructions of one run.
const INSTRUCTIONS: u64 = 3000;
/// Time that one run lasts, in nanoseconds: time of halted vCPUs is skipped.
const TIME: u64 = 1_000_000;
/// How long a run lasts before it is kicked, at a point that no other run reaches in the same way.
pub const KICK_AFTER: Duration = Duration::from_millis(200);

const RESUME_FLAG: u64 = 1 << 16;

/// Something that happened.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A call of the VMM's.
    Call { name: &'static str, place: u64, data: Vec<u8> },
    /// The end of a run.
    End { end: String, instructions: u64, state: Box<CpuState> },
}

/// What is seen of a guest.
#[derive(Debug, Default)]
pub struct Record {
    pub events: Vec<Event>,
    /// What the regions hold at the end.
    pub memory: Vec<Vec<u8>>,
    /// How many events come before the first kick from outside.
    kicked_at: Option<usize>,
}

impl Record {
    /// Notes the end of a run.
    pub fn note(&mut self, vcpu: &mut dyn Vcpu, result: &Result<Halt>, kicked: bool) {
        if kicked {
            self.kicked_at.get_or_insert(self.events.len());
        }
        let instructions = vcpu.exact_stops().unwrap().instructions();
        let mut state = Box::new(vcpu.save().unwrap());
        // It is for one instruction, and stays set where nothing looks at it.
        state.general.rflags &= !RESUME_FLAG;
        self.events.push(Event::End { end: format!("{result:?}"), instructions, state });
    }
}

/// Lets the next run end after a while in any case.
pub fn limit(vcpu: &mut dyn Vcpu, now: u64) {
    let stops = vcpu.exact_stops().unwrap();
    let stop = ExactStop::none().at_instructions(
        stops.instructions()
            + std::env::var(if stops.instructions() == 0 { "LIMIT" } else { "LIMIT2" })
                .map_or(INSTRUCTIONS, |l| l.parse().unwrap()),
    );
    stops.stop_at(stop.at_guest_time(now + TIME));
}

/// Runs a deterministic guest on both tiers, with the address window and without.
pub fn compare(guest: &Guest) -> Tally {
    let record = |tier| exercise_on(guest, tier, Some(Record::default()));
    let (mut tally, interpreted) = record(Tier::Interpreted);
    for tier in [Tier::AtOnce, Tier::Window] {
        if let (Some(interpreted), (_, Some(translated))) = (&interpreted, record(tier)) {
            tally.compared += check(guest, tier, interpreted, &translated);
        }
    }
    tally
}

/// How many runs can be compared, which must be the same.
fn check(guest: &Guest, tier: Tier, interpreted: &Record, translated: &Record) -> u64 {
    let kicked_at = [interpreted, translated].into_iter().filter_map(|record| record.kicked_at).min();
    let count = kicked_at.unwrap_or(interpreted.events.len().max(translated.events.len()));
    let mut compared = 0;
    for at in 0..count {
        let (one, other) = (interpreted.events.get(at), translated.events.get(at));
        assert!(one == other, "{tier:?}, event {at}: {}of {guest:?}", difference(one, other));
        compared += u64::from(matches!(one, Some(Event::End { .. })));
    }
    if kicked_at.is_none() {
        for ((extent, one), other) in EXTENTS.iter().zip(&interpreted.memory).zip(&translated.memory) {
            let at = one.iter().zip(other).position(|(one, other)| one != other);
            assert!(at.is_none(), "{tier:?}, memory at {:#x}+{at:x?} of {guest:?}", extent.gpa);
        }
    }
    compared
}

/// The lines in which two events differ: interpreted, translated.
fn difference(one: Option<&Event>, other: Option<&Event>) -> String {
    let (one, other) = (format!("{one:#x?}"), format!("{other:#x?}"));
    let differing = one.lines().zip(other.lines()).filter(|(one, other)| one != other);
    let lines = differing.map(|(one, other)| format!("{} {}\n", one.trim(), other.trim()));
    lines.take(40).collect()
}
