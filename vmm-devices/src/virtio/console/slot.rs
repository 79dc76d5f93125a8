//! A place for a port, and what the driver was told of it.
//!
//! What is still to be told is kept as a difference between what is and what was told, not as a queue of messages: whatever the
//! guest sends and however often the monitor changes its mind, it is a few bits for each port.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::message;
use super::port::PortCore;
use super::state::ConsoleTold as Told;

/// One of the places of a device.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) port: Option<Arc<PortCore>>,
    /// Of the port's terminal.
    pub(super) size: Option<(u16, u16)>,
    /// Where the driver is.
    pub(super) told: Told,
    /// How much of which chain's output was written, when the device was paused last.
    pub(super) sent: Option<(u16, u64)>,
}

impl Slot {
    /// Another port is there, or none. The old one is given back.
    pub(super) fn put(
        &mut self,
        port: Option<Arc<PortCore>>,
        size: Option<(u16, u16)>,
    ) -> Option<Arc<PortCore>> {
        let removal_due = self.told.added || self.told.removal_due;
        self.told = Told { removal_due, ..Told::default() };
        self.size = size;
        std::mem::replace(&mut self.port, port)
    }

    /// Whether `port` is what is here.
    pub(super) fn holds(&self, port: &Arc<PortCore>) -> bool {
        self.port.as_ref().is_some_and(|own| Arc::ptr_eq(own, port))
    }

    /// The driver is gone, and with it what it knew. The port, if the guest had it open.
    pub(super) fn reset(&mut self) -> Option<Arc<PortCore>> {
        (self.told, self.sent) = (Told::default(), None);
        self.port.clone().filter(|port| port.guest_open.swap(false, Ordering::SeqCst))
    }

    /// The driver says that it can serve the port, or cannot. The port, if it knows of one: by what it was told, or, one that
    /// is not `listening`, from before a reset. Linux goes on like that after a suspension.
    pub(super) fn ready(&mut self, ready: bool, listening: bool) -> Option<Arc<PortCore>> {
        let port = self.port.clone().filter(|_| self.told.added || !listening)?;
        self.told = Told {
            added: true,
            ready,
            console_due: port.console,
            size_due: port.console && self.size.is_some(),
            name_due: port.name.is_some(),
            ..Told::default()
        };
        Some(port)
    }

    /// The driver says whether somebody has the port open. The port, if it knows of one, and whether that is new.
    pub(super) fn guest_open(&mut self, open: bool) -> Option<(Arc<PortCore>, bool)> {
        let port = self.port.clone().filter(|_| self.told.added)?;
        let new = port.guest_open.swap(open, Ordering::SeqCst) != open;
        Some((port, new))
    }

    /// The monitor opens the port or closes it.
    pub(super) fn set_open(&mut self, open: bool) {
        let Some(port) = &self.port else { return };
        if port.open.swap(open, Ordering::SeqCst) != open && self.told.open == open {
            self.told.blinked |= self.told.ready;
        }
    }

    pub(super) fn resize(&mut self, size: (u16, u16)) {
        self.size = Some(size);
        self.told.size_due = self.told.ready && self.port.as_ref().is_some_and(|port| port.console);
    }

    /// Whether there is something that a driver which is `listening` is to be told.
    pub(super) fn has_news(&self, listening: bool) -> bool {
        let Told { removal_due, added, ready, console_due, size_due, name_due, open, blinked } =
            self.told.clone();
        if removal_due {
            return true;
        }
        let Some(port) = self.port.as_ref().filter(|_| listening || added) else { return false };
        let is_open = port.open.load(Ordering::SeqCst);
        !added || ready && (console_due || size_due || name_due || blinked || open != is_open)
    }

    /// The next message, which counts as told.
    pub(super) fn next_message(&mut self, id: u32, listening: bool, rows_first: bool) -> Option<Vec<u8>> {
        let told = &mut self.told;
        if std::mem::take(&mut told.removal_due) {
            return Some(message::of(id, message::PORT_REMOVE, 0));
        }
        let port = self.port.as_ref().filter(|_| listening || told.added)?;
        if !told.added {
            told.added = true;
            return Some(message::of(id, message::PORT_ADD, 0));
        }
        if !told.ready {
            return None;
        }
        if std::mem::take(&mut told.console_due) {
            return Some(message::of(id, message::CONSOLE_PORT, 1));
        }
        if std::mem::take(&mut told.size_due)
            && let Some(size) = self.size
        {
            return Some(message::resize(id, size, rows_first));
        }
        if std::mem::take(&mut told.name_due)
            && let Some(name) = &port.name
        {
            return Some(message::name(id, name));
        }
        if std::mem::take(&mut told.blinked) || told.open != port.open.load(Ordering::SeqCst) {
            told.open = !told.open;
            return Some(message::of(id, message::PORT_OPEN, told.open.into()));
        }
        None
    }
}
