//! Code that is written while it runs: by itself, through another address, by another vCPU, and by the VMM.

use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cl, dword_ptr, eax, ecx, edx, ptr, qword_ptr, r8, r9, rax, rbx, rcx,
    rdi, rdx, rsi, rsp, word_ptr, xmm0, xmmword_ptr,
};

use super::machine::{CODE, DATA, HIGH, Machine, PAGE, STACK, WINDOW, entry, on_each_tier_and_level};
use super::program::{Code, Made, assemble, here, labelled};

/// A function of another page than its callers, at the page's start.
const FUNCTION: u64 = CODE + 5 * PAGE;

/// MOV EAX, `value`; RET.
fn function(value: u32) -> Vec<u8> {
    let mut bytes = vec![0xb8];
    bytes.extend(value.to_le_bytes());
    bytes.push(0xc3);
    bytes
}

/// A loop from `rounds` down to 1 in ECX, then HLT.
fn rounds(
    address: u64,
    rounds: u32,
    before: impl FnOnce(&mut CodeAssembler) -> Made,
    body: impl FnOnce(&mut CodeAssembler) -> Made,
) -> Code {
    assemble(address, |a| {
        before(a)?;
        a.mov(ecx, rounds)?;
        let again = here(a)?;
        body(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    })
}

/// Adds what [`FUNCTION`] returns to RBX.
fn add_function(a: &mut CodeAssembler) -> Made {
    a.call(FUNCTION)?;
    a.add(rbx, rax)
}

fn sum_to(last: u64) -> u64 {
    (1..=last).sum()
}

fn nothing(_: &mut CodeAssembler) -> Made {
    Ok(())
}

#[test]
fn the_next_instruction() {
    let code = assemble(CODE, |a| {
        let mut patched = a.create_label();
        a.lea(rsi, ptr(patched))?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        a.mov(dword_ptr(rsi + 1), ecx)?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x1111_1111)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| Machine::new(tier, &code).run().rbx);
    assert_eq!(sum, sum_to(20));
}

#[test]
fn an_instruction_further_ahead_while_flags_are_live() {
    let code = assemble(CODE, |a| {
        let mut patched = a.create_label();
        a.lea(rsi, ptr(patched))?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        // CF in every second round, through the store and what follows it.
        a.bt(ecx, 0)?;
        a.mov(byte_ptr(rsi + 3), cl)?;
        a.mov(rdx, rbx)?;
        a.lea(r8, ptr(rdx + 1))?;
        a.set_label(&mut patched)?;
        // Four bytes, the last of them the immediate.
        a.adc(rbx, 0x11)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| Machine::new(tier, &code).run().rbx);
    assert_eq!(sum, sum_to(20) + 10);
}

#[test]
fn the_start_of_the_running_block() {
    let code = assemble(CODE, |a| {
        let mut top = a.create_label();
        a.lea(rsi, ptr(top))?;
        a.mov(ecx, 10)?;
        a.set_label(&mut top)?;
        a.add(rbx, 1)?;
        a.inc(byte_ptr(rsi + 3))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| Machine::new(tier, &code).run().rbx);
    assert_eq!(sum, sum_to(10));
}

#[test]
fn blocks_that_are_linked() {
    let code = assemble(CODE, |a| {
        let (mut near, mut skip) = (a.create_label(), a.create_label());
        a.lea(rsi, ptr(near))?;
        a.mov(rdi, FUNCTION)?;
        a.mov(ecx, 30)?;
        let again = here(a)?;
        a.jmp(near)?;
        a.int3()?;
        a.set_label(&mut near)?;
        a.mov(eax, 5)?;
        a.add(rbx, rax)?;
        add_function(a)?;
        a.cmp(ecx, 15)?;
        a.jne(skip)?;
        a.mov(dword_ptr(rsi + 1), 100)?;
        a.mov(dword_ptr(rdi + 1), 1000)?;
        a.set_label(&mut skip)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.write(FUNCTION, &function(7));
        machine.run().rbx
    });
    assert_eq!(sum, 16 * (5 + 7) + 14 * 1100);
}

#[test]
fn code_of_another_page_through_an_alias() {
    // Executed at one linear address, written at others: in the window, and where everything is once more.
    for alias in [WINDOW + PAGE, HIGH + FUNCTION, HIGH + WINDOW] {
        let code = rounds(
            CODE,
            20,
            |a| a.mov(rdi, alias),
            |a| {
                a.mov(dword_ptr(rdi + 1), ecx)?;
                a.call(WINDOW)?;
                a.add(rbx, rax)
            },
        );
        let sum = on_each_tier_and_level(|tier| {
            let mut machine = Machine::new(tier, &code);
            machine.ram.map(0, FUNCTION | entry::ALL);
            machine.ram.map(1, FUNCTION | entry::ALL);
            machine.ram.write(FUNCTION, &function(0));
            machine.run().rbx
        });
        assert_eq!(sum, sum_to(20), "{alias:#x}");
    }
}

#[test]
fn the_running_block_through_an_alias() {
    let code = assemble(HIGH + CODE, |a| {
        let mut patched = a.create_label();
        a.lea(rsi, ptr(patched))?;
        // The same frame at its low address.
        a.mov(rdx, HIGH)?;
        a.sub(rsi, rdx)?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        a.mov(dword_ptr(rsi + 1), ecx)?;
        a.nop()?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x1111_1111)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| Machine::new(tier, &code).run().rbx);
    assert_eq!(sum, sum_to(20));
}

#[test]
fn by_the_vmm_between_two_runs() {
    let code = rounds(CODE, 3, nothing, add_function);
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        for value in 1..=5 {
            machine.ram.write(FUNCTION, &function(value));
            machine.run_at(CODE);
        }
        // The last one once more, which may still be linked.
        machine.run_at(CODE).rbx
    });
    assert_eq!(sum, 3 * (sum_to(5) + 5));
}

#[test]
fn by_the_vmm_in_a_callback() {
    // The handler changes CR3, after which code is looked at anew.
    let code = rounds(CODE, 20, nothing, |a| {
        a.int(0x80)?;
        add_function(a)
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.run_with(|trap, ram| ram.write(FUNCTION, &function(trap.general.rcx as u32))).rbx
    });
    assert_eq!(sum, sum_to(20));
}

#[test]
fn by_another_vcpu() {
    let code = rounds(CODE, 3, nothing, add_function);
    let writer = assemble(CODE + 0x800, |a| {
        a.mov(rdi, FUNCTION)?;
        a.inc(dword_ptr(rdi + 1))?;
        // In translated code the second time.
        a.mov(edx, 2)?;
        let again = here(a)?;
        a.add(dword_ptr(rdi + 1), 10)?;
        a.dec(edx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::of_two(tier, &code);
        machine.ram.write(FUNCTION, &function(0));
        machine.ram.write(writer.address, &writer.bytes);
        for _ in 0..4 {
            machine.run_at(CODE);
            machine.switch();
            machine.run_at(writer.address);
            machine.switch();
        }
        machine.run_at(CODE).rbx
    });
    assert_eq!(sum, 3 * (21 + 42 + 63 + 84));
}

#[test]
fn data_beside_code_that_is_changed_all_the_time() {
    const ROUNDS: u32 = 1000;
    // Quadwords right before a function and right behind it, and one in the caller's page.
    const BEFORE: u64 = FUNCTION + 0x100;
    const START: u64 = BEFORE + 8;
    const BESIDE: u64 = CODE + 0x800;
    let (body, [behind]) = labelled(START, |a| {
        let mut behind = a.create_label();
        a.mov(rdx, BEFORE)?;
        a.inc(qword_ptr(rdx))?;
        a.mov(rax, qword_ptr(rdx))?;
        a.add(qword_ptr(behind), rax)?;
        a.ret()?;
        a.set_label(&mut behind)?;
        a.db(&[0; 8])?;
        Ok([behind])
    });
    let code = rounds(
        CODE,
        ROUNDS,
        |a| a.mov(rdi, BESIDE),
        |a| {
            a.inc(qword_ptr(rdi))?;
            a.call(START)
        },
    );
    let words = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.write(START, &body.bytes);
        machine.run();
        [BESIDE, BEFORE, behind].map(|at| machine.ram.word(at))
    });
    let rounds = u64::from(ROUNDS);
    assert_eq!(words, [rounds, rounds, sum_to(rounds)]);
}

/// Every kind of store, with RDI at the immediate of [`FUNCTION`], RAX and XMM0 as told.
type Store = (&'static str, fn(&mut CodeAssembler) -> Made);

const STORES: &[Store] = &[
    ("MOV byte", |a| a.mov(byte_ptr(rdi), al)),
    ("MOV word", |a| a.mov(word_ptr(rdi), ax)),
    ("MOV doubleword", |a| a.mov(dword_ptr(rdi), eax)),
    ("MOV of an immediate", |a| a.mov(dword_ptr(rdi), 0x77)),
    ("MOV quadword from the page before", |a| a.mov(qword_ptr(rdi - 4), rax)),
    ("ADD", |a| a.add(dword_ptr(rdi), eax)),
    ("INC", |a| a.inc(byte_ptr(rdi + 2))),
    ("NOT", |a| a.not(dword_ptr(rdi))),
    ("SHL", |a| a.shl(dword_ptr(rdi), 3)),
    ("ROR by CL", |a| a.ror(dword_ptr(rdi), cl)),
    ("SHLD", |a| a.shld(dword_ptr(rdi), eax, 5)),
    ("BTS", |a| a.bts(dword_ptr(rdi), 20)),
    ("BTC of a bit string", |a| a.btc(dword_ptr(rdi), ecx)),
    ("SETNE", |a| a.setne(byte_ptr(rdi + 1))),
    ("XCHG", |a| a.xchg(dword_ptr(rdi), edx)),
    ("LOCK XADD", |a| a.lock().xadd(dword_ptr(rdi), edx)),
    ("CMPXCHG", |a| {
        a.mov(eax, dword_ptr(rdi))?;
        a.cmpxchg(dword_ptr(rdi), edx)
    }),
    ("LOCK CMPXCHG8B", |a| {
        a.mov(rax, qword_ptr(rdi - 1))?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(rbx, rax)?;
        a.xor(rbx, 0x5500)?;
        a.mov(rcx, rdx)?;
        a.lock().cmpxchg8b(qword_ptr(rdi - 1))
    }),
    ("CMPXCHG16B", |a| {
        a.mov(rax, qword_ptr(rdi - 1))?;
        a.mov(rdx, qword_ptr(rdi + 7))?;
        a.mov(rbx, rax)?;
        a.xor(rbx, 0x5500)?;
        a.mov(rcx, rdx)?;
        a.cmpxchg16b(xmmword_ptr(rdi - 1))
    }),
    ("MOVNTI", |a| a.movnti(dword_ptr(rdi), eax)),
    ("MOVBE", |a| a.movbe(dword_ptr(rdi), eax)),
    ("MOVD", |a| a.movd(dword_ptr(rdi), xmm0)),
    ("MOVSS", |a| a.movss(dword_ptr(rdi), xmm0)),
    ("MOVUPS from the page before", |a| a.movups(xmmword_ptr(rdi - 12), xmm0)),
    ("PEXTRD", |a| a.pextrd(dword_ptr(rdi), xmm0, 2)),
    ("FISTP", |a| {
        a.fld1()?;
        a.fistp(dword_ptr(rdi))
    }),
    ("STMXCSR", |a| a.stmxcsr(dword_ptr(rdi))),
    ("PUSH", |a| {
        // All of the function, and what is behind it.
        a.mov(rax, qword_ptr(rdi - 1))?;
        a.xor(rax, 0x6600)?;
        a.lea(rsp, ptr(rdi + 7))?;
        a.push(rax)?;
        a.mov(rsp, STACK)
    }),
    ("POP", |a| {
        a.mov(rax, qword_ptr(rdi - 1))?;
        a.xor(rax, 0x6600)?;
        a.push(rax)?;
        a.pop(qword_ptr(rdi - 1))
    }),
    ("STOSB", |a| a.stosb()),
    ("REP STOSB", |a| {
        a.mov(ecx, 3)?;
        a.rep().stosb()
    }),
    ("REP STOSB up to there", |a| {
        a.mov(ecx, 0x102)?;
        a.sub(rdi, 0x100)?;
        a.rep().stosb()
    }),
    ("REP STOSB backwards", |a| {
        a.std()?;
        a.mov(ecx, 0x80)?;
        a.add(rdi, 2)?;
        a.sub(ecx, 0x7d)?;
        a.rep().stosb()?;
        a.cld()
    }),
    ("REP MOVSD", |a| {
        a.mov(rsi, DATA)?;
        a.mov(ecx, 1)?;
        a.rep().movsd()
    }),
    ("MOVSW", |a| {
        a.mov(rsi, DATA)?;
        a.movsw()
    }),
];

#[test]
fn by_every_kind_of_store() {
    for (name, store) in STORES {
        let code = assemble(CODE, |a| {
            for _ in 0..3 {
                a.call(FUNCTION)?;
            }
            a.mov(r8, rax)?;
            a.mov(rdi, FUNCTION + 1)?;
            a.mov(rax, 0x1234_56c3_b8b8_b8b8_u64)?;
            a.mov(edx, 0x0765_4321)?;
            a.mov(ecx, 9)?;
            a.test(eax, eax)?;
            store(a)?;
            a.call(FUNCTION)?;
            a.mov(r9, rax)?;
            a.hlt()
        });
        let (before, after) = on_each_tier_and_level(|tier| {
            let mut machine = Machine::new(tier, &code);
            machine.ram.write(FUNCTION, &function(0x0102_0304));
            machine.ram.write(DATA, &[0x31, 0x32, 0x33, 0x34]);
            machine.set_xmm0([
                0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0xb8, 0x21, 0x22, 0x23,
                0x24,
            ]);
            let general = machine.run();
            // What is executed is what is there.
            assert_eq!(general.r9, machine.ram.word(FUNCTION) >> 8 & 0xffff_ffff, "{name}");
            (general.r8, general.r9)
        });
        assert_eq!(before, 0x0102_0304, "{name}");
        assert_ne!(before, after, "{name} stores something");
    }
}
