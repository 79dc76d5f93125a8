//! What a VMM says that there is to debug.

use std::fmt;
use std::sync::Arc;

use vmm_memory::GuestRam;

use super::monitor::Monitor;
use crate::threads::VcpuThreads;
use crate::vm::VmClock;

/// A virtual machine to debug: its vCPUs, which are the debugger's threads, and its memory.
pub struct Debuggee {
    pub(super) threads: Arc<VcpuThreads>,
    pub(super) ram: GuestRam,
    pub(super) clock: Option<Arc<dyn VmClock>>,
    pub(super) monitors: Vec<Box<dyn Monitor>>,
}

impl fmt::Debug for Debuggee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debuggee").field("vcpus", &self.threads.indices()).finish_non_exhaustive()
    }
}

impl Debuggee {
    /// The vCPUs of `threads`, which see the memory of `ram`.
    pub fn new(threads: Arc<VcpuThreads>, ram: GuestRam) -> Self {
        Self { threads, ram, clock: None, monitors: Vec::new() }
    }

    /// Guest time stands still while the debugger has the vCPUs stopped. Devices notice nothing if they take the time from
    /// that clock too.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn VmClock>) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Adds commands to the debugger's `monitor`. Of two with one name, the first added is meant.
    #[must_use]
    pub fn monitor(mut self, monitor: impl Monitor + 'static) -> Self {
        self.monitors.push(Box::new(monitor));
        self
    }
}
