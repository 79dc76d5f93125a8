//! Far RET and IRET.

use super::Known;
use super::settle::*;
use crate::arena::{Mode, rflags};
use crate::layout::*;
use crate::outcome::{start, word};
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "order of checks in far returns",
        reason: "The offset is compared with the limit of CS before SS is loaded (AMD64 APM 3, RETF, IRET); QEMU 7.2 looks at \
                 SS first",
        settle: target_before_stack,
    },
    Known {
        name: "null SS for compatibility mode",
        reason: "A return may leave SS null where it leads to 64-bit code (AMD64 APM 3, IRET, RETF); QEMU 7.2 allows it for all \
                 code of long mode, and any RPL",
        settle: null_returned_stack,
    },
    Known {
        name: "SS that is not present",
        reason: "#SS(selector) (AMD64 APM 3, RETF, IRET, Intel SDM 2A, IRET); QEMU 7.2 raises #NP",
        settle: stack_not_present,
    },
    Known {
        name: "return beyond the limit",
        reason: "#GP(0), and where the address is not canonical (AMD64 APM 3, RETF, IRET); QEMU 7.2 looks at neither",
        settle: return_beyond_limit,
    },
    Known {
        name: "offset of virtual-8086 code",
        reason: "#GP(0) beyond 64 KiB (Intel SDM 2A, IRET); QEMU 7.2 cuts it",
        settle: virtual_offset,
    },
    Known {
        name: "IRET to virtual-8086 mode from outer levels",
        reason: "VM in the image counts at level 0 alone (AMD64 APM 3, IRET); QEMU 7.2 does not look at the level",
        settle: virtual_from_outer,
    },
];

/// What the scenario's return pops, as it was at the start.
struct Image {
    target: Target,
    flags: u64,
    stack: u64,
}

impl Image {
    fn is_64_bit(&self, scenario: &Scenario) -> bool {
        scenario.arena.mode == Mode::Long && self.target.is_long()
    }

    fn is_beyond(&self, scenario: &Scenario) -> bool {
        let offset = self.target.offset;
        if self.is_64_bit(scenario) { !is_canonical(offset) } else { offset > self.target.limit() }
    }
}

/// What the return that is the instruction at `code` pops.
fn image(scenario: &Scenario, ours: &[u8], code: u64) -> Option<Image> {
    let arena = &scenario.arena;
    let instruction = word(ours, code);
    let opcode = without_prefixes(instruction);
    if !matches!(scenario.topic, "returns" | "transfers") || !is_return(opcode) {
        return None;
    }
    let (bits, _) = start(ours);
    let bytes = match (instruction & 0xff, bits) {
        (0x48, 64) => 8,
        (0x66, 16) => 4,
        (0x66, _) | (_, 16) => 2,
        _ => 4,
    };
    let top = word(ours, header::FRAME_64 + 24).checked_sub(arena.base)?;
    let popped = |n| arena.get(top + bytes * n, bytes);
    let (flags, stack) = match opcode & 0xff {
        0xcf => (popped(2), popped(4)),
        0xca => (0, arena.get(top + 3 * bytes + (opcode >> 8 & 0xffff), bytes)),
        _ => (0, popped(3)),
    };
    let selector = popped(1) & 0xffff;
    let target = Target { selector, offset: popped(0), raw: descriptor_of(ours, selector) };
    Some(Image { target, flags, stack: stack & 0xffff })
}

/// What the return that our first event interrupts pops.
fn faulting_image(scenario: &Scenario, ours: &[u8], event: &Event) -> Option<Image> {
    image(scenario, ours, interrupted(scenario, ours, event)?)
}

fn target_before_stack(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let Some(image) = faulting_image(scenario, ours, &event) else { continue };
        let at = event.at + event::FRAME;
        let (mine, other) = (word(ours, at) & 0xffff, word(theirs, at) & 0xffff);
        if event.vector == 13 && mine == 0 && other == image.stack & !3 && image.is_beyond(scenario) {
            event.copy(ours, theirs, 0, 0xffff);
        }
    }
}

fn null_returned_stack(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let event = Event { at: page::EVENTS, vector: 13, stack: None, bytes: 8 };
    let Some(image) = faulting_image(scenario, ours, &event) else { return };
    let level = image.target.selector & 3;
    let may_be_null = image.is_64_bit(scenario) && level < 3 && image.stack & 3 == level;
    if scenario.arena.mode == Mode::Long && image.stack & 0xfffc == 0 && !may_be_null {
        settle_fault(scenario, ours, theirs, 13, is_return, |_| true);
    }
}

fn stack_not_present(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let at = page::EVENTS;
    let event = Event { at, vector: 12, stack: None, bytes: 8 };
    let Some(image) = faulting_image(scenario, ours, &event) else { return };
    let vectors = (word(ours, at + event::VECTOR), word(theirs, at + event::VECTOR));
    let errors = [ours, theirs].map(|bytes| word(bytes, at + event::FRAME) & 0xffff);
    let is_present = descriptor_of(ours, image.stack) >> 47 & 1 != 0;
    if vectors == (12, 11) && errors == [image.stack & !3; 2] && !is_present {
        copy(ours, theirs, at + event::VECTOR, u64::MAX);
    }
}

fn return_beyond_limit(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let event = Event { at: page::EVENTS, vector: 13, stack: None, bytes: 8 };
    let image = faulting_image(scenario, ours, &event);
    if image.is_some_and(|image| image.is_beyond(scenario)) {
        settle_fault(scenario, ours, theirs, 13, is_return, |_| true);
    }
}

fn virtual_offset(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let top = word(ours, header::FRAME_64 + 24).wrapping_sub(scenario.arena.base);
    let (offset, flags) = (word(ours, top) & 0xffff_ffff, word(ours, top + 8));
    if scenario.arena.mode != Mode::Long
        && scenario.topic == "returns"
        && flags & rflags::VM != 0
        && offset > 0xffff
    {
        settle_fault(scenario, ours, theirs, 13, |code| code & 0xff == 0xcf, |_| true);
    }
}

/// QEMU arrives in virtual-8086 mode, where ours faults at the IRET or arrives where the image says.
fn virtual_from_outer(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let starts_outer = word(ours, header::FRAME_64 + 8) & 3 != 0;
    let Some(image) = image(scenario, ours, page::CODE) else { return };
    if scenario.arena.mode == Mode::Long || !starts_outer || image.flags & rflags::VM == 0 {
        return;
    }
    let frame = |bytes: &[u8], n: u64| word(bytes, page::EVENTS + event::FRAME + 8 * n) & 0xffff_ffff;
    let has_vm = |bytes: &[u8]| (2..4).any(|n| frame(bytes, n) & rflags::VM != 0);
    let iret = start(ours).1;
    let is_ours = (0..2).any(|n| {
        let (rip, cs) = (frame(ours, n), frame(ours, n + 1) & 0xffff);
        rip == iret || cs == image.target.selector && rip.wrapping_sub(image.target.offset) < 16
    });
    if is_ours && !has_vm(ours) && has_vm(theirs) {
        theirs.copy_from_slice(ours);
    }
}
