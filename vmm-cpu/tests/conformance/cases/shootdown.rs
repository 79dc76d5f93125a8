//! A page that one vCPU maps anew while another uses it: until the other has dropped its translation it may use either,
//! from then on just the new one (Intel SDM 3A 5.10.5). Accessed and dirty bits of the entry that was replaced are not
//! lost (5.8), nor are the stores.

use std::time::{Duration, Instant};

use iced_x86::code_asm::{
    byte_ptr, cr3, dword_ptr, eax, ebx, ecx, edx, qword_ptr, r8, r8d, rax, rbx, rcx, rdi, rdx,
};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::layout;
use crate::suite::program::{Image, Program};

use super::ordering::{FOUND, SHARED, code, rounds, run_all, word};

cases![page_mapped_anew_is_seen_after_invlpg, page_mapped_anew_is_seen_after_a_load_of_cr3,];

/// Rounds at a time. vCPUs that share a processor do few of them in a second.
const ROUNDS: u32 = 40;
const TIME: Duration = Duration::from_millis(250);

/// The page that is mapped to one frame and the other.
const PAGE: u64 = 1 << 32;
/// How often the user of the page has counted there.
const COUNTED: u64 = FOUND + 0x100;
/// Replaced entries that lacked an accessed or a dirty bit.
const CLEAN: u64 = FOUND + 0x200;
/// What the user has dropped its translation for.
const DROPPED: u64 = SHARED + 64;
const DIRECTORY: u64 = layout::DATA + 0x1_8000;
const TABLE: u64 = layout::DATA + 0x1_9000;
const FRAMES: [u64; 2] = [layout::DATA + 0x1_a000, layout::DATA + 0x1_c000];
/// In each frame: its number, a counter, a function that returns its number.
const NUMBER: u64 = 0;
const COUNTER: u64 = 8;
const FUNCTION: u64 = 0x100;

/// Maps the page to the frame of each round and waits until the other vCPU has seen that.
fn mapper() -> Outcome<Image> {
    rounds(0, ROUNDS, |p| {
        // The frame of odd rounds is the second.
        p.mov(eax, ecx)?;
        p.and(eax, 1)?;
        p.imul_3(eax, eax, i32::try_from(FRAMES[1] - FRAMES[0])?)?;
        p.add(eax, i32::try_from(FRAMES[0] | 7)?)?;
        p.xchg(qword_ptr(TABLE), rax)?;
        let mut first = p.create_label();
        p.cmp(ecx, 1)?;
        p.je(first)?;
        p.and(eax, 0x60)?;
        p.cmp(eax, 0x60)?;
        p.je(first)?;
        p.inc(qword_ptr(CLEAN))?;
        p.set_label(&mut first)?;
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
}

/// Uses the page all the time, and drops its translation whenever it has been asked.
fn user(drop_translation: fn(&mut Program) -> Outcome) -> Outcome<Image> {
    let mut p = Program::new()?;
    // The frames, and tables that lead to the page.
    for (frame, number) in FRAMES.into_iter().zip(0_u32..) {
        p.mov(qword_ptr(frame + NUMBER), i32::try_from(number)?)?;
        // MOV EAX, number; RET.
        p.mov(byte_ptr(frame + FUNCTION), 0xb8)?;
        p.mov(dword_ptr(frame + FUNCTION + 1), number)?;
        p.mov(byte_ptr(frame + FUNCTION + 5), 0xc3)?;
    }
    let fifth_gib = layout::PAGE_TABLES + 0x1000 + 4 * 8;
    p.mov(qword_ptr(fifth_gib), i32::try_from(DIRECTORY | 7)?)?;
    p.mov(qword_ptr(DIRECTORY), i32::try_from(TABLE | 7)?)?;
    p.mov(rdi, PAGE)?;
    p.xor(r8d, r8d)?;
    let wait = p.here()?;
    p.pause()?;
    p.cmp(qword_ptr(SHARED), 0)?;
    p.je(wait)?;
    p.xor(ebx, ebx)?;

    let next = p.here()?;
    let (mut stale, mut fresh) = (p.create_label(), p.create_label());
    p.lock().inc(qword_ptr(rdi + COUNTER))?;
    p.inc(r8)?;
    p.pause()?;
    p.mov(rdx, qword_ptr(SHARED))?;
    p.cmp(rdx, rbx)?;
    p.je(next)?;
    p.mov(rbx, rdx)?;
    drop_translation(&mut p)?;
    // A load, a store, a locked access, and a call.
    p.and(edx, 1)?;
    p.cmp(qword_ptr(rdi + NUMBER), rdx)?;
    p.jne(stale)?;
    p.mov(qword_ptr(rdi + 16), rbx)?;
    p.lock().inc(qword_ptr(rdi + COUNTER))?;
    p.inc(r8)?;
    p.lea(rax, qword_ptr(rdi + FUNCTION))?;
    p.call(rax)?;
    p.cmp(eax, edx)?;
    p.je(fresh)?;
    p.set_label(&mut stale)?;
    p.inc(qword_ptr(FOUND))?;
    p.set_label(&mut fresh)?;
    p.mov(qword_ptr(DROPPED), rbx)?;
    p.cmp(ebx, i32::try_from(ROUNDS)?)?;
    p.jne(next)?;
    p.mov(qword_ptr(COUNTED), r8)?;
    p.hlt()?;
    p.assemble_at(code(1))
}

fn check(backend: &Backend, drop_translation: fn(&mut Program) -> Outcome) -> Outcome {
    let images = [mapper()?, user(drop_translation)?];
    let start = Instant::now();
    for batch in (0..).take_while(|batch| *batch == 0 || start.elapsed() < TIME) {
        let ram = run_all(backend, &images)?;
        assert_eq!(word(&ram, FOUND)?, 0, "times that the old page was seen, batch {batch}");
        assert_eq!(word(&ram, CLEAN)?, 0, "entries that were used and do not say so, batch {batch}");
        let [first, second] = FRAMES.map(|frame| word(&ram, frame + COUNTER));
        assert_eq!(first? + second?, word(&ram, COUNTED)?, "counted in the page, batch {batch}");
    }
    Ok(())
}

fn page_mapped_anew_is_seen_after_invlpg(backend: &Backend) -> Outcome {
    check(backend, |p| Ok(p.invlpg(byte_ptr(rdi))?))
}

fn page_mapped_anew_is_seen_after_a_load_of_cr3(backend: &Backend) -> Outcome {
    check(backend, |p| {
        p.mov(rcx, cr3)?;
        Ok(p.mov(cr3, rcx)?)
    })
}
