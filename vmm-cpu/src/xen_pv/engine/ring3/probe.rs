//! What code in ring 3 finds of the processor, which is not on every backend what the backend was told: where KVM runs ring
//! 3 without hardware assistance, CPUID and XCR0 are the host's own there.

use super::{MAX_STAYS, Ring3, Stay};
use crate::cpuid::CpuidEntry;
use crate::error::{Error, Result};
use crate::state::{GeneralRegisters, Segment, SystemRegisters, rflags};
use crate::xen_pv::engine::descriptors::{FLAT_CS64, FLAT_SS};
use crate::xen_pv::engine::private::{self, PORT_EXCEPTION};

/// XGETBV without CR4.OSXSAVE, RDFSBASE without CR4.FSGSBASE.
const INVALID_OPCODE: u8 = PORT_EXCEPTION + 6;
/// OUT in ring 3.
const GENERAL_PROTECTION: u8 = PORT_EXCEPTION + 13;

impl Ring3 {
    /// XCR0 as ring 3 finds it, if that is not what this engine has set.
    pub(super) fn fixed_xcr0(&mut self) -> Result<Option<u64>> {
        let enabled = self.system.cr4 & super::CR4_OSXSAVE != 0;
        let expected = enabled.then_some(self.system.xcr0);
        let found =
            self.in_ring_3(private::VA_XGETBV, [0; 2])?.map(|found| low(found.rdx) << 32 | low(found.rax));
        Ok(found.filter(|_| found != expected))
    }

    /// Whether XCR0 is none of this engine's choice. Then programs find CPUID too as the processor has it.
    pub(in crate::xen_pv::engine) fn is_xcr0_fixed(&self) -> bool {
        self.xcr0_fixed
    }

    /// What CPUID says in ring 3. For an engine that did not run yet.
    pub(in crate::xen_pv::engine) fn cpuid_in_ring_3(
        &mut self,
        leaf: u32,
        subleaf: u32,
    ) -> Result<CpuidEntry> {
        let found = self.in_ring_3(private::VA_CPUID, [leaf, subleaf].map(u64::from))?;
        let Some(GeneralRegisters { rax, rbx, rcx, rdx, .. }) = found else {
            return Err(Error::unsupported("a paravirtual guest", "CPUID is not allowed in ring 3"));
        };
        let registers = [rax, rbx, rcx, rdx].map(|value| u32::try_from(low(value)).unwrap_or(0));
        Ok(CpuidEntry::new(leaf, Some(subleaf), registers))
    }

    /// Whether a null selector in FS or GS clears its base, which processors do that say so with
    /// [`NULL_SEL_CLR_BASE`](crate::cpuid::Feature::NULL_SEL_CLR_BASE), and others do without saying it. `false` if that
    /// cannot be found out. For an engine that did not run yet.
    pub(in crate::xen_pv::engine) fn null_selectors_clear_bases(&mut self) -> Result<bool> {
        const BASE: u64 = 0x1000;
        let found = self.in_ring_3(private::VA_NULL_SELECTOR, [BASE, FLAT_SS.into()])?;
        Ok(found.is_some_and(|found| found.rax == 0))
    }

    /// Executes one of the stubs for ring 3. `None` if its instruction is not allowed.
    fn in_ring_3(&mut self, rip: u64, [rax, rcx]: [u64; 2]) -> Result<Option<GeneralRegisters>> {
        let flat = |selector| self.descriptors.stack(selector).unwrap_or_else(|_| Segment::null());
        let (code, data) = (self.descriptors.code(FLAT_CS64).unwrap_or_default(), flat(FLAT_SS));
        self.vcpu.set_segment_registers(&SystemRegisters {
            cs: code,
            ss: data,
            ds: data,
            es: data,
            fs: Segment::null(),
            gs: Segment::null(),
            // There every exception leaves the guest.
            cr3: self.private.own_root(),
            ..self.system
        })?;
        let rflags = rflags::FIXED | rflags::IF;
        self.vcpu.set_registers(&GeneralRegisters {
            rip,
            rax,
            rcx,
            rflags,
            ..GeneralRegisters::default()
        })?;
        for _ in 0..MAX_STAYS {
            match self.stay()? {
                Stay::Port(GENERAL_PROTECTION) => return self.vcpu.registers().map(Some),
                Stay::Port(INVALID_OPCODE) => return Ok(None),
                Stay::Interrupted => {}
                Stay::Port(_) | Stay::Crashed => break,
            }
        }
        Err(Error::unsupported("a paravirtual guest", "code in ring 3 does not run on this backend"))
    }
}

fn low(value: u64) -> u64 {
    value & u64::from(u32::MAX)
}
