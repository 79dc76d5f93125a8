//! Moves: MOV and its extensions, LEA, PUSH, POP, XCHG, XADD, CMPXCHG, SETcc, CMOVcc.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::cpu::{RAX, RBX, RCX, RDX, RSP};
use crate::translate::flags::bits;
use crate::translate::memory::HostWord;
use crate::translate::segment::{low8, low32};
use crate::translate::word::{Word, halves, sign_extend};

fn register_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = m.cpu.get::<W>(op.b);
    m.cpu.set::<W>(op.a, value);
    Ok(())
}

fn register_immediate<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.cpu.set::<W>(op.a, op.imm);
    Ok(())
}

fn register_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let value = m.load::<W>(place)?.extend();
    m.cpu.set::<W>(op.a, value);
    Ok(())
}

fn memory_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let value = W::truncate(m.cpu.get::<W>(op.a));
    m.store(place, value)
}

fn memory_immediate<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    m.store(place, W::truncate(op.imm))
}

/// The accumulator from an absolute address, which is the immediate.
fn accumulator_absolute<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place_in(op.segment(), op.imm, W::BYTES, false)?;
    let value = m.load::<W>(place)?.extend();
    m.cpu.set::<W>(RAX, value);
    Ok(())
}

fn absolute_accumulator<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place_in(op.segment(), op.imm, W::BYTES, true)?;
    let value = W::truncate(m.cpu.get::<W>(RAX));
    m.store(place, value)
}

/// How a narrow value is widened.
trait Widen {
    fn widen<S: Word>(value: u64) -> u64;
}

struct Zero;
struct Sign;

impl Widen for Zero {
    #[inline(always)]
    fn widen<S: Word>(value: u64) -> u64 {
        value
    }
}

impl Widen for Sign {
    #[inline(always)]
    fn widen<S: Word>(value: u64) -> u64 {
        sign_extend::<S>(value)
    }
}

fn widen_register<S: HostWord, D: Word, X: Widen>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = m.cpu.get::<S>(op.b);
    m.cpu.set::<D>(op.a, X::widen::<S>(value));
    Ok(())
}

fn widen_memory<S: HostWord, D: Word, X: Widen>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, S::BYTES, false)?;
    let value = m.load::<S>(place)?.extend();
    m.cpu.set::<D>(op.a, X::widen::<S>(value));
    Ok(())
}

fn lea<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let address = m.effective_address(op);
    m.cpu.set::<W>(op.a, address);
    Ok(())
}

fn push_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = m.cpu.get::<W>(op.a);
    m.push::<W>(value)
}

fn push_immediate<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.push::<W>(op.imm)
}

fn push_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let value = m.load::<W>(place)?.extend();
    m.push::<W>(value)
}

fn pop_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = m.peek::<W>(0)?;
    m.drop_stack(W::BYTES as u64);
    m.cpu.set::<W>(op.a, value);
    Ok(())
}

fn pop_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = m.peek::<W>(0)?;
    // An address made of RSP is that after the pop.
    let rsp = m.cpu.r(RSP);
    m.drop_stack(W::BYTES as u64);
    let stored = m.place(op, W::BYTES, true).and_then(|place| m.store(place, W::truncate(value)));
    if stored.is_err() {
        m.cpu.set_r(RSP, rsp);
    }
    stored
}

fn exchange_registers<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let (a, b) = (m.cpu.get::<W>(op.a), m.cpu.get::<W>(op.b));
    m.cpu.set::<W>(op.a, b);
    m.cpu.set::<W>(op.b, a);
    Ok(())
}

fn exchange_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let new = m.cpu.get::<W>(op.a);
    let old = m.modify::<W>(place, true, |_| new)?;
    m.cpu.set::<W>(op.a, old);
    Ok(())
}

/// Status flags of `a + b`.
fn sum_flags<W: Word>(m: &mut Machine<'_>, a: u64, b: u64) -> u64 {
    let result = a.wrapping_add(b) & W::MASK;
    m.cpu.flags.set_result::<W>(result, a & b | (a | b) & !result);
    result
}

fn add_exchange_registers<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let (a, b) = (m.cpu.get::<W>(op.a), m.cpu.get::<W>(op.b));
    let sum = sum_flags::<W>(m, a, b);
    m.cpu.set::<W>(op.b, a);
    m.cpu.set::<W>(op.a, sum);
    Ok(())
}

fn add_exchange_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let b = m.cpu.get::<W>(op.a);
    let a = m.modify::<W>(place, op.locked(), |a| a.wrapping_add(b))?;
    sum_flags::<W>(m, a, b);
    m.cpu.set::<W>(op.a, a);
    Ok(())
}

/// Flags of comparing the accumulator with the destination; whether they are equal.
fn compare_accumulator<W: Word>(m: &mut Machine<'_>, destination: u64) -> bool {
    let a = m.cpu.get::<W>(RAX);
    let result = a.wrapping_sub(destination) & W::MASK;
    m.cpu.flags.set_result::<W>(result, !a & destination | (!a | destination) & result);
    result == 0
}

fn compare_exchange_registers<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let destination = m.cpu.get::<W>(op.a);
    if compare_accumulator::<W>(m, destination) {
        let source = m.cpu.get::<W>(op.b);
        m.cpu.set::<W>(op.a, source);
    } else {
        m.cpu.set::<W>(RAX, destination);
    }
    Ok(())
}

fn compare_exchange_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let (expected, source) = (m.cpu.get::<W>(RAX), m.cpu.get::<W>(op.a));
    let old = m.modify::<W>(place, op.locked(), |old| if old == expected { source } else { old })?;
    if !compare_accumulator::<W>(m, old) {
        m.cpu.set::<W>(RAX, old);
    }
    Ok(())
}

fn compare_exchange_8b(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, 8, true)?;
    let pair = |m: &Machine<'_>, high, low| m.cpu.get::<u32>(high) << 32 | m.cpu.get::<u32>(low);
    let (expected, new) = (pair(m, RDX, RAX), pair(m, RCX, RBX));
    let old = m.modify::<u64>(place, op.locked(), |old| if old == expected { new } else { old })?;
    m.cpu.flags.replace_status(bits::ZF, if old == expected { bits::ZF } else { 0 });
    if old != expected {
        m.cpu.set_r(RAX, u64::from(low32(old)));
        m.cpu.set_r(RDX, old >> 32);
    }
    Ok(())
}

fn compare_exchange_16b(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, 16, true)?;
    if !place.va.is_multiple_of(16) {
        return Err(m.gp(0));
    }
    let pair = |m: &Machine<'_>, high, low| u128::from(m.cpu.r(high)) << 64 | u128::from(m.cpu.r(low));
    let (expected, new) = (pair(m, RDX, RAX), pair(m, RCX, RBX));
    let old = m.compare_exchange_wide(place, expected, new)?;
    m.cpu.flags.replace_status(bits::ZF, if old == expected { bits::ZF } else { 0 });
    if old != expected {
        let [low, high] = halves(old);
        m.cpu.set_r(RAX, low);
        m.cpu.set_r(RDX, high);
    }
    Ok(())
}

fn set_register<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = u64::from(m.cpu.flags.condition::<CC>());
    m.cpu.set::<u8>(op.a, value);
    Ok(())
}

fn set_memory<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, 1, true)?;
    let value = u8::from(m.cpu.flags.condition::<CC>());
    m.store(place, value)
}

fn move_register_if<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let from = if m.cpu.flags.condition::<CC>() { op.b } else { op.a };
    let value = m.cpu.r(from);
    move_width(m, op, value);
    Ok(())
}

/// The source is read, and may fault, also if the condition is false.
fn move_memory_if<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, usize::from(op.b), false)?;
    let value = match op.b {
        8 => m.load::<u64>(place)?,
        4 => m.load::<u32>(place)?.extend(),
        _ => m.load::<u16>(place)?.extend(),
    };
    let value = if m.cpu.flags.condition::<CC>() { value } else { m.cpu.r(op.a) };
    match op.b {
        8 => m.cpu.set::<u64>(op.a, value),
        4 => m.cpu.set::<u32>(op.a, value),
        _ => m.cpu.set::<u16>(op.a, value),
    }
    Ok(())
}

/// Writes the destination of a CMOVcc between registers, whose width is the immediate.
#[inline(always)]
fn move_width(m: &mut Machine<'_>, op: &Op, value: u64) {
    match op.imm {
        8 => m.cpu.set::<u64>(op.a, value),
        4 => m.cpu.set::<u32>(op.a, value),
        _ => m.cpu.set::<u16>(op.a, value),
    }
}

/// The instances of a handler for the sixteen condition codes.
macro_rules! by_condition {
    ($cc:expr, $handler:ident) => {
        match $cc {
            0 => $handler::<0> as $crate::translate::ops::Handler,
            1 => $handler::<1>,
            2 => $handler::<2>,
            3 => $handler::<3>,
            4 => $handler::<4>,
            5 => $handler::<5>,
            6 => $handler::<6>,
            7 => $handler::<7>,
            8 => $handler::<8>,
            9 => $handler::<9>,
            10 => $handler::<10>,
            11 => $handler::<11>,
            12 => $handler::<12>,
            13 => $handler::<13>,
            14 => $handler::<14>,
            _ => $handler::<15>,
        }
    };
}
pub(super) use by_condition;

/// The condition code of Jcc, SETcc, CMOVcc.
pub(super) fn condition(instruction: &Instruction) -> u8 {
    // The decoder's enumeration has "none" first.
    low8(instruction.condition_code() as u64).saturating_sub(1)
}

fn widen<X: Widen>(instruction: &Instruction, op: &mut Op) -> Handler {
    op.a = register_slot(instruction.op_register(0));
    // AMD's processors read 32 bits whatever the operand size of MOVSXD.
    let is_movsxd = instruction.mnemonic() == Mnemonic::Movsxd;
    let from = if is_movsxd { 4 } else { operand_bytes(instruction, 1) };
    let to = operand_bytes(instruction, 0);
    if instruction.op_kind(1) == OpKind::Register {
        op.b = register_slot(instruction.op_register(1));
        match (from, to) {
            (1, 2) => widen_register::<u8, u16, X>,
            (1, 4) => widen_register::<u8, u32, X>,
            (1, _) => widen_register::<u8, u64, X>,
            (2, 2) => widen_register::<u16, u16, X>,
            (2, 4) => widen_register::<u16, u32, X>,
            (2, _) => widen_register::<u16, u64, X>,
            (_, 8) => widen_register::<u32, u64, X>,
            (_, 4) => widen_register::<u32, u32, X>,
            // MOVSXD with a 16-bit destination.
            (_, _) => widen_register::<u32, u16, X>,
        }
    } else {
        match (from, to) {
            (1, 2) => widen_memory::<u8, u16, X>,
            (1, 4) => widen_memory::<u8, u32, X>,
            (1, _) => widen_memory::<u8, u64, X>,
            (2, 2) => widen_memory::<u16, u16, X>,
            (2, 4) => widen_memory::<u16, u32, X>,
            (2, _) => widen_memory::<u16, u64, X>,
            (_, 8) => widen_memory::<u32, u64, X>,
            (_, 4) => widen_memory::<u32, u32, X>,
            (_, _) => widen_memory::<u32, u16, X>,
        }
    }
}

/// Two operands that are general registers, memory or an immediate.
fn mov(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    let general = |n| instruction.op_kind(n) != OpKind::Register || instruction.op_register(n).is_gpr();
    if !general(0) || !general(1) {
        return None;
    }
    Some(match (instruction.op_kind(0), instruction.op_kind(1)) {
        (OpKind::Register, OpKind::Register) => {
            op.a = register_slot(instruction.op_register(0));
            op.b = register_slot(instruction.op_register(1));
            by_width!(bytes, register_register)
        }
        (OpKind::Register, OpKind::Memory) => {
            op.a = register_slot(instruction.op_register(0));
            by_width!(bytes, register_memory)
        }
        (OpKind::Memory, OpKind::Register) => {
            op.a = register_slot(instruction.op_register(1));
            by_width!(bytes, memory_register)
        }
        (OpKind::Register, _) => {
            op.a = register_slot(instruction.op_register(0));
            op.imm = instruction.immediate(1);
            by_width!(bytes, register_immediate)
        }
        (_, _) => {
            op.imm = instruction.immediate(1);
            by_width!(bytes, memory_immediate)
        }
    })
}

/// Register or memory in the first operand, register in the second.
fn pair(instruction: &Instruction, op: &mut Op, registers: Handler, memory: Handler) -> Handler {
    if instruction.op_kind(0) == OpKind::Register && instruction.op_kind(1) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        op.b = register_slot(instruction.op_register(1));
        registers
    } else {
        let register = u32::from(instruction.op_kind(0) == OpKind::Memory);
        op.a = register_slot(instruction.op_register(register));
        memory
    }
}

fn push(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = instruction.stack_pointer_increment().unsigned_abs();
    Some(match instruction.op0_kind() {
        OpKind::Register if instruction.op0_register().is_gpr() => {
            op.a = register_slot(instruction.op0_register());
            by_width!(bytes, push_register)
        }
        OpKind::Register => return None,
        OpKind::Memory => by_width!(bytes, push_memory),
        _ => {
            op.imm = instruction.immediate(0);
            by_width!(bytes, push_immediate)
        }
    })
}

fn pop(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = instruction.stack_pointer_increment();
    Some(match instruction.op0_kind() {
        OpKind::Register if instruction.op0_register().is_gpr() => {
            op.a = register_slot(instruction.op0_register());
            by_width!(bytes, pop_register)
        }
        OpKind::Register => return None,
        _ => by_width!(bytes, pop_memory),
    })
}

/// MOV between the accumulator and an absolute address that does not fit a displacement.
pub(super) fn lower_absolute(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let absolute = instruction.memory_base() == iced_x86::Register::None
        && instruction.memory_index() == iced_x86::Register::None;
    if !absolute || instruction.mnemonic() != Mnemonic::Mov {
        return None;
    }
    op.imm = instruction.memory_displacement64();
    let bytes = operand_bytes(instruction, 0);
    Some(if instruction.op0_kind() == OpKind::Register {
        by_width!(bytes, accumulator_absolute)
    } else {
        by_width!(bytes, absolute_accumulator)
    })
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    Some(match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => return mov(instruction, op),
        Mnemonic::Movzx => widen::<Zero>(instruction, op),
        Mnemonic::Movsx | Mnemonic::Movsxd => widen::<Sign>(instruction, op),
        Mnemonic::Lea => {
            op.a = register_slot(instruction.op0_register());
            by_width!(bytes, lea)
        }
        Mnemonic::Push => return push(instruction, op),
        Mnemonic::Pop => return pop(instruction, op),
        Mnemonic::Xchg => {
            pair(instruction, op, by_width!(bytes, exchange_registers), by_width!(bytes, exchange_memory))
        }
        Mnemonic::Xadd => pair(
            instruction,
            op,
            by_width!(bytes, add_exchange_registers),
            by_width!(bytes, add_exchange_memory),
        ),
        Mnemonic::Cmpxchg => pair(
            instruction,
            op,
            by_width!(bytes, compare_exchange_registers),
            by_width!(bytes, compare_exchange_memory),
        ),
        Mnemonic::Cmpxchg8b => compare_exchange_8b,
        Mnemonic::Cmpxchg16b => compare_exchange_16b,
        mnemonic if is_setcc(mnemonic) => {
            let cc = condition(instruction);
            if instruction.op0_kind() == OpKind::Register {
                op.a = register_slot(instruction.op0_register());
                by_condition!(cc, set_register)
            } else {
                by_condition!(cc, set_memory)
            }
        }
        mnemonic if is_cmovcc(mnemonic) => {
            let cc = condition(instruction);
            op.a = register_slot(instruction.op0_register());
            if instruction.op1_kind() == OpKind::Register {
                op.b = register_slot(instruction.op1_register());
                op.imm = bytes as u64;
                by_condition!(cc, move_register_if)
            } else {
                op.b = low8(bytes as u64);
                by_condition!(cc, move_memory_if)
            }
        }
        _ => return None,
    })
}

fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

fn is_cmovcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

impl Machine<'_> {
    /// Compares and exchanges 16 aligned bytes; what was there before.
    fn compare_exchange_wide(&mut self, place: Place, expected: u128, new: u128) -> Flow<u128> {
        self.probe_write(place, 16)?;
        self.exchange_16(place, expected, new)
    }
}

#[cfg(test)]
#[path = "mov_tests.rs"]
mod tests;
