//! IA32_APIC_BASE (Intel SDM 3A 12.4.4 and 12.12.1): where the register page stands, and the modes.

use crate::vcpu::MsrFault;

/// Number of IA32_APIC_BASE.
pub(crate) const MSR_APIC_BASE: u32 = 0x1b;

const BOOTSTRAP: u64 = 1 << 8;
const EXTENDED: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;
const RESET_PAGE: u64 = 0xfee0_0000;
const PAGE_SIZE: u64 = 1 << 12;

/// What a local APIC is, by EN and EXTD of IA32_APIC_BASE (Intel SDM 3A table 12-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Globally disabled: no registers; LINT0 and LINT1 are the INTR and NMI pins of the processor.
    Disabled,
    /// Registers in a page of memory.
    Xapic,
    /// Registers are MSRs 0x800 to 0x8ff.
    X2apic,
}

/// The register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ApicBase(u64);

impl ApicBase {
    /// After RESET: xAPIC mode, page at 0xfee0_0000.
    pub(super) fn at_reset(bootstrap: bool) -> Self {
        Self(RESET_PAGE | ENABLED | if bootstrap { BOOTSTRAP } else { 0 })
    }

    /// A value that the register can hold; `None` for reserved bits, EXTD without EN, and EXTD without `x2apic`.
    pub(super) fn checked(value: u64, x2apic: bool, gpa_bits: u8) -> Option<Self> {
        let addresses = 1_u64.checked_shl(gpa_bits.into()).map_or(u64::MAX, |end| end - 1);
        let page = addresses & !(PAGE_SIZE - 1);
        let extended = if x2apic { EXTENDED } else { 0 };
        let reserved = !(page | BOOTSTRAP | ENABLED | extended);
        let invalid = value & (EXTENDED | ENABLED) == EXTENDED;
        (value & reserved == 0 && !invalid).then_some(Self(value))
    }

    /// What the register holds after WRMSR of `self` over `old`.
    ///
    /// # Errors
    /// A transition that does not exist (Intel SDM 3A figure 12-27): from x2APIC to xAPIC mode, and from
    /// disabled to x2APIC mode.
    pub(super) fn transition(self, old: Self) -> Result<Self, MsrFault> {
        match (old.mode(), self.mode()) {
            (Mode::X2apic, Mode::Xapic) | (Mode::Disabled, Mode::X2apic) => Err(MsrFault),
            _ => Ok(self),
        }
    }

    /// The mode.
    pub(super) fn mode(self) -> Mode {
        match (self.0 & ENABLED != 0, self.0 & EXTENDED != 0) {
            (false, _) => Mode::Disabled,
            (true, false) => Mode::Xapic,
            (true, true) => Mode::X2apic,
        }
    }

    /// Guest-physical address of the register page, whether or not the mode has one.
    pub(super) fn page(self) -> u64 {
        self.0 & !(PAGE_SIZE - 1)
    }

    /// The register as RDMSR sees it.
    pub(super) fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITS: u8 = 40;

    fn base(flags: u64) -> ApicBase {
        ApicBase::checked(RESET_PAGE | flags, true, BITS).expect("a value that exists")
    }

    #[test]
    fn reset_value_is_that_of_the_portable_state() {
        assert_eq!(ApicBase::at_reset(false).value(), crate::state::SystemRegisters::at_reset().apic_base);
        assert_eq!(ApicBase::at_reset(true).value(), 0xfee0_0900);
    }

    #[test]
    fn transitions_are_those_of_the_diagram() {
        let (disabled, xapic, x2apic) = (base(0), base(ENABLED), base(ENABLED | EXTENDED));
        let legal = [
            (disabled, disabled),
            (disabled, xapic),
            (xapic, disabled),
            (xapic, xapic),
            (xapic, x2apic),
            (x2apic, disabled),
            (x2apic, x2apic),
        ];
        for old in [disabled, xapic, x2apic] {
            for new in [disabled, xapic, x2apic] {
                let expected = if legal.contains(&(old, new)) { Ok(new) } else { Err(MsrFault) };
                assert_eq!(new.transition(old), expected, "{:?} to {:?}", old.mode(), new.mode());
            }
        }
    }

    #[test]
    fn reserved_bits_are_refused_one_by_one() {
        for bit in 0..64 {
            let legal = matches!(bit, 8 | 11..40);
            assert_eq!(ApicBase::checked(1 << bit, true, BITS).is_some(), legal, "bit {bit}");
        }
        assert!(ApicBase::checked(ENABLED | EXTENDED, true, BITS).is_some());
        assert!(
            ApicBase::checked(ENABLED | EXTENDED, false, BITS).is_none(),
            "without x2APIC EXTD is reserved"
        );
        assert!(ApicBase::checked(EXTENDED, true, BITS).is_none());
        assert!(ApicBase::checked(1 << 63, true, u8::MAX).is_some(), "a silly width does not overflow");
    }
}
