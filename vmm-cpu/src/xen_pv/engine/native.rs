//! What a guest kernel has to know of the processor where its programs find the processor itself.
//!
//! KVM without hardware assistance runs ring 3 with the host's XCR0 and CPUID. A guest kernel that was told of no XSAVE
//! saves x87 and SSE state alone, while its programs use all vector registers that they find: each switch of tasks loses
//! what the kernel does not know of, and shows it to the next task.

use crate::cpuid::{CpuidEntry, CpuidTable, Feature};
use crate::error::Result;

/// Bits of XCR0 that guests may use: x87, SSE, AVX, AVX-512.
pub(super) const XCR0_KNOWN: u64 = 0xe7;

/// The leaf of the extended state, and the size of its area without extension (Intel SDM 1 13.2).
const STATE_LEAF: u32 = 0xd;
const LEGACY_SIZE: u32 = 576;

/// Instructions for all rings, and what they need of each other so that a kernel believes in the state components.
const INSTRUCTIONS: &[Feature] = &[
    Feature::SSE3,
    Feature::PCLMULQDQ,
    Feature::SSSE3,
    Feature::FMA,
    Feature::CX16,
    Feature::SSE4_1,
    Feature::SSE4_2,
    Feature::MOVBE,
    Feature::POPCNT,
    Feature::AES,
    Feature::XSAVE,
    Feature::AVX,
    Feature::F16C,
    Feature::RDRAND,
    Feature::BMI1,
    Feature::AVX2,
    Feature::BMI2,
    Feature::ERMS,
    Feature::AVX512F,
    Feature::AVX512DQ,
    Feature::RDSEED,
    Feature::ADX,
    Feature::AVX512IFMA,
    Feature::AVX512CD,
    Feature::SHA,
    Feature::AVX512BW,
    Feature::AVX512VL,
    Feature::AVX512VBMI,
    Feature::AVX512VBMI2,
    Feature::GFNI,
    Feature::VAES,
    Feature::VPCLMULQDQ,
    Feature::AVX512VNNI,
    Feature::AVX512BITALG,
    Feature::AVX512VPOPCNTDQ,
    Feature::FSRM,
    Feature::XSAVEOPT,
    Feature::XGETBV1,
    Feature::LAHF_LM,
    Feature::LZCNT,
    Feature::NULL_SEL_CLR_BASE,
];

/// `told` with what ring 3 finds, by `find`, of those instructions and of the state components in `xcr0`.
pub(super) fn with_instructions(
    told: &CpuidTable,
    xcr0: u64,
    mut find: impl FnMut(u32, u32) -> Result<CpuidEntry>,
) -> Result<CpuidTable> {
    let mut table = told.clone();
    let mut first = table.get(0, 0).unwrap_or_default();
    first.eax = first.eax.max(STATE_LEAF);
    table.set(first);
    describe_state(&mut table, xcr0, &mut find)?;
    let mut found = CpuidEntry::default();
    for feature in INSTRUCTIONS {
        let place = (feature.leaf(), Some(feature.subleaf()));
        if (found.leaf, found.subleaf) != place {
            found = find(feature.leaf(), feature.subleaf())?;
        }
        set(&mut table, *feature, found.register(feature.register()) & feature.mask());
    }
    Ok(table)
}

/// Adds a feature that was found in another way.
pub(super) fn tell(table: &mut CpuidTable, feature: Feature) {
    set(table, feature, feature.mask());
}

fn set(table: &mut CpuidTable, feature: Feature, bit: u32) {
    let subleaf = (feature.leaf() == 7 || feature.leaf() == STATE_LEAF).then_some(feature.subleaf());
    let mut entry = table
        .get(feature.leaf(), feature.subleaf())
        .unwrap_or_else(|| CpuidEntry::new(feature.leaf(), subleaf, [0; 4]));
    let register = entry.register_mut(feature.register());
    *register = *register & !feature.mask() | bit;
    table.set(entry);
    table.reach(feature.leaf());
}

/// Leaf 0xd for those components, in the standard format: what the processor says of its compacted one counts components
/// of supervisors, which the guest kernel is not.
fn describe_state(
    table: &mut CpuidTable,
    xcr0: u64,
    find: &mut impl FnMut(u32, u32) -> Result<CpuidEntry>,
) -> Result<()> {
    table.remove_leaf(STATE_LEAF);
    let mut size = LEGACY_SIZE;
    for component in (2..63).filter(|component| xcr0 & 1 << component != 0) {
        let entry = find(STATE_LEAF, component)?;
        size = size.max(entry.eax.saturating_add(entry.ebx));
        table.set(entry);
    }
    let [a, b, c, d, e, f, g, h] = xcr0.to_le_bytes();
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    table.set(CpuidEntry::new(STATE_LEAF, Some(0), [low, size, size, high]));
    table.set(CpuidEntry::new(STATE_LEAF, Some(1), [0; 4]));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor with everything, whose AVX-512 state lies where AMD's has it, and protection keys behind that.
    fn processor(leaf: u32, subleaf: u32) -> Result<CpuidEntry> {
        let registers = match (leaf, subleaf) {
            (STATE_LEAF, 2) => [0x100, 0x240, 0, 0],
            (STATE_LEAF, 5) => [0x40, 0x340, 0, 0],
            (STATE_LEAF, 6) => [0x200, 0x380, 0, 0],
            (STATE_LEAF, 7) => [0x400, 0x580, 0, 0],
            (STATE_LEAF, 9) => [8, 0x980, 0, 0],
            _ => [u32::MAX; 4],
        };
        Ok(CpuidEntry::new(leaf, Some(subleaf), registers))
    }

    #[test]
    fn instructions_and_their_state_are_told() {
        let told = CpuidTable::new(vec![
            CpuidEntry::new(0, None, [7, 1, 2, 3]),
            CpuidEntry::new(1, None, [0x1234, 0, Feature::CX16.mask(), 5]),
        ]);
        let table = with_instructions(&told, 0xe7, processor).unwrap();
        for feature in INSTRUCTIONS {
            assert!(table.has(*feature), "{feature}");
        }
        for feature in
            [Feature::XSAVES, Feature::XSAVEC, Feature::PKU, Feature::VMX, Feature::SMEP, Feature::SVM]
        {
            assert!(!table.has(feature), "{feature}");
        }
        assert_eq!(table.max_basic_leaf(), 0xd);
        assert_eq!(table.get(1, 0).map(|entry| (entry.eax, entry.edx)), Some((0x1234, 5)));
        let state = |subleaf| {
            table.get(STATE_LEAF, subleaf).map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        };
        assert_eq!(state(0), Some([0xe7, 0x980, 0x980, 0]));
        assert_eq!(state(7), Some([0x400, 0x580, 0, 0]));
        assert_eq!((state(9), state(3)), (None, None), "not in XCR0");
    }

    #[test]
    fn what_the_processor_lacks_is_taken_back() {
        let every = INSTRUCTIONS.iter().map(|feature| feature.leaf());
        let told = CpuidTable::new(every.map(|leaf| CpuidEntry::new(leaf, None, [u32::MAX; 4])).collect());
        let nothing = |leaf, subleaf| Ok(CpuidEntry::new(leaf, Some(subleaf), [0; 4]));
        let table = with_instructions(&told, 3, nothing).unwrap();
        assert!(INSTRUCTIONS.iter().all(|feature| !table.has(*feature)));
        assert!(table.has(Feature::FPU) && table.has(Feature::SYSCALL));
        assert_eq!(table.get(STATE_LEAF, 0), Some(CpuidEntry::new(STATE_LEAF, Some(0), [3, 576, 576, 0])));
    }
}
