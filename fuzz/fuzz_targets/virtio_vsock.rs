//! Hostile guests of two socket devices that a switch joins, and a hostile monitor: packets, credit, buffers, connects, ends, revocations.

#![no_main]

use libfuzzer_sys::fuzz_target;

mod threads;
#[path = "../../vmm-devices/tests/support/vsock.rs"]
mod vsock;

fuzz_target!(|bytes: &[u8]| {
    threads::settled(|| vsock::run(&vsock::steps(bytes)));
});
