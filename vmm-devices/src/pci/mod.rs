//! PCI Express: a host bridge, and what a function needs to stand on it (PCI Local Bus 3.0, PCIe base specification).
//!
//! | part | what |
//! |---|---|
//! | [`HostBridge`] | bus 0: the ECAM window, ports 0xcf8 and 0xcfc, places for BARs, interrupt pins |
//! | [`PciFunction`] | what a function is to the bridge |
//! | [`ConfigSpace`], [`Capability`] | its registers, of which each bit is writable or not; [`ConfigBuilder`] puts them together |
//! | [`Bar`] | a range of memory or ports that it answers at |
//! | [`Intx`], [`Msix`] | its interrupts, by a pin and by messages |
//! | [`PciLayout`] | where all that is, for the bridge and for `AcpiBuilder::pci` |
//!
//! Nothing here knows what the functions do.
//!
//! # Example
//! A function with one register, and what the guest does to reach it.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use vmm_devices::pci::{Bar, ConfigBuilder, ConfigSpace, HostBridge, Identity, PciFunction, PciLayout};
//! use vmm_devices::vmm_memory::vm_memory::GuestAddress;
//! use vmm_devices::{MmioBus, PioBus};
//!
//! struct Scratch {
//!     config: ConfigSpace,
//!     value: u8,
//! }
//!
//! impl PciFunction for Scratch {
//!     fn config(&self) -> &ConfigSpace {
//!         &self.config
//!     }
//!     fn config_mut(&mut self) -> &mut ConfigSpace {
//!         &mut self.config
//!     }
//!     fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
//!         data.fill(self.value);
//!     }
//!     fn bar_write(&mut self, _bar: usize, _offset: u64, data: &[u8]) {
//!         self.value = data.first().copied().unwrap_or(0);
//!     }
//!     fn reset(&mut self) {
//!         self.value = 0;
//!     }
//! }
//!
//! let (mmio, pio) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()));
//! let bridge = HostBridge::new(PciLayout::default(), &mmio, &pio)?;
//! let mut config = ConfigBuilder::new(Identity::new(0x1234, 0x5678, [0xff, 0, 0]));
//! config.bar(0, Bar::memory32(0x1000))?;
//! let at = bridge.add(Arc::new(Mutex::new(Scratch { config: config.build(), value: 0 })))?;
//! assert_eq!(at.to_string(), "00:01.0");
//!
//! // The guest asks who is there, where BAR 0 is, and switches memory decoding on.
//! let register = |offset: u64| GuestAddress(0xe000_0000 + (1 << 15) + offset);
//! let (mut ids, mut bar) = ([0; 4], [0; 4]);
//! mmio.read(register(0), &mut ids);
//! mmio.read(register(0x10), &mut bar);
//! mmio.write(register(4), &[2, 0]);
//! assert_eq!(ids, [0x34, 0x12, 0x78, 0x56]);
//! assert!(mmio.write(GuestAddress(u32::from_le_bytes(bar).into()), &[42]));
//! # Ok::<(), vmm_devices::pci::PciError>(())
//! ```
//!
//! # Threat model
//! The guest writes any register in any order, width and moment, from several vCPUs at once. Bits that are not its to
//! change stay what they are. A BAR answers where the guest puts it if that is in a window of the [`PciLayout`] and
//! nobody else is there; else it answers nowhere, which [`HostBridge::mappings`] and [`HostBridge::refusals`] show,
//! and no other device loses an address. What a write costs is bounded by the number of BARs that there are. The
//! functions and the layout are the monitor's.
//!
//! # What there is not
//! * **Bridges and further buses**: all functions are on bus 0, in segment 0.
//! * **Hot-plug slots**: functions come and go at any time, and the guest finds out when it looks (`/sys/bus/pci/rescan`).
//! * **MSI without X**, expansion ROMs, power states, error reporting, BARs that can be resized.

mod address;
mod bar;
pub mod capability;
mod config;
mod function;
mod host_bridge;
mod intx;
mod layout;
mod mapping;
pub mod msix;

pub use address::FunctionAddress;
pub use bar::{BARS, Bar, BarKind};
pub use capability::{Capability, CapabilityOffset, CapabilityWrite};
pub use config::{CONFIG_SIZE, ConfigBuilder, ConfigSpace, ConfigState, Identity};
pub use function::PciFunction;
pub use host_bridge::{HostBridge, HostBridgeBuilder, HostBridgeState, SharedFunction};
// The tables tell what the wires do.
#[cfg(feature = "acpi")]
pub(crate) use intx::line_of;
pub use intx::{InterruptPin, Intx};
pub use layout::{CONFIG_PORTS, ECAM_SIZE, PciLayout};
pub use mapping::{BarMapping, BarRefusal, BarStatus};
pub use msix::{Msix, MsixEntry, MsixPlace, MsixState};

use crate::error::BusError;

/// Why a bridge, a function or its place on the bus cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// A window that is empty, or where none may be.
    #[error("{window} window of {size:#x} bytes at {base:#x}; allowed are {allowed}")]
    Window {
        /// Which one.
        window: &'static str,
        /// Its first address.
        base: u64,
        /// How many bytes.
        size: u64,
        /// Where it may be.
        allowed: &'static str,
    },
    /// Two windows that share an address.
    #[error("the {window} window overlaps {other}")]
    WindowOverlap {
        /// One of them.
        window: &'static str,
        /// The other one.
        other: &'static str,
    },
    /// Something is where the bridge itself is to be.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device or function number that there is not.
    #[error("device {device} function {function}; allowed are 0 to 31 and 0 to 7")]
    Address {
        /// The device.
        device: u8,
        /// The function.
        function: u8,
    },
    /// There is a function already.
    #[error("{address} is taken by another function")]
    Occupied {
        /// Where.
        address: FunctionAddress,
    },
    /// A function that no guest would find.
    #[error("{address} has no function 0 beside it, which a guest looks for first")]
    WithoutFunctionZero {
        /// Where it was to be.
        address: FunctionAddress,
    },
    /// All 32 devices are there.
    #[error("there are 32 devices on the bus, as many as it takes")]
    Full,
    /// There is no function.
    #[error("there is no function at {address} that could be taken")]
    NoFunction {
        /// Where.
        address: FunctionAddress,
    },
    /// The windows have no room for a BAR.
    #[error("{address} BAR {bar}: no {size:#x} free bytes, aligned, in the windows for {kind}")]
    NoRoom {
        /// The function.
        address: FunctionAddress,
        /// The BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
        /// What it is for.
        kind: BarKind,
    },
    /// A BAR that no register can say.
    #[error("BAR {bar} of {size:#x} bytes; allowed are powers of two, {allowed}")]
    Bar {
        /// Its number.
        bar: usize,
        /// Its size in bytes.
        size: u64,
        /// The sizes that it may have.
        allowed: &'static str,
    },
    /// A BAR whose register there is not, or is another's.
    #[error("BAR {bar} ({kind}): allowed are 0 to 5 that are not in use; 64-bit ones take two")]
    BarIndex {
        /// Its number.
        bar: usize,
        /// What it is for.
        kind: BarKind,
    },
    /// Capabilities that do not fit.
    #[error("a capability of {size} bytes, where {room} are left")]
    CapabilityRoom {
        /// Bytes that it needs.
        size: usize,
        /// Bytes that there are.
        room: u16,
    },
    /// No vector, or too many.
    #[error("{vectors} MSI-X vectors; allowed are 1 to {max}")]
    MsixVectors {
        /// How many.
        vectors: u16,
        /// How many there may be.
        max: u16,
    },
    /// Table and pending bits that cannot be where they are to be.
    #[error(
        "MSI-X of {vectors} vectors, table at {:#x} and pending bits at {:#x} of BAR {}: multiples of 8 within a memory BAR, \
         apart from each other, are needed",
        place.table, place.pending, place.bar
    )]
    MsixPlace {
        /// Where.
        place: MsixPlace,
        /// How many vectors.
        vectors: u16,
    },
}
