//! The virtio devices of the PC: which there are, where the guest finds them, and which modules of its kernel drive them.
//!
//! Over MMIO each device has registers of its own and an input of the I/O APIC, and the guest learns of both from the DSDT.

use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use vmm_devices::BusRange;
use vmm_devices::acpi::AcpiDevice;
use vmm_devices::virtio::{Rng, VirtioMmio};
use vmm_memory::GuestRam;

use crate::pc::Pc;

/// How the guest finds the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Registers in memory, told by ACPI.
    Mmio,
}

/// Where the registers of the first device are; a page for each, in the hole below 4 GiB.
const REGISTERS: u64 = 0xd000_0000;
const PAGE: u64 = 0x1000;

/// Inputs of the I/O APIC above those of the ISA bus.
const FIRST_INPUT: u32 = 16;
const INPUTS: usize = 8;

/// What a machine has.
pub struct VirtioDevices {
    transport: Transport,
    random: Box<dyn Read + Send>,
}

impl VirtioDevices {
    /// An entropy device, with the host's random numbers. With `seed`, its numbers are the same each time.
    ///
    /// # Errors
    /// If the host has none.
    pub fn new(transport: Transport, seed: Option<&[u8]>) -> Result<Self> {
        let random: Box<dyn Read + Send> = match seed {
            Some(seed) => Box::new(blake3::Hasher::new().update(seed).finalize_xof()),
            None => Box::new(File::open("/dev/urandom").context("opening /dev/urandom")?),
        };
        Ok(Self { transport, random })
    }

    /// Modules of the guest's kernel that are to be loaded.
    #[must_use]
    pub fn modules(&self) -> Vec<&'static str> {
        let Transport::Mmio = self.transport;
        vec!["virtio_mmio", "virtio_rng"]
    }

    fn count(&self) -> usize {
        let Self { transport: _, random: _ } = self;
        1
    }

    /// What the ACPI tables say of them.
    ///
    /// # Errors
    /// If there are more than the I/O APIC has inputs for.
    pub fn described(&self) -> Result<Vec<AcpiDevice>> {
        ensure!(self.count() <= INPUTS, "{} virtio devices; {INPUTS} at most find an input", self.count());
        let places = (0..).take(self.count()).map(|index| {
            AcpiDevice::virtio_mmio(index, REGISTERS + u64::from(index) * PAGE, PAGE, FIRST_INPUT + index)
        });
        Ok(places.collect())
    }

    /// Puts them on the machine's bus.
    ///
    /// # Errors
    /// If a place is taken.
    pub fn attach(self, pc: &Pc, ram: &GuestRam) -> Result<()> {
        let line = pc.io_apic_line(FIRST_INPUT)?;
        let device = VirtioMmio::builder(Rng::new(self.random), ram.address_space(), line)
            .on_failure(|error| tracing::warn!(%error, "entropy device"))
            .build()?;
        pc.attach_mmio("entropy device", BusRange::new(REGISTERS, PAGE), Arc::new(Mutex::new(device)))
    }
}
