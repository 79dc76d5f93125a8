//! What the test of a virtio device needs, with no virtual machine: the driver's side of queues and transports, guest memory of
//! any shape, and recorders.
//!
//! The driver is as well-behaved or as hostile as the test wants: each step of [`DriverQueue`] and [`Driver`] can be made
//! alone, in any order, with any value.

mod driver;
mod memory;
mod output;
mod queue;
mod recorder;

pub use driver::{Driver, MmioDriver, StartError};
pub use memory::{Memory, guest_memory, guest_memory_of};
pub use output::OutputRecorder;
pub use queue::{ChainBuilder, DriverQueue};
pub use recorder::{LineRecorder, LinkRecorder};
