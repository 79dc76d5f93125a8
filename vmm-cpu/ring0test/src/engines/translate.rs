//! The backend under test.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vmm_cpu::entry::entry_state;
use vmm_cpu::translate::{TranslateHypervisor, TranslateOptions};
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, Error, ExactStop, Halt, Hypervisor, InterruptMode, VcpuHandle,
    VcpuIo, VmConfig,
};
use vmm_memory::boot::{Boot, KernelImage};
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{Backing, GuestRam, RegionConfig};

use super::End;
use crate::layout::{EXIT_PORT, control};
use crate::memory::Memory;

/// Instructions between two looks at the progress; no scenario takes as many.
const PATIENCE: u64 = 1_000_000;

/// Nothing but the port that ends the run.
struct Bus(Arc<dyn VcpuHandle>);

impl VcpuIo for Bus {
    fn pio_read(&mut self, _port: u16, _size: usize, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&mut self, port: u16, _size: usize, _data: &[u8]) {
        if port == EXIT_PORT {
            self.0.kick();
        }
    }
}

/// Boots the image. `None`: all scenarios are done.
pub(super) fn boot(image: &Path, memory: &Memory, translate_after: Option<u32>) -> Result<Option<End>> {
    let backing = Backing::File { file: Arc::clone(&memory.file), offset: 0 };
    let region = RegionConfig::new(GuestAddress(0), memory.bytes).backing(backing);
    let ram = GuestRam::builder().region(region).build()?;
    let bytes = std::fs::read(image)?;
    let kernel = KernelImage::parse(&bytes)?;
    let entry = Boot::new(&kernel).load(&*ram.memory())?;
    let mut clock = ClockConfig::host_at_khz(1_000_000);
    clock.source = ClockSource::Deterministic;
    let config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic).clock(clock);
    let options = TranslateOptions::default().translate_after(translate_after);
    let vm = TranslateHypervisor::with_options(options).create_vm(&config)?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    entry_state(&entry)?.apply(&mut *vcpu)?;
    let mut bus = Bus(vcpu.handle());
    let mut started = memory.word(control::STARTED)?;
    loop {
        let stops = vcpu.exact_stops().context("a deterministic clock")?;
        let stop = stops.instructions() + PATIENCE;
        stops.stop_at(ExactStop::none().at_instructions(stop));
        match vcpu.run(&mut bus) {
            Ok(Halt::Interrupted) if memory.word(control::DONE)? != 0 => return Ok(None),
            Ok(Halt::Interrupted) => {}
            Ok(Halt::ExactStop) => {
                let now = memory.word(control::STARTED)?;
                if now == started {
                    return Ok(Some(End::Hang));
                }
                started = now;
            }
            Ok(Halt::Shutdown) => return Ok(Some(End::Shutdown)),
            Ok(halt) => bail!("translate: {halt:?}"),
            Err(Error::Unhandled(unhandled)) => {
                eprintln!("translate: {unhandled}");
                return Ok(Some(End::Unhandled));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
