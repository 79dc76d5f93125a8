//! What a virtio device is while nobody works on it: in a snapshot, or on its way elsewhere.
//!
//! The steps are in [the module above](super).
//!
//! # Threat model
//! A state is as hostile as a driver, and may say what no driver can. All of it is checked before any of it is taken over: features are
//! a subset of what the device offers, queues lie in RAM, their indices and chains fit. What chains say is read again, and believed no more than the
//! first time.

use super::balloon::BalloonState;
use super::block::BlockState;
use super::console::ConsoleState;
use super::device::ActivateError;
use super::net::NetState;
use crate::error::StateError;

/// A device, whatever its transport.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtioState {
    /// Its kind (5).
    pub device_type: u16,
    /// Device status (2.1).
    pub status: u8,
    /// The features that the driver has written (2.2).
    pub features: u64,
    /// Which half of the features the driver looks at.
    pub device_features_select: u32,
    /// Which half it writes.
    pub driver_features_select: u32,
    /// Which queue it looks at.
    pub queue_select: u16,
    /// The generation of the configuration (2.5.1).
    pub config_generation: u32,
    /// The configuration as the driver could read it (2.5), without zeros at its end; 256 bytes at most. A device whose own is another
    /// one tells the driver.
    pub config: Vec<u8>,
    /// All queues.
    pub queues: Vec<VirtqueueState>,
    /// What is of this kind of device.
    pub device: DeviceState,
}

/// A split queue (2.7).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtqueueState {
    /// Descriptors that the device allows it.
    pub max_size: u16,
    /// Descriptors that it has.
    pub size: u16,
    /// The driver uses it.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// The entry of the available ring that comes next; this and what follows is zero where the device has not started.
    pub next_available: u16,
    /// The entry of the used ring that comes next.
    pub next_used: u16,
    /// The entry of the used ring that was next when the device last looked whether the driver wants an interrupt.
    pub told: u16,
    /// Heads of the chains that were taken and are not used yet, in that order: as many as the two rings are apart.
    pub in_flight: Vec<u16>,
}

/// What is of one kind of device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceState {
    /// Nothing.
    Stateless,
    /// A block device.
    Block(BlockState),
    /// A console.
    Console(ConsoleState),
    /// A network device.
    Net(NetState),
    /// A balloon.
    Balloon(BalloonState),
    /// Bytes of a device that this crate does not know, in a format of its own.
    Other(Vec<u8>),
}

impl DeviceState {
    /// What a device says that has states of another kind.
    pub fn of_another(&self, device: &'static str) -> StateError {
        let kind = match self {
            Self::Stateless => 0,
            Self::Block(_) => 1,
            Self::Console(_) => 2,
            Self::Net(_) => 3,
            Self::Balloon(_) => 4,
            Self::Other(_) => 5,
        };
        StateError { device, field: "kind of state", value: kind, allowed: "its own" }
    }
}

/// A device on MMIO.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtioMmioState {
    /// InterruptStatus (4.2.2): 1 for used buffers, 2 for the configuration.
    pub interrupt_status: u8,
    /// The device.
    pub device: VirtioState,
}

/// A device on PCI.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VirtioPciState {
    /// What the driver has written to configuration space.
    pub config: crate::pci::ConfigState,
    /// The vectors.
    pub msix: crate::pci::MsixState,
    /// The vector for changes of the configuration (4.1.4.3), or 0xffff.
    pub config_vector: u16,
    /// That of each queue, likewise.
    pub queue_vectors: Vec<u16>,
    /// ISR status (4.1.4.5), as InterruptStatus of MMIO.
    pub isr: u8,
    /// The device.
    pub device: VirtioState,
}

/// Why a device is not saved or restored. It is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioStateError {
    /// It does not know how.
    #[error("a virtio device of type {device_type} that cannot be saved")]
    Unsupported {
        /// Its type.
        device_type: u16,
    },
    /// It is not paused.
    #[error("the device is at work; pause it before it is saved")]
    Running,
    /// It is no new one.
    #[error("the device has been used by a driver; a state is for one that is new or reset")]
    InUse,
    /// No device can be in that state, or not this one.
    #[error(transparent)]
    State(#[from] StateError),
    /// It cannot start from there: queues that are not in RAM, or a host that refuses something.
    #[error("the device cannot go on from its state")]
    Start(#[from] ActivateError),
}

#[cfg(test)]
mod tests;
