//! What a network device is beside its queues (see [`crate::virtio::VirtioState`]).

use std::sync::atomic::Ordering;

use super::Net;
use super::config::{self, GUEST_OFFLOADS, feature};
use super::shared::read;
use crate::error::StateError;
use crate::interrupt::lock;
use crate::net::{MAX_MAC_ENTRIES, MacAddr, MacTable, NetError, RxFilter};
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
        let NetState { filter, offloads, pairs, .. } = state;
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
        self.resumed = Some(state.clone());
        Ok(())
    }

    /// Tells the backend, and all who look, what the driver of a restored device wants. A driver that can is asked to announce itself: it is
    /// somewhere else in its network.
    pub(super) fn go_on(&self, state: NetState, features: u64) -> Result<(), NetError> {
        let NetState { filter, offloads, pairs, announce, .. } = state;
        let offloads = config::receive(offloads);
        if offloads != config::receive(features) {
            self.shared.backend.set_receive_offloads(offloads)?;
        }
        if pairs != 1 {
            self.shared.backend.set_pairs(pairs)?;
        }
        self.shared.use_pairs(pairs);
        self.shared.wish(|wishes| (wishes.filter, wishes.offloads) = (filter.into(), offloads));
        let announces = features & feature::GUEST_ANNOUNCE != 0 && features & feature::STATUS != 0;
        self.shared.announce.store(announces || announce, Ordering::SeqCst);
        Ok(())
    }
}
