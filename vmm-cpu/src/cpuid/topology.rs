//! What differs between the vCPUs of one guest: APIC IDs, and the counts around them.

use super::{CpuidEntry, CpuidTable, Feature};

/// Leaf 0xb, level type of a thread of a core (Intel SDM 2A table 3-8).
const LEVEL_THREAD: u32 = 1;
/// Leaf 0xb, level type of a core of a package.
const LEVEL_CORE: u32 = 2;

impl CpuidTable {
    /// The copy for vCPU `index` of `count`: APIC ID `index`, each vCPU a core with one thread, all in one
    /// package.
    ///
    /// Changed are, where the processor has them: leaf 1 (APIC ID, logical processors, HTT), leaves 0xb
    /// and 0x1f (Intel SDM 3A 9.9), the sharing fields of leaf 4 and of its AMD counterpart 0x8000_001d,
    /// the core count of 0x8000_0008 and the IDs of 0x8000_001e (AMD APM 3 E.4). Leaf 0x8000_0026, which
    /// describes the chiplets of the host's package, goes. Everything else stays as it is.
    ///
    /// Fields of 8 bits hold the low bits of larger IDs and the largest value for larger counts, as on
    /// processors; the leaves with 32-bit IDs are the ones to read then.
    #[must_use]
    pub fn for_vcpu(&self, index: u32, count: u32) -> Self {
        let topology = Topology { index, count: count.max(index.saturating_add(1)) };
        let mut table = self.clone();
        topology.write_leaf_1(&mut table);
        for leaf in [0xb, 0x1f] {
            if table.max_basic_leaf() >= leaf {
                topology.write_levels(&mut table, leaf);
            }
        }
        topology.write_caches(&mut table);
        topology.write_amd(&mut table);
        table
    }

    fn is_amd(&self) -> bool {
        matches!(&self.vendor(), b"AuthenticAMD" | b"HygonGenuine")
    }
}

/// One vCPU among `count`, which is at least `index + 1`.
struct Topology {
    index: u32,
    count: u32,
}

impl Topology {
    /// Bits of the APIC ID that number the cores of the package.
    fn core_bits(&self) -> u32 {
        u32::BITS - self.count.saturating_sub(1).leading_zeros()
    }

    /// Highest APIC ID that fits into [`Self::core_bits`]: manuals count addressable IDs minus one.
    fn last_id(&self) -> u32 {
        1_u32.checked_shl(self.core_bits()).map_or(u32::MAX, |ids| ids.saturating_sub(1))
    }

    fn write_leaf_1(&self, table: &mut CpuidTable) {
        if let Some(mut entry) = table.get(1, 0) {
            entry.ebx = entry.ebx & 0xffff | self.count.min(0xff) << 16 | (self.index & 0xff) << 24;
            entry.edx &= !Feature::HTT.mask();
            if self.count > 1 {
                entry.edx |= Feature::HTT.mask();
            }
            table.set(entry);
        }
    }

    fn write_levels(&self, table: &mut CpuidTable, leaf: u32) {
        table.remove_leaf(leaf);
        let levels = [
            (0, 1, LEVEL_THREAD),
            (self.core_bits(), self.count.min(0xffff), LEVEL_CORE),
            // The end of the list.
            (0, 0, 0),
        ];
        for ((shift, processors, kind), subleaf) in levels.into_iter().zip(0..) {
            let registers = [shift, processors, subleaf | kind << 8, self.index];
            table.set(CpuidEntry::new(leaf, Some(subleaf), registers));
        }
    }

    /// Caches of level 1 and 2 belong to one core, those above to the package.
    fn write_caches(&self, table: &mut CpuidTable) {
        for leaf in [4, 0x8000_001d] {
            let caches: Vec<_> =
                table.leaf(leaf).iter().copied().filter(|entry| entry.eax & 0x1f != 0).collect();
            for mut cache in caches {
                let level = cache.eax >> 5 & 7;
                let sharing = if level >= 3 { self.last_id().min(0xfff) } else { 0 };
                cache.eax = cache.eax & 0x3fff | sharing << 14;
                if leaf == 4 {
                    cache.eax |= self.last_id().min(0x3f) << 26;
                }
                table.set(cache);
            }
        }
    }

    fn write_amd(&self, table: &mut CpuidTable) {
        table.remove_leaf(0x8000_0026);
        if !table.is_amd() {
            return;
        }
        if let Some(mut entry) = table.get(0x8000_0008, 0) {
            let cores = self.count.saturating_sub(1).min(0xff);
            entry.ecx = entry.ecx & !0xf0ff | cores | self.core_bits().min(0xf) << 12;
            table.set(entry);
        }
        if table.has(Feature::TOPOEXT) && table.max_extended_leaf() >= 0x8000_001e {
            // One node, and a compute unit of one thread for each vCPU.
            let subleaf = table.leaf(0x8000_001e).first().and_then(|entry| entry.subleaf);
            let registers = [self.index, self.index & 0xff, 0, 0];
            table.set(CpuidEntry::new(0x8000_001e, subleaf, registers));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuidRegister;

    fn host(vendor: [u32; 3], topoext: bool) -> CpuidTable {
        let ecx = if topoext { Feature::TOPOEXT.mask() } else { 0 };
        let [ebx, edx, ecx_vendor] = vendor;
        CpuidTable::new(vec![
            CpuidEntry::new(0, None, [0x1f, ebx, ecx_vendor, edx]),
            CpuidEntry::new(1, None, [0x806f8, 0x4510_0800, 7, 0x178b_fbff]),
            CpuidEntry::new(4, Some(0), [0xfc00_4121, 1, 2, 3]),
            CpuidEntry::new(4, Some(1), [0xfc00_4143, 1, 2, 3]),
            CpuidEntry::new(4, Some(2), [0xfc3f_c163, 1, 2, 3]),
            CpuidEntry::new(4, Some(3), [0, 0, 0, 0]),
            CpuidEntry::new(7, Some(0), [0, 77, 77, 77]),
            CpuidEntry::new(0xb, Some(0), [1, 2, 0x100, 0x45]),
            CpuidEntry::new(0x1f, Some(5), [9, 9, 9, 9]),
            CpuidEntry::new(0x8000_0000, None, [0x8000_0026, 0, 0, 0]),
            CpuidEntry::new(0x8000_0001, None, [0, 0, ecx, 0]),
            CpuidEntry::new(0x8000_0008, None, [0x3030, 5, 0x2_7001, 0]),
            CpuidEntry::new(0x8000_001d, Some(3), [0x03c0_4163, 1, 2, 3]),
            CpuidEntry::new(0x8000_0026, Some(0), [1, 2, 3, 4]),
        ])
    }

    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];

    #[test]
    fn leaf_1_holds_id_count_and_htt() {
        let host = host(INTEL, false);
        let entry = host.for_vcpu(3, 6).get(1, 0).unwrap();
        assert_eq!((entry.ebx, entry.edx >> 28 & 1), (0x0306_0800, 1));
        assert_eq!((entry.eax, entry.ecx), (0x806f8, 7));
        let entry = host.for_vcpu(0, 1).get(1, 0).unwrap();
        assert_eq!((entry.ebx, entry.edx >> 28 & 1), (0x0001_0800, 0));
        let entry = host.for_vcpu(0x123, 0x200).get(1, 0).unwrap();
        assert_eq!(entry.ebx, 0x23ff_0800);
    }

    #[test]
    fn levels_describe_cores_of_one_package() {
        for leaf in [0xb, 0x1f] {
            let table = host(INTEL, false).for_vcpu(0x123, 0x180);
            let levels: Vec<_> = table.leaf(leaf).iter().map(|e| [e.eax, e.ebx, e.ecx, e.edx]).collect();
            assert_eq!(
                levels,
                [[0, 1, 0x100, 0x123], [9, 0x180, 0x201, 0x123], [0, 0, 2, 0x123]],
                "leaf {leaf:#x}"
            );
        }
        let mut small = host(INTEL, false);
        small.set(CpuidEntry::new(0, None, [0xa, 0, 0, 0]));
        small.remove_leaf(0xb);
        assert!(small.for_vcpu(0, 2).leaf(0xb).is_empty());
    }

    #[test]
    fn id_width_fits_the_count() {
        for (count, bits) in
            [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (4096, 12), (u32::MAX, 32)]
        {
            let topology = Topology { index: 0, count };
            assert_eq!(topology.core_bits(), bits, "{count}");
            assert!(topology.last_id() >= count - 1, "{count}");
        }
        // An index beyond the count still gets an ID that fits.
        assert_eq!(host(INTEL, false).for_vcpu(8, 2).get(0xb, 1).map(|e| (e.eax, e.ebx)), Some((4, 9)));
        assert_eq!(host(INTEL, false).for_vcpu(0, 0).get(0xb, 1).map(|e| (e.eax, e.ebx)), Some((0, 1)));
        let last = host(AMD, true).for_vcpu(u32::MAX, u32::MAX);
        assert_eq!(last.get(0xb, 1).map(|e| (e.eax, e.ebx, e.edx)), Some((32, 0xffff, u32::MAX)));
    }

    #[test]
    fn caches_are_private_below_level_3() {
        let table = host(INTEL, false).for_vcpu(1, 6);
        let caches: Vec<_> = table.leaf(4).iter().map(|e| e.eax).collect();
        assert_eq!(caches, [7 << 26 | 0x121, 7 << 26 | 0x143, 7 << 26 | 7 << 14 | 0x163, 0]);
        assert_eq!(table.get(0x8000_001d, 3).map(|e| e.eax), Some(7 << 14 | 0x163));
    }

    #[test]
    fn amd_leaves_only_on_amd() {
        let table = host(AMD, true).for_vcpu(2, 3);
        assert_eq!(table.get(0x8000_0008, 0).map(|e| (e.ebx, e.ecx)), Some((5, 0x2_2002)));
        assert_eq!(table.get(0x8000_001e, 0), Some(CpuidEntry::new(0x8000_001e, None, [2, 2, 0, 0])));
        assert!(table.leaf(0x8000_0026).is_empty());
        assert!(host(AMD, false).for_vcpu(2, 3).leaf(0x8000_001e).is_empty());

        let table = host(INTEL, false).for_vcpu(2, 3);
        assert_eq!(table.get(0x8000_0008, 0).map(|e| e.ecx), Some(0x2_7001));
    }

    #[test]
    fn nothing_else_changes() {
        let topological = [1, 4, 0xb, 0x1f, 0x8000_0008, 0x8000_001d, 0x8000_001e, 0x8000_0026];
        let rest = |table: &CpuidTable| {
            let kept = table.entries().iter().filter(|entry| !topological.contains(&entry.leaf));
            kept.copied().collect::<Vec<_>>()
        };
        for host in [host(INTEL, false), host(AMD, true), CpuidTable::default()] {
            assert_eq!(rest(&host.for_vcpu(1, 2)), rest(&host));
        }
        assert_eq!(CpuidTable::default().for_vcpu(1, 2), CpuidTable::default());
        let twice = host(AMD, true).for_vcpu(1, 2).for_vcpu(3, 4);
        assert_eq!(twice, host(AMD, true).for_vcpu(3, 4), "copies can be made of copies");
        assert_eq!(twice.register(7, 0, CpuidRegister::Ebx), 77);
    }
}
