//! What the fuzz target `virtio_block` does, on random bytes.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, unreachable_pub)]

#[path = "support/block.rs"]
mod block;

use arbitrary::{Arbitrary as _, Unstructured};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_hostile_guest_breaks_no_disk(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let mut bytes = Unstructured::new(&bytes);
        let mut actions = Vec::new();
        while !bytes.is_empty() {
            actions.extend(block::Action::arbitrary(&mut bytes));
        }
        block::exercise(&actions);
    }
}
