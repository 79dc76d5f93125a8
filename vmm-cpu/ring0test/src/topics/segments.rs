//! Loads of segment registers, LDTR and TR with random selectors, and what LAR, LSL, VERR and VERW say of them.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::Arena;
use crate::layout::page;
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.descriptors(random);
    setup.features(random);
    let mut title = setup.describe();
    let is_64 = setup.bits == 64;
    let result = u32::try_from(setup.arena.at(page::DATA))?;
    // Relative to CS.
    let pointer = if setup.bits == 16 { page::DATA_2 } else { setup.arena.at(page::DATA_2) };
    let pointer = u32::try_from(pointer)?;
    let selectors: Vec<u16> = (0..3).map(|_| setup.selector(random)).collect();
    let kinds: Vec<u64> = (0..3).map(|_| random.below(20)).collect();
    for (selector, n) in selectors.iter().zip(0..) {
        setup.arena.put(page::DATA_2 + 16 * n, 8, 0x1234_5678 | u64::from(*selector) << 32);
    }
    let bits = setup.bits;
    setup.arena.code(bits, 0, |a| {
        for ((selector, kind), n) in selectors.iter().zip(&kinds).zip(0_u32..) {
            title += &format!("; {kind} with {selector:#x}");
            a.mov(eax, u32::from(*selector))?;
            a.mov(ebx, pointer + 16 * n)?;
            a.mov(ebp, result + 16 * n)?;
            a.mov(ecx, 0x5555_5555)?;
            emit(a, *kind, is_64)?;
            // Without a data segment, which may be anything by now.
            match n {
                0 => {
                    a.setz(dl)?;
                    a.mov(esi, ecx)?;
                }
                1 => {
                    a.setz(dh)?;
                    a.mov(edi, ecx)?;
                }
                _ => {}
            }
        }
        Ok(())
    })?;
    Ok((title, setup.arena))
}

fn emit(a: &mut CodeAssembler, kind: u64, is_64: bool) -> Result<(), IcedError> {
    match kind {
        0 => a.mov(ds, eax),
        1 => a.mov(es, eax),
        2 => a.mov(fs, eax),
        3 => a.mov(gs, eax),
        4 | 5 => a.mov(ss, eax),
        6 => a.lldt(ax),
        7 => a.ltr(ax),
        8 | 9 => a.lar(ecx, eax),
        10 | 11 => a.lsl(ecx, eax),
        12 => a.verr(ax),
        13 => a.verw(ax),
        14 if is_64 => {
            a.push(rax)?;
            a.pop(fs)
        }
        14 => {
            a.push(eax)?;
            a.pop(es)
        }
        15 if is_64 => {
            a.push(rax)?;
            a.pop(gs)
        }
        15 => {
            a.push(eax)?;
            a.pop(ss)
        }
        16 if is_64 => a.lss(ecx, fword_ptr(rbx)),
        16 => a.lss(ecx, fword_ptr(ebx).cs()),
        17 if is_64 => a.lfs(ecx, fword_ptr(rbx)),
        17 => a.les(ecx, fword_ptr(ebx).cs()),
        18 if is_64 => a.lgs(ecx, fword_ptr(rbx)),
        18 => a.lgs(ecx, fword_ptr(ebx).cs()),
        _ if is_64 => {
            a.sldt(ecx)?;
            a.str(edx)
        }
        _ => {
            a.mov(ecx, 3)?;
            a.arpl(ax, cx)
        }
    }
}
