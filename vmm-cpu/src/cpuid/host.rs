//! The host processor's own CPUID.

use super::CpuidTable;

#[cfg(target_arch = "x86_64")]
mod read {
    use std::arch::x86_64::__cpuid_count;
    use std::ops::RangeInclusive;

    use super::super::{CpuidEntry, EXTENDED_BASE, Feature, HYPERVISOR_LEAVES};
    use super::CpuidTable;

    /// No range of leaves is longer than this, whatever its first leaf says.
    const LEAVES_MAX: u32 = 0x100;

    /// No leaf has more subleaves than this, whatever it says.
    const SUBLEAVES_MAX: u32 = 64;

    fn read(leaf: u32, subleaf: Option<u32>) -> CpuidEntry {
        let found = __cpuid_count(leaf, subleaf.unwrap_or(0));
        CpuidEntry::new(leaf, subleaf, [found.eax, found.ebx, found.ecx, found.edx])
    }

    /// The subleaves of leaves that have them (Intel SDM 2A and AMD APM 3, CPUID).
    fn subleaves(leaf: u32) -> Option<RangeInclusive<u32>> {
        let announced = || read(leaf, Some(0)).eax;
        let until = |last: fn(&CpuidEntry) -> bool| {
            (0..SUBLEAVES_MAX).find(|n| last(&read(leaf, Some(*n)))).unwrap_or(SUBLEAVES_MAX)
        };
        // Components of the extended state, for XCR0 and IA32_XSS, of which each has a subleaf; a hypervisor below may take long to say of
        // each other one that it is empty.
        let components = || {
            let (user, supervisor) = (read(leaf, Some(0)), read(leaf, Some(1)));
            u64::from(user.eax | supervisor.ecx) | u64::from(user.edx | supervisor.edx) << 32
        };
        let last = match leaf {
            // Caches, ended by one of type 0.
            4 | 0x8000_001d => until(|entry| entry.eax & 0x1f == 0),
            // Levels, ended by one of type 0.
            0xb | 0x1f | 0x8000_0026 => until(|entry| entry.ecx & 0xff00 == 0),
            7 | 0x14 | 0x17 | 0x18 | 0x1d | 0x20 | 0x24 => announced(),
            0xd => 63 - components().leading_zeros().min(62),
            0xf => 1,
            0x10 | 0x8000_0020 => 3,
            0x12 | 0x23 => 5,
            0x1e => 1,
            _ => return None,
        };
        Some(0..=last.min(SUBLEAVES_MAX - 1))
    }

    pub(super) fn host() -> CpuidTable {
        let mut entries = Vec::new();
        let mut range = |base: u32| {
            let announced = read(base, None).eax;
            // A base that is not answered announces something outside its own range.
            let last =
                if announced & 0xffff_0000 == base { announced.min(base + LEAVES_MAX - 1) } else { return };
            for leaf in base..=last {
                match subleaves(leaf) {
                    None => entries.push(read(leaf, None)),
                    // An empty subleaf says as much as one that is absent, but for the first.
                    Some(subleaves) => entries.extend(
                        subleaves
                            .map(|subleaf| read(leaf, Some(subleaf)))
                            .filter(|entry| entry.subleaf == Some(0) || !entry.is_zero()),
                    ),
                }
            }
        };
        range(0);
        range(EXTENDED_BASE);
        if read(1, None).ecx & Feature::HYPERVISOR.mask() != 0 {
            range(*HYPERVISOR_LEAVES.start());
        }
        CpuidTable::new(entries)
    }
}

impl CpuidTable {
    /// What the processor that executes this call answers, for backends that let guests see it. On hosts
    /// other than x86-64 the table is empty.
    ///
    /// Fields that differ between processors (APIC IDs) are those of the one that happened to execute the
    /// call; if the host is itself a guest, its hypervisor's leaves are among the entries.
    pub fn host() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            read::host()
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            Self::default()
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpuid::Feature;

    #[test]
    fn the_host_has_a_vendor_and_long_mode() {
        let host = CpuidTable::host();
        assert!(host.vendor().iter().all(u8::is_ascii_graphic), "{:x?}", host.vendor());
        for feature in [Feature::LM, Feature::SSE2, Feature::FXSR, Feature::SYSCALL] {
            assert!(host.has(feature), "{feature}");
        }
        assert!(host.entries().len() < 1000);
    }

    #[test]
    fn components_of_the_state_are_all_there() {
        let host = CpuidTable::host();
        let Some(first) = host.get(0xd, 0) else { return };
        for component in (2..32).filter(|n| first.eax & 1 << n != 0) {
            assert!(host.get(0xd, component).is_some_and(|entry| entry.eax != 0), "component {component}");
        }
    }
}
