//! What a device has done, counted: requests, bytes, errors, and how long requests took.
//!
//! A device tells a [`Metrics`] of each request that has ended. [`DeviceMetrics`] counts with atomics, and whoever exports the
//! figures reads them with [`DeviceMetrics::snapshot`]; what names and formats they go by is not this crate's business.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a request did, as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activity {
    /// The driver got data: a disk was read, a packet received.
    Read,
    /// The driver gave data.
    Write,
    /// Neither: a flush, a discard, a question.
    Other,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it did, or would have.
    pub activity: Activity,
    /// Bytes of data that it moved between driver and device: of its buffers, not of what it asked to be done elsewhere (a discard, zeros
    /// on a disk). Of one that failed, those that the driver can rely on: as a rule none, though some may have moved.
    pub bytes: u64,
    /// Whether it was done; if not, the driver was told so.
    pub succeeded: bool,
    /// Nanoseconds from when the device took it to when it gave it back, waits for rate limits included.
    pub latency_ns: u64,
}

/// Told of each request. Called by workers, from several threads at once, on the way of every request: it must be quick.
pub trait Metrics: Send + Sync {
    /// A request has ended.
    fn ended(&self, request: Ended);

    /// A request has to wait for a rate limit.
    fn throttled(&self) {}
}

/// Buckets of a latency histogram.
pub const LATENCY_BUCKETS: usize = 40;

/// Counters of one device. Share it in an `Arc`.
#[derive(Debug)]
pub struct DeviceMetrics {
    activities: [Counters; 3],
    latency: [AtomicU64; LATENCY_BUCKETS],
    latency_total: AtomicU64,
    throttled: AtomicU64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// What was counted of one kind of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests that ended, errors among them.
    pub requests: u64,
    /// Bytes that they moved, as [`Ended::bytes`] has it.
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
}

/// What was counted so far. Requests that end while it is taken may be in one figure and not yet in another.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MetricsSnapshot {
    /// Of [`Activity::Read`].
    pub read: Totals,
    /// Of [`Activity::Write`].
    pub write: Totals,
    /// Of [`Activity::Other`].
    pub other: Totals,
    /// Requests by latency: bucket `i` holds those below [`latency_bound_ns`]`(i)` and not below the bound before.
    pub latency: [u64; LATENCY_BUCKETS],
    /// Nanoseconds that all requests took together.
    pub latency_total_ns: u64,
    /// How often a request had to wait for a rate limit.
    pub throttled: u64,
}

/// Requests in bucket `index` took less than this many nanoseconds: powers of two from 1 on. The last bucket, from about 4.6
/// minutes on, has no bound.
pub fn latency_bound_ns(index: usize) -> u64 {
    match u32::try_from(index) {
        Ok(shift) if index + 1 < LATENCY_BUCKETS => 1 << shift,
        _ => u64::MAX,
    }
}

impl Default for DeviceMetrics {
    fn default() -> Self {
        Self {
            activities: Default::default(),
            latency: [const { AtomicU64::new(0) }; LATENCY_BUCKETS],
            latency_total: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
        }
    }
}

impl DeviceMetrics {
    /// What was counted so far.
    pub fn snapshot(&self) -> MetricsSnapshot {
        let [read, write, other] = self.activities.each_ref().map(|counters| Totals {
            requests: counters.requests.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
        });
        MetricsSnapshot {
            read,
            write,
            other,
            latency: self.latency.each_ref().map(|bucket| bucket.load(Ordering::Relaxed)),
            latency_total_ns: self.latency_total.load(Ordering::Relaxed),
            throttled: self.throttled.load(Ordering::Relaxed),
        }
    }
}

impl Metrics for DeviceMetrics {
    fn ended(&self, request: Ended) {
        let [read, write, other] = &self.activities;
        let counters = match request.activity {
            Activity::Read => read,
            Activity::Write => write,
            Activity::Other => other,
        };
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(request.bytes, Ordering::Relaxed);
        if !request.succeeded {
            counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.latency_total.fetch_add(request.latency_ns, Ordering::Relaxed);
        let bucket = usize::try_from(u64::BITS - request.latency_ns.leading_zeros()).unwrap_or(0);
        if let Some(bucket) = self.latency.get(bucket.min(LATENCY_BUCKETS - 1)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_by_itself() {
        let metrics = DeviceMetrics::default();
        let ended = |activity, bytes, succeeded| Ended { activity, bytes, succeeded, latency_ns: 7 };
        metrics.ended(ended(Activity::Read, 512, true));
        metrics.ended(ended(Activity::Read, 0, false));
        metrics.ended(ended(Activity::Write, 4096, true));
        metrics.ended(ended(Activity::Other, 0, true));
        metrics.throttled();
        let snapshot = metrics.snapshot();
        assert_eq!(snapshot.read, Totals { requests: 2, bytes: 512, errors: 1 });
        assert_eq!(snapshot.write, Totals { requests: 1, bytes: 4096, errors: 0 });
        assert_eq!(snapshot.other, Totals { requests: 1, bytes: 0, errors: 0 });
        assert_eq!((snapshot.latency_total_ns, snapshot.throttled), (28, 1));
    }

    #[test]
    fn latencies_are_in_the_bucket_whose_bounds_enclose_them() {
        for latency_ns in [0, 1, 2, 3, 4, 1000, 1 << 20, (1 << 38) - 1, 1 << 38, 1 << 39, u64::MAX] {
            let metrics = DeviceMetrics::default();
            metrics.ended(Ended { activity: Activity::Other, bytes: 0, succeeded: true, latency_ns });
            let buckets = metrics.snapshot().latency;
            let index = buckets.iter().position(|count| *count == 1).unwrap();
            assert_eq!(buckets.iter().sum::<u64>(), 1);
            assert!(latency_ns < latency_bound_ns(index) || index == LATENCY_BUCKETS - 1);
            assert!(index == 0 || latency_ns >= latency_bound_ns(index - 1), "{latency_ns} in {index}");
        }
    }
}
