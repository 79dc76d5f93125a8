//! The levels of the x86-64 psABI, cut out of what a backend supports.
//!
//! What a level shows is decided per bit by the [`Tier`] of the feature and per leaf by [`cut_entry`]; what
//! neither names is hidden, so a leaf of a future processor cannot leak into a model of today.

use std::fmt;

use super::features::{Feature, Tier};
use super::{CpuidEntry, CpuidRegister, CpuidTable, EXTENDED_BASE, HYPERVISOR_LEAVES};

/// A level of the x86-64 psABI, table 3.1. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Level {
    /// Baseline: CMPXCHG8B, CMOV, x87, FXSR, MMX, SSE2, SYSCALL.
    V1,
    /// Nehalem: CMPXCHG16B, LAHF-SAHF, POPCNT, SSE3 to SSE4.2.
    V2,
    /// Haswell: AVX2, BMI, F16C, FMA, LZCNT, MOVBE, XSAVE.
    V3,
    /// Skylake server: AVX512F, BW, CD, DQ, VL.
    V4,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// The bits of leaf 0x8000_0001 EDX that repeat leaf 1 EDX on AMD (AMD APM 3 E.4.2).
pub(super) const AMD_MIRROR: u32 = 0x0183_f3ff;

/// Leaf 1 EBX: brand index and CLFLUSH line size. The other bytes differ between vCPUs.
const BRAND_AND_CLFLUSH: u32 = 0x0000_ffff;

/// Width of linear addresses shown: LA57 is hidden.
const LINEAR_BITS: u32 = 48;

/// The part of `supported` that `level` may show. Not yet consistent; see [`super::xstate::settle`].
pub(super) fn cut(level: Level, supported: &CpuidTable) -> CpuidTable {
    let entries = supported.entries().iter().filter_map(|entry| cut_entry(level, *entry));
    let mut table =
        CpuidTable::new(entries.filter(|entry| !entry.is_zero() || entry.subleaf == Some(0)).collect());

    let mut reachable: Vec<u32> =
        table.entries().iter().filter(|entry| !entry.is_zero()).map(|entry| entry.leaf).collect();
    // Leaf 0xd may yet go, and is reached where it is written.
    reachable.retain(|leaf| *leaf != 0xd);
    // Where the topology of the vCPUs will be written, even if the backend left the leaves empty.
    if supported.max_basic_leaf() >= 0xb {
        reachable.push(0xb);
    }
    if table.has(Feature::TOPOEXT) && supported.max_extended_leaf() >= 0x8000_001e {
        reachable.push(0x8000_001e);
    }
    for leaf in reachable {
        table.reach(leaf);
    }

    let last_subleaf = table.leaf(7).iter().filter_map(|entry| entry.subleaf).max();
    if let (Some(mut entry), Some(last)) = (table.get(7, 0), last_subleaf) {
        entry.eax = last;
        table.set(entry);
    }
    table
}

/// The features that `level` demands and `table` lacks.
pub(super) fn missing(level: Level, table: &CpuidTable) -> Vec<Feature> {
    let demanded = |feature: &&Feature| matches!(feature.tier(), Tier::Level(of) if of <= level);
    Feature::all().iter().filter(demanded).filter(|feature| !table.has(**feature)).copied().collect()
}

/// The bits of a feature register that `level` may show.
fn shown(level: Level, leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
    let of_register = |feature: &&Feature| {
        (feature.leaf(), feature.subleaf(), feature.register()) == (leaf, subleaf, register)
    };
    let of_level = |feature: &&Feature| match feature.tier() {
        Tier::Level(of) => of <= level,
        Tier::Platform => true,
        Tier::Other => false,
    };
    let named = Feature::all().iter().filter(of_register).filter(of_level);
    let bits = named.fold(0, |bits, feature| bits | feature.mask());
    if (leaf, register) == (EXTENDED_BASE + 1, CpuidRegister::Edx) {
        bits | AMD_MIRROR & shown(level, 1, 0, CpuidRegister::Edx)
    } else {
        bits
    }
}

/// What of one entry `level` shows; `None` hides it.
fn cut_entry(level: Level, entry: CpuidEntry) -> Option<CpuidEntry> {
    let CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx } = entry;
    let bits = |register| entry.register(register) & shown(level, leaf, subleaf.unwrap_or(0), register);
    let (a, b, c, d) = (
        bits(CpuidRegister::Eax),
        bits(CpuidRegister::Ebx),
        bits(CpuidRegister::Ecx),
        bits(CpuidRegister::Edx),
    );
    let registers = match leaf {
        // The maximum follows from what is kept.
        0 => [0, ebx, ecx, edx],
        EXTENDED_BASE => [EXTENDED_BASE, ebx, ecx, edx],
        // Family, model and stepping are the host's: guest kernels choose workarounds by them.
        1 => [eax, ebx & BRAND_AND_CLFLUSH, c, d],
        0x8000_0001 => [eax, ebx, c, d],
        // Caches, TLBs, topology, the name of the processor: they describe and enable nothing.
        2 | 4 | 0xb | 0x8000_0002..=0x8000_0006 | 0x8000_001d | 0x8000_001e => [eax, ebx, ecx, edx],
        0x8000_0008 => {
            let [physical, linear, guest_physical, _] = eax.to_le_bytes();
            let linear = u32::from(linear).min(LINEAR_BITS);
            [u32::from(physical) | linear << 8 | u32::from(guest_physical) << 16, b, ecx & 0xffff, 0]
        }
        // Subleaf 0 and the components are computed from the features; here only the instructions.
        0xd if subleaf == Some(1) => [a, b, c, d],
        6 | 7 | 0x8000_0007 | 0x8000_0021 => [a, b, c, d],
        _ if HYPERVISOR_LEAVES.contains(&leaf) => [eax, ebx, ecx, edx],
        _ => return None,
    };
    Some(CpuidEntry::new(leaf, subleaf, registers))
}
