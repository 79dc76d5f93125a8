//! System registers, SYSCALL and SYSENTER.

use super::Known;
use super::settle::*;
use crate::arena::{Mode, rflags};
use crate::layout::*;
use crate::outcome::{event_count, word};
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "values that a register cannot hold",
        reason: "Addresses that are not canonical, memory types that do not exist and bits 63 to 32 of TSC_AUX are #GP(0) \
                 (AMD64 APM 2 3.2, 7.8.1, APM 3 WRMSR, WRFSBASE); QEMU 7.2 takes them",
        settle: refused_values,
    },
    Known {
        name: "SGDT and SIDT in part",
        reason: "Nothing is stored if all of it cannot be; QEMU 7.2 has stored the limit before the base faults",
        settle: table_stored_in_part,
    },
    Known {
        name: "status flags after SYSCALL",
        reason: "The flags that SFMASK does not have stay (AMD64 APM 3, SYSCALL); QEMU 7.2 loses the status flags in long mode",
        settle: system_call_flags,
    },
    Known {
        name: "SYSENTER and SYSEXIT in compatibility mode",
        reason: "#UD in all of long mode (AMD64 APM 3, SYSENTER, SYSEXIT); with QEMU 7.2 in 64-bit mode alone",
        settle: fast_call_in_long_mode,
    },
    Known {
        name: "VM after SYSRET",
        reason: "SYSRET clears VM and RF (AMD64 APM 3, SYSRET, Intel SDM 2B, SYSRET); QEMU 7.2 loads them from R11",
        settle: system_return_flags,
    },
    Known {
        name: "null selector of SYSENTER",
        reason: "#GP(0) if bits 15 to 2 of SYSENTER_CS are 0 (AMD64 APM 3, SYSENTER, Intel SDM 2B); QEMU 7.2 looks at all bits",
        settle: fast_call_without_selector,
    },
];

/// Whether no such register can hold such a value.
fn is_refused(msr: u64, value: u64) -> bool {
    match msr {
        0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102 | 0x175 | 0x176 => !is_canonical(value),
        0xc000_0103 => value >> 32 != 0,
        0x277 => value.to_le_bytes().into_iter().any(|kind| !matches!(kind, 0 | 1 | 4..=7)),
        _ => false,
    }
}

fn refused_values(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let register = |n: u64| word(ours, page::EVENTS + event::REGISTERS + 8 * n);
    let written = register(2) << 32 | register(0) & 0xffff_ffff;
    if is_refused(register(1) & 0xffff_ffff, written) {
        // WRMSR.
        settle_fault(scenario, ours, theirs, 13, |code| code & 0xffff == 0x300f, |_| true);
    }
    if !is_canonical(register(3)) {
        // WRFSBASE, WRGSBASE of RBX.
        settle_fault(scenario, ours, theirs, 13, |code| code & 0xff == 0xf3, |_| true);
    }
}

fn table_stored_in_part(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let code = interrupted(scenario, ours, &event).map_or(0, |offset| word(ours, offset));
        if event.vector == 14 && matches!(without_prefixes(code) & 0xff_ffff, 0x03_010f | 0x0b_010f) {
            copy(ours, theirs, page::FRAME_A + PAGE - 8, u64::MAX);
            copy(ours, theirs, page::FRAME_A + PAGE - 16, u64::MAX);
        }
    }
}

fn system_call_flags(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.topic != "calls" || scenario.arena.mode != Mode::Long {
        return;
    }
    let code = word(ours, page::CODE);
    let kept = rflags::STATUS & !word(ours, header::FMASK);
    for event in shared_events(scenario, ours, theirs) {
        let n = if event.has_error() { 3 } else { 2 };
        let at = event.at + event::FRAME + 8 * n;
        let lost = word(ours, at) & rflags::STATUS & !kept == 0 && word(theirs, at) & rflags::STATUS == 0;
        if code & 0xffff == 0x050f && lost {
            event.copy(ours, theirs, n, rflags::STATUS);
        }
    }
}

fn fast_call_in_long_mode(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let at = page::EVENTS;
    let event = Event { at, vector: 6, stack: None, bytes: 8 };
    let code = interrupted(scenario, ours, &event).map_or(0, |offset| word(ours, offset) & 0xffff);
    if scenario.topic == "calls"
        && scenario.arena.mode == Mode::Long
        && event_count(ours) == 1
        && word(ours, at + event::VECTOR) == 6
        && matches!(code, 0x340f | 0x350f)
    {
        theirs.copy_from_slice(ours);
    }
}

fn system_return_flags(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let code = without_prefixes(word(ours, page::CODE));
    let taken = word(ours, header::REGISTERS + 8 * 11) & (rflags::VM | rflags::RF);
    if scenario.topic != "calls" || scenario.arena.mode != Mode::Long || code & 0xffff != 0x070f {
        return;
    }
    for event in shared_events(scenario, ours, theirs) {
        let n = if event.has_error() { 3 } else { 2 };
        let at = event.at + event::FRAME + 8 * n;
        // With RF only where this is no fault's.
        let clear = taken & !word(ours, at);
        if word(theirs, at) & clear == clear {
            event.copy(ours, theirs, n, clear);
        }
    }
}

fn fast_call_without_selector(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let selector = word(ours, header::SYSENTER_CS) & 0xffff;
    if scenario.topic == "calls" && matches!(selector, 1..=3) {
        settle_fault(scenario, ours, theirs, 13, |code| matches!(code & 0xffff, 0x340f | 0x350f), |_| true);
    }
}
