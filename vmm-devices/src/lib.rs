#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[cfg(feature = "acpi")]
pub mod acpi;
pub mod bus;
pub mod channel;
pub mod clock;
mod closer;
mod error;
pub mod interrupt;
pub mod ivshmem;
pub mod net;
pub mod pci;
pub mod platform;
#[cfg(feature = "snapshot")]
pub mod snapshot;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
mod timed;
mod vectored;
pub mod virtio;

pub use bus::{BusDevice, BusDeviceMut, BusRange, MmioBus, PioBus};
pub use clock::{Clock, ManualClock};
pub use error::{BusError, LineError, StateError};
pub use interrupt::{InterruptLine, MsiSink};
pub use platform::{PlatformEvent, PlatformEvents};
pub use timed::{Timed, TimedDevice};
pub use vm_superio;
pub use vmm_memory;
