//! Buffers of a chain as slices of the guest's memory that forget whose dirty bitmap they belong to.
//!
//! What carries data outside (disks, networks) is an object, so it cannot be generic over the memory. The devices mark what was written
//! themselves.

#![allow(unsafe_code, reason = "vm-memory has no safe way to a slice without its dirty bitmap")]

use smallvec::SmallVec;
use vmm_memory::vm_memory::bitmap::{BS, Bitmap, BitmapSlice};
use vmm_memory::vm_memory::volatile_memory::PtrGuardMut;
use vmm_memory::vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

/// Pieces of guest memory.
pub type Slices<'a> = SmallVec<[VolatileSlice<'a>; 4]>;

/// Calls `f` for each slice of memory; how many bytes they have, `None` if one is in no RAM. What a memory says about its slices is
/// counted, and not believed.
pub(super) fn each_slice<'a, G: GuestMemory + ?Sized>(
    memory: &'a G,
    pieces: impl Iterator<Item = (GuestAddress, usize)>,
    access: Permissions,
    mut f: impl FnMut(VolatileSlice<'a, BS<'a, G::Bitmap>>),
) -> Option<usize> {
    let mut total = 0;
    for (gpa, len) in pieces {
        let mut left = len;
        for slice in memory.get_slices(gpa, len, access).ok()? {
            let slice = slice.ok()?;
            left = left.checked_sub(slice.len())?;
            f(slice);
        }
        if left > 0 {
            return None;
        }
        total += len;
    }
    Some(total)
}

/// Tells the dirty bitmaps that these were written. What is in no RAM was not.
pub(super) fn mark_dirty<G: GuestMemory + ?Sized>(
    memory: &G,
    pieces: impl Iterator<Item = (GuestAddress, usize)>,
) {
    each_slice(memory, pieces, Permissions::Write, |slice| slice.bitmap().mark_dirty(0, slice.len()));
}

/// The guard of a pointer has nothing to undo, so the pointer is good without it. With vm-memory's feature `xen`, which any crate of a
/// program turns on for all, memory is mapped for each guard anew: there the devices do not build.
const _: () = assert!(
    !std::mem::needs_drop::<PtrGuardMut>(),
    "vmm-devices hands guest memory to the kernel by address, and cannot be built with vm-memory's feature `xen`"
);

/// The same memory, without its bitmap.
pub(super) fn erase<'a, B: BitmapSlice>(slice: &VolatileSlice<'a, B>) -> VolatileSlice<'a> {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the slice says that these bytes are there for 'a and are used by volatile accesses alone. The pointer outlives its guard, as
    // asserted above.
    unsafe { VolatileSlice::new(guard.as_ptr(), guard.len()) }
}
