//! The full-virtualization backend: guests run in software, with no hardware support and no /dev/kvm.
//!
//! Tier 0, the interpreter, executes decoded basic blocks from a cache. It is complete and portable, and the oracle for
//! tier 1, the binary translator, which works on the same vCPU state, memory and blocks: on x86-64 hosts it makes the
//! host's own instructions of 64-bit blocks that run more than once or twice.
//!
//! Threat model: everything in guest memory and every register is the guest's choice. Interpreted code reaches the host
//! only through [`VcpuIo`](crate::VcpuIo) and through the memory map; the few modules that go to host memory directly are
//! `memory/host.rs`, `memory/map.rs`, `memory/reserve.rs` and `memory/tlb.rs`. Translated code runs in the process and with
//! the rights of the thread that runs the vCPU. What keeps it from the rest of the process:
//!
//! - no address of the guest's reaches memory but through a lookup in the TLB's tables, which only the interpreter fills,
//!   and which yields an address of guest RAM or leaves translated code; or, in user programs, as an address in the
//!   [window](AddressWindow), a range in which nothing but pages of guest RAM is ever mapped, and which no 64-bit address
//!   can lead out of (`memory/window.rs`);
//! - no instruction of the guest's is executed as it is unless it is in the list of those that are: any other is the
//!   interpreter's, and of branches only the target is taken over, which must be a translation;
//! - the host's stack pointer, segment registers and control flags are never the guest's;
//! - no memory is both writable and executable, and the address at which code memory is written is in no register and no
//!   place that translated code can reach.
//!
//! The second wall is the VMM's to put up: a process that runs one virtual machine and gives up, before the guest starts,
//! all rights that this machine's devices do not need. Translated code itself makes no system call; for the window the
//! backend calls `mmap`, `mprotect` and `mremap`, none of them for executable memory or with a descriptor, and
//! `rt_sigaction`.

#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux", not(vmm_portable))),
    allow(dead_code, unused_imports, reason = "what is for the translator alone")
)]

mod alarm;
mod apic;
mod block;
mod clock;
mod code_stores;
mod core;
mod cpu;
mod cpuid;
mod debug;
mod descriptor;
mod entries;
pub(crate) mod exception;
mod exclusive;
mod flags;
mod float;
mod hypervisor;
mod interrupts;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(vmm_portable)))]
mod jit;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(vmm_portable))))]
#[path = "jit/absent.rs"]
mod jit;
mod memory;
mod msr;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod native;
#[cfg(not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")))]
#[path = "native/absent.rs"]
mod native;
mod ops;
mod run;
mod segment;
mod signals;
mod state;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod substitute;
mod task;
#[cfg(test)]
mod test_support;
mod vcpu;
mod vector;
mod vm;
mod word;
mod x87;

pub use hypervisor::{AddressWindow, TranslateHypervisor, TranslateOptions};

/// Name of the backend.
pub const NAME: &str = "translate";
