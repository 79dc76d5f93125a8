//! Debug stops: breakpoints, watchpoints, single step.

use iced_x86::code_asm::{al, dword_ptr, eax, ebx, ecx, ptr, qword_ptr, rax, rbx};
use vmm_cpu::{DebugReason, DebugRequest, DebugStop, DebugStops, Error, Halt, HardwareStop, Vcpu};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;

cases![
    hardware_breakpoint_stops_before_the_instruction,
    every_hardware_breakpoint_is_told_apart,
    cleared_breakpoint_does_not_stop,
    single_step_stops_after_each_instruction,
    single_step_over_port_and_mmio_access,
    held_interrupts_come_after_the_steps,
    watchpoint_stops_after_a_write,
    watchpoint_stops_after_an_access,
    int3_stops_the_debugger,
    int3_is_the_guests_unless_asked_for,
    impossible_stops_are_refused,
];

fn stops(vcpu: &mut dyn Vcpu) -> Outcome<&mut dyn DebugStops> {
    vcpu.debug_stops().ok_or_else(|| Stop::skipped("no debug stops"))
}

fn request(machine: &mut Machine, request: &DebugRequest) -> Outcome {
    Ok(stops(&mut *machine.vcpu)?.request(request)?)
}

fn stop(rip: u64, reason: DebugReason) -> Halt {
    Halt::Debug(DebugStop::new(rip, reason))
}

fn hardware(rip: u64, hits: u8) -> Halt {
    stop(rip, DebugReason::Hardware { hits })
}

fn hardware_breakpoint_stops_before_the_instruction(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(eax, 0)?;
    let again = p.here()?;
    p.inc(eax)?;
    let after = p.here()?;
    p.cmp(eax, 3)?;
    p.jne(again)?;
    p.end()?;
    let image = p.assemble()?;
    let (address, next) = (image.address_of(again)?, image.address_of(after)?);
    let mut machine = Machine::new(backend, &image)?;
    for round in 0..3 {
        request(&mut machine, &DebugRequest::none().at(HardwareStop::execute(address)))?;
        machine.run_until(&hardware(address, 1))?;
        let registers = machine.vcpu.registers()?;
        assert_eq!((registers.rip, registers.rax), (address, round));
        // A debugger steps over the instruction before it sets the breakpoint again.
        request(&mut machine, &DebugRequest::none().step())?;
        machine.run_until(&stop(next, DebugReason::SingleStep))?;
        assert_eq!(machine.vcpu.registers()?.rax, round + 1);
    }
    request(&mut machine, &DebugRequest::none())?;
    machine.run_to_end()
}

fn every_hardware_breakpoint_is_told_apart(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let labels = [
        p.here()?,
        {
            p.nop()?;
            p.here()?
        },
        {
            p.nop()?;
            p.here()?
        },
        {
            p.nop()?;
            p.here()?
        },
    ];
    p.end()?;
    let image = p.assemble()?;
    let addresses = labels.map(|label| image.address_of(label).ok());
    let mut machine = Machine::new(backend, &image)?;
    let max = stops(&mut *machine.vcpu)?.max_hardware();
    assert!(max >= 1, "debug stops without a hardware stop");
    for (index, address) in addresses.iter().flatten().enumerate().take(max).skip(1) {
        let mut all = DebugRequest::none();
        // Those up to this one, of which the guest meets this one next.
        for (other, address) in addresses.iter().flatten().enumerate().take(index + 1) {
            all = all.at(HardwareStop::execute(if other == index { *address } else { layout::DATA }));
        }
        request(&mut machine, &all)?;
        machine.run_until(&hardware(*address, 1 << index))?;
    }
    Ok(())
}

fn cleared_breakpoint_does_not_stop(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.nop()?;
    let label = p.here()?;
    p.nop()?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    let all = DebugRequest::none().step().int3().at(HardwareStop::execute(image.address_of(label)?));
    request(&mut machine, &all)?;
    request(&mut machine, &DebugRequest::none())?;
    machine.run_to_end()
}

fn single_step_stops_after_each_instruction(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(eax, 5)?;
    let mut labels = vec![p.here()?];
    p.add(eax, 7)?;
    labels.push(p.here()?);
    p.mov(ptr(layout::DATA), rax)?;
    let mut target = p.create_label();
    labels.push(p.here()?);
    p.jmp(target)?;
    p.ud2()?;
    p.set_label(&mut target)?;
    p.mov(ecx, eax)?;
    labels.push(target);
    labels.push(p.here()?);
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    request(&mut machine, &DebugRequest::none().step())?;
    for label in labels {
        machine.run_until(&stop(image.address_of(label)?, DebugReason::SingleStep))?;
    }
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rax, registers.rcx, machine.word(layout::DATA)?), (12, 12, 12));
    assert_eq!(registers.rflags & vmm_cpu::state::rflags::TF, 0, "the guest's own trap flag stays clear");
    Ok(())
}

fn single_step_over_port_and_mmio_access(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    let mut labels = vec![p.here()?];
    p.out(0x10, al)?;
    labels.push(p.here()?);
    p.in_(al, 0x11)?;
    labels.push(p.here()?);
    p.mov(dword_ptr(rbx), eax)?;
    labels.push(p.here()?);
    p.mov(eax, dword_ptr(rbx))?;
    labels.push(p.here()?);
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    request(&mut machine, &DebugRequest::none().step())?;
    for (index, label) in labels.into_iter().enumerate() {
        machine.run_until(&stop(image.address_of(label)?, DebugReason::SingleStep))?;
        assert_eq!(machine.bus.log.len(), index, "accesses so far");
    }
    Ok(())
}

fn held_interrupts_come_after_the_steps(backend: &Backend) -> Outcome {
    const VECTOR: u8 = 0x21;
    let mut p = Program::new()?;
    p.sti()?;
    p.nop()?;
    p.checkpoint()?;
    let mut labels = Vec::new();
    for _ in 0..4 {
        p.nop()?;
        labels.push(p.here()?);
    }
    p.report(0x10, 1)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.pop(rbx)?;
    p.push(rbx)?;
    p.report(0x10, VECTOR)?;
    p.iretq()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    if !stops(&mut *machine.vcpu)?.can_hold_interrupts() {
        return Err(Stop::skipped("interrupts cannot be held"));
    }
    machine.run_to_end()?;
    machine.bus.vectors.push_back(VECTOR);
    machine.vcpu.handle().set_intr(true)?;
    request(&mut machine, &DebugRequest::none().step_without_interrupts())?;
    let last = image.address_of(labels[labels.len() - 1])?;
    for label in labels {
        machine.run_until(&stop(image.address_of(label)?, DebugReason::SingleStep))?;
    }
    assert_eq!(machine.bus.output(0x10), []);
    request(&mut machine, &DebugRequest::none())?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [VECTOR, 1]);
    assert_eq!(machine.vcpu.registers()?.rbx, last, "the interrupt came where the steps ended");
    Ok(())
}

/// A ring-3 guest that touches the word at the start of the data area by a load, then by a store, with the labels
/// behind the two; processors check data accesses of the guest, emulators of privileged code may not.
fn touching_guest(backend: &Backend) -> Outcome<(Machine, [u64; 2])> {
    let mut p = Program::new()?;
    p.mov(rbx, layout::DATA)?;
    p.mov(qword_ptr(rbx + 16), rax)?;
    p.mov(rax, qword_ptr(rbx))?;
    let loaded = p.here()?;
    p.nop()?;
    p.mov(dword_ptr(rbx + 4), ecx)?;
    let stored = p.here()?;
    p.nop()?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.enter_ring_3()?;
    Ok((machine, [image.address_of(loaded)?, image.address_of(stored)?]))
}

fn watchpoint_stops_after_a_write(backend: &Backend) -> Outcome {
    let (mut machine, [_, stored]) = touching_guest(backend)?;
    request(&mut machine, &DebugRequest::none().at(HardwareStop::write(layout::DATA, 8)))?;
    machine.run_until(&hardware(stored, 1))?;
    machine.run_to_end()
}

fn watchpoint_stops_after_an_access(backend: &Backend) -> Outcome {
    let (mut machine, [loaded, stored]) = touching_guest(backend)?;
    let twice = DebugRequest::none().at(HardwareStop::execute(layout::STACK_TOP));
    request(&mut machine, &twice.at(HardwareStop::access(layout::DATA + 4, 4)))?;
    machine.run_until(&hardware(loaded, 2))?;
    machine.run_until(&hardware(stored, 2))?;
    machine.run_to_end()
}

fn int3_stops_the_debugger(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(eax, 1)?;
    let label = p.here()?;
    p.int3()?;
    p.mov(ebx, 2)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    machine.enter_ring_3()?;
    request(&mut machine, &DebugRequest::none().int3())?;
    let address = image.address_of(label)?;
    machine.run_until(&stop(address, DebugReason::SoftwareBreakpoint))?;
    let registers = machine.vcpu.registers()?;
    assert_eq!((registers.rip, registers.rax), (address, 1));
    // The debugger puts the instruction back that it had replaced.
    machine.write(address, &[0x90])?;
    machine.run_to_end()?;
    assert_eq!(machine.vcpu.registers()?.rbx, 2);
    Ok(())
}

fn int3_is_the_guests_unless_asked_for(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.int3()?;
    let label = p.here()?;
    p.end()?;
    p.handler(3)?;
    p.pop(rbx)?;
    p.report(0x10, 3)?;
    p.end()?;
    let image = p.assemble()?;
    let mut machine = Machine::new(backend, &image)?;
    // The stops asked for have nothing to do with it.
    if machine.vcpu.debug_stops().is_some() {
        request(&mut machine, &DebugRequest::none().at(HardwareStop::execute(layout::STACK_TOP)))?;
    }
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [3]);
    assert_eq!(machine.vcpu.registers()?.rbx, image.address_of(label)?, "RIP behind the INT3");
    Ok(())
}

fn impossible_stops_are_refused(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let stops = stops(&mut *machine.vcpu)?;
    let max = stops.max_hardware();
    let too_many = (0..=max).fold(DebugRequest::none(), |all, _| all.at(HardwareStop::execute(layout::CODE)));
    let one = |stop| DebugRequest::none().at(stop);
    for request in [
        too_many,
        one(HardwareStop::write(layout::DATA, 0)),
        one(HardwareStop::write(layout::DATA, 3)),
        one(HardwareStop::access(layout::DATA, 16)),
        one(HardwareStop::access(layout::DATA + 2, 4)),
    ] {
        let error = stops.request(&request);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{request:?}: {error:?}");
    }
    machine.run_to_end()
}
