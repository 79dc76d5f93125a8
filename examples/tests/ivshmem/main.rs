//! Memory in common and doorbells between guests: Debian's kernel on backend `translate`, which needs nothing of the host, and in QEMU.
//!
//! Guests use `examples/guest/ivshmem`, a program that maps the BARs by sysfs. Interrupts come to it by `uio_pci_generic`, through the
//! pin; Debian's kernels have no driver that would give a program messages without an IOMMU.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

mod guest;
mod one_process;
mod pair;
mod qemu;
mod revoked;
mod server_program;

#[path = "../../src/bin/io_versus_qemu/shared_memory.rs"]
mod shared_memory;

/// With a release build of the guest's monitor: `cargo test --release -p vmm-examples --test ivshmem -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, of a minute and more"]
fn rows_are_measured() {
    for shared_memory::Row { name, guests, peer: (peer, figure), unit } in
        shared_memory::rows(env!("CARGO_BIN_EXE_linux").as_ref()).unwrap()
    {
        println!("{name:45} {guests:8.2} {unit}, {peer} {figure:8.2}: {:.2}", guests / figure);
    }
}
