//! Host addresses at which guest pages are mapped a second time.
#![allow(unsafe_code, reason = "memory is mapped at chosen addresses")]

use std::io;
use std::ptr;

use super::PAGE;

const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE);

/// What a mapped page allows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rights {
    Read,
    ReadWrite,
}

/// A range of addresses at which nothing can be accessed, but for the pages that are mapped there. All places are offsets
/// in it, and multiples of the page size.
#[derive(Debug)]
pub(super) struct Reserve {
    start: usize,
    len: usize,
    /// A page that may not be the reserve's any more.
    lost: Option<usize>,
}

impl Reserve {
    /// Takes `len` bytes of address space, and no memory.
    ///
    /// # Errors
    /// Those of the operating system.
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { start: map_nothing(ptr::null_mut(), len, 0)?, len, lost: None })
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

    /// What of `len` bytes at `at` is the reserve's for certain.
    fn owned(&self, at: u64, len: u64) -> io::Result<[(*mut libc::c_void, usize); 2]> {
        let (address, len) = self.pages(at, len)?;
        let start = address.expose_provenance();
        let end = start + len;
        let (first, second) = match self.lost.map(|lost| self.start + lost) {
            Some(lost) if (start..end).contains(&lost) => (lost, lost + PAGE_BYTES),
            _ => (end, end),
        };
        let from = |start| ptr::with_exposed_provenance_mut(start);
        Ok([(from(start), first - start), (from(second), end - second)])
    }

    /// Whether the page of memory at the host address `page` can be mapped a second time.
    ///
    /// # Errors
    /// Those of the operating system: EINVAL if the memory is private to its mapping.
    pub(super) fn probe(page: u64) -> io::Result<()> {
        let second = map_again(page, ptr::null_mut(), 0)?;
        // SAFETY: the new mapping is nobody else's.
        let _ = unsafe { libc::munmap(ptr::with_exposed_provenance_mut(second), PAGE_BYTES) };
        Ok(())
    }

    /// Maps the page of shared memory at the host address `page` also at `at`, with the same rights.
    ///
    /// # Errors
    /// Those of the operating system: EINVAL if the memory is private to its mapping. Linux before 6.17 may have unmapped
    /// what was at `at` then, and somebody else may have that page by now. So nothing is to be mapped any more.
    pub(super) fn duplicate(&mut self, page: u64, at: u64) -> io::Result<()> {
        let (to, _) = self.pages(at, PAGE)?;
        if let Err(error) = map_again(page, to, libc::MREMAP_FIXED) {
            self.lost = usize::try_from(at).ok();
            return Err(error);
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
            Rights::Read => libc::PROT_READ,
            Rights::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: the pages are some of the reserve, and nothing of Rust's is there.
        match unsafe { libc::mprotect(address, len, rights) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Unmaps pages; whether the host has done it, which it may lack memory for.
    #[must_use]
    pub(super) fn vacate(&self, at: u64, len: u64) -> bool {
        let Ok(pieces) = self.owned(at, len) else { return false };
        pieces
            .iter()
            .filter(|(_, len)| *len > 0)
            .all(|(address, len)| map_nothing(*address, *len, libc::MAP_FIXED).is_ok())
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        let Ok(pieces) = self.owned(0, self.len as u64) else { return };
        for (address, len) in pieces.into_iter().filter(|(_, len)| *len > 0) {
            // SAFETY: the range is this value's, and nothing of Rust's is there.
            let _ = unsafe { libc::munmap(address, len) };
        }
    }
}

/// Maps the page of shared memory at the host address `page` a second time: at `to`, where `flags` say so; where it is.
fn map_again(page: u64, to: *mut libc::c_void, flags: libc::c_int) -> io::Result<usize> {
    let page = usize::try_from(page).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
    let page = ptr::with_exposed_provenance_mut(page);
    // SAFETY: with an old size of zero the old mapping stays; the new one replaces nothing, or a page of a reserve.
    let done = unsafe { libc::mremap(page, 0, PAGE_BYTES, flags | libc::MREMAP_MAYMOVE, to) };
    if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(done.expose_provenance()) }
}

/// Makes `len` bytes at `address`, or where there is room, inaccessible; where that is.
fn map_nothing(address: *mut libc::c_void, len: usize, flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: it replaces nothing, or pages of a reserve.
    let done = unsafe { libc::mmap(address, len, libc::PROT_NONE, flags, -1, 0) };
    if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(done.expose_provenance()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(place: *mut libc::c_void, flags: libc::c_int) -> *mut u8 {
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_ANONYMOUS);
        // SAFETY: it replaces nothing.
        let memory = unsafe { libc::mmap(place, PAGE_BYTES, rights, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        memory.cast()
    }

    #[test]
    fn a_page_that_others_may_have_is_left_alone() {
        let at = 3 * PAGE;
        let mut reserve = Reserve::new(8 * PAGE).unwrap();
        let private = anonymous(ptr::null_mut(), libc::MAP_PRIVATE);
        // SAFETY: the page was just mapped.
        unsafe { private.write(1) };
        let private = private.expose_provenance() as u64;
        assert_eq!(Reserve::probe(private).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert!(reserve.duplicate(private, at).is_err());

        // What older kernels do.
        let (page, len) = reserve.pages(at, PAGE).unwrap();
        // SAFETY: nobody uses the page.
        assert_eq!(unsafe { libc::munmap(page, len) }, 0);
        let others = anonymous(page, libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE);
        assert_eq!(others, page.cast());
        // SAFETY: the page was just mapped.
        unsafe { others.write(7) };
        assert!(reserve.vacate(0, 8 * PAGE) && reserve.vacate(at, PAGE));
        drop(reserve);
        // SAFETY: it is still mapped, or this test fails.
        assert_eq!(unsafe { others.read() }, 7);
    }

    #[test]
    fn what_is_probed_stays_where_it_is() {
        let shared = anonymous(ptr::null_mut(), libc::MAP_SHARED);
        let mut reserve = Reserve::new(8 * PAGE).unwrap();
        let address = shared.expose_provenance() as u64;
        Reserve::probe(address).unwrap();
        reserve.duplicate(address, PAGE).unwrap();
        // SAFETY: the page is mapped.
        unsafe { shared.write(5) };
        let (second, _) = reserve.pages(PAGE, PAGE).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { second.cast::<u8>().read() }, 5);
        assert!(reserve.duplicate(address, 8 * PAGE).is_err(), "outside of the reserve");
    }
}
