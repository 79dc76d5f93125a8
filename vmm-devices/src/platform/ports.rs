//! Where a PC has its devices, and on which interrupts: addresses that kernels try without being told.
//!
//! The interrupt numbers are those of the ISA bus. On the I/O APIC they are the same but for the timer, which
//! is on input 2: the MADT says so (ACPI 6.5, 5.2.12.5).

use crate::bus::BusRange;

/// The first PIC, the second one, and the edge/level registers of both.
pub const PIC: [BusRange; 3] =
    [BusRange::new(0x20, 2), BusRange::new(0xa0, 2).at_offset(2), BusRange::new(0x4d0, 2).at_offset(4)];

/// The timer, and the port with the gate and the output of its channel 2.
pub const PIT: [BusRange; 2] = [BusRange::new(0x40, 4), BusRange::new(0x61, 1).at_offset(4)];
/// ISA interrupt of the timer's channel 0.
pub const PIT_IRQ: u32 = 0;
/// Input of the I/O APIC that the timer is on.
pub const PIT_GSI: u32 = 2;

/// Data port, and status and command port of the keyboard controller.
pub const I8042: [BusRange; 2] = [BusRange::new(0x60, 1), BusRange::new(0x64, 1).at_offset(4)];

/// Index and data port of the real-time clock.
pub const RTC: BusRange = BusRange::new(0x70, 2);
/// ISA interrupt of the real-time clock.
pub const RTC_IRQ: u32 = 8;

/// First serial port.
pub const COM1: BusRange = BusRange::new(0x3f8, 8);
/// ISA interrupt of the first serial port, and of the third.
pub const COM1_IRQ: u32 = 4;
/// Second serial port.
pub const COM2: BusRange = BusRange::new(0x2f8, 8);
/// ISA interrupt of the second serial port, and of the fourth.
pub const COM2_IRQ: u32 = 3;
/// Third serial port.
pub const COM3: BusRange = BusRange::new(0x3e8, 8);
/// Fourth serial port.
pub const COM4: BusRange = BusRange::new(0x2e8, 8);

/// Where the guest writes the status that it ends with.
pub const DEBUG_EXIT: BusRange = BusRange::new(0xf4, 4);

/// ACPI power management registers. The FADT tells where they are, so any free 16 ports will do.
pub const ACPI_PM: BusRange = BusRange::new(0x600, 16);
/// ISA interrupt of ACPI events (SCI): level-triggered.
pub const ACPI_SCI: u32 = 9;

/// The I/O APIC, in guest-physical memory.
pub const IO_APIC: BusRange = BusRange::new(0xfec0_0000, 0x1000);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::{BusDevice, PioBus};

    struct Nothing;
    impl BusDevice for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn they_fit_beside_each_other() {
        let bus = PioBus::new();
        let single = [RTC, COM1, COM2, COM3, COM4, DEBUG_EXIT, ACPI_PM];
        for range in PIC.iter().chain(&PIT).chain(&I8042).chain(&single) {
            bus.insert("device", *range, Arc::new(Nothing)).unwrap();
        }
        // The PCI configuration ports stay free.
        bus.insert("pci", BusRange::new(0xcf8, 8), Arc::new(Nothing)).unwrap();
    }
}
