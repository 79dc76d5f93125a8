//! The thread that waits for the disk, and the batches that it is given.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::emitter::Waiter;
use crate::log::{Writing, Written};

/// The thread of the disk, and the way to it and back.
pub(super) struct Disk {
    pub(super) to: Sender<Writing>,
    pub(super) from: Receiver<Written>,
    thread: JoinHandle<()>,
}

impl Disk {
    pub(super) fn start() -> std::io::Result<Self> {
        let (to, batches) = channel::<Writing>();
        let (done, from) = channel();
        let write = move || {
            while let Ok(batch) = batches.recv() {
                if done.send(batch.write()).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("vmm-audit-disk".to_owned()).spawn(write)?;
        Ok(Self { to, from, thread })
    }

    pub(super) fn end(self) {
        drop(self.to);
        if self.thread.join().is_err() {
            tracing::error!("the thread that writes the audit log to the disk panicked");
        }
    }
}

/// Those who wait for a batch, and what is in it.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) waiters: Vec<(Arc<Waiter>, u64)>,
    pub(super) flushes: Vec<Arc<Waiter>>,
    pub(super) events: usize,
    /// When it was begun, monotonic; 0 if there is nothing in it.
    pub(super) since: u64,
}

impl Gathered {
    pub(super) fn fail(self, why: &str) {
        let waiters = self.waiters.into_iter().map(|(waiter, _)| waiter);
        waiters.chain(self.flushes).for_each(|waiter| waiter.tell(Err(why.to_owned())));
    }

    /// Puts another one, that was to be written before, in front.
    pub(super) fn prepend(&mut self, mut before: Self) {
        before.waiters.append(&mut self.waiters);
        before.flushes.append(&mut self.flushes);
        before.events += self.events;
        *self = before;
    }
}
