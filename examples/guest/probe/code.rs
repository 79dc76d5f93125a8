//! Where the attempts' machine code lies.

use crate::system;

/// Pages below 2 GiB: what a 32-bit far pointer can name.
pub(crate) struct Code {
    pages: &'static mut [u8],
    used: usize,
}

impl Code {
    pub(crate) fn new() -> Self {
        Self { pages: system::low_pages(16), used: 0 }
    }

    /// Adds code, or data, aligned to 16 bytes, and returns its address.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> u64 {
        let start = self.used;
        self.pages[start..start + bytes.len()].copy_from_slice(bytes);
        self.used = (start + bytes.len()).next_multiple_of(16);
        self.pages[start..].as_ptr() as u64
    }

    /// UD2, in code of any size: whoever gets here has SIGILL at this address.
    pub(crate) fn landing(&mut self) -> u64 {
        self.add(&[0x0f, 0x0b])
    }
}
