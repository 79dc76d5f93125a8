//! Code that another vCPU writes (Intel SDM 3A 9.1.3): whoever has seen its announcement and then executes a serializing
//! instruction executes the new code, wherever that is.

use std::time::{Duration, Instant};

use iced_x86::code_asm::{ax, byte_ptr, dword_ptr, eax, ecx, edx, esi, ptr, qword_ptr, rax, rcx, rsi, rsp};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{layout, selector};
use crate::suite::program::{Image, Program};

use super::ordering::{FOUND, SHARED, WRITTEN, code, rounds, run_all, word};

cases![code_right_behind_a_serializing_instruction_is_new, code_across_two_pages_is_new,];

/// Rounds at a time. vCPUs that share a processor do few of them in a second.
const ROUNDS: u32 = 30;
/// The last round whose code was called, as far as its caller says.
const CALLED: u64 = SHARED + 64;
/// An operand of LIDT.
const TABLE: u64 = SHARED + 0x80;

/// The vCPU that writes the number of the round to `gpa`, announces it, and waits until it was called.
fn writer(gpa: u64) -> Outcome<Image> {
    rounds(0, ROUNDS, |p| {
        p.mov(dword_ptr(gpa), ecx)?;
        p.mov(qword_ptr(SHARED), rcx)?;
        let again = p.here()?;
        let mut called = p.create_label();
        p.cmp(qword_ptr(CALLED), rcx)?;
        p.jae(called)?;
        p.pause()?;
        p.jmp(again)?;
        p.set_label(&mut called)?;
        Ok(())
    })
}

/// Lets a writer and a caller run, again and again for a while.
fn check(backend: &Backend, serialized_by: &str, time: Duration, images: &[Image]) -> Outcome {
    let start = Instant::now();
    for batch in (0..).take_while(|batch| *batch == 0 || start.elapsed() < time) {
        let ram = run_all(backend, images)?;
        assert_eq!(word(&ram, FOUND)?, 0, "times that old code ran behind {serialized_by}, batch {batch}");
        assert_eq!(word(&ram, CALLED)?, u64::from(ROUNDS), "{serialized_by}");
    }
    Ok(())
}

/// A serializing instruction. RSI, RDI and RSP stay.
type Serialize = fn(&mut Program) -> Outcome;

const SERIALIZING: &[(&str, Serialize)] = &[
    ("CPUID", |p| {
        p.xor(eax, eax)?;
        Ok(p.cpuid()?)
    }),
    ("WBINVD", |p| Ok(p.wbinvd()?)),
    ("LIDT", |p| Ok(p.lidt(ptr(TABLE))?)),
    ("LLDT", |p| {
        p.xor(eax, eax)?;
        Ok(p.lldt(ax)?)
    }),
    ("INVLPG", |p| Ok(p.invlpg(byte_ptr(SHARED))?)),
    ("MOV CR3", |p| {
        p.mov(eax, u32::try_from(layout::PAGE_TABLES)?)?;
        Ok(p.mov(iced_x86::code_asm::cr3, rax)?)
    }),
    ("MOV DR7", |p| {
        p.mov(eax, 0x400)?;
        Ok(p.mov(iced_x86::code_asm::dr7, rax)?)
    }),
    ("WRMSR", |p| {
        // IA32_KERNEL_GS_BASE.
        p.mov(ecx, 0xc000_0102_u32)?;
        p.xor(eax, eax)?;
        p.xor(edx, edx)?;
        Ok(p.wrmsr()?)
    }),
    ("IRET", |p| {
        let mut next = p.create_label();
        p.mov(rax, rsp)?;
        p.push(i32::from(selector::DATA))?;
        p.push(rax)?;
        p.pushfq()?;
        p.push(i32::from(selector::CODE))?;
        p.lea(rax, ptr(next))?;
        p.push(rax)?;
        p.iretq()?;
        p.set_label(&mut next)?;
        Ok(p.nop()?)
    }),
];

/// The vCPU that executes MOV EAX, round right behind a serializing instruction; and where that operand is.
fn executes_at_once(serialize: Serialize, nops: usize) -> Outcome<(Image, u64)> {
    let mut p = Program::new()?;
    p.mov(qword_ptr(TABLE), 0xfff)?;
    p.mov(qword_ptr(TABLE + 2), i32::try_from(layout::IDT)?)?;
    let next = p.here()?;
    for _ in 0..nops {
        p.nop()?;
    }
    p.pause()?;
    p.mov(rsi, qword_ptr(SHARED))?;
    serialize(&mut p)?;
    let written = p.here()?;
    p.mov(eax, 0)?;
    let mut new = p.create_label();
    p.cmp(eax, esi)?;
    p.jae(new)?;
    p.inc(qword_ptr(FOUND))?;
    p.set_label(&mut new)?;
    p.mov(qword_ptr(CALLED), rsi)?;
    p.cmp(esi, i32::try_from(ROUNDS)?)?;
    p.jb(next)?;
    p.hlt()?;
    let image = p.assemble_at(code(1))?;
    let operand = image.address_of(written)? + 1;
    Ok((image, operand))
}

fn code_right_behind_a_serializing_instruction_is_new(backend: &Backend) -> Outcome {
    for (name, serialize) in SERIALIZING {
        // The operand is written at once.
        let (image, operand) = (0..4)
            .map(|nops| executes_at_once(*serialize, nops))
            .find(|built| built.as_ref().map_or(true, |(_, operand)| operand.is_multiple_of(4)))
            .expect("one of four is aligned")?;
        check(backend, name, Duration::from_millis(30), &[writer(operand)?, image])?;
    }
    Ok(())
}

/// MOV EAX, round; RET, with the operand in the second page, called all the time.
fn code_across_two_pages_is_new(backend: &Backend) -> Outcome {
    let function = WRITTEN + 0xfff;
    let mut p = Program::new()?;
    p.mov(byte_ptr(function), 0xb8)?;
    p.mov(byte_ptr(function + 5), 0xc3)?;
    let next = p.here()?;
    p.pause()?;
    p.mov(rsi, qword_ptr(SHARED))?;
    p.xor(eax, eax)?;
    p.cpuid()?;
    p.mov(eax, u32::try_from(function)?)?;
    p.call(rax)?;
    let mut new = p.create_label();
    p.cmp(eax, esi)?;
    p.jae(new)?;
    p.inc(qword_ptr(FOUND))?;
    p.set_label(&mut new)?;
    p.mov(qword_ptr(CALLED), rsi)?;
    p.cmp(esi, i32::try_from(ROUNDS)?)?;
    p.jb(next)?;
    p.hlt()?;
    let caller = p.assemble_at(code(1))?;
    check(backend, "CPUID", Duration::from_millis(300), &[writer(function + 1)?, caller])
}
