//! A virtual machine monitor in one page: RAM, a kernel, one vCPU, a serial port.
//!
//!     minimal KERNEL [COMMAND LINE]
//!
//! `KERNEL` is anything that `vmm-memory` loads: an ELF with a PVH note, a multiboot image, a bzImage (which unpacks
//! itself, and takes its time for that where KVM has no hardware; `linux` enters its payload instead). The guest ends
//! the run through the ISA debug-exit port at 0xf4 (status `2 * value + 1`, as with QEMU) or by a reset through
//! the keyboard controller.

use std::io::{self, Stdout};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_cpu::entry::entry_state;
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::boot::{Boot, KernelImage};
use vmm_cpu::{CpuModel, Halt, InterruptLines, InterruptMode, VcpuHandle, VcpuIo, VmConfig, open_backend};

const RAM: u64 = 256 << 20;
const COM1: u16 = 0x3f8;
const COM1_GSI: u32 = 4;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const DEBUG_EXIT: u16 = 0xf4;

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

/// What the guest finds at its ports. No address outside of RAM holds anything.
struct Machine {
    serial: Serial<Edge, NoEvents, Stdout>,
    /// Ends the run: a callback kicks its own vCPU.
    vcpu: Arc<dyn VcpuHandle>,
    exit: Option<u8>,
}

impl VcpuIo for Machine {
    fn pio_read(&mut self, port: u16, _size: usize, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(register), [byte]) = (com1_register(port), data) {
            *byte = self.serial.read(register);
        }
    }

    fn pio_write(&mut self, port: u16, _size: usize, data: &[u8]) {
        match (com1_register(port), port, data) {
            (Some(register), _, [byte]) => {
                if let Err(error) = self.serial.write(register, *byte) {
                    eprintln!("serial port: {error:?}");
                }
            }
            (_, DEBUG_EXIT, [value, ..]) => self.end(value.wrapping_mul(2) | 1),
            (_, KEYBOARD_CONTROLLER, [0xfe]) => self.end(0),
            _ => {}
        }
    }
}

impl Machine {
    fn end(&mut self, status: u8) {
        self.exit = Some(status);
        self.vcpu.kick();
    }
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("usage: minimal KERNEL [COMMAND LINE]")?;
    let command_line = arguments.collect::<Vec<_>>().join(" ");
    let image = std::fs::read(&path).with_context(|| format!("reading the kernel {path}"))?;

    // The machine: RAM with a kernel in it, interrupt controllers, one vCPU at the kernel's entry.
    let ram = GuestRam::builder().ram(RAM).build()?;
    let kernel = KernelImage::parse(&image).with_context(|| format!("the kernel {path}"))?;
    let entry = Boot::new(&kernel).command_line(command_line).load(&*ram.memory())?;
    let config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::Platform).legacy_timer(true);
    let vm = open_backend("kvm")?.create_vm(&config)?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    entry_state(&entry)?.apply(&mut *vcpu)?;

    // Its one device.
    let lines = vm.interrupt_lines().context("the backend has no interrupt lines")?;
    let serial = Serial::new(Edge(lines), io::stdout());
    let mut machine = Machine { serial, vcpu: vcpu.handle(), exit: None };

    // Run it.
    loop {
        match (vcpu.run(&mut machine)?, machine.exit) {
            (Halt::Interrupted, Some(status)) => return Ok(ExitCode::from(status)),
            (Halt::Interrupted | Halt::Halted, _) => {}
            (Halt::Reset, _) => return Ok(ExitCode::SUCCESS),
            (halt, _) => bail!("the guest stopped: {halt:?}"),
        }
    }
}
