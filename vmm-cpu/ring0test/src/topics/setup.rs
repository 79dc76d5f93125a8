//! What most topics begin with: a mode, a privilege level, a size of code.

use crate::arena::{Arena, Mode, cr4, descriptor};
use crate::layout::*;
use crate::random::Random;

/// A scenario in the making.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) arena: Arena,
    pub(super) mode: Mode,
    pub(super) ring: u64,
    /// Of the code: 16, 32 or 64.
    pub(super) bits: u32,
    pub(super) stack: u64,
    pub(super) code: u16,
    pub(super) stack_segment: u16,
}

/// Modes, with long mode as often as the others together.
const MODES: [Mode; 6] = [Mode::Flat, Mode::Paged, Mode::Pae, Mode::Long, Mode::Long, Mode::Long];

impl Setup {
    /// In any mode, at any privilege level.
    pub(super) fn any(base: u64, random: &mut Random) -> Self {
        let mode = random.pick(&MODES);
        let ring = random.pick(&[0, 0, 0, 3, 3, 3, 1, 2]);
        let bits = match mode {
            Mode::Long if matches!(ring, 1 | 2) => 32,
            Mode::Long => random.pick(&[64, 64, 64, 32, 16]),
            _ => random.pick(&[32, 32, 32, 16]),
        };
        Self::new(base, mode, ring, bits)
    }

    pub(super) fn new(base: u64, mode: Mode, ring: u64, bits: u32) -> Self {
        let mut arena = Arena::new(base, mode, ring == 3);
        let bits = if matches!(ring, 1 | 2) { 32 } else { bits };
        let code = match (ring, bits) {
            (0, 64) => selector::CODE_64,
            (0, 32) => selector::CODE_32,
            (0, _) => selector::CODE_16,
            (1, _) => selector::CODE_1,
            (2, _) => selector::CODE_2,
            (_, 64) => selector::USER_CODE_64,
            (_, 32) => selector::USER_CODE_32,
            (_, _) => selector::USER_CODE_16,
        };
        let (stack_segment, stack) = match ring {
            0 => (selector::DATA, page::STACK),
            1 => (selector::DATA_1, page::OTHER_STACK),
            2 => (selector::DATA_2, page::OTHER_STACK),
            _ => (selector::USER_DATA, page::USER_STACK),
        };
        arena.data_segments(stack_segment);
        let mut setup = Self { arena, mode, ring, bits, stack, code, stack_segment };
        setup.enter(0);
        setup
    }

    /// Starts with those RFLAGS.
    pub(super) fn enter(&mut self, flags: u64) {
        self.arena.enter(self.code, self.stack_segment, self.bits, 0, self.stack, flags);
    }

    /// Starts with the stack pointer so many bytes below the top, where `words` of that many bytes lie.
    pub(super) fn words_on_stack(&mut self, bytes: u64, words: &[u64]) {
        let below = 0x100;
        let top = self.arena.stack_top(64, self.stack) - below;
        self.arena.put64(header::FRAME_64 + 24, top);
        if self.mode != Mode::Long {
            self.arena.put(header::STACK_32, 4, top);
        }
        self.arena.register(4, top);
        for (word, n) in words.iter().zip(0..) {
            self.arena.put(self.stack + PAGE - 64 - below + bytes * n, bytes, *word);
        }
    }

    pub(super) fn describe(&self) -> String {
        format!("{:?}, level {}, {} bits", self.mode, self.ring, self.bits)
    }

    /// Whether long mode is on.
    pub(super) fn is_long(&self) -> bool {
        self.mode == Mode::Long
    }

    /// Sets CR4 bits that do not change what the tables mean.
    pub(super) fn features(&mut self, random: &mut Random) {
        let bits = random.bits(cr4::UMIP | cr4::TSD | cr4::FSGSBASE | cr4::DE | cr4::PCE);
        self.arena.set(header::CR4, bits);
    }

    /// Fills entries of the GDT and LDT with random descriptors.
    pub(super) fn descriptors(&mut self, random: &mut Random) {
        for n in 0..32 {
            let value = self.descriptor(random);
            self.arena.gdt(selector::FREE + 8 * n, value);
            let value = self.descriptor(random);
            self.arena.ldt(8 * n, value);
        }
        // The last entry may lie beyond the limit by a byte.
        self.arena.gdt(0x2f8, descriptor(0, 0xf_ffff, 0xf3, 0xc));
        let limit = random.pick(&[0x2ff, 0x2ff, 0x2fe]);
        self.arena.put(crate::layout::header::GDTR, 2, limit);
    }

    /// A selector of one of those, or of something else.
    pub(super) fn selector(&self, random: &mut Random) -> u16 {
        let rpl = random.pick(&[0, 0, 1, 2, 3, 3]);
        let index = match random.below(16) {
            0 => return rpl,
            1 => random.pick(&[0x2f8, 0x300, 0x308, 0xfff8]),
            2 => return 4 | random.pick(&[0xf8, 0x100, 0x108]) | rpl,
            3..=5 => 4 | (8 * random.pick(&(0..31).collect::<Vec<u16>>())),
            6..=7 => {
                random.pick(&[selector::CODE_32, selector::CODE_64, selector::DATA, selector::CONFORMING_32])
                    & !7
            }
            8..=9 => random.pick(&[selector::USER_CODE_32, selector::USER_CODE_64, selector::USER_DATA]) & !7,
            10 => random.pick(&[selector::TSS, selector::LDT, selector::OTHER_TSS]),
            _ => selector::FREE + 8 * random.pick(&(0..31).collect::<Vec<u16>>()),
        };
        index | rpl
    }

    /// A selector for SS: more often than not one that a stack can have.
    pub(super) fn stack_selector(&self, random: &mut Random) -> u16 {
        match random.below(8) {
            0 => self.selector(random),
            1 => 0,
            2 => random.pick(&[0, 1, 2, 3]),
            3 => selector::DATA_1,
            4 | 5 => selector::DATA,
            _ => selector::USER_DATA,
        }
    }

    /// A random descriptor. Segments that may become a stack are flat, or with 16-bit pointers the arena: QEMU does not
    /// check limits of accesses.
    fn descriptor(&self, random: &mut Random) -> u64 {
        let dpl = random.pick(&[0, 0, 1, 2, 3, 3]) << 5;
        let present = if random.one_in(10) { 0 } else { 0x80 };
        if random.one_in(6) {
            let kind = random.below(16);
            let target = if kind & 7 == 2 { page::LDT } else { page::OTHER_TSS };
            let target = self.arena.at(target);
            let is_16 = matches!(kind, 1 | 3);
            let limit = if is_16 { 0x2b } else { random.pick(&[0x67, 0xfff]) };
            let flags = random.below(16);
            // A 16-bit TSS would lead to whatever the 32-bit one there means as one.
            let present = if is_16 && self.mode != Mode::Long { 0 } else { present };
            return descriptor(target, limit, kind | dpl | present, flags);
        }
        let kind = random.below(16);
        let flags = random.below(16);
        let is_stack = kind & 0b1010 == 0b0010;
        if is_stack {
            let kind = kind & !4;
            // QEMU takes the bit that means 64-bit code for the stack pointer's width 0.
            let flags = flags & !2;
            let (base, limit, flags) =
                if flags & 4 != 0 { (0, 0xf_ffff, flags | 8) } else { (self.arena.base, 0xffff, flags & !8) };
            return descriptor(base, limit, 0x10 | kind | dpl | present, flags);
        }
        // Without paging, twice the arena's address may have no memory.
        let base = if self.mode == Mode::Flat { 0 } else { random.pick(&[0, 0, self.arena.base]) };
        let limit = random.pick(&[0xf_ffff, 0xf_ffff, 0xffff, 0xfff, 0]);
        descriptor(base, limit, 0x10 | kind | dpl | present, flags)
    }
}
