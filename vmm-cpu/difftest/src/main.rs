//! Compares the interpreter with the processor that it runs on.
#![allow(dead_code, reason = "grows")]
mod case;
fn main() {}
