//! One device's end of shared memory: what device, peers, kernel and gatekeeper have in common.
//!
//! Locks: nobody who holds one of a port's locks takes another of the same port, or one of another port's. The device is locked before
//! they are. Rings reach a peer with none of them held.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::bells::{Bell, Bells, Found};
use super::error::IvshmemError;
use super::metrics::IvshmemMetrics;
use super::pacer::Pacer;
use super::registers::Interrupts;
use super::window::Window;
use crate::channel::{Channel, DoorbellRing, Grant, RegionMap};
use crate::interrupt::lock;

/// Leaves whoever has brought the peers together.
pub(super) type Leave = Box<dyn FnOnce() + Send>;

/// The rights that keep it open.
#[derive(Default)]
struct Rights {
    map: Option<Grant<RegionMap>>,
    ring: Option<Grant<DoorbellRing>>,
}

/// See the module.
pub(super) struct Port {
    position: u16,
    /// For which others ring; 0 for memory without doorbells.
    vectors: u16,
    open: AtomicBool,
    may_ring: AtomicBool,
    pub(super) bells: Mutex<Bells>,
    pub(super) window: Mutex<Window>,
    interrupts: OnceLock<Interrupts>,
    pacer: OnceLock<Arc<Pacer>>,
    rights: Mutex<Rights>,
    leave: Mutex<Option<Leave>>,
    pub(super) metrics: Arc<IvshmemMetrics>,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("position", &self.position)
            .field("vectors", &self.vectors)
            .field("open", &self.is_open())
            .field("may_ring", &self.may_ring)
            .field("bells", &*lock(&self.bells))
            .field("window", &*lock(&self.window))
            .finish_non_exhaustive()
    }
}

impl Port {
    /// Opens it with the rights to do so.
    pub(super) fn open(
        (position, vectors): (u16, u16),
        window: Window,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Arc<Self>, IvshmemError> {
        let region = Arc::clone(&map.channel().region);
        let port = Arc::new(Self {
            position,
            vectors,
            open: AtomicBool::new(true),
            may_ring: AtomicBool::new(ring.is_some()),
            bells: Mutex::default(),
            window: Mutex::new(window),
            interrupts: OnceLock::new(),
            pacer: OnceLock::new(),
            rights: Mutex::default(),
            leave: Mutex::default(),
            metrics: Arc::default(),
        });
        let weak = Arc::downgrade(&port);
        map.on_revoked(move || {
            if let Some(port) = weak.upgrade() {
                port.close();
            }
        });
        if let Some(ring) = &ring {
            let weak = Arc::downgrade(&port);
            ring.on_revoked(move || {
                if let Some(port) = weak.upgrade() {
                    port.silence();
                }
            });
        }
        let rings = ring.as_ref().is_none_or(Grant::is_live);
        *lock(&port.rights) = Rights { map: Some(map), ring };
        // Revoked before the port had them, so that nobody has dropped them.
        if !rings {
            port.silence();
        }
        if !lock(&port.rights).map.as_ref().is_some_and(Grant::is_live) {
            port.close();
        }
        if port.is_open() { Ok(port) } else { Err(IvshmemError::Revoked { region }) }
    }

    pub(super) fn position(&self) -> u16 {
        self.position
    }

    pub(super) fn vectors(&self) -> u16 {
        self.vectors
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    pub(super) fn may_ring(&self) -> bool {
        self.may_ring.load(Ordering::Acquire)
    }

    /// How the guest is interrupted, from now on.
    pub(super) fn connect(&self, interrupts: Interrupts) {
        // There is one device for each port.
        let (Ok(()) | Err(_)) = self.interrupts.set(interrupts);
    }

    pub(super) fn interrupts(&self) -> Option<&Interrupts> {
        self.interrupts.get()
    }

    pub(super) fn pace(&self, pacer: Arc<Pacer>) {
        let (Ok(()) | Err(_)) = self.pacer.set(pacer);
    }

    pub(super) fn pacer(&self) -> Option<&Arc<Pacer>> {
        self.pacer.get()
    }

    /// Called when the port is closed; at once if it is.
    pub(super) fn on_leave(&self, leave: Leave) {
        *lock(&self.leave) = Some(leave);
        if !self.is_open() {
            self.leave();
        }
    }

    fn leave(&self) {
        let leave = lock(&self.leave).take();
        if let Some(leave) = leave {
            leave();
        }
    }

    /// The guest rings.
    pub(super) fn ring(&self, peer: u16, vector: u16) {
        if let Some(bell) = self.find(peer, vector) {
            if self.pacer.get().is_none_or(|pacer| pacer.admit(peer, vector)) {
                self.go(&bell);
            } else {
                self.metrics.held.one();
            }
        }
    }

    /// A ring that has waited.
    pub(super) fn deliver(&self, peer: u16, vector: u16) {
        if let Some(bell) = self.find(peer, vector) {
            self.go(&bell);
        }
    }

    fn find(&self, peer: u16, vector: u16) -> Option<Bell> {
        if !self.may_ring() {
            self.metrics.no_right.one();
            return None;
        }
        let found = lock(&self.bells).find(peer, vector);
        match found {
            Found::Bell(bell) => return Some(bell),
            Found::NoPeer => self.metrics.no_peer.one(),
            Found::NoVector => self.metrics.no_vector.one(),
        }
        None
    }

    fn go(&self, bell: &Bell) {
        self.metrics.rung.one();
        bell.ring();
    }

    /// A peer has rung for `vector`.
    pub(super) fn receive(&self, vector: u16) {
        if self.is_open()
            && vector < self.vectors
            && let Some(interrupts) = self.interrupts.get()
        {
            self.metrics.received.one();
            interrupts.signal(vector);
        }
    }

    /// A peer has one more vector, if it is one that this port may ring.
    pub(super) fn add_bell(&self, peer: u16, bell: Bell) {
        let mut bells = lock(&self.bells);
        // Looked at under the lock that `silence` takes after it has said so.
        if self.may_ring() {
            bells.add(peer, bell);
        }
    }

    pub(super) fn remove_peer(&self, peer: u16) {
        lock(&self.bells).remove(peer);
    }

    /// The right to ring is gone.
    pub(super) fn silence(&self) {
        self.may_ring.store(false, Ordering::Release);
        lock(&self.bells).clear();
        if let Some(pacer) = self.pacer.get() {
            pacer.clear();
        }
        let right = lock(&self.rights).ring.take();
        drop(right);
    }

    /// Closes it, in the order in which nothing of it is seen half closed. A second call waits for what the first one has to wait
    /// for.
    pub(super) fn close(&self) {
        // Quiesced: nobody begins anything.
        self.open.store(false, Ordering::Release);
        self.may_ring.store(false, Ordering::Release);
        // Unmapped: no vCPU reaches it when this is done.
        lock(&self.window).close(&self.metrics);
        // Drained: what has begun ends, and what waits is forgotten.
        self.silence();
        if let Some(interrupts) = self.interrupts.get() {
            interrupts.quiet();
        }
        // Closed: the peers, the server, the gatekeeper learn of it.
        self.leave();
        let rights = std::mem::take(&mut *lock(&self.rights));
        drop(rights);
    }
}

/// Whether a grant is for the region of that name.
pub(super) fn check_region<C: Channel>(
    region: &Arc<str>,
    granted: &Arc<str>,
    grant: &Grant<C>,
) -> Result<(), IvshmemError> {
    if region != granted {
        return Err(IvshmemError::WrongRegion { granted: Arc::clone(granted), region: Arc::clone(region) });
    }
    if grant.is_live() { Ok(()) } else { Err(IvshmemError::Revoked { region: Arc::clone(region) }) }
}
