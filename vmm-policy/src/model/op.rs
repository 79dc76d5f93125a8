//! Kinds of channels and objects, what can be done with each, and which way information goes then.

use std::fmt;

/// What a value of a [`Kind`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// A number up to and including this one.
    Number(u64),
    /// A name that the monitor or the operator gave.
    Name,
    /// There is one of the kind, and nothing to tell apart.
    Nothing,
}

/// Which way information goes when something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Flow {
    /// To and from nobody but the monitor.
    None = 0,
    /// From the peer or object to the asker.
    In = 1,
    /// From the asker to the peer or object.
    Out = 2,
    /// Both ways.
    Both = 3,
}

impl Flow {
    /// Whether the asker learns something.
    pub fn reads(self) -> bool {
        self as u8 & Self::In as u8 != 0
    }

    /// Whether the peer or the object learns something.
    pub fn writes(self) -> bool {
        self as u8 & Self::Out as u8 != 0
    }
}

macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// As a policy writes it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// What a policy means by `word`.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)* _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }
    };
}

words! {
    /// What is asked for.
    Kind {
        /// A vsock port of the peer's (Virtio 1.3, 5.10): a number of 32 bits.
        Vsock = "vsock",
        /// A TCP port of the peer's, as the switch sees it (L4).
        Tcp = "tcp",
        /// A UDP port of the peer's (L4).
        Udp = "udp",
        /// A type of ICMP or ICMPv6 message (L3).
        Icmp = "icmp",
        /// Another IP protocol, by its number (L3).
        Ip = "ip",
        /// Another kind of frame, by its ethertype (L2): ARP is 0x806.
        Ethernet = "ethernet",
        /// A network that a device is on, by name.
        Network = "network",
        /// Memory in common, by name.
        Region = "region",
        /// Pages that a Xen domain grants (Xen public/grant_table.h).
        Grant = "grant",
        /// The doorbells of memory in common, by the memory's name.
        Doorbell = "doorbell",
        /// A Xen event channel (Xen public/event_channel.h).
        EventChannel = "event-channel",
        /// What a block device stores to, by name.
        Disk = "disk",
        /// A folder of the host, by name.
        Share = "share",
        /// A console, by name.
        Console = "console",
        /// A saved state, by name.
        Snapshot = "snapshot",
        /// A place to migrate to or from, by name.
        Migration = "migration",
        /// What the management interface offers, by name: pause, destroy.
        Verb = "verb",
        /// A hypercall, by its number.
        Hypercall = "hypercall",
        /// Ports of the processor's I/O space.
        Pio = "pio",
        /// Addresses of memory-mapped I/O, in bytes.
        Mmio = "mmio",
        /// Model-specific registers.
        Msr = "msr",
        /// Pages given and taken by a balloon.
        Balloon = "balloon",
        /// What is plugged while the guest runs, by name: cpu, memory, device.
        Hotplug = "hotplug",
    }
}

words! {
    /// What is done.
    Action {
        /// Makes it.
        Create = "create",
        /// Begins a connection to the peer, or binds to it.
        Connect = "connect",
        /// Takes connections, or a migration that comes in.
        Accept = "accept",
        /// Sends to the peer.
        Send = "send",
        /// Sees the memory.
        MapRo = "map-ro",
        /// Sees and changes the memory.
        MapRw = "map-rw",
        /// Interrupts the peer.
        Notify = "notify",
        /// Gives what one may do oneself to another.
        Delegate = "delegate",
        /// Has it, to read and to write.
        Attach = "attach",
        /// Has it, to read.
        AttachRo = "attach-ro",
        /// Takes contents out.
        Export = "export",
        /// Manages the peer.
        Administer = "administer",
        /// Asks the monitor for it: a hypercall, a port, a page.
        Use = "use",
    }
}

impl Kind {
    /// What tells objects of the kind apart.
    pub fn value_kind(self) -> ValueKind {
        match self {
            Self::Vsock | Self::EventChannel | Self::Msr => ValueKind::Number(u32::MAX as u64),
            Self::Tcp | Self::Udp | Self::Ethernet | Self::Pio => ValueKind::Number(u16::MAX as u64),
            Self::Icmp | Self::Ip => ValueKind::Number(u8::MAX as u64),
            Self::Hypercall | Self::Mmio => ValueKind::Number(u64::MAX),
            Self::Network
            | Self::Region
            | Self::Doorbell
            | Self::Disk
            | Self::Share
            | Self::Console
            | Self::Snapshot
            | Self::Migration
            | Self::Verb
            | Self::Hotplug => ValueKind::Name,
            Self::Grant | Self::Balloon => ValueKind::Nothing,
        }
    }

    /// What can be done with objects of the kind, and which way information goes then.
    pub const fn actions(self) -> &'static [(Action, Flow)] {
        use Action::*;
        match self {
            Self::Vsock => &[(Connect, Flow::Both), (Accept, Flow::Both)],
            Self::Tcp => &[(Connect, Flow::Both)],
            // An answer goes with what was asked.
            Self::Udp | Self::Icmp => &[(Send, Flow::Both)],
            Self::Ip | Self::Ethernet => &[(Send, Flow::Out)],
            Self::Network => &[(Attach, Flow::Both)],
            Self::Region => &[
                (Create, Flow::Both),
                (MapRo, Flow::In),
                (MapRw, Flow::Both),
                (Delegate, Flow::Both),
                (Export, Flow::In),
            ],
            Self::Grant => &[(MapRo, Flow::In), (MapRw, Flow::Both), (Delegate, Flow::Both)],
            Self::Doorbell => &[(Notify, Flow::Out)],
            Self::EventChannel => &[(Create, Flow::Both), (Connect, Flow::Both), (Notify, Flow::Out)],
            Self::Disk | Self::Share => {
                &[(Attach, Flow::Both), (AttachRo, Flow::In), (Export, Flow::In), (Create, Flow::Both)]
            }
            Self::Console => &[(Attach, Flow::Both), (AttachRo, Flow::In)],
            Self::Snapshot => &[(Create, Flow::In), (Export, Flow::In), (Attach, Flow::Out)],
            Self::Migration => &[(Export, Flow::In), (Accept, Flow::Out)],
            Self::Verb => &[(Administer, Flow::Out)],
            Self::Hypercall | Self::Pio | Self::Mmio | Self::Msr | Self::Balloon => &[(Use, Flow::None)],
            Self::Hotplug => &[(Attach, Flow::None)],
        }
    }

    /// Whether what one subject puts there another one finds: such objects are stations on the ways that
    /// [`prove_no_path`](crate::Policy::prove_no_path) looks for.
    pub fn is_station(self) -> bool {
        matches!(
            self,
            Self::Network | Self::Region | Self::Disk | Self::Share | Self::Console | Self::Snapshot
        )
    }
}

/// By [`index`], for what can be done. A decision begins with it.
static FLOWS: [Option<Flow>; Op::COUNT] = flows();

const fn index(kind: Kind, action: Action) -> usize {
    kind as usize * Action::ALL.len() + action as usize
}

#[allow(clippy::indexing_slicing, reason = "it is computed when the crate is compiled")]
const fn flows() -> [Option<Flow>; Op::COUNT] {
    let mut flows = [None; Op::COUNT];
    let mut kind = 0;
    while kind < Kind::ALL.len() {
        let actions = Kind::ALL[kind].actions();
        let mut at = 0;
        while at < actions.len() {
            let (action, flow) = actions[at];
            flows[index(Kind::ALL[kind], action)] = Some(flow);
            at += 1;
        }
        kind += 1;
    }
    flows
}

/// An action on a kind of object that knows it. There is no other way to have one than [`new`](Self::new), so that what
/// makes no sense (to ring a disk) cannot be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Op {
    kind: Kind,
    action: Action,
    flow: Flow,
}

impl Op {
    /// One more than the highest [`index`](Self::index).
    pub(crate) const COUNT: usize = Kind::ALL.len() * Action::ALL.len();

    /// `action` on a `kind`, if that can be.
    #[inline(always)]
    pub fn new(kind: Kind, action: Action) -> Option<Self> {
        let flow = (*FLOWS.get(index(kind, action))?)?;
        Some(Self { kind, action, flow })
    }

    /// All there are.
    pub fn all() -> impl Iterator<Item = Self> {
        Kind::ALL.iter().flat_map(|kind| Self::of(*kind))
    }

    /// All of one kind.
    pub fn of(kind: Kind) -> impl Iterator<Item = Self> {
        kind.actions().iter().map(move |(action, flow)| Self { kind, action: *action, flow: *flow })
    }

    /// On what.
    pub fn kind(self) -> Kind {
        self.kind
    }

    /// What is done.
    pub fn action(self) -> Action {
        self.action
    }

    /// Which way information goes.
    #[inline(always)]
    pub fn flow(self) -> Flow {
        self.flow
    }

    /// The [`index`](Self::index) of `action` on a `kind`, whether that can be or not.
    #[inline(always)]
    pub(crate) fn index_of(kind: Kind, action: Action) -> usize {
        index(kind, action)
    }

    #[inline(always)]
    pub(crate) fn index(self) -> usize {
        index(self.kind, self.action)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Verb => f.write_str(self.action.word()),
            kind => write!(f, "{} {kind}", self.action),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique_and_come_back() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_word(kind.word()), Some(*kind));
            assert!(!kind.actions().is_empty(), "nothing can be done with a {kind}");
        }
        for action in Action::ALL {
            assert_eq!(Action::from_word(action.word()), Some(*action));
            assert!(Kind::ALL.iter().any(|kind| Op::new(*kind, *action).is_some()), "{action} is of no use");
        }
    }

    #[test]
    fn indices_are_unique_and_flows_survive() {
        let mut seen = std::collections::BTreeSet::new();
        for op in Op::all() {
            assert!(op.index() < Op::COUNT && seen.insert(op.index()), "{op}");
            let flow = op.kind().actions().iter().find(|(action, _)| *action == op.action()).unwrap().1;
            assert_eq!(op.flow(), flow);
            assert_eq!(Op::new(op.kind(), op.action()), Some(op));
        }
        assert_eq!(Op::new(Kind::Disk, Action::Notify), None);
    }
}
