//! Instructions that the privilege level, IOPL, UMIP and other bits of CR4 allow or not, at every level.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, cr4, entry, rflags};
use crate::layout::{PAGE, header, page};
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.features(random);
    let flags = random.bits(rflags::STATUS | rflags::IOPL | rflags::AC | rflags::ID | rflags::IF);
    setup.enter(flags);
    // Operands may lie across the end of a page, one of the two not being there or not writable.
    let mut memory = setup.arena.at(page::DATA);
    if setup.mode.is_paged() && random.flip() {
        let window = if setup.bits == 64 { setup.arena.window() } else { setup.arena.low_window() };
        memory = window + random.pick(&[0xff0, 0xff7, 0xff8, 0xffc, 0xffe, 0xfff, 0x1000]);
        for n in 0..2 {
            let value = setup.arena.at(page::FRAME_A + n * PAGE) | entry::P | entry::W | entry::U;
            let value =
                value ^ random.rarely(3, entry::P) ^ random.rarely(3, entry::W) ^ random.rarely(4, entry::U);
            let index = setup.arena.window() / PAGE + n;
            setup.arena.entry(page::WINDOW_TABLE, index, value);
        }
    }
    // For LGDT and LIDT: what is there already.
    for (field, n) in [(header::GDTR, 0), (header::IDTR, 1)] {
        let (limit, table) = (setup.arena.get(field, 2), setup.arena.get(field + 2, 8));
        setup.arena.put(page::DATA_2 + 16 * n, 2, limit);
        setup.arena.put64(page::DATA_2 + 16 * n + 2, table);
    }
    let tables = setup.arena.at(page::DATA_2);
    let (bits, ring) = (setup.bits, setup.ring);
    let counts = setup.arena.get(header::CR4, 8) & cr4::PCE != 0;
    let what = random.below(26);
    setup.arena.code(bits, 0, |a| {
        a.mov(eax, 0x1111_1111)?;
        a.mov(edx, 0x1234)?;
        if bits == 64 {
            a.mov(rbx, memory)?;
            a.mov(rsi, tables)?;
        } else {
            a.mov(ebx, u32::try_from(memory & 0xffff_ffff).unwrap_or(0))?;
            a.mov(esi, u32::try_from(tables & 0xffff_ffff).unwrap_or(0))?;
        }
        // Addresses of 32 bits also in 16-bit code; [RBX] and [RSI] are encoded alike in all modes.
        let wide = |code: &[u8]| if bits == 16 { [&[0x67], code].concat() } else { code.to_vec() };
        match what {
            0 => a.cli(),
            1 => a.sti(),
            // At level 0 nothing would wake it.
            2 if ring != 0 => a.hlt(),
            3 => a.in_(al, dx),
            4 => a.out(dx, al),
            5 => a.clts(),
            6 => a.db(&wide(&[0x0f, 0x01, 0x3b])),
            7 => a.wbinvd(),
            8 => a.db(&wide(&[0x0f, 0x01, 0x16])),
            9 => a.db(&wide(&[0x0f, 0x01, 0x5e, 0x10])),
            // With operands of 32 bits: with those of 16 QEMU stores 24 bits of the base.
            10..=13 if bits == 16 => a.db(&[0x66, 0x67, 0x0f, 0x01, if what < 12 { 0x03 } else { 0x0b }]),
            10 | 11 => a.db(&[0x0f, 0x01, 0x03]),
            12 | 13 => a.db(&[0x0f, 0x01, 0x0b]),
            14 => a.sldt(eax),
            15 => a.str(eax),
            16 => a.smsw(eax),
            17 => a.db(&wide(&[0x0f, 0x00, 0x03])),
            18 => a.db(&wide(&[0x0f, 0x01, 0x23])),
            19 => {
                a.rdtsc()?;
                a.mov(eax, 0)?;
                a.mov(edx, 0)
            }
            20 if ring != 0 && !counts => a.rdpmc(),
            21 => a.stac(),
            22 => a.clac(),
            23 => {
                pop_flags(a, bits)?;
                push_flags(a, bits)
            }
            24 => {
                a.mov(ecx, 0xc000_0080_u32)?;
                a.rdmsr()
            }
            _ => a.xgetbv(),
        }
    })?;
    let title = format!("{}: what {what} at {memory:#x}, flags {flags:#x}", setup.describe());
    // What POPF takes.
    let popped = random.bits(0x3f_ffff & !(rflags::TF | rflags::RF)) | rflags::FIXED;
    let word = match bits {
        64 => 8,
        32 => 4,
        _ => 2,
    };
    if what == 23 {
        setup.words_on_stack(word, &[popped]);
    }
    Ok((title, setup.arena))
}

fn pop_flags(a: &mut CodeAssembler, bits: u32) -> Result<(), IcedError> {
    match bits {
        64 => a.popfq(),
        32 => a.popfd(),
        _ => a.popf(),
    }
}

fn push_flags(a: &mut CodeAssembler, bits: u32) -> Result<(), IcedError> {
    match bits {
        64 => a.pushfq(),
        32 => a.pushfd(),
        _ => a.pushf(),
    }
}
