//! The code of ring 0: it loads the state of a case, and when something comes of it, stores what it ended with and tells
//! the host by a write to a port.
//!
//! So the host only reads and writes memory for a case, and most of what loads and stores state is the interpreter's own
//! code too. The page with the state is also the stack of ring 0, so that what an exception pushes is read where it lies.

use anyhow::{Context, Result};
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

use super::machine::{CODE, KERNEL, STATE};
use crate::start::{USER_DS, USER32_CS, USER64_CS, at};

/// The port that is written when a case has ended.
pub(super) const DONE: u16 = 0xf4;

/// In the page with the state: where the fields are that a case ended with, from FXSAVE on.
pub(super) mod end {
    pub(in super::super) const FXSAVE: usize = 0x400;
    pub(in super::super) const FS_BASE: usize = 0x600;
    pub(in super::super) const GS_BASE: usize = 0x608;
    pub(in super::super) const CR2: usize = 0x610;
    /// DS, ES, FS, GS, two bytes each.
    pub(in super::super) const SELECTORS: usize = 0x618;
    /// RAX, RCX, RDX, RBX, RSP (not that of the case), RBP, RSI, RDI, R8 to R15 downwards from the frame.
    pub(in super::super) const FRAME: usize = super::STACK_TOP as usize - 56;
}
const USER_RSP: usize = 0x620;

/// Where the stack begins that exceptions push on: SS, RSP, RFLAGS, CS, RIP, the error code, and the vector.
pub(super) const STACK_TOP: u64 = 0x1000;

/// What stands for the vector of an exception after SYSCALL.
pub(super) const SYSTEM_CALL: u64 = 0x100;

/// The code and the addresses in it.
pub(super) struct Kernel {
    pub(super) code: Vec<u8>,
    pub(super) vectors: [u64; 256],
    pub(super) system_call: u64,
    pub(super) system_call_32: u64,
}

/// Whether an exception comes with an error code.
fn pushes_error(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

fn offset(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// Assembles it for [`CODE`], where loading the state comes first.
pub(super) fn assemble() -> Result<Kernel> {
    let mut a = CodeAssembler::new(64)?;
    load(&mut a)?;
    let mut common = a.create_label();
    let mut labels = Vec::with_capacity(258);
    for vector in 0..256 {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        labels.push(label);
        if !pushes_error(vector) {
            a.push(0)?;
        }
        a.push(i32::try_from(vector)?)?;
        a.jmp(common)?;
    }
    for selector in [USER64_CS, USER32_CS] {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        labels.push(label);
        system_call(&mut a, selector)?;
        a.jmp(common)?;
    }
    a.set_label(&mut common)?;
    store(&mut a)?;
    let origin = KERNEL + CODE;
    let assembled = a.assemble_options(origin, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut addresses = Vec::with_capacity(labels.len());
    for label in &labels {
        addresses.push(assembled.label_ip(label)?);
    }
    let code = assembled.inner.code_buffer;
    anyhow::ensure!(code.len() as u64 <= STATE - CODE, "the code of ring 0 is too long");
    let (vectors, calls) = addresses.split_first_chunk().context("256 labels")?;
    let [system_call, system_call_32] = calls else { anyhow::bail!("two more labels") };
    Ok(Kernel { code, vectors: *vectors, system_call: *system_call, system_call_32: *system_call_32 })
}

fn load(a: &mut CodeAssembler) -> Result<()> {
    let mut flat = a.create_label();
    a.mov(rdi, KERNEL + STATE)?;
    a.mov(eax, dword_ptr(rdi + offset(at::DATA_SELECTOR)))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(fs, eax)?;
    a.mov(gs, eax)?;
    a.test(eax, eax)?;
    a.jne(flat)?;
    a.mov(rax, qword_ptr(rdi + offset(at::FS_BASE)))?;
    a.wrfsbase(rax)?;
    a.mov(rax, qword_ptr(rdi + offset(at::GS_BASE)))?;
    a.wrgsbase(rax)?;
    a.set_label(&mut flat)?;
    a.fxrstor64(ptr(rdi + offset(at::FXSAVE)))?;
    a.lea(rsp, ptr(rdi + offset(at::RIP)))?;
    for (register, place) in [
        (rax, 0),
        (rcx, 1),
        (rdx, 2),
        (rbx, 3),
        (rbp, 5),
        (rsi, 6),
        (r8, 8),
        (r9, 9),
        (r10, 10),
        (r11, 11),
        (r12, 12),
        (r13, 13),
        (r14, 14),
        (r15, 15),
        (rdi, 7),
    ] {
        a.mov(register, qword_ptr(rdi + 8 * place))?;
    }
    a.iretq()?;
    Ok(())
}

/// SYSCALL leaves RIP in RCX, RFLAGS in R11 and RSP alone: makes a frame of them as exceptions do.
fn system_call(a: &mut CodeAssembler, selector: u16) -> Result<()> {
    let place = KERNEL + STATE + USER_RSP as u64;
    a.mov(qword_ptr(place), rsp)?;
    a.lea(rsp, ptr(KERNEL + STATE + STACK_TOP))?;
    a.push(i32::from(USER_DS))?;
    a.push(qword_ptr(place))?;
    a.push(r11)?;
    a.push(i32::from(selector))?;
    a.push(rcx)?;
    a.push(0)?;
    a.push(i32::try_from(SYSTEM_CALL)?)?;
    Ok(())
}

fn store(a: &mut CodeAssembler) -> Result<()> {
    for register in [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] {
        a.push(register)?;
    }
    a.mov(rdi, KERNEL + STATE)?;
    a.fxsave64(ptr(rdi + offset(end::FXSAVE)))?;
    a.rdfsbase(rax)?;
    a.mov(qword_ptr(rdi + offset(end::FS_BASE)), rax)?;
    a.rdgsbase(rax)?;
    a.mov(qword_ptr(rdi + offset(end::GS_BASE)), rax)?;
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(rdi + offset(end::CR2)), rax)?;
    for (number, segment) in [ds, es, fs, gs].into_iter().enumerate() {
        a.mov(eax, segment)?;
        a.mov(word_ptr(rdi + offset(end::SELECTORS + 2 * number)), ax)?;
    }
    a.mov(edx, u32::from(DONE))?;
    a.out(dx, al)?;
    // The host has put the next one there.
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(rax, KERNEL + CODE)?;
    a.jmp(rax)?;
    Ok(())
}
