//! A switch of Ethernet frames (layer 2) between the network devices of several virtual machines.
//!
//! | part | what |
//! |---|---|
//! | [`Switch`] | a network: ports, the addresses behind them (IEEE 802.1Q), who hears what |
//! | [`SwitchPort`] | a port, which is a [`NetBackend`](super::NetBackend) for a device of this process |
//! | [`PortConfig`] | VLANs, a locked address, isolation, limits |
//! | [`FlowJudge`] | a policy's look at each frame between two ports |
//! | [`flows`] | a judge that asks a policy once for each flow |
//!
//! A frame is copied once from the sender's memory into a bounded queue of each receiver, and once from there into its memory. The thread
//! that serves the sender's device does the first, and never waits for a receiver: where there is no room, the frame is
//! dropped for that receiver alone. What senders leave to others to do (checksums, segmentation) stays left where the receiver's driver takes
//! it, and is done here where not. Nothing is allocated for a frame.
//!
//! A port takes the [`Grant`] for it by value, and is gone when that is revoked: when the revocation
//! returns, no frame of it is delivered any more, nor one to it, what was in its queues and was learned of it is forgotten, and its device sees the
//! link go down.
//!
//! # Threat model
//! Drivers are hostile, and work together. They choose every byte of a frame, and change it meanwhile: the first 192 bytes
//! are read once, decided about, and delivered as they were read. They send from any address, as many as they like: each port has so many
//! entries of the table, and locked addresses are nobody else's. They flood, and are limited; they lie about segmentation, and are refused.
//! Frames of a VLAN are seen by no port that is not of it. What a switch does not keep from anybody is that others are there, and busy: how long a
//! frame takes depends on them.
//!
//! ```
//! use vmm_devices::ManualClock;
//! use vmm_devices::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
//! use vmm_devices::net::MacAddr;
//! use vmm_devices::net::switch::{PortConfig, PortVlans, Switch, VlanId};
//!
//! let switch = Switch::builder("lan", ManualClock::default()).build();
//! let gatekeeper = Gatekeeper::new(AllowAll);
//! let vm = Party::Vm(VmIdentity::new(1, 1));
//! let grant = gatekeeper.open(vm, None, NetworkAttach { network: "lan".into() })?;
//! let id = grant.id();
//! let vlan = PortVlans::Access(VlanId::new(7)?);
//! let port = switch.attach(grant, PortConfig::new("web").vlans(vlan).mac(MacAddr::local(1)))?;
//! assert_eq!(switch.ports().len(), 1); // `port` goes to the builder of a network device
//! gatekeeper.revoke(id);
//! assert!(switch.ports().is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod broker;
mod config;
mod error;
pub mod flows;
mod forward;
mod head;
mod judge;
mod metrics;
mod offload;
mod port;
mod ring;
mod table;
#[cfg(test)]
mod tests;
mod vlan;

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

pub use config::{Isolation, MAX_QUEUES, PortConfig};
pub use error::SwitchError;
pub use judge::{Flow, FlowJudge, FlowPort, Headers, Network, Transport, Verdict};
pub use metrics::{DropReason, FrameTotals, PortSnapshot};
pub use offload::{MAX_HEADERS, MAX_SEGMENTS, OffloadError};
pub use port::SwitchPort;
pub use ring::RingError;
pub use table::PortId;
pub use vlan::{PortVlans, VlanId, VlanSet};

use crate::channel::{Grant, GrantId, NetworkAttach};
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::net::MacAddr;
use forward::Ingress;
use port::{Lane, Port};
use ring::{Consumer, Producer};
use table::{Key, MacTable};

/// How a switch is to be.
pub struct SwitchBuilder {
    network: Arc<str>,
    clock: Arc<dyn Clock>,
    ports: usize,
    macs: usize,
    aging_ns: u64,
    mtu: Option<u16>,
}

impl fmt::Debug for SwitchBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchBuilder").field("network", &self.network).finish_non_exhaustive()
    }
}

impl SwitchBuilder {
    /// How many ports there are at most; 256 where nothing is said.
    #[must_use]
    pub fn max_ports(mut self, most: usize) -> Self {
        self.ports = most;
        self
    }

    /// How many addresses it knows at most; 8192 where nothing is said. Frames for others go to everybody.
    #[must_use]
    pub fn max_macs(mut self, most: usize) -> Self {
        self.macs = most;
        self
    }

    /// After how many nanoseconds of silence an address is forgotten; 300 seconds where nothing is said (IEEE 802.1Q, 8.8.3).
    #[must_use]
    pub fn aging(mut self, ns: u64) -> Self {
        self.aging_ns = ns;
        self
    }

    /// The largest packet that devices are told, without its Ethernet header, in bytes. The switch passes longer ones; a device drops those
    /// that come to a driver which relies on it (VIRTIO_NET_F_MTU).
    #[must_use]
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.mtu = Some(bytes);
        self
    }

    /// The switch, without ports.
    pub fn build(self) -> Switch {
        let Self { network, clock, ports, macs, aging_ns, mtu } = self;
        Switch {
            inner: Arc::new(Inner {
                network,
                clock,
                max_ports: ports,
                mtu,
                topology: RwLock::default(),
                epoch: AtomicU64::new(0),
                table: Mutex::new(MacTable::new(macs, aging_ns)),
                generation: AtomicU64::new(0),
                next: AtomicU32::new(1),
            }),
        }
    }
}

/// A network. Clones are the same one.
#[derive(Clone)]
pub struct Switch {
    inner: Arc<Inner>,
}

/// What a switch and its ports have in common.
pub(crate) struct Inner {
    network: Arc<str>,
    clock: Arc<dyn Clock>,
    max_ports: usize,
    mtu: Option<u16>,
    topology: RwLock<Arc<Topology>>,
    /// Of the topology, to be looked at without its lock.
    epoch: AtomicU64,
    table: Mutex<MacTable>,
    /// How often the table has changed.
    generation: AtomicU64,
    next: AtomicU32,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("network", &self.network).finish_non_exhaustive()
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

/// Which ports there are, in the order of their numbers, and who judges. It is replaced as a whole.
#[derive(Clone, Default)]
struct Topology {
    epoch: u64,
    ports: Vec<Arc<Port>>,
    judge: Option<Arc<dyn FlowJudge>>,
}

impl Topology {
    fn find(&self, id: PortId) -> Option<Arc<Port>> {
        let at = self.ports.binary_search_by_key(&id, |port| port.flow.id).ok()?;
        self.ports.get(at).map(Arc::clone)
    }
}

/// A port that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStatus {
    /// Which one, its name, and by which right it is there.
    pub port: FlowPort,
    /// Whether its link is up.
    pub up: bool,
    /// What was counted.
    pub metrics: PortSnapshot,
}

/// An address that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct MacEntry {
    /// The number of the VLAN.
    pub vlan: u16,
    /// The address.
    pub mac: MacAddr,
    /// Where it is.
    pub port: PortId,
    /// Whether it stays there, and was not learned.
    pub pinned: bool,
}

impl Switch {
    /// The network of that name, which grants are for, with addresses that age by `clock`.
    pub fn builder(network: impl Into<Arc<str>>, clock: impl Clock + 'static) -> SwitchBuilder {
        SwitchBuilder {
            network: network.into(),
            clock: Arc::new(clock),
            ports: 256,
            macs: 8192,
            aging_ns: 300 * crate::clock::NANOSECONDS,
            mtu: None,
        }
    }

    /// Its name.
    pub fn network(&self) -> &Arc<str> {
        &self.inner.network
    }

    /// A port for a device of this process.
    ///
    /// # Errors
    /// [`SwitchError`]: the grant is revoked, or for another network; the name or the address is another port's; there are too many ports;
    /// or the configuration is none.
    pub fn attach(&self, grant: Grant<NetworkAttach>, config: PortConfig) -> Result<SwitchPort, SwitchError> {
        config.check()?;
        let lanes = (0..config.queues).map(|_| ring::ring(config.ring)).collect::<Result<Vec<_>, _>>()?;
        let lanes = lanes.into_iter().map(|(producer, consumer)| (producer, Some(consumer)));
        self.attach_with(grant, config, lanes)
    }

    /// A port with those queues.
    fn attach_with(
        &self,
        grant: Grant<NetworkAttach>,
        config: PortConfig,
        lanes: impl Iterator<Item = (Producer, Option<Consumer>)>,
    ) -> Result<SwitchPort, SwitchError> {
        let inner = &self.inner;
        let network = || Arc::clone(&inner.network);
        if grant.channel().network != inner.network {
            return Err(SwitchError::Network {
                granted: Arc::clone(&grant.channel().network),
                network: network(),
            });
        }
        let id = PortId(inner.next.fetch_add(1, Ordering::Relaxed));
        let watch = grant.watch();
        let place = Arc::<OnceLock<Weak<Port>>>::default();
        let (switch, of_grant) = (Arc::downgrade(inner), Arc::clone(&place));
        grant.on_revoked(move || {
            if let (Some(switch), Some(port)) = (switch.upgrade(), of_grant.get().and_then(Weak::upgrade)) {
                switch.detach(&port);
            }
        });
        let flow = FlowPort { id, name: Arc::clone(&config.name), grant: grant.id() };
        let ingress = Ingress::new(&config, Arc::default(), inner.clock.now_ns());
        let lanes = lanes.map(|(producer, consumer)| Lane::new(producer, consumer)).collect();
        let port = Arc::new(Port::new(flow, config, lanes, ingress, grant));
        inner.change(|topology| {
            if topology.ports.len() >= inner.max_ports {
                return Err(SwitchError::Ports { network: network(), most: inner.max_ports });
            }
            if topology.ports.iter().any(|other| other.flow.name == port.flow.name) {
                return Err(SwitchError::Name { network: network(), name: Arc::clone(&port.flow.name) });
            }
            if let Some((vlan, mac)) = port.config.pinned() {
                let mut table = lock(&inner.table);
                let key = Key::new(vlan, mac);
                if let Some(owner) = table.owner(key).and_then(|owner| topology.find(owner)) {
                    return Err(SwitchError::MacTaken { mac, vlan, owner: Arc::clone(&owner.flow.name) });
                }
                table.pin(key, id);
                inner.generation.fetch_add(1, Ordering::AcqRel);
            }
            topology.ports.push(Arc::clone(&port));
            topology.ports.sort_by_key(|port| port.flow.id);
            Ok(())
        })?;
        let attached = SwitchPort { switch: Arc::clone(inner), port };
        // One that was taken back before this finds no port.
        let (Ok(()) | Err(_)) = place.set(Arc::downgrade(&attached.port));
        if !watch.is_live() {
            return Err(SwitchError::Revoked { network: network() });
        }
        Ok(attached)
    }

    /// Has each frame between two ports judged from now on, or none any more.
    pub fn set_judge(&self, judge: Option<Arc<dyn FlowJudge>>) {
        let set = self.inner.change(|topology| {
            topology.judge = judge;
            Ok(())
        });
        // It does not fail.
        let (Ok(()) | Err(_)) = set;
    }

    /// Plugs the cable of a port in, or out: its device sees the link change. Whether there is such a port.
    pub fn set_link(&self, port: PortId, up: bool) -> bool {
        let port = self.inner.topology().find(port);
        port.inspect(|port| port.plug(up)).is_some()
    }

    /// The ports that are there.
    pub fn ports(&self) -> Vec<PortStatus> {
        let status = |port: &Arc<Port>| PortStatus {
            port: port.flow.clone(),
            up: port.is_up(),
            metrics: port.counters.snapshot(),
        };
        self.inner.topology().ports.iter().map(status).collect()
    }

    /// The addresses that it knows.
    pub fn macs(&self) -> Vec<MacEntry> {
        let now_ns = self.inner.clock.now_ns();
        let entry = |(key, port, pinned): (Key, PortId, bool)| {
            let (vlan, mac) = key.parts();
            MacEntry { vlan, mac, port, pinned }
        };
        let mut entries: Vec<_> = lock(&self.inner.table).entries(now_ns).map(entry).collect();
        entries.sort();
        entries
    }

    /// Which grant a port is there by.
    pub fn grant(&self, port: PortId) -> Option<GrantId> {
        self.inner.topology().find(port).map(|port| port.flow.grant)
    }
}

impl Inner {
    fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.topology.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the topology by a changed one.
    fn change(
        &self,
        change: impl FnOnce(&mut Topology) -> Result<(), SwitchError>,
    ) -> Result<(), SwitchError> {
        let mut place = self.topology.write().unwrap_or_else(PoisonError::into_inner);
        let mut topology = (**place).clone();
        change(&mut topology)?;
        topology.epoch += 1;
        let epoch = topology.epoch;
        *place = Arc::new(topology);
        self.epoch.store(epoch, Ordering::Release);
        Ok(())
    }

    /// Takes a port away; when it returns, no frame comes from it or goes to it.
    fn detach(&self, port: &Arc<Port>) {
        if !port.end() {
            return;
        }
        let id = port.flow.id;
        let removed = self.change(|topology| {
            topology.ports.retain(|other| other.flow.id != id);
            Ok(())
        });
        // It does not fail.
        let (Ok(()) | Err(_)) = removed;
        // Waits for a frame that is on its way from it.
        lock(&port.ingress).end();
        lock(&self.table).forget(id);
        self.generation.fetch_add(1, Ordering::AcqRel);
        // And for those that are on their way to it.
        port.drain();
        port::flush(port);
    }
}
