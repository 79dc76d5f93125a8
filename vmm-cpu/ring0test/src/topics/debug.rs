//! Single steps, breakpoints, and what holds them off.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, rflags};
use crate::layout::{header, page};
use crate::random::Random;

/// Vector of a software interrupt whose handler returns.
const RETURNING: u8 = 0x50;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    for vector in [1, 3, RETURNING] {
        setup.arena.resume(vector);
        let rights = if random.flip() { 0xee } else { 0xef };
        setup.arena.gate_rights(vector, rights);
    }
    let kinds: Vec<u64> = (0..random.below(3) + 2).map(|_| random.below(14)).collect();
    let steps = random.rarely(2, rflags::TF);
    setup.enter(steps | rflags::IF);
    let may_step = steps != 0 || kinds.contains(&6);
    let (bits, ring) = (setup.bits, setup.ring);
    let data = u32::try_from(setup.arena.at(page::DATA))?;
    setup.arena.put(page::DATA, 4, u64::from(setup.stack_segment) | 0x1234_0000);
    // One breakpoint on code, one on data.
    let mut control = 0x400;
    // At one in 16-bit code QEMU 7.2 dies.
    if bits != 16 && random.flip() {
        let at = setup.arena.at(page::CODE) + random.below(24);
        setup.arena.put64(header::DR, at);
        control |= random.pick(&[1, 2, 3]);
    }
    // QEMU tells of a single step and of data in two exceptions, and takes addresses that are not aligned as they are.
    if !may_step && random.flip() {
        let (length, bits) = random.pick(&[(1, 0), (2, 0x40), (4, 0xc0)]);
        let offset = random.below(12) / length * length;
        setup.arena.put64(header::DR + 8, setup.arena.at(page::DATA) + offset);
        control |= random.pick(&[4, 8]) | (random.pick(&[0x10, 0x30]) | bits) << 16;
    }
    setup.arena.put64(header::DR7, control);
    let stack_segment = u32::from(setup.stack_segment);
    setup.arena.code(bits, 0, |a| {
        a.mov(ebx, data)?;
        a.mov(eax, stack_segment)?;
        for kind in &kinds {
            match kind {
                0 | 1 => a.nop()?,
                2 => a.mov(dword_ptr(ebx), ecx)?,
                3 => a.mov(ecx, dword_ptr(ebx + 4))?,
                4 => {
                    a.mov(ss, eax)?;
                    a.nop()?;
                }
                5 => {
                    a.mov(ss, eax)?;
                    a.mov(dword_ptr(ebx + 8), ecx)?;
                }
                6 if bits == 64 => {
                    a.pushfq()?;
                    a.or(dword_ptr(rsp), 0x100)?;
                    a.popfq()?;
                    a.nop()?;
                }
                7 if bits == 64 => {
                    a.pushfq()?;
                    a.and(dword_ptr(rsp), !0x100)?;
                    a.popfq()?;
                }
                6 if bits == 32 => {
                    a.pushfd()?;
                    a.or(dword_ptr(esp), 0x100)?;
                    a.popfd()?;
                    a.nop()?;
                }
                8 => a.int(i32::from(RETURNING))?,
                9 => a.int3()?,
                10 => {
                    a.mov(ecx, 3)?;
                    a.mov(edi, ebx)?;
                    if bits == 64 { a.rep().stosb()? } else { a.nop()? }
                }
                // With QEMU no single step follows STI.
                11 if ring == 0 && !may_step => a.sti()?,
                // Aligned: QEMU watches all of the aligned words that an access overlaps.
                12 => a.add(word_ptr(ebx + 2), 5)?,
                _ => a.inc(ecx)?,
            }
        }
        Ok(())
    })?;
    let data = setup.arena.get(header::DR + 8, 8);
    let title = format!("{}: steps {steps:#x}, DR7 {control:#x}, DR1 {data:#x}, {kinds:?}", setup.describe());
    Ok((title, setup.arena))
}
