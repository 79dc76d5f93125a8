//! Where a replay puts queues, tables and buffers.

use std::ops::Range;

use vmm_memory::vm_memory::{GuestAddressSpace as _, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::Place;
use crate::testkit::Memory;

/// Bytes of RAM that a replay needs, in one region at address 0.
pub const MIN_MEMORY: u64 = 0x2_0000;

/// Queues that are used; a device may have more.
pub(super) const MAX_QUEUES: u16 = 8;
/// The largest size of a queue.
pub(super) const MAX_SIZE: u16 = 256;
/// What one takes.
const STRIDE: u64 = 0x2000;
const RINGS: u64 = 0x2000;
const TABLES: u64 = RINGS + STRIDE * MAX_QUEUES as u64;
const DATA: u64 = TABLES + 0x2000;

/// RAM as it is when a replay begins.
pub(super) struct Layout {
    regions: Vec<Range<u64>>,
    queues: u64,
}

impl Layout {
    /// Nothing if there is too little RAM.
    pub(super) fn of(memory: &Memory, queues: u16) -> Option<Self> {
        let regions: Vec<_> = memory
            .memory()
            .iter()
            .map(|region| region.start_addr().0..region.start_addr().0.saturating_add(region.len()))
            .collect();
        let enough = regions.first().is_some_and(|first| first.start == 0 && first.end >= MIN_MEMORY);
        enough.then_some(Self { regions, queues: queues.max(1).into() })
    }

    pub(super) fn regions(&self) -> &[Range<u64>] {
        &self.regions
    }

    /// Where the rings of a queue begin.
    pub(super) fn rings(queue: u16) -> u64 {
        RINGS + STRIDE * u64::from(queue)
    }

    pub(super) fn tables() -> Range<u64> {
        TABLES..DATA
    }

    pub(super) fn address(&self, place: Place) -> u64 {
        match place {
            Place::Data(offset) => {
                let end = self.regions.first().map_or(MIN_MEMORY, |first| first.end);
                DATA + u64::from(offset) % (end - DATA)
            }
            Place::BeforeEnd { region, bytes } => {
                let index = usize::from(region).checked_rem(self.regions.len()).unwrap_or(0);
                let end = self.regions.get(index).map_or(MIN_MEMORY, |region| region.end);
                end.saturating_sub(bytes.into())
            }
            Place::Rings { queue, offset } => {
                RINGS + STRIDE * (u64::from(queue) % self.queues) + u64::from(offset) % STRIDE
            }
            Place::Tables(offset) => Self::table(offset),
            Place::Anywhere(gpa) => gpa,
        }
    }

    /// Where an indirect table may begin: with room for 32 entries.
    pub(super) fn table(offset: u16) -> u64 {
        TABLES + u64::from(offset) % (DATA - TABLES - 16 * 32)
    }

    /// Whether some of that are rings, descriptors or tables.
    pub(super) fn is_structure(gpa: u64, len: u64) -> bool {
        gpa < DATA && gpa.saturating_add(len) > RINGS
    }
}
