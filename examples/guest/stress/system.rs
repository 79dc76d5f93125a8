//! The few system calls that std has no function for.

use std::ffi::{c_int, c_long, c_void};
use std::os::fd::AsRawFd;

pub(crate) const READ: c_int = 1;
pub(crate) const WRITE: c_int = 2;
pub(crate) const EXECUTE: c_int = 4;
const PRIVATE_ANONYMOUS: c_int = 0x22;
const FIXED: c_int = 0x10;

unsafe extern "C" {
    fn sched_setaffinity(pid: c_int, size: usize, mask: *const u64) -> c_int;
    fn sched_getcpu() -> c_int;
    fn mmap(
        address: *mut c_void,
        length: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: c_long,
    ) -> *mut c_void;
    fn mprotect(address: *mut c_void, length: usize, prot: c_int) -> c_int;
    fn munmap(address: *mut c_void, length: usize) -> c_int;
    fn read(descriptor: c_int, to: *mut c_void, length: usize) -> isize;
}

/// Keeps the calling thread on one processor.
pub(crate) fn stay_on(cpu: usize) {
    let mut mask = [0_u64; 16];
    mask[cpu / 64] = 1 << (cpu % 64);
    // SAFETY: the mask is as long as is said.
    let result = unsafe { sched_setaffinity(0, size_of_val(&mask), mask.as_ptr()) };
    assert_eq!(result, 0, "sched_setaffinity to processor {cpu}");
}

pub(crate) fn current_cpu() -> usize {
    // SAFETY: no arguments.
    let cpu = unsafe { sched_getcpu() };
    usize::try_from(cpu).expect("a processor")
}

/// Pages of this process, unmapped when dropped.
pub(crate) struct Pages {
    base: *mut u8,
    length: usize,
}

// SAFETY: the address is all that is in it; accesses are the business of whoever makes them.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    pub(crate) fn new(count: usize, prot: c_int) -> Self {
        let length = count * 4096;
        // SAFETY: new pages wherever the kernel likes.
        let base = unsafe { mmap(std::ptr::null_mut(), length, prot, PRIVATE_ANONYMOUS, -1, 0) };
        assert_ne!(base.addr(), usize::MAX, "mmap");
        Self { base: base.cast(), length }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Puts fresh pages of zeros in the place of those here.
    pub(crate) fn replace(&self) {
        let flags = PRIVATE_ANONYMOUS | FIXED;
        // SAFETY: the pages are this value's own, and whoever accesses them does it atomically.
        let base = unsafe { mmap(self.base.cast(), self.length, READ | WRITE, flags, -1, 0) };
        assert_eq!(base.cast(), self.base, "mmap");
    }

    /// Lets the kernel copy eight bytes from a descriptor to the first page; whether it could write there.
    pub(crate) fn read_from(&self, descriptor: &impl AsRawFd) -> bool {
        // SAFETY: the pages are this value's own, and whoever accesses them does it atomically.
        let length = unsafe { read(descriptor.as_raw_fd(), self.base.cast(), 8) };
        assert!(length == 8 || length == -1, "{length} bytes");
        length == 8
    }

    pub(crate) fn protect(&self, prot: c_int) {
        // SAFETY: as above.
        assert_eq!(unsafe { mprotect(self.base.cast(), self.length, prot) }, 0, "mprotect");
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the pages are this value's own.
        unsafe { munmap(self.base.cast(), self.length) };
    }
}
