//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD.
//!
//! The manual leaves some flags undefined (Intel SDM 2B, "SAL/SAR/SHL/SHR", "RCL/RCR/ROL/ROR"). OF for counts other than
//! one follows the formula for one, as AMD Zen computes it; shifts set AF, as Zen 5 does, and rotates leave it alone.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RCX;
use crate::translate::memory::HostWord;
use crate::translate::segment::low8;
use crate::translate::word::{Word, sign_extend};

/// What of a count counts.
#[inline(always)]
fn count_of<W: Word>(count: u64) -> u32 {
    u32::from(low8(count & if W::BITS == 64 { 63 } else { 31 }))
}

/// Bit `n` of `value`.
#[inline(always)]
fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 != 0
}

/// The most significant bit of a result differs from the carry.
#[inline(always)]
fn overflow_left<W: Word>(result: u64, carry: bool) -> bool {
    bit(result, W::BITS - 1) != carry
}

/// The two most significant bits of a result differ.
#[inline(always)]
fn overflow_right<W: Word>(result: u64) -> bool {
    bit(result ^ result << 1, W::BITS - 1)
}

/// A shift or rotate by a count of 1 to 31, or 63 for 64-bit operands.
trait Shift {
    /// The other status flags follow from the result.
    const SETS_ALL: bool;

    /// Result and carry.
    fn shift<W: Word>(a: u64, count: u32, carry: bool) -> (u64, bool);

    fn overflow<W: Word>(result: u64, carry: bool) -> bool;
}

struct Shl;
struct Shr;
struct Sar;
struct Rol;
struct Ror;
struct Rcl;
struct Rcr;

impl Shift for Shl {
    const SETS_ALL: bool = true;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, _: bool) -> (u64, bool) {
        (a << count & W::MASK, bit(a << (count - 1), W::BITS - 1))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, carry: bool) -> bool {
        overflow_left::<W>(result, carry)
    }
}

impl Shift for Shr {
    const SETS_ALL: bool = true;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, _: bool) -> (u64, bool) {
        (a >> count, bit(a, count - 1))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, _: bool) -> bool {
        overflow_right::<W>(result)
    }
}

impl Shift for Sar {
    const SETS_ALL: bool = true;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, _: bool) -> (u64, bool) {
        let a = sign_extend::<W>(a);
        ((a.cast_signed() >> count).cast_unsigned() & W::MASK, bit(a, count - 1))
    }

    #[inline(always)]
    fn overflow<W: Word>(_: u64, _: bool) -> bool {
        false
    }
}

impl Shift for Rol {
    const SETS_ALL: bool = false;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, _: bool) -> (u64, bool) {
        let count = count % W::BITS;
        let result = (a << count | a >> (W::BITS - 1 - count) >> 1) & W::MASK;
        (result, bit(result, 0))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, carry: bool) -> bool {
        overflow_left::<W>(result, carry)
    }
}

impl Shift for Ror {
    const SETS_ALL: bool = false;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, _: bool) -> (u64, bool) {
        let count = count % W::BITS;
        let result = (a >> count | a << (W::BITS - 1 - count) << 1) & W::MASK;
        (result, bit(result, W::BITS - 1))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, _: bool) -> bool {
        overflow_right::<W>(result)
    }
}

impl Shift for Rcl {
    const SETS_ALL: bool = false;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, carry: bool) -> (u64, bool) {
        let count = count % (W::BITS + 1);
        if count == 0 {
            return (a, carry);
        }
        let result = a << count | u64::from(carry) << (count - 1) | a >> (W::BITS - count) >> 1;
        (result & W::MASK, bit(a, W::BITS - count))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, carry: bool) -> bool {
        overflow_left::<W>(result, carry)
    }
}

impl Shift for Rcr {
    const SETS_ALL: bool = false;

    #[inline(always)]
    fn shift<W: Word>(a: u64, count: u32, carry: bool) -> (u64, bool) {
        let count = count % (W::BITS + 1);
        if count == 0 {
            return (a, carry);
        }
        let result = a >> count | u64::from(carry) << (W::BITS - count) | a << (W::BITS - count) << 1;
        (result & W::MASK, bit(a, count - 1))
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, _: bool) -> bool {
        overflow_right::<W>(result)
    }
}

/// Sets the flags of a shift by a count that is not zero; its result.
#[inline(always)]
fn apply<W: Word, S: Shift>(m: &mut Machine<'_>, a: u64, count: u32) -> u64 {
    let carry = !S::SETS_ALL && m.cpu.flags.cf();
    let (result, carry) = S::shift::<W>(a, count, carry);
    let overflow = S::overflow::<W>(result, carry);
    if S::SETS_ALL {
        m.cpu.flags.set_shifted::<W>(result, carry, overflow);
    } else {
        m.cpu.flags.set_cf_of(carry, overflow);
    }
    result
}

#[inline(always)]
fn to_memory<W: HostWord, S: Shift>(m: &mut Machine<'_>, op: &Op, count: u64) -> Flow {
    let count = count_of::<W>(count);
    let place = m.place(op, W::BYTES, true)?;
    if count == 0 {
        // It is a store nevertheless, which may fault.
        m.modify::<W>(place, false, |a| a)?;
    } else {
        let carry = !S::SETS_ALL && m.cpu.flags.cf();
        let a = m.modify::<W>(place, false, |a| S::shift::<W>(a, count, carry).0)?;
        apply::<W, S>(m, a, count);
    }
    Ok(())
}

/// By an immediate that is not zero.
fn register_immediate<W: HostWord, S: Shift>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let a = m.cpu.get::<W>(op.a);
    let result = apply::<W, S>(m, a, count_of::<W>(op.imm).max(1));
    m.cpu.set::<W>(op.a, result);
    Ok(())
}

/// By zero: just the upper half of a 64-bit register is cleared.
fn register_zero<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let a = m.cpu.get::<W>(op.a);
    m.cpu.set::<W>(op.a, a);
    Ok(())
}

fn register_cl<W: HostWord, S: Shift>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let count = count_of::<W>(m.cpu.r(RCX));
    let a = m.cpu.get::<W>(op.a);
    let result = if count == 0 { a } else { apply::<W, S>(m, a, count) };
    m.cpu.set::<W>(op.a, result);
    Ok(())
}

fn memory_immediate<W: HostWord, S: Shift>(m: &mut Machine<'_>, op: &Op) -> Flow {
    to_memory::<W, S>(m, op, op.imm)
}

fn memory_cl<W: HostWord, S: Shift>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let count = m.cpu.r(RCX);
    to_memory::<W, S>(m, op, count)
}

/// A shift that takes its new bits from a second operand. Counts beyond the width, which 16-bit operands can have, are
/// undefined; AMD Zen fills with the second operand again and clears the carry.
trait Double {
    fn shift<W: Word>(a: u64, b: u64, count: u32) -> (u64, bool);
    fn overflow<W: Word>(result: u64, carry: bool) -> bool;
}

struct Shld;
struct Shrd;

impl Double for Shld {
    #[inline(always)]
    fn shift<W: Word>(a: u64, b: u64, count: u32) -> (u64, bool) {
        if count <= W::BITS {
            ((a << count | b >> (W::BITS - count)) & W::MASK, bit(a, W::BITS - count))
        } else {
            let count = count - W::BITS;
            ((b << count | b >> (W::BITS - count)) & W::MASK, false)
        }
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, carry: bool) -> bool {
        overflow_left::<W>(result, carry)
    }
}

impl Double for Shrd {
    #[inline(always)]
    fn shift<W: Word>(a: u64, b: u64, count: u32) -> (u64, bool) {
        if count <= W::BITS {
            ((a >> count | b << (W::BITS - count)) & W::MASK, bit(a, count - 1))
        } else {
            let count = count - W::BITS;
            ((b >> count | b << (W::BITS - count)) & W::MASK, false)
        }
    }

    #[inline(always)]
    fn overflow<W: Word>(result: u64, _: bool) -> bool {
        overflow_right::<W>(result)
    }
}

/// The second register is `b`, the first one `a`.
#[inline(always)]
fn double_register<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op, count: u64) -> Flow {
    let count = count_of::<W>(count);
    let a = m.cpu.get::<W>(op.a);
    if count == 0 {
        m.cpu.set::<W>(op.a, a);
        return Ok(());
    }
    let (result, carry) = D::shift::<W>(a, m.cpu.get::<W>(op.b), count);
    m.cpu.flags.set_shifted::<W>(result, carry, D::overflow::<W>(result, carry));
    m.cpu.set::<W>(op.a, result);
    Ok(())
}

#[inline(always)]
fn double_memory<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op, count: u64) -> Flow {
    let count = count_of::<W>(count);
    let place = m.place(op, W::BYTES, true)?;
    if count == 0 {
        m.modify::<W>(place, false, |a| a)?;
        return Ok(());
    }
    let b = m.cpu.get::<W>(op.b);
    let a = m.modify::<W>(place, false, |a| D::shift::<W>(a, b, count).0)?;
    let (result, carry) = D::shift::<W>(a, b, count);
    m.cpu.flags.set_shifted::<W>(result, carry, D::overflow::<W>(result, carry));
    Ok(())
}

fn double_register_immediate<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op) -> Flow {
    double_register::<W, D>(m, op, op.imm)
}

fn double_register_cl<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let count = m.cpu.r(RCX);
    double_register::<W, D>(m, op, count)
}

fn double_memory_immediate<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op) -> Flow {
    double_memory::<W, D>(m, op, op.imm)
}

fn double_memory_cl<W: HostWord, D: Double>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let count = m.cpu.r(RCX);
    double_memory::<W, D>(m, op, count)
}

fn single<S: Shift>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    let by_cl = instruction.op_kind(1) == OpKind::Register;
    if !by_cl {
        op.imm = instruction.immediate(1) & if bytes == 8 { 63 } else { 31 };
    }
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        if by_cl {
            by_width!(bytes, register_cl, S)
        } else if op.imm == 0 {
            by_width!(bytes, register_zero)
        } else {
            by_width!(bytes, register_immediate, S)
        }
    } else if by_cl {
        by_width!(bytes, memory_cl, S)
    } else {
        by_width!(bytes, memory_immediate, S)
    })
}

fn double<D: Double>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 1);
    let by_cl = instruction.op_kind(2) == OpKind::Register;
    op.b = register_slot(instruction.op_register(1));
    if !by_cl {
        op.imm = instruction.immediate(2);
    }
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        if by_cl {
            by_width!(bytes, double_register_cl, D)
        } else {
            by_width!(bytes, double_register_immediate, D)
        }
    } else if by_cl {
        by_width!(bytes, double_memory_cl, D)
    } else {
        by_width!(bytes, double_memory_immediate, D)
    })
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => single::<Shl>(instruction, op),
        Mnemonic::Shr => single::<Shr>(instruction, op),
        Mnemonic::Sar => single::<Sar>(instruction, op),
        Mnemonic::Rol => single::<Rol>(instruction, op),
        Mnemonic::Ror => single::<Ror>(instruction, op),
        Mnemonic::Rcl => single::<Rcl>(instruction, op),
        Mnemonic::Rcr => single::<Rcr>(instruction, op),
        Mnemonic::Shld => double::<Shld>(instruction, op),
        Mnemonic::Shrd => double::<Shrd>(instruction, op),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::misc::bench::{Bench, Numbers};
    use super::*;
    use crate::translate::flags::bits;

    #[cfg(target_arch = "x86_64")]
    mod on_the_host {
        use super::super::super::misc::bench::{Native, native};
        use super::*;

        /// The forms with CL of one operation, by width.
        macro_rules! by_cl {
            ($modrm:literal) => {
                [
                    native!(0xd2 $modrm),
                    native!(0x66 0xd3 $modrm),
                    native!(0xd3 $modrm),
                    native!(0x48 0xd3 $modrm),
                ]
            };
        }

        const ROUNDS: u32 = 4000;

        fn compare_all(forms: &[Native; 4], sets_all: bool) {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(1));
            for (native, width) in forms.iter().zip([8_u64, 16, 32, 64]) {
                for round in 0..ROUNDS {
                    let mut before = numbers.registers();
                    if round % 4 == 0 {
                        before[1] = 1;
                    }
                    let count = before[1] & if width == 64 { 63 } else { 31 };
                    let mut defined = bits::STATUS;
                    if count != 0 && sets_all {
                        defined &= !bits::AF;
                    }
                    if count > 1 {
                        defined &= !bits::OF;
                    }
                    if count >= width && sets_all {
                        defined &= !bits::CF;
                    }
                    bench.compare(native, before, defined);
                }
            }
        }

        #[test]
        fn rotates_by_cl() {
            compare_all(&by_cl!(0xc0), false);
            compare_all(&by_cl!(0xc8), false);
        }

        #[test]
        fn rotates_through_carry_by_cl() {
            compare_all(&by_cl!(0xd0), false);
            compare_all(&by_cl!(0xd8), false);
        }

        #[test]
        fn shifts_by_cl() {
            compare_all(&by_cl!(0xe0), true);
            compare_all(&by_cl!(0xe8), true);
            compare_all(&by_cl!(0xf0), true);
            compare_all(&by_cl!(0xf8), true);
        }

        #[test]
        fn immediate_counts() {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(2));
            let forms = [
                native!(0xd0 0xe4),
                native!(0xd1 0xd9),
                native!(0x48 0xd1 0xd2),
                native!(0xc0 0xec 5),
                native!(0xc1 0xe0 0),
                native!(0xc1 0xe0 0x20),
                native!(0x48 0xc1 0xe0 0x20),
                native!(0x48 0xc1 0xfa 0x3f),
                native!(0xc1 0xc2 0x0d),
                native!(0x66 0xc1 0xd0 0x11),
            ];
            for native in &forms {
                for _ in 0..ROUNDS {
                    bench.compare(native, numbers.registers(), bits::CF);
                }
            }
        }

        #[test]
        fn double_shifts() {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(3));
            let forms = [
                (native!(0x66 0x0f 0xa5 0xd0), 16),
                (native!(0x0f 0xa5 0xd0), 32),
                (native!(0x48 0x0f 0xa5 0xd0), 64),
                (native!(0x66 0x0f 0xad 0xd0), 16),
                (native!(0x0f 0xad 0xd0), 32),
                (native!(0x48 0x0f 0xad 0xd0), 64),
            ];
            for (native, width) in &forms {
                for round in 0..ROUNDS {
                    let mut before = numbers.registers();
                    if round % 4 == 0 {
                        before[1] = 1;
                    }
                    let count = before[1] & if *width == 64 { 63 } else { 31 };
                    if count > *width {
                        // Undefined, the destination included.
                        continue;
                    }
                    let defined = match count {
                        0 => bits::STATUS,
                        1 => bits::STATUS & !bits::AF,
                        _ => bits::STATUS & !bits::AF & !bits::OF,
                    };
                    bench.compare(native, before, defined);
                }
            }
            for native in [native!(0x48 0x0f 0xa4 0xd0 0x25), native!(0x0f 0xac 0xd0 0x20)] {
                bench.compare(&native, numbers.registers(), bits::STATUS & !bits::AF & !bits::OF);
            }
        }
    }

    #[test]
    fn memory_is_shifted_as_registers_are() {
        let (mut bench, mut numbers) = (Bench::new(64), Numbers(4));
        // Opcodes with bytes behind the ModRM byte: C1 takes an immediate, the others take CL.
        let forms: [(&[u8], &[u8]); 5] = [
            (&[0x48, 0xc1], &[0x07]),
            (&[0x48, 0xd3], &[]),
            (&[0xd2], &[]),
            (&[0xc1], &[0x20]),
            (&[0xd1], &[]),
        ];
        for (opcode, rest) in forms {
            for operation in [0_u8, 1, 2, 3, 4, 5, 7] {
                let code = |modrm: u8| [opcode, &[modrm | operation << 3], rest].concat();
                let (value, flags) = (numbers.next(), numbers.next() & bits::STATUS);
                let len = if opcode[0] == 0x48 { 8 } else { 4 };
                bench.set(&[(RCX, numbers.next()), (0, value), (3, 0x8ffd)]);
                bench.poke(0x8ffd, &value.to_le_bytes());
                bench.core.cpu.flags.set(flags);
                bench.run(&code(0xc0)).unwrap();
                let (result, after) = (bench.r(0), bench.core.cpu.flags.get());
                bench.core.cpu.flags.set(flags);
                bench.run(&code(0x03)).unwrap();
                assert_eq!(bench.core.cpu.flags.get(), after, "{:x?}", code(0x03));
                assert_eq!(bench.peek(0x8ffd, len), result.to_le_bytes()[..len], "{:x?}", code(0x03));
            }
        }
        for opcode in [0xa5, 0xad] {
            bench.set(&[(RCX, 13), (0, 0x0123_4567_89ab_cdef), (2, 0xfedc_ba98_7654_3210), (3, 0x8ffd)]);
            bench.poke(0x8ffd, &bench.r(0).to_le_bytes());
            bench.run(&[0x48, 0x0f, opcode, 0xd0]).unwrap();
            bench.run(&[0x48, 0x0f, opcode, 0x13]).unwrap();
            assert_eq!(bench.peek(0x8ffd, 8), bench.r(0).to_le_bytes());
        }
    }

    #[test]
    fn double_shifts_beyond_the_width_take_the_source_again() {
        let mut bench = Bench::new(64);
        bench.set(&[(0, 0x1234), (2, 0xabcd), (RCX, 20)]);
        bench.run(&[0x66, 0x0f, 0xa5, 0xd0]).unwrap();
        assert_eq!(bench.r(0), 0xbcda);
        bench.set(&[(0, 0x1234)]);
        bench.run(&[0x66, 0x0f, 0xad, 0xd0]).unwrap();
        assert_eq!(bench.r(0), 0xdabc);
    }
}
