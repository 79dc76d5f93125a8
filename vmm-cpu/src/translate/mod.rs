//! The full-virtualization backend: guests run in software, with no hardware support and no /dev/kvm.
//!
//! Tier 0, the interpreter, executes decoded basic blocks from a cache. It is complete and portable, and the oracle for
//! the binary translator that works on the same vCPU state, memory and blocks.
//!
//! Threat model: everything in guest memory and every register is the guest's choice. Interpreted code reaches the host
//! only through [`VcpuIo`](crate::VcpuIo) and through the memory map; the few modules that go to host memory directly are
//! `memory/host.rs`, `memory/map.rs` and `memory/tlb.rs`.

mod alarm;
mod apic;
mod block;
mod clock;
mod core;
mod cpu;
mod cpuid;
mod debug;
mod descriptor;
mod exception;
mod exclusive;
mod flags;
mod float;
mod hypervisor;
mod interrupts;
mod jit;
mod memory;
mod msr;
mod ops;
mod run;
mod segment;
mod signals;
mod state;
mod task;
#[cfg(test)]
mod test_support;
mod vcpu;
mod vector;
mod vm;
mod word;
mod x87;

pub use hypervisor::{TranslateHypervisor, TranslateOptions};

/// Name of the backend.
pub const NAME: &str = "translate";
