//! Network device (Virtio 1.3, 5.1): frames to a network and from it.
//!
//! | part | what |
//! |---|---|
//! | [`Net`], [`NetBuilder`] | the device |
//! | [`NetHandle`], [`NetCounters`] | its cable, limits and figures, while a driver uses it |
//! | [`NetBackend`] | what carries the frames; [`crate::net`] has several |
//!
//! Each pair of queues has a worker and a port of the backend's. Frames go between port and guest memory without a copy here. A frame
//! of which the driver leaves the checksums and the cutting to the other side is handed on as it is, where the backend takes that, and
//! so is one that comes.
//!
//! # Threat model
//! The driver is hostile: what its headers say is checked against the frame and what was agreed upon before a backend, which is a host
//! kernel as a rule, sees it. Headers are read once. So is the network: a frame that comes is checked likewise, dropped if it finds no
//! room, and never given in part. A frame costs no memory here, whatever its length, but for one of each pair of queues, which may wait
//! for buffers. The driver's tables of addresses are bounded.

mod config;
mod control;
mod handle;
mod receive;
mod room;
mod shared;
mod state;
mod transmit;
mod worker;

use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;

pub use config::feature;
pub use handle::NetHandle;
pub use shared::NetCounters;
pub use state::{NetFrameState, NetState};

use self::config::Config;
use self::control::ControlWorker;
use self::receive::Receive;
use self::shared::{Active, Events, Measured, Shared};
use self::transmit::Transmit;
use self::worker::PairWorker;
use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, VirtioDevice, Worker};
use super::metrics::Metrics;
use super::rate::RateLimiter;
use super::state::DeviceState;
use crate::clock::Clock;
use crate::error::StateError;
use crate::interrupt::lock;
use crate::net::{Agreed, MacAddr, NetBackend, NetError, Offloads, RxFilter};

/// Descriptors of a queue, unless said otherwise.
const QUEUE_SIZE: u16 = 256;
/// Those of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Pairs of queues at most (5.1.4.1).
const MOST_PAIRS: u16 = 0x8000;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetDeviceError {
    /// Its address, or its network, is none.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A queue of a size that queues cannot have.
    #[error("a queue of {size} descriptors; allowed are powers of two from 4 to 32768")]
    QueueSize {
        /// The size.
        size: u16,
    },
    /// A largest packet that none can have.
    #[error("an MTU of {mtu} bytes; allowed are 68 to 65535")]
    Mtu {
        /// Its bytes.
        mtu: u16,
    },
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    pairs: u16,
    mtu: Option<u16>,
    sizes: Vec<u16>,
    /// What is offered of the backend's offloads: of frames from the driver, and to it.
    offloads: [Offloads; 2],
    /// What the driver wants, which was saved elsewhere.
    resumed: Option<NetState>,
}

/// What a network device is to be like.
#[must_use]
pub struct NetBuilder {
    backend: Arc<dyn NetBackend>,
    mac: MacAddr,
    pairs: NonZeroU16,
    queue_size: u16,
    offloads: [Offloads; 2],
    receive_rate: Option<RateLimiter>,
    send_rate: Option<RateLimiter>,
    metrics: Option<Measured>,
}

impl fmt::Debug for NetBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetBuilder")
            .field("mac", &self.mac)
            .field("pairs", &self.pairs)
            .finish_non_exhaustive()
    }
}

impl NetBuilder {
    /// How many pairs of queues there are (VIRTIO_NET_F_MQ), one for each vCPU at best. Each has a worker of its own. 1 unless said here;
    /// the backend carries as many at least.
    pub fn pairs(mut self, pairs: NonZeroU16) -> Self {
        self.pairs = pairs;
        self
    }

    /// Descriptors of each queue at most: a power of two from 4 to 32768. 256 unless said here.
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// What the driver may leave to the backend, and the backend to the driver, of what they can: all, unless said here.
    pub fn offloads(mut self, transmit: Offloads, receive: Offloads) -> Self {
        self.offloads = [transmit, receive];
        self
    }

    /// Limits on bytes and frames that go to the driver, of all queues together.
    pub fn receive_rate(mut self, rate: RateLimiter) -> Self {
        self.receive_rate = Some(rate);
        self
    }

    /// Limits on those that come from it.
    pub fn send_rate(mut self, rate: RateLimiter) -> Self {
        self.send_rate = Some(rate);
        self
    }

    /// Tells `metrics` of each frame and command; latencies go by `clock`.
    pub fn metrics(mut self, metrics: Arc<dyn Metrics>, clock: impl Clock + 'static) -> Self {
        self.metrics = Some(Measured { sink: metrics, clock: Box::new(clock) });
        self
    }

    /// # Errors
    /// If the backend, or what was said here, is not what a device can be.
    pub fn build(self) -> Result<Net, NetDeviceError> {
        let mac = self.mac.unicast().map_err(NetError::from)?;
        let size = self.queue_size;
        if !size.is_power_of_two() || size < 4 {
            return Err(NetDeviceError::QueueSize { size });
        }
        let pairs = self.pairs.get();
        let most = self.backend.max_pairs().min(MOST_PAIRS);
        if pairs > most {
            return Err(NetError::Pairs { pairs, most }.into());
        }
        let mtu = self.backend.mtu();
        if let Some(mtu) = mtu.filter(|mtu| *mtu < 68) {
            return Err(NetDeviceError::Mtu { mtu });
        }
        let [transmit, receive] = self.offloads;
        let offloads =
            [transmit & self.backend.transmit_offloads(), receive & self.backend.receive_offloads()];
        let mut shared = Shared::new(self.backend, mac);
        shared.receive_rate = self.receive_rate;
        shared.send_rate = self.send_rate;
        shared.metrics = self.metrics;
        let shared = Arc::new(shared);
        shared.backend.listen(Arc::new(Events { shared: Arc::downgrade(&shared), doorbells: None }));
        let mut sizes = vec![size; 2 * usize::from(pairs)];
        sizes.push(CONTROL_SIZE);
        Ok(Net { shared, pairs, mtu, sizes, offloads, resumed: None })
    }
}

impl Net {
    /// A device on the network that `backend` leads to, with that address.
    pub fn builder(backend: Arc<dyn NetBackend>, mac: MacAddr) -> NetBuilder {
        NetBuilder {
            backend,
            mac,
            pairs: NonZeroU16::MIN,
            queue_size: QUEUE_SIZE,
            offloads: [Offloads::ALL; 2],
            receive_rate: None,
            send_rate: None,
            metrics: None,
        }
    }

    /// Reaches the device after a transport has taken it.
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }

    fn offered(&self) -> u64 {
        let [transmit, receive] = self.offloads;
        let mut features = config::ALWAYS | config::offered(transmit, receive);
        if self.pairs > 1 {
            features |= feature::MQ;
        }
        if self.mtu.is_some() {
            features |= feature::MTU;
        }
        features
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NETWORK
    }

    fn features(&self) -> u64 {
        self.offered()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn accepts(&self, features: u64) -> bool {
        config::consistent(features)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            // That of the driver's command, where it has given one (5.1.6.5.2).
            mac: self.shared.mac(),
            status: self.shared.status(),
            pairs: self.pairs,
            mtu: self.mtu.unwrap_or(0),
            speed: self.shared.link().speed,
        };
        let bytes = config.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(place, byte)| *place = *byte);
    }

    fn config_generation(&self) -> u32 {
        self.shared.generation()
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let features = activation.features;
        let resumed = self.resumed.take();
        let has = |bit: u64| features & bit != 0;
        let pairs = if has(feature::MQ) { self.pairs } else { 1 };
        let mtu = self.mtu.filter(|_| has(feature::MTU));
        let (transmit, receive) = (config::transmit(features), config::receive(features));
        let agreed = Agreed { pairs, transmit, receive };
        let doorbells = Arc::clone(&activation.doorbells);
        let events = Events { shared: Arc::downgrade(&self.shared), doorbells: Some(Arc::clone(&doorbells)) };
        let ports = self.shared.backend.attach(&agreed, Arc::new(events)).map_err(std::io::Error::other)?;
        if ports.len() != usize::from(pairs) {
            let why = format!("the network has {} ports for {pairs} pairs of queues", ports.len());
            return Err(std::io::Error::other(why).into());
        }
        self.shared.use_pairs(1);
        lock(&self.shared.waiting).clear();
        let mut filter = RxFilter::everything(self.shared.mac);
        if has(feature::CTRL_VLAN) {
            // None, until the driver says which (5.1.6.5.3).
            filter.vlans = Some(Box::new([0; 64]));
        }
        self.shared.wish(|wishes| (wishes.filter, wishes.offloads) = (Arc::new(filter), receive));
        if let Some(state) = resumed {
            self.go_on(state, features).map_err(std::io::Error::other)?;
        }
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        // The first pair is always there; of others, those that the driver has set up.
        for (pair, port) in (0..).zip(ports) {
            let both = (activation.take_queue(2 * pair), activation.take_queue(2 * pair + 1));
            let (rx, tx) = match both {
                (Ok(rx), Ok(tx)) => (rx, tx),
                (Err(error), _) | (_, Err(error)) if pair == 0 => return Err(error),
                _ => continue,
            };
            let shared = || Arc::clone(&self.shared);
            workers.push(Box::new(PairWorker {
                receive: Receive::new(rx, shared(), has(feature::MRG_RXBUF), receive, mtu),
                transmit: Transmit::new(tx, shared(), transmit),
                port,
            }));
        }
        if has(feature::CTRL_VQ) {
            // Behind all queues that there may be (5.1.2).
            let queue = activation.take_queue(2 * pairs)?;
            let shared = Arc::clone(&self.shared);
            workers.push(Box::new(ControlWorker::new(queue, shared, features, pairs)));
        }
        for rate in [&self.shared.receive_rate, &self.shared.send_rate].into_iter().flatten() {
            rate.register(&doorbells);
        }
        let announces = has(feature::GUEST_ANNOUNCE) && has(feature::STATUS);
        *lock(&self.shared.active) = Some(Active { link: activation.link, doorbells, announces });
        Ok(workers)
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        *lock(&self.shared.active) = None;
        drop(workers);
        self.resumed = None;
        self.shared.reset();
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Net(self.saved()))
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        self.take_over(state, features)
    }
}

#[cfg(test)]
mod tests;
