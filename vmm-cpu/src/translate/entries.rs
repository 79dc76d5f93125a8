//! Stores that replace what reads as an entry of a page table: what an engine that keeps translations of its own has to hear of.

use super::core::Core;
use super::cpu::cr4;
use super::memory::MemoryMap;

/// Present, accessed and dirty, in entries of all formats.
const PRESENT: u64 = 1 << 0;
const ACCESSED_DIRTY: u64 = 1 << 5 | 1 << 6;

/// Whether `new` in place of `old` leaves no translation as it was that an engine may have made of `old`, other than of accessed
/// and dirty bits.
fn replaces_entry(old: u64, new: u64) -> bool {
    let is_cleared = old & !new != 0;
    let is_changed = (old ^ new) & !ACCESSED_DIRTY != 0;
    old & PRESENT != 0 && (is_cleared || is_changed)
}

impl Core {
    /// Looks at a quadword of guest memory, aligned, that a store changes.
    fn compare_entry(&mut self, old: u64, new: u64) {
        let halves = |word: u64| [word & 0xffff_ffff, word >> 32];
        // Entries of 32-bit paging have four bytes.
        let narrow = self.cpu.cr4 & cr4::PAE == 0
            && halves(old).into_iter().zip(halves(new)).any(|(old, new)| replaces_entry(old, new));
        self.entries_replaced |= replaces_entry(old, new) || narrow;
    }

    /// Looks at what a store of `new` at `gpa`, within one region, is about to replace.
    pub(crate) fn compare_entries(&mut self, map: &MemoryMap, gpa: u64, new: &[u8]) {
        let mut old = vec![0; new.len()];
        if map.read(gpa, &mut old) {
            self.compare_replaced(map, gpa, &old, new);
        }
    }

    /// Looks at what was at `gpa` when `new` replaced it.
    pub(crate) fn compare_replaced(&mut self, map: &MemoryMap, gpa: u64, old: &[u8], new: &[u8]) {
        let end = gpa.saturating_add(new.len() as u64);
        for quadword in (gpa & !7..end).step_by(8) {
            let Some(around) = map.load::<u64>(quadword) else { return };
            let with = |bytes: &[u8]| {
                let mut word = around.to_le_bytes();
                for (byte, place) in word.iter_mut().zip(quadword..) {
                    let offset = place.checked_sub(gpa).and_then(|offset| usize::try_from(offset).ok());
                    *byte = offset.and_then(|offset| bytes.get(offset)).copied().unwrap_or(*byte);
                }
                u64::from_le_bytes(word)
            };
            self.compare_entry(with(old), with(new));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn present_entries_count_and_accessed_bits_do_not() {
        for (old, new, counts) in [
            (0x1000, 0x2000, false),
            (0x1000, 0x1001, false),
            (0x1001, 0x1000, true),
            (0x1003, 0x1001, true),
            (0x1001, 0x2001, true),
            (0x1001, 0x1061, false),
            (0x1061, 0x1001, true),
            (0x1001, 0x1001, false),
        ] {
            assert_eq!(replaces_entry(old, new), counts, "{old:#x} to {new:#x}");
        }
    }
}
