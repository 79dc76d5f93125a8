//! Models resolved on synthetic hosts, on this one, and under random masks.

use super::*;
use crate::cpuid::CpuidEntry;
use crate::cpuid::CpuidRegister::{Eax, Ebx, Ecx, Edx};

const LEVELS: [CpuModel; 4] =
    [CpuModel::X86_64V1, CpuModel::X86_64V2, CpuModel::X86_64V3, CpuModel::X86_64V4];

const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

/// A host with every bit of every feature register set, also those that mean nothing yet.
fn full_host([ebx, ecx, edx]: [u32; 3]) -> CpuidTable {
    let ones = [u32::MAX; 4];
    let mut entries = vec![
        CpuidEntry::new(0, None, [0x24, ebx, ecx, edx]),
        CpuidEntry::new(1, None, [0x000a_0f11, 0x0102_0800, u32::MAX, u32::MAX]),
        CpuidEntry::new(2, None, [0x00fe_ff01, 0xf0, 0, 0]),
        CpuidEntry::new(4, Some(0), [0x4121, 0x01c0_003f, 0x3f, 0]),
        CpuidEntry::new(7, Some(0), [2, u32::MAX, u32::MAX, u32::MAX]),
        CpuidEntry::new(7, Some(1), ones),
        CpuidEntry::new(7, Some(2), ones),
        CpuidEntry::new(0xb, Some(0), [0, 0, 0, 1]),
        CpuidEntry::new(0xd, Some(0), [0x0006_02ff, 0x2b00, 0x2b00, 0]),
        CpuidEntry::new(0xd, Some(1), [0x1f, 0x2b00, 0x1900, 0]),
        CpuidEntry::new(0x8000_0000, None, [0x8000_0026, ebx, ecx, edx]),
        CpuidEntry::new(0x8000_0001, None, [0x000a_0f11, 0x4000_0000, u32::MAX, u32::MAX]),
        CpuidEntry::new(0x8000_0002, None, [1, 2, 3, 4]),
        CpuidEntry::new(0x8000_0008, None, [0x0034_3934, u32::MAX, u32::MAX, u32::MAX]),
        CpuidEntry::new(0x8000_001d, Some(0), [0x0121, 0x01c0_003f, 0x3f, 0]),
        CpuidEntry::new(0x4000_0000, None, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        CpuidEntry::new(0x4000_0001, None, [0x0100_7efb, 0, 0, 0]),
    ];
    let components = [
        (2, 0x100, 0x240),
        (3, 0x40, 0x3c0),
        (4, 0x40, 0x400),
        (5, 0x40, 0x440),
        (6, 0x200, 0x480),
        (7, 0x400, 0x680),
        (8, 0x80, 0),
        (9, 8, 0xa80),
        (11, 0x10, 0),
        (12, 0x18, 0),
        (17, 0x40, 0xac0),
        (18, 0x2000, 0xb00),
    ];
    entries.extend(components.map(|(n, size, offset)| {
        let supervisor = u32::from(offset == 0);
        CpuidEntry::new(0xd, Some(n), [size, offset, supervisor, 0])
    }));
    let hidden =
        [3, 5, 6, 9, 0xa, 0x12, 0x14, 0x1f, 0x23, 0x8000_0007, 0x8000_000a, 0x8000_001f, 0x8000_0021];
    entries.extend(hidden.map(|leaf| CpuidEntry::new(leaf, None, ones)));
    CpuidTable::new(entries)
}

fn hosts() -> Vec<CpuidTable> {
    vec![full_host(INTEL), full_host(AMD), CpuidTable::host()]
}

/// The features of `table`, by name.
fn shown(table: &CpuidTable) -> Vec<&'static str> {
    Feature::all().iter().filter(|feature| table.has(**feature)).map(Feature::name).collect()
}

fn assert_within(table: &CpuidTable, bound: &CpuidTable, what: &str) {
    for entry in table.entries() {
        for register in CpuidRegister::ALL {
            let place = (entry.leaf, entry.subleaf.unwrap_or(0), register);
            assert_eq!(rules::excess(table, bound, place), 0, "{what}: {place:x?}");
        }
    }
}

fn xcr0(table: &CpuidTable) -> u32 {
    table.get(0xd, 0).map_or(0, |entry| entry.eax)
}

#[test]
fn each_level_is_within_the_next_and_the_host() {
    for supported in hosts() {
        let resolved = LEVELS.iter().map(|level| (level.to_string(), level.resolve(&supported)));
        // A real host may end before level 4; the synthetic ones must not.
        let mut tables: Vec<_> = resolved.filter_map(|(name, table)| Some((name, table.ok()?))).collect();
        assert!(!tables.is_empty());
        if supported != CpuidTable::host() {
            assert_eq!(tables.len(), LEVELS.len());
        }
        tables.push(("host".to_owned(), CpuModel::Host.resolve(&supported).unwrap()));
        for pair in tables.windows(2) {
            let what = format!("{} in {}", pair[0].0, pair[1].0);
            assert_within(&pair[0].1, &pair[1].1, &what);
            for feature in Feature::all() {
                assert!(!pair[0].1.has(*feature) || pair[1].1.has(*feature), "{what}: {feature}");
            }
        }
        assert_eq!(tables.last().unwrap().1, supported);
    }
}

/// Spelt out from the psABI, not taken from the table under test.
#[test]
fn each_level_adds_what_the_psabi_says() {
    let v1 = ["fpu", "cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "syscall", "lm"];
    let steps = [
        ("x86-64-v2", &["sse3", "ssse3", "cx16", "sse4.1", "sse4.2", "popcnt", "lahf-lm"][..]),
        (
            "x86-64-v3",
            &["fma", "movbe", "xsave", "avx", "f16c", "bmi1", "avx2", "bmi2", "xsaveopt", "lzcnt"][..],
        ),
        ("x86-64-v4", &["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"][..]),
    ];
    for supported in [full_host(INTEL), full_host(AMD)] {
        let mut before = shown(&CpuModel::X86_64V1.resolve(&supported).unwrap());
        assert!(v1.iter().all(|feature| before.contains(feature)), "{before:?}");
        for (model, added) in steps {
            let now = shown(&model.parse::<CpuModel>().unwrap().resolve(&supported).unwrap());
            let new: Vec<_> = now.iter().filter(|feature| !before.contains(feature)).copied().collect();
            assert_eq!(new, added, "{model}");
            before = now;
        }
    }
}

#[test]
fn a_level_names_what_the_host_lacks() {
    let full = full_host(INTEL);
    for (model, features, expected) in [
        (CpuModel::X86_64V1, &[Feature::SSE2][..], "x86-64-v1 needs SSE2, which this host lacks"),
        (CpuModel::X86_64V2, &[Feature::POPCNT], "x86-64-v2 needs POPCNT, which this host lacks"),
        (
            CpuModel::X86_64V3,
            &[Feature::BMI2, Feature::AVX2],
            "x86-64-v3 needs AVX2, BMI2, which this host lacks",
        ),
        (CpuModel::X86_64V4, &[Feature::AVX512CD], "x86-64-v4 needs AVX512CD, which this host lacks"),
    ] {
        let mut supported = full.clone();
        features.iter().for_each(|feature| supported.clear_feature(*feature));
        assert_eq!(model.resolve(&supported).unwrap_err().to_string(), expected);
    }

    // Without the state components the instructions cannot be used.
    let mut supported = full;
    supported.remove_leaf(0xd);
    let error = CpuModel::X86_64V3.resolve(&supported).unwrap_err();
    let CpuModelError::LevelUnmet { missing, .. } = &error else { panic!("{error}") };
    assert!(missing.contains(&Feature::XSAVE) && missing.contains(&Feature::AVX), "{error}");
    assert!(CpuModel::X86_64V2.resolve(&supported).is_ok());
    let error = Error::from(error);
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("x86-64-v3 needs"), "{error}");
}

#[test]
fn every_demanded_feature_is_demanded() {
    for (level, model) in [Level::V1, Level::V2, Level::V3, Level::V4].into_iter().zip(LEVELS) {
        let demanded = levels::missing(level, &CpuidTable::default());
        for feature in demanded {
            let mut supported = full_host(AMD);
            supported.clear_feature(feature);
            let error = model.resolve(&supported).unwrap_err();
            let CpuModelError::LevelUnmet { missing, .. } = &error else { panic!("{error}") };
            assert!(missing.contains(&feature), "{error}");
        }
    }
}

#[test]
fn leaf_d_describes_the_components_of_the_level() {
    let supported = full_host(INTEL);
    let [v1, v2, v3, v4] = LEVELS.map(|level| level.resolve(&supported).unwrap());
    for table in [v1, v2] {
        assert!(table.leaf(0xd).is_empty());
        assert_eq!(table.max_basic_leaf(), 0xb);
    }
    for (table, mask, size, components) in [(v3, 7, 0x340, &[2][..]), (v4, 0xe7, 0xa80, &[2, 5, 6, 7])] {
        assert_eq!(table.get(0xd, 0), Some(CpuidEntry::new(0xd, Some(0), [mask, 576, size, 0])));
        // XSAVEOPT stays, the compacted format and its components go.
        assert_eq!(table.get(0xd, 1), Some(CpuidEntry::new(0xd, Some(1), [1, 0, 0, 0])));
        let found: Vec<_> =
            table.leaf(0xd).iter().filter_map(|entry| entry.subleaf).filter(|n| *n > 1).collect();
        assert_eq!(found, components);
    }
}

#[test]
fn unknown_leaves_and_bits_stay_hidden() {
    for supported in [full_host(INTEL), full_host(AMD)] {
        let table = CpuModel::X86_64V4.resolve(&supported).unwrap();
        let leaves: std::collections::BTreeSet<_> = table.entries().iter().map(|entry| entry.leaf).collect();
        let expected = [0, 1, 2, 4, 6, 7, 0xb, 0xd].into_iter().chain([0x4000_0000, 0x4000_0001]).chain([
            0x8000_0000,
            0x8000_0001,
            0x8000_0002,
            0x8000_0007,
            0x8000_0008,
            0x8000_001d,
            0x8000_0021,
        ]);
        assert_eq!(leaves, expected.collect());
        assert_eq!((table.max_basic_leaf(), table.max_extended_leaf()), (0xd, 0x8000_0021));
        assert_eq!(table.get(6, 0), Some(CpuidEntry::new(6, None, [4, 0, 0, 0])));
        for name in ["vmx", "svm", "monitor", "aes", "rdrand", "la57", "pku", "shstk", "osxsave", "amx-tile"]
        {
            assert!(!table.has(Feature::from_name(name).unwrap()), "{name}");
        }
        // Bit 16 of leaf 1 ECX and bit 10 of its EDX are reserved.
        assert_eq!((table.register(1, 0, Ecx) >> 16 & 1, table.register(1, 0, Edx) >> 10 & 1), (0, 0));
    }
}

#[test]
fn the_host_stays_recognizable() {
    let supported = full_host(AMD);
    for table in LEVELS.map(|level| level.resolve(&supported).unwrap()) {
        assert_eq!(&table.vendor(), b"AuthenticAMD");
        assert_eq!(table.register(1, 0, Eax), 0x000a_0f11);
        for leaf in [0x4000_0000, 0x4000_0001, 0x8000_0002] {
            assert_eq!(table.leaf(leaf), supported.leaf(leaf));
        }
        // Physical width is the host's; linear addresses have 48 bits without LA57.
        assert_eq!(table.register(0x8000_0008, 0, Eax), 0x0034_3034);
        // AMD repeats leaf 1, and no reserved bit of it.
        assert_eq!(table.register(0x8000_0001, 0, Edx) & 0x0183_f3ff, 0x0183_f3ff);
        assert_eq!(table.register(0x8000_0001, 0, Edx) >> 10 & 1, 0);
    }
}

#[test]
fn topology_leaves_can_be_found_at_every_level() {
    let mut supported = full_host(AMD);
    // As KVM answers them: there, and empty.
    supported.remove_leaf(0xb);
    for level in LEVELS {
        let table = level.resolve(&supported).unwrap().for_vcpu(1, 2);
        assert!(table.max_basic_leaf() >= 0xb && table.get(0xb, 1).is_some_and(|entry| entry.ebx == 2));
        assert_eq!(table.get(0x8000_001e, 0).map(|entry| entry.eax), Some(1));
    }
}

#[test]
fn resolving_again_changes_nothing() {
    for supported in hosts() {
        for model in LEVELS {
            let Ok(table) = model.resolve(&supported) else { continue };
            assert_eq!(model.resolve(&table).as_ref(), Ok(&table), "{model}");
            assert_eq!(CpuModel::Exact(table.clone()).resolve(&supported).as_ref(), Ok(&table), "{model}");
            let of_vcpu = table.for_vcpu(3, 5);
            assert_eq!(CpuModel::Exact(of_vcpu.clone()).resolve(&supported), Ok(of_vcpu), "{model}");
        }
    }
}

#[test]
fn taking_a_feature_away_takes_what_depends_on_it() {
    let supported = full_host(INTEL);
    let table = CpuModel::Host.without_feature(Feature::AVX).resolve(&supported).unwrap();
    for feature in
        [Feature::AVX, Feature::AVX2, Feature::FMA, Feature::VAES, Feature::AVX512F, Feature::AVX512VL]
    {
        assert!(!table.has(feature), "{feature}");
    }
    assert!(table.has(Feature::XSAVES) && table.has(Feature::AES) && table.has(Feature::PKU));
    assert_eq!(xcr0(&table), 0x0006_021b);
    assert!(table.get(0xd, 2).is_none() && table.get(0xd, 9).is_some());

    // The same by way of XCR0.
    let table = CpuModel::X86_64V4.without(0xd, 0, Eax, 1 << 6).resolve(&supported).unwrap();
    assert!(!table.has(Feature::AVX512F) && table.has(Feature::AVX2));
    assert_eq!(xcr0(&table), 7);

    let table = CpuModel::Host.without_feature(Feature::XSAVE).resolve(&supported).unwrap();
    assert!(table.leaf(0xd).is_empty() && !table.has(Feature::AVX) && table.has(Feature::SSE4_2));
}

#[test]
fn supervisor_components_go_with_xsaves() {
    let supported = full_host(INTEL);
    let table = CpuModel::Host.without_feature(Feature::AVX512F).resolve(&supported).unwrap();
    assert_eq!(table.register(0xd, 1, Ecx), 0x1900);
    assert!(table.get(0xd, 11).is_some());
    let table = CpuModel::Host.without_feature(Feature::XSAVES).resolve(&supported).unwrap();
    assert_eq!(table.register(0xd, 1, Ecx), 0);
    assert!(table.get(0xd, 11).is_none() && table.get(0xd, 2).is_some());
}

#[test]
fn amd_repeats_what_is_left_of_leaf_1() {
    let table = CpuModel::Host.without_feature(Feature::MCA).resolve(&full_host(AMD)).unwrap();
    assert_eq!(table.register(0x8000_0001, 0, Edx), !Feature::MCA.mask());
}

#[test]
fn adding_to_a_level() {
    let supported = full_host(INTEL);
    let table = CpuModel::X86_64V2.with_feature(Feature::AES).resolve(&supported).unwrap();
    assert!(table.has(Feature::AES) && !table.has(Feature::AVX));

    // Leaf 0xd comes back with XSAVE, in whichever order the features are named.
    for text in ["x86-64-v2,+xsave,+avx", "x86-64-v2,+avx,+xsave"] {
        let table = text.parse::<CpuModel>().unwrap().resolve(&supported).unwrap();
        assert!(table.has(Feature::AVX) && table.max_basic_leaf() == 0xd);
        assert_eq!(table.get(0xd, 0).map(|entry| (entry.eax, entry.ecx)), Some((7, 0x340)));
    }

    // A leaf above the announced maximum, and a subleaf above the one of leaf 7.
    let table = CpuModel::X86_64V1.with(0x14, 0, Ebx, 3).resolve(&supported).unwrap();
    assert_eq!((table.max_basic_leaf(), table.register(0x14, 0, Ebx)), (0x14, 3));
    let mut small = supported.clone();
    small.set(CpuidEntry::new(7, Some(2), [0; 4]));
    small.set(CpuidEntry::new(7, Some(1), [1 << 4, 0, 0, 0]));
    assert_eq!(CpuModel::X86_64V3.resolve(&small).unwrap().register(7, 0, Eax), 0);
    let table = CpuModel::X86_64V3.with_feature(Feature::AVX_VNNI).resolve(&small).unwrap();
    assert_eq!(table.register(7, 0, Eax), 1);
}

#[test]
fn what_cannot_be_added_is_named() {
    let supported = full_host(INTEL);
    let error = CpuModel::X86_64V2.with_feature(Feature::AVX2).resolve(&supported).unwrap_err();
    assert_eq!(error, CpuModelError::DependencyAbsent { feature: Feature::AVX2, needs: Some(Feature::AVX) });
    assert_eq!(error.to_string(), "AVX2 needs AVX, which the model leaves out");

    let model = CpuModel::X86_64V3.without(0xd, 0, Eax, 4).with_feature(Feature::AVX);
    let error = model.resolve(&supported).unwrap_err();
    assert!(error.to_string().starts_with("AVX needs its state in CPUID leaf 0xd"), "{error}");

    let error = CpuModel::X86_64V3.with(0xd, 0, Eax, 0x20).resolve(&supported).unwrap_err();
    assert_eq!(error, CpuModelError::Computed { leaf: 0xd, subleaf: 0, register: Eax, bits: 0x20 });

    let mut poor = supported;
    poor.clear_feature(Feature::AES);
    let error = CpuModel::X86_64V2.with(1, 0, Ecx, 0x0200_0001).resolve(&poor).unwrap_err();
    assert_eq!(
        error,
        CpuModelError::BeyondSupported {
            leaf: 1,
            subleaf: 0,
            register: Ecx,
            bits: 1 << 25,
            supported: !(1 << 25)
        }
    );
    assert_eq!(
        error.to_string(),
        "CPUID leaf 0x1 subleaf 0x0 ECX: 0x2000000 (AES) is more than the supported 0xfdffffff"
    );
    let error = CpuModel::Host.with(0x77, 3, Edx, 6).resolve(&poor).unwrap_err();
    assert_eq!(
        error,
        CpuModelError::BeyondSupported { leaf: 0x77, subleaf: 3, register: Edx, bits: 6, supported: 0 }
    );
}

#[test]
fn a_table_must_be_within_the_supported_one() {
    let supported = CpuModel::X86_64V3.resolve(&full_host(AMD)).unwrap();
    for (leaf, subleaf, register, bits) in [
        (1, None, Ecx, 1 << 25),
        (7, Some(0), Ebx, 1 << 16),
        (0x77, None, Eax, 1),
        (0, None, Eax, 0x1f),
        (0x8000_0008, None, Eax, 0x39),
    ] {
        let mut table = supported.clone();
        let found = table.get(leaf, subleaf.unwrap_or(0));
        let mut entry = found.unwrap_or_else(|| CpuidEntry::new(leaf, subleaf, [0; 4]));
        *entry.register_mut(register) |= bits;
        table.set(entry);
        let error = CpuModel::Exact(table).resolve(&supported).unwrap_err();
        let matches = matches!(error, CpuModelError::BeyondSupported { leaf: l, register: r, .. }
            if (l, r) == (leaf, register));
        assert!(matches, "{error}");
    }
    let mut table = supported.clone();
    table.remove_leaf(0xd);
    table.set(CpuidEntry::new(0x8000_0002, None, [9; 4]));
    assert_eq!(
        CpuModel::Exact(table.clone()).resolve(&supported),
        Ok(table),
        "less, or another name, is fine"
    );
}

#[test]
fn masks_apply_in_order_and_custom_models_do_not_nest() {
    let supported = full_host(INTEL);
    let off_on = CpuModel::X86_64V2.without_feature(Feature::SSE4_2).with_feature(Feature::SSE4_2);
    assert_eq!(off_on.resolve(&supported), CpuModel::X86_64V2.masked(no_mask()).resolve(&supported));
    let on_off = CpuModel::X86_64V2.with_feature(Feature::AES).without_feature(Feature::AES);
    assert!(!on_off.resolve(&supported).unwrap().has(Feature::AES));

    let CpuModel::Custom(custom) = on_off.masked(no_mask()) else { panic!("not custom") };
    assert_eq!((custom.base(), custom.masks().len()), (&CpuModel::X86_64V2, 3));
}

fn no_mask() -> CpuidMask {
    CpuidMask { leaf: 1, subleaf: 0, register: Eax, clear: 0, set: 0 }
}

/// Numbers of a fixed sequence (xorshift64*), so that a failure can be repeated.
struct Sequence(u64);

impl Sequence {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// 32 bits of which few are set.
    fn sparse(&mut self) -> u32 {
        (0..4).fold(u32::MAX, |bits, _| {
            bits & self.next().to_le_bytes()[..4].iter().fold(0, |v, b| v << 8 | u32::from(*b))
        })
    }
}

#[test]
fn no_mask_leads_beyond_the_host_or_to_an_inconsistent_table() {
    let mut sequence = Sequence(0x9e37_79b9_7f4a_7c15);
    let bases =
        [CpuModel::Host, CpuModel::X86_64V1, CpuModel::X86_64V2, CpuModel::X86_64V3, CpuModel::X86_64V4];
    let (mut good, mut bad) = (0, 0);
    for round in 0..600 {
        // A host with a few features missing, so that masks can fail.
        let mut supported = full_host(if round % 2 == 0 { INTEL } else { AMD });
        for _ in 0..sequence.below(4) {
            supported.clear_feature(sequence.pick(Feature::all()));
        }
        let mut model = sequence.pick(&bases);
        for _ in 0..1 + sequence.below(4) {
            let feature = sequence.pick(Feature::all());
            let (clear, set) = match sequence.below(4) {
                0 => (feature.mask(), 0),
                1 => (0, feature.mask()),
                2 => (sequence.sparse(), 0),
                _ => (sequence.sparse(), sequence.sparse()),
            };
            let (leaf, subleaf, register) = (feature.leaf(), feature.subleaf(), feature.register());
            model = model.masked(CpuidMask { leaf, subleaf, register, clear, set });
        }

        let table = match model.resolve(&supported) {
            Ok(table) => table,
            Err(error) => {
                bad += 1;
                assert!(!matches!(error, CpuModelError::UnknownModel { .. }), "{model}");
                continue;
            }
        };
        good += 1;
        let what = format!("round {round}: {model}");
        assert_within(&table, &supported, &what);

        let CpuModel::Custom(custom) = &model else { panic!("not custom") };
        for ((leaf, subleaf, register), (clear, set)) in custom.net() {
            let value = table.register(leaf, subleaf, register);
            assert_eq!((value & clear, value & set), (0, set), "{what}: {leaf:#x}.{subleaf:#x} {register}");
        }
        let mut again = table.clone();
        xstate::settle(&mut again, &supported, u64::from(!xcr0(&table)) & 0xffff_fffc);
        assert_eq!(again, table, "{what}: not consistent");
        for feature in Feature::all().iter().filter(|feature| table.has(**feature)) {
            assert_eq!(xstate::unmet_dependency(&table, *feature), None, "{what}: {feature}");
        }
        // What is written down is the same model; masks without a bit leave no trace.
        if custom.masks().iter().all(|mask| mask.clear | mask.set == 0) {
            continue;
        }
        assert_eq!(model.to_string().parse::<CpuModel>().unwrap().resolve(&supported), Ok(table), "{what}");
    }
    assert!(good > 100 && bad > 100, "{good} resolved, {bad} refused: the masks test one side only");
}
