//! The way of a frame from a port: what is looked at, in which order, and to whom it goes.
//!
//! | step | what is dropped |
//! |---|---|
//! | the head is read, and the tag taken off | what is no frame |
//! | source and VLAN | what comes from a group, from an address that is not the port's, or is of no VLAN of the port's |
//! | limits | what is too much |
//! | the source is learned, the destination looked up | what stays where it is |
//! | for each receiver: isolation, judge, tag, offloads, room | what is not to go there, or cannot |
//!
//! The sender's port is locked meanwhile, so that a port that has been detached has sent its last frame. Of receivers one queue at a
//! time is locked, for one frame. No lock is held while devices are woken.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::VolatileSlice;

use super::config::PortConfig;
use super::head::{Head, with_tag, without_tag};
use super::judge::{Flow, Headers, Verdict};
use super::metrics::DropReason;
use super::port::{Parcel, Port};
use super::table::{Key, Learned};
use super::vlan::{self, Leaves, VlanId};
use super::{Inner, Topology};
use crate::interrupt::lock;
use crate::net::{ETHERNET_HEADER, MAX_FRAME, MacAddr, NetError, PacketInfo};
use crate::virtio::rate::TokenBucket;

/// How long a decision holds without a look at the table, in which ages are then that much behind.
const HOLDS_NS: u64 = 100_000_000;

/// What a port remembers of what it sends.
pub(super) struct Ingress {
    head: Head,
    bytes: Option<TokenBucket>,
    frames: Option<TokenBucket>,
    flood: Option<TokenBucket>,
    topology: Arc<Topology>,
    last: Option<Decision>,
    /// Ports that have got frames and sleep.
    wakes: Vec<(Arc<Port>, u16)>,
    scratch: Vec<u8>,
}

/// Where the last frame went, for the next one between the same two.
struct Decision {
    from: Key,
    to: Key,
    port: Arc<Port>,
    /// Of the table.
    generation: u64,
    until_ns: u64,
}

/// To whom a frame goes.
enum Target {
    One(Arc<Port>),
    All,
}

impl Ingress {
    pub(super) fn new(config: &PortConfig, topology: Arc<Topology>, now_ns: u64) -> Self {
        let bucket = |rate| TokenBucket::new(rate, now_ns);
        Self {
            head: Head::new(),
            bytes: config.limits.bytes.map(bucket),
            frames: config.limits.operations.map(bucket),
            flood: config.flood.map(bucket),
            topology,
            last: None,
            wakes: Vec::with_capacity(8),
            scratch: Vec::new(),
        }
    }

    /// Forgets the other ports.
    pub(super) fn end(&mut self) {
        self.topology = Arc::default();
        self.last = None;
        self.scratch = Vec::new();
    }

    pub(super) fn wakes(&mut self) -> &mut Vec<(Arc<Port>, u16)> {
        &mut self.wakes
    }
}

/// Whether there is enough in the bucket; if not, nothing is taken out.
fn affords(bucket: &mut Option<TokenBucket>, now_ns: u64, cost: u64) -> bool {
    let Some(bucket) = bucket else { return true };
    if bucket.take(now_ns, cost).is_some() {
        bucket.put_back(cost);
        return false;
    }
    true
}

/// Addresses that no bridge passes on (IEEE 802.1Q, table 8-1).
fn is_reserved(mac: MacAddr) -> bool {
    let [a, b, c, d, e, f] = mac.0;
    [a, b, c, d, e] == [0x01, 0x80, 0xc2, 0, 0] && f < 16
}

/// A number that is the same for all frames of a flow.
fn flow_hash(head: &Head, key: Key) -> u64 {
    let payload = head.payload();
    let addresses = match (head.ether_type(), payload.first()) {
        (0x0800, Some(0x45)) => payload.get(12..24),
        (0x86dd, _) => payload.get(8..44),
        _ => None,
    };
    let mut hash = key.mix(0);
    for word in addresses.unwrap_or_default().as_chunks::<4>().0 {
        hash =
            (hash.rotate_left(5) ^ u64::from(u32::from_ne_bytes(*word))).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    hash >> 32
}

impl Inner {
    /// Sends a frame of the port's. Devices that sleep are to be told by [`super::port::flush`].
    pub(super) fn forward(
        &self,
        from: &Arc<Port>,
        info: &PacketInfo,
        frame: &[VolatileSlice<'_>],
    ) -> Result<(), NetError> {
        let mut ingress = lock(&from.ingress);
        if !from.is_live() {
            return Err(NetError::Revoked);
        }
        let len: usize = frame.iter().map(VolatileSlice::len).sum();
        from.counters.sent(len);
        if let Err(reason) = self.forward_in(&mut ingress, from, info, frame, len) {
            from.counters.dropped(reason);
        }
        Ok(())
    }

    fn forward_in(
        &self,
        ingress: &mut Ingress,
        from: &Arc<Port>,
        info: &PacketInfo,
        frame: &[VolatileSlice<'_>],
        len: usize,
    ) -> Result<(), DropReason> {
        if !(ETHERNET_HEADER..=MAX_FRAME).contains(&len) {
            return Err(DropReason::Malformed);
        }
        if !from.is_up() {
            return Err(DropReason::NoDriver);
        }
        ingress.head.read(frame).ok_or(DropReason::Malformed)?;
        let (mut info, mut bytes) = (*info, len);
        if ingress.head.tag().is_some() {
            info = without_tag(info).ok_or(DropReason::Malformed)?;
            bytes -= super::head::TAG;
        }
        let (source, destination) = (ingress.head.source(), ingress.head.destination());
        if source.unicast().is_err() {
            return Err(DropReason::Source);
        }
        if from.config.mac.is_some_and(|own| own != source) {
            return Err(DropReason::Spoofed);
        }
        let vlan = from.config.vlans.enters(ingress.head.tag()).ok_or(DropReason::Vlan)?;
        if is_reserved(destination) {
            return Err(DropReason::Reserved);
        }
        let now_ns = self.clock.now_ns();
        if !affords(&mut ingress.frames, now_ns, 1) {
            return Err(DropReason::RateLimit);
        }
        if !affords(&mut ingress.bytes, now_ns, bytes as u64) {
            if let Some(frames) = &mut ingress.frames {
                frames.put_back(1);
            }
            return Err(DropReason::RateLimit);
        }
        if ingress.topology.epoch != self.epoch.load(Ordering::Acquire) {
            ingress.topology = self.topology();
            ingress.last = None;
        }
        let (source, to) = (Key::new(vlan, source), Key::new(vlan, destination));
        let target = self.target(ingress, from, source, to, destination.is_multicast(), now_ns)?;
        let mut sending = Sending { info, bytes, vlan, now_ns, headers: None, hash: None };
        match target {
            Target::One(port) if Arc::ptr_eq(&port, from) => Err(DropReason::Local),
            Target::One(port) => {
                if !port.config.isolation.meets(from.config.isolation) {
                    return Err(DropReason::Isolated);
                }
                let leaves = port.config.vlans.leaves(vlan, ingress.head.has_inner_tag());
                let leaves = leaves.ok_or(DropReason::Vlan)?;
                if !sending.passes(ingress, from, &port, false) {
                    return Err(DropReason::Judged);
                }
                sending.send(ingress, frame, &port, leaves, to);
                Ok(())
            }
            Target::All => {
                if !affords(&mut ingress.flood, now_ns, 1) {
                    return Err(DropReason::Storm);
                }
                from.counters.flooded.fetch_add(1, Ordering::Relaxed);
                let topology = Arc::clone(&ingress.topology);
                let mut judged = false;
                for port in topology.ports.iter().filter(|port| !Arc::ptr_eq(port, from)) {
                    let leaves = port.config.vlans.leaves(vlan, ingress.head.has_inner_tag());
                    let Some(leaves) = leaves.filter(|_| port.config.isolation.meets(from.config.isolation))
                    else {
                        continue;
                    };
                    if sending.passes(ingress, from, port, true) {
                        sending.send(ingress, frame, port, leaves, to);
                    } else {
                        judged = true;
                    }
                }
                if judged { Err(DropReason::Judged) } else { Ok(()) }
            }
        }
    }

    /// Learns the source, and finds the destination.
    fn target(
        &self,
        ingress: &mut Ingress,
        from: &Arc<Port>,
        source: Key,
        to: Key,
        is_multicast: bool,
        now_ns: u64,
    ) -> Result<Target, DropReason> {
        let generation = self.generation.load(Ordering::Acquire);
        if let Some(last) = &ingress.last
            && (last.from, last.to, last.generation) == (source, to, generation)
            && now_ns < last.until_ns
        {
            return Ok(Target::One(Arc::clone(&last.port)));
        }
        let mut table = lock(&self.table);
        match table.learn(source, from.flow.id, from.config.learned, now_ns) {
            Learned::Known => {}
            Learned::Taken => return Err(DropReason::Spoofed),
            change => {
                if let Learned::Moved = change {
                    from.counters.moved_here.fetch_add(1, Ordering::Relaxed);
                } else if let Learned::Full = change {
                    from.counters.not_learned.fetch_add(1, Ordering::Relaxed);
                }
                self.generation.fetch_add(1, Ordering::AcqRel);
            }
        }
        if is_multicast {
            return Ok(Target::All);
        }
        let Some(port) = table.find(to, now_ns) else { return Ok(Target::All) };
        let generation = self.generation.load(Ordering::Acquire);
        drop(table);
        // One that is newer than what this port knows of is known with the next frame.
        let Some(port) = ingress.topology.find(port) else { return Ok(Target::All) };
        let until_ns = now_ns.saturating_add(HOLDS_NS);
        ingress.last = Some(Decision { from: source, to, port: Arc::clone(&port), generation, until_ns });
        Ok(Target::One(port))
    }
}

/// A frame that goes to one or many.
struct Sending {
    info: PacketInfo,
    /// Its bytes, without a tag.
    bytes: usize,
    vlan: VlanId,
    now_ns: u64,
    /// For the judge, once for all receivers.
    headers: Option<Headers>,
    hash: Option<u64>,
}

impl Sending {
    fn passes(&mut self, ingress: &Ingress, from: &Port, to: &Port, flooded: bool) -> bool {
        let Some(judge) = &ingress.topology.judge else { return true };
        let headers = self.headers.get_or_insert_with(|| Headers::parse(&ingress.head));
        let (vlan, len, now_ns) = (self.vlan, self.bytes, self.now_ns);
        let flow = Flow { from: &from.flow, to: &to.flow, vlan, len, flooded, now_ns, headers };
        judge.judge(&flow) == Verdict::Pass
    }

    fn send(
        &mut self,
        ingress: &mut Ingress,
        frame: &[VolatileSlice<'_>],
        to: &Arc<Port>,
        leaves: Leaves,
        key: Key,
    ) {
        let Ingress { head, scratch, wakes, .. } = ingress;
        let hash = &mut self.hash;
        let pair = to.lane(|| *hash.get_or_insert_with(|| flow_hash(head, key)));
        let skip = head.read_bytes();
        let (info, len, head) = match leaves {
            Leaves::Untagged => (Some(self.info), self.bytes, head.untagged()),
            Leaves::Tagged => {
                let tag = vlan::tag(self.vlan, head.tag());
                (with_tag(self.info), self.bytes + super::head::TAG, head.tagged(tag))
            }
        };
        // A tag may make it longer than frames are.
        let Some(info) = info.filter(|_| len <= MAX_FRAME) else {
            to.counters.dropped(DropReason::Offload);
            return;
        };
        match to.deliver(pair, &mut Parcel { info, len, head, rest: frame, skip, scratch }) {
            Ok(false) => {}
            Ok(true) => {
                if !wakes.iter().any(|(port, other)| *other == pair && Arc::ptr_eq(port, to)) {
                    wakes.push((Arc::clone(to), pair));
                }
            }
            Err(reason) => to.counters.dropped(reason),
        }
    }
}
