//! The registers of the x87 unit: the stack, tags, and the view of them that MMX has.

use super::super::float::environment::{ALL_EXCEPTIONS, Environment, INVALID};
use super::f80::F80;

/// Status word: stack fault.
const STACK_FAULT: u16 = 1 << 6;
/// Status word: an unmasked exception is pending (ES), and its 8087-compatible copy (B).
const SUMMARY: u16 = 1 << 7 | 1 << 15;
pub(super) const C0: u16 = 1 << 8;
pub(super) const C1: u16 = 1 << 9;
pub(super) const C2: u16 = 1 << 10;
pub(super) const C3: u16 = 1 << 14;
const TOP_SHIFT: u32 = 11;
const TOP: u16 = 7 << TOP_SHIFT;

/// Bits of the control word that can be written; bit 6 reads as one.
const CONTROL_WRITABLE: u16 = 0x1f3f;
const CONTROL_ONES: u16 = 0x0040;

/// The x87 unit. [`Default`] is the state after FNINIT with all registers zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct X87State {
    /// R0 to R7, not turned by TOP; MMX registers are their significands.
    pub(crate) registers: [F80; 8],
    /// Last instruction: offset.
    pub(crate) instruction_pointer: u64,
    /// Last memory operand: offset.
    pub(crate) data_pointer: u64,
    /// Last instruction: code segment selector.
    pub(crate) code_selector: u16,
    /// Last memory operand: segment selector.
    pub(crate) data_selector: u16,
    /// Last instruction: the low three bits of the first opcode byte, and the second.
    pub(crate) opcode: u16,
    pub(super) control: u16,
    pub(super) status: u16,
    /// A set bit: the register holds something (the abridged tag word of FXSAVE).
    pub(super) tags: u8,
}

impl Default for X87State {
    fn default() -> Self {
        Self {
            registers: [F80::default(); 8],
            instruction_pointer: 0,
            data_pointer: 0,
            code_selector: 0,
            data_selector: 0,
            opcode: 0,
            control: 0x037f,
            status: 0,
            tags: 0,
        }
    }
}

impl X87State {
    /// FNINIT: the registers keep their contents, which their tags call empty.
    pub(crate) fn initialize(&mut self) {
        *self = Self { registers: self.registers, ..Self::default() };
    }

    /// The control word.
    pub(crate) fn control(&self) -> u16 {
        self.control
    }

    /// Loads the control word; reserved bits are ignored. An exception flag that it unmasks becomes pending.
    pub(crate) fn set_control(&mut self, control: u16) {
        self.control = control & CONTROL_WRITABLE | CONTROL_ONES;
        self.update_summary();
    }

    /// The status word, TOP included.
    pub(crate) fn status(&self) -> u16 {
        self.status
    }

    /// Loads the status word. The summary bits follow from the flags and the control word.
    pub(crate) fn set_status(&mut self, status: u16) {
        self.status = status;
        self.update_summary();
    }

    /// The abridged tag word: a set bit for each register R0 to R7 that is not empty.
    pub(crate) fn tags(&self) -> u8 {
        self.tags
    }

    /// Loads the abridged tag word.
    pub(crate) fn set_tags(&mut self, tags: u8) {
        self.tags = tags;
    }

    /// An unmasked exception is pending.
    pub(crate) fn is_pending(&self) -> bool {
        self.status & SUMMARY != 0
    }

    /// FNCLEX: no exception, no stack fault, nothing pending.
    pub(crate) fn clear_exceptions(&mut self) {
        self.status &= !(0x3f | STACK_FAULT | SUMMARY);
    }

    fn update_summary(&mut self) {
        self.status &= !SUMMARY;
        if self.status & !self.control & 0x3f != 0 {
            self.status |= SUMMARY;
        }
    }

    /// Sets exception flags.
    pub(super) fn raise(&mut self, exceptions: u32) {
        self.status |= (exceptions & ALL_EXCEPTIONS) as u16;
        self.update_summary();
    }

    /// Notes a stack fault: an overflow or an underflow. Whether the instruction goes on with an
    /// indefinite value.
    pub(super) fn stack_fault(&mut self, overflow: bool) -> bool {
        self.status |= STACK_FAULT;
        self.set_condition(C1, if overflow { C1 } else { 0 });
        self.raise(INVALID);
        u32::from(self.control) & INVALID != 0
    }

    /// Notes the exceptions of an operation. Whether its result is to be stored in a register.
    pub(super) fn complete(&mut self, environment: &Environment) -> bool {
        self.set_condition(C1, 0);
        self.raise(environment.pre);
        if environment.stops_before() {
            return false;
        }
        self.set_condition(C1, if environment.up { C1 } else { 0 });
        self.raise(environment.post);
        true
    }

    /// Replaces the condition codes in `mask`.
    pub(super) fn set_condition(&mut self, mask: u16, value: u16) {
        self.status = self.status & !mask | value & mask;
    }

    /// The register number of the top of the stack.
    pub(crate) fn top(&self) -> u8 {
        (self.status >> TOP_SHIFT & 7) as u8
    }

    /// Turns the stack by `by` registers; 1 is a pop.
    pub(super) fn turn(&mut self, by: u8) {
        let top = u16::from(self.top().wrapping_add(by) & 7);
        self.status = self.status & !TOP | top << TOP_SHIFT;
    }

    fn number(&self, st: u8) -> u8 {
        self.top().wrapping_add(st) & 7
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to three bits")]
    fn register_mut(&mut self, number: u8) -> &mut F80 {
        &mut self.registers[usize::from(number & 7)]
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to three bits")]
    fn register(&self, number: u8) -> F80 {
        self.registers[usize::from(number & 7)]
    }

    /// ST(i), whatever its tag says; `st` counts modulo 8.
    pub(crate) fn st(&self, st: u8) -> F80 {
        self.register(self.number(st))
    }

    pub(super) fn is_empty(&self, st: u8) -> bool {
        self.tags >> self.number(st) & 1 == 0
    }

    /// Sets ST(i) and tags it as not empty.
    pub(super) fn set_st(&mut self, st: u8, value: F80) {
        let number = self.number(st);
        *self.register_mut(number) = value;
        self.tags |= 1 << number;
    }

    /// Sets ST(i) and leaves its tag alone.
    pub(super) fn set_st_untagged(&mut self, st: u8, value: F80) {
        let number = self.number(st);
        *self.register_mut(number) = value;
    }

    pub(super) fn free(&mut self, st: u8) {
        self.tags &= !(1 << self.number(st));
    }

    pub(super) fn push(&mut self, value: F80) {
        self.turn(7);
        self.set_st(0, value);
    }

    pub(super) fn pop(&mut self) {
        self.free(0);
        self.turn(1);
    }

    /// MMX register `index` (modulo 8).
    pub(crate) fn mm(&self, index: u8) -> u64 {
        self.register(index).significand
    }

    /// Writes MMX register `index` (modulo 8): its exponent becomes all ones. To be preceded by
    /// [`enter_mmx`](Self::enter_mmx), as every MMX instruction but EMMS is.
    pub(crate) fn set_mm(&mut self, index: u8, value: u64) {
        *self.register_mut(index) = F80 { significand: value, sign_exponent: 0xffff };
    }

    /// What every MMX instruction but EMMS does to the x87 unit: TOP is 0, no register empty (Intel SDM 1
    /// 9.5.1).
    pub(crate) fn enter_mmx(&mut self) {
        self.status &= !TOP;
        self.tags = 0xff;
    }

    /// EMMS: TOP is 0, all registers are empty (Intel SDM 3A 13.2).
    pub(crate) fn emms(&mut self) {
        self.status &= !TOP;
        self.tags = 0;
    }
}
