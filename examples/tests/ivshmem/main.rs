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
