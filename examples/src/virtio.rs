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
use vmm_devices::virtio::{Rng, VirtioDevice, VirtioMmio};
use vmm_memory::vm_memory::GuestMemoryAtomic;
use vmm_memory::{GuestMemoryMap, GuestRam};

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

/// The RAM of a machine as its devices have it.
type Ram = GuestMemoryAtomic<GuestMemoryMap>;

/// A device, and which module of the guest's kernel drives it.
struct Device {
    name: String,
    module: &'static str,
    device: Box<dyn VirtioDevice<Ram>>,
}

/// What a machine has.
pub struct VirtioDevices {
    transport: Transport,
    devices: Vec<Device>,
}

impl VirtioDevices {
    /// None yet.
    #[must_use]
    pub fn new(transport: Transport) -> Self {
        Self { transport, devices: Vec::new() }
    }

    /// An entropy device, with the host's random numbers. With `seed`, its numbers are the same each time.
    ///
    /// # Errors
    /// If the host has none, or no input is left.
    pub fn entropy(self, seed: Option<&[u8]>) -> Result<Self> {
        let random: Box<dyn Read + Send> = match seed {
            Some(seed) => Box::new(blake3::Hasher::new().update(seed).finalize_xof()),
            None => Box::new(File::open("/dev/urandom").context("opening /dev/urandom")?),
        };
        self.add("entropy device".to_owned(), "virtio_rng", Box::new(Rng::new(random)))
    }

    fn add(mut self, name: String, module: &'static str, device: Box<dyn VirtioDevice<Ram>>) -> Result<Self> {
        ensure!(
            self.devices.len() < INPUTS,
            "more than {INPUTS} virtio devices: no input of the I/O APIC is left"
        );
        self.devices.push(Device { name, module, device });
        Ok(self)
    }

    /// Modules of the guest's kernel that are to be loaded.
    #[must_use]
    pub fn modules(&self) -> Vec<&'static str> {
        let Transport::Mmio = self.transport;
        let mut modules = vec!["virtio_mmio"];
        for device in &self.devices {
            if !modules.contains(&device.module) {
                modules.push(device.module);
            }
        }
        modules
    }

    /// What the ACPI tables say of them.
    #[must_use]
    pub fn described(&self) -> Vec<AcpiDevice> {
        let places = places().take(self.devices.len());
        places.map(|(index, base, input)| AcpiDevice::virtio_mmio(index, base, PAGE, input)).collect()
    }

    /// Puts them on the machine's bus.
    ///
    /// # Errors
    /// If a place is taken.
    pub fn attach(self, pc: &Pc, ram: &GuestRam) -> Result<()> {
        for (Device { name, device, .. }, (_, base, input)) in self.devices.into_iter().zip(places()) {
            let failed = name.clone();
            let transport = VirtioMmio::builder(device, ram.address_space(), pc.io_apic_line(input)?)
                .on_failure(move |error| tracing::warn!(device = failed, %error, "a virtio device gave up"))
                .build()?;
            pc.attach_mmio(&name, BusRange::new(base, PAGE), Arc::new(Mutex::new(transport)))?;
        }
        Ok(())
    }
}

/// Number, registers and input of each device.
fn places() -> impl Iterator<Item = (u32, u64, u32)> {
    (0..).map(|index| (index, REGISTERS + u64::from(index) * PAGE, FIRST_INPUT + index))
}
