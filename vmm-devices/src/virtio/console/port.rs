//! A port: input that waits for the guest, the writer that output goes to, and the monitor's handle on both.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::GuestMemory;

use super::config::{PortConfig, PortEvent, PortEvents, WhenFull};
use super::shared::Shared;
use crate::interrupt::lock;
use crate::virtio::queue::Chain;

/// Bytes that went through a port since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortCounters {
    /// Output that the writer took.
    pub output: u64,
    /// Output that nobody took: the port was closed, its writer had failed or was full ([`WhenFull::Discard`]), the buffer was
    /// not in RAM, or the guest reset the device before the writer took it.
    pub output_discarded: u64,
    /// Input that the guest has.
    pub input: u64,
    /// Input that was taken and then given up by [`Port::discard_input`], or because the port was removed.
    pub input_discarded: u64,
}

/// The port itself, which its place in the device and the handles share.
pub(super) struct PortCore {
    pub(super) id: u32,
    pub(super) console: bool,
    pub(super) name: Option<String>,
    when_full: WhenFull,
    input: Mutex<Input>,
    output: Mutex<Output>,
    /// Changed with the place of the port locked.
    pub(super) open: AtomicBool,
    pub(super) guest_open: AtomicBool,
    counters: Counters,
    events: Option<Arc<dyn PortEvents>>,
}

#[derive(Default)]
struct Counters {
    output: AtomicU64,
    output_discarded: AtomicU64,
    input: AtomicU64,
    input_discarded: AtomicU64,
}

/// Input that the guest has not got yet.
struct Input {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// Somebody was told that there is no room.
    refused: bool,
    /// The port was removed: nobody will ever get it.
    removed: bool,
}

struct Output {
    /// None once the port is removed.
    writer: Option<Box<dyn Write + Send>>,
    /// It holds something back, maybe.
    flushed: bool,
    failed: bool,
}

/// What a writer did with output.
pub(super) enum Taken {
    /// It took that much, which may be nothing: try again.
    Bytes(usize),
    /// Nothing, until somebody says that it would.
    Later,
    /// Nothing, and it is to be forgotten.
    Never,
}

impl PortCore {
    pub(super) fn new(id: u32, config: PortConfig) -> Self {
        let PortConfig { console, name, output, when_full, input_capacity, size: _, open, events } = config;
        Self {
            id,
            console,
            name,
            when_full,
            input: Mutex::new(Input {
                bytes: VecDeque::new(),
                capacity: input_capacity,
                refused: false,
                removed: false,
            }),
            output: Mutex::new(Output { writer: Some(output), flushed: true, failed: false }),
            open: AtomicBool::new(open),
            guest_open: AtomicBool::new(false),
            counters: Counters::default(),
            events,
        }
    }

    pub(super) fn tell(&self, event: PortEvent<'_>) {
        if let Some(events) = &self.events {
            events.event(event);
        }
    }

    /// Tells that the guest opened the port or closed it.
    pub(super) fn tell_guest_open(&self, open: bool) {
        self.tell(if open { PortEvent::GuestOpened } else { PortEvent::GuestClosed });
    }

    /// Whether the guest is to get something.
    pub(super) fn has_input(&self) -> bool {
        self.guest_open.load(Ordering::SeqCst) && !lock(&self.input).bytes.is_empty()
    }

    fn enqueue(&self, data: &[u8]) -> usize {
        let mut input = lock(&self.input);
        if input.removed || !self.open.load(Ordering::SeqCst) {
            return 0;
        }
        let (capacity, len) = (input.capacity, input.bytes.len());
        let (taken, rest) = data.split_at(data.len().min(capacity.saturating_sub(len)));
        if !taken.is_empty() && input.bytes.capacity() < capacity {
            // Once, and no more than was agreed upon.
            input.bytes.reserve_exact(capacity - len);
        }
        input.bytes.extend(taken);
        input.refused |= !rest.is_empty();
        taken.len()
    }

    /// Moves input into the guest's buffer; how many bytes. `None` if there is none any more.
    pub(super) fn deliver<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>) -> Option<usize> {
        let mut input = lock(&self.input);
        if input.bytes.is_empty() {
            return None;
        }
        let (front, back) = input.bytes.as_slices();
        let mut written = chain.write_some(0, front);
        if written == front.len() {
            written += chain.write_some(written as u64, back);
        }
        input.bytes.drain(..written);
        self.counters.input.fetch_add(written as u64, Ordering::Relaxed);
        self.tell_of_room(input);
        Some(written)
    }

    /// Input that the guest has not got.
    pub(super) fn waiting_input(&self) -> Vec<u8> {
        lock(&self.input).bytes.iter().copied().collect()
    }

    /// How many bytes may wait.
    pub(super) fn input_capacity(&self) -> usize {
        lock(&self.input).capacity
    }

    /// What waited elsewhere comes before what was taken here.
    pub(super) fn put_input_back(&self, bytes: &[u8]) {
        let mut input = lock(&self.input);
        for byte in bytes.iter().rev() {
            input.bytes.push_front(*byte);
        }
    }

    fn discard_input(&self) -> usize {
        let mut input = lock(&self.input);
        let discarded = input.bytes.len();
        input.bytes.clear();
        self.counters.input_discarded.fetch_add(discarded as u64, Ordering::Relaxed);
        self.tell_of_room(input);
        discarded
    }

    fn tell_of_room(&self, mut input: std::sync::MutexGuard<'_, Input>) {
        let room = !input.removed && input.bytes.len() <= input.capacity / 2;
        let wanted = room && std::mem::take(&mut input.refused);
        drop(input);
        if wanted {
            self.tell(PortEvent::InputRoom);
        }
    }

    /// The port is part of no device any more, and its writer is dropped, though handles may stay for long.
    pub(super) fn remove(&self) {
        lock(&self.input).removed = true;
        self.discard_input();
        self.guest_open.store(false, Ordering::SeqCst);
        let old = lock(&self.output).writer.take();
        // Its destructor may do anything.
        drop(old);
    }

    /// Puts another writer in the place of the one that is there; whether the port is there as well.
    fn replace_output(&self, writer: Box<dyn Write + Send>) -> bool {
        let mut output = lock(&self.output);
        if output.writer.is_none() {
            return false;
        }
        let old =
            std::mem::replace(&mut *output, Output { writer: Some(writer), flushed: true, failed: false });
        drop(output);
        // As above.
        drop(old);
        true
    }

    /// Gives output to the writer.
    pub(super) fn output(&self, data: &[u8]) -> Taken {
        if !self.open.load(Ordering::SeqCst) {
            return Taken::Never;
        }
        let mut output = lock(&self.output);
        let Output { writer: Some(writer), failed: false, flushed } = &mut *output else {
            return Taken::Never;
        };
        let error = match writer.write(data) {
            Ok(0) if !data.is_empty() => io::ErrorKind::WriteZero.into(),
            Ok(taken) => {
                *flushed = false;
                let taken = taken.min(data.len());
                self.counters.output.fetch_add(taken as u64, Ordering::Relaxed);
                return Taken::Bytes(taken);
            }
            Err(error) => match (error.kind(), self.when_full) {
                (io::ErrorKind::Interrupted, _) => return Taken::Bytes(0),
                (io::ErrorKind::WouldBlock, WhenFull::Wait) => return Taken::Later,
                (io::ErrorKind::WouldBlock, WhenFull::Discard) => return Taken::Never,
                _ => error,
            },
        };
        output.failed = true;
        drop(output);
        self.tell(PortEvent::OutputFailed(&error));
        // Maybe there is another one by now.
        Taken::Bytes(0)
    }

    /// Output has come to a pause.
    pub(super) fn flush(&self) {
        let mut output = lock(&self.output);
        let Output { writer: Some(writer), failed: false, flushed: flushed @ false } = &mut *output else {
            return;
        };
        match writer.flush() {
            Ok(()) => *flushed = true,
            // At the next pause, or when the monitor says so.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                output.failed = true;
                drop(output);
                self.tell(PortEvent::OutputFailed(&error));
            }
        }
    }

    pub(super) fn discarded_output(&self, bytes: u64) {
        self.counters.output_discarded.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A character that waits for nothing (`emerg_wr`, 5.3.4).
    pub(super) fn emergency(&self, byte: u8) {
        // Again for a call that was interrupted, or a writer that was replaced.
        for _ in 0..4 {
            match self.output(&[byte]) {
                Taken::Bytes(0) => {}
                Taken::Bytes(_) => return self.flush(),
                Taken::Later | Taken::Never => break,
            }
        }
        self.discarded_output(1);
    }
}

/// The monitor's side of a port. Clones are the same port; any thread may use them.
///
/// It outlives the port and the device: then nothing is taken, and nothing happens.
#[derive(Clone)]
pub struct Port {
    pub(super) core: Arc<PortCore>,
    pub(super) shared: Arc<Shared>,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("id", &self.core.id)
            .field("name", &self.core.name)
            .finish_non_exhaustive()
    }
}

impl Port {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.core.id
    }

    /// Input for the guest, and how many bytes of it were taken: as many as there is room for. The rest stays with the
    /// caller, who hears of [`PortEvent::InputRoom`] when it is time to come again.
    ///
    /// What was taken arrives once, in order. It waits for a guest that is not there yet, that is reset, or that has not
    /// opened the port. A port that is closed or removed takes nothing.
    pub fn enqueue(&self, data: &[u8]) -> usize {
        let taken = self.core.enqueue(data);
        if taken > 0 {
            self.shared.ring_input(self.core.id);
        }
        taken
    }

    /// How many bytes of input would be taken now, the port being open.
    pub fn room(&self) -> usize {
        let input = lock(&self.core.input);
        if input.removed { 0 } else { input.capacity.saturating_sub(input.bytes.len()) }
    }

    /// Forgets the input that the guest has not got; how many bytes.
    pub fn discard_input(&self) -> usize {
        self.core.discard_input()
    }

    /// The writer may take output again, after it said [`io::ErrorKind::WouldBlock`]. Once too often does no harm.
    pub fn resume(&self) {
        self.shared.ring_output(self.core.id);
    }

    /// Output goes there from now on, also after the writer has failed; the old one is dropped. Waits for a writer that
    /// blocks. Once the port is removed, this one is dropped at once.
    pub fn replace_output(&self, writer: impl Write + Send + 'static) {
        if self.core.replace_output(Box::new(writer)) {
            self.resume();
        }
    }

    /// Opens this side of the port. With multiport the guest is told.
    pub fn open(&self) {
        self.shared.set_open(&self.core, true);
    }

    /// Closes this side of the port: output is discarded, and counted; input is not taken, though what was taken before is
    /// delivered. With multiport the guest is told, even where the port is opened again at once.
    pub fn close(&self) {
        self.shared.set_open(&self.core, false);
    }

    /// Whether this side is open.
    pub fn is_open(&self) -> bool {
        self.core.open.load(Ordering::SeqCst)
    }

    /// Whether the guest's side is: somebody has opened it, or, without multiport, there is a driver.
    pub fn is_guest_open(&self) -> bool {
        self.core.guest_open.load(Ordering::SeqCst)
    }

    /// The terminal has this size from now on, in characters. Port 0 has it in the configuration (VIRTIO_CONSOLE_F_SIZE); with
    /// multiport every console is told by a message.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.shared.resize(&self.core, (columns, rows));
    }

    /// What went through it.
    pub fn counters(&self) -> PortCounters {
        let c = &self.core.counters;
        PortCounters {
            output: c.output.load(Ordering::Relaxed),
            output_discarded: c.output_discarded.load(Ordering::Relaxed),
            input: c.input.load(Ordering::Relaxed),
            input_discarded: c.input_discarded.load(Ordering::Relaxed),
        }
    }
}
