//! The hardware-assisted backend: Linux KVM through `kvm-ioctls`.
//!
//! | module | holds |
//! |---|---|
//! | `hypervisor` | opening `/dev/kvm`, capabilities, creating virtual machines |
//! | `vm` | memory slots, capabilities of a virtual machine |
//! | `irq` | interrupt lines, messages, notifiers |
//! | `clock` | TSC rate, pause and resume |
//! | `vcpu` | the run loop |
//! | `dirty` | the log of written pages: bitmaps, or rings |
//! | `coalesced` | writes that are gathered |
//! | `guest_memfd` | memory in guest_memfds, private memory |
//! | `exits` | exit counters, the report of an instruction that KVM could not execute |
//! | `finish` | instructions that KVM could not execute, executed in software (with feature `translate`) |
//! | `split` | programs on KVM, everything else in software, where KVM would emulate it (with feature `translate`) |
//! | `handle` | kick, NMI and INTR from other threads |
//! | `debug` | breakpoints and single step |
//! | `state`, `platform_state` | KVM's structures to and from the portable state |
//! | `sys`, `rings` | the only unsafe code |
//!
//! Threat model: the guest chooses ports, addresses, data, MSR numbers and the moment of every
//! exit. Exits carry lengths that the host kernel bounds; nothing here indexes by a value of the
//! guest. The host kernel is trusted.
//!
//! A vCPU is kicked by the signal `SIGRTMIN + 0`. When the first vCPU is created, a handler that does nothing is
//! installed for it, unless the program has one; any handler will do, *ignore* would lose kicks. A thread
//! that calls [`Vcpu::run`](crate::Vcpu::run) gets the signal unblocked at its first call and must not block it
//! again.

mod clock;
mod coalesced;
mod debug;
mod dirty;
mod exits;
#[cfg(feature = "translate")]
mod finish;
#[cfg(not(feature = "translate"))]
#[path = "finish/absent.rs"]
mod finish;
mod guest_memfd;
mod handle;
mod hypervisor;
mod irq;
mod platform_state;
mod rings;
#[cfg(feature = "translate")]
mod split;
mod state;
mod sys;
mod vcpu;
mod vm;

pub use hypervisor::{KvmHypervisor, KvmOptions};

/// Name of this backend.
pub const NAME: &str = "kvm";

/// Copies the fields that two structures have under the same names.
macro_rules! same_fields {
    ($from:expr => $to:ident { $($field:ident),* $(,)? } $($rest:tt)*) => {
        $to { $($field: $from.$field,)* $($rest)* }
    };
}
use same_fields;

/// An [`Error::Host`](crate::Error::Host) from an errno.
fn host(operation: &'static str, errno: kvm_ioctls::Error) -> crate::Error {
    crate::Error::Host { backend: NAME, operation, source: std::io::Error::from_raw_os_error(errno.errno()) }
}
