//! IRET to everywhere.

use anyhow::Result;

use super::setup::Setup;
use crate::arena::{Arena, rflags};
use crate::layout::{VIRTUAL_SEGMENT, header, page, selector};
use crate::random::Random;

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    setup.descriptors(random);
    let word = match setup.bits {
        64 => random.pick(&[8, 8, 8, 8, 4, 2]),
        _ => random.pick(&[4, 4, 4, 2]),
    };
    let code = match random.below(4) {
        0 => setup.selector(random),
        1 => random.pick(&[selector::CODE_1, selector::CODE_2, selector::CODE_16, selector::USER_CODE_16]),
        2 => random.pick(&[selector::CODE_32, selector::CODE_64, selector::CONFORMING_64]),
        _ => random.pick(&[selector::USER_CODE_32, selector::USER_CODE_64, selector::USER_CODE_64]),
    };
    let is_16 = matches!(code, selector::CODE_16 | selector::USER_CODE_16) || word == 2;
    let mut rip = if is_16 { page::CODE + 0x800 } else { setup.arena.at(page::CODE + 0x800) };
    if word == 8 && random.one_in(10) {
        rip = random.pick(&[0x8000_0000_0000, 0x1_0000_0000, 0x7fff_ffff_ffff, 0xffff_0000_0000_0000]);
    }
    let stack = setup.stack_selector(random);
    let pointer =
        setup.arena.stack_top(64, random.pick(&[page::USER_STACK, setup.stack])) - random.below(0x40) * 8;
    let mut flags = random.bits(rflags::STATUS | rflags::IOPL | rflags::AC | rflags::ID) | rflags::FIXED;
    flags |= random.rarely(12, rflags::NT) | random.rarely(3, rflags::IF);
    flags |= random.rarely(4, rflags::RF);
    if !setup.is_long() && setup.mode.is_paged() && word == 4 {
        flags |= random.rarely(8, rflags::VM);
    }
    let mut words = vec![rip, code.into(), flags, pointer, stack.into()];
    if flags & rflags::VM != 0 {
        // The segment that has the arena's first pages.
        let offset = random.pick(&[page::CODE + 0x800, page::CODE + 0x800, 0x1_6800]);
        words = vec![offset, VIRTUAL_SEGMENT, flags, page::USER_STACK + 0x800, VIRTUAL_SEGMENT];
        words.extend([0x1111, 0x2222, 0x3333, 0x4444]);
    }
    setup.words_on_stack(word, &words);
    let start = random.bits(rflags::IOPL | rflags::AC) | random.rarely(10, rflags::NT);
    setup.arena.put64(header::FRAME_64 + 16, start | rflags::FIXED);
    if !setup.is_long() {
        setup.arena.put(header::FRAME_32 + 8, 4, start | rflags::FIXED);
    }
    // Segments of the outer and of the inner level, some of which do not survive.
    if setup.ring == 0 {
        for field in [header::ES, header::FS, header::GS] {
            let value = random.pick(&[selector::DATA, selector::USER_DATA, selector::CONFORMING_32, 0, 3]);
            setup.arena.put(field, 2, value.into());
        }
    }
    setup.arena.put64(header::FS_BASE, random.next() >> 18);
    setup.arena.put64(header::GS_BASE, random.next() >> 18);
    let bits = setup.bits;
    setup.arena.code(bits, 0, |a| match (bits, word) {
        (_, 8) => a.iretq(),
        (_, 4) => a.iretd(),
        (_, _) => a.iret(),
    })?;
    let title = format!(
        "{}: {word}-byte IRET to {code:#x}:{rip:#x}, flags {flags:#x}, stack {stack:#x}:{pointer:#x}",
        setup.describe()
    );
    Ok((title, setup.arena))
}
