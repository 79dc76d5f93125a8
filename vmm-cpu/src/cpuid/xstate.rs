//! Makes a table consistent after features were taken away or added: what depends on an absent feature
//! goes too, and leaf 0xd describes exactly the state components that are left.

use super::features::Feature;
use super::levels::AMD_MIRROR;
use super::{CpuidEntry, CpuidRegister, CpuidTable, EXTENDED_BASE};

/// The leaf that describes the extended state (Intel SDM 1 13.2).
const LEAF: u32 = 0xd;

/// x87 and SSE: the components that every XSAVE has.
const LEGACY: u64 = 0b11;

/// Legacy region and header: the size of the area with nothing but [`LEGACY`], in bytes.
const LEGACY_SIZE: u32 = 576;

/// Components of XCR0 (Intel SDM 1 13.1) and the feature that owns them.
const COMPONENTS: &[(u64, Feature)] = &[
    (1 << 2, Feature::AVX),
    (0b11 << 3, Feature::MPX),
    (0b111 << 5, Feature::AVX512F),
    (1 << 9, Feature::PKU),
    (0b11 << 17, Feature::AMX_TILE),
    (1 << 19, Feature::APX_F),
];

/// Components of IA32_XSS and the features any of which needs them.
const SUPERVISOR_COMPONENTS: &[(u64, &[Feature])] =
    &[(1 << 8, &[Feature::INTEL_PT]), (0b11 << 11, &[Feature::SHSTK, Feature::IBT])];

/// Pairs of a feature and one that it needs (Intel SDM 1, "Detection of ..." sections), ordered so that a
/// single pass reaches everything: what is needed stands on the right before it stands on the left.
const DEPENDENCIES: &[(Feature, Feature)] = &[
    (Feature::SSE, Feature::FXSR),
    (Feature::SSE2, Feature::SSE),
    (Feature::SSE3, Feature::SSE2),
    (Feature::AES, Feature::SSE2),
    (Feature::PCLMULQDQ, Feature::SSE2),
    (Feature::GFNI, Feature::SSE2),
    (Feature::SHA, Feature::SSE2),
    (Feature::SSE4A, Feature::SSE3),
    (Feature::SSSE3, Feature::SSE3),
    (Feature::SSE4_1, Feature::SSSE3),
    (Feature::SSE4_2, Feature::SSE4_1),
    (Feature::XSAVEOPT, Feature::XSAVE),
    (Feature::XSAVEC, Feature::XSAVE),
    (Feature::XGETBV1, Feature::XSAVE),
    (Feature::XSAVES, Feature::XSAVEC),
    (Feature::XFD, Feature::XSAVE),
    (Feature::OSXSAVE, Feature::XSAVE),
    (Feature::AVX, Feature::XSAVE),
    (Feature::AVX, Feature::SSE4_2),
    (Feature::MPX, Feature::XSAVE),
    (Feature::PKU, Feature::XSAVE),
    (Feature::OSPKE, Feature::PKU),
    (Feature::AMX_TILE, Feature::XSAVE),
    (Feature::APX_F, Feature::XSAVE),
    (Feature::FMA, Feature::AVX),
    (Feature::F16C, Feature::AVX),
    (Feature::XOP, Feature::AVX),
    (Feature::FMA4, Feature::AVX),
    (Feature::AVX2, Feature::AVX),
    (Feature::VAES, Feature::AVX),
    (Feature::VAES, Feature::AES),
    (Feature::VPCLMULQDQ, Feature::AVX),
    (Feature::VPCLMULQDQ, Feature::PCLMULQDQ),
    (Feature::SHA512, Feature::AVX2),
    (Feature::SM3, Feature::AVX),
    (Feature::SM4, Feature::AVX),
    (Feature::AVX_VNNI, Feature::AVX2),
    (Feature::AVX_IFMA, Feature::AVX2),
    (Feature::AVX_VNNI_INT8, Feature::AVX2),
    (Feature::AVX_VNNI_INT16, Feature::AVX2),
    (Feature::AVX_NE_CONVERT, Feature::AVX2),
    (Feature::AVX512F, Feature::AVX2),
    (Feature::AVX512F, Feature::FMA),
    (Feature::AVX512F, Feature::F16C),
    (Feature::AVX512CD, Feature::AVX512F),
    (Feature::AVX512DQ, Feature::AVX512F),
    (Feature::AVX512BW, Feature::AVX512F),
    (Feature::AVX512VL, Feature::AVX512F),
    (Feature::AVX512PF, Feature::AVX512F),
    (Feature::AVX512ER, Feature::AVX512F),
    (Feature::AVX512IFMA, Feature::AVX512F),
    (Feature::AVX512VPOPCNTDQ, Feature::AVX512F),
    (Feature::AVX512VNNI, Feature::AVX512F),
    (Feature::AVX512_4VNNIW, Feature::AVX512F),
    (Feature::AVX512_4FMAPS, Feature::AVX512F),
    (Feature::AVX512_VP2INTERSECT, Feature::AVX512F),
    (Feature::AVX512VBMI, Feature::AVX512BW),
    (Feature::AVX512VBMI2, Feature::AVX512BW),
    (Feature::AVX512BITALG, Feature::AVX512BW),
    (Feature::AVX512BF16, Feature::AVX512BW),
    (Feature::AVX512FP16, Feature::AVX512BW),
    (Feature::AVX10, Feature::AVX512VL),
    (Feature::AMX_INT8, Feature::AMX_TILE),
    (Feature::AMX_BF16, Feature::AMX_TILE),
    (Feature::AMX_FP16, Feature::AMX_TILE),
    (Feature::AMX_COMPLEX, Feature::AMX_TILE),
    (Feature::X2APIC, Feature::APIC),
    (Feature::TSC_DEADLINE, Feature::APIC),
    (Feature::TSC_DEADLINE, Feature::TSC),
    (Feature::INVPCID, Feature::PCID),
];

/// The feature that stands in the way of `feature` in `table`, if one does.
pub(super) fn unmet_dependency(table: &CpuidTable, feature: Feature) -> Option<Feature> {
    let needs = DEPENDENCIES.iter().filter(|(of, _)| *of == feature).map(|(_, needed)| *needed);
    needs.into_iter().find(|needed| !table.has(*needed))
}

/// Makes `table` consistent. `supported` lends the layout of the state components; those in `forbidden` are
/// not used even if it has them.
pub(super) fn settle(table: &mut CpuidTable, supported: &CpuidTable, forbidden: u64) {
    let available = user_components(supported) & !forbidden;
    if available & LEGACY != LEGACY {
        table.clear_feature(Feature::XSAVE);
    }
    for (components, feature) in COMPONENTS {
        if components & !available != 0 {
            table.clear_feature(*feature);
        }
    }
    for (feature, needed) in DEPENDENCIES {
        if !table.has(*needed) {
            table.clear_feature(*feature);
        }
    }
    describe_state(table, supported, available);
    mirror_leaf_1(table);
}

/// XCR0 as far as the table allows it.
fn user_components(table: &CpuidTable) -> u64 {
    table.get(LEAF, 0).map_or(0, |entry| pair(entry.eax, entry.edx))
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// Rewrites leaf 0xd from the features of `table`.
fn describe_state(table: &mut CpuidTable, supported: &CpuidTable, available: u64) {
    let instructions = table.get(LEAF, 1).unwrap_or_default();
    let unowned =
        user_components(table) & !COMPONENTS.iter().fold(LEGACY, |all, (components, _)| all | components);
    table.remove_leaf(LEAF);
    if !table.has(Feature::XSAVE) {
        return;
    }

    let owned = COMPONENTS.iter().filter(|(_, feature)| table.has(*feature));
    let user = available & owned.fold(LEGACY | unowned, |all, (components, _)| all | components);
    // XSAVES is a bit of the entry that was just taken out.
    let xsaves = instructions.eax & Feature::XSAVES.mask() != 0;
    let compacted = xsaves || instructions.eax & Feature::XSAVEC.mask() != 0;
    let unused = SUPERVISOR_COMPONENTS.iter().filter(|(_, features)| !features.iter().any(|f| table.has(*f)));
    let unused = unused.fold(0, |all, (components, _)| all | components);
    let supervisor = if xsaves { pair(instructions.ecx, instructions.edx) & !unused } else { 0 };

    let mut size = LEGACY_SIZE;
    for component in supported.leaf(LEAF) {
        let bit = component.subleaf.filter(|n| *n >= 2).and_then(|n| 1_u64.checked_shl(n)).unwrap_or(0);
        if user & bit != 0 {
            size = size.max(component.ebx.saturating_add(component.eax));
        }
        if (user | supervisor) & bit != 0 {
            table.set(*component);
        }
    }
    // EBX follows XCR0 and IA32_XSS while the guest runs; this is their value at reset.
    let (low, high) = halves(user);
    table.set(CpuidEntry::new(LEAF, Some(0), [low, LEGACY_SIZE, size, high]));
    let (low, high) = halves(supervisor);
    let current = if compacted { LEGACY_SIZE } else { 0 };
    table.set(CpuidEntry::new(LEAF, Some(1), [instructions.eax, current, low, high]));
    table.reach(LEAF);
}

/// Keeps AMD's copy of leaf 1 EDX no larger than the original.
fn mirror_leaf_1(table: &mut CpuidTable) {
    let original = table.register(1, 0, CpuidRegister::Edx);
    if let Some(mut entry) = table.get(EXTENDED_BASE + 1, 0) {
        entry.edx &= original | !AMD_MIRROR;
        table.set(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_over_the_dependencies_is_enough() {
        for (i, (_, needed)) in DEPENDENCIES.iter().enumerate() {
            let later = DEPENDENCIES[i..].iter().any(|(feature, _)| feature == needed);
            assert!(!later, "{needed} loses a dependency after it was looked at");
        }
    }

    #[test]
    fn size_and_mask_follow_the_components() {
        let supported = CpuidTable::new(vec![
            CpuidEntry::new(0, None, [0xd, 0, 0, 0]),
            CpuidEntry::new(1, None, [0, 0, u32::MAX, u32::MAX]),
            CpuidEntry::new(7, Some(0), [0, Feature::AVX2.mask() | Feature::AVX512F.mask(), 0, 0]),
            CpuidEntry::new(LEAF, Some(0), [0xe7, 0x988, 0x988, 0]),
            CpuidEntry::new(LEAF, Some(1), [0xf, 0x988, 0x1800, 0]),
            CpuidEntry::new(LEAF, Some(2), [0x100, 0x240, 0, 0]),
            CpuidEntry::new(LEAF, Some(5), [0x40, 0x440, 0, 0]),
            CpuidEntry::new(LEAF, Some(6), [0x200, 0x480, 0, 0]),
            CpuidEntry::new(LEAF, Some(7), [0x400, 0x680, 0, 0]),
            CpuidEntry::new(LEAF, Some(11), [0x10, 0, 1, 0]),
        ]);
        let describe = |forbidden, without: &[Feature]| {
            let mut table = supported.clone();
            without.iter().for_each(|feature| table.clear_feature(*feature));
            settle(&mut table, &supported, forbidden);
            let subleaves: Vec<_> = table.leaf(LEAF).iter().filter_map(|entry| entry.subleaf).collect();
            (table, subleaves)
        };

        let (table, subleaves) = describe(0, &[]);
        assert_eq!(subleaves, [0, 1, 2, 5, 6, 7]);
        assert_eq!(table.get(LEAF, 0), Some(CpuidEntry::new(LEAF, Some(0), [0xe7, 576, 0xa80, 0])));
        assert_eq!(
            table.get(LEAF, 1),
            Some(CpuidEntry::new(LEAF, Some(1), [0xf, 576, 0, 0])),
            "no CET, no state"
        );

        let (table, subleaves) = describe(0, &[Feature::AVX512F]);
        assert_eq!(subleaves, [0, 1, 2]);
        assert_eq!(table.get(LEAF, 0).map(|e| (e.eax, e.ecx)), Some((7, 0x340)));

        // One of the three components of AVX-512 is not enough.
        let (table, _) = describe(1 << 6, &[]);
        assert!(table.has(Feature::AVX2) && !table.has(Feature::AVX512F));
        assert_eq!(table.get(LEAF, 0).map(|e| e.eax), Some(7));

        let (table, subleaves) = describe(0, &[Feature::SSE]);
        assert_eq!(subleaves, [0, 1]);
        assert_eq!(table.get(LEAF, 0).map(|e| (e.eax, e.ecx)), Some((3, 576)));
        assert!([Feature::SSE2, Feature::AVX, Feature::FMA, Feature::AVX2].iter().all(|f| !table.has(*f)));

        let (table, subleaves) = describe(0, &[Feature::XSAVE]);
        assert!(subleaves.is_empty());
        assert!(!table.has(Feature::AVX) && !table.has(Feature::OSXSAVE));
    }
}
