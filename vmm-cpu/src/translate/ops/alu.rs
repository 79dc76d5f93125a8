//! Two-operand arithmetic and logic: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST; one-operand NOT, NEG, INC, DEC.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine};
use crate::translate::flags::Flags;
use crate::translate::memory::HostWord;
use crate::translate::word::Word;

/// An operation on two operands.
trait Binary {
    /// The result is stored.
    const STORES: bool = true;

    /// The result, in the low bits.
    fn value(a: u64, b: u64, carry: u64) -> u64;

    /// Sets the flags of `result`, which has zeros above `W`.
    fn flags<W: Word>(flags: &mut Flags, a: u64, b: u64, result: u64);
}

/// Carries out of each bit of a sum.
#[inline(always)]
fn carries(a: u64, b: u64, result: u64) -> u64 {
    a & b | (a | b) & !result
}

/// Borrows into each bit of a difference.
#[inline(always)]
fn borrows(a: u64, b: u64, result: u64) -> u64 {
    !a & b | (!a | b) & result
}

macro_rules! binary {
    ($($name:ident $stores:literal |$a:ident, $b:ident, $c:ident| $value:expr; $flags:ident;)*) => {$(
        struct $name;

        impl Binary for $name {
            const STORES: bool = $stores;

            #[inline(always)]
            fn value($a: u64, $b: u64, $c: u64) -> u64 {
                let _ = $c;
                $value
            }

            #[inline(always)]
            fn flags<W: Word>(flags: &mut Flags, a: u64, b: u64, result: u64) {
                $flags::<W>(flags, a, b, result);
            }
        }
    )*};
}

#[inline(always)]
fn sum_flags<W: Word>(flags: &mut Flags, a: u64, b: u64, result: u64) {
    flags.set_result::<W>(result, carries(a, b, result));
}

#[inline(always)]
fn difference_flags<W: Word>(flags: &mut Flags, a: u64, b: u64, result: u64) {
    flags.set_result::<W>(result, borrows(a, b, result));
}

#[inline(always)]
fn logic_flags<W: Word>(flags: &mut Flags, _: u64, _: u64, result: u64) {
    flags.set_logic::<W>(result);
}

binary! {
    Add true |a, b, carry| a.wrapping_add(b); sum_flags;
    Or true |a, b, carry| a | b; logic_flags;
    Adc true |a, b, carry| a.wrapping_add(b).wrapping_add(carry); sum_flags;
    Sbb true |a, b, carry| a.wrapping_sub(b).wrapping_sub(carry); difference_flags;
    And true |a, b, carry| a & b; logic_flags;
    Sub true |a, b, carry| a.wrapping_sub(b); difference_flags;
    Xor true |a, b, carry| a ^ b; logic_flags;
    Cmp false |a, b, carry| a.wrapping_sub(b); difference_flags;
    Test false |a, b, carry| a & b; logic_flags;
}

#[inline(always)]
fn apply<W: Word, B: Binary>(m: &mut Machine<'_>, a: u64, b: u64) -> u64 {
    let carry = u64::from(m.cpu.flags.cf());
    let result = B::value(a, b, carry) & W::MASK;
    B::flags::<W>(&mut m.cpu.flags, a, b, result);
    result
}

#[inline(always)]
fn to_register<W: Word, B: Binary>(m: &mut Machine<'_>, op: &Op, b: u64) {
    let a = m.cpu.get::<W>(op.a);
    let result = apply::<W, B>(m, a, b);
    if B::STORES {
        m.cpu.set::<W>(op.a, result);
    }
}

#[inline(always)]
fn to_memory<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op, b: u64) -> Flow {
    let place = m.place(op, W::BYTES, B::STORES)?;
    if B::STORES {
        let carry = u64::from(m.cpu.flags.cf());
        let a = m.modify::<W>(place, op.locked(), |a| B::value(a, b, carry))?;
        B::flags::<W>(&mut m.cpu.flags, a, b, B::value(a, b, carry) & W::MASK);
    } else {
        let a = m.load::<W>(place)?.extend();
        apply::<W, B>(m, a, b);
    }
    Ok(())
}

fn register_register<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let b = m.cpu.get::<W>(op.b);
    to_register::<W, B>(m, op, b);
    Ok(())
}

fn register_immediate<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    to_register::<W, B>(m, op, op.imm);
    Ok(())
}

fn register_memory<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let b = m.load::<W>(place)?.extend();
    to_register::<W, B>(m, op, b);
    Ok(())
}

fn memory_register<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let b = m.cpu.get::<W>(op.a);
    to_memory::<W, B>(m, op, b)
}

fn memory_immediate<W: HostWord, B: Binary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    to_memory::<W, B>(m, op, op.imm)
}

/// XOR or SUB of a register with itself, the customary zero.
fn zero<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.cpu.set::<W>(op.a, 0);
    m.cpu.flags.set_logic::<W>(0);
    Ok(())
}

/// An operation on one operand.
trait Unary {
    fn value(a: u64) -> u64;
    fn flags<W: Word>(flags: &mut Flags, a: u64, result: u64);
}

struct Not;
struct Neg;
struct Inc;
struct Dec;

impl Unary for Not {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        !a
    }

    fn flags<W: Word>(_: &mut Flags, _: u64, _: u64) {}
}

impl Unary for Neg {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_neg()
    }

    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: u64, result: u64) {
        flags.set_result::<W>(result, borrows(0, a, result));
    }
}

impl Unary for Inc {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_add(1)
    }

    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: u64, result: u64) {
        flags.set_result_keep_carry::<W>(result, carries(a, 1, result));
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn value(a: u64) -> u64 {
        a.wrapping_sub(1)
    }

    #[inline(always)]
    fn flags<W: Word>(flags: &mut Flags, a: u64, result: u64) {
        flags.set_result_keep_carry::<W>(result, borrows(a, 1, result));
    }
}

fn unary_register<W: HostWord, U: Unary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let a = m.cpu.get::<W>(op.a);
    let result = U::value(a) & W::MASK;
    m.cpu.set::<W>(op.a, result);
    U::flags::<W>(&mut m.cpu.flags, a, result);
    Ok(())
}

fn unary_memory<W: HostWord, U: Unary>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let a = m.modify::<W>(place, op.locked(), U::value)?;
    U::flags::<W>(&mut m.cpu.flags, a, U::value(a) & W::MASK);
    Ok(())
}

fn binary<B: Binary>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    let register = |n| register_slot(instruction.op_register(n));
    Some(match (instruction.op_kind(0), instruction.op_kind(1)) {
        (OpKind::Register, OpKind::Register) => {
            (op.a, op.b) = (register(0), register(1));
            let is_zero = matches!(instruction.mnemonic(), Mnemonic::Xor | Mnemonic::Sub) && op.a == op.b;
            if is_zero { by_width!(bytes, zero) } else { by_width!(bytes, register_register, B) }
        }
        (OpKind::Register, OpKind::Memory) => {
            op.a = register(0);
            by_width!(bytes, register_memory, B)
        }
        (OpKind::Memory, OpKind::Register) => {
            op.a = register(1);
            by_width!(bytes, memory_register, B)
        }
        (OpKind::Register, _) => {
            op.a = register(0);
            op.imm = instruction.immediate(1) & u64::MAX >> (64 - 8 * bytes);
            by_width!(bytes, register_immediate, B)
        }
        (_, _) => {
            op.imm = instruction.immediate(1) & u64::MAX >> (64 - 8 * bytes);
            by_width!(bytes, memory_immediate, B)
        }
    })
}

fn unary<U: Unary>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        by_width!(bytes, unary_register, U)
    } else {
        by_width!(bytes, unary_memory, U)
    })
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Add => binary::<Add>(instruction, op),
        Mnemonic::Or => binary::<Or>(instruction, op),
        Mnemonic::Adc => binary::<Adc>(instruction, op),
        Mnemonic::Sbb => binary::<Sbb>(instruction, op),
        Mnemonic::And => binary::<And>(instruction, op),
        Mnemonic::Sub => binary::<Sub>(instruction, op),
        Mnemonic::Xor => binary::<Xor>(instruction, op),
        Mnemonic::Cmp => binary::<Cmp>(instruction, op),
        Mnemonic::Test => binary::<Test>(instruction, op),
        Mnemonic::Not => unary::<Not>(instruction, op),
        Mnemonic::Neg => unary::<Neg>(instruction, op),
        Mnemonic::Inc => unary::<Inc>(instruction, op),
        Mnemonic::Dec => unary::<Dec>(instruction, op),
        _ => None,
    }
}

#[cfg(test)]
#[path = "alu_tests.rs"]
mod tests;
