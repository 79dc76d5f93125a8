//! What of a virtual processor only the engine knows, for its state: extended registers, XCR0, debug registers, descriptors.

use vmm_memory::vm_memory::GuestAddress;

use super::context::is_canonical;
use super::control::{debug_value, is_consistent};
use super::{Ring3, msr};
use crate::error::{Error, Result};
use crate::state::{SystemRegisters, XsaveArea};
use crate::xen_pv::engine::descriptors::{self, FIRST_RESERVED};
use crate::xen_pv::engine::{Engine as _, EngineCapabilities};

/// x87 and SSE, which every processor has.
const LEGACY: u64 = 3;

fn invalid(element: &'static str, problem: String) -> Error {
    Error::InvalidState { element, problem }
}

impl Ring3 {
    /// XCR0 as programs find it.
    pub(in crate::xen_pv) fn xcr0_in_use(&self) -> u64 {
        if self.xcr0_fixed { self.capabilities.xcr0 } else { self.system.xcr0 }
    }

    /// The registers that XSAVE knows, of those that the guest knows of.
    pub(in crate::xen_pv) fn extended_state(&mut self) -> Result<XsaveArea> {
        let mut area = self.vcpu.save()?.xsave;
        area.retain(self.xcr0_in_use() | LEGACY);
        Ok(area)
    }

    /// The root of mode kernel, once the guest has one.
    pub(in crate::xen_pv) fn guest_root(&self) -> Option<GuestAddress> {
        Some(self.kernel_root).filter(|root| root.0 != self.private.own_root())
    }

    /// Checks what the methods of the engine's traits would refuse, so that they do not.
    pub(in crate::xen_pv) fn check_saved(
        &self,
        system: &SystemRegisters,
        xsave: &XsaveArea,
        descriptors: impl Iterator<Item = (u16, u64)>,
    ) -> Result<()> {
        let EngineCapabilities { xcr0, compatibility_mode, .. } = self.capabilities;
        // Programs use what they find in XCR0, and the guest kernel saves what it found.
        let saved = system.xcr0;
        let fits = match xcr0 {
            // Nobody can set it.
            0 => saved & !LEGACY == 0 && saved & 1 != 0,
            _ if self.xcr0_fixed => saved == xcr0,
            _ => saved & !xcr0 == 0 && is_consistent(saved),
        };
        if !fits {
            let relation = if self.xcr0_fixed { "exactly" } else { "bit 0 with any that go together of" };
            return Err(invalid(
                "system.xcr0",
                format!("{saved:#x}, this engine takes {relation} {xcr0:#x}"),
            ));
        }
        if xsave.xstate_bv() & !(saved | LEGACY) != 0 {
            let problem = format!("components {:#x} are in use, XCR0 is {saved:#x}", xsave.xstate_bv());
            return Err(invalid("xsave", problem));
        }
        let registers = (0..).zip(system.dr).chain([(6, system.dr6), (7, system.dr7)]);
        for (number, value) in registers {
            if let Err(allowed) = debug_value(number, value) {
                return Err(invalid("system.dr", format!("{value:#x} in DR{number}, allowed is {allowed}")));
            }
        }
        for base in [system.fs.base, system.gs.base] {
            if !is_canonical(base) {
                return Err(invalid(
                    "system",
                    format!("base {base:#x} of a segment, which is not canonical"),
                ));
            }
        }
        for (index, value) in descriptors {
            if index >= FIRST_RESERVED || descriptors::admit(value, compatibility_mode) != Some(value) {
                let problem = format!("{value:#x} in entry {index}, which is none of a guest's here");
                return Err(invalid("backend.descriptors", problem));
            }
        }
        Ok(())
    }

    /// Takes over the registers that XSAVE knows.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if they cannot be so.
    pub(in crate::xen_pv) fn restore_extended_state(&mut self, xsave: &XsaveArea) -> Result<()> {
        let mut state = self.vcpu.save()?;
        state.xsave = xsave.clone();
        // Of that, the time that has passed meanwhile.
        state.msrs.retain(|register| register.index != msr::TSC);
        self.vcpu.restore(&state)
    }

    /// Takes over control and debug registers, which were checked.
    pub(in crate::xen_pv) fn restore_system(&mut self, system: &SystemRegisters) -> Result<()> {
        for (number, value) in (0..).zip(system.dr).chain([(6, system.dr6), (7, system.dr7)]) {
            self.set_debug_register(number, value)?;
        }
        self.rare_changed = true;
        match self.capabilities.xcr0 {
            0 => Ok(()),
            _ => self.set_xcr0(system.xcr0),
        }
    }
}
