//! Virtio devices with the drivers of Debian's kernel, on backend `translate`, which needs nothing of the host. Each device is
//! used over both transports.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

mod balloon;
mod console;
mod disk;
mod guest;
mod network;
mod scrape;
mod switch;
mod vsock;
mod wrong;
