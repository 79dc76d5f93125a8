//! MOV to and from control and debug registers, LMSW, CLTS.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, cr0, cr4};
use crate::layout::header;
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    if setup.ring != 0 && random.flip() {
        setup = Setup::new(base, setup.mode, 0, if setup.is_long() { 64 } else { 32 });
    }
    let mut title = setup.describe();
    let (bits, is_64) = (setup.bits, setup.bits == 64);
    let steps: Vec<(u64, u64)> = (0..2).map(|_| (random.below(12), random.next())).collect();
    let first = [header::CR0, header::CR4, header::CR3].map(|field| setup.arena.get(field, 8));
    let [cr0_now, cr4_now, cr3_now] = first;
    setup.arena.code(bits, 0, |a| {
        for (kind, value) in &steps {
            let value = match kind {
                // Not NW without CD, which QEMU takes.
                0 | 1 => {
                    let bits = cr0::MP | cr0::EM | cr0::TS | cr0::WP | cr0::AM | cr0::CD | cr0::ET;
                    cr0_now ^ value & bits
                }
                2 | 3 => {
                    let bits =
                        cr4::TSD | cr4::DE | cr4::PGE | cr4::MCE | cr4::PCE | cr4::OSXMMEXCPT | cr4::UMIP;
                    let more = cr4::FSGSBASE | cr4::SMEP | cr4::SMAP | cr4::PSE;
                    cr4_now ^ value & (bits | more)
                }
                4 => cr3_now ^ value & 0x18,
                // QEMU takes what is above 15.
                5 => value & 0xf,
                6 => value & 0xffff_ffff,
                // Without reserved bits, which read as zero (AMD64 APM 2 13.1.1) but not in QEMU.
                7 => value & 0xffff_efff,
                8 => value & 0xffff_0300,
                9 => cr0_now & 0xffff ^ value & 0xe,
                _ => *value,
            };
            title += &format!("; {kind} {value:#x}");
            if is_64 {
                a.mov(rax, value)?;
                step_64(a, *kind)?;
            } else {
                a.mov(eax, u32::try_from(value & 0xffff_ffff).unwrap_or(0))?;
                step_32(a, *kind)?;
            }
        }
        Ok(())
    })?;
    Ok((title, setup.arena))
}

fn step_64(a: &mut CodeAssembler, kind: u64) -> Result<(), IcedError> {
    match kind {
        0 | 1 => {
            a.mov(cr0, rax)?;
            a.mov(rcx, cr0)
        }
        2 | 3 => {
            a.mov(cr4, rax)?;
            a.mov(rdx, cr4)
        }
        4 => {
            a.mov(cr3, rax)?;
            a.mov(rsi, cr3)
        }
        5 => {
            a.mov(cr8, rax)?;
            a.mov(rdi, cr8)
        }
        6 => {
            a.mov(dr1, rax)?;
            a.mov(r8, dr1)
        }
        7 => {
            a.mov(dr6, rax)?;
            a.mov(r9, dr6)
        }
        8 => {
            a.mov(dr7, rax)?;
            a.mov(r10, dr7)
        }
        9 => {
            a.lmsw(ax)?;
            a.smsw(r11)
        }
        10 => a.clts(),
        _ => {
            // DR4 and DR5 are DR6 and DR7, or nothing.
            a.db(&[0x0f, 0x21, 0xe1])?;
            a.db(&[0x0f, 0x21, 0xea])
        }
    }
}

fn step_32(a: &mut CodeAssembler, kind: u64) -> Result<(), IcedError> {
    match kind {
        0 | 1 => {
            a.mov(cr0, eax)?;
            a.mov(ecx, cr0)
        }
        2 | 3 => {
            a.mov(cr4, eax)?;
            a.mov(edx, cr4)
        }
        4 => {
            a.mov(cr3, eax)?;
            a.mov(esi, cr3)
        }
        5 => {
            a.mov(cr2, eax)?;
            a.mov(edi, cr2)
        }
        6 => {
            a.mov(dr1, eax)?;
            a.mov(ebp, dr1)
        }
        7 => {
            a.mov(dr6, eax)?;
            a.mov(ebp, dr6)
        }
        8 => {
            a.mov(dr7, eax)?;
            a.mov(ebp, dr7)
        }
        9 => {
            a.lmsw(ax)?;
            a.smsw(edi)
        }
        10 => a.clts(),
        _ => {
            a.db(&[0x0f, 0x21, 0xe1])?;
            a.db(&[0x0f, 0x21, 0xea])
        }
    }
}
