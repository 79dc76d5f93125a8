//! Decimal arithmetic of legacy modes: AAA, AAS, AAM, AAD, DAA, DAS; and SALC, which is as old.

use iced_x86::{Instruction, Mnemonic};

use super::op::{Handler, Op};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{HIGH_BYTE, RAX};
use crate::translate::flags::bits;

/// AH.
const AH: u8 = RAX | HIGH_BYTE;

/// Sets SF, ZF and PF by AL, carry and adjust flag as given, and clears OF, which is undefined.
fn set_flags(m: &mut Machine<'_>, carry: bool, adjust: bool) {
    let al = m.cpu.get::<u8>(RAX);
    m.cpu.flags.set_logic::<u8>(al);
    let value = if carry { bits::CF } else { 0 } | if adjust { bits::AF } else { 0 };
    m.cpu.flags.replace_status(bits::CF | bits::AF, value);
}

fn adjust_flag(m: &Machine<'_>) -> bool {
    m.cpu.flags.get() & bits::AF != 0
}

/// AAA and AAS. SF, ZF and PF, undefined, follow AL.
fn ascii_adjust(m: &mut Machine<'_>, subtracts: bool) -> Flow {
    let ax = m.cpu.get::<u16>(RAX);
    let adjust = ax & 0xf > 9 || adjust_flag(m);
    let ax = match (adjust, subtracts) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    m.cpu.set::<u16>(RAX, ax & 0xff0f);
    set_flags(m, adjust, adjust);
    Ok(())
}

fn aaa(m: &mut Machine<'_>, _: &Op) -> Flow {
    ascii_adjust(m, false)
}

fn aas(m: &mut Machine<'_>, _: &Op) -> Flow {
    ascii_adjust(m, true)
}

fn aam(m: &mut Machine<'_>, op: &Op) -> Flow {
    let base = u64::from(m.rare(op).immediate8());
    let al = m.cpu.get::<u8>(RAX);
    let (Some(quotient), Some(remainder)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(m.divide_error());
    };
    m.cpu.set::<u16>(RAX, quotient << 8 | remainder);
    set_flags(m, false, false);
    Ok(())
}

fn aad(m: &mut Machine<'_>, op: &Op) -> Flow {
    let base = u64::from(m.rare(op).immediate8());
    let value = m.cpu.get::<u8>(AH).wrapping_mul(base).wrapping_add(m.cpu.get::<u8>(RAX));
    m.cpu.set::<u16>(RAX, value & 0xff);
    set_flags(m, false, false);
    Ok(())
}

/// DAA and DAS (Intel SDM 2A, "DAA").
fn decimal_adjust(m: &mut Machine<'_>, subtracts: bool) -> Flow {
    let old = m.cpu.get::<u8>(RAX);
    let old_carry = m.cpu.flags.cf();
    let low = old & 0xf > 9 || adjust_flag(m);
    let high = old > 0x99 || old_carry;
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    // The correction of the low digit alone carries in a subtraction only: 9A to 9F count as high.
    let carry = high || subtracts && low && old < 6;
    let new = if subtracts { old.wrapping_sub(correction) } else { old + correction };
    m.cpu.set::<u8>(RAX, new);
    set_flags(m, carry, low);
    Ok(())
}

fn daa(m: &mut Machine<'_>, _: &Op) -> Flow {
    decimal_adjust(m, false)
}

fn das(m: &mut Machine<'_>, _: &Op) -> Flow {
    decimal_adjust(m, true)
}

/// SALC: AL becomes the carry flag, spread.
fn salc(m: &mut Machine<'_>, _: &Op) -> Flow {
    let value = if m.cpu.flags.cf() { 0xff } else { 0 };
    m.cpu.set::<u8>(RAX, value);
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    let run: Handler = match instruction.mnemonic() {
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Salc => salc,
        _ => return None,
    };
    Some((run, false))
}

#[cfg(test)]
mod tests {
    use super::super::misc::bench::Bench;
    use super::*;
    use crate::translate::core::Reason;
    use crate::translate::exception::vector;

    /// Executes with AX and flags; AX and flags after it.
    fn run(bench: &mut Bench, code: &[u8], ax: u64, flags: u64) -> (u64, u64) {
        bench.set(&[(RAX, ax)]);
        bench.core.cpu.flags.set(flags);
        bench.run(code).unwrap();
        (bench.r(RAX), bench.core.cpu.flags.get() & bits::STATUS)
    }

    /// A byte of two decimal digits.
    fn packed(value: u64) -> u64 {
        ((value / 10) << 4) + value % 10
    }

    #[test]
    fn packed_sums_and_differences_are_decimal() {
        let mut bench = Bench::new(32);
        for a in 0..100 {
            for b in 0..100 {
                let (x, y) = (packed(a), packed(b));
                let half = if (x & 0xf) + (y & 0xf) > 0xf { bits::AF } else { 0 };
                let whole = if x + y > 0xff { bits::CF } else { 0 };
                let (al, flags) = run(&mut bench, &[0x27], (x + y) & 0xff, half | whole);
                assert_eq!((al, flags & bits::CF != 0), (packed((a + b) % 100), a + b > 99), "{a} + {b}");
                let half = if x & 0xf < y & 0xf { bits::AF } else { 0 };
                let whole = if x < y { bits::CF } else { 0 };
                let (al, flags) = run(&mut bench, &[0x2f], x.wrapping_sub(y) & 0xff, half | whole);
                assert_eq!((al, flags & bits::CF != 0), (packed((100 + a - b) % 100), a < b), "{a} - {b}");
                assert_eq!((flags & bits::ZF != 0, flags & bits::SF != 0), (al == 0, al > 0x7f), "{a} - {b}");
            }
        }
    }

    #[test]
    fn decimal_adjustment_of_what_is_no_decimal() {
        let mut bench = Bench::new(32);
        // The low digit's correction borrows, the high one's is not due.
        let (al, flags) = run(&mut bench, &[0x2f], 0x03, bits::AF);
        assert_eq!((al, flags & (bits::CF | bits::AF)), (0xfd, bits::CF | bits::AF));
        let (al, flags) = run(&mut bench, &[0x27], 0xfa, 0);
        assert_eq!((al, flags & (bits::CF | bits::AF)), (0x60, bits::CF | bits::AF));
    }

    #[test]
    fn unpacked_digits_carry_into_ah() {
        let mut bench = Bench::new(32);
        for a in 0..10 {
            for b in 0..10 {
                let half = if a + b > 0xf { bits::AF } else { 0 };
                let (ax, flags) = run(&mut bench, &[0x37], 0x0300 + a + b, half);
                assert_eq!(ax, 0x0300 + (((a + b) / 10) << 8) + (a + b) % 10, "{a} + {b}");
                assert_eq!(flags & bits::CF != 0, a + b > 9, "{a} + {b}");
                let half = if a < b { bits::AF } else { 0 };
                let (ax, flags) = run(&mut bench, &[0x3f], 0x0300 | a.wrapping_sub(b) & 0xff, half);
                assert_eq!(ax, if a < b { 0x0200 + 10 + a - b } else { 0x0300 + a - b }, "{a} - {b}");
                assert_eq!(flags & bits::CF != 0, a < b, "{a} - {b}");
            }
        }
    }

    #[test]
    fn digits_are_split_and_joined() {
        let mut bench = Bench::new(32);
        for value in 0..=255 {
            let (ax, flags) = run(&mut bench, &[0xd4, 10], value, 0);
            assert_eq!(ax, ((value / 10) << 8) + value % 10);
            assert_eq!(flags & bits::ZF != 0, value % 10 == 0);
            assert_eq!(run(&mut bench, &[0xd5, 10], ax, 0).0, value);
        }
        assert_eq!(run(&mut bench, &[0xd4, 16], 0xa7, 0).0, 0x0a07);
        assert_eq!(run(&mut bench, &[0xd5, 16], 0xff0f, 0).0, 0xff);
        bench.set(&[(RAX, 7)]);
        let result = bench.run(&[0xd4, 0]);
        assert!(matches!(result, Err(Reason::Exception(exception)) if exception.vector == vector::DE));
        assert_eq!(bench.r(RAX), 7);
    }

    #[test]
    fn the_carry_spreads_over_al() {
        let mut bench = Bench::new(32);
        assert_eq!(run(&mut bench, &[0xd6], 0x1234, bits::CF).0, 0x12ff);
        assert_eq!(run(&mut bench, &[0xd6], 0x1234, 0).0, 0x1200);
    }
}
