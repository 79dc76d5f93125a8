//! RDMSR and WRMSR, SWAPGS, the instructions on FS and GS bases.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::Arena;
use crate::layout::header;
use crate::random::Random;

/// Registers that both engines have.
const MSRS: [u32; 16] = [
    0xc000_0080,
    0xc000_0080,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x175,
    0x176,
    0x277,
    0x200,
];

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.features(random);
    for field in [header::FS_BASE, header::GS_BASE, header::KERNEL_GS_BASE] {
        setup.arena.put64(field, random.next() >> 20);
    }
    let mut title = setup.describe();
    let steps: Vec<(u64, u32, u64)> = (0..2)
        .map(|_| {
            let random_value = random.next();
            let msr = random.pick(&MSRS);
            let value = match random.below(6) {
                0 => random_value,
                1 => random_value >> 17,
                2 => (random_value.cast_signed() >> 17).cast_unsigned(),
                3 => random.pick(&[0x8000_0000_0000, 0x7fff_ffff_ffff, 0xffff_7fff_ffff_ffff]),
                4 => random_value & 0x0007_0406_0701_0400,
                _ => random_value & 0xffff_ffff,
            };
            let value = match msr {
                // LME does not change while there is paging: QEMU does not refuse that.
                0xc000_0080 if setup.mode.is_paged() => {
                    random_value & 0xc01 | (setup.arena.get(header::EFER, 8) & 0x100)
                }
                0xc000_0080 => random_value & 0xd01,
                // Reserved bits are another thing here and there.
                0xc000_0084 => value & 0xffff_ffff,
                0x174 => value & 0xffff,
                _ => value,
            };
            (random.below(10), msr, value)
        })
        .collect();
    let bits = setup.bits;
    setup.arena.code(bits, 0, |a| {
        for (kind, msr, value) in &steps {
            title += &format!("; {kind} of {msr:#x} with {value:#x}");
            a.mov(ecx, *msr)?;
            a.mov(eax, low(*value))?;
            a.mov(edx, low(*value >> 32))?;
            match kind {
                0..=4 => {
                    a.wrmsr()?;
                    a.mov(eax, 0x77)?;
                    a.rdmsr()?;
                }
                5 => a.rdmsr()?,
                6 | 7 if bits == 64 => {
                    a.mov(rbx, *value)?;
                    if value & 1 == 0 {
                        a.wrfsbase(rbx)?
                    } else {
                        a.wrgsbase(rbx)?
                    }
                    a.rdgsbase(r8)?;
                    a.rdfsbase(r9d)?;
                }
                8 if bits == 64 => {
                    a.mov(rbx, *value)?;
                    a.wrgsbase(ebx)?;
                    a.rdgsbase(r8)?;
                }
                6..=8 => a.rdtsc()?,
                _ if bits == 64 => a.swapgs()?,
                _ => a.nop()?,
            }
            if matches!(kind, 6..=8) && bits != 64 {
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
            }
            a.mov(esi, eax)?;
            a.mov(edi, edx)?;
        }
        Ok(())
    })?;
    Ok((title, setup.arena))
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}
