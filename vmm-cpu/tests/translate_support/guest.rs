//! What an input describes. Fields that select something are reduced to what there is, so that no input is refused.

use arbitrary::{Arbitrary, Result, Unstructured};
use vmm_cpu::translate::{AddressWindow, TranslateOptions};

use super::code::Instruction;
use super::layout;

/// Up to `MAX` elements, any number of them equally likely.
fn list<'a, T: Arbitrary<'a>, const MAX: usize>(u: &mut Unstructured<'a>) -> Result<Vec<T>> {
    let count = usize::from(u8::arbitrary(u)?) % (MAX + 1);
    (0..count).map(|_| T::arbitrary(u)).collect()
}

/// How the guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub enum Mode {
    Real,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    Compatibility,
    Long,
    // More often than others.
    Long2,
    Long3,
}

impl Mode {
    /// Width of the code in bits.
    pub fn code_bits(self) -> u32 {
        match self {
            Self::Real | Self::Protected16 => 16,
            Self::Protected32 | Self::Paged32 | Self::Pae | Self::Compatibility => 32,
            Self::Long | Self::Long2 | Self::Long3 => 64,
        }
    }

    pub fn is_long(self) -> bool {
        self == Self::Compatibility || self.code_bits() == 64
    }

    pub fn is_protected(self) -> bool {
        self != Self::Real
    }

    pub fn is_paged(self) -> bool {
        matches!(self, Self::Paged32 | Self::Pae) || self.is_long()
    }
}

/// What executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub enum Tier {
    /// The interpreter alone.
    Interpreted,
    /// Blocks are translated before they run for the first time.
    AtOnce,
    /// Blocks that ran twice are translated.
    Later,
    /// Blocks are translated at once, and user programs access memory through the address window.
    Window,
}

impl Tier {
    pub const ALL: [Self; 4] = [Self::Interpreted, Self::AtOnce, Self::Later, Self::Window];

    pub fn options(self) -> TranslateOptions {
        let (translate_after, window) = match self {
            Self::Interpreted => (None, AddressWindow::Never),
            Self::AtOnce => (Some(0), AddressWindow::Never),
            Self::Later => (Some(2), AddressWindow::Never),
            Self::Window => (Some(0), AddressWindow::Always),
        };
        TranslateOptions::default().translate_after(translate_after).address_window(window)
    }
}

/// A number that hits something: an address near an edge, a small count, or anything.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Value {
    /// One of [`layout::PLACES`] and a few bytes beside it.
    Place(u8, i8),
    Place2(u8, i8),
    /// In the code.
    Code(u16),
    /// In the page tables.
    Tables(u16),
    Small(u8),
    Any(u64),
}

impl Value {
    pub fn get(self) -> u64 {
        match self {
            Self::Place(place, beside) | Self::Place2(place, beside) => {
                let place = layout::PLACES[usize::from(place) % layout::PLACES.len()];
                place.wrapping_add_signed(beside.into())
            }
            Self::Code(offset) => layout::CODE + u64::from(offset % layout::CODE_SIZE),
            Self::Tables(offset) => layout::TABLES + u64::from(offset & !7) % 0x9000,
            Self::Small(value) => value.into(),
            Self::Any(value) => value,
        }
    }
}

/// A page-table entry that is not what it would be.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct EntryChange {
    /// Which table.
    pub table: u8,
    pub index: EntryIndex,
    pub entry: Entry,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum EntryIndex {
    /// Pages that are in use: those of code, stack and descriptors.
    Low(u8),
    Low2(u8),
    Any(u16),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Entry {
    /// Bits that change.
    Flip(u16),
    /// No execution, reserved bits.
    FlipHigh(u16),
    /// Another frame.
    Frame(Value, u16),
    /// The table itself or another.
    Table(u8, u16),
    Any(u64),
}

/// A segment register that is not what the mode makes of it.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct SegmentChange {
    pub register: u8,
    pub selector: u8,
    pub base: Option<Value>,
    pub limit: Option<u32>,
    /// Bits of the attributes that change.
    pub flip: u16,
}

/// A descriptor that is not what it would be.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum DescriptorChange {
    /// One in GDT or LDT: bits that change.
    Flip {
        index: u8,
        bits: u64,
    },
    /// Attributes only.
    Attributes {
        index: u8,
        bits: u16,
    },
    Any {
        index: u8,
        raw: u64,
    },
    /// A gate of the IDT.
    Gate {
        vector: u8,
        kind: u8,
        selector: u8,
        target: u8,
        ist: u8,
    },
    AnyGate {
        vector: u8,
        raw: [u64; 2],
    },
    /// A word of one of the task-state segments.
    Task {
        offset: u8,
        value: Value,
    },
}

/// What the guest starts with.
#[derive(Clone, Debug, Arbitrary)]
pub struct Start {
    pub mode: Mode,
    /// At privilege level 3.
    pub user: bool,
    pub entry: u8,
    pub registers: [Value; 16],
    pub rflags: u32,
    /// Bits of CR0, CR4 and EFER that change.
    pub cr0: u32,
    pub cr4: u32,
    pub efer: u8,
    /// Each change applies only if its bit is set, so that most starts are accepted.
    pub odd: u8,
    #[arbitrary(with = list::<_, 3>)]
    pub segments: Vec<SegmentChange>,
}

impl Start {
    /// The same with nothing that could be refused.
    pub fn sane(&self) -> Self {
        Self { odd: 0, segments: Vec::new(), ..self.clone() }
    }
}

/// What a VMM does at a callback besides answering.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Reaction {
    Nothing,
    Answer,
    Answer2,
    Kick,
    TakeMemory,
    PutMemory,
    Nmi,
    Intr(bool),
    Message(Value, u32),
    Harvest,
    Write(Value, u32),
}

/// A change of a saved state.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Mutation {
    General(u8, Value),
    Control(u8, Value),
    ControlBit(u8, u8),
    Segment(SegmentChange),
    Table(u8, Value, u16),
    Xsave(u16, u8),
    Msr(MsrIndex, Value),
    Apic(u8, u32),
    NoApic,
    AnApic,
    Exception { vector: u8, error: Option<u32>, pending: bool, payload: Option<Value> },
    Interrupt { vector: u8, software: bool },
    Nmi(u8),
    Run(u8),
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum MsrIndex {
    Known(u8),
    Known2(u8),
    X2apic(u8),
    Any(u32),
}

impl MsrIndex {
    pub fn get(self) -> u32 {
        match self {
            Self::Known(n) | Self::Known2(n) => layout::MSRS[usize::from(n) % layout::MSRS.len()],
            Self::X2apic(n) => 0x800 + u32::from(n % 0x40),
            Self::Any(index) => index,
        }
    }
}

/// What the VMM does between two runs.
#[derive(Clone, Debug, Arbitrary)]
pub enum Step {
    Run,
    Run2,
    /// Single steps.
    Walk(u8),
    /// The start once more, elsewhere in the code.
    Enter(u8),
    /// Another start.
    Start(Box<Start>),
    /// The other vCPU from here on, if there are two.
    Switch,
    Registers(u8, Value),
    SetMsr(MsrIndex, Value),
    Msr(MsrIndex),
    Nmi,
    Intr(bool),
    Message(Value, u32),
    Kick,
    Debug {
        step: bool,
        int3: bool,
        #[arbitrary(with = list::<_, 5>)]
        stops: Vec<(Value, u8)>,
    },
    Translate(Value),
    Save,
    /// A state that was tampered with.
    Restore(#[arbitrary(with = list::<_, 4>)] Vec<Mutation>),
    TakeMemory,
    PutMemory,
    Log(u8),
    Filter(MsrIndex, u8, bool),
    Hypercall(u8),
    Write(Value, u64),
    Clock(bool),
}

/// The whole input.
#[derive(Clone, Debug, Arbitrary)]
pub struct Guest {
    pub tier: Tier,
    /// All tiers must come to the same, where all that the guest sees follows from the input.
    pub compared: bool,
    pub start: Start,
    pub local_apic: bool,
    pub deterministic: bool,
    pub two: bool,
    /// How the handlers of exceptions and interrupts go on.
    pub handlers: [u8; 4],
    #[arbitrary(with = list::<_, 6>)]
    pub entries: Vec<EntryChange>,
    #[arbitrary(with = list::<_, 6>)]
    pub descriptors: Vec<DescriptorChange>,
    #[arbitrary(with = list::<_, 56>)]
    pub code: Vec<Instruction>,
    #[arbitrary(with = list::<_, 10>)]
    pub steps: Vec<Step>,
    #[arbitrary(with = list::<_, 16>)]
    pub reactions: Vec<Reaction>,
    #[arbitrary(with = list::<_, 16>)]
    pub answers: Vec<Value>,
}
