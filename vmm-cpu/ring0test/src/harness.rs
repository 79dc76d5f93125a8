//! The program in the guest. It runs each scenario from the state in its header, writes down every event, and goes on
//! with the next after one whose handler does not return.
//!
//! Between scenarios it is in 32-bit protected mode without paging. It uses no stack of the scenario's but for what the
//! processor itself pushes there, eight bytes below that in legacy mode, and the image of RFLAGS.

use anyhow::{Result, ensure};
use iced_x86::code_asm::*;

use crate::layout::*;

const EFER: u32 = 0xc000_0080;
/// Registers that are as after RESET when a scenario starts.
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xc000_0103;
const MTRR: u32 = 0x200;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Vectors of exceptions with an error code.
const WITH_ERROR: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;

/// Registers that are loaded before anything else, and where the header has them.
const MSRS: [(u32, u64); 7] = [
    (0xc000_0081, header::STAR),
    (0xc000_0082, header::LSTAR),
    (0xc000_0083, header::CSTAR),
    (0xc000_0084, header::FMASK),
    (0x174, header::SYSENTER_CS),
    (0x175, header::SYSENTER_ESP),
    (0x176, header::SYSENTER_EIP),
];

/// The harness: what is loaded from [`HARNESS`] on.
pub fn code() -> Result<Vec<u8>> {
    let (legacy, common_32) = legacy()?;
    let (long, common_64) = long()?;
    let mut image = Vec::new();
    place(&mut image, HARNESS, &legacy)?;
    place(&mut image, HARNESS_64, &long)?;
    for vector in 0..256 {
        place(&mut image, STUBS_64 + u64::from(vector) * 32, &stub_64(vector, common_64)?)?;
    }
    for vector in 0..256 {
        place(&mut image, STUBS_32 + u64::from(vector) * 16, &stub_32(vector, common_32)?)?;
    }
    Ok(image)
}

fn place(image: &mut Vec<u8>, address: u64, code: &[u8]) -> Result<()> {
    let offset = usize::try_from(address - HARNESS)?;
    ensure!(image.len() <= offset, "the harness does not fit its layout at {address:#x}");
    image.resize(offset, 0xcc);
    image.extend(code);
    Ok(())
}

fn stub_64(vector: u32, common: u64) -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(qword_ptr(control::SAVED_AX), rax)?;
    a.mov(eax, vector)?;
    a.jmp(common)?;
    Ok(a.assemble(STUBS_64 + u64::from(vector) * 32)?)
}

fn stub_32(vector: u32, common: u64) -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(32)?;
    a.push(eax)?;
    a.mov(eax, vector)?;
    a.jmp(common)?;
    Ok(a.assemble(STUBS_32 + u64::from(vector) * 16)?)
}

/// The code between scenarios and of legacy mode, and where its handlers begin.
fn legacy() -> Result<(Vec<u8>, u64)> {
    let mut a = CodeAssembler::new(32)?;
    let (mut next, mut outer, mut done) = (a.create_label(), a.create_label(), a.create_label());
    let (mut tidy, mut common, mut stop) = (a.create_label(), a.create_label(), a.create_label());

    a.cli()?;
    a.cld()?;
    a.lgdt(fword_ptr(control::GDTR))?;
    a.lidt(fword_ptr(control::NO_IDT))?;
    // What firmware left below: code that ends a scenario is there instead.
    a.mov(ecx, 0x8_f000_u32 / 4)?;
    a.mov(edi, 0x1000)?;
    a.mov(eax, 0x0001_0001 * (0xcd | u32::from(END_VECTOR) << 8))?;
    let mut fill = a.create_label();
    a.set_label(&mut fill)?;
    a.mov(dword_ptr(edi), eax)?;
    a.add(edi, 4)?;
    a.dec(ecx)?;
    a.jnz(fill)?;

    a.set_label(&mut next)?;
    a.mov(eax, u32::from(selector::DATA))?;
    for segment in [ds, es, ss, fs, gs] {
        a.mov(segment, eax)?;
    }
    a.mov(esp, u32::try_from(HARNESS_STACK)?)?;
    a.push(2)?;
    a.popfd()?;
    a.xor(eax, eax)?;
    a.mov(dr7, eax)?;
    a.lldt(ax)?;
    drain_apic(&mut a)?;
    a.mov(eax, dword_ptr(control::STARTED))?;
    a.cmp(eax, dword_ptr(control::COUNT))?;
    a.jae(done)?;
    a.inc(dword_ptr(control::STARTED))?;
    a.imul_3(ebx, eax, i32::try_from(ARENA)?)?;
    a.add(ebx, i32::try_from(ARENAS)?)?;
    a.mov(dword_ptr(control::CURRENT), ebx)?;

    for (n, register) in [dr0, dr1, dr2, dr3].into_iter().enumerate() {
        a.mov(eax, dword_ptr(ebx + header::DR + 8 * n as u64))?;
        a.mov(register, eax)?;
    }
    a.mov(eax, dword_ptr(ebx + header::DR6))?;
    a.mov(dr6, eax)?;
    for (msr, field) in MSRS {
        a.mov(ecx, msr)?;
        a.mov(eax, dword_ptr(ebx + field))?;
        a.mov(edx, dword_ptr(ebx + field + 4))?;
        a.wrmsr()?;
    }
    for (msr, low, high) in [(PAT, 0x0007_0406_u32, 0x0007_0406_u32), (TSC_AUX, 0, 0), (MTRR, 0, 0)] {
        a.mov(ecx, msr)?;
        a.mov(eax, low)?;
        a.mov(edx, high)?;
        a.wrmsr()?;
    }
    a.mov(ecx, EFER)?;
    a.mov(eax, dword_ptr(ebx + header::EFER))?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    for (field, register) in [(header::CR2, cr2), (header::CR4, cr4), (header::CR3, cr3), (header::CR0, cr0)]
    {
        a.mov(eax, dword_ptr(ebx + field))?;
        a.mov(register, eax)?;
    }
    a.lgdt(fword_ptr(ebx + header::GDTR))?;
    let mut not_long = a.create_label();
    a.cmp(dword_ptr(ebx + header::LONG), 0)?;
    a.je(not_long)?;
    a.push(u32::from(selector::CODE_64))?;
    a.push(u32::try_from(HARNESS_64)?)?;
    a.retf()?;

    a.set_label(&mut not_long)?;
    a.lldt(word_ptr(ebx + header::LDTR))?;
    a.ltr(word_ptr(ebx + header::TR))?;
    a.lidt(fword_ptr(ebx + header::IDTR))?;
    // Privilege level and VM of what starts.
    a.mov(eax, dword_ptr(ebx + header::FRAME_32 + 8))?;
    a.shr(eax, 15)?;
    a.and(eax, 4)?;
    a.mov(ecx, dword_ptr(ebx + header::FRAME_32 + 4))?;
    a.and(ecx, 3)?;
    a.or(ecx, eax)?;
    a.lea(esp, dword_ptr(ebx + header::START_32))?;
    a.jnz(outer)?;
    a.lss(esp, fword_ptr(ebx + header::STACK_32))?;
    for field in [header::FRAME_32 + 8, header::FRAME_32 + 4, header::FRAME_32, header::START_32 + 4] {
        a.push(dword_ptr(ebx + field))?;
    }
    a.push(dword_ptr(ebx + header::START_32))?;
    a.set_label(&mut outer)?;
    a.mov(es, word_ptr(ebx + header::ES))?;
    a.mov(fs, word_ptr(ebx + header::FS))?;
    a.mov(gs, word_ptr(ebx + header::GS))?;
    a.mov(eax, dword_ptr(ebx + header::DR7))?;
    a.mov(dr7, eax)?;
    for (register, n) in [(eax, 0), (ecx, 1), (edx, 2), (ebp, 5), (esi, 6), (edi, 7)] {
        a.mov(register, dword_ptr(ebx + header::REGISTERS + 8 * n))?;
    }
    a.pop(ebx)?;
    a.pop(ds)?;
    a.iretd()?;

    a.set_label(&mut done)?;
    a.mov(dword_ptr(control::DONE), 1)?;
    a.mov(edx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    let mut forever = a.create_label();
    a.set_label(&mut forever)?;
    a.hlt()?;
    a.jmp(forever)?;

    // An event in legacy mode. EAX is the vector, the program's is on the stack.
    a.set_label(&mut common)?;
    a.push(ds)?;
    a.push(ebx)?;
    a.mov(ebx, u32::from(selector::DATA))?;
    a.mov(ds, ebx)?;
    a.pop(dword_ptr(control::SAVED_BX))?;
    a.pop(dword_ptr(control::SAVED_DS))?;
    a.pop(dword_ptr(control::SAVED_AX))?;
    a.mov(dword_ptr(control::SAVED_CX), ecx)?;
    a.mov(dword_ptr(control::SAVED_DX), edx)?;
    a.mov(ebx, dword_ptr(control::CURRENT))?;
    a.mov(ecx, dword_ptr(ebx + header::EVENT_COUNT))?;
    a.cmp(ecx, dword_ptr(ebx + header::MAX_EVENTS))?;
    a.jae(stop)?;
    a.shl(ecx, 9)?;
    a.lea(ecx, dword_ptr(ebx + ecx + page::EVENTS))?;
    a.inc(dword_ptr(ebx + header::EVENT_COUNT))?;
    a.mov(dword_ptr(ecx + event::VECTOR), eax)?;
    let saved =
        [(control::SAVED_AX, 0), (control::SAVED_CX, 1), (control::SAVED_DX, 2), (control::SAVED_BX, 3)];
    for (from, n) in saved {
        a.mov(eax, dword_ptr(from))?;
        a.mov(dword_ptr(ecx + event::REGISTERS + 8 * n), eax)?;
    }
    for (register, n) in [(esp, 4), (ebp, 5), (esi, 6), (edi, 7)] {
        a.mov(dword_ptr(ecx + event::REGISTERS + 8 * n), register)?;
    }
    // What of ESP addresses the stack.
    let mut is_big = a.create_label();
    a.mov(edx, esp)?;
    a.test(dword_ptr(ebx + header::FLAGS), i32::try_from(flag::FLAT_STACK)?)?;
    a.jnz(is_big)?;
    a.mov(eax, ss)?;
    a.lar(eax, eax)?;
    a.test(eax, 1 << 22)?;
    a.jnz(is_big)?;
    a.movzx(edx, dx)?;
    a.set_label(&mut is_big)?;
    for word in 0..event::FRAME_WORDS {
        a.mov(eax, dword_ptr(edx + 4 * word).ss())?;
        a.mov(dword_ptr(ecx + event::FRAME + 8 * word), eax)?;
    }
    a.pushfd()?;
    a.pop(dword_ptr(ecx + event::FLAGS))?;
    store_32(&mut a)?;
    // Whether this handler returns.
    a.mov(eax, dword_ptr(ebx + header::EVENT_COUNT))?;
    a.cmp(eax, dword_ptr(ebx + header::MAX_EVENTS))?;
    a.jae(stop)?;
    a.mov(eax, dword_ptr(ecx + event::VECTOR))?;
    a.bt(dword_ptr(ebx + header::RESUME), eax)?;
    a.jnc(stop)?;
    let (mut no_eoi, mut narrow) = (a.create_label(), a.create_label());
    a.test(dword_ptr(ebx + header::FLAGS), i32::try_from(flag::EOI)?)?;
    a.jz(no_eoi)?;
    a.mov(dword_ptr(APIC + 0xb0), 0)?;
    a.set_label(&mut no_eoi)?;
    a.test(dword_ptr(ebx + header::FLAGS), i32::try_from(flag::NARROW_GATES)?)?;
    a.mov(eax, dword_ptr(control::SAVED_AX))?;
    a.mov(ecx, dword_ptr(control::SAVED_CX))?;
    a.mov(edx, dword_ptr(control::SAVED_DX))?;
    a.mov(ebx, dword_ptr(control::SAVED_BX))?;
    a.push(dword_ptr(control::SAVED_DS))?;
    a.pop(ds)?;
    a.jnz(narrow)?;
    a.iretd()?;
    a.set_label(&mut narrow)?;
    a.iret()?;

    a.set_label(&mut stop)?;
    a.lidt(fword_ptr(control::NO_IDT))?;
    a.lgdt(fword_ptr(control::GDTR))?;
    a.mov(eax, u32::from(selector::DATA))?;
    a.mov(ss, eax)?;
    a.mov(esp, u32::try_from(HARNESS_STACK)?)?;
    a.push(u32::from(selector::CODE_32))?;
    let mut flat = a.create_label();
    // As an address and not relative to CS, whose base may not be 0.
    a.push(u32::try_from(TIDY)?)?;
    a.retf()?;

    // In 32-bit code with flat segments, with or without paging and long mode.
    a.set_label(&mut tidy)?;
    a.mov(eax, 0x11)?;
    a.mov(cr0, eax)?;
    a.jmp(flat)?;
    a.set_label(&mut flat)?;
    a.mov(ecx, EFER)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(cr4, eax)?;
    a.jmp(next)?;

    let result =
        a.assemble_options(HARNESS, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let (common, tidy) = (result.label_ip(&common)?, result.label_ip(&tidy)?);
    let mut code = result.inner.code_buffer;
    let mut a = CodeAssembler::new(32)?;
    a.mov(dword_ptr(APIC + 0xb0), 0)?;
    a.iretd()?;
    place(&mut code, DRAIN, &a.assemble(DRAIN)?)?;
    let mut a = CodeAssembler::new(32)?;
    a.jmp(tidy)?;
    place(&mut code, TIDY, &a.assemble(TIDY)?)?;
    Ok((code, common))
}

/// A jump to the end of a scenario, at an address that the 64-bit code knows.
const TIDY: u64 = HARNESS_64 - 16;

/// A handler that ends its interrupt and nothing else.
pub const DRAIN: u64 = HARNESS_64 - 32;

/// Leaves the local APIC, if the last scenario used it, as the next one shall find it.
fn drain_apic(a: &mut CodeAssembler) -> Result<()> {
    let mut clean = a.create_label();
    a.mov(eax, dword_ptr(control::CURRENT))?;
    a.test(eax, eax)?;
    a.jz(clean)?;
    a.test(dword_ptr(eax + header::FLAGS), i32::try_from(flag::APIC)?)?;
    a.jz(clean)?;
    a.lidt(fword_ptr(control::IDTR))?;
    a.mov(edi, u32::try_from(APIC)?)?;
    // Software-enabled; timer, LINT0, LINT1 and error off; no count; all priorities.
    let registers =
        [(0xf0, 0x1ff), (0x320, 0x1_0000), (0x350, 0x1_0000), (0x360, 0x1_0000), (0x370, 0x1_0000)];
    for (register, value) in registers.into_iter().chain([(0x380, 0), (0x80, 0)]) {
        a.mov(dword_ptr(edi + register), value)?;
    }
    for _ in 0..20 {
        a.mov(dword_ptr(edi + 0xb0), 0)?;
    }
    // What is still requested goes to handlers that end it.
    a.sti()?;
    for _ in 0..4 {
        a.nop()?;
    }
    a.cli()?;
    a.lidt(fword_ptr(control::NO_IDT))?;
    a.set_label(&mut clean)?;
    Ok(())
}

/// Stores what needs no stack, EBX being the arena and ECX the event.
fn store_32(a: &mut CodeAssembler) -> Result<()> {
    let controls = [(cr0, event::CR0), (cr2, event::CR2), (cr3, event::CR3), (cr4, event::CR4)];
    for (register, field) in controls {
        a.mov(eax, register)?;
        a.mov(dword_ptr(ecx + field), eax)?;
    }
    for (register, field) in [(dr6, event::DR6), (dr7, event::DR7)] {
        a.mov(eax, register)?;
        a.mov(dword_ptr(ecx + field), eax)?;
    }
    a.mov(eax, dword_ptr(control::SAVED_DS))?;
    a.mov(word_ptr(ecx + event::DS), ax)?;
    for (segment, field) in
        [(cs, event::CS), (ss, event::SS), (es, event::ES), (fs, event::FS), (gs, event::GS)]
    {
        a.mov(word_ptr(ecx + field), segment)?;
    }
    a.str(word_ptr(ecx + event::TR))?;
    a.sldt(word_ptr(ecx + event::LDTR))?;
    a.sgdt(fword_ptr(ecx + event::GDTR))?;
    a.sidt(fword_ptr(ecx + event::IDTR))?;
    a.push(ecx)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.pop(ecx)?;
    a.mov(dword_ptr(ecx + event::EFER), eax)?;
    Ok(())
}

/// The 64-bit code, and where its handlers begin.
fn long() -> Result<(Vec<u8>, u64)> {
    let mut a = CodeAssembler::new(64)?;
    // The scenario's header is at EBX, and everything but segments, tables and general registers as it says.
    a.mov(ebx, ebx)?;
    a.lgdt(ptr(rbx + header::GDTR))?;
    a.lldt(word_ptr(rbx + header::LDTR))?;
    a.ltr(word_ptr(rbx + header::TR))?;
    a.lidt(ptr(rbx + header::IDTR))?;
    for (segment, field) in [(ds, header::DS), (es, header::ES), (fs, header::FS), (gs, header::GS)] {
        a.mov(eax, dword_ptr(rbx + field))?;
        a.mov(segment, eax)?;
    }
    let bases =
        [(FS_BASE, header::FS_BASE), (GS_BASE, header::GS_BASE), (KERNEL_GS_BASE, header::KERNEL_GS_BASE)];
    for (msr, field) in bases {
        a.mov(ecx, msr)?;
        a.mov(eax, dword_ptr(rbx + field))?;
        a.mov(edx, dword_ptr(rbx + field + 4))?;
        a.wrmsr()?;
    }
    a.mov(rax, qword_ptr(rbx + header::CR8))?;
    a.mov(cr8, rax)?;
    a.mov(rax, qword_ptr(rbx + header::CR2))?;
    a.mov(cr2, rax)?;
    for (n, register) in [dr0, dr1, dr2, dr3].into_iter().enumerate() {
        a.mov(rax, qword_ptr(rbx + header::DR + 8 * n as u64))?;
        a.mov(register, rax)?;
    }
    a.mov(rax, qword_ptr(rbx + header::DR7))?;
    a.mov(dr7, rax)?;
    a.lea(rsp, qword_ptr(rbx + header::FRAME_64))?;
    for (n, register) in REGISTERS_64.into_iter().enumerate() {
        if register != rbx && register != rsp {
            a.mov(register, qword_ptr(rbx + header::REGISTERS + 8 * n as u64))?;
        }
    }
    a.mov(rbx, qword_ptr(rbx + header::REGISTERS + 8 * 3))?;
    a.iretq()?;

    let (mut common, mut no_error, mut stop) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut common)?;
    a.mov(qword_ptr(control::SAVED_BX), rbx)?;
    a.mov(qword_ptr(control::SAVED_CX), rcx)?;
    a.mov(qword_ptr(control::SAVED_DX), rdx)?;
    a.mov(ebx, dword_ptr(control::CURRENT))?;
    a.mov(ecx, dword_ptr(rbx + header::EVENT_COUNT))?;
    a.cmp(ecx, dword_ptr(rbx + header::MAX_EVENTS))?;
    a.jae(stop)?;
    a.shl(ecx, 9)?;
    a.lea(rcx, qword_ptr(rbx + rcx + page::EVENTS))?;
    a.inc(dword_ptr(rbx + header::EVENT_COUNT))?;
    a.mov(qword_ptr(rcx + event::VECTOR), rax)?;
    let saved =
        [(control::SAVED_AX, 0), (control::SAVED_CX, 1), (control::SAVED_DX, 2), (control::SAVED_BX, 3)];
    for (from, n) in saved {
        a.mov(rax, qword_ptr(from))?;
        a.mov(qword_ptr(rcx + event::REGISTERS + 8 * n), rax)?;
    }
    for (n, register) in REGISTERS_64.into_iter().enumerate().skip(4) {
        a.mov(qword_ptr(rcx + event::REGISTERS + 8 * n as u64), register)?;
    }
    for word in 0..5 {
        a.mov(rax, qword_ptr(rsp + 8 * word))?;
        a.mov(qword_ptr(rcx + event::FRAME + 8 * word), rax)?;
    }
    a.mov(eax, dword_ptr(rcx + event::VECTOR))?;
    a.mov(edx, WITH_ERROR)?;
    a.cmp(eax, 31)?;
    a.ja(no_error)?;
    a.bt(edx, eax)?;
    a.jnc(no_error)?;
    a.mov(rax, qword_ptr(rsp + 40))?;
    a.mov(qword_ptr(rcx + event::FRAME + 40), rax)?;
    a.set_label(&mut no_error)?;
    a.pushfq()?;
    a.pop(qword_ptr(rcx + event::FLAGS))?;
    let controls =
        [(cr0, event::CR0), (cr2, event::CR2), (cr3, event::CR3), (cr4, event::CR4), (cr8, event::CR8)];
    for (register, field) in controls {
        a.mov(rax, register)?;
        a.mov(qword_ptr(rcx + field), rax)?;
    }
    for (register, field) in [(dr6, event::DR6), (dr7, event::DR7)] {
        a.mov(rax, register)?;
        a.mov(qword_ptr(rcx + field), rax)?;
    }
    let segments = [
        (cs, event::CS),
        (ss, event::SS),
        (ds, event::DS),
        (es, event::ES),
        (fs, event::FS),
        (gs, event::GS),
    ];
    for (segment, field) in segments {
        a.mov(word_ptr(rcx + field), segment)?;
    }
    a.str(word_ptr(rcx + event::TR))?;
    a.sldt(word_ptr(rcx + event::LDTR))?;
    a.sgdt(ptr(rcx + event::GDTR))?;
    a.sidt(ptr(rcx + event::IDTR))?;
    let msrs = [
        (EFER, event::EFER),
        (FS_BASE, event::FS_BASE),
        (GS_BASE, event::GS_BASE),
        (KERNEL_GS_BASE, event::KERNEL_GS_BASE),
    ];
    for (msr, field) in msrs {
        a.mov(qword_ptr(control::VECTOR), rcx)?;
        a.mov(ecx, msr)?;
        a.rdmsr()?;
        a.mov(rcx, qword_ptr(control::VECTOR))?;
        a.mov(dword_ptr(rcx + field), eax)?;
        a.mov(dword_ptr(rcx + field + 4), edx)?;
    }
    a.mov(eax, dword_ptr(rbx + header::EVENT_COUNT))?;
    a.cmp(eax, dword_ptr(rbx + header::MAX_EVENTS))?;
    a.jae(stop)?;
    a.mov(eax, dword_ptr(rcx + event::VECTOR))?;
    a.bt(dword_ptr(rbx + header::RESUME), eax)?;
    a.jnc(stop)?;
    a.mov(rax, qword_ptr(control::SAVED_AX))?;
    a.mov(rbx, qword_ptr(control::SAVED_BX))?;
    a.mov(rcx, qword_ptr(control::SAVED_CX))?;
    a.mov(rdx, qword_ptr(control::SAVED_DX))?;
    a.iretq()?;

    a.set_label(&mut stop)?;
    a.lidt(ptr(control::NO_IDT))?;
    a.lgdt(ptr(control::GDTR))?;
    a.mov(esp, u32::try_from(HARNESS_STACK)?)?;
    a.mov(eax, u32::from(selector::DATA))?;
    for segment in [ss, ds] {
        a.mov(segment, eax)?;
    }
    a.push(i32::from(selector::CODE_32))?;
    a.push(i32::try_from(TIDY)?)?;
    a.retf()?;

    let result =
        a.assemble_options(HARNESS_64, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let common = result.label_ip(&common)?;
    Ok((result.inner.code_buffer, common))
}

const REGISTERS_64: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
