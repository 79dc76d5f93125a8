//! The registers of BAR 0 (QEMU docs/specs/ivshmem-spec, "PCI device registers"), and how rings interrupt the guest.
//!
//! With MSI-X on, a ring is a message. With MSI-X off, it sets bit 0 of Interrupt Status, and the pin is asserted while Status and
//! Mask have a bit in common, which is what revision 0 does. Revision 1 says that both registers are reserved: a driver for it
//! leaves Mask as it was after reset, at 0, so that it sees nothing of the pin.

use std::sync::{Mutex, MutexGuard};

use crate::error::StateError;
use crate::interrupt::{InterruptLine as _, lock};
use crate::pci::{ConfigSpace, Intx, Msix, MsixState};

/// Offsets of registers, in units of 4 bytes.
pub(super) mod register {
    pub(in super::super) const MASK: u64 = 0;
    pub(in super::super) const STATUS: u64 = 1;
    pub(in super::super) const POSITION: u64 = 2;
    pub(in super::super) const DOORBELL: u64 = 3;
}

#[derive(Debug, Default)]
struct Registers {
    mask: u32,
    status: u32,
}

/// How a device interrupts its guest. Any thread signals, without the device's lock.
#[derive(Debug)]
pub(super) struct Interrupts {
    msix: Option<Msix>,
    pin: Option<Intx>,
    registers: Mutex<Registers>,
}

impl Interrupts {
    pub(super) fn new(msix: Option<Msix>, pin: Option<Intx>) -> Self {
        Self { msix, pin, registers: Mutex::default() }
    }

    pub(super) fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    /// A peer has rung for `vector`.
    pub(super) fn signal(&self, vector: u16) {
        if self.msix.as_ref().is_some_and(|msix| msix.notify(vector)) {
            return;
        }
        let mut registers = lock(&self.registers);
        registers.status |= 1;
        self.drive(&registers);
    }

    fn drive(&self, registers: &MutexGuard<'_, Registers>) {
        // While MSI-X is on, the pin is none (PCI 3.0, 6.8.2.3).
        let by_message = self.msix.as_ref().is_some_and(Msix::is_enabled);
        if let Some(pin) = &self.pin {
            pin.set_level(!by_message && registers.mask & registers.status != 0);
        }
    }

    /// The guest loads Interrupt Mask or Status; the latter is cleared by that.
    pub(super) fn load(&self, register: u64) -> u32 {
        let mut registers = lock(&self.registers);
        match register {
            register::MASK => registers.mask,
            register::STATUS => {
                let status = std::mem::take(&mut registers.status);
                self.drive(&registers);
                status
            }
            _ => 0,
        }
    }

    /// The guest stores to Interrupt Mask or Status.
    pub(super) fn store(&self, register: u64, value: u32) {
        let mut registers = lock(&self.registers);
        match register {
            register::MASK => registers.mask = value,
            register::STATUS => registers.status = value,
            _ => return,
        }
        self.drive(&registers);
    }

    /// Configuration space was written, or restored.
    pub(super) fn config_written(&self, config: &ConfigSpace) {
        if let Some(msix) = &self.msix {
            msix.config_written(config);
        }
        self.drive(&lock(&self.registers));
    }

    /// The machine is reset.
    pub(super) fn reset(&self) {
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        let mut registers = lock(&self.registers);
        *registers = Registers::default();
        self.drive(&registers);
    }

    /// Nothing is signalled any more, nor is what is pending.
    pub(super) fn quiet(&self) {
        if let Some(msix) = &self.msix {
            msix.forget_pending();
        }
        let mut registers = lock(&self.registers);
        registers.status = 0;
        self.drive(&registers);
    }

    /// Mask, Status, and the vectors.
    pub(super) fn state(&self) -> (u32, u32, Option<MsixState>) {
        let registers = lock(&self.registers);
        (registers.mask, registers.status, self.msix.as_ref().map(Msix::state))
    }

    /// Goes on from a saved state.
    pub(super) fn restore(
        &self,
        (mask, status, vectors): (u32, u32, Option<&MsixState>),
        config: &ConfigSpace,
    ) -> Result<(), StateError> {
        if let (Some(msix), Some(vectors)) = (&self.msix, vectors) {
            msix.restore(vectors, config)?;
        }
        let mut registers = lock(&self.registers);
        *registers = Registers { mask, status };
        self.drive(&registers);
        Ok(())
    }
}
