//! A case: code of one or more instructions, and all that it can see when it begins. What came of it is an [`Outcome`].
//!
//! Both sides, the processor in a confined child and the interpreter in a guest, have the same user address space:
//! the [`Area`]s below and nothing else that a case may touch.

use iced_x86::Code;

/// A run of pages that cases use. The pages beside it are absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// First address.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Whether ring 3 may write.
    pub(crate) writable: bool,
    /// Whether ring 3 may execute.
    pub(crate) executable: bool,
}

const PAGE: u64 = 0x1000;

/// Code. Neither written nor compared; reads of it are fine.
pub(crate) const CODE: Area = Area { start: 0x1000_0000, size: 2 * PAGE, writable: false, executable: true };
/// Data.
pub(crate) const DATA: Area = Area { start: 0x1010_0000, size: 2 * PAGE, writable: true, executable: false };
/// Data that stores fault on.
pub(crate) const READ_ONLY: Area =
    Area { start: 0x1020_0000, size: PAGE, writable: false, executable: false };
/// Where RSP points into.
pub(crate) const STACK: Area = Area { start: 0x1030_0000, size: PAGE, writable: true, executable: false };
/// Data behind an address of more than 32 bits.
pub(crate) const HIGH: Area = Area { start: 0x1234_5670_0000, size: PAGE, writable: true, executable: false };

/// All of them.
pub(crate) const AREAS: [Area; 5] = [CODE, DATA, READ_ONLY, STACK, HIGH];

/// Width of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode with a 32-bit code segment, as Linux's `__USER32_CS`.
    Compatibility,
}

/// What user code sees of a processor.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15. In compatibility mode the upper halves and the last eight are
    /// neither set nor compared.
    pub(crate) general: [u64; 16],
    /// RFLAGS.
    pub(crate) rflags: u64,
    /// Bases of FS and GS (64-bit mode only).
    pub(crate) fs_base: u64,
    /// See `fs_base`.
    pub(crate) gs_base: u64,
    /// x87, MXCSR and XMM in the layout of FXSAVE64 (Intel SDM 1, 10.5.1), the last 96 bytes zero.
    pub(crate) fxsave: [u8; 512],
}

/// Code and all that it sees.
#[derive(Clone)]
pub(crate) struct Case {
    /// How it is executed.
    pub(crate) mode: Mode,
    /// The instructions by form and offset into `code`, in the order in which they lie.
    pub(crate) instructions: Vec<(Code, u8)>,
    /// Its bytes. Behind them lies, as the runner's business, something that ends the case; unless they reach to
    /// the end of [`CODE`], where the fetch of more of them faults.
    pub(crate) code: Vec<u8>,
    /// Address of its first byte, in [`CODE`]; also the RIP at which it begins.
    pub(crate) address: u64,
    /// Registers at its beginning.
    pub(crate) registers: Registers,
    /// What writable and read-only areas hold: a pattern that all cases share (the runner's business), with these
    /// bytes put over it.
    pub(crate) memory: Vec<(u64, Vec<u8>)>,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ending {
    /// It ran to the end of its code (or jumped there).
    Completed,
    /// An exception.
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, 0 where there is none.
        error_code: u32,
        /// CR2 of a page fault, else 0.
        address: u64,
    },
    /// A system call by SYSCALL: caught before anything was done.
    SystemCall,
    /// Neither side can tell more: it ran for longer than a case may.
    TimedOut,
    /// The interpreter gave up on it.
    Unhandled,
}

/// What came of a case.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) ending: Ending,
    /// RIP at its end: that of the faulting instruction for a fault.
    pub(crate) rip: u64,
    /// Registers at its end.
    pub(crate) registers: Registers,
    /// Selectors in ES, CS, SS, DS, FS and GS.
    pub(crate) selectors: [u16; 6],
    /// Runs of words in the writable areas that are no longer what they were, ascending.
    pub(crate) stores: Vec<(u64, Vec<u8>)>,
}

impl Registers {
    /// Leaves what 32-bit code can see.
    pub(crate) fn only_32_bits(&mut self) {
        let (low, high) = self.general.split_at_mut(8);
        low.iter_mut().for_each(|register| *register &= 0xffff_ffff);
        high.fill(0);
        (self.fs_base, self.gs_base) = (0, 0);
    }
}

impl Ending {
    /// What an exception says of the case that it ended, with the RIP that is to be compared: a breakpoint in the filler
    /// around the code, which both sides put there, is how a case completes.
    pub(crate) fn of_exception(case: &Case, vector: u64, error: u64, cr2: u64, rip: u64) -> (Self, u64) {
        let before = rip.wrapping_sub(1);
        if vector == 3 && before.wrapping_sub(CODE.start) < CODE.size && !case.owns(before) {
            return (Self::Completed, before);
        }
        let ending = Self::Exception {
            vector: vector as u8,
            error_code: error as u32,
            address: if vector == 14 { cr2 } else { 0 },
        };
        (ending, rip)
    }
}
