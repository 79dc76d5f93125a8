//! Doorbells of virtio devices that a backend's kernel rings, so that a guest's write does not come to the monitor.

use std::sync::Arc;

use vmm_cpu::{Doorbell, DoorbellAddress, Doorbells, Notifier};
use vmm_devices::virtio::{DoorbellHost, GuestDoorbell};

/// What a virtual machine has for that ([`Vm::doorbells`](vmm_cpu::Vm::doorbells)), as devices want it.
#[derive(Clone, Debug)]
pub struct KernelDoorbells(pub Arc<dyn Doorbells>);

impl KernelDoorbells {
    /// Asks the backend to attach or to detach what a device has, in the backend's terms.
    fn ask(
        &self,
        found: &GuestDoorbell,
        what: impl FnOnce(&dyn Doorbells, &Doorbell, &Notifier) -> vmm_cpu::Result<()>,
    ) -> anyhow::Result<()> {
        let doorbell = Doorbell::new(DoorbellAddress::Mmio(found.gpa), found.width).matching(found.value);
        let notifier = Notifier::from(found.fd.try_clone()?);
        Ok(what(&*self.0, &doorbell, &notifier)?)
    }
}

impl DoorbellHost for KernelDoorbells {
    fn attach(&mut self, found: &GuestDoorbell) -> bool {
        let attached = self.ask(found, |kernel, doorbell, fd| kernel.attach_doorbell(doorbell, fd));
        if let Err(error) = &attached {
            tracing::warn!(gpa = found.gpa.0, %error, "a doorbell comes by the bus");
        }
        attached.is_ok()
    }

    fn detach(&mut self, found: &GuestDoorbell) {
        if let Err(error) = self.ask(found, |kernel, doorbell, fd| kernel.detach_doorbell(doorbell, fd)) {
            tracing::warn!(gpa = found.gpa.0, %error, "a doorbell stays where no device is");
        }
    }
}
