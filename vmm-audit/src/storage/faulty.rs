//! Storage that fails when it is told to (feature `testkit`): a full disk, a failed or endless synchronisation, the end of the
//! process at any operation.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::{Listed, Storage, StorageFile};

#[derive(Debug, Default)]
struct Orders {
    /// Bytes that still fit.
    room: Option<u64>,
    sync_fails: bool,
    stalled: bool,
    sync_delay: Duration,
    /// Operations until all fail.
    left: Option<u64>,
    operations: u64,
}

/// Tells a [`FaultyStorage`] how to fail. Its clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<(Mutex<Orders>, Condvar)>);

impl Faults {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk takes `bytes` more, and then `ENOSPC`; with `None` it has room again.
    pub fn disk_has_room_for(&self, bytes: Option<u64>) {
        self.orders().room = bytes;
    }

    /// Synchronisation fails with `EIO`, or works again.
    pub fn sync_fails(&self, fails: bool) {
        self.orders().sync_fails = fails;
    }

    /// Synchronisation does not return until this is called with `false`.
    pub fn stall(&self, stalled: bool) {
        self.orders().stalled = stalled;
        self.0.1.notify_all();
    }

    /// Synchronisation takes this long.
    pub fn sync_takes(&self, delay: Duration) {
        self.orders().sync_delay = delay;
    }

    /// After `operations` more that change something, all fail with `EIO`, as if the machine had gone.
    pub fn dies_after(&self, operations: Option<u64>) {
        self.orders().left = operations;
    }

    /// How many operations that change something there have been.
    pub fn operations(&self) -> u64 {
        self.orders().operations
    }

    fn step(&self) -> io::Result<()> {
        let mut orders = self.orders();
        orders.operations += 1;
        match &mut orders.left {
            Some(0) => Err(Errno::IO.into()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// How many of `bytes` still fit.
    fn take(&self, bytes: usize) -> usize {
        let mut orders = self.orders();
        let Some(room) = &mut orders.room else { return bytes };
        let fits = usize::try_from(*room).unwrap_or(usize::MAX).min(bytes);
        *room -= fits as u64;
        fits
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        let mut orders = self.orders();
        while orders.stalled {
            orders = self.0.1.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
        let (delay, fails) = (orders.sync_delay, orders.sync_fails);
        drop(orders);
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        if fails { Err(Errno::IO.into()) } else { Ok(()) }
    }
}

/// Another storage, and [`Faults`] in between.
pub struct FaultyStorage<S> {
    inner: S,
    faults: Faults,
}

impl<S: Storage> FaultyStorage<S> {
    /// `inner`, which fails as the faults say.
    pub fn new(inner: S) -> (Self, Faults) {
        let faults = Faults::default();
        (Self { inner, faults: faults.clone() }, faults)
    }
}

struct FaultyFile {
    inner: Box<dyn StorageFile>,
    faults: Faults,
}

impl StorageFile for FaultyFile {
    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.faults.step()?;
        let fits = self.faults.take(bytes.len());
        self.inner.append(bytes.get(..fits).unwrap_or_default())?;
        if fits < bytes.len() { Err(Errno::NOSPC.into()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.faults.sync()?;
        self.inner.sync()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.faults.step()?;
        self.inner.truncate(length)
    }
}

impl<S: Storage> Storage for FaultyStorage<S> {
    fn create(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        self.faults.step()?;
        Ok(Box::new(FaultyFile { inner: self.inner.create(path)?, faults: self.faults.clone() }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(FaultyFile { inner: self.inner.open(path)?, faults: self.faults.clone() }))
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        self.inner.read(path, limit)
    }

    fn replace(&self, path: &str, bytes: &[u8], durable: bool) -> io::Result<()> {
        self.faults.step()?;
        if self.faults.take(bytes.len()) < bytes.len() {
            return Err(Errno::NOSPC.into());
        }
        if durable {
            self.faults.sync()?;
        }
        self.inner.replace(path, bytes, durable)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.faults.step()?;
        self.inner.remove(path)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        self.inner.list(folder)
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.sync()?;
        self.inner.sync()
    }

    fn lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        self.inner.lock()
    }
}
