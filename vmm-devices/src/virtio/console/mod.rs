//! Console device (Virtio 1.3, 5.3): one text console, or up to [`MAX_PORTS`] ports that come and go.
//!
//! | part | what |
//! |---|---|
//! | [`Console`] | the device, for a transport |
//! | [`PortConfig`] | what a port is made of: a writer for output, who is told what happens |
//! | [`Port`] | the monitor's side of a port: input, size, open and closed; from any thread |
//! | [`Ports`] | the monitor's side of a device with many: adds and removes them at run time |
//!
//! # Input
//! [`Port::enqueue`] takes as much as there is room for, and says how much that was. What it took arrives once and in order,
//! over resets of the device too, as with a terminal on which somebody types while the machine starts. With multiport it waits
//! until somebody in the guest has opened the port.
//!
//! # Output
//! | the writer | what happens |
//! |---|---|
//! | takes a part | is given the rest |
//! | blocks | the port's transmit queue waits with it, and a reset of the device; other ports go on |
//! | [`WouldBlock`](std::io::ErrorKind::WouldBlock) | the guest's buffer stays in flight until [`Port::resume`]; or is discarded ([`WhenFull`]) |
//! | fails, or takes 0 bytes | [`PortEvent::OutputFailed`]; a writer that is put in its place goes on where it stopped |
//!
//! What is discarded is counted ([`PortCounters`]): nothing is lost in silence. Output that is in flight when the guest resets
//! the device is discarded, since its memory is the guest's again. The writer is flushed whenever the queue has run empty.
//!
//! # Threat model
//! The guest chooses buffers, control messages and their order. What it costs: [`PortConfig::input_capacity`] bytes for each port,
//! 4 KiB of output in flight, and a few bits of what the driver is still to be told; none of that grows, whether nobody reads
//! on the one side or the other. Control messages that make no sense are ignored, and counted ([`Ports::counters`]).
//! What a guest writes to a terminal is not filtered: escape sequences are the writer's to look at.
//!
//! # Testing a device with no virtual machine
//! The kit has the driver's side of everything (feature `testkit`). It is used here as it is for a device of your own: memory, a
//! transport, a driver, and queues in that memory.
//!
//! ```
//! use vmm_devices::testkit::{Driver, DriverQueue, MmioDriver, OutputRecorder, guest_memory};
//! use vmm_devices::virtio::console::{Console, PortConfig};
//!
//! let (memory, screen) = (guest_memory(1 << 20)?, OutputRecorder::default());
//! let (console, port) = Console::new(PortConfig::console(screen.clone()))?;
//! let (driver, line) = MmioDriver::of(console, &memory)?;
//! let mut rx = DriverQueue::new(memory.clone(), 0x1000, 8)?;
//! let mut tx = DriverQueue::new(memory, 0x2000, 8)?;
//! driver.start(0, &[(0, &rx), (1, &tx)])?;
//!
//! tx.put(0x8000, b"login: ")?;
//! let head = tx.chain().readable(0x8000, 7).submit()?;
//! driver.notify(1);
//! assert_eq!(screen.take(), b"login: ");
//! assert_eq!(tx.take_used()?, Some((head.into(), 0)));
//!
//! assert_eq!(port.enqueue(b"root\n"), 5); // waits: the guest has no buffer
//! let head = rx.chain().writable(0x9000, 3).writable(0xa000, 100).submit()?;
//! driver.notify(0);
//! assert_eq!(rx.take_used()?, Some((head.into(), 5)));
//! assert_eq!(rx.get(0xa000, 2)?, b"t\n");
//! assert!(line.is_asserted());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod control;
mod input;
mod message;
mod output;
mod port;
mod shared;
mod slot;
mod state;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use config::{
    ConsoleError, INPUT_CAPACITIES, MAX_NAME, PortConfig, PortEvent, PortEvents, ResizeOrder, WhenFull,
};
pub use port::{Port, PortCounters};
pub use state::{ConsolePlaceState, ConsolePortState, ConsoleState, ConsoleTold};

use control::ControlWorker;
use input::InputWorker;
use output::OutputWorker;
use shared::{Measured, Session, Shared};

use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, VirtioDevice, Worker};
use super::metrics::Metrics;
use super::state::DeviceState;
use crate::clock::Clock;
use crate::error::StateError;

/// Ports of one device at most: their queues and those for control are 64.
pub const MAX_PORTS: u32 = 31;

/// Descriptors that each queue has at most.
const QUEUE_SIZE: u16 = 64;

const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;

/// Feature bits (5.3.3).
mod feature {
    pub(super) const SIZE: u64 = 1 << 0;
    pub(super) const MULTIPORT: u64 = 1 << 1;
    pub(super) const EMERG_WRITE: u64 = 1 << 2;
}

/// Where the character of an emergency write goes in the configuration (5.3.4).
const EMERG_WR: u64 = 8;

/// The queue by which a port gets input (5.3.2).
fn rx_queue(id: u32) -> u16 {
    match u16::try_from(id) {
        Ok(0) => 0,
        Ok(id) => id.saturating_add(1).saturating_mul(2),
        Err(_) => u16::MAX,
    }
}

/// The queue by which its output comes.
fn tx_queue(id: u32) -> u16 {
    rx_queue(id).saturating_add(1)
}

/// A console device.
pub struct Console {
    shared: Arc<Shared>,
    multiport: bool,
    queue_sizes: Vec<u16>,
    /// What was saved elsewhere, for the driver that is there.
    resumed: Option<ConsoleState>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("ports", &self.shared.ports()).finish_non_exhaustive()
    }
}

impl Console {
    /// One text console.
    ///
    /// # Errors
    /// If the port cannot be as it is described.
    pub fn new(port: PortConfig) -> Result<(Self, Port), ConsoleError> {
        let shared = Shared::new(1);
        let port = shared.add(0, port)?;
        Ok((Self { shared, multiport: false, queue_sizes: vec![QUEUE_SIZE; 2], resumed: None }, port))
    }

    /// A device with places for `ports` ports, 1 to [`MAX_PORTS`], none of which is there yet. A driver without
    /// VIRTIO_CONSOLE_F_MULTIPORT has port 0 alone, which is to be a console therefore.
    ///
    /// # Errors
    /// If it cannot have so many.
    pub fn multiport(ports: u32) -> Result<(Self, Ports), ConsoleError> {
        if !(1..=MAX_PORTS).contains(&ports) {
            return Err(ConsoleError::Ports { ports });
        }
        let shared = Shared::new(ports);
        // Each port's, and those for control.
        let queue_sizes = (0..2 * ports + 2).map(|_| QUEUE_SIZE).collect();
        let this = Self { shared: Arc::clone(&shared), multiport: true, queue_sizes, resumed: None };
        Ok((this, Ports { shared }))
    }

    /// The order of columns and rows for the drivers that are to be expected: [`ResizeOrder::ColumnsFirst`], by the book, unless
    /// said.
    #[must_use]
    pub fn resize_order(self, order: ResizeOrder) -> Self {
        self.shared.rows_first.store(order == ResizeOrder::RowsFirst, Ordering::SeqCst);
        self
    }

    /// Tells `metrics` of each buffer of data that is given back: output is an [`Activity::Write`](super::metrics::Activity::Write), an error if not all of it
    /// was written; input is an [`Activity::Read`](super::metrics::Activity::Read), an error if nothing found room. Latencies are by `clock`, and those of
    /// output have what the writer took in them. For the first call; later ones change nothing.
    #[must_use]
    pub fn metrics(self, metrics: Arc<dyn Metrics>, clock: impl Clock + 'static) -> Self {
        self.shared.metrics.get_or_init(|| Measured { sink: metrics, clock: Box::new(clock) });
        self
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> u64 {
        let multiport = if self.multiport { feature::MULTIPORT } else { 0 };
        feature::SIZE | feature::EMERG_WRITE | multiport
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows, _) = self.shared.size();
        let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
        let [e, f, g, h] = self.shared.ports().to_le_bytes();
        // Behind them is what is there to be written.
        let config = [a, b, c, d, e, f, g, h];
        let config = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(config).for_each(|(place, byte)| *place = *byte);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERG_WR, Some(byte)) = (offset, data.first()) {
            match self.shared.port(0) {
                Some(port) => port.emergency(*byte),
                None => {
                    self.shared.counters.output_discarded.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn config_generation(&self) -> u32 {
        self.shared.size().2
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        let resumed = self.resumed.take();
        let is_resumed = resumed.is_some();
        let shared = &self.shared;
        let multiport = activation.features & feature::MULTIPORT != 0;
        if multiport {
            let (rx, tx) = (activation.take_queue(CONTROL_RX)?, activation.take_queue(CONTROL_TX)?);
            let shared = Arc::clone(shared);
            let last = shared.ports() - 1;
            workers.push(Box::new(ControlWorker { rx, tx, shared, last, spare: None }));
        }
        for id in 0..if multiport { shared.ports() } else { 1 } {
            let queues = (activation.take_queue(rx_queue(id)), activation.take_queue(tx_queue(id)));
            let (rx, tx) = match queues {
                (Ok(rx), Ok(tx)) => (rx, tx),
                // A driver may have no use for a port, but for the first.
                (Err(error), _) | (_, Err(error)) if id == 0 => return Err(error),
                _ => continue,
            };
            let (input, output) = (Arc::clone(shared), Arc::clone(shared));
            workers.push(Box::new(InputWorker { id, queue: rx, shared: input, spare: None }));
            let place = usize::try_from(id).ok().and_then(|id| resumed.as_ref()?.places.get(id));
            let begun = place.and_then(|place| place.sent);
            workers.push(Box::new(OutputWorker::new(id, tx, output, begun)));
        }
        if let Some(state) = resumed {
            shared.go_on(state);
        }
        let Activation { features, link, doorbells, .. } = activation;
        let (columns, rows, _) = shared.size();
        if !is_resumed && !multiport && features & feature::SIZE != 0 && (columns, rows) != (0, 0) {
            // Linux reads the size when it hears of another one, and not before.
            link.config_changed();
        }
        shared.begin(Session { doorbells, link, multiport });
        Ok(workers)
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        drop(workers);
        self.forget_driver();
        self.shared.end();
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Console(self.saved()))
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<(), StateError> {
        self.take_over(state)
    }
}

/// The monitor's side of a device with many ports. Clones are the same; any thread may use them.
#[derive(Clone)]
pub struct Ports {
    shared: Arc<Shared>,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports").field("ports", &self.shared.ports()).finish_non_exhaustive()
    }
}

/// What went wrong between device and driver, since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ControlCounters {
    /// Control messages from the driver that are too short, or name an event, a value or a port that there is not.
    pub ignored: u64,
    /// Control messages to the driver that its buffer was too small for, or did not lie in RAM for.
    pub undeliverable: u64,
    /// Bytes of output to ports that there are not.
    pub output_discarded: u64,
}

impl Ports {
    /// Adds a port with number `id`, at any time. A driver that is there is told of it.
    ///
    /// # Errors
    /// If there is no such place, if it is taken, or if the port cannot be as it is described.
    pub fn add(&self, id: u32, port: PortConfig) -> Result<Port, ConsoleError> {
        self.shared.add(id, port)
    }

    /// Takes a port away, at any time. A driver that knows it is told so. Output of it that is in flight and input that was
    /// not delivered are discarded, and counted; the writer is dropped, after what it does just now. The place is free for
    /// another one at once.
    ///
    /// # Errors
    /// If there is none.
    pub fn remove(&self, id: u32) -> Result<(), ConsoleError> {
        self.shared.remove(id)
    }

    /// What went wrong so far.
    pub fn counters(&self) -> ControlCounters {
        let c = &self.shared.counters;
        ControlCounters {
            ignored: c.ignored.load(Ordering::Relaxed),
            undeliverable: c.undeliverable.load(Ordering::Relaxed),
            output_discarded: c.output_discarded.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests;
