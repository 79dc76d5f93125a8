//! Instructions and blocks that lie in two pages.
//!
//! Two pages of the window that follow one another lead to frames that do not.

use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, ebx, ecx, ptr, qword_ptr, r8, r9, rax, rbx, rcx, rdi, rsi, xmm0,
};

use super::machine::{
    CODE, DATA, Machine, PAGE, Ram, STACK, WINDOW, entry, on_each_tier, on_each_tier_and_level,
    on_each_tier_at, window_entry,
};
use super::program::{Code, Made, assemble, here};

/// Where the second of the two pages begins.
const BORDER: u64 = WINDOW + 0x11 * PAGE;
const FIRST: u64 = CODE + 0x1_0000;
const SECOND: u64 = CODE + 0x1_4000;
/// Another frame for the second page.
const OTHER: u64 = CODE + 0x1_8000;

/// Writes to the two pages.
fn write(ram: &Ram, address: u64, bytes: &[u8]) {
    let split = BORDER.saturating_sub(address).min(bytes.len() as u64) as usize;
    let (before, behind) = bytes.split_at(split);
    ram.write(FIRST + address % PAGE, before);
    ram.write(SECOND + address.max(BORDER) % PAGE, behind);
}

fn map_both(ram: &Ram) {
    ram.map(0x10, FIRST | entry::ALL);
    ram.map(0x11, SECOND | entry::ALL);
}

/// Instructions of all lengths that do something to RBX, with RDI at [`DATA`].
const INSTRUCTIONS: &[fn(&mut CodeAssembler) -> Made] = &[
    |a| a.add(ebx, ebx),
    |a| a.add(rbx, 5),
    |a| a.xor(rbx, qword_ptr(rdi + 8)),
    |a| a.add(rbx, 0x1234_5678),
    |a| a.mov(rbx, 0x1122_3344_5566_7788_u64),
    |a| a.add(qword_ptr(rdi + 0x1234), 0x1234_5678),
    |a| a.imul_3(rbx, qword_ptr(rdi + 0x100), 0x7654_3210),
    |a| a.push(rbx),
    |a| a.popcnt(rbx, rbx),
    |a| a.movsb(),
    |a| a.pinsrq(xmm0, rbx, 1),
    |a| a.lock().xadd(qword_ptr(rdi + rcx * 8 + 0x200), rbx),
];

#[test]
fn instructions_are_those_that_they_are_elsewhere() {
    for (number, instruction) in INSTRUCTIONS.iter().enumerate() {
        // Between others, in a function that is called three times, with so many of its bytes before the border.
        let length = assemble(WINDOW, instruction).bytes.len() as u64;
        let before = assemble(WINDOW, |a| a.add(ebx, 3)).bytes.len() as u64;
        let body = |address| {
            assemble(address, |a| {
                a.add(ebx, 3)?;
                instruction(a)?;
                a.adc(rbx, 7)?;
                // Wherever the stack pointer is.
                a.jmp(r8)
            })
        };
        let caller = |address: u64| {
            assemble(CODE, |a| {
                let mut back = a.create_label();
                a.lea(r8, ptr(back))?;
                a.mov(rdi, DATA)?;
                a.lea(rsi, ptr(rdi + 0x40))?;
                a.mov(ecx, 3)?;
                let again = here(a)?;
                a.mov(r9, address)?;
                a.jmp(r9)?;
                a.set_label(&mut back)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.hlt()
            })
        };
        let result = |at: u64| {
            on_each_tier_and_level(|tier| {
                let mut machine = Machine::new(tier, &caller(at));
                map_both(&machine.ram);
                machine.ram.write(DATA, &(0..=255).collect::<Vec<_>>());
                write(&machine.ram, at, &body(at).bytes);
                let mut general = machine.run();
                (general.r8, general.r9, general.rflags) = (0, 0, general.rflags & 0x8d5);
                (general, machine.ram.bytes(DATA, 0x2000))
            })
        };
        let elsewhere = result(BORDER + 0x100);
        for first in 0..=length {
            assert!(
                result(BORDER - first - before) == elsewhere,
                "instruction {number}, {first} bytes before"
            );
        }
    }
}

/// Calls a function across the border whose MOV EAX has its operand in both pages, `rounds` times, and `change` in
/// between; adds what it returns to RBX.
fn calls(rounds: u32, change: impl FnOnce(&mut CodeAssembler) -> Made) -> Code {
    assemble(CODE, |a| {
        a.mov(ecx, rounds)?;
        let again = here(a)?;
        a.call(BORDER - 3)?;
        a.add(rbx, rax)?;
        change(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    })
}

/// MOV EAX, 0xddccbbaa; RET.
fn write_function(ram: &Ram) {
    write(ram, BORDER - 3, &[0xb8, 0xaa, 0xbb, 0xcc, 0xdd, 0xc3]);
}

#[test]
fn the_second_page_of_an_instruction_is_remapped() {
    let code = calls(20, |a| {
        a.mov(rdi, window_entry(0x11))?;
        a.mov(rsi, SECOND ^ OTHER)?;
        a.xor(qword_ptr(rdi), rsi)?;
        a.mov(rdi, BORDER)?;
        a.invlpg(byte_ptr(rdi))
    });
    let sum = on_each_tier(|tier| {
        let mut machine = Machine::new(tier, &code);
        map_both(&machine.ram);
        write_function(&machine.ram);
        machine.ram.write(OTHER, &[0x33, 0x22, 0xc3]);
        machine.run().rbx
    });
    assert_eq!(sum, 10 * (0xddcc_bbaa + 0x2233_bbaa));
}

#[test]
fn the_second_page_of_an_instruction_is_written() {
    let code = calls(20, |a| {
        // In both pages, by turns.
        a.mov(rdi, BORDER)?;
        a.inc(byte_ptr(rdi + 1))?;
        a.inc(byte_ptr(rdi - 1))
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        map_both(&machine.ram);
        write_function(&machine.ram);
        machine.run().rbx
    });
    let values =
        (0..20).map(|n: u64| 0xaa | ((0xbb + n) & 0xff) << 8 | 0xcc << 16 | ((0xdd + n) & 0xff) << 24);
    assert_eq!(sum, values.sum::<u64>());
}

#[test]
fn the_second_page_of_an_instruction_is_absent() {
    // The fetch's error code at privilege levels 0 and 3, with what is wrong with the page.
    let wrong = [(0, 0x10), (SECOND | entry::ALL | entry::NO_EXECUTE, 0x11)];
    for ((bad, error), user) in wrong.into_iter().flat_map(|wrong| [(wrong, false), (wrong, true)]) {
        let code = calls(4, |a| a.int(0x80));
        let faults = on_each_tier_at(user, |tier| {
            let mut machine = Machine::new(tier, &code);
            map_both(&machine.ram);
            write_function(&machine.ram);
            let mut faults = Vec::new();
            let general = machine.run_with(|trap, ram| match trap.vector {
                0x80 if trap.general.rcx == 1 => trap.end(),
                0x80 => ram.map(0x11, bad),
                14 => {
                    faults.push((trap.error, trap.cr2, trap.general.rip, trap.general.rsp, trap.general.rax));
                    ram.map(0x11, SECOND | entry::ALL);
                }
                _ => panic!("{trap:x?}"),
            });
            assert_eq!(general.rbx, 4 * 0xddcc_bbaa);
            faults
        });
        let error = if user { error | 4 } else { error };
        // Nothing of the instruction was done: RAX is what it was.
        assert_eq!(faults, vec![(error, BORDER, BORDER - 3, STACK - 8, 0xddcc_bbaa); 3], "{bad:#x}, {user}");
    }
}

#[test]
fn a_block_goes_on_in_the_next_page() {
    // 100 instructions, the border at any of their bytes, in a loop.
    for first in 380..=404 {
        let at = BORDER - first;
        let body = assemble(at, |a| {
            a.mov(ecx, 3)?;
            let again = here(a)?;
            for n in 0..100 {
                // Four bytes each.
                a.add(rbx, n + 1)?;
            }
            a.dec(ecx)?;
            a.jne(again)?;
            a.hlt()
        });
        let sum = on_each_tier_and_level(|tier| {
            let mut machine = Machine::new(tier, &assemble(CODE, |a| a.jmp(at)));
            map_both(&machine.ram);
            write(&machine.ram, at, &body.bytes);
            machine.run().rbx
        });
        assert_eq!(sum, 3 * 5050, "{first} bytes before the border");
    }
}
