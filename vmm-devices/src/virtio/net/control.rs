//! The control queue (Virtio 1.3, 5.1.6.5): what the driver wants of the frames that it gets.

use std::ops::Deref;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestMemory;

use super::config::{self, GUEST_OFFLOADS, feature};
use super::shared::{Shared, count};
use crate::net::{MAX_MAC_ENTRIES, MacAddr, MacTable, RxFilter, VLANS};
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};

/// Classes of commands.
const RX: u8 = 0;
const MAC: u8 = 1;
const VLAN: u8 = 2;
const ANNOUNCE: u8 = 3;
const MQ: u8 = 4;
const OFFLOADS: u8 = 5;

/// Of [`MAC`].
const TABLE_SET: u8 = 0;
const ADDR_SET: u8 = 1;

/// What a command ends with.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Bytes of a header: class and command.
const HEADER: u64 = 2;

/// Commands that are obeyed before others have their turn.
const SHARE: u32 = 64;

pub(super) struct ControlWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    features: u64,
    /// Pairs of queues that it may take into use.
    pairs: u16,
}

impl<M: DeviceMemory> ControlWorker<M> {
    pub(super) fn new(queue: Virtqueue<M>, shared: Arc<Shared>, features: u64, pairs: u16) -> Self {
        Self { queue, shared, features, pairs }
    }

    fn has(&self, bit: u64) -> bool {
        self.features & bit != 0
    }

    /// Does what a command says; `None` if it cannot be had.
    fn obey<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>) -> Option<()> {
        let [class, command] = read(chain, 0)?;
        match (class, command) {
            (RX, 0..=1) if self.has(feature::CTRL_RX) => self.receive_mode(chain, command),
            (RX, 2..=5) if self.has(feature::CTRL_RX_EXTRA) => self.receive_mode(chain, command),
            (MAC, TABLE_SET) if self.has(feature::CTRL_RX) => self.table(chain),
            (MAC, ADDR_SET) if self.has(feature::CTRL_MAC_ADDR) => {
                let mac = MacAddr(read(chain, HEADER)?).unicast().ok()?;
                self.filter(|filter| filter.mac = mac);
                Some(())
            }
            (VLAN, 0..=1) if self.has(feature::CTRL_VLAN) => self.vlan(chain, command == 0),
            (ANNOUNCE, 0) if self.has(feature::GUEST_ANNOUNCE) => {
                self.shared.announced();
                Some(())
            }
            (MQ, 0) if self.has(feature::MQ) => {
                let pairs = u16::from_le_bytes(read(chain, HEADER)?);
                if !(1..=self.pairs).contains(&pairs) {
                    return None;
                }
                self.shared.backend.set_pairs(pairs).ok()?;
                self.shared.use_pairs(pairs);
                Some(())
            }
            (OFFLOADS, 0) if self.has(feature::CTRL_GUEST_OFFLOADS) => self.offloads(chain),
            _ => None,
        }
    }

    fn filter(&self, change: impl FnOnce(&mut RxFilter)) {
        self.shared.wish(|wishes| change(Arc::make_mut(&mut wishes.filter)));
    }

    fn receive_mode<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>, command: u8) -> Option<()> {
        let [on] = read(chain, HEADER)?;
        let on = on != 0;
        self.filter(|filter| {
            let place = match command {
                0 => &mut filter.promiscuous,
                1 => &mut filter.all_multicast,
                2 => &mut filter.all_unicast,
                3 => &mut filter.no_multicast,
                4 => &mut filter.no_unicast,
                _ => &mut filter.no_broadcast,
            };
            *place = on;
        });
        Some(())
    }

    /// Two tables: devices, then groups.
    fn table<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>) -> Option<()> {
        let mut at = HEADER;
        let unicast = table(chain, &mut at)?;
        let multicast = table(chain, &mut at)?;
        // A table is a promise of what lies behind, and nothing else.
        if at != chain.readable_len() {
            return None;
        }
        self.filter(|filter| (filter.unicast, filter.multicast) = (unicast, multicast));
        Some(())
    }

    fn vlan<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>, add: bool) -> Option<()> {
        let vlan = u16::from_le_bytes(read(chain, HEADER)?);
        if vlan >= VLANS {
            return None;
        }
        let bit = 1 << (vlan % 64);
        self.filter(|filter| {
            let vlans = filter.vlans.get_or_insert_with(|| Box::new([0; VLANS as usize / 64]));
            if let Some(word) = vlans.get_mut(usize::from(vlan / 64)) {
                *word = if add { *word | bit } else { *word & !bit };
            }
        });
        Some(())
    }

    /// A part of what was agreed upon.
    fn offloads<T: Deref<Target: GuestMemory>>(&self, chain: &Chain<T>) -> Option<()> {
        let wanted = u64::from_le_bytes(read(chain, HEADER)?);
        let agreed = self.features & GUEST_OFFLOADS;
        if wanted & !agreed != 0 || !config::consistent(wanted) {
            return None;
        }
        let offloads = config::receive(wanted);
        self.shared.backend.set_receive_offloads(offloads).ok()?;
        self.shared.wish(|wishes| wishes.offloads = offloads);
        Some(())
    }
}

/// The table at byte `at`, and where it ends; `Some(None)` for more addresses than are kept.
fn table<T: Deref<Target: GuestMemory>>(chain: &Chain<T>, at: &mut u64) -> Option<Option<MacTable>> {
    let entries = u32::from_le_bytes(read(chain, *at)?);
    let first = at.checked_add(4)?;
    // Below 2^35.
    let end = first.checked_add(6 * u64::from(entries))?;
    if end > chain.readable_len() {
        return None;
    }
    *at = end;
    if usize::try_from(entries).map_or(true, |entries| entries > MAX_MAC_ENTRIES) {
        return Some(None);
    }
    let entries = (0..u64::from(entries)).map(|entry| read(chain, first + 6 * entry).map(MacAddr));
    entries.collect::<Option<MacTable>>().map(Some)
}

fn read<const N: usize, T: Deref<Target: GuestMemory>>(chain: &Chain<T>, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    chain.read(at, &mut bytes).ok().filter(|len| *len == N).map(|_| bytes)
}

impl<M: DeviceMemory> Worker for ControlWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        for _ in 0..SHARE {
            let Some(chain) = self.queue.pop(&*memory)? else { return self.queue.rest() };
            let begun_ns = self.shared.now_ns();
            // A command whose end cannot be told is not obeyed.
            let can_tell = chain.writable_len() > 0;
            let obeyed = can_tell && self.obey(&chain).is_some();
            if !obeyed {
                count(&self.shared.counters.commands_refused);
            }
            let written = chain.write(0, &[if obeyed { OK } else { ERR }]).unwrap_or(0);
            self.shared.ended(Activity::Other, 0, obeyed, begun_ns);
            self.queue.complete_in(&memory, chain.head(), u32::try_from(written).unwrap_or(0))?;
        }
        self.queue.rest().map(|_| Progress::More)
    }
}
