//! Kinds of channels as types, so that a grant for one opens no other.

use crate::model::Kind;

mod sealed {
    pub trait Sealed {}
}

/// A kind of channel, as a type.
pub trait Channel: sealed::Sealed + Send + Sync + 'static {
    /// Which.
    const KIND: Kind;
}

macro_rules! channels {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            pub enum $name {}
            impl sealed::Sealed for $name {}
            impl Channel for $name {
                const KIND: Kind = Kind::$name;
            }
        )*

        #[cfg(test)]
        pub(crate) const KINDS: &[Kind] = &[$(Kind::$name,)*];
    };
}

channels! {
    /// A vsock connection, or a port that listens.
    Vsock,
    /// A TCP flow.
    Tcp,
    /// A UDP flow.
    Udp,
    /// An ICMP flow.
    Icmp,
    /// A flow of another IP protocol.
    Ip,
    /// A flow of frames of an ethertype.
    Ethernet,
    /// A device on a network.
    Network,
    /// Memory in common.
    Region,
    /// Pages that a Xen domain grants.
    Grant,
    /// Doorbells.
    Doorbell,
    /// A Xen event channel.
    EventChannel,
    /// What a block device stores to.
    Disk,
    /// A folder of the host.
    Share,
    /// A console.
    Console,
    /// A saved state.
    Snapshot,
    /// A migration under way.
    Migration,
    /// A management verb that is being carried out.
    Verb,
    /// A hypercall that is being carried out.
    Hypercall,
    /// A right to ports.
    Pio,
    /// A right to memory-mapped I/O.
    Mmio,
    /// A right to model-specific registers.
    Msr,
    /// Pages of a balloon.
    Balloon,
    /// What has been plugged.
    Hotplug,
}

#[cfg(test)]
#[test]
fn each_kind_has_a_type() {
    assert_eq!(KINDS, Kind::ALL);
}
