//! What a network device is beside its queues (see [`crate::virtio::VirtioState`]).

use std::sync::atomic::Ordering;

use super::Net;
use super::config::{self, GUEST_OFFLOADS, feature};
use super::receive::longest;
use super::shared::read;
use crate::error::StateError;
use crate::interrupt::lock;
use crate::net::{
    ETHERNET_HEADER, HEADER, MAX_MAC_ENTRIES, MacAddr, MacTable, NetError, Offloads, PacketInfo, RxFilter,
};
use crate::virtio::state::DeviceState;

const DEVICE: &str = "network device";

/// What a driver wants of its frames (5.1.6.5).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetState {
    /// The address that the device has if the driver says nothing else.
    pub mac: MacAddr,
    /// The largest packet that the driver was promised, if it was (VIRTIO_NET_F_MTU).
    pub mtu: Option<u16>,
    /// Which frames it wants, and under which address.
    pub filter: RxFilter,
    /// What it takes over, as in VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET (5.1.6.5.6.1).
    pub offloads: u64,
    /// Pairs of queues that it uses.
    pub pairs: u16,
    /// It was asked to announce itself, and has not.
    pub announce: bool,
    /// Frames that have come, and wait for its buffers or for a rate: one of each pair of queues at most.
    pub waiting: Vec<NetFrameState>,
}

/// A frame that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetFrameState {
    /// The pair of queues that it came by.
    pub pair: u16,
    /// What it leaves to the driver: a header (5.1.6), whose number of buffers says nothing yet.
    pub header: [u8; HEADER],
    /// Its bytes, from the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl NetFrameState {
    pub(super) fn new(pair: u16, info: PacketInfo, bytes: Vec<u8>) -> Self {
        Self { pair, header: info.to_bytes(0), bytes }
    }

    /// What it leaves to its driver; `None` if that is nothing a frame has.
    pub(super) fn info(&self) -> Option<PacketInfo> {
        PacketInfo::from_bytes(&self.header).ok().filter(|info| info.to_bytes(0) == self.header)
    }
}

impl Net {
    pub(super) fn saved(&self) -> NetState {
        if let Some(state) = &self.resumed {
            return state.clone();
        }
        let (filter, offloads) = {
            let wishes = lock(&self.shared.wishes);
            (RxFilter::clone(&wishes.filter), wishes.offloads)
        };
        NetState {
            mac: self.shared.mac,
            mtu: self.mtu,
            filter,
            offloads: config::receive_bits(offloads),
            pairs: *read(&self.shared.in_use),
            announce: self.shared.announce.load(Ordering::SeqCst),
            waiting: lock(&self.shared.waiting).clone(),
        }
    }

    /// Checks a state, which counts from the activation on.
    pub(super) fn take_over(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        let DeviceState::Net(state) = state else { return Err(state.of_another(DEVICE)) };
        let check =
            |valid, field, value: u64, allowed| StateError::check(valid, DEVICE, field, value, allowed);
        let has = |bit: u64| features & bit != 0;
        let number = |MacAddr([a, b, c, d, e, f]): MacAddr| u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        check(state.mac == self.shared.mac, "mac", number(state.mac), "that of the device")?;
        let same = !has(feature::MTU) || state.mtu == self.mtu;
        check(same, "mtu", state.mtu.unwrap_or(0).into(), "that of the device's network")?;
        let NetState { filter, offloads, pairs, waiting, .. } = state;
        let unicast = filter.mac.unicast().is_ok();
        check(unicast, "filter.mac", number(filter.mac), "addresses of one device")?;
        let is_long = |table: &Option<MacTable>| table.as_ref().map_or(0, MacTable::len) > MAX_MAC_ENTRIES;
        let fits = !is_long(&filter.unicast) && !is_long(&filter.multicast);
        check(fits, "length of an address table", 65, "0 to 64")?;
        let agreed = features & GUEST_OFFLOADS;
        let sound = offloads & !agreed == 0 && config::consistent(*offloads);
        check(sound, "offloads", *offloads, "those that were agreed upon, and that go together")?;
        let most = if has(feature::MQ) { self.pairs } else { 1 };
        check((1..=most).contains(pairs), "pairs", (*pairs).into(), "1 to those of the device")?;
        let mut before = None;
        for frame in waiting {
            // One that its driver does not use any more has a frame until it is looked at.
            let ascends = before.is_none_or(|before| before < frame.pair) && frame.pair < most;
            check(ascends, "pair of a frame that waits", frame.pair.into(), "the device's, ascending")?;
            let [header @ .., _, _, _, _] = frame.header;
            let (header, len) = (u64::from_le_bytes(header), frame.bytes.len());
            // What the driver took when it came, maybe, is what it agreed to take.
            let taken = config::receive(agreed);
            let info = frame.info().filter(|info| info.check(len, taken).is_ok());
            let info = info.filter(|info| !info.data_valid || taken.contains(Offloads::CSUM));
            let allowed = "those of frames of its length, as was agreed upon";
            check(info.is_some(), "header of a frame that waits", header, allowed)?;
            let mtu = self.mtu.filter(|_| has(feature::MTU));
            let longest = info.map_or(0, |info| longest(mtu, &info, &frame.bytes));
            let fits = (ETHERNET_HEADER..=longest).contains(&len);
            check(fits, "length of a frame that waits", len as u64, "14 to 65597, or what the MTU allows")?;
            before = Some(frame.pair);
        }
        self.resumed = Some(state.clone());
        Ok(())
    }

    /// Tells the backend, and all who look, what the driver of a restored device wants. A driver that can is asked to announce itself: it is
    /// somewhere else in its network.
    pub(super) fn go_on(&self, state: NetState, features: u64) -> Result<(), NetError> {
        let NetState { filter, offloads, pairs, announce, waiting, .. } = state;
        let offloads = config::receive(offloads);
        if offloads != config::receive(features) {
            self.shared.backend.set_receive_offloads(offloads)?;
        }
        if pairs != 1 {
            self.shared.backend.set_pairs(pairs)?;
        }
        self.shared.use_pairs(pairs);
        self.shared.wish(|wishes| (wishes.filter, wishes.offloads) = (filter.into(), offloads));
        *lock(&self.shared.waiting) = waiting;
        let announces = features & feature::GUEST_ANNOUNCE != 0 && features & feature::STATUS != 0;
        self.shared.announce.store(announces || announce, Ordering::SeqCst);
        Ok(())
    }
}
