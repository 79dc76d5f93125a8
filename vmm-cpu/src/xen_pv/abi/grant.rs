//! Grant tables, version 1 (public/grant_table.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries of a frame of the table.
pub const ENTRIES_PER_FRAME: u32 = 512;

/// Entries that are set aside for console and xenstore.
pub const RESERVED_ENTRIES: u32 = 8;

/// Commands of `grant_table_op`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod gnttabop {
    pub const MAP_GRANT_REF: u64 = 0;
    pub const UNMAP_GRANT_REF: u64 = 1;
    pub const SETUP_TABLE: u64 = 2;
    pub const DUMP_TABLE: u64 = 3;
    pub const TRANSFER: u64 = 4;
    pub const COPY: u64 = 5;
    pub const QUERY_SIZE: u64 = 6;
    pub const UNMAP_AND_REPLACE: u64 = 7;
    pub const SET_VERSION: u64 = 8;
    pub const GET_STATUS_FRAMES: u64 = 9;
    pub const GET_VERSION: u64 = 10;
    pub const SWAP_GRANT_REF: u64 = 11;
}

/// Flags of an entry.
#[allow(missing_docs, reason = "each constant is the flag of its name")]
pub mod gtf {
    pub const TYPE_MASK: u16 = 3;
    pub const PERMIT_ACCESS: u16 = 1;
    pub const READONLY: u16 = 1 << 2;
    pub const READING: u16 = 1 << 3;
    pub const WRITING: u16 = 1 << 4;
    pub const SUB_PAGE: u16 = 1 << 8;
}

/// Results in structures (`GNTST_*`).
#[allow(missing_docs, reason = "each constant is the result of its name")]
pub mod gntst {
    pub const OKAY: i16 = 0;
    pub const GENERAL_ERROR: i16 = -1;
    pub const BAD_DOMAIN: i16 = -2;
    pub const BAD_GNTREF: i16 = -3;
    pub const BAD_HANDLE: i16 = -4;
    pub const PERMISSION_DENIED: i16 = -8;
    pub const BAD_PAGE: i16 = -9;
    pub const BAD_COPY_ARG: i16 = -10;
}

/// `struct grant_entry_v1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct GrantEntry {
    pub flags: u16,
    pub domid: u16,
    pub frame: u32,
}

/// `struct gnttab_setup_table`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct SetupTable {
    pub dom: u16,
    pub pad0: u16,
    pub nr_frames: u32,
    pub status: i16,
    pub pad1: [u16; 3],
    pub frame_list: u64,
}

/// `struct gnttab_query_size`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct QuerySize {
    pub dom: u16,
    pub pad0: u16,
    pub nr_frames: u32,
    pub max_nr_frames: u32,
    pub status: i16,
    pub pad1: u16,
}

/// `struct gnttab_get_version`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct GetVersion {
    pub dom: u16,
    pub pad: u16,
    pub version: u32,
}

/// `struct gnttab_map_grant_ref`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MapGrantRef {
    pub host_addr: u64,
    pub flags: u32,
    pub reference: u32,
    pub dom: u16,
    pub status: i16,
    pub handle: u32,
    pub dev_bus_addr: u64,
}

/// `struct gnttab_unmap_grant_ref`, and `gnttab_unmap_and_replace` with its second address at the same place.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct UnmapGrantRef {
    pub host_addr: u64,
    pub dev_bus_addr: u64,
    pub handle: u32,
    pub status: i16,
    pub pad: u16,
}

/// One end of a [`GrantCopy`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct CopyEnd {
    /// A grant reference or a frame.
    pub place: u64,
    pub domid: u16,
    pub offset: u16,
    pub pad: u32,
}

/// `struct gnttab_copy`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct GrantCopy {
    pub source: CopyEnd,
    pub dest: CopyEnd,
    pub len: u16,
    pub flags: u16,
    pub status: i16,
    pub pad: u16,
}

/// `GNTCOPY_source_gref`: the source is a grant reference.
pub const COPY_SOURCE_GREF: u16 = 1;

/// `GNTCOPY_dest_gref`: the destination is a grant reference.
pub const COPY_DEST_GREF: u16 = 2;

/// `struct gnttab_swap_grant_ref`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct SwapGrantRef {
    pub ref_a: u32,
    pub ref_b: u32,
    pub status: i16,
    pub pad: u16,
}
