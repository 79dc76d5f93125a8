//! The virtual machine's clock and the time-stamp counter.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{dword_ptr, eax, edx, qword_ptr, rax, rbx, rdi};
use vmm_cpu::{ClockConfig, ClockSource, Error, InterruptMode, VmClock};

use super::apic::{Registers, VECTOR, enable_local_apic, end_of_interrupt};
use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;

cases![
    rate_is_known_before_the_first_vcpu,
    time_passes_at_the_rate_that_is_told,
    counter_is_told_as_the_guest_reads_it,
    clock_stands_still_while_paused,
    counter_stands_still_while_paused,
    pauses_add_up,
    no_vcpu_runs_while_paused,
    rate_can_be_asked_for,
    clocks_that_cannot_be_are_refused,
    counted_time_interrupts_at_exact_instructions,
];

const PAUSE: Duration = Duration::from_millis(300);

/// A guest that reads its time-stamp counter each time it is run.
fn machine(backend: &Backend, clock: ClockConfig) -> Outcome<(Machine, Arc<dyn VmClock>)> {
    let mut p = Program::new()?;
    let again = p.here()?;
    p.rdtsc()?;
    p.mov(dword_ptr(layout::DATA), eax)?;
    p.mov(dword_ptr(layout::DATA + 4), edx)?;
    p.checkpoint()?;
    p.jmp(again)?;
    let config = backend.config(InterruptMode::External)?.clock(clock);
    let machine = Machine::with_config(backend, &config, &p.assemble()?)?;
    let clock = machine.vm.clock().ok_or_else(|| Stop::skipped("no clock"))?;
    Ok((machine, clock))
}

/// The guest's counter in nanoseconds.
fn guest_time(machine: &mut Machine, clock: &dyn VmClock) -> Outcome<Duration> {
    machine.run_to_end()?;
    let nanoseconds = u128::from(machine.word(layout::DATA)?) * 1_000_000 / u128::from(clock.tsc_khz());
    Ok(Duration::from_nanos(u64::try_from(nanoseconds)?))
}

fn rate_is_known_before_the_first_vcpu(backend: &Backend) -> Outcome {
    let vm = backend.hypervisor.create_vm(&backend.config(InterruptMode::External)?)?;
    let clock = vm.clock().ok_or_else(|| Stop::skipped("no clock"))?;
    let before = clock.tsc_khz();
    let _vcpu = vm.create_vcpu(0)?;
    assert_eq!(before, clock.tsc_khz());
    Ok(())
}

fn time_passes_at_the_rate_that_is_told(backend: &Backend) -> Outcome {
    let (mut machine, clock) = machine(backend, ClockConfig::default())?;
    let outer = Instant::now();
    let (first, first_now) = (guest_time(&mut machine, &*clock)?, clock.now()?);
    let inner = Instant::now();
    thread::sleep(PAUSE);
    let least = inner.elapsed();
    let (second, second_now) = (guest_time(&mut machine, &*clock)?, clock.now()?);
    let most = outer.elapsed();
    // Clocks disagree by less than one in a hundred.
    for passed in [second - first, Duration::from_nanos(second_now - first_now)] {
        assert!(
            passed >= least.mul_f64(0.99) && passed <= most.mul_f64(1.01),
            "{least:?} {passed:?} {most:?}"
        );
    }
    Ok(())
}

fn counter_is_told_as_the_guest_reads_it(backend: &Backend) -> Outcome {
    const TSC: u32 = 0x10;
    let (mut machine, _) = machine(backend, ClockConfig::default())?;
    let mut last = 0;
    for round in 0..150 {
        machine.run_to_end()?;
        let before = machine.word(layout::DATA)?;
        let told = [machine.vcpu.msr(TSC)?, machine.vcpu.msr(TSC)?];
        machine.run_to_end()?;
        let order = [last, before, told[0], told[1], machine.word(layout::DATA)?];
        assert!(order.is_sorted(), "round {round}: {order:?}");
        last = order[4];
        if round % 50 == 49 {
            thread::sleep(PAUSE / 2);
        }
    }
    Ok(())
}

fn clock_stands_still_while_paused(backend: &Backend) -> Outcome {
    let (_machine, clock) = machine(backend, ClockConfig::default())?;
    clock.pause()?;
    let at_pause = clock.now()?;
    thread::sleep(PAUSE);
    assert_eq!(clock.now()?, at_pause);
    clock.pause()?;
    assert_eq!(clock.now()?, at_pause, "pausing twice is pausing once");
    let resumed = Instant::now();
    clock.resume()?;
    clock.resume()?;
    let passed = Duration::from_nanos(clock.now()? - at_pause);
    assert!(passed <= resumed.elapsed() + Duration::from_millis(1), "{passed:?}");
    Ok(())
}

fn counter_stands_still_while_paused(backend: &Backend) -> Outcome {
    let (mut machine, clock) = machine(backend, ClockConfig::default())?;
    let outer = Instant::now();
    let before = guest_time(&mut machine, &*clock)?;
    for _ in 0..2 {
        clock.pause()?;
        thread::sleep(PAUSE);
        clock.pause()?;
        clock.resume()?;
    }
    let after = guest_time(&mut machine, &*clock)?;
    let awake = outer.elapsed() - 2 * PAUSE;
    assert!(after >= before, "never backwards: {before:?} {after:?}");
    let passed = after - before;
    assert!(
        passed <= awake + Duration::from_millis(1),
        "{passed:?} passed for the guest, awake for {awake:?}"
    );
    Ok(())
}

/// Several pauses between two runs, and a vCPU that had not run before the first.
fn pauses_add_up(backend: &Backend) -> Outcome {
    let (mut machine, clock) = machine(backend, ClockConfig::default())?;
    let (start, start_now) = (Instant::now(), clock.now()?);
    for _ in 0..3 {
        clock.pause()?;
        thread::sleep(PAUSE);
        clock.resume()?;
    }
    let first = guest_time(&mut machine, &*clock)?;
    let passed = Duration::from_nanos(clock.now()? - start_now);
    let awake = start.elapsed() - 3 * PAUSE;
    assert!(passed <= awake + Duration::from_millis(1), "{passed:?} passed, awake for {awake:?}");
    assert!(guest_time(&mut machine, &*clock)? >= first);
    Ok(())
}

fn no_vcpu_runs_while_paused(backend: &Backend) -> Outcome {
    let (mut machine, clock) = machine(backend, ClockConfig::default())?;
    clock.pause()?;
    let error = machine.vcpu.run(&mut machine.bus);
    assert!(matches!(error, Err(Error::Unsupported { .. })), "{error:?}");
    clock.resume()?;
    machine.run_to_end()
}

fn rate_can_be_asked_for(backend: &Backend) -> Outcome {
    let (_, clock) = machine(backend, ClockConfig::default())?;
    let own = clock.tsc_khz();
    assert!(own > 0);
    // The rate that it has anyway is always possible.
    let (_, clock) = machine(backend, ClockConfig::host_at_khz(own))?;
    assert_eq!(clock.tsc_khz(), own);
    if !backend.hypervisor.capabilities().tsc_scaling {
        return Err(Stop::skipped("the host cannot scale the time-stamp counter"));
    }
    let (mut machine, clock) = machine(backend, ClockConfig::host_at_khz(own / 2))?;
    assert_eq!(clock.tsc_khz(), own / 2);
    let first = guest_time(&mut machine, &*clock)?;
    thread::sleep(PAUSE);
    let passed = guest_time(&mut machine, &*clock)? - first;
    assert!(passed >= PAUSE.mul_f64(0.99) && passed < 2 * PAUSE, "{passed:?}");
    Ok(())
}

fn clocks_that_cannot_be_are_refused(backend: &Backend) -> Outcome {
    let config = backend.config(InterruptMode::External)?;
    let create = |clock| backend.hypervisor.create_vm(&config.clone().clock(clock));
    let mut deterministic = ClockConfig::default();
    deterministic.source = ClockSource::Deterministic;
    let result = create(deterministic);
    assert!(matches!(result, Ok(_) | Err(Error::Unsupported { .. })), "{result:?}");
    let result = create(ClockConfig::host_at_khz(0));
    assert!(matches!(result, Err(Error::InvalidArgument { .. })), "{result:?}");
    if !backend.hypervisor.capabilities().tsc_scaling {
        let result = create(ClockConfig::host_at_khz(1_234_567));
        assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    }
    Ok(())
}

/// With a clock that counts instructions, a periodic timer interrupts every so many of them, and kicks from outside change
/// nothing.
fn counted_time_interrupts_at_exact_instructions(backend: &Backend) -> Outcome {
    const PERIOD: u64 = 20_011;
    const INTERRUPTS: u64 = 200;
    let mut clock = ClockConfig::default();
    clock.source = ClockSource::Deterministic;
    let config = backend.config(InterruptMode::LocalApic)?.clock(clock);
    if matches!(backend.hypervisor.create_vm(&config), Err(Error::Unsupported { .. })) {
        return Err(Stop::skipped("no clock that counts instructions"));
    }

    let (local_apic, end) = (0xfee0_0000_u64, layout::DATA + 16 * INTERRUPTS);
    let mut p = Program::new()?;
    enable_local_apic(&mut p, Registers::Mmio)?;
    let (divide_by_1, periodic) = (0b1011, 1 << 17 | u32::from(VECTOR));
    let period = u32::try_from(PERIOD)?;
    p.mov(rdi, layout::DATA)?;
    for (register, value) in [(0x3e0, divide_by_1), (0x320, periodic), (0x380, period)] {
        p.mov(rax, local_apic + register)?;
        p.mov(dword_ptr(rax), value)?;
    }
    p.sti()?;
    let again = p.here()?;
    p.inc(rbx)?;
    p.cmp(rdi, i32::try_from(end)?)?;
    p.jb(again)?;
    p.cli()?;
    p.end()?;
    p.handler(VECTOR)?;
    p.push(rax)?;
    p.rdtsc()?;
    p.mov(dword_ptr(rdi), eax)?;
    p.mov(dword_ptr(rdi + 4), edx)?;
    p.mov(qword_ptr(rdi + 8), rbx)?;
    p.add(rdi, 16)?;
    end_of_interrupt(&mut p, Registers::Mmio)?;
    p.pop(rax)?;
    p.iretq()?;
    let image = p.assemble()?;

    let run = |kicks: u64| -> Outcome<(Vec<u8>, u64)> {
        let mut machine = Machine::with_config(backend, &config, &image)?;
        let handle = machine.vcpu.handle();
        let kicker = thread::spawn(move || {
            for _ in 0..kicks {
                handle.kick();
                thread::sleep(Duration::from_micros(50));
            }
        });
        while !machine.bus.ended {
            machine.vcpu.run(&mut machine.bus)?;
        }
        kicker.join().expect("the kicker's thread ends");
        let length = usize::try_from(16 * INTERRUPTS)?;
        Ok((machine.bytes(layout::DATA, length)?, machine.vcpu.registers()?.rbx))
    };
    let (undisturbed, kicked) = (run(0)?, run(200)?);
    assert!(undisturbed == kicked, "kicks change what the guest does");
    let (stamps, _) = undisturbed.0.as_chunks::<16>();
    let times: Vec<u64> = stamps
        .iter()
        .map(|[a, b, c, d, e, f, g, h, ..]| u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))
        .collect();
    for pair in times.windows(2) {
        assert_eq!(pair[1] - pair[0], PERIOD, "{times:?}");
    }
    Ok(())
}
