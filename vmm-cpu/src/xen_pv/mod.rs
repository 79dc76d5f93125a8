//! The paravirtual backend: guest kernels that know Xen's PV ABI, with no Xen.
//!
//! Two layers. The ABI is pure state over guest memory, tested without any engine. An engine ([`engine::Engine`])
//! executes the guest deprivileged, over any other backend of this crate.

pub mod abi;
mod alarm;
pub mod builder;
mod console;
mod cpuid;
mod domain;
mod emulate;
pub mod engine;
mod event_channels;
mod events;
mod gate;
mod grants;
mod hypercall;
mod hypervisor;
mod m2p;
mod memory;
mod processor;
mod repair;
#[cfg(feature = "snapshot")]
pub(crate) mod saved;
mod start;
mod tables;
#[cfg(test)]
mod test_support;
mod time;
mod time_info;
mod trap;
mod vcpu;
mod vcpu_abi;
mod vm;

pub use console::{ConsoleSink, ConsoleSource, NoConsole};
pub use cpuid::pv_cpuid;
pub use domain::{Domain, DomainConfig};
pub use event_channels::EventChannels;
pub use gate::{BackendsOnly, EventSink, Gate};
pub use grants::{GrantError, GrantedFrame};
pub use hypervisor::{DomainDevices, XenPvHypervisor};
pub use time::Clock;
pub use vcpu_abi::{Action, VcpuAbi, Wake};
pub use vm::XenPvVm;

/// Name of the backend.
pub const NAME: &str = "xen-pv";

#[cfg(not(feature = "snapshot"))]
const NO_SNAPSHOTS: &str = "vmm-cpu was built without its feature `snapshot`";
