//! What all transports have in common: device status, features, queues before they are started, start and reset.
//!
//! A transport maps its registers to these methods, on the vCPU's thread, with the device locked. Nothing here trusts the
//! order in which the driver calls.

mod saved;

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueState, QueueT};

use super::device::{ActivateError, Activation, DeviceMemory, DriverLink, VirtioDevice, Worker, feature};
use super::doorbell::{Doorbells, Notifiers};
use super::executor::{Executor, Inline, Running};
use super::queue::{Position, QueueError, Virtqueue};
use super::state::VirtqueueState;
use crate::bus::halves;
use crate::interrupt::{InterruptLine, lock};

/// Device status bits (Virtio 1.3, 2.1).
pub(crate) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    /// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED: the driver's.
    pub(crate) const OF_DRIVER: u8 = 0x8f;
}

/// How a transport interrupts.
pub(crate) trait Signal: Send + Sync {
    /// Buffers of `queue` were used.
    fn used(&self, queue: u16);

    /// The configuration changed, or the status did; unless `wanted` says, at the moment when it counts, that nobody is
    /// there to hear it.
    fn config(&self, wanted: &dyn Fn() -> bool);

    /// The device is reset: nothing is signalled any more, and nothing chosen.
    fn reset(&self);
}

/// Why a device interrupts, and a line that is asserted while it has cause to.
pub(crate) struct Causes(Mutex<Raised>);

struct Raised {
    causes: u8,
    muted: bool,
    line: Box<dyn InterruptLine>,
}

impl Causes {
    /// Buffers were used.
    pub(crate) const USED: u8 = 1;
    /// The configuration changed.
    pub(crate) const CONFIG: u8 = 2;

    pub(crate) fn new(line: Box<dyn InterruptLine>) -> Self {
        Self(Mutex::new(Raised { causes: 0, muted: false, line }))
    }

    /// The level follows the causes in the order of their changes.
    fn change(&self, change: impl FnOnce(&mut Raised)) -> u8 {
        let mut raised = lock(&self.0);
        let level = |raised: &Raised| raised.causes != 0 && !raised.muted;
        let (causes, before) = (raised.causes, level(&raised));
        change(&mut raised);
        let after = level(&raised);
        if before != after {
            raised.line.set_level(after);
        }
        causes
    }

    /// One more cause, if it is `wanted` then; whether it was.
    pub(crate) fn raise_if(&self, cause: u8, wanted: &dyn Fn() -> bool) -> bool {
        let mut is_wanted = false;
        self.change(|raised| {
            is_wanted = wanted();
            if is_wanted {
                raised.causes |= cause;
            }
        });
        is_wanted
    }

    /// The causes so far, of which those in `seen` are no more.
    pub(crate) fn clear(&self, seen: u8) -> u8 {
        self.change(|raised| raised.causes &= !seen)
    }

    /// Whether the line stays as if there were none.
    pub(crate) fn mute(&self, muted: bool) {
        self.change(|raised| raised.muted = muted);
    }

    /// The causes so far.
    pub(crate) fn get(&self) -> u8 {
        lock(&self.0).causes
    }
}

/// Told when a device gives up. It may be called with the device locked, or by a worker for which a reset waits, so it
/// must not call the device.
pub(crate) type Failed = Box<dyn Fn(&dyn Error) + Send + Sync>;

/// What workers reach of the transport: nothing that is behind its lock.
pub(crate) struct Link<S> {
    status: AtomicU8,
    pub(crate) signal: S,
    failed: Option<Failed>,
}

impl<S: Signal> DriverLink for Link<S> {
    fn used(&self, queue: u16) {
        self.signal.used(queue);
    }

    fn config_changed(&self) {
        // A driver that is not there yet reads it (2.1.2).
        self.signal.config(&|| self.status() & status::DRIVER_OK != 0);
    }

    fn needs_reset(&self, why: &dyn Error) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET != 0 {
            return;
        }
        if let Some(failed) = &self.failed {
            failed(why);
        }
        self.config_changed();
    }
}

impl<S> Link<S> {
    fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }
}

/// A queue register that a driver writes, half by half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    Descriptors,
    Available,
    Used,
}

/// What the builders of transports gather.
pub(crate) struct Parts<M: DeviceMemory> {
    pub(crate) device: Box<dyn VirtioDevice<M>>,
    memory: M,
    pub(crate) executor: Arc<dyn Executor>,
    pub(crate) failed: Option<Failed>,
}

impl<M: DeviceMemory> Parts<M> {
    pub(crate) fn new(device: impl VirtioDevice<M> + 'static, memory: M) -> Self {
        Self { device: Box::new(device), memory, executor: Arc::new(Inline), failed: None }
    }
}

impl<M: DeviceMemory> fmt::Debug for Parts<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("type", &self.device.device_type()).finish_non_exhaustive()
    }
}

/// A device with its driver's half of the bargain.
pub(crate) struct Control<M: DeviceMemory, S> {
    device: Box<dyn VirtioDevice<M>>,
    memory: M,
    executor: Arc<dyn Executor>,
    pub(crate) link: Arc<Link<S>>,
    /// As the driver has set them up so far, right or wrong.
    queues: Vec<QueueState>,
    /// Which half of the features the driver looks at, and writes.
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    driver_features: u64,
    pub(crate) queue_select: u16,
    /// While the driver is there.
    started: Option<Started>,
    notifiers: Notifiers,
    /// By how much the configuration's generation is ahead of the device's, which was restored.
    generation_ahead: u32,
    /// The driver is to be told, when the device goes on, that its configuration is another one.
    config_news: bool,
}

/// A device that its driver has started.
struct Started {
    doorbells: Arc<Doorbells>,
    /// Of each queue that the driver uses.
    positions: Positions,
    at_work: AtWork,
}

enum AtWork {
    Running(Box<dyn Running>),
    /// They wait to go on.
    Paused(Vec<Box<dyn Worker>>),
}

type Positions = Vec<Option<Arc<Position>>>;
type Queues<M> = Vec<Option<Virtqueue<M>>>;
/// Who serves the queues, and by which doorbells.
type Activated = (Arc<Doorbells>, Vec<Box<dyn Worker>>);

impl Started {
    /// Ends its work for good.
    fn stop(self) -> Vec<Box<dyn Worker>> {
        match self.at_work {
            AtWork::Running(running) => running.stop(),
            AtWork::Paused(mut workers) => {
                workers.iter_mut().for_each(|worker| worker.stop());
                workers
            }
        }
    }
}

impl<M: DeviceMemory, S> fmt::Debug for Control<M, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("type", &self.device.device_type())
            .field("status", &self.link.status())
            .finish_non_exhaustive()
    }
}

impl<M: DeviceMemory, S: Signal + 'static> Control<M, S> {
    /// # Errors
    /// If the device has a queue of a size that queues cannot have.
    pub(crate) fn new(parts: Parts<M>, signal: S) -> Result<Self, QueueError> {
        let Parts { device, memory, executor, failed } = parts;
        let sizes = (0..).zip(device.queue_sizes());
        let queues = sizes.map(|(index, size)| match Queue::new(*size) {
            Ok(queue) => Ok(queue.state()),
            Err(source) => Err(QueueError::Ring { index, source }),
        });
        let queues = queues.collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            executor,
            link: Arc::new(Link { status: AtomicU8::new(0), signal, failed }),
            queues,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            started: None,
            notifiers: Notifiers::default(),
            generation_ahead: 0,
            config_news: false,
        })
    }

    pub(crate) fn device(&self) -> &dyn VirtioDevice<M> {
        &*self.device
    }

    /// Features that a driver may choose from.
    pub(crate) fn features(&self) -> u64 {
        self.device.features() | feature::OFFERED
    }

    /// The half of the features that the driver selected; other halves are empty.
    pub(crate) fn device_features(&self) -> u32 {
        half(self.features(), self.device_features_select)
    }

    pub(crate) fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_select)
    }

    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Only before the features were agreed upon (3.1.1).
    pub(crate) fn set_driver_features(&mut self, value: u32) {
        if self.status() & (status::FEATURES_OK | status::DRIVER_OK) != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // Bits that are offered nowhere.
            _ => {}
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.link.status()
    }

    /// The driver writes the status: 0 resets, other bits are added to those that are there.
    pub(crate) fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let new = value & status::OF_DRIVER & !self.status();
        let mut granted = new & !(status::FEATURES_OK | status::DRIVER_OK);
        if new & status::FEATURES_OK != 0 && self.features_are_acceptable() {
            granted |= status::FEATURES_OK;
        }
        self.link.status.fetch_or(granted, Ordering::SeqCst);
        if new & status::DRIVER_OK == 0 {
            return;
        }
        if self.status() & (status::FEATURES_OK | status::NEEDS_RESET) != status::FEATURES_OK {
            self.link.needs_reset(&NotReady);
            return;
        }
        // Before anything is served, so that nothing that is used meanwhile goes without its interrupt.
        self.link.status.fetch_or(status::DRIVER_OK, Ordering::SeqCst);
        if let Err(error) = self.start() {
            self.link.needs_reset(&*error);
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.are_acceptable(self.driver_features)
    }

    fn are_acceptable(&self, wanted: u64) -> bool {
        wanted & !self.features() == 0
            && wanted & feature::VERSION_1 != 0
            && self.device.accepts(wanted & !feature::OFFERED)
    }

    fn start(&mut self) -> Result<(), Box<dyn Error>> {
        let (queues, positions) = self.take_queues(None)?;
        let (doorbells, workers) = self.activate(queues)?;
        let running = self.executor.start(Arc::<Link<S>>::clone(&self.link), &doorbells, workers)?;
        self.started = Some(Started { doorbells, positions, at_work: AtWork::Running(running) });
        Ok(())
    }

    /// The queues that the driver has set up; those of a `saved` device with what is in flight.
    fn take_queues(&self, saved: Option<&[VirtqueueState]>) -> Result<(Queues<M>, Positions), QueueError> {
        let event_idx_enabled = self.driver_features & feature::EVENT_IDX != 0;
        let (mut queues, mut positions) = (Vec::new(), Vec::new());
        for (index, state) in (0..).zip(&self.queues) {
            if !state.ready {
                queues.push(None);
                positions.push(None);
                continue;
            }
            let own = Queue::try_from(QueueState { event_idx_enabled, ..*state })
                .map_err(|source| QueueError::Ring { index, source })?;
            let (memory, link) = (self.memory.clone(), Arc::<Link<S>>::clone(&self.link));
            let queue = match saved.and_then(|saved| saved.get(usize::from(index))) {
                Some(VirtqueueState { told, in_flight, .. }) => {
                    Virtqueue::restored(own, index, memory, link, (*told, in_flight))?
                }
                None => Virtqueue::new(own, index, memory, link)?,
            };
            positions.push(Some(Arc::clone(queue.position())));
            queues.push(Some(queue));
        }
        Ok((queues, positions))
    }

    fn activate(&mut self, queues: Queues<M>) -> Result<Activated, ActivateError> {
        let notifiers = Arc::clone(&self.notifiers);
        let doorbells = Arc::new(Doorbells::with_notifiers(self.queues.len(), notifiers));
        let link: Arc<dyn DriverLink> = Arc::<Link<S>>::clone(&self.link);
        let features = self.driver_features;
        let activation = Activation { features, queues, link, doorbells: Arc::clone(&doorbells) };
        let workers = self.device.activate(activation)?;
        Ok((doorbells, workers))
    }

    /// Back to the beginning. Nothing of the device is at work when this returns.
    pub(crate) fn reset(&mut self) {
        let workers = self.started.take().map(Started::stop).unwrap_or_default();
        self.device.reset(workers);
        for queue in &mut self.queues {
            // It was one with that size, so it is again.
            if let Ok(anew) = Queue::new(queue.max_size) {
                *queue = anew.state();
            }
        }
        self.driver_features = 0;
        self.config_news = false;
        (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
        // In this order: who signals now, sees that nobody is there, or is forgotten.
        self.link.status.store(0, Ordering::SeqCst);
        self.link.signal.reset();
    }

    /// The driver rings for a queue.
    pub(crate) fn notify(&self, queue: u16) {
        if let Some(started) = &self.started {
            started.doorbells.ring(queue);
        }
    }

    /// Makes an eventfd for each queue, none if the executor polls none. Before the device is started; once.
    ///
    /// # Errors
    /// If the host has no more descriptors.
    pub(crate) fn notifiers(&mut self) -> io::Result<Notifiers> {
        self.notifiers = self.executor.notifiers(self.queues.len())?.into();
        Ok(Arc::clone(&self.notifiers))
    }

    /// The selected queue, if there is one.
    pub(crate) fn queue(&self) -> Option<&QueueState> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue, as long as it can be set up.
    fn queue_to_set_up(&mut self) -> Option<&mut QueueState> {
        let started = self.status() & status::DRIVER_OK != 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !started && !queue.ready)
    }

    /// A size that the queue cannot have is forgotten.
    pub(crate) fn set_queue_size(&mut self, size: u16) {
        if let Some(queue) = self.queue_to_set_up()
            && size.is_power_of_two()
            && size <= queue.max_size
        {
            queue.size = size;
        }
    }

    /// Sets halves of an address. What is not aligned is found when the device starts.
    pub(crate) fn set_queue_address(&mut self, ring: Ring, low: Option<u32>, high: Option<u32>) {
        if let Some(queue) = self.queue_to_set_up() {
            let address = match ring {
                Ring::Descriptors => &mut queue.desc_table,
                Ring::Available => &mut queue.avail_ring,
                Ring::Used => &mut queue.used_ring,
            };
            let [old_low, old_high] = halves(*address);
            *address = u64::from(high.unwrap_or(old_high)) << 32 | u64::from(low.unwrap_or(old_low));
        }
    }

    pub(crate) fn enable_queue(&mut self) {
        if let Some(queue) = self.queue_to_set_up() {
            queue.ready = true;
        }
    }

    /// The driver takes a queue back before the device has started; afterwards it is the device's until reset.
    pub(crate) fn disable_queue(&mut self) {
        let started = self.status() & status::DRIVER_OK != 0;
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|_| !started) {
            queue.ready = false;
        }
    }

    /// See [`VirtioDevice::config_generation`].
    pub(crate) fn config_generation(&self) -> u32 {
        self.device.config_generation().wrapping_add(self.generation_ahead)
    }

    /// The configuration at `offset`; zeros beyond its end.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(crate) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }
}

impl<M: DeviceMemory, S> Drop for Control<M, S> {
    fn drop(&mut self) {
        // What is in flight belongs to memory that may go now.
        drop(self.started.take().map(Started::stop));
    }
}

fn half(features: u64, select: u32) -> u32 {
    let select = usize::try_from(select).unwrap_or(usize::MAX);
    halves(features).get(select).copied().unwrap_or(0)
}

/// A driver that says DRIVER_OK before its time (3.1.1).
#[derive(Debug, thiserror::Error)]
#[error("the driver set DRIVER_OK without features that were agreed upon")]
struct NotReady;
