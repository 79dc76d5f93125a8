//! Traditional memory balloon (Virtio 1.3, 5.5): a guest gives pages back to the host, when it is asked to, or because they are
//! free.
//!
//! | part | what |
//! |---|---|
//! | [`Balloon`] | the device |
//! | [`BalloonHandle`] | the monitor's end: sets the size, asks for statistics, reads counters, from any thread |
//! | [`MemoryRelease`] | what gives memory back to the host: `GuestRam` of `vmm-memory`, or what the monitor has for it |
//! | [`Statistics`] | what the guest tells of its memory |
//!
//! Inflated and reported pages go to [`MemoryRelease`] in runs, each within one region of RAM. Offered are VIRTIO_BALLOON_F_STATS_VQ,
//! F_PAGE_REPORTING with F_PAGE_POISON, F_DEFLATE_ON_OOM, and F_MUST_TELL_HOST, as the [`BalloonBuilder`] has it. Free page hints
//! (5.5.6.5), which say what a migration need not copy, are not.
//!
//! # Threat model
//! Page numbers and reported ranges are whatever a hostile driver likes. What is no RAM is left out and counted, so nothing that
//! is not this guest's reaches [`MemoryRelease`]. A call of a worker does a bounded amount, however long the chain is. A guest
//! can give away pages that it needs, its own rings among them: it then reads zeros there, and that is all. It need not do
//! as it is asked: `actual` and all statistics are what it claims.

mod handle;
mod pages;
mod release;
mod state;
mod statistics;

use std::fmt;
use std::sync::Arc;

use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, VirtioDevice, Worker};
use super::metrics::Metrics;
use super::state::DeviceState;
use crate::clock::Clock;
use crate::error::StateError;
use handle::{Active, Measured, Shared};
use pages::{Kind, PageWorker};
use statistics::StatisticsWorker;

pub use handle::{BalloonCounters, BalloonHandle};
pub use release::MemoryRelease;
pub use state::BalloonState;
pub use statistics::{MAX_STATISTICS, Statistic, Statistics};

/// Bytes of a page, whatever the guest's own pages are (5.5.6).
pub const PAGE: u64 = 4096;

/// Feature bits (5.5.3).
pub mod feature {
    /// VIRTIO_BALLOON_F_MUST_TELL_HOST.
    pub const MUST_TELL_HOST: u64 = 1 << 0;
    /// VIRTIO_BALLOON_F_STATS_VQ.
    pub const STATS_VQ: u64 = 1 << 1;
    /// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// VIRTIO_BALLOON_F_FREE_PAGE_HINT, which is not offered.
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    /// VIRTIO_BALLOON_F_PAGE_POISON.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// VIRTIO_BALLOON_F_PAGE_REPORTING.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// Queues (5.5.2); those behind it are there with their features.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Queues that come with a feature, and where.
const OPTIONAL: [(u64, u16); 2] = [(feature::STATS_VQ, 2), (feature::PAGE_REPORTING, 4)];
const SIZES: [u16; 5] = [128; 5];

/// A memory balloon.
pub struct Balloon {
    release: Arc<dyn MemoryRelease>,
    features: u64,
    shared: Arc<Shared>,
    /// The target before a state was restored that it has not started from yet.
    target_before: Option<u32>,
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("features", &self.features)
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl Balloon {
    /// A balloon of no pages that gives memory back through `release`, with all that it can offer but
    /// VIRTIO_BALLOON_F_MUST_TELL_HOST.
    pub fn new(release: impl MemoryRelease + 'static) -> Self {
        Self::builder(release).build()
    }

    /// The same with more to say.
    pub fn builder(release: impl MemoryRelease + 'static) -> BalloonBuilder {
        let features =
            feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::PAGE_POISON | feature::PAGE_REPORTING;
        BalloonBuilder { release: Arc::new(release), features, target: 0, callback: None, metrics: None }
    }

    /// The monitor's end.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }

    /// A driver is there.
    fn begin<M: DeviceMemory>(
        &self,
        mut activation: Activation<M>,
    ) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let [statistics, reporting] = optional_queues(&activation);
        let poison = activation.features & feature::PAGE_POISON != 0;
        let pages = |queue, kind| PageWorker::new(queue, kind, &self.release, &self.shared);
        let mut workers: Vec<Box<dyn Worker>> = vec![
            Box::new(pages(activation.take_queue(INFLATE)?, Kind::Inflate)),
            Box::new(pages(activation.take_queue(DEFLATE)?, Kind::Deflate)),
        ];
        if let Some(index) = reporting {
            workers.push(Box::new(pages(activation.take_queue(index)?, Kind::Report { poison })));
        }
        if let Some(index) = statistics {
            let worker = StatisticsWorker::new(activation.take_queue(index)?, &self.shared);
            workers.push(Box::new(worker));
        }
        self.shared.activate(Active { link: activation.link, doorbells: activation.doorbells, statistics });
        Ok(workers)
    }
}

type Callback = Box<dyn Fn(&Statistics) + Send + Sync>;

/// See [`Balloon::builder`].
pub struct BalloonBuilder {
    release: Arc<dyn MemoryRelease>,
    features: u64,
    target: u32,
    callback: Option<Callback>,
    metrics: Option<Measured>,
}

impl fmt::Debug for BalloonBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonBuilder").field("features", &self.features).finish_non_exhaustive()
    }
}

impl BalloonBuilder {
    fn feature(mut self, bits: u64, offered: bool) -> Self {
        self.features = if offered { self.features | bits } else { self.features & !bits };
        self
    }

    /// How many pages of 4 KiB the guest is to give up from the start; none unless said.
    #[must_use]
    pub fn target(mut self, pages: u32) -> Self {
        self.target = pages;
        self
    }

    /// Whether the guest may take pages back when it is short of memory (5.5.6.1), which it may unless said.
    #[must_use]
    pub fn deflate_on_oom(self, offered: bool) -> Self {
        self.feature(feature::DEFLATE_ON_OOM, offered)
    }

    /// Whether the guest must tell before it uses pages again, which it need not unless said. For a [`MemoryRelease`] that has
    /// to do something first, in [`MemoryRelease::reclaim`]. A driver that does not tell is refused. Reported pages come back
    /// without a word all the same, so such a one has [`page_reporting`](Self::page_reporting) off.
    #[must_use]
    pub fn must_tell_host(self, offered: bool) -> Self {
        self.feature(feature::MUST_TELL_HOST, offered)
    }

    /// Whether the guest tells statistics of its memory, which it does unless said.
    #[must_use]
    pub fn statistics(self, offered: bool) -> Self {
        self.feature(feature::STATS_VQ, offered)
    }

    /// Whether the guest reports free pages by itself (5.5.6.7), which it does unless said.
    #[must_use]
    pub fn page_reporting(self, offered: bool) -> Self {
        self.feature(feature::PAGE_REPORTING | feature::PAGE_POISON, offered)
    }

    /// Called with statistics whenever the guest tells them, asked or not, on the thread that serves the queue.
    #[must_use]
    pub fn on_statistics(mut self, callback: impl Fn(&Statistics) + Send + Sync + 'static) -> Self {
        self.callback = Some(Box::new(callback));
        self
    }

    /// Tells `metrics` of each request: memory that the guest gave, asked or not, is an
    /// [`Activity::Write`](super::metrics::Activity::Write) of so many bytes, memory that it took back a
    /// [`Read`](super::metrics::Activity::Read), statistics are [`Other`](super::metrics::Activity::Other). What could not be
    /// read or released makes it an error, which the guest does not hear of. Latencies go by `clock`.
    #[must_use]
    pub fn metrics(mut self, metrics: Arc<dyn Metrics>, clock: impl Clock + 'static) -> Self {
        self.metrics = Some(Measured { sink: metrics, clock: Box::new(clock) });
        self
    }

    /// Makes the device.
    pub fn build(self) -> Balloon {
        let shared = Arc::new(Shared::new(self.target, self.callback, self.metrics));
        Balloon { release: self.release, features: self.features, shared, target_before: None }
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn accepts(&self, features: u64) -> bool {
        // 5.5.3.2: who needs to be told does not work for a driver that does not tell.
        self.features & feature::MUST_TELL_HOST & !features == 0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.shared.write_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.generation()
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let before = self.target_before.take();
        self.begin(activation).inspect_err(|_| self.shared.set_target_back(before))
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        drop(workers);
        self.target_before = None;
        self.shared.reset();
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Balloon(self.saved()))
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<(), StateError> {
        self.take_over(state)
    }
}

/// The queues for statistics and for reports, as far as the driver uses them.
///
/// 5.5.2 gives each queue its number. Linux leaves none out, but numbers those that it uses one after the other; which of the
/// two a driver does shows in the queues that it has set up.
fn optional_queues<M: DeviceMemory>(activation: &Activation<M>) -> [Option<u16>; 2] {
    let is_set_up = |index: &u16| activation.queues.get(usize::from(*index)).is_some_and(Option::is_some);
    let negotiated = |bit: u64| activation.features & bit != 0;
    let by_number = OPTIONAL.map(|(bit, index)| Some(index).filter(|_| negotiated(bit)));
    if by_number.iter().flatten().all(is_set_up) {
        return by_number;
    }
    let mut next = DEFLATE;
    by_number.map(|index| {
        next += u16::from(index.is_some());
        index.map(|_| next).filter(is_set_up)
    })
}

#[cfg(test)]
mod tests;
