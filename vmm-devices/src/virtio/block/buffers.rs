//! The data of a request, as slices of the guest's memory that forget whose dirty bitmap they belong to.
//!
//! Backends are objects, so they cannot be generic over the memory. The device marks what was written itself.

#![allow(unsafe_code, reason = "vm-memory has no safe way to a slice without its dirty bitmap")]

use std::fmt;
use std::io;
use std::ops::Deref;

use smallvec::SmallVec;
use vmm_memory::vm_memory::bitmap::{BS, Bitmap, BitmapSlice};
use vmm_memory::vm_memory::volatile_memory::PtrGuardMut;
use vmm_memory::vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::virtio::queue::{Chain, pieces};

/// Pieces of guest memory.
pub type Slices<'a> = SmallVec<[VolatileSlice<'a>; 4]>;

/// Which of a chain's bytes are the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    /// None.
    None,
    /// The device reads them, from byte `at` of the readable buffers on.
    Readable { at: u64, len: usize },
    /// The device writes them, from the first byte of the writable buffers on.
    Writable { len: usize },
}

impl Area {
    pub(super) fn len(self) -> usize {
        match self {
            Self::None => 0,
            Self::Readable { len, .. } | Self::Writable { len } => len,
        }
    }
}

/// Adds where the data lies, as it is handed to `also`, too; whether all of it is in RAM.
fn gather<'a, T: Deref<Target: GuestMemory>>(
    chain: &'a Chain<T>,
    area: &Area,
    all: &mut Slices<'a>,
    mut also: impl FnMut(VolatileSlice<'a, BS<'a, <T::Target as GuestMemory>::Bitmap>>),
) -> bool {
    let each = |slice| {
        all.push(erase(&slice));
        also(slice);
    };
    match *area {
        Area::None => true,
        Area::Readable { at, len } => {
            let pieces = pieces(chain.readable(), at, len);
            each_slice(chain.memory(), pieces, Permissions::Read, each) == Some(len)
        }
        Area::Writable { len } => {
            let pieces = pieces(chain.writable(), 0, len);
            each_slice(chain.memory(), pieces, Permissions::Write, each) == Some(len)
        }
    }
}

/// Calls `f` with the data, and tells the dirty bitmaps what it has written; `None` if not all of it is in RAM.
pub(super) fn with_slices<T: Deref<Target: GuestMemory>, R>(
    chain: &Chain<T>,
    area: &Area,
    f: impl FnOnce(&[VolatileSlice<'_>]) -> R,
) -> Option<R> {
    let mut all = Slices::new();
    if !matches!(area, Area::Writable { .. }) {
        return gather(chain, area, &mut all, drop).then(|| f(&all));
    }
    // Kept, for looking them up again takes as long as a short request.
    let mut own: SmallVec<[_; 4]> = SmallVec::new();
    if !gather(chain, area, &mut all, |slice| own.push(slice)) {
        return None;
    }
    let result = f(&all);
    own.iter().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
    Some(result)
}

/// Tells the dirty bitmaps that the data was written, by who had it from [`Buffers::slices`].
pub(super) fn mark_written<T: Deref<Target: GuestMemory>>(chain: &Chain<T>, area: Area) {
    if let Area::Writable { len } = area {
        let pieces = pieces(chain.writable(), 0, len);
        // What is in no RAM was not written.
        each_slice(chain.memory(), pieces, Permissions::Write, |s| s.bitmap().mark_dirty(0, s.len()));
    }
}

/// Calls `f` for each slice of memory; how many bytes they have, `None` if one is in no RAM. What a memory says about its slices is
/// counted, and not believed.
fn each_slice<'a, G: GuestMemory + ?Sized>(
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

/// The guard of a pointer has nothing to undo, so the pointer is good without it. With vm-memory's feature `xen`, which any crate of a
/// program turns on for all, memory is mapped for each guard anew: there the devices do not build.
const _: () = assert!(
    !std::mem::needs_drop::<PtrGuardMut>(),
    "vmm-devices hands guest memory to the kernel by address, and cannot be built with vm-memory's feature `xen`"
);

fn erase<'a, B: BitmapSlice>(slice: &VolatileSlice<'a, B>) -> VolatileSlice<'a> {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the slice says that these bytes are there for 'a and are used by volatile accesses alone. The pointer outlives its guard, as
    // asserted above.
    unsafe { VolatileSlice::new(guard.as_ptr(), guard.len()) }
}

/// A request's data, with what keeps it mapped.
pub struct Buffers {
    held: Box<dyn Held>,
    len: usize,
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Buffers {
    pub(super) fn new<T: Deref<Target: GuestMemory> + Send + 'static>(chain: Chain<T>, area: Area) -> Self {
        Self { held: Box::new((chain, area)), len: area.len() }
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of memory that it consists of, as the driver's addresses are looked up now.
    ///
    /// # Errors
    /// If not all of it is RAM: nothing is to be done with what is.
    pub fn slices(&self) -> io::Result<Slices<'_>> {
        self.held.slices().ok_or_else(|| io::Error::other("the request's buffers are not in RAM"))
    }
}

trait Held: Send {
    fn slices(&self) -> Option<Slices<'_>>;
}

impl<T: Deref<Target: GuestMemory> + Send> Held for (Chain<T>, Area) {
    fn slices(&self) -> Option<Slices<'_>> {
        let mut all = Slices::new();
        gather(&self.0, &self.1, &mut all, drop).then_some(all)
    }
}
