//! Descriptors, and the registers that hold them.

use super::Known;
use super::settle::*;
use crate::arena::{Mode, entry};
use crate::layout::*;
use crate::outcome::word;
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "LTR of a null selector",
        reason: "#GP(0) (AMD64 APM 3, LTR); QEMU 7.2 loads it",
        settle: null_task,
    },
    Known {
        name: "null SS of another level",
        reason: "64-bit code at levels 0 to 2 may load a null selector whose RPL is its level (Intel SDM 2B, MOV; the AMD64 APM \
                 does not say); QEMU 7.2 takes any RPL",
        settle: null_stack_level,
    },
    Known {
        name: "LAR and LSL of what long mode does not have",
        reason: "16-bit and task-switching system types have neither rights nor limit in long mode (AMD64 APM 3, LAR, LSL); \
                 QEMU 7.2 gives both in any mode",
        settle: legacy_types,
    },
    Known {
        name: "limit in the rights of LAR",
        reason: "Bits 19 to 16 of what LAR gives are undefined (Intel SDM 2A, LAR; 00FxFF00h). AMD's processors put those of the \
                 limit there, as difftest has seen; QEMU 7.2 puts 0",
        settle: limit_in_rights,
    },
    Known {
        name: "accessed bit of CS and SS",
        reason: "Far branches, returns and deliveries mark the descriptors that they load (AMD64 APM 2 4.7.1); QEMU 7.2 marks \
                 those of MOV, POP and LDS and the like alone",
        settle: accessed_descriptors,
    },
    Known {
        name: "code that asks for 64 and 32 bits",
        reason: "L and D together are reserved in long mode: #GP (AMD64 APM 2 4.8.1, Intel SDM 3A 3.4.5); QEMU 7.2 takes them",
        settle: both_sizes,
    },
    Known {
        name: "upper half of LDT and TSS",
        reason: "Its type field must be zero and the base canonical (AMD64 APM 2 4.8.3, APM 3, LLDT, LTR); QEMU 7.2 checks neither \
                 with LLDT",
        settle: upper_half,
    },
    Known {
        name: "RPL of null selectors after a return",
        reason: "A register that holds a null selector has no descriptor that could be too privileged, so it stays (AMD64 APM 3, \
                 RETF, IRET); QEMU 7.2 clears it, RPL included",
        settle: null_levels,
    },
];

fn null_task(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    // 0F 00 /3.
    settle_fault(scenario, ours, theirs, 13, |code| code & 0xf8_ffff == 0xd8_000f, |ax| ax & 0xfffc == 0);
}

fn null_stack_level(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.arena.mode == Mode::Long {
        let is_load = |code| code & 0xffff == 0xd08e || code & 0xff_ffff == 0x0b_b20f;
        settle_fault(scenario, ours, theirs, 13, is_load, |ax| ax & 0xfffc == 0 && ax & 3 != 0);
    }
}

fn legacy_types(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const NOTHING: u64 = 0x5555_5555;
    const ZF: u64 = 1 << 6;
    if scenario.arena.mode != Mode::Long || scenario.topic != "segments" {
        return;
    }
    for event in shared_events(scenario, ours, theirs) {
        for register in [1, 6, 7] {
            let at = event.at + event::REGISTERS + 8 * register;
            let theirs_there = word(theirs, at);
            let is_rights =
                matches!(theirs_there >> 8 & 0x1f, 1 | 3 | 4 | 5) && theirs_there & !0xf0_ff00 == 0;
            // Only the TSS of 16 bits has this limit, see `Setup::descriptors`.
            let is_limit = matches!(theirs_there, 0x2b | 0x2_bfff);
            if word(ours, at) == NOTHING && (is_rights || is_limit) {
                copy(ours, theirs, at, u64::MAX);
                // What SETZ made of ZF, here or later, and ZF itself.
                copy(ours, theirs, event.at + event::REGISTERS + 16, 0x101);
                let flags = if event.has_error() { 3 } else { 2 };
                event.copy(ours, theirs, flags, ZF);
            }
        }
    }
}

fn limit_in_rights(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const LIMIT: u64 = 0xf_0000;
    if scenario.topic != "segments" {
        return;
    }
    for event in shared_events(scenario, ours, theirs) {
        for register in [1, 6, 7] {
            let at = event.at + event::REGISTERS + 8 * register;
            let rights = word(ours, at);
            if rights & !0xff_ff00 == 0 && word(theirs, at) == rights & !LIMIT {
                copy(ours, theirs, at, LIMIT);
            }
        }
    }
}

/// Descriptors whose accessed bit is set on our side alone: those that something other than a load of a data segment
/// register used.
fn accessed_descriptors(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const ACCESSED: u64 = 1 << 40;
    let arena = &scenario.arena;
    for table in [page::GDT, page::LDT] {
        for at in (0..PAGE / 8).map(|n| table + 8 * n) {
            let (mine, other) = (word(ours, at), word(theirs, at));
            let is_code = mine >> 43 & 3 == 3;
            let is_data = mine >> 43 & 3 == 2 && scenario.topic != "segments";
            if (is_code || is_data) && mine ^ other == ACCESSED && mine & ACCESSED != 0 {
                copy(ours, theirs, at, ACCESSED);
                // The page of the table became dirty with it.
                if arena.mode.is_paged() {
                    let bytes = arena.mode.entry_bytes();
                    let entry = page::TABLE + arena.at(table) / PAGE % (PAGE / bytes) * bytes;
                    copy(ours, theirs, entry & !7, entry::D << (entry % 8 * 8));
                }
            }
        }
    }
}

fn both_sizes(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let error = word(ours, page::EVENTS + event::FRAME) & 0xffff;
    let is_both = |target: &Target| target.is_long() && target.is_big() && target.selector & 0xfffc == error;
    let is_far = |code| is_branch(code) || is_return(code);
    if scenario.arena.mode == Mode::Long && targets(scenario, ours).iter().any(is_both) {
        settle_error(scenario, ours, theirs, (13, error), is_far, |_| true);
    }
}

fn upper_half(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let selector = word(ours, page::EVENTS + event::REGISTERS) & 0xffff;
    let upper = descriptor_of(ours, selector + 8);
    let lower = descriptor_of(ours, selector);
    let is_spoilt = upper >> 40 & 0x1f != 0 || !is_canonical(upper << 32 | lower >> 16 & 0xff_ffff);
    if scenario.arena.mode == Mode::Long && is_spoilt {
        let is_load = |code| matches!(code & 0xf8_ffff, 0xd0_000f | 0xd8_000f);
        settle_error(scenario, ours, theirs, (13, selector & 0xfffc), is_load, |_| true);
    }
}

fn null_levels(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        for field in [event::DS, event::ES, event::FS, event::GS] {
            let at = event.at + field;
            if word(ours, at) & 0xfffc == 0 && word(theirs, at) & 0xfffc == 0 {
                copy(ours, theirs, at, 3);
            }
        }
    }
}
