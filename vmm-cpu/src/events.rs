//! What becomes of vCPUs, for those who write it down.

use std::fmt;

use crate::threads::VcpuExit;

/// Hears what becomes of the vCPUs of a [`VcpuThreads`](crate::VcpuThreads), for an audit log: given to
/// [`VcpuThreads::observe`](crate::VcpuThreads::observe).
///
/// Called by the vCPU's own thread, with no lock held; the vCPU stands still until it returns.
pub trait VcpuEvents: fmt::Debug + Send + Sync {
    /// A vCPU has stopped by itself: a reset, a shutdown, a debug stop, or what its backend could not execute.
    fn stopped(&self, exit: &VcpuExit);
}
