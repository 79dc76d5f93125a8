//! Interrupt controllers, and vCPUs that wait for them, saved and restored.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::{dword_ptr, rax};
use vmm_cpu::state::RunState;
use vmm_cpu::{Halt, InterruptMode, MsiSink};

use super::apic::{
    LEVEL_LINE, MESSAGE, Registers, VECTOR, check_level_interrupts, interrupts_seen, waiting_guest,
};
use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;

cases![
    pending_message_survives,
    programmed_line_survives,
    asserted_level_survives,
    vcpu_that_waits_in_run_survives,
];

fn copy(backend: &Backend, mode: InterruptMode, machine: &mut Machine) -> Outcome<Machine> {
    let state = machine.vcpu.save()?;
    machine.copy(backend, &backend.config(mode)?, &state)
}

fn messages(machine: &Machine) -> Outcome<Arc<dyn MsiSink>> {
    machine.vm.msi().ok_or_else(|| Stop::failed("no messages"))
}

/// A message that came while interrupts were off is delivered in the other machine.
fn pending_message_survives(backend: &Backend) -> Outcome {
    for mode in [InterruptMode::LocalApic, InterruptMode::Platform] {
        let mut p = Program::new()?;
        p.mov(rax, 0xfee0_00f0_u64)?;
        p.mov(dword_ptr(rax), 0x1ff)?;
        p.checkpoint()?;
        p.report(0x10, 1)?;
        p.sti()?;
        let wait = p.here()?;
        p.cmp(dword_ptr(layout::DATA), 0)?;
        p.je(wait)?;
        p.end()?;
        p.handler(VECTOR)?;
        p.report(0x10, VECTOR)?;
        p.inc(dword_ptr(layout::DATA))?;
        p.iretq()?;
        let mut machine = Machine::in_mode(backend, mode, &p.assemble()?)?;
        machine.run_to_end()?;
        assert!(messages(&machine)?.send(MESSAGE)?);
        let mut copy = copy(backend, mode, &mut machine)?;
        copy.run_to_end()?;
        assert_eq!(copy.bus.output(0x10), [1, VECTOR], "{mode:?}");
    }
    Ok(())
}

/// A machine whose guest has set up a level-triggered line and waits for one interrupt.
fn with_line(backend: &Backend) -> Outcome<Machine> {
    let image = waiting_guest(Registers::Mmio, Some((LEVEL_LINE, true)), 1)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::Platform, &image)?;
    machine.run_to_end()?;
    Ok(machine)
}

fn set_line(machine: &Machine, asserted: bool) -> Outcome {
    let lines = machine.vm.interrupt_lines().ok_or_else(|| Stop::failed("no interrupt lines"))?;
    Ok(lines.set_level(LEVEL_LINE.into(), asserted)?)
}

fn programmed_line_survives(backend: &Backend) -> Outcome {
    let mut machine = with_line(backend)?;
    let mut copy = copy(backend, InterruptMode::Platform, &mut machine)?;
    set_line(&copy, true)?;
    copy.bus.hook = lowering(&copy)?;
    copy.run_to_end()?;
    check_level_interrupts(backend, &copy, 1)
}

fn asserted_level_survives(backend: &Backend) -> Outcome {
    let mut machine = with_line(backend)?;
    set_line(&machine, true)?;
    let mut copy = copy(backend, InterruptMode::Platform, &mut machine)?;
    copy.bus.hook = lowering(&copy)?;
    copy.run_to_end()?;
    check_level_interrupts(backend, &copy, 1)
}

/// Lowers the line at the first report of the handler, as a device does when its cause is gone.
fn lowering(machine: &Machine) -> Outcome<Option<crate::suite::recorder::Hook>> {
    let lines = machine.vm.interrupt_lines().ok_or_else(|| Stop::failed("no interrupt lines"))?;
    Ok(Some(Box::new(move |_| lines.set_level(LEVEL_LINE.into(), false).expect("the line exists"))))
}

fn vcpu_that_waits_in_run_survives(backend: &Backend) -> Outcome {
    for mode in [InterruptMode::LocalApic, InterruptMode::Platform] {
        let mut machine = Machine::in_mode(backend, mode, &waiting_guest(Registers::Mmio, None, 1)?)?;
        machine.run_to_end()?;
        let handle = machine.vcpu.handle();
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            handle.kick();
        });
        machine.run_until(&Halt::Interrupted)?;
        kicker.join().expect("the kicking thread ends");
        assert_eq!(machine.vcpu.save()?.run_state, RunState::Halted, "{mode:?}");
        let mut copy = copy(backend, mode, &mut machine)?;
        let sink = messages(&copy)?;
        let sender = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            sink.send(MESSAGE)
        });
        copy.run_to_end()?;
        assert!(sender.join().expect("the sending thread ends")?);
        assert_eq!(interrupts_seen(&copy)?, 1, "{mode:?}");
    }
    Ok(())
}
