//! Runs a freestanding guest and shows what it prints.
//!
//! The guest is part of this program: `examples/guest/hello.rs`, built by `examples/build.rs`. It says what
//! machine it sees, counts primes, and leaves through the ISA debug-exit port. The exit status is 0 if the
//! guest found everything as expected, otherwise the one that QEMU would give.

use std::io::{Stdout, stdout};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_cpu::entry::entry_state;
use vmm_cpu::{
    CpuModel, Halt, InterruptLines, InterruptMode, VcpuHandle, VcpuIo, VmConfig, backend_names, open_backend,
};
use vmm_memory::GuestRam;
use vmm_memory::boot::{Boot, KernelImage};

/// The guest.
static GUEST: &[u8] = include_bytes!(env!("HELLO_GUEST"));

const COM1: u16 = 0x3f8;
const COM1_GSI: u32 = 4;
const DEBUG_EXIT: u16 = 0xf4;

/// Status at the debug-exit port (QEMU: twice the value, plus one) for 0x10, the guest's word for success.
const GUEST_SUCCESS: u8 = 0x10 << 1 | 1;

/// Status for failures of this program's own: QEMU's debug exit can give any odd one.
const VMM_FAILURE: u8 = 125;

/// Runs a freestanding guest and shows what it prints.
#[derive(Parser)]
struct Options {
    /// The backend that runs the guest.
    #[arg(long, default_value = "kvm", value_parser = backend_names().to_vec())]
    backend: String,
    /// Command line for the guest.
    #[arg(long, default_value = "from hello")]
    append: String,
    /// Guest RAM in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(2..=1 << 20))]
    memory: u64,
    /// How long the guest may take, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

/// The serial port's interrupt, as an edge on its line.
struct Edge(Arc<dyn InterruptLines>);

impl Trigger for Edge {
    type E = vmm_cpu::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set_level(COM1_GSI, true)?;
        self.0.set_level(COM1_GSI, false)
    }
}

/// Register of the serial port at `port`, if it is one of its eight.
fn com1_register(port: u16) -> Option<u8> {
    port.checked_sub(COM1).and_then(|offset| u8::try_from(offset).ok()).filter(|register| *register < 8)
}

/// What the guest finds at its ports.
struct Machine {
    serial: Serial<Edge, NoEvents, Stdout>,
    vcpu: Arc<dyn VcpuHandle>,
    /// How the guest, or the terminal, ended the run.
    end: Option<Result<u8>>,
}

impl Machine {
    /// Makes `Vcpu::run` return.
    fn end(&mut self, end: Result<u8>) {
        self.end = Some(end);
        self.vcpu.kick();
    }
}

impl VcpuIo for Machine {
    fn pio_read(&mut self, port: u16, _size: usize, data: &mut [u8]) {
        match (com1_register(port), data) {
            (Some(register), [byte]) => *byte = self.serial.read(register),
            // Nothing else answers.
            (_, data) => data.fill(0xff),
        }
    }

    fn pio_write(&mut self, port: u16, _size: usize, data: &[u8]) {
        match (com1_register(port), port, data) {
            (Some(register), _, [byte]) => {
                if let Err(error) = self.serial.write(register, *byte) {
                    self.end(Err(error).context("serial port"));
                }
            }
            (_, DEBUG_EXIT, [value, ..]) => self.end(Ok(value.wrapping_mul(2) | 1)),
            _ => {}
        }
    }
}

fn main() -> ExitCode {
    // RUST_LOG=vmm_cpu=trace shows every exit.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    run(&Options::parse()).unwrap_or_else(|error| {
        eprintln!("hello: {error:#}");
        ExitCode::from(VMM_FAILURE)
    })
}

fn run(options: &Options) -> Result<ExitCode> {
    // The backend, which may be absent on this host.
    let hypervisor = open_backend(&options.backend)?;

    // A virtual machine with the interrupt controllers of a PC.
    let config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::Platform);
    let vm = hypervisor.create_vm(&config)?;

    // Its memory, with the guest loaded.
    let ram = GuestRam::builder().ram(options.memory << 20).build()?;
    let kernel = KernelImage::parse(GUEST).context("the built-in guest")?;
    let boot = Boot::new(&kernel).command_line(options.append.as_str());
    let entry = boot.load(&*ram.memory()).context("the built-in guest")?;
    vm.map_ram(&ram)?;

    // One vCPU that stands at the guest's first instruction.
    let mut vcpu = vm.create_vcpu(0)?;
    entry_state(&entry)?.apply(&mut *vcpu)?;

    // Its one device.
    let lines = vm.interrupt_lines().context("the backend has no interrupt lines")?;
    let serial = Serial::new(Edge(lines), stdout());
    let mut machine = Machine { serial, vcpu: vcpu.handle(), end: None };

    // Somebody who looks at the clock. The process ends before this thread does.
    let time_is_up = Arc::new(AtomicBool::new(false));
    let (flag, handle, limit) =
        (Arc::clone(&time_is_up), vcpu.handle(), Duration::from_secs(options.seconds));
    thread::spawn(move || {
        thread::sleep(limit);
        flag.store(true, Ordering::SeqCst);
        handle.kick();
    });

    let status = loop {
        match vcpu.run(&mut machine)? {
            Halt::Interrupted => {
                if let Some(end) = machine.end.take() {
                    break end?;
                }
                if time_is_up.load(Ordering::SeqCst) {
                    bail!("the guest was still running after {} s", options.seconds);
                }
            }
            halt => bail!("the guest stopped: {halt:?}"),
        }
    };
    if status != GUEST_SUCCESS {
        return Ok(ExitCode::from(status));
    }
    eprintln!("hello: the guest found everything as expected (backend {})", hypervisor.name());
    Ok(ExitCode::SUCCESS)
}
