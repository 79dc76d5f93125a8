//! A small guest that has all that there is to be saved, and whose result is known: a program that computes with general and vector
//! registers and a segment base and makes system calls, its kernel, which changes page tables, waits for a periodic timer and looks that time
//! does not go back, and a second virtual processor, which starts, computes, tells the first one by an event and goes down.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, PAGE_SIZE};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::xen_pv::abi::mmu::mmuext;
use crate::xen_pv::abi::vcpu::{VGCF_IN_SYSCALL, VcpuGuestContext, segbase, vcpuop, vgcf};
use crate::xen_pv::abi::{domid, event::evtchnop, nr, sched::schedop, shared_info};
use crate::xen_pv::builder::PvEntry;
use crate::xen_pv::builder::tests::{ENTRY, Kernel};

pub(super) const RAM: u64 = 32 << 20;
/// Guest-physical address of [`ENTRY`].
const ENTRY_GPA: u64 = 0x100_0000;
const MEMORY: u64 = 0x1_0000;

/// Pages behind the code.
const DATA: u64 = ENTRY + 0x1000;
const SHARED: u64 = ENTRY + 0x2000;
const SCRATCH: u64 = ENTRY + 0x3000;
const STACK_END: u64 = ENTRY + 0x5000;
const USER_ROOT: u64 = ENTRY + 0x5000;
const CONTEXT: u64 = ENTRY + 0x6000;
const SECOND_STACK_END: u64 = ENTRY + 0x9000;
const FRAMES: [u64; 2] = [ENTRY + 0x9000, ENTRY + 0xa000];
const PROGRAM_STACK_END: u64 = ENTRY + 0xc000;

/// Offsets in the page of data.
const ARGUMENTS: u64 = 0;
const TIMER_PORT: u64 = 0x48;
const IPI: u64 = 0x60;
const INFO: u64 = 0x400;
const TICKS: u64 = 0x500;
const LAST_TIME: u64 = 0x508;
const SECOND_RESULT: u64 = 0x510;
const SECOND_DONE: u64 = 0x518;
const RESULT: u64 = 0x520;
const CALLS: u64 = 0x538;
const TLS: u64 = 0x540;

/// Steps of the program, and of the second virtual processor.
const STEPS: u64 = 200_000;
const SECOND_STEPS: u64 = 400_000;
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;
/// What is in the segment that FS has.
const IN_SEGMENT: u64 = 0x1234_5678_9abc;

/// What the guest prints when all went well.
pub(super) fn expected(vcpus: u32) -> Vec<u8> {
    let (mut value, mut sum) = (1_u64, 0_u64);
    for _ in 0..STEPS {
        value = value.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT).wrapping_add(IN_SEGMENT);
        sum = sum.wrapping_add(value);
    }
    let mut second = 0_u64;
    if vcpus > 1 {
        second = 7;
        for _ in 0..SECOND_STEPS {
            second = second.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        }
    }
    // The system calls: each added 1 to one of two pages.
    let calls = STEPS / 64;
    [value, sum, second, calls].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn call(a: &mut CodeAssembler, number: u64, args: &[u64]) -> Result<(), IcedError> {
    a.mov(rax, number)?;
    for (register, value) in [rdi, rsi, rdx, r10].into_iter().zip(args) {
        a.mov(register, *value)?;
    }
    a.syscall()
}

/// A call whose failure ends the guest.
fn must(a: &mut CodeAssembler, number: u64, args: &[u64]) -> Result<(), IcedError> {
    call(a, number, args)?;
    let mut well = a.create_label();
    a.test(rax, rax)?;
    a.jz(well)?;
    a.ud2()?;
    a.set_label(&mut well)
}

fn put(a: &mut CodeAssembler, offset: u64, value: u64) -> Result<(), IcedError> {
    a.mov(r14, DATA + offset)?;
    a.mov(rcx, value)?;
    a.mov(qword_ptr(r14), rcx)
}

/// Back to what an event or a system call interrupted: RCX and R11 first, then the frame of IRET.
fn back(a: &mut CodeAssembler, flags: u64) -> Result<(), IcedError> {
    a.pop(rcx)?;
    a.pop(r11)?;
    a.push(i32::try_from(flags).unwrap())?;
    a.push(rcx)?;
    a.push(r11)?;
    a.push(rax)?;
    a.mov(rax, nr::IRET)?;
    a.syscall()
}

/// The kernel, and where the second virtual processor starts in it.
pub(super) fn kernel(vcpus: u32) -> (Vec<u8>, u64) {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut labels = Labels {
        event: a.create_label(),
        system_call: a.create_label(),
        program: a.create_label(),
        second: a.create_label(),
    };
    start(&mut a, &labels, vcpus).unwrap();
    event(&mut a, &mut labels).unwrap();
    system_call(&mut a, &mut labels).unwrap();
    program(&mut a, &mut labels).unwrap();
    second(&mut a, &mut labels).unwrap();
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(ENTRY, options).unwrap();
    let second = assembled.label_ip(&labels.second).unwrap();
    let code = assembled.inner.code_buffer;
    assert!(code.len() < 0x1000, "{:#x}", code.len());
    (Kernel::with_code(code).with_memory(MEMORY).elf(), second)
}

struct Labels {
    event: CodeLabel,
    system_call: CodeLabel,
    program: CodeLabel,
    second: CodeLabel,
}

fn start(a: &mut CodeAssembler, labels: &Labels, vcpus: u32) -> Result<(), IcedError> {
    // The shared information, from the start information.
    a.mov(rsi, qword_ptr(rsi + 40))?;
    a.or(rsi, 0x67)?;
    a.mov(rax, nr::UPDATE_VA_MAPPING)?;
    a.mov(rdi, SHARED)?;
    a.mov(rdx, 2_u64)?;
    a.syscall()?;
    // The vcpu_info in a page of the kernel's own.
    put(a, ARGUMENTS, (ENTRY_GPA + 0x1000) / PAGE_SIZE)?;
    put(a, ARGUMENTS + 8, INFO)?;
    must(a, nr::VCPU_OP, &[vcpuop::REGISTER_VCPU_INFO, 0, DATA + ARGUMENTS])?;
    // A copy of the time, which nobody reads; that it is written does no harm.
    put(a, ARGUMENTS, DATA + 0x600)?;
    must(a, nr::VCPU_OP, &[vcpuop::REGISTER_VCPU_TIME_MEMORY_AREA, 0, DATA + ARGUMENTS])?;
    // VIRQ_TIMER and an IPI.
    must(a, nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_VIRQ, DATA + TIMER_PORT - 8])?;
    must(a, nr::EVENT_CHANNEL_OP, &[evtchnop::UNMASK, DATA + TIMER_PORT])?;
    must(a, nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_IPI, DATA + IPI])?;
    must(a, nr::EVENT_CHANNEL_OP, &[evtchnop::UNMASK, DATA + IPI + 4])?;
    a.lea(rdi, ptr(labels.event))?;
    a.xor(esi, esi)?;
    a.lea(rdx, ptr(labels.system_call))?;
    a.mov(rax, nr::SET_CALLBACKS)?;
    a.syscall()?;
    put(a, ARGUMENTS, 1_000_000)?;
    must(a, nr::VCPU_OP, &[vcpuop::SET_PERIODIC_TIMER, 0, DATA + ARGUMENTS])?;
    must(a, nr::STACK_SWITCH, &[0xe02b, STACK_END])?;
    must(a, nr::SET_SEGMENT_BASE, &[segbase::FS, DATA + TLS])?;
    put(a, TLS, IN_SEGMENT)?;
    // The program's own root.
    put(a, ARGUMENTS, mmuext::NEW_USER_BASEPTR.into())?;
    put(a, ARGUMENTS + 8, (ENTRY_GPA + USER_ROOT - ENTRY) / PAGE_SIZE)?;
    must(a, nr::MMUEXT_OP, &[DATA + ARGUMENTS, 1, 0, domid::SELF.into()])?;
    if vcpus > 1 {
        must(a, nr::VCPU_OP, &[vcpuop::INITIALISE, 1, CONTEXT])?;
        must(a, nr::VCPU_OP, &[vcpuop::UP, 1])?;
    } else {
        put(a, SECOND_DONE, 1)?;
    }
    // Into the program: SS, RSP, RFLAGS, CS, RIP, flags, RCX, R11, RAX.
    a.mov(rsp, STACK_END - 0x400)?;
    a.push(0xe02b)?;
    a.mov(rcx, PROGRAM_STACK_END)?;
    a.push(rcx)?;
    a.push(0x202)?;
    a.push(0xe033)?;
    a.lea(rcx, ptr(labels.program))?;
    a.push(rcx)?;
    for _ in 0..4 {
        a.push(0)?;
    }
    a.mov(rax, nr::IRET)?;
    a.syscall()
}

/// Takes all events. Changes RAX alone.
fn event(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    a.set_label(&mut labels.event)?;
    a.push(rax)?;
    a.push(rbx)?;
    a.mov(rbx, DATA)?;
    a.mov(byte_ptr(rbx + (INFO + shared_info::UPCALL_PENDING)), 0)?;
    a.xor(eax, eax)?;
    a.xchg(qword_ptr(rbx + (INFO + shared_info::PENDING_SEL)), rax)?;
    a.inc(qword_ptr(rbx + TICKS))?;
    a.mov(rbx, SHARED)?;
    a.xor(eax, eax)?;
    a.xchg(qword_ptr(rbx + shared_info::EVTCHN_PENDING), rax)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    back(a, 0)
}

fn system_call(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    a.set_label(&mut labels.system_call)?;
    let mut done = a.create_label();
    a.cmp(rax, 2)?;
    a.je(done)?;
    look_at_time(a)?;
    // One of two pages, by turns, at the same place.
    a.mov(r14, DATA)?;
    a.inc(qword_ptr(r14 + CALLS))?;
    a.mov(rcx, qword_ptr(r14 + CALLS))?;
    a.and(rcx, 1)?;
    a.shl(rcx, 12)?;
    a.mov(rsi, (ENTRY_GPA + FRAMES[0] - ENTRY) | 0x67)?;
    a.add(rsi, rcx)?;
    a.mov(rdi, SCRATCH)?;
    a.mov(rdx, 2_u64)?;
    a.mov(rax, nr::UPDATE_VA_MAPPING)?;
    a.syscall()?;
    a.mov(r14, SCRATCH)?;
    a.inc(qword_ptr(r14))?;
    // Every so often it waits for a tick.
    let mut goes_on = a.create_label();
    a.mov(r14, DATA)?;
    a.mov(rcx, qword_ptr(r14 + CALLS))?;
    a.and(rcx, 63)?;
    a.jnz(goes_on)?;
    a.mov(rbp, qword_ptr(r14 + TICKS))?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    call(a, nr::SCHED_OP, &[schedop::BLOCK, 0])?;
    a.mov(r14, DATA)?;
    a.cmp(qword_ptr(r14 + TICKS), rbp)?;
    a.je(again)?;
    a.set_label(&mut goes_on)?;
    a.xor(eax, eax)?;
    back(a, VGCF_IN_SYSCALL)?;

    a.set_label(&mut done)?;
    a.mov(r14, DATA)?;
    a.mov(qword_ptr(r14 + RESULT), r12)?;
    a.movq(qword_ptr(r14 + (RESULT + 8)), xmm0)?;
    let mut wait = a.create_label();
    let mut both = a.create_label();
    a.set_label(&mut wait)?;
    a.mov(r14, DATA)?;
    a.cmp(qword_ptr(r14 + SECOND_DONE), 0)?;
    a.jne(both)?;
    call(a, nr::SCHED_OP, &[schedop::BLOCK, 0])?;
    a.jmp(wait)?;
    a.set_label(&mut both)?;
    a.mov(rcx, qword_ptr(r14 + SECOND_RESULT))?;
    a.mov(qword_ptr(r14 + (RESULT + 16)), rcx)?;
    // Both pages together hold the number of calls.
    a.mov(rcx, FRAMES[0])?;
    a.mov(rdx, qword_ptr(rcx))?;
    a.add(rdx, qword_ptr(rcx + 0x1000))?;
    a.mov(qword_ptr(r14 + (RESULT + 24)), rdx)?;
    call(a, nr::CONSOLE_IO, &[0, 32, DATA + RESULT])?;
    put(a, ARGUMENTS, 0)?;
    call(a, nr::SCHED_OP, &[schedop::SHUTDOWN, DATA + ARGUMENTS])?;
    a.ud2()
}

/// Computes the time as public/xen.h says; a time before the last one ends the guest.
fn look_at_time(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut right, mut shifted, mut well) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(r8, DATA + INFO + shared_info::TIME)?;
    a.set_label(&mut again)?;
    a.mov(edi, dword_ptr(r8))?;
    a.test(edi, 1)?;
    a.jnz(again)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.sub(rax, qword_ptr(r8 + 8))?;
    a.movsx(ecx, byte_ptr(r8 + 28))?;
    a.test(ecx, ecx)?;
    a.js(right)?;
    a.shl(rax, cl)?;
    a.jmp(shifted)?;
    a.set_label(&mut right)?;
    a.neg(ecx)?;
    a.shr(rax, cl)?;
    a.set_label(&mut shifted)?;
    a.mov(edx, dword_ptr(r8 + 24))?;
    a.mul(rdx)?;
    a.shrd(rax, rdx, 32)?;
    a.add(rax, qword_ptr(r8 + 16))?;
    a.cmp(edi, dword_ptr(r8))?;
    a.jne(again)?;
    a.mov(r9, DATA + LAST_TIME)?;
    a.cmp(rax, qword_ptr(r9))?;
    a.jae(well)?;
    a.ud2()?;
    a.set_label(&mut well)?;
    a.mov(qword_ptr(r9), rax)
}

fn program(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    a.set_label(&mut labels.program)?;
    a.mov(r12, 1_u64)?;
    a.xor(r13, r13)?;
    a.pxor(xmm0, xmm0)?;
    a.mov(rbx, MULTIPLIER)?;
    a.mov(r15, INCREMENT)?;
    let (mut again, mut no_call) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.imul_2(r12, rbx)?;
    a.add(r12, r15)?;
    a.add(r12, qword_ptr(0).fs())?;
    a.movq(xmm1, r12)?;
    a.paddq(xmm0, xmm1)?;
    a.inc(r13)?;
    a.test(r13, 63)?;
    a.jnz(no_call)?;
    a.mov(eax, 1)?;
    a.syscall()?;
    a.set_label(&mut no_call)?;
    a.cmp(r13, i32::try_from(STEPS).unwrap())?;
    a.jb(again)?;
    a.mov(eax, 2)?;
    a.syscall()?;
    a.ud2()
}

fn second(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    a.set_label(&mut labels.second)?;
    a.xor(r13, r13)?;
    a.mov(rbx, MULTIPLIER)?;
    a.mov(r15, INCREMENT)?;
    let (mut again, mut no_call) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.imul_2(r12, rbx)?;
    a.add(r12, r15)?;
    a.inc(r13)?;
    a.test(r13, 1023)?;
    a.jnz(no_call)?;
    call(a, nr::XEN_VERSION, &[0, 0])?;
    a.set_label(&mut no_call)?;
    a.cmp(r13, i32::try_from(SECOND_STEPS).unwrap())?;
    a.jb(again)?;
    a.mov(r14, DATA)?;
    a.mov(qword_ptr(r14 + SECOND_RESULT), r12)?;
    a.mov(qword_ptr(r14 + SECOND_DONE), 1)?;
    must(a, nr::EVENT_CHANNEL_OP, &[evtchnop::SEND, DATA + IPI + 4])?;
    call(a, nr::VCPU_OP, &[vcpuop::DOWN, 1])?;
    a.ud2()
}

/// What the kernel finds in its memory: the program's root, and the start of the second virtual processor.
pub(super) fn furnish(ram: &GuestRam, entry: &PvEntry, second: u64) {
    let gpa = |va: u64| GuestAddress(ENTRY_GPA + (va - ENTRY));
    let mut root = vec![0; 4096];
    ram.memory().read_slice(&mut root, entry.root).unwrap();
    ram.memory().write_slice(&root, gpa(USER_ROOT)).unwrap();
    let mut context = VcpuGuestContext::new_zeroed();
    context.flags = vgcf::IN_KERNEL;
    context.ctrlreg[3] = entry.root.0;
    let regs = &mut context.user_regs;
    (regs.rip, regs.rsp, regs.r12) = (second, SECOND_STACK_END, 7);
    (regs.cs, regs.ss, regs.rflags) = (0xe033, 0xe02b, 0x202);
    ram.memory().write_slice(context.as_bytes(), gpa(CONTEXT)).unwrap();
}

/// Ticks that the guest has seen.
pub(super) fn ticks(ram: &GuestRam) -> u64 {
    ram.memory().read_obj(GuestAddress(ENTRY_GPA + 0x1000 + TICKS)).unwrap()
}
