//! Starts Debian's stock kernel (or another) with a serial console.
//!
//! With no kernel given it gets Debian's cloud kernel as a package. The kernel is entered by PVH, the ELF payload of a
//! bzImage directly. The run ends when the guest resets or powers off, when the backend meets something it cannot
//! execute (the error says what), or after `--seconds`.

use std::io::{self, Stdout, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_cpu::entry::entry_state;
use vmm_cpu::{
    CpuModel, Error, Halt, Hypervisor, InterruptLines, InterruptMode, VcpuHandle, VcpuIo, VmConfig,
    open_backend,
};
use vmm_examples::debian;
use vmm_memory::GuestRam;
use vmm_memory::boot::{Boot, BootProtocol, KernelImage};

const COM1: u16 = 0x3f8;
const COM1_GSI: u32 = 4;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const DEBUG_EXIT: u16 = 0xf4;

/// Statuses of the program's own: QEMU's debug exit can give any odd one.
const VMM_FAILURE: u8 = 125;
const TIME_IS_UP: u8 = 124;

/// Starts Debian's stock kernel, or another, with a serial console.
#[derive(Parser)]
struct Options {
    /// The backend that runs it.
    #[arg(long, default_value = "kvm")]
    backend: String,
    /// Kernel: bzImage, ELF with a PVH note, or multiboot image.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Added to the kernel's command line.
    #[arg(long, default_value = "")]
    append: String,
    /// RAM in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Ends the run after that time.
    #[arg(long)]
    seconds: Option<u64>,
    /// Exits by kind and time, at the end, on standard error.
    #[arg(long)]
    timings: bool,
}

struct Edge(Arc<dyn InterruptLines>);

impl Trigger for Edge {
    type E = Error;

    fn trigger(&self) -> Result<(), Error> {
        self.0.set_level(COM1_GSI, true)?;
        self.0.set_level(COM1_GSI, false)
    }
}

/// Register of the serial port at `port`, if it is one of its eight.
fn com1_register(port: u16) -> Option<u8> {
    port.checked_sub(COM1).and_then(|offset| u8::try_from(offset).ok()).filter(|register| *register < 8)
}

struct Machine {
    serial: Serial<Edge, NoEvents, Stdout>,
    vcpu: Arc<dyn VcpuHandle>,
    exit: Option<u8>,
}

impl Machine {
    fn end(&mut self, status: u8) {
        self.exit = Some(status);
        self.vcpu.kick();
    }
}

impl VcpuIo for Machine {
    fn pio_read(&mut self, port: u16, _size: usize, data: &mut [u8]) {
        data.fill(0xff);
        match (com1_register(port), port, data) {
            (Some(register), _, [byte]) => *byte = self.serial.read(register),
            // No key, and the controller is ready for a command.
            (_, KEYBOARD_CONTROLLER, data) => data.fill(0),
            _ => {}
        }
    }

    fn pio_write(&mut self, port: u16, _size: usize, data: &[u8]) {
        match (com1_register(port), port, data) {
            (Some(register), _, [byte]) => {
                if let Err(error) = self.serial.write(register, *byte) {
                    eprintln!("linux: serial port: {error:?}");
                    self.end(VMM_FAILURE);
                }
            }
            (_, DEBUG_EXIT, [value, ..]) => self.end(value.wrapping_mul(2) | 1),
            (_, KEYBOARD_CONTROLLER, [0xfe]) => self.end(0),
            _ => {}
        }
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    run(&Options::parse()).unwrap_or_else(|error| {
        eprintln!("linux: {error:#}");
        ExitCode::from(VMM_FAILURE)
    })
}

fn run(options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    // Before the kernel is fetched: without a backend there is no use for it.
    let hypervisor = open_backend(&options.backend)?;
    let kernel_path = options.kernel.clone().map_or_else(debian::kernel, Ok)?;
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let image = read(&kernel_path)?;
    let initrd = options.initrd.as_ref().map(read).transpose()?;

    let ram = GuestRam::builder().ram(options.memory << 20).build()?;
    let kernel = KernelImage::parse(&image).with_context(|| format!("kernel {}", kernel_path.display()))?;
    let command_line = format!("console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 {}", options.append);
    let mut boot = Boot::new(&kernel).command_line(command_line.trim_end());
    if let Some(initrd) = &initrd {
        boot = boot.initrd(initrd);
    }
    if kernel.setup_header().is_some() {
        // The payload's own PVH entry: the guest need not decompress itself.
        boot = boot.protocol(BootProtocol::Pvh);
    }
    let entry = boot.load(&*ram.memory()).with_context(|| format!("kernel {}", kernel_path.display()))?;

    let vm = hypervisor.create_vm(&config(&*hypervisor))?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    entry_state(&entry)?.apply(&mut *vcpu)?;
    let lines = vm.interrupt_lines().context("the backend has no interrupt lines")?;
    let serial = Serial::new(Edge(lines), io::stdout());
    let mut machine = Machine { serial, vcpu: vcpu.handle(), exit: None };

    let time_is_up = Arc::new(AtomicBool::new(false));
    if let Some(seconds) = options.seconds {
        let (flag, vcpu) = (Arc::clone(&time_is_up), vcpu.handle());
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(seconds));
            flag.store(true, Ordering::SeqCst);
            vcpu.kick();
        });
    }
    let status = loop {
        match vcpu.run(&mut machine) {
            Ok(Halt::Interrupted) => {
                if let Some(status) = machine.exit {
                    break Ok(status);
                }
                if time_is_up.load(Ordering::SeqCst) {
                    break Ok(TIME_IS_UP);
                }
            }
            Ok(Halt::Reset | Halt::Shutdown) => break Ok(0),
            Ok(halt) => break Err(anyhow::anyhow!("the guest stopped: {halt:?}")),
            Err(error) => break Err(error.into()),
        }
    };
    io::stdout().flush()?;
    if options.timings {
        eprintln!("wall time: {:.3} s", started.elapsed().as_secs_f64());
        for (kind, count) in vcpu.exit_counts().into_iter().filter(|(_, count)| *count > 0) {
            eprintln!("exits {kind}: {count}");
        }
    }
    match status {
        Ok(TIME_IS_UP) => bail!("the guest was still running after {} s", options.seconds.unwrap_or(0)),
        Ok(status) => Ok(ExitCode::from(status)),
        Err(error) => Err(error),
    }
}

/// The machine that a PC kernel expects, as far as the backend has it.
fn config(hypervisor: &dyn Hypervisor) -> VmConfig {
    let capabilities = hypervisor.capabilities();
    VmConfig::new(CpuModel::Host).interrupts(InterruptMode::Platform).legacy_timer(capabilities.legacy_timer)
}
