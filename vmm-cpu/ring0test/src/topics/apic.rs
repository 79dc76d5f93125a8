//! Interrupts that the processor sends itself: priorities, requests, service, ends.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, Mode};
use crate::layout::{APIC, flag, header, page};
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::new(base, Mode::Flat, 0, 32);
    for vector in 0x20..0xe0 {
        setup.arena.resume(vector);
    }
    let ends = random.flip();
    let flags = flag::APIC | if ends { flag::EOI } else { 0 };
    setup.arena.put(header::FLAGS, 4, flags);
    let steps: Vec<(u64, u32)> = (0..random.below(8) + 4)
        .map(|_| {
            let vector = random.pick(&[0x31, 0x35, 0x41, 0x47, 0x52, 0x58, 0x80, 0x8f, 0xc1, 0xd0]);
            (random.below(9), vector)
        })
        .collect();
    let mut title = format!("ends {ends}");
    let data = u32::try_from(setup.arena.at(page::DATA))?;
    let apic = u32::try_from(APIC)?;
    setup.arena.code(32, 0, |a| {
        a.mov(ebx, apic)?;
        a.mov(edi, data)?;
        a.mov(dword_ptr(ebx + 0xf0), 0x1ff)?;
        for (kind, vector) in &steps {
            title += &format!("; {kind} {vector:#x}");
            match kind {
                // To itself.
                0..=2 => a.mov(dword_ptr(ebx + 0x300), 0x4_4000 | vector)?,
                3 => a.mov(dword_ptr(ebx + 0x80), vector & 0xff)?,
                4 => a.mov(dword_ptr(ebx + 0x80), 0)?,
                5 | 6 => {
                    a.sti()?;
                    for _ in 0..3 {
                        a.nop()?;
                    }
                    a.cli()?;
                }
                7 => a.mov(dword_ptr(ebx + 0xb0), 0)?,
                _ => {}
            }
            // PPR, TPR, and of IRR and ISR the word with the vector.
            for register in [0xa0, 0x80, 0x200 + 0x10 * (vector / 32), 0x100 + 0x10 * (vector / 32)] {
                a.mov(eax, dword_ptr(ebx + register))?;
                a.mov(dword_ptr(edi), eax)?;
                a.add(edi, 4)?;
            }
        }
        Ok(())
    })?;
    Ok((title, setup.arena))
}
