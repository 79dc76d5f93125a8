//! What a connection does between the guest and the far end (Virtio 1.3, 5.10.6): states, and what is still to be told. Nothing here
//! does input or output.
//!
//! What the guest is to be told is kept as a difference between what is and what it knows, not as a queue of packets: whatever it
//! sends and however often, that is a few bits.

use super::credit::Credit;
use super::packet::{Header, Kind, operation, shutdown};

/// How far it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest wants it, the far end has not answered.
    Dialing,
    /// The far end wants it, the guest has not answered.
    Requested,
    /// Both have it.
    Open,
    /// The guest was told that nothing comes and goes any more, and is to confirm.
    Closing,
    /// There is none, of which the guest may still have to hear.
    Over,
}

/// What a packet of the guest's means for who moves the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receipt {
    /// Nothing.
    Nothing,
    /// The guest accepts.
    Accepted,
    /// Data, for which there is room.
    Data,
    /// Data that nobody takes any more.
    Stale,
    /// There may be more room for what the guest is to get.
    Credit,
    /// The guest has no more to send, or takes no more.
    Shut,
    /// The guest ended it.
    Reset,
    /// The guest has broken the rules, by this. The connection is over.
    Breach(&'static str),
}

/// A packet without data that is to be sent: operation and flags.
pub(super) type Control = (u16, u32);

/// How long to wait, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Patience {
    /// For an answer to a request.
    pub(super) connect_ns: u64,
    /// For the end of what is ending.
    pub(super) close_ns: u64,
}

/// One connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) kind: Kind,
    phase: Phase,
    pub(super) credit: Credit,
    patience: Patience,
    deadline: Option<u64>,
    /// What the guest does no more, as flags of SHUTDOWN.
    guest_off: u32,
    /// What the far end does no more.
    far_off: u32,
    /// What the guest knows of that.
    told_off: u32,
    owes_answer: bool,
    owes_reset: bool,
    owes_credit: bool,
    /// A CREDIT_REQUEST is wanted, or was sent.
    wants_credit: bool,
    asked_credit: bool,
}

impl Connection {
    fn new(kind: Kind, phase: Phase, buffer: u32, patience: Patience, now: u64) -> Self {
        Self {
            kind,
            phase,
            credit: Credit::new(buffer),
            patience,
            deadline: Some(now.saturating_add(patience.connect_ns)),
            guest_off: 0,
            far_off: 0,
            told_off: 0,
            owes_answer: false,
            owes_reset: false,
            owes_credit: false,
            wants_credit: false,
            asked_credit: false,
        }
    }

    /// One that the guest asks for with `request`.
    pub(super) fn dialing(kind: Kind, request: &Header, buffer: u32, patience: Patience, now: u64) -> Self {
        let mut connection = Self::new(kind, Phase::Dialing, buffer, patience, now);
        connection.credit.hear(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// One that the far end asks for.
    pub(super) fn requested(kind: Kind, buffer: u32, patience: Patience, now: u64) -> Self {
        Self { owes_answer: true, ..Self::new(kind, Phase::Requested, buffer, patience, now) }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// When it is to be looked at though nothing happened.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// The far end accepts.
    pub(super) fn accepted(&mut self) {
        if self.phase == Phase::Dialing {
            self.phase = Phase::Open;
            self.deadline = None;
            self.owes_answer = true;
        }
    }

    /// A packet of the guest's, for this connection.
    pub(super) fn receive(&mut self, header: &Header) -> Receipt {
        if self.phase == Phase::Over {
            if header.op == operation::RST {
                self.owes_reset = false;
            }
            return Receipt::Nothing;
        }
        if header.kind != self.kind.number() {
            return self.breach("another type than the connection's");
        }
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        if self.credit.available() > 0 {
            (self.wants_credit, self.asked_credit) = (false, false);
        }
        match (header.op, self.phase) {
            (operation::RST, _) => {
                self.end();
                Receipt::Reset
            }
            (operation::RESPONSE, Phase::Requested) => {
                self.phase = Phase::Open;
                self.deadline = None;
                Receipt::Accepted
            }
            (operation::RW, Phase::Open | Phase::Closing) => self.receive_data(header),
            (operation::SHUTDOWN, Phase::Open | Phase::Closing) => {
                self.guest_off |= header.flags & shutdown::BOTH;
                Receipt::Shut
            }
            (operation::CREDIT_UPDATE, Phase::Open | Phase::Closing) => Receipt::Credit,
            (operation::CREDIT_REQUEST, Phase::Open | Phase::Closing) => {
                self.owes_credit = true;
                Receipt::Credit
            }
            _ => self.breach("an operation that does not go with the state of the connection"),
        }
    }

    fn receive_data(&mut self, header: &Header) -> Receipt {
        if self.guest_off & shutdown::SEND != 0 {
            return self.breach("data after the end of data");
        }
        if !self.credit.receive(header.len) {
            return self.breach("more data than there is credit for");
        }
        if self.phase == Phase::Closing || self.far_off & shutdown::RECEIVE != 0 {
            self.credit.forward(header.len);
            return Receipt::Stale;
        }
        Receipt::Data
    }

    fn breach(&mut self, what: &'static str) -> Receipt {
        self.reset();
        Receipt::Breach(what)
    }

    /// It is over at once, and the guest hears so.
    pub(super) fn reset(&mut self) {
        if self.phase != Phase::Over {
            // A request that the guest has not heard needs no end.
            let unheard = self.phase == Phase::Requested && self.owes_answer;
            self.end();
            self.owes_reset = !unheard;
        }
    }

    /// It is over, as the guest knows.
    fn end(&mut self) {
        self.phase = Phase::Over;
        self.deadline = None;
        self.owes_reset = false;
    }

    /// What the guest does no more.
    pub(super) fn guest_off(&self) -> u32 {
        self.guest_off
    }

    /// The far end sends no more, and all that it sent was delivered; or it receives no more; or both.
    pub(super) fn far_ended(&mut self, flags: u32) {
        self.far_off |= flags & shutdown::BOTH;
    }

    /// What the far end does no more.
    pub(super) fn far_off(&self) -> u32 {
        self.far_off
    }

    /// Whether data may be sent to the guest, credit apart.
    pub(super) fn may_send(&self) -> bool {
        self.phase == Phase::Open
            && self.guest_off & shutdown::RECEIVE == 0
            && self.far_off & shutdown::SEND == 0
    }

    /// There is data for which the guest has no room.
    pub(super) fn want_credit(&mut self) {
        self.wants_credit = true;
    }

    /// So many bytes have left the backlog.
    pub(super) fn forwarded(&mut self, bytes: u32) {
        self.credit.forward(bytes);
        self.owes_credit |= self.credit.is_news();
    }

    /// The next packet without data that the guest is to get. It counts as sent.
    pub(super) fn next_control(&mut self, now: u64) -> Option<Control> {
        if std::mem::take(&mut self.owes_reset) {
            return Some((operation::RST, 0));
        }
        if self.phase == Phase::Over {
            return None;
        }
        if std::mem::take(&mut self.owes_answer) {
            let requested = self.phase == Phase::Requested;
            return Some((if requested { operation::REQUEST } else { operation::RESPONSE }, 0));
        }
        if !matches!(self.phase, Phase::Open | Phase::Closing) {
            return None;
        }
        let due = self.far_off & !self.told_off;
        if due != 0 {
            self.told_off |= due;
            if self.told_off == shutdown::BOTH {
                self.phase = Phase::Closing;
                self.deadline = Some(now.saturating_add(self.patience.close_ns));
            }
            return Some((operation::SHUTDOWN, due));
        }
        if std::mem::take(&mut self.owes_credit) {
            return Some((operation::CREDIT_UPDATE, 0));
        }
        if self.wants_credit && !self.asked_credit {
            self.asked_credit = true;
            return Some((operation::CREDIT_REQUEST, 0));
        }
        None
    }

    /// Whether [`Connection::next_control`] would give one.
    pub(super) fn has_control(&self) -> bool {
        // Nothing of it depends on the time.
        self.clone().next_control(0).is_some()
    }

    /// Whether its time is over: then so is the connection.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        let over = self.deadline.is_some_and(|deadline| deadline <= now);
        if over {
            self.reset();
        }
        over
    }
}
