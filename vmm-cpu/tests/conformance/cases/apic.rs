//! Local APICs, I/O APIC, lines, messages, and notifiers that raise interrupts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::{dword_ptr, eax, ecx, edx, rax, rcx};
use vmm_cpu::{
    Error, GsiRoute, GsiTarget, InterruptLines, InterruptMode, InterruptNotifiers, MsiMessage, Notifier,
};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    msi_with_local_apics,
    msi_with_a_platform,
    msi_in_x2apic_mode,
    msi_wakes_a_vcpu_that_waits_in_run,
    msi_to_nowhere,
    edge_line,
    level_line_stays_until_lowered,
    line_routed_to_a_message,
    end_of_level_interrupt_is_reported,
    notifier_raises_an_edge,
    notifier_raises_a_message,
    notifier_raises_a_level_until_resampled,
    detached_notifier_raises_nothing,
    notifier_attaches_once,
    impossible_lines_and_routes_are_refused,
];

pub(super) const VECTOR: u8 = 0x41;
const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const EDGE_LINE: u8 = 5;
pub(super) const LEVEL_LINE: u8 = 10;

/// Checks how many level-triggered interrupts the guest has counted.
pub(super) fn check_level_interrupts(backend: &Backend, machine: &Machine, expected: u64) -> Outcome {
    let seen = interrupts_seen(machine)?;
    assert!(
        (expected..=expected + backend.level_repetitions()).contains(&seen),
        "{seen} instead of {expected}"
    );
    Ok(())
}

/// A message of `VECTOR` to APIC ID 0.
pub(super) const MESSAGE: MsiMessage = MsiMessage { address: LOCAL_APIC, data: VECTOR as u32 };

/// Which registers the guest uses for its local APIC.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Registers {
    Mmio,
    X2apic,
}

/// Enables the local APIC by its spurious-interrupt register.
pub(super) fn enable_local_apic(p: &mut Program, registers: Registers) -> Outcome {
    match registers {
        Registers::Mmio => {
            p.mov(rax, LOCAL_APIC + 0xf0)?;
            p.mov(dword_ptr(rax), 0x1ff)?;
        }
        Registers::X2apic => {
            let (apic_base, extended, spurious) = (0x1b, 1 << 10, 0x80f);
            p.mov(ecx, apic_base)?;
            p.rdmsr()?;
            p.or(eax, extended)?;
            p.wrmsr()?;
            p.mov(ecx, spurious)?;
            p.mov(eax, 0x1ff)?;
            p.mov(edx, 0)?;
            p.wrmsr()?;
        }
    }
    Ok(())
}

pub(super) fn end_of_interrupt(p: &mut Program, registers: Registers) -> Outcome {
    match registers {
        Registers::Mmio => {
            p.mov(rax, LOCAL_APIC + 0xb0)?;
            p.mov(dword_ptr(rax), 0)?;
        }
        Registers::X2apic => {
            p.mov(ecx, 0x80b)?;
            p.mov(eax, 0)?;
            p.mov(edx, 0)?;
            p.wrmsr()?;
        }
    }
    Ok(())
}

/// Lets I/O APIC input `pin` raise `VECTOR` at APIC ID 0.
fn program_io_apic(p: &mut Program, pin: u8, level: bool) -> Outcome {
    let low = u32::from(VECTOR) | if level { 1 << 15 } else { 0 };
    p.mov(rcx, IO_APIC)?;
    for (register, value) in [(0x11 + 2 * u32::from(pin), 0), (0x10 + 2 * u32::from(pin), low)] {
        p.mov(dword_ptr(rcx), register)?;
        p.mov(dword_ptr(rcx + 0x10), value)?;
    }
    Ok(())
}

/// A guest that comes back once it is ready, then waits with HLT until it has had `interrupts` interrupts, goes
/// on for a while in case there is one more, and comes back again; each one is counted and reported. Run again
/// with the count set back, it does the same again.
pub(super) fn waiting_guest(
    registers: Registers,
    line: Option<(u8, bool)>,
    interrupts: i32,
) -> Outcome<Image> {
    let mut p = Program::new()?;
    enable_local_apic(&mut p, registers)?;
    if let Some((pin, level)) = line {
        // The PIC has the line too, and passes it on through the local APIC: mask all of its inputs.
        p.report(0x21, 0xff)?;
        p.report(0xa1, 0xff)?;
        program_io_apic(&mut p, pin, level)?;
    }
    p.checkpoint()?;
    let wait = p.here()?;
    let mut enough = p.create_label();
    p.cli()?;
    p.cmp(dword_ptr(layout::DATA), interrupts)?;
    p.jae(enough)?;
    p.sti()?;
    p.hlt()?;
    p.jmp(wait)?;
    p.set_label(&mut enough)?;
    p.sti()?;
    p.mov(ecx, 500)?;
    let again = p.here()?;
    p.dec(ecx)?;
    p.jnz(again)?;
    p.checkpoint()?;
    p.jmp(wait)?;
    p.handler(VECTOR)?;
    p.push(rax)?;
    p.push(rcx)?;
    p.inc(dword_ptr(layout::DATA))?;
    p.report(0x10, VECTOR)?;
    end_of_interrupt(&mut p, registers)?;
    p.pop(rcx)?;
    p.pop(rax)?;
    p.iretq()?;
    p.assemble()
}

/// How many interrupts the guest has counted; it begins again.
pub(super) fn interrupts_seen(machine: &Machine) -> Outcome<u64> {
    let seen = machine.word(layout::DATA)?;
    machine.write(layout::DATA, &[0; 8])?;
    Ok(seen)
}

fn msi(backend: &Backend, mode: InterruptMode, registers: Registers) -> Outcome {
    let mut machine = Machine::in_mode(backend, mode, &waiting_guest(registers, None, 2)?)?;
    let sink = machine.vm.msi().ok_or_else(|| Stop::failed(format!("no messages in mode {mode:?}")))?;
    machine.run_to_end()?;
    assert!(sink.send(MESSAGE)?, "the local APIC is enabled");
    let late = Arc::clone(&sink);
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        late.send(MESSAGE)
    });
    machine.run_to_end()?;
    assert!(sender.join().expect("the sending thread ends")?);
    assert_eq!(interrupts_seen(&machine)?, 2);
    Ok(())
}

fn msi_with_local_apics(backend: &Backend) -> Outcome {
    msi(backend, InterruptMode::LocalApic, Registers::Mmio)
}

fn msi_with_a_platform(backend: &Backend) -> Outcome {
    msi(backend, InterruptMode::Platform, Registers::Mmio)
}

fn msi_in_x2apic_mode(backend: &Backend) -> Outcome {
    if !backend.hypervisor.supported_cpuid().has(vmm_cpu::cpuid::Feature::X2APIC) {
        return Err(Stop::skipped("no x2APIC"));
    }
    msi(backend, InterruptMode::LocalApic, Registers::X2apic)
}

fn msi_wakes_a_vcpu_that_waits_in_run(backend: &Backend) -> Outcome {
    const MESSAGES: i32 = 200;
    let image = waiting_guest(Registers::Mmio, None, MESSAGES)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &image)?;
    let sink = machine.vm.msi().ok_or_else(|| Stop::failed("no messages"))?;
    machine.run_to_end()?;
    let seen = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&seen);
    machine.bus.hook = Some(Box::new(move |access| {
        if matches!(access, Access::Out { port: 0x10, .. }) {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }));
    let sender = thread::spawn(move || -> Result<(), Error> {
        for sent in 1..=MESSAGES.cast_unsigned() {
            sink.send(MESSAGE)?;
            // One message that finds the vector pending merges with it, so each waits for the one before.
            while seen.load(Ordering::SeqCst) < sent {
                thread::yield_now();
            }
        }
        Ok(())
    });
    machine.run_to_end()?;
    sender.join().expect("the sending thread ends")?;
    assert_eq!(interrupts_seen(&machine)?, 200);
    Ok(())
}

fn msi_to_nowhere(backend: &Backend) -> Outcome {
    let image = waiting_guest(Registers::Mmio, None, 1)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &image)?;
    let sink = machine.vm.msi().ok_or_else(|| Stop::failed("no messages"))?;
    machine.run_to_end()?;
    assert!(!sink.send(MsiMessage { address: LOCAL_APIC | 7 << 12, ..MESSAGE })?, "there is no APIC ID 7");
    for address in [0, LOCAL_APIC - 4, 0xfef0_0000, 1 << 40] {
        let error = sink.send(MsiMessage { address, ..MESSAGE });
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{address:#x}: {error:?}");
    }
    Ok(())
}

/// A machine with all controllers whose guest waits for interrupts of one line, and its lines.
fn platform(
    backend: &Backend,
    line: u8,
    level: bool,
    interrupts: i32,
) -> Outcome<(Machine, Arc<dyn InterruptLines>)> {
    let image = waiting_guest(Registers::Mmio, Some((line, level)), interrupts)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::Platform, &image)?;
    machine.run_to_end()?;
    let lines = machine.vm.interrupt_lines().ok_or_else(|| Stop::failed("no interrupt lines"))?;
    Ok((machine, lines))
}

fn edge_line(backend: &Backend) -> Outcome {
    let (mut machine, lines) = platform(backend, EDGE_LINE, false, 1)?;
    let gsi = u32::from(EDGE_LINE);
    // It stays high: only the edge counts.
    lines.set_level(gsi, true)?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    lines.set_level(gsi, false)?;
    lines.set_level(gsi, true)?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    Ok(())
}

fn level_line_stays_until_lowered(backend: &Backend) -> Outcome {
    let (mut machine, lines) = platform(backend, LEVEL_LINE, true, 3)?;
    let gsi = u32::from(LEVEL_LINE);
    lines.set_level(gsi, true)?;
    let mut seen = 0;
    machine.bus.hook = Some(Box::new(move |access| {
        if matches!(access, Access::Out { port: 0x10, .. }) {
            seen += 1;
            if seen == 3 {
                lines.set_level(gsi, false).expect("the line was raised before");
            }
        }
    }));
    machine.run_to_end()?;
    // Once, and again after each end of interrupt, until the line falls.
    check_level_interrupts(backend, &machine, 3)?;
    Ok(())
}

fn line_routed_to_a_message(backend: &Backend) -> Outcome {
    let image = waiting_guest(Registers::Mmio, None, 1)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &image)?;
    machine.run_to_end()?;
    let lines =
        machine.vm.interrupt_lines().ok_or_else(|| Stop::skipped("no interrupt lines with local APICs"))?;
    lines.set_routes(&[GsiRoute::new(3, GsiTarget::Msi(MESSAGE))])?;
    lines.set_level(3, true)?;
    lines.set_level(3, false)?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    Ok(())
}

fn end_of_level_interrupt_is_reported(backend: &Backend) -> Outcome {
    let image = waiting_guest(Registers::Mmio, None, 1)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &image)?;
    machine.run_to_end()?;
    let lines =
        machine.vm.interrupt_lines().ok_or_else(|| Stop::skipped("no interrupt lines with local APICs"))?;
    let (level_triggered, assert) = (1 << 15, 1 << 14);
    let message = MsiMessage { data: MESSAGE.data | level_triggered | assert, ..MESSAGE };
    lines.set_routes(&[GsiRoute::new(3, GsiTarget::Msi(message))])?;
    lines.set_level(3, true)?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    assert!(machine.bus.log.contains(&Access::EndOfInterrupt(VECTOR)), "{:?}", machine.bus.log);
    Ok(())
}

fn notifiers(machine: &Machine) -> Outcome<Arc<dyn InterruptNotifiers>> {
    machine.vm.interrupt_notifiers().ok_or_else(|| Stop::skipped("no notifiers"))
}

fn notifier_raises_an_edge(backend: &Backend) -> Outcome {
    let (mut machine, _lines) = platform(backend, EDGE_LINE, false, 2)?;
    let notifier = Notifier::new()?;
    notifiers(&machine)?.attach_interrupt(EDGE_LINE.into(), &notifier, None)?;
    notifier.notify()?;
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        notifier.notify()
    });
    machine.run_to_end()?;
    sender.join().expect("the sending thread ends")?;
    assert_eq!(interrupts_seen(&machine)?, 2);
    Ok(())
}

fn notifier_raises_a_message(backend: &Backend) -> Outcome {
    let image = waiting_guest(Registers::Mmio, None, 1)?;
    let mut machine = Machine::in_mode(backend, InterruptMode::LocalApic, &image)?;
    machine.run_to_end()?;
    let lines =
        machine.vm.interrupt_lines().ok_or_else(|| Stop::skipped("no interrupt lines with local APICs"))?;
    lines.set_routes(&[GsiRoute::new(30, GsiTarget::Msi(MESSAGE))])?;
    let notifier = Notifier::new()?;
    notifiers(&machine)?.attach_interrupt(30, &notifier, None)?;
    notifier.notify()?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    Ok(())
}

fn notifier_raises_a_level_until_resampled(backend: &Backend) -> Outcome {
    let (mut machine, _lines) = platform(backend, LEVEL_LINE, true, 1)?;
    let (notifier, resample) = (Notifier::new()?, Notifier::new()?);
    notifiers(&machine)?.attach_interrupt(LEVEL_LINE.into(), &notifier, Some(&resample))?;
    for round in 1..=3 {
        notifier.notify()?;
        machine.run_to_end()?;
        // The end of interrupt lowers the line and tells so.
        check_level_interrupts(backend, &machine, 1)?;
        assert!(resample.wait(Duration::from_secs(10))? >= 1, "round {round}");
    }
    Ok(())
}

fn detached_notifier_raises_nothing(backend: &Backend) -> Outcome {
    let (mut machine, lines) = platform(backend, EDGE_LINE, false, 1)?;
    let (detached, attached) = (Notifier::new()?, Notifier::new()?);
    let notifiers = notifiers(&machine)?;
    let gsi = u32::from(EDGE_LINE);
    notifiers.attach_interrupt(gsi, &detached, None)?;
    notifiers.detach_interrupt(gsi, &detached)?;
    notifiers.attach_interrupt(gsi, &attached, None)?;
    detached.notify()?;
    lines.set_level(gsi, true)?;
    machine.run_to_end()?;
    assert_eq!(interrupts_seen(&machine)?, 1);
    assert_eq!(detached.take()?, 1, "nobody took the signal");
    let error = notifiers.detach_interrupt(gsi, &detached);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}

fn notifier_attaches_once(backend: &Backend) -> Outcome {
    let (machine, _lines) = platform(backend, EDGE_LINE, false, 1)?;
    let notifier = Notifier::new()?;
    let notifiers = notifiers(&machine)?;
    notifiers.attach_interrupt(EDGE_LINE.into(), &notifier, None)?;
    let error = notifiers.attach_interrupt(EDGE_LINE.into(), &notifier, None);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}

fn impossible_lines_and_routes_are_refused(backend: &Backend) -> Outcome {
    let (_machine, lines) = platform(backend, EDGE_LINE, false, 1)?;
    let error = lines.set_level(u32::MAX, true);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    for target in [
        GsiTarget::IoApic { pin: 24 },
        GsiTarget::Pic { pin: 16 },
        GsiTarget::Msi(MsiMessage { address: 0x1000, data: 0 }),
    ] {
        let error = lines.set_routes(&[GsiRoute::new(5, target)]);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{target:?}: {error:?}");
    }
    Ok(())
}
