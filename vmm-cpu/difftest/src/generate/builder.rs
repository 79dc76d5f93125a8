//! What is decided about a case while its instructions are chosen: the values that registers and memory must have at
//! its beginning for the instructions to find what they are meant to find.

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, Register};

use super::Random;
use super::layout::Destination;
use super::values;
use crate::case::{Area, CODE, DATA, HIGH, Mode, READ_ONLY, STACK};

pub(super) const RAX: usize = 0;
pub(super) const RCX: usize = 1;
pub(super) const RDX: usize = 2;
pub(super) const RBX: usize = 3;
pub(super) const RSP: usize = 4;
pub(super) const RBP: usize = 5;
pub(super) const RSI: usize = 6;
pub(super) const RDI: usize = 7;

/// Somewhere that holds the address of an instruction, which is known only when all of them are placed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pointer {
    /// A general register.
    Register(usize),
    /// The first bytes of one of [`Builder::memory`]: 4 or 8.
    Memory(usize, u8),
    /// The operand of the branch itself.
    Operand,
}

/// A case in the making.
pub(super) struct Builder<'r> {
    pub(super) random: &'r mut Random,
    pub(super) mode: Mode,
    /// Bases of FS and GS.
    pub(super) bases: [u64; 2],
    /// RFLAGS.DF at the beginning.
    pub(super) backward: bool,
    /// Bytes over the pattern that memory holds.
    pub(super) memory: Vec<(u64, Vec<u8>)>,
    /// Where each of them points: of the instruction that is being made.
    pub(super) pointers: Vec<(Pointer, Destination)>,
    /// Whether operands may lie in the code itself.
    pub(super) reads_code: bool,
    values: [Option<u64>; 16],
    /// Registers that an instruction before the one that is being made writes.
    changed: u16,
    /// Registers with the address of an instruction.
    pointing: u16,
    /// A few values that come more than once, so that operands are equal sometimes.
    palette: [u64; 3],
    info: InstructionInfoFactory,
}

impl<'r> Builder<'r> {
    pub(super) fn new(random: &'r mut Random, mode: Mode) -> Self {
        let palette = [0; 3].map(|_: u64| {
            let width = values::width(random);
            values::integer(random, width)
        });
        let mut builder = Self {
            random,
            mode,
            bases: [0; 2],
            backward: false,
            memory: Vec::new(),
            pointers: Vec::new(),
            reads_code: true,
            values: [None; 16],
            changed: 0,
            pointing: 0,
            palette,
            info: InstructionInfoFactory::new(),
        };
        if mode == Mode::Long {
            builder.bases = [builder.base(), builder.base()];
        }
        let stack = builder.stack();
        builder.fix(RSP, stack);
        builder
    }

    /// True in one of `n` cases.
    pub(super) fn one_in(&mut self, n: u32) -> bool {
        self.random.u32(..n) == 0
    }

    /// One of these.
    pub(super) fn pick<T: Copy>(&mut self, from: &[T], or: T) -> T {
        let place = self.random.usize(..from.len().max(1));
        from.get(place).copied().unwrap_or(or)
    }

    /// A value for an operand of `bits` bits.
    pub(super) fn integer(&mut self, bits: u32) -> u64 {
        let common = self.pick(&self.palette.clone(), 0);
        if self.one_in(3) { common } else { values::integer(self.random, bits) }
    }

    fn base(&mut self) -> u64 {
        match self.random.u8(..6) {
            0 => 0,
            1 => values::integer(self.random, 64) & 0x7fff_ffff_ffff,
            2 => HIGH.start,
            _ => DATA.start + self.random.u64(..DATA.size),
        }
    }

    fn stack(&mut self) -> u64 {
        let end = STACK.start + STACK.size;
        match self.random.u8(..32) {
            0 => STACK.start + self.random.u64(..24),
            1 => end - self.random.u64(..24),
            2 => STACK.start,
            3 => end,
            4 | 5 => STACK.start + 0x400 + self.random.u64(..0x800),
            6 => self.elsewhere(),
            _ => STACK.start + 0x400 + 8 * self.random.u64(..0x100),
        }
    }

    /// An address that is good for little.
    pub(super) fn elsewhere(&mut self) -> u64 {
        let any = values::integer(self.random, 64);
        match self.random.u8(..8) {
            0 => 0,
            1 => READ_ONLY.start + self.random.u64(..READ_ONLY.size),
            2 if self.reads_code => CODE.start + self.random.u64(..CODE.size),
            3 => DATA.start - self.random.u64(..64),
            4 if self.mode == Mode::Long => 0x8000_0000_0000 - self.random.u64(..16),
            5 if self.mode == Mode::Long => any | 1 << 63,
            6 => DATA.start + DATA.size + self.random.u64(..64),
            _ => any,
        }
    }

    /// Decides that general register `register` has `value` at the beginning, which fails where it has another one
    /// or is written before the instruction that wants it.
    pub(super) fn fix(&mut self, register: usize, value: u64) -> bool {
        let value = if self.mode == Mode::Long { value } else { value & 0xffff_ffff };
        let is_changed = self.is_changed(register);
        match self.values.get_mut(register) {
            Some(known) if !is_changed => *known.get_or_insert(value) == value,
            _ => false,
        }
    }

    /// The value that has been decided, None where any would do.
    pub(super) fn fixed(&self, register: usize) -> Option<u64> {
        self.values.get(register).copied().flatten()
    }

    /// Whether the instructions before write `register`.
    pub(super) fn is_changed(&self, register: usize) -> bool {
        (self.changed | self.pointing) >> register & 1 != 0
    }

    /// Whether `register` can have any value.
    pub(super) fn is_free(&self, register: usize) -> bool {
        !self.is_changed(register) && self.fixed(register).is_none()
    }

    /// Makes `register` hold the address of an instruction.
    pub(super) fn point(&mut self, register: usize, destination: Destination) {
        self.fix(register, CODE.start);
        // No operand is found through it.
        self.pointing |= 1 << register;
        self.pointers.push((Pointer::Register(register), destination));
    }

    /// Puts `bytes` at `address`.
    pub(super) fn put(&mut self, address: u64, bytes: Vec<u8>) {
        self.memory.push((address, bytes));
    }

    /// General registers that `instruction` writes.
    pub(super) fn written(&mut self, instruction: &Instruction) -> u16 {
        let mut written = 0;
        for used in self.info.info(instruction).used_registers() {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            if let Some(number) = general(used.register()).filter(|_| writes) {
                written |= 1 << number;
            }
        }
        written
    }

    /// Registers that no instruction before may write, since the value at the beginning matters.
    pub(super) fn needed(&self) -> u16 {
        (0..16)
            .filter(|register| self.fixed(*register).is_some())
            .fold(0, |set, register| set | 1 << register)
    }

    /// Sets which registers the instructions before the next one write.
    pub(super) fn set_changed(&mut self, changed: u16) {
        // The stack pointer moves by a little, if at all.
        self.changed = changed & !(1 << RSP);
    }

    /// All general registers at the beginning.
    pub(super) fn general(&mut self) -> [u64; 16] {
        let mut general = [0; 16];
        for (register, value) in general.iter_mut().enumerate() {
            *value = match self.fixed(register) {
                Some(value) => value,
                None => {
                    let width = values::width(self.random);
                    self.integer(width)
                }
            };
            if self.mode == Mode::Compatibility {
                *value &= if register < 8 { 0xffff_ffff } else { 0 };
            }
        }
        general
    }

    /// An address for an access of `size` bytes at a multiple of `alignment`, mostly a good one.
    pub(super) fn aim(&mut self, size: u64, alignment: u64) -> u64 {
        let is_long = self.mode == Mode::Long;
        let area = match self.random.u8(..64) {
            0..=8 if is_long => HIGH,
            9..=14 => STACK,
            15..=17 => READ_ONLY,
            18 if self.reads_code => CODE,
            19 => return self.elsewhere(),
            _ => DATA,
        };
        let address = self.within(area, size);
        if alignment > 1 && !self.one_in(12) { address & !(alignment - 1) } else { address }
    }

    fn within(&mut self, area: Area, size: u64) -> u64 {
        let end = area.start + area.size;
        let last = end.saturating_sub(size).max(area.start);
        match self.random.u8(..40) {
            0..=2 => last,
            3 => area.start,
            // Into the hole behind, or from the one before.
            4 if size > 1 => end - self.random.u64(1..size),
            5 if size > 1 => area.start - self.random.u64(1..size),
            // Across two pages.
            6..=9 if area.size > 0x1000 && size > 1 => area.start + 0x1000 - self.random.u64(1..size),
            10..=19 => (area.start + self.random.u64(..=last - area.start)) & !15,
            _ => area.start + self.random.u64(..=last - area.start),
        }
    }
}

/// Number of the general register that `register` is part of.
pub(super) fn general(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}
