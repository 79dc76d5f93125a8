//! A disk that does as it is told.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vmm_memory::vm_memory::VolatileSlice;

use crate::interrupt::lock;
use crate::virtio::block::{Backend, MemoryDisk, Operation};

/// A disk in memory that remembers what it was asked for, and fails, waits, or comes back short as a test wants. Clones are the
/// same disk.
///
/// ```
/// use std::io::ErrorKind;
/// use std::sync::Arc;
/// use vmm_devices::testkit::FaultyDisk;
/// use vmm_devices::virtio::Block;
///
/// let disk = FaultyDisk::new(1 << 20);
/// let device = Block::builder(Arc::new(disk.clone())).build()?;
/// disk.fail(Some(ErrorKind::StorageFull));
/// // What a driver asks for now fails, and `disk.take_calls()` says what that was.
/// # drop(device);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct FaultyDisk(Arc<Inner>);

struct Inner {
    contents: MemoryDisk,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calls: Vec<DiskCall>,
    failure: Option<io::ErrorKind>,
    most: Option<usize>,
    size: Option<u64>,
    /// Whether the next call is interrupted, if every other one is.
    interrupted: Option<bool>,
    blocked: bool,
    waiting: usize,
    during: Option<Box<dyn FnOnce() + Send>>,
}

/// What a disk was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskCall {
    /// To do what.
    pub operation: Operation,
    /// Bytes of the buffers that came with it.
    pub bytes: usize,
}

impl fmt::Display for DiskCall {
    /// One word or two, then position and length in bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes;
        match self.operation {
            Operation::Read { offset } => write!(f, "read {offset} {bytes}"),
            Operation::Write { offset, durable: false } => write!(f, "write {offset} {bytes}"),
            Operation::Write { offset, durable: true } => write!(f, "write durably {offset} {bytes}"),
            Operation::Flush => f.write_str("flush"),
            Operation::Discard { offset, len } => write!(f, "discard {offset} {len}"),
            Operation::WriteZeroes { offset, len, unmap, .. } => write!(f, "zero {offset} {len} {unmap}"),
        }
    }
}

impl fmt::Debug for FaultyDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyDisk").field("contents", &self.0.contents).finish_non_exhaustive()
    }
}

impl FaultyDisk {
    /// `size` bytes of zeros, that work until told otherwise.
    pub fn new(size: u64) -> Self {
        Self::with_room(size, size)
    }

    /// The same, which can become `largest` bytes large.
    pub fn with_room(size: u64, largest: u64) -> Self {
        let contents = MemoryDisk::with_room(size, largest);
        Self(Arc::new(Inner { contents, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// What it holds, which is there whatever its calls do.
    pub fn contents(&self) -> &MemoryDisk {
        &self.0.contents
    }

    /// What it was asked for since the last call, questions for its size aside.
    pub fn take_calls(&self) -> Vec<DiskCall> {
        std::mem::take(&mut lock(&self.0.state).calls)
    }

    /// Whether calls fail, and how.
    pub fn fail(&self, failure: Option<io::ErrorKind>) {
        lock(&self.0.state).failure = failure;
    }

    /// Whether a call moves at most so many bytes; with 0 the disk ends before it should.
    pub fn shorten(&self, most: Option<usize>) {
        lock(&self.0.state).most = most;
    }

    /// Whether every other call is interrupted, the next one first.
    pub fn interrupt(&self, interrupted: bool) {
        lock(&self.0.state).interrupted = interrupted.then_some(true);
    }

    /// Whether it says another size than it has.
    pub fn claim_size(&self, size: Option<u64>) {
        lock(&self.0.state).size = size;
    }

    /// What happens in the middle of the next call.
    pub fn during(&self, what: impl FnOnce() + Send + 'static) {
        lock(&self.0.state).during = Some(Box::new(what));
    }

    /// Calls wait, until what this returns is dropped: by a test that fails, too.
    pub fn block(&self) -> BlockedDisk {
        lock(&self.0.state).blocked = true;
        BlockedDisk(self.clone())
    }

    /// Returns when at least so many calls wait.
    pub fn await_blocked(&self, calls: usize) {
        let mut state = lock(&self.0.state);
        while state.waiting < calls {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes a call down; how many bytes it may move.
    fn enter(&self, operation: Operation, bytes: usize) -> io::Result<usize> {
        let mut state = lock(&self.0.state);
        state.calls.push(DiskCall { operation, bytes });
        state.waiting += 1;
        self.0.changed.notify_all();
        while state.blocked {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if let Some(during) = state.during.take() {
            drop(state);
            during();
            state = lock(&self.0.state);
        }
        if let Some(interrupted) = &mut state.interrupted {
            let now = *interrupted;
            *interrupted = !now;
            if now {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        match state.failure {
            Some(failure) => Err(failure.into()),
            None => Ok(state.most.unwrap_or(usize::MAX)),
        }
    }
}

/// A [`FaultyDisk`] whose calls wait as long as this is there.
#[derive(Debug)]
#[must_use]
pub struct BlockedDisk(FaultyDisk);

impl Drop for BlockedDisk {
    fn drop(&mut self) {
        lock(&self.0.0.state).blocked = false;
        self.0.0.changed.notify_all();
    }
}

fn total(buffers: &[VolatileSlice<'_>]) -> usize {
    buffers.iter().map(VolatileSlice::len).sum()
}

/// The first `len` bytes.
fn cut<'a>(buffers: &[VolatileSlice<'a>], mut len: usize) -> Vec<VolatileSlice<'a>> {
    let mut parts = Vec::new();
    for buffer in buffers {
        let part = len.min(buffer.len());
        // Within its length, so there is no error.
        parts.extend(buffer.subslice(0, part));
        len -= part;
    }
    parts
}

impl Backend for FaultyDisk {
    fn size(&self) -> io::Result<u64> {
        let claimed = lock(&self.0.state).size;
        claimed.map_or_else(|| self.0.contents.size(), Ok)
    }

    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        let most = self.enter(Operation::Read { offset }, total(buffers))?;
        self.0.contents.read_at(&cut(buffers, most), offset)
    }

    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
        let most = self.enter(Operation::Write { offset, durable }, total(buffers))?;
        self.0.contents.write_at(&cut(buffers, most), offset, durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.enter(Operation::Flush, 0).map(drop)
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter(Operation::Discard { offset, len }, 0)?;
        self.0.contents.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.enter(Operation::WriteZeroes { offset, len, unmap, durable: false }, 0)?;
        self.0.contents.write_zeroes(offset, len, unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &FaultyDisk, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        disk.write_at(&[VolatileSlice::from(bytes)], offset, false)
    }

    #[test]
    fn it_does_as_it_is_told() {
        let disk = FaultyDisk::with_room(4096, 8192);
        assert_eq!(write(&disk, 0, &mut [1; 512]).unwrap(), 512);
        disk.shorten(Some(100));
        assert_eq!(write(&disk, 512, &mut [2; 512]).unwrap(), 100);
        disk.interrupt(true);
        assert_eq!(write(&disk, 0, &mut [3; 512]).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert_eq!(write(&disk, 0, &mut [3; 512]).unwrap(), 100);
        disk.interrupt(false);
        disk.fail(Some(io::ErrorKind::StorageFull));
        assert_eq!(disk.discard(0, 512).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.fail(None);
        disk.write_zeroes(0, 512, true).unwrap();
        let calls: Vec<_> = disk.take_calls().iter().map(ToString::to_string).collect();
        let written = ["write 0 512", "write 512 512", "write 0 512", "write 0 512"];
        assert_eq!(calls[..4], written);
        assert_eq!(calls[4..], ["discard 0 512", "flush", "zero 0 512 true"]);
        let mut bytes = [9; 613];
        disk.contents().read(0, &mut bytes).unwrap();
        assert!(bytes[..512] == [0; 512] && bytes[512..612] == [2; 100] && bytes[612] == 0);
        let (told, other) = (Arc::new(Mutex::new(0)), disk.clone());
        let tell = Arc::clone(&told);
        disk.during(move || *lock(&tell) += other.take_calls().len());
        disk.flush().unwrap();
        disk.flush().unwrap();
        assert_eq!((*lock(&told), disk.take_calls().len()), (1, 1), "once, when the call is noted down");
        disk.claim_size(Some(1));
        assert_eq!((disk.size().unwrap(), disk.contents().size().unwrap()), (1, 4096));
        assert!(disk.take_calls().is_empty());
    }

    #[test]
    fn calls_wait_as_long_as_it_is_blocked() {
        let disk = FaultyDisk::new(4096);
        let blocked = disk.block();
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| disk.flush());
            disk.await_blocked(1);
            assert!(!flush.is_finished());
            drop(blocked);
            flush.join().unwrap().unwrap();
        });
    }
}
