//! What can go wrong when shared memory is joined.

use std::io;
use std::sync::Arc;

use vmm_memory::{Access, MemoryError};

use super::server::ProtocolError;
use crate::pci::PciError;

/// Why there is no such region, seat or device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IvshmemError {
    /// A region of a size that no BAR has.
    #[error("region {region:?} of {size:#x} bytes; allowed are powers of two from 0x1000 on")]
    Size {
        /// Its name.
        region: Arc<str>,
        /// Its size in bytes.
        size: u64,
    },
    /// More vectors than a peer may have.
    #[error("{vectors} vectors; allowed are 1 to {max}")]
    Vectors {
        /// How many.
        vectors: u16,
        /// How many there may be.
        max: u16,
    },
    /// A grant for something else.
    #[error("a grant for region {granted:?} opens no region {region:?}")]
    WrongRegion {
        /// What the grant is for.
        granted: Arc<str>,
        /// What was to be opened.
        region: Arc<str>,
    },
    /// The grant is for more than the memory allows.
    #[error("region {region:?} is read-only here, and the grant is for {granted:?}")]
    Access {
        /// The region.
        region: Arc<str>,
        /// What the grant is for.
        granted: Access,
    },
    /// The right was taken back before it was used.
    #[error("the right to region {region:?} has been revoked")]
    Revoked {
        /// The region.
        region: Arc<str>,
    },
    /// A position that another one has.
    #[error("position {position} of region {region:?} is taken")]
    Taken {
        /// The position.
        position: u16,
        /// The region.
        region: Arc<str>,
    },
    /// All seats are taken.
    #[error("region {region:?} has {max} peers, as many as it takes")]
    Full {
        /// The region.
        region: Arc<str>,
        /// How many it takes.
        max: usize,
    },
    /// Peers that are gone have passed what takes long to close.
    #[error("region {region:?} takes nobody while {left} connections are being closed; {max} may be")]
    Closing {
        /// The region.
        region: Arc<str>,
        /// How many are.
        left: usize,
        /// How many may be before nobody is taken.
        max: usize,
    },
    /// A server that does not keep to the protocol, or is gone.
    #[error("the server of region {region:?}")]
    Protocol {
        /// The region.
        region: Arc<str>,
        /// What it did.
        source: ProtocolError,
    },
    /// The memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its configuration space cannot be.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The host refused something.
    #[error("{operation} failed")]
    Host {
        /// What was attempted.
        operation: &'static str,
        /// What the host answered.
        source: io::Error,
    },
}

impl IvshmemError {
    pub(super) fn host(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { operation, source }
    }
}
