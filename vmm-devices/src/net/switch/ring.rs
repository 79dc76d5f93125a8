//! A ring of frames: one side puts them in, the other takes them out, and either may be another process.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | how many bytes were put in so far; the producer's |
//! | 64 | how many were taken out; the consumer's |
//! | 128 | 1: the consumer sleeps, and is to be woken |
//! | 192 | 1: the producer waits for room, and is to be woken |
//! | 4096 on | the frames: length, virtio-net header, bytes, filled up to 16 bytes; they go on at the beginning where the end is reached |
//!
//! Words of 64 bits and the length are little-endian.
//!
//! # Threat model
//! The other side may be hostile and change all of the memory at any moment. Each side knows its own position and believes nobody
//! else's before it has looked whether there can be so much; a length is read once; what a frame holds is the reader's to distrust.
//! A side that breaks the rules ends the ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vmm_memory::vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

use super::error::SwitchError;
use crate::net::{HEADER, MAX_FRAME};

/// Bytes before the frames of a ring.
pub(super) const CONTROL: usize = 4096;

const PRODUCED: usize = 0;
const CONSUMED: usize = 64;
const ASLEEP: usize = 128;
const WAITS: usize = 192;

/// Bytes before each frame, and what its place is a multiple of.
const RECORD: usize = 4 + HEADER;
const RECORD_64: u64 = RECORD as u64;

/// The least that a ring can have room for, in bytes of frames: two of the longest.
pub(super) const LEAST: usize = 256 << 10;
/// The most.
pub(super) const MOST: usize = 64 << 20;

/// The ring is not one, or its other side has broken the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// A size that no ring has.
    #[error("a ring of {size} bytes; allowed are powers of two from {LEAST} to {MOST}")]
    Size {
        /// What was asked for.
        size: usize,
    },
    /// The ring does not lie within its memory.
    #[error("a ring of {size} bytes at {base:#x} does not lie in memory of {memory} bytes")]
    Place {
        /// Where it begins.
        base: usize,
        /// Bytes of frames.
        size: usize,
        /// Bytes of the memory.
        memory: usize,
    },
    /// More was put in than there is room for, or more taken out than was put in.
    #[error("the other side says it is at byte {theirs}, this one is at {own}, and the ring has {size}")]
    Position {
        /// What it says.
        theirs: u64,
        /// Where this side is.
        own: u64,
        /// Bytes of the ring.
        size: u64,
    },
    /// A frame that is longer than what was put in, or than frames are.
    #[error("a frame of {len} bytes, where {left} were put in; the longest has {MAX_FRAME}")]
    Length {
        /// What it says.
        len: usize,
        /// What there is.
        left: u64,
    },
}

/// Where a ring lies.
#[derive(Clone, Debug)]
struct Place {
    memory: Arc<MmapRegion<()>>,
    base: usize,
    size: usize,
}

impl Place {
    fn new(memory: Arc<MmapRegion<()>>, base: usize, size: usize) -> Result<Self, RingError> {
        check_size(size)?;
        let end = base.checked_add(CONTROL).and_then(|start| start.checked_add(size));
        if !base.is_multiple_of(CONTROL) || end.is_none_or(|end| end > memory.size()) {
            return Err(RingError::Place { base, size, memory: memory.size() });
        }
        Ok(Self { memory, base, size })
    }

    fn size(&self) -> u64 {
        self.size as u64
    }

    fn lost(&self) -> RingError {
        RingError::Place { base: self.base, size: self.size, memory: self.memory.size() }
    }

    /// A control word.
    fn word(&self, at: usize) -> Result<&AtomicU64, RingError> {
        self.memory.get_atomic_ref(self.base + at).map_err(|_| self.lost())
    }

    fn load(&self, at: usize, order: Ordering) -> Result<u64, RingError> {
        Ok(u64::from_le(self.word(at)?.load(order)))
    }

    fn store(&self, at: usize, value: u64, order: Ordering) -> Result<(), RingError> {
        self.word(at)?.store(value.to_le(), order);
        Ok(())
    }

    /// The memory of `len` bytes from `position` on: one piece, or two where the end lies between. The second may be empty.
    fn pieces(&self, position: u64, len: usize) -> Result<[VolatileSlice<'_>; 2], RingError> {
        // The remainder fits, since the size does.
        let start = usize::try_from(position % self.size()).map_err(|_| self.lost())?;
        let first = len.min(self.size - start);
        let data = self.base + CONTROL;
        let piece = |at, len| self.memory.get_slice(at, len).map_err(|_| self.lost());
        Ok([piece(data + start, first)?, piece(data, len - first)?])
    }
}

/// Whether a ring can have so many bytes of frames.
pub(super) fn check_size(size: usize) -> Result<(), RingError> {
    if !size.is_power_of_two() || !(LEAST..=MOST).contains(&size) {
        return Err(RingError::Size { size });
    }
    Ok(())
}

/// Copies from `from`, one slice after the other, to `to`, as much as there is of both.
pub(super) fn copy<'a>(from: impl IntoIterator<Item = VolatileSlice<'a>>, to: &[VolatileSlice<'_>]) -> usize {
    let mut done = 0;
    let mut targets = to.iter().copied();
    let Some(mut target) = targets.next() else { return 0 };
    for mut source in from {
        while !source.is_empty() {
            if target.is_empty() {
                let Some(next) = targets.next() else { return done };
                target = next;
                continue;
            }
            let len = source.len().min(target.len());
            source.copy_to_volatile_slice(target);
            done += len;
            let (Ok(rest), Ok(room)) = (source.offset(len), target.offset(len)) else { return done };
            (source, target) = (rest, room);
        }
    }
    done
}

/// `len` bytes of `slices` from byte `skip` on.
pub(super) fn part<'a, 'b>(
    slices: &'b [VolatileSlice<'a>],
    skip: usize,
    len: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a, 'b> {
    let (mut skip, mut len) = (skip, len);
    slices.iter().filter_map(move |slice| {
        let within = skip.min(slice.len());
        skip -= within;
        let count = (slice.len() - within).min(len);
        len -= count;
        if count > 0 { slice.subslice(within, count).ok() } else { None }
    })
}

/// The two sides of a new ring in memory of its own.
pub(super) fn ring(size: usize) -> Result<(Producer, Consumer), SwitchError> {
    check_size(size)?;
    let memory = MmapRegion::new(CONTROL + size).map_err(|_| SwitchError::Memory { bytes: size })?;
    let memory = Arc::new(memory);
    let consumer = Consumer::new(Arc::clone(&memory), 0, size)?;
    Ok((Producer::new(memory, 0, size)?, consumer))
}

/// The side that puts frames in.
#[derive(Debug)]
pub(super) struct Producer {
    place: Place,
    /// Bytes that were put in.
    own: u64,
    /// Bytes that were taken out, when it was last looked.
    theirs: u64,
}

impl Producer {
    /// For a ring of `size` bytes at `base`, which is empty.
    pub(super) fn new(memory: Arc<MmapRegion<()>>, base: usize, size: usize) -> Result<Self, RingError> {
        let place = Place::new(memory, base, size)?;
        place.store(PRODUCED, 0, Ordering::Relaxed)?;
        place.store(WAITS, 0, Ordering::Release)?;
        Ok(Self { place, own: 0, theirs: 0 })
    }

    /// Whether there is room for a frame of `len` bytes.
    fn has_room(&mut self, len: usize) -> Result<bool, RingError> {
        let size = self.place.size();
        let needed = record(len);
        if size - (self.own - self.theirs) >= needed {
            return Ok(true);
        }
        let theirs = self.place.load(CONSUMED, Ordering::Acquire)?;
        if theirs > self.own || self.own - theirs > size {
            return Err(RingError::Position { theirs, own: self.own, size });
        }
        self.theirs = theirs;
        Ok(size - (self.own - theirs) >= needed)
    }

    /// Puts a frame in, whose bytes are `len` in `frame`; whether there was room. Its consumer sees it, awake or not.
    pub(super) fn push<'a>(
        &mut self,
        info: &[u8; HEADER],
        len: usize,
        frame: impl IntoIterator<Item = VolatileSlice<'a>>,
    ) -> Result<bool, RingError> {
        if len > MAX_FRAME {
            return Err(RingError::Length { len, left: self.place.size() });
        }
        if !self.has_room(len)? {
            return Ok(false);
        }
        let [l0, l1, l2, l3] = u32::try_from(len).unwrap_or(0).to_le_bytes();
        let &[a, b, c, d, e, f, g, h, i, j, k, m] = info;
        let head = [l0, l1, l2, l3, a, b, c, d, e, f, g, h, i, j, k, m];
        // Records begin at multiples of their own size, so none is in two pieces.
        let [place, _] = self.place.pieces(self.own, RECORD)?;
        place.copy_from(&head);
        copy(frame, &self.place.pieces(self.own + RECORD_64, len)?);
        self.own += record(len);
        self.place.store(PRODUCED, self.own, Ordering::Release)?;
        Ok(true)
    }

    /// Whether the consumer sleeps and is now this side's to wake. Asked after frames were put in.
    pub(super) fn wakes(&mut self) -> Result<bool, RingError> {
        // What was put in is to be seen by a consumer that says after this that it sleeps.
        fence(Ordering::SeqCst);
        let asleep = self.place.word(ASLEEP)?;
        Ok(asleep.load(Ordering::Relaxed) != 0 && asleep.swap(0, Ordering::AcqRel) != 0)
    }

    /// Asks to be woken when there is room; whether a frame of `len` bytes has found some meanwhile.
    pub(super) fn wait(&mut self, len: usize) -> Result<bool, RingError> {
        self.place.store(WAITS, 1, Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        let has_room = self.has_room(len)?;
        if has_room {
            self.place.store(WAITS, 0, Ordering::Relaxed)?;
        }
        Ok(has_room)
    }
}

/// Bytes that a frame takes in a ring.
fn record(len: usize) -> u64 {
    (len as u64 + RECORD_64).next_multiple_of(RECORD_64)
}

/// The frame that is next to be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Front {
    /// What is left to the receiver of it, as the other side says.
    pub(super) info: [u8; HEADER],
    /// Its bytes.
    pub(super) len: usize,
}

/// The side that takes frames out.
#[derive(Debug)]
pub(super) struct Consumer {
    place: Place,
    /// Bytes that were taken out.
    own: u64,
    /// Bytes that were put in, when it was last looked.
    theirs: u64,
}

impl Consumer {
    /// For a ring of `size` bytes at `base`, which is empty.
    pub(super) fn new(memory: Arc<MmapRegion<()>>, base: usize, size: usize) -> Result<Self, RingError> {
        let place = Place::new(memory, base, size)?;
        place.store(CONSUMED, 0, Ordering::Relaxed)?;
        // Who has never looked is to be told of the first frame.
        place.store(ASLEEP, 1, Ordering::Release)?;
        Ok(Self { place, own: 0, theirs: 0 })
    }

    fn look(&mut self) -> Result<u64, RingError> {
        if self.own == self.theirs {
            let theirs = self.place.load(PRODUCED, Ordering::Acquire)?;
            let size = self.place.size();
            if theirs < self.own || theirs - self.own > size {
                return Err(RingError::Position { theirs, own: self.own, size });
            }
            self.theirs = theirs;
        }
        Ok(self.theirs - self.own)
    }

    /// The next frame, which stays where it is.
    pub(super) fn front(&mut self) -> Result<Option<Front>, RingError> {
        let left = self.look()?;
        if left == 0 {
            return Ok(None);
        }
        let [head, _] = self.place.pieces(self.own, RECORD)?;
        let mut bytes = [0; RECORD];
        head.copy_to(&mut bytes);
        let [l0, l1, l2, l3, a, b, c, d, e, f, g, h, i, j, k, m] = bytes;
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if len > MAX_FRAME || record(len) > left {
            return Err(RingError::Length { len, left });
        }
        Ok(Some(Front { info: [a, b, c, d, e, f, g, h, i, j, k, m], len }))
    }

    /// Where the bytes of that frame lie.
    pub(super) fn frame(&self, front: &Front) -> Result<[VolatileSlice<'_>; 2], RingError> {
        self.place.pieces(self.own + RECORD_64, front.len)
    }

    /// Takes it out.
    pub(super) fn pop(&mut self, front: &Front) -> Result<(), RingError> {
        self.own += record(front.len);
        self.place.store(CONSUMED, self.own, Ordering::Release)
    }

    /// Forgets what was put in so far.
    pub(super) fn clear(&mut self) -> Result<(), RingError> {
        self.theirs = self.own;
        let left = self.look()?;
        self.own += left;
        self.place.store(CONSUMED, self.own, Ordering::Release)
    }

    /// Whether the producer waits for room and is now this side's to wake. Asked after frames were taken out.
    pub(super) fn wakes(&mut self) -> Result<bool, RingError> {
        fence(Ordering::SeqCst);
        let waits = self.place.word(WAITS)?;
        Ok(waits.load(Ordering::Relaxed) != 0 && waits.swap(0, Ordering::AcqRel) != 0)
    }

    /// Asks to be woken when there are frames; whether there are none until then.
    pub(super) fn sleep(&mut self) -> Result<bool, RingError> {
        self.place.store(ASLEEP, 1, Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        if self.look()? == 0 {
            return Ok(true);
        }
        self.place.store(ASLEEP, 0, Ordering::Relaxed)?;
        Ok(false)
    }

    /// A second view of the memory, for tests of what the other side may do to it.
    #[cfg(test)]
    pub(super) fn memory(&self) -> Arc<MmapRegion<()>> {
        Arc::clone(&self.place.memory)
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
