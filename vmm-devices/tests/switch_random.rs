//! Random guests on a switch, and random clients of its broker.

// The lint spares test functions only, not what they call.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::expect_used,
    clippy::cast_possible_truncation
)]

use arbitrary::{Arbitrary as _, Unstructured};
use proptest::prelude::*;

#[path = "support/switch.rs"]
mod switch;

proptest! {
    #[test]
    fn nothing_goes_where_it_may_not(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let mut input = Unstructured::new(&bytes);
        let mut actions = Vec::new();
        while !input.is_empty() {
            let Ok(action) = switch::Action::arbitrary(&mut input) else { break };
            actions.push(action);
        }
        switch::exercise(&actions);
    }
}
