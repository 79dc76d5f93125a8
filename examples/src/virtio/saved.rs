//! The devices of a machine that is saved, and of one that goes on.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use vmm_devices::ivshmem::{Ivshmem, IvshmemState};
use vmm_devices::pci::{HostBridge, HostBridgeState};
use vmm_devices::virtio::metrics::{DeviceMetrics, MetricsSnapshot};
use vmm_devices::virtio::{VirtioMmio, VirtioMmioState, VirtioPci, VirtioPciState, VirtioState};
use vmm_memory::snapshot::{Snapshot, SnapshotWriter};

use super::{Ram, Served};
use crate::pc::lock;

/// The number of block devices among virtio's (5.2.1).
const BLOCK: u16 = 2;

/// Where the devices are.
pub(super) enum Attached {
    Mmio(Vec<Arc<Mutex<VirtioMmio<Ram>>>>),
    Pci { bridge: HostBridge, functions: Vec<Arc<Mutex<VirtioPci<Ram>>>>, regions: Vec<Arc<Mutex<Ivshmem>>> },
}

/// What the devices of a machine were.
pub enum DeviceStates {
    /// On MMIO.
    Mmio(Vec<VirtioMmioState>),
    /// On PCI.
    Pci {
        /// The host bridge.
        bridge: HostBridgeState,
        /// Virtio devices.
        functions: Vec<VirtioPciState>,
        /// Shared memory.
        regions: Vec<IvshmemState>,
    },
}

const BRIDGE: &str = "pci/bridge";

fn mmio(number: usize) -> String {
    format!("virtio/mmio/{number}")
}

fn function(number: usize) -> String {
    format!("virtio/pci/{number}")
}

fn region(number: usize) -> String {
    format!("ivshmem/{number}")
}

impl Served {
    /// Brings all devices to rest; how many requests of disks were finished meanwhile, which were in flight. The vCPUs stand still.
    pub fn pause(&self) -> u64 {
        let before = self.requests_done();
        match &self.attached {
            Attached::Mmio(devices) => devices.iter().for_each(|device| lock(device).pause()),
            Attached::Pci { functions, .. } => functions.iter().for_each(|device| lock(device).pause()),
        }
        self.requests_done() - before
    }

    fn requests_done(&self) -> u64 {
        let done = |disk: &Arc<DeviceMetrics>| {
            let MetricsSnapshot { read, write, other, .. } = disk.snapshot();
            read.requests + write.requests + other.requests
        };
        self.disks.iter().map(done).sum()
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// If the host refuses what they need.
    pub fn resume(&self) -> Result<()> {
        match &self.attached {
            Attached::Mmio(devices) => devices.iter().try_for_each(|device| lock(device).resume())?,
            Attached::Pci { functions, .. } => {
                functions.iter().try_for_each(|device| lock(device).resume())?
            }
        }
        Ok(())
    }

    /// What the devices are, which are [at rest](Self::pause).
    ///
    /// # Errors
    /// If one cannot be saved.
    pub fn states(&self) -> Result<DeviceStates> {
        Ok(match &self.attached {
            Attached::Mmio(devices) => DeviceStates::Mmio(
                devices.iter().map(|device| lock(device).save()).collect::<Result<_, _>>()?,
            ),
            Attached::Pci { bridge, functions, regions } => DeviceStates::Pci {
                bridge: bridge.state(),
                functions: functions.iter().map(|device| lock(device).save()).collect::<Result<_, _>>()?,
                regions: regions.iter().map(|region| lock(region).state()).collect(),
            },
        })
    }

    /// Takes the states of as many devices as there are.
    ///
    /// # Errors
    /// Those of [`Snapshot::get`].
    pub fn get(&self, snapshot: &Snapshot) -> Result<DeviceStates> {
        Ok(match &self.attached {
            Attached::Mmio(devices) => DeviceStates::Mmio(
                (0..devices.len()).map(|at| snapshot.get(&mmio(at))).collect::<Result<_, _>>()?,
            ),
            Attached::Pci { functions, regions, .. } => DeviceStates::Pci {
                bridge: snapshot.get(BRIDGE)?,
                functions: (0..functions.len())
                    .map(|at| snapshot.get(&function(at)))
                    .collect::<Result<_, _>>()?,
                regions: (0..regions.len()).map(|at| snapshot.get(&region(at))).collect::<Result<_, _>>()?,
            },
        })
    }

    /// Makes the devices, which are new, what they were. They are at rest then.
    ///
    /// # Errors
    /// If a device cannot be what its state says. The machine is useless then.
    pub fn restore(&self, states: &DeviceStates) -> Result<()> {
        match (&self.attached, states) {
            (Attached::Mmio(devices), DeviceStates::Mmio(states)) => {
                for (number, (device, state)) in devices.iter().zip(states).enumerate() {
                    lock(device).restore(state).with_context(|| mmio(number))?;
                }
            }
            (
                Attached::Pci { bridge, functions, regions },
                DeviceStates::Pci { bridge: of_bridge, functions: of_functions, regions: of_regions },
            ) => {
                for (number, (device, state)) in functions.iter().zip(of_functions).enumerate() {
                    lock(device).restore(state).with_context(|| function(number))?;
                }
                for (number, (device, state)) in regions.iter().zip(of_regions).enumerate() {
                    lock(device).restore(state).with_context(|| region(number))?;
                }
                // It looks at where its functions are now.
                bridge.restore(of_bridge).context(BRIDGE)?;
            }
            _ => anyhow::bail!("the devices were on another bus"),
        }
        Ok(())
    }

    /// Requests that were taken, and stay in flight.
    #[must_use]
    pub fn carried(states: &DeviceStates) -> u64 {
        let devices: Vec<&VirtioState> = match states {
            DeviceStates::Mmio(states) => states.iter().map(|state| &state.device).collect(),
            DeviceStates::Pci { functions, .. } => functions.iter().map(|state| &state.device).collect(),
        };
        let disks = devices.into_iter().filter(|device| device.device_type == BLOCK);
        disks.flat_map(|device| &device.queues).map(|queue| queue.in_flight.len() as u64).sum()
    }
}

impl DeviceStates {
    /// Adds them to a snapshot.
    ///
    /// # Errors
    /// Those of [`SnapshotWriter::put`].
    pub fn put(&self, writer: &mut SnapshotWriter) -> Result<()> {
        match self {
            Self::Mmio(states) => {
                for (number, state) in states.iter().enumerate() {
                    writer.put(&mmio(number), state)?;
                }
            }
            Self::Pci { bridge, functions, regions } => {
                writer.put(BRIDGE, bridge)?;
                for (number, state) in functions.iter().enumerate() {
                    writer.put(&function(number), state)?;
                }
                for (number, state) in regions.iter().enumerate() {
                    writer.put(&region(number), state)?;
                }
            }
        }
        Ok(())
    }
}
