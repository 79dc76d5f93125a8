//! The devices of a PC that are not on PCI and not virtio: what a kernel expects to find at fixed places.
//!
//! | module | device | where |
//! |---|---|---|
//! | [`serial`] | 16550 UART | ports, 8 from [`ports::COM1`] on |
//! | [`ioapic`] | 82093AA I/O APIC | memory, [`ports::IO_APIC`] |
//! | [`pic`] | two 8259A interrupt controllers | ports [`ports::PIC`] |
//! | [`pit`] | 8254 timer, port 0x61 | ports [`ports::PIT`] |
//! | [`rtc`] | MC146818 clock and CMOS RAM | ports [`ports::RTC`] |
//! | [`i8042`] | keyboard controller without keyboard | ports [`ports::I8042`] |
//! | [`acpi_pm`] | ACPI fixed hardware: PM timer, power-off, power button, reset | ports [`ports::ACPI_PM`] |
//! | [`debug_exit`] | the guest ends with a status | port [`ports::DEBUG_EXIT`] |
//! | [`vm_generation`] | a number that is another one when the machine goes on from a saved state | anywhere in RAM |
//!
//! All are plain state behind bus accesses: no host time, no threads, no file descriptors. Those with a notion of time
//! take a [`Clock`](crate::Clock) and are [`TimedDevice`](crate::TimedDevice)s. Each has a `*State` structure that a snapshot stores, checked when it is restored.

use std::sync::Arc;

pub mod acpi_pm;
pub mod debug_exit;
pub mod i8042;
pub mod ioapic;
pub mod pic;
pub mod pit;
pub mod ports;
pub mod rtc;
pub mod serial;
pub mod vm_generation;

pub use acpi_pm::{AcpiPm, AcpiPmState};
pub use debug_exit::DebugExit;
pub use i8042::{I8042, I8042State};
pub use ioapic::{IoApic, IoApicLine, IoApicState};
pub use pic::{Pic, PicLine, PicState};
pub use pit::{Pit, PitState};
pub use rtc::{Rtc, RtcState};
pub use serial::{Uart16550, UartState};
pub use vm_generation::{VM_GENERATION_SIZE, VmGeneration, VmGenerationError};

/// What a guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlatformEvent {
    /// The machine is to be reset.
    Reset,
    /// The machine is to be switched off (ACPI S5).
    PowerOff,
    /// The guest ends with this status, which is odd: see [`DebugExit`].
    DebugExit {
        /// The value that the guest wrote, doubled, plus one.
        status: u32,
    },
}

/// Who is told of a [`PlatformEvent`]. A closure is one.
///
/// Called on the vCPU thread whose access it was, with the device locked: note the event, kick the vCPUs, and
/// act when the call has returned.
pub trait PlatformEvents: Send + Sync {
    /// The guest asked for `event`.
    fn event(&self, event: PlatformEvent);
}

impl<T: PlatformEvents + ?Sized> PlatformEvents for Arc<T> {
    fn event(&self, event: PlatformEvent) {
        (**self).event(event);
    }
}

impl<F: Fn(PlatformEvent) + Send + Sync> PlatformEvents for F {
    fn event(&self, event: PlatformEvent) {
        self(event);
    }
}
