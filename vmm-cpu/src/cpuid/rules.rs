//! What "no more than the backend supports" means for each register of CPUID.

use super::{CpuidRegister, CpuidTable, EXTENDED_BASE, Feature, HYPERVISOR_LEAVES};

/// How a register compares with the supported one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// A bit may be set if it is supported or among these, which follow the guest's own doing.
    Flags(u32),
    /// A number that may be smaller.
    AtMost,
    /// Four numbers of 8 bits that may each be smaller.
    BytesAtMost,
    /// Fixed by the processor: as it is, or absent.
    EqualOrZero,
    /// Describes and enables nothing, or changes while the guest runs.
    Free,
}

/// The bits of `value` that go beyond what `supported` allows in that register; 0 if none does.
pub(super) fn excess(
    table: &CpuidTable,
    supported: &CpuidTable,
    (leaf, subleaf, register): (u32, u32, CpuidRegister),
) -> u32 {
    let value = table.register(leaf, subleaf, register);
    let limit = supported.register(leaf, subleaf, register);
    let beyond = match rule(leaf, subleaf, register) {
        Rule::Flags(_) if leaf == HYPERVISOR_FEATURES && !same_hypervisor(table, supported) => {
            // Another interface than the backend's own: the VMM serves it.
            return 0;
        }
        Rule::Flags(free) => return value & !limit & !free,
        Rule::AtMost => value > limit,
        Rule::BytesAtMost => value.to_le_bytes().iter().zip(limit.to_le_bytes()).any(|(v, limit)| *v > limit),
        Rule::EqualOrZero => value != 0 && value != limit,
        Rule::Free => false,
    };
    if beyond { value } else { 0 }
}

/// The leaf in which KVM reports its paravirtual features (Linux Documentation/virt/kvm/x86/cpuid.rst).
const HYPERVISOR_FEATURES: u32 = 0x4000_0001;

fn same_hypervisor(a: &CpuidTable, b: &CpuidTable) -> bool {
    let signature = |table: &CpuidTable| {
        table.get(*HYPERVISOR_LEAVES.start(), 0).map(|entry| (entry.ebx, entry.ecx, entry.edx))
    };
    signature(a) == signature(b)
}

fn rule(leaf: u32, subleaf: u32, register: CpuidRegister) -> Rule {
    use CpuidRegister::{Eax, Ebx, Ecx, Edx};
    match (leaf, subleaf, register) {
        (0 | EXTENDED_BASE, _, Eax) | (7, 0, Eax) | (0xd, 0, Ecx) => Rule::AtMost,
        (0 | EXTENDED_BASE, ..) => Rule::Free,
        // Signature, brand, and what differs between vCPUs.
        (1 | 0x8000_0001, _, Eax | Ebx) => Rule::Free,
        (1, _, Ecx) => Rule::Flags(Feature::OSXSAVE.mask()),
        (1, _, Edx) => Rule::Flags(Feature::HTT.mask()),
        (7, 0, Ecx) => Rule::Flags(Feature::OSPKE.mask()),
        (0x8000_0001, _, Ecx) => Rule::Flags(Feature::CMP_LEGACY.mask()),
        // Caches, TLBs, topology, frequencies, the name of the processor.
        (2 | 4 | 0xb | 0x15 | 0x16 | 0x1f, ..) => Rule::Free,
        (0x8000_0002..=0x8000_0006 | 0x8000_0019 | 0x8000_001a | 0x8000_001d | 0x8000_001e, ..) => Rule::Free,
        // Performance counters: sizes and counts, then a mask of what is missing.
        (0xa, _, Eax) => Rule::BytesAtMost,
        (0xa, _, Ebx) => Rule::Free,
        (0xa, _, Edx) => Rule::EqualOrZero,
        // Sizes that follow XCR0 and IA32_XSS; then size and place of each component.
        (0xd, 0 | 1, Ebx) => Rule::Free,
        (0xd, 2.., Eax | Ebx) => Rule::EqualOrZero,
        (0x8000_0008, _, Eax) => Rule::BytesAtMost,
        (0x8000_0008, _, Ecx) => Rule::Free,
        (HYPERVISOR_FEATURES, _, Eax) => Rule::Flags(0),
        _ if HYPERVISOR_LEAVES.contains(&leaf) => Rule::Free,
        _ => Rule::Flags(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuidEntry;

    fn excess_of(entry: CpuidEntry, supported: CpuidEntry) -> [u32; 4] {
        let (table, supported) = (CpuidTable::new(vec![entry]), CpuidTable::new(vec![supported]));
        CpuidRegister::ALL.map(|r| excess(&table, &supported, (entry.leaf, entry.subleaf.unwrap_or(0), r)))
    }

    #[test]
    fn flags_must_be_a_subset_except_those_that_follow_the_guest() {
        let entry = |ecx, edx| CpuidEntry::new(1, None, [0x123, 0x456, ecx, edx]);
        assert_eq!(excess_of(entry(0b101, 0b1), entry(0b111, 0b1)), [0; 4]);
        assert_eq!(excess_of(entry(0b1101, 0b11), entry(0b111, 0b1)), [0, 0, 0b1000, 0b10]);
        assert_eq!(excess_of(entry(1 << 27, 1 << 28), entry(0, 0)), [0; 4], "OSXSAVE and HTT");
        let unknown = |ebx| CpuidEntry::new(0x77, Some(3), [0, ebx, 0, 0]);
        assert_eq!(excess_of(unknown(6), unknown(2)), [0, 4, 0, 0]);
    }

    #[test]
    fn numbers_may_be_smaller_only() {
        let max = |eax| CpuidEntry::new(0, None, [eax, 9, 9, 9]);
        assert_eq!(excess_of(max(7), max(8)), [0; 4]);
        assert_eq!(excess_of(max(9), max(8)), [9, 0, 0, 0]);
        let widths = |eax| CpuidEntry::new(0x8000_0008, None, [eax, 0, 0, 0]);
        assert_eq!(excess_of(widths(0x3027), widths(0x3930)), [0; 4]);
        assert_eq!(excess_of(widths(0x3930), widths(0x3030)), [0x3930, 0, 0, 0]);
    }

    #[test]
    fn places_of_components_are_fixed() {
        let avx = |ebx| CpuidEntry::new(0xd, Some(2), [0x100, ebx, 0, 0]);
        assert_eq!(excess_of(avx(0x240), avx(0x240)), [0; 4]);
        assert_eq!(excess_of(avx(0x200), avx(0x240)), [0, 0x200, 0, 0]);
    }

    #[test]
    fn paravirtual_features_compare_only_with_the_same_hypervisor() {
        let table = |signature, features| {
            CpuidTable::new(vec![
                CpuidEntry::new(0x4000_0000, None, [0x4000_0001, signature, 0, 0]),
                CpuidEntry::new(0x4000_0001, None, [features, 0, 0, 1]),
            ])
        };
        let eax = (0x4000_0001, 0, CpuidRegister::Eax);
        assert_eq!(excess(&table(1, 0b11), &table(1, 0b01), eax), 0b10);
        assert_eq!(excess(&table(2, 0b11), &table(1, 0b01), eax), 0);
        assert_eq!(excess(&table(1, 0), &table(1, 0), (0x4000_0001, 0, CpuidRegister::Edx)), 0);
    }
}
