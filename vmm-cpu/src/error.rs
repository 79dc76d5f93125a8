//! The error type of the whole crate.

use std::error::Error as StdError;
use std::fmt;

use vmm_memory::vm_memory::GuestAddress;

use crate::vcpu::UnhandledInstruction;

/// What went wrong in a backend, in creating a virtual machine, or in running it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend needs something of the host that is not there.
    #[error("{backend}: {path} is absent: {hint}")]
    HostInterfaceAbsent {
        /// Name of the backend.
        backend: &'static str,
        /// The path that was opened.
        path: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The host has the interface and refuses this user.
    #[error("{backend}: no permission to open {path}: {hint}")]
    PermissionDenied {
        /// Name of the backend.
        backend: &'static str,
        /// The path that was opened.
        path: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The host interface lacks a feature that the backend cannot do without.
    #[error("{backend}: the host lacks {what}")]
    HostTooOld {
        /// Name of the backend.
        backend: &'static str,
        /// The missing capability or version.
        what: String,
    },
    /// No backend of that name is compiled in.
    #[error("no backend named {name:?} is compiled in; there is: {available}")]
    UnknownBackend {
        /// The name asked for.
        name: String,
        /// The names that exist, separated by commas.
        available: String,
    },
    /// The backend, or the way this virtual machine was configured, has no such capability.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What stands against it.
        why: String,
    },
    /// A value given by the caller is outside of what is allowed.
    #[error("{what} is {value}, allowed is {allowed}")]
    InvalidArgument {
        /// Name of the argument.
        what: &'static str,
        /// The value given.
        value: String,
        /// The range or set of allowed values.
        allowed: String,
    },
    /// Two memory regions share guest-physical addresses.
    #[error(
        "region {gpa:#x}+{len:#x} overlaps region {other_gpa:#x}+{other_len:#x}, which is mapped already",
        gpa = .gpa.0, other_gpa = .other_gpa.0
    )]
    RegionOverlap {
        /// First guest-physical address of the refused region.
        gpa: GuestAddress,
        /// Its length in bytes.
        len: u64,
        /// First guest-physical address of the region in the way.
        other_gpa: GuestAddress,
        /// Its length in bytes.
        other_len: u64,
    },
    /// No memory region starts at that address.
    #[error("no memory region is mapped at {gpa:#x}", gpa = .gpa.0)]
    NoSuchRegion {
        /// The guest-physical address asked for.
        gpa: GuestAddress,
    },
    /// More vCPUs than the virtual machine was created for, or than the host allows.
    #[error("vCPU {index} is refused: {limit} vCPUs at most ({reason})")]
    TooManyVcpus {
        /// Index of the refused vCPU (for a VM: number of vCPUs asked for, minus one).
        index: u32,
        /// The limit.
        limit: u32,
        /// Whose limit it is.
        reason: &'static str,
    },
    /// The vCPU of that index exists already.
    #[error("vCPU {index} exists already")]
    VcpuExists {
        /// The index.
        index: u32,
    },
    /// The backend met an instruction or a situation that it cannot execute.
    #[error(transparent)]
    Unhandled(#[from] Box<UnhandledInstruction>),
    /// The processor refused to enter the guest (hardware-assisted backends).
    #[error("vCPU {index}: guest entry failed, hardware reason {reason:#x} on host CPU {host_cpu}")]
    EntryFailed {
        /// Index of the vCPU.
        index: u32,
        /// The processor's own reason (Intel SDM 3C appendix C; AMD APM 2 appendix C).
        reason: u64,
        /// Host CPU it happened on.
        host_cpu: u32,
    },
    /// The backend stopped for a reason that this crate does not know.
    #[error("vCPU {index}: unexpected exit: {exit}")]
    UnexpectedExit {
        /// Index of the vCPU.
        index: u32,
        /// The exit, as the backend names it.
        exit: String,
    },
    /// The host could not give the guest the memory behind an address that is mapped: a file that became shorter, or a pool
    /// that has no page left.
    #[error("vCPU {index}: the host has no memory for {len:#x} bytes at {gpa:#x}, which are mapped", gpa = .gpa.0)]
    NoHostMemory {
        /// Index of the vCPU.
        index: u32,
        /// The guest-physical address.
        gpa: GuestAddress,
        /// Length in bytes.
        len: u64,
    },
    /// The host's kernel wrote over dirty pages that nobody had collected yet. Which ones cannot be known, so all pages count
    /// as dirty, and the log says nothing any more.
    #[error("kvm: a dirty ring of {entries} entries was overrun; use a larger one, or the bitmap")]
    DirtyRingOverrun {
        /// Entries of each ring.
        entries: u32,
    },
    /// A saved state does not fit here.
    #[error("state element {element}: {problem}")]
    InvalidState {
        /// Name of the element of [`CpuState`](crate::state::CpuState) or [`VmState`](crate::state::VmState).
        element: &'static str,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// The host refused a request of the backend.
    #[error("{backend}: {operation} failed")]
    Host {
        /// Name of the backend.
        backend: &'static str,
        /// The request, by its documented name.
        operation: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU thread ended by a panic in a callback.
    #[error("the thread of vCPU {index} panicked: {message}")]
    ThreadPanicked {
        /// Index of the vCPU.
        index: u32,
        /// What the panic said.
        message: String,
    },
    /// An error of a backend outside this crate.
    #[error("{backend}: {source}")]
    Backend {
        /// Name of the backend.
        backend: &'static str,
        /// The backend's own error.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`] from displayable parts.
    pub fn invalid(what: &'static str, value: impl fmt::Display, allowed: impl fmt::Display) -> Self {
        Self::InvalidArgument { what, value: value.to_string(), allowed: allowed.to_string() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: &'static str, why: impl Into<String>) -> Self {
        Self::Unsupported { what, why: why.into() }
    }
}

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
