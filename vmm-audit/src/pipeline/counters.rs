//! Events that were counted and not written one by one: a counter for each kind, action and verdict.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::event::{Action, Event, Kind, Verdict};

/// Kinds, actions and verdicts that have counters of their own; the last of each stands for all others, the first of actions and
/// verdicts for none.
const KINDS: usize = 16;
const ACTIONS: usize = 16;
const VERDICTS: usize = 8;
/// Counters of a source.
pub(crate) const CELLS: usize = KINDS * ACTIONS * VERDICTS;

/// The counters of a source, wherever they are. They only ever grow.
pub(crate) trait Cells: Send + Sync {
    /// Adds an event of so many bytes to a counter.
    fn add(&self, cell: usize, bytes: u64);

    /// Events and bytes of a counter so far.
    fn get(&self, cell: usize) -> (u64, u64);

    /// Events of all counters so far.
    fn total(&self) -> u64;

    /// The number of the next event, from 1.
    fn number(&self) -> u64;

    /// Numbers given so far.
    fn issued(&self) -> u64;
}

fn slot(number: Option<u32>, slots: usize) -> usize {
    number.map_or(0, |number| usize::try_from(number).unwrap_or(slots).min(slots - 1))
}

/// The counter of an event.
pub(crate) fn cell(event: &Event) -> usize {
    let kind = slot(Some(event.kind.number()), KINDS);
    let action = slot(event.action.map(Action::number), ACTIONS);
    let verdict = slot(event.verdict.map(Verdict::number), VERDICTS);
    (kind * ACTIONS + action) * VERDICTS + verdict
}

/// The event that says how far a counter is.
pub(crate) fn cell_event(cell: usize, source: u32, (count, bytes): (u64, u64)) -> Event {
    let (verdict, rest) = (cell % VERDICTS, cell / VERDICTS);
    let (action, kind) = (rest % ACTIONS, rest / ACTIONS);
    let number = |slot: usize| u32::try_from(slot).unwrap_or(0);
    let of = if kind == 0 || kind == KINDS - 1 {
        "other".to_owned()
    } else {
        Kind::from_number(number(kind)).to_string()
    };
    let mut event = Event::new(Kind::Coalesced).amount(count, bytes);
    event.action = (action != 0).then(|| Action::from_number(number(action)));
    event.verdict = (verdict != 0).then(|| Verdict::from_number(number(verdict)));
    event.attribute("of", of).attribute("source", source.to_string())
}

/// Counters of a source in this process.
pub(crate) struct LocalCells {
    cells: Box<[(AtomicU64, AtomicU64)]>,
    total: AtomicU64,
    issued: AtomicU64,
}

impl LocalCells {
    pub(crate) fn new() -> Self {
        let cells = (0..CELLS).map(|_| Default::default()).collect();
        Self { cells, total: AtomicU64::new(0), issued: AtomicU64::new(0) }
    }
}

impl Cells for LocalCells {
    fn add(&self, cell: usize, bytes: u64) {
        if let Some((count, sum)) = self.cells.get(cell) {
            sum.fetch_add(bytes, Ordering::Relaxed);
            count.fetch_add(1, Ordering::Relaxed);
            self.total.fetch_add(1, Ordering::Release);
        }
    }

    fn get(&self, cell: usize) -> (u64, u64) {
        let read = |(count, bytes): &(AtomicU64, AtomicU64)| {
            (count.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
        };
        self.cells.get(cell).map_or((0, 0), read)
    }

    fn total(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    fn number(&self) -> u64 {
        self.issued.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }
}

/// Events for the counters that are ahead of `written`, which is brought up to date. Counters only grow, so that an event that is
/// written twice says the same.
pub(crate) fn coalesced_events(cells: &dyn Cells, source: u32, written: &mut Vec<(u64, u64)>) -> Vec<Event> {
    written.resize(CELLS, (0, 0));
    let mut events = Vec::new();
    for (cell, written) in written.iter_mut().enumerate() {
        let now = cells.get(cell);
        if now != *written {
            *written = now;
            events.push(cell_event(cell, source, now));
        }
    }
    events
}
