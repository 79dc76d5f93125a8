//! How a log is written.

use std::time::Duration;

use super::LogError;

/// When segments end, how long they are kept, and how often the outside is shown the log's state.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LogOptions {
    /// A segment ends when it has this many bytes. At least 64 KiB, 64 MiB if nothing is said.
    pub segment_bytes: u64,
    /// A segment ends when it is this old. A day if nothing is said.
    pub segment_age: Duration,
    /// Whether each segment is signed with a key of its own. It is if nothing is said.
    pub evolve_keys: bool,
    /// Segments that are kept, the present one among them, at least 2; older ones are removed, which the log records. All if
    /// nothing is said.
    pub keep_segments: Option<u64>,
    /// Segments whose end is older than this are removed likewise.
    pub keep_for: Option<Duration>,
    /// How often `checkpoint` and the tiles that are not full are written. A second if nothing is said.
    pub publish_every: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            segment_age: Duration::from_secs(24 * 60 * 60),
            evolve_keys: true,
            keep_segments: None,
            keep_for: None,
            publish_every: Duration::from_secs(1),
        }
    }
}

impl LogOptions {
    /// Those that hold if nothing is said.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another [`segment_bytes`](Self::segment_bytes).
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = bytes;
        self
    }

    /// With another [`segment_age`](Self::segment_age).
    #[must_use]
    pub fn segment_age(mut self, age: Duration) -> Self {
        self.segment_age = age;
        self
    }

    /// With or without [`evolve_keys`](Self::evolve_keys).
    #[must_use]
    pub fn evolve_keys(mut self, evolve: bool) -> Self {
        self.evolve_keys = evolve;
        self
    }

    /// With another [`keep_segments`](Self::keep_segments).
    #[must_use]
    pub fn keep_segments(mut self, count: u64) -> Self {
        self.keep_segments = Some(count);
        self
    }

    /// With another [`keep_for`](Self::keep_for).
    #[must_use]
    pub fn keep_for(mut self, age: Duration) -> Self {
        self.keep_for = Some(age);
        self
    }

    /// With another [`publish_every`](Self::publish_every).
    #[must_use]
    pub fn publish_every(mut self, interval: Duration) -> Self {
        self.publish_every = interval;
        self
    }

    pub(super) fn check(&self) -> Result<(), LogError> {
        let (bytes, keep) = (self.segment_bytes, self.keep_segments.unwrap_or(2));
        if bytes < 1 << 16 {
            let value = bytes.to_string();
            return Err(LogError::Option { option: "segment_bytes", value, allowed: "65536 and more" });
        }
        if keep < 2 {
            return Err(LogError::Option {
                option: "keep_segments",
                value: keep.to_string(),
                allowed: "2 and more",
            });
        }
        Ok(())
    }
}
