//! Several vCPUs: INIT and SIPI.

use iced_x86::code_asm::{bx, byte_ptr, dword_ptr, eax, ebx, rax, word_ptr};
use vmm_cpu::state::RunState;
use vmm_cpu::{EmptyBus, InterruptMode, Vcpu, VcpuIo, VcpuThreads};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};

cases![
    init_and_sipi_bring_up_four_vcpus_with_local_apics,
    init_and_sipi_bring_up_four_vcpus_with_a_platform,
    no_vcpu_starts_by_itself,
    restored_vcpu_still_waits_for_init,
];

const VCPUS: u32 = 4;
/// How many further vCPUs have started; behind it a byte for each.
const STARTED: u64 = 0x9000;
const STARTED_BYTES: u64 = 0x9010;

/// Real-mode code of the further vCPUs: each marks its byte, counts itself, and halts for good.
fn trampoline() -> Outcome<Image> {
    let mut p = Program::of_bits(16)?;
    p.mov(eax, 1)?;
    p.cpuid()?;
    p.shr(ebx, 24)?;
    p.mov(byte_ptr(bx + STARTED_BYTES), 1)?;
    p.lock().inc(word_ptr(STARTED))?;
    p.cli()?;
    let forever = p.here()?;
    p.hlt()?;
    p.jmp(forever)?;
    p.assemble_at(layout::TRAMPOLINE)
}

/// The first vCPU: sends INIT and, if `sipi`, SIPI to all others.
fn first_vcpu(sipi: bool) -> Outcome<Image> {
    let (spurious, command) = (0xfee0_00f0_u64, 0xfee0_0300_u64);
    let (init, start_up) = (0x000c_4500, 0x000c_4600 | u32::try_from(layout::TRAMPOLINE >> 12)?);
    let mut p = Program::new()?;
    p.mov(rax, spurious)?;
    p.mov(dword_ptr(rax), 0x1ff)?;
    p.mov(rax, command)?;
    p.mov(dword_ptr(rax), init)?;
    if sipi {
        p.mov(dword_ptr(rax), start_up)?;
        let wait = p.here()?;
        p.pause()?;
        p.cmp(word_ptr(STARTED), VCPUS - 1)?;
        p.jne(wait)?;
    }
    p.end()?;
    p.assemble()
}

/// A machine whose first vCPU is about to send INIT and, if `sipi`, SIPI, and its further vCPUs.
fn machine(backend: &Backend, mode: InterruptMode, sipi: bool) -> Outcome<(Machine, Vec<Box<dyn Vcpu>>)> {
    let config = backend.config(mode)?.vcpus(VCPUS);
    let machine = Machine::with_config(backend, &config, &first_vcpu(sipi)?)?;
    machine.write(layout::TRAMPOLINE, trampoline()?.bytes())?;
    let others = (1..VCPUS).map(|index| Ok(machine.vm.create_vcpu(index)?)).collect::<Outcome<Vec<_>>>()?;
    Ok((machine, others))
}

/// Which of the vCPUs have started in the end.
fn bring_up(mut machine: Machine, others: Vec<Box<dyn Vcpu>>) -> Outcome<[u8; VCPUS as usize]> {
    let with_bus = |vcpu| (vcpu, Box::new(EmptyBus) as Box<dyn VcpuIo + Send>);
    let threads = VcpuThreads::spawn(others.into_iter().map(with_bus).collect())?;
    threads.resume();
    machine.run_to_end()?;
    assert!(threads.wait(Some(std::time::Duration::from_millis(10))).is_none(), "all of them wait");
    assert_eq!(threads.stop().iter().map(|vcpu| vcpu.index()).collect::<Vec<_>>(), [1, 2, 3]);
    let marks = machine.bytes(STARTED_BYTES, VCPUS as usize)?;
    Ok([marks[0], marks[1], marks[2], marks[3]])
}

fn four_vcpus(backend: &Backend, mode: InterruptMode) -> Outcome {
    let (machine, others) = machine(backend, mode, true)?;
    assert_eq!(bring_up(machine, others)?, [0, 1, 1, 1]);
    Ok(())
}

fn init_and_sipi_bring_up_four_vcpus_with_local_apics(backend: &Backend) -> Outcome {
    four_vcpus(backend, InterruptMode::LocalApic)
}

fn init_and_sipi_bring_up_four_vcpus_with_a_platform(backend: &Backend) -> Outcome {
    four_vcpus(backend, InterruptMode::Platform)
}

fn no_vcpu_starts_by_itself(backend: &Backend) -> Outcome {
    let (machine, others) = machine(backend, InterruptMode::Platform, false)?;
    assert_eq!(bring_up(machine, others)?, [0; 4]);
    Ok(())
}

fn restored_vcpu_still_waits_for_init(backend: &Backend) -> Outcome {
    let (mut machine, mut others) = machine(backend, InterruptMode::Platform, true)?;
    let config = backend.config(InterruptMode::Platform)?.vcpus(VCPUS);
    let copy = {
        let state = machine.vcpu.save()?;
        machine.copy(backend, &config, &state)?
    };
    let mut restored = Vec::new();
    for vcpu in &mut others {
        let state = vcpu.save()?;
        assert_eq!(state.run_state, RunState::WaitForInit);
        restored.push(copy.vm.restore_vcpu(vcpu.index(), &state)?);
    }
    assert_eq!(bring_up(copy, restored)?, [0, 1, 1, 1]);
    Ok(())
}
