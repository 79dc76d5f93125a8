//! Page-table hypercalls (public/xen.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of a page-table entry.
#[allow(missing_docs, reason = "each constant is the bit of its name")]
pub mod entry {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITABLE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    /// What a processor sets by itself.
    pub const ACCESSED_DIRTY: u64 = ACCESSED | DIRTY;
    /// Of levels 2 and 3: maps a large page. On level 1 it is the PAT bit.
    pub const LARGE: u64 = 1 << 7;
    pub const GLOBAL: u64 = 1 << 8;
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// The frame, in place.
    pub const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

/// `struct mmu_update`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MmuUpdate {
    pub ptr: u64,
    pub val: u64,
}

/// Checked store to a page-table entry.
pub const NORMAL_PT_UPDATE: u64 = 0;
/// Store to the machine-to-physical table.
pub const MACHPHYS_UPDATE: u64 = 1;
/// As the first, with the accessed and dirty bits kept.
pub const PT_UPDATE_PRESERVE_AD: u64 = 2;
/// As the first for guests whose frames are not translated, which these are.
pub const PT_UPDATE_NO_TRANSLATE: u64 = 3;

/// `struct mmuext_op`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MmuextOp {
    pub cmd: u32,
    pub pad: u32,
    pub arg1: u64,
    pub arg2: u64,
}

/// Commands of `mmuext_op`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod mmuext {
    pub const PIN_L1_TABLE: u32 = 0;
    pub const PIN_L4_TABLE: u32 = 3;
    pub const UNPIN_TABLE: u32 = 4;
    pub const NEW_BASEPTR: u32 = 5;
    pub const TLB_FLUSH_LOCAL: u32 = 6;
    pub const INVLPG_LOCAL: u32 = 7;
    pub const TLB_FLUSH_MULTI: u32 = 8;
    pub const INVLPG_MULTI: u32 = 9;
    pub const TLB_FLUSH_ALL: u32 = 10;
    pub const INVLPG_ALL: u32 = 11;
    pub const FLUSH_CACHE: u32 = 12;
    pub const SET_LDT: u32 = 13;
    pub const NEW_USER_BASEPTR: u32 = 15;
    pub const CLEAR_PAGE: u32 = 16;
    pub const COPY_PAGE: u32 = 17;
    pub const FLUSH_CACHE_GLOBAL: u32 = 18;
    pub const MARK_SUPER: u32 = 19;
    pub const UNMARK_SUPER: u32 = 20;
}

/// Flags of `update_va_mapping`.
pub mod uvmf {
    /// Flush everything.
    pub const TLB_FLUSH: u64 = 1;
    /// Flush the one address.
    pub const INVLPG: u64 = 2;
    /// Which of the two.
    pub const TYPE_MASK: u64 = 3;
    /// On all virtual processors; any other value beside 0 is the address of a bitmap of them.
    pub const ALL: u64 = 4;
}

/// `struct multicall_entry`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct MulticallEntry {
    pub op: u64,
    pub result: u64,
    pub args: [u64; 6],
}
