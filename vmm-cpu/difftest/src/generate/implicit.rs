//! What instructions need beyond the operands that are written down, and operands that few values are good for.

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::builder::{Builder, Pointer, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, general};
use super::layout::Destination;
use super::{state, string, values};
use crate::case::{Mode, STACK};

/// Flags that POPF of ring 3 may change without anything happening.
const POPPABLE: u64 = 0x20_4cd5;

/// Bytes of the memory operand and the alignment that it needs.
pub(super) fn extent(code: Code) -> (u64, u64) {
    let size = code.op_code().memory_size();
    let bytes = match size {
        // With the header and the components of a current processor.
        MemorySize::Xsave | MemorySize::Xsave64 => 0xa80,
        MemorySize::Unknown => 1,
        size => u64::try_from(size.size()).unwrap_or(1).max(1),
    };
    let alignment = match size {
        MemorySize::Xsave | MemorySize::Xsave64 => 64,
        MemorySize::Fxsave_512Byte | MemorySize::Fxsave64_512Byte => 16,
        _ if bytes >= 16 && is_aligned(code) => bytes,
        _ => 1,
    };
    (bytes, alignment)
}

fn is_aligned(code: Code) -> bool {
    use Mnemonic::{
        Cmpxchg16b, Invept, Invpcid, Invvpid, Lddqu, Movdqu, Movupd, Movups, Pcmpestri, Pcmpestrm, Pcmpistri,
        Pcmpistrm,
    };
    let is_any = matches!(
        code.mnemonic(),
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Pcmpestri
            | Pcmpestrm
            | Pcmpistri
            | Pcmpistrm
            | Invpcid
            | Invept
            | Invvpid
    );
    let is_vector = code.op_code().memory_size().is_packed() || code.mnemonic() == Cmpxchg16b;
    is_vector && !is_any && code.op_code().encoding() == iced_x86::EncodingKind::Legacy
}

/// A value for the immediate operand `place`, where not any will do.
pub(super) fn immediate(builder: &mut Builder<'_>, code: Code, place: u32) -> Option<u64> {
    match code.mnemonic() {
        Mnemonic::Enter if place == 0 => Some(u64::from(builder.random.u16(..0x200))),
        Mnemonic::Enter => Some(u64::from(builder.random.u8(..) >> builder.random.u32(..8))),
        Mnemonic::Ret | Mnemonic::Retf => Some(u64::from(builder.random.u16(..0x80))),
        // A system call where Linux takes them by it.
        Mnemonic::Int => Some(builder.random.u64(..256)).filter(|vector| *vector != 0x80).or(Some(3)),
        Mnemonic::Aam if builder.random.bool() => Some(10),
        Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
        | Mnemonic::Shl
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Shld
        | Mnemonic::Shrd => Some(count(builder, code)),
        _ => None,
    }
}

/// A count of a shift or rotation.
fn count(builder: &mut Builder<'_>, code: Code) -> u64 {
    // What a double shift of 16 bits does with more is nobody's to say.
    let limit = match (code.mnemonic(), code.op_code().operand_size()) {
        (Mnemonic::Shld | Mnemonic::Shrd, 16) if !builder.one_in(8) => 17,
        _ => 256,
    };
    let any = match builder.random.u8(..4) {
        0 => builder.pick(&[0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255], 0),
        1 => builder.random.u64(..256),
        _ => builder.random.u64(..65),
    };
    any % limit
}

/// A segment selector that Linux's ring 3 may load, or that it may not.
pub(super) fn selector(builder: &mut Builder<'_>) -> u16 {
    match builder.random.u8(..16) {
        0..=3 => builder.pick(&[0, 1, 2, 3], 0),
        4..=7 => 0x2b,
        8..=11 => 0x33,
        12 => builder.pick(&[0x28, 0x29, 0x30, 0x32, 0x20], 0),
        13 => builder.pick(&[0x08, 0x10, 0x13, 0x18, 0x1b], 0x10),
        // Behind the table, and in the local one, which there is not.
        14 => 0x80 + (builder.random.u16(..) & 0xff7b),
        _ => builder.random.u16(..) & 0x7f | 4,
    }
}

/// Puts what only few values are good for at `address`, the memory operand. False where it is like any other.
pub(super) fn fill(builder: &mut Builder<'_>, instruction: &Instruction, address: u64) -> bool {
    let bytes = match instruction.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => return branch_memory(builder, instruction, address),
        Mnemonic::Ldmxcsr if !builder.one_in(10) => values::mxcsr(builder.random).to_le_bytes().to_vec(),
        Mnemonic::Fldcw => values::control_word(builder.random).to_le_bytes().to_vec(),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            let mut image = state::fxsave(builder.random, None);
            if builder.one_in(10) {
                state::spoil(builder.random, &mut image);
            }
            image.to_vec()
        }
        Mnemonic::Fldenv | Mnemonic::Frstor => state::environment(builder.random, instruction.code()),
        Mnemonic::Mov | Mnemonic::Verr | Mnemonic::Verw | Mnemonic::Lar | Mnemonic::Lsl
            if takes_selector(instruction) =>
        {
            selector(builder).to_le_bytes().to_vec()
        }
        _ => return false,
    };
    builder.put(address, bytes);
    true
}

/// Whether a segment selector is what the last operand is.
fn takes_selector(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        Mnemonic::Mov => {
            instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_segment_register()
        }
        Mnemonic::Verr | Mnemonic::Verw | Mnemonic::Lar | Mnemonic::Lsl => true,
        _ => false,
    }
}

fn branch_memory(builder: &mut Builder<'_>, instruction: &Instruction, address: u64) -> bool {
    let size = match instruction.code().op_code().memory_size() {
        MemorySize::UInt16 | MemorySize::WordOffset | MemorySize::SegPtr16 => 2,
        MemorySize::UInt32 | MemorySize::DwordOffset | MemorySize::SegPtr32 => 4,
        _ => 8,
    };
    let mut bytes = vec![0; usize::from(size)];
    if instruction.is_call_far_indirect() || instruction.is_jmp_far_indirect() {
        let code_segment = if builder.mode == Mode::Long { 0x33 } else { 0x23 };
        let selector = if builder.one_in(4) { selector(builder) } else { code_segment };
        bytes.extend(selector.to_le_bytes());
    }
    builder.put(address, bytes);
    let destination = Destination::any(builder);
    builder.pointers.push((Pointer::Memory(builder.memory.len() - 1, size), destination));
    true
}

/// Decides on the registers and the memory that `instruction` uses without an operand that says so, and on LOCK and
/// REP prefixes.
pub(super) fn arrange(builder: &mut Builder<'_>, instruction: &mut Instruction) {
    if instruction.is_string_instruction() {
        string::arrange(builder, instruction);
    }
    lock(builder, instruction);
    let stack = |builder: &Builder<'_>| builder.fixed(RSP).unwrap_or(STACK.start);
    match instruction.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv => division(builder, instruction),
        Mnemonic::Cmpxchg => comparison(builder, instruction),
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => wide_comparison(builder, instruction),
        Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts => bit_offset(builder, instruction),
        Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
        | Mnemonic::Shl
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Shld
        | Mnemonic::Shrd => {
            let count = count(builder, instruction.code());
            let value = builder.random.u64(..) & !0xff | count;
            builder.fix(RCX, value);
        }
        Mnemonic::Jcxz
        | Mnemonic::Jecxz
        | Mnemonic::Jrcxz
        | Mnemonic::Loop
        | Mnemonic::Loope
        | Mnemonic::Loopne => {
            let high = builder.pick(&[0, 0, 1 << 32, 1 << 16], 0);
            let value = builder.random.u64(..3) | high;
            builder.fix(RCX, value);
        }
        Mnemonic::Jmp | Mnemonic::Call => branch_register(builder, instruction),
        Mnemonic::Ret | Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            returned(builder, instruction, stack(builder));
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            let mut flags = builder.random.u64(..);
            if !builder.one_in(16) {
                // Single steps, interrupts of every instruction and alignment checks are rare.
                flags &= POPPABLE;
            }
            builder.put(stack(builder), flags.to_le_bytes().to_vec());
        }
        Mnemonic::Leave | Mnemonic::Enter => {
            let frame = STACK.start + 0x400 + builder.random.u64(..0x800);
            let frame = if builder.one_in(12) { builder.elsewhere() } else { frame };
            builder.fix(RBP, frame);
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            let value = builder.integer(64);
            let value = if builder.one_in(8) { value } else { value & 0x7fff_ffff_ffff };
            if let Some(register) = general(instruction.op0_register()) {
                builder.fix(register, value);
            }
        }
        Mnemonic::Pcmpestri | Mnemonic::Pcmpestrm | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpestrm64 => {
            for register in [RAX, RDX] {
                let length = builder.random.i64(-18..19).cast_unsigned();
                if builder.random.bool() {
                    builder.fix(register, length);
                }
            }
        }
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => {
            let address = builder.aim(16, 1);
            builder.fix(RDI, address);
        }
        Mnemonic::Monitor | Mnemonic::Monitorx | Mnemonic::Clzero => {
            let address = builder.aim(64, 1);
            builder.fix(RAX, address);
        }
        _ if takes_selector(instruction) => {
            let register = general(instruction.op1_register()).or(general(instruction.op0_register()));
            let value = u64::from(selector(builder)) | builder.random.u64(..) & !0xffff;
            if let Some(register) = register {
                builder.fix(register, value);
            }
        }
        _ => {}
    }
}

/// LOCK where it may be, and rarely where it may not.
fn lock(builder: &mut Builder<'_>, instruction: &mut Instruction) {
    let may = instruction.code().op_code().can_use_lock_prefix() && instruction.op0_kind() == OpKind::Memory;
    if may && builder.one_in(4) {
        instruction.set_has_lock_prefix(true);
    }
}

/// The value of an operand of `bits` bits, which is chosen if it can be.
fn operand_value(builder: &mut Builder<'_>, instruction: &Instruction, place: u32, bits: u32) -> Option<u64> {
    match instruction.op_kind(place) {
        OpKind::Register => {
            let register = instruction.op_register(place);
            let number = general(register)?;
            if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
                return builder.fixed(number).map(|value| value >> 8);
            }
            let value = builder.integer(bits);
            builder.fix(number, value);
            builder.fixed(number)
        }
        OpKind::Memory => {
            let (_, bytes) = builder.memory.last()?;
            let mut value = [0; 8];
            value.iter_mut().zip(bytes).for_each(|(byte, from)| *byte = *from);
            Some(u64::from_le_bytes(value))
        }
        _ => None,
    }
}

fn operand_bits(instruction: &Instruction) -> u32 {
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    u32::try_from(8 * bytes).unwrap_or(64).clamp(8, 64)
}

/// A dividend whose quotient fits, mostly.
fn division(builder: &mut Builder<'_>, instruction: &Instruction) {
    if builder.one_in(8) {
        return;
    }
    let bits = operand_bits(instruction);
    let mask = u64::MAX >> (64 - bits);
    let is_signed = instruction.mnemonic() == Mnemonic::Idiv;
    let known = operand_value(builder, instruction, 0, bits);
    let divisor = known.unwrap_or_else(|| builder.integer(bits)) & mask;
    let sign_bit = 1 << (bits - 1);
    // The magnitude of the quotient stays below this, or nearly.
    let magnitude = match (is_signed, divisor & sign_bit != 0) {
        (true, true) => divisor.wrapping_neg() & mask,
        _ => divisor,
    };
    let mut low = builder.integer(bits) & mask;
    let mut high = match builder.random.u8(..4) {
        0 | 1 => 0,
        2 => magnitude.saturating_sub(1),
        _ => builder.random.u64(..) % magnitude.max(1),
    };
    if is_signed {
        high >>= 1;
        if builder.random.bool() {
            (low, high) =
                (low.wrapping_neg() & mask, if low == 0 { high.wrapping_neg() } else { !high } & mask);
        } else if high == 0 {
            low &= sign_bit - 1;
        }
    }
    let garbage = builder.random.u64(..);
    if bits == 8 {
        builder.fix(RAX, low | high << 8 | garbage & !0xffff);
    } else {
        builder.fix(RAX, low | garbage & !mask);
        builder.fix(RDX, high | garbage & !mask);
    }
}

/// What CMPXCHG compares with is what is there, in half of the cases.
fn comparison(builder: &mut Builder<'_>, instruction: &Instruction) {
    let bits = operand_bits(instruction);
    if let Some(value) = operand_value(builder, instruction, 0, bits).filter(|_| builder.random.bool()) {
        let mask = u64::MAX >> (64 - bits);
        let value = value & mask | builder.random.u64(..) & !mask;
        builder.fix(RAX, value);
    }
}

fn wide_comparison(builder: &mut Builder<'_>, instruction: &Instruction) {
    let bits = if instruction.mnemonic() == Mnemonic::Cmpxchg8b { 32 } else { 64 };
    let mask = u64::MAX >> (64 - bits);
    let Some((_, bytes)) = builder.memory.last() else { return };
    let mut value = [0; 16];
    value.iter_mut().zip(bytes).for_each(|(byte, from)| *byte = *from);
    let value = u128::from_le_bytes(value);
    let [low, high] =
        [value, value >> bits].map(|part| u64::try_from(part & u128::from(mask)).unwrap_or_default());
    if builder.random.bool() {
        let garbage = builder.random.u64(..) & !mask;
        builder.fix(RAX, low | garbage);
        builder.fix(RDX, high | garbage);
    }
    let new = builder.integer(64);
    builder.fix(RBX, new);
}

/// Whether a bit offset in a register is also the address that it is relative to.
pub(super) fn is_far_bit(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts)
        && instruction.op1_kind() == OpKind::Register
        && [instruction.memory_base(), instruction.memory_index()]
            .iter()
            .any(|register| register.full_register() == instruction.op1_register().full_register())
}

/// Bit offsets reach beyond the operand in memory, but not far.
fn bit_offset(builder: &mut Builder<'_>, instruction: &Instruction) {
    if instruction.op0_kind() != OpKind::Memory || instruction.op1_kind() != OpKind::Register {
        return;
    }
    let register = instruction.op1_register();
    let bits = u32::try_from(8 * register.size()).unwrap_or(64);
    let reach = if builder.random.bool() { 0x100 } else { 0x4000 };
    let offset = builder.random.i64(-reach..reach).cast_unsigned();
    let mask = u64::MAX >> (64 - bits);
    let value = offset & mask | builder.random.u64(..) & !mask;
    if let Some(number) = general(register).filter(|_| !builder.one_in(12)) {
        builder.fix(number, value);
    }
}

fn branch_register(builder: &mut Builder<'_>, instruction: &Instruction) {
    if instruction.op0_kind() != OpKind::Register {
        return;
    }
    if let Some(register) = general(instruction.op0_register()).filter(|register| builder.is_free(*register))
    {
        let destination = Destination::any(builder);
        builder.point(register, destination);
    }
}

/// What returns find on the stack.
fn returned(builder: &mut Builder<'_>, instruction: &Instruction, stack: u64) {
    let word = match instruction.code().op_code().operand_size() {
        16 => 2,
        32 => 4,
        _ => 8_u8,
    };
    let is_long = builder.mode == Mode::Long;
    let mut bytes = vec![0; usize::from(word)];
    let mut push = |value: u64| bytes.extend(value.to_le_bytes().into_iter().take(usize::from(word)));
    let code_segment = if is_long { 0x33 } else { 0x23 };
    match instruction.mnemonic() {
        Mnemonic::Ret => {}
        _ => {
            let code_segment = if builder.one_in(4) { u64::from(selector(builder)) } else { code_segment };
            push(code_segment);
        }
    }
    if matches!(instruction.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq) {
        let mut flags = builder.random.u64(..);
        if !builder.one_in(16) {
            flags = flags & POPPABLE | 0x202;
        }
        push(flags);
        if is_long {
            push(STACK.start + 8 * builder.random.u64(..0x200));
            let stack_segment = if builder.one_in(5) { u64::from(selector(builder)) } else { 0x2b };
            push(stack_segment);
        }
    }
    builder.put(stack, bytes);
    let destination = Destination::any(builder);
    builder.pointers.push((Pointer::Memory(builder.memory.len() - 1, word), destination));
}

/// Registers of string instructions: source and destination.
pub(super) const STRING: [usize; 2] = [RSI, RDI];
