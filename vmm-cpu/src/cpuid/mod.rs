//! CPUID as plain data: tables, models cut out of them, and what differs between the vCPUs of a guest.
//!
//! Called before a guest runs: a backend says what it [supports](crate::Hypervisor::supported_cpuid), a
//! [`CpuModel`] chooses from that, and [`CpuidTable::for_vcpu`] gives each vCPU its own copy. No guest
//! reaches this module; tables from snapshots do, through [`CpuModel::Exact`], which checks them.

mod features;
mod host;
mod levels;
mod model;
mod parse;
mod rules;
mod topology;
mod xstate;

use std::fmt;

pub use features::Feature;
pub use model::{CpuModel, CpuModelError, CpuidMask, CustomCpu};

/// One of the four registers that CPUID writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each variant is the register of its name")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl CpuidRegister {
    /// All four, in the order of the manuals.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];
}

impl fmt::Display for CpuidRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

/// What CPUID answers to one leaf, or to one subleaf of a leaf that has them (Intel SDM 2A, CPUID).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "four fields are the registers of their names")]
pub struct CpuidEntry {
    /// EAX before the instruction.
    pub leaf: u32,
    /// ECX before the instruction; `None` if the leaf does not look at it.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidEntry {
    /// An entry from its four registers: EAX, EBX, ECX, EDX.
    pub fn new(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self { leaf, subleaf, eax, ebx, ecx, edx }
    }

    /// One of the four registers.
    pub fn register(&self, register: CpuidRegister) -> u32 {
        match register {
            CpuidRegister::Eax => self.eax,
            CpuidRegister::Ebx => self.ebx,
            CpuidRegister::Ecx => self.ecx,
            CpuidRegister::Edx => self.edx,
        }
    }

    /// One of the four registers, to be changed.
    pub fn register_mut(&mut self, register: CpuidRegister) -> &mut u32 {
        match register {
            CpuidRegister::Eax => &mut self.eax,
            CpuidRegister::Ebx => &mut self.ebx,
            CpuidRegister::Ecx => &mut self.ecx,
            CpuidRegister::Edx => &mut self.edx,
        }
    }

    fn key(&self) -> (u32, Option<u32>) {
        (self.leaf, self.subleaf)
    }

    /// Whether all four registers are zero, which is what CPUID answers for leaves that do not exist.
    fn is_zero(&self) -> bool {
        CpuidRegister::ALL.iter().all(|register| self.register(*register) == 0)
    }
}

/// The answers of CPUID: entries ascending by leaf and subleaf, each pair at most once.
///
/// A leaf has either one entry without a subleaf or entries that each name theirs. What a guest
/// finds at leaves that are absent here is the backend's matter (zeros, or the highest basic leaf).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// Sorts `entries`. Of several entries for the same leaf and subleaf the last one counts.
    pub fn new(entries: Vec<CpuidEntry>) -> Self {
        let mut table = Self { entries: Vec::with_capacity(entries.len()) };
        for entry in entries {
            table.set(entry);
        }
        table
    }

    /// The entries, ascending by leaf and subleaf.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// What CPUID answers to `leaf` with `subleaf` in ECX; `None` if the table has no entry.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<CpuidEntry> {
        let found = self
            .position((leaf, Some(subleaf)))
            .or_else(|_| self.position((leaf, None)))
            .ok()
            .and_then(|position| self.entries.get(position));
        found.copied()
    }

    /// All entries of `leaf`.
    pub fn leaf(&self, leaf: u32) -> &[CpuidEntry] {
        let start = self.entries.partition_point(|entry| entry.leaf < leaf);
        let end = self.entries.partition_point(|entry| entry.leaf <= leaf);
        self.entries.get(start..end).unwrap_or_default()
    }

    /// Inserts `entry`, in place of what was there for the same leaf and subleaf. An entry without a
    /// subleaf replaces all subleaves of its leaf, and the other way round.
    pub fn set(&mut self, entry: CpuidEntry) {
        if self
            .leaf(entry.leaf)
            .first()
            .is_some_and(|first| first.subleaf.is_some() != entry.subleaf.is_some())
        {
            self.remove_leaf(entry.leaf);
        }
        match self.position(entry.key()) {
            Ok(position) => {
                if let Some(slot) = self.entries.get_mut(position) {
                    *slot = entry;
                }
            }
            Err(position) => self.entries.insert(position, entry),
        }
    }

    /// Removes every entry of `leaf`.
    pub fn remove_leaf(&mut self, leaf: u32) {
        self.entries.retain(|entry| entry.leaf != leaf);
    }

    /// Whether `feature` is reported.
    pub fn has(&self, feature: Feature) -> bool {
        self.register(feature.leaf(), feature.subleaf(), feature.register()) & feature.mask() != 0
    }

    /// The highest basic leaf that leaf 0 announces; 0 if there is no leaf 0.
    pub fn max_basic_leaf(&self) -> u32 {
        self.register(0, 0, CpuidRegister::Eax)
    }

    /// The highest extended leaf that leaf 0x8000_0000 announces; 0 if there is none.
    pub fn max_extended_leaf(&self) -> u32 {
        self.register(EXTENDED_BASE, 0, CpuidRegister::Eax)
    }

    /// The 12 characters of the vendor in leaf 0 (Intel SDM 2A table 3-8): `GenuineIntel`.
    pub fn vendor(&self) -> [u8; 12] {
        let mut vendor = [0; 12];
        if let Some(entry) = self.get(0, 0) {
            let bytes = [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes);
            for (slot, byte) in vendor.iter_mut().zip(bytes) {
                *slot = byte;
            }
        }
        vendor
    }

    /// A register's value; zero where there is no entry, as CPUID answers.
    fn register(&self, leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
        self.get(leaf, subleaf).map_or(0, |entry| entry.register(register))
    }

    fn position(&self, key: (u32, Option<u32>)) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&key, CpuidEntry::key)
    }

    /// Gives a register that the table may or may not have a new value, if that changes anything.
    /// `template` is the table whose entry says whether the leaf has subleaves.
    fn set_register(
        &mut self,
        template: &Self,
        leaf: u32,
        subleaf: u32,
        register: CpuidRegister,
        value: u32,
    ) {
        let current = self.get(leaf, subleaf);
        if current.map_or(0, |entry| entry.register(register)) == value {
            return;
        }
        let mut entry = current.unwrap_or_else(|| {
            let of_template = template.get(leaf, subleaf);
            let significant = of_template.map_or(subleaf != 0, |entry| entry.subleaf.is_some());
            CpuidEntry { leaf, subleaf: significant.then_some(subleaf), ..CpuidEntry::default() }
        });
        *entry.register_mut(register) = value;
        self.set(entry);
    }

    /// Reports a feature if `supported` does. Returns whether it does.
    #[cfg(any(
        feature = "xen-pv",
        all(feature = "kvm", feature = "translate", target_os = "linux", target_arch = "x86_64")
    ))]
    pub(crate) fn enable(&mut self, feature: Feature, supported: &Self) -> bool {
        if !supported.has(feature) {
            return false;
        }
        let (leaf, subleaf, register) = (feature.leaf(), feature.subleaf(), feature.register());
        let value = self.register(leaf, subleaf, register) | feature.mask();
        self.set_register(supported, leaf, subleaf, register, value);
        self.reach(leaf);
        true
    }

    fn clear_feature(&mut self, feature: Feature) {
        let (leaf, subleaf, register) = (feature.leaf(), feature.subleaf(), feature.register());
        if let Some(mut entry) = self.get(leaf, subleaf) {
            *entry.register_mut(register) &= !feature.mask();
            self.set(entry);
        }
    }

    /// Raises what leaf 0 or 0x8000_0000 announces so that `leaf` can be found.
    pub(crate) fn reach(&mut self, leaf: u32) {
        let base = leaf & 0xffff_0000;
        if let Some(mut entry) = self.get(base, 0)
            && (base == 0 || base == EXTENDED_BASE)
            && entry.eax < leaf
        {
            entry.eax = leaf;
            self.set(entry);
        }
    }
}

/// The leaf that announces the extended leaves.
const EXTENDED_BASE: u32 = 0x8000_0000;

/// The leaves that hypervisors use for themselves; no processor answers them (Intel SDM 2A, CPUID).
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: Option<u32>, eax: u32) -> CpuidEntry {
        CpuidEntry::new(leaf, subleaf, [eax, 0, 0, 0])
    }

    #[test]
    fn entries_are_sorted_and_the_last_duplicate_counts() {
        let table = CpuidTable::new(vec![
            entry(7, Some(1), 71),
            entry(1, None, 1),
            entry(7, Some(0), 70),
            entry(0x8000_0000, None, 8),
            entry(1, None, 2),
        ]);
        let found: Vec<_> = table.entries().iter().map(|e| (e.leaf, e.subleaf, e.eax)).collect();
        assert_eq!(found, [(1, None, 2), (7, Some(0), 70), (7, Some(1), 71), (0x8000_0000, None, 8)]);
        assert_eq!(table.leaf(7).len(), 2);
        assert_eq!(table.leaf(3), []);
    }

    #[test]
    fn get_looks_at_the_subleaf_only_where_it_is_significant() {
        let table = CpuidTable::new(vec![entry(1, None, 1), entry(7, Some(0), 70)]);
        assert_eq!(table.get(1, 12345).map(|e| e.eax), Some(1));
        assert_eq!(table.get(7, 0).map(|e| e.eax), Some(70));
        assert_eq!(table.get(7, 1), None);
        assert_eq!(table.get(2, 0), None);
    }

    #[test]
    fn a_leaf_never_has_entries_of_both_kinds() {
        let mut table = CpuidTable::new(vec![entry(4, Some(0), 1), entry(4, Some(1), 2), entry(5, None, 5)]);
        table.set(entry(4, None, 3));
        assert_eq!(table.leaf(4), [entry(4, None, 3)]);
        table.set(entry(4, Some(1), 4));
        assert_eq!(table.leaf(4), [entry(4, Some(1), 4)]);
        table.remove_leaf(4);
        assert_eq!(table.entries(), [entry(5, None, 5)]);
    }

    #[test]
    fn vendor_reads_ebx_edx_ecx() {
        let table =
            CpuidTable::new(vec![CpuidEntry::new(0, None, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69])]);
        assert_eq!(&table.vendor(), b"GenuineIntel");
        assert_eq!(table.max_basic_leaf(), 0xd);
        assert_eq!(CpuidTable::default().vendor(), [0; 12]);
    }

    #[test]
    fn reach_raises_the_announced_maximum_and_never_lowers_it() {
        let mut table = CpuidTable::new(vec![entry(0, None, 7), entry(0x8000_0000, None, 0x8000_0008)]);
        for leaf in [4, 0xd, 0x4000_0001, 0x8000_001e, 0x8000_0001] {
            table.reach(leaf);
        }
        assert_eq!((table.max_basic_leaf(), table.max_extended_leaf()), (0xd, 0x8000_001e));
        assert_eq!(table.entries().len(), 2);
    }
}
