//! What CPUID says to a paravirtual guest: the processor without what a deprivileged kernel cannot use, and Xen's own leaves
//! (public/arch-x86/cpuid.h).

use crate::cpuid::{CpuidEntry, CpuidRegister, CpuidTable, Feature};

/// First of Xen's leaves.
const XEN: u32 = 0x4000_0000;

/// Supervisor features, features whose registers only the engine can write, and promises of mitigations whose registers
/// nobody writes.
const HIDDEN: &[Feature] = &[
    Feature::VME,
    Feature::DE,
    Feature::PSE,
    Feature::MCE,
    Feature::SEP,
    Feature::MTRR,
    Feature::PGE,
    Feature::MCA,
    Feature::PSE36,
    Feature::DS,
    Feature::ACPI,
    Feature::MONITOR,
    Feature::VMX,
    Feature::PDCM,
    Feature::PCID,
    Feature::X2APIC,
    Feature::TSC_DEADLINE,
    Feature::ARAT,
    Feature::FSGSBASE,
    Feature::TSC_ADJUST,
    Feature::SGX,
    Feature::SMEP,
    Feature::INVPCID,
    Feature::MPX,
    Feature::SMAP,
    Feature::INTEL_PT,
    Feature::UMIP,
    Feature::PKU,
    Feature::OSPKE,
    Feature::WAITPKG,
    Feature::SHSTK,
    Feature::LA57,
    Feature::RDPID,
    Feature::IBT,
    Feature::SPEC_CTRL,
    Feature::INTEL_STIBP,
    Feature::FLUSH_L1D,
    Feature::ARCH_CAPABILITIES,
    Feature::SSBD,
    Feature::PSFD,
    Feature::IPRED_CTRL,
    Feature::RRSBA_CTRL,
    Feature::DDPD_U,
    Feature::BHI_CTRL,
    Feature::XSAVES,
    Feature::XFD,
    Feature::SVM,
    Feature::CR8_LEGACY,
    Feature::OSVW,
    Feature::PDPE1GB,
    Feature::RDTSCP,
    Feature::IBPB,
    Feature::IBRS,
    Feature::STIBP,
    Feature::IBRS_ALWAYS,
    Feature::STIBP_ALWAYS,
    Feature::IBRS_PREFERRED,
    Feature::IBRS_SAME_MODE,
    Feature::AMD_SSBD,
    Feature::VIRT_SSBD,
    Feature::AMD_PSFD,
    Feature::IBPB_RET,
];

/// Bits of leaf 0x8000_0001 EDX that repeat hidden ones of leaf 1 on AMD's processors.
const HIDDEN_REPEATED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;

/// Leaves that make no sense there: performance monitoring, SGX, trace, AMD's SVM.
const HIDDEN_LEAVES: [u32; 5] = [5, 0xa, 0x12, 0x14, 0x8000_000a];

/// What a paravirtual guest finds, from what the engine's processor has. The same table serves CPUID with Xen's prefix,
/// which the ABI emulates, and without it.
pub fn pv_cpuid(processor: &CpuidTable) -> CpuidTable {
    let mut table = processor.clone();
    for leaf in HIDDEN_LEAVES {
        table.remove_leaf(leaf);
    }
    for leaf in XEN..XEN + 0x100 {
        table.remove_leaf(leaf);
    }
    for feature in HIDDEN {
        if let Some(mut entry) = table.get(feature.leaf(), feature.subleaf()) {
            *entry.register_mut(feature.register()) &= !feature.mask();
            table.set(entry);
        }
    }
    if let Some(mut entry) = table.get(0x8000_0001, 0) {
        *entry.register_mut(CpuidRegister::Edx) &= !HIDDEN_REPEATED;
        table.set(entry);
    }
    if let Some(mut entry) = table.get(1, 0) {
        *entry.register_mut(CpuidRegister::Ecx) |= Feature::HYPERVISOR.mask();
        table.set(entry);
    }
    for entry in xen_leaves() {
        table.set(entry);
    }
    table
}

fn xen_leaves() -> [CpuidEntry; 3] {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    [
        CpuidEntry::new(XEN, None, [XEN + 2, word(b"XenV"), word(b"MMXe"), word(b"nVMM")]),
        CpuidEntry::new(XEN + 1, None, [4 << 16 | 17, 0, 0, 0]),
        // One hypercall page (whose address is not set by a register here), and the first feature.
        CpuidEntry::new(XEN + 2, None, [0, 0, 1, 0]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor() -> CpuidTable {
        CpuidTable::new(vec![
            CpuidEntry::new(0, None, [0x16, 0, 0, 0]),
            CpuidEntry::new(1, None, [u32::MAX; 4]),
            CpuidEntry::new(7, Some(0), [0, u32::MAX, u32::MAX, u32::MAX]),
            CpuidEntry::new(0xa, None, [7; 4]),
            CpuidEntry::new(XEN, None, [1, 2, 3, 4]),
            CpuidEntry::new(0x8000_0001, None, [u32::MAX; 4]),
        ])
    }

    #[test]
    fn supervisor_features_are_gone() {
        let table = pv_cpuid(&processor());
        for feature in HIDDEN {
            assert!(!table.has(*feature), "{}", feature.name());
        }
        for feature in
            [Feature::PAE, Feature::SSE2, Feature::CX16, Feature::LM, Feature::NX, Feature::HYPERVISOR]
        {
            assert!(table.has(feature), "{}", feature.name());
        }
        assert_eq!(table.get(0xa, 0), None);
    }

    #[test]
    fn xen_signs() {
        let entry = pv_cpuid(&processor()).get(XEN, 0).unwrap();
        let text: Vec<u8> =
            [entry.ebx, entry.ecx, entry.edx].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(text, b"XenVMMXenVMM");
        assert_eq!(entry.eax, XEN + 2);
    }
}
