//! A disk in the monitor's memory: for ramdisks and tests.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vmm_memory::vm_memory::VolatileSlice;

use super::backend::Backend;

/// What is allocated, given back and locked at once.
const CHUNK: usize = 64 << 10;

type Bytes = Option<Box<[u8; CHUNK]>>;
type Chunk = RwLock<Bytes>;

/// A disk whose bytes are gone when it is dropped. Memory is taken as it is written, and given back by discards.
pub struct MemoryDisk {
    size: AtomicU64,
    /// Enough for the largest size. What lies beyond the size is zeros.
    chunks: Box<[Chunk]>,
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisk").field("size", &self.size).finish_non_exhaustive()
    }
}

fn read(chunk: &Chunk) -> RwLockReadGuard<'_, Bytes> {
    chunk.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(chunk: &Chunk) -> RwLockWriteGuard<'_, Bytes> {
    chunk.write().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryDisk {
    /// `size` bytes of zeros; a multiple of 512 for a block device.
    pub fn new(size: u64) -> Self {
        Self::with_room(size, size)
    }

    /// The same, which can become `largest` bytes large.
    pub fn with_room(size: u64, largest: u64) -> Self {
        let chunks = (0..size.max(largest).div_ceil(CHUNK as u64)).map(|_| Chunk::default()).collect();
        Self { size: AtomicU64::new(size), chunks }
    }

    /// Makes it larger, by zeros, or smaller. Tell the device by its [`BlockHandle`](super::BlockHandle), and [settle](super::BlockHandle::settle)
    /// before it becomes smaller: what a guest writes at the same moment beyond the new size it may find again when the disk becomes
    /// larger.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if it was not made with so much room.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        let room = (self.chunks.len() as u64).saturating_mul(CHUNK as u64);
        if size > room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.size.store(size, Ordering::SeqCst);
        self.zero(size, room, true);
        Ok(())
    }

    /// Reads `data.len()` bytes at `offset`, without a guest.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if there are not so many.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let len = data.len();
        whole(len, self.read_at(&[VolatileSlice::from(data)], offset)?)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if it ends before; what fits was written.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut data = data.to_vec();
        let len = data.len();
        whole(len, self.write_at(&[VolatileSlice::from(&mut *data)], offset, false)?)
    }

    /// Calls `f` for each run of bytes that `buffers` and one chunk have in common; how many bytes that were.
    fn each_run(
        &self,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
        f: impl Fn(&Chunk, usize, &VolatileSlice<'_>),
    ) -> usize {
        let size = self.size.load(Ordering::SeqCst);
        let mut done = 0;
        for buffer in buffers {
            let mut rest = *buffer;
            while !rest.is_empty() {
                let at = offset.saturating_add(done as u64);
                let left = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX);
                let len = rest.len().min(CHUNK - within(at)).min(left);
                let Some(chunk) = self.chunk_of(at).filter(|_| len > 0) else { return done };
                let Ok((run, behind)) = rest.split_at(len) else { return done };
                f(chunk, within(at), &run);
                (rest, done) = (behind, done + len);
            }
        }
        done
    }

    fn chunk_of(&self, at: u64) -> Option<&Chunk> {
        self.chunks.get(usize::try_from(at / CHUNK as u64).ok()?)
    }

    /// Makes the bytes from `offset` to `end` zeros; whole chunks are given back if `unmap`.
    fn zero(&self, offset: u64, end: u64, unmap: bool) {
        let mut at = offset;
        while at < end {
            let next = (at - at % CHUNK as u64).saturating_add(CHUNK as u64).min(end);
            let Some(chunk) = self.chunk_of(at) else { break };
            let mut chunk = write(chunk);
            if unmap && next - at == CHUNK as u64 {
                *chunk = None;
            } else if let Some(bytes) = chunk.as_deref_mut()
                && let Some(bytes) = bytes.get_mut(within(at)..)
                && let Some(bytes) = bytes.get_mut(..usize::try_from(next - at).unwrap_or(0))
            {
                bytes.fill(0);
            }
            at = next;
        }
    }
}

fn whole(wanted: usize, got: usize) -> io::Result<()> {
    if got == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Where in its chunk a byte is.
fn within(at: u64) -> usize {
    // Less than CHUNK.
    usize::try_from(at % CHUNK as u64).unwrap_or(0)
}

impl Backend for MemoryDisk {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size.load(Ordering::SeqCst))
    }

    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        Ok(self.each_run(buffers, offset, |chunk, at, buffer| {
            static ZEROS: [u8; CHUNK] = [0; CHUNK];
            let chunk = read(chunk);
            let bytes = chunk.as_deref().unwrap_or(&ZEROS);
            buffer.copy_from(bytes.get(at..at + buffer.len()).unwrap_or_default());
        }))
    }

    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, _durable: bool) -> io::Result<usize> {
        Ok(self.each_run(buffers, offset, |chunk, at, buffer| {
            let mut chunk = write(chunk);
            let bytes = chunk.get_or_insert_with(zeros);
            buffer.copy_to(bytes.get_mut(at..at + buffer.len()).unwrap_or_default());
        }))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let size = self.size.load(Ordering::SeqCst);
        let end = offset.checked_add(len).filter(|end| *end <= size).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.zero(offset, end, unmap);
        Ok(())
    }
}

fn zeros() -> Box<[u8; CHUNK]> {
    // On the heap at once, and of zero pages.
    vec![0; CHUNK].into_boxed_slice().try_into().unwrap_or_else(|_| Box::new([0; CHUNK]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_and_what_was_never_written_is_zero() {
        let disk = MemoryDisk::new(3 * CHUNK as u64);
        let at = CHUNK as u64 - 3;
        disk.write(at, b"abcdef").unwrap();
        let mut bytes = [9; 8];
        disk.read(at - 1, &mut bytes).unwrap();
        assert_eq!(bytes, *b"\0abcdef\0");
        assert!(disk.read(3 * CHUNK as u64 - 7, &mut bytes).is_err());
        assert!(disk.write(u64::MAX, b"a").is_err());
        disk.write_zeroes(at + 1, 4, true).unwrap();
        disk.read(at - 1, &mut bytes).unwrap();
        assert_eq!(bytes, *b"\0a\0\0\0\0f\0");
        assert!(disk.discard(at, 3 * CHUNK as u64).is_err());
    }

    #[test]
    fn discards_give_memory_back() {
        let disk = MemoryDisk::new(4 * CHUNK as u64);
        let allocated = || disk.chunks.iter().filter(|chunk| read(chunk).is_some()).count();
        disk.write(10, &vec![1; 3 * CHUNK]).unwrap();
        assert_eq!(allocated(), 4);
        disk.discard(10, 3 * CHUNK as u64).unwrap();
        assert_eq!(allocated(), 2);
        disk.write_zeroes(0, 4 * CHUNK as u64, false).unwrap();
        assert_eq!(allocated(), 2, "without leave to unmap it stays");
    }

    #[test]
    fn what_was_cut_off_does_not_come_back() {
        let disk = MemoryDisk::new(1024);
        disk.write(0, &[7; 1024]).unwrap();
        disk.set_size(512).unwrap();
        disk.set_size(1024).unwrap();
        assert!(disk.set_size(2 * CHUNK as u64).is_err());
        let mut bytes = [0; 1024];
        disk.read(0, &mut bytes).unwrap();
        assert_eq!((bytes[511], bytes[512]), (7, 0));
    }
}
