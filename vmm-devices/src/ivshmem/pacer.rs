//! A limit on how often a guest rings: rings beyond it wait, each peer's vector once, and none is lost.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use super::port::Port;
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::virtio::rate::{Rate, TokenBucket};

/// The rate limit of one device's doorbell. Whoever made the device calls [`service`](Self::service) at the deadline of which it is told.
pub struct Pacer {
    clock: Arc<dyn Clock>,
    wake: Box<dyn Fn(u64) + Send + Sync>,
    port: Weak<Port>,
    state: Mutex<State>,
}

struct State {
    bucket: TokenBucket,
    /// Peers and vectors that were found, so there are not more than those.
    held: BTreeSet<(u16, u16)>,
    deadline: Option<u64>,
}

impl Pacer {
    pub(super) fn new(
        rate: Rate,
        clock: Arc<dyn Clock>,
        wake: Box<dyn Fn(u64) + Send + Sync>,
        port: Weak<Port>,
    ) -> Self {
        let bucket = TokenBucket::new(rate, clock.now_ns());
        let state = Mutex::new(State { bucket, held: BTreeSet::new(), deadline: None });
        Self { clock, wake, port, state }
    }

    /// Whether a ring goes out now. If not, it is held.
    pub(super) fn admit(&self, peer: u16, vector: u16) -> bool {
        let mut state = lock(&self.state);
        if !state.held.is_empty() {
            // It waits with the others.
            state.held.insert((peer, vector));
            return false;
        }
        let Some(deadline) = state.bucket.take(self.clock.now_ns(), 1) else { return true };
        // It pays when it goes out.
        state.bucket.put_back(1);
        state.held.insert((peer, vector));
        state.deadline = Some(deadline);
        drop(state);
        (self.wake)(deadline);
        false
    }

    /// When [`service`](Self::service) has something to do, as a time of the clock in nanoseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        lock(&self.state).deadline
    }

    /// Rings what waited and now may. Nothing happens if it is called too early or too often.
    pub fn service(&self) {
        let Some(port) = self.port.upgrade() else { return };
        loop {
            let (peer, vector) = {
                let mut state = lock(&self.state);
                if state.held.is_empty() {
                    state.deadline = None;
                    return;
                }
                if let Some(deadline) = state.bucket.take(self.clock.now_ns(), 1) {
                    state.bucket.put_back(1);
                    state.deadline = Some(deadline);
                    return;
                }
                let Some(first) = state.held.pop_first() else { return };
                first
            };
            port.deliver(peer, vector);
        }
    }

    /// What waits is forgotten.
    pub(super) fn clear(&self) {
        let mut state = lock(&self.state);
        state.held.clear();
        state.deadline = None;
    }
}

impl fmt::Debug for Pacer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("Pacer")
            .field("held", &state.held)
            .field("deadline", &state.deadline)
            .finish_non_exhaustive()
    }
}
