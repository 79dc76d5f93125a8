//! One or two accesses to the window, whose page-table entries are random.

use anyhow::Result;
use iced_x86::code_asm::*;

use crate::arena::{Arena, Mode, cr0, cr4, efer, entry, rflags};
use crate::layout::*;
use crate::random::Random;

/// What an access does.
#[derive(Clone, Copy, Debug, Default)]
enum Access {
    #[default]
    Read,
    Write,
    Modify,
    /// A jump to it.
    Execute,
    Push,
    InvalidateThenRead,
}

const ACCESSES: [Access; 6] =
    [Access::Push, Access::Read, Access::Write, Access::Modify, Access::Execute, Access::InvalidateThenRead];

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mode = random.pick(&[Mode::Paged, Mode::Pae, Mode::Long, Mode::Long]);
    let user = random.flip();
    let mut arena = Arena::new(base, mode, user);
    registers(&mut arena, mode, random);
    let depth = tables(&mut arena, mode, random);

    let mut va = arena.window() + random.pick(&[0, 0x10, 0xff0, 0xffd, 0x1000, 0x1ffe, 0x2000, 0x2ffc]);
    if mode == Mode::Long && random.one_in(12) {
        // None that begins below the hole and reaches into it: QEMU 7.2 takes the half below for a page fault, where
        // processors have #GP or #SS, as difftest has seen.
        va = random.pick(&[0x8000_0000_0000, 0xffff_0000_0000_0000, 0x7fff_ffff_fff8, 0xffff_ffff_ffff_f000]);
    }
    let bits = match mode {
        Mode::Long if random.one_in(3) => 32,
        Mode::Long => 64,
        _ => 32,
    };
    let va = if bits == 32 && mode == Mode::Long { arena.low_window() + va % PAGE } else { va };
    // A handler at level 0 would go on with the stack of a push.
    let accesses =
        if user { ACCESSES.as_slice() } else { ACCESSES.split_first().map_or(&[][..], |(_, rest)| rest) };
    let access = random.pick(accesses);
    let again = random.pick(accesses);
    let flags = random.rarely(2, rflags::AC);
    let (code, stack_segment) = match (user, bits) {
        (true, 64) => (selector::USER_CODE_64, selector::USER_DATA),
        (true, _) => (selector::USER_CODE_32, selector::USER_DATA),
        (false, 64) => (selector::CODE_64, selector::DATA),
        (false, _) => (selector::CODE_32, selector::DATA),
    };
    let stack = if user { page::USER_STACK } else { page::STACK };
    arena.enter(code, stack_segment, bits, 0, stack, flags);
    arena.data_segments(if user { selector::USER_DATA } else { selector::DATA });
    let wide = bits == 64;
    // What is stored can be executed: it ends the scenario.
    let code = 0x0001_0001_0001_0001 * (0xcd | u64::from(END_VECTOR) << 8);
    arena.register(0, code);
    arena.register(7, code);
    arena.code(bits, 0, |a| {
        for access in [access, again] {
            emit(a, access, va, wide, user)?;
        }
        Ok(())
    })?;
    // What a jump into the window finds there.
    for frame in [page::FRAME_A, page::FRAME_B, page::FRAME_C] {
        for at in 0..PAGE / 2 {
            arena.put(frame + 2 * at, 2, 0xcd | u64::from(END_VECTOR) << 8);
        }
    }
    Ok((format!("{mode:?} {bits}-bit, user {user}, {depth}: {access:?} and {again:?} at {va:#x}"), arena))
}

fn emit(a: &mut CodeAssembler, access: Access, va: u64, wide: bool, user: bool) -> Result<(), IcedError> {
    if wide {
        a.mov(rbx, va)?;
        match access {
            Access::Read => a.mov(rax, qword_ptr(rbx)),
            Access::Write => a.mov(dword_ptr(rbx), edi),
            Access::Modify => a.lock().add(dword_ptr(rbx), 0x1000_0000),
            Access::Execute => a.jmp(rbx),
            Access::Push => {
                a.lea(rsp, qword_ptr(rbx + 8))?;
                a.push(rax)
            }
            Access::InvalidateThenRead if user => a.mov(al, byte_ptr(rbx)),
            Access::InvalidateThenRead => {
                a.invlpg(ptr(rbx))?;
                a.mov(ax, word_ptr(rbx))
            }
        }
    } else {
        a.mov(ebx, u32::try_from(va & 0xffff_ffff).unwrap_or(0))?;
        match access {
            Access::Read => a.mov(eax, dword_ptr(ebx)),
            Access::Write => a.mov(dword_ptr(ebx), edi),
            Access::Modify => a.lock().add(dword_ptr(ebx), 0x1000_0000),
            Access::Execute => a.jmp(ebx),
            Access::Push => {
                a.lea(esp, dword_ptr(ebx + 4))?;
                a.push(eax)
            }
            Access::InvalidateThenRead if user => a.mov(al, byte_ptr(ebx)),
            Access::InvalidateThenRead => {
                a.invlpg(ptr(ebx))?;
                a.mov(ax, word_ptr(ebx))
            }
        }
    }
}

/// Control registers and EFER.
fn registers(arena: &mut Arena, mode: Mode, random: &mut Random) {
    let protection = cr0::PG | cr0::PE | cr0::ET | cr0::NE;
    arena.put64(header::CR0, protection | random.bits(cr0::WP));
    arena.set(header::CR4, random.bits(cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP));
    let nx = random.bits(efer::NXE);
    let long = if mode == Mode::Long { efer::LME } else { 0 };
    arena.put64(header::EFER, long | nx);
}

/// Spoils the entries of the window; in words.
fn tables(arena: &mut Arena, mode: Mode, random: &mut Random) -> String {
    use entry::*;
    let frames = [page::FRAME_A, page::FRAME_B, page::FRAME_C];
    let window = arena.window();
    let has_large = mode != Mode::Paged || arena.get(header::CR4, 8) & cr4::PSE != 0;
    let mut words = String::new();
    let nx = if mode == Mode::Paged { 0 } else { NX };
    for n in 0..3 {
        if random.one_in(3) {
            continue;
        }
        let mut value = arena.at(random.pick(&frames)) | P | W | U | A | D;
        value ^= random.bits(W | U | A | D | G) & random.next();
        value ^= random.rarely(5, P);
        value ^= random.rarely(3, nx);
        if mode != Mode::Paged {
            value ^= random.bit_rarely(8, 46, 6);
            value ^= random.bit_rarely(12, 52, 11);
        }
        words += &format!("PTE {n} {value:#x}; ");
        arena.entry(page::WINDOW_TABLE, window / PAGE + n, value);
    }
    let levels: &[(u64, u64, u64)] = match mode {
        Mode::Long => &[
            (page::ROOT, 1, page::WINDOW_POINTERS),
            (page::WINDOW_POINTERS, 0, page::WINDOW_DIRECTORY),
            (page::WINDOW_DIRECTORY, window >> 21, page::WINDOW_TABLE),
        ],
        Mode::Pae => &[(page::WINDOW_DIRECTORY, window >> 21, page::WINDOW_TABLE)],
        _ => &[(page::ROOT, window >> 22, page::WINDOW_TABLE)],
    };
    for (table, index, target) in levels {
        if !random.one_in(3) {
            continue;
        }
        let mut value = arena.at(*target) | P | W | U;
        value ^= random.bits(W | U | A | D | G) & random.next();
        value ^= random.rarely(6, P);
        value ^= random.rarely(4, nx);
        if mode != Mode::Paged {
            value ^= random.bit_rarely(8, 46, 6);
        }
        let shift: u32 = match *table {
            page::ROOT if mode == Mode::Paged => 22,
            page::WINDOW_DIRECTORY => 21,
            page::WINDOW_POINTERS => 30,
            _ => 39,
        };
        if has_large && random.one_in(3) {
            // A large page with the arena in it.
            let size = 1_u64 << shift;
            value |= PS;
            if shift != 39 {
                value = value & (0xfff | NX) | arena.base & !(size - 1);
                // In 32-bit paging bits 13 to 20 are another address.
                value ^= match mode {
                    Mode::Paged => random.bit_rarely(6, 12, 1) | random.bit_rarely(6, 21, 1),
                    _ => random.bit_rarely(6, 12, u64::from(shift) - 12),
                };
            }
        }
        words += &format!("entry of level {shift} {value:#x}; ");
        arena.entry(*table, *index, value);
    }
    words
}
