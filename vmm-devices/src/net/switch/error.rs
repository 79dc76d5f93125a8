//! What goes wrong with a switch.

use std::sync::Arc;

use super::ring::RingError;
use super::vlan::VlanId;
use crate::net::MacAddr;

/// Why a port is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// There is no such VLAN.
    #[error("VLAN {number}; there are 1 to 4094")]
    Vlan {
        /// What was asked for.
        number: u16,
    },
    /// The grant is for another network.
    #[error("the grant is for network {granted:?}, and the switch is network {network:?}")]
    Network {
        /// That of the grant.
        granted: Arc<str>,
        /// That of the switch.
        network: Arc<str>,
    },
    /// The grant has been revoked.
    #[error("the right to be on network {network:?} was taken back")]
    Revoked {
        /// The network.
        network: Arc<str>,
    },
    /// Another port has the name.
    #[error("network {network:?} has a port called {name:?}; each has a name of its own")]
    Name {
        /// The network.
        network: Arc<str>,
        /// The name.
        name: Arc<str>,
    },
    /// The address is another port's.
    #[error("{mac} in {vlan} belongs to port {owner:?}; each port has an address of its own")]
    MacTaken {
        /// The address.
        mac: MacAddr,
        /// Where.
        vlan: VlanId,
        /// Whose it is.
        owner: Arc<str>,
    },
    /// The address is none of a device's.
    #[error("{mac} cannot be a device's address: it is a group's, or nobody's")]
    Mac {
        /// The address.
        mac: MacAddr,
    },
    /// There are as many ports as there can be.
    #[error("network {network:?} has {most} ports, which is the most")]
    Ports {
        /// The network.
        network: Arc<str>,
        /// How many.
        most: usize,
    },
    /// More queues than a port has, or none.
    #[error("{queues} queues; a port has 1 to {most}")]
    Queues {
        /// What was asked for.
        queues: u16,
        /// The most.
        most: u16,
    },
    /// A queue cannot be as it should.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The host has no memory for a queue.
    #[error("no memory for a queue of {bytes} bytes")]
    Memory {
        /// What was asked for.
        bytes: usize,
    },
}
