//! What the device, its workers and the monitor's handles have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::config::{ConsoleError, PortConfig};
use super::port::{Port, PortCore};
use super::slot::Slot;
use super::{CONTROL_RX, rx_queue, tx_queue};
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::virtio::device::DriverLink;
use crate::virtio::doorbell::Doorbells;
use crate::virtio::metrics::{Activity, Ended, Metrics};

/// No lock is held where a doorbell rings or an event is told: a worker may serve on the spot. Locks are taken one at a time, or
/// in this order: the session's, a place's, the size's.
pub(super) struct Shared {
    slots: Box<[Mutex<Slot>]>,
    /// See [`ResizeOrder`](super::ResizeOrder).
    pub(super) rows_first: AtomicBool,
    /// Columns and rows of port 0, and how often they changed.
    size: Mutex<(u16, u16, u32)>,
    session: Mutex<Option<Session>>,
    /// The driver said DEVICE_READY.
    pub(super) listening: AtomicBool,
    pub(super) counters: ControlCounters,
    pub(super) metrics: OnceLock<Measured>,
}

/// Where figures go, and what time it is.
pub(super) struct Measured {
    pub(super) sink: Arc<dyn Metrics>,
    pub(super) clock: Box<dyn Clock>,
}

/// While there is a driver.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) doorbells: Arc<Doorbells>,
    pub(super) link: Arc<dyn DriverLink>,
    pub(super) multiport: bool,
}

/// See [`Ports`](super::Ports).
#[derive(Default)]
pub(super) struct ControlCounters {
    pub(super) ignored: AtomicU64,
    pub(super) undeliverable: AtomicU64,
    pub(super) output_discarded: AtomicU64,
}

impl Shared {
    pub(super) fn new(ports: u32) -> Arc<Self> {
        Arc::new(Self {
            slots: (0..ports).map(|_| Mutex::default()).collect(),
            rows_first: AtomicBool::new(false),
            size: Mutex::default(),
            session: Mutex::default(),
            listening: AtomicBool::new(false),
            counters: ControlCounters::default(),
            metrics: OnceLock::new(),
        })
    }

    /// When a buffer is taken, if anybody wants to know.
    pub(super) fn now_ns(&self) -> u64 {
        self.metrics.get().map_or(0, |metrics| metrics.clock.now_ns())
    }

    /// A buffer is given back.
    pub(super) fn ended(&self, activity: Activity, bytes: u64, succeeded: bool, begun_ns: u64) {
        if let Some(Measured { sink, clock }) = self.metrics.get() {
            let latency_ns = clock.now_ns().saturating_sub(begun_ns);
            sink.ended(Ended { activity, bytes, succeeded, latency_ns });
        }
    }

    /// How many ports there can be.
    pub(super) fn ports(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn slot(&self, id: u32) -> Option<&Mutex<Slot>> {
        self.slots.get(usize::try_from(id).ok()?)
    }

    /// The port that has that number now.
    pub(super) fn port(&self, id: u32) -> Option<Arc<PortCore>> {
        lock(self.slot(id)?).port.clone()
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = (u32, &Mutex<Slot>)> {
        (0..).zip(&self.slots)
    }

    fn session(&self) -> Option<Session> {
        lock(&self.session).clone()
    }

    fn ring(&self, queue: u16) {
        if let Some(session) = self.session() {
            session.doorbells.ring(queue);
        }
    }

    /// There is something to tell the driver.
    fn ring_control(&self) {
        if let Some(session) = self.session().filter(|session| session.multiport) {
            session.doorbells.ring(CONTROL_RX);
        }
    }

    pub(super) fn ring_input(&self, id: u32) {
        self.ring(rx_queue(id));
    }

    pub(super) fn ring_output(&self, id: u32) {
        self.ring(tx_queue(id));
    }

    pub(super) fn add(self: &Arc<Self>, id: u32, config: PortConfig) -> Result<Port, ConsoleError> {
        config.check(id)?;
        let ports = self.ports();
        let slot = self.slot(id).ok_or(ConsoleError::NoSuchPort { id, ports })?;
        let size = config.size;
        let core = Arc::new(PortCore::new(id, config));
        let mut slot = lock(slot);
        if slot.port.is_some() {
            return Err(ConsoleError::Taken { id });
        }
        slot.put(Some(Arc::clone(&core)), size);
        let resized = id == 0 && self.set_size(size.unwrap_or_default());
        drop(slot);
        self.tell_size(resized);
        if id == 0 {
            self.serve_alone();
        }
        self.ring_control();
        self.ring_output(id);
        Ok(Port { core, shared: Arc::clone(self) })
    }

    pub(super) fn remove(&self, id: u32) -> Result<(), ConsoleError> {
        let ports = self.ports();
        let slot = self.slot(id).ok_or(ConsoleError::NoSuchPort { id, ports })?;
        let port = lock(slot).put(None, None).ok_or(ConsoleError::Empty { id })?;
        port.remove();
        self.ring_control();
        // What the guest has in flight is given back.
        self.ring_output(id);
        Ok(())
    }

    pub(super) fn set_open(&self, port: &Arc<PortCore>, open: bool) {
        let Some(slot) = self.slot(port.id) else { return };
        let mut slot = lock(slot);
        if !slot.holds(port) {
            return;
        }
        slot.set_open(open);
        drop(slot);
        self.ring_control();
        self.ring_output(port.id);
    }

    pub(super) fn resize(&self, port: &Arc<PortCore>, size: (u16, u16)) {
        let Some(slot) = self.slot(port.id) else { return };
        let mut slot = lock(slot);
        if !slot.holds(port) {
            return;
        }
        slot.resize(size);
        let resized = port.id == 0 && self.set_size(size);
        drop(slot);
        self.tell_size(resized);
        self.ring_control();
    }

    /// Of port 0, whose place is locked. Whether it is another one.
    fn set_size(&self, (columns, rows): (u16, u16)) -> bool {
        let mut size = lock(&self.size);
        let resized = (size.0, size.1) != (columns, rows);
        if resized {
            *size = (columns, rows, size.2.wrapping_add(1));
        }
        resized
    }

    fn tell_size(&self, resized: bool) {
        if let Some(session) = self.session().filter(|_| resized) {
            session.link.config_changed();
        }
    }

    /// Columns, rows, generation.
    pub(super) fn size(&self) -> (u16, u16, u32) {
        *lock(&self.size)
    }

    /// There is a driver.
    pub(super) fn begin(&self, session: Session) {
        *lock(&self.session) = Some(session);
        self.serve_alone();
    }

    /// Port 0 is open where there is a driver that knows of no opening: one without multiport.
    fn serve_alone(&self) {
        let Some(slot) = self.slot(0) else { return };
        // Held, so that a driver that goes meanwhile closes the port after this.
        let session = lock(&self.session);
        if session.as_ref().is_none_or(|session| session.multiport) {
            return;
        }
        let opened = lock(slot).port.clone().filter(|port| !port.guest_open.swap(true, Ordering::SeqCst));
        drop(session);
        if let Some(port) = opened {
            port.tell_guest_open(true);
        }
        self.ring_input(0);
    }

    /// There is none any more.
    pub(super) fn end(&self) {
        *lock(&self.session) = None;
        self.listening.store(false, Ordering::SeqCst);
        for (_, slot) in self.slots() {
            let closed = lock(slot).reset();
            if let Some(port) = closed {
                port.tell_guest_open(false);
            }
        }
    }
}
