//! Virtio over PCI (Virtio 1.3, 4.1): a function for any device, without the transitional interface.
//!
//! A [`PciFunction`]: in a `Mutex` it goes to a [`HostBridge`](crate::pci::HostBridge). All structures are in one BAR, where the
//! capabilities say; queues interrupt by MSI-X, or by INTA# where the driver does not turn it on.

mod common;
mod vectors;

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;

use self::vectors::Vectors;
use super::control::{Control, Parts};
use super::device::{DeviceMemory, DeviceType, VirtioDevice};
use super::doorbell_host::{AttachedDoorbells, DoorbellHost};
use super::executor::Executor;
use super::queue::QueueError;
use super::state::{VirtioPciState, VirtioStateError};
use crate::interrupt::MsiSink;
use crate::pci::{
    Bar, Capability, CapabilityOffset, ConfigBuilder, ConfigSpace, Identity, InterruptPin, Msix, MsixPlace,
    PciError, PciFunction, capability,
};

/// Under which virtio devices are known (4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device type 0.
const FIRST_DEVICE: u16 = 0x1040;
/// From 0x40 on, as devices without the transitional interface have it (4.1.2.1).
const SUBSYSTEM: u16 = 0x1100;

/// The BAR with everything.
const BAR: usize = 0;
const BAR_SIZE: u64 = 0x8000;

/// What is in the BAR, and where; a page for each but the vectors.
mod place {
    pub(super) const COMMON: u64 = 0;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const MSIX_TABLE: u64 = 0x4000;
    pub(super) const MSIX_PENDING: u64 = 0x7000;
    pub(super) const PAGE: u64 = 0x1000;
}

/// Bytes from one doorbell to the next (4.1.4.4).
const DOORBELL: u64 = 4;

/// Queues that have a doorbell and a vector each.
const MAX_QUEUES: usize = 512;

/// Types of capabilities (4.1.4).
mod kind {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// Registers of the capability by which a driver reaches the BAR through configuration space (4.1.4.9).
mod window {
    pub(super) const BAR: u16 = 4;
    pub(super) const OFFSET: u16 = 8;
    pub(super) const LENGTH: u16 = 12;
    pub(super) const DATA: u16 = 16;
}

/// Why a device cannot be a PCI function.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioPciError {
    /// It has a queue of a size that queues cannot have.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// It has more queues than there is room for.
    #[error("a device with {queues} queues; {max} at most have a doorbell each")]
    Queues {
        /// How many.
        queues: usize,
        /// How many there may be.
        max: usize,
    },
    /// Its configuration space cannot be.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The host has no eventfds for its doorbells.
    #[error("the host refuses eventfds for the doorbells")]
    Notifiers(#[from] std::io::Error),
}

/// A virtio device as a PCI function.
///
/// Where it departs from what a driver may expect: the bus master bit holds back messages, and not what the device does to
/// memory; that ends with a reset of the device. A queue is taken back by a reset of the device alone (2.6.1 is not offered).
pub struct VirtioPci<M: DeviceMemory> {
    config: ConfigSpace,
    /// The capability that is a window on the BAR.
    window: CapabilityOffset,
    vectors: Arc<Vectors>,
    control: Control<M, Arc<Vectors>>,
    doorbells: Option<AttachedDoorbells>,
}

impl<M: DeviceMemory> fmt::Debug for VirtioPci<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci")
            .field("control", &self.control)
            .field("vectors", &self.vectors)
            .finish_non_exhaustive()
    }
}

impl<M: DeviceMemory> VirtioPci<M> {
    /// A function for `device`, whose buffers lie in `memory`. Its messages go to `sink`; queues are served [`Inline`](super::Inline).
    ///
    /// # Errors
    /// If the device has too many queues, or one of a size that is no power of two up to 32768.
    pub fn new(
        device: impl VirtioDevice<M> + 'static,
        memory: M,
        sink: impl MsiSink + 'static,
    ) -> Result<Self, VirtioPciError> {
        Self::builder(device, memory, sink).build()
    }

    /// The same with more to say.
    pub fn builder(
        device: impl VirtioDevice<M> + 'static,
        memory: M,
        sink: impl MsiSink + 'static,
    ) -> VirtioPciBuilder<M> {
        VirtioPciBuilder { parts: Parts::new(device, memory), sink: Arc::new(sink), doorbells: None }
    }

    /// Brings the device to rest until [`resume`](Self::resume), as [`VirtioMmio::pause`](super::VirtioMmio::pause) does.
    pub fn pause(&mut self) {
        self.control.pause();
    }

    /// Requests that the device has taken and not given back, as [`VirtioMmio::in_flight`](super::VirtioMmio::in_flight) has it.
    pub fn in_flight(&self) -> Vec<(u16, u16)> {
        self.control.in_flight()
    }

    /// Goes on after a [`pause`](Self::pause) or [`restore`](Self::restore), and looks at each queue once.
    ///
    /// # Errors
    /// If the executor cannot: the driver is told that the device needs a reset.
    pub fn resume(&mut self) -> std::io::Result<()> {
        self.control.resume()
    }

    /// The state of a device that is paused, or that no driver has started.
    ///
    /// # Errors
    /// [`VirtioStateError::Running`], and [`VirtioStateError::Unsupported`] if the device is of a kind that cannot be saved.
    pub fn save(&self) -> Result<VirtioPciState, VirtioStateError> {
        let device = self.control.save()?;
        let (config_vector, queue_vectors, isr) = self.vectors.saved();
        let (config, msix) = (self.config.state(), self.vectors.msix().state());
        Ok(VirtioPciState { config, msix, config_vector, queue_vectors, isr, device })
    }

    /// Goes on from a saved state when it is [resumed](Self::resume): before the guest runs, with its RAM in place. The bridge does not know
    /// before it is told: [`HostBridge::restore`](crate::pci::HostBridge::restore), or
    /// [`refresh`](crate::pci::HostBridge::refresh). A pin that was asserted is so again.
    ///
    /// # Errors
    /// If it is a state of another device, one that none can be in, or the host refuses what the device needs; nothing has
    /// changed.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), VirtioStateError> {
        let VirtioPciState { config, msix, config_vector, queue_vectors, isr, device } = state;
        self.vectors.check(*config_vector, queue_vectors, *isr)?;
        self.vectors.msix().check(msix)?;
        let ours = self.config.state();
        self.config.restore(config)?;
        if let Err(error) = self.control.restore(device) {
            // What was there a moment ago can be.
            self.config.restore(&ours)?;
            return Err(error);
        }
        // It has been checked.
        self.vectors.msix().restore(msix, &self.config)?;
        self.vectors.restore(*config_vector, queue_vectors, *isr);
        Ok(())
    }

    /// What the window of configuration space looks at, if the driver has set it up: BAR, offset, and how many of its data's
    /// bytes count, whatever the width of the access to them.
    fn window_target(&self) -> Option<(usize, u64, usize)> {
        let register = |offset| self.config.register(self.window.get() + offset);
        let [bar, ..] = register(window::BAR).to_le_bytes();
        let (offset, length) = (register(window::OFFSET), register(window::LENGTH));
        let len = usize::try_from(length).ok().filter(|len| matches!(len, 1 | 2 | 4))?;
        offset.is_multiple_of(length).then_some((bar.into(), offset.into(), len))
    }

    fn window_data(&self) -> u16 {
        self.window.get() + window::DATA
    }
}

impl<M: DeviceMemory> PciFunction for VirtioPci<M> {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        if self.vectors.msix().read(bar, offset, data) {
            return;
        }
        data.fill(0);
        let into = offset % place::PAGE;
        match (bar, offset - into) {
            (BAR, place::COMMON) => common::read(&self.control, &self.vectors, into, data),
            // Reading it is what acknowledges (4.1.4.5).
            (BAR, place::ISR) if into == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.vectors.take_isr();
                }
            }
            (BAR, place::DEVICE) => self.control.read_config(into, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        if self.vectors.msix().write(bar, offset, data) {
            return;
        }
        let into = offset % place::PAGE;
        match (bar, offset - into) {
            (BAR, place::COMMON) => common::write(&mut self.control, &self.vectors, into, data),
            (BAR, place::DEVICE) => self.control.write_config(into, data),
            // Each queue has an address of its own, so what is written says nothing more.
            (BAR, place::NOTIFY) if into.is_multiple_of(DOORBELL) => {
                if let Ok(queue) = u16::try_from(into / DOORBELL) {
                    self.control.notify(queue);
                }
            }
            _ => {}
        }
    }

    fn bar_moved(&mut self, bar: usize, at: Option<u64>) {
        let Some(doorbells) = self.doorbells.as_mut().filter(|_| bar == BAR) else { return };
        match at {
            // The driver writes the queue's number, of 16 bits (4.1.5.2).
            Some(base) => {
                doorbells.attach(2, |queue| GuestAddress(base + place::NOTIFY + u64::from(queue) * DOORBELL))
            }
            None => doorbells.detach(),
        }
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        let place = self.window_data();
        if offset & !3 == place
            && let Some((bar, at, len)) = self.window_target()
        {
            let mut word = self.config.register(place).to_le_bytes();
            if let Some(bytes) = word.get_mut(..len) {
                self.bar_read(bar, at, bytes);
            }
            self.config.set_register(place, u32::from_le_bytes(word));
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        let written = self.config.write(offset, data);
        self.vectors.config_written(&self.config);
        if written.is_some_and(|written| written.reaches(self.window, window::DATA))
            && let Some((bar, at, len)) = self.window_target()
            && let Some(bytes) = self.config.register(self.window_data()).to_le_bytes().get(..len)
        {
            self.bar_write(bar, at, bytes);
        }
    }

    fn reset(&mut self) {
        self.control.reset();
        self.vectors.reset_function();
    }
}

/// See [`VirtioPci::builder`].
pub struct VirtioPciBuilder<M: DeviceMemory> {
    parts: Parts<M>,
    sink: Arc<dyn MsiSink>,
    doorbells: Option<Box<dyn DoorbellHost>>,
}

impl<M: DeviceMemory> fmt::Debug for VirtioPciBuilder<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VirtioPciBuilder").field(&self.parts).finish()
    }
}

impl<M: DeviceMemory> VirtioPciBuilder<M> {
    /// What serves the queues.
    #[must_use]
    pub fn executor(mut self, executor: Arc<dyn Executor>) -> Self {
        self.parts.executor = executor;
        self
    }

    /// Called when the device gives up until it is reset, and why; maybe by a worker. It must not call the device.
    #[must_use]
    pub fn on_failure(mut self, failed: impl Fn(&dyn Error) + Send + Sync + 'static) -> Self {
        self.parts.failed = Some(Box::new(failed));
        self
    }

    /// Has a kernel ring the doorbells, wherever the guest puts them, if the executor polls eventfds; [`Inline`](super::Inline) does not.
    #[must_use]
    pub fn doorbells(mut self, host: impl DoorbellHost + 'static) -> Self {
        self.doorbells = Some(Box::new(host));
        self
    }

    /// # Errors
    /// As [`VirtioPci::new`], or if the host has no descriptors for doorbells.
    pub fn build(self) -> Result<VirtioPci<M>, VirtioPciError> {
        let kind = self.parts.device.device_type();
        let queues = self.parts.device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::Queues { queues, max: MAX_QUEUES });
        }
        let device = FIRST_DEVICE.saturating_add(kind.0);
        let identity = Identity::new(VENDOR, device, class(kind)).revision(1).subsystem(VENDOR, SUBSYSTEM);
        let mut config = ConfigBuilder::new(identity);
        config.bar(BAR, Bar::memory32(BAR_SIZE))?;
        config.interrupt_pin(InterruptPin::A);
        for (kind, at, length) in [
            (kind::COMMON, place::COMMON, common::SIZE),
            (kind::ISR, place::ISR, 1),
            (kind::DEVICE, place::DEVICE, place::PAGE),
        ] {
            config.capability(structure(kind, at, length, &[]))?;
        }
        let doorbells = (queues.max(1) as u64) * DOORBELL;
        let multiplier = u32::try_from(DOORBELL).unwrap_or(0).to_le_bytes();
        config.capability(structure(kind::NOTIFY, place::NOTIFY, doorbells, &multiplier))?;
        // BAR, offset, length and data are the driver's.
        let mask = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
        let window = config.capability(structure(kind::PCI, 0, 0, &[0; 4]).writable(mask))?;
        let place = MsixPlace { bar: BAR, table: place::MSIX_TABLE, pending: place::MSIX_PENDING };
        // One for each queue, and one for the configuration.
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let msix = Msix::new(&mut config, vectors, place, self.sink)?;
        let config = config.build();
        let pin = config.intx().cloned().unwrap_or_default();
        let vectors = Arc::new(Vectors::new(queues, msix, Box::new(pin)));
        let mut control = Control::new(self.parts, Arc::clone(&vectors))?;
        let doorbells = match self.doorbells {
            Some(host) => Some(AttachedDoorbells::new(host, control.notifiers()?)),
            None => None,
        };
        Ok(VirtioPci { config, window, vectors, control, doorbells })
    }
}

/// A capability that says where a structure is (4.1.4).
fn structure(kind: u8, offset: u64, length: u64, further: &[u8]) -> Capability {
    // Identifier and pointer come before.
    let size = u8::try_from(16 + further.len()).unwrap_or(u8::MAX);
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    let bar = u8::try_from(BAR).unwrap_or(0);
    let body = [&[size, kind, bar, 0, 0, 0][..], &word(offset), &word(length), further].concat();
    Capability::new(capability::id::VENDOR, body)
}

/// Base class, sub-class and interface of a device (PCI 3.0, appendix D), which drivers do not look at.
fn class(kind: DeviceType) -> [u8; 3] {
    match kind {
        DeviceType::BLOCK => [0x01, 0x80, 0],
        DeviceType::CONSOLE => [0x07, 0x80, 0],
        _ => [0xff, 0, 0],
    }
}

#[cfg(test)]
mod tests;
