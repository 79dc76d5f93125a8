//! Exceptions and software interrupts through random gates.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, cr0, descriptor, gate, rflags};
use crate::layout::{STUBS_32, STUBS_64, header, page, selector};
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.descriptors(random);
    if !setup.is_long() && random.one_in(4) {
        setup.arena.narrow_gates();
    }
    let cause = match random.below(16) {
        // QEMU 7.2 does not know INT1. Without paging everything can be read.
        12 => 7,
        11 if !setup.mode.is_paged() => 7,
        cause => cause,
    };
    let vector = match cause {
        0..=4 => random.pick(&[0x20, 0x41, 0x80, 0xff, 0x03]),
        5 => 3,
        6 => 4,
        7 => 6,
        8 => 0,
        9 => 7,
        10 => 13,
        11 => 14,
        13 => 5,
        14 => 11,
        _ => 12,
    };
    let mut title = format!("{}: cause {cause}", setup.describe());
    if vector != 8 && !random.one_in(4) {
        title += &spoil(&mut setup, vector, random);
    }
    let mut flags = random.bits(rflags::STATUS | rflags::IOPL | rflags::AC | rflags::ID | rflags::IF);
    flags |= random.rarely(12, rflags::NT);
    setup.enter(flags);
    if cause == 9 {
        setup.arena.set(header::CR0, random.pick(&[cr0::TS, cr0::EM, cr0::TS | cr0::MP]));
    }
    setup.arena.gdt(0x2f0, 0x0000_7200_0000_ffff | u64::from(setup.ring != 0) << 46);
    let (bits, data) = (setup.bits, u32::try_from(setup.arena.at(page::DATA))?);
    let number = i32::try_from(vector)?;
    let ring = u32::try_from(setup.ring)?;
    setup.arena.code(bits, 0, |a| {
        a.mov(ebx, data)?;
        match cause {
            0..=4 => a.int(number),
            5 => a.int3(),
            6 if bits == 64 => a.ud2(),
            6 => {
                a.mov(al, 0x7f)?;
                a.add(al, 1)?;
                a.into()
            }
            7 => a.ud2(),
            8 => {
                a.xor(ecx, ecx)?;
                a.div(ecx)
            }
            9 => a.fnop(),
            10 => {
                a.mov(eax, 0xfff8)?;
                a.mov(ds, eax)
            }
            11 => {
                a.mov(ebx, 0x3fff_fff0_u32)?;
                if bits == 64 { a.mov(rax, qword_ptr(rbx)) } else { a.mov(eax, dword_ptr(ebx)) }
            }
            13 if bits == 64 => a.int3(),
            13 => {
                a.mov(eax, 5)?;
                a.bound(eax, qword_ptr(ebx))
            }
            // Not present.
            14 => {
                a.mov(eax, 0x2f0 | ring)?;
                a.mov(es, eax)
            }
            _ => {
                a.mov(eax, 0x2f0 | ring)?;
                a.mov(ss, eax)
            }
        }
    })?;
    Ok((title, setup.arena))
}

/// Spoils the gate of a vector, or what delivery needs besides; in words.
fn spoil(setup: &mut Setup, vector: u64, random: &mut Random) -> String {
    let long = setup.is_long();
    let at = page::IDT + vector * if long { 16 } else { 8 };
    let stub = if long { STUBS_64 + vector * 32 } else { STUBS_32 + vector * 16 };
    match random.below(10) {
        0..=4 => {
            let kind = random.below(16);
            let kind = random.pick(&[0xe, 0xe, 0xf, 0xf, 0xe, 5, 0xc, kind]);
            let narrow = kind & 8 == 0 && !long;
            let (offset, good) = match (long, narrow) {
                (true, _) => (stub, selector::CODE_64),
                (_, false) => (stub, selector::CODE_32),
                (_, true) => (stub - crate::layout::HARNESS, selector::HARNESS),
            };
            let target = match random.below(8) {
                // Nothing that would run the entry points as code of another size, or at an outer level, where they
                // cannot write anything down.
                0 => random.pick(&[0x2f8, 0x300, selector::LDT, selector::USER_DATA]),
                1 if setup.ring == 0 && long => selector::CONFORMING_64,
                1 if setup.ring == 0 && !narrow => selector::CONFORMING_32,
                2 if long => random.pick(&[0, 3, selector::DATA, selector::TSS, selector::CODE_32]),
                2 => random.pick(&[0, 3, selector::DATA, selector::TSS]),
                3 => good | random.pick(&[1, 2, 3]),
                _ => good,
            };
            let target = if kind == 5 { random.pick(&[selector::OTHER_TSS, target]) } else { target };
            let rights = kind | random.pick(&[0, 3, 3, 1, 2]) << 5 | if random.one_in(8) { 0 } else { 0x80 };
            let ist = random.pick(&[0, 0, 1, 2, 3]);
            setup.arena.put64(at, gate(target, offset, rights, ist));
            if long {
                // With an exception this becomes a double fault, which QEMU does not see.
                let upper = if vector < 32 { 0 } else { random.pick(&[0, 0, 0, 0, 0x8000]) };
                setup.arena.put64(at + 8, upper);
            }
            format!(", gate {kind:x} rights {rights:#x} to {target:#x}, IST {ist}")
        }
        5 | 6 => {
            let limit = vector * if long { 16 } else { 8 } + random.pick(&[7, 6, 8, 15, 14]);
            let last = (0xe1 * if long { 16 } else { 8 }) - 1;
            // The double fault's own gate stays reachable.
            let limit = limit.max(if long { 0x9f } else { 0x7f });
            setup.arena.put(header::IDTR, 2, if limit > last { last } else { limit });
            format!(", IDT limit {limit:#x}")
        }
        7 if long => {
            let stack = random.pick(&[0x9000_0000_0000, 0x3fff_f000, setup.arena.at(page::DATA) + 5, 0]);
            setup.arena.put64(page::TSS + 4, stack);
            format!(", RSP0 {stack:#x}")
        }
        7 => {
            let stack = setup.selector(random);
            setup.arena.put(page::TSS + 8, 2, stack.into());
            format!(", SS0 {stack:#x}")
        }
        8 if long => {
            // The double fault needs the whole.
            let limit = random.pick(&[0x67, 0x5f]);
            setup.arena.gdt(selector::TSS, descriptor(setup.arena.at(page::TSS), limit, 0x89, 0));
            format!(", TSS limit {limit:#x}")
        }
        // The double fault of an exception would be one task more than such a TSS can save.
        8 if vector < 32 || setup.ring == 0 => String::new(),
        8 => {
            // Of the stacks of levels 0 and 1, to which the handler goes, the second may lie beyond.
            let limit = random.pick(&[0x0b, 0x11, 0x12, 0x13]);
            setup.arena.gdt(selector::TSS, descriptor(setup.arena.at(page::TSS), limit, 0x89, 0));
            setup.arena.put64(at, gate(selector::CODE_1, stub, 0xee, 0));
            format!(", TSS limit {limit:#x}, handler at level 1")
        }
        _ => {
            let kind = random.below(256) | 8;
            let at = setup.arena.idt_offset(13);
            setup.arena.put(at + 5, 1, kind);
            format!(", rights of #GP's gate {kind:#x}")
        }
    }
}
