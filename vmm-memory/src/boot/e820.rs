//! The memory map that the guest is told: RAM, minus what is not RAM to it.

use std::ops::Range;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;

/// Video memory and firmware of a PC: never RAM, whatever lies there (ACPI 6.5, 15.3).
pub(super) const LEGACY_HOLE: Range<u64> = 0xa_0000..0x10_0000;

/// What a range of the memory map is (ACPI 6.5, table 15.3; the discriminant is the wire value).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum E820Kind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not for the guest.
    Reserved = 2,
    /// ACPI tables, usable as RAM once they have been read.
    Acpi = 3,
    /// ACPI memory that must be kept.
    Nvs = 4,
}

impl E820Kind {
    /// The number that stands for it in every table that a guest gets.
    pub fn wire(self) -> u32 {
        self as u32
    }
}

/// One range of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest-physical address.
    pub start: GuestAddress,
    /// Size in bytes, not 0.
    pub size: u64,
    /// What is there.
    pub kind: E820Kind,
}

/// A range that the caller has put to some use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reserved {
    pub(super) start: GuestAddress,
    pub(super) end: GuestAddress,
    pub(super) kind: E820Kind,
}

impl Reserved {
    pub(super) fn range(&self) -> Range<u64> {
        self.start.raw_value()..self.end.raw_value()
    }
}

/// The RAM of `memory`, ascending, adjacent regions merged.
pub(super) fn ram_ranges<M: GuestMemoryBackend>(memory: &M) -> Vec<Range<u64>> {
    let mut regions: Vec<_> = memory
        .iter()
        .map(|region| {
            let start = region.start_addr().raw_value();
            start..start.saturating_add(region.len())
        })
        .collect();
    regions.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for region in regions {
        match merged.last_mut() {
            Some(last) if last.end >= region.start => last.end = last.end.max(region.end),
            _ => merged.push(region),
        }
    }
    merged
}

/// Takes `hole` out of ascending, disjoint `ranges`.
pub(super) fn subtract(ranges: &mut Vec<Range<u64>>, hole: &Range<u64>) {
    if hole.is_empty() {
        return;
    }
    let first = ranges.partition_point(|range| range.end <= hole.start);
    let last = ranges.partition_point(|range| range.start < hole.end);
    let Some(touched) = ranges.get(first..last).filter(|touched| !touched.is_empty()) else { return };
    let before = touched.first().map(|range| range.start..hole.start);
    let after = touched.last().map(|range| hole.end..range.end);
    let kept = before.into_iter().chain(after).filter(|range| !range.is_empty());
    ranges.splice(first..last, kept.collect::<Vec<_>>());
}

/// Checks that reserved ranges are ranges and disjoint; returns them ascending.
pub(super) fn check_reserved(reserved: &[Reserved]) -> Result<Vec<Reserved>, BootError> {
    let mut reserved = reserved.to_vec();
    reserved.sort_by_key(|range| range.start);
    for range in &reserved {
        if range.end <= range.start {
            let allowed = format!("above the start {:#x}", range.start.raw_value());
            return Err(BootError::field("end of a reserved range", range.end.raw_value(), allowed));
        }
    }
    for (lower, higher) in reserved.iter().zip(reserved.iter().skip(1)) {
        if lower.end > higher.start {
            return Err(BootError::ReservedOverlap {
                first: lower.start.raw_value(),
                first_end: lower.end.raw_value(),
                second: higher.start.raw_value(),
                second_end: higher.end.raw_value(),
            });
        }
    }
    Ok(reserved)
}

/// The memory map of a guest with RAM at `ram`: ascending and disjoint.
pub(super) fn memory_map(ram: &[Range<u64>], reserved: &[Reserved]) -> Vec<E820Entry> {
    let mut usable = ram.to_vec();
    subtract(&mut usable, &LEGACY_HOLE);
    for range in reserved {
        subtract(&mut usable, &range.range());
    }
    let entry = |range: Range<u64>, kind| E820Entry {
        start: GuestAddress(range.start),
        size: range.end - range.start,
        kind,
    };
    let mut map: Vec<_> = usable.into_iter().map(|range| entry(range, E820Kind::Ram)).collect();
    map.extend(reserved.iter().map(|reserved| entry(reserved.range(), reserved.kind)));
    map.sort_by_key(|entry| entry.start);
    map
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of one range of RAM is meant")]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn reserved(start: u64, end: u64) -> Reserved {
        Reserved { start: GuestAddress(start), end: GuestAddress(end), kind: E820Kind::Reserved }
    }

    fn brief(map: &[E820Entry]) -> Vec<(u64, u64, u32)> {
        map.iter().map(|entry| (entry.start.0, entry.size, entry.kind.wire())).collect()
    }

    #[test]
    fn adjacent_regions_are_one_range() {
        let ranges =
            [(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        assert_eq!(ram_ranges(&memory), [0..0x3000, 0x8000..0x9000]);
    }

    #[test]
    fn the_legacy_hole_is_cut_out_where_there_is_ram() {
        assert_eq!(
            brief(&memory_map(&[0..0x400_0000, 1 << 32..(1 << 32) + 0x1000], &[])),
            [(0, 0xa_0000, 1), (0x10_0000, 0x3f0_0000, 1), (1 << 32, 0x1000, 1)]
        );
        assert_eq!(brief(&memory_map(&[0x20_0000..0x30_0000], &[])), [(0x20_0000, 0x10_0000, 1)]);
        assert_eq!(brief(&memory_map(&[0..0xc_0000], &[])), [(0, 0xa_0000, 1)]);
    }

    #[test]
    fn reserved_ranges_replace_ram_and_stand_alone_outside_it() {
        let map =
            memory_map(&[0..0x9_0000], &[reserved(0x8_f000, 0x9_1000), reserved(0xfec0_0000, 0xfec0_1000)]);
        assert_eq!(brief(&map), [(0, 0x8_f000, 1), (0x8_f000, 0x2000, 2), (0xfec0_0000, 0x1000, 2)]);
    }

    #[test]
    fn reserved_ranges_must_be_disjoint_and_not_empty() {
        assert!(check_reserved(&[reserved(0x2000, 0x3000), reserved(0x1000, 0x2000)]).is_ok());
        let error = check_reserved(&[reserved(0x1000, 0x2001), reserved(0x2000, 0x3000)]).unwrap_err();
        assert!(error.to_string().contains("0x1000..0x2001 and 0x2000..0x3000"), "{error}");
        assert!(check_reserved(&[reserved(0x1000, 0x1000)]).is_err());
    }

    #[test]
    fn subtracting_may_split_trim_and_remove() {
        let mut ranges = vec![0..10, 20..30, 40..50];
        subtract(&mut ranges, &(3..5));
        subtract(&mut ranges, &(9..45));
        subtract(&mut ranges, &(60..70));
        assert_eq!(ranges, [0..3, 5..9, 45..50]);
        subtract(&mut ranges, &(0..100));
        assert!(ranges.is_empty());
    }
}
