//! What the example programs share: getting a kernel to run.

pub mod debian;
