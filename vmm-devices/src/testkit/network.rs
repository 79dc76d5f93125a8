//! A network that a test has in hand.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::VolatileSlice;

use crate::interrupt::lock;
use crate::net::{
    Agreed, Link, NetBackend, NetError, NetEvents, NetPort, Offloads, PacketInfo, Received, RxFilter, Sent,
};

/// A frame, with what it leaves to the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestFrame {
    /// The pair of queues that it came by, or is to go to.
    pub pair: u16,
    /// What is left to do.
    pub info: PacketInfo,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl TestFrame {
    /// One for the first pair, of which nothing is left to do.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self { pair: 0, info: PacketInfo::default(), bytes: bytes.into() }
    }

    /// The same, with `info`.
    #[must_use]
    pub fn with_info(self, info: PacketInfo) -> Self {
        Self { info, ..self }
    }
}

/// A network that remembers what was sent, gives what it is told to give, and fails when it is to. Clones are the same.
#[derive(Clone, Default)]
pub struct TestNetwork(Arc<State>);

#[derive(Default)]
struct State {
    pairs: u16,
    offloads: [Offloads; 2],
    mtu: Option<u16>,
    now: Mutex<Now>,
}

struct Now {
    link: Link,
    full: bool,
    fails: bool,
    sent: Vec<TestFrame>,
    coming: VecDeque<TestFrame>,
    flushes: usize,
    looks: usize,
    /// Of the driver that is there.
    agreed: Option<Agreed>,
    pairs: u16,
    filter: Option<RxFilter>,
    events: Option<Arc<dyn NetEvents>>,
    listener: Option<Arc<dyn NetEvents>>,
}

impl Default for Now {
    fn default() -> Self {
        Self {
            link: Link::UP,
            full: false,
            fails: false,
            sent: Vec::new(),
            coming: VecDeque::new(),
            flushes: 0,
            looks: 0,
            agreed: None,
            pairs: 0,
            filter: None,
            events: None,
            listener: None,
        }
    }
}

impl fmt::Debug for TestNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestNetwork").field("pairs", &self.0.pairs).finish_non_exhaustive()
    }
}

impl TestNetwork {
    /// For so many pairs of queues, with what frames from the driver may leave to it, and it to the driver.
    pub fn new(pairs: u16, transmit: Offloads, receive: Offloads) -> Self {
        let state = State { pairs, offloads: [transmit, receive], mtu: None, now: Mutex::default() };
        Self(Arc::new(state))
    }

    /// One of packets of `mtu` bytes at most.
    pub fn with_mtu(mtu: u16) -> Self {
        Self::new(1, Offloads::NONE, Offloads::NONE).of_mtu(mtu)
    }

    /// The same, of packets of `mtu` bytes at most: a network of its own.
    #[must_use]
    pub fn of_mtu(self, mtu: u16) -> Self {
        let State { pairs, offloads, .. } = &*self.0;
        Self(Arc::new(State { pairs: *pairs, offloads: *offloads, mtu: Some(mtu), now: Mutex::default() }))
    }

    /// Gives the device a frame, now or when it can take it.
    pub fn give(&self, frame: TestFrame) {
        let pair = frame.pair;
        let mut now = lock(&self.0.now);
        now.coming.push_back(frame);
        let events = now.events.clone();
        drop(now);
        if let Some(events) = events {
            events.ready(pair);
        }
    }

    /// What the device has not taken.
    pub fn coming(&self) -> usize {
        lock(&self.0.now).coming.len()
    }

    /// What was sent since the last call.
    pub fn take_sent(&self) -> Vec<TestFrame> {
        std::mem::take(&mut lock(&self.0.now).sent)
    }

    /// How often the device has said that no more frames are sent for now, since the last call.
    pub fn take_flushes(&self) -> usize {
        std::mem::take(&mut lock(&self.0.now).flushes)
    }

    /// How often it has asked for a frame, since the last call.
    pub fn take_looks(&self) -> usize {
        std::mem::take(&mut lock(&self.0.now).looks)
    }

    /// From now on there is no room, or there is again.
    pub fn set_full(&self, full: bool) {
        let mut now = lock(&self.0.now);
        now.full = full;
        let events = now.events.clone().filter(|_| !full);
        drop(now);
        if let Some(events) = events {
            (0..self.0.pairs).for_each(|pair| events.ready(pair));
        }
    }

    /// From now on frames are lost, with an error, or no more.
    pub fn set_failing(&self, fails: bool) {
        lock(&self.0.now).fails = fails;
    }

    /// Changes the link.
    pub fn set_link(&self, link: Link) {
        let mut now = lock(&self.0.now);
        now.link = link;
        let listener = now.listener.clone();
        drop(now);
        if let Some(listener) = listener {
            listener.link_changed();
        }
    }

    /// What was agreed upon with the driver that was last there, with what it has changed since.
    pub fn agreed(&self) -> Option<Agreed> {
        lock(&self.0.now).agreed
    }

    /// How many pairs it has taken into use.
    pub fn pairs(&self) -> u16 {
        lock(&self.0.now).pairs
    }

    /// What it wants.
    pub fn filter(&self) -> Option<RxFilter> {
        lock(&self.0.now).filter.clone()
    }
}

impl NetBackend for TestNetwork {
    fn max_pairs(&self) -> u16 {
        self.0.pairs
    }

    fn transmit_offloads(&self) -> Offloads {
        let [transmit, _] = self.0.offloads;
        transmit
    }

    fn receive_offloads(&self) -> Offloads {
        let [_, receive] = self.0.offloads;
        receive
    }

    fn mtu(&self) -> Option<u16> {
        self.0.mtu
    }

    fn link(&self) -> Link {
        lock(&self.0.now).link
    }

    fn listen(&self, events: Arc<dyn NetEvents>) {
        lock(&self.0.now).listener = Some(events);
    }

    fn attach(&self, agreed: &Agreed, events: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError> {
        let mut now = lock(&self.0.now);
        if now.fails {
            return Err(io::Error::other("it fails").into());
        }
        (now.agreed, now.events, now.pairs) = (Some(*agreed), Some(events), 1);
        now.coming.clear();
        let port = |pair| -> Box<dyn NetPort> { Box::new(TestPort { network: self.clone(), pair }) };
        Ok((0..agreed.pairs).map(port).collect())
    }

    fn set_pairs(&self, pairs: u16) -> Result<(), NetError> {
        let mut now = lock(&self.0.now);
        if now.fails {
            return Err(io::Error::other("it fails").into());
        }
        now.pairs = pairs;
        Ok(())
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        if let Some(agreed) = &mut lock(&self.0.now).agreed {
            agreed.receive = offloads;
        }
        Ok(())
    }

    fn set_filter(&self, filter: &RxFilter) {
        lock(&self.0.now).filter = Some(filter.clone());
    }
}

#[derive(Debug)]
struct TestPort {
    network: TestNetwork,
    pair: u16,
}

impl NetPort for TestPort {
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError> {
        let mut now = lock(&self.network.0.now);
        if now.fails {
            return Err(io::Error::other("it fails").into());
        }
        if now.full {
            return Ok(Sent::Full);
        }
        let mut bytes = Vec::new();
        for slice in frame {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            slice.copy_to(bytes.get_mut(start..).unwrap_or_default());
        }
        now.sent.push(TestFrame { pair: self.pair, info: *info, bytes });
        Ok(Sent::Done)
    }

    fn flush(&mut self) {
        lock(&self.network.0.now).flushes += 1;
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError> {
        let mut now = lock(&self.network.0.now);
        now.looks += 1;
        if now.fails {
            return Err(io::Error::other("it fails").into());
        }
        let Some(at) = now.coming.iter().position(|frame| frame.pair == self.pair) else { return Ok(None) };
        let Some(TestFrame { info, bytes, .. }) = now.coming.remove(at) else { return Ok(None) };
        drop(now);
        let mut left = &*bytes;
        for slice in buffers {
            let (part, rest) = left.split_at(left.len().min(slice.len()));
            slice.copy_from(part);
            left = rest;
        }
        // A test may have it say of a frame what is not so.
        if left.is_empty() {
            Ok(Some(Received { info, len: bytes.len() }))
        } else {
            Err(NetError::Frame { len: bytes.len() })
        }
    }
}
