//! Memory reservation and maps (public/memory.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Commands of `memory_op`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod memop {
    pub const INCREASE_RESERVATION: u64 = 0;
    pub const DECREASE_RESERVATION: u64 = 1;
    pub const MAXIMUM_RAM_PAGE: u64 = 2;
    pub const CURRENT_RESERVATION: u64 = 3;
    pub const MAXIMUM_RESERVATION: u64 = 4;
    pub const MACHPHYS_MFN_LIST: u64 = 5;
    pub const POPULATE_PHYSMAP: u64 = 6;
    pub const MEMORY_MAP: u64 = 9;
    pub const EXCHANGE: u64 = 11;
    pub const MACHPHYS_MAPPING: u64 = 12;
    pub const MAXIMUM_GPFN: u64 = 14;
    /// The command proper: the bits above are where an interrupted call goes on.
    pub const MASK: u64 = 0x3f;
    /// Where the extent begins at which an interrupted call goes on.
    pub const EXTENT_SHIFT: u32 = 6;
}

/// `struct xen_memory_reservation`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct Reservation {
    pub extent_start: u64,
    pub nr_extents: u64,
    pub extent_order: u32,
    pub mem_flags: u32,
    pub domid: u16,
    pub pad: [u16; 3],
}

/// `struct xen_machphys_mapping`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MachphysMapping {
    pub v_start: u64,
    pub v_end: u64,
    pub max_mfn: u64,
}

/// `struct xen_memory_map`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MemoryMap {
    pub nr_entries: u32,
    pub pad: u32,
    pub buffer: u64,
}

/// An entry of such a map: as INT 15h, AX=E820h gives it (ACPI 6.5 15.4).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
#[allow(missing_docs, reason = "the fields are those of the specification")]
pub struct E820Entry {
    pub address: u64,
    pub size: u64,
    pub kind: u32,
}

/// [`E820Entry::kind`] of RAM.
pub const E820_RAM: u32 = 1;
