//! What the other crates of the family tell, written down as events. Each of them owns the trait that it tells it by, and knows nothing of
//! this crate; each feature here implements one crate's.
//!
//! | feature | module | implements | events |
//! |---|---|---|---|
//! | `vmm-cpu` | `cpu` | `vmm_cpu::VcpuEvents` | launch, with its measurement; reset, shutdown, emulation failure |
//! | `vmm-devices` | `devices` | `vmm_devices::channel::Gate`, `vmm_devices::platform::PlatformEvents`, `on_failure` of transports | opened, refused, revoked, closed; reset, power-off; a guest's misbehaviour |
//! | `vmm-policy` | `policy` | `vmm_policy::Observer` | decisions with rule and policy, revocations, policies that come into force, what waits for a second person |
//! | `vmm-policy` | `desk` | around `vmm_policy::trust::Desk` | managers' verbs, before they are carried out and how they end |
//!
//! What is about to happen is [admitted](crate::pipeline::Emitter::admit) before it does, so that nothing opens or starts of which there is no record;
//! what has happened is [emitted](crate::pipeline::Emitter::emit), which never waits.

#[cfg(feature = "vmm-cpu")]
pub mod cpu;
#[cfg(feature = "vmm-policy")]
pub mod desk;
#[cfg(feature = "vmm-devices")]
pub mod devices;
#[cfg(feature = "vmm-policy")]
pub mod policy;

use crate::event::Event;
use crate::pipeline::Emitter;

/// Emits; what cannot be encoded is counted by the emitter and told here.
fn emit(emitter: &Emitter, event: &Event) {
    if let Err(error) = emitter.emit(event) {
        tracing::error!(error = %error, kind = %event.kind, "an event is counted and not written");
    }
}
