//! Which guest memory is free while an image and its boot data are being placed.

use std::ops::Range;

use super::e820::{LEGACY_HOLE, Reserved, subtract};
use super::error::{BootError, BootItem};

/// Where boot data goes if its usual place is taken: low memory, then above 1 MiB. Page 0 is left to the
/// interrupt vectors and BIOS data that some guests look for, the page below the hole to the extended BIOS
/// data area, and the last page below 4 GiB free, so that the end of everything fits 32 bits.
pub(super) const ANYWHERE_32: [Range<u64>; 2] = [0x1000..0x9_f000, HIGH_32];
/// RAM from 1 MiB to 4 GiB.
pub(super) const HIGH_32: Range<u64> = 0x10_0000..0xffff_f000;

/// A thing to be placed: its name in errors, size and alignment in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) item: BootItem,
    pub(super) size: u64,
    pub(super) align: u64,
}

/// Free and taken guest memory.
#[derive(Debug)]
pub(super) struct Room {
    /// Ascending and disjoint.
    free: Vec<Range<u64>>,
    taken: Vec<(Range<u64>, BootItem)>,
}

impl Room {
    /// All of `ram` is free but the legacy hole and the reserved ranges.
    pub(super) fn new(ram: &[Range<u64>], reserved: &[Reserved]) -> Self {
        let mut free = ram.to_vec();
        let mut taken = vec![(LEGACY_HOLE, BootItem::LegacyHole)];
        taken.extend(reserved.iter().map(|reserved| (reserved.range(), BootItem::Reserved)));
        for (range, _) in &taken {
            subtract(&mut free, range);
        }
        Self { free, taken }
    }

    /// Takes exactly `range`, which must be wholly free.
    pub(super) fn claim(&mut self, item: BootItem, range: Range<u64>) -> Result<(), BootError> {
        if range.is_empty() {
            return Ok(());
        }
        if !self.is_free(&range) {
            return Err(self.refusal(item, &range));
        }
        subtract(&mut self.free, &range);
        self.taken.push((range, item));
        Ok(())
    }

    /// Takes the memory at `preferred` if it is free, otherwise the lowest that fits in one of `windows`.
    pub(super) fn place(
        &mut self,
        request: Request,
        preferred: u64,
        windows: &[Range<u64>],
    ) -> Result<u64, BootError> {
        let wish = preferred..preferred.saturating_add(request.size);
        if preferred.is_multiple_of(request.align) && self.is_free(&wish) {
            self.claim(request.item, wish)?;
            return Ok(preferred);
        }
        self.place_lowest(request, windows)
    }

    /// Takes the lowest memory that fits in the first of `windows` that has any.
    pub(super) fn place_lowest(
        &mut self,
        request: Request,
        windows: &[Range<u64>],
    ) -> Result<u64, BootError> {
        let found = windows.iter().find_map(|window| {
            self.pieces(window).find_map(|piece| {
                let start = piece.start.checked_next_multiple_of(request.align)?;
                (start.checked_add(request.size)? <= piece.end).then_some(start)
            })
        });
        self.take(request, found, windows)
    }

    /// Takes the highest memory that fits in `window`.
    pub(super) fn place_highest(&mut self, request: Request, window: Range<u64>) -> Result<u64, BootError> {
        let found = self.pieces(&window).rev().find_map(|piece| {
            let start = piece.end.checked_sub(request.size)?;
            let start = start - start.checked_rem(request.align)?;
            (start >= piece.start).then_some(start)
        });
        self.take(request, found, &[window])
    }

    fn take(
        &mut self,
        request: Request,
        found: Option<u64>,
        windows: &[Range<u64>],
    ) -> Result<u64, BootError> {
        let Request { item, size, align } = request;
        let Some(start) = found else {
            let largest =
                windows.iter().flat_map(|window| self.pieces(window)).map(|piece| piece.end - piece.start);
            return Err(BootError::NoRoom {
                item,
                size,
                align,
                from: windows.first().map_or(0, |window| window.start),
                to: windows.last().map_or(0, |window| window.end),
                largest: largest.max().unwrap_or(0),
            });
        };
        self.claim(item, start..start.saturating_add(size))?;
        Ok(start)
    }

    /// The free memory inside `window`.
    fn pieces(&self, window: &Range<u64>) -> impl DoubleEndedIterator<Item = Range<u64>> {
        let (start, end) = (window.start, window.end);
        self.free
            .iter()
            .map(move |free| free.start.max(start)..free.end.min(end))
            .filter(|piece| !piece.is_empty())
    }

    fn is_free(&self, range: &Range<u64>) -> bool {
        let index = self.free.partition_point(|free| free.end <= range.start);
        self.free.get(index).is_some_and(|free| free.start <= range.start && range.end <= free.end)
    }

    fn refusal(&self, item: BootItem, range: &Range<u64>) -> BootError {
        let Range { start, end } = *range;
        let collision = self.taken.iter().find(|(taken, _)| taken.start < end && start < taken.end);
        match collision {
            Some((taken, with)) => BootError::Collision {
                item,
                start,
                end,
                with: *with,
                with_start: taken.start,
                with_end: taken.end,
            },
            None => BootError::NotRam { item, start, end },
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of one range of RAM is meant")]
mod tests {
    use super::super::E820Kind;
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    const RAM: [Range<u64>; 1] = [0..0x100_0000];

    fn request(size: u64, align: u64) -> Request {
        Request { item: BootItem::Initrd, size, align }
    }

    #[test]
    fn a_wish_is_granted_until_the_place_is_taken() {
        let mut room = Room::new(&RAM, &[]);
        assert_eq!(room.place(request(0x1000, 0x1000), 0x6000, &ANYWHERE_32).unwrap(), 0x6000);
        assert_eq!(room.place(request(0x1000, 0x1000), 0x6000, &ANYWHERE_32).unwrap(), 0x1000);
        assert_eq!(room.place(request(0x9_0000, 0x1000), 0x6000, &ANYWHERE_32).unwrap(), 0x7000);
        assert_eq!(room.place(request(0x9_0000, 0x1000), 0x6000, &ANYWHERE_32).unwrap(), 0x10_0000);
    }

    #[test]
    fn the_highest_place_is_aligned_and_ends_in_the_window() {
        let mut room = Room::new(&RAM, &[]);
        assert_eq!(room.place_highest(request(0x1001, 0x1000), HIGH_32).unwrap(), 0xff_e000);
        assert_eq!(room.place_highest(request(0x1000, 0x1000), HIGH_32).unwrap(), 0xff_d000);
        assert_eq!(room.place_highest(request(0x1000, 0x1000), 0x10_0000..0x20_0000).unwrap(), 0x1f_f000);
    }

    #[test]
    fn a_refusal_says_what_room_there_was() {
        let mut room = Room::new(&RAM, &[]);
        room.claim(BootItem::Kernel, 0x80_0000..0x90_0000).unwrap();
        let error = room.place_highest(request(0x80_0000, 0x1000), HIGH_32).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no room for the initrd: 0x800000 bytes aligned to 0x1000 in 0x100000..0xfffff000; \
             the largest free range there is 0x700000 bytes"
        );
    }

    #[test]
    fn a_collision_names_both_sides() {
        let reserved =
            Reserved { start: GuestAddress(0x5000), end: GuestAddress(0x6000), kind: E820Kind::Reserved };
        let mut room = Room::new(&RAM, &[reserved]);
        room.claim(BootItem::Segment(1), 0x4000..0x5000).unwrap();
        for (range, text) in [
            (0x4fff..0x5000, "overlaps the segment of program header 1 at 0x4000..0x5000"),
            (0x5fff..0x7000, "overlaps a reserved range at 0x5000..0x6000"),
            (0x9_0000..0xa_0001, "overlaps the 640 KiB to 1 MiB hole at 0xa0000..0x100000"),
            (0xff_f000..0x100_0001, "is not all guest RAM"),
        ] {
            let error = room.claim(BootItem::Kernel, range).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_placed_overlaps_anything(
            requests in prop::collection::vec((1_u64..0x20_0000, 0_u32..22, 0_u8..3), 1..40),
        ) {
            let ram = [0..0x8000, 0xc000..0x80_0000, 0xa0_0000..0x180_0000];
            let mut room = Room::new(&ram, &[]);
            let mut placed: Vec<Range<u64>> = vec![LEGACY_HOLE];
            for (size, shift, how) in requests {
                let request = request(size, 1 << shift);
                let result = match how {
                    0 => room.place(request, 0x6000, &ANYWHERE_32),
                    1 => room.place_lowest(request, &ANYWHERE_32),
                    _ => room.place_highest(request, HIGH_32),
                };
                if let Ok(start) = result {
                    prop_assert!(start.is_multiple_of(request.align));
                    let range = start..start + size;
                    prop_assert!(ram.iter().any(|ram| ram.start <= range.start && range.end <= ram.end));
                    prop_assert!(placed.iter().all(|other| range.end <= other.start || other.end <= range.start));
                    placed.push(range);
                }
            }
        }
    }
}
