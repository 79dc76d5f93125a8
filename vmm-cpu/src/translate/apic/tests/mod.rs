//! Behaviour across the modules.

mod access;
mod modes;
mod priority;
mod random;
mod saved;
mod threads;

use std::sync::Arc;

use super::lvt::Lint;
use super::message::{Delivery, Destination};
use super::*;

/// Everything there is.
const FEATURES: ApicFeatures =
    ApicFeatures { x2apic: true, tsc_deadline: true, suppress_eoi_broadcast: true, gpa_bits: 40 };

/// What the first versions of most things lack.
const PLAIN: ApicFeatures =
    ApicFeatures { x2apic: false, tsc_deadline: false, suppress_eoi_broadcast: false, gpa_bits: 36 };

const XAPIC: u64 = 0xfee0_0800;
const X2APIC: u64 = 0xfee0_0c00;

const ID: u64 = 0x20;
const VERSION: u64 = 0x30;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

/// A local APIC and the shorthands of a guest; time stands still unless told.
#[derive(Debug)]
struct Guest {
    apic: LocalApic,
    now: u64,
    tsc: u64,
}

impl Guest {
    /// As after RESET, of ID `id`; 0 is the bootstrap processor.
    fn new(id: u32) -> Self {
        Self::with(id, FEATURES)
    }

    fn with(id: u32, features: ApicFeatures) -> Self {
        Self { apic: LocalApic::new(Arc::new(Inbox::new(id)), features, id == 0), now: 0, tsc: 0 }
    }

    /// In xAPIC mode and software-enabled.
    fn xapic() -> Self {
        let mut guest = Self::new(0);
        guest.store(SVR, 0x1ff);
        guest
    }

    /// In x2APIC mode and software-enabled.
    fn x2apic() -> Self {
        let mut guest = Self::new(0);
        assert_eq!(guest.wrmsr(MSR_APIC_BASE, X2APIC), Ok(ApicAction::BaseChanged));
        assert_eq!(guest.wrmsr(0x80f, 0x1ff), Ok(ApicAction::None));
        guest
    }

    fn load(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.apic.mmio_read(offset, &mut data, self.now, self.tsc);
        u32::from_le_bytes(data)
    }

    fn act(&mut self, offset: u64, value: u32) -> ApicAction {
        self.apic.mmio_write(offset, &value.to_le_bytes(), self.now, self.tsc)
    }

    /// A store, whatever it has for others.
    fn store_any(&mut self, offset: u64, value: u32) {
        let _whatever = self.act(offset, value);
    }

    /// A store with no consequence for others.
    fn store(&mut self, offset: u64, value: u32) {
        assert_eq!(self.act(offset, value), ApicAction::None, "store of {value:#x} to {offset:#x}");
    }

    fn rdmsr(&mut self, index: u32) -> Result<u64, crate::vcpu::MsrFault> {
        self.apic.msr_read(index, self.now, self.tsc)
    }

    fn wrmsr(&mut self, index: u32, value: u64) -> Result<ApicAction, crate::vcpu::MsrFault> {
        self.apic.msr_write(index, value, self.now, self.tsc)
    }

    /// WRMSR that is legal, whatever it has for others.
    fn set_msr(&mut self, index: u32, value: u64) {
        if let Err(fault) = self.wrmsr(index, value) {
            panic!("WRMSR of {value:#x} to {index:#x}: {fault}");
        }
    }

    /// Errors since the last call.
    fn errors(&mut self) -> u32 {
        self.store(ESR, 0);
        self.load(ESR)
    }

    /// Posts interrupts as another thread would, and takes them.
    fn receive(&mut self, vectors: &[u8], level: bool) {
        for vector in vectors {
            self.apic.inbox.post_interrupt(*vector, level);
        }
        assert_eq!(self.apic.drain(), Events::default());
    }

    fn expire(&mut self, now: u64, tsc: u64) {
        (self.now, self.tsc) = (now, tsc);
        self.apic.expire(now, tsc);
    }
}
