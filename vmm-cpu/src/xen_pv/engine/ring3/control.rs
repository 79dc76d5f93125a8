//! What the ABI asks of the processor beside memory: running, descriptors, control and debug registers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::Bytes as _;

use super::context::is_canonical;
use super::{Ring3, msr};
use crate::error::{Error, Result};
use crate::xen_pv::engine::descriptors;
use crate::xen_pv::engine::{Context, Engine, EngineCapabilities, EngineExit, EngineHandle, FastPath};

const CR0_TS: u64 = 1 << 3;

impl Engine for Ring3 {
    fn run(&mut self) -> Result<EngineExit> {
        if self.crashed {
            return Ok(EngineExit::Crashed);
        }
        if self.signals.take_kick() {
            return Ok(EngineExit::Interrupted);
        }
        let _inside = self.signals.enter();
        self.run_guest()
    }

    fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    fn handle(&self) -> Arc<dyn EngineHandle> {
        Arc::clone(&self.signals) as Arc<dyn EngineHandle>
    }

    fn capabilities(&self) -> EngineCapabilities {
        self.capabilities
    }

    fn time_stamp(&mut self) -> Result<u64> {
        self.vcpu.msr(msr::TSC)
    }

    fn set_descriptor(&mut self, index: u16, descriptor: u64) -> bool {
        let admitted = descriptors::admit(descriptor, self.capabilities.compatibility_mode);
        let value = admitted.unwrap_or(0);
        if self.descriptors.get(index) == value {
            return admitted.is_some() && index < descriptors::FIRST_RESERVED;
        }
        if !self.descriptors.set(index, value) {
            return false;
        }
        let place = self.private.descriptor(self.index, index);
        // The page is part of the memory that the machine was made with.
        let stored = self.ram.memory().store(value, place, Ordering::Relaxed);
        stored.is_ok() && admitted.is_some()
    }

    fn descriptor(&self, index: u16) -> u64 {
        self.descriptors.get(index)
    }

    fn set_task_switched(&mut self, set: bool) {
        self.system.cr0 = if set { self.system.cr0 | CR0_TS } else { self.system.cr0 & !CR0_TS };
    }

    fn set_fast_path(&mut self, path: &FastPath) {
        if let Some(shim) = &mut self.shim {
            shim.set_path(path);
        }
    }

    fn set_xcr0(&mut self, value: u64) -> Result<()> {
        let allowed = self.capabilities.xcr0;
        if value & !allowed != 0 || !is_consistent(value) {
            let allowed = format!("bit 0 with any of {allowed:#x} that go together");
            return Err(Error::invalid("XCR0", format_args!("{value:#x}"), allowed));
        }
        // A kernel that wants less than is fixed has chosen itself what it does not save.
        if !self.xcr0_fixed {
            self.system.xcr0 = value;
            self.rare_changed = true;
        }
        Ok(())
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        match number {
            6 => self.system.dr6,
            7 => self.system.dr7,
            _ => self.system.dr.get(usize::from(number)).copied().unwrap_or(0),
        }
    }

    fn set_debug_register(&mut self, number: u8, value: u64) -> Result<()> {
        let value = debug_value(number, value).map_err(|allowed| {
            Error::invalid("debug register", format_args!("{value:#x} in DR{number}"), allowed)
        })?;
        self.rare_changed = true;
        match number {
            6 => self.system.dr6 = value,
            7 => self.system.dr7 = value,
            _ => {
                if let Some(register) = self.system.dr.get_mut(usize::from(number)) {
                    *register = value;
                }
            }
        }
        Ok(())
    }
}

/// What becomes of a value in a debug register; what is allowed, if it cannot be there.
pub(super) fn debug_value(number: u8, value: u64) -> Result<u64, &'static str> {
    /// What is always set, and what can be.
    const DR6: (u64, u64) = (0xffff_0ff0, 0xffff_efff);
    /// General detect would stop the engine's own code.
    const DR7: (u64, u64) = (0x400, 0xffff_07ff);
    match number {
        0..=3 if !is_canonical(value) || is_reserved(value) => {
            Err("a canonical address outside of the engine's range")
        }
        0..=3 => Ok(value),
        6 => Ok(value & DR6.1 | DR6.0),
        7 if value >> 32 != 0 => Err("32 bits"),
        7 => Ok(value & DR7.1 | DR7.0),
        _ => Err("DR0 to DR3, DR6 or DR7"),
    }
}

/// Whether the processor takes the value (Intel SDM 3A 2.6): components that build upon others come with them.
pub(super) fn is_consistent(xcr0: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const AVX_512: u64 = 7 << 5;
    xcr0 & X87 != 0
        && (xcr0 & AVX == 0 || xcr0 & SSE != 0)
        && (xcr0 & AVX_512 == 0 || xcr0 & (AVX_512 | AVX) == AVX_512 | AVX)
}

/// Whether the address is in Xen's range: the slots 256 to 271 of a root.
fn is_reserved(va: u64) -> bool {
    (256..272).contains(&(va >> 39 & 0x1ff))
}
