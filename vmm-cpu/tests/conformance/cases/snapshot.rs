//! Saving and restoring: in the middle of a computation, into a fresh machine, and across backends.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::{al, cl, dx, eax, ecx, esi, ptr, rax, rbx, rcx, rdx};
use vmm_cpu::state::{BackendBlob, CpuState, RunState, XsaveArea};
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::{ClockConfig, Halt, InterruptMode, Vcpu, VcpuHandle, VcpuIo, Vm, VmConfig};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, copy_ram, guest_ram, layout};
use crate::suite::program::{END_PORT, Image, Program};
use crate::suite::recorder::Access;

cases![
    moved_in_the_middle_many_times_the_result_is_the_same,
    moved_with_a_platform_the_result_is_the_same,
    moved_to_other_backends_and_back_the_result_is_the_same,
    restored_state_saves_the_same,
    saving_changes_nothing,
    vector_registers_survive,
    halted_vcpu_stays_halted,
    asserted_interrupt_survives,
    queued_nmi_survives,
    kick_is_no_state,
    access_whose_callback_panicked_is_not_repeated,
    blob_of_another_backend_is_ignored,
    empty_optional_elements_are_allowed,
];

/// How many steps the computation takes.
const ITERATIONS: u32 = 12_000;

/// A computation over registers, memory and ports: each step mixes RAX and a word of memory; every 16th also
/// takes a number from the device, and every 64th gives it 16 bytes from two pages by a string instruction.
fn computation() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(ecx, ITERATIONS)?;
    p.mov(rax, 0x1234_5678_9abc_def0_u64)?;
    let step = p.here()?;
    let mut next = p.create_label();
    p.imul_3(rax, rax, 0x5851_f42d)?;
    p.add(rax, rcx)?;
    p.mov(rdx, rax)?;
    p.and(rdx, 0xff8)?;
    p.xor(ptr(rdx + layout::DATA), rax)?;
    p.test(cl, 15)?;
    p.jnz(next)?;
    p.mov(rbx, rax)?;
    p.mov(dx, 0x300)?;
    p.in_(eax, dx)?;
    p.add(rax, rbx)?;
    p.test(cl, 63)?;
    p.jnz(next)?;
    p.push(rcx)?;
    p.mov(esi, u32::try_from(layout::DATA + 0xff8)?)?;
    p.mov(ecx, 16)?;
    p.rep().outsb()?;
    p.pop(rcx)?;
    p.set_label(&mut next)?;
    p.dec(rcx)?;
    p.jnz(step)?;
    p.mov(ptr(layout::DATA + 0x1000), rax)?;
    p.end()?;
    p.assemble()
}

/// The device of the computation: part of the machine's state that moves with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    given: u32,
    /// A hash of the bytes taken.
    taken: u64,
    ended: bool,
}

/// The device on the bus of one machine, where it may ask for a kick after so many accesses.
struct DeviceBus<'a> {
    device: &'a mut Device,
    kick_after: Option<u64>,
    handle: Arc<dyn VcpuHandle>,
}

impl DeviceBus<'_> {
    fn count(&mut self) {
        match &mut self.kick_after {
            Some(0) => self.handle.kick(),
            Some(left) => *left -= 1,
            None => {}
        }
    }
}

impl VcpuIo for DeviceBus<'_> {
    fn pio_read(&mut self, _port: u16, _size: usize, data: &mut [u8]) {
        self.count();
        self.device.given = self.device.given.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        data.copy_from_slice(&self.device.given.to_le_bytes()[..data.len()]);
    }

    fn pio_write(&mut self, port: u16, _size: usize, data: &[u8]) {
        if port == END_PORT {
            self.device.ended = true;
            self.handle.kick();
            return;
        }
        self.count();
        for byte in data {
            self.device.taken = (self.device.taken ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// A machine that a computation moves through.
struct Host {
    vcpu: Box<dyn Vcpu>,
    vm: Arc<dyn Vm>,
    ram: GuestRam,
}

impl Host {
    fn new(backend: &Backend, config: &VmConfig) -> Outcome<Self> {
        let machine = Machine::with_config(backend, config, &computation()?)?;
        Ok(Self { vcpu: machine.vcpu, vm: machine.vm, ram: machine.ram })
    }

    /// The same machine in a new process, so to speak; its clock and controllers too, if the backend is the same.
    fn moved(mut self, to: &Backend, config: &VmConfig, same_backend: bool) -> Outcome<Self> {
        let cpu = self.vcpu.save()?;
        let ram = guest_ram()?;
        copy_ram(&self.ram, &ram)?;
        let vm = if same_backend {
            to.hypervisor.restore_vm(config, &self.vm.save()?)?
        } else {
            to.hypervisor.create_vm(config)?
        };
        vm.map_ram(&ram)?;
        Ok(Self { vcpu: vm.restore_vcpu(0, &cpu)?, vm, ram })
    }

    /// Runs the computation on until it ends or a kick comes: after `accesses` of them, or after `time`.
    fn run(&mut self, device: &mut Device, accesses: Option<u64>, time: Option<Duration>) -> Outcome {
        let handle = self.vcpu.handle();
        let timer = time.map(|time| {
            let handle = Arc::clone(&handle);
            thread::spawn(move || {
                thread::sleep(time);
                handle.kick();
            })
        });
        let halt = self.vcpu.run(&mut DeviceBus { device, kick_after: accesses, handle });
        if let Some(timer) = timer {
            timer.join().expect("the timer's thread ends");
        }
        match halt? {
            Halt::Interrupted => Ok(()),
            other => Err(Stop::failed(format!("{other:?}"))),
        }
    }

    /// Result in memory and at the device.
    fn result(&self, device: &Device) -> Outcome<(Vec<u8>, Device)> {
        use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
        let mut memory = vec![0; 0x1008];
        self.ram.memory().read_slice(&mut memory, GuestAddress(layout::DATA))?;
        Ok((memory, device.clone()))
    }
}

/// The result of the computation that nobody interrupts.
fn undisturbed(backend: &Backend, config: &VmConfig) -> Outcome<(Vec<u8>, Device)> {
    let mut host = Host::new(backend, config)?;
    let mut device = Device::default();
    host.run(&mut device, None, None)?;
    assert!(device.ended);
    host.result(&device)
}

/// Moves the computation from machine to machine, by turns among `places`, for at most `rounds` rounds.
fn moved_around(places: &[(&Backend, &VmConfig)], rounds: usize) -> Outcome {
    let (first, first_config) = places[0];
    let expected = undisturbed(first, first_config)?;
    let mut host = Host::new(first, first_config)?;
    let mut device = Device::default();
    let (mut random, mut done) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    let mut from = first.hypervisor.name();
    while !device.ended && done < rounds {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if random & 0xf == 0 {
            // Also bounded by accesses, so that a fast backend has something left for the other rounds.
            host.run(&mut device, Some(16), Some(Duration::from_micros(random >> 8 & 0x3f)))?;
        } else {
            host.run(&mut device, Some(random >> 8 & 3), None)?;
        }
        let (to, config) = places[(done + 1) % places.len()];
        host = host.moved(to, config, to.hypervisor.name() == from)?;
        from = to.hypervisor.name();
        done += 1;
    }
    assert!(done >= rounds / 2, "{done} rounds until the end");
    if !device.ended {
        host.run(&mut device, None, None)?;
    }
    assert!(host.result(&device)? == expected, "another result after {done} rounds");
    Ok(())
}

fn moved_in_the_middle_many_times_the_result_is_the_same(backend: &Backend) -> Outcome {
    moved_around(&[(backend, &backend.config(InterruptMode::External)?)], 300)
}

fn moved_with_a_platform_the_result_is_the_same(backend: &Backend) -> Outcome {
    moved_around(&[(backend, &backend.config(InterruptMode::Platform)?)], 30)
}

/// Every second machine is of another backend, at the same rate of the time-stamp counter.
fn moved_to_other_backends_and_back_the_result_is_the_same(backend: &Backend) -> Outcome {
    let others = backend.others();
    if others.is_empty() {
        return Err(Stop::skipped("there is no other backend here"));
    }
    for other in others {
        let (own, foreign) = at_one_rate(backend, &other)?;
        moved_around(&[(backend, &own), (&other, &foreign)], 60)?;
    }
    Ok(())
}

/// Configurations of two backends with one rate of the time-stamp counter: the own one of either.
fn at_one_rate(a: &Backend, b: &Backend) -> Outcome<(VmConfig, VmConfig)> {
    let own_rate = |backend: &Backend| -> Outcome<Option<u32>> {
        let vm = backend.hypervisor.create_vm(&backend.config(InterruptMode::External)?)?;
        let _vcpu = vm.create_vcpu(0)?;
        Ok(vm.clock().map(|clock| clock.tsc_khz()))
    };
    let (of_a, of_b) = (a.config(InterruptMode::External)?, b.config(InterruptMode::External)?);
    let (Some(rate_of_a), Some(rate_of_b)) = (own_rate(a)?, own_rate(b)?) else { return Ok((of_a, of_b)) };
    let a_like_b = of_a.clone().clock(ClockConfig::host_at_khz(rate_of_b));
    let b_like_a = of_b.clone().clock(ClockConfig::host_at_khz(rate_of_a));
    if a.hypervisor.create_vm(&a_like_b).is_ok() {
        Ok((a_like_b, of_b))
    } else if b.hypervisor.create_vm(&b_like_a).is_ok() {
        Ok((of_a, b_like_a))
    } else {
        Err(Stop::skipped(format!("{a:?} and {b:?} have no common rate of the time-stamp counter")))
    }
}

/// A fresh machine, restored from `state`, with a copy of the memory of `from`.
fn restored(backend: &Backend, from: &Machine, state: &CpuState) -> Outcome<Machine> {
    from.copy(backend, &backend.config(InterruptMode::External)?, state)
}

/// The state without what time changes: the counter, and what is derived from it.
fn timeless(mut state: CpuState) -> CpuState {
    let tsc_and_deadline = [0x10, 0x6e0];
    state.msrs.retain(|msr| !tsc_and_deadline.contains(&msr.index));
    state
}

fn in_the_middle(backend: &Backend) -> Outcome<Machine> {
    let mut p = Program::new()?;
    p.mov(eax, 1)?;
    p.stc()?;
    p.in_(al, 0x10)?;
    p.checkpoint()?;
    p.mov(ptr(layout::DATA), rax)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.input.push_back(0x77);
    machine.run_to_end()?;
    Ok(machine)
}

fn restored_state_saves_the_same(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    let state = machine.vcpu.save()?;
    let mut again = restored(backend, &machine, &state)?;
    assert_eq!(timeless(again.vcpu.save()?), timeless(state));
    again.run_to_end()?;
    assert_eq!(again.word(layout::DATA)?, 0x77);
    Ok(())
}

fn saving_changes_nothing(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    let first = machine.vcpu.save()?;
    assert_eq!(timeless(machine.vcpu.save()?), timeless(first));
    machine.run_to_end()?;
    assert_eq!(machine.word(layout::DATA)?, 0x77);
    Ok(())
}

fn vector_registers_survive(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    let mut state = machine.vcpu.save()?;
    let mut bytes = state.xsave.bytes().to_vec();
    // XMM3 and x87 register 2, and the bits that say that x87 and SSE hold something.
    bytes[208..224].copy_from_slice(&0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.to_le_bytes());
    bytes[64..74].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    bytes[512] |= 3;
    state.xsave = XsaveArea::from_bytes(bytes).ok_or_else(|| Stop::failed("an area of the same size"))?;
    let saved = restored(backend, &machine, &state)?.vcpu.save()?;
    assert_eq!(saved.xsave.xmm(3), Some(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff));
    assert_eq!(saved.xsave.bytes()[64..74], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(saved.xsave.xstate_bv() & 3, 3);
    Ok(())
}

const VECTOR: u8 = 0x21;

/// A guest that halts with interrupts on; what wakes it reports itself.
fn halting_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.sti()?;
    p.hlt()?;
    p.report(0x10, 9)?;
    p.end()?;
    for vector in [2, VECTOR] {
        p.handler(vector)?;
        p.report(0x10, vector)?;
        p.iretq()?;
    }
    p.assemble()
}

fn halted_vcpu_stays_halted(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    let state = machine.vcpu.save()?;
    assert_eq!(state.run_state, RunState::Halted);
    let mut again = restored(backend, &machine, &state)?;
    again.run_until(&Halt::Halted)?;
    assert_eq!(again.bus.log, []);
    again.bus.vectors.push_back(VECTOR);
    again.vcpu.handle().set_intr(true)?;
    again.run_to_end()?;
    assert_eq!(again.bus.output(0x10), [VECTOR, 9]);
    Ok(())
}

fn asserted_interrupt_survives(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    machine.vcpu.handle().set_intr(true)?;
    let state = machine.vcpu.save()?;
    assert!(state.events.intr);
    let mut again = restored(backend, &machine, &state)?;
    again.bus.vectors.push_back(VECTOR);
    again.run_to_end()?;
    assert_eq!(again.bus.log.first(), Some(&Access::Acknowledge(Some(VECTOR))));
    assert_eq!(again.bus.output(0x10), [VECTOR, 9]);
    Ok(())
}

fn queued_nmi_survives(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting_guest()?)?;
    machine.run_until(&Halt::Halted)?;
    machine.vcpu.handle().nmi()?;
    let state = machine.vcpu.save()?;
    let mut again = restored(backend, &machine, &state)?;
    again.run_to_end()?;
    assert_eq!(again.bus.output(0x10), [2, 9]);
    machine.run_to_end()?;
    assert_eq!(machine.bus.output(0x10), [2, 9], "the saved vCPU still has it too");
    Ok(())
}

fn kick_is_no_state(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    machine.vcpu.handle().kick();
    let state = machine.vcpu.save()?;
    restored(backend, &machine, &state)?.run_to_end()?;
    machine.bus.ended = false;
    machine.run_until(&Halt::Interrupted)?;
    assert!(!machine.bus.ended, "the kick is answered first");
    machine.run_to_end()
}

/// Panics at every OUT.
struct Broken;

impl VcpuIo for Broken {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        std::panic::panic_any("no such device");
    }
}

fn access_whose_callback_panicked_is_not_repeated(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.report(0x44, 1)?;
    p.report(0x45, 2)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let run = AssertUnwindSafe(|| machine.vcpu.run(&mut Broken));
    assert!(std::panic::catch_unwind(run).is_err(), "the panic comes through");
    let state = machine.vcpu.save()?;
    let mut copy = restored(backend, &machine, &state)?;
    copy.run_to_end()?;
    assert_eq!(copy.bus.log, [Access::Out { port: 0x45, size: 1, data: vec![2] }]);
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, copy.bus.log);
    Ok(())
}

fn blob_of_another_backend_is_ignored(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    let blob = BackendBlob { backend: "some other".to_owned(), version: 7, data: vec![0xff; 1000] };
    let mut state = machine.vcpu.save()?;
    state.backend = Some(blob.clone());
    let mut vm = machine.vm.save()?;
    vm.backend = Some(blob);
    drop(backend.hypervisor.restore_vm(&backend.config(InterruptMode::External)?, &vm)?);
    let mut again = restored(backend, &machine, &state)?;
    again.run_to_end()?;
    assert_eq!(again.word(layout::DATA)?, 0x77);
    Ok(())
}

/// A state that a simpler backend wrote: no MSRs, no local APIC, x87 and SSE as after reset.
fn empty_optional_elements_are_allowed(backend: &Backend) -> Outcome {
    let mut machine = in_the_middle(backend)?;
    let full = machine.vcpu.save()?;
    let mut state = CpuState::at_reset();
    state.general = full.general;
    state.system = full.system;
    let mut again = restored(backend, &machine, &state)?;
    again.run_to_end()?;
    assert_eq!(again.word(layout::DATA)?, 0x77);
    Ok(())
}
