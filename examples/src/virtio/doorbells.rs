//! Doorbells of virtio devices that a backend's kernel rings, so that a guest's write does not come to the monitor.

use std::io;
use std::sync::Arc;

use vmm_cpu::{Doorbell, DoorbellAddress, Doorbells, Notifier};
use vmm_devices::virtio::{DoorbellHost, GuestDoorbell};

/// What a virtual machine has for that ([`Vm::doorbells`](vmm_cpu::Vm::doorbells)), as devices want it.
#[derive(Clone, Debug)]
pub struct KernelDoorbells(pub Arc<dyn Doorbells>);

fn as_backends_have_it(found: &GuestDoorbell) -> io::Result<(Doorbell, Notifier)> {
    let doorbell = Doorbell::new(DoorbellAddress::Mmio(found.gpa), found.width).matching(found.value);
    Ok((doorbell, Notifier::from(found.fd.try_clone()?)))
}

impl DoorbellHost for KernelDoorbells {
    fn attach(&mut self, found: &GuestDoorbell) -> bool {
        let attached = as_backends_have_it(found)
            .map_err(anyhow::Error::from)
            .and_then(|(doorbell, notifier)| Ok(self.0.attach_doorbell(&doorbell, &notifier)?));
        if let Err(error) = &attached {
            tracing::warn!(gpa = found.gpa.0, %error, "a doorbell comes by the bus");
        }
        attached.is_ok()
    }

    fn detach(&mut self, found: &GuestDoorbell) {
        let detached = as_backends_have_it(found)
            .map_err(anyhow::Error::from)
            .and_then(|(doorbell, notifier)| Ok(self.0.detach_doorbell(&doorbell, &notifier)?));
        if let Err(error) = detached {
            tracing::warn!(gpa = found.gpa.0, %error, "a doorbell stays where no device is");
        }
    }
}
