//! What a loop shares with those who start and stop devices.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::bell::{Bell, Inbox};
use super::poller::{Poller, notifier};
use super::slot::{Slot, rest};
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::virtio::{Doorbells, DriverLink, Running, Worker};

pub(super) struct Shared {
    pub(super) poller: Poller,
    pub(super) inbox: Arc<Inbox>,
    pub(super) clock: Arc<dyn Clock>,
    /// The loop ends, or has ended. Changed under the lock of the state.
    pub(super) closed: AtomicBool,
    state: Mutex<State>,
}

/// Nothing of others is called under its lock.
#[derive(Default)]
struct State {
    slots: BTreeMap<u64, Entry>,
    /// Deadlines of slots.
    deadlines: BTreeSet<(u64, u64)>,
}

struct Entry {
    slot: Arc<Slot>,
    deadline: Option<u64>,
}

impl Shared {
    pub(super) fn new(clock: Arc<dyn Clock>) -> io::Result<Arc<Self>> {
        let inbox = Inbox::new()?;
        Ok(Arc::new(Self {
            poller: Poller::new(&inbox.kick)?,
            inbox,
            clock,
            closed: AtomicBool::new(false),
            state: Mutex::default(),
        }))
    }

    /// From now on the loop finds the slots.
    fn insert(&self, slots: &[Arc<Slot>]) -> io::Result<()> {
        let mut state = lock(&self.state);
        if self.closed.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the event loop has ended"));
        }
        for slot in slots {
            state.slots.insert(slot.id, Entry { slot: Arc::clone(slot), deadline: None });
        }
        Ok(())
    }

    /// From now on it does not. A call may be under way.
    pub(super) fn remove(&self, slot: &Slot) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.slots.remove(&slot.id)
            && let Some(deadline) = entry.deadline
        {
            state.deadlines.remove(&(deadline, slot.id));
        }
        drop(state);
        self.inbox.forget(slot.id);
        for fd in std::mem::take(&mut *lock(&slot.watched)) {
            self.poller.remove(&fd);
        }
    }

    /// Lines up the slots named by `ids`, and those whose deadline is over, unless they stand there already.
    pub(super) fn collect(&self, ids: impl Iterator<Item = u64>, now: u64, ready: &mut VecDeque<Arc<Slot>>) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let mut line_up = |entry: &Entry| {
            if !entry.slot.queued.swap(true, Ordering::Relaxed) {
                ready.push_back(Arc::clone(&entry.slot));
            }
        };
        ids.filter_map(|id| state.slots.get(&id)).for_each(&mut line_up);
        while let Some((deadline, id)) = state.deadlines.pop_first() {
            if deadline > now {
                state.deadlines.insert((deadline, id));
                break;
            }
            if let Some(entry) = state.slots.get_mut(&id) {
                entry.deadline = None;
                line_up(entry);
            }
        }
    }

    pub(super) fn set_deadline(&self, slot: &Slot, deadline: Option<u64>) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        // One that was stopped meanwhile has none.
        let Some(entry) = state.slots.get_mut(&slot.id) else { return };
        let before = std::mem::replace(&mut entry.deadline, deadline);
        if before != deadline {
            before.map(|before| state.deadlines.remove(&(before, slot.id)));
            deadline.map(|deadline| state.deadlines.insert((deadline, slot.id)));
        }
    }

    pub(super) fn earliest(&self) -> Option<u64> {
        lock(&self.state).deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends the loop.
    pub(super) fn close(&self) {
        let state = lock(&self.state);
        self.closed.store(true, Ordering::SeqCst);
        drop(state);
        self.inbox.kick();
    }

    /// The loop cannot go on: all devices hear of it.
    pub(super) fn fail(&self, why: &dyn Error) {
        self.close();
        let slots = Vec::from_iter(lock(&self.state).slots.values().map(|entry| Arc::clone(&entry.slot)));
        slots.iter().for_each(|slot| slot.abandon(why));
    }
}

/// Workers of one device on one loop. Dropped, it stops them.
pub(super) struct LoopRunning {
    shared: Arc<Shared>,
    slots: Vec<Arc<Slot>>,
}

impl LoopRunning {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, slots: Vec::new() }
    }

    /// Adds a worker, which is not called yet.
    pub(super) fn add(
        &mut self,
        link: Arc<dyn DriverLink>,
        doorbells: &Doorbells,
        worker: Box<dyn Worker>,
    ) -> io::Result<()> {
        let slot = Slot::new(&self.shared.inbox, link, doorbells, worker)?;
        self.slots.push(Arc::clone(&slot));
        for fd in lock(&slot.watched).iter() {
            self.shared.poller.add(fd, slot.id)?;
        }
        Ok(())
    }

    /// The loop may call the workers from now on. What it was told of them before it did not understand: [`Self::ring`] makes
    /// up for that.
    pub(super) fn insert(&self) -> io::Result<()> {
        self.shared.insert(&self.slots)
    }

    pub(super) fn ring(&self) {
        self.slots.iter().for_each(|slot| slot.bell.ring());
    }

    /// Doorbells and their queues.
    pub(super) fn bells(&self) -> Vec<(Vec<u16>, Arc<Bell>)> {
        self.slots.iter().map(|slot| (slot.queues.clone(), Arc::clone(&slot.bell))).collect()
    }

    /// Takes the workers back from the loop, as soon as none of them is called. They are not stopped.
    pub(super) fn take(&mut self) -> Vec<Box<dyn Worker>> {
        self.slots.iter().for_each(|slot| self.shared.remove(slot));
        self.slots.drain(..).filter_map(|slot| slot.take()).collect()
    }
}

impl Running for LoopRunning {
    fn stop(mut self: Box<Self>) -> Vec<Box<dyn Worker>> {
        // All have left their calls before the first is stopped: they may have things in common.
        rest(self.take())
    }

    fn pause(mut self: Box<Self>) -> Vec<Box<dyn Worker>> {
        self.take()
    }
}

impl Drop for LoopRunning {
    fn drop(&mut self) {
        rest(self.take());
    }
}

/// Lets each of `bells` hear the doorbells of its queues. They hold no worker: those hold the doorbells.
pub(super) fn connect(doorbells: &Doorbells, bells: Vec<(Vec<u16>, Arc<Bell>)>) {
    let mut of_queue: Vec<Vec<Arc<Bell>>> = Vec::new();
    for (queues, bell) in bells {
        for queue in queues.into_iter().map(usize::from) {
            if of_queue.len() <= queue {
                of_queue.resize_with(queue + 1, Vec::new);
            }
            if let Some(place) = of_queue.get_mut(queue) {
                place.push(Arc::clone(&bell));
            }
        }
    }
    doorbells.connect(move |queue| {
        of_queue.get(usize::from(queue)).into_iter().flatten().for_each(|bell| bell.ring());
    });
}

pub(super) fn notifiers(queues: usize) -> io::Result<Vec<Arc<OwnedFd>>> {
    (0..queues).map(|_| notifier().map(Arc::new)).collect()
}
