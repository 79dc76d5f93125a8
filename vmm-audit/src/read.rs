//! Reading a log: all entries in order, with whatever is damaged in its place.

use std::io;
use std::sync::Arc;

use crate::event::{Entry, Event, EventError};
use crate::log::read_header;
use crate::log::segment::{Damage, FrameKind, HEADER, Scanned, Scanner, parse_name, path};
use crate::storage::Storage;

/// Where in the files something is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    /// The file, relative to the log.
    pub file: String,
    /// The byte at which it begins.
    pub offset: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at byte {}", self.file, self.offset)
    }
}

/// An entry as it was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its sequence number.
    pub seq: u64,
    /// Where it is.
    pub place: Place,
    /// Its source; 0 is the log itself, and what is no entry.
    pub source: u32,
    /// The event.
    pub event: Result<Event, EventError>,
    /// The bytes of the entry.
    pub bytes: Vec<u8>,
}

/// What comes next in a log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Item {
    /// An entry.
    Entry(Box<Found>),
    /// A checkpoint, its signature unchecked.
    Checkpoint {
        /// Where it is.
        place: Place,
        /// The signed note.
        note: Vec<u8>,
    },
    /// Something that is not as it was written.
    Damage {
        /// Where it is.
        place: Place,
        /// How many bytes were passed over.
        bytes: u64,
        /// What is wrong.
        why: String,
    },
}

struct Current {
    number: u64,
    scanner: Scanner,
}

/// Goes through the entries of a log. It checks no signatures: [`verify`](crate::verify::verify) does.
///
/// At the end, [`next`](Self::next) gives `None`; later it goes on with what has been written since.
pub struct Entries {
    storage: Arc<dyn Storage>,
    /// The segment that is next.
    number: Option<u64>,
    current: Option<Current>,
    seq: u64,
    /// Whether a writer may be at work, whose last frame is not whole yet.
    live: bool,
}

/// The numbers of the segments that there are, in order.
pub(crate) fn segments(storage: &dyn Storage) -> io::Result<Vec<u64>> {
    let mut numbers: Vec<u64> =
        storage.list("segments")?.iter().filter_map(|l| parse_name(&l.name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

impl Entries {
    /// From the beginning of the log.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, number: None, current: None, seq: 0, live: false }
    }

    /// From the segment on that has entry `seq`: a few may come before it.
    ///
    /// # Errors
    /// If the storage cannot be read.
    pub fn near(storage: Arc<dyn Storage>, seq: u64) -> io::Result<Self> {
        let mut number = None;
        for candidate in segments(&*storage)? {
            match read_header(&*storage.open_to_read(&path(candidate))?)? {
                Ok(header) if header.base <= seq => number = Some(candidate),
                _ => {}
            }
        }
        Ok(Self { storage, number, current: None, seq: 0, live: false })
    }

    /// The sequence number that is due next.
    pub fn position(&self) -> u64 {
        self.seq
    }

    /// Takes a frame that is cut short at the end of the log for one that is being written.
    #[must_use]
    pub fn live(mut self) -> Self {
        self.live = true;
        self
    }

    /// Opens the next segment; what is wrong with its header is an item.
    fn open_next(&mut self) -> io::Result<Option<Option<Item>>> {
        let numbers = segments(&*self.storage)?;
        let wanted = self.number.or_else(|| numbers.first().copied());
        let Some(number) = wanted.and_then(|wanted| numbers.iter().copied().find(|n| *n >= wanted)) else {
            return Ok(None);
        };
        let file = self.storage.open_to_read(&path(number))?;
        let length = file.length()?;
        if self.live && length < HEADER as u64 && numbers.last() == Some(&number) {
            return Ok(None);
        }
        let mut item = None;
        let mut damage = |why: String| {
            item.get_or_insert(Item::Damage {
                place: Place { file: path(number), offset: 0 },
                bytes: 0,
                why,
            });
        };
        match read_header(&*file)? {
            Ok(header) => {
                if self.number.is_some_and(|wanted| wanted != number) {
                    damage(format!("segments {} to {} are absent", wanted.unwrap_or(0), number - 1));
                } else if self.current.is_some() && header.base != self.seq {
                    damage(format!("it begins with entry {}, and entry {} is due", header.base, self.seq));
                }
                self.seq = header.base;
            }
            Err(e) => damage(e.to_string()),
        }
        self.current = Some(Current { number, scanner: Scanner::new(file, HEADER as u64) });
        self.number = number.checked_add(1);
        Ok(Some(item))
    }

    /// What comes next.
    ///
    /// # Errors
    /// If the storage cannot be read.
    #[allow(clippy::should_implement_trait, reason = "reading fails, and the end is not for good")]
    pub fn next(&mut self) -> io::Result<Option<Item>> {
        loop {
            let Some(current) = &mut self.current else {
                match self.open_next()? {
                    None => return Ok(None),
                    Some(Some(item)) => return Ok(Some(item)),
                    Some(None) => continue,
                }
            };
            let at = current.scanner.position();
            let place = |offset| Place { file: path(current.number), offset };
            match current.scanner.next()? {
                Some(Scanned::Frame(frame)) => {
                    let place = place(frame.offset);
                    if frame.kind == FrameKind::Checkpoint {
                        return Ok(Some(Item::Checkpoint { place, note: frame.payload.to_vec() }));
                    }
                    // Behind damage the number says how many are gone.
                    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
                    let ahead = frame.number.wrapping_sub(self.seq as u32);
                    let seq = self.seq.wrapping_add(if ahead < 1 << 31 { ahead.into() } else { 0 });
                    self.seq = seq.wrapping_add(1);
                    let bytes = frame.payload.to_vec();
                    let entry = Entry::decode(&bytes);
                    let source = entry.as_ref().map_or(0, |entry| entry.source);
                    let event = entry.and_then(|entry| Event::decode(entry.event));
                    return Ok(Some(Item::Entry(Box::new(Found { seq, place, source, event, bytes }))));
                }
                Some(Scanned::Damaged { offset, bytes, damage }) => {
                    let place = place(offset);
                    let is_last =
                        || Ok::<_, io::Error>(segments(&*self.storage)?.last() == Some(&current.number));
                    if self.live && matches!(damage, Damage::Cut { .. }) && is_last()? {
                        current.scanner.seek(at);
                        return Ok(None);
                    }
                    return Ok(Some(Item::Damage { place, bytes, why: damage.to_string() }));
                }
                None => {
                    let number = current.number;
                    if segments(&*self.storage)?.last().is_none_or(|last| *last <= number) {
                        // More may come.
                        current.scanner.seek(at);
                        return Ok(None);
                    }
                    // What was written to this one before the next was made.
                    current.scanner.seek(at);
                    if current.scanner.next()?.is_some() {
                        current.scanner.seek(at);
                        continue;
                    }
                    match self.open_next()? {
                        None => return Ok(None),
                        Some(Some(item)) => return Ok(Some(item)),
                        Some(None) => {}
                    }
                }
            }
        }
    }
}
