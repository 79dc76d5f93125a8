//! The devices of a machine that is saved, and of one that goes on.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use vmm_devices::ivshmem::{Ivshmem, IvshmemState};
use vmm_devices::pci::{HostBridge, HostBridgeState};
use vmm_devices::virtio::{VirtioMmio, VirtioMmioState, VirtioPci, VirtioPciState};
use vmm_memory::snapshot::{Snapshot, SnapshotWriter};

use super::{Ram, Served};
use crate::pc::lock;

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
    /// Brings all devices to rest. Of requests that disks had taken when they were asked to, and not given back: how many were finished
    /// meanwhile, and how many stay in flight and are saved so. The vCPUs stand still.
    pub fn pause(&self) -> (u64, u64) {
        let before = self.in_flight();
        match &self.attached {
            Attached::Mmio(devices) => devices.iter().for_each(|device| lock(device).pause()),
            Attached::Pci { functions, .. } => functions.iter().for_each(|device| lock(device).pause()),
        }
        let after = self.in_flight();
        // No vCPU makes the same one again.
        let carried = before.intersection(&after).count();
        ((before.len() - carried) as u64, carried as u64)
    }

    /// Requests that disks have taken, and not given back: the number of the device, its queue, and the descriptor.
    fn in_flight(&self) -> BTreeSet<(usize, u16, u16)> {
        let of_device = |number: usize| match &self.attached {
            Attached::Mmio(devices) => devices.get(number).map(|device| lock(device).in_flight()),
            Attached::Pci { functions, .. } => functions.get(number).map(|device| lock(device).in_flight()),
        };
        let of_disk = |number: &usize| {
            let number = *number;
            let requests = of_device(number).unwrap_or_default().into_iter();
            requests.map(move |(queue, head)| (number, queue, head))
        };
        self.disks.iter().flat_map(of_disk).collect()
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
