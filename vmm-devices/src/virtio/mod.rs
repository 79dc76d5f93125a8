//! Virtio devices (Virtio 1.3): what a device is, how its queues are served, and the transports a driver finds it by.
//!
//! A device is state plus methods. It knows neither transport nor event loop nor hypervisor:
//!
//! | part | what |
//! |---|---|
//! | [`VirtioDevice`] | features, configuration, and what begins when the driver is ready |
//! | [`Worker`] | serves queues of a device that the driver has started; what it needs comes in an [`Activation`] |
//! | [`Virtqueue`], [`Chain`] | a split queue whose driver is not believed anything |
//! | [`Executor`] | decides which thread calls a worker, and when: [`Inline`] at the doorbell, `EventLoop` and `ThreadPerQueue` on theirs |
//! | [`VirtioMmio`] | the device on an MMIO bus (4.2) |
//! | [`VirtioPci`] | the device as a PCI function (4.1) |
//!
//! # Threat model
//! The driver is hostile: registers are written in any order, at any moment and width; queues lie anywhere, change while they
//! are read, and hold chains that loop, overlap, name memory that is not there, or are submitted twice. Of all that
//! nothing makes a device panic, loop, allocate without bound, or touch what is not guest RAM. A queue that breaks the rules
//! stops its device, which tells so with DEVICE_NEEDS_RESET (2.1.1), until the driver resets it. Nothing of a queue's
//! set-up can be changed between DRIVER_OK and reset.

pub mod balloon;
pub mod block;
pub mod console;
mod control;
mod device;
mod doorbell;
mod doorbell_host;
#[cfg(feature = "event-loop")]
mod event_loop;
mod executor;
pub mod metrics;
mod mmio;
pub mod net;
mod pci;
mod queue;
pub mod rate;
pub mod rng;
mod slices;
pub mod vsock;

pub use balloon::Balloon;
pub use block::Block;
pub use console::Console;
pub use device::{
    ActivateError, Activation, DeviceMemory, DeviceType, DriverLink, Progress, VirtioDevice, Worker, feature,
};
pub use doorbell::Doorbells;
pub use doorbell_host::{DoorbellHost, GuestDoorbell};
#[cfg(feature = "event-loop")]
pub use event_loop::{EventLoop, LoopExecutor, LoopThread, ThreadPerQueue};
pub use executor::{Executor, Inline, Running};
pub use mmio::{VirtioMmio, VirtioMmioBuilder, VirtioMmioError};
pub use net::Net;
pub use pci::{VirtioPci, VirtioPciBuilder, VirtioPciError};
pub use queue::{Chain, QueueError, Virtqueue};
pub use rng::Rng;
pub use vsock::Vsock;
