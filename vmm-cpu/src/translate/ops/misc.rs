//! What fits no other family: NOP and hints, flags, sign extension of the accumulator, XLAT, stack frames, PUSHA and
//! POPA, BOUND, fences and cache lines.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Code, Instruction, Mnemonic};

use super::by_width;
use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::cpu::{HIGH_BYTE, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::memory::{Access, HostWord};
use crate::translate::word::sign_extend;

/// AH.
const AH: u8 = RAX | HIGH_BYTE;

fn nop(_: &mut Machine<'_>, _: &Op) -> Flow {
    Ok(())
}

/// PAUSEs of a vCPU after which another thread gets its turn: the vCPU waited for may be without a host processor.
const PAUSES_A_TURN: u32 = 64;

fn pause(m: &mut Machine<'_>, _: &Op) -> Flow {
    std::hint::spin_loop();
    m.pauses += 1;
    if m.pauses >= PAUSES_A_TURN {
        m.pauses = 0;
        if m.shared.max_vcpus > 1 {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// MFENCE: the only fence that loads which acquire and stores which release do not make up for.
fn full_fence(_: &mut Machine<'_>, _: &Op) -> Flow {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH and CLFLUSHOPT: a load as far as faults go. There is no cache to speak of.
fn flush_line(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, 1, false)?;
    if m.tlb.load::<u8>(place.va).is_none() {
        m.translate(place, Access::Read)?;
    }
    Ok(())
}

fn lahf(m: &mut Machine<'_>, _: &Op) -> Flow {
    let flags = m.cpu.flags.get();
    m.cpu.set::<u8>(AH, flags);
    Ok(())
}

fn sahf(m: &mut Machine<'_>, _: &Op) -> Flow {
    let value = m.cpu.get::<u8>(AH);
    m.cpu.flags.replace_status(bits::STATUS & 0xff, value);
    Ok(())
}

fn set_carry(m: &mut Machine<'_>, carry: bool) -> Flow {
    let overflow = m.cpu.flags.of();
    m.cpu.flags.set_cf_of(carry, overflow);
    Ok(())
}

fn clc(m: &mut Machine<'_>, _: &Op) -> Flow {
    set_carry(m, false)
}

fn stc(m: &mut Machine<'_>, _: &Op) -> Flow {
    set_carry(m, true)
}

fn cmc(m: &mut Machine<'_>, _: &Op) -> Flow {
    let carry = m.cpu.flags.cf();
    set_carry(m, !carry)
}

fn cld(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.cpu.flags.set_control(bits::DF, false);
    Ok(())
}

fn std(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.cpu.flags.set_control(bits::DF, true);
    Ok(())
}

/// CBW, CWDE, CDQE: sign-extends the accumulator of width `W` to `D`.
fn extend_accumulator<W: HostWord, D: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    let value = sign_extend::<W>(m.cpu.get::<W>(RAX));
    m.cpu.set::<D>(RAX, value);
    Ok(())
}

/// CWD, CDQ, CQO: fills RDX with the accumulator's sign.
fn spread_sign<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    let negative = m.cpu.get::<W>(RAX) & W::SIGN != 0;
    m.cpu.set::<W>(RDX, if negative { u64::MAX } else { 0 });
    Ok(())
}

fn xlat(m: &mut Machine<'_>, op: &Op) -> Flow {
    let offset = m.cpu.r(RBX).wrapping_add(m.cpu.get::<u8>(RAX)) & op.address_mask();
    let place = m.place_in(op.segment(), offset, 1, false)?;
    let value = m.load::<u8>(place)?;
    m.cpu.set::<u8>(RAX, u64::from(value));
    Ok(())
}

/// `register` with the part that addresses the stack replaced by that of `value`.
fn stack_part(m: &Machine<'_>, register: u64, value: u64) -> u64 {
    let mask = m.mode.stack_mask;
    register & !mask | value & mask
}

fn leave<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    let frame = m.cpu.r(RBP);
    let place = m.stack_place(frame, W::BYTES as u64, false)?;
    let value = m.load::<W>(place)?.extend();
    let rsp = stack_part(m, m.cpu.r(RSP), frame.wrapping_add(W::BYTES as u64));
    m.cpu.set_r(RSP, rsp);
    m.cpu.set::<W>(RBP, value);
    Ok(())
}

/// ENTER. The immediate holds the size of the frame and from bit 16 the nesting level.
fn enter<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let bytes = W::BYTES as u64;
    let (size, level) = (op.imm & 0xffff, op.imm >> 16 & 31);
    let mut rsp = m.cpu.r(RSP);
    let mut push = |m: &mut Machine<'_>, value: u64| -> Flow<u64> {
        rsp = stack_part(m, rsp, rsp.wrapping_sub(bytes));
        let place = m.stack_place(rsp, bytes, true)?;
        m.store(place, W::truncate(value))?;
        Ok(rsp)
    };
    let mut rbp = m.cpu.r(RBP);
    let frame = push(m, rbp)?;
    let mut top = frame;
    for _ in 1..level {
        rbp = stack_part(m, rbp, rbp.wrapping_sub(bytes));
        let place = m.stack_place(rbp, bytes, false)?;
        let value = m.load::<W>(place)?.extend();
        top = push(m, value)?;
    }
    if level > 0 {
        top = push(m, frame)?;
    }
    let top = stack_part(m, top, top.wrapping_sub(size));
    // The new top must be writable, though nothing is written there.
    let place = m.stack_place(top, 1, true)?;
    m.require_aligned(place, W::BYTES)?;
    m.probe_write(place, 1)?;
    m.cpu.set_r(RSP, top);
    m.cpu.set::<W>(RBP, frame);
    Ok(())
}

/// In the order in which they are pushed.
const PUSHED: [u8; 8] = [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI];

fn pusha<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    let bytes = W::BYTES as u64;
    let mut places = [Place::stack(0); 8];
    let mut rsp = m.cpu.r(RSP);
    for place in &mut places {
        rsp = stack_part(m, rsp, rsp.wrapping_sub(bytes));
        *place = m.stack_place(rsp, bytes, true)?;
        m.require_aligned(*place, W::BYTES)?;
        m.probe_write(*place, bytes)?;
    }
    for (place, register) in places.into_iter().zip(PUSHED) {
        let value = m.cpu.get::<W>(register);
        m.store(place, W::truncate(value))?;
    }
    m.cpu.set_r(RSP, rsp);
    Ok(())
}

fn popa<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    let mut values = [0; 8];
    let mut skip = 0;
    for value in &mut values {
        *value = m.peek::<W>(skip)?;
        skip += W::BYTES as u64;
    }
    for (value, register) in values.into_iter().zip(PUSHED.into_iter().rev()) {
        if register != RSP {
            m.cpu.set::<W>(register, value);
        }
    }
    m.drop_stack(skip);
    Ok(())
}

fn bound<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let lower = m.place(op, W::BYTES, false)?;
    let lower = m.load::<W>(lower)?.sign_extend().cast_signed();
    let upper = m.place_at(op, W::BYTES as u64, W::BYTES, false)?;
    let upper = m.load::<W>(upper)?.sign_extend().cast_signed();
    let index = sign_extend::<W>(m.cpu.get::<W>(op.a)).cast_signed();
    if (lower..=upper).contains(&index) { Ok(()) } else { Err(m.raise(Exception::new(vector::BR))) }
}

fn is_register_prefetch(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    )
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    Some(match instruction.mnemonic() {
        // A prefetch from a register: AMD's processors do not take it for NOP.
        M::Reservednop if is_register_prefetch(instruction.code()) => return None,
        // Shadow stacks and branch tracking are off, and prefetches access nothing.
        M::Nop
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote
        | M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Lfence
        | M::Sfence => nop,
        M::Mfence => full_fence,
        M::Pause => pause,
        M::Clflush | M::Clflushopt => flush_line,
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Clc => clc,
        M::Stc => stc,
        M::Cmc => cmc,
        M::Cld => cld,
        M::Std => std,
        M::Cbw => extend_accumulator::<u8, u16>,
        M::Cwde => extend_accumulator::<u16, u32>,
        M::Cdqe => extend_accumulator::<u32, u64>,
        M::Cwd => spread_sign::<u16>,
        M::Cdq => spread_sign::<u32>,
        M::Cqo => spread_sign::<u64>,
        M::Xlatb => xlat,
        M::Enter => {
            op.imm = u64::from(instruction.immediate16()) | u64::from(instruction.immediate8_2nd()) << 16;
            by_width!(stack_word(instruction), enter)
        }
        M::Leave => by_width!(stack_word(instruction), leave),
        M::Pusha => pusha::<u16>,
        M::Pushad => pusha::<u32>,
        M::Popa => popa::<u16>,
        M::Popad => popa::<u32>,
        M::Bound => {
            op.a = register_slot(instruction.op_register(0));
            by_width!(operand_bytes(instruction, 0), bound)
        }
        _ => return None,
    })
}

/// Operand size of ENTER and LEAVE in bytes.
fn stack_word(instruction: &Instruction) -> usize {
    use iced_x86::Code as C;
    match instruction.code() {
        C::Enterw_imm16_imm8 | C::Leavew => 2,
        C::Enterd_imm16_imm8 | C::Leaved => 4,
        _ => 8,
    }
}

#[cfg(test)]
pub(super) mod bench;

#[cfg(test)]
mod tests {
    use super::bench::{Bench, HOLE};
    use super::*;
    use crate::translate::core::Reason;
    use crate::translate::segment::index;

    fn is_exception(result: Result<(), Reason>, wanted: u8) -> bool {
        matches!(result, Err(Reason::Exception(exception)) if exception.vector == wanted)
    }

    #[test]
    fn accumulators_are_sign_extended() {
        let mut bench = Bench::new(64);
        let cases: [(&[u8], u64, u64); 6] = [
            (&[0x66, 0x98], 0x1111_2222_3333_4480, 0x1111_2222_3333_ff80),
            (&[0x98], 0x1111_2222_3333_8001, 0xffff_8001),
            (&[0x48, 0x98], 0x1111_2222_8000_0001, 0xffff_ffff_8000_0001),
            (&[0x66, 0x99], 0x8000, 0x7777_7777_7777_ffff),
            (&[0x99], 0x8000_0000, 0xffff_ffff),
            (&[0x48, 0x99], u64::MAX >> 1, 0),
        ];
        for (code, rax, result) in cases {
            bench.set(&[(RAX, rax), (RDX, 0x7777_7777_7777_7777)]);
            bench.run(code).unwrap();
            let register = if code.last() == Some(&0x98) { RAX } else { RDX };
            assert_eq!(bench.r(register), result, "{code:x?}");
        }
    }

    #[test]
    fn flag_instructions_change_their_flags_only() {
        let mut bench = Bench::new(64);
        let all = bits::STATUS | bits::FIXED | bits::DF;
        for (code, before, after) in [
            (0xf8, all, all & !bits::CF),
            (0xf9, bits::FIXED, bits::FIXED | bits::CF),
            (0xf5, all, all & !bits::CF),
            (0xf5, bits::FIXED, bits::FIXED | bits::CF),
            (0xfc, all, all & !bits::DF),
            (0xfd, bits::FIXED, bits::FIXED | bits::DF),
        ] {
            bench.core.cpu.flags.set(before);
            bench.run(&[code]).unwrap();
            assert_eq!(bench.core.cpu.flags.get(), after, "{code:x}");
        }
        bench.core.cpu.flags.set(all);
        bench.run(&[0x9f]).unwrap();
        assert_eq!(bench.r(RAX), 0xd700);
        bench.set(&[(RAX, 0x2a00)]);
        bench.run(&[0x9e]).unwrap();
        assert_eq!(bench.core.cpu.flags.get(), bits::FIXED | bits::DF | bits::OF);
    }

    #[test]
    fn hints_do_nothing_and_lines_must_exist() {
        let mut bench = Bench::new(64);
        bench.set(&[(RAX, HOLE)]);
        let hints: [&[u8]; 9] = [
            &[0x90],
            &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
            &[0xf3, 0x0f, 0x1e, 0xfa],
            &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],
            &[0x0f, 0x18, 0x08],
            &[0x0f, 0x0d, 0x08],
            &[0xf3, 0x90],
            &[0x0f, 0xae, 0xf0],
            &[0x0f, 0xae, 0xe8],
        ];
        for code in hints {
            bench.run(code).unwrap();
        }
        assert!(is_exception(bench.run(&[0x0f, 0xae, 0x38]), 14));
        bench.set(&[(RAX, 0x8000)]);
        bench.run(&[0x0f, 0xae, 0x38]).unwrap();
    }

    #[test]
    fn xlat_adds_al_to_the_table() {
        let mut bench = Bench::new(64);
        bench.poke(0x80ff, &[0x5a]);
        bench.set(&[(RAX, 0x1234_56ff), (RBX, 0x8000)]);
        bench.run(&[0xd7]).unwrap();
        assert_eq!(bench.r(RAX), 0x1234_565a);
        bench.set(&[(RAX, 0x80), (RBX, 0xffff_ffff_ffff_fff0)]);
        bench.poke(0x70, &[0x77]);
        bench.run(&[0x67, 0xd7]).unwrap();
        assert_eq!(bench.r(RAX), 0x77);
    }

    #[test]
    fn frames_nest() {
        let mut bench = Bench::new(64);
        bench.set(&[(RSP, 0x8800), (RBP, 0x8900)]);
        bench.run(&[0xc8, 0x20, 0, 1]).unwrap();
        assert_eq!((bench.r(RSP), bench.r(RBP)), (0x8800 - 16 - 0x20, 0x87f8));
        let outer = bench.r(RBP);
        bench.run(&[0xc8, 0x10, 0, 2]).unwrap();
        let inner = bench.r(RBP);
        // The old RBP, then the frame pointers of the outer and of the new frame.
        assert_eq!(bench.r(RSP), inner - 16 - 0x10);
        assert_eq!(bench.peek(inner, 8), outer.to_le_bytes());
        assert_eq!(bench.peek(inner - 8, 8), outer.to_le_bytes());
        assert_eq!(bench.peek(inner - 16, 8), inner.to_le_bytes());
        bench.run(&[0xc9]).unwrap();
        bench.run(&[0xc9]).unwrap();
        assert_eq!((bench.r(RSP), bench.r(RBP)), (0x8800, 0x8900));
    }

    #[test]
    fn frames_that_fault_change_nothing() {
        let mut bench = Bench::new(64);
        bench.set(&[(RSP, HOLE + 0x1010), (RBP, 5)]);
        // The new top lies in the hole, though nothing is stored there.
        assert!(is_exception(bench.run(&[0xc8, 0x20, 0, 0]), 14));
        assert_eq!((bench.r(RSP), bench.r(RBP)), (HOLE + 0x1010, 5));
        bench.set(&[(RBP, HOLE)]);
        assert!(is_exception(bench.run(&[0xc9]), 14));
        assert_eq!((bench.r(RSP), bench.r(RBP)), (HOLE + 0x1010, HOLE));
    }

    #[test]
    fn all_registers_are_pushed_and_popped() {
        let mut bench = Bench::new(32);
        let registers: Vec<(u8, u64)> = (0..8).map(|n| (n, 0x1111_1111 * u64::from(n))).collect();
        bench.set(&registers);
        bench.set(&[(RSP, 0x8800)]);
        bench.run(&[0x60]).unwrap();
        assert_eq!(bench.r(RSP), 0x8800 - 32);
        assert_eq!(bench.peek(0x8800 - 4, 4), 0_u32.to_le_bytes());
        assert_eq!(bench.peek(0x8800 - 20, 4), 0x8800_u32.to_le_bytes());
        assert_eq!(bench.peek(0x8800 - 32, 4), 0x7777_7777_u32.to_le_bytes());
        for register in (0..8).filter(|register| *register != RSP) {
            bench.set(&[(register, 0)]);
        }
        bench.run(&[0x61]).unwrap();
        for (register, value) in registers {
            assert_eq!(bench.r(register), if register == RSP { 0x8800 } else { value });
        }
        // The limit of the stack segment is met on the way.
        bench.core.cpu.segment_mut(index::SS).limit = 0x87ff;
        bench.core.cpu.segment_mut(index::SS).attributes |= 4;
        bench.set(&[(RSP, 0x8808)]);
        assert!(is_exception(bench.run(&[0x60]), vector::SS));
        assert_eq!(bench.r(RSP), 0x8808);
    }

    #[test]
    fn bounds_are_signed() {
        let mut bench = Bench::new(32);
        bench.poke(0x8000, &[0xf0, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
        for (value, inside) in
            [(0_u32, true), (5, true), (6, false), (0xffff_fff0, true), (0xffff_ffef, false)]
        {
            bench.set(&[(RAX, value.into()), (RBX, 0x8000)]);
            let result = bench.run(&[0x62, 0x03]);
            assert_eq!(is_exception(result, vector::BR), !inside, "{value:x}");
        }
    }
}
