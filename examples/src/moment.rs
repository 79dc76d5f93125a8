//! What a machine was in the middle of when it was saved, and when.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use vmm_cpu::Vcpu;
use vmm_cpu::state::{CpuState, RunState};
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::Bytes as _;

/// What time it is by a clock that all processes have in common (CLOCK_MONOTONIC).
#[must_use]
pub fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(now).unwrap_or_default()
}

/// What vCPUs were in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// vCPUs that were executing instructions, and did not wait for an interrupt.
    pub running: u32,
    /// Interrupts that were on their way, or waited to be taken.
    pub interrupts: u32,
    /// Instructions with REP of which some iterations were to come.
    pub repeats: u32,
    /// Requests that disks had taken and not given back, and finished before they came to rest.
    pub drained: u64,
    /// The same, of which the snapshot knows: the disks that go on do them.
    pub carried: u64,
}

/// What the line that tells of a moment begins with.
pub const SAVED: &str = "saved in the middle of: ";

impl Moment {
    /// Adds a vCPU, which has that state.
    pub fn add(&mut self, vcpu: &mut dyn Vcpu, state: &CpuState, ram: &GuestRam) {
        self.running += u32::from(state.run_state == RunState::Running);
        // IRR is in the registers 0x20 to 0x27 (Intel SDM 3A table 12-1).
        let requested = state.local_apic.as_ref().and_then(|apic| apic.registers.get(0x20..0x28));
        let requested: u32 = requested.map_or(0, |irr| irr.iter().map(|word| word.count_ones()).sum());
        let on_its_way = state.events.interrupt.is_some() || state.events.intr;
        self.interrupts += requested + u32::from(on_its_way);
        self.repeats += u32::from(is_repeat(vcpu, state, ram));
    }
}

/// Whether iterations of the instruction at RIP are to come: a string instruction with REP, and RCX is not zero. Of one that has not begun
/// that is true as well; few are found there, as they are long.
fn is_repeat(vcpu: &mut dyn Vcpu, state: &CpuState, ram: &GuestRam) -> bool {
    let base = if state.system.code_bits() == 64 { 0 } else { state.system.cs.base };
    let Ok(Some(address)) = vcpu.translate(base.wrapping_add(state.general.rip)) else { return false };
    let mut code = [0; 3];
    if ram.memory().read_slice(&mut code, address).is_err() || state.general.rcx == 0 {
        return false;
    }
    let opcode = match code {
        [0xf2 | 0xf3, 0x48, opcode] | [0xf2 | 0xf3, opcode, _] => opcode,
        _ => return false,
    };
    // MOVS, CMPS, STOS, LODS, SCAS, INS and OUTS (Intel SDM 2B, REP).
    matches!(opcode, 0x6c..=0x6f | 0xa4..=0xa7 | 0xaa..=0xaf)
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { running, interrupts, repeats, drained, carried } = self;
        write!(f, "running {running}, interrupts {interrupts}, repeats {repeats}, ")?;
        write!(f, "drained {drained}, carried {carried}")
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut moment = Self::default();
        for part in text.split(", ") {
            let (name, count) = part.split_once(' ').ok_or_else(|| format!("{part:?} is no count"))?;
            let count: u32 = count.parse().map_err(|_| format!("{count:?} is no number"))?;
            match name {
                "running" => moment.running = count,
                "interrupts" => moment.interrupts = count,
                "repeats" => moment.repeats = count,
                "drained" => moment.drained = count.into(),
                "carried" => moment.carried = count.into(),
                _ => return Err(format!("{name:?} is none of a moment's counts")),
            }
        }
        Ok(moment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_read_as_it_is_shown() {
        let moment = Moment { running: 2, interrupts: 1, repeats: 0, drained: 7, carried: 3 };
        assert_eq!(moment.to_string().parse(), Ok(moment));
        assert!("running 2, sleeping 1".parse::<Moment>().is_err());
    }
}
