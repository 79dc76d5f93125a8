//! Memory for translated code: one piece of memory at two addresses, one of which can be written and the other executed.
//!
//! No page is ever both, so nothing that a guest makes a store do can change code that runs: it would need an address that
//! no guest is told, in a mapping that translated code never refers to.
#![allow(unsafe_code, reason = "memory is mapped and written through raw addresses")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// The file's pages may be executed, whatever is customary on this host (Linux 6.3).
const MFD_EXEC: libc::c_uint = 0x10;

/// See the module.
#[derive(Debug)]
pub(super) struct CodeMemory {
    writable: *mut u8,
    executable: *mut u8,
    len: usize,
}

// SAFETY: both pointers are to memory that this value alone owns.
unsafe impl Send for CodeMemory {}
// SAFETY: shared references only read the addresses.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `len` bytes, which hold no code yet.
    ///
    /// # Errors
    /// Those of the operating system, also where it allows nobody to make memory executable.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let fd = sealed_file(len)?;
        let writable = map(&fd, len, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&fd, len, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(executable) => Ok(Self { writable, executable, len }),
            Err(error) => {
                unmap(writable, len);
                Err(error)
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where the byte at `offset` is executed.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.executable.wrapping_add(offset).expose_provenance() as u64
    }

    /// Replaces bytes from `offset` on; those that would lie outside are left out.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        let room = self.len.saturating_sub(offset);
        let bytes = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        let place = self.writable.wrapping_add(offset.min(self.len));
        // SAFETY: the mapping has that many bytes from there on, and nothing refers to them as Rust values.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        unmap(self.writable, self.len);
        unmap(self.executable, self.len);
    }
}

/// An anonymous file of that length, which nobody can change the length of.
fn sealed_file(len: usize) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string of C, and the call has no other pointer.
    let mut fd = unsafe { libc::memfd_create(c"translated code".as_ptr(), flags | MFD_EXEC) };
    if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // Linux before 6.3 knows no such flag, and such files can be executed anyway.
        // SAFETY: as above.
        fd = unsafe { libc::memfd_create(c"translated code".as_ptr(), flags) };
    }
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: the call has no pointer.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call has no pointer.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn map(fd: &OwnedFd, len: usize, protection: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let address =
        unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

fn unmap(address: *mut u8, len: usize) {
    // SAFETY: the mapping is the caller's, who does not use it any more.
    let _ = unsafe { libc::munmap(address.cast(), len) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_would_be_executed() {
        let mut memory = CodeMemory::new(1 << 16).unwrap();
        memory.write(100, &[1, 2, 3]);
        // Behind the end.
        memory.write((1 << 16) - 1, &[4, 5]);
        memory.write(1 << 20, &[6]);
        let byte = |offset| {
            let address = usize::try_from(memory.address(offset)).unwrap();
            // SAFETY: the mapping can be read.
            unsafe { *ptr::with_exposed_provenance::<u8>(address) }
        };
        assert_eq!([byte(100), byte(102), byte(103), byte((1 << 16) - 1)], [1, 3, 0, 4]);
    }

    #[test]
    fn no_page_can_be_both_written_and_executed() {
        let memory = CodeMemory::new(1 << 16).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let rights = |address: u64| {
            let line = maps.lines().find(|line| line.starts_with(&format!("{address:x}-"))).unwrap();
            line.split(' ').nth(1).unwrap().to_owned()
        };
        assert_eq!(rights(memory.address(0)), "r-xs");
        assert_eq!(rights(memory.writable.expose_provenance() as u64), "rw-s");
    }
}
