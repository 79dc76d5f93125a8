//! What settlers share.

use crate::arena::Mode;
use crate::layout::*;
use crate::outcome::{event_count, word};
use crate::topics::Scenario;

/// Replaces bits of a word of QEMU's side by ours.
pub(super) fn copy(ours: &[u8], theirs: &mut [u8], offset: u64, mask: u64) {
    let value = word(theirs, offset) & !mask | word(ours, offset) & mask;
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(field) = at.checked_add(8).and_then(|end| theirs.get_mut(at..end)) {
        field.copy_from_slice(&value.to_le_bytes());
    }
}

/// An event that both sides have.
pub(super) struct Event {
    /// Its offset.
    pub(super) at: u64,
    pub(super) vector: u64,
    /// Offset of the top of the handler's stack, if that is in the arena.
    pub(super) stack: Option<u64>,
    /// Bytes of a word of its frame.
    pub(super) bytes: u64,
}

pub(super) fn shared_events(scenario: &Scenario, ours: &[u8], theirs: &[u8]) -> Vec<Event> {
    let arena = &scenario.arena;
    let count = event_count(ours).min(event_count(theirs)).min(event::MAX);
    let bytes = |vector: u64| match arena.mode {
        Mode::Long => 8,
        // The widths of gates.
        _ if word(ours, page::IDT + 8 * vector) >> 43 & 1 == 0 => 2,
        _ => 4,
    };
    (0..count)
        .map(|n| {
            let at = page::EVENTS + n * event::BYTES;
            let rsp = word(ours, at + event::REGISTERS + 32);
            let ss = word(ours, at + event::SS) & 0xfff8;
            let is_16 = ss == u64::from(selector::DATA_16);
            let stack = if is_16 { Some(rsp & 0xffff) } else { rsp.checked_sub(arena.base) };
            let stack = stack.filter(|stack| *stack < ARENA - 64);
            let vector = word(ours, at + event::VECTOR) & 0xff;
            Event { at, vector, stack, bytes: bytes(vector) }
        })
        .filter(|event| event.vector == word(theirs, event.at + event::VECTOR))
        .collect()
}

impl Event {
    pub(super) fn has_error(&self) -> bool {
        matches!(self.vector, 8 | 10..=14 | 17)
    }

    /// Settles bits of the frame's word `n`, in the event and on the handler's stack.
    pub(super) fn copy(&self, ours: &[u8], theirs: &mut [u8], n: u64, mask: u64) {
        copy(ours, theirs, self.at + event::FRAME + 8 * n, mask);
        if let Some(stack) = self.stack {
            copy(ours, theirs, stack + self.bytes * n, mask);
        }
    }
}

/// The offset in the arena of the instruction that an event's frame points to.
pub(super) fn interrupted(scenario: &Scenario, bytes: &[u8], event: &Event) -> Option<u64> {
    let rip = word(bytes, event.at + event::FRAME + if event.has_error() { 8 } else { 0 });
    let (base, offset) = (scenario.arena.base, rip & 0xffff_ffff);
    [offset.checked_sub(base), Some(offset)].into_iter().flatten().find(|offset| *offset < ARENA - 16)
}

pub(super) fn is_canonical(va: u64) -> bool {
    (va.cast_signed() << 16 >> 16).cast_unsigned() == va
}

/// An instruction without its prefixes for sizes.
pub(super) fn without_prefixes(code: u64) -> u64 {
    if matches!(code & 0xff, 0x66 | 0x67 | 0x48) { without_prefixes(code >> 8) } else { code }
}

/// [`settle_error`] with error code 0.
pub(super) fn settle_fault(
    scenario: &Scenario,
    ours: &[u8],
    theirs: &mut [u8],
    vector: u64,
    is_instruction: impl Fn(u64) -> bool,
    is_operand: impl Fn(u64) -> bool,
) {
    settle_error(scenario, ours, theirs, (vector, 0), is_instruction, is_operand);
}

/// Settles all of QEMU's side if our only event is a fault with that vector and error code of such an instruction, RAX
/// being such.
pub(super) fn settle_error(
    scenario: &Scenario,
    ours: &[u8],
    theirs: &mut [u8],
    (vector, error): (u64, u64),
    is_instruction: impl Fn(u64) -> bool,
    is_operand: impl Fn(u64) -> bool,
) {
    let at = page::EVENTS;
    let bytes = if scenario.arena.mode == Mode::Long { 8 } else { 4 };
    let event = Event { at, vector, stack: None, bytes };
    let code = interrupted(scenario, ours, &event).map_or(0, |offset| word(ours, offset));
    let code = without_prefixes(code);
    let is_fault = event_count(ours) == 1
        && word(ours, at + event::VECTOR) == vector
        && word(ours, at + event::FRAME) & 0xffff == error;
    if is_fault && is_instruction(code) && is_operand(word(ours, at + event::REGISTERS)) {
        theirs.copy_from_slice(ours);
    }
}

/// A descriptor as it was at the end, and what it says.
pub(super) struct Target {
    pub(super) selector: u64,
    pub(super) offset: u64,
    pub(super) raw: u64,
}

impl Target {
    pub(super) fn is_code(&self) -> bool {
        self.raw >> 43 & 3 == 3
    }

    pub(super) fn limit(&self) -> u64 {
        let limit = self.raw & 0xffff | self.raw >> 32 & 0xf_0000;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    pub(super) fn is_long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }

    pub(super) fn is_big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }
}

/// The descriptor of a selector.
pub(super) fn descriptor_of(bytes: &[u8], selector: u64) -> u64 {
    let table = if selector & 4 == 0 { page::GDT } else { page::LDT };
    word(bytes, table + (selector & 0xff8))
}

/// Where the far branch or return of the scenario may lead.
pub(super) fn targets(scenario: &Scenario, bytes: &[u8]) -> Vec<Target> {
    let pointer = page::DATA_2;
    let mut pairs = vec![
        (word(bytes, pointer + 4), word(bytes, pointer) & 0xffff_ffff),
        (word(bytes, pointer + 2), word(bytes, pointer) & 0xffff),
    ];
    if let Some(top) = word(bytes, header::FRAME_64 + 24).checked_sub(scenario.arena.base) {
        for size in [2, 4, 8] {
            let mask = if size == 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
            pairs.push((word(bytes, top + size), word(bytes, top) & mask));
        }
    }
    let target = |(selector, offset)| {
        let selector = selector & 0xffff;
        Target { selector, offset, raw: descriptor_of(bytes, selector) }
    };
    pairs.into_iter().map(target).filter(Target::is_code).collect()
}

/// Far JMP and CALL, through a pointer at EBX.
pub(super) fn is_branch(code: u64) -> bool {
    matches!(code & 0xffff, 0x1bff | 0x2bff)
}

/// IRET or far RET.
pub(super) fn is_return(code: u64) -> bool {
    matches!(code & 0xff, 0xcf | 0xcb | 0xca)
}
