//! The audit log of a machine: of one that boots, and of a device whose log's disk stands still.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

mod back_pressure;
mod boot;
