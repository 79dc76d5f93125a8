//! Basic blocks: decoded instructions, found by guest-physical address, and the cache that keeps them.
//!
//! A block ends at the first instruction that may go elsewhere, at the end of its page, or at [`MAX_OPS`]. It belongs to
//! a guest-physical address and a code width, so address spaces share it. Code that changes is found out in two ways:
//! stores of vCPUs to pages that hold code are seen by the TLB's slow path and drop the blocks that they overlap, but for
//! pages that are stored to all the time, see `code_stores.rs`; and whenever a block is looked up anew (after any change of the TLB, and at each entry to `run`), its bytes are compared
//! with memory, which finds what devices and the VMM wrote.

mod build;
mod cache;
mod length;

pub(crate) use build::{DECODING, build};
pub(crate) use cache::{BlockCache, Stamp};

use super::memory::{PAGE, PAGE_MASK};
use super::ops::Op;

/// Most instructions in a block.
pub(crate) const MAX_OPS: usize = 64;

/// Decoded instructions that run one after another.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    /// The code that was decoded.
    pub(crate) bytes: Box<[u8]>,
    pub(crate) gpa: u64,
    /// Where the code continues if its last instruction crosses into another page.
    pub(crate) second_page: Option<u64>,
    /// Width of the code in bits.
    pub(crate) code_bits: u32,
    /// It is compared with memory whenever it is entered, since nobody looks at what is stored there.
    pub(crate) checked: bool,
    /// How often it has run before it was translated.
    pub(crate) runs: u32,
}

impl Block {
    /// Length of the code in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The pages that hold the code. Paging may make both the same, which is then told once.
    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let first = self.gpa & PAGE_MASK;
        [Some(first), self.second_page.filter(|second| *second != first)].into_iter().flatten()
    }

    /// Its code by pages: where it lies and what it is.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let here = usize::try_from(PAGE - (self.gpa & !PAGE_MASK)).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.split_at(here.min(self.bytes.len()));
        [Some((self.gpa, first)), self.second_page.map(|page| (page, second))].into_iter().flatten()
    }

    /// Length of its first instruction.
    pub(crate) fn first_len(&self) -> u64 {
        self.ops.get(1).map_or(self.len(), |second| second.start.into())
    }
}
