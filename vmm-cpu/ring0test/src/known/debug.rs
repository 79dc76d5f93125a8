//! Debug exceptions.

use super::Known;
use super::settle::*;
use crate::layout::*;
use crate::outcome::word;
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "trap to a breakpoint",
        reason: "A trap after one instruction, then a fault of the next (Intel SDM 3A table 7-2, AMD64 APM 2 8.5); QEMU 7.2 has \
             the breakpoint in DR6 with the trap already, and keeps it there",
        settle: trap_to_breakpoint,
    },
    Known {
        name: "trap of the last iteration",
        reason: "The instruction is over then, so RIP is that of the next (Intel SDM 3B 19.3.1.1); QEMU 7.2 has that of the \
                 string instruction, with RCX 0",
        settle: last_iteration,
    },
];

fn trap_to_breakpoint(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const BREAKPOINT: u64 = 1;
    if scenario.topic != "debug" {
        return;
    }
    let breakpoint = word(ours, header::DR);
    let mut is_kept = false;
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::DR6;
        let is_trap = event.vector == 1 && word(ours, at) & BREAKPOINT == 0;
        let is_there = is_trap && word(ours, event.at + event::FRAME) == breakpoint;
        is_kept |= is_there;
        if word(ours, at) ^ word(theirs, at) == BREAKPOINT && word(theirs, at) & BREAKPOINT != 0 && is_kept {
            copy(ours, theirs, at, BREAKPOINT);
        }
    }
}

fn last_iteration(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const REP: u64 = 0xf3;
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::FRAME;
        let code = interrupted(scenario, theirs, &event).map_or(0, |offset| word(ours, offset));
        let length = if code & 0xff == 0x67 { 3 } else { 2 };
        if scenario.topic == "debug"
            && event.vector == 1
            && without_prefixes(code) & 0xff == REP
            && word(theirs, at) + length == word(ours, at)
            && word(ours, event.at + event::REGISTERS + 8) == 0
        {
            event.copy(ours, theirs, 0, u64::MAX);
        }
    }
}
