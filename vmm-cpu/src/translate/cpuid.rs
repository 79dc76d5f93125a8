//! What the interpreted processor is: the CPUID leaves that the interpreter honours.
//!
//! The vendor is AMD's, since the interpreter is not subject to Meltdown and guests take AMD's word for it, and the family
//! one of the first with long mode, for which guests know no workarounds that would cost time.

use crate::cpuid::{CpuidEntry, CpuidTable, Feature};
use crate::translate::cpu::{cr4, efer};
pub(crate) use crate::translate::memory::GPA_BITS;

const VENDOR: [u32; 3] =
    [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"enti"), u32::from_le_bytes(*b"cAMD")];
/// Family 15, model 107, stepping 1.
const SIGNATURE: u32 = 0x0006_0fb1;
/// In 48 characters.
const BRAND: &[u8; 48] = b"vmm-cpu translate (software x86-64)\0\0\0\0\0\0\0\0\0\0\0\0\0";

const fn bits(list: &[u32]) -> u32 {
    let mut value = 0;
    let mut rest = list;
    while let [bit, others @ ..] = rest {
        value |= 1 << *bit;
        rest = others;
    }
    value
}

/// Leaf 1 EDX: FPU DE PSE TSC MSR PAE CX8 APIC SEP MTRR PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2.
const LEAF_1_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
/// Leaf 1 ECX: SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES, and that this is a
/// virtual machine.
const LEAF_1_ECX: u32 = bits(&[0, 1, 9, 13, 19, 20, 21, 22, 23, 24, 25, 31]);
/// Leaf 7 EBX: FSGSBASE TSC-adjust BMI1 SMEP BMI2 ERMS ADX SMAP CLFLUSHOPT SHA.
const LEAF_7_EBX: u32 = bits(&[0, 1, 3, 7, 8, 9, 19, 20, 23, 29]);
/// Leaf 7 ECX: UMIP.
const LEAF_7_ECX: u32 = bits(&[2]);
/// Leaf 0x80000001 EDX: the first 24 as in leaf 1 as far as AMD repeats them, SYSCALL NX 1-GiB pages RDTSCP LM.
const LEAF_E1_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 20, 23, 24, 26, 27, 29]);
/// Leaf 0x80000001 ECX: LAHF in 64-bit mode, CR8 in legacy modes, LZCNT, PREFETCHW.
const LEAF_E1_ECX: u32 = bits(&[0, 5, 8]);
/// Leaf 0x80000007 EDX: the TSC runs at a constant rate.
const LEAF_E7_EDX: u32 = bits(&[8]);

/// The upper bound of any CPU model.
pub(crate) fn supported() -> CpuidTable {
    let [a, b, c] = VENDOR;
    let entry = CpuidEntry::new;
    let mut entries = vec![
        entry(0, None, [0xd, a, c, b]),
        // CLFLUSH lines of 64 bytes.
        entry(1, None, [SIGNATURE, 8 << 8, LEAF_1_ECX, LEAF_1_EDX]),
        entry(7, Some(0), [0, LEAF_7_EBX, LEAF_7_ECX, 0]),
        entry(0x8000_0000, None, [0x8000_0008, a, c, b]),
        entry(0x8000_0001, None, [SIGNATURE, 0, LEAF_E1_ECX, LEAF_E1_EDX]),
        entry(0x8000_0007, None, [0, 0, 0, LEAF_E7_EDX]),
        // 48 bits of linear and as many physical address bits as page tables may use.
        entry(0x8000_0008, None, [48 << 8 | GPA_BITS, 0, 0, 0]),
    ];
    for (leaf, text) in (0x8000_0002..).zip(BRAND.as_chunks::<16>().0) {
        let (words, _) = text.as_chunks::<4>();
        let mut registers = [0; 4];
        for (register, word) in registers.iter_mut().zip(words) {
            *register = u32::from_le_bytes(*word);
        }
        entries.push(entry(leaf, None, registers));
    }
    CpuidTable::new(entries)
}

/// The same where programs run on the processor `host`, whatever is said here, with the vector registers in `state`, a table that
/// describes them: a guest kernel that is not told of them does not keep them apart.
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) fn supported_with_vectors(host: &CpuidTable, state: &CpuidTable) -> CpuidTable {
    /// The leaf of the extended state, and what of it is told of.
    const STATE: u32 = 0xd;
    const SSE: u32 = 3;
    const AVX: u32 = 1 << 2;
    const AVX_512: u32 = 7 << 5;
    const LEGACY_SIZE: u32 = 576;
    let mut table = supported();
    let held = state.get(STATE, 0).map_or(0, |leaf| leaf.eax);
    let has = |features: &[Feature], components| {
        held & components == components && features.iter().all(|feature| host.has(*feature))
    };
    if !has(&[Feature::XSAVE, Feature::AVX], SSE | AVX) {
        return table;
    }
    // Those alone that a kernel takes the state components from. It has no use for the instructions, which are not here.
    let (mut xcr0, mut features) = (SSE | AVX, vec![Feature::XSAVE, Feature::AVX]);
    if has(&[Feature::AVX512F], AVX_512) {
        xcr0 |= AVX_512;
        features.push(Feature::AVX512F);
    }
    let mut size = LEGACY_SIZE;
    for number in (2..32).filter(|number| xcr0 >> number & 1 != 0) {
        let Some(entry) = state.get(STATE, number) else { return table };
        size = size.max(entry.eax.saturating_add(entry.ebx));
        table.set(CpuidEntry::new(STATE, Some(number), [entry.eax, entry.ebx, 0, 0]));
    }
    table.set(CpuidEntry::new(STATE, Some(0), [xcr0, size, size, 0]));
    table.set(CpuidEntry::new(STATE, Some(1), [0; 4]));
    for feature in features {
        table.enable(feature, host);
    }
    table
}

/// What a program finds of a leaf that its kernel is told like that: without the vector registers of
/// `supported_with_vectors`, whose instructions software does not have.
pub(crate) fn without_vectors(leaf: u32, subleaf: u32, told: [u32; 4]) -> [u32; 4] {
    let [a, b, c, d] = told;
    let state = Feature::XSAVE.mask() | Feature::OSXSAVE.mask() | Feature::AVX.mask();
    match (leaf, subleaf) {
        (1, _) => [a, b, c & !state, d],
        (7, 0) => [a, b & !Feature::AVX512F.mask(), c, d],
        (0xd, _) => [0; 4],
        _ => told,
    }
}

/// The CR4 bits that go with the features of `table`.
pub(crate) fn cr4_allowed(table: &CpuidTable) -> u64 {
    let always = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::PAE
        | cr4::MCE
        | cr4::PGE
        | cr4::PCE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT;
    let optional = [
        (Feature::UMIP, cr4::UMIP),
        (Feature::FSGSBASE, cr4::FSGSBASE),
        (Feature::SMEP, cr4::SMEP),
        (Feature::SMAP, cr4::SMAP),
        (Feature::XSAVE, cr4::OSXSAVE),
    ];
    optional
        .into_iter()
        .filter(|(feature, _)| table.has(*feature))
        .fold(always, |allowed, (_, bit)| allowed | bit)
}

/// The EFER bits that go with the features of `table`.
pub(crate) fn efer_allowed(table: &CpuidTable) -> u64 {
    let optional =
        [(Feature::SYSCALL, efer::SCE), (Feature::LM, efer::LME | efer::LMA), (Feature::NX, efer::NXE)];
    optional
        .into_iter()
        .filter(|(feature, _)| table.has(*feature))
        .fold(0, |allowed, (_, bits)| allowed | bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_bits_follow_features() {
        let mut table = supported();
        assert_eq!(cr4_allowed(&table) & (cr4::SMEP | cr4::SMAP | cr4::OSXSAVE), cr4::SMEP | cr4::SMAP);
        table.remove_leaf(7);
        assert_eq!(cr4_allowed(&table) & (cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::FSGSBASE), 0);
    }

    #[test]
    fn extended_features_follow_features() {
        assert_eq!(efer_allowed(&supported()), efer::ALL);
        let mut table = supported();
        table.remove_leaf(0x8000_0001);
        assert_eq!(efer_allowed(&table), 0);
    }

    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    #[test]
    fn kernels_are_told_of_vector_registers_that_the_host_has_and_the_engine_holds() {
        let mut host = CpuidTable::new(vec![CpuidEntry::new(0, None, [0xd, 0, 0, 0])]);
        host.set(CpuidEntry::new(1, None, [0, 0, Feature::XSAVE.mask() | Feature::AVX.mask(), 0]));
        let entry = |subleaf, registers| CpuidEntry::new(0xd, Some(subleaf), registers);
        let held = CpuidTable::new(vec![
            CpuidEntry::new(0, None, [0xd, 0, 0, 0]),
            entry(0, [0xe7, 0x980, 0x980, 0]),
            entry(2, [0x100, 0x240, 0, 0]),
            entry(5, [0x40, 0x340, 0, 0]),
            entry(6, [0x200, 0x380, 0, 0]),
            entry(7, [0x400, 0x580, 0, 0]),
        ]);
        let told = supported_with_vectors(&host, &held);
        assert!(told.has(Feature::XSAVE) && told.has(Feature::AVX) && !told.has(Feature::AVX512F));
        assert_eq!(told.get(0xd, 0), Some(entry(0, [7, 0x340, 0x340, 0])));
        assert_eq!(without_vectors(1, 0, [0, 0, u32::MAX, 0])[2] & Feature::AVX.mask(), 0);
        host.set(CpuidEntry::new(7, Some(0), [0, Feature::AVX512F.mask(), 0, 0]));
        let told = supported_with_vectors(&host, &held);
        assert!(told.has(Feature::AVX512F) && !told.has(Feature::AVX2));
        assert_eq!(told.get(0xd, 0), Some(entry(0, [0xe7, 0x980, 0x980, 0])));
        let nothing = supported_with_vectors(&host, &CpuidTable::new(Vec::new()));
        assert!(!nothing.has(Feature::XSAVE) && nothing.get(0xd, 0).is_none_or(|leaf| leaf.eax == 0));
    }

    #[test]
    fn brand_is_readable() {
        let table = supported();
        let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| table.get(leaf, 0))
            .flat_map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(text, BRAND);
        assert_eq!(&table.vendor(), b"AuthenticAMD");
    }
}
