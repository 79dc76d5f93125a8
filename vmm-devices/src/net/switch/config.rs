//! What a port is to be like.

use std::sync::Arc;

use super::error::SwitchError;
use super::ring::check_size;
use super::vlan::{PortVlans, VlanId};
use crate::net::MacAddr;
use crate::virtio::rate::{Limits, Rate};

/// Pairs of queues that a port has at most.
pub const MAX_QUEUES: u16 = 8;

/// With whom a port may talk beside what VLANs say (a private VLAN).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// With all.
    #[default]
    Promiscuous,
    /// With promiscuous ones.
    Isolated,
    /// With promiscuous ones, and those of the same community.
    Community(u16),
}

impl Isolation {
    /// Whether frames go between two such ports.
    pub(super) fn meets(self, other: Self) -> bool {
        match (self, other) {
            (Self::Promiscuous, _) | (_, Self::Promiscuous) => true,
            (Self::Community(one), Self::Community(two)) => one == two,
            _ => false,
        }
    }
}

/// What a port is to be like.
///
/// By default it is an access port of [`VlanId::DEFAULT`], from whose device frames of any source come; 64 addresses are learned there; 10 000
/// frames a second go to everybody; each of its queues holds 2 MiB.
#[derive(Clone, Debug)]
pub struct PortConfig {
    pub(super) name: Arc<str>,
    pub(super) vlans: PortVlans,
    pub(super) mac: Option<MacAddr>,
    pub(super) isolation: Isolation,
    pub(super) limits: Limits,
    pub(super) flood: Option<Rate>,
    pub(super) learned: usize,
    pub(super) queues: u16,
    pub(super) ring: usize,
}

impl PortConfig {
    /// A port of that name, which metrics and policies know it by.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            vlans: PortVlans::default(),
            mac: None,
            isolation: Isolation::default(),
            limits: Limits::default(),
            flood: Rate::new(10_000, 10_000),
            learned: 64,
            queues: 1,
            ring: 2 << 20,
        }
    }

    /// Its VLANs.
    #[must_use]
    pub fn vlans(mut self, vlans: PortVlans) -> Self {
        self.vlans = vlans;
        self
    }

    /// Locks it to an address: what its device sends from another one is dropped, nobody else's frames come from it in the VLAN of its untagged
    /// frames, and frames for it go there from the beginning.
    #[must_use]
    pub fn mac(mut self, mac: MacAddr) -> Self {
        self.mac = Some(mac);
        self
    }

    /// With whom it may talk.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// What its device may send: frames beyond that are dropped. To have the device wait instead, limit the device.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How many frames of its device's may go to everybody; `None` is without a limit.
    #[must_use]
    pub fn flood_limit(mut self, frames: Option<Rate>) -> Self {
        self.flood = frames;
        self
    }

    /// How many addresses are learned there at most. With a locked address there is none to learn in that VLAN.
    #[must_use]
    pub fn learned_macs(mut self, most: usize) -> Self {
        self.learned = most;
        self
    }

    /// Pairs of queues: 1 to [`MAX_QUEUES`].
    #[must_use]
    pub fn queues(mut self, pairs: u16) -> Self {
        self.queues = pairs;
        self
    }

    /// Bytes that each queue to the device holds: a power of two from 256 KiB to 64 MiB. What finds no room is dropped.
    #[must_use]
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.ring = bytes;
        self
    }

    /// What it is called.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn check(&self) -> Result<(), SwitchError> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(SwitchError::Queues { queues: self.queues, most: MAX_QUEUES });
        }
        if let Some(mac) = self.mac {
            mac.unicast().map_err(|_| SwitchError::Mac { mac })?;
        }
        Ok(check_size(self.ring)?)
    }

    /// Where its address stays: in the VLAN of untagged frames.
    pub(super) fn pinned(&self) -> Option<(VlanId, MacAddr)> {
        Some((self.vlans.untagged()?, self.mac?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_meets_whom() {
        use Isolation::{Community, Isolated, Promiscuous};
        for (one, two, expected) in [
            (Promiscuous, Isolated, true),
            (Isolated, Isolated, false),
            (Isolated, Community(1), false),
            (Community(1), Community(1), true),
            (Community(1), Community(2), false),
            (Promiscuous, Promiscuous, true),
        ] {
            assert_eq!((one.meets(two), two.meets(one)), (expected, expected), "{one:?}, {two:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let config = || PortConfig::new("p");
        assert_eq!(config().check(), Ok(()));
        for queues in [0, MAX_QUEUES + 1] {
            assert_eq!(
                config().queues(queues).check(),
                Err(SwitchError::Queues { queues, most: MAX_QUEUES })
            );
        }
        let mac = MacAddr::BROADCAST;
        assert_eq!(config().mac(mac).check(), Err(SwitchError::Mac { mac }));
        assert!(matches!(config().queue_bytes(3 << 20).check(), Err(SwitchError::Ring(_))));
    }
}
