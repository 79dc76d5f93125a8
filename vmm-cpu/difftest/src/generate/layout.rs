//! Instructions become bytes at addresses, with prefixes that need not be, and what branches to them is told where.

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, OpKind};

use super::builder::{Builder, Pointer};
use crate::case::{CODE, DATA, Mode};
use crate::forms::is_beyond;

/// Where a branch leads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Destination {
    /// The beginning of an instruction behind it, or the end.
    Later,
    /// The instruction with this place in the order in which they lie.
    Instruction(usize),
    /// Any address.
    Address(u64),
}

impl Destination {
    /// Mostly where something is.
    pub(super) fn any(builder: &mut Builder<'_>) -> Self {
        match builder.random.u8(..32) {
            0 => Self::Address(builder.elsewhere()),
            1 => Self::Address(DATA.start + builder.random.u64(..DATA.size)),
            2 => Self::Address(CODE.start + CODE.size + builder.random.u64(..0x100)),
            _ => Self::Later,
        }
    }
}

/// An instruction and what points from it to others.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) instruction: Instruction,
    pub(super) pointers: Vec<(Pointer, Destination)>,
    /// Prefixes that it does not need: they come first.
    prefixes: Vec<u8>,
    /// A REX prefix before the opcode, or before the one that it has and then without effect.
    rex: Option<u8>,
}

/// Room behind the code for what ends a case.
const ROOM: u64 = 64;

impl Step {
    /// Takes the pointers of the instruction that has been made.
    pub(super) fn new(builder: &mut Builder<'_>, instruction: Instruction) -> Self {
        let pointers = std::mem::take(&mut builder.pointers);
        Self { instruction, pointers, prefixes: Vec::new(), rex: None }
    }

    fn encode(&self, mode: Mode, address: u64) -> Option<Vec<u8>> {
        let mut encoder = Encoder::new(bits(mode));
        let inserted = u64::try_from(self.prefixes.len()).ok()? + u64::from(self.rex.is_some());
        encoder.encode(&self.instruction, address.wrapping_add(inserted)).ok()?;
        let encoded = encoder.take_buffer();
        let mut bytes = self.prefixes.clone();
        let legacy = encoded.iter().take_while(|byte| is_legacy_prefix(**byte)).count();
        let (before, rest) = encoded.split_at(legacy);
        bytes.extend(before);
        bytes.extend(self.rex);
        bytes.extend(rest);
        Some(bytes)
    }

    /// Adds prefixes that the instruction ignores, or rarely such as it does not bear.
    pub(super) fn decorate(&mut self, builder: &mut Builder<'_>) {
        if self.is_vector_encoded() {
            return;
        }
        let is_long = builder.mode == Mode::Long;
        let many = match builder.random.u8(..64) {
            0 => builder.random.usize(8..15),
            1..=3 => builder.random.usize(2..5),
            4..=9 => 1,
            _ => 0,
        };
        for _ in 0..many {
            let prefix =
                builder.pick(&[0x66, 0x2e, 0x36, 0x3e, 0x26, 0xf2, 0xf3, 0x67, 0x64, 0x65, 0x40, 0x4f], 0x3e);
            if prefix & 0xf0 != 0x40 || is_long {
                self.prefixes.push(prefix);
            }
        }
        // No prefix after REX, or REX is ignored: an effect only in the bytes.
        self.rex = (is_long && builder.one_in(16)).then_some(0x40);
        if self.prefixes.is_empty() && self.rex.is_none() {
            if builder.one_in(100) {
                self.prefixes.push(0xf0);
            }
            return;
        }
        if !self.is_as_before(builder.mode) {
            // What is left are prefixes that never matter for length.
            self.rex = None;
            self.prefixes.retain(|prefix| matches!(prefix, 0x2e | 0x26));
            if !self.is_as_before(builder.mode) {
                self.prefixes.clear();
            }
        }
    }

    /// VEX, EVEX and XOP are undefined behind most prefixes, and when a processor finds that out, before it has looked at
    /// all bytes or after, no manual says.
    fn is_vector_encoded(&self) -> bool {
        self.instruction.code().op_code().encoding() != EncodingKind::Legacy
    }

    /// Adds prefixes whatever they make of it.
    pub(super) fn distort(&mut self, builder: &mut Builder<'_>) {
        if is_beyond(self.instruction.code()) || self.is_vector_encoded() {
            return;
        }
        for _ in 0..builder.random.usize(1..4) {
            let prefix =
                builder.pick(&[0x66, 0x66, 0xf2, 0xf3, 0x67, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65], 0x66);
            self.prefixes.push(prefix);
        }
        if builder.mode == Mode::Long && builder.random.bool() {
            self.rex = Some(builder.random.u8(0x40..0x50));
        }
        // What a narrower operand leaves over would be another instruction, and any.
        let bytes = self.encode(builder.mode, CODE.start).unwrap_or_default();
        let mut decoder = Decoder::with_ip(bits(builder.mode), &bytes, CODE.start, DecoderOptions::AMD);
        let decoded = decoder.decode();
        if !decoded.is_invalid() && decoded.len() != bytes.len() {
            self.prefixes.clear();
            self.rex = None;
        }
    }

    /// Whether it is still the same instruction, or one that is too long.
    fn is_as_before(&self, mode: Mode) -> bool {
        let plain = Self { prefixes: Vec::new(), rex: None, ..self.clone() };
        let (Some(plain), Some(bytes)) = (plain.encode(mode, CODE.start), self.encode(mode, CODE.start))
        else {
            return false;
        };
        if bytes.len() > 15 {
            let decoded = Decoder::with_ip(bits(mode), &bytes, CODE.start, DecoderOptions::AMD).decode();
            return decoded.is_invalid() && plain.len() < 15 && bytes.len() < 20;
        }
        let decode =
            |bytes: &[u8]| Decoder::with_ip(bits(mode), bytes, CODE.start, DecoderOptions::AMD).decode();
        let (before, after) = (decode(&plain), decode(&bytes));
        let same_memory = before.memory_base() == after.memory_base()
            && before.memory_index() == after.memory_index()
            && before.memory_segment() == after.memory_segment()
            && before.op_kinds().eq(after.op_kinds());
        before.code() == after.code()
            && same_memory
            && before.has_rep_prefix() == after.has_rep_prefix()
            && before.has_repne_prefix() == after.has_repne_prefix()
    }
}

fn bits(mode: Mode) -> u32 {
    match mode {
        Mode::Long => 64,
        Mode::Compatibility => 32,
    }
}

fn is_legacy_prefix(byte: u8) -> bool {
    matches!(byte, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
}

/// Code of a case.
pub(super) struct Layout {
    pub(super) address: u64,
    pub(super) code: Vec<u8>,
    pub(super) instructions: Vec<(Code, u8)>,
    /// Registers that hold addresses of instructions.
    pub(super) registers: Vec<(usize, u64)>,
}

/// Places `steps`. None where an instruction cannot be encoded.
pub(super) fn place(builder: &mut Builder<'_>, steps: &mut [Step]) -> Option<Layout> {
    for step in &mut *steps {
        if matches!(step.instruction.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32) {
            step.instruction.set_far_branch32(0);
        } else if step.instruction.is_jcc_short_or_near()
            || step.pointers.iter().any(|(pointer, _)| matches!(pointer, Pointer::Operand))
        {
            step.instruction.set_near_branch64(CODE.start);
        }
    }
    let mut lengths = Vec::with_capacity(steps.len());
    for step in &*steps {
        lengths.push(u64::try_from(step.encode(builder.mode, CODE.start)?.len()).ok()?);
    }
    let total: u64 = lengths.iter().sum();
    let address = start(builder, &lengths, total);
    let mut starts = Vec::with_capacity(steps.len() + 1);
    let mut at = address;
    for length in &lengths {
        starts.push(at);
        at += length;
    }
    starts.push(at);

    let mut registers = Vec::new();
    let mut code = Vec::new();
    let mut instructions = Vec::new();
    for (place, step) in steps.iter_mut().enumerate() {
        for (pointer, destination) in step.pointers.clone() {
            let later = starts.get(place + 1..).unwrap_or_default();
            // The end is the more interesting, the longer the case is.
            let later = builder.pick(later, at);
            let target = match destination {
                Destination::Later => later,
                Destination::Instruction(place) => starts.get(place).copied().unwrap_or(at),
                Destination::Address(address) => address,
            };
            match pointer {
                Pointer::Register(register) => registers.push((register, target)),
                Pointer::Memory(place, size) => {
                    let bytes = builder.memory.get_mut(place).map(|(_, bytes)| bytes);
                    for (byte, from) in
                        bytes.into_iter().flatten().zip(target.to_le_bytes()).take(usize::from(size))
                    {
                        *byte = from;
                    }
                }
                Pointer::Operand if step.instruction.op0_kind() == OpKind::FarBranch16 => {
                    step.instruction.set_far_branch16(u16::try_from(target & 0xffff).ok()?);
                }
                Pointer::Operand if step.instruction.op0_kind() == OpKind::FarBranch32 => {
                    step.instruction.set_far_branch32(u32::try_from(target & 0xffff_ffff).ok()?);
                }
                Pointer::Operand => {
                    set_target(&mut step.instruction, builder.mode, target);
                    if step.encode(builder.mode, *starts.get(place)?).is_none() {
                        set_target(&mut step.instruction, builder.mode, later);
                    }
                }
            }
        }
        let start = *starts.get(place)?;
        let bytes = step.encode(builder.mode, start)?;
        let offset = u8::try_from(code.len()).ok()?;
        // What the prefixes have made of it; for what is invalid, that which it would be without them.
        let decoded =
            Decoder::with_ip(bits(builder.mode), &bytes, start, DecoderOptions::AMD).decode().code();
        let form = if decoded == Code::INVALID { step.instruction.code() } else { decoded };
        instructions.push((form, offset));
        code.extend(bytes);
    }
    // What lies behind the end of the area is not there.
    let left = usize::try_from(CODE.start + CODE.size - address).ok()?;
    code.truncate(left);
    instructions.retain(|(_, offset)| usize::from(*offset) < left);
    Some(Layout { address, code, instructions, registers })
}

fn set_target(instruction: &mut Instruction, mode: Mode, target: u64) {
    instruction.set_near_branch64(match (instruction.op0_kind(), mode) {
        (OpKind::NearBranch16, _) => target & 0xffff,
        (_, Mode::Compatibility) => target & 0xffff_ffff,
        _ => target,
    });
}

/// Where the code begins: mostly anywhere, sometimes so that it crosses two pages or reaches to the end of the area,
/// or so that the last instruction lies behind that in part.
fn start(builder: &mut Builder<'_>, lengths: &[u64], total: u64) -> u64 {
    let end = CODE.start + CODE.size;
    let last = lengths.last().copied().unwrap_or(1);
    match builder.random.u8(..64) {
        0..=5 if total > 1 => CODE.start + 0x1000 - builder.random.u64(1..total),
        6 => end - total,
        7 if last > 1 => end - total + builder.random.u64(1..last),
        8 => CODE.start,
        _ => CODE.start + builder.random.u64(..CODE.size - total - ROOM),
    }
}
