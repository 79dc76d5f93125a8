//! What a guest has sent and nobody has taken yet: bytes, and where messages end in them.

use std::collections::VecDeque;

/// The end of a message: its length, and whether it ends a record too. One word, for there may be many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End(u32);

const RECORD: u32 = 1 << 31;

impl End {
    fn new(len: u32, record: bool) -> Self {
        Self(len | if record { RECORD } else { 0 })
    }

    pub(super) fn len(self) -> usize {
        // The host's usize has 32 bits at least.
        usize::try_from(self.0 & !RECORD).unwrap_or(0)
    }

    pub(super) fn is_record(self) -> bool {
        self.0 & RECORD != 0
    }

    fn shortened(self, by: u32) -> Self {
        Self::new((self.0 & !RECORD).saturating_sub(by), self.is_record())
    }
}

/// The buffer of one connection. Credit bounds its bytes, [`Backlog::close_message`] its messages.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front of it that have left.
    head: usize,
    ends: VecDeque<End>,
    /// Bytes behind the last end.
    open: u32,
}

impl Backlog {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.head
    }

    /// Whether nothing waits, not even an empty message.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0 && self.ends.is_empty()
    }

    /// Those bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.head..).unwrap_or_default()
    }

    /// The first end of a message that is here.
    pub(super) fn first_end(&self) -> Option<End> {
        self.ends.front().copied()
    }

    /// Appends `len` bytes, which `fill` writes; `false` if it cannot, and then there are none.
    #[must_use]
    pub(super) fn append(&mut self, len: u32, fill: impl FnOnce(&mut [u8]) -> bool) -> bool {
        let before = self.bytes.len();
        self.bytes.resize(before + usize::try_from(len).unwrap_or(0), 0);
        let filled = self.bytes.get_mut(before..).is_some_and(fill);
        if filled {
            self.open = self.open.saturating_add(len);
        } else {
            self.bytes.truncate(before);
        }
        filled
    }

    /// A message ends here; `false` if `most` of them wait already. Empty ones take no credit, and would be without bound.
    #[must_use]
    pub(super) fn close_message(&mut self, record: bool, most: usize) -> bool {
        let room = self.ends.len() < most;
        if room {
            self.ends.push_back(End::new(self.open, record));
            self.open = 0;
        }
        room
    }

    /// Bytes of a message that has not ended.
    pub(super) fn unfinished(&self) -> u32 {
        self.open
    }

    /// The first `len` bytes have left; all bytes are a stream, or the beginning of a message.
    pub(super) fn take(&mut self, len: usize) {
        let len = len.min(self.len());
        self.head += len;
        let taken = u32::try_from(len).unwrap_or(u32::MAX);
        match self.ends.front_mut() {
            Some(end) => *end = end.shortened(taken),
            None => self.open = self.open.saturating_sub(taken),
        }
        if self.head == self.bytes.len() {
            self.bytes.clear();
            self.head = 0;
            // What a burst took is not kept.
            self.bytes.shrink_to(KEPT);
        } else if self.head >= self.bytes.len() / 2 {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
    }

    /// So has the first end.
    pub(super) fn take_end(&mut self) {
        self.ends.pop_front();
    }

    /// Throws all away; how many bytes that were.
    pub(super) fn clear(&mut self) -> usize {
        let len = self.len();
        *self = Self::default();
        len
    }
}

/// Bytes of memory that an empty buffer keeps.
const KEPT: usize = 128 << 10;
