//! What goes to the far end, and what follows when a connection has ended on either side.

use std::sync::atomic::Ordering;

use super::connection::Phase;
use super::engine::Engine;
use super::far::{Framing, Sent};
use super::packet::{Kind, shutdown};

impl Engine {
    /// The batch is over: what it brought is sent.
    pub(super) fn flush_all(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for place in dirty.drain(..) {
            self.flush(place);
        }
        self.dirty = dirty;
    }

    /// Sends what waits for the far end, as far as there is room.
    pub(super) fn flush(&mut self, place: u32) {
        let close_ns = self.setup.patience.close_ns;
        let now = self.setup.now();
        let Some(entry) = self.slots.get_mut(place) else { return };
        if let Some(far) = entry.far.as_ref().filter(|_| entry.writable) {
            let mut left = 0;
            let mut sent = far.send_backlog(&mut entry.backlog, entry.connection.kind, &mut left);
            entry.connection.forwarded(left);
            let untold = entry.connection.guest_off() & !entry.told_far;
            // A message without an end has none any more.
            if sent == Sent::All && untold != 0 {
                sent = far.say_shut(untold);
                if sent == Sent::All {
                    entry.told_far |= untold;
                }
            }
            if left > 0 && entry.drain_deadline.is_some() {
                entry.drain_deadline = Some(now.saturating_add(close_ns));
            }
            match sent {
                Sent::All => {}
                Sent::Full => entry.writable = false,
                Sent::Gone => {
                    let lost = u32::try_from(entry.backlog.clear()).unwrap_or(u32::MAX);
                    self.shared.counts.discarded.fetch_add(lost.into(), Ordering::Relaxed);
                    entry.connection.forwarded(lost);
                    entry.told_far = shutdown::BOTH;
                    // Another device has said why, in what is still to be read; if it has not, it died.
                    entry.readable = true;
                    if far.framing != Framing::Records {
                        entry.connection.far_ended(shutdown::RECEIVE);
                    }
                }
            }
        }
        self.settle(place);
    }

    /// Lets the far end go, and what waited for it.
    pub(super) fn drop_far(&mut self, place: u32) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        if let Some(far) = entry.far.take() {
            self.poll.remove(far.as_fd());
            far.cut();
        }
        let lost = entry.backlog.clear();
        self.shared.counts.discarded.fetch_add(lost as u64, Ordering::Relaxed);
        entry.staged = None;
        entry.drain_deadline = None;
        entry.wanted = None;
        // Its closure holds the socket.
        entry.right = None;
    }

    /// What follows from the state of a connection, after anything has changed.
    pub(super) fn settle(&mut self, place: u32) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        if entry.connection.phase() == Phase::Over {
            // Data that the guest sent before it ended in order still has to find its reader.
            let drains = entry.connection.guest_off() & shutdown::SEND != 0
                && entry.far.is_some()
                && (!entry.backlog.bytes().is_empty() || entry.connection.guest_off() & !entry.told_far != 0);
            if !drains {
                self.drop_far(place);
            } else if entry.drain_deadline.is_none() {
                entry.drain_deadline = Some(self.setup.now().saturating_add(self.setup.patience.close_ns));
            }
        }
        let Some(entry) = self.slots.get_mut(place) else { return };
        if entry.has_data() && entry.connection.may_send() && entry.connection.credit.available() == 0 {
            let most = entry.connection.credit.peer_alloc();
            if entry.connection.kind == Kind::SeqPacket && entry.unfinished > 0 && entry.unfinished >= most {
                // The guest waits for the end of the message, and that waits for room.
                entry.connection.reset();
                return self.drop_and_settle(place);
            }
            entry.connection.want_credit();
        }
        let has_control = entry.connection.has_control();
        if entry.connection.phase() == Phase::Over && !has_control {
            if entry.far.is_none() {
                return self.remove(place);
            }
            self.slots.unmap(place);
        }
        let Some(entry) = self.slots.get_mut(place) else { return };
        if (has_control || entry.may_move()) && !std::mem::replace(&mut entry.queued, true) {
            self.ready.push_back(place);
        }
        let at = entry.connection.deadline().into_iter().chain(entry.drain_deadline).min();
        self.slots.set_timer(place, at);
    }

    pub(super) fn drop_and_settle(&mut self, place: u32) {
        self.drop_far(place);
        self.settle(place);
    }

    pub(super) fn remove(&mut self, place: u32) {
        let Some(entry) = self.slots.remove(place) else { return };
        if entry.queued {
            // A guest that takes nothing would make it longer and longer.
            self.ready.retain(|other| *other != place);
        }
        self.shared.counts.open.fetch_sub(1, Ordering::Relaxed);
        // The gate hears of its end with no lock held.
        drop(entry);
    }
}
