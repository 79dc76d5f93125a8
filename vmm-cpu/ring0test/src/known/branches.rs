//! Near and far JMP and CALL, and task switches.

use super::Known;
use super::settle::*;
use crate::arena::Mode;
use crate::layout::*;
use crate::outcome::word;
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "near branch to an address that is not canonical",
        reason: "The branch faults (AMD64 APM 3, JMP: #GP); with QEMU 7.2 what is fetched there does",
        settle: branch_not_canonical,
    },
    Known {
        name: "TSS in the LDT",
        reason: "#GP(selector) (Intel SDM 2A, CALL, JMP); QEMU 7.2 raises #TS",
        settle: local_task,
    },
    Known {
        name: "limit of 64-bit code",
        reason: "It does not count (AMD64 APM 2 4.8.1); QEMU 7.2 looks at it in CALL from compatibility mode",
        settle: limit_of_long_code,
    },
    Known {
        name: "far CALL beyond the limit",
        reason: "#GP(0) before anything is pushed (AMD64 APM 3, CALL far); QEMU 7.2 pushes first, and has the selector in the \
                 error code",
        settle: call_beyond_limit,
    },
    Known {
        name: "call gate to conforming code",
        reason: "The privilege level, and so CS.RPL, stays (AMD64 APM 2 4.11); QEMU 7.2 puts the segment's DPL there",
        settle: conforming_gate,
    },
    Known {
        name: "gate to an address that is not canonical",
        reason: "#GP(0) of the branch or interrupt (AMD64 APM 3, CALL far, INT n); with QEMU 7.2 what is fetched there faults",
        settle: gate_not_canonical,
    },
];

fn branch_not_canonical(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::FRAME + 8;
        let code = interrupted(scenario, ours, &event).map_or(0, |offset| word(ours, offset) & 0xffff);
        // FF /4 with a register.
        let is_jump = code & 0xf8ff == 0xe0ff;
        if event.vector == 13 && is_jump && is_canonical(word(ours, at)) && !is_canonical(word(theirs, at)) {
            event.copy(ours, theirs, 1, u64::MAX);
        }
    }
}

fn local_task(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let at = page::EVENTS;
    let error = word(ours, at + event::FRAME) & 0xffff;
    let is_same = error == word(theirs, at + event::FRAME) & 0xffff && error & 4 != 0;
    let vectors = (word(ours, at + event::VECTOR), word(theirs, at + event::VECTOR));
    if scenario.topic == "transfers" && matches!(vectors, (13, 10 | 11)) && is_same {
        copy(ours, theirs, at + event::VECTOR, u64::MAX);
    }
}

/// QEMU faults at a CALL that, with us, arrives or faults at what it pushes.
fn limit_of_long_code(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let error = word(theirs, page::EVENTS + event::FRAME) & 0xffff;
    let is_beyond = |target: &Target| {
        target.is_long() && target.offset > target.limit() && target.selector & 0xfffc == error
    };
    let is_long = scenario.arena.mode == Mode::Long && scenario.topic == "transfers";
    let in_their_way = word(theirs, page::EVENTS) == 13 && word(ours, page::EVENTS) != 13;
    let frame = |n: u64| word(ours, page::EVENTS + event::FRAME + 8 * n);
    let arrives = |target: &Target| {
        (0..2).any(|n| frame(n).wrapping_sub(target.offset) < 16 && frame(n + 1) & 0xfffc == error)
    };
    if is_long
        && in_their_way
        && targets(scenario, ours).iter().any(|target| is_beyond(target) && arrives(target))
    {
        theirs.copy_from_slice(ours);
    }
}

fn call_beyond_limit(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let error = word(theirs, page::EVENTS + event::FRAME) & 0xffff;
    let pointer = word(ours, page::DATA_2);
    let selectors = [pointer >> 16 & 0xfffc, pointer >> 32 & 0xfffc];
    if scenario.topic == "transfers" && word(theirs, page::EVENTS) == 13 && selectors.contains(&error) {
        let is_call = |code: u64| code & 0xffff == 0x1bff;
        settle_fault(scenario, ours, theirs, 13, is_call, |_| true);
    }
}

fn conforming_gate(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.topic != "transfers" {
        return;
    }
    let level = word(ours, header::FRAME_64 + 8) & 3;
    for event in shared_events(scenario, ours, theirs) {
        let n = if event.has_error() { 2 } else { 1 };
        let at = event.at + event::FRAME + 8 * n;
        let (mine, other) = (word(ours, at), word(theirs, at));
        let is_conforming = matches!(mine & 0xfffc, 0x70 | 0x78);
        if is_conforming && mine & 3 == level && mine ^ other == level {
            event.copy(ours, theirs, n, 3);
        }
    }
}

fn gate_not_canonical(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let rip = word(theirs, page::EVENTS + event::FRAME + 8);
    if scenario.arena.mode == Mode::Long
        && matches!(scenario.topic, "transfers" | "exceptions")
        && !is_canonical(rip)
    {
        let is_interrupt = |code: u64| matches!(code & 0xff, 0xcd | 0xcc);
        settle_fault(scenario, ours, theirs, 13, |code| is_branch(code) || is_interrupt(code), |_| true);
    }
}
