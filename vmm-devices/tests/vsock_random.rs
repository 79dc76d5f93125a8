//! Two socket devices between hostile guests and a monitor that does anything.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

#[path = "support/vsock.rs"]
mod vsock;

use proptest::prelude::*;
use vsock::{Sum, run, steps};

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_guests_and_monitors_do_breaks_a_socket_device(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
        run(&steps(&bytes));
    }
}

/// What is drawn reaches the devices: connections open, data arrives, rules are broken.
#[test]
fn lives_reach_deep() {
    let mut sum = Sum::default();
    let mut random = 1_u64;
    for _ in 0..60 {
        let bytes: Vec<u8> = (0..6000)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (random >> 56) as u8
            })
            .collect();
        let one = run(&steps(&bytes));
        sum.opened += one.opened;
        sum.breaches += one.breaches;
        sum.read += one.read;
    }
    assert!(sum.opened > 20 && sum.breaches > 5 && sum.read > 100, "{sum:?}");
}
