//! What handlers store on their stack, for the test to see and to change.

use vmm_cpu::state::GeneralRegisters;

use super::machine::{HANDLERS, KERNEL_CS, KERNEL_DS, Ram, TRAP_STACK};

/// What a handler was called for, with all registers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u64,
    pub error: u64,
    pub cs: u64,
    pub ss: u64,
    pub cr2: u64,
    pub general: GeneralRegisters,
}

/// Words of a trap on the handlers' stack: 15 registers from R15 up to RAX, vector, error code and the frame.
const TRAP_WORDS: u64 = 15 + 2 + 5;
pub const TRAP_FRAME: u64 = TRAP_STACK - TRAP_WORDS * 8;

impl Trap {
    pub fn load(ram: &Ram) -> Self {
        let word = |n: u64| ram.word(TRAP_FRAME + n * 8);
        Self {
            vector: word(15),
            error: word(16),
            cs: word(18),
            ss: word(21),
            cr2: ram.word(TRAP_FRAME - 8),
            general: GeneralRegisters {
                r15: word(0),
                r14: word(1),
                r13: word(2),
                r12: word(3),
                r11: word(4),
                r10: word(5),
                r9: word(6),
                r8: word(7),
                rdi: word(8),
                rsi: word(9),
                rbp: word(10),
                rdx: word(11),
                rcx: word(12),
                rbx: word(13),
                rax: word(14),
                rip: word(17),
                rflags: word(19),
                rsp: word(20),
            },
        }
    }

    pub fn store(&self, ram: &Ram) {
        let g = &self.general;
        let words = [
            g.r15,
            g.r14,
            g.r13,
            g.r12,
            g.r11,
            g.r10,
            g.r9,
            g.r8,
            g.rdi,
            g.rsi,
            g.rbp,
            g.rdx,
            g.rcx,
            g.rbx,
            g.rax,
            self.vector,
            self.error,
            g.rip,
            self.cs,
            g.rflags,
            g.rsp,
            self.ss,
        ];
        for (n, word) in (0..).zip(words) {
            ram.set_word(TRAP_FRAME + n * 8, word);
        }
    }

    /// The handler does not return to where it came from, but halts.
    pub fn end(&mut self) {
        (self.general.rip, self.cs, self.ss) = (HANDLERS, KERNEL_CS.into(), KERNEL_DS.into());
    }
}
