//! Where rings go: the peers' doorbells, and those of them that a kernel rings for the guest.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use vmm_memory::vm_memory::GuestAddress;

use super::bellhop::Bellhop;
use super::eventfd;
use super::port::Port;
use super::registers::register;
use crate::virtio::{DoorbellHost, GuestDoorbell};

/// Doorbells that a kernel is asked to ring at most; others come by the bus.
const MOST_ATTACHED: usize = 256;

/// A vector of a peer's.
#[derive(Clone)]
pub(super) enum Bell {
    /// Of a device of this process.
    Inside(Weak<Port>, u16),
    /// Of another process: an eventfd.
    Outside(Arc<OwnedFd>),
    /// Such a one, of a peer that may make it wait: somebody else rings.
    Carried(u16, Arc<OwnedFd>, Arc<Bellhop>),
}

impl Bell {
    pub(super) fn ring(&self) {
        match self {
            Self::Inside(port, vector) => {
                if let Some(port) = port.upgrade() {
                    port.receive(*vector);
                }
            }
            Self::Outside(fd) => eventfd::signal(fd),
            Self::Carried(peer, fd, bellhop) => bellhop.carry(*peer, fd),
        }
    }

    fn fd(&self) -> Option<&Arc<OwnedFd>> {
        match self {
            Self::Inside(..) => None,
            Self::Outside(fd) | Self::Carried(_, fd, _) => Some(fd),
        }
    }
}

/// What became of a search for a bell.
pub(super) enum Found {
    Bell(Bell),
    NoPeer,
    NoVector,
}

/// The doorbells of one device's peers.
#[derive(Default)]
pub(super) struct Bells {
    peers: BTreeMap<u16, Vec<Bell>>,
    kernel: Option<Box<dyn DoorbellHost>>,
    /// Where the registers are.
    base: Option<u64>,
    /// Whose, and which.
    attached: Vec<(u16, GuestDoorbell)>,
}

impl fmt::Debug for Bells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers: Vec<(u16, usize)> = self.peers.iter().map(|(peer, bells)| (*peer, bells.len())).collect();
        f.debug_struct("Bells").field("peers", &peers).field("attached", &self.attached.len()).finish()
    }
}

impl Bells {
    /// A kernel rings from now on, where it can.
    pub(super) fn connect_kernel(&mut self, kernel: Box<dyn DoorbellHost>) {
        self.kernel = Some(kernel);
    }

    /// Positions of the peers that are there.
    pub(super) fn peers(&self) -> Vec<u16> {
        self.peers.keys().copied().collect()
    }

    pub(super) fn find(&self, peer: u16, vector: u16) -> Found {
        match self.peers.get(&peer) {
            None => Found::NoPeer,
            Some(bells) => bells.get(usize::from(vector)).cloned().map_or(Found::NoVector, Found::Bell),
        }
    }

    /// A peer has one more vector.
    pub(super) fn add(&mut self, peer: u16, bell: Bell) {
        let bells = self.peers.entry(peer).or_default();
        let vector = bells.len();
        bells.push(bell);
        self.attach(peer, vector);
    }

    /// A peer is gone.
    pub(super) fn remove(&mut self, peer: u16) {
        self.detach(|whose| whose == peer);
        self.peers.remove(&peer);
    }

    /// All are.
    pub(super) fn clear(&mut self) {
        self.detach(|_| true);
        self.peers.clear();
    }

    /// The registers are at `base`, or nowhere.
    pub(super) fn moved(&mut self, base: Option<u64>) {
        self.detach(|_| true);
        self.base = base;
        let vectors: Vec<(u16, usize)> = self
            .peers
            .iter()
            .flat_map(|(peer, bells)| (0..bells.len()).map(|vector| (*peer, vector)))
            .collect();
        for (peer, vector) in vectors {
            self.attach(peer, vector);
        }
    }

    fn attach(&mut self, peer: u16, vector: usize) {
        let fd = self.peers.get(&peer).and_then(|bells| bells.get(vector)).and_then(Bell::fd);
        let (Some(kernel), Some(base), Some(fd), Ok(queue)) =
            (&mut self.kernel, self.base, fd, u16::try_from(vector))
        else {
            return;
        };
        let gpa = GuestAddress(base.saturating_add(register::DOORBELL * 4));
        let value = u64::from(peer) << 16 | u64::from(queue);
        let doorbell = GuestDoorbell { queue, gpa, width: 4, value, fd: Arc::clone(fd) };
        if self.attached.len() < MOST_ATTACHED && kernel.attach(&doorbell) {
            self.attached.push((peer, doorbell));
        }
    }

    fn detach(&mut self, whose: impl Fn(u16) -> bool) {
        let Some(kernel) = &mut self.kernel else { return };
        self.attached.retain(|(peer, doorbell)| {
            let goes = whose(*peer);
            if goes {
                kernel.detach(doorbell);
            }
            !goes
        });
    }
}
