//! Exact stops: at instruction counts and at guest times.

use std::thread;
use std::time::Duration;

use iced_x86::code_asm::{byte_ptr, dword_ptr, eax, ecx, qword_ptr, rax, rbx, rcx, rdi, rdx, rsi};
use vmm_cpu::state::CpuState;
use vmm_cpu::{ClockConfig, ClockSource, Error, ExactStop, ExactStops, Halt, InterruptMode, Vcpu, VmConfig};

use super::apic::{Registers, VECTOR, enable_local_apic, end_of_interrupt};
use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};

cases![
    absent_where_time_is_not_counted,
    stops_at_the_very_instruction,
    stops_at_the_very_time,
    halted_vcpu_stops_before_its_next_deadline,
    halted_vcpu_without_a_deadline_stops_too,
    what_was_reached_is_not_reached_again,
    stop_comes_before_what_is_due_at_the_same_point,
    stops_and_kicks_change_nothing,
];

fn config(backend: &Backend, mode: InterruptMode) -> Outcome<VmConfig> {
    let mut clock = ClockConfig::default();
    clock.source = ClockSource::Deterministic;
    let config = backend.config(mode)?.clock(clock);
    if matches!(backend.hypervisor.create_vm(&config), Err(Error::Unsupported { .. })) {
        return Err(Stop::skipped("no clock that counts instructions"));
    }
    Ok(config)
}

fn machine(backend: &Backend, mode: InterruptMode, image: &Image) -> Outcome<Machine> {
    Machine::with_config(backend, &config(backend, mode)?, image)
}

fn stops(vcpu: &mut dyn Vcpu) -> Outcome<&mut dyn ExactStops> {
    vcpu.exact_stops().ok_or_else(|| Stop::skipped("no exact stops"))
}

fn instructions(machine: &mut Machine) -> Outcome<u64> {
    Ok(stops(&mut *machine.vcpu)?.instructions())
}

fn time(machine: &Machine) -> Outcome<u64> {
    Ok(machine.vm.clock().ok_or_else(|| Stop::failed("a counted clock that is not there"))?.now()?)
}

fn run_to(machine: &mut Machine, stop: ExactStop) -> Outcome {
    stops(&mut *machine.vcpu)?.stop_at(stop);
    machine.run_until(&Halt::ExactStop)
}

/// INC RBX for ever, seven at a time.
fn counter() -> Outcome<Image> {
    let mut p = Program::new()?;
    let again = p.here()?;
    for _ in 0..7 {
        p.inc(rbx)?;
    }
    p.jmp(again)?;
    p.assemble()
}

fn absent_where_time_is_not_counted(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &counter()?)?;
    assert!(machine.vcpu.exact_stops().is_none());
    Ok(())
}

fn stops_at_the_very_instruction(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::External, &counter()?)?;
    assert_eq!(instructions(&mut machine)?, 0);
    // Within blocks, at their ends, and many blocks away.
    for count in [1, 2, 6, 7, 8, 9, 16, 1000, 1001, 123_456, 5_000_001] {
        run_to(&mut machine, ExactStop::none().at_instructions(count))?;
        assert_eq!((instructions(&mut machine)?, time(&machine)?), (count, count));
        assert_eq!(machine.vcpu.registers()?.rbx, count - count / 8, "{count}");
    }
    Ok(())
}

fn stops_at_the_very_time(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::External, &counter()?)?;
    for nanoseconds in [1, 12, 13, 2_000_003] {
        run_to(&mut machine, ExactStop::none().at_guest_time(nanoseconds))?;
        assert_eq!((instructions(&mut machine)?, time(&machine)?), (nanoseconds, nanoseconds));
    }
    // What comes first.
    run_to(&mut machine, ExactStop::none().at_guest_time(3_000_000).at_instructions(2_500_000))?;
    assert_eq!(time(&machine)?, 2_500_000);
    // The other one is still asked for.
    machine.run_until(&Halt::ExactStop)?;
    assert_eq!(time(&machine)?, 3_000_000);
    Ok(())
}

/// A local APIC whose timer goes off once, after `ticks` of it, and HLT; then RBX is 1.
fn sleeper(ticks: Option<u32>) -> Outcome<Image> {
    let local_apic = 0xfee0_0000_u64;
    let mut p = Program::new()?;
    enable_local_apic(&mut p, Registers::Mmio)?;
    if let Some(ticks) = ticks {
        for (register, value) in [(0x3e0, 0b1011), (0x320, u32::from(VECTOR)), (0x380, ticks)] {
            p.mov(rax, local_apic + register)?;
            p.mov(dword_ptr(rax), value)?;
        }
    }
    p.sti()?;
    p.hlt()?;
    p.end()?;
    p.handler(VECTOR)?;
    p.mov(rbx, 1_u64)?;
    end_of_interrupt(&mut p, Registers::Mmio)?;
    p.iretq()?;
    p.assemble()
}

fn halted_vcpu_stops_before_its_next_deadline(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::LocalApic, &sleeper(Some(1_000_000))?)?;
    run_to(&mut machine, ExactStop::none().at_guest_time(400_000))?;
    let halted_at = instructions(&mut machine)?;
    assert!(halted_at < 1000, "{halted_at}");
    assert_eq!((time(&machine)?, machine.vcpu.registers()?.rbx), (400_000, 0));
    run_to(&mut machine, ExactStop::none().at_guest_time(400_001))?;
    assert_eq!((instructions(&mut machine)?, time(&machine)?), (halted_at, 400_001));
    // An instruction count does not keep it from sleeping on.
    run_to(&mut machine, ExactStop::none().at_instructions(halted_at + 1))?;
    assert_eq!(machine.vcpu.registers()?.rbx, 1);
    let woken = time(&machine)?;
    assert!((1_000_000..1_000_100).contains(&woken), "{woken}");
    machine.run_to_end()
}

fn halted_vcpu_without_a_deadline_stops_too(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::LocalApic, &sleeper(None)?)?;
    run_to(&mut machine, ExactStop::none().at_guest_time(7_000_000_000))?;
    assert_eq!(time(&machine)?, 7_000_000_000);
    Ok(())
}

fn what_was_reached_is_not_reached_again(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::External, &counter()?)?;
    run_to(&mut machine, ExactStop::none().at_instructions(10))?;
    // One that lies behind is reached at once.
    run_to(&mut machine, ExactStop::none().at_instructions(3))?;
    assert_eq!(instructions(&mut machine)?, 10);
    let handle = machine.vcpu.handle();
    let kicker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        handle.kick();
    });
    machine.run_until(&Halt::Interrupted)?;
    kicker.join().expect("the kicker's thread ends");
    assert!(instructions(&mut machine)? > 10);
    Ok(())
}

fn stop_comes_before_what_is_due_at_the_same_point(backend: &Backend) -> Outcome {
    let mut machine = machine(backend, InterruptMode::LocalApic, &sleeper(Some(1_000_000))?)?;
    // The timer was started by the last instruction but two before the HLT, whose time is that of its start.
    run_to(&mut machine, ExactStop::none().at_guest_time(500_000))?;
    let due = instructions(&mut machine)? - 3 + 1_000_000;
    run_to(&mut machine, ExactStop::none().at_guest_time(due))?;
    assert_eq!(machine.vcpu.save()?.run_state, vmm_cpu::state::RunState::Halted);
    run_to(&mut machine, ExactStop::none().at_guest_time(due + 1))?;
    assert_eq!(machine.vcpu.registers()?.rbx, 1, "the timer is late");
    Ok(())
}

/// A guest that has a bit of everything: a periodic timer that it sometimes waits for, string instructions that change code,
/// reach devices and cross pages, reads of time, accessed bits that it clears without a flush.
fn busy() -> Outcome<Image> {
    let (local_apic, copy) = (0xfee0_0000_u64, layout::DATA + 0x8000);
    let mut p = Program::new()?;
    enable_local_apic(&mut p, Registers::Mmio)?;
    for (register, value) in [(0x3e0, 0b1011), (0x320, 1 << 17 | u32::from(VECTOR)), (0x380, 20_011)] {
        p.mov(rax, local_apic + register)?;
        p.mov(dword_ptr(rax), value)?;
    }
    p.sti()?;
    let again = p.here()?;
    p.inc(rbx)?;
    // Code that is new each time: MOV EAX, number; RET.
    p.mov(rdi, copy)?;
    p.mov(byte_ptr(rdi), 0xb8)?;
    p.mov(dword_ptr(rdi + 1), ecx)?;
    p.mov(byte_ptr(rdi + 5), 0xc3)?;
    p.call(rdi)?;
    p.add(rdi, 0xff8)?;
    p.mov(rcx, 0x1234_u64)?;
    p.rep().stosb()?;
    p.mov(rsi, layout::DATA)?;
    p.mov(rdi, layout::MMIO)?;
    p.mov(rcx, 5_u64)?;
    p.rep().movsd()?;
    // Accessed bits of the page tables go, and nothing is flushed.
    p.mov(rsi, layout::PAGE_TABLES + 0x2000)?;
    p.and(qword_ptr(rsi), !0x60)?;
    p.mov(rdx, local_apic + 0x390)?;
    p.mov(eax, dword_ptr(rdx))?;
    p.add(dword_ptr(layout::DATA + 0x7000), eax)?;
    p.rdtsc()?;
    p.add(dword_ptr(layout::DATA + 0x7004), eax)?;
    p.mov(rcx, qword_ptr(rsi))?;
    p.add(qword_ptr(layout::DATA + 0x7008), rcx)?;
    p.test(rbx, 7)?;
    p.jnz(again)?;
    p.hlt()?;
    p.jmp(again)?;
    p.handler(VECTOR)?;
    p.push(rax)?;
    p.rdtsc()?;
    p.add(dword_ptr(layout::DATA + 0x7010), eax)?;
    p.add(qword_ptr(layout::DATA + 0x7018), rcx)?;
    end_of_interrupt(&mut p, Registers::Mmio)?;
    p.pop(rax)?;
    p.iretq()?;
    p.assemble()
}

/// What can be seen of a machine at a moment.
type Picture = (u64, u64, CpuState, Vec<u8>);

fn picture(machine: &mut Machine) -> Outcome<Picture> {
    let bytes = machine.bytes(0, usize::try_from(layout::RAM_SIZE)?)?;
    Ok((instructions(machine)?, time(machine)?, machine.vcpu.save()?, bytes))
}

fn stops_and_kicks_change_nothing(backend: &Backend) -> Outcome {
    const POINTS: [u64; 5] = [5000, 33_333, 33_334, 70_001, 110_000];
    let (config, image) = (config(backend, InterruptMode::LocalApic)?, busy()?);
    // With further stops every so many instructions or nanoseconds, kicks every so many microseconds, and a dirty log.
    let run = |instructions_apart: u64, time_apart: u64, kicks: u64, log: bool| -> Outcome<Vec<Picture>> {
        let mut machine = Machine::with_config(backend, &config, &image)?;
        let regions = machine.ram.regions();
        let logs = if log { machine.vm.dirty_log() } else { None };
        if let Some(log) = &logs {
            for region in &regions {
                log.start(vmm_cpu::vmm_memory::vm_memory::GuestMemoryRegion::start_addr(&**region))?;
            }
        }
        let handle = machine.vcpu.handle();
        let kicker = thread::spawn(move || {
            for _ in 0..kicks {
                handle.kick();
                thread::sleep(Duration::from_micros(30));
            }
        });
        let mut pictures = Vec::new();
        for point in POINTS {
            loop {
                let (done, now) = (instructions(&mut machine)?, time(&machine)?);
                if done == point {
                    break;
                }
                let stop = ExactStop::none()
                    .at_instructions(point.min(done + instructions_apart))
                    .at_guest_time(now + time_apart);
                stops(&mut *machine.vcpu)?.stop_at(stop);
                let halt = machine.vcpu.run(&mut machine.bus)?;
                assert!(matches!(halt, Halt::ExactStop | Halt::Interrupted), "{halt:?}");
                if let Some(log) = &logs {
                    for region in &regions {
                        let mut dirty = vmm_cpu::vmm_memory::PageBitmap::for_region(region);
                        log.harvest(region, &mut dirty).map_err(|error| Stop::failed(error.to_string()))?;
                    }
                }
            }
            pictures.push(picture(&mut machine)?);
        }
        kicker.join().expect("the kicker's thread ends");
        Ok(pictures)
    };
    let undisturbed = run(u64::MAX / 2, u64::MAX / 2, 0, false)?;
    for (instructions_apart, time_apart, kicks, log) in [
        (u64::MAX / 2, u64::MAX / 2, 400, false),
        (997, 1409, 0, true),
        (3, 500, 0, false),
        (107, 641, 200, true),
    ] {
        let disturbed = run(instructions_apart, time_apart, kicks, log)?;
        for (a, b) in undisturbed.iter().zip(&disturbed) {
            assert_eq!((a.0, a.1), (b.0, b.1));
            assert!(a.2 == b.2, "at {}: {:#?}\n{:#?}", a.0, a.2, b.2);
            let different = a.3.iter().zip(&b.3).position(|(a, b)| a != b);
            assert_eq!(different, None, "memory at instruction {}", a.0);
        }
    }
    Ok(())
}
