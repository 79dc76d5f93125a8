//! Ring-0 behaviour of the `translate` backend beside that of QEMU's translator.
//!
//! A seed makes scenarios: each a small program at some privilege level in some mode, with descriptor tables, page tables
//! and stacks of its own. One guest program, the [`harness`], runs them one after another, first under `translate`, then
//! under QEMU, and writes down every exception and interrupt with all that its handler can see. Afterwards all of a
//! scenario's memory must be the same.
//!
//! Where QEMU is known not to do what the manuals say, [`known`] says so.

#![allow(missing_docs, reason = "a test program: its items are for its own modules")]

pub mod arena;
mod compare;
pub mod elf;
pub mod engines;
pub mod harness;
pub mod known;
pub mod layout;
mod memory;
mod outcome;
mod random;
mod topics;

pub use compare::{Options, Summary, compare};
pub use topics::TOPICS;
