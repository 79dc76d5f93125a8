//! Model-specific registers, and what CPUID says.

use super::apic::{ApicAction, LocalApic, MSR_APIC_BASE};
use super::core::{Core, Flow, Machine, is_canonical};
use super::cpu::{cr0, cr4, efer};
use super::segment::{index, low32};
use crate::cpuid::Feature;

/// IA32_TIME_STAMP_COUNTER.
pub(super) const TSC: u32 = number::TSC;

/// Numbers of registers (Intel SDM 4, AMD APM 2 appendix A).
mod number {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const MICROCODE: u32 = 0x8b;
    pub(super) const MTRR_CAP: u32 = 0xfe;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUG_CONTROL: u32 = 0x1d9;
    pub(super) const MTRR_VARIABLE: u32 = 0x200;
    pub(super) const MTRR_FIXED: [u32; 11] =
        [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const FMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    /// Event selectors and counters of a K7 and K8.
    pub(super) const PERFORMANCE: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_0007;
    pub(super) const SYSCFG: u32 = 0xc001_0010;
    pub(super) const HWCR: u32 = 0xc001_0015;
    pub(super) const INTERRUPT_PENDING: u32 = 0xc001_0055;
    pub(super) const VM_CR: u32 = 0xc001_0114;
    pub(super) const DECODER_CONFIGURATION: u32 = 0xc001_1029;
}

/// Eight variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;

/// Registers that read as zero and drop what is written: AMD's configuration, which has no meaning here. So do
/// [`number::PERFORMANCE`]: no CPUID bit says that a processor of this family lacks the four counters.
const IGNORED: [u32; 6] = [
    number::SYSCFG,
    number::HWCR,
    number::INTERRUPT_PENDING,
    number::VM_CR,
    number::DECODER_CONFIGURATION,
    number::MICROCODE,
];

fn is_ignored(index: u32) -> bool {
    IGNORED.contains(&index) || number::PERFORMANCE.contains(&index)
}

/// Registers that make up a saved state, those of the local APIC and those with a place of their own aside.
pub(crate) fn saved() -> impl Iterator<Item = u32> {
    let variable = number::MTRR_VARIABLE..number::MTRR_VARIABLE + 16;
    let mut list = vec![
        number::TSC,
        number::TSC_ADJUST,
        number::SYSENTER_CS,
        number::SYSENTER_ESP,
        number::SYSENTER_EIP,
        number::MISC_ENABLE,
        number::PAT,
        number::MTRR_DEF_TYPE,
        number::STAR,
        number::LSTAR,
        number::CSTAR,
        number::FMASK,
        number::KERNEL_GS_BASE,
        number::TSC_AUX,
    ];
    list.extend(variable);
    list.extend(number::MTRR_FIXED);
    list.sort_unstable();
    list.into_iter()
}

/// A memory type (Intel SDM 3A table 12-2).
fn is_memory_type(value: u64) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

fn bytes_are(value: u64, allowed: impl Fn(u64) -> bool) -> bool {
    value.to_le_bytes().into_iter().all(|byte| allowed(byte.into()))
}

impl Core {
    /// RDMSR without filters; `None` if there is no such register.
    pub(crate) fn msr(&mut self, index: u32) -> Option<u64> {
        if LocalApic::owns_msr(index) {
            return self.apic_msr(index);
        }
        let msr = &self.cpu.msr;
        Some(match index {
            number::TSC => self.guest_tsc(),
            number::TSC_ADJUST if self.cpuid.has(Feature::TSC_ADJUST) => msr.tsc_adjust,
            number::APIC_BASE => self.cpu.apic_base,
            number::MTRR_CAP => MTRR_CAP,
            number::SYSENTER_CS => msr.sysenter_cs,
            number::SYSENTER_ESP => msr.sysenter_esp,
            number::SYSENTER_EIP => msr.sysenter_eip,
            number::MISC_ENABLE => msr.misc_enable,
            number::DEBUG_CONTROL => 0,
            number::PAT => msr.pat,
            number::MTRR_DEF_TYPE => msr.mtrr_def_type,
            number::EFER => self.cpu.efer,
            number::STAR => msr.star,
            number::LSTAR => msr.lstar,
            number::CSTAR => msr.cstar,
            number::FMASK => msr.fmask,
            number::FS_BASE => self.cpu.segment(index::FS).base,
            number::GS_BASE => self.cpu.segment(index::GS).base,
            number::KERNEL_GS_BASE => msr.kernel_gs_base,
            number::TSC_AUX if self.cpuid.has(Feature::RDTSCP) => msr.tsc_aux,
            _ if is_ignored(index) => 0,
            _ => {
                let variable = index.checked_sub(number::MTRR_VARIABLE).and_then(|n| usize::try_from(n).ok());
                let fixed = number::MTRR_FIXED.iter().position(|other| *other == index);
                let variable = variable.and_then(|n| msr.mtrr_variable.get(n));
                *variable.or_else(|| msr.mtrr_fixed.get(fixed?))?
            }
        })
    }

    /// WRMSR without filters; `None` if there is no such register or it cannot hold `value`.
    pub(crate) fn set_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let msr = &mut self.cpu.msr;
        let canonical = |value: u64| is_canonical(value).then_some(value);
        match index {
            number::TSC => {
                let now = self.now();
                self.cpu.msr.tsc_offset = value.wrapping_sub(self.shared.clock.ticks(now));
                self.refresh_deadline();
            }
            number::TSC_ADJUST if self.cpuid.has(Feature::TSC_ADJUST) => msr.tsc_adjust = value,
            number::SYSENTER_CS => msr.sysenter_cs = value,
            number::SYSENTER_ESP => msr.sysenter_esp = canonical(value)?,
            number::SYSENTER_EIP => msr.sysenter_eip = canonical(value)?,
            number::MISC_ENABLE => msr.misc_enable = value,
            number::DEBUG_CONTROL if value == 0 => {}
            number::PAT if bytes_are(value, |byte| is_memory_type(byte) || byte == 7) => msr.pat = value,
            number::MTRR_DEF_TYPE if value & !0xcff == 0 && is_memory_type(value & 0xff) => {
                msr.mtrr_def_type = value;
            }
            number::EFER => self.set_efer(value)?,
            number::STAR => msr.star = value,
            number::LSTAR => msr.lstar = canonical(value)?,
            number::CSTAR => msr.cstar = canonical(value)?,
            number::FMASK => msr.fmask = value & 0xffff_ffff,
            number::FS_BASE => self.cpu.segment_mut(index::FS).base = canonical(value)?,
            number::GS_BASE => self.cpu.segment_mut(index::GS).base = canonical(value)?,
            number::KERNEL_GS_BASE => msr.kernel_gs_base = canonical(value)?,
            number::TSC_AUX if value >> 32 == 0 && self.cpuid.has(Feature::RDTSCP) => msr.tsc_aux = value,
            _ if is_ignored(index) => {}
            _ => {
                let variable = index.checked_sub(number::MTRR_VARIABLE).and_then(|n| usize::try_from(n).ok());
                if let Some(register) = variable.and_then(|n| msr.mtrr_variable.get_mut(n)) {
                    *register = value;
                } else {
                    let fixed = number::MTRR_FIXED.iter().position(|other| *other == index)?;
                    let register =
                        msr.mtrr_fixed.get_mut(fixed).filter(|_| bytes_are(value, is_memory_type))?;
                    *register = value;
                }
            }
        }
        Some(())
    }

    fn set_efer(&mut self, value: u64) -> Option<()> {
        let old = self.cpu.efer;
        // LMA cannot be written, and what is written there does not matter.
        let value = value & !efer::LMA | old & efer::LMA;
        let lme_while_paging = (old ^ value) & efer::LME != 0 && self.cpu.cr0 & cr0::PG != 0;
        if value & !(self.efer_allowed | old) != 0 || lme_while_paging {
            return None;
        }
        self.cpu.efer = value;
        if (old ^ value) & efer::NXE != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        Some(())
    }

    /// The time-stamp counter of this vCPU.
    pub(crate) fn guest_tsc(&mut self) -> u64 {
        if let Some(counter) = self.shared.clock.counter() {
            // What is written to it has no effect: programs would not see it.
            return counter;
        }
        let now = self.now();
        self.shared.clock.ticks(now).wrapping_add(self.cpu.msr.tsc_offset)
    }

    /// XCR0 bits that CPUID lets the guest set.
    pub(crate) fn xcr0_allowed(&self) -> u64 {
        let leaf = self.cpuid.get(0xd, 0);
        leaf.map_or(1, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax)) | 1
    }

    /// What CPUID says now.
    pub(crate) fn guest_cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let Some(entry) = self.cpuid.get(leaf, subleaf) else { return [0; 4] };
        let mut registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let [_, _, ecx, edx] = &mut registers;
        if leaf == 1 {
            let osxsave = 1 << 27;
            *ecx &= !osxsave;
            if self.cpu.cr4 & cr4::OSXSAVE != 0 {
                *ecx |= osxsave;
            }
        }
        if leaf == 1 && self.apic_disabled() {
            *edx &= !(1 << 9);
        }
        registers
    }
}

impl Machine<'_> {
    /// RDMSR by the guest.
    pub(crate) fn guest_rdmsr(&mut self, index: u32) -> Flow<u64> {
        if !self.shared.passed_on.msr_read(index) {
            if let Some(value) = self.msr(index) {
                return Ok(value);
            }
            if !self.shared.passed_on.unknown_msrs() {
                return Err(self.gp(0));
            }
        }
        self.counts.msr += 1;
        self.end_block();
        let result = self.leave_guest(|io| io.msr_read(index));
        result.map_err(|_| self.gp(0))
    }

    /// WRMSR by the guest.
    pub(crate) fn guest_wrmsr(&mut self, index: u32, value: u64) -> Flow {
        if !self.shared.passed_on.msr_write(index) {
            if LocalApic::owns_msr(index) && self.apic.is_some() {
                let (now, tsc) = (self.now(), self.guest_tsc());
                let action = self.apic.as_mut().map(|apic| apic.msr_write(index, value, now, tsc));
                return match action {
                    Some(Ok(action)) => {
                        if index == MSR_APIC_BASE {
                            self.cpu.apic_base = value;
                        }
                        self.act(action);
                        Ok(())
                    }
                    _ => Err(self.gp(0)),
                };
            }
            let (tsc_offset, tsc_adjust) = (self.cpu.msr.tsc_offset, self.cpu.msr.tsc_adjust);
            if self.set_msr(index, value).is_some() {
                // What the guest does to one of the two, it does to the other (Intel SDM 3B 19.17.3).
                let msr = &mut self.cpu.msr;
                match index {
                    number::TSC => {
                        let change = msr.tsc_offset.wrapping_sub(tsc_offset);
                        msr.tsc_adjust = tsc_adjust.wrapping_add(change);
                    }
                    number::TSC_ADJUST => {
                        let change = value.wrapping_sub(tsc_adjust);
                        msr.tsc_offset = tsc_offset.wrapping_add(change);
                        self.refresh_deadline();
                    }
                    _ => {}
                }
                return Ok(());
            }
            if !self.shared.passed_on.unknown_msrs() {
                return Err(self.gp(0));
            }
        }
        self.counts.msr += 1;
        self.end_block();
        let result = self.leave_guest(|io| io.msr_write(index, value));
        result.map_err(|_| self.gp(0))
    }
}

impl Core {
    /// RDMSR of a register of the local APIC.
    fn apic_msr(&mut self, index: u32) -> Option<u64> {
        let (now, tsc) = (self.now(), self.guest_tsc());
        match &mut self.apic {
            Some(apic) => {
                let value = apic.msr_read(index, now, tsc).ok();
                self.urgent = true;
                value
            }
            None if index == MSR_APIC_BASE => Some(self.cpu.apic_base),
            None => None,
        }
    }

    /// WRMSR of a register of the local APIC from outside of the guest: no messages are sent.
    pub(crate) fn set_apic_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let (now, tsc) = (self.now(), self.guest_tsc());
        let apic = self.apic.as_mut()?;
        let action = apic.msr_write(index, value, now, tsc).ok()?;
        if index == MSR_APIC_BASE {
            self.cpu.apic_base = value;
            self.tlb.flush_all();
        }
        self.refresh_deadline();
        self.urgent = true;
        (action == ApicAction::None || action == ApicAction::BaseChanged || low32(value) == 0).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::number;
    use crate::translate::core::Machine;
    use crate::translate::test_support::Guest;
    use crate::vcpu::EmptyBus;

    #[test]
    fn counter_and_its_adjustment_move_together_for_the_guest_and_apart_for_the_vmm() {
        let core = &mut Guest::long().core;
        core.cpuid = crate::translate::cpuid::supported();
        let mut bus = EmptyBus;
        let offset = core.cpu.msr.tsc_offset;
        let mut m = Machine::new(core, &mut bus);
        assert!(m.guest_wrmsr(number::TSC_ADJUST, 1 << 40).is_ok());
        assert_eq!(m.cpu.msr.tsc_offset.wrapping_sub(offset), 1 << 40);
        let before = m.cpu.msr.tsc_offset;
        assert!(m.guest_wrmsr(number::TSC, 5).is_ok());
        let change = m.cpu.msr.tsc_offset.wrapping_sub(before);
        assert!(change != 0);
        assert_eq!(core.msr(number::TSC_ADJUST), Some((1_u64 << 40).wrapping_add(change)));
        let before = core.cpu.msr.tsc_offset;
        assert_eq!(core.set_msr(number::TSC_ADJUST, 7), Some(()));
        assert_eq!((core.cpu.msr.tsc_offset, core.msr(number::TSC_ADJUST)), (before, Some(7)));
        assert_eq!(core.set_msr(number::TSC, 9), Some(()));
        assert_eq!(core.msr(number::TSC_ADJUST), Some(7));
    }

    #[test]
    fn performance_counters_stand_still() {
        let core = &mut Guest::long().core;
        for index in 0xc001_0000..=0xc001_0007 {
            assert_eq!(core.set_msr(index, 0x1_2345), Some(()));
            assert_eq!(core.msr(index), Some(0));
        }
        // Those of later families, which a CPUID bit announces.
        assert_eq!((core.msr(0xc001_0008), core.msr(0xc001_0200)), (None, None));
    }
}
