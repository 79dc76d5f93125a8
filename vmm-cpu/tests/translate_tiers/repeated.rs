//! Repeated string instructions that fault midway: what came before is done, and registers say how much that was.

use iced_x86::code_asm::{CodeAssembler, ecx, r11d, r15, rax, rdi, rsi};

use super::machine::{CODE, Machine, PAGE, Ram, Trap, WINDOW, entry, on_each_tier_at};
use super::program::{Made, here, labelled};

/// Where a page of the window ends that is always there, and one begins that is not.
const BORDER: u64 = WINDOW + 0x11 * PAGE;
const FIRST: u64 = CODE + 0x1_0000;
const SECOND: u64 = CODE + 0x1_4000;
/// Another page that is there.
const GOOD: u64 = WINDOW + 0x20 * PAGE;
const GOOD_FRAME: u64 = CODE + 0x1_8000;

/// Bytes before the border, and in all.
const BEFORE: u64 = 0x80;
const BYTES: u64 = 0x200;

/// An instruction, the size of an element, and which of RSI and RDI goes across the border.
struct Repeated {
    name: &'static str,
    size: u64,
    source: bool,
    code: fn(&mut CodeAssembler) -> Made,
}

const fn of(name: &'static str, size: u64, source: bool, code: fn(&mut CodeAssembler) -> Made) -> Repeated {
    Repeated { name, size, source, code }
}

const REPEATED: &[Repeated] = &[
    of("STOSB", 1, false, |a| a.rep().stosb()),
    of("STOSW", 2, false, |a| a.rep().stosw()),
    of("STOSD", 4, false, |a| a.rep().stosd()),
    of("STOSQ", 8, false, |a| a.rep().stosq()),
    of("MOVSB to there", 1, false, |a| a.rep().movsb()),
    of("MOVSQ to there", 8, false, |a| a.rep().movsq()),
    of("MOVSB from there", 1, true, |a| a.rep().movsb()),
    of("MOVSD from there", 4, true, |a| a.rep().movsd()),
    of("LODSB", 1, true, |a| a.rep().lodsb()),
    of("CMPSB", 1, false, |a| a.repe().cmpsb()),
    of("CMPSQ", 8, true, |a| a.repe().cmpsq()),
    of("SCASB", 1, false, |a| a.repne().scasb()),
];

fn fill(ram: &Ram, elsewhere: u8) {
    for (frame, value) in [(FIRST, 0x33), (SECOND, 0x33), (GOOD_FRAME, elsewhere)] {
        ram.write(frame, &[value; PAGE as usize]);
    }
}

/// The bytes around the border, in order.
fn around(ram: &Ram) -> Vec<u8> {
    [ram.bytes(FIRST + PAGE - 2 * BEFORE, 2 * BEFORE as usize), ram.bytes(SECOND, BYTES as usize)].concat()
}

#[test]
fn strings_across_an_absent_page() {
    for (repeated, user) in REPEATED.iter().flat_map(|repeated| [(repeated, false), (repeated, true)]) {
        let (code, [at]) = labelled(CODE, |a| {
            // Three rounds: absent, present, absent.
            a.mov(r15, 3_u64)?;
            let again = here(a)?;
            a.int(0x80)?;
            let (across, other) = if repeated.source { (rsi, rdi) } else { (rdi, rsi) };
            a.mov(across, BORDER - BEFORE)?;
            a.mov(other, GOOD)?;
            a.mov(rax, 0x7777_7777_7777_7777_u64)?;
            a.mov(ecx, (BYTES / repeated.size) as u32)?;
            a.mov(r11d, 0x7fff_ffff)?;
            a.add(r11d, r11d)?;
            let at = here(a)?;
            (repeated.code)(a)?;
            a.setc(iced_x86::code_asm::r14b)?;
            a.int(0x81)?;
            a.dec(r15)?;
            a.jne(again)?;
            a.int(0x82)?;
            Ok([at])
        });
        // What is stored, where something is.
        let name = repeated.name;
        let stored = match name {
            _ if name.starts_with("STOS") => Some(0x77),
            _ if name.ends_with("to there") => Some(0x55),
            _ => None,
        };
        let elsewhere = if stored == Some(0x55) { 0x55 } else { 0x33 };
        let run = |tier, absent: bool| {
            let mut machine = Machine::new(tier, &code);
            machine.ram.map(0x10, FIRST | entry::ALL);
            machine.ram.map(0x20, GOOD_FRAME | entry::ALL);
            let (mut faults, mut behind) = (Vec::new(), Vec::new());
            machine.run_with(|trap: &mut Trap, ram| match trap.vector {
                0x80 => {
                    fill(ram, elsewhere);
                    let is_absent = absent && trap.general.r15 != 2;
                    ram.map(0x11, if is_absent { 0 } else { SECOND | entry::ALL });
                }
                0x81 => {
                    behind.push((Trap { cr2: 0, ..*trap }, around(ram), ram.bytes(GOOD_FRAME, PAGE as usize)))
                }
                0x82 => trap.end(),
                14 => {
                    faults.push((*trap, around(ram)));
                    ram.map(0x11, SECOND | entry::ALL);
                }
                _ => panic!("{}: {trap:x?}", repeated.name),
            });
            (faults, behind)
        };
        let (none, undisturbed) = on_each_tier_at(user, |tier| run(tier, false));
        assert!(none.is_empty() && undisturbed.len() == 3, "{name}");
        let (faults, behind) = on_each_tier_at(user, |tier| run(tier, true));
        assert!(behind == undisturbed, "{name} comes to something else");
        assert_eq!(faults.len(), 2, "{name}");
        for (fault, around) in &faults {
            let general = &fault.general;
            let error = if stored.is_some() { 2 } else { 0 } | if user { 4 } else { 0 };
            assert_eq!((fault.cr2, fault.error), (BORDER, error), "{name}");
            assert_eq!((general.rip, general.rcx), (at, (BYTES - BEFORE) / repeated.size), "{name}");
            let across = if repeated.source { general.rsi } else { general.rdi };
            assert_eq!(across, BORDER, "{name}");
            let value = stored.unwrap_or(0x33);
            let (before, behind) = around.split_at(2 * BEFORE as usize);
            assert!(
                before[BEFORE as usize..].iter().all(|byte| *byte == value),
                "{name} did not do what it says"
            );
            assert!(behind.iter().all(|byte| *byte == 0x33), "{name} stored behind the border");
        }
    }
}
