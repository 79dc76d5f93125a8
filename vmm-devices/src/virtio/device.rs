//! What a virtio device is to a transport, and what serves its queues.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddressSpace;

use super::doorbell::Doorbells;
use super::queue::{QueueError, Virtqueue};
use super::state::DeviceState;
use crate::error::StateError;

/// Guest memory as devices take it: `GuestRam::address_space` of `vmm-memory`, or any other address space of `vm-memory`.
/// What keeps it mapped goes with requests to other threads.
pub trait DeviceMemory: GuestAddressSpace<T: Send> + Clone + Send + Sync + 'static {}

impl<M: GuestAddressSpace<T: Send> + Clone + Send + Sync + 'static> DeviceMemory for M {}

/// Which kind of device it is (Virtio 1.3, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u16);

impl DeviceType {
    /// Network device (5.1).
    pub const NETWORK: Self = Self(1);
    /// Block device (5.2).
    pub const BLOCK: Self = Self(2);
    /// Console (5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy device (5.4).
    pub const RNG: Self = Self(4);
    /// Traditional memory balloon (5.5).
    pub const BALLOON: Self = Self(5);
    /// Socket device (5.10).
    pub const VSOCK: Self = Self(19);
}

/// Feature bits that all devices share (Virtio 1.3, 6). [`Virtqueue`] sees to those of the ring, transports offer them.
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1, without which there is no device.
    pub const VERSION_1: u64 = 1 << 32;
    /// What is the transport's and the queue's to offer, and not a device's.
    pub(crate) const OFFERED: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// A device, without a transport. Methods are called by one thread at a time, from vCPU threads; queues are served by the
/// [`Worker`]s that [`VirtioDevice::activate`] gives away, which may run anywhere.
pub trait VirtioDevice<M: DeviceMemory>: Send {
    /// Its kind.
    fn device_type(&self) -> DeviceType;

    /// The feature bits of its kind that it offers (bits 0 to 23 and 50 to 127, of which 64 are there). Those of the ring
    /// are not its business.
    fn features(&self) -> u64;

    /// For each queue, how many descriptors it may have at most: powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Whether a driver may have that subset of what is offered: some features are nothing without others.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The driver reads its configuration at `offset` (2.5). `data`, of 1, 2, 4 or 8 bytes, comes filled with zeros: what
    /// lies beyond the configuration is left alone.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// The driver writes there.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// A number that is another one whenever the configuration is other than before (2.5.1). A device that changes it
    /// changes both at once.
    fn config_generation(&self) -> u32 {
        0
    }

    /// The driver is ready. What serves the queues takes over what it needs of the device.
    ///
    /// # Errors
    /// The driver is told that the device needs a reset.
    fn activate(&mut self, activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError>;

    /// The driver has reset the device: back to the state before it was found. `workers` are those of the last activation,
    /// stopped; none where there was none since the last reset, or where it failed.
    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        let _ = workers;
    }

    /// What it knows beside its queues and what it was built with. Its workers are [paused](Worker::pause), or there are none. `None` if it
    /// cannot be saved, which is so unless said here.
    fn save(&self) -> Option<DeviceState> {
        None
    }

    /// Goes on from a saved state, whose driver has accepted `features`. Nothing was activated so far; if its driver had started it, its
    /// activation follows, with queues that stand where they stood. To the driver that is no new beginning.
    ///
    /// # Errors
    /// If it cannot be in that state: it is another device's, or means nothing. Nothing has changed.
    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        let _ = features;
        Err(state.of_another("virtio"))
    }
}

impl<M: DeviceMemory, D: VirtioDevice<M> + ?Sized> VirtioDevice<M> for Box<D> {
    fn device_type(&self) -> DeviceType {
        (**self).device_type()
    }

    fn features(&self) -> u64 {
        (**self).features()
    }

    fn queue_sizes(&self) -> &[u16] {
        (**self).queue_sizes()
    }

    fn accepts(&self, features: u64) -> bool {
        (**self).accepts(features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        (**self).read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        (**self).write_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        (**self).config_generation()
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        (**self).activate(activation)
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        (**self).reset(workers);
    }

    fn save(&self) -> Option<DeviceState> {
        (**self).save()
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        (**self).restore(state, features)
    }
}

/// What a device gets to work with while the driver is there.
pub struct Activation<M: DeviceMemory> {
    /// Features that the driver has accepted, those of the ring too.
    pub features: u64,
    /// The queues by index; `None` for those that the driver does not use.
    pub queues: Vec<Option<Virtqueue<M>>>,
    /// Reaches the driver.
    pub link: Arc<dyn DriverLink>,
    /// Wakes the workers, for who has news that comes by no queue.
    pub doorbells: Arc<Doorbells>,
}

impl<M: DeviceMemory> Activation<M> {
    /// Takes the queue with that index.
    ///
    /// # Errors
    /// If the driver does not use it and the device cannot do without.
    pub fn take_queue(&mut self, index: u16) -> Result<Virtqueue<M>, ActivateError> {
        let place = self.queues.get_mut(usize::from(index));
        place.and_then(Option::take).ok_or(ActivateError::QueueMissing { index })
    }
}

impl<M: DeviceMemory> fmt::Debug for Activation<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation").field("features", &self.features).finish_non_exhaustive()
    }
}

/// Why a device cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver did not set up a queue.
    #[error("queue {index} is not set up, and the device cannot do without")]
    QueueMissing {
        /// Which one.
        index: u16,
    },
    /// A queue is not where queues can be.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The host refused something.
    #[error("the host refused what the device needs")]
    Host(#[from] std::io::Error),
}

/// How a device reaches its driver. A transport implements it.
pub trait DriverLink: Send + Sync {
    /// Buffers of a queue were used. [`Virtqueue::interrupt`] calls it, where the driver wants to hear of it.
    fn used(&self, queue: u16);

    /// The configuration is another one.
    fn config_changed(&self);

    /// The device cannot go on until it is reset (DEVICE_NEEDS_RESET, 2.1.1), and why. Who says so touches no queue after this; other
    /// workers of the device may go on, on which a driver does not rely (2.1.2).
    fn needs_reset(&self, why: &dyn std::error::Error);
}

/// Whether a worker has work left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// None; it is called again when something happens.
    Idle,
    /// It did as much as is fair to others, and is to be called again soon.
    More,
}

/// What serves one or several queues of a device. An [`Executor`](super::Executor) calls it, from one thread at a time.
pub trait Worker: Send {
    /// The queues whose doorbells are its own.
    fn queues(&self) -> Vec<u16>;

    /// Something happened: a doorbell rang, or what else it waits for came. Looks at everything that it serves, and comes
    /// back within a bounded time, whatever the driver does meanwhile. It may be called though nothing happened.
    ///
    /// # Errors
    /// The driver has broken the rules. The executor tells it that the device needs a reset, and does not call again.
    fn process(&mut self) -> Result<Progress, QueueError>;

    /// What it waits for beside doorbells: input there (`EPOLLIN`), or its end, leads to [`Worker::process`]. Asked for
    /// once, when the executor starts it.
    ///
    /// Each arrival is told once (`EPOLLET`): a worker that leaves input unread, because its driver has no room, is called
    /// at the driver's doorbell, and nobody spins meanwhile. One that could go on says [`Progress::More`].
    ///
    /// [`Inline`](super::Inline) waits for nothing: there a worker with sources is called at its doorbells alone.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// When it wants to be called though nothing happened: nanoseconds of the clock that the device was made with. Asked
    /// for after each call.
    fn deadline(&self) -> Option<u64> {
        None
    }

    /// Comes to rest: what is in flight is finished or given up, and from here on it touches neither guest memory nor the
    /// driver.
    fn stop(&mut self) {}

    /// Comes to rest in order to go on, here or, from its device's saved state, elsewhere. What others do for it (threads, the kernel) is
    /// waited for and given back to the driver; what it holds beside that is kept. Until it is called again it touches neither guest
    /// memory nor the driver.
    ///
    /// Chains that stay in flight are saved with their queue, and taken again where that goes on: what was done of them and is not
    /// to be done twice has to be in the device's state. A worker that does nothing outside of its calls needs nothing here.
    ///
    /// # Errors
    /// As [`Worker::process`].
    fn pause(&mut self) -> Result<(), QueueError> {
        Ok(())
    }
}
