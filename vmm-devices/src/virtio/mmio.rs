//! Virtio over MMIO (Virtio 1.3, 4.2), register layout version 2.
//!
//! A [`BusDeviceMut`]: put a `Mutex` around it on an [`MmioBus`](crate::MmioBus), [`VirtioMmio::SIZE`] bytes from any address on
//! that suits. The driver finds it by ACPI ([`AcpiDevice::virtio_mmio`](crate::acpi::AcpiDevice::virtio_mmio)), a device tree, or the
//! kernel's command line.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;

use super::control::{Causes, Control, Parts, Ring, Signal};
use super::device::{DeviceMemory, VirtioDevice};
use super::doorbell_host::{AttachedDoorbells, DoorbellHost};
use super::executor::Executor;
use super::queue::QueueError;
use super::state::{VirtioMmioState, VirtioStateError};
use crate::bus::BusDeviceMut;
use crate::error::StateError;
use crate::interrupt::InterruptLine;

/// Registers (4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x0;
    pub(super) const VERSION: u64 = 0x4;
    pub(super) const DEVICE_ID: u64 = 0x8;
    pub(super) const VENDOR_ID: u64 = 0xc;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "VMMD": no vendor has it.
const VENDOR: u32 = 0x444d_4d56;

impl Signal for Causes {
    fn used(&self, _queue: u16) {
        self.raise_if(Self::USED, &|| true);
    }

    fn config(&self, wanted: &dyn Fn() -> bool) {
        self.raise_if(Self::CONFIG, wanted);
    }

    fn reset(&self) {
        self.clear(u8::MAX);
    }
}

/// A virtio device with registers in memory.
///
/// A queue that is ready is taken back by a reset of the device alone: once the driver has said DRIVER_OK, QueueReady stays 1
/// whatever it writes (4.2.2.2 lets it write 0), for the queue may be in use on another thread.
pub struct VirtioMmio<M: DeviceMemory> {
    control: Control<M, Causes>,
    /// Attached as long as it is there.
    _doorbells: Option<AttachedDoorbells>,
}

/// Why a device cannot be on MMIO.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioMmioError {
    /// It has a queue of a size that queues cannot have.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The host has no eventfds for its doorbells.
    #[error("the host refuses eventfds for the doorbells")]
    Notifiers(#[from] std::io::Error),
}

impl<M: DeviceMemory> fmt::Debug for VirtioMmio<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VirtioMmio").field(&self.control).finish()
    }
}

impl<M: DeviceMemory> VirtioMmio<M> {
    /// Bytes that its registers occupy, 256 of them for the device's own configuration beside those of the transport.
    pub const SIZE: u64 = 0x200;

    /// Puts `device` there. Its buffers lie in `memory`; it drives `line`, which is level-triggered. Queues are served
    /// [`Inline`](super::Inline).
    ///
    /// # Errors
    /// If the device has a queue of a size that is no power of two up to 32768.
    pub fn new(
        device: impl VirtioDevice<M> + 'static,
        memory: M,
        line: impl InterruptLine + 'static,
    ) -> Result<Self, VirtioMmioError> {
        Self::builder(device, memory, line).build()
    }

    /// The same with more to say.
    pub fn builder(
        device: impl VirtioDevice<M> + 'static,
        memory: M,
        line: impl InterruptLine + 'static,
    ) -> VirtioMmioBuilder<M> {
        VirtioMmioBuilder { parts: Parts::new(device, memory), line: Box::new(line), doorbells: None }
    }

    /// Brings the device to rest until [`resume`](Self::resume): what was taken from its queues is finished and told to the driver, or stays
    /// with them; nothing more is taken, and guest memory stays as it is. The vCPUs are stopped before. A disk that hangs holds
    /// it up.
    pub fn pause(&mut self) {
        self.control.pause();
    }

    /// Requests that the device has taken and not given back: the queue, and the first descriptor of the chain. While it is at work that is so for
    /// a moment; of one that is paused, these are the ones that stay in flight, and are saved with it.
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
    pub fn save(&self) -> Result<VirtioMmioState, VirtioStateError> {
        let device = self.control.save()?;
        Ok(VirtioMmioState { interrupt_status: self.control.link.signal.get(), device })
    }

    /// Goes on from a saved state when it is [resumed](Self::resume): before the guest runs, with its RAM in place. A line that was asserted
    /// is so again.
    ///
    /// # Errors
    /// If it is a state of another device, one that none can be in, or the host refuses what the device needs; nothing has
    /// changed.
    pub fn restore(&mut self, state: &VirtioMmioState) -> Result<(), VirtioStateError> {
        let causes = state.interrupt_status;
        let known = causes & !(Causes::USED | Causes::CONFIG) == 0;
        StateError::check(known, "virtio", "interrupt_status", causes, "bits 0 and 1")?;
        self.control.restore(&state.device)?;
        self.control.link.signal.raise_if(causes, &|| true);
        Ok(())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let c = &self.control;
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => u32::from(c.device().device_type().0),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => c.device_features(),
            register::QUEUE_SIZE_MAX => c.queue().map_or(0, |queue| u32::from(queue.max_size)),
            register::QUEUE_READY => c.queue().map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => u32::from(c.link.signal.get()),
            register::STATUS => u32::from(c.status()),
            // No shared memory: a length of all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => c.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let c = &mut self.control;
        let [low, ..] = value.to_le_bytes();
        // Numbers of queues have 16 bits; a larger one names none.
        let queue = u16::try_from(value).unwrap_or(u16::MAX);
        match offset {
            register::DEVICE_FEATURES_SELECT => c.device_features_select = value,
            register::DRIVER_FEATURES => c.set_driver_features(value),
            register::DRIVER_FEATURES_SELECT => c.driver_features_select = value,
            register::QUEUE_SELECT => c.queue_select = queue,
            // One that does not fit is no power of two either.
            register::QUEUE_SIZE => c.set_queue_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY if value & 1 != 0 => c.enable_queue(),
            register::QUEUE_READY => c.disable_queue(),
            register::QUEUE_NOTIFY => c.notify(queue),
            register::INTERRUPT_ACK => {
                c.link.signal.clear(low);
            }
            register::STATUS => c.set_status(low),
            register::QUEUE_DESC_LOW => c.set_queue_address(Ring::Descriptors, Some(value), None),
            register::QUEUE_DESC_HIGH => c.set_queue_address(Ring::Descriptors, None, Some(value)),
            register::QUEUE_DRIVER_LOW => c.set_queue_address(Ring::Available, Some(value), None),
            register::QUEUE_DRIVER_HIGH => c.set_queue_address(Ring::Available, None, Some(value)),
            register::QUEUE_DEVICE_LOW => c.set_queue_address(Ring::Used, Some(value), None),
            register::QUEUE_DEVICE_HIGH => c.set_queue_address(Ring::Used, None, Some(value)),
            _ => {}
        }
    }
}

impl<M: DeviceMemory> BusDeviceMut for VirtioMmio<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.control.read_config(offset, data);
            return;
        }
        // Registers are 32 bits wide and aligned; another access is the driver's mistake (4.2.2.2).
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => *word = self.read_register(offset).to_le_bytes(),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.control.write_config(offset, data);
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

/// See [`VirtioMmio::builder`].
pub struct VirtioMmioBuilder<M: DeviceMemory> {
    parts: Parts<M>,
    line: Box<dyn InterruptLine>,
    doorbells: Option<(GuestAddress, Box<dyn DoorbellHost>)>,
}

impl<M: DeviceMemory> fmt::Debug for VirtioMmioBuilder<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VirtioMmioBuilder").field(&self.parts).finish()
    }
}

impl<M: DeviceMemory> VirtioMmioBuilder<M> {
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

    /// Has a kernel ring the doorbells of the device, whose registers begin at `base`, if the executor polls eventfds;
    /// [`Inline`](super::Inline) does not.
    #[must_use]
    pub fn doorbells(mut self, base: GuestAddress, host: impl DoorbellHost + 'static) -> Self {
        self.doorbells = Some((base, Box::new(host)));
        self
    }

    /// # Errors
    /// As [`VirtioMmio::new`], or if the host has no descriptors for doorbells.
    pub fn build(self) -> Result<VirtioMmio<M>, VirtioMmioError> {
        let mut control = Control::new(self.parts, Causes::new(self.line))?;
        let mut attached = None;
        if let Some((base, host)) = self.doorbells {
            let doorbells = attached.insert(AttachedDoorbells::new(host, control.notifiers()?));
            let place = GuestAddress(base.0.saturating_add(register::QUEUE_NOTIFY));
            doorbells.attach(4, |_| place);
        }
        Ok(VirtioMmio { control, _doorbells: attached })
    }
}

#[cfg(test)]
mod tests;
