//! Doorbells that a kernel rings, without an exit to the monitor.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;

use super::doorbell::Notifiers;

/// A kernel that signals eventfds at writes of the guest: KVM's ioeventfd, which is `attach_doorbell` and `detach_doorbell` of
/// `vmm-cpu`. Give it to the builder of a transport.
///
/// Called with the device locked, on the thread of the vCPU that moves a BAR, too; it must not call the device.
///
/// ```
/// # use std::os::fd::AsFd;
/// # use std::sync::Arc;
/// # use vmm_devices::virtio::{DoorbellHost, GuestDoorbell};
/// # struct Vm;
/// # impl Vm { fn ioeventfd(&self, _: u64, _: u8, _: u64, _: impl AsFd, _attach: bool) -> std::io::Result<()> { Ok(()) } }
/// struct Kvm(Arc<Vm>);
///
/// impl DoorbellHost for Kvm {
///     fn attach(&mut self, bell: &GuestDoorbell) -> bool {
///         self.0.ioeventfd(bell.gpa.0, bell.width, bell.value, &*bell.fd, true).is_ok()
///     }
///
///     fn detach(&mut self, bell: &GuestDoorbell) {
///         if let Err(error) = self.0.ioeventfd(bell.gpa.0, bell.width, bell.value, &*bell.fd, false) {
///             eprintln!("the doorbell at {:#x} stays: {error}", bell.gpa.0);
///         }
///     }
/// }
/// ```
pub trait DoorbellHost: Send {
    /// From now on the kernel rings. `false` if it does not: then the guest's writes come by the bus, as they do without.
    fn attach(&mut self, doorbell: &GuestDoorbell) -> bool;

    /// It rings there no more. For what was attached.
    fn detach(&mut self, doorbell: &GuestDoorbell);
}

/// A write by which a driver rings for a queue, and the eventfd that a kernel signals instead. The eventfd outlives resets of the
/// device; a write while nobody serves the queue does nothing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GuestDoorbell {
    /// Which queue.
    pub queue: u16,
    /// Where the driver writes.
    pub gpa: GuestAddress,
    /// Bytes that it writes.
    pub width: u8,
    /// What it writes. Other values are other queues', or nobody's.
    pub value: u64,
    /// Signalled instead of the write.
    pub fd: Arc<OwnedFd>,
}

/// The doorbells of one device, and those of them that are attached.
pub(crate) struct AttachedDoorbells {
    host: Box<dyn DoorbellHost>,
    notifiers: Notifiers,
    attached: Vec<GuestDoorbell>,
}

impl fmt::Debug for AttachedDoorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachedDoorbells").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl AttachedDoorbells {
    /// None yet.
    pub(crate) fn new(host: Box<dyn DoorbellHost>, notifiers: Notifiers) -> Self {
        Self { host, notifiers, attached: Vec::new() }
    }

    /// Attaches those of all queues, each a write of `width` bytes with the queue's number at `place`.
    pub(crate) fn attach(&mut self, width: u8, place: impl Fn(u16) -> GuestAddress) {
        self.detach();
        for (queue, fd) in (0..=u16::MAX).zip(self.notifiers.iter()) {
            let (gpa, fd) = (place(queue), Arc::clone(fd));
            let doorbell = GuestDoorbell { queue, gpa, width, value: queue.into(), fd };
            if self.host.attach(&doorbell) {
                self.attached.push(doorbell);
            }
        }
    }

    pub(crate) fn detach(&mut self) {
        self.attached.drain(..).for_each(|doorbell| self.host.detach(&doorbell));
    }
}

impl Drop for AttachedDoorbells {
    fn drop(&mut self) {
        self.detach();
    }
}
