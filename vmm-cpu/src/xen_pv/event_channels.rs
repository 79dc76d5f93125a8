//! Event channels from the host's side.

use std::sync::Arc;

use super::abi::event::PORTS;
use super::domain::Domain;
use super::gate::EventSink;
use crate::error::{Error, Result};

/// Event channels as back ends use them, from any thread.
#[derive(Clone, Debug)]
pub struct EventChannels(pub(super) Arc<Domain>);

impl EventChannels {
    /// A port of the guest whose events go to `sink`, as if `domid` had bound it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if all ports are in use.
    pub fn allocate(&self, domid: u16, sink: Arc<dyn EventSink>) -> Result<u32> {
        self.0
            .ports
            .allocate_outside(domid, 1, false, sink)
            .map_err(|_| Error::invalid("event channels", PORTS, "a free one"))
    }

    /// Connects `sink` with a port that the guest keeps for `domid`; in a restored domain also with one that `domid` was connected
    /// with when the domain was saved. What the guest sent there meanwhile comes at once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the guest has no such port or keeps it for somebody else.
    pub fn connect(&self, port: u32, domid: u16, sink: Arc<dyn EventSink>) -> Result<()> {
        let sent = self.0.ports.connect(port, domid, Arc::clone(&sink)).map_err(|_| {
            Error::invalid("event channel", port, format_args!("one that waits for domain {domid}"))
        })?;
        if sent {
            sink.notify();
        }
        // What was sent before somebody listened is not lost.
        self.0.set_pending(port);
        Ok(())
    }

    /// Sends an event to the guest's port. A port that is free takes none.
    pub fn raise(&self, port: u32) {
        self.0.set_pending(port);
    }

    /// Closes the guest's port.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is free.
    pub fn close(&self, port: u32) -> Result<()> {
        self.0.close_port(port).map_err(|_| Error::invalid("event channel", port, "one in use"))
    }
}
