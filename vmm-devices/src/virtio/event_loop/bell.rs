//! How a loop hears of what is to be done, from any thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::poller::{notifier, signal};
use crate::interrupt::lock;

/// Where bells leave word for a loop. It holds nothing that could hold it.
pub(super) struct Inbox {
    /// The slots that were rung for since the loop last looked.
    rung: Mutex<Vec<u64>>,
    /// The clock did something else than going on.
    clock_moved: AtomicBool,
    pub(super) kick: OwnedFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let (rung, clock_moved) = (Mutex::default(), AtomicBool::new(false));
        Ok(Arc::new(Self { rung, clock_moved, kick: notifier()? }))
    }

    /// Ends a wait of the loop, the next one if it does not wait now.
    pub(super) fn kick(&self) {
        signal(&self.kick);
    }

    pub(super) fn clock_moved(&self) {
        self.clock_moved.store(true, Ordering::SeqCst);
        self.kick();
    }

    pub(super) fn take_clock_moved(&self) -> bool {
        self.clock_moved.swap(false, Ordering::SeqCst)
    }

    /// Moves the slots that were rung for to the end of `slots`.
    pub(super) fn take(&self, slots: &mut Vec<u64>) {
        slots.append(&mut lock(&self.rung));
    }

    /// What was rung for `slot` is of no interest any more.
    pub(super) fn forget(&self, slot: u64) {
        lock(&self.rung).retain(|other| *other != slot);
    }
}

/// The doorbell of one worker.
pub(super) struct Bell {
    inbox: Arc<Inbox>,
    slot: u64,
    rung: AtomicBool,
}

impl Bell {
    pub(super) fn new(inbox: Arc<Inbox>, slot: u64) -> Arc<Self> {
        Arc::new(Self { inbox, slot, rung: AtomicBool::new(false) })
    }

    /// The worker is to be called. Those who ring before it is are as one.
    pub(super) fn ring(&self) {
        // Both this and the answer are read-modify-writes: whoever finds that it was rung already has written what it rings
        // for before the answer that is to come.
        if !self.rung.swap(true, Ordering::SeqCst) {
            lock(&self.inbox.rung).push(self.slot);
            self.inbox.kick();
        }
    }

    /// The worker looks now: whoever rings from here on is heard anew.
    pub(super) fn answer(&self) {
        self.rung.swap(false, Ordering::SeqCst);
    }

    /// Nobody comes any more.
    pub(super) fn silence(&self) {
        self.rung.store(true, Ordering::SeqCst);
    }
}
