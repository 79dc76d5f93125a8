//! Where RAM lies in the guest-physical address space of an x86 machine, and the limits of this crate.
//!
//! A PC keeps the top of the first 4 GiB for devices (MMIO windows, ECAM, the local and I/O APICs,
//! the firmware flash), so RAM that does not fit below that hole continues at 4 GiB.

use vm_memory::GuestAddress;

use crate::{MemoryError, PAGE_SIZE};

/// First address of the 32-bit MMIO hole, which is the end of low RAM: 3 GiB.
pub const MMIO_HOLE_START: GuestAddress = GuestAddress(0xC000_0000);

/// Length in bytes of the 32-bit MMIO hole: 1 GiB, so that it ends at [`HIGH_RAM_START`].
pub const MMIO_HOLE_SIZE: u64 = 0x4000_0000;

/// First address of the RAM that does not fit below the hole: 4 GiB.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x1_0000_0000);

/// First address that no region may reach: physical addresses have at most 52 bits
/// (Intel SDM 3A 4.1.4, MAXPHYADDR).
pub const GPA_LIMIT: u64 = 1 << 52;

/// Least RAM in bytes that [`x86_ram_ranges`] lays out: 1 MiB, what real mode can address.
pub const MIN_RAM: u64 = 1 << 20;

/// Most memory in bytes that one guest may have, over all its regions: 16 TiB.
///
/// The limit keeps the bookkeeping bounded: a dirty bitmap for this much takes 512 MiB.
pub const MAX_RAM: u64 = 16 << 40;

/// The ranges `(base, length in bytes)` that `size` bytes of RAM occupy, ascending: up to 3 GiB from
/// address 0, the rest from 4 GiB.
///
/// The legacy window from 0xA0000 to 0xFFFFF is part of the first range; a boot protocol reports it
/// as reserved in its memory map.
///
/// # Errors
/// [`MemoryError::RamSize`] unless `size` is from [`MIN_RAM`] to [`MAX_RAM`];
/// [`MemoryError::Unaligned`] unless it is a multiple of [`PAGE_SIZE`].
///
/// ```
/// use vmm_memory::layout::x86_ram_ranges;
/// use vmm_memory::vm_memory::GuestAddress;
///
/// let ranges = x86_ram_ranges(5 << 30)?;
/// assert_eq!(ranges, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
/// # Ok::<(), vmm_memory::MemoryError>(())
/// ```
pub fn x86_ram_ranges(size: u64) -> Result<Vec<(GuestAddress, u64)>, MemoryError> {
    if !(MIN_RAM..=MAX_RAM).contains(&size) {
        return Err(MemoryError::RamSize { size, min: MIN_RAM, max: MAX_RAM });
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Unaligned { gpa: 0, size, align: PAGE_SIZE });
    }
    let low = size.min(MMIO_HOLE_START.0);
    let high = size - low;
    let mut ranges = vec![(GuestAddress(0), low)];
    if high > 0 {
        ranges.push((HIGH_RAM_START, high));
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hole_edges() {
        let ranges = |size| x86_ram_ranges(size).unwrap();
        assert_eq!(ranges(MIN_RAM), [(GuestAddress(0), MIN_RAM)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ranges((3 << 30) + PAGE_SIZE),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), PAGE_SIZE)]
        );
        assert_eq!(MMIO_HOLE_START.0 + MMIO_HOLE_SIZE, HIGH_RAM_START.0);
    }

    #[test]
    fn sizes_out_of_range_are_named() {
        for size in [0, MIN_RAM - PAGE_SIZE, MAX_RAM + PAGE_SIZE, u64::MAX] {
            let error = x86_ram_ranges(size).unwrap_err();
            assert!(matches!(error, MemoryError::RamSize { size: s, .. } if s == size), "{error}");
            assert!(error.to_string().contains(&size.to_string()), "{error}");
        }
        assert!(matches!(x86_ram_ranges(MIN_RAM + 1), Err(MemoryError::Unaligned { .. })));
    }

    proptest! {
        #[test]
        fn covers_the_size_and_avoids_the_hole(pages in MIN_RAM / PAGE_SIZE..=MAX_RAM / PAGE_SIZE) {
            let ranges = x86_ram_ranges(pages * PAGE_SIZE).unwrap();
            prop_assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), pages * PAGE_SIZE);
            for (base, length) in ranges {
                let end = base.0 + length;
                prop_assert!(length > 0 && end <= GPA_LIMIT);
                prop_assert!(end <= MMIO_HOLE_START.0 || base >= HIGH_RAM_START);
            }
        }
    }
}
