//! How far a queue has come: what its worker leaves behind for who saves the device.
//!
//! The worker alone writes it, whatever thread it is called by, and who saves it has waited for the end of its calls. So nothing here needs
//! more order than that wait gives. Who looks at a queue that is at work sees each value as it is or was a moment ago.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};

#[derive(Debug)]
pub(crate) struct Position {
    next_available: AtomicU16,
    next_used: AtomicU16,
    told: AtomicU16,
    /// By head: 0, or the how manieth chain it is, for those that were taken and not completed.
    taken: Box<[AtomicU64]>,
    /// How many were taken.
    count: AtomicU64,
}

impl Position {
    /// Of a queue of `size` descriptors, which has taken those chains, in that order.
    pub(super) fn new(size: u16, [next_available, next_used, told]: [u16; 3], in_flight: &[u16]) -> Self {
        let this = Self {
            next_available: next_available.into(),
            next_used: next_used.into(),
            told: told.into(),
            taken: (0..size).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
        };
        for head in in_flight {
            // The caller knows them to be different, and of this queue.
            this.take(*head, next_available);
        }
        this
    }

    /// A chain is taken; `false` if it is already, or cannot be.
    pub(super) fn take(&self, head: u16, next_available: u16) -> bool {
        self.next_available.store(next_available, Relaxed);
        let Some(place) = self.taken.get(usize::from(head)).filter(|place| place.load(Relaxed) == 0) else {
            return false;
        };
        let count = self.count.load(Relaxed) + 1;
        self.count.store(count, Relaxed);
        place.store(count, Relaxed);
        true
    }

    /// A chain is completed.
    pub(super) fn complete(&self, head: u16) {
        if let Some(place) = self.taken.get(usize::from(head)) {
            place.store(0, Relaxed);
        }
    }

    /// Completed chains are on the used ring.
    pub(super) fn set_next_used(&self, next_used: u16) {
        self.next_used.store(next_used, Relaxed);
    }

    /// The driver was thought of.
    pub(super) fn set_told(&self, told: u16) {
        self.told.store(told, Relaxed);
    }

    /// The next entry of the available ring, that of the used ring, and the one at which the driver was thought of.
    pub(crate) fn indices(&self) -> [u16; 3] {
        [&self.next_available, &self.next_used, &self.told].map(|index| index.load(Relaxed))
    }

    /// Heads of the chains that were taken and not completed, in the order in which they were taken.
    pub(crate) fn in_flight(&self) -> Vec<u16> {
        let taken = (0..).zip(&self.taken).map(|(head, place)| (place.load(Relaxed), head));
        let mut taken: Vec<(u64, u16)> = taken.filter(|(count, _)| *count != 0).collect();
        taken.sort_unstable();
        taken.into_iter().map(|(_, head)| head).collect()
    }
}
