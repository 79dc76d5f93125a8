//! Where a host bridge has its addresses: said once, for the bridge and for the ACPI tables.

use vmm_memory::vm_memory::GuestAddress;

use crate::bus::BusRange;
use crate::pci::PciError;
use crate::pci::bar::{Bar, BarKind};

/// Bytes of configuration space of a bus with all its functions.
pub const ECAM_SIZE: u64 = 1 << 20;

/// The ports of the older way to configuration space: address and data.
pub const CONFIG_PORTS: BusRange = BusRange::new(0xcf8, 8);

/// Addresses that belong to PCI. Nothing but the bridge puts anything there.
///
/// By default they are between 0xe000_0000 and the I/O APIC, and the ports from 0x1000 on. Where memory above 4 GiB
/// may be depends on the guest's RAM and on how many address bits its processors have, so that window is the
/// monitor's to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PciLayout {
    /// Where configuration space is in memory: [`ECAM_SIZE`] bytes, a multiple of that.
    pub ecam: GuestAddress,
    /// Memory below 4 GiB.
    pub memory32: BusRange,
    /// Memory above, if there is any.
    pub memory64: Option<BusRange>,
    /// Ports, if there are any.
    pub io: Option<BusRange>,
}

impl Default for PciLayout {
    fn default() -> Self {
        Self {
            ecam: GuestAddress(0xe000_0000),
            memory32: BusRange::new(0xe800_0000, 0x1600_0000),
            memory64: None,
            io: Some(BusRange::new(0x1000, 0xf000)),
        }
    }
}

/// First and last address.
pub(super) type Span = (u64, u64);

pub(super) fn span(range: BusRange) -> Option<Span> {
    Some((range.base, range.base.checked_add(range.size.checked_sub(1)?)?))
}

fn overlap((base, last): Span, (other, other_last): Span) -> bool {
    base <= other_last && other <= last
}

impl PciLayout {
    /// Configuration space is at `gpa`.
    #[must_use]
    pub fn ecam(self, gpa: GuestAddress) -> Self {
        Self { ecam: gpa, ..self }
    }

    /// The window below 4 GiB.
    #[must_use]
    pub fn memory32(self, window: BusRange) -> Self {
        Self { memory32: window, ..self }
    }

    /// The window above 4 GiB.
    #[must_use]
    pub fn memory64(self, window: Option<BusRange>) -> Self {
        Self { memory64: window, ..self }
    }

    /// The ports.
    #[must_use]
    pub fn io(self, window: Option<BusRange>) -> Self {
        Self { io: window, ..self }
    }

    /// Configuration space in memory, as a range of the bus.
    pub const fn ecam_range(&self) -> BusRange {
        BusRange::new(self.ecam.0, ECAM_SIZE)
    }

    /// Each window is one, where it may be, and no two share an address.
    pub(crate) fn check(&self) -> Result<(), PciError> {
        let ecam = ("ECAM", Some(self.ecam_range()), 0..=u64::MAX, "multiples of 0x10_0000");
        let memory32 = ("32-bit memory", Some(self.memory32), 0..=0xffff_ffff, "1 to 0xffff_ffff");
        let memory64 = ("64-bit memory", self.memory64, 1 << 32..=u64::MAX, "from 0x1_0000_0000 on");
        let io = ("I/O", self.io, 0..=0xffff, "1 to 0xffff");
        for (window, range, bounds, allowed) in [ecam, memory32, memory64, io] {
            let Some(range) = range else { continue };
            // An address of 0 in a BAR means that it is nowhere, to more than one kernel.
            let valid = span(range)
                .is_some_and(|(base, last)| base > 0 && bounds.contains(&base) && bounds.contains(&last));
            if !valid || window == "ECAM" && !range.base.is_multiple_of(ECAM_SIZE) {
                return Err(PciError::Window { window, base: range.base, size: range.size, allowed });
            }
        }
        let conflict = |window, other, a: Option<BusRange>, b: Option<BusRange>| {
            let spans = a.and_then(span).zip(b.and_then(span));
            match spans.filter(|(a, b)| overlap(*a, *b)) {
                Some(_) => Err(PciError::WindowOverlap { window, other }),
                None => Ok(()),
            }
        };
        conflict("32-bit memory", "ECAM", Some(self.memory32), Some(self.ecam_range()))?;
        conflict("64-bit memory", "ECAM", self.memory64, Some(self.ecam_range()))?;
        conflict("I/O", "the configuration ports", self.io, Some(CONFIG_PORTS))
    }

    /// The windows that a BAR may be in, the preferred one first.
    pub(super) fn windows(&self, kind: BarKind) -> [Option<BusRange>; 2] {
        match kind {
            BarKind::Memory32 => [Some(self.memory32), None],
            BarKind::Memory64 => [self.memory64, Some(self.memory32)],
            BarKind::Io => [self.io, None],
        }
    }

    /// Whether a BAR at `base` lies in a window as a whole.
    pub(super) fn admits(&self, bar: Bar, base: u64) -> bool {
        let within = |window: Span| window.0 <= base && bar.last(base) <= window.1;
        self.windows(bar.kind()).into_iter().flatten().filter_map(span).any(within)
    }

    /// The lowest place for a BAR, aligned to its size, that touches none of `taken`.
    pub(super) fn first_fit(&self, bar: Bar, taken: &mut [Span]) -> Option<u64> {
        taken.sort_unstable();
        let windows = self.windows(bar.kind()).into_iter().flatten().filter_map(span);
        windows.filter_map(|window| first_fit_in(bar, window, taken)).next()
    }
}

/// `taken` ascends by its first addresses.
fn first_fit_in(bar: Bar, (first, end): Span, taken: &[Span]) -> Option<u64> {
    let mut base = first.checked_next_multiple_of(bar.size())?;
    for &(other, other_last) in taken {
        if overlap((base, bar.last(base)), (other, other_last)) {
            base = other_last.checked_add(1)?.checked_next_multiple_of(bar.size())?;
        }
    }
    (bar.last(base) <= end).then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_fit_is_aligned_and_free() {
        let layout = PciLayout::default().memory32(BusRange::new(0xe800_1000, 0xf000));
        let fit = |size, taken: &[Span]| layout.first_fit(Bar::memory32(size), &mut taken.to_vec());
        assert_eq!(fit(0x1000, &[]), Some(0xe800_1000));
        assert_eq!(fit(0x4000, &[]), Some(0xe800_4000));
        assert_eq!(fit(0x1000, &[(0xe800_1000, 0xe800_1fff)]), Some(0xe800_2000));
        // A large one that a small one lies in, and one that touches from below.
        let taken = [(0xe800_4000, 0xe800_4fff), (0xe800_0000, 0xe800_7fff), (0xe800_5000, 0xe800_50ff)];
        assert_eq!(fit(0x1000, &taken), Some(0xe800_8000));
        assert_eq!(fit(0x8000, &taken), Some(0xe800_8000));
        assert_eq!(fit(0x1_0000, &[]), None);
        assert_eq!(fit(0x1000, &[(0, u64::MAX)]), None);
        assert_eq!(fit(0x1000, &[(0xe800_1000, 0xe800_ffff)]), None);
    }

    #[test]
    fn a_64_bit_bar_goes_high_if_it_can() {
        let low = PciLayout::default();
        let high = low.memory64(Some(BusRange::new(1 << 40, 1 << 30)));
        let bar = Bar::memory64(0x4000);
        assert_eq!(low.first_fit(bar, &mut []), Some(0xe800_0000));
        assert_eq!(high.first_fit(bar, &mut []), Some(1 << 40));
        assert_eq!(high.first_fit(bar, &mut [(1 << 40, u64::MAX)]), Some(0xe800_0000));
        assert!(high.admits(bar, 0xe800_0000) && high.admits(bar, (1 << 40) + 0x4000));
        let odd = low.memory32(BusRange::new(0xe800_0000, 0x1800));
        let small = Bar::memory32(0x1000);
        assert!(odd.admits(small, 0xe800_0000) && !odd.admits(small, 0xe800_1000));
        assert!(!high.admits(Bar::memory32(0x4000), 1 << 40) && !high.admits(bar, (1 << 40) + (1 << 30)));
    }

    #[test]
    fn windows_are_checked() {
        let layout = PciLayout::default();
        layout.check().unwrap();
        layout.io(None).check().unwrap();
        for (bad, expected) in [
            (layout.ecam(GuestAddress(0xe008_0000)), "ECAM window of 0x100000 bytes at 0xe0080000"),
            (layout.ecam(GuestAddress(0)), "ECAM"),
            (layout.memory32(BusRange::new(0xe800_0000, 0)), "32-bit memory"),
            (layout.memory32(BusRange::new(0xe800_0000, 0x1800_0001)), "32-bit memory"),
            (layout.memory64(Some(BusRange::new(0xe000_0000, 0x1000))), "from 0x1_0000_0000 on"),
            (layout.memory64(Some(BusRange::new(u64::MAX, 2))), "64-bit memory"),
            (layout.io(Some(BusRange::new(0x1000, 0xf001))), "I/O"),
            (layout.io(Some(BusRange::new(0xc00, 0x400))), "overlaps the configuration ports"),
            (layout.memory32(BusRange::new(0xd000_0000, 0x1000_0001)), "overlaps ECAM"),
            (layout.ecam(GuestAddress(1 << 40)).memory64(Some(BusRange::new(1 << 39, 1 << 40))), "ECAM"),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not have {expected:?}");
        }
    }
}
