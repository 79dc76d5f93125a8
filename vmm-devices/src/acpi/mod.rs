//! The ACPI tables that tell a guest what the machine has (ACPI 6.5): RSDP, XSDT, FADT, FACS, MADT, MCFG and a DSDT.
//!
//! [`AcpiBuilder`] takes the description and gives [`AcpiTables`], which are written into guest memory where the
//! kernel looks for them or is told that they are. Everything in them is the monitor's own; the guest
//! reads, and may overwrite, its copy.
//!
//! ```
//! use vmm_devices::acpi::{AcpiBuilder, AcpiDevice, BIOS_AREA};
//! use vmm_devices::platform::ports;
//! use vmm_devices::vmm_memory::GuestRam;
//!
//! let ram = GuestRam::builder().ram(64 << 20).build()?;
//! let tables = AcpiBuilder::new(0..2) // the APIC IDs of two processors
//!     .device(AcpiDevice::serial("COM1", 0, ports::COM1, ports::COM1_IRQ))
//!     .device(AcpiDevice::rtc())
//!     .device(AcpiDevice::virtio_mmio(0, 0xd000_0000, 0x200, 5))
//!     .build(BIOS_AREA)?;
//! tables.write_to(&ram)?;
//! assert_eq!(tables.rsdp().0, 0xe_0000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod builder;
mod device;
mod dsdt;
mod generation;
mod madt;
mod pci;

pub use builder::{AcpiBuilder, AcpiTables, BIOS_AREA};
pub use device::{AcpiDevice, InterruptTrigger, Resource};
pub use pci::AcpiPci;

/// Why tables cannot be made or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// An area that does not begin at a multiple of 64, ends before it begins, or ends beyond 4 GiB.
    #[error("tables cannot be at {start:#x}..{end:#x}: multiples of 0x40 below 0x1_0000_0000 are needed")]
    Area {
        /// First address.
        start: u64,
        /// The address after the last one.
        end: u64,
    },
    /// The tables are larger than the area.
    #[error("the tables need {needed} bytes and have {room}")]
    Room {
        /// Bytes that they need.
        needed: u64,
        /// Bytes that there are.
        room: u64,
    },
    /// No processor, or too many.
    #[error("{count} processors; allowed are 1 to {max}")]
    Processors {
        /// How many were described.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// Two processors with one APIC ID, or an ID that means all processors.
    #[error("APIC ID {id:#x} is used twice, or is the broadcast 0xffff_ffff")]
    ApicId {
        /// The ID.
        id: u32,
    },
    /// An interrupt that the ISA bus does not have.
    #[error("ISA interrupt {irq}; allowed are 0 to 15")]
    IsaInterrupt {
        /// Its number.
        irq: u8,
    },
    /// A device whose name is no ACPI name segment: a letter, then three letters, digits or `_`.
    #[error("device name {name:?}: a capital letter or '_', then three of A-Z, 0-9 and '_' are needed")]
    Name {
        /// The name.
        name: String,
    },
    /// Two devices with one name.
    #[error("device name {name:?} is used twice")]
    SameName {
        /// The name.
        name: String,
    },
    /// A hardware ID that is neither like PNP0501 nor like ACPI0007.
    #[error(
        "hardware ID {hid:?} of device {name}: three letters and four hexadecimal digits, or four and four are needed"
    )]
    HardwareId {
        /// The device.
        name: String,
        /// Its hardware ID.
        hid: String,
    },
    /// A resource that is empty, or goes beyond its address space.
    #[error("device {name}: {size:#x} addresses at {base:#x} are none, or go beyond {last:#x}")]
    Resource {
        /// The device.
        name: String,
        /// First address.
        base: u64,
        /// How many addresses.
        size: u64,
        /// Last address that there may be.
        last: u64,
    },
    /// A PCI host bridge whose addresses cannot be.
    #[error("PCI host bridge")]
    Pci {
        /// Why.
        source: crate::pci::PciError,
    },
    /// The tables could not be written into guest memory.
    #[error("ACPI tables at {gpa:#x}")]
    Memory {
        /// Where.
        gpa: u64,
        /// Why.
        source: vmm_memory::vm_memory::GuestMemoryError,
    },
}

#[cfg(test)]
mod tests;
