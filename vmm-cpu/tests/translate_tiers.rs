//! What is hard for a translator, on each tier of the `translate` backend: the interpreter, translated code with an exact
//! count of instructions, and translated code without, with the address window and without. All must come to the same.
//!
//! - [`machine`]: a guest with page tables and a handler for every vector, whose traps the test sees and changes.
//! - [`program`]: its code.
//! - [`self_modifying`]: code that is written while it runs.
//! - [`remapped`]: code whose translation of addresses changes.
//! - [`data_pages`]: data likewise, and stores that have to be noticed.
//! - [`straddling`]: instructions and blocks that lie in two pages.
//! - [`split_accesses`]: accesses that go to two pages.
//! - [`boundaries`]: an interrupt between any two instructions.
//! - [`faults`]: a fault in every access of every kind of instruction, of those in [`accesses`].
//! - [`repeated`]: string instructions that fault midway.

#![cfg(feature = "translate")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, unreachable_pub)]

mod translate_tiers {
    mod accesses;
    mod boundaries;
    mod data_pages;
    mod faults;
    mod machine;
    mod program;
    mod remapped;
    mod repeated;
    mod self_modifying;
    mod split_accesses;
    mod straddling;
}
