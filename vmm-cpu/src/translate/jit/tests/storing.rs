//! Programs that store to pages of their own code all the time.

use std::sync::Arc;

use iced_x86::code_asm::{byte_ptr, cl, dword_ptr, eax, qword_ptr, r8, r9, rax, rbx, rcx, rdx, rsi, rsp};
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

use super::*;
use crate::translate::cpu::{RAX, RBX};
use crate::translate::vm::TranslateVm;
use crate::vm::{GuestAccess, Vm};

/// As many rounds as make a page be checked, and as many again.
const ROUNDS: u64 = 5000;
/// A page with a function and a counter.
const PAGE_OF_BOTH: u64 = FREE;
const COUNTER: u64 = PAGE_OF_BOTH + 0x800;

fn low(address: u64) -> i32 {
    i32::try_from(address).unwrap()
}

/// What is put where an immediate is to be found.
const MARK: u32 = 0x0112_3344;

/// The function: counts, and adds 1 to RAX; where that is.
fn put_function(vcpu: &mut Vcpu) -> u64 {
    vcpu.put(PAGE_OF_BOTH, |a| {
        a.inc(dword_ptr(low(COUNTER)))?;
        a.add(rax, MARK.cast_signed())?;
        a.inc(rbx)?;
        a.ret()
    });
    let immediate = vcpu.mark(PAGE_OF_BOTH);
    vcpu.put_bytes(immediate, &1_u32.to_le_bytes());
    immediate
}

fn put_loop(vcpu: &mut Vcpu, rounds: u64) {
    vcpu.put(MAIN, |a| {
        let mut again = a.create_label();
        a.mov(rcx, rounds)?;
        a.set_label(&mut again)?;
        a.call(PAGE_OF_BOTH)?;
        a.dec(rcx)?;
        a.jnz(again)?;
        a.hlt()
    });
}

impl Vcpu {
    /// Where the mark is in code at `at`.
    fn mark(&self, at: u64) -> u64 {
        let is_mark = |at: &u64| self.guest.read::<4>(*at) == u64::from(MARK);
        (at..at + 0x100).find(is_mark).unwrap()
    }

    fn pages_checked(&self) -> u64 {
        self.guest.core.counts.pages_checked
    }

    fn is_watched(&self, gpa: u64) -> bool {
        let slot = self.guest.core.map().slot(gpa).unwrap();
        slot.code.is_watched(slot.page(gpa))
    }
}

#[test]
fn counters_beside_code_are_counted_by_translated_code() {
    on_all(|mut vcpu| {
        put_function(&mut vcpu);
        put_loop(&mut vcpu, 4 * ROUNDS);
        vcpu.run();
        assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), (4 * ROUNDS, 4 * ROUNDS));
        assert_eq!(vcpu.guest.read::<4>(COUNTER), 4 * ROUNDS);
        assert_eq!(vcpu.pages_checked(), u64::from(vcpu.tier1.is_some()));
        assert_eq!(vcpu.is_watched(COUNTER), vcpu.tier1.is_none());
        if vcpu.counts_translated() {
            let interpreted = vcpu.guest.core.instructions - vcpu.figure("translated-instructions");
            assert!(interpreted < 4 * ROUNDS, "{interpreted} of {}", vcpu.guest.core.instructions);
        }
    });
}

#[test]
fn what_a_loop_stores_to_its_own_instructions_is_executed_at_once() {
    on_all(|mut vcpu| {
        let mut place = FREE;
        // The immediate of the next instruction, as soon as it is known where that is.
        for _ in 0..2 {
            vcpu.put(MAIN, |a| {
                let mut again = a.create_label();
                a.mov(rcx, ROUNDS)?;
                a.set_label(&mut again)?;
                a.inc(dword_ptr(low(place)))?;
                a.add(rax, MARK.cast_signed())?;
                a.dec(rcx)?;
                a.jnz(again)?;
                a.hlt()
            });
            place = vcpu.mark(MAIN);
        }
        vcpu.run();
        let first = u64::from(MARK) + 1;
        assert_eq!(vcpu.register(RAX), (first..first + ROUNDS).sum::<u64>());
    });
}

#[test]
fn code_that_changes_now_and_then_beside_a_counter_is_what_it_is() {
    on_all(|mut vcpu| {
        let immediate = put_function(&mut vcpu);
        vcpu.put(MAIN, |a| {
            let (mut again, mut same) = (a.create_label(), a.create_label());
            a.mov(rcx, ROUNDS)?;
            a.set_label(&mut again)?;
            a.call(PAGE_OF_BOTH)?;
            a.test(rcx, 0x3f)?;
            a.jnz(same)?;
            a.inc(byte_ptr(low(immediate + 1)))?;
            a.set_label(&mut same)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.hlt()
        });
        vcpu.run();
        let (mut sum, mut addend) = (0_u64, 1_u32);
        for round in (1..=ROUNDS).rev() {
            sum = sum.wrapping_add(addend.into());
            if round % 64 == 0 {
                addend = addend & !0xff00 | (addend + 0x100) & 0xff00;
            }
        }
        assert_eq!((vcpu.register(RAX), vcpu.guest.read::<4>(COUNTER)), (sum, ROUNDS));
        assert_eq!(vcpu.pages_checked() > 0, vcpu.tier1.is_some());
    });
}

#[test]
fn trampolines_on_the_stack_cost_no_store_its_speed() {
    on_all(|mut vcpu| {
        let stack = FREE + PAGE;
        let trampoline = stack - 0x800;
        vcpu.put(trampoline, |a| {
            a.push(rbx)?;
            a.inc(qword_ptr(rsp))?;
            a.pop(rbx)?;
            a.ret()
        });
        vcpu.put(MAIN, |a| {
            let mut again = a.create_label();
            a.mov(rsp, stack)?;
            a.mov(rcx, ROUNDS)?;
            a.mov(r8, trampoline)?;
            a.set_label(&mut again)?;
            a.call(r8)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.hlt()
        });
        vcpu.run();
        assert_eq!(vcpu.register(RBX), ROUNDS);
        assert_eq!(vcpu.pages_checked(), u64::from(vcpu.tier1.is_some()));
    });
}

#[test]
fn an_instruction_across_two_pages_is_checked_in_both() {
    const CROSSING: u64 = FREE + PAGE - 4;
    for counter in [FREE + 0x800, FREE + PAGE + 0x800] {
        on_all(|mut vcpu| {
            // ADD RAX, 1: the immediate begins in the first page. RET.
            vcpu.put_bytes(CROSSING, &[0x48, 0x05, 1, 0, 0, 0, 0xc3]);
            vcpu.put(MAIN, |a| {
                let mut again = a.create_label();
                a.mov(rcx, ROUNDS)?;
                a.set_label(&mut again)?;
                a.inc(dword_ptr(low(counter)))?;
                a.call(CROSSING)?;
                // One part, and the other one at other times.
                for (at, low_bits) in [(CROSSING + 2, 0), (CROSSING + 4, 0x80)] {
                    let mut same = a.create_label();
                    a.mov(rdx, rcx)?;
                    a.and(rdx, 0xff)?;
                    a.cmp(rdx, low_bits)?;
                    a.jne(same)?;
                    a.inc(byte_ptr(low(at)))?;
                    a.set_label(&mut same)?;
                    a.nop()?;
                }
                a.dec(rcx)?;
                a.jnz(again)?;
                a.hlt()
            });
            vcpu.run();
            let (mut sum, mut addend) = (0, 1);
            for round in (1..=ROUNDS).rev() {
                sum += addend;
                addend += u64::from(round % 256 == 0) + (u64::from(round % 256 == 0x80) << 16);
            }
            assert_eq!((vcpu.register(RAX), vcpu.guest.read::<4>(counter)), (sum, ROUNDS));
            assert_eq!(vcpu.pages_checked() > 0, vcpu.tier1.is_some());
        });
    }
}

#[test]
fn memory_that_is_mapped_elsewhere_is_looked_at_there() {
    on_all(|mut vcpu| {
        let immediate = put_function(&mut vcpu);
        put_loop(&mut vcpu, ROUNDS);
        vcpu.run();
        assert_eq!(vcpu.register(RAX), ROUNDS);
        let vm = TranslateVm(Arc::clone(&vcpu.guest.core.shared));
        let old = vm.unmap_memory(GuestAddress(0)).unwrap();
        let ram = GuestRam::builder().ram(crate::translate::test_support::RAM).build().unwrap();
        let new = ram.regions().remove(0);
        vm.map_memory(Arc::clone(&new), GuestAccess::ReadWrite).unwrap();
        let mut bytes = vec![0; usize::try_from(crate::translate::test_support::RAM).unwrap()];
        assert!(vcpu.guest.core.map().read(0, &mut bytes));
        vcpu.guest.core.see_epoch();
        vcpu.put_bytes(0, &bytes);
        drop(old);
        // Stored to all the time again, and changed while it is.
        for addend in [1, 7, 9] {
            let before = vcpu.register(RAX);
            vcpu.put_bytes(immediate, &[addend]);
            vcpu.run();
            assert_eq!(vcpu.register(RAX) - before, ROUNDS * u64::from(addend));
        }
        assert_eq!(vcpu.guest.read::<4>(COUNTER), 4 * ROUNDS);
    });
}

#[test]
fn a_page_that_is_left_alone_is_watched_again() {
    on_all(|mut vcpu| {
        let immediate = put_function(&mut vcpu);
        // A second function, which stores nothing.
        let other = PAGE_OF_BOTH + 0x400;
        vcpu.put(other, |a| {
            a.add(rbx, 1)?;
            a.ret()
        });
        vcpu.put(MAIN, |a| {
            let (mut again, mut flush) = (a.create_label(), a.create_label());
            a.mov(rcx, ROUNDS)?;
            a.set_label(&mut again)?;
            a.call(PAGE_OF_BOTH)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.mov(rcx, 100u64)?;
            a.set_label(&mut flush)?;
            a.invlpg(qword_ptr(low(PAGE_OF_BOTH)))?;
            a.call(other)?;
            a.dec(rcx)?;
            a.jnz(flush)?;
            a.mov(byte_ptr(low(immediate)), 3)?;
            a.call(PAGE_OF_BOTH)?;
            a.hlt()
        });
        vcpu.run();
        assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), (ROUNDS + 3, ROUNDS + 101));
        assert!(vcpu.is_watched(PAGE_OF_BOTH));
        assert_eq!(vcpu.pages_checked(), u64::from(vcpu.tier1.is_some()));
    });
}

/// Stores at random to counters, to immediates and to opcodes of functions that are called at random.
#[test]
fn random_stores_to_code_do_what_they_do_interpreted() {
    const FUNCTIONS: u64 = 24;
    let function = |n: u64| FREE + n * 0x1f0;
    let results: std::cell::RefCell<Vec<[u64; 3]>> = std::cell::RefCell::default();
    on_all(|mut vcpu| {
        for n in 0..FUNCTIONS {
            vcpu.put(function(n), |a| {
                let mut skip = a.create_label();
                a.mov(qword_ptr(low(function(n) + 0x100)), rsi)?;
                a.add(rax, MARK.cast_signed())?;
                a.inc(rbx)?;
                a.test(rbx, 3)?;
                a.jz(skip)?;
                a.xor(rax, rsi)?;
                a.set_label(&mut skip)?;
                a.add(dword_ptr(low(function(n) + 0x108)), eax)?;
                a.ret()
            });
        }
        let offset = low(vcpu.mark(function(0)) - function(0));
        vcpu.put(MAIN, |a| {
            let (mut again, mut call) = (a.create_label(), a.create_label());
            a.mov(rcx, 8 * ROUNDS)?;
            a.mov(rsi, 1u64)?;
            a.set_label(&mut again)?;
            a.imul_3(rsi, rsi, 0x19660d)?;
            a.add(rsi, 0x3c6ef35f)?;
            a.mov(r8, rsi)?;
            a.shr(r8, 16)?;
            a.and(r8, 15)?;
            a.imul_3(r8, r8, 0x1f0)?;
            a.add(r8, low(FREE))?;
            a.mov(rdx, rsi)?;
            a.shr(rdx, 24)?;
            a.mov(r9, rdx)?;
            a.and(r9, 0x7f)?;
            a.cmp(r9, 1)?;
            a.ja(call)?;
            // One of two bytes of an immediate.
            a.mov(byte_ptr(r8 + r9 + offset), cl)?;
            a.set_label(&mut call)?;
            a.call(r8)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.hlt()
        });
        vcpu.run();
        let sums = [vcpu.register(RAX), vcpu.register(RBX), vcpu.guest.read::<8>(FREE + 0x108)];
        results.borrow_mut().push(sums);
        assert_eq!(vcpu.pages_checked() > 0, vcpu.tier1.is_some());
    });
    let results = results.into_inner();
    assert!(results.iter().all(|result| *result == results[0]), "{results:x?}");
}
