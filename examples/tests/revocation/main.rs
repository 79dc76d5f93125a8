//! Channels that are taken back while guests use them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test may panic, also in functions that it calls"
)]

mod channels;
mod regions;
mod sockets;

use channels::{ALL_REGIONS, CHANNELS, Channels, percentile};

#[test]
fn a_reload_cuts_half_of_a_thousand_channels_that_are_in_use() {
    let outcome = Channels::open().cut(true);
    println!(
        "{} sockets: p99 {:?}; {} regions: p99 {:?}; all within {:?}, seen by processors after {:?}; {} packets meanwhile",
        (CHANNELS - ALL_REGIONS) / 2,
        percentile(&outcome.sockets, 99),
        ALL_REGIONS / 2,
        percentile(&outcome.regions, 99),
        outcome.all,
        outcome.seen,
        outcome.packets
    );
}
