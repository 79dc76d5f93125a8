//! Compares the interpreter with the processor that it runs on.
#![allow(dead_code, reason = "grows")]
mod case;
mod forms;
mod generate;
mod memory;
mod native;
mod scan;
mod start;
mod tier0;
mod undefined;
fn main() {}
