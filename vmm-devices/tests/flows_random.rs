//! Random guests on a switch whose flows are judged.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use arbitrary::{Arbitrary as _, Unstructured};
use proptest::prelude::*;

#[path = "support/flows.rs"]
mod flows;

proptest! {
    #[test]
    fn what_passes_is_what_a_list_of_flows_says(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let mut input = Unstructured::new(&bytes);
        let mut actions = Vec::new();
        while !input.is_empty() {
            let Ok(action) = flows::Action::arbitrary(&mut input) else { break };
            actions.push(action);
        }
        flows::exercise(&actions);
    }
}
