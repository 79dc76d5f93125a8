//! Far JMP, CALL and RET, to segments, through call gates, to tasks.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::setup::Setup;
use crate::arena::{Arena, gate};
use crate::layout::{page, selector};
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.descriptors(random);
    // Entry points, all with the interrupt that ends the scenario: by address, and by offset in the arena.
    let offset = random.pick(&[page::CODE + 0x800, page::CODE + 0x800, setup.arena.at(page::CODE + 0x800)]);
    gates(&mut setup, random);
    let selector = setup.selector(random);
    let selector = if random.one_in(3) {
        selector & 3 | (selector::FREE + 8 * random.pick(&(32..40).collect::<Vec<u16>>()))
    } else {
        selector
    };
    let how = random.below(8);
    let title = format!("{}: way {how} to {selector:#x}:{offset:#x}", setup.describe());
    let pointer = u32::try_from(setup.arena.at(page::DATA_2))?;
    setup.arena.put(page::DATA_2, 4, offset);
    setup.arena.put(page::DATA_2 + 4, 2, selector.into());
    let (bits, narrow, extra) = (setup.bits, random.one_in(4), random.pick(&[0, 0, 4, 8]));
    let far = if how < 6 { Far::Memory { call: how >= 3 } } else { Far::Return { extra } };
    let word = far.operand_bytes(bits, narrow, random);
    if matches!(far, Far::Memory { .. }) && word == 2 {
        setup.arena.put(page::DATA_2 + 2, 2, selector.into());
    }
    let stack_top = setup.arena.stack_top(32, setup.stack) - random.below(0x80) * 2;
    let (stack, other) = (setup.stack_selector(random), setup.stack_selector(random));
    let words = [offset, selector.into(), stack_top, stack.into(), stack_top, other.into()];
    setup.words_on_stack(word, &words);
    setup.arena.code(bits, 0, |a| {
        a.mov(ebx, pointer)?;
        a.db(&far.encoding(bits, word))
    })?;
    Ok((title, setup.arena))
}

/// A far branch.
#[derive(Clone, Copy)]
enum Far {
    /// JMP or CALL through a pointer at EBX.
    Memory {
        call: bool,
    },
    Return {
        extra: u8,
    },
}

impl Far {
    fn operand_bytes(self, bits: u32, narrow: bool, random: &mut Random) -> u64 {
        match self {
            _ if narrow => 2,
            Far::Return { .. } if bits == 64 => random.pick(&[4, 8, 8]),
            _ => 4,
        }
    }

    fn encoding(self, bits: u32, word: u64) -> Vec<u8> {
        let mut code = Vec::new();
        match (bits, word) {
            (16, 4) | (32 | 64, 2) => code.push(0x66),
            _ => {}
        }
        if bits == 16 {
            code.push(0x67);
        }
        if word == 8 {
            code.push(0x48);
        }
        match self {
            Far::Memory { call: false } => code.extend([0xff, 0x2b]),
            Far::Memory { call: true } => code.extend([0xff, 0x1b]),
            Far::Return { extra: 0 } => code.push(0xcb),
            Far::Return { extra } => code.extend([0xca, extra, 0]),
        }
        code
    }
}

/// Replaces some descriptors by call gates, task gates and task-state segments.
fn gates(setup: &mut Setup, random: &mut Random) {
    for n in 32..40_u16 {
        let kind = if setup.is_long() {
            random.pick(&[0xc, 0xc, 0xc, 0xc, 4, 5, 9, 0xb])
        } else {
            random.pick(&[0xc, 0xc, 0xc, 4, 4, 5, 9, 0xb])
        };
        let dpl = random.pick(&[0, 3, 3, 3, 1, 2]) << 5;
        let present = if random.one_in(10) { 0 } else { 0x80 };
        let target = match random.below(8) {
            // Whole segments: QEMU does not compare the gate's offset with the limit.
            0 => random.pick(&[selector::USER_CODE_32, selector::DATA, selector::TSS, 0, 0x2f8, 0x300]),
            1 => selector::CONFORMING_32,
            2 => selector::CONFORMING_64,
            3 => selector::CODE_1,
            _ if setup.is_long() => selector::CODE_64,
            4 => selector::CODE_16,
            _ => selector::CODE_32,
        };
        let target = if kind == 5 { random.pick(&[selector::OTHER_TSS, selector::TSS]) } else { target };
        let is_16 = target == selector::CODE_16 || kind == 4;
        let offset = if is_16 { page::CODE + 0x800 } else { setup.arena.at(page::CODE + 0x800) };
        let parameters = random.pick(&[0, 0, 1, 4, 31]);
        let value = if matches!(kind, 1 | 9 | 0xb) {
            let limit = random.pick(&[0x67, 0x67, 0x2b, 0xfff]);
            crate::arena::descriptor(setup.arena.at(page::OTHER_TSS), limit, kind | dpl | present, 0)
        } else {
            gate(target, offset, kind | dpl | present, parameters)
        };
        setup.arena.gdt(selector::FREE + 8 * n, value);
        // In long mode every second one is the upper half.
        if setup.is_long() && n % 2 == 1 && random.flip() {
            let upper = random.pick(&[0, 0, 0, 0x7fff, 0x8000, 0x100_0000_0000]);
            setup.arena.gdt(selector::FREE + 8 * n, upper);
        }
    }
}
