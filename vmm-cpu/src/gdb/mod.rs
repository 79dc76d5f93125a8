//! A stub for GDB: whoever speaks its remote protocol debugs the guest, on every backend alike.
//!
//! A VMM opens an [`Endpoint`], says in a [`Debuggee`] what there is to debug, and starts a [`Debugger`], which serves one
//! debugger after another on a thread of its own. vCPUs are the debugger's threads: vCPU 0 is thread 1. When one stops, all
//! do.
//!
//! What there is:
//! - general, segment, x87, SSE and control registers; segment selectors cannot be changed;
//! - memory by guest-virtual address, through the page tables of the vCPU that is looked at. Where they lead to no RAM or
//!   ROM, there is an error; looking sets accessed bits, as the vCPU would;
//! - software breakpoints, which are INT3 in the guest's memory and which the debugger does not see there; hardware
//!   breakpoints and watchpoints, as many as the backend's [`DebugStops`](crate::DebugStops) has; single step of one vCPU,
//!   alone or while others run. An INT3 that the guest has itself stays its own;
//! - `monitor` commands: a walk of the page tables, system registers, pending interrupts, and what the VMM adds by
//!   [`Monitor`];
//! - interrupting, detaching, killing, and attaching again.
//!
//! Addresses of breakpoints are linear: in code with a segment base, that is not what RIP holds.
//!
//! Threat model: the debugger owns the guest, so whoever can connect does. Its bytes are not trusted otherwise: packets are
//! bounded, what is malformed ends the connection and nothing else, and no packet reaches memory of the host that is not the
//! guest's.

mod debuggee;
mod debugger;
mod endpoint;
mod float;
mod inferior;
mod memory;
mod monitor;
mod packet;
mod page_walk;
mod registers;
mod session;
mod stops;
mod target;

pub use debuggee::Debuggee;
pub use debugger::{Debugger, Event};
pub use endpoint::{Endpoint, ListenError};
pub use monitor::{Monitor, MonitorCommand};
