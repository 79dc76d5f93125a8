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
//! | [`VirtioState`] | the device in a snapshot: paused, saved, restored elsewhere, resumed |
//!
//! # Pause, save, restore
//! A machine that is saved or moved stops its vCPUs, then [pauses](VirtioMmio::pause) each device: requests that were taken are finished and
//! told to the driver, or stay with their queue as chains in flight. Only then are vCPUs and interrupt controllers saved, for
//! devices may have interrupted until that moment. [`save`](VirtioMmio::save) gives the state of a device, plain data for a snapshot
//! (feature `snapshot`). After that the machine goes on ([`resume`](VirtioMmio::resume)), or ends.
//!
//! Where it goes on elsewhere, the same device is built from what that host gives it (a file, a tap device, a socket). When RAM and
//! interrupt controllers are there, and before the guest runs, it takes its state over ([`restore`](VirtioMmio::restore)), which is checked as a
//! driver's accesses are. Then it is paused, and `resume` has it look at each queue once, so that no doorbell is lost.
//!
//! ```
//! use vmm_devices::testkit::{Driver, DriverQueue, LineRecorder, MmioDriver, guest_memory};
//! use vmm_devices::virtio::{Rng, VirtioMmio};
//! use std::sync::{Arc, Mutex};
//!
//! let memory = guest_memory(1 << 20)?;
//! let build = || VirtioMmio::new(Rng::new(std::io::repeat(7)), memory.clone(), LineRecorder::default());
//! let here = Arc::new(Mutex::new(build()?));
//! let driver = MmioDriver::new(here.clone());
//! let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8)?;
//! driver.start(0, &[(0, &queue)])?;
//!
//! here.lock().unwrap().pause();
//! queue.chain().writable(0x8000, 64).submit()?;
//! driver.notify(0); // nobody hears it
//! let state = here.lock().unwrap().save()?;
//! drop((here, driver));
//!
//! let mut there = build()?; // over a copy of the memory, as a rule
//! there.restore(&state)?;
//! there.resume()?;
//! assert_eq!(queue.take_used()?, Some((0, 64)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | device | what goes with it, beside queues, features and status |
//! |---|---|
//! | block | the disk's size and name, which must be those of the new one, and the cache mode that the driver chose |
//! | entropy | nothing |
//! | console | what ports were told, input that the guest has not got, how much of a buffer was written |
//! | network | what the driver wants of frames: address, filters, offloads, pairs of queues; it is asked to announce itself. Frames that came and wait for buffers or a rate, one of each pair at most |
//! | balloon | its target, and what the driver says that it holds |
//! | sockets | nothing: connections end, and the driver is told so (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, 5.10.6.7) |
//!
//! Rate limits, figures and limits of sizes are the new device's own.
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
mod state;
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
pub use state::{
    DeviceState, VirtioMmioState, VirtioPciState, VirtioState, VirtioStateError, VirtqueueState,
};
pub use vsock::Vsock;
