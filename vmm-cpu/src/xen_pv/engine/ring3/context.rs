//! From the context to the processor and back: what IRET would check on the way out, and what an exit means on the way in.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};

use super::{Ring3, memory_error};
use crate::error::Result;
use crate::state::{GeneralRegisters, Segment, SystemRegisters, rflags};
use crate::xen_pv::engine::descriptors::{FLAT_CS32, FLAT_CS64, FLAT_SS, SelectorFault};
use crate::xen_pv::engine::private::{self, Private};
use crate::xen_pv::engine::{EngineExit, GuestMode, has_error_code};

/// Flags that the guest chooses: CF, PF, AF, ZF, SF, TF, DF, OF, RF, AC, ID.
const GUEST_FLAGS: u64 = 0x0025_0dd5;

const DEBUG: u8 = 1;
const INVALID_OPCODE: u8 = 6;
const GENERAL_PROTECTION: u8 = 13;
pub(super) const PAGE_FAULT: u8 = 14;

impl Ring3 {
    /// Gives the processor what [`Context`] says; the exception if that cannot be loaded.
    pub(super) fn load_context(&mut self) -> Result<Option<EngineExit>> {
        let fault = |fault: SelectorFault| EngineExit::Exception {
            vector: fault.vector,
            error_code: fault.error_code,
            address: 0,
        };
        let c = &self.context;
        let (cs, ss) = match (self.descriptors.code(c.cs), self.descriptors.stack(c.ss)) {
            (Ok(cs), Ok(ss)) => (cs, ss),
            (Err(error), _) | (_, Err(error)) => return Ok(Some(fault(error))),
        };
        let mut general = c.general;
        if !cs.long {
            general.rip &= 0xffff_ffff;
            general.rsp &= 0xffff_ffff;
        }
        let root = match c.mode {
            GuestMode::Kernel => Some(self.kernel_root),
            GuestMode::User => self.user_root,
        };
        let Some(root) = root.filter(|_| is_canonical(general.rip)) else {
            let none = SelectorFault { vector: GENERAL_PROTECTION, error_code: 0 };
            return Ok(Some(fault(none)));
        };
        general.rflags = general.rflags & GUEST_FLAGS | rflags::FIXED | rflags::IF;
        let system = SystemRegisters {
            cs,
            ss,
            ds: self.descriptors.data(c.ds),
            es: self.descriptors.data(c.es),
            fs: Segment { base: canonical(c.fs_base), ..self.descriptors.data(c.fs) },
            gs: Segment { base: canonical(c.gs_base), ..self.descriptors.data(c.gs) },
            ..self.system
        };
        self.load_root(root)?;
        let system = SystemRegisters { cr3: self.system.cr3, ..system };
        if std::mem::take(&mut self.rare_changed) {
            self.vcpu.set_system_registers(&system)?;
        } else {
            self.vcpu.set_segment_registers(&system)?;
        }
        self.vcpu.set_registers(&general)?;
        self.publish()?;
        Ok(None)
    }

    /// Takes over what the guest changed by itself: data segments.
    pub(super) fn take_segments(&mut self, system: &SystemRegisters) {
        let c = &mut self.context;
        (c.ds, c.es, c.fs, c.gs) =
            (system.ds.selector, system.es.selector, system.fs.selector, system.gs.selector);
        (c.fs_base, c.gs_base) = (system.fs.base, system.gs.base);
        self.system.cr2 = system.cr2;
    }

    /// SYSCALL from code of the guest, by the registers as they are at the stub.
    pub(super) fn syscall_exit(&mut self, mut general: GeneralRegisters, from_32: bool) -> EngineExit {
        (general.rip, general.rflags) = (general.rcx, general.r11);
        self.context.general = general;
        // The processor does not say what they were.
        (self.context.cs, self.context.ss) = (if from_32 { FLAT_CS32 } else { FLAT_CS64 }, FLAT_SS);
        EngineExit::Syscall
    }

    /// The frame that the processor pushed for an exception: error code, RIP, CS, RFLAGS, RSP, SS.
    pub(super) fn frame(&self, vector: u8) -> Result<[u64; 6]> {
        let end = self.private.stack_end_gpa(self.index, vector);
        let mut bytes = [0; 48];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(end.0 - 48)).map_err(memory_error)?;
        let mut frame = [0; 6];
        for (value, bytes) in frame.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *value = u64::from_le_bytes(*bytes);
        }
        Ok(frame)
    }

    pub(super) fn exception_exit(&mut self, vector: u8, mut general: GeneralRegisters) -> Result<EngineExit> {
        let [error, rip, cs, flags, rsp, ss] = self.frame(vector)?;
        general.rsp = rsp;
        if self.shim.is_some() {
            let system = self.vcpu.segment_registers()?;
            let there = GeneralRegisters { rip, rflags: flags, ..general };
            if let Some(exit) = self.shim_exit(&there, cs & 3 == 0, &system)? {
                return Ok(exit);
            }
        }
        let from_32 = match rip {
            private::VA_SYSCALL => Some(false),
            private::VA_SYSCALL_32 => Some(true),
            _ => None,
        };
        // In ring 0, a debug exception may come before a stub's OUT. In ring 3, that OUT is not allowed.
        let at_stub = cs & 3 == 0 && vector == DEBUG
            || cs & 3 == 3 && matches!(vector, GENERAL_PROTECTION | INVALID_OPCODE);
        if let Some(from_32) = from_32.filter(|_| at_stub) {
            return Ok(self.syscall_exit(general, from_32));
        }
        if cs & 3 == 0 {
            return match Private::exception_of(rip).filter(|inner| vector == DEBUG && *inner != DEBUG) {
                Some(inner) => self.exception_exit(inner, general),
                None => Ok(self.crash("an exception in the engine's own code")),
            };
        }
        if vector == DEBUG {
            self.system.dr6 = self.vcpu.system_registers()?.dr6;
        }
        (general.rip, general.rflags) = (rip, flags);
        self.context.general = general;
        (self.context.cs, self.context.ss) = (low16(cs), low16(ss));
        let error_code =
            if has_error_code(vector) { u32::try_from(error & 0xffff_ffff).unwrap_or(0) } else { 0 };
        let address = if vector == PAGE_FAULT { self.system.cr2 } else { 0 };
        Ok(EngineExit::Exception { vector, error_code, address })
    }
}

/// The address with its upper bits as 48-bit addresses have them.
pub(super) fn canonical(va: u64) -> u64 {
    (va.cast_signed() << 16 >> 16).cast_unsigned()
}

pub(super) fn is_canonical(va: u64) -> bool {
    canonical(va) == va
}

pub(super) fn low16(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0)
}
