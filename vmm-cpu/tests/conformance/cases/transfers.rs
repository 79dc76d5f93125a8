//! Far transfers, returns from interrupts, and the changes of privilege level that they are for: what emulators of privileged
//! code have in real mode alone, if at all.

use iced_x86::code_asm::{ax, eax, ebx, ecx, edx, qword_ptr, rax, rbx, rcx, rdi, rsi, rsp, xmmword_ptr};
use vmm_cpu::state::{Segment, SystemRegisters};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{Machine, layout, selector};
use crate::suite::program::{Image, Program};

cases![
    far_return_to_the_same_level,
    far_return_to_privilege_level_3,
    far_jump_and_call_through_memory,
    iret_to_the_same_level,
    iret_to_privilege_level_3,
    software_interrupt_through_a_gate,
    iret_of_32_bit_protected_mode,
    sysret_to_privilege_level_3,
    swapgs_exchanges_the_bases,
    entry_that_software_takes_back_translates_no_more,
    entry_that_software_makes_read_only_lets_no_store_through,
];

const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;
const VECTOR: u8 = 0x40;
const STAR: u32 = 0xc000_0081;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SCE: u64 = 1;

/// Where interrupts of privilege level 3 put their frames.
const INNER_STACK: u64 = layout::STACK_TOP - 0x2000;

/// Runs a program to its end.
fn run(backend: &Backend, p: Program) -> Outcome<Machine> {
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    // RSP0 of the task state.
    machine.write(layout::TSS + 4, &INNER_STACK.to_le_bytes())?;
    machine.run_to_end()?;
    Ok(machine)
}

/// Ends the guest if it is at privilege level 3, where its ports are open by IOPL; else says so.
fn end_at_level_3(p: &mut Program) -> Outcome {
    p.mov(ax, iced_x86::code_asm::cs)?;
    p.end()
}

fn selector_at_end(machine: &mut Machine) -> Outcome<u64> {
    Ok(machine.vcpu.registers()?.rax & 0xffff)
}

fn far_return_to_the_same_level(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let mut target = p.create_label();
    p.push(i32::from(selector::CODE))?;
    p.lea(rax, qword_ptr(target))?;
    p.push(rax)?;
    p.db(&[0x48, 0xcb])?;
    p.report(0x10, 0)?;
    p.set_label(&mut target)?;
    p.mov(ebx, 7)?;
    p.end()?;
    let mut machine = run(backend, p)?;
    assert!(machine.bus.log.is_empty(), "{:?}", machine.bus.log);
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rbx, registers.rsp), (7, layout::STACK_TOP));
    Ok(())
}

fn far_return_to_privilege_level_3(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let mut target = p.create_label();
    // IOPL 3.
    p.pushfq()?;
    p.or(qword_ptr(rsp), 3 << 12)?;
    p.popfq()?;
    p.push(i32::from(selector::USER_DATA))?;
    p.push(i32::try_from(layout::STACK_TOP - 0x100)?)?;
    p.push(i32::from(selector::USER_CODE))?;
    p.lea(rax, qword_ptr(target))?;
    p.push(rax)?;
    p.db(&[0x48, 0xcb])?;
    p.set_label(&mut target)?;
    end_at_level_3(&mut p)?;
    let mut machine = run(backend, p)?;
    assert_eq!(selector_at_end(&mut machine)?, u64::from(selector::USER_CODE));
    assert_eq!(machine.vcpu.registers()?.rsp, layout::STACK_TOP - 0x100);
    let system = machine.vcpu.system_registers()?;
    assert_eq!((system.cs.dpl, system.ss.selector, system.ss.dpl), (3, selector::USER_DATA, 3));
    Ok(())
}

fn far_jump_and_call_through_memory(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let (mut function, mut target) = (p.create_label(), p.create_label());
    p.mov(rsi, layout::DATA)?;
    for (offset, label) in [(0, function), (16, target)] {
        p.lea(rax, qword_ptr(label))?;
        // m16:32, which all processors have.
        p.mov(iced_x86::code_asm::dword_ptr(rsi + offset), eax)?;
        p.mov(iced_x86::code_asm::word_ptr(rsi + offset + 4), u32::from(selector::CODE))?;
    }
    // call far [rsi]; jmp far [rsi + 16]
    p.db(&[0xff, 0x1e])?;
    let returned = p.here()?;
    p.db(&[0xff, 0x6e, 0x10])?;
    p.report(0x10, 0)?;
    p.set_label(&mut function)?;
    p.mov(ebx, iced_x86::code_asm::dword_ptr(rsp))?;
    p.mov(ecx, iced_x86::code_asm::dword_ptr(rsp + 4))?;
    // RETF of 32 bits, as the call was.
    p.db(&[0xcb])?;
    p.set_label(&mut target)?;
    p.mov(edx, 9)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    let expected = (image.address_of(returned)?, u64::from(selector::CODE), 9, layout::STACK_TOP);
    assert_eq!((registers.rbx, registers.rcx, registers.rdx, registers.rsp), expected);
    Ok(())
}

/// Pushes what IRETQ takes and executes it.
fn iret(p: &mut Program, ss: u16, stack: u64, cs: u16, flags: i32) -> Outcome {
    let mut target = p.create_label();
    p.push(i32::from(ss))?;
    p.push(i32::try_from(stack)?)?;
    p.push(flags)?;
    p.push(i32::from(cs))?;
    p.lea(rax, qword_ptr(target))?;
    p.push(rax)?;
    p.iretq()?;
    p.report(0x10, 0)?;
    p.set_label(&mut target)?;
    Ok(())
}

fn iret_to_the_same_level(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    iret(&mut p, selector::DATA, layout::STACK_TOP - 0x40, selector::CODE, 0x8d7)?;
    p.pushfq()?;
    p.pop(rbx)?;
    p.end()?;
    let mut machine = run(backend, p)?;
    assert!(machine.bus.log.is_empty(), "{:?}", machine.bus.log);
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rbx, registers.rsp), (0x8d7, layout::STACK_TOP - 0x40));
    Ok(())
}

fn iret_to_privilege_level_3(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    iret(&mut p, selector::USER_DATA, layout::STACK_TOP - 0x80, selector::USER_CODE, 0x3002)?;
    end_at_level_3(&mut p)?;
    let mut machine = run(backend, p)?;
    assert_eq!(selector_at_end(&mut machine)?, u64::from(selector::USER_CODE));
    let registers = machine.vcpu.registers()?;
    assert_eq!(registers.rsp, layout::STACK_TOP - 0x80);
    Ok(())
}

fn software_interrupt_through_a_gate(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.int(i32::from(VECTOR))?;
    let behind = p.here()?;
    p.mov(ecx, 5)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.mov(rbx, qword_ptr(rsp))?;
    p.iretq()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    let expected = (image.address_of(behind)?, 5, layout::STACK_TOP);
    assert_eq!((registers.rbx, registers.rcx, registers.rsp), expected);
    Ok(())
}

/// Flat 32-bit protected mode without paging.
fn protected(backend: &Backend, image: &Image) -> Outcome<Machine> {
    const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
    let mut machine = Machine::new(backend, image)?;
    machine.write(layout::GDT + u64::from(selector::CODE), &CODE_32.to_le_bytes())?;
    let system = machine.vcpu.system_registers()?;
    let cs = Segment { long: false, big: true, ..system.cs };
    let cr0 = system.cr0 & !SystemRegisters::CR0_PG;
    machine.vcpu.set_system_registers(&SystemRegisters { cs, cr0, cr4: 0, efer: 0, ..system })?;
    Ok(machine)
}

fn iret_of_32_bit_protected_mode(backend: &Backend) -> Outcome {
    let mut p = Program::of_bits(32)?;
    let mut over = p.create_label();
    // The address behind it is where the IRET goes.
    p.call(over)?;
    p.sbb(ebx, ebx)?;
    p.end()?;
    p.set_label(&mut over)?;
    p.pop(eax)?;
    p.pushfd()?;
    p.or(iced_x86::code_asm::dword_ptr(iced_x86::code_asm::esp), 1)?;
    p.push(i32::from(selector::CODE))?;
    p.push(eax)?;
    p.iretd()?;
    p.report(0x10, 0)?;
    let mut machine = protected(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert!(machine.bus.log.is_empty(), "{:?}", machine.bus.log);
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rbx, registers.rsp), (u64::from(u32::MAX), layout::STACK_TOP));
    Ok(())
}

fn sysret_to_privilege_level_3(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let mut target = p.create_label();
    p.lea(rcx, qword_ptr(target))?;
    p.mov(iced_x86::code_asm::r11d, 0x3002)?;
    p.sysretq()?;
    p.report(0x10, 0)?;
    p.set_label(&mut target)?;
    end_at_level_3(&mut p)?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let system = machine.vcpu.system_registers()?;
    machine.vcpu.set_system_registers(&SystemRegisters { efer: system.efer | SCE, ..system })?;
    // SYSRET takes SS from here plus 8 and CS from here plus 16.
    machine.vcpu.set_msr(STAR, u64::from(selector::USER_DATA - 8) << 48 | u64::from(selector::CODE) << 32)?;
    machine.run_to_end()?;
    assert_eq!(selector_at_end(&mut machine)?, u64::from(selector::USER_CODE));
    let system = machine.vcpu.system_registers()?;
    assert_eq!((system.cs.dpl, system.ss.selector, system.ss.dpl), (3, selector::USER_DATA, 3));
    Ok(())
}

fn swapgs_exchanges_the_bases(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.swapgs()?;
    p.mov(rax, qword_ptr(8).gs())?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let mut system = machine.vcpu.system_registers()?;
    system.gs.base = 0x1234_5000;
    machine.vcpu.set_system_registers(&system)?;
    machine.vcpu.set_msr(KERNEL_GS_BASE, layout::DATA)?;
    machine.write(layout::DATA + 8, &77_u64.to_le_bytes())?;
    machine.run_to_end()?;
    assert_eq!(machine.vcpu.registers()?.rax, 77);
    assert_eq!(machine.vcpu.msr(KERNEL_GS_BASE)?, 0x1234_5000);
    assert_eq!(machine.vcpu.system_registers()?.gs.base, layout::DATA);
    Ok(())
}

/// A page of its own behind the identity map, and the entry that maps it.
const PAGE: u64 = 1 << 32;
const DIRECTORY: u64 = layout::DATA + 0x1_8000;
const TABLE: u64 = layout::DATA + 0x1_9000;
const FRAME: u64 = layout::DATA + 0x1_a000;

/// At privilege level 3 a program stores to the page and loads from it, comes back, privileged code replaces the page's entry by
/// `new` with CMPXCHG16B and invalidates the translation, and the program does the same again, which must fault with that error
/// code.
fn replaced_entry(backend: &Backend, new: u64, error: u64) -> Outcome {
    let entry = FRAME | 7;
    let mut p = Program::new()?;
    let user = p.here()?;
    p.mov(rdi, PAGE)?;
    p.inc(qword_ptr(rdi))?;
    p.mov(rbx, qword_ptr(rdi))?;
    p.checkpoint()?;
    p.inc(qword_ptr(rdi))?;
    p.report(0x10, 1)?;
    p.end()?;
    let kernel = p.here()?;
    p.mov(rsi, TABLE)?;
    p.mov(rax, qword_ptr(rsi))?;
    p.mov(iced_x86::code_asm::rdx, qword_ptr(rsi + 8))?;
    p.mov(rbx, new)?;
    p.mov(rcx, iced_x86::code_asm::rdx)?;
    p.lock().cmpxchg16b(xmmword_ptr(rsi))?;
    p.mov(rdi, PAGE)?;
    p.invlpg(iced_x86::code_asm::byte_ptr(rdi))?;
    p.end()?;
    p.handler(PAGE_FAULT)?;
    p.pop(rbx)?;
    p.mov(rcx, iced_x86::code_asm::cr2)?;
    p.end()?;
    p.handler(GENERAL_PROTECTION)?;
    p.report(0x10, GENERAL_PROTECTION)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.write(layout::TSS + 4, &INNER_STACK.to_le_bytes())?;
    machine.write(layout::PAGE_TABLES + 0x1000 + 4 * 8, &(DIRECTORY | 7).to_le_bytes())?;
    machine.write(DIRECTORY, &(TABLE | 7).to_le_bytes())?;
    machine.write(TABLE, &entry.to_le_bytes())?;
    let privileged = machine.vcpu.system_registers()?;
    let mut registers = machine.vcpu.registers()?;
    registers.rip = image.address_of(user)?;
    machine.vcpu.set_registers(&registers)?;
    machine.enter_ring_3()?;
    machine.run_to_end()?;
    let (program, unprivileged) = (machine.vcpu.registers()?, machine.vcpu.system_registers()?);
    assert_eq!((program.rbx, machine.word(FRAME)?), (1, 1));

    machine.vcpu.set_system_registers(&privileged)?;
    registers.rip = image.address_of(kernel)?;
    machine.vcpu.set_registers(&registers)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(TABLE)?, new);

    machine.vcpu.set_system_registers(&unprivileged)?;
    machine.vcpu.set_registers(&program)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    assert!(machine.bus.log.is_empty(), "{:?}", machine.bus.log);
    assert_eq!((registers.rbx, registers.rcx), (error, PAGE));
    assert_eq!(machine.word(FRAME)?, 1);
    Ok(())
}

fn entry_that_software_takes_back_translates_no_more(backend: &Backend) -> Outcome {
    // INC reads to write.
    replaced_entry(backend, 0, 4 | 2)
}

fn entry_that_software_makes_read_only_lets_no_store_through(backend: &Backend) -> Outcome {
    // Present, accessed and dirty, for the user, and not to be written.
    replaced_entry(backend, FRAME | 0x65, 4 | 2 | 1)
}
