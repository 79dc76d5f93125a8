//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS.

use anyhow::Result;

use super::setup::Setup;
use crate::arena::{Arena, Mode, efer, rflags};
use crate::layout::{flag, header, page};
use crate::random::Random;

const UD2: [u8; 2] = [0x0f, 0x0b];

pub(super) fn make(base: u64, random: &mut Random) -> Result<(String, Arena)> {
    let mut setup = Setup::any(base, random);
    if !setup.mode.is_paged() {
        // There may be anything at the addresses that these lead to.
        setup = Setup::new(base, Mode::Pae, setup.ring, 32);
    }
    let end = setup.arena.at(page::CODE + 0x800);
    let canonical = |random: &mut Random| {
        let value = random.next();
        random.pick(&[value >> 17, (value.cast_signed() >> 17).cast_unsigned(), 0])
    };
    // QEMU carries into bit 16 of the selector that follows 0xffff.
    let selectors = random.next() & 0x7fff_7fff;
    let selectors = random.pick(&[0x0008_0008, 0x0023_0010, 0x0033_0018, selectors]);
    // The selectors that these load need not be those of flat segments.
    setup.arena.put(header::FLAGS, 4, flag::FLAT_STACK);
    setup.arena.bytes(page::SPARE, &UD2);
    let target = if random.one_in(8) { setup.arena.at(page::SPARE) } else { end };
    setup.arena.put64(header::STAR, selectors << 32 | end);
    setup.arena.put64(header::LSTAR, target);
    setup.arena.put64(header::CSTAR, target);
    setup.arena.put64(header::FMASK, random.bits(0x7fff_ffff) & !rflags::FIXED);
    let sysenter = random.pick(&[8, 8, 8, 0, 3, 0x101]);
    setup.arena.put64(header::SYSENTER_CS, sysenter);
    setup.arena.put64(header::SYSENTER_ESP, setup.arena.at(page::STACK + 0x800));
    setup.arena.put64(header::SYSENTER_EIP, end);
    for field in [header::FS_BASE, header::GS_BASE, header::KERNEL_GS_BASE] {
        let value = canonical(random);
        setup.arena.put64(field, value);
    }
    let long = if setup.is_long() { efer::LME | efer::NXE } else { 0 };
    setup.arena.put64(header::EFER, long | if random.one_in(6) { 0 } else { efer::SCE });
    let flags =
        random.bits(rflags::STATUS | rflags::IOPL | rflags::AC | rflags::ID | rflags::NT | rflags::IF);
    setup.enter(flags);
    // For SYSRET and SYSEXIT.
    let rip = match random.below(8) {
        0 => canonical(random),
        1 => 0x8000_0000_0000,
        _ => end,
    };
    setup.arena.register(1, rip);
    setup.arena.register(2, end);
    let mut loaded = random.bits(rflags::STATUS | rflags::IOPL | rflags::AC | rflags::ID | rflags::IF);
    loaded |=
        random.rarely(4, rflags::RF) | random.rarely(4, rflags::VM) | random.rarely(4, 0xffff_ffff << 32);
    setup.arena.register(11, loaded | rflags::NT & random.next());
    let (bits, what) = (setup.bits, random.below(7));
    setup.arena.code(bits, 0, |a| match what {
        0 | 1 => a.syscall(),
        2 | 3 if bits == 64 => a.sysretq(),
        2..=4 => a.sysret(),
        5 => a.sysenter(),
        _ if bits == 64 => {
            a.swapgs()?;
            a.sysexitq()
        }
        _ => a.sysexit(),
    })?;
    let title =
        format!("{}: call {what}, STAR {selectors:#x}, RCX {rip:#x}, R11 {loaded:#x}", setup.describe());
    Ok((title, setup.arena))
}
