//! A policy in front of the devices: `vmm_policy` decides, `vmm_devices` asks it by its own traits. Neither crate knows the other; this
//! module is what lies between them, for other monitors to copy.
//!
//! | part | asked by |
//! |---|---|
//! | [`Enforcement`] | a gate for a [`Gatekeeper`](vmm_devices::channel::Gatekeeper): vsock, networks, memory in common, doorbells |
//! | [`PolicyFlows`] | the flow table of a switch, for each flow between two ports (layers 2 to 4) |
//! | [`Disks`], [`PolicedDisk`] | a block device: one writer or several readers, and who may at all |
//! | [`PolicedBalloon`] | a balloon, whose pages are counted |
//! | [`Enforcement::plug`] | who plugs processors, memory and devices while a guest runs |
//! | [`Enforcement::share`] | who serves a folder of the host's |
//! | [`XenGate`] | the paravirtual backend, for event channels and grants to other domains |
//!
//! # How it is put in front of devices
//! ```
//! use vmm_devices::ManualClock;
//! use vmm_devices::channel::{RegionMap, VmIdentity};
//! use vmm_devices::net::switch::{PortConfig, Switch, flows::FlowTable};
//! use vmm_devices::virtio::Vsock;
//! use vmm_examples::policy::Enforcement;
//! use vmm_memory::Access;
//! use vmm_policy::{Monitor, Policy};
//!
//! // A policy, and the machines that take part: each life of one is registered, and unregistered at its end.
//! let policy = Policy::parse(
//!     "vm web { uuid 00000000-0000-0000-0000-0000000000a1 }\n\
//!      network lan {}  region frames {}\n\
//!      allow web to attach network lan\n\
//!      allow web to map-ro region frames",
//! )?;
//! let enforcement = Enforcement::new(Monitor::new(policy));
//! let web = VmIdentity::new(0xa1, 1);
//! enforcement.register(web)?;
//!
//! // Devices take a right for each channel, and get it of the gatekeeper, which asks the policy.
//! let gatekeeper = enforcement.gatekeeper();
//! let switch = Switch::builder("lan", ManualClock::default()).build();
//! switch.set_judge(Some(std::sync::Arc::new(FlowTable::builder(enforcement.flows()).build())));
//! let right = gatekeeper.open(web.into(), None, vmm_devices::channel::NetworkAttach { network: "lan".into() })?;
//! let port = switch.attach(right, PortConfig::new("web"))?; // to the builder of a network device
//! let vsock = Vsock::builder(3, || 0).gatekeeper(web, gatekeeper.clone()).build()?; // asks at each connection
//! let write = RegionMap { region: "frames".into(), access: Access::ReadWrite };
//! assert!(gatekeeper.open(web.into(), None, write).unwrap_err().reason().contains("no rule allows it"));
//!
//! // Another policy closes what it does not allow while guests run, and says what and why.
//! let cut = enforcement.reload(Policy::deny_all())?;
//! assert_eq!(cut.closed.len(), 1);
//! assert!(switch.ports().is_empty());
//! # let _ = (port, vsock);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What holds
//! Nothing opens that no rule allows, as the gatekeeper has no other gate. [`Enforcement::reload`] returns when what lost its right is
//! closed: sockets are shut, memory is unmapped, ports are gone. A request that is decided meanwhile is decided again. Of flows,
//! each sender's frame that is on its way may still arrive.
//!
//! Virtual machines are told apart by UUID and incarnation: one that starts again is registered again, and what was for its last life is
//! refused. What asks is the device, so a guest cannot say that it is another.

mod balloon;
mod disk;
mod flows;
mod gate;
#[cfg(test)]
mod tests;
mod words;
mod xen;

pub use balloon::PolicedBalloon;
pub use disk::{DiskError, Disks, PolicedDisk, lock_image};
pub use flows::PolicyFlows;
pub use gate::{Cut, Enforcement};
pub use xen::XenGate;
