//! The virtio devices of the PC: which there are, where the guest finds them, and which modules of its kernel drive them.
//!
//! Over MMIO each device has a page of registers and an input of the I/O APIC, and the guest learns of both from the DSDT.
//! Over PCI each is a function of bus 0, which the guest finds by itself, and interrupts by messages.

mod console;
mod disk;
mod doorbells;
mod network;
mod port;
mod saved;
mod vsock;

pub use console::VirtioConsole;
pub use disk::Disk;
pub use doorbells::KernelDoorbells;
pub use network::{Network, Place};
pub use port::NamedPort;
pub use saved::DeviceStates;
pub use vsock::VsockOptions;

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use vmm_cpu::Vm;
use vmm_devices::acpi::{AcpiBuilder, AcpiDevice, AcpiPci};
use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::ivshmem::{Ivshmem, Member};
use vmm_devices::pci::PciLayout;
use vmm_devices::virtio::console::{Console, MAX_PORTS};
use vmm_devices::virtio::{
    Balloon, EventLoop, Executor, Inline, LoopThread, Rng, VirtioDevice, VirtioMmio, VirtioPci,
};
use vmm_devices::{BusRange, Clock};
use vmm_memory::vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_memory::{GuestMemoryMap, GuestRam};

use crate::audit::OnFailure;
use crate::ivshmem::{Mapper, SharedRegion};
use crate::metrics::{Exporter, Sources};
use crate::pc::{Output, Pc};
use saved::Attached;

/// How the guest finds the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Registers in memory, told by ACPI.
    Mmio,
    /// Functions of a PCI bus, which interrupt by MSI-X.
    Pci,
}

/// Where the registers of the first device are; a page for each, in the hole below 4 GiB.
const REGISTERS: u64 = 0xd000_0000;
const PAGE: u64 = 0x1000;

/// Inputs of the I/O APIC above those of the ISA bus.
const FIRST_INPUT: u32 = 16;
const INPUTS: usize = 8;

/// The RAM of a machine as its devices have it.
pub type Ram = GuestMemoryAtomic<GuestMemoryMap>;

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
    /// Seats at memory that the guest has in common with others; functions of the PCI bus, and no virtio devices.
    regions: Vec<Member>,
    /// What serves them, unless that is the vCPU's own thread.
    served_by: Option<LoopThread>,
    /// By which they say how long requests took.
    clock: Arc<dyn Clock>,
    figures: Sources,
    /// Which of the devices are disks.
    disks: Vec<usize>,
    /// Who is asked before a channel opens.
    gatekeeper: Gatekeeper,
    on_failure: Option<OnFailure>,
}

/// What goes on as long as the machine does.
#[must_use]
pub struct Served {
    attached: Attached,
    /// Which of the devices are disks.
    disks: Vec<usize>,
    /// It ends when it is dropped.
    _thread: Option<LoopThread>,
}

impl VirtioDevices {
    /// None yet. A thread of their own serves them, or, for runs that can be had again, the vCPU's.
    ///
    /// # Errors
    /// If the host refuses the thread.
    pub fn new(transport: Transport, deterministic: bool) -> Result<Self> {
        let start = Instant::now();
        let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let clock: Arc<dyn Clock> = Arc::new(clock);
        let thread = || EventLoop::new(Arc::clone(&clock))?.spawn("virtio");
        let served_by =
            if deterministic { None } else { Some(thread().context("a thread for virtio devices")?) };
        Ok(Self {
            transport,
            devices: Vec::new(),
            regions: Vec::new(),
            served_by,
            clock,
            figures: Sources::default(),
            disks: Vec::new(),
            gatekeeper: Gatekeeper::new(AllowAll),
            on_failure: None,
        })
    }

    /// With somebody who is asked before a channel opens; without, all do. To be said before devices are added.
    #[must_use]
    pub fn gatekeeper(mut self, gatekeeper: Gatekeeper) -> Self {
        self.gatekeeper = gatekeeper;
        self
    }

    /// With somebody who is told of devices that give up.
    #[must_use]
    pub fn on_failure(mut self, told: OnFailure) -> Self {
        self.on_failure = Some(told);
        self
    }

    /// A disk. Its name, as the guest finds it (`/dev/disk/by-id`, sysfs), is that of the file.
    ///
    /// # Errors
    /// If the file cannot be opened, or is no disk, another program writes to it, or is to have it while this one writes, or there are too many
    /// devices.
    pub fn disk(mut self, disk: &Disk) -> Result<Self> {
        let name = format!("disk {}", disk.path.display());
        let device = disk.device(self.figures.device("block"), &self.clock).with_context(|| name.clone())?;
        self.disks.push(self.devices.len());
        self.add(name, "virtio_blk", Box::new(device))
    }

    /// A network device, whose frames go to a tap device of this machine, or to a switch.
    ///
    /// # Errors
    /// If the tap device is not there, or not to be had, or there are too many devices.
    pub fn network(mut self, network: &Network) -> Result<Self> {
        let name = network.place.to_string();
        let number = self.devices.iter().filter(|device| device.module == "virtio_net").count();
        let device = network.device(number, &self.gatekeeper).with_context(|| name.clone())?;
        let device = device.metrics(self.figures.device("net"), Arc::clone(&self.clock)).build()?;
        self.figures.network(device.handle());
        if let Some(path) = &network.cable {
            network::serve_cable(path, device.handle()).with_context(|| name.clone())?;
        }
        self.add(name, "virtio_net", Box::new(device))
    }

    /// A balloon of so many MiB, which the guest is to give back of `ram`.
    ///
    /// # Errors
    /// If it is more than the guest has, or there are too many devices.
    pub fn balloon(mut self, ram: &GuestRam, mib: u64) -> Result<Self> {
        let has = ram.size() >> 20;
        let pages = mib.checked_mul(256).and_then(|pages| u32::try_from(pages).ok()).filter(|_| mib <= has);
        let pages =
            pages.with_context(|| format!("a balloon of {mib} MiB is more than the {has} MiB of RAM"))?;
        let device = Balloon::builder(ram.clone()).target(pages);
        let device = device.metrics(self.figures.device("balloon"), Arc::clone(&self.clock)).build();
        self.figures.balloon(device.handle());
        self.add("balloon".to_owned(), "virtio_balloon", Box::new(device))
    }

    /// An entropy device, with the host's random numbers. With `seed`, its numbers are the same each time.
    ///
    /// # Errors
    /// If the host has none, or there are too many devices.
    pub fn entropy(mut self, seed: Option<&[u8]>) -> Result<Self> {
        let random: Box<dyn Read + Send> = match seed {
            Some(seed) => Box::new(blake3::Hasher::new().update(seed).finalize_xof()),
            None => Box::new(File::open("/dev/urandom").context("opening /dev/urandom")?),
        };
        let device = Rng::new(random).metrics(self.figures.device("entropy"), Arc::clone(&self.clock));
        self.add("entropy device".to_owned(), "virtio_rng", Box::new(device))
    }

    /// A console (`/dev/hvc0`) whose output goes to `output`, and the keyboard of it. `size` is the terminal's, lines and
    /// columns.
    ///
    /// # Errors
    /// If there are too many devices.
    pub fn console(mut self, output: Output, size: Option<(u16, u16)>) -> Result<(Self, VirtioConsole)> {
        let (device, console) = VirtioConsole::new(output, size)?;
        let device = device.metrics(self.figures.device("console"), Arc::clone(&self.clock));
        Ok((self.add("console".to_owned(), "virtio_console", Box::new(device))?, console))
    }

    /// Ports with names, on a console device of their own, which has no console.
    ///
    /// # Errors
    /// If two have the same name, a socket cannot be listened at, or there are too many.
    pub fn ports(mut self, wanted: &[NamedPort]) -> Result<Self> {
        // Port 0 is one that a driver may take for a console.
        let most = MAX_PORTS - 1;
        let count = u32::try_from(wanted.len()).ok().filter(|count| *count <= most);
        let count = count.with_context(|| format!("{} ports; {most} are possible", wanted.len()))?;
        let (device, ports) = Console::multiport(count + 1)?;
        for (id, port) in (1..).zip(wanted) {
            let same = wanted.iter().filter(|other| other.name == port.name).count();
            ensure!(same == 1, "{same} ports are called {}: give each a name of its own", port.name);
            port.start(&ports, id)?;
        }
        let device = device.metrics(self.figures.device("ports"), Arc::clone(&self.clock));
        self.add("ports".to_owned(), "virtio_console", Box::new(device))
    }

    /// Memory that the guest has in common with others.
    ///
    /// # Errors
    /// Over MMIO, and if there is no server.
    pub fn region(mut self, region: &SharedRegion) -> Result<Self> {
        ensure!(
            self.transport == Transport::Pci,
            "--ivshmem is a function of a PCI bus, so take --transport pci"
        );
        self.regions.push(region.join(&self.gatekeeper)?);
        Ok(self)
    }

    /// A socket device, whose programs here and there connect to each other.
    ///
    /// # Errors
    /// If its sockets cannot be, the broker refuses, or there are too many devices.
    pub fn vsock(mut self, wanted: &VsockOptions) -> Result<Self> {
        let figures = self.figures.device("vsock");
        let device = wanted.device(figures, Arc::clone(&self.clock), &self.gatekeeper);
        let device = device.context("--vsock")?;
        self.figures.vsock(device.handle());
        self.add("socket device".to_owned(), "vmw_vsock_virtio_transport", Box::new(device))
    }

    /// A device that the caller has made, for which the guest's kernel has that module.
    ///
    /// # Errors
    /// If there are too many devices.
    pub fn device(
        self,
        name: &str,
        module: &'static str,
        device: impl VirtioDevice<Ram> + 'static,
    ) -> Result<Self> {
        self.add(name.to_owned(), module, Box::new(device))
    }

    /// A seat at memory in common, which the caller has taken.
    ///
    /// # Errors
    /// Over MMIO.
    pub fn member(mut self, member: Member) -> Result<Self> {
        ensure!(self.transport == Transport::Pci, "memory in common is a function of a PCI bus");
        self.regions.push(member);
        Ok(self)
    }

    /// The time that these devices go by.
    #[must_use]
    pub fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock)
    }

    fn add(mut self, name: String, module: &'static str, device: Box<dyn VirtioDevice<Ram>>) -> Result<Self> {
        ensure!(
            self.transport == Transport::Pci || self.devices.len() < INPUTS,
            "no input of the I/O APIC is left for the {name}: there are {INPUTS} for virtio devices over MMIO; over PCI they need none, so take --transport pci"
        );
        self.devices.push(Device { name, module, device });
        Ok(self)
    }

    /// Modules of the guest's kernel that are to be loaded.
    #[must_use]
    pub fn modules(&self) -> Vec<&'static str> {
        let mut modules = match self.transport {
            Transport::Mmio => vec!["virtio_mmio"],
            Transport::Pci => vec!["virtio_pci"],
        };
        for device in &self.devices {
            if !modules.contains(&device.module) {
                modules.push(device.module);
            }
        }
        if !self.regions.is_empty() {
            // For programs that are to be interrupted by peers.
            modules.push("uio_pci_generic");
        }
        modules
    }

    /// What the ACPI tables say of them.
    #[must_use]
    pub fn describe(&self, tables: AcpiBuilder) -> AcpiBuilder {
        match self.transport {
            Transport::Mmio => {
                let devices = places()
                    .zip(&self.devices)
                    .map(|((index, base, input), _)| AcpiDevice::virtio_mmio(index, base, PAGE, input));
                devices.fold(tables, AcpiBuilder::device)
            }
            Transport::Pci => {
                let (layout, inputs) = pci();
                tables.pci(AcpiPci::new(layout, inputs))
            }
        }
    }

    /// Puts them on the machine's buses, with doorbells that the kernel rings where the backend has such. Their figures are at
    /// `exporter`.
    ///
    /// # Errors
    /// If a place is taken.
    pub fn attach(
        self,
        pc: &Pc,
        vm: &Arc<dyn Vm>,
        ram: &GuestRam,
        exporter: Option<Exporter>,
    ) -> Result<Served> {
        let Self { transport, devices, regions, served_by, figures, disks, on_failure, .. } = self;
        let failed = |name: &str| failed(name, on_failure.as_ref());
        let executor = || -> Arc<dyn Executor> {
            match &served_by {
                Some(thread) => thread.executor(),
                None => Arc::new(Inline),
            }
        };
        let kernel = vm.doorbells().map(KernelDoorbells);
        let attached = match transport {
            Transport::Mmio => {
                let mut attached = Vec::new();
                for ((_, base, input), Device { name, device, .. }) in places().zip(devices) {
                    let transport = VirtioMmio::builder(device, ram.address_space(), pc.io_apic_line(input)?);
                    let mut transport = transport.executor(executor()).on_failure(failed(&name));
                    if let Some(kernel) = &kernel {
                        transport = transport.doorbells(GuestAddress(base), kernel.clone());
                    }
                    let transport = Arc::new(Mutex::new(transport.build()?));
                    pc.attach_mmio(&name, BusRange::new(base, PAGE), transport.clone())?;
                    attached.push(transport);
                }
                Attached::Mmio(attached)
            }
            Transport::Pci => {
                let (layout, inputs) = pci();
                let bridge = pc.add_pci(layout, inputs)?;
                let (mut functions, mut seats) = (Vec::new(), Vec::new());
                for Device { name, device, .. } in devices {
                    let function = VirtioPci::builder(device, ram.address_space(), pc.message_sink());
                    let mut function = function.executor(executor()).on_failure(failed(&name));
                    if let Some(kernel) = &kernel {
                        function = function.doorbells(kernel.clone());
                    }
                    let function = Arc::new(Mutex::new(function.build()?));
                    bridge.add(function.clone()).with_context(|| name)?;
                    functions.push(function);
                }
                for member in regions {
                    let name = format!("region {}", member.region());
                    let mut function = Ivshmem::builder(member, pc.message_sink())
                        .mapper(Mapper(Arc::clone(vm)))
                        .on_failure(failed(&name));
                    if let Some(kernel) = &kernel {
                        function = function.doorbells(kernel.clone());
                    }
                    let function = Arc::new(Mutex::new(function.build()?));
                    bridge.add(function.clone()).with_context(|| name)?;
                    seats.push(function);
                }
                Attached::Pci { bridge, functions, regions: seats }
            }
        };
        exporter.map(|exporter| exporter.serve(figures)).transpose()?;
        Ok(Served { attached, disks, _thread: served_by })
    }
}

/// What is done when a device of that name gives up.
fn failed(name: &str, also: Option<&OnFailure>) -> impl Fn(&dyn Error) + Send + Sync + use<> {
    let (device, also) = (name.to_owned(), also.map(|also| also(name)));
    move |error| {
        tracing::warn!(device, %error, "a virtio device gave up");
        if let Some(also) = &also {
            also(error);
        }
    }
}

/// Number, registers and input of each device over MMIO.
fn places() -> impl Iterator<Item = (u32, u64, u32)> {
    (0..).map(|index| (index, REGISTERS + u64::from(index) * PAGE, FIRST_INPUT + index))
}

/// Where the PCI bus is, and the inputs that its four lines lead to.
fn pci() -> (PciLayout, [u32; 4]) {
    (PciLayout::default(), [16, 17, 18, 19])
}
