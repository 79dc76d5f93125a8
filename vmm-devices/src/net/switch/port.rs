//! A port: the queues to its device, and what it has in common with the switch and with the device.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use smallvec::SmallVec;
use vmm_memory::vm_memory::VolatileSlice;

use super::Inner;
use super::config::PortConfig;
use super::forward::Ingress;
use super::judge::FlowPort;
use super::metrics::{DropReason, PortCounters};
use super::offload;
use super::ring::{Consumer, Producer};
use crate::channel::{Grant, NetworkAttach};
use crate::interrupt::lock;
use crate::net::{
    Agreed, Link, NetBackend, NetError, NetEvents, NetPort, Offloads, PacketInfo, Received, Sent,
};

/// A queue to the device.
pub(super) struct Lane {
    entry: Mutex<Entry>,
    /// `None` where another process has it, and when the port is gone.
    exit: Mutex<Option<Consumer>>,
}

/// Where frames go in.
struct Entry {
    /// `None` when the port is gone.
    producer: Option<Producer>,
    /// There is a driver that takes frames.
    has_driver: bool,
    /// What may be left to it.
    accepts: Offloads,
}

impl Lane {
    pub(super) fn new(producer: Producer, consumer: Option<Consumer>) -> Self {
        let entry = Entry { producer: Some(producer), has_driver: false, accepts: Offloads::NONE };
        Self { entry: Mutex::new(entry), exit: Mutex::new(consumer) }
    }
}

/// A frame on its way to ports, as one of them is to have it.
pub(super) struct Parcel<'a, 'b> {
    pub(super) info: PacketInfo,
    /// Bytes of it.
    pub(super) len: usize,
    pub(super) head: &'a mut [u8],
    /// What comes behind the head.
    pub(super) rest: &'a [VolatileSlice<'b>],
    /// Bytes of `rest` that are in the head.
    pub(super) skip: usize,
    /// Where it is put together if it has to be cut.
    pub(super) scratch: &'a mut Vec<u8>,
}

impl Parcel<'_, '_> {
    /// All of it in one piece, read once more.
    fn together(&mut self) -> &mut [u8] {
        // Allocated for the longest frame, by the first one that needs it.
        self.scratch.resize(self.len, 0);
        let (head, tail) = self.scratch.split_at_mut(self.head.len().min(self.len));
        head.copy_from_slice(self.head.get(..head.len()).unwrap_or_default());
        let len = tail.len();
        super::ring::copy(super::ring::part(self.rest, self.skip, len), &[VolatileSlice::from(tail)]);
        self.scratch
    }
}

pub(super) struct Port {
    pub(super) flow: FlowPort,
    pub(super) config: PortConfig,
    pub(super) counters: PortCounters,
    live: AtomicBool,
    /// What the monitor says.
    plugged: AtomicBool,
    lanes: Box<[Lane]>,
    /// Pairs that the driver uses.
    active: AtomicU16,
    pub(super) ingress: Mutex<Ingress>,
    /// Hears that frames came.
    events: Mutex<Option<Arc<dyn NetEvents>>>,
    /// Hears of the link.
    listener: OnceLock<Arc<dyn NetEvents>>,
    grant: Mutex<Option<Grant<NetworkAttach>>>,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("flow", &self.flow)
            .field("live", &self.is_live())
            .finish_non_exhaustive()
    }
}

impl Port {
    pub(super) fn new(
        flow: FlowPort,
        config: PortConfig,
        lanes: Box<[Lane]>,
        ingress: Ingress,
        grant: Grant<NetworkAttach>,
    ) -> Self {
        Self {
            flow,
            config,
            counters: PortCounters::default(),
            live: AtomicBool::new(true),
            plugged: AtomicBool::new(true),
            lanes,
            active: AtomicU16::new(1),
            ingress: Mutex::new(ingress),
            events: Mutex::new(None),
            listener: OnceLock::new(),
            grant: Mutex::new(Some(grant)),
        }
    }

    pub(super) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    pub(super) fn is_up(&self) -> bool {
        self.is_live() && self.plugged.load(Ordering::Acquire)
    }

    pub(super) fn plug(&self, plugged: bool) {
        if self.plugged.swap(plugged, Ordering::AcqRel) != plugged {
            self.tell_link();
        }
    }

    fn tell_link(&self) {
        if let Some(listener) = self.listener.get() {
            listener.link_changed();
        }
    }

    /// Which of the queues has the flow with that hash.
    pub(super) fn lane(&self, hash: impl FnOnce() -> u64) -> u16 {
        match self.active.load(Ordering::Relaxed) {
            0 | 1 => 0,
            active => u16::try_from(hash() % u64::from(active)).unwrap_or(0),
        }
    }

    /// Puts a frame into a queue; whether its consumer sleeps, and is now the caller's to wake.
    pub(super) fn deliver(&self, pair: u16, parcel: &mut Parcel<'_, '_>) -> Result<bool, DropReason> {
        let lane = self.lanes.get(usize::from(pair)).ok_or(DropReason::NoDriver)?;
        let mut entry = lock(&lane.entry);
        let Entry { producer: Some(producer), has_driver: true, accepts } = &mut *entry else {
            return Err(DropReason::NoDriver);
        };
        if !self.is_up() {
            return Err(DropReason::NoDriver);
        }
        // A ring whose other side has broken the rules takes nothing; who owns the port sees it there.
        let pushed = if accepts.contains(parcel.info.wants()) {
            let head = VolatileSlice::from(&mut *parcel.head);
            let tail = super::ring::part(parcel.rest, parcel.skip, parcel.len - head.len());
            let info = parcel.info.to_bytes(0);
            let pushed = producer.push(&info, parcel.len, std::iter::once(head).chain(tail));
            let pushed = pushed.map_err(|_| DropReason::NoDriver)?;
            if pushed {
                self.counters.delivered(parcel.len);
            }
            pushed
        } else {
            self.deliver_finished(producer, parcel)?
        };
        let wakes = producer.wakes().map_err(|_| DropReason::NoDriver)?;
        if pushed || wakes { Ok(wakes) } else { Err(DropReason::QueueFull) }
    }

    /// The same after doing what the driver cannot. Whether some of it found room.
    fn deliver_finished(
        &self,
        producer: &mut Producer,
        parcel: &mut Parcel<'_, '_>,
    ) -> Result<bool, DropReason> {
        let info = parcel.info;
        let plain = PacketInfo::default().to_bytes(0);
        let mut some = false;
        let finished = offload::finish(parcel.together(), &info, |headers, payload| {
            let len = headers.len() + payload.len();
            let pieces = [VolatileSlice::from(headers), VolatileSlice::from(payload)];
            match producer.push(&plain, len, pieces) {
                Ok(true) => {
                    self.counters.delivered(len);
                    some = true;
                }
                Ok(false) | Err(_) => self.counters.dropped(DropReason::QueueFull),
            }
        });
        finished.map_err(|_| DropReason::Offload)?;
        self.counters.segmented.fetch_add(1, Ordering::Relaxed);
        // Those that found no room have been counted.
        Ok(some || info.gso.is_some())
    }

    /// Tells the device that frames came for that pair.
    pub(super) fn wake(&self, pair: u16) {
        let events = lock(&self.events).clone();
        if let Some(events) = events {
            events.ready(pair);
        }
    }

    /// A driver takes frames from now on, and leaves so much to it.
    pub(super) fn open(&self, accepts: Offloads, events: Arc<dyn NetEvents>) {
        *lock(&self.events) = Some(events);
        for lane in &self.lanes {
            if let Some(consumer) = &mut *lock(&lane.exit) {
                // Memory of this process: nobody else has written there.
                let (Ok(_) | Err(_)) = consumer.clear().and_then(|()| consumer.sleep());
            }
            let mut entry = lock(&lane.entry);
            (entry.has_driver, entry.accepts) = (true, accepts);
        }
    }

    /// There is none any more.
    pub(super) fn close(&self) {
        for lane in &self.lanes {
            lock(&lane.entry).has_driver = false;
        }
        *lock(&self.events) = None;
        self.active.store(1, Ordering::Relaxed);
    }

    pub(super) fn set_accepts(&self, accepts: Offloads) {
        self.lanes.iter().for_each(|lane| lock(&lane.entry).accepts = accepts);
    }

    /// What the switch does last with a port: when it returns, nothing comes in and nothing goes out. Whether it was there until now.
    pub(super) fn end(&self) -> bool {
        self.live.swap(false, Ordering::AcqRel)
    }

    /// The queues are gone, with what is in them.
    pub(super) fn drain(&self) {
        for lane in &self.lanes {
            lock(&lane.entry).producer = None;
            *lock(&lane.exit) = None;
        }
        let grant = lock(&self.grant).take();
        drop(grant);
        self.tell_link();
    }

    fn receive(
        &self,
        pair: u16,
        agreed: Offloads,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<Option<Received>, NetError> {
        let Some(lane) = self.lanes.get(usize::from(pair)) else { return Ok(None) };
        let mut exit = lock(&lane.exit);
        let Some(consumer) = &mut *exit else { return Ok(None) };
        loop {
            let Some(front) = consumer.front().map_err(broken)? else {
                if consumer.sleep().map_err(broken)? {
                    return Ok(None);
                }
                continue;
            };
            let room: usize = buffers.iter().map(VolatileSlice::len).sum();
            // The driver may have changed its mind since it was put in.
            let info = PacketInfo::from_bytes(&front.info);
            let fits = front.len <= room;
            if let Ok(info) = info
                && fits
                && agreed.contains(info.wants())
            {
                super::ring::copy(consumer.frame(&front).map_err(broken)?, buffers);
                consumer.pop(&front).map_err(broken)?;
                return Ok(Some(Received { info, len: front.len }));
            }
            self.counters.dropped(if fits { DropReason::Offload } else { DropReason::Malformed });
            consumer.pop(&front).map_err(broken)?;
        }
    }
}

pub(super) fn broken(error: super::ring::RingError) -> NetError {
    NetError::Host(std::io::Error::new(std::io::ErrorKind::InvalidData, error))
}

/// A port for a device of this process. The port is there as long as this is, or until its grant is revoked.
#[derive(Debug)]
pub struct SwitchPort {
    pub(super) switch: Arc<Inner>,
    pub(super) port: Arc<Port>,
}

impl SwitchPort {
    /// Which port it is.
    pub fn id(&self) -> super::PortId {
        self.port.flow.id
    }

    /// What was counted.
    pub fn metrics(&self) -> super::PortSnapshot {
        self.port.counters.snapshot()
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        self.switch.detach(&self.port);
    }
}

impl NetBackend for SwitchPort {
    fn max_pairs(&self) -> u16 {
        self.port.config.queues
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn mtu(&self) -> Option<u16> {
        self.switch.mtu
    }

    fn link(&self) -> Link {
        Link { up: self.port.is_up(), speed: None }
    }

    fn listen(&self, events: Arc<dyn NetEvents>) {
        // One device has it.
        drop(self.port.listener.set(events));
    }

    fn attach(&self, agreed: &Agreed, events: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError> {
        let most = self.port.config.queues;
        if agreed.pairs > most {
            return Err(NetError::Pairs { pairs: agreed.pairs, most });
        }
        self.port.open(agreed.receive, events);
        let opened = Arc::new(Opened(Arc::clone(&self.port)));
        let lane = |pair| -> Box<dyn NetPort> {
            Box::new(LanePort {
                switch: Arc::clone(&self.switch),
                opened: Arc::clone(&opened),
                pair,
                receives: agreed.receive,
            })
        };
        Ok((0..agreed.pairs).map(lane).collect())
    }

    fn set_pairs(&self, pairs: u16) -> Result<(), NetError> {
        let most = self.port.config.queues;
        if pairs == 0 || pairs > most {
            return Err(NetError::Pairs { pairs, most });
        }
        self.port.active.store(pairs, Ordering::Relaxed);
        Ok(())
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        self.port.set_accepts(offloads);
        Ok(())
    }
}

/// A driver has the port, until the last of its pairs is gone.
#[derive(Debug)]
struct Opened(Arc<Port>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A pair of queues of a port.
#[derive(Debug)]
struct LanePort {
    switch: Arc<Inner>,
    opened: Arc<Opened>,
    pair: u16,
    /// What was agreed upon in the beginning.
    receives: Offloads,
}

impl NetPort for LanePort {
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError> {
        self.switch.forward(&self.opened.0, info, frame)?;
        Ok(Sent::Done)
    }

    fn flush(&mut self) {
        flush(&self.opened.0);
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError> {
        self.opened.0.receive(self.pair, self.receives, buffers)
    }
}

impl Drop for LanePort {
    fn drop(&mut self) {
        // Whoever was not told yet.
        self.flush();
    }
}

/// Tells the devices that have got frames from this port, with no lock held.
pub(super) fn flush(port: &Port) {
    let woken: SmallVec<[(Arc<Port>, u16); 8]> = lock(&port.ingress).wakes().drain(..).collect();
    woken.iter().for_each(|(port, pair)| port.wake(*pair));
}
