//! RAM that comes out of the file as it is touched.
//!
//! A thread gives what somebody waits for, a chunk at a time, and in between, one after the other, what nobody has asked for yet. When all is
//! there, it ends, and the memory is like any other.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::chunk::{CHUNK, PAGE_BYTES, pages_of, runs};
use super::image::{Buffers, Image};
use super::load::forget_dirty;
use crate::region::{host_page_size, is_read_only};
use crate::snapshot::error::SnapshotError;
use crate::snapshot::ram::userfault::{REQUESTS, UserFaults};
use crate::snapshot::reader::Snapshot;
use crate::{GuestRam, PAGE_SIZE};

/// RAM that is still coming out of a snapshot: see [`Snapshot::load_ram_lazily`](crate::snapshot::Snapshot::load_ram_lazily).
///
/// Dropping it stops that. Pages that have not come by then are zero, so nobody may use the memory afterwards unless it
/// [is complete](Self::is_complete).
#[derive(Debug)]
pub struct LazyRam {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: OwnedFd,
    complete: AtomicBool,
    /// Bytes that are there.
    done: AtomicU64,
    failure: Mutex<Option<SnapshotError>>,
}

impl LazyRam {
    /// Requests of ioctl(2) that its thread makes, for filters of system calls; it also calls `read` and `ppoll`.
    pub const REQUESTS: [u32; 2] = REQUESTS;

    /// Whether all of RAM is there.
    pub fn is_complete(&self) -> bool {
        self.shared.complete.load(Ordering::Acquire)
    }

    /// Bytes of RAM that are there.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// What keeps the rest from coming, once. Whoever touches it waits for good, so the machine has to be ended.
    pub fn failure(&self) -> Option<SnapshotError> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        // An eventfd takes that, and nothing else writes to it.
        let (Ok(_) | Err(_)) = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It tells of a panic itself.
            let (Ok(()) | Err(_)) = thread.join();
        }
    }
}

/// What the thread works with.
struct Giver {
    snapshot: Arc<Snapshot>,
    faults: UserFaults,
    shared: Arc<Shared>,
    /// The number of the first chunk of each region.
    first: Vec<usize>,
    given: Vec<bool>,
    /// Where to look for one that was not given.
    next: usize,
    buffers: Buffers,
}

impl Image {
    /// See [`Snapshot::load_ram_lazily`](crate::snapshot::Snapshot::load_ram_lazily).
    pub(crate) fn load_lazily(
        snapshot: &Arc<Snapshot>,
        ram: &GuestRam,
        failed: Box<dyn FnOnce(&SnapshotError) + Send>,
    ) -> Result<LazyRam, SnapshotError> {
        let image = snapshot.image()?;
        let layout = |problem| SnapshotError::Layout { path: snapshot.path().to_owned(), problem };
        if let Some(problem) = image.layout.differs(ram) {
            return Err(layout(problem));
        }
        let host = |operation| move |source| SnapshotError::Host { operation, source };
        let mut faults = UserFaults::new().map_err(host("userfaultfd(2)"))?;
        let (mut first, mut before) = (Vec::new(), 0);
        for region in ram.regions() {
            use vm_memory::GuestMemoryRegion as _;
            let gpa = region.start_addr();
            if is_read_only(&region) || region.file_offset().is_some() || host_page_size(&region) != PAGE_SIZE
            {
                let problem = format!(
                    "RAM at {:#x} cannot be filled as it is touched: that takes anonymous memory of small pages",
                    gpa.0
                );
                return Err(layout(problem));
            }
            // What was there would not be missing.
            ram.discard(gpa, region.len())?;
            forget_dirty(&region);
            faults.add(&region).map_err(host("UFFDIO_REGISTER"))?;
            first.push(before);
            before += usize::try_from(region.len().div_ceil(CHUNK)).unwrap_or(usize::MAX);
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            stop: stop.map_err(|error| host("eventfd(2)")(error.into()))?,
            complete: AtomicBool::new(false),
            done: AtomicU64::new(0),
            failure: Mutex::new(None),
        });
        let giver = Giver {
            snapshot: Arc::clone(snapshot),
            faults,
            shared: Arc::clone(&shared),
            first,
            given: vec![false; image.places.len()],
            next: 0,
            buffers: Buffers::default(),
        };
        let thread = std::thread::Builder::new().name("lazy RAM".to_owned()).spawn(move || giver.run(failed));
        let thread = Some(thread.map_err(host("starting a thread"))?);
        Ok(LazyRam { shared, thread })
    }
}

impl Giver {
    fn run(mut self, failed: Box<dyn FnOnce(&SnapshotError) + Send>) {
        match self.give_all() {
            Ok(true) => self.shared.complete.store(true, Ordering::Release),
            Ok(false) => {}
            Err(error) => {
                failed(&error);
                *self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Nobody finds zero where something else should be, as long as the memory is in use.
                let (Ok(_) | Err(_)) = self.wait(true);
            }
        }
    }

    /// Whether all has been given, and nobody has stopped it before.
    fn give_all(&mut self) -> Result<bool, SnapshotError> {
        loop {
            let missing = self.given.get(self.next..).unwrap_or_default().iter().position(|given| !given);
            let Some(missing) = missing else { return Ok(true) };
            self.next += missing;
            if self.wait(false).map_err(|source| SnapshotError::Host { operation: "poll(2)", source })? {
                return Ok(false);
            }
            let read = self.faults.next();
            match read.map_err(|source| SnapshotError::Host { operation: "reading a user fault", source })? {
                Some((region, offset)) => self.serve(region, offset)?,
                None => self.give(self.next)?,
            }
        }
    }

    /// Whether it is to stop; with `for_good` waits for that.
    fn wait(&self, for_good: bool) -> io::Result<bool> {
        let mut descriptors = [PollFd::from_borrowed_fd(self.shared.stop.as_fd(), PollFlags::IN)];
        let timeout = (!for_good).then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        loop {
            match poll(&mut descriptors, timeout.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives what somebody waits for. A page that was given and is missing again was given back to the host since, and is zero.
    fn serve(&mut self, region: usize, offset: u64) -> Result<(), SnapshotError> {
        let chunk = self.first.get(region).map(|first| first + usize::try_from(offset / CHUNK).unwrap_or(0));
        let Some(chunk) = chunk else { return Ok(()) };
        if self.given.get(chunk) == Some(&false) {
            return self.give(chunk);
        }
        let page = offset / PAGE_SIZE * PAGE_SIZE;
        self.pages(region, page, PAGE_SIZE, None)
    }

    fn give(&mut self, number: usize) -> Result<(), SnapshotError> {
        let snapshot = Arc::clone(&self.snapshot);
        let image = snapshot.image()?;
        let Some(place) = image.places.get(number) else { return Ok(()) };
        let mut chunk = self.buffers.take();
        let pages = pages_of(place.size);
        let mut give = || {
            let occupied = image.fill(&snapshot, number, pages, &mut chunk, &mut self.buffers)?;
            for run in runs(occupied) {
                let bytes = chunk.get(run.clone()).unwrap_or_default();
                let offset = place.offset + run.start as u64;
                self.pages(place.region, offset, bytes.len() as u64, Some(bytes))?;
            }
            for run in runs(pages & !occupied) {
                self.pages(place.region, place.offset + run.start as u64, run.len() as u64, None)?;
            }
            Ok(())
        };
        let done = give();
        self.buffers.put(chunk);
        if let Some(given) = self.given.get_mut(number) {
            *given = true;
        }
        self.shared.done.fetch_add(place.size, Ordering::Relaxed);
        done
    }

    /// Gives pages with these contents, or zero, but for those that are there.
    fn pages(
        &self,
        region: usize,
        offset: u64,
        len: u64,
        contents: Option<&[u8]>,
    ) -> Result<(), SnapshotError> {
        let mut at = 0;
        while at < len {
            let given = match contents {
                Some(bytes) => {
                    let from = usize::try_from(at).unwrap_or(usize::MAX);
                    self.faults.give(region, offset + at, bytes.get(from..).unwrap_or_default())
                }
                None => self.faults.give_zero(region, offset + at, len - at),
            };
            match given {
                Ok(given) => at += given,
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => at += PAGE_BYTES as u64,
                Err(source) => return Err(SnapshotError::Host { operation: "giving a page", source }),
            }
        }
        Ok(())
    }
}
