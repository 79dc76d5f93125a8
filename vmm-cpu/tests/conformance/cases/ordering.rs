//! What one vCPU sees of another's stores: locked accesses, the order of stores and loads (Intel SDM 3A 9.2), code that
//! another vCPU writes (9.1.3).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{byte_ptr, dword_ptr, eax, ecx, edi, edx, esi, qword_ptr, rax, rcx, rdi, rdx, rsi};
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::{EmptyBus, Halt, InterruptMode};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};

cases![
    locked_additions_add_up,
    locked_additions_across_cache_lines_and_pages_add_up,
    stores_become_visible_in_order,
    loads_do_not_pass_fenced_stores,
    loads_do_not_pass_locked_accesses,
    loads_do_not_pass_serializing_instructions,
    code_written_by_another_vcpu_runs,
];

const DEADLINE: Duration = Duration::from_secs(30);

/// Words that the vCPUs share.
pub(super) const SHARED: u64 = layout::DATA;
/// How far each vCPU is, in words of their own cache lines.
pub(super) const PROGRESS: u64 = layout::DATA + 0x1000;
/// What each vCPU has found, likewise.
pub(super) const FOUND: u64 = layout::DATA + 0x2000;
/// Code that is written.
pub(super) const WRITTEN: u64 = layout::DATA + 0x8000;

/// Runs `images`, each on a vCPU and a thread of its own, until all have halted.
pub(super) fn run_all(backend: &Backend, images: &[Image]) -> Outcome<GuestRam> {
    let [first, others @ ..] = images else { return Err(Stop::failed("no vCPU")) };
    let config = backend.config(InterruptMode::External)?.vcpus(u32::try_from(images.len())?);
    let Machine { mut vcpu, vm, ram, .. } = Machine::with_config(backend, &config, first)?;
    let (system, mut registers) = (vcpu.system_registers()?, vcpu.registers()?);
    let mut vcpus = vec![vcpu];
    for (image, index) in others.iter().zip(1..) {
        ram.memory().write_slice(image.bytes(), GuestAddress(image.base))?;
        let mut vcpu = vm.create_vcpu(index)?;
        vcpu.set_system_registers(&system)?;
        registers.rip = image.base;
        registers.rsp -= 0x1000;
        vcpu.set_registers(&registers)?;
        vcpus.push(vcpu);
    }
    let (running, expired) = (AtomicBool::new(true), AtomicBool::new(false));
    let handles: Vec<_> = vcpus.iter().map(|vcpu| vcpu.handle()).collect();
    let ends = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let start = Instant::now();
            while running.load(Ordering::SeqCst) {
                thread::park_timeout(DEADLINE.saturating_sub(start.elapsed()));
                if start.elapsed() >= DEADLINE {
                    expired.store(true, Ordering::SeqCst);
                    handles.iter().for_each(|handle| handle.kick());
                    return;
                }
            }
        });
        let threads: Vec<_> =
            vcpus.iter_mut().map(|vcpu| scope.spawn(move || vcpu.run(&mut EmptyBus))).collect();
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        running.store(false, Ordering::SeqCst);
        watch.thread().unpark();
        ends
    });
    for end in ends {
        let end = end.map_err(|_| Stop::failed("a vCPU's thread panicked"))??;
        if end != Halt::Halted {
            let found = (0..images.len() as u64)
                .map(|n| word(&ram, PROGRESS + n * 64))
                .collect::<Outcome<Vec<_>>>()?;
            return Err(Stop::failed(format!("{end:?} (time is up: {expired:?}), progress {found:?}")));
        }
    }
    Ok(ram)
}

pub(super) fn word(ram: &GuestRam, gpa: u64) -> Outcome<u64> {
    Ok(ram.memory().read_obj(GuestAddress(gpa))?)
}

/// Where the program of a vCPU is.
pub(super) fn code(vcpu: u64) -> u64 {
    layout::CODE + vcpu * 0x1000
}

/// Waits until both vCPUs have begun the round in RCX.
fn meet(p: &mut Program, vcpu: u64) -> Outcome {
    p.mov(qword_ptr(PROGRESS + vcpu * 64), rcx)?;
    let again = p.here()?;
    let mut there = p.create_label();
    p.cmp(qword_ptr(PROGRESS + (1 - vcpu) * 64), rcx)?;
    p.jae(there)?;
    p.pause()?;
    p.jmp(again)?;
    p.set_label(&mut there)?;
    Ok(())
}

/// `rounds` rounds, numbered from 1 in RCX; then HLT.
pub(super) fn rounds(vcpu: u64, rounds: u32, round: impl FnOnce(&mut Program) -> Outcome) -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(ecx, 1)?;
    let again = p.here()?;
    round(&mut p)?;
    p.inc(rcx)?;
    p.cmp(ecx, i32::try_from(rounds)?)?;
    p.jbe(again)?;
    p.hlt()?;
    p.assemble_at(code(vcpu))
}

/// Counts in the shared words at those offsets with LOCK INC, LOCK XADD, and LOCK CMPXCHG, on three vCPUs at once.
fn count_at(backend: &Backend, offsets: &[u64], times: u32) -> Outcome {
    let images = (0..3).map(|vcpu| {
        rounds(vcpu, times, |p| {
            for offset in offsets {
                let address = SHARED + offset;
                p.lock().inc(qword_ptr(address))?;
                p.mov(edx, 1)?;
                p.lock().xadd(qword_ptr(address), rdx)?;
                p.mov(rax, qword_ptr(address))?;
                let again = p.here()?;
                p.lea(rdx, qword_ptr(rax + 1))?;
                p.lock().cmpxchg(qword_ptr(address), rdx)?;
                p.jne(again)?;
            }
            Ok(())
        })
    });
    let ram = run_all(backend, &images.collect::<Outcome<Vec<_>>>()?)?;
    for offset in offsets {
        assert_eq!(word(&ram, SHARED + offset)?, u64::from(times) * 9, "at offset {offset:#x}");
    }
    Ok(())
}

fn locked_additions_add_up(backend: &Backend) -> Outcome {
    count_at(backend, &[0, 64], 3000)
}

fn locked_additions_across_cache_lines_and_pages_add_up(backend: &Backend) -> Outcome {
    count_at(backend, &[0x3d, 0xffc], 300)
}

/// Data first and the number of the round second: whoever sees the second sees the first.
fn stores_become_visible_in_order(backend: &Backend) -> Outcome {
    const ROUNDS: u32 = 3000;
    let writer = rounds(0, ROUNDS, |p| {
        p.mov(qword_ptr(SHARED), rcx)?;
        p.mov(qword_ptr(SHARED + 64), rcx)?;
        Ok(())
    })?;
    let mut p = Program::new()?;
    let again = p.here()?;
    p.mov(rax, qword_ptr(SHARED + 64))?;
    p.mov(rdx, qword_ptr(SHARED))?;
    let mut in_order = p.create_label();
    p.cmp(rdx, rax)?;
    p.jae(in_order)?;
    p.inc(qword_ptr(FOUND))?;
    p.set_label(&mut in_order)?;
    p.cmp(rax, i32::try_from(ROUNDS)?)?;
    p.jb(again)?;
    p.hlt()?;
    let reader = p.assemble_at(code(1))?;
    let ram = run_all(backend, &[writer, reader])?;
    assert_eq!(word(&ram, FOUND)?, 0, "times that data came after the flag");
    Ok(())
}

/// Each vCPU stores to its own word and loads the other's, with `between` in between: not both may load what was there
/// before. An interpreter without the fence was seen to fail one batch in seven.
fn store_then_load(backend: &Backend, between: impl Fn(&mut Program) -> Outcome) -> Outcome {
    const BATCHES: u32 = 60;
    const ROUNDS: u32 = 2000;
    let images = [0, 1].map(|vcpu| {
        rounds(vcpu, ROUNDS, |p| {
            meet(p, vcpu)?;
            p.mov(qword_ptr(SHARED + vcpu * 64), rcx)?;
            between(p)?;
            p.mov(rax, qword_ptr(SHARED + (1 - vcpu) * 64))?;
            p.mov(dword_ptr(rcx * 4 + FOUND + vcpu * 0x2000), eax)?;
            Ok(())
        })
    });
    let [first, second] = images;
    let images = [first?, second?];
    let start = Instant::now();
    // Fewer where privileged code is slow.
    for batch in (0..BATCHES).take_while(|_| start.elapsed() < Duration::from_secs(3)) {
        let ram = run_all(backend, &images)?;
        for round in 1..=u64::from(ROUNDS) {
            let seen = |vcpu: u64| -> Outcome<u32> {
                Ok(ram.memory().read_obj(GuestAddress(FOUND + vcpu * 0x2000 + round * 4))?)
            };
            let seen = (seen(0)?, seen(1)?);
            let in_order = u64::from(seen.0) >= round || u64::from(seen.1) >= round;
            assert!(in_order, "batch {batch}, round {round}: both saw {seen:?}");
        }
    }
    Ok(())
}

fn loads_do_not_pass_fenced_stores(backend: &Backend) -> Outcome {
    store_then_load(backend, |p| Ok(p.mfence()?))
}

fn loads_do_not_pass_locked_accesses(backend: &Backend) -> Outcome {
    store_then_load(backend, |p| Ok(p.lock().add(qword_ptr(SHARED + 0x200), 1)?))
}

fn loads_do_not_pass_serializing_instructions(backend: &Backend) -> Outcome {
    store_then_load(backend, |p| {
        p.mov(esi, ecx)?;
        p.xor(eax, eax)?;
        p.cpuid()?;
        Ok(p.mov(ecx, esi)?)
    })
}

/// One vCPU writes a function that returns the number of the round, and announces it; the other serializes and calls it.
fn code_written_by_another_vcpu_runs(backend: &Backend) -> Outcome {
    const ROUNDS: u32 = 1000;
    let writer = rounds(0, ROUNDS, |p| {
        // MOV EAX, round; RET.
        p.mov(dword_ptr(WRITTEN + 1), ecx)?;
        p.mov(qword_ptr(SHARED), rcx)?;
        // Until it has been called.
        let again = p.here()?;
        let mut called = p.create_label();
        p.cmp(qword_ptr(SHARED + 64), rcx)?;
        p.je(called)?;
        p.pause()?;
        p.jmp(again)?;
        p.set_label(&mut called)?;
        Ok(())
    })?;
    let mut p = Program::new()?;
    p.mov(byte_ptr(WRITTEN), 0xb8)?;
    p.mov(byte_ptr(WRITTEN + 5), 0xc3)?;
    p.mov(esi, 1)?;
    let (mut next, mut same) = (p.create_label(), p.create_label());
    p.set_label(&mut next)?;
    p.cmp(qword_ptr(SHARED), rsi)?;
    let mut announced = p.create_label();
    p.je(announced)?;
    p.pause()?;
    p.jmp(next)?;
    p.set_label(&mut announced)?;
    p.xor(eax, eax)?;
    p.cpuid()?;
    p.mov(edi, i32::try_from(WRITTEN)?)?;
    p.call(rdi)?;
    p.cmp(eax, esi)?;
    p.je(same)?;
    p.inc(qword_ptr(FOUND))?;
    p.set_label(&mut same)?;
    p.mov(qword_ptr(SHARED + 64), rsi)?;
    p.inc(esi)?;
    p.cmp(esi, i32::try_from(ROUNDS)?)?;
    p.jbe(next)?;
    p.hlt()?;
    let caller = p.assemble_at(code(1))?;
    let ram = run_all(backend, &[writer, caller])?;
    assert_eq!(word(&ram, FOUND)?, 0, "times that old code ran");
    assert_eq!(word(&ram, SHARED + 64)?, u64::from(ROUNDS));
    Ok(())
}
