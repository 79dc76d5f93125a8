//! What the delivery of exceptions and interrupts pushes and loads.

use super::Known;
use super::settle::*;
use crate::arena::{Mode, rflags};
use crate::layout::*;
use crate::outcome::{event_count, word};
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    // First: what follows is about events that are the same on both sides.
    Known {
        name: "stack address that is not canonical",
        reason: "#SS(0) for references through SS (AMD64 APM 2 8.2.13); QEMU 7.2 raises #GP(0) for all",
        settle: stack_not_canonical,
    },
    Known {
        name: "error codes of gates",
        reason: "The vector is in bits 15 to 3 in all modes, and EXT is set if no INT n was being delivered (AMD64 APM 2 8.4.1, \
                 Intel SDM 3A 7.13); QEMU 7.2 has the vector in bits 15 to 4 in long mode, and never EXT",
        settle: gate_errors,
    },
    Known {
        name: "RF of faults",
        reason: "A fault pushes RFLAGS with RF set (Intel SDM 3A 7.3.1.1, AMD64 APM 2 3.1.6); QEMU 7.2 does not",
        settle: resume_flag,
    },
    Known {
        name: "RF of INT n",
        reason: "INT n right after an IRET that loads RF pushes it as 0 (Intel SDM 3B 19.3.1.1); QEMU 7.2 as 1",
        settle: resume_flag_of_software,
    },
    Known {
        name: "RF of faults, in a TSS",
        reason: "As on a stack, where a task gate leads away",
        settle: resume_flag_of_task,
    },
    Known {
        name: "SS with an interrupt stack",
        reason: "SS becomes null where the privilege level changes (AMD64 APM 2 8.9.3, Intel SDM 3A 7.14.4); QEMU 7.2 does \
                 so too where only the interrupt stack table changes RSP",
        settle: null_stack,
    },
    Known {
        name: "bits 31 to 16 of ESP on a 16-bit inner stack",
        reason: "ESP is that of the TSS (Intel SDM 3A 7.12.1), of which pushes change SP alone; QEMU 7.2 keeps the outer upper half",
        settle: upper_stack_pointer,
    },
];

fn gate_errors(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const EXTERNAL: u64 = 1;
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::FRAME;
        let (mine, other) = (word(ours, at) & 0xffff, word(theirs, at) & 0xffff);
        if !matches!(event.vector, 10..=13) || mine == other {
            continue;
        }
        let names_gate = mine & 2 != 0 && scenario.arena.mode == Mode::Long && other == (mine >> 3) * 16 + 2;
        if names_gate || mine == other | EXTERNAL {
            event.copy(ours, theirs, 0, 0xffff);
        }
    }
}

fn resume_flag(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let is_fault = event.vector < 32 && !matches!(event.vector, 1..=4 | 8 | 18);
        let flags = if event.has_error() { 3 } else { 2 };
        let at = event.at + event::FRAME + 8 * flags;
        if is_fault
            && event.bytes > 2
            && word(ours, at) & rflags::RF != 0
            && word(theirs, at) & rflags::RF == 0
        {
            event.copy(ours, theirs, flags, rflags::RF);
        }
    }
}

fn resume_flag_of_software(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::FRAME + 8 * 2;
        let is_end = event.vector == u64::from(END_VECTOR) && event.bytes > 2;
        let (mine, other) = (word(ours, at), word(theirs, at));
        if scenario.topic == "returns" && is_end && mine & rflags::RF == 0 && other & rflags::RF != 0 {
            event.copy(ours, theirs, 2, rflags::RF);
        }
    }
}

/// RF in the RFLAGS that a fault leaves in the TSS of the task that it interrupts.
fn resume_flag_of_task(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let at = page::TSS + 0x20;
    if scenario.arena.mode != Mode::Long
        && scenario.topic == "exceptions"
        && word(ours, at) >> 32 & rflags::RF != 0
    {
        copy(ours, theirs, at, rflags::RF << 32);
    }
}

fn null_stack(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.arena.mode != Mode::Long {
        return;
    }
    for event in shared_events(scenario, ours, theirs) {
        let ist = word(ours, page::IDT + event.vector * 16) >> 32 & 7;
        let at = event.at + event::SS;
        let frame_cs = event.at + event::FRAME + if event.has_error() { 16 } else { 8 };
        let same_level = (word(ours, frame_cs) ^ word(ours, event.at + event::CS)) & 3 == 0;
        if ist != 0 && same_level && word(theirs, at) & 0xfffc == 0 {
            copy(ours, theirs, at, 0xffff);
        }
    }
}

fn upper_stack_pointer(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.arena.mode == Mode::Long {
        return;
    }
    for event in shared_events(scenario, ours, theirs) {
        if descriptor_of(ours, word(ours, event.at + event::SS) & 0xffff) >> 54 & 1 == 0 {
            copy(ours, theirs, event.at + event::REGISTERS + 32, 0xffff_0000);
        }
    }
}

fn stack_not_canonical(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.arena.mode != Mode::Long {
        return;
    }
    let count = event_count(ours).min(event_count(theirs)).min(event::MAX);
    for at in (0..count).map(|n| page::EVENTS + n * event::BYTES) {
        let vectors = (word(ours, at + event::VECTOR), word(theirs, at + event::VECTOR));
        let no_error = word(ours, at + event::FRAME) == 0;
        if vectors == (12, 13) && no_error {
            copy(ours, theirs, at + event::VECTOR, u64::MAX);
        }
    }
}
