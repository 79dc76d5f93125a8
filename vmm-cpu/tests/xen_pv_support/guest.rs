//! What a hostile kernel does, in few bytes, most of which reach something.

use arbitrary::{Arbitrary, Result, Unstructured};

/// What an input describes: steps until its bytes end.
#[derive(Clone, Debug)]
pub struct Kernel(pub Vec<Step>);

impl<'a> Arbitrary<'a> for Kernel {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut steps = Vec::new();
        while !u.is_empty() && steps.len() < 500 {
            steps.push(u.arbitrary()?);
        }
        Ok(Self(steps))
    }
}

/// Up to 12 of them; the usual way gives two on average.
fn list<'a, T: Arbitrary<'a>>(u: &mut Unstructured<'a>) -> Result<Vec<T>> {
    let count = u.int_in_range(0..=12)?;
    (0..count).map(|_| u.arbitrary()).collect()
}

/// A value: an argument, a word in memory, a register.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Value {
    Small(u8),
    Word(u32),
    Any(u64),
    /// A place in the arena, where structures lie.
    Arena(u16),
    /// An address in the direct map.
    Direct {
        frame: u16,
        offset: u16,
    },
    /// A frame, and the same as an entry of a page table with some bits.
    Frame(u16),
    Entry {
        frame: u16,
        bits: u16,
    },
    /// Where such an entry lies, with a command in its low bits.
    EntryAddress {
        table: u8,
        index: u16,
        command: u8,
    },
    Edge(Edge),
    Domain(Domain),
}

/// Values that something ends or begins at.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Edge {
    EndOfRam,
    EndOfFrames,
    EndOfArena,
    Hole,
    EndOfHole,
    MachineToPhysical,
    NotCanonical,
    Last,
    LastPage,
    Sign,
    Handler,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Domain {
    Own,
    Io,
    Backend,
    Other(u16),
}

#[derive(Clone, Debug, Arbitrary)]
pub struct Call {
    pub nr: Number,
    pub args: [Value; 4],
}

/// A hypercall: most of those that are there have commands in the first argument.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Number {
    Plain(u8),
    Command { nr: Group, command: u8 },
    Any(u64),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Group {
    Memory,
    Version,
    Console,
    Grant,
    Assist,
    Vcpu,
    Sched,
    Callback,
    Event,
    Physdev,
    Nmi,
    SegmentBase,
}

#[derive(Clone, Debug, Arbitrary)]
pub enum Step {
    /// Words into the arena.
    Write {
        at: u16,
        #[arbitrary(with = list)]
        words: Vec<Value>,
    },
    /// One word anywhere in memory that the guest can map, page tables too.
    Store {
        frame: u16,
        index: u16,
        value: Value,
    },
    Call(Call),
    /// Several commands for the page tables in one list.
    Updates {
        extended: bool,
        #[arbitrary(with = list)]
        list: Vec<(Value, Value, Value)>,
    },
    Multicall(#[arbitrary(with = list)] Vec<Call>),
    /// IRET with a frame made of these.
    Iret {
        frame: [Value; 9],
    },
    Exception {
        vector: u8,
        error_code: u16,
        address: Value,
    },
    /// An instruction faults.
    Instruction {
        code: [u8; 8],
        invalid: bool,
    },
    Prefixed {
        leaf: Value,
    },
    Register {
        which: u8,
        value: Value,
    },
    User(bool),
    SystemCall,
    Enter,
    Pass(u32),
    Input(u8),
    Raise(u16),
    /// A grant is given, more or less, and a back end tries to use it.
    UseGrant {
        reference: u16,
        flags: u8,
        frame: u16,
        writable: bool,
    },
    DropGrant,
    /// A start for the other virtual processor, with some words of it changed.
    StartOther {
        #[arbitrary(with = list)]
        changes: Vec<(u16, Value)>,
    },
}
