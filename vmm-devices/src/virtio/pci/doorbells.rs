//! Doorbells that a kernel rings, at addresses that the guest chooses: they follow the BAR that they lie in.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;

use super::{DOORBELL, place};
use crate::virtio::doorbell::Notifiers;

/// A kernel that signals eventfds at writes of the guest, without an exit to the monitor: KVM's ioeventfd, which is
/// `attach_doorbell` and `detach_doorbell` of `vmm-cpu`.
///
/// Called with the device locked, on the thread of the vCPU that moves the BAR; it must not call the device.
pub trait DoorbellHost: Send {
    /// From now on the kernel rings. `false` if it does not: then the guest's writes come by the bus, as they do without.
    fn attach(&mut self, doorbell: &GuestDoorbell) -> bool;

    /// It rings there no more. For what was attached.
    fn detach(&mut self, doorbell: &GuestDoorbell);
}

/// A write by which a driver rings for a queue, and the eventfd that a kernel signals instead.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GuestDoorbell {
    /// Which queue.
    pub queue: u16,
    /// Where the driver writes.
    pub gpa: GuestAddress,
    /// Bytes that it writes.
    pub width: u8,
    /// What it writes.
    pub value: u64,
    /// Signalled instead of the write.
    pub fd: Arc<OwnedFd>,
}

/// The doorbells of one function, and those of them that are attached.
pub(super) struct Doorbells {
    host: Box<dyn DoorbellHost>,
    notifiers: Notifiers,
    attached: Vec<GuestDoorbell>,
}

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl Doorbells {
    pub(super) fn new(host: Box<dyn DoorbellHost>, notifiers: Notifiers) -> Self {
        Self { host, notifiers, attached: Vec::new() }
    }

    /// The BAR answers from `base` on, or nowhere.
    pub(super) fn moved(&mut self, base: Option<u64>) {
        self.attached.drain(..).for_each(|doorbell| self.host.detach(&doorbell));
        let Some(base) = base else { return };
        for (queue, fd) in (0..=u16::MAX).zip(self.notifiers.iter()) {
            // The driver writes the queue's index, of 16 bits (4.1.5.2).
            let gpa = GuestAddress(base + place::NOTIFY + u64::from(queue) * DOORBELL);
            let doorbell = GuestDoorbell { queue, gpa, width: 2, value: queue.into(), fd: Arc::clone(fd) };
            if self.host.attach(&doorbell) {
                self.attached.push(doorbell);
            }
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.moved(None);
    }
}
