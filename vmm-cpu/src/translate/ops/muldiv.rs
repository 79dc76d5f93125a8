//! Multiplication and division: MUL, IMUL, DIV, IDIV.
//!
//! Undefined flags are those of AMD's Zen 5: SF, ZF, AF and PF stay as they are after a multiplication, CF and OF after a
//! division, which sets AF and clears the others.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Core, Flow, Leave, Machine};
use crate::translate::cpu::{HIGH_BYTE, RAX, RDX};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::memory::HostWord;
use crate::translate::word::{Word, sign_extend};

/// AH.
const AH: u8 = RAX | HIGH_BYTE;

/// Where the upper half of double-width values is.
const fn high_register<W: Word>() -> u8 {
    if W::BITS == 8 { AH } else { RDX }
}

/// The halves of a product.
#[allow(clippy::cast_possible_truncation, reason = "the halves are what is asked for")]
#[inline(always)]
fn halves(product: u128) -> (u64, u64) {
    (product as u64, (product >> 64) as u64)
}

/// An operation on the accumulator (RDX:RAX, AX for bytes) and one operand.
trait Wide {
    fn run<W: Word>(m: &mut Machine<'_>, operand: u64) -> Flow;
}

struct Mul;
struct Imul;
struct Div;
struct Idiv;

#[inline(always)]
fn set_product<W: Word>(m: &mut Machine<'_>, low: u64, high: u64, overflow: bool) {
    m.cpu.set::<W>(RAX, low);
    m.cpu.set::<W>(high_register::<W>(), high);
    m.cpu.flags.set_cf_of(overflow, overflow);
}

impl Wide for Mul {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, operand: u64) -> Flow {
        let a = m.cpu.get::<W>(RAX);
        let (low, high) = if W::BITS == 64 {
            halves(u128::from(a) * u128::from(operand))
        } else {
            let product = a * operand;
            (product & W::MASK, product >> W::BITS)
        };
        set_product::<W>(m, low, high, high != 0);
        Ok(())
    }
}

/// The low and high half of a signed product, and whether the low half alone is not all of it.
#[inline(always)]
fn signed_product<W: Word>(a: u64, b: u64) -> (u64, u64, bool) {
    let (a, b) = (sign_extend::<W>(a).cast_signed(), sign_extend::<W>(b).cast_signed());
    if W::BITS == 64 {
        let (low, high) = halves((i128::from(a) * i128::from(b)).cast_unsigned());
        (low, high, high != (low.cast_signed() >> 63).cast_unsigned())
    } else {
        // Factors of at most 32 bits.
        let product = (a * b).cast_unsigned();
        let low = product & W::MASK;
        (low, product >> W::BITS & W::MASK, sign_extend::<W>(low) != product)
    }
}

impl Wide for Imul {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, operand: u64) -> Flow {
        let (low, high, overflow) = signed_product::<W>(m.cpu.get::<W>(RAX), operand);
        set_product::<W>(m, low, high, overflow);
        Ok(())
    }
}

impl Core {
    /// #DE.
    #[cold]
    pub(super) fn divide_error(&mut self) -> Leave {
        self.raise(Exception::new(vector::DE))
    }
}

/// Quotient and remainder, both of width `W`; `None` if the quotient does not fit or the divisor is zero.
#[inline(always)]
fn divide<W: Word>(high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    // This includes a divisor of zero.
    if high >= divisor {
        return None;
    }
    if high == 0 {
        return Some((low / divisor, low % divisor));
    }
    if W::BITS == 64 {
        let (dividend, divisor) = (u128::from(high) << 64 | u128::from(low), u128::from(divisor));
        Some((halves(dividend / divisor).0, halves(dividend % divisor).0))
    } else {
        let dividend = high << W::BITS | low;
        Some((dividend / divisor, dividend % divisor))
    }
}

/// As [`divide`], signed: quotients are rounded towards zero, remainders have the sign of the dividend.
#[inline(always)]
fn divide_signed<W: Word>(high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    let divisor = sign_extend::<W>(divisor).cast_signed();
    if W::BITS == 64 && high != (low.cast_signed() >> 63).cast_unsigned() {
        let dividend = (u128::from(high) << 64 | u128::from(low)).cast_signed();
        let divisor = i128::from(divisor);
        let quotient = i64::try_from(dividend.checked_div(divisor)?).ok()?;
        let remainder = dividend.checked_rem(divisor)?;
        return Some((quotient.cast_unsigned(), halves(remainder.cast_unsigned()).0));
    }
    let dividend = match W::BITS {
        64 => low.cast_signed(),
        32 => (high << 32 | low).cast_signed(),
        16 => sign_extend::<u32>(high << 16 | low).cast_signed(),
        _ => sign_extend::<u16>(high << 8 | low).cast_signed(),
    };
    let quotient = dividend.checked_div(divisor)?.cast_unsigned();
    let remainder = dividend.checked_rem(divisor)?.cast_unsigned();
    (sign_extend::<W>(quotient & W::MASK) == quotient).then_some((quotient & W::MASK, remainder & W::MASK))
}

#[inline(always)]
fn set_quotient<W: Word>(m: &mut Machine<'_>, result: Option<(u64, u64)>) -> Flow {
    let Some((quotient, remainder)) = result else { return Err(m.divide_error()) };
    m.cpu.set::<W>(RAX, quotient);
    m.cpu.set::<W>(high_register::<W>(), remainder);
    m.cpu.flags.replace_status(bits::SF | bits::ZF | bits::AF | bits::PF, bits::AF);
    Ok(())
}

impl Wide for Div {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, operand: u64) -> Flow {
        let high = m.cpu.get::<W>(high_register::<W>());
        let result = divide::<W>(high, m.cpu.get::<W>(RAX), operand);
        set_quotient::<W>(m, result)
    }
}

impl Wide for Idiv {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, operand: u64) -> Flow {
        let high = m.cpu.get::<W>(high_register::<W>());
        let result = divide_signed::<W>(high, m.cpu.get::<W>(RAX), operand);
        set_quotient::<W>(m, result)
    }
}

fn wide_register<W: HostWord, O: Wide>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let operand = m.cpu.get::<W>(op.a);
    O::run::<W>(m, operand)
}

fn wide_memory<W: HostWord, O: Wide>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let operand = m.load::<W>(place)?.extend();
    O::run::<W>(m, operand)
}

/// IMUL with a destination register.
#[inline(always)]
fn multiply<W: Word>(m: &mut Machine<'_>, op: &Op, a: u64, b: u64) {
    let (low, _, overflow) = signed_product::<W>(a, b);
    m.cpu.set::<W>(op.a, low);
    m.cpu.flags.set_cf_of(overflow, overflow);
}

fn multiply_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let (a, b) = (m.cpu.get::<W>(op.a), m.cpu.get::<W>(op.b));
    multiply::<W>(m, op, a, b);
    Ok(())
}

fn multiply_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let b = m.load::<W>(place)?.extend();
    let a = m.cpu.get::<W>(op.a);
    multiply::<W>(m, op, a, b);
    Ok(())
}

fn multiply_register_immediate<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let b = m.cpu.get::<W>(op.b);
    multiply::<W>(m, op, op.imm, b);
    Ok(())
}

fn multiply_memory_immediate<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let b = m.load::<W>(place)?.extend();
    multiply::<W>(m, op, op.imm, b);
    Ok(())
}

fn wide<O: Wide>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        by_width!(bytes, wide_register, O)
    } else {
        by_width!(bytes, wide_memory, O)
    })
}

fn imul(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    if instruction.op_count() == 1 {
        return wide::<Imul>(instruction, op);
    }
    let bytes = operand_bytes(instruction, 0);
    let is_register = instruction.op_kind(1) == OpKind::Register;
    op.a = register_slot(instruction.op_register(0));
    if is_register {
        op.b = register_slot(instruction.op_register(1));
    }
    let has_immediate = instruction.op_count() == 3;
    if has_immediate {
        op.imm = instruction.immediate(2) & u64::MAX >> (64 - 8 * bytes);
    }
    Some(match (is_register, has_immediate) {
        (true, false) => by_width!(bytes, multiply_register),
        (true, true) => by_width!(bytes, multiply_register_immediate),
        (false, false) => by_width!(bytes, multiply_memory),
        (false, true) => by_width!(bytes, multiply_memory_immediate),
    })
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Mul => wide::<Mul>(instruction, op),
        Mnemonic::Imul => imul(instruction, op),
        Mnemonic::Div => wide::<Div>(instruction, op),
        Mnemonic::Idiv => wide::<Idiv>(instruction, op),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::misc::bench::{Bench, Numbers};
    use super::*;
    use crate::translate::core::Reason;
    use crate::translate::cpu::RCX;

    fn is_divide_error<T>(result: &Result<T, Reason>) -> bool {
        matches!(result, Err(Reason::Exception(exception)) if exception.vector == vector::DE)
    }

    #[cfg(target_arch = "x86_64")]
    mod on_the_host {
        use super::super::super::misc::bench::native;
        use super::*;
        use crate::translate::flags::bits;

        const ROUNDS: u32 = 4000;

        #[test]
        fn products() {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(5));
            let forms = [
                native!(0xf6 0xe1),
                native!(0x66 0xf7 0xe1),
                native!(0xf7 0xe1),
                native!(0x48 0xf7 0xe1),
                native!(0xf6 0xe9),
                native!(0xf6 0xed),
                native!(0x66 0xf7 0xe9),
                native!(0xf7 0xe9),
                native!(0x48 0xf7 0xe9),
                native!(0x66 0x0f 0xaf 0xc1),
                native!(0x0f 0xaf 0xc1),
                native!(0x48 0x0f 0xaf 0xc1),
                native!(0x66 0x69 0xc1 0x00 0x80),
                native!(0x69 0xc1 0xfe 0xff 0xff 0xff),
                native!(0x48 0x69 0xc1 0x00 0x00 0x00 0x80),
                native!(0x48 0x6b 0xc1 0xfb),
            ];
            for native in &forms {
                for _ in 0..ROUNDS {
                    bench.compare(native, numbers.registers(), bits::CF | bits::OF);
                }
            }
        }

        /// Whether the quotient of the signed or unsigned dividend does not fit.
        fn overflows(before: [u64; 4], width: u32, signed: bool) -> bool {
            let [rax, rcx, rdx, _] = before;
            let mask = u64::MAX >> (64 - width);
            let (low, high) =
                if width == 8 { (rax & 0xff, rax >> 8 & 0xff) } else { (rax & mask, rdx & mask) };
            let dividend = u128::from(high) << width | u128::from(low);
            let divisor = u128::from(rcx & mask);
            if divisor == 0 {
                return true;
            }
            if !signed {
                return dividend / divisor > u128::from(mask);
            }
            let extend = |value: u128, bits: u32| (value << (128 - bits)).cast_signed() >> (128 - bits);
            let limit = 1_i128 << (width - 1);
            extend(dividend, 2 * width)
                .checked_div(extend(divisor, width))
                .is_none_or(|quotient| !(-limit..limit).contains(&quotient))
        }

        #[test]
        fn quotients() {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(6));
            let forms = [
                (native!(0xf6 0xf1), 8, false),
                (native!(0x66 0xf7 0xf1), 16, false),
                (native!(0xf7 0xf1), 32, false),
                (native!(0x48 0xf7 0xf1), 64, false),
                (native!(0xf6 0xf9), 8, true),
                (native!(0x66 0xf7 0xf9), 16, true),
                (native!(0xf7 0xf9), 32, true),
                (native!(0x48 0xf7 0xf9), 64, true),
            ];
            for (native, width, signed) in &forms {
                let (mut errors, mut wide) = (0, 0);
                for round in 0..ROUNDS {
                    let mut before = numbers.registers();
                    // Dividends just below the limit, and those that are narrow.
                    match round % 4 {
                        0 => before[2] = before[1].wrapping_sub(1),
                        1 if *signed => before[2] = (before[1].cast_signed() >> 2).cast_unsigned(),
                        2 => {
                            before[2] =
                                if *signed { (before[0].cast_signed() >> 63).cast_unsigned() } else { 0 }
                        }
                        _ => {}
                    }
                    if overflows(before, *width, *signed) {
                        errors += 1;
                        let result = bench.run_on(native.code, before);
                        assert!(is_divide_error(&result), "{:x?} of {before:x?}", native.code);
                        assert_eq!([bench.r(RAX), bench.r(RDX)], [before[0], before[2]]);
                    } else {
                        wide += u32::from(before[2] != 0);
                        bench.compare(native, before, 0);
                    }
                }
                assert!(errors > 50 && wide > 50, "{:x?}: {errors}, {wide}", native.code);
            }
        }
    }

    #[test]
    fn the_most_negative_quotient_fits_and_its_opposite_does_not() {
        let mut bench = Bench::new(64);
        let cases: [(&[u8], u64, u64, u64, bool); 4] = [
            // -2^64 by 2, and 2^64 by 2.
            (&[0x48, 0xf7, 0xf9], 0, u64::MAX, 2, true),
            (&[0x48, 0xf7, 0xf9], 0, 1, 2, false),
            // -2^63 by -1, and -2^127 by -1.
            (&[0x48, 0xf7, 0xf9], 1 << 63, u64::MAX, u64::MAX, false),
            (&[0x48, 0xf7, 0xf9], 0, 1 << 63, u64::MAX, false),
        ];
        for (code, rax, rdx, rcx, fits) in cases {
            bench.set(&[(RAX, rax), (RDX, rdx), (RCX, rcx)]);
            let result = bench.run(code);
            assert_eq!(is_divide_error(&result), !fits, "{rdx:x}:{rax:x} by {rcx:x}");
            if fits {
                assert_eq!((bench.r(RAX), bench.r(RDX)), (1 << 63, 0));
            }
        }
    }

    #[test]
    fn operands_come_from_memory_too() {
        let (mut bench, mut numbers) = (Bench::new(64), Numbers(7));
        // Register forms take RCX, memory forms [RBX].
        let forms: [(&[u8], u8, &[u8]); 5] = [
            (&[0x48, 0xf7], 0xe0, &[]),
            (&[0x48, 0xf7], 0xe8, &[]),
            (&[0xf7], 0xf0, &[]),
            (&[0x48, 0x0f, 0xaf], 0xc0, &[]),
            (&[0x69], 0xc0, &[1, 2, 3, 4]),
        ];
        for (opcode, modrm, rest) in forms {
            let (rax, operand) = (numbers.next(), numbers.next() | 1);
            bench.poke(0x8ffd, &operand.to_le_bytes());
            let mut results = Vec::new();
            for modrm in [modrm | 1, modrm & 0x38 | 3] {
                bench.set(&[(RAX, rax), (RDX, 0), (RCX, operand), (3, 0x8ffd)]);
                bench.run(&[opcode, &[modrm], rest].concat()).unwrap();
                results.push((bench.r(RAX), bench.r(RDX), bench.core.cpu.flags.cf()));
            }
            assert_eq!(results.first(), results.last(), "{opcode:x?}");
        }
    }
}
