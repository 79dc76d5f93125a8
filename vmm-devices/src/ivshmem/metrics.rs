//! What a device has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! figures {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counters of one device, which any thread reads with [`snapshot`](Self::snapshot).
        #[derive(Debug, Default)]
        pub struct IvshmemMetrics {
            $(pub(super) $name: Counter,)+
        }

        /// What was counted so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct IvshmemFigures {
            $($(#[$doc])* pub $name: u64,)+
        }

        impl IvshmemMetrics {
            /// What was counted so far.
            pub fn snapshot(&self) -> IvshmemFigures {
                IvshmemFigures { $($name: self.$name.get(),)+ }
            }
        }
    };
}

figures! {
    /// Rings that went to a peer. Those that a kernel rings for the guest are not counted.
    rung,
    /// Rings of peers that were signalled to the guest.
    received,
    /// Rings for peers that are not there.
    no_peer,
    /// Rings for vectors that the peer does not have.
    no_vector,
    /// Rings without the right to ring: none was given, or it was revoked.
    no_right,
    /// Rings that had to wait for the rate limit.
    held,
    /// Stores to registers that were not 4 bytes, aligned.
    malformed,
    /// Loads of shared memory that came by the bus: it was not mapped.
    loads_by_bus,
    /// Stores to shared memory that came by the bus: it was not mapped, or it is read-only.
    stores_by_bus,
    /// Stores that were dropped, because the memory is read-only or gone.
    stores_dropped,
    /// How often the memory was mapped into the guest.
    mapped,
    /// How often that, or the contrary, failed.
    map_failures,
    /// Vectors and peers of a server's that were beyond what the device takes.
    beyond_limits,
}

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
