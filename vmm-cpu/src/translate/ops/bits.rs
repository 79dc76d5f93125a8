//! Single bits and their positions: BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT; byte order: BSWAP, MOVBE;
//! additions with a carry flag of their own: ADCX, ADOX.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::flags::{Flags, bits};
use crate::translate::memory::HostWord;
use crate::translate::word::{Word, sign_extend};

/// What happens to the bit that BT looks at.
trait BitChange {
    /// The operand is stored.
    const STORES: bool = true;

    fn change(a: u64, bit: u64) -> u64;
}

struct Keep;
struct Set;
struct Reset;
struct Complement;

impl BitChange for Keep {
    const STORES: bool = false;

    #[inline(always)]
    fn change(a: u64, _: u64) -> u64 {
        a
    }
}

impl BitChange for Set {
    #[inline(always)]
    fn change(a: u64, bit: u64) -> u64 {
        a | bit
    }
}

impl BitChange for Reset {
    #[inline(always)]
    fn change(a: u64, bit: u64) -> u64 {
        a & !bit
    }
}

impl BitChange for Complement {
    #[inline(always)]
    fn change(a: u64, bit: u64) -> u64 {
        a ^ bit
    }
}

/// The selected bit goes to CF; the other flags, undefined in part, stay.
#[inline(always)]
fn set_carry(flags: &mut Flags, carry: bool) {
    let overflow = flags.of();
    flags.set_cf_of(carry, overflow);
}

/// Bit `n`, modulo the width.
#[inline(always)]
fn selected<W: Word>(n: u64) -> u64 {
    1 << (n & (u64::from(W::BITS) - 1))
}

#[inline(always)]
fn in_register<W: Word, C: BitChange>(m: &mut Machine<'_>, op: &Op, n: u64) -> Flow {
    let (a, bit) = (m.cpu.get::<W>(op.a), selected::<W>(n));
    if C::STORES {
        m.cpu.set::<W>(op.a, C::change(a, bit));
    }
    set_carry(&mut m.cpu.flags, a & bit != 0);
    Ok(())
}

#[inline(always)]
fn in_memory<W: HostWord, C: BitChange>(m: &mut Machine<'_>, op: &Op, place: Place, n: u64) -> Flow {
    let bit = selected::<W>(n);
    let a = if C::STORES {
        m.modify::<W>(place, op.locked(), |a| C::change(a, bit))?
    } else {
        m.load::<W>(place)?.extend()
    };
    set_carry(&mut m.cpu.flags, a & bit != 0);
    Ok(())
}

fn bit_register_register<W: HostWord, C: BitChange>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let n = m.cpu.get::<W>(op.b);
    in_register::<W, C>(m, op, n)
}

fn bit_register_immediate<W: HostWord, C: BitChange>(m: &mut Machine<'_>, op: &Op) -> Flow {
    in_register::<W, C>(m, op, op.imm)
}

/// The register selects a bit of a string that extends to both sides of the operand.
fn bit_memory_register<W: HostWord, C: BitChange>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let n = m.cpu.get::<W>(op.b);
    let word = sign_extend::<W>(n).cast_signed() >> W::BITS.trailing_zeros();
    let offset = word.cast_unsigned().wrapping_mul(W::BYTES as u64);
    let place = m.place_at(op, offset, W::BYTES, C::STORES)?;
    in_memory::<W, C>(m, op, place, n)
}

fn bit_memory_immediate<W: HostWord, C: BitChange>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, C::STORES)?;
    in_memory::<W, C>(m, op, place, op.imm)
}

fn bit<C: BitChange>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    let by_register = instruction.op_kind(1) == OpKind::Register;
    if by_register {
        op.b = register_slot(instruction.op_register(1));
    } else {
        op.imm = instruction.immediate(1);
    }
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        if by_register {
            by_width!(bytes, bit_register_register, C)
        } else {
            by_width!(bytes, bit_register_immediate, C)
        }
    } else if by_register {
        by_width!(bytes, bit_memory_register, C)
    } else {
        by_width!(bytes, bit_memory_immediate, C)
    })
}

/// An operation with a source in a register or memory and a register as its destination.
trait Count {
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64);
}

struct Bsf;
struct Bsr;
struct Tzcnt;
struct Lzcnt;
struct Popcnt;

/// BSF and BSR: the destination keeps all 64 bits if the source is zero, and undefined flags are those of the
/// position, as on AMD.
#[inline(always)]
fn scan<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64, position: u32) {
    if source == 0 {
        m.cpu.flags.set_logic::<W>(0);
    } else {
        let position = u64::from(position);
        m.cpu.set::<W>(op.a, position);
        // ZF tells of the source: a bit above the byte that PF tells of keeps it clear.
        m.cpu.flags.set_logic::<W>(position | 0x100);
    }
}

impl Count for Bsf {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        scan::<W>(m, op, source, source.trailing_zeros());
    }
}

impl Count for Bsr {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        scan::<W>(m, op, source, 63_u32.saturating_sub(source.leading_zeros()));
    }
}

/// TZCNT and LZCNT: CF tells of a source of zero, ZF of a count of zero; of the undefined flags OF stays and the others are
/// cleared, as on AMD's Zen 5.
#[inline(always)]
fn set_count<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64, count: u32) {
    m.cpu.set::<W>(op.a, u64::from(count));
    let status = bits::of(source == 0, bits::CF) | bits::of(count == 0, bits::ZF);
    m.cpu.flags.replace_status(bits::STATUS & !bits::OF, status);
}

impl Count for Tzcnt {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        set_count::<W>(m, op, source, source.trailing_zeros().min(W::BITS));
    }
}

impl Count for Lzcnt {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        set_count::<W>(m, op, source, source.leading_zeros() - (64 - W::BITS));
    }
}

impl Count for Popcnt {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        m.cpu.set::<W>(op.a, u64::from(source.count_ones()));
        m.cpu.flags.replace_status(bits::STATUS, if source == 0 { bits::ZF } else { 0 });
    }
}

fn count_register<W: HostWord, C: Count>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let source = m.cpu.get::<W>(op.b);
    C::run::<W>(m, op, source);
    Ok(())
}

fn count_memory<W: HostWord, C: Count>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let source = m.load::<W>(place)?.extend();
    C::run::<W>(m, op, source);
    Ok(())
}

/// ADCX and ADOX.
struct AddCarry;
struct AddOverflow;

impl Count for AddCarry {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        let carry = m.cpu.flags.cf();
        let carry = add::<W>(m, op, source, carry);
        set_carry(&mut m.cpu.flags, carry);
    }
}

impl Count for AddOverflow {
    #[inline(always)]
    fn run<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64) {
        let (carry, overflow) = (m.cpu.flags.cf(), m.cpu.flags.of());
        let overflow = add::<W>(m, op, source, overflow);
        m.cpu.flags.set_cf_of(carry, overflow);
    }
}

/// Adds to the destination; the carry out.
#[inline(always)]
fn add<W: Word>(m: &mut Machine<'_>, op: &Op, source: u64, carry: bool) -> bool {
    let a = m.cpu.get::<W>(op.a);
    m.cpu.set::<W>(op.a, a.wrapping_add(source).wrapping_add(u64::from(carry)));
    (u128::from(a) + u128::from(source) + u128::from(carry)) >> W::BITS != 0
}

fn count<C: Count>(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    op.a = register_slot(instruction.op_register(0));
    Some(if instruction.op_kind(1) == OpKind::Register {
        op.b = register_slot(instruction.op_register(1));
        by_width!(bytes, count_register, C)
    } else {
        by_width!(bytes, count_memory, C)
    })
}

/// The bytes of a word in the opposite order.
#[inline(always)]
fn swap_bytes<W: Word>(value: u64) -> u64 {
    value.swap_bytes() >> (64 - W::BITS)
}

/// BSWAP. That of a 16-bit register is undefined; processors clear it.
fn byte_swap<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let value = if W::BITS == 16 { 0 } else { swap_bytes::<W>(m.cpu.get::<W>(op.a)) };
    m.cpu.set::<W>(op.a, value);
    Ok(())
}

fn load_swapped<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let value = m.load::<W>(place)?.extend();
    m.cpu.set::<W>(op.a, swap_bytes::<W>(value));
    Ok(())
}

fn store_swapped<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, true)?;
    let value = swap_bytes::<W>(m.cpu.get::<W>(op.a));
    m.store(place, W::truncate(value))
}

fn movbe(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(if instruction.op_kind(0) == OpKind::Register {
        op.a = register_slot(instruction.op_register(0));
        by_width!(operand_bytes(instruction, 0), load_swapped)
    } else {
        op.a = register_slot(instruction.op_register(1));
        by_width!(operand_bytes(instruction, 1), store_swapped)
    })
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Bt => bit::<Keep>(instruction, op),
        Mnemonic::Bts => bit::<Set>(instruction, op),
        Mnemonic::Btr => bit::<Reset>(instruction, op),
        Mnemonic::Btc => bit::<Complement>(instruction, op),
        Mnemonic::Bsf => count::<Bsf>(instruction, op),
        Mnemonic::Bsr => count::<Bsr>(instruction, op),
        Mnemonic::Tzcnt => count::<Tzcnt>(instruction, op),
        Mnemonic::Lzcnt => count::<Lzcnt>(instruction, op),
        Mnemonic::Popcnt => count::<Popcnt>(instruction, op),
        Mnemonic::Adcx => count::<AddCarry>(instruction, op),
        Mnemonic::Adox => count::<AddOverflow>(instruction, op),
        Mnemonic::Bswap => {
            op.a = register_slot(instruction.op_register(0));
            Some(by_width!(operand_bytes(instruction, 0), byte_swap))
        }
        Mnemonic::Movbe => movbe(instruction, op),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::misc::bench::{Bench, Numbers};
    use super::*;

    #[cfg(target_arch = "x86_64")]
    mod on_the_host {
        use super::super::super::misc::bench::{Native, native};
        use super::*;

        const ROUNDS: u32 = 4000;

        fn compare_all(forms: &[Native], defined: u64) {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(8));
            for native in forms {
                for _ in 0..ROUNDS {
                    bench.compare(native, numbers.registers(), defined);
                }
            }
        }

        #[test]
        fn single_bits() {
            let forms = [
                native!(0x66 0x0f 0xa3 0xc8),
                native!(0x0f 0xa3 0xc8),
                native!(0x48 0x0f 0xa3 0xc8),
                native!(0x66 0x0f 0xab 0xc8),
                native!(0x0f 0xab 0xc8),
                native!(0x48 0x0f 0xab 0xc8),
                native!(0x0f 0xb3 0xc8),
                native!(0x48 0x0f 0xb3 0xc8),
                native!(0x0f 0xbb 0xc8),
                native!(0x48 0x0f 0xbb 0xc8),
                native!(0x0f 0xba 0xe0 0x25),
                native!(0x48 0x0f 0xba 0xe8 0x25),
                native!(0x66 0x0f 0xba 0xf0 0x1f),
                native!(0x48 0x0f 0xba 0xf8 0x3f),
            ];
            compare_all(&forms, bits::CF | bits::ZF);
        }

        #[test]
        fn positions() {
            let (mut bench, mut numbers) = (Bench::new(64), Numbers(9));
            let forms = [
                (native!(0x0f 0xbc 0xc1), 32),
                (native!(0x48 0x0f 0xbc 0xc1), 64),
                (native!(0x0f 0xbd 0xc1), 32),
                (native!(0x48 0x0f 0xbd 0xc1), 64),
            ];
            for (native, width) in &forms {
                for _ in 0..ROUNDS {
                    let before = numbers.registers();
                    // Processors differ in the upper half of a 32-bit destination that is not written.
                    if *width == 64 || before[1] & 0xffff_ffff != 0 {
                        bench.compare(native, before, bits::ZF);
                    }
                }
            }
        }

        #[test]
        fn counts() {
            if std::is_x86_feature_detected!("bmi1") {
                let forms = [
                    native!(0x66 0xf3 0x0f 0xbc 0xc1),
                    native!(0xf3 0x0f 0xbc 0xc1),
                    native!(0xf3 0x48 0x0f 0xbc 0xc1),
                ];
                compare_all(&forms, bits::CF | bits::ZF);
            }
            if std::is_x86_feature_detected!("lzcnt") {
                let forms = [
                    native!(0x66 0xf3 0x0f 0xbd 0xc1),
                    native!(0xf3 0x0f 0xbd 0xc1),
                    native!(0xf3 0x48 0x0f 0xbd 0xc1),
                ];
                compare_all(&forms, bits::CF | bits::ZF);
            }
            if std::is_x86_feature_detected!("popcnt") {
                let forms = [
                    native!(0x66 0xf3 0x0f 0xb8 0xc1),
                    native!(0xf3 0x0f 0xb8 0xc1),
                    native!(0xf3 0x48 0x0f 0xb8 0xc1),
                ];
                compare_all(&forms, bits::STATUS);
            }
        }

        #[test]
        fn byte_order_and_carries() {
            compare_all(&[native!(0x0f 0xc8), native!(0x48 0x0f 0xc9)], bits::STATUS);
            if std::is_x86_feature_detected!("adx") {
                let forms = [
                    native!(0x66 0x0f 0x38 0xf6 0xc1),
                    native!(0x66 0x48 0x0f 0x38 0xf6 0xc1),
                    native!(0xf3 0x0f 0x38 0xf6 0xc1),
                    native!(0xf3 0x48 0x0f 0x38 0xf6 0xc1),
                ];
                compare_all(&forms, bits::STATUS);
            }
        }
    }

    const RBX: u8 = 3;
    const RCX: u8 = 1;

    #[test]
    fn bit_strings_extend_to_both_sides() {
        let mut bench = Bench::new(64);
        // BTC [RBX], RCX and ECX and CX: the bit that flips, as an offset from the operand.
        let forms: [(&[u8], u64, i64); 6] = [
            (&[0x48, 0x0f, 0xbb, 0x0b], 67, 67),
            (&[0x48, 0x0f, 0xbb, 0x0b], (-1_i64).cast_unsigned(), -1),
            (&[0xf0, 0x48, 0x0f, 0xbb, 0x0b], (-65_i64).cast_unsigned(), -65),
            (&[0x0f, 0xbb, 0x0b], 0x7_ffff_ffdf, -33),
            (&[0x66, 0x0f, 0xbb, 0x0b], 0x7fff, 0x7fff),
            (&[0x66, 0x0f, 0xbb, 0x0b], 0x8000, -0x8000),
        ];
        for (code, n, bit) in forms {
            bench.set(&[(RBX, 0x2_0000), (RCX, n)]);
            let address = 0x2_0000_u64.wrapping_add_signed(bit >> 3);
            bench.poke(address, &[0]);
            for (before, after) in [(false, 1 << (bit & 7)), (true, 0)] {
                bench.run(code).unwrap();
                assert_eq!(bench.core.cpu.flags.cf(), before, "{code:x?}");
                assert_eq!(bench.peek(address, 1), [after], "{code:x?}");
            }
        }
        // An immediate selects a bit of the operand only.
        bench.poke(0x2_0000, &[0; 16]);
        bench.run(&[0x48, 0x0f, 0xba, 0x2b, 0x47]).unwrap();
        assert_eq!(bench.peek(0x2_0000, 1), [0x80]);
        bench.run(&[0x48, 0x0f, 0xba, 0x23, 0x47]).unwrap();
        assert!(bench.core.cpu.flags.cf());
    }

    #[test]
    fn a_source_of_zero_leaves_the_destination() {
        let mut bench = Bench::new(64);
        for code in [[0x0f, 0xbc, 0xc1], [0x0f, 0xbd, 0xc1]] {
            bench.set(&[(0, u64::MAX), (RCX, 1 << 32)]);
            bench.run(&code).unwrap();
            assert!(bench.core.cpu.flags.zf());
            assert_eq!(bench.r(0), u64::MAX);
        }
    }

    #[test]
    fn words_are_loaded_and_stored_in_the_opposite_order() {
        let (mut bench, mut numbers) = (Bench::new(64), Numbers(10));
        let value = numbers.next();
        bench.poke(0x8ffd, &value.to_le_bytes());
        bench.set(&[(0, u64::MAX), (RBX, 0x8ffd)]);
        bench.run(&[0x66, 0x0f, 0x38, 0xf0, 0x03]).unwrap();
        assert_eq!(bench.r(0), u64::MAX << 16 | (value & 0xffff).swap_bytes() >> 48);
        bench.run(&[0x0f, 0x38, 0xf0, 0x03]).unwrap();
        assert_eq!(bench.r(0), (value & 0xffff_ffff).swap_bytes() >> 32);
        bench.run(&[0x48, 0x0f, 0x38, 0xf0, 0x03]).unwrap();
        assert_eq!(bench.r(0), value.swap_bytes());
        bench.run(&[0x48, 0x0f, 0x38, 0xf1, 0x03]).unwrap();
        assert_eq!(bench.peek(0x8ffd, 8), value.to_le_bytes());
    }
}
