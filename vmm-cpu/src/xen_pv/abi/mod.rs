//! Numbers and structures of Xen's PV interface for 64-bit guests (Xen public/xen.h and its siblings).
//!
//! All structures are plain bytes with every gap named, so that what is copied to a guest holds nothing else.
//!
#![doc = include_str!("../../../docs/xen-pv-abi.md")]

pub mod errno;
pub mod event;
pub mod grant;
pub mod memory;
pub mod mmu;
pub mod sched;
pub mod vcpu;

/// Hypercall numbers (public/xen.h, `__HYPERVISOR_*`).
#[allow(missing_docs, reason = "each constant is the hypercall of its name")]
pub mod nr {
    pub const SET_TRAP_TABLE: u64 = 0;
    pub const MMU_UPDATE: u64 = 1;
    pub const SET_GDT: u64 = 2;
    pub const STACK_SWITCH: u64 = 3;
    pub const SET_CALLBACKS: u64 = 4;
    pub const FPU_TASKSWITCH: u64 = 5;
    pub const SCHED_OP_COMPAT: u64 = 6;
    pub const PLATFORM_OP: u64 = 7;
    pub const SET_DEBUGREG: u64 = 8;
    pub const GET_DEBUGREG: u64 = 9;
    pub const UPDATE_DESCRIPTOR: u64 = 10;
    pub const MEMORY_OP: u64 = 12;
    pub const MULTICALL: u64 = 13;
    pub const UPDATE_VA_MAPPING: u64 = 14;
    pub const SET_TIMER_OP: u64 = 15;
    pub const XEN_VERSION: u64 = 17;
    pub const CONSOLE_IO: u64 = 18;
    pub const GRANT_TABLE_OP: u64 = 20;
    pub const VM_ASSIST: u64 = 21;
    pub const UPDATE_VA_MAPPING_OTHERDOMAIN: u64 = 22;
    pub const IRET: u64 = 23;
    pub const VCPU_OP: u64 = 24;
    pub const SET_SEGMENT_BASE: u64 = 25;
    pub const MMUEXT_OP: u64 = 26;
    pub const NMI_OP: u64 = 28;
    pub const SCHED_OP: u64 = 29;
    pub const CALLBACK_OP: u64 = 30;
    pub const EVENT_CHANNEL_OP: u64 = 32;
    pub const PHYSDEV_OP: u64 = 33;
}

/// Domain identifiers (public/xen.h, `DOMID_*`).
pub mod domid {
    /// The caller itself.
    pub const SELF: u16 = 0x7ff0;
    /// Machine memory that is not RAM.
    pub const IO: u16 = 0x7ff1;
    /// The domain that the virtual machine monitor's back ends stand for.
    pub const BACKEND: u16 = 0;
}

/// Features (public/features.h): submap 0 as `xen_version` gives it.
pub mod features {
    /// `MMU_PT_UPDATE_PRESERVE_AD` exists; Linux needs it.
    pub const MMU_PT_UPDATE_PRESERVE_AD: u32 = 1 << 5;
    /// Grant mappings keep the guest's available bits; Linux needs it.
    pub const GNTTAB_MAP_AVAIL_BITS: u32 = 1 << 7;
    /// What is announced.
    pub const ALL: u32 = MMU_PT_UPDATE_PRESERVE_AD | GNTTAB_MAP_AVAIL_BITS;
}

/// Assists (public/xen.h, `VMASST_*`).
pub mod vm_assist {
    /// `VMASST_CMD_enable`.
    pub const ENABLE: u64 = 0;
    /// `VMASST_CMD_disable`.
    pub const DISABLE: u64 = 1;
    /// Segments that leave out Xen's hole; only 32-bit guests feel it.
    pub const FOUR_GB_SEGMENTS: u64 = 0;
    /// Report of the same.
    pub const FOUR_GB_SEGMENTS_NOTIFY: u64 = 1;
    /// The guest may store to its page tables directly.
    pub const WRITABLE_PAGETABLES: u64 = 2;
    /// IOPL is part of the flags in frames.
    pub const ARCHITECTURAL_IOPL: u64 = 4;
    /// Bit 63 of `state_entry_time` marks an update in progress.
    pub const RUNSTATE_UPDATE_FLAG: u64 = 5;
}

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// The same, as the size of something in the host's memory.
pub const PAGE_BYTES: usize = 4096;

/// The code selector of guest kernel and 64-bit programs (`FLAT_RING3_CS64`).
pub const FLAT_CS64: u16 = 0xe033;

/// The code selector of 32-bit programs (`FLAT_USER_CS32`).
pub const FLAT_CS32: u16 = 0xe023;

/// The stack selector of all (`FLAT_RING3_SS64`).
pub const FLAT_SS64: u16 = 0xe02b;

/// First GDT entry that is Xen's own.
pub const FIRST_RESERVED_GDT_ENTRY: u64 = 14 * 512;

/// Virtual interrupts (public/xen.h, `VIRQ_*`).
pub mod virq {
    /// A timer has run out.
    pub const TIMER: u32 = 0;
    /// The guest shall print what it knows.
    pub const DEBUG: u32 = 1;
    /// Profiling sample.
    pub const XENOPROF: u32 = 7;
    /// Performance counter.
    pub const XENPMU: u32 = 13;
    /// How many there are.
    pub const COUNT: u32 = 24;

    /// Whether every virtual processor has its own.
    pub fn is_per_vcpu(virq: u32) -> bool {
        matches!(virq, TIMER | DEBUG | XENOPROF | XENPMU)
    }
}

/// Layout of `struct shared_info` and `struct vcpu_info`, as offsets: the guest writes there at any time, so that fields
/// are accessed one by one.
#[allow(missing_docs, reason = "each constant is the offset of the field of its name")]
pub mod shared_info {
    pub const VCPU_INFO: u64 = 0;
    /// Virtual processors whose `vcpu_info` is in the page.
    pub const LEGACY_VCPUS: u32 = 32;
    pub const EVTCHN_PENDING: u64 = 2048;
    pub const EVTCHN_MASK: u64 = 2048 + 512;
    pub const WC_VERSION: u64 = 3072;
    pub const WC_SEC: u64 = 3076;
    pub const WC_NSEC: u64 = 3080;
    pub const WC_SEC_HI: u64 = 3084;

    /// Bytes of a `vcpu_info`.
    pub const VCPU_INFO_SIZE: u64 = 64;
    pub const VCPU_INFO_BYTES: usize = 64;
    pub const UPCALL_PENDING: u64 = 0;
    pub const UPCALL_MASK: u64 = 1;
    pub const PENDING_SEL: u64 = 8;
    pub const CR2: u64 = 16;
    pub const TIME: u64 = 32;
}
