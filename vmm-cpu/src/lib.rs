#![doc = include_str!("../README.md")]

mod coalesced;
pub mod cpuid;
mod debug;
mod decode;
pub mod entry;
mod error;
mod eventfd;
mod events;
mod exact;
#[cfg(feature = "gdb")]
pub mod gdb;
mod hypervisor;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
#[cfg(any(
    feature = "xen-pv",
    all(feature = "kvm", feature = "translate", target_os = "linux", target_arch = "x86_64")
))]
mod own_tables;
#[cfg(any(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"), feature = "translate"))]
mod pin;
mod private_memory;
mod registry;
#[cfg(feature = "snapshot")]
pub mod snapshot;
pub mod state;
mod threads;
#[cfg(feature = "translate")]
pub mod translate;
#[cfg(all(any(all(feature = "kvm", target_os = "linux"), feature = "translate"), target_arch = "x86_64"))]
mod tsc;
mod vcpu;
mod vm;
#[cfg(feature = "xen-pv")]
pub mod xen_pv;

pub mod writing_a_backend {
    #![doc = include_str!("../docs/writing-a-backend.md")]
}

pub use coalesced::{CoalescedWrites, CoalescedZone};
pub use cpuid::{CpuModel, CpuidTable};
pub use debug::{DebugReason, DebugRequest, DebugStop, DebugStops, HardwareStop, HardwareStopKind};
pub use error::{Error, Result};
pub use events::VcpuEvents;
pub use exact::{ExactStop, ExactStops};
pub use hypervisor::{Capabilities, ClockConfig, ClockSource, Hypervisor, InterruptMode, VmConfig};
pub use private_memory::{GuestMemfdKind, GuestMemfds, MemoryFault, PrivateMemory};
pub use registry::{backend_names, open_backend};
pub use threads::{PauseHandle, VcpuExit, VcpuThreads};
pub use vcpu::{EmptyBus, Halt, Hypercall, MsrFault, UnhandledInstruction, Vcpu, VcpuHandle, VcpuIo};
pub use vm::{
    Doorbell, DoorbellAddress, Doorbells, GsiRoute, GsiTarget, GuestAccess, GuestDirtyLog, Hypercalls,
    InterruptLines, InterruptNotifiers, MappedRegion, MsiMessage, MsiSink, MsrFilter, MsrRange, Notifier, Vm,
    VmClock,
};
pub use vmm_memory;
pub use vmm_sys_util;
