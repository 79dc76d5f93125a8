//! Instructions that emulators of privileged code and of device accesses lack: vector instructions, x87, `cmpxchg16b`. Hardware
//! executes all of them; a KVM without virtualization hardware refuses them at privilege level 0, and any KVM where their
//! operand is a device.

use iced_x86::code_asm::{
    byte_ptr, dword_ptr, eax, ecx, edx, ptr, qword_ptr, rax, rbx, rcx, rdx, rsi, st0, st1, xmm0, xmm1, xmm2,
    xmmword_ptr, ymm1, ymm2, ymmword_ptr,
};
use vmm_cpu::state::SystemRegisters;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{DirtyTracker, GuestRam, PAGE_SIZE, RegionConfig};
use vmm_cpu::{DebugReason, DebugRequest, DebugStop, Doorbell, DoorbellAddress, GuestAccess, Halt, Notifier};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::{Access, address_pattern};

use super::ordering::{SHARED, rounds, run_all, word};

cases![
    exchange_of_16_bytes,
    exchanges_of_16_bytes_by_several_vcpus_add_up,
    exchange_of_16_bytes_that_is_not_aligned_faults,
    exchange_on_a_page_that_is_not_there_faults_with_its_address,
    single_step_over_an_exchange,
    trap_flag_over_an_exchange,
    vector_moves_and_arithmetic,
    x87_arithmetic,
    vector_store_to_a_device,
    vector_load_from_a_device,
    vector_access_across_memory_and_device,
    vector_access_of_a_device_at_privilege_level_3,
    wide_accesses_of_a_device,
    vector_store_rings_a_doorbell,
    vector_store_is_logged,
    vector_store_to_read_only_memory_goes_to_the_vmm,
    kick_from_a_vector_store_ends_the_run_behind_it,
];

/// OSFXSR and OSXMMEXCPT.
const CR4_SSE: u64 = 1 << 9 | 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
/// x87, SSE, AVX.
const XCR0_AVX: u64 = 7;
/// Vectors.
const DEBUG: u8 = 1;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// A machine whose guest may use vector instructions.
fn machine(backend: &Backend, image: &Image) -> Outcome<Machine> {
    let mut machine = Machine::new(backend, image)?;
    let system = machine.vcpu.system_registers()?;
    machine.vcpu.set_system_registers(&SystemRegisters { cr4: system.cr4 | CR4_SSE, ..system })?;
    Ok(machine)
}

/// Bytes that are not all alike.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n as u8).wrapping_mul(29) ^ 0xa5).collect()
}

fn device(gpa: u64, length: usize) -> Vec<u8> {
    (gpa..).take(length).map(address_pattern).collect()
}

/// All bytes that were stored to devices, by address.
fn stored(log: &[Access]) -> Vec<(u64, u8)> {
    let stores = log.iter().filter_map(|access| match access {
        Access::Store { gpa, data } => Some((*gpa..).zip(data.iter().copied())),
        _ => None,
    });
    stores.flatten().collect()
}

fn exchange_of_16_bytes(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    p.mov(rax, 0x1111_2222_3333_4444_u64)?;
    p.mov(rdx, 0x5555_6666_7777_8888_u64)?;
    p.mov(rbx, 1_u64)?;
    p.mov(rcx, 2_u64)?;
    // Not what is there: the registers get that. Then it is.
    for flag in [layout::DATA + 16, layout::DATA + 17] {
        p.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        p.sete(byte_ptr(flag))?;
    }
    // Without LOCK, the same.
    p.mov(eax, 1)?;
    p.mov(edx, 2)?;
    p.mov(rbx, 7_u64)?;
    p.cmpxchg16b(xmmword_ptr(rsi))?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let there = pattern(16);
    machine.write(layout::DATA, &there)?;
    machine.run_to_end()?;
    assert_eq!((machine.word(layout::DATA)?, machine.word(layout::DATA + 8)?), (7, 2));
    assert_eq!(machine.bytes(layout::DATA + 16, 2)?, [0, 1]);
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rax, registers.rdx), (1, 2));
    Ok(())
}

/// Both halves of 16 bytes count, on three vCPUs at once.
fn exchanges_of_16_bytes_by_several_vcpus_add_up(backend: &Backend) -> Outcome {
    const TIMES: u32 = 300;
    let images = (0..3).map(|vcpu| {
        rounds(vcpu, TIMES, |p| {
            p.mov(ptr(layout::DATA + 0x3000 + vcpu * 8), rcx)?;
            let again = p.here()?;
            p.mov(rax, qword_ptr(SHARED))?;
            p.mov(rdx, qword_ptr(SHARED + 8))?;
            p.lea(rbx, qword_ptr(rax + 1))?;
            p.lea(rcx, qword_ptr(rdx + 3))?;
            p.lock().cmpxchg16b(xmmword_ptr(SHARED))?;
            p.jne(again)?;
            p.mov(rcx, ptr(layout::DATA + 0x3000 + vcpu * 8))?;
            Ok(())
        })
    });
    let ram = run_all(backend, &images.collect::<Outcome<Vec<_>>>()?)?;
    let times = u64::from(TIMES);
    assert_eq!((word(&ram, SHARED)?, word(&ram, SHARED + 8)?), (3 * times, 9 * times));
    Ok(())
}

/// A guest with a handler of `vector` that keeps CR2 in RCX, the error code in RBX, and the address that it would return to in
/// RAX.
fn faulting(vector: u8, body: impl FnOnce(&mut Program) -> Outcome) -> Outcome<(Image, u64)> {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    body(&mut p)?;
    let fault = p.here()?;
    p.lock().cmpxchg16b(xmmword_ptr(rsi))?;
    p.report(0x10, 0)?;
    p.end()?;
    p.handler(vector)?;
    p.pop(rbx)?;
    p.pop(rax)?;
    p.mov(rcx, iced_x86::code_asm::cr2)?;
    p.end()?;
    let image = p.assemble()?;
    let address = image.address_of(fault)?;
    Ok((image, address))
}

fn exchange_of_16_bytes_that_is_not_aligned_faults(backend: &Backend) -> Outcome {
    let (image, address) = faulting(GENERAL_PROTECTION, |p| Ok(p.mov(rsi, layout::DATA + 8)?))?;
    let mut machine = machine(backend, &image)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rax, registers.rbx), (address, 0));
    assert!(machine.bus.log.is_empty(), "{:?}", machine.bus.log);
    Ok(())
}

fn exchange_on_a_page_that_is_not_there_faults_with_its_address(backend: &Backend) -> Outcome {
    let nowhere = 1_u64 << 32;
    let (image, address) = faulting(PAGE_FAULT, |p| Ok(p.mov(rsi, nowhere + 0x120)?))?;
    let mut machine = machine(backend, &image)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    // A write to what is not present.
    assert_eq!((registers.rax, registers.rbx, registers.rcx), (address, 2, nowhere + 0x120));
    Ok(())
}

/// A guest with an exchange between two other instructions, and the addresses of it and of the next.
fn exchanging() -> Outcome<(Program, [iced_x86::code_asm::CodeLabel; 2])> {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    let exchange = p.here()?;
    p.cmpxchg16b(xmmword_ptr(rsi))?;
    let next = p.here()?;
    p.nop()?;
    p.end()?;
    Ok((p, [exchange, next]))
}

fn single_step_over_an_exchange(backend: &Backend) -> Outcome {
    let (p, [exchange, next]) = exchanging()?;
    let image = p.assemble()?;
    let mut machine = machine(backend, &image)?;
    let stops = machine.vcpu.debug_stops().ok_or_else(|| Stop::skipped("no debug stops"))?;
    stops.request(&DebugRequest::none().step())?;
    for label in [exchange, next] {
        let stop = DebugStop::new(image.address_of(label)?, DebugReason::SingleStep);
        machine.run_until(&Halt::Debug(stop))?;
    }
    Ok(())
}

fn trap_flag_over_an_exchange(backend: &Backend) -> Outcome {
    let (mut p, [_, next]) = exchanging()?;
    p.handler(DEBUG)?;
    p.pop(rax)?;
    p.mov(rbx, iced_x86::code_asm::dr6)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = machine(backend, &image)?;
    let mut registers = machine.vcpu.registers()?;
    // The exchange comes first, so that no other instruction traps before it.
    registers.rip = image.address_of(next)? - 4;
    registers.rsi = layout::DATA;
    registers.rflags |= 1 << 8;
    let start = usize::try_from(registers.rip - layout::CODE)?;
    assert_eq!(image.bytes()[start..start + 4], [0x48, 0x0f, 0xc7, 0x0e], "cmpxchg16b [rsi]");
    machine.vcpu.set_registers(&registers)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    assert_eq!(registers.rax, image.address_of(next)?, "the trap comes behind it");
    assert_eq!(registers.rbx & 1 << 14, 1 << 14, "DR6.BS");
    Ok(())
}

fn vector_moves_and_arithmetic(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    p.movdqu(xmm0, xmmword_ptr(rsi))?;
    p.movaps(xmm1, xmmword_ptr(rsi + 16))?;
    p.paddd(xmm0, xmm1)?;
    p.movups(xmmword_ptr(rsi + 0x21), xmm0)?;
    p.movq(xmm2, rsi)?;
    p.mulpd(xmm1, xmm1)?;
    p.movntdq(xmmword_ptr(rsi + 0x40), xmm1)?;
    p.cvtsi2sd(xmm0, rsi)?;
    p.movq(rax, xmm0)?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let (a, b) = (pattern(16), 3.0_f64.to_le_bytes().repeat(2));
    machine.write(layout::DATA, &[&*a, &*b].concat())?;
    machine.run_to_end()?;
    let lanes = |bytes: &[u8]| -> Vec<u32> {
        bytes.chunks(4).map(|lane| u32::from_le_bytes([lane[0], lane[1], lane[2], lane[3]])).collect()
    };
    let sum: Vec<u32> = lanes(&a).iter().zip(lanes(&b)).map(|(a, b)| a.wrapping_add(b)).collect();
    assert_eq!(lanes(&machine.bytes(layout::DATA + 0x21, 16)?), sum);
    assert_eq!(machine.bytes(layout::DATA + 0x40, 16)?, 9.0_f64.to_le_bytes().repeat(2));
    let converted = f64::from(u32::try_from(layout::DATA)?);
    assert_eq!(machine.vcpu.registers()?.rax, converted.to_bits());
    let state = machine.vcpu.save()?;
    assert_eq!(state.xsave.xmm(2), Some(layout::DATA.into()));
    Ok(())
}

fn x87_arithmetic(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    p.fninit()?;
    p.fild(dword_ptr(rsi))?;
    p.fld(qword_ptr(rsi + 8))?;
    p.fmulp(st1, st0)?;
    p.fstp(qword_ptr(rsi + 16))?;
    p.fnstcw(iced_x86::code_asm::word_ptr(rsi + 24))?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    machine.write(layout::DATA, &5_u64.to_le_bytes())?;
    machine.write(layout::DATA + 8, &1.5_f64.to_le_bytes())?;
    machine.run_to_end()?;
    assert_eq!(machine.word(layout::DATA + 16)?, 7.5_f64.to_bits());
    assert_eq!(machine.bytes(layout::DATA + 24, 2)?, [0x7f, 0x03]);
    Ok(())
}

fn vector_store_to_a_device(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    p.mov(rbx, layout::MMIO)?;
    p.movdqu(xmm1, xmmword_ptr(rsi))?;
    p.movups(xmmword_ptr(rbx), xmm1)?;
    p.movntdq(xmmword_ptr(rbx + 0x10), xmm1)?;
    p.movq(qword_ptr(rbx + 0x20), xmm1)?;
    p.movss(dword_ptr(rbx + 0x28), xmm1)?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let data = pattern(16);
    machine.write(layout::DATA, &data)?;
    machine.run_to_end()?;
    let expected: Vec<u8> = [&data[..], &data, &data[..8], &data[..4]].concat();
    let expected: Vec<(u64, u8)> = (layout::MMIO..).zip(expected).collect();
    assert_eq!(stored(&machine.bus.log), expected);
    Ok(())
}

fn vector_load_from_a_device(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.movups(xmm1, xmmword_ptr(rbx + 0x30))?;
    p.pxor(xmm2, xmm2)?;
    p.paddb(xmm2, xmmword_ptr(rbx + 0x40))?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let xsave = machine.vcpu.save()?.xsave;
    for (register, offset) in [(1, 0x30), (2, 0x40)] {
        let value = xsave.xmm(register).unwrap_or_default().to_le_bytes().to_vec();
        assert_eq!(value, device(layout::MMIO + offset, 16), "xmm{register}");
    }
    Ok(())
}

/// The last page of RAM and the first of nothing behind it.
fn vector_access_across_memory_and_device(backend: &Backend) -> Outcome {
    let edge = layout::RAM_SIZE;
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA)?;
    p.mov(rbx, edge - 6)?;
    p.movdqu(xmm1, xmmword_ptr(rsi))?;
    p.movdqu(xmmword_ptr(rbx), xmm1)?;
    p.movdqu(xmm2, xmmword_ptr(rbx))?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let data = pattern(16);
    machine.write(layout::DATA, &data)?;
    machine.run_to_end()?;
    assert_eq!(machine.bytes(edge - 6, 6)?, data[..6]);
    assert_eq!(stored(&machine.bus.log), (edge..).zip(data[6..].iter().copied()).collect::<Vec<_>>());
    let read = machine.vcpu.save()?.xsave.xmm(2).unwrap_or_default().to_le_bytes();
    assert_eq!((&read[..6], read[6..].to_vec()), (&data[..6], device(edge, 10)));
    Ok(())
}

fn vector_access_of_a_device_at_privilege_level_3(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.movups(xmm1, xmmword_ptr(rbx + 0x50))?;
    p.movups(xmmword_ptr(rbx), xmm1)?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    machine.enter_ring_3()?;
    machine.run_to_end()?;
    let expected: Vec<(u64, u8)> = (layout::MMIO..).zip(device(layout::MMIO + 0x50, 16)).collect();
    assert_eq!(stored(&machine.bus.log), expected);
    Ok(())
}

fn wide_accesses_of_a_device(backend: &Backend) -> Outcome {
    let leaf = backend.hypervisor.supported_cpuid().get(1, 0);
    if leaf.is_none_or(|leaf| leaf.ecx & 1 << 28 == 0) {
        return Err(Stop::skipped("no AVX"));
    }
    for privileged in [true, false] {
        let mut p = Program::new()?;
        p.mov(rsi, layout::DATA)?;
        p.mov(rbx, layout::MMIO)?;
        p.vmovdqu(ymm1, ymmword_ptr(rbx + 0x60))?;
        p.vmovdqu(ymmword_ptr(rbx), ymm1)?;
        p.vmovaps(ymm2, ymmword_ptr(rbx + 0x80))?;
        p.vmovups(xmmword_ptr(rbx + 0x20), xmm2)?;
        // What a narrower load leaves of the rest is nothing.
        p.vmovdqu(xmm1, xmmword_ptr(rbx + 0x60))?;
        p.vmovdqu(ymmword_ptr(rbx + 0x30), ymm1)?;
        p.end()?;
        let mut machine = machine(backend, &p.assemble()?)?;
        let system = machine.vcpu.system_registers()?;
        let cr4 = system.cr4 | CR4_OSXSAVE;
        machine.vcpu.set_system_registers(&SystemRegisters { cr4, xcr0: XCR0_AVX, ..system })?;
        if !privileged {
            machine.enter_ring_3()?;
        }
        machine.run_to_end()?;
        let at = |offset, length| device(layout::MMIO + offset, length);
        let expected = [at(0x60, 32), at(0x80, 16), at(0x60, 16), vec![0; 16]].concat();
        let expected: Vec<(u64, u8)> = (layout::MMIO..).zip(expected).collect();
        assert_eq!(stored(&machine.bus.log), expected, "privileged: {privileged}");
    }
    Ok(())
}

fn vector_store_rings_a_doorbell(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(eax, 0x22)?;
    p.movq(xmm1, rax)?;
    p.movq(qword_ptr(rbx), xmm1)?;
    p.mov(ecx, 0x23)?;
    p.movq(xmm1, rcx)?;
    p.movq(qword_ptr(rbx), xmm1)?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let doorbells = machine.vm.doorbells().ok_or_else(|| Stop::skipped("no doorbells"))?;
    let notifier = Notifier::new()?;
    let doorbell = Doorbell::new(DoorbellAddress::Mmio(GuestAddress(layout::MMIO)), 8).matching(0x22);
    doorbells.attach_doorbell(&doorbell, &notifier)?;
    machine.run_to_end()?;
    assert_eq!(notifier.take()?, 1);
    let data = 0x23_u64.to_le_bytes().to_vec();
    assert_eq!(machine.bus.log, [Access::Store { gpa: layout::MMIO, data }]);
    Ok(())
}

fn vector_store_is_logged(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rsi, layout::DATA + 2 * PAGE_SIZE - 8)?;
    p.movups(xmmword_ptr(rsi), xmm1)?;
    p.mov(rsi, layout::DATA + 5 * PAGE_SIZE)?;
    p.cmpxchg16b(xmmword_ptr(rsi))?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let log = machine.vm.dirty_log().ok_or_else(|| Stop::skipped("no dirty log"))?;
    let tracker = DirtyTracker::new(&machine.ram);
    tracker.add_log(log.clone());
    log.start(GuestAddress(0))?;
    tracker.harvest()?;
    machine.run_to_end()?;
    let pages = tracker.harvest()?;
    let reported = |index: &u64| pages.contains(GuestAddress(layout::DATA + index * PAGE_SIZE));
    assert_eq!((0..16).filter(reported).collect::<Vec<u64>>(), [1, 2, 5]);
    Ok(())
}

fn vector_store_to_read_only_memory_goes_to_the_vmm(backend: &Backend) -> Outcome {
    const ROM: u64 = 0x4000_0000;
    let mut p = Program::new()?;
    p.mov(rbx, ROM)?;
    p.movups(xmm1, xmmword_ptr(rbx))?;
    p.pxor(xmm2, xmm2)?;
    p.movups(xmmword_ptr(rbx), xmm2)?;
    p.end()?;
    let mut machine = machine(backend, &p.assemble()?)?;
    let rom = GuestRam::builder().region(RegionConfig::new(GuestAddress(ROM), PAGE_SIZE)).build()?;
    let region = rom.regions().first().cloned().ok_or_else(|| Stop::failed("RAM without its region"))?;
    let data = pattern(16);
    rom.memory().write_slice(&data, GuestAddress(ROM))?;
    machine.vm.map_memory(region, GuestAccess::ReadOnly)?;
    machine.run_to_end()?;
    assert_eq!(machine.vcpu.save()?.xsave.xmm(1).unwrap_or_default().to_le_bytes().to_vec(), data);
    assert_eq!(stored(&machine.bus.log), (ROM..ROM + 16).map(|gpa| (gpa, 0)).collect::<Vec<_>>());
    let mut held = vec![0; 16];
    rom.memory().read_slice(&mut held, GuestAddress(ROM))?;
    assert_eq!(held, data);
    Ok(())
}

fn kick_from_a_vector_store_ends_the_run_behind_it(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.movups(xmmword_ptr(rbx), xmm1)?;
    let next = p.here()?;
    p.mov(eax, 1)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = machine(backend, &image)?;
    let handle = machine.vcpu.handle();
    machine.bus.hook = Some(Box::new(move |access| {
        if matches!(access, Access::Store { .. }) {
            handle.kick();
        }
    }));
    machine.run_until(&Halt::Interrupted)?;
    assert_eq!(machine.vcpu.registers()?.rip, image.address_of(next)?);
    assert_eq!(stored(&machine.bus.log).len(), 16);
    machine.run_to_end()
}
