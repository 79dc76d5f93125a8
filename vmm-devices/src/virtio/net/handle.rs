//! What the monitor does with a network device while the driver uses it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::{NetCounters, Shared};
use crate::net::{Link, MacAddr};
use crate::virtio::rate::Limits;

/// Reaches a network device. Clones reach the same one; any thread may use them.
#[derive(Clone, Debug)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Plugs the cable in, or pulls it out (VIRTIO_NET_S_LINK_UP). While it is out frames are dropped, in both directions. Where the
    /// backend has no link there is none, whatever is said here.
    pub fn set_link(&self, up: bool) {
        if self.0.plugged.swap(up, Ordering::SeqCst) != up {
            self.0.changed();
        }
    }

    /// What the driver is told of the link.
    pub fn link(&self) -> Link {
        self.0.link()
    }

    /// Asks the driver to tell the network where it is (VIRTIO_NET_S_ANNOUNCE), after the machine has moved; whether there is one
    /// that does.
    pub fn announce(&self) -> bool {
        self.0.announce()
    }

    /// The address as the driver has it now.
    pub fn mac(&self) -> MacAddr {
        self.0.mac()
    }

    /// Other limits of frames to the driver, for all devices that share them; `false` if this one was built without.
    pub fn set_receive_limits(&self, limits: Limits) -> bool {
        self.0.receive_rate.as_ref().map(|rate| rate.set_limits(limits)).is_some()
    }

    /// Other limits of frames from the driver.
    pub fn set_send_limits(&self, limits: Limits) -> bool {
        self.0.send_rate.as_ref().map(|rate| rate.set_limits(limits)).is_some()
    }

    /// What has become of frames.
    pub fn counters(&self) -> NetCounters {
        self.0.counters.get()
    }
}
