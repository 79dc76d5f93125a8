//! [`CpuModel`]: which of the supported CPUID leaves and bits a guest sees.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use super::levels::Level;
use super::{CpuidRegister, CpuidTable, Feature, levels, rules, xstate};
use crate::error::Error;

/// The CPU that a guest sees.
///
/// A model never adds anything to what the backend supports on this host. On command lines it is written
/// as `host`, `x86-64-v2`, or `x86-64-v3,+aes,-avx2`; see [`CpuModel::from_str`](std::str::FromStr).
///
/// # The levels
/// The models `X86_64V1` to `X86_64V4` show what the x86-64 psABI (table 3.1) puts into that level, which
/// the host must have, and what a kernel uses to run the machine at any level, as far as the host has it:
/// paging, protection, interrupts, clocks, fast string instructions, mitigations of processor flaws. Hidden
/// are instructions beyond the level (also AES and RDRAND, which belong to none: see
/// [`CpuModel::with_feature`]), performance counters, tracing, nested virtualization, 57-bit addresses, the
/// compacted XSAVE format, and every leaf that this crate does not know.
///
/// Vendor, family, model, stepping and the name stay the host's, since guest kernels choose workarounds by
/// them. So a level is about what programs may use; two hosts of different vendors do not become the
/// same, and a guest that moves between hosts needs one [table](CpuModel::Exact) that both support.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuModel {
    /// Everything that the backend supports.
    Host,
    /// The x86-64 baseline.
    X86_64V1,
    /// Baseline, CMPXCHG16B, LAHF-SAHF, POPCNT, SSE3, SSSE3, SSE4.1, SSE4.2.
    X86_64V2,
    /// Level 2, AVX, AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, XSAVE.
    X86_64V3,
    /// Level 3, AVX512F, AVX512BW, AVX512CD, AVX512DQ, AVX512VL.
    X86_64V4,
    /// Another model with bits taken away or added; made by [`CpuModel::without`] and its kin.
    Custom(CustomCpu),
    /// This table, as it is, if the backend supports all of it. Such a table comes from a snapshot.
    Exact(CpuidTable),
}

/// A change to one register of CPUID: first `clear`, then `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuidMask {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf; 0 where the leaf has none.
    pub subleaf: u32,
    /// The register.
    pub register: CpuidRegister,
    /// Bits that become zero.
    pub clear: u32,
    /// Bits that become one.
    pub set: u32,
}

/// A model and changes to it, applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomCpu {
    base: Box<CpuModel>,
    masks: Vec<CpuidMask>,
}

impl CustomCpu {
    /// `base` with `masks` applied in order. A custom base contributes its own masks first.
    pub fn new(base: CpuModel, masks: Vec<CpuidMask>) -> Self {
        match base {
            CpuModel::Custom(mut custom) => {
                custom.masks.extend(masks);
                custom
            }
            base => Self { base: Box::new(base), masks },
        }
    }

    /// The model that is changed; never a custom one.
    pub fn base(&self) -> &CpuModel {
        &self.base
    }

    /// The changes.
    pub fn masks(&self) -> &[CpuidMask] {
        &self.masks
    }

    /// The outcome of all masks for each register they touch: bits cleared, bits set.
    fn net(&self) -> BTreeMap<(u32, u32, CpuidRegister), (u32, u32)> {
        let mut net = BTreeMap::new();
        for mask in &self.masks {
            let (clear, set) = net.entry((mask.leaf, mask.subleaf, mask.register)).or_insert((0, 0));
            *clear = (*clear | mask.clear) & !mask.set;
            *set = *set & !mask.clear | mask.set;
        }
        net
    }
}

impl CpuModel {
    /// This model without `bits` of a register. What depends on them goes too: without AVX there is no
    /// AVX2, and leaf 0xd has no YMM component.
    #[must_use]
    pub fn without(self, leaf: u32, subleaf: u32, register: CpuidRegister, bits: u32) -> Self {
        self.masked(CpuidMask { leaf, subleaf, register, clear: bits, set: 0 })
    }

    /// This model with `bits` of a register, which the backend must support.
    #[must_use]
    pub fn with(self, leaf: u32, subleaf: u32, register: CpuidRegister, bits: u32) -> Self {
        self.masked(CpuidMask { leaf, subleaf, register, clear: 0, set: bits })
    }

    /// This model without `feature` and whatever depends on it.
    #[must_use]
    pub fn without_feature(self, feature: Feature) -> Self {
        self.without(feature.leaf(), feature.subleaf(), feature.register(), feature.mask())
    }

    /// This model with `feature`, which the backend must support.
    #[must_use]
    pub fn with_feature(self, feature: Feature) -> Self {
        self.with(feature.leaf(), feature.subleaf(), feature.register(), feature.mask())
    }

    /// This model with one more change.
    #[must_use]
    pub fn masked(self, mask: CpuidMask) -> Self {
        Self::Custom(CustomCpu::new(self, vec![mask]))
    }

    /// The table that a guest of this model sees on a host that supports `supported`, but for what
    /// [`CpuidTable::for_vcpu`] makes different for each vCPU.
    ///
    /// # Errors
    /// [`CpuModelError::LevelUnmet`], [`CpuModelError::BeyondSupported`],
    /// [`CpuModelError::DependencyAbsent`], [`CpuModelError::Computed`].
    pub fn resolve(&self, supported: &CpuidTable) -> Result<CpuidTable, CpuModelError> {
        match self {
            Self::Host => Ok(supported.clone()),
            Self::X86_64V1 => resolve_level(Level::V1, supported),
            Self::X86_64V2 => resolve_level(Level::V2, supported),
            Self::X86_64V3 => resolve_level(Level::V3, supported),
            Self::X86_64V4 => resolve_level(Level::V4, supported),
            Self::Custom(custom) => resolve_custom(custom, supported),
            Self::Exact(table) => {
                for entry in table.entries() {
                    for register in CpuidRegister::ALL {
                        check(table, supported, (entry.leaf, entry.subleaf.unwrap_or(0), register))?;
                    }
                }
                Ok(table.clone())
            }
        }
    }
}

fn resolve_level(level: Level, supported: &CpuidTable) -> Result<CpuidTable, CpuModelError> {
    let mut table = levels::cut(level, supported);
    xstate::settle(&mut table, supported, 0);
    let missing = levels::missing(level, &table);
    if missing.is_empty() {
        Ok(table)
    } else {
        Err(CpuModelError::LevelUnmet { level: level.to_string(), missing })
    }
}

fn resolve_custom(custom: &CustomCpu, supported: &CpuidTable) -> Result<CpuidTable, CpuModelError> {
    let mut table = custom.base.resolve(supported)?;
    let net = custom.net();
    for (&(leaf, subleaf, register), (clear, set)) in &net {
        let value = table.register(leaf, subleaf, register) & !clear | set;
        table.set_register(supported, leaf, subleaf, register, value);
        if *set != 0 {
            table.reach(leaf);
            reach_subleaf(&mut table, leaf, subleaf);
            check(&table, supported, (leaf, subleaf, register))?;
        }
    }

    let cleared = |register| net.get(&(0xd, 0, register)).map_or(0, |(clear, _)| u64::from(*clear));
    let forbidden = cleared(CpuidRegister::Edx) << 32 | cleared(CpuidRegister::Eax);
    xstate::settle(&mut table, supported, forbidden);

    // What was asked for in so many words must not be dropped in silence.
    for (&(leaf, subleaf, register), (_, set)) in &net {
        let lost = set & !table.register(leaf, subleaf, register);
        if lost != 0 {
            return Err(lost_bits(&table, (leaf, subleaf, register), lost));
        }
    }
    Ok(table)
}

/// Why `bits`, though set by a mask, did not survive [`xstate::settle`].
fn lost_bits(
    table: &CpuidTable,
    (leaf, subleaf, register): (u32, u32, CpuidRegister),
    bits: u32,
) -> CpuModelError {
    match features_in(leaf, subleaf, register, bits).next() {
        Some(feature) => {
            CpuModelError::DependencyAbsent { feature, needs: xstate::unmet_dependency(table, feature) }
        }
        None => CpuModelError::Computed { leaf, subleaf, register, bits },
    }
}

/// The features that this crate knows among `bits` of a register.
fn features_in(leaf: u32, subleaf: u32, register: CpuidRegister, bits: u32) -> impl Iterator<Item = Feature> {
    Feature::all().iter().copied().filter(move |feature| {
        (feature.leaf(), feature.subleaf(), feature.register()) == (leaf, subleaf, register)
            && feature.mask() & bits != 0
    })
}

/// Raises the highest subleaf that leaf 7 announces.
fn reach_subleaf(table: &mut CpuidTable, leaf: u32, subleaf: u32) {
    if leaf == 7
        && let Some(mut entry) = table.get(7, 0)
        && entry.eax < subleaf
    {
        entry.eax = subleaf;
        table.set(entry);
    }
}

fn check(
    table: &CpuidTable,
    supported: &CpuidTable,
    place: (u32, u32, CpuidRegister),
) -> Result<(), CpuModelError> {
    let (leaf, subleaf, register) = place;
    match rules::excess(table, supported, place) {
        0 => Ok(()),
        bits => Err(CpuModelError::BeyondSupported {
            leaf,
            subleaf,
            register,
            bits,
            supported: supported.register(leaf, subleaf, register),
        }),
    }
}

/// Why a [`CpuModel`] does not fit a host, or a text names none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuModelError {
    /// The host lacks features of the psABI level.
    #[error("{level} needs {}, which this host lacks", names(.missing))]
    LevelUnmet {
        /// The model's name.
        level: String,
        /// What is missing, at least one.
        missing: Vec<Feature>,
    },
    /// The model shows more than the backend supports on this host.
    #[error(
        "CPUID leaf {leaf:#x} subleaf {subleaf:#x} {register}: {bits:#x}{} is more than the supported {supported:#x}",
        known(*.leaf, *.subleaf, *.register, *.bits)
    )]
    BeyondSupported {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: CpuidRegister,
        /// The bits that are too many; the whole value where the register holds numbers.
        bits: u32,
        /// The register as supported.
        supported: u32,
    },
    /// A feature was asked for without one that it needs.
    #[error(
        "{} needs {}, which the model leaves out",
        names(&[*.feature]),
        .needs.map_or_else(|| "its state in CPUID leaf 0xd".to_owned(), |needed| names(&[needed]))
    )]
    DependencyAbsent {
        /// The feature asked for.
        feature: Feature,
        /// The feature that is absent; `None` for the feature's part of the extended state.
        needs: Option<Feature>,
    },
    /// Bits were asked for that follow from features which the model leaves out.
    #[error(
        "CPUID leaf {leaf:#x} subleaf {subleaf:#x} {register}: {bits:#x} follows from features that the model \
         leaves out; ask for the features"
    )]
    Computed {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: CpuidRegister,
        /// The bits that are too many.
        bits: u32,
    },
    /// No model has that name.
    #[error("no CPU model named {name:?}; there is: host, x86-64-v1, x86-64-v2, x86-64-v3, x86-64-v4")]
    UnknownModel {
        /// The name.
        name: String,
    },
    /// A change to a model is not understood.
    #[error(
        "CPU feature {text:?} is unknown; allowed is + or - and a name, or leaf.subleaf.register.bit: \
         -0x7.0.ebx.5"
    )]
    UnknownFeature {
        /// The text of the change.
        text: String,
    },
}

fn names(features: &[Feature]) -> String {
    features.iter().map(|feature| feature.name().to_uppercase()).collect::<Vec<_>>().join(", ")
}

/// The names of the features among `bits`, in brackets; nothing if there is none.
fn known(leaf: u32, subleaf: u32, register: CpuidRegister, bits: u32) -> impl fmt::Display {
    let features: Vec<_> = features_in(leaf, subleaf, register, bits).collect();
    if features.is_empty() { String::new() } else { format!(" ({})", names(&features)) }
}

impl From<CpuModelError> for Error {
    fn from(error: CpuModelError) -> Self {
        Self::unsupported("the CPU model", error.to_string())
    }
}
