//! What a port is made of, and what it tells.

use std::fmt;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::MAX_PORTS;

/// Bytes of input that a port can be told to keep.
pub const INPUT_CAPACITIES: RangeInclusive<usize> = 1..=16 << 20;

/// Bytes that the name of a port can have.
pub const MAX_NAME: usize = 512;

/// What is wrong with a console or a port that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// A device with that many ports.
    #[error("a console has 1 to {MAX_PORTS} ports, not {ports}")]
    Ports {
        /// How many were asked for.
        ports: u32,
    },
    /// The device has no place for that port.
    #[error("port {id} does not exist: the device has {ports}, counted from 0")]
    NoSuchPort {
        /// Which port.
        id: u32,
        /// How many ports there can be.
        ports: u32,
    },
    /// The place is taken.
    #[error("port {id} is there already; remove it before you add another")]
    Taken {
        /// Which port.
        id: u32,
    },
    /// Nothing is there to remove.
    #[error("port {id} was not added, or was removed already")]
    Empty {
        /// Which port.
        id: u32,
    },
    /// The guest takes the name from one message.
    #[error("the name of port {id} has {len} bytes or a NUL; it is to have 1 to {MAX_NAME} bytes")]
    Name {
        /// Which port.
        id: u32,
        /// Bytes of the name.
        len: usize,
    },
    /// The buffer for input cannot have that size.
    #[error("port {id} cannot keep {capacity} bytes of input; {min} to {max} are possible",
        min = INPUT_CAPACITIES.start(), max = INPUT_CAPACITIES.end())]
    Capacity {
        /// Which port.
        id: u32,
        /// Bytes that were asked for.
        capacity: usize,
    },
}

/// What becomes of output while its writer takes none ([`io::ErrorKind::WouldBlock`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// The guest waits until [`Port::resume`](super::Port::resume): nothing is lost. Mind that Linux holds a lock and spins
    /// while a console of its own waits.
    #[default]
    Wait,
    /// The rest of the guest's buffer is discarded, and counted.
    Discard,
}

/// The order of the two numbers in a RESIZE message, of which drivers have two opinions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResizeOrder {
    /// Columns first, as the specification says (5.3.6.2), and Debian's kernels of today do.
    #[default]
    ColumnsFirst,
    /// Rows first, as Linux had it until that was mended, in its stable versions too.
    RowsFirst,
}

/// Something that a monitor may want to know of a port.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum PortEvent<'a> {
    /// A driver began to serve the port; with multiport, somebody in the guest opened it. Input is delivered from now on.
    GuestOpened,
    /// The guest closed it, or was reset.
    GuestClosed,
    /// The guest could not add the port (PORT_READY with 0).
    GuestRefused,
    /// [`Port::enqueue`](super::Port::enqueue) took less than it was given, and half of the buffer is free by now.
    InputRoom,
    /// The writer failed with this error. A writer that [`Port::replace_output`](super::Port::replace_output) gives it before
    /// this call returns goes on with what the old one did not take. Otherwise output is discarded, and counted, until there
    /// is a new one.
    OutputFailed(&'a io::Error),
}

/// Who is told of a [`PortEvent`]. A closure is one.
///
/// Called as often as the guest likes, by what serves the queue, from any thread, with no lock of the port held: it may call any method of a
/// [`Port`](super::Port). It must not touch the transport, which may wait for it. What two threads tell at once may come in either
/// order: [`Port::is_guest_open`](super::Port::is_guest_open) says what is so now.
pub trait PortEvents: Send + Sync {
    /// It happened.
    fn event(&self, event: PortEvent<'_>);
}

impl<F: Fn(PortEvent<'_>) + Send + Sync> PortEvents for F {
    fn event(&self, event: PortEvent<'_>) {
        self(event);
    }
}

/// A port before it is one.
#[must_use]
pub struct PortConfig {
    pub(super) console: bool,
    pub(super) name: Option<String>,
    pub(super) output: Box<dyn Write + Send>,
    pub(super) when_full: WhenFull,
    pub(super) input_capacity: usize,
    pub(super) size: Option<(u16, u16)>,
    pub(super) open: bool,
    pub(super) events: Option<Arc<dyn PortEvents>>,
}

impl fmt::Debug for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortConfig")
            .field("console", &self.console)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl PortConfig {
    /// A port for a text console (`/dev/hvc0` in Linux), whose output goes to `output`.
    ///
    /// The writer is called by the worker of the port's transmit queue, and by a vCPU for an emergency write; one that
    /// blocks holds these, and a reset of the device, but no other port. It may take a part. It must not call
    /// [`Port::replace_output`](super::Port::replace_output) or [`Ports::remove`](super::Ports::remove).
    pub fn console(output: impl Write + Send + 'static) -> Self {
        Self {
            console: true,
            name: None,
            output: Box::new(output),
            when_full: WhenFull::default(),
            input_capacity: 64 << 10,
            size: None,
            open: true,
            events: None,
        }
    }

    /// A port for whatever two programs have to say to each other (`/dev/virtio-ports/name` in Linux). Needs multiport.
    pub fn channel(name: impl Into<String>, output: impl Write + Send + 'static) -> Self {
        Self { console: false, name: Some(name.into()), ..Self::console(output) }
    }

    /// What the guest calls it: UTF-8, 1 to [`MAX_NAME`] bytes, without NUL. With multiport only.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// What becomes of output while the writer takes none.
    pub fn when_full(mut self, what: WhenFull) -> Self {
        self.when_full = what;
        self
    }

    /// How many bytes of input are kept for a guest that does not read: 64 KiB unless told, see [`INPUT_CAPACITIES`].
    pub fn input_capacity(mut self, bytes: usize) -> Self {
        self.input_capacity = bytes;
        self
    }

    /// Columns and rows of the terminal, as far as they are known.
    pub fn size(mut self, columns: u16, rows: u16) -> Self {
        self.size = Some((columns, rows));
        self
    }

    /// The port is closed on this side until [`Port::open`](super::Port::open).
    pub fn closed(mut self) -> Self {
        self.open = false;
        self
    }

    /// Who is told what happens.
    pub fn events(mut self, events: impl PortEvents + 'static) -> Self {
        self.events = Some(Arc::new(events));
        self
    }

    pub(super) fn check(&self, id: u32) -> Result<(), ConsoleError> {
        if let Some(name) = &self.name
            && (name.is_empty() || name.len() > MAX_NAME || name.contains('\0'))
        {
            return Err(ConsoleError::Name { id, len: name.len() });
        }
        if !INPUT_CAPACITIES.contains(&self.input_capacity) {
            return Err(ConsoleError::Capacity { id, capacity: self.input_capacity });
        }
        Ok(())
    }
}
