//! Why a domain could not be built.

use std::fmt;

use vmm_memory::boot::BootError;
use vmm_memory::vm_memory::GuestMemoryError;

/// A part of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BuildItem {
    /// A segment of the kernel.
    Segment(usize),
    /// The hypercall page.
    HypercallPage,
    /// The initial RAM disk.
    Initrd,
    /// The physical-to-machine table.
    P2m,
    /// The machine-to-physical table.
    M2p,
    /// The start information.
    StartInfo,
    /// The pages of console and xenstore.
    Rings,
    /// The page tables.
    PageTables,
    /// The boot stack.
    Stack,
}

impl fmt::Display for BuildItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(index) => write!(f, "program header {index}"),
            Self::HypercallPage => f.write_str("the hypercall page"),
            Self::Initrd => f.write_str("the initrd"),
            Self::P2m => f.write_str("the physical-to-machine table"),
            Self::M2p => f.write_str("the machine-to-physical table"),
            Self::StartInfo => f.write_str("the start information"),
            Self::Rings => f.write_str("the pages of console and xenstore"),
            Self::PageTables => f.write_str("the page tables"),
            Self::Stack => f.write_str("the boot stack"),
        }
    }
}

/// What stands against building a domain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel cannot be started by Xen's PV protocol.
    #[error(
        "the kernel cannot run paravirtualized: {what}; allowed: a 64-bit ELF, or a bzImage of one, built with CONFIG_XEN_PV or the like"
    )]
    NotPv {
        /// What it lacks.
        what: String,
    },
    /// The image is damaged.
    #[error(transparent)]
    Image(#[from] BootError),
    /// A value in the image is out of range.
    #[error("{field} is {value:#x}; allowed: {allowed}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The range.
        allowed: String,
    },
    /// The command line is too long.
    #[error("the command line has {length} bytes; allowed: {max}")]
    CommandLine {
        /// Its length in bytes.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// The command line holds a NUL.
    #[error("the command line holds a NUL byte")]
    Nul,
    /// The kernel wants a feature that is not there.
    #[error("the kernel needs the Xen feature {name:?}")]
    Feature {
        /// Its name (public/features.h, in lower case without the prefix).
        name: String,
    },
    /// The domain is too small.
    #[error("{item} ends at {end:#x}, beyond the domain's RAM of {ram:#x} bytes: give it more")]
    NoRoom {
        /// What did not fit.
        item: BuildItem,
        /// Where it would end.
        end: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// Guest memory could not be written: it is smaller than the layout says.
    #[error("{item} cannot be written at {address:#x}")]
    Write {
        /// What was written.
        item: BuildItem,
        /// Where.
        address: u64,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

impl From<BuildError> for crate::Error {
    fn from(error: BuildError) -> Self {
        Self::Backend { backend: super::super::NAME, source: Box::new(error) }
    }
}
