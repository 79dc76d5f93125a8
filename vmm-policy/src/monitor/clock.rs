//! What time it is.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What time it is. Limits are paced by the first, conditions hold by the second.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some moment; never less than before.
    fn monotonic(&self) -> u64;
    /// Seconds since 1970, UTC.
    fn wall(&self) -> u64;
}

/// The system's.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    begin: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { begin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> u64 {
        // It does not end before the year 2500.
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wall(&self) -> u64 {
        // Before 1970 no policy was written.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}
