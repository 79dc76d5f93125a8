//! Guest memory while a protocol fills it: what is free, and writes that name what they were for.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::e820::{E820Entry, Reserved, check_reserved, memory_map, ram_ranges};
use super::error::{BootError, BootItem};
use super::image::KernelImage;
use super::room::{Request, Room};
use crate::PAGE_SIZE;

/// Zeroes are written in pieces of this size.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

pub(super) struct Target<'m, M> {
    memory: &'m M,
    pub(super) room: Room,
    pub(super) map: Vec<E820Entry>,
}

impl<'m, M: GuestMemoryBackend> Target<'m, M> {
    pub(super) fn new(memory: &'m M, reserved: &[Reserved]) -> Result<Self, BootError> {
        let reserved = check_reserved(reserved)?;
        let ram = ram_ranges(memory);
        Ok(Self { memory, room: Room::new(&ram, &reserved), map: memory_map(&ram, &reserved) })
    }

    pub(super) fn write(&self, item: BootItem, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Write {
            item,
            address,
            source,
        })
    }

    pub(super) fn zero(&self, item: BootItem, range: Range<u64>) -> Result<(), BootError> {
        let mut address = range.start;
        while address < range.end {
            let length = usize::try_from(range.end - address).unwrap_or(usize::MAX);
            let piece = ZEROES.get(..length).unwrap_or(&ZEROES);
            self.write(item, address, piece)?;
            address = address.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes the segments of an ELF, with the memory past their file content zeroed: it may have been used
    /// before. Returns the range from the lowest to the highest segment.
    pub(super) fn load_segments(
        &mut self,
        image: &KernelImage<'_>,
    ) -> Result<Range<GuestAddress>, BootError> {
        for segment in image.segments() {
            self.room.claim(BootItem::Segment(segment.index), segment.physical())?;
        }
        for segment in image.segments() {
            let item = BootItem::Segment(segment.index);
            self.write(item, segment.paddr, image.segment_bytes(segment)?)?;
            let physical = segment.physical();
            self.zero(item, physical.start.saturating_add(segment.filesz)..physical.end)?;
        }
        let start = image.segments().first().map_or(0, |segment| segment.paddr);
        let end = image.segments().last().map_or(start, |segment| segment.physical().end);
        Ok(GuestAddress(start)..GuestAddress(end))
    }

    /// Writes `bytes` page-aligned at the highest place in `window`.
    pub(super) fn load_high(
        &mut self,
        item: BootItem,
        bytes: &[u8],
        window: Range<u64>,
    ) -> Result<(GuestAddress, u64), BootError> {
        let size = bytes.len() as u64;
        let address = self.room.place_highest(Request { item, size, align: PAGE_SIZE }, window)?;
        self.write(item, address, bytes)?;
        Ok((GuestAddress(address), size))
    }

    /// Writes `bytes` page-aligned at the lowest place in `window`.
    pub(super) fn load_low(
        &mut self,
        item: BootItem,
        bytes: &[u8],
        window: Range<u64>,
    ) -> Result<(GuestAddress, u64), BootError> {
        let size = bytes.len() as u64;
        let address = self.room.place_lowest(Request { item, size, align: PAGE_SIZE }, &[window])?;
        self.write(item, address, bytes)?;
        Ok((GuestAddress(address), size))
    }
}

/// Tables and strings that lie behind one another, each 8-byte aligned, at a known address.
pub(super) struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// The size of pieces of these lengths.
    pub(super) fn size_of(lengths: impl IntoIterator<Item = usize>) -> u64 {
        lengths.into_iter().map(|length| (length as u64).next_multiple_of(8)).sum()
    }

    /// Starts with `head` zero bytes, for a structure that points to the rest.
    pub(super) fn new(base: u64, head: usize) -> Self {
        Self { base, bytes: vec![0; head] }
    }

    /// Appends a piece and returns its address.
    pub(super) fn push(&mut self, piece: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = self.base.saturating_add(self.bytes.len() as u64);
        self.bytes.extend_from_slice(piece);
        address
    }

    /// Appends a string with a NUL and returns its address.
    pub(super) fn push_string(&mut self, text: &str) -> u64 {
        let address = self.push(text.as_bytes());
        self.bytes.push(0);
        address
    }

    /// The whole, with `head` in front.
    pub(super) fn finish(mut self, head: &[u8]) -> Vec<u8> {
        for (to, from) in self.bytes.iter_mut().zip(head) {
            *to = *from;
        }
        self.bytes
    }
}

/// An address that a 32-bit field of a boot structure holds.
pub(super) fn address32(what: &'static str, address: u64) -> Result<u32, BootError> {
    u32::try_from(address).map_err(|_| BootError::field(what, address, "below 4 GiB"))
}
