//! The data of a request, as slices of the guest's memory. The device marks what was written itself.

use std::fmt;
use std::io;
use std::ops::Deref;

use smallvec::SmallVec;
use vmm_memory::vm_memory::bitmap::{BS, Bitmap};
use vmm_memory::vm_memory::{GuestMemory, Permissions, VolatileSlice};

use crate::virtio::queue::{Chain, pieces};
use crate::virtio::slices::{Slices, each_slice, erase, mark_dirty};

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
        mark_dirty(chain.memory(), pieces(chain.writable(), 0, len));
    }
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
