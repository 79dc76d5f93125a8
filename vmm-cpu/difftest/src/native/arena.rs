//! The memory that a child shares with its parent: the areas' image, what is to be done and what came of it.
//!
//! Parent and child take turns: the child works from when `asked` has changed until it has set `done` to the same value,
//! and only then does the parent touch the rest again.
#![allow(clippy::multiple_unsafe_ops_per_block, reason = "fields of one structure, for one reason")]
#![allow(unsafe_code, reason = "memory that two processes share")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use crate::memory::{IMAGE, MOST_CHANGES};
use crate::start::{MOST_CODE, MOST_MEMORY, Start};

/// Cases that are handed over at once.
pub(crate) const BATCH: usize = 64;

/// A case on its way to the child, and what came of it.
#[repr(C, align(64))]
pub(super) struct Slot {
    pub(super) start: Start,
    pub(super) memory_len: usize,
    pub(super) memory: [u8; MOST_MEMORY + MOST_CODE],
    pub(super) finish: Finish,
    pub(super) stores_len: usize,
    pub(super) stores: [u8; MOST_CHANGES],
}

/// What the signal that ended a case says.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Finish {
    pub(super) signal: u64,
    pub(super) trap: u64,
    pub(super) error: u64,
    pub(super) address: u64,
    pub(super) general: [u64; 16],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) fs_base: u64,
    pub(super) gs_base: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub(super) selectors: [u16; 6],
    pub(super) fxsave: [u8; 512],
}

/// All that is shared. The image comes first: its pages are mapped once more where cases see them.
#[repr(C, align(4096))]
pub(super) struct Shared {
    pub(super) image: [u8; IMAGE],
    pub(super) asked: AtomicU32,
    pub(super) done: AtomicU32,
    /// Of the slots, from the first on, that are to be done.
    pub(super) count: AtomicU32,
    /// The slot that is being done.
    pub(super) current: AtomicU32,
    pub(super) slots: [Slot; BATCH],
}

/// A mapping of [`Shared`] and the memfd behind it.
pub(super) struct Arena {
    shared: NonNull<Shared>,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to no thread.
unsafe impl Send for Arena {}

impl Arena {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: the name is a string with a terminating zero.
        let fd = unsafe { libc::memfd_create(c"difftest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was opened above and nobody else has it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sizes a file that is ours.
        if unsafe { libc::ftruncate(fd, size_of::<Shared>().cast_signed() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        match NonNull::new(address.cast()) {
            Some(shared) if address != libc::MAP_FAILED => Ok(Self { shared, file }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(super) fn address(&self) -> *mut Shared {
        self.shared.as_ptr()
    }

    /// The words that both sides watch.
    pub(super) fn words(&self) -> [&AtomicU32; 4] {
        let shared = self.shared.as_ptr();
        // SAFETY: the fields are within the mapping, which lives as long as `self`, and are only accessed atomically.
        unsafe { [&(*shared).asked, &(*shared).done, &(*shared).count, &(*shared).current] }
    }

    /// A slot, while it is the parent's turn.
    pub(super) fn slot(&mut self, index: usize) -> &mut Slot {
        let shared = self.shared.as_ptr();
        // SAFETY: the index is reduced to the length, every pattern of bits is a slot, and the child only touches slots
        // during its turn.
        unsafe { &mut *(&raw mut (*shared).slots).cast::<Slot>().add(index % BATCH) }
    }

    /// The image, while there is no child.
    pub(super) fn image(&mut self) -> &mut [u8; IMAGE] {
        let shared = self.shared.as_ptr();
        // SAFETY: within the mapping, and nobody else touches it.
        unsafe { &mut (*shared).image }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this size and nothing refers to it any more.
        unsafe { libc::munmap(self.shared.as_ptr().cast(), size_of::<Shared>()) };
    }
}
