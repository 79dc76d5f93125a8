//! What an instruction costs that KVM gives up on and software finishes, beside those that KVM executes itself.
//!
//! Each guest is a loop at privilege level 0 of flat 64-bit code: one instruction of the kind that is measured, then `dec ecx; jnz`.
//! The empty loop's time is taken off. Where KVM executes an instruction itself, which the exit counts say, its line says so.

use std::process::ExitCode;
use std::time::Instant;

use vmm_cpu::kvm::KvmHypervisor;
use vmm_cpu::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::{CpuModel, EmptyBus, Error, Halt, Hypervisor, Vcpu, VmConfig};

type Failure = Box<dyn std::error::Error>;

const PAGE_TABLES: u64 = 0x1_0000;
const CODE: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const DEVICE: u64 = 0x4000_0000;

/// Name, code with RSI at memory and RDI at a device, and how often.
const KINDS: [(&str, &[u8], u32); 6] = [
    ("nothing", &[], 20_000),
    ("add [rsi], eax", &[0x01, 0x06], 20_000),
    ("lock cmpxchg16b [rsi]", &[0xf0, 0x48, 0x0f, 0xc7, 0x0e], 20_000),
    ("movups [rsi], xmm0", &[0x0f, 0x11, 0x06], 20_000),
    ("mov [rdi], rax", &[0x48, 0x89, 0x07], 5_000),
    ("movups [rdi], xmm0", &[0x0f, 0x11, 0x07], 5_000),
];

/// Nanoseconds of one round of the loop, and how many instructions were finished in software.
fn measure(hypervisor: &dyn Hypervisor, code: &[u8], rounds: u32) -> Result<(f64, u64), Failure> {
    let ram = GuestRam::builder().ram(1 << 20).build()?;
    let memory = ram.memory();
    // The first 2 MiB of memory, and of the second GiB, where there is none.
    let [top, middle, low, high] = [0, 1, 2, 3].map(|page| PAGE_TABLES + page * 0x1000);
    for (entry, value) in
        [(top, middle | 3), (middle, low | 3), (middle + 8, high | 3), (low, 0x83), (high, DEVICE | 0x83)]
    {
        memory.write_obj(value, GuestAddress(entry))?;
    }
    let mut text = code.to_vec();
    let back = i8::try_from(text.len() + 4)?;
    text.extend([0xff, 0xc9, 0x75, back.wrapping_neg().cast_unsigned(), 0xf4]);
    memory.write_slice(&text, GuestAddress(CODE))?;

    let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host))?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let data = Segment::data32(0x10);
    vcpu.set_system_registers(&SystemRegisters {
        cs: Segment::code64(8),
        ds: data,
        es: data,
        ss: data,
        idtr: DescriptorTable::default(),
        cr0: 0x8000_0033,
        cr3: PAGE_TABLES,
        cr4: SystemRegisters::CR4_PAE | 1 << 9 | 1 << 10,
        efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
        ..SystemRegisters::at_reset()
    })?;
    vcpu.set_registers(&GeneralRegisters {
        rip: CODE,
        rsi: DATA,
        rdi: DEVICE,
        rcx: rounds.into(),
        rflags: rflags::FIXED,
        ..GeneralRegisters::default()
    })?;
    let start = Instant::now();
    let halt = vcpu.run(&mut EmptyBus)?;
    let time = start.elapsed();
    if halt != Halt::Halted {
        return Err(format!("{halt:?} instead of a halt").into());
    }
    let finished = vcpu.exit_counts().into_iter().find(|(name, _)| *name == "finished-in-software");
    Ok((time.as_secs_f64() * 1e9 / f64::from(rounds), finished.map_or(0, |(_, count)| count)))
}

fn run() -> Result<(), Failure> {
    let hypervisor = match KvmHypervisor::open() {
        Err(error @ (Error::HostInterfaceAbsent { .. } | Error::PermissionDenied { .. })) => {
            println!("skipped: {error}");
            return Ok(());
        }
        opened => opened?,
    };
    let mut empty = 0.0;
    for (name, code, rounds) in KINDS {
        let (time, finished) = measure(&hypervisor, code, rounds)?;
        if code.is_empty() {
            empty = time;
        }
        let by = if finished == 0 { "by KVM itself" } else { "finished in software" };
        println!("{name:24} {:10.0} ns  {by}", if code.is_empty() { time } else { time - empty });
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
