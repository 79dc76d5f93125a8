//! The console: the `console_io` hypercall and the ring that a guest shares with its console back end (public/io/console.h).
//!
//! Threat model: the guest writes to the ring's indices at any time. Each is read once, and no more is believed than what
//! the ring can hold.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::abi::PAGE_SIZE;
use super::abi::errno::Errno;
use super::memory::DomainMemory;

const IN_SIZE: u32 = 1024;
const OUT_SIZE: u32 = 2048;
const OUT: u64 = 1024;
const IN_CONS: u64 = 3072;
const IN_PROD: u64 = 3076;
const OUT_CONS: u64 = 3080;
const OUT_PROD: u64 = 3084;

/// Input that waits for room in the ring; what comes on top is dropped, as a serial line does.
const QUEUE: usize = 64 << 10;

/// By which way a guest printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConsoleSource {
    /// The `console_io` hypercall, meant for the operator of the host: kernels print what they have to say early.
    Hypercall,
    /// The console's ring: the guest's terminal.
    Ring,
}

/// Where the guest's console goes.
pub trait ConsoleSink: fmt::Debug + Send {
    /// Takes what the guest printed, one to 4096 bytes at a time.
    fn write(&mut self, source: ConsoleSource, bytes: &[u8]);
}

/// Drops everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoConsole;

impl ConsoleSink for NoConsole {
    fn write(&mut self, _source: ConsoleSource, _bytes: &[u8]) {}
}

/// The console of one domain.
#[derive(Debug)]
pub(crate) struct Console {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    sink: Box<dyn ConsoleSink>,
    ring: Option<u64>,
    input: VecDeque<u8>,
}

impl Console {
    pub(crate) fn new(sink: Box<dyn ConsoleSink>) -> Self {
        Self { inner: Mutex::new(Inner { sink, ring: None, input: VecDeque::new() }) }
    }

    /// The frame that holds the ring from now on.
    pub(crate) fn set_ring(&self, frame: u64) {
        self.lock().ring = Some(frame);
    }

    /// What the guest wrote by hypercall.
    pub(crate) fn write(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.lock().sink.write(ConsoleSource::Hypercall, bytes);
        }
    }

    /// Takes input for a hypercall.
    pub(crate) fn read(&self, data: &mut [u8]) -> usize {
        let mut inner = self.lock();
        let count = inner.input.len().min(data.len());
        for (to, from) in data.iter_mut().zip(inner.input.drain(..count)) {
            *to = from;
        }
        count
    }

    /// Queues input for the guest.
    pub(crate) fn input(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let room = QUEUE.saturating_sub(inner.input.len());
        inner.input.extend(bytes.iter().take(room));
    }

    /// Moves what there is through the ring, both ways. Returns whether the guest should be told.
    pub(crate) fn service(&self, memory: &DomainMemory) -> Result<bool, Errno> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Some(frame) = inner.ring else { return Ok(false) };
        let page = frame * PAGE_SIZE;
        let took = inner.take_output(memory, page)?;
        let gave = inner.give_input(memory, page)?;
        Ok(took || gave)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn take_output(&mut self, memory: &DomainMemory, page: u64) -> Result<bool, Errno> {
        let consumed = memory.load_u32(page + OUT_CONS)?;
        let produced = memory.load_u32(page + OUT_PROD)?;
        let count = produced.wrapping_sub(consumed);
        if count == 0 {
            return Ok(false);
        }
        // More than the ring holds is nonsense: everything is taken as read, so that the guest goes on.
        if count <= OUT_SIZE {
            let mut ring = [0; OUT_SIZE as usize];
            memory.read(page + OUT, &mut ring)?;
            let start = (consumed % OUT_SIZE) as usize;
            let (tail, head) = ring.split_at(start);
            let first = head.get(..head.len().min(count as usize)).unwrap_or_default();
            let second = tail.get(..count as usize - first.len()).unwrap_or_default();
            for part in [first, second] {
                if !part.is_empty() {
                    self.sink.write(ConsoleSource::Ring, part);
                }
            }
        }
        memory.store_u32(page + OUT_CONS, produced)?;
        Ok(true)
    }

    fn give_input(&mut self, memory: &DomainMemory, page: u64) -> Result<bool, Errno> {
        if self.input.is_empty() {
            return Ok(false);
        }
        let consumed = memory.load_u32(page + IN_CONS)?;
        let mut produced = memory.load_u32(page + IN_PROD)?;
        let used = produced.wrapping_sub(consumed);
        let room = IN_SIZE.saturating_sub(used);
        let count = self.input.len().min(room as usize);
        if count == 0 {
            return Ok(false);
        }
        for byte in self.input.drain(..count) {
            memory.write(page + u64::from(produced % IN_SIZE), &[byte])?;
            produced = produced.wrapping_add(1);
        }
        memory.store_u32(page + IN_PROD, produced)?;
        Ok(true)
    }
}

#[cfg(feature = "snapshot")]
impl Console {
    /// The frame of the ring, and input that waits.
    pub(crate) fn save(&self) -> (Option<u64>, Vec<u8>) {
        let inner = self.lock();
        (inner.ring, inner.input.iter().copied().collect())
    }

    /// Takes over what was saved; `false` if it is more input than there can be.
    pub(crate) fn restore(&self, ring: Option<u64>, input: &[u8]) -> bool {
        let mut inner = self.lock();
        inner.ring = ring;
        inner.input.extend(input);
        input.len() <= QUEUE
    }
}
