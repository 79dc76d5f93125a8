//! Host addresses at which guest pages are mapped a second time.
#![allow(unsafe_code, reason = "memory is mapped at chosen addresses")]

use std::io;
use std::ptr;

use super::PAGE;

/// What a mapped page allows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rights {
    Nothing,
    Read,
    ReadWrite,
}

/// A range of addresses at which nothing can be accessed, but for the pages that are mapped there. All places are offsets
/// in it, and multiples of the page size.
#[derive(Debug)]
pub(super) struct Reserve {
    start: usize,
    len: usize,
}

impl Reserve {
    /// Takes `len` bytes of address space, and no memory.
    ///
    /// # Errors
    /// Those of the operating system.
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { start: map_nothing(ptr::null_mut(), len, 0)?, len })
    }

    pub(super) fn address(&self) -> u64 {
        self.start as u64
    }

    /// Where `len` bytes at `at` are, if the reserve has them.
    fn pages(&self, at: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        let range = usize::try_from(at).ok().zip(usize::try_from(len).ok());
        let is_inside = |(at, len): &(usize, usize)| at.checked_add(*len).is_some_and(|end| end <= self.len);
        let (at, len) = range.filter(is_inside).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok((ptr::with_exposed_provenance_mut(self.start + at), len))
    }

    /// Maps the page of shared memory at the host address `page` also at `at`, with the same rights.
    ///
    /// # Errors
    /// Those of the operating system: EINVAL if the memory is private to its mapping.
    pub(super) fn duplicate(&self, page: u64, at: u64) -> io::Result<()> {
        let (to, len) = self.pages(at, PAGE)?;
        let page = usize::try_from(page).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: with an old size of zero the old mapping stays; the new one replaces a page of the reserve.
        let done = unsafe { libc::mremap(ptr::with_exposed_provenance_mut(page), 0, len, flags, to) };
        if done == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The host's page tables have it from now on, rather than from the first access on.
        // SAFETY: the page was just mapped, and what guest memory is made of can be read.
        let _ = unsafe { to.cast::<u8>().read_volatile() };
        Ok(())
    }

    /// Changes what mapped pages allow.
    ///
    /// # Errors
    /// Those of the operating system.
    pub(super) fn protect(&self, at: u64, len: u64, rights: Rights) -> io::Result<()> {
        let (address, len) = self.pages(at, len)?;
        let rights = match rights {
            Rights::Nothing => libc::PROT_NONE,
            Rights::Read => libc::PROT_READ,
            Rights::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: the pages are some of the reserve, and nothing of Rust's is there.
        match unsafe { libc::mprotect(address, len, rights) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Unmaps pages. If the host refused, which it can for want of memory, the guest would keep pages that it has no right
    /// to: then the process ends.
    pub(super) fn vacate(&self, at: u64, len: u64) {
        let unmapped =
            self.pages(at, len).and_then(|(address, len)| map_nothing(address, len, libc::MAP_FIXED));
        if unmapped.is_ok() {
            return;
        }
        if let Err(error) = self.protect(at, len, Rights::Nothing) {
            tracing::error!(%error, "pages of the address window cannot be unmapped");
            std::process::abort();
        }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // SAFETY: the range is this value's, and nothing of Rust's is there.
        let _ = unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.start), self.len) };
    }
}

/// Makes `len` bytes at `address`, or where there is room, inaccessible; where that is.
fn map_nothing(address: *mut libc::c_void, len: usize, flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: it replaces nothing, or pages of a reserve.
    let done = unsafe { libc::mmap(address, len, libc::PROT_NONE, flags, -1, 0) };
    if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(done.expose_provenance()) }
}
