//! Where a port writes a frame: slices of the driver's buffers, and of memory of the device's.

use smallvec::SmallVec;
use vmm_memory::vm_memory::VolatileSlice;

use crate::net::HEADER;

/// Slices, one after the other.
pub(super) type Room<'a> = SmallVec<[VolatileSlice<'a>; 64]>;

/// What lies behind the header in `room`, and `own` behind that.
pub(super) fn behind_header<'a>(room: &[VolatileSlice<'a>], own: &[VolatileSlice<'a>]) -> Room<'a> {
    let mut skip = HEADER;
    let mut behind = Room::new();
    for slice in room {
        let within = skip.min(slice.len());
        skip -= within;
        // Within its length, so there is no error.
        behind.extend(slice.offset(within).ok().filter(|slice| !slice.is_empty()));
    }
    behind.extend(own.iter().cloned());
    behind
}

/// Copies what begins at the first of `slices`, `len` bytes of it at most; those that there were.
pub(super) fn peek<'b>(slices: &[VolatileSlice<'_>], len: usize, bytes: &'b mut [u8]) -> &'b [u8] {
    let most = len.min(bytes.len());
    let mut done = 0;
    for slice in slices {
        let Some(place) = bytes.get_mut(done..most).filter(|place| !place.is_empty()) else { break };
        done += slice.copy_to(place);
    }
    bytes.get(..done).unwrap_or_default()
}

/// The other way round.
pub(super) fn fill(slices: &[VolatileSlice<'_>], bytes: &[u8]) {
    let mut left = bytes;
    for slice in slices {
        let (part, rest) = left.split_at(left.len().min(slice.len()));
        slice.copy_from(part);
        left = rest;
    }
}
