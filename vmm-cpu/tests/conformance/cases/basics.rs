//! Registers, HLT, shutdown, and what a backend says about an instruction that it cannot execute.

use iced_x86::code_asm::{eax, ecx, rax, rbx, rcx, rsp};
use vmm_cpu::state::{GeneralRegisters, SystemRegisters, rflags};
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::{Error, Halt};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, flat_system_registers, layout};
use crate::suite::program::Program;

cases![
    hlt_returns_and_goes_on_only_with_an_event,
    triple_fault_is_shutdown,
    exception_reaches_the_guests_handler,
    registers_read_back,
    system_registers_read_back,
    segment_registers_leave_the_others_alone,
    guest_sees_registers_that_were_set,
    msr_reads_back,
    translate_follows_the_guests_tables,
    vcpu_starts_at_reset,
    instruction_that_cannot_be_fetched_is_named,
    instruction_that_cannot_be_executed_is_named,
];

fn hlt_returns_and_goes_on_only_with_an_event(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.report(0x10, 1)?;
    p.cli()?;
    p.hlt()?;
    p.report(0x10, 2)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_until(&Halt::Halted)?;
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.output(0x10), [1], "the instruction after HLT waits for an event");
    Ok(())
}

fn triple_fault_is_shutdown(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.report(0x10, 1)?;
    // No gate is present, neither for this nor for what follows from it.
    p.ud2()?;
    p.report(0x10, 2)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_until(&Halt::Shutdown)?;
    assert_eq!(machine.bus.output(0x10), [1]);
    Ok(())
}

fn exception_reaches_the_guests_handler(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.report(0x10, 1)?;
    let faulting = p.here()?;
    p.ud2()?;
    p.end()?;
    p.handler(6)?;
    p.pop(rax)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.run_to_end()?;
    assert_eq!(machine.vcpu.registers()?.rax, image.address_of(faulting)?, "RIP on the stack");
    Ok(())
}

fn distinct_registers() -> GeneralRegisters {
    let n = |i: u64| i.wrapping_mul(0x0123_4567_89ab_cdef);
    GeneralRegisters {
        rax: n(1),
        rbx: n(2),
        rcx: n(3),
        rdx: n(4),
        rsi: n(5),
        rdi: n(6),
        rsp: n(7),
        rbp: n(8),
        r8: n(9),
        r9: n(10),
        r10: n(11),
        r11: n(12),
        r12: n(13),
        r13: n(14),
        r14: n(15),
        r15: n(16),
        rip: layout::CODE + 5,
        rflags: rflags::FIXED | rflags::CF | rflags::ZF | rflags::DF,
    }
}

fn idle(backend: &Backend) -> Outcome<Machine> {
    let mut p = Program::new()?;
    p.end()?;
    Machine::new(backend, &p.assemble()?)
}

fn registers_read_back(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    let registers = distinct_registers();
    machine.vcpu.set_registers(&registers)?;
    assert_eq!(machine.vcpu.registers()?, registers);
    assert_eq!(machine.vcpu.save()?.general, registers);
    Ok(())
}

fn system_registers_read_back(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    let apic_base = machine.vcpu.system_registers()?.apic_base;
    let mut system = SystemRegisters { apic_base, ..flat_system_registers() };
    system.fs.base = 0x1234_5000;
    system.gs.base = 0xffff_8000_0000_1000;
    system.cr2 = 0xdead_b000;
    system.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    system.dr7 = 0x402;
    machine.vcpu.set_system_registers(&system)?;
    let read = machine.vcpu.system_registers()?;
    assert_eq!(read, SystemRegisters { ldtr: read.ldtr, ..system });
    assert!(read.ldtr.unusable || !read.ldtr.present, "{:?}", read.ldtr);
    Ok(())
}

fn segment_registers_leave_the_others_alone(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    // A backend may keep what a run leaves at hand.
    machine.run_to_end()?;
    let before = machine.vcpu.system_registers()?;
    let system = SystemRegisters { dr: [0x1000, 0x2000, 0x3000, 0x4000], dr7: 0x402, ..before };
    machine.vcpu.set_system_registers(&system)?;
    let mut wanted = SystemRegisters { dr: [0; 4], dr7: 0x400, cr2: 0xbeef_0000, ..system };
    wanted.gs.base = 0x7000;
    machine.vcpu.set_segment_registers(&wanted)?;
    let segments = machine.vcpu.segment_registers()?;
    assert_eq!((segments.gs, segments.cs, segments.cr2), (wanted.gs, wanted.cs, wanted.cr2));
    let all = machine.vcpu.system_registers()?;
    assert_eq!((all.dr, all.dr7, all.xcr0), (system.dr, system.dr7, system.xcr0));
    assert_eq!((all.gs, all.cr2), (wanted.gs, wanted.cr2));
    assert_eq!(machine.vcpu.save()?.system.gs, wanted.gs);
    // What is set last counts, whichever way.
    wanted.gs.base = 0x8000;
    machine.vcpu.set_segment_registers(&wanted)?;
    machine.vcpu.set_system_registers(&system)?;
    assert_eq!(machine.vcpu.segment_registers()?.gs, system.gs);
    assert!(!machine.vcpu.exception_pending()?);
    Ok(())
}

fn guest_sees_registers_that_were_set(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.add(rax, rbx)?;
    p.mov(rcx, rsp)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let registers = GeneralRegisters { rip: layout::CODE, rflags: rflags::FIXED, ..distinct_registers() };
    machine.vcpu.set_registers(&registers)?;
    machine.run_to_end()?;
    let after = machine.vcpu.registers()?;
    let rax_after = registers.rax.wrapping_add(registers.rbx);
    let expected = GeneralRegisters {
        rax: rax_after,
        rcx: registers.rsp,
        rip: after.rip,
        rflags: after.rflags,
        ..registers
    };
    assert_eq!(after, expected);
    Ok(())
}

fn msr_reads_back(backend: &Backend) -> Outcome {
    const LSTAR: u32 = 0xc000_0082;
    let mut machine = idle(backend)?;
    machine.vcpu.set_msr(LSTAR, 0xffff_8000_1234_5678)?;
    assert_eq!(machine.vcpu.msr(LSTAR)?, 0xffff_8000_1234_5678);
    assert_eq!(machine.vcpu.save()?.msr(LSTAR), Some(0xffff_8000_1234_5678));
    let error = machine.vcpu.set_msr(LSTAR, 1 << 62);
    assert!(
        matches!(error, Err(Error::InvalidArgument { .. })),
        "an address that is not canonical: {error:?}"
    );
    let error = machine.vcpu.msr(0x4000_1234);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}

fn translate_follows_the_guests_tables(backend: &Backend) -> Outcome {
    let mut machine = idle(backend)?;
    for gva in [0, layout::CODE + 0x123, 0x2345_6789, layout::MMIO] {
        assert_eq!(machine.vcpu.translate(gva)?, Some(GuestAddress(gva)), "{gva:#x}");
    }
    assert_eq!(machine.vcpu.translate(0x7f00_0000_0000)?, None, "no entry in the top table");
    assert_eq!(machine.vcpu.translate(0x1234_0000_0000_0000)?, None, "not canonical");
    Ok(())
}

fn vcpu_starts_at_reset(backend: &Backend) -> Outcome {
    let vm = backend.hypervisor.create_vm(&backend.config(vmm_cpu::InterruptMode::External)?)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let (registers, system) = (vcpu.registers()?, vcpu.system_registers()?);
    assert_eq!((registers.rip, registers.rflags), (0xfff0, rflags::FIXED));
    assert_eq!((system.cs.selector, system.cs.base), (0xf000, 0xffff_0000));
    assert_eq!((system.efer, system.cr0 & SystemRegisters::CR0_PE, system.code_bits()), (0, 0, 16));
    assert_eq!(vcpu.index(), 0);
    Ok(())
}

fn instruction_that_cannot_be_fetched_is_named(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(eax, u32::try_from(layout::MMIO)?)?;
    p.jmp(rax)?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    match machine.vcpu.run(&mut machine.bus) {
        Err(Error::Unhandled(unhandled)) => {
            assert_eq!(unhandled.registers.rip, layout::MMIO);
            assert_eq!((unhandled.backend, unhandled.vcpu), (backend.hypervisor.name(), 0));
            assert!(unhandled.to_string().contains(&format!("{:016x}", layout::MMIO)), "{unhandled}");
            Ok(())
        }
        other => Err(Stop::failed(format!("{other:?}"))),
    }
}

/// CRC32 asks nothing of the guest's mode but is rare in emulators. One that refuses says what it refused, and
/// leaves the state before it, so that somebody else can execute it and let the guest go on.
fn instruction_that_cannot_be_executed_is_named(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(eax, 0)?;
    p.mov(ecx, 1)?;
    let refused = p.here()?;
    p.crc32(eax, ecx)?;
    let next = p.here()?;
    p.end()?;
    let image = p.assemble()?;
    let (refused, next) = (image.address_of(refused)?, image.address_of(next)?);
    let mut machine = Machine::new(backend, &image)?;
    let crc_of_1 = 0xdd45_aab8;
    match machine.vcpu.run(&mut machine.bus) {
        Ok(Halt::Interrupted) => {}
        Err(Error::Unhandled(unhandled)) => {
            assert_eq!((unhandled.registers.rip, unhandled.registers.rax), (refused, 0));
            let start = usize::try_from(refused - layout::CODE)?;
            assert_eq!(unhandled.bytes[..5], image.bytes()[start..start + 5]);
            assert!(unhandled.text.as_deref().is_none_or(|text| text == "crc32 eax,ecx"), "{unhandled}");
            assert!(unhandled.to_string().contains("f2 0f 38 f1 c1"), "{unhandled}");
            let mut registers = machine.vcpu.registers()?;
            assert_eq!(registers, unhandled.registers);
            (registers.rip, registers.rax) = (next, crc_of_1);
            machine.vcpu.set_registers(&registers)?;
            machine.run_to_end()?;
        }
        other => return Err(Stop::failed(format!("{other:?}"))),
    }
    assert_eq!(machine.vcpu.registers()?.rax, crc_of_1);
    Ok(())
}
