//! Where RAM was.

use super::chunk::CHUNK;
use crate::GuestRam;
use crate::layout::MAX_RAM;
use crate::region::{GuestRegion, check_range, is_read_only};
use crate::snapshot::error::StateError;
use vm_memory::{GuestAddress, GuestMemoryRegion};

/// Most regions.
const MAX_REGIONS: usize = 1024;

/// Where a guest's RAM was, and how it is kept in the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamLayout {
    /// The regions, ascending and disjoint.
    pub regions: Vec<RamRange>,
    /// Whether pages are packed, with LZ4 where that makes them fewer bytes. If not, each is at its place, where it can be mapped.
    pub packed: bool,
}

/// A region of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamRange {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the host cannot write it.
    pub read_only: bool,
}

impl RamRange {
    fn of(region: &GuestRegion) -> Self {
        Self { gpa: region.start_addr().0, size: region.len(), read_only: is_read_only(region) }
    }

    fn chunks(&self) -> u64 {
        self.size.div_ceil(CHUNK)
    }
}

/// A chunk of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The region that it is in, by its index, and where in there.
    pub(crate) region: usize,
    pub(crate) offset: u64,
    /// Where it is in RAM as a whole, regions one behind the other.
    pub(crate) at: u64,
    pub(crate) size: u64,
}

impl RamLayout {
    pub(crate) fn of(ram: &GuestRam, packed: bool) -> Self {
        Self { regions: ram.regions().iter().map(|region| RamRange::of(region)).collect(), packed }
    }

    /// Sum of the sizes of all regions, in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.regions.iter().map(RamRange::chunks).sum()
    }

    /// All chunks, in the order of their records.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> + '_ {
        let mut before = 0;
        self.regions.iter().enumerate().flat_map(move |(region, range)| {
            let begin = before;
            before += range.size;
            (0..range.chunks()).map(move |chunk| {
                let offset = chunk * CHUNK;
                Place { region, offset, at: begin + offset, size: CHUNK.min(range.size - offset) }
            })
        })
    }

    /// Guest-physical addresses of a chunk, for people.
    pub(crate) fn name(&self, place: &Place) -> String {
        let gpa = self.regions.get(place.region).map_or(0, |region| region.gpa) + place.offset;
        format!("RAM at {gpa:#x} to {:#x}", gpa + place.size)
    }

    /// Whether it could be that of some RAM.
    pub(crate) fn check(&self) -> Result<(), StateError> {
        let count = self.regions.len();
        if count > MAX_REGIONS {
            return Err(format!("it has {count} regions; at most {MAX_REGIONS} are allowed").into());
        }
        let mut end = 0;
        let mut size = 0_u64;
        for region in &self.regions {
            check_range(GuestAddress(region.gpa), region.size)?;
            if region.gpa < end {
                return Err(format!(
                    "its region at {:#x} begins before {end:#x}, where another ends",
                    region.gpa
                )
                .into());
            }
            end = region.gpa + region.size;
            size = size.saturating_add(region.size);
        }
        if size > MAX_RAM {
            Err(format!("it has {size} bytes; at most {MAX_RAM} are allowed").into())
        } else {
            Ok(())
        }
    }

    /// Where RAM is other than this.
    pub(crate) fn differs(&self, ram: &GuestRam) -> Option<String> {
        let here = Self::of(ram, self.packed);
        let text = |range: Option<&RamRange>| match range {
            Some(RamRange { gpa, size, read_only }) => {
                format!("{size:#x} bytes at {gpa:#x}{}", if *read_only { ", read-only" } else { "" })
            }
            None => "no more region".to_owned(),
        };
        let count = self.regions.len().max(here.regions.len());
        (0..count)
            .map(|at| (self.regions.get(at), here.regions.get(at)))
            .find(|(saved, here)| saved != here)
            .map(|(saved, here)| {
                format!("RAM is laid out otherwise: saved were {}, here are {}", text(saved), text(here))
            })
    }
}
