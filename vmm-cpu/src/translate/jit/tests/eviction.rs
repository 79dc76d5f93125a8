//! Programs that need more code memory than there is.

use iced_x86::code_asm::{AsmRegister64, qword_ptr, r8, r9, r10, rax, rbx, rcx, rdx, rsi};

use super::*;
use crate::translate::cpu::{RAX, RBX};

/// Functions of the program, and how far from each other they begin.
const FUNCTIONS: u64 = 3000;
const DISTANCE: u64 = 256;
/// As many bytes of addresses and of data as functions.
const TABLE: u64 = 0xa000;
const DATA: u64 = 0x1_8000;
const ROUNDS: u64 = 20_000;

fn function(n: u64) -> u64 {
    FREE + n * DISTANCE
}

/// What function `n` adds.
fn addend(n: u64) -> u64 {
    n * 0x9e37 + 1
}

/// The two that it calls, directly, if it does.
fn callees(n: u64) -> [u64; 2] {
    [(n * 7 + 11) % 16, (n + 16) % FUNCTIONS]
}

/// Function `n`: adds to RAX, does this and that to memory and RBX, and calls others while RDX says so.
fn put_function(vcpu: &mut Vcpu, n: u64) {
    vcpu.put(function(n), |a| {
        let mut end = a.create_label();
        a.mov(r9, addend(n))?;
        a.add(rax, r9)?;
        for slot in 0..4 {
            let place = i32::try_from(DATA + 8 * slot).unwrap();
            a.mov(r10, qword_ptr(place))?;
            a.add(r10, rbx)?;
            a.mov(qword_ptr(place), r10)?;
        }
        a.inc(rbx)?;
        a.sub(rdx, 1)?;
        a.jb(end)?;
        for callee in callees(n) {
            a.push(rdx)?;
            a.call(function(callee))?;
            a.pop(rdx)?;
        }
        a.set_label(&mut end)?;
        a.ret()
    });
}

/// The same in Rust: RAX, and how many functions ran.
fn call(n: u64, depth: u64, sum: &mut u64, calls: &mut u64) {
    *sum = sum.wrapping_add(addend(n));
    *calls += 1;
    if let Some(depth) = depth.checked_sub(1) {
        for callee in callees(n) {
            call(callee, depth, sum, calls);
        }
    }
}

fn next(random: AsmRegister64, a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.imul_3(random, random, 0x19660d)?;
    a.add(random, 0x3c6ef35f)
}

/// Calls functions at random, some more often than others, through pointers.
fn put_program(vcpu: &mut Vcpu, rounds: u64) {
    for n in 0..FUNCTIONS {
        put_function(vcpu, n);
        vcpu.put_bytes(TABLE + 8 * n, &function(n).to_le_bytes());
    }
    vcpu.put(MAIN, |a| {
        let mut again = a.create_label();
        a.mov(rcx, rounds)?;
        a.mov(rsi, 1u64)?;
        a.set_label(&mut again)?;
        next(rsi, a)?;
        a.mov(r8, rsi)?;
        a.shr(r8, 20)?;
        a.and(r8, 0xfff)?;
        a.cmp(r8, i32::try_from(FUNCTIONS).unwrap())?;
        a.cmovae(r8, rcx)?;
        a.and(r8, 0x7ff)?;
        a.mov(rdx, 2u64)?;
        a.call(qword_ptr(r8 * 8 + i32::try_from(TABLE).unwrap()))?;
        a.dec(rcx)?;
        a.jnz(again)?;
        a.hlt()
    });
}

/// What the program leaves in RAX and RBX.
fn expected(rounds: u64) -> (u64, u64) {
    let (mut random, mut sum, mut calls) = (1_u64, 0, 0);
    for round in (1..=rounds).rev() {
        random = random.wrapping_mul(0x19660d).wrapping_add(0x3c6ef35f);
        let n = random >> 20 & 0xfff;
        let n = (if n >= FUNCTIONS { round } else { n }) & 0x7ff;
        call(n, 2, &mut sum, &mut calls);
    }
    (sum, calls)
}

#[test]
fn the_oldest_code_makes_room_and_all_goes_on() {
    for clock in [ClockSource::Deterministic, ClockSource::Host] {
        let options = TranslateOptions::default().translate_after(Some(0)).code_memory(0);
        let mut vcpu = Vcpu::new(options, clock);
        put_program(&mut vcpu, ROUNDS);
        vcpu.run();
        assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), expected(ROUNDS));
        assert!(vcpu.figure("translated-parts-emptied") > 100);
        assert_eq!(vcpu.figure("translations-dropped-all"), 0);
        assert!(vcpu.figure("translated-bytes") > 96 << 10 && vcpu.figure("translated-pages") < 200);
    }
}

/// One frame after another at one linear page after another, each with the same function.
#[test]
fn ever_new_pages_take_no_more_memory_than_there_is() {
    const PAGES: u64 = 64;
    on_all_with(TranslateOptions::default().code_memory(0), |mut vcpu| {
        for n in 0..PAGES {
            vcpu.put(FREE + n * PAGE, |a| {
                a.add(rax, i32::try_from(n).unwrap() + 1)?;
                a.ret()
            });
        }
        let places = FREE + PAGES * PAGE;
        vcpu.put(MAIN, |a| {
            let (mut again, mut same) = (a.create_label(), a.create_label());
            a.xor(rbx, rbx)?;
            a.set_label(&mut again)?;
            // R8 is the linear page, R9 the entry, R10 the frame.
            a.mov(r8, rbx)?;
            a.and(r8, i32::try_from(PAGES - 1).unwrap())?;
            a.mov(r10, rbx)?;
            a.shr(r10, 6)?;
            a.add(r10, rbx)?;
            a.and(r10, i32::try_from(PAGES - 1).unwrap())?;
            a.shl(r10, 12)?;
            a.add(r10, i32::try_from(FREE | 7).unwrap())?;
            a.mov(qword_ptr(r8 * 8 + i32::try_from(entry(places)).unwrap()), r10)?;
            a.shl(r8, 12)?;
            a.add(r8, i32::try_from(places).unwrap())?;
            a.invlpg(qword_ptr(r8))?;
            a.mov(rcx, 4u64)?;
            a.set_label(&mut same)?;
            a.call(r8)?;
            a.dec(rcx)?;
            a.jnz(same)?;
            a.inc(rbx)?;
            a.cmp(rbx, i32::try_from(PAGES * PAGES).unwrap())?;
            a.jb(again)?;
            a.hlt()
        });
        vcpu.run();
        let sum: u64 = (0..PAGES * PAGES).map(|n| ((n >> 6) + n) % PAGES + 1).sum();
        assert_eq!(vcpu.register(RAX), 4 * sum);
        assert!(vcpu.tier1.is_none() || vcpu.figure("translated-parts-emptied") > 1);
    });
}

#[test]
fn a_page_that_is_flushed_again_and_again_is_listed_once_or_twice() {
    on_all(|mut vcpu| {
        vcpu.put(FREE, |a| a.ret());
        vcpu.put(MAIN, |a| {
            let mut again = a.create_label();
            a.mov(rcx, 5000u64)?;
            a.set_label(&mut again)?;
            a.invlpg(qword_ptr(FREE))?;
            a.call(FREE)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.hlt()
        });
        vcpu.run();
        assert!(vcpu.figure("translations") < 20);
    });
}
