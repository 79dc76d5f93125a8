//! What a port has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// Why a frame went nowhere.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DropReason {
            $($(#[$doc])* $name),+
        }

        impl DropReason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// As metrics have it: lower case, with underscores.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text),+
                }
            }
        }
    };
}

reasons! {
    /// It is too short or too long, or its tag is cut off, or what is left to do of it makes no sense.
    Malformed = "malformed",
    /// Its source is a group's address, or nobody's.
    Source = "source",
    /// Its source is not the port's own, or another port's for good.
    Spoofed = "spoofed",
    /// It is for the next bridge alone (01:80:c2:00:00:00 to 0f).
    Reserved = "reserved",
    /// The port is not of its VLAN.
    Vlan = "vlan",
    /// The port has sent too much.
    RateLimit = "rate_limit",
    /// The port has sent too much that goes to everybody.
    Storm = "storm",
    /// It is for where it came from.
    Local = "local",
    /// It is for a port that is kept apart from its own.
    Isolated = "isolated",
    /// The judge said so.
    Judged = "judged",
    /// Of the receiver's drops: there is no driver, or no link.
    NoDriver = "no_driver",
    /// Of the receiver's drops: it has not taken what came before.
    QueueFull = "queue_full",
    /// Of the receiver's drops: its driver cannot take it as it is, and it cannot be cut.
    Offload = "offload",
}

const REASONS: usize = DropReason::ALL.len();

/// Frames, and the bytes in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameTotals {
    /// Frames; a large one that is left to others to cut is one.
    pub frames: u64,
    /// Their bytes, without tags of the switch's.
    pub bytes: u64,
}

/// What was counted of a port so far.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortSnapshot {
    /// What the device sent, all of it.
    pub from_device: FrameTotals,
    /// What was put into its queues.
    pub to_device: FrameTotals,
    /// How many of its frames went to everybody, since they were meant so, or nobody knew the receiver.
    pub flooded: u64,
    /// Addresses that were learned to be here while they were known to be elsewhere.
    pub moved_here: u64,
    /// Addresses that were not learned, since there was no room.
    pub not_learned: u64,
    /// Frames that were cut or summed up here, because the device's driver cannot.
    pub segmented: u64,
    dropped: [u64; REASONS],
}

impl PortSnapshot {
    /// Frames that were dropped for that reason: of those from the device, or, where the reason says so, of those to it.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason as usize).copied().unwrap_or(0)
    }

    /// All that were dropped.
    pub fn all_dropped(&self) -> u64 {
        self.dropped.iter().sum()
    }
}

#[derive(Debug, Default)]
struct Pair {
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Pair {
    fn add(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn totals(&self) -> FrameTotals {
        FrameTotals { frames: self.frames.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

#[derive(Debug, Default)]
pub(super) struct PortCounters {
    from_device: Pair,
    to_device: Pair,
    pub(super) flooded: AtomicU64,
    pub(super) moved_here: AtomicU64,
    pub(super) not_learned: AtomicU64,
    pub(super) segmented: AtomicU64,
    dropped: [AtomicU64; REASONS],
}

impl PortCounters {
    pub(super) fn sent(&self, bytes: usize) {
        self.from_device.add(bytes);
    }

    pub(super) fn delivered(&self, bytes: usize) {
        self.to_device.add(bytes);
    }

    pub(super) fn dropped(&self, reason: DropReason) {
        if let Some(count) = self.dropped.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> PortSnapshot {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        PortSnapshot {
            from_device: self.from_device.totals(),
            to_device: self.to_device.totals(),
            flooded: load(&self.flooded),
            moved_here: load(&self.moved_here),
            not_learned: load(&self.not_learned),
            segmented: load(&self.segmented),
            dropped: self.dropped.each_ref().map(load),
        }
    }
}
