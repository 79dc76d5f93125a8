//! Who wants what of whom.

use std::fmt;
use std::sync::Arc;

use vmm_memory::Access;

/// Which virtual machine, and which of its lives: what starts again under the same identifier is another one, so that
/// no right outlives whom it was given to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmIdentity {
    uuid: u128,
    incarnation: u64,
}

impl VmIdentity {
    /// `uuid` as a number, most significant byte first; `incarnation` counts the lives and is never used twice.
    pub const fn new(uuid: u128, incarnation: u64) -> Self {
        Self { uuid, incarnation }
    }

    /// The identifier.
    pub const fn uuid(self) -> u128 {
        self.uuid
    }

    /// Which of its lives.
    pub fn incarnation(self) -> u64 {
        self.incarnation
    }
}

impl fmt::Display for VmIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uuid = self.uuid;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}#{}",
            uuid >> 96,
            (uuid >> 80) & 0xffff,
            (uuid >> 64) & 0xffff,
            (uuid >> 48) & 0xffff,
            uuid & 0xffff_ffff_ffff,
            self.incarnation
        )
    }
}

/// Who takes part in a channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Party {
    /// A virtual machine.
    Vm(VmIdentity),
    /// A program or user of the host, by a name that the monitor gives.
    Host(Arc<str>),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vm) => write!(f, "vm {vm}"),
            Self::Host(name) => write!(f, "host {name}"),
        }
    }
}

impl From<VmIdentity> for Party {
    fn from(vm: VmIdentity) -> Self {
        Self::Vm(vm)
    }
}

/// What a channel leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Object {
    /// A port of the peer's (Virtio 1.3, 5.10).
    Vsock {
        /// Its number.
        port: u32,
    },
    /// A network, by the name that the monitor gives it.
    Network {
        /// Its name.
        name: Arc<str>,
    },
    /// Memory in common, by the name that the monitor gives it.
    Region {
        /// Its name.
        name: Arc<str>,
    },
    /// The doorbells of memory in common.
    Doorbell {
        /// The memory's name.
        region: Arc<str>,
    },
}

impl Object {
    /// The vsock port, if it is one.
    pub fn port(&self) -> Option<u32> {
        match self {
            Self::Vsock { port } => Some(*port),
            _ => None,
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { port } => write!(f, "vsock port {port}"),
            Self::Network { name } => write!(f, "network {name:?}"),
            Self::Region { name } => write!(f, "region {name:?}"),
            Self::Doorbell { region } => write!(f, "doorbells of region {region:?}"),
        }
    }
}

/// What is to be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// The asker begins a connection to the peer.
    Connect,
    /// The asker accepts connections; of the peer, where one is named.
    Accept,
    /// The asker's device becomes part of it: frames go both ways.
    Attach,
    /// The asker sees the memory.
    MapReadOnly,
    /// The asker sees and changes the memory.
    MapReadWrite,
    /// The asker interrupts those who have the memory too.
    Notify,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Accept => "accept",
            Self::Attach => "attach",
            Self::MapReadOnly => "map-ro",
            Self::MapReadWrite => "map-rw",
            Self::Notify => "notify",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A kind of channel: what a [`Grant`](super::Grant) is for.
pub trait Channel: sealed::Sealed + Clone + fmt::Debug + Send + Sync + 'static {
    /// What it leads to.
    fn object(&self) -> Object;
    /// What is done with it.
    fn action(&self) -> Action;
}

/// A stream or message connection to a vsock port of the peer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConnect {
    /// The port.
    pub port: u32,
}

/// A vsock port of the asker's at which others connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockListen {
    /// The port.
    pub port: u32,
}

/// A network device on a network: a port of a switch, a tap device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkAttach {
    /// The network's name.
    pub network: Arc<str>,
}

/// Memory in common with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionMap {
    /// Its name.
    pub region: Arc<str>,
    /// What for.
    pub access: Access,
}

/// Interrupts to those who share memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoorbellRing {
    /// The memory's name.
    pub region: Arc<str>,
}

macro_rules! channel {
    ($type:ident, |$this:ident| $object:expr, $action:expr) => {
        impl sealed::Sealed for $type {}
        impl Channel for $type {
            fn object(&self) -> Object {
                let $this = self;
                $object
            }

            fn action(&self) -> Action {
                $action
            }
        }
    };
}

channel!(VsockConnect, |this| Object::Vsock { port: this.port }, Action::Connect);
channel!(VsockListen, |this| Object::Vsock { port: this.port }, Action::Accept);
channel!(NetworkAttach, |this| Object::Network { name: Arc::clone(&this.network) }, Action::Attach);
channel!(DoorbellRing, |this| Object::Doorbell { region: Arc::clone(&this.region) }, Action::Notify);

impl sealed::Sealed for RegionMap {}
impl Channel for RegionMap {
    fn object(&self) -> Object {
        Object::Region { name: Arc::clone(&self.region) }
    }

    fn action(&self) -> Action {
        match self.access {
            Access::ReadOnly => Action::MapReadOnly,
            Access::ReadWrite => Action::MapReadWrite,
        }
    }
}

/// What a [`Gate`](super::Gate) decides about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    asker: Party,
    peer: Option<Party>,
    object: Object,
    action: Action,
}

impl Request {
    /// Of any kind of channel. To open one takes [`Gatekeeper::open`](super::Gatekeeper::open); this is for who tests a gate.
    pub fn new<C: Channel>(asker: Party, peer: Option<Party>, channel: &C) -> Self {
        Self { asker, peer, object: channel.object(), action: channel.action() }
    }

    /// Who asks.
    pub fn asker(&self) -> &Party {
        &self.asker
    }

    /// Whom it leads to, if that is one: a network leads to many.
    pub fn peer(&self) -> Option<&Party> {
        self.peer.as_ref()
    }

    /// What it leads to.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// What is to be done.
    pub fn action(&self) -> Action {
        self.action
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.asker, self.action, self.object)?;
        match &self.peer {
            Some(peer) => write!(f, " of {peer}"),
            None => Ok(()),
        }
    }
}
