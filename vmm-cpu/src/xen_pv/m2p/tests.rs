#![allow(clippy::cast_possible_truncation, reason = "operands are cut to the size of the instruction")]
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::abi::PAGE_SIZE;
use super::super::abi::vcpu::TrapInfo;
use super::super::engine::GuestMode;
use super::super::test_support::{DIRECT, FRAMES, FREE, Guest};
use super::super::vcpu_abi::Action;
use super::*;

const HANDLER: u64 = 0xffff_ffff_8123_4560;
const ENTRY: u64 = XEN_M2P_VA + 8 * 9;
const VALUE: u64 = 0x8182_8384_f586_8788;
const OLD: u64 = 0x1111_2222_3333_4444;

/// A guest kernel about to execute an instruction, with an entry of the table set to [`VALUE`].
fn guest(assemble: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> (Guest, u64) {
    let mut a = CodeAssembler::new(64).unwrap();
    assemble(&mut a).unwrap();
    let code = a.assemble(DIRECT).unwrap();
    let mut guest = Guest::new();
    guest.vcpu.traps[14] = TrapInfo { vector: 14, flags: 0, cs: 0x10, pad: 0, address: HANDLER };
    guest.domain.memory.set_m2p(9, VALUE).unwrap();
    let rip = guest.put_bytes(&code);
    let general = &mut guest.engine.context.general;
    (general.rip, general.rax, general.rbx, general.r9) = (rip, OLD, OLD, OLD);
    (guest, rip + code.len() as u64)
}

#[test]
fn loads_are_done() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let programs: [(Program, u64); 14] = [
        (|a| a.mov(rax, qword_ptr(rdi)), VALUE),
        (|a| a.mov(rax, qword_ptr(rdi + rcx * 8)), VALUE),
        (|a| a.mov(eax, dword_ptr(rdi)), VALUE & 0xffff_ffff),
        (|a| a.mov(ax, word_ptr(rdi)), OLD & !0xffff | 0x8788),
        (|a| a.mov(al, byte_ptr(rdi)), OLD & !0xff | 0x88),
        (|a| a.mov(ah, byte_ptr(rdi)), OLD & !0xff00 | 0x8800),
        // The accumulator's own form, with an address of 64 bits.
        (|a| a.mov(rax, qword_ptr(ENTRY)), VALUE),
        (|a| a.movzx(eax, byte_ptr(rdi)), 0x88),
        (|a| a.movzx(rax, word_ptr(rdi)), 0x8788),
        (|a| a.movzx(ax, byte_ptr(rdi)), OLD & !0xffff | 0x88),
        (|a| a.movsx(rax, byte_ptr(rdi)), 0xffff_ffff_ffff_ff88),
        (|a| a.movsx(eax, word_ptr(rdi)), 0xffff_8788),
        (|a| a.movsx(ax, byte_ptr(rdi)), OLD & !0xffff | 0xff88),
        (|a| a.movsxd(rax, dword_ptr(rdi)), 0xffff_ffff_f586_8788),
    ];
    for (number, (program, expected)) in programs.into_iter().enumerate() {
        let (mut guest, next) = guest(program);
        assert_eq!(guest.exception(14, 0, ENTRY), Action::Continue);
        let general = guest.engine.context.general;
        assert_eq!((general.rax, general.rip), (expected, next), "program {number}: {:#x}", general.rax);
    }
    let (mut guest, next) = guest(|a| a.mov(r9b, byte_ptr(rdi + 1)));
    assert_eq!(guest.exception(14, 0, ENTRY + 1), Action::Continue);
    let general = guest.engine.context.general;
    assert_eq!((general.r9, general.rip), (OLD & !0xff | 0x87, next));
}

/// The definitions of the flags (Intel SDM 1 3.4.3.1), put another way.
#[test]
fn comparisons_set_the_flags() {
    let values = [0, 1, 0xf, 0x10, 0x7f, 0x80, i64::MAX as u64, 1 << 63, u64::MAX, u64::MAX - 1, VALUE, OLD];
    for (a, b) in values.into_iter().flat_map(|a| values.map(|b| (a, b))) {
        let overflow = [
            (1, (a as i8).checked_sub(b as i8).is_none(), (a as u8).checked_sub(b as u8).is_none()),
            (2, (a as i16).checked_sub(b as i16).is_none(), (a as u16).checked_sub(b as u16).is_none()),
            (4, (a as i32).checked_sub(b as i32).is_none(), (a as u32).checked_sub(b as u32).is_none()),
            (8, (a as i64).checked_sub(b as i64).is_none(), a.checked_sub(b).is_none()),
        ];
        for (size, signed, unsigned) in overflow {
            let result = u128::from(a.wrapping_sub(b)) % (1 << (8 * size));
            let ones = (0..8).filter(|bit| result >> bit & 1 != 0).count();
            let expected = [
                (rflags::CF, unsigned),
                (PF, ones % 2 == 0),
                (AF, a % 16 < b % 16),
                (rflags::ZF, result == 0),
                (SF, result >> (8 * size - 1) != 0),
                (OF, signed),
            ];
            let expected: u64 = expected.iter().filter(|(_, set)| *set).map(|(flag, _)| flag).sum();
            assert_eq!(flags_of_difference(a, b, size), expected, "{a:#x} and {b:#x} in {size} bytes");
        }
    }
    for (program, set, clear) in [
        (
            (|a: &mut CodeAssembler| a.cmp(rax, qword_ptr(rdi))) as fn(&mut CodeAssembler) -> _,
            rflags::CF,
            rflags::ZF,
        ),
        (|a| a.cmp(qword_ptr(rdi), rax), OF, SF | rflags::CF | rflags::ZF),
        (|a| a.cmp(byte_ptr(rdi), 0x88_u8 as i32), rflags::ZF, rflags::CF),
        (|a| a.cmp(qword_ptr(rdi), -1), rflags::CF, rflags::ZF),
        (|a| a.test(qword_ptr(rdi), rbx), 0, rflags::ZF | rflags::CF | OF),
        (|a| a.test(dword_ptr(rdi), 0x7000), 0, SF | rflags::CF),
    ] {
        let (mut guest, next) = guest(program);
        guest.engine.context.general.rflags |= clear;
        assert_eq!(guest.exception(14, 0, ENTRY), Action::Continue);
        let general = guest.engine.context.general;
        assert_eq!((general.rip, general.rflags & (set | clear)), (next, set), "{general}");
        assert_eq!(general.rax, OLD);
    }
}

#[test]
fn everything_else_faults() {
    let load = |a: &mut CodeAssembler| a.mov(rax, qword_ptr(rdi));
    let heard = |guest: &Guest| {
        let general = guest.engine.context.general;
        assert_eq!((general.rip, general.rax), (HANDLER, OLD), "{general}");
    };
    let size = guest(load).0.domain.memory.layout().m2p_size();
    assert!(size >= FRAMES * 8);
    // Beyond the end of the table, across it, before its start.
    for address in [XEN_M2P_VA + size, XEN_M2P_VA + size - 4, XEN_M2P_VA - 1, u64::MAX] {
        let (mut guest, _) = guest(load);
        assert_eq!(guest.exception(14, 0, address), Action::Continue);
        heard(&guest);
    }
    // Stores, by error code and by instruction; instructions with no operand in memory, or two.
    let (mut stored, _) = guest(load);
    assert_eq!(stored.exception(14, 2, ENTRY), Action::Continue);
    heard(&stored);
    for program in [
        (|a: &mut CodeAssembler| a.add(qword_ptr(rdi), rax)) as fn(&mut CodeAssembler) -> _,
        |a| a.mov(rax, rbx),
        CodeAssembler::movsq,
        |a| a.push(qword_ptr(rdi)),
        |a| a.movdqu(xmm0, xmmword_ptr(rdi)),
        |a| a.call(qword_ptr(rdi)),
        |a| a.jmp(rdi),
        CodeAssembler::ud2,
    ] {
        let (mut guest, _) = guest(program);
        assert_eq!(guest.exception(14, 0, ENTRY), Action::Continue);
        heard(&guest);
    }
    // Execution there, and code that is gone by now.
    for rip in [ENTRY, 8] {
        let (mut guest, _) = guest(load);
        guest.engine.context.general.rip = rip;
        assert_eq!(guest.exception(14, 0, ENTRY), Action::Continue);
        heard(&guest);
    }
    // A program has no business there.
    let (mut guest, _) = guest(load);
    guest.engine.user_root = Some(FREE * PAGE_SIZE);
    guest.engine.context().kernel_sp = DIRECT + 0x8_1000;
    guest.engine.context.switch_mode(GuestMode::User);
    assert_eq!(guest.exception(14, 4, ENTRY), Action::Continue);
    heard(&guest);
}
