//! Interrupts from the VMM's own controller, and non-maskable ones.

use std::time::Duration;

use iced_x86::code_asm::{al, cr8, dword_ptr, eax, ecx, qword_ptr, rax};
use vmm_cpu::state::rflags;
use vmm_cpu::{Halt, InterruptMode};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    interrupt_wakes_from_hlt,
    blocked_by_cli_until_after_sti,
    hlt_with_interrupts_off_stays,
    withdrawn_interrupt_is_not_delivered,
    pin_lowered_while_interrupts_are_off_is_forgotten,
    two_interrupts_one_after_the_other,
    interrupt_of_a_busy_guest,
    interrupt_reaches_a_vcpu_with_a_local_apic,
    interrupt_pin_belongs_to_the_platform,
    nmi_wakes_from_hlt,
    nmi_ignores_cli,
    nmi_blocks_nmi_until_iret,
    wait_times_out,
    registers_set_from_outside_decide_what_is_deliverable,
    guest_raises_and_lowers_its_task_priority,
];

const VECTOR: u8 = 0x21;
const NMI: u8 = 2;

/// A guest that enables interrupts, halts, and after each event reports 9 and halts again; handlers report
/// their vector.
fn halting_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.sti()?;
    let again = p.here()?;
    p.hlt()?;
    p.report(0x10, 9)?;
    p.jmp(again)?;
    for vector in [NMI, VECTOR, VECTOR + 1] {
        p.handler(vector)?;
        p.report(0x10, vector)?;
        p.iretq()?;
    }
    p.assemble()
}

/// A vCPU that last stood with interrupts on is set to code that has them off: INTR waits for its STI.
fn registers_set_from_outside_decide_what_is_deliverable(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.sti()?;
    p.nop()?;
    p.checkpoint()?;
    p.report(0x10, 1)?;
    p.mov(al, 3)?;
    p.sti()?;
    p.out(0x10, al)?;
    p.report(0x10, 4)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.report(0x10, VECTOR)?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let mut registers = machine.vcpu.registers()?;
    assert_ne!(registers.rflags & rflags::IF, 0);
    registers.rflags &= !rflags::IF;
    machine.vcpu.set_registers(&registers)?;
    machine.bus.vectors.push_back(VECTOR);
    machine.vcpu.handle().set_intr(true)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [1, 3, VECTOR, 4]);
    Ok(())
}

/// The pin was high while the guest could not take an interrupt, and is low when it can: nothing happens.
fn pin_lowered_while_interrupts_are_off_is_forgotten(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.cli()?;
    p.checkpoint()?;
    p.report(0x10, 1)?;
    p.checkpoint()?;
    p.sti()?;
    for value in 3..10 {
        p.report(0x10, value)?;
    }
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    machine.vcpu.handle().set_intr(true)?;
    machine.run_to_end()?;
    machine.vcpu.handle().set_intr(false)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [1, 3, 4, 5, 6, 7, 8, 9]);
    assert!(!machine.bus.log.iter().any(|access| matches!(access, Access::Acknowledge(_))));
    // A backend that asked to be told of the moment is told once: hardware would not get past a second time.
    let counts = machine.vcpu.exit_counts();
    let windows = counts.iter().find(|(kind, _)| *kind == "interrupt-window").map_or(0, |(_, count)| *count);
    assert!(windows <= 1, "{counts:?}");
    Ok(())
}

/// CR8 is an ordinary register of a vCPU without a local APIC, to the guest and to the VMM.
fn guest_raises_and_lowers_its_task_priority(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rax, cr8)?;
    p.mov(dword_ptr(layout::DATA), eax)?;
    p.mov(eax, 9)?;
    p.mov(cr8, rax)?;
    p.mov(eax, 2)?;
    p.mov(cr8, rax)?;
    p.checkpoint()?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let mut system = machine.vcpu.system_registers()?;
    system.cr8 = 5;
    machine.vcpu.set_system_registers(&system)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(layout::DATA)?, 5);
    assert_eq!(machine.vcpu.system_registers()?.cr8, 2);
    let state = machine.vcpu.save()?;
    let config = backend.config(InterruptMode::External)?;
    let mut copy = machine.copy(backend, &config, &state)?;
    copy.run_to_end()?;
    assert_eq!(copy.vcpu.system_registers()?.cr8, 2);
    Ok(())
}

fn interrupt_wakes_from_hlt(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    for round in 1..=3 {
        machine.bus.take_log();
        machine.bus.vectors.push_back(VECTOR);
        machine.vcpu.handle().set_intr(true)?;
        assert!(machine.vcpu.wait(None), "INTR is asserted");
        machine.run_until(&Halt::Halted)?;
        let out = |value| Access::Out { port: 0x10, size: 1, data: vec![value] };
        let expected = [Access::Acknowledge(Some(VECTOR)), out(VECTOR), out(9)];
        assert_eq!(machine.bus.log, expected, "round {round}");
    }
    Ok(())
}

fn blocked_by_cli_until_after_sti(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.cli()?;
    p.report(0x10, 1)?;
    p.mov(al, 3)?;
    p.sti()?;
    // The instruction after STI still comes first.
    p.out(0x10, al)?;
    p.report(0x10, 4)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.report(0x10, VECTOR)?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.vectors.push_back(VECTOR);
    machine.vcpu.handle().set_intr(true)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [1, 3, VECTOR, 4]);
    Ok(())
}

fn hlt_with_interrupts_off_stays(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.cli()?;
    p.hlt()?;
    p.report(0x10, 1)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.vectors.push_back(VECTOR);
    machine.vcpu.handle().set_intr(true)?;
    machine.run_until(&Halt::Halted)?;
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.log, []);
    Ok(())
}

fn withdrawn_interrupt_is_not_delivered(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.sti()?;
    p.nop()?;
    p.report(0x10, 1)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.report(0x10, VECTOR)?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.vcpu.handle().set_intr(true)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [1]);
    assert!(machine.bus.log.contains(&Access::Acknowledge(None)));
    Ok(())
}

fn two_interrupts_one_after_the_other(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.bus.vectors.extend([VECTOR, VECTOR + 1]);
    machine.vcpu.handle().set_intr(true)?;
    machine.run_until(&Halt::Halted)?;
    let output = machine.bus.output(0x10);
    assert_eq!(output.iter().filter(|value| **value != 9).collect::<Vec<_>>(), [&VECTOR, &(VECTOR + 1)]);
    Ok(())
}

/// Interrupts that another thread raises at any moment arrive once each and change nothing else.
fn interrupt_of_a_busy_guest(backend: &Backend) -> Outcome {
    const INTERRUPTS: u64 = 50;
    let mut p = Program::new()?;
    p.sti()?;
    p.mov(eax, 0)?;
    let again = p.here()?;
    p.inc(eax)?;
    p.mov(ecx, eax)?;
    p.sub(ecx, eax)?;
    let mut broken = p.create_label();
    p.jnz(broken)?;
    p.cmp(qword_ptr(layout::DATA), i32::try_from(INTERRUPTS)?)?;
    p.jb(again)?;
    p.report(0x10, 1)?;
    p.end()?;
    p.set_label(&mut broken)?;
    p.report(0x10, 0xff)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.push(rax)?;
    p.inc(qword_ptr(layout::DATA))?;
    p.pop(rax)?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let handle = machine.vcpu.handle();
    let ram = machine.ram.clone();
    machine.bus.vectors.extend(std::iter::repeat_n(VECTOR, usize::try_from(INTERRUPTS)?));
    let raiser = std::thread::spawn(move || {
        use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
        // The controller's output is level: raised once, it stays until the last vector is taken.
        for _ in 0..200 {
            if ram.memory().read_obj::<u64>(GuestAddress(layout::DATA)).is_ok_and(|count| count >= INTERRUPTS)
            {
                break;
            }
            if handle.set_intr(true).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    machine.run_to_end()?;
    raiser.join().expect("the raising thread ends");
    assert_eq!(machine.bus.output(0x10), [1]);
    assert_eq!(machine.word(layout::DATA)?, INTERRUPTS);
    Ok(())
}

/// INTR of the VMM's PIC goes through the first local APIC, which passes it on after reset.
fn interrupt_reaches_a_vcpu_with_a_local_apic(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.sti()?;
    p.hlt()?;
    p.report(0x10, 9)?;
    p.end()?;
    p.handler(VECTOR)?;
    p.report(0x10, VECTOR)?;
    p.iretq()?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &p.assemble()?)?;
    machine.bus.vectors.push_back(VECTOR);
    let handle = machine.vcpu.handle();
    let raiser = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(10));
        handle.set_intr(true)
    });
    machine.run_to_end()?;
    raiser.join().expect("the raising thread ends")?;
    assert_eq!(machine.bus.output(0x10), [VECTOR, 9]);
    Ok(())
}

fn interrupt_pin_belongs_to_the_platform(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.end()?;
    let machine = Machine::in_mode(backend, InterruptMode::Platform, &p.assemble()?)?;
    let error = machine.vcpu.handle().set_intr(true);
    assert!(matches!(error, Err(vmm_cpu::Error::Unsupported { .. })), "{error:?}");
    Ok(())
}

fn nmi_wakes_from_hlt(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    machine.vcpu.handle().nmi()?;
    assert!(machine.vcpu.wait(None), "an NMI is queued");
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.output(0x10), [NMI, 9]);
    Ok(())
}

fn nmi_ignores_cli(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.cli()?;
    let again = p.here()?;
    p.cmp(dword_ptr(layout::DATA), 0)?;
    p.je(again)?;
    p.report(0x10, 1)?;
    p.end()?;
    p.handler(NMI)?;
    p.mov(dword_ptr(layout::DATA), 1)?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let handle = machine.vcpu.handle();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        handle.nmi()
    });
    machine.run_to_end()?;
    sender.join().expect("the sending thread ends")?;
    assert_eq!(machine.bus.output(0x10), [1]);
    Ok(())
}

fn nmi_blocks_nmi_until_iret(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    let again = p.here()?;
    p.nop()?;
    p.cmp(dword_ptr(layout::DATA), 2)?;
    p.jb(again)?;
    p.report(0x10, 9)?;
    p.end()?;
    p.handler(NMI)?;
    p.report(0x10, 1)?;
    // Here, inside of the handler, the test queues a second one.
    p.in_(al, 0x11)?;
    p.report(0x10, 2)?;
    p.inc(dword_ptr(layout::DATA))?;
    p.iretq()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let handle = machine.vcpu.handle();
    handle.nmi()?;
    let mut second = Some(handle);
    machine.bus.hook = Some(Box::new(move |access| {
        if let Some(handle) = second.take_if(|_| matches!(access, Access::In { .. })) {
            handle.nmi().expect("the backend took an NMI before");
        }
    }));
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [1, 2, 1, 2, 9]);
    Ok(())
}

fn wait_times_out(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    assert!(!machine.vcpu.wait(Some(Duration::from_millis(5))));
    machine.vcpu.handle().kick();
    assert!(machine.vcpu.wait(Some(Duration::from_secs(10))));
    machine.run_until(&Halt::Interrupted)?;
    assert!(!machine.vcpu.wait(Some(Duration::from_millis(5))), "the kick was answered");
    Ok(())
}
