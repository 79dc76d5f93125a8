//! Block device (Virtio 1.3, 5.2): a disk.
//!
//! | part | what |
//! |---|---|
//! | [`Block`], [`BlockBuilder`] | the device |
//! | [`BlockHandle`] | resizes it and changes its limits while a driver uses it |
//! | [`Backend`] | what a disk is to it; [`MemoryDisk`] and [`RawFile`] are there |
//! | [`ConcurrentDisk`], [`IoQueue`] | one whose requests go on while others are made: [`Pooled`] is every backend, by threads; `UringFile` a file, by io_uring |
//!
//! With a mere [`Backend`] requests are done one after the other by the thread that serves the queue, which suits memory
//! and files that are cached.
//!
//! # Threat model
//! Requests are hostile. Each is read once, its range is checked against the disk as it is then, and only then anything is
//! touched. Data goes between backend and guest memory without a copy here, so a request costs no memory, whatever its length. A request
//! that stays in flight keeps the guest's memory mapped, and a reset waits until none is: a backend that hangs holds the
//! reset up, and nothing is ever written for a driver that has gone. The disk's contents are never looked at.

mod backend;
mod buffers;
mod config;
mod handle;
mod memory;
mod pool;
mod raw;
mod request;
mod shrinks;
mod state;
#[cfg(feature = "io-uring")]
mod uring;
mod worker;

use std::fmt;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use super::slices::Slices;
pub use backend::{Backend, BlockSizes, ConcurrentDisk, IoQueue, Job, JobEnd, Operation, Waker};
pub use buffers::Buffers;
pub use config::{ID_BYTES, feature};
pub use handle::{BlockHandle, ResizeError};
pub use memory::MemoryDisk;
pub use pool::{Pooled, ThreadPool};
pub use raw::{RawFile, RawFileError};
pub use state::BlockState;
#[cfg(feature = "io-uring")]
pub use uring::UringFile;

use self::config::{Config, WRITEBACK_AT};
use self::request::Agreed;
use self::shrinks::Shrinks;
use self::worker::BlockWorker;
use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, DriverLink, VirtioDevice, Worker};
use super::doorbell::Doorbells;
use super::metrics::Metrics;
use super::rate::RateLimiter;
use super::state::DeviceState;
use crate::clock::Clock;
use crate::error::StateError;
use crate::interrupt::lock;

/// Descriptors of a queue, unless said otherwise.
const QUEUE_SIZE: u16 = 256;

/// Why a disk cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// Its size is none that disks have, or is not known.
    #[error(transparent)]
    Size(#[from] ResizeError),
    /// It was to be written, and its backend is read-only.
    #[error("the disk's backend is read-only; open it for writing, or make the device read-only")]
    ReadOnly,
    /// A queue of a size that queues cannot have.
    #[error("a queue of {size} descriptors; allowed are powers of two from 4 to 32768")]
    QueueSize {
        /// The size.
        size: u16,
    },
    /// The backend's blocks are none that a driver understands.
    #[error(
        "blocks of {logical} bytes, physically {physical}; allowed are powers of two from 512 to 65536, physical ones no smaller"
    )]
    Blocks {
        /// Logical ones.
        logical: u32,
        /// Physical ones.
        physical: u32,
    },
    /// The name is too long.
    #[error("a serial number of {len} bytes; 20 are the most")]
    Serial {
        /// Its length.
        len: usize,
    },
}

/// When a write counts as done (5.2.6.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// When the backend has it; a flush brings it to stable storage. Without VIRTIO_BLK_F_FLUSH the driver could ask for
    /// no flush: then it is as [`CacheMode::WriteThrough`].
    #[default]
    WriteBack,
    /// When it is on stable storage.
    WriteThrough,
}

/// What device, workers and handles share.
pub(crate) struct Shared {
    disk: Arc<dyn Backend>,
    read_only: bool,
    serial: [u8; ID_BYTES],
    /// The capacity. Written with `generation` locked.
    sectors: AtomicU64,
    generation: Mutex<u32>,
    shrinks: Shrinks,
    writeback: AtomicBool,
    rate: Option<RateLimiter>,
    metrics: Option<Measured>,
    active: Mutex<Option<Active>>,
}

/// Where figures go, and what time it is.
struct Measured {
    sink: Arc<dyn Metrics>,
    clock: Box<dyn Clock>,
}

/// The driver that is there.
struct Active {
    link: Arc<dyn DriverLink>,
    doorbells: Arc<Doorbells>,
    /// It may choose the cache mode.
    may_choose: bool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("sectors", &self.sectors)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// When a request begins, if anybody wants to know.
    fn now_ns(&self) -> u64 {
        self.metrics.as_ref().map_or(0, |metrics| metrics.clock.now_ns())
    }
}

#[derive(Clone)]
struct Concurrent(Arc<dyn ConcurrentDisk>);

impl fmt::Debug for Concurrent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Concurrent").finish_non_exhaustive()
    }
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    shared: Arc<Shared>,
    cache: CacheMode,
    /// What the driver wants of it.
    chosen: Option<CacheMode>,
    /// Where queues of the disk come from, if it has any.
    concurrent: Option<Concurrent>,
    sizes: Vec<u16>,
    blocks: BlockSizes,
}

/// What a block device is to be like.
#[must_use]
pub struct BlockBuilder {
    disk: Arc<dyn Backend>,
    concurrent: Option<Concurrent>,
    read_only: bool,
    serial: Vec<u8>,
    queues: NonZeroU16,
    queue_size: u16,
    cache: CacheMode,
    rate: Option<RateLimiter>,
    metrics: Option<Measured>,
}

impl fmt::Debug for BlockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockBuilder").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

impl BlockBuilder {
    /// The driver may only read (VIRTIO_BLK_F_RO); a backend that is read-only needs this.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// What the disk is called (VIRTIO_BLK_T_GET_ID): up to 20 bytes, ASCII as a rule.
    pub fn serial(mut self, serial: impl AsRef<[u8]>) -> Self {
        self.serial = serial.as_ref().to_vec();
        self
    }

    /// How many queues there are, one for each vCPU at best (VIRTIO_BLK_F_MQ). Each has a worker of its own. 1 unless said here.
    pub fn queues(mut self, queues: NonZeroU16) -> Self {
        self.queues = queues;
        self
    }

    /// Descriptors of each queue at most: a power of two from 4 to 32768. 256 unless said here.
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// When writes are done, until the driver says otherwise (VIRTIO_BLK_F_CONFIG_WCE).
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Limits on bytes and requests, of all queues together.
    pub fn rate(mut self, rate: RateLimiter) -> Self {
        self.rate = Some(rate);
        self
    }

    /// Tells `metrics` of each request; latencies go by `clock`.
    pub fn metrics(mut self, metrics: Arc<dyn Metrics>, clock: impl Clock + 'static) -> Self {
        self.metrics = Some(Measured { sink: metrics, clock: Box::new(clock) });
        self
    }

    /// # Errors
    /// If the backend, or what was said here, is not what a device can be.
    pub fn build(self) -> Result<Block, BlockError> {
        if self.disk.is_read_only() && !self.read_only {
            return Err(BlockError::ReadOnly);
        }
        let size = self.queue_size;
        if !size.is_power_of_two() || size < 4 {
            return Err(BlockError::QueueSize { size });
        }
        let blocks = self.disk.block_sizes();
        let BlockSizes { logical, physical, .. } = blocks;
        let sound = |block: u32| block.is_power_of_two() && (512..=1 << 16).contains(&block);
        if !sound(logical) || !sound(physical) || physical < logical {
            return Err(BlockError::Blocks { logical, physical });
        }
        if self.serial.len() > ID_BYTES {
            return Err(BlockError::Serial { len: self.serial.len() });
        }
        let sectors = handle::sectors(self.disk.size().map_err(ResizeError::from)?)?;
        let shared = Shared {
            disk: self.disk,
            read_only: self.read_only,
            serial: worker::serial(&self.serial),
            sectors: AtomicU64::new(sectors),
            generation: Mutex::new(0),
            shrinks: Shrinks::new(self.queues.get()),
            writeback: AtomicBool::new(self.cache == CacheMode::WriteBack),
            rate: self.rate,
            metrics: self.metrics,
            active: Mutex::new(None),
        };
        let sizes = vec![size; self.queues.get().into()];
        Ok(Block {
            shared: Arc::new(shared),
            cache: self.cache,
            chosen: None,
            concurrent: self.concurrent,
            sizes,
            blocks,
        })
    }
}

impl Block {
    /// A device whose contents are those of `disk`, and whose requests are done one after the other by the thread that serves
    /// their queue.
    pub fn builder(disk: Arc<dyn Backend>) -> BlockBuilder {
        BlockBuilder {
            disk,
            concurrent: None,
            read_only: false,
            serial: Vec::new(),
            queues: NonZeroU16::MIN,
            queue_size: QUEUE_SIZE,
            cache: CacheMode::default(),
            rate: None,
            metrics: None,
        }
    }

    /// The same, whose requests go on while others are made.
    pub fn concurrent(disk: Arc<dyn ConcurrentDisk>) -> BlockBuilder {
        BlockBuilder { concurrent: Some(Concurrent(Arc::clone(&disk))), ..Self::builder(disk.disk()) }
    }

    /// Reaches the device after a transport has taken it.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle(Arc::clone(&self.shared))
    }

    fn offered(&self) -> u64 {
        use feature::{
            BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, SIZE_MAX, TOPOLOGY, WRITE_ZEROES,
        };
        let mut features = SIZE_MAX | SEG_MAX | BLK_SIZE | TOPOLOGY | FLUSH | CONFIG_WCE;
        if self.sizes.len() > 1 {
            features |= MQ;
        }
        if self.shared.read_only {
            return features | RO;
        }
        if self.shared.disk.can_discard() {
            features |= DISCARD;
        }
        features | WRITE_ZEROES
    }

    fn queues(&self) -> u16 {
        // Made of one.
        u16::try_from(self.sizes.len()).unwrap_or(u16::MAX)
    }

    fn set_cache(&self, mode: CacheMode) {
        self.shared.writeback.store(mode == CacheMode::WriteBack, Ordering::SeqCst);
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        self.offered()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let generation = lock(&self.shared.generation);
        let config = Config {
            sectors: self.shared.sectors.load(Ordering::SeqCst),
            blocks: self.blocks,
            queue_size: self.sizes.first().copied().unwrap_or_default(),
            queues: self.queues(),
            writeback: self.shared.writeback.load(Ordering::SeqCst),
            features: self.offered(),
        };
        drop(generation);
        let bytes = config.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(place, byte)| *place = *byte);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The one field that a driver writes, for itself alone (5.2.5.1). It may do so from FEATURES_OK on (3.1.1): whether the feature
        // was agreed upon is known to the device when it is activated.
        if let (WRITEBACK_AT, [mode]) = (offset, data)
            && lock(&self.shared.active).as_ref().is_none_or(|active| active.may_choose)
        {
            let mode = if *mode == 0 { CacheMode::WriteThrough } else { CacheMode::WriteBack };
            self.chosen = Some(mode);
            self.set_cache(mode);
        }
    }

    fn config_generation(&self) -> u32 {
        *lock(&self.shared.generation)
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let has = |bit: u64| activation.features & bit != 0;
        let agreed = Agreed {
            flush: has(feature::FLUSH),
            discard: has(feature::DISCARD),
            write_zeroes: has(feature::WRITE_ZEROES),
        };
        let may_choose = has(feature::CONFIG_WCE);
        let several = has(feature::MQ);
        // A driver that cannot flush finds a disk that writes through (5.2.5.2).
        let cache = if agreed.flush { self.cache } else { CacheMode::WriteThrough };
        self.set_cache(self.chosen.filter(|_| may_choose).unwrap_or(cache));
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        // The first queue is always there; of others, those that the driver has set up.
        for index in 0..if several { self.queues() } else { 1 } {
            let queue = match activation.take_queue(index) {
                Ok(queue) => queue,
                Err(_) if index > 0 => continue,
                Err(error) => return Err(error),
            };
            let io = self.concurrent.as_ref().map(|Concurrent(disk)| {
                let doorbells = Arc::clone(&activation.doorbells);
                disk.queue(queue.size(), Arc::new(move || doorbells.ring(index)))
            });
            let io = io.transpose()?;
            workers.push(Box::new(BlockWorker::new(queue, Arc::clone(&self.shared), agreed, io)));
        }
        let Activation { link, doorbells, .. } = activation;
        if let Some(rate) = &self.shared.rate {
            rate.register(&doorbells);
        }
        *lock(&self.shared.active) = Some(Active { link, doorbells, may_choose });
        Ok(workers)
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        *lock(&self.shared.active) = None;
        drop(workers);
        self.chosen = None;
        self.set_cache(self.cache);
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Block(self.saved()))
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        self.take_over(state, features)
    }
}

#[cfg(test)]
mod tests;
