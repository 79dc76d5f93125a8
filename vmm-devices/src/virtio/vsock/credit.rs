//! Credit (Virtio 1.3, 5.10.6.3): each side says how large its buffer is and how much has left it, and the other sends no more than
//! there is room for.
//!
//! All counters wrap. Those of the guest may be lies: the worst that follows is that its own connection stands still, or ends.

/// A connection's account, from the device's side.
#[derive(Clone, Debug)]
pub(super) struct Credit {
    /// The guest's buffer, as it says.
    peer_alloc: u32,
    /// How much has left it, as it says; never more than was sent.
    peer_forwarded: u32,
    /// Bytes sent to the guest so far.
    sent: u32,
    /// The device's own buffer.
    own_alloc: u32,
    /// Bytes that came from the guest.
    received: u32,
    /// Bytes of those that have left the buffer.
    forwarded: u32,
    /// How many the guest has been told of.
    told: u32,
}

impl Credit {
    /// With a buffer of `own_alloc` bytes, of which the guest knows.
    pub(super) fn new(own_alloc: u32) -> Self {
        Self { peer_alloc: 0, peer_forwarded: 0, sent: 0, own_alloc, received: 0, forwarded: 0, told: 0 }
    }

    /// What the guest says of its buffer, in each packet.
    pub(super) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        // What would say that more has left than was sent, or less than before: a lie, or a word that another one has overtaken.
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        if fwd_cnt.wrapping_sub(self.peer_forwarded) <= in_flight {
            self.peer_forwarded = fwd_cnt;
        }
    }

    /// Bytes that may be sent. A guest may make its buffer smaller than what is in flight.
    pub(super) fn available(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Bytes of the guest's buffer, which no message may exceed.
    pub(super) fn peer_alloc(&self) -> u32 {
        self.peer_alloc
    }

    /// So many are sent.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// So many came; `false` if that is more than the guest was allowed to send, and nothing is booked then.
    #[must_use]
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let fits = waiting.checked_add(bytes).is_some_and(|all| all <= self.own_alloc);
        if fits {
            self.received = self.received.wrapping_add(bytes);
        }
        fits
    }

    /// So many have left the buffer.
    pub(super) fn forward(&mut self, bytes: u32) {
        let waiting = self.received.wrapping_sub(self.forwarded);
        self.forwarded = self.forwarded.wrapping_add(bytes.min(waiting));
    }

    /// Whether the guest should hear of the room that there is: it takes less than half of it for free.
    pub(super) fn is_news(&self) -> bool {
        let free = self.own_alloc.saturating_sub(self.received.wrapping_sub(self.told));
        self.told != self.forwarded && free < self.own_alloc / 2
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is sent now.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.own_alloc, self.forwarded)
    }
}
