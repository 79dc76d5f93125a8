//! The places where translated code is left.

/// A place where translated code is left, and what for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    /// The translation that it is in.
    pub(super) translation: u32,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// The interpreter is to execute instruction `op` of the block. Afterwards translated code goes on at `resume`, an
    /// offset in code memory, unless that instruction was the last.
    Instruction { op: u16, resume: u32 },
    /// A branch to a block that it was not linked to.
    Jump(Jump),
    /// A branch backwards while something wants attention.
    Poll { target: u64 },
    /// The translation was entered through its gate, which was shut.
    Gate,
    /// The code that the translation was made from is no longer in memory.
    Changed,
    /// The budget has not that many instructions left.
    Budget,
    /// The start of a translation that is traced.
    Trace { resume: u32 },
}

/// A direct branch at the end of a translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Jump {
    /// RIP.
    pub(super) target: u64,
    /// Offset of the jump in code memory: five bytes if it is [`Reach::Page`], eight if not.
    pub(super) at: u32,
    /// Offset of what it goes to while it is not linked.
    pub(super) stub: u32,
    pub(super) link: Link,
    /// The status flags are in the processor and not in the frame.
    pub(super) live: bool,
    /// Interrupts are held off for one instruction.
    pub(super) shadow: bool,
}

/// How a jump goes to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// By its distance: the target lies in the same page and holds as long as the jump itself does. The last four bytes
    /// of the instruction are the distance.
    Near { length: u8 },
    /// Through the target's gate.
    Gate,
}
