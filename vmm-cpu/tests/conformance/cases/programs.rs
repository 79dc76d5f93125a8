//! Programs, code of privilege level 3 that is interruptible and has no ports, under a kernel that changes their page tables: what
//! the kernel takes back is gone once it has said so, and what it saves of a program's registers is what the program had.
//!
//! The kernel here is two handlers. UD2 asks it to store R13 at R14 and to forget the translation of RDI, by what R12 says; a page
//! fault is noted at R15, with its error code and address, and the program goes on at RBX.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{
    byte_ptr, cr0, cr2, cr3, cr4, dword_ptr, eax, ecx, edx, ptr, qword_ptr, r8, r9, r10, r11, r12, r12d, r13,
    r14, r15, rax, rbx, rcx, rdi, rsi, rsp, xmm1, ymm1, ymmword_ptr,
};
use vmm_cpu::cpuid::Feature;
use vmm_cpu::vmm_memory::vm_memory::{Bytes as _, GuestAddress};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout, selector};
use crate::suite::program::{Image, Program};

use super::ordering::{FOUND, SHARED, code, rounds, run_all, word};

cases![
    programs_call_their_kernel,
    page_that_is_taken_away_faults,
    right_to_write_that_is_taken_away_faults,
    page_that_is_mapped_anew_is_the_new_one,
    table_that_is_replaced_is_the_new_one,
    table_that_was_in_use_before_is_what_it_is_now,
    dirty_and_accessed_bits_come_back,
    page_that_another_vcpu_maps_anew_is_the_new_one,
    locked_additions_of_a_program_and_of_a_kernel_add_up,
    kernel_keeps_vector_registers_of_a_program,
    programs_that_take_turns_keep_their_vector_registers,
    flags_that_a_program_may_not_choose_stay_as_they_are,
    programs_find_nothing_where_engines_may_keep_something,
    steps_of_a_program_are_seen_by_its_kernel,
    alignment_is_checked_if_the_kernel_wants_that,
    number_of_the_processor_is_what_the_kernel_has_said,
];

const NMI: u8 = 2;
const UNDEFINED: u8 = 6;
const PAGE_FAULT: u8 = 14;
/// What UD2 asks for, in R12: INVLPG, a load of CR3, the end.
const INVALIDATE: u32 = 0;
const RELOAD: u32 = 1;
const END: u32 = 2;
/// Error codes (Intel SDM 3A 5.7).
const NOT_THERE: u64 = 4;
const NOT_WRITABLE: u64 = 7;

/// A page that the program uses, through these tables, in one frame or the other.
const PAGE: u64 = 1 << 32;
const DIRECTORY: u64 = layout::DATA + 0x1_8000;
const TABLES: [u64; 2] = [layout::DATA + 0x1_9000, layout::DATA + 0x1_b000];
const FRAMES: [u64; 2] = [layout::DATA + 0x1_a000, layout::DATA + 0x1_c000];
/// Present, writable, for programs.
const RIGHTS: u64 = 7;
const ACCESSED_DIRTY: u64 = 0x60;
const WRITABLE: u64 = 2;
/// Where faults are noted, and what the program has found.
const FAULTS: u64 = layout::DATA + 0x4000;
const SEEN: u64 = layout::DATA + 0x5000;
/// OSFXSR and OSXMMEXCPT; OSXSAVE.
const CR4_SSE: i32 = 3 << 9;
const CR4_OSXSAVE: i32 = 1 << 18;
const KERNEL_STACK: u64 = layout::STACK_TOP - 0x8000;

/// The kernel's beginning, up to where the program begins.
fn kernel(p: &mut Program) -> Outcome {
    let mut start = p.create_label();
    p.jmp(start)?;
    p.handler(UNDEFINED)?;
    let (mut no_reload, mut no_end) = (p.create_label(), p.create_label());
    p.mov(qword_ptr(r14), r13)?;
    p.invlpg(byte_ptr(rdi))?;
    p.cmp(r12d, RELOAD)?;
    p.jne(no_reload)?;
    p.mov(rax, cr3)?;
    p.mov(cr3, rax)?;
    p.set_label(&mut no_reload)?;
    p.cmp(r12d, END)?;
    p.jne(no_end)?;
    p.end()?;
    p.set_label(&mut no_end)?;
    p.add(qword_ptr(rsp), 2)?;
    p.iretq()?;
    p.handler(PAGE_FAULT)?;
    p.pop(rax)?;
    p.mov(qword_ptr(r15), rax)?;
    p.mov(rax, cr2)?;
    p.mov(qword_ptr(r15 + 8), rax)?;
    p.add(r15, 16)?;
    p.mov(qword_ptr(rsp), rbx)?;
    p.iretq()?;
    p.set_label(&mut start)?;
    for (frame, number) in FRAMES.into_iter().zip(1..) {
        p.mov(qword_ptr(frame), number)?;
    }
    for (table, frame) in TABLES.into_iter().zip(FRAMES) {
        p.mov(qword_ptr(table), i32::try_from(frame | RIGHTS)?)?;
    }
    p.mov(qword_ptr(DIRECTORY), i32::try_from(TABLES[0] | RIGHTS)?)?;
    p.mov(qword_ptr(layout::PAGE_TABLES + 0x1000 + 4 * 8), i32::try_from(DIRECTORY | RIGHTS)?)?;
    p.mov(rdi, PAGE)?;
    p.mov(r15, FAULTS)?;
    p.mov(rsi, SEEN)?;
    enter(p)
}

/// Goes on at privilege level 3, with a stack for the kernel, on a processor that has all vector registers turned on.
fn enter(p: &mut Program) -> Outcome {
    const XSAVE: u32 = 26;
    let (mut has_none, mut program) = (p.create_label(), p.create_label());
    p.mov(rax, KERNEL_STACK)?;
    p.mov(qword_ptr(layout::TSS + 4), rax)?;
    p.mov(r8, rbx)?;
    p.mov(r9, rcx)?;
    p.mov(rax, cr4)?;
    p.or(eax, CR4_SSE)?;
    p.mov(cr4, rax)?;
    p.mov(eax, 1)?;
    p.cpuid()?;
    p.bt(ecx, XSAVE)?;
    p.jnc(has_none)?;
    p.mov(rax, cr4)?;
    p.or(eax, CR4_OSXSAVE)?;
    p.mov(cr4, rax)?;
    p.mov(eax, 0xd)?;
    p.xor(ecx, ecx)?;
    p.cpuid()?;
    // What there is of x87, SSE, AVX and AVX-512.
    p.and(eax, 0xe7)?;
    p.xor(ecx, ecx)?;
    p.xor(edx, edx)?;
    p.xsetbv()?;
    p.set_label(&mut has_none)?;
    p.mov(rbx, r8)?;
    p.mov(rcx, r9)?;
    p.lea(rax, ptr(program))?;
    p.push(i32::from(selector::USER_DATA))?;
    p.push(i32::try_from(layout::STACK_TOP - 0x1_0000)?)?;
    // IF and what is always set.
    p.push(0x202)?;
    p.push(i32::from(selector::USER_CODE))?;
    p.push(rax)?;
    p.iretq()?;
    Ok(p.set_label(&mut program)?)
}

/// Asks the kernel.
fn call(p: &mut Program, what: u32) -> Outcome {
    p.mov(r12d, what)?;
    Ok(p.ud2()?)
}

/// Has the kernel store `value` at `gpa`.
fn store(p: &mut Program, gpa: u64, value: u64, what: u32) -> Outcome {
    p.mov(r14, gpa)?;
    p.mov(r13, value)?;
    call(p, what)
}

/// Notes what is in the page, or that it cannot be read.
fn look(p: &mut Program) -> Outcome {
    let mut next = p.create_label();
    p.mov(ecx, -1)?;
    p.lea(rbx, ptr(next))?;
    p.mov(ecx, ptr(rdi))?;
    p.set_label(&mut next)?;
    p.mov(qword_ptr(rsi), rcx)?;
    Ok(p.add(rsi, 8)?)
}

/// Stores to the page, if that is allowed.
fn write(p: &mut Program, value: u32) -> Outcome {
    let mut next = p.create_label();
    p.lea(rbx, ptr(next))?;
    p.mov(dword_ptr(rdi), value)?;
    p.set_label(&mut next)?;
    Ok(p.nop()?)
}

/// A page fault: error code and address.
type Fault = (u64, u64);

/// Runs the program to its end: what it has seen, and its faults with their addresses.
fn run(
    backend: &Backend,
    program: impl FnOnce(&mut Program) -> Outcome,
    seen: usize,
) -> Outcome<(Machine, Vec<u64>, Vec<Fault>)> {
    let mut p = Program::new()?;
    kernel(&mut p)?;
    program(&mut p)?;
    store(&mut p, SHARED, 0, END)?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let found = (0..seen as u64).map(|n| machine.word(SEEN + n * 8)).collect::<Outcome<Vec<_>>>()?;
    let count = (machine.vcpu.registers()?.r15 - FAULTS) / 16;
    let faults = (0..count).map(|n| Ok((machine.word(FAULTS + n * 16)?, machine.word(FAULTS + n * 16 + 8)?)));
    let faults = faults.collect::<Outcome<Vec<_>>>()?;
    has_run_there(&machine);
    Ok((machine, found, faults))
}

/// Where another engine runs programs, it has run this one.
fn has_run_there(machine: &Machine) {
    let counts = machine.vcpu.exit_counts();
    let stays = counts.iter().find(|(name, _)| *name == "program-stays");
    assert!(stays.is_none_or(|(_, stays)| *stays > 0), "{counts:?}");
}

const NOTHING: u64 = 0xffff_ffff;

fn programs_call_their_kernel(backend: &Backend) -> Outcome {
    let (mut machine, seen, faults) = run(
        backend,
        |p| {
            for round in 1..=50_u64 {
                store(p, SEEN + round * 8, round, INVALIDATE)?;
            }
            look(p)
        },
        51,
    )?;
    assert_eq!(seen[1..], (1..=50).collect::<Vec<_>>());
    assert_eq!((seen[0], faults), (1, vec![]));
    assert_eq!(machine.vcpu.registers()?.rdi, PAGE);
    Ok(())
}

fn page_that_is_taken_away_faults(backend: &Backend) -> Outcome {
    let (_, seen, faults) = run(
        backend,
        |p| {
            for what in [INVALIDATE, RELOAD] {
                look(p)?;
                store(p, TABLES[0], 0, what)?;
                look(p)?;
                store(p, TABLES[0], FRAMES[0] | RIGHTS, what)?;
            }
            look(p)
        },
        5,
    )?;
    assert_eq!(seen, [1, NOTHING, 1, NOTHING, 1]);
    assert_eq!(faults, [(NOT_THERE, PAGE); 2]);
    Ok(())
}

fn right_to_write_that_is_taken_away_faults(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    kernel(&mut p)?;
    write(&mut p, 11)?;
    look(&mut p)?;
    store(&mut p, TABLES[0], (FRAMES[0] | RIGHTS | ACCESSED_DIRTY) & !WRITABLE, INVALIDATE)?;
    write(&mut p, 12)?;
    look(&mut p)?;
    store(&mut p, TABLES[0], FRAMES[0] | RIGHTS, INVALIDATE)?;
    write(&mut p, 13)?;
    look(&mut p)?;
    store(&mut p, SHARED, 0, END)?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let seen = [0, 8, 16].map(|at| machine.word(SEEN + at));
    let [first, second, third] = seen;
    assert_eq!([first?, second?, third?], [11, 11, 13]);
    assert_eq!(machine.vcpu.registers()?.r15 - FAULTS, 16, "one fault");
    assert_eq!((machine.word(FAULTS)?, machine.word(FAULTS + 8)?), (NOT_WRITABLE, PAGE));
    Ok(())
}

fn page_that_is_mapped_anew_is_the_new_one(backend: &Backend) -> Outcome {
    let (_, seen, faults) = run(
        backend,
        |p| {
            look(p)?;
            for (frame, what) in [(1, INVALIDATE), (0, INVALIDATE), (1, RELOAD), (0, RELOAD)] {
                store(p, TABLES[0], FRAMES[frame] | RIGHTS, what)?;
                look(p)?;
            }
            Ok(())
        },
        5,
    )?;
    assert_eq!((seen, faults), (vec![1, 2, 1, 2, 1], vec![]));
    Ok(())
}

fn table_that_is_replaced_is_the_new_one(backend: &Backend) -> Outcome {
    let (_, seen, faults) = run(
        backend,
        |p| {
            look(p)?;
            store(p, DIRECTORY, TABLES[1] | RIGHTS, INVALIDATE)?;
            look(p)?;
            store(p, DIRECTORY, 0, RELOAD)?;
            look(p)?;
            store(p, DIRECTORY, TABLES[0] | RIGHTS, RELOAD)?;
            look(p)
        },
        4,
    )?;
    assert_eq!((seen, faults), (vec![1, 2, NOTHING, 1], vec![(NOT_THERE, PAGE)]));
    Ok(())
}

/// A table that was in use is changed while it is not, and is in use again.
fn table_that_was_in_use_before_is_what_it_is_now(backend: &Backend) -> Outcome {
    let (_, seen, faults) = run(
        backend,
        |p| {
            look(p)?;
            store(p, DIRECTORY, TABLES[1] | RIGHTS, RELOAD)?;
            look(p)?;
            store(p, TABLES[0], 0, RELOAD)?;
            look(p)?;
            store(p, DIRECTORY, TABLES[0] | RIGHTS, RELOAD)?;
            look(p)?;
            store(p, TABLES[0], FRAMES[1] | RIGHTS, INVALIDATE)?;
            look(p)
        },
        5,
    )?;
    assert_eq!((seen, faults), (vec![1, 2, 2, NOTHING, 2], vec![(NOT_THERE, PAGE)]));
    Ok(())
}

fn dirty_and_accessed_bits_come_back(backend: &Backend) -> Outcome {
    let (machine, seen, faults) = run(
        backend,
        |p| {
            write(p, 5)?;
            look(p)?;
            // Still writable, and clean.
            store(p, TABLES[0], FRAMES[0] | RIGHTS, INVALIDATE)?;
            write(p, 6)?;
            look(p)
        },
        2,
    )?;
    assert_eq!((seen, faults), (vec![5, 6], vec![]));
    assert_eq!(machine.word(TABLES[0])? & ACCESSED_DIRTY, ACCESSED_DIRTY);
    Ok(())
}

/// As in `shootdown`, of a program: the kernel forgets the translation when it asks for that.
fn page_that_another_vcpu_maps_anew_is_the_new_one(backend: &Backend) -> Outcome {
    const ROUNDS: u32 = 40;
    const TIME: Duration = Duration::from_millis(250);
    const DROPPED: u64 = SHARED + 64;
    const COUNTED: u64 = FOUND + 0x100;
    const COUNTER: u64 = 8;
    let mapper = || {
        rounds(1, ROUNDS, |p| {
            let mut begun = p.create_label();
            p.cmp(ecx, 1)?;
            p.jne(begun)?;
            // The tables are made by the other.
            let wait = p.here()?;
            p.pause()?;
            p.cmp(qword_ptr(DROPPED), 0)?;
            p.je(wait)?;
            p.set_label(&mut begun)?;
            p.mov(eax, ecx)?;
            p.and(eax, 1)?;
            p.imul_3(eax, eax, i32::try_from(FRAMES[1] - FRAMES[0])?)?;
            p.add(eax, i32::try_from(FRAMES[0] | RIGHTS)?)?;
            p.xchg(qword_ptr(TABLES[0]), rax)?;
            p.mov(qword_ptr(SHARED), rcx)?;
            let again = p.here()?;
            let mut dropped = p.create_label();
            p.cmp(qword_ptr(DROPPED), rcx)?;
            p.je(dropped)?;
            p.pause()?;
            p.jmp(again)?;
            p.set_label(&mut dropped)?;
            Ok(())
        })
    };
    let program = || -> Outcome<Image> {
        let mut p = Program::new()?;
        let mut start = p.create_label();
        p.jmp(start)?;
        p.handler(UNDEFINED)?;
        let mut goes_on = p.create_label();
        p.invlpg(byte_ptr(rdi))?;
        p.cmp(r12d, END)?;
        p.jne(goes_on)?;
        p.hlt()?;
        p.set_label(&mut goes_on)?;
        p.add(qword_ptr(rsp), 2)?;
        p.iretq()?;
        p.set_label(&mut start)?;
        for (frame, number) in FRAMES.into_iter().zip(0..) {
            p.mov(qword_ptr(frame), number)?;
            p.mov(qword_ptr(frame + COUNTER), 0)?;
        }
        p.mov(qword_ptr(TABLES[0]), i32::try_from(FRAMES[0] | RIGHTS)?)?;
        p.mov(qword_ptr(DIRECTORY), i32::try_from(TABLES[0] | RIGHTS)?)?;
        p.mov(qword_ptr(layout::PAGE_TABLES + 0x1000 + 4 * 8), i32::try_from(DIRECTORY | RIGHTS)?)?;
        p.mov(rdi, PAGE)?;
        p.xor(eax, eax)?;
        p.mov(r8, rax)?;
        p.mov(rbx, rax)?;
        p.mov(qword_ptr(DROPPED), -1)?;
        enter(&mut p)?;
        p.nop()?;
        let next = p.here()?;
        let mut fresh = p.create_label();
        p.lock().inc(qword_ptr(rdi + COUNTER))?;
        p.inc(r8)?;
        p.pause()?;
        p.mov(rcx, qword_ptr(SHARED))?;
        p.cmp(rcx, rbx)?;
        p.je(next)?;
        p.mov(rbx, rcx)?;
        call(&mut p, INVALIDATE)?;
        p.mov(edx, ecx)?;
        p.and(edx, 1)?;
        p.mov(eax, ptr(rdi))?;
        p.lock().inc(qword_ptr(rdi + COUNTER))?;
        p.inc(r8)?;
        p.cmp(eax, edx)?;
        p.je(fresh)?;
        p.inc(qword_ptr(FOUND))?;
        p.set_label(&mut fresh)?;
        p.mov(qword_ptr(COUNTED), r8)?;
        p.mov(qword_ptr(DROPPED), rbx)?;
        p.cmp(rbx, i32::try_from(ROUNDS)?)?;
        p.jne(next)?;
        call(&mut p, END)?;
        p.assemble_at(code(0))
    };
    let images = [program()?, mapper()?];
    let start = Instant::now();
    for batch in (0..).take_while(|batch| *batch == 0 || start.elapsed() < TIME) {
        let ram = run_all(backend, &images)?;
        assert_eq!(word(&ram, FOUND)?, 0, "times that the old page was seen, batch {batch}");
        let [first, second] = FRAMES.map(|frame| word(&ram, frame + COUNTER));
        assert_eq!(first? + second?, word(&ram, COUNTED)?, "counted in the page, batch {batch}");
    }
    Ok(())
}

/// A program and, on another vCPU, a kernel count in the same words.
fn locked_additions_of_a_program_and_of_a_kernel_add_up(backend: &Backend) -> Outcome {
    const TIMES: u32 = 3000;
    let count = |p: &mut Program| -> Outcome {
        p.mov(ecx, TIMES)?;
        let again = p.here()?;
        p.lock().inc(qword_ptr(SHARED))?;
        p.mov(eax, 3)?;
        p.lock().xadd(qword_ptr(SHARED + 8), rax)?;
        p.dec(ecx)?;
        Ok(p.jne(again)?)
    };
    let mut p = Program::new()?;
    let mut start = p.create_label();
    p.jmp(start)?;
    p.handler(UNDEFINED)?;
    p.hlt()?;
    p.set_label(&mut start)?;
    enter(&mut p)?;
    count(&mut p)?;
    p.ud2()?;
    let program = p.assemble_at(code(0))?;
    let mut p = Program::new()?;
    count(&mut p)?;
    p.hlt()?;
    let ram = run_all(backend, &[program, p.assemble_at(code(1))?])?;
    assert_eq!((word(&ram, SHARED)?, word(&ram, SHARED + 8)?), (u64::from(TIMES) * 2, u64::from(TIMES) * 6));
    Ok(())
}

/// The program's AVX registers, which the kernel saves, clears and restores by XSAVE and XRSTOR.
fn kernel_keeps_vector_registers_of_a_program(backend: &Backend) -> Outcome {
    const AREA: u64 = layout::DATA + 0x6000;
    const EMPTY: u64 = layout::DATA + 0x7000;
    const AVX: u32 = 7;
    let cpuid = backend.hypervisor.supported_cpuid();
    if !cpuid.has(Feature::XSAVE) || !cpuid.has(Feature::AVX) {
        return Err(Stop::skipped("the processor has no AVX"));
    }
    let mut p = Program::new()?;
    let (mut start, mut last) = (p.create_label(), p.create_label());
    p.jmp(start)?;
    p.handler(UNDEFINED)?;
    p.cmp(r12d, END)?;
    p.je(last)?;
    p.xor(edx, edx)?;
    p.mov(eax, AVX)?;
    p.xsave64(byte_ptr(AREA))?;
    p.xrstor64(byte_ptr(EMPTY))?;
    p.cmp(r12d, RELOAD)?;
    let mut keeps_nothing = p.create_label();
    p.je(keeps_nothing)?;
    p.xrstor64(byte_ptr(AREA))?;
    p.set_label(&mut keeps_nothing)?;
    p.add(qword_ptr(rsp), 2)?;
    p.iretq()?;
    p.set_label(&mut last)?;
    p.end()?;
    p.set_label(&mut start)?;
    enter(&mut p)?;
    p.vmovdqu(ymm1, ymmword_ptr(layout::DATA))?;
    call(&mut p, INVALIDATE)?;
    p.vmovdqu(ymmword_ptr(SEEN), ymm1)?;
    call(&mut p, RELOAD)?;
    p.vmovdqu(ymmword_ptr(SEEN + 32), ymm1)?;
    call(&mut p, END)?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let pattern: Vec<u8> = (1..=32).collect();
    machine.write(layout::DATA, &pattern)?;
    machine.write(SEEN + 32, &[0xff; 32])?;
    machine.run_to_end()?;
    assert_eq!(machine.bytes(SEEN, 32)?, pattern, "restored");
    assert_eq!(machine.bytes(SEEN + 32, 32)?, [0; 32], "in its initial state");
    // XSTATE_BV, and where the upper half is: the first of the components that come behind the header.
    assert_eq!(machine.word(AREA + 512)? & 4, 4);
    assert_eq!(machine.bytes(AREA + 576, 32)?[16..], pattern[16..]);
    Ok(())
}

/// Two programs whose kernel goes over from one to the other with each NMI, as often and as soon as they come.
fn programs_that_take_turns_keep_their_vector_registers(backend: &Backend) -> Outcome {
    const AREAS: [u64; 2] = [layout::DATA + 0x6000, layout::DATA + 0x7000];
    const RUNS: u64 = layout::DATA + 0x8000;
    const IS_OVER: u64 = layout::DATA + 0x9000;
    const TURNS: u64 = IS_OVER + 8;
    const IS_WRONG: u64 = IS_OVER + 16;
    const NUMBERS: [u64; 2] = [0x1111, 0x2222];
    const SSE: u32 = 2;
    const NMIS: u64 = 4000;
    /// Where others want the processors too, there are fewer.
    const TIME: Duration = Duration::from_secs(5);
    let has_xsave = backend.hypervisor.supported_cpuid().has(Feature::XSAVE);
    let mut p = Program::new()?;
    let (mut start, mut wrong) = (p.create_label(), p.create_label());
    p.jmp(start)?;
    p.handler(UNDEFINED)?;
    p.end()?;
    // Of the one that stops: its number in RBX, the one that it read in RAX, and R12 with its area. Of the other one the same in R8, R9 and R13.
    p.handler(NMI)?;
    p.mov(r10, rax)?;
    p.xor(edx, edx)?;
    p.mov(eax, SSE)?;
    if has_xsave {
        p.xsave64(byte_ptr(r12))?;
    } else {
        p.fxsave64(byte_ptr(r12))?;
    }
    p.xchg(r12, r13)?;
    if has_xsave {
        p.xrstor64(byte_ptr(r12))?;
    } else {
        p.fxrstor64(byte_ptr(r12))?;
    }
    p.xchg(rbx, r8)?;
    p.mov(rax, r9)?;
    p.mov(r9, r10)?;
    p.inc(qword_ptr(TURNS))?;
    p.iretq()?;
    p.set_label(&mut start)?;
    enter(&mut p)?;
    for (register, value) in
        [(rbx, NUMBERS[0]), (r8, NUMBERS[1]), (r9, NUMBERS[1]), (r12, AREAS[0]), (r13, AREAS[1])]
    {
        p.mov(register, value)?;
    }
    p.movq(xmm1, rbx)?;
    p.mov(qword_ptr(RUNS), 1)?;
    let again = p.here()?;
    p.movq(rax, xmm1)?;
    p.cmp(rax, rbx)?;
    p.jne(wrong)?;
    p.cmp(qword_ptr(IS_OVER), 0)?;
    p.je(again)?;
    p.ud2()?;
    // NMIs come here, too, and leave other registers.
    p.set_label(&mut wrong)?;
    p.mov(qword_ptr(IS_WRONG), 1)?;
    p.ud2()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    // FCW, MXCSR, XMM1, XSTATE_BV.
    machine.write(AREAS[1], &0x37f_u16.to_le_bytes())?;
    machine.write(AREAS[1] + 24, &0x1f80_u32.to_le_bytes())?;
    machine.write(AREAS[1] + 176, &NUMBERS[1].to_le_bytes())?;
    machine.write(AREAS[1] + 512, &SSE.to_le_bytes())?;
    let (handle, ram) = (machine.vcpu.handle(), machine.ram.clone());
    let sender = thread::spawn(move || -> Outcome {
        let begun = Instant::now();
        let comes_to = |gpa, count| -> Outcome<bool> {
            while begun.elapsed() < TIME {
                if word(&ram, gpa)? >= count {
                    return Ok(true);
                }
                // The vCPU has the processor meanwhile.
                thread::sleep(Duration::from_micros(20));
            }
            Ok(false)
        };
        let (mut n, mut goes_on) = (0, comes_to(RUNS, 1)?);
        while goes_on && n < NMIS {
            n += 1;
            // At other moments of what the vCPU does behind the last one.
            let next = Instant::now() + Duration::from_nanos(n * 7919 % 150_000);
            while Instant::now() < next {
                hint::spin_loop();
            }
            handle.nmi()?;
            goes_on = comes_to(TURNS, n)?;
        }
        Ok(ram.memory().write_obj(1_u64, GuestAddress(IS_OVER))?)
    });
    machine.run_to_end()?;
    sender.join().expect("the sending thread ends")?;
    let registers = machine.vcpu.registers()?;
    assert_eq!(machine.word(IS_WRONG)?, 0, "{registers}");
    assert!(NUMBERS.contains(&registers.rbx) && registers.rax == registers.rbx, "{registers}");
    let turns = machine.word(TURNS)?;
    assert!((2..=NMIS).contains(&turns), "{turns} turns");
    has_run_there(&machine);
    Ok(())
}

/// Engines that run programs in their own way may keep code in the upper half of the address space. A program that jumps there,
/// with a return address and flags of its choice where SYSCALL leaves them, gets no right that it had not.
fn flags_that_a_program_may_not_choose_stay_as_they_are(backend: &Backend) -> Outcome {
    const WHERE_XEN_IS: u64 = 0xffff_8100_0000_0000;
    const IF: u64 = 1 << 9;
    const IOPL: u64 = 3 << 12;
    let mut p = Program::new()?;
    let (mut start, mut behind) = (p.create_label(), p.create_label());
    p.jmp(start)?;
    for (vector, frame) in [(UNDEFINED, 0), (PAGE_FAULT, 8)] {
        p.handler(vector)?;
        p.mov(rax, qword_ptr(rsp + frame + 8))?;
        p.mov(qword_ptr(SEEN), rax)?;
        p.mov(rax, qword_ptr(rsp + frame + 16))?;
        p.mov(qword_ptr(SEEN + 8), rax)?;
        p.end()?;
    }
    p.set_label(&mut start)?;
    enter(&mut p)?;
    p.lea(rcx, ptr(behind))?;
    p.mov(r11, IOPL | 2)?;
    p.mov(rax, WHERE_XEN_IS)?;
    p.jmp(rax)?;
    p.syscall()?;
    p.set_label(&mut behind)?;
    p.ud2()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(SEEN)?, u64::from(selector::USER_CODE));
    assert_eq!(machine.word(SEEN + 8)? & (IF | IOPL), IF);
    Ok(())
}

/// Engines that run programs in their own way may keep what they need in the upper half of the address space.
fn programs_find_nothing_where_engines_may_keep_something(backend: &Backend) -> Outcome {
    const BEHIND_STUBS: u64 = 0xffff_8100_0000_1000;
    const PAGES: u64 = 80;
    let (_, _, faults) = run(
        backend,
        |p| {
            let (mut next, mut behind) = (p.create_label(), p.create_label());
            p.mov(r8, BEHIND_STUBS)?;
            p.mov(r9, PAGES)?;
            let again = p.here()?;
            p.lea(rbx, ptr(behind))?;
            // Neither a store of some bytes nor one of many.
            p.test(r9, 1)?;
            p.je(next)?;
            p.mov(byte_ptr(r8), 1)?;
            p.set_label(&mut next)?;
            p.lock().inc(qword_ptr(r8))?;
            p.set_label(&mut behind)?;
            p.add(r8, 0x1000)?;
            p.dec(r9)?;
            Ok(p.jne(again)?)
        },
        0,
    )?;
    const WRITE_BY_A_PROGRAM: u64 = 6;
    let pages = (0..PAGES).map(|n| (WRITE_BY_A_PROGRAM, BEHIND_STUBS + n * 0x1000));
    assert_eq!(
        faults.iter().map(|(error, va)| (*error, va & !0xfff)).collect::<Vec<_>>(),
        pages.collect::<Vec<_>>()
    );
    Ok(())
}

/// A program sets TF by itself.
fn steps_of_a_program_are_seen_by_its_kernel(backend: &Backend) -> Outcome {
    const DEBUG: u8 = 1;
    const TF: i32 = 1 << 8;
    const STEPS: u64 = 7;
    let mut p = Program::new()?;
    let mut start = p.create_label();
    p.jmp(start)?;
    p.handler(DEBUG)?;
    p.inc(qword_ptr(SEEN))?;
    p.iretq()?;
    p.handler(UNDEFINED)?;
    p.mov(rax, qword_ptr(rsp + 16))?;
    p.mov(qword_ptr(SEEN + 8), rax)?;
    p.end()?;
    p.set_label(&mut start)?;
    enter(&mut p)?;
    // It has computed before, and computes on after.
    p.mov(ecx, 1000)?;
    let before = p.here()?;
    p.dec(ecx)?;
    p.jne(before)?;
    p.pushfq()?;
    p.or(qword_ptr(rsp), TF)?;
    p.popfq()?;
    for _ in 0..STEPS - 3 {
        p.inc(rax)?;
    }
    p.pushfq()?;
    p.and(qword_ptr(rsp), !TF)?;
    p.popfq()?;
    p.inc(rax)?;
    p.ud2()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(SEEN)?, STEPS);
    assert_eq!(machine.word(SEEN + 8)? & u64::from(TF.unsigned_abs()), 0);
    Ok(())
}

/// AC is a program's own, and means something if CR0.AM is set.
fn alignment_is_checked_if_the_kernel_wants_that(backend: &Backend) -> Outcome {
    const ALIGNMENT: u8 = 17;
    const AM: i32 = 1 << 18;
    const AC: i32 = 1 << 18;
    for (am, expected) in [(0, 0), (AM, 1)] {
        let mut p = Program::new()?;
        let mut start = p.create_label();
        p.jmp(start)?;
        p.handler(ALIGNMENT)?;
        p.inc(qword_ptr(SEEN))?;
        p.end()?;
        p.handler(UNDEFINED)?;
        p.end()?;
        p.set_label(&mut start)?;
        p.mov(rax, cr0)?;
        p.or(eax, am)?;
        p.mov(cr0, rax)?;
        enter(&mut p)?;
        p.mov(rdi, SEEN)?;
        p.pushfq()?;
        p.or(qword_ptr(rsp), AC)?;
        p.popfq()?;
        p.mov(rax, qword_ptr(rdi + 9))?;
        p.ud2()?;
        let mut machine = Machine::new(backend, &p.assemble()?)?;
        machine.run_to_end()?;
        assert_eq!(machine.word(SEEN)?, expected, "CR0.AM {am:#x}");
    }
    Ok(())
}

/// RDTSCP reads what the kernel has put into IA32_TSC_AUX.
fn number_of_the_processor_is_what_the_kernel_has_said(backend: &Backend) -> Outcome {
    const TSC_AUX: u32 = 0xc000_0103;
    const NUMBER: u32 = 0x123;
    if !backend.hypervisor.supported_cpuid().has(Feature::RDTSCP) {
        return Err(Stop::skipped("the processor has no RDTSCP"));
    }
    let mut p = Program::new()?;
    let mut start = p.create_label();
    p.jmp(start)?;
    p.handler(UNDEFINED)?;
    p.end()?;
    p.set_label(&mut start)?;
    p.mov(ecx, TSC_AUX)?;
    p.mov(eax, NUMBER)?;
    p.xor(edx, edx)?;
    p.wrmsr()?;
    enter(&mut p)?;
    p.rdtscp()?;
    p.mov(qword_ptr(SEEN), rcx)?;
    p.ud2()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(SEEN)?, u64::from(NUMBER));
    Ok(())
}
