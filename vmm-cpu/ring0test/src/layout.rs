//! Where everything is: the harness, and the arena that each scenario has to itself.

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;

/// Where the harness's code is loaded.
pub const HARNESS: u64 = 0x10_0000;
/// 64-bit code of the harness.
pub const HARNESS_64: u64 = HARNESS + 0x2000;
/// Entry points of the 256 vectors in long mode, 32 bytes each.
pub const STUBS_64: u64 = HARNESS + 0x4000;
/// Entry points of the 256 vectors in legacy mode, 16 bytes each.
pub const STUBS_32: u64 = HARNESS + 0x6000;
/// End of what the ELF image holds.
pub const HARNESS_END: u64 = HARNESS + 0x7000;
/// What the harness and the host share, see [`control`].
pub const CONTROL: u64 = 0x11_0000;
/// Top of the harness's stack.
pub const HARNESS_STACK: u64 = 0x11_2000;
/// The harness's IDT, for draining the local APIC.
pub const HARNESS_IDT: u64 = 0x11_3000;
/// First address after everything that the harness needs mapped.
pub const HARNESS_MAPPED: u64 = 0x11_4000;

/// The first arena.
pub const ARENAS: u64 = 0x40_0000;
/// Bytes of an arena.
pub const ARENA: u64 = 32 * PAGE;

/// The local APIC.
pub const APIC: u64 = 0xfee0_0000;

/// A segment of virtual-8086 mode whose first 64 KiB are the arena's, where there is paging.
pub const VIRTUAL_SEGMENT: u64 = 0x1000;

/// Port that ends the run.
pub const EXIT_PORT: u16 = 0xf4;

/// Words of the page at [`CONTROL`].
pub mod control {
    use super::CONTROL;

    /// How many scenarios were started.
    pub const STARTED: u64 = CONTROL;
    /// How many there are.
    pub const COUNT: u64 = CONTROL + 4;
    /// Arena of the running one.
    pub const CURRENT: u64 = CONTROL + 8;
    /// Set when all are done.
    pub const DONE: u64 = CONTROL + 12;
    /// Registers of the interrupted program.
    pub const SAVED_AX: u64 = CONTROL + 0x20;
    pub const SAVED_BX: u64 = CONTROL + 0x28;
    pub const SAVED_CX: u64 = CONTROL + 0x30;
    pub const SAVED_DX: u64 = CONTROL + 0x38;
    pub const SAVED_DS: u64 = CONTROL + 0x40;
    pub const VECTOR: u64 = CONTROL + 0x48;
    /// Operands of LGDT and LIDT: base at the next multiple of eight.
    pub const GDTR: u64 = CONTROL + 0x56;
    pub const IDTR: u64 = CONTROL + 0x66;
    pub const NO_IDT: u64 = CONTROL + 0x76;
    /// The harness's GDT.
    pub const GDT: u64 = CONTROL + 0x100;
}

/// Pages of an arena, as offsets from its start.
pub mod page {
    pub const HEADER: u64 = 0;
    pub const EVENTS: u64 = 0x1000;
    pub const GDT: u64 = 0x2000;
    pub const LDT: u64 = 0x3000;
    pub const IDT: u64 = 0x4000;
    pub const TSS: u64 = 0x5000;
    pub const CODE: u64 = 0x6000;
    pub const DATA: u64 = 0x7000;
    pub const DATA_2: u64 = 0x8000;
    pub const STACK: u64 = 0x9000;
    pub const INNER_STACK: u64 = 0xa000;
    pub const MIDDLE_STACK: u64 = 0xb000;
    pub const USER_STACK: u64 = 0xc000;
    pub const IST: u64 = 0xd000;
    pub const ROOT: u64 = 0xe000;
    pub const POINTERS: u64 = 0xf000;
    pub const DIRECTORY: u64 = 0x1_0000;
    pub const LOW_TABLE: u64 = 0x1_1000;
    pub const TABLE: u64 = 0x1_2000;
    pub const WINDOW_POINTERS: u64 = 0x1_3000;
    pub const WINDOW_DIRECTORY: u64 = 0x1_4000;
    pub const WINDOW_TABLE: u64 = 0x1_5000;
    pub const FRAME_A: u64 = 0x1_6000;
    pub const FRAME_B: u64 = 0x1_7000;
    pub const FRAME_C: u64 = 0x1_8000;
    pub const OTHER_TSS: u64 = 0x1_9000;
    pub const OTHER_STACK: u64 = 0x1_a000;
    pub const FAULT_TSS: u64 = 0x1_b000;
    pub const FAULT_STACK: u64 = 0x1_c000;
    pub const HIGH_DIRECTORY: u64 = 0x1_d000;
    pub const OTHER_ROOT: u64 = 0x1_e000;
    pub const SPARE: u64 = 0x1_f000;

    /// Names, in order.
    pub const NAMES: [&str; 32] = [
        "header",
        "events",
        "GDT",
        "LDT",
        "IDT",
        "TSS",
        "code",
        "data",
        "data 2",
        "stack",
        "inner stack",
        "middle stack",
        "user stack",
        "IST",
        "root table",
        "page directory pointers",
        "page directory",
        "low page table",
        "page table",
        "window pointers",
        "window directory",
        "window table",
        "frame A",
        "frame B",
        "frame C",
        "other TSS",
        "other stack",
        "fault TSS",
        "fault stack",
        "high directory",
        "other root",
        "spare",
    ];
}

/// Fields of an arena's header: the state that the scenario starts with.
pub mod header {
    pub const LONG: u64 = 0x000;
    /// See [`flag`](super::flag).
    pub const FLAGS: u64 = 0x004;
    pub const CR0: u64 = 0x008;
    pub const CR3: u64 = 0x010;
    pub const CR4: u64 = 0x018;
    pub const EFER: u64 = 0x020;
    pub const GDTR: u64 = 0x02e;
    pub const IDTR: u64 = 0x03e;
    pub const LDTR: u64 = 0x048;
    pub const TR: u64 = 0x04a;
    pub const ES: u64 = 0x04e;
    pub const FS: u64 = 0x050;
    pub const GS: u64 = 0x052;
    pub const DS: u64 = 0x054;
    pub const FS_BASE: u64 = 0x058;
    pub const GS_BASE: u64 = 0x060;
    pub const KERNEL_GS_BASE: u64 = 0x068;
    pub const STAR: u64 = 0x070;
    pub const LSTAR: u64 = 0x078;
    pub const CSTAR: u64 = 0x080;
    pub const FMASK: u64 = 0x088;
    pub const SYSENTER_CS: u64 = 0x090;
    pub const SYSENTER_ESP: u64 = 0x098;
    pub const SYSENTER_EIP: u64 = 0x0a0;
    pub const DR: u64 = 0x0a8;
    pub const DR7: u64 = 0x0c8;
    pub const DR6: u64 = 0x0d0;
    pub const CR2: u64 = 0x0d8;
    pub const CR8: u64 = 0x0e0;
    /// A bit for each vector whose handler returns.
    pub const RESUME: u64 = 0x0e8;
    pub const EVENT_COUNT: u64 = 0x108;
    pub const MAX_EVENTS: u64 = 0x10c;
    /// Sixteen general registers in the order of their encoding.
    pub const REGISTERS: u64 = 0x110;
    /// RIP, CS, RFLAGS, RSP, SS.
    pub const FRAME_64: u64 = 0x190;
    /// EBX, DS, then what IRETD takes: EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
    pub const START_32: u64 = 0x1c0;
    pub const FRAME_32: u64 = 0x1c8;
    /// ESP and SS for LSS.
    pub const STACK_32: u64 = 0x1d4;
}

/// Bits of [`header::FLAGS`].
pub mod flag {
    /// The local APIC is used, and brought to order before the next scenario.
    pub const APIC: u64 = 1 << 0;
    /// Handlers are entered through 16-bit gates.
    pub const NARROW_GATES: u64 = 1 << 1;
    /// Handlers that return write the EOI register.
    pub const EOI: u64 = 1 << 2;
    /// SS is flat, whatever the descriptor tables say of its selector.
    pub const FLAT_STACK: u64 = 1 << 3;
}

/// What the harness writes for each event.
pub mod event {
    pub const BYTES: u64 = 512;
    pub const MAX: u64 = 8;
    pub const VECTOR: u64 = 0x00;
    pub const REGISTERS: u64 = 0x08;
    /// The words at the top of the stack.
    pub const FRAME: u64 = 0x88;
    pub const FRAME_WORDS: u64 = 10;
    pub const CR0: u64 = 0xd8;
    pub const CR2: u64 = 0xe0;
    pub const CR3: u64 = 0xe8;
    pub const CR4: u64 = 0xf0;
    pub const CR8: u64 = 0xf8;
    pub const EFER: u64 = 0x100;
    pub const FS_BASE: u64 = 0x108;
    pub const GS_BASE: u64 = 0x110;
    pub const KERNEL_GS_BASE: u64 = 0x118;
    pub const DR6: u64 = 0x120;
    pub const DR7: u64 = 0x128;
    pub const CS: u64 = 0x130;
    pub const SS: u64 = 0x138;
    pub const DS: u64 = 0x140;
    pub const ES: u64 = 0x148;
    pub const FS: u64 = 0x150;
    pub const GS: u64 = 0x158;
    pub const TR: u64 = 0x160;
    pub const LDTR: u64 = 0x168;
    pub const FLAGS: u64 = 0x170;
    pub const GDTR: u64 = 0x17e;
    pub const IDTR: u64 = 0x18e;
}

/// Selectors that every GDT has, the harness's included as far as it needs them.
pub mod selector {
    pub const CODE_32: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE_64: u16 = 0x18;
    /// 32-bit code whose segment starts at the harness, for 16-bit gates.
    pub const HARNESS: u16 = 0x20;
    pub const USER_CODE_32: u16 = 0x2b;
    pub const USER_DATA: u16 = 0x33;
    pub const USER_CODE_64: u16 = 0x3b;
    pub const TSS: u16 = 0x40;
    pub const LDT: u16 = 0x50;
    pub const CODE_16: u16 = 0x60;
    pub const USER_CODE_16: u16 = 0x6b;
    pub const CONFORMING_32: u16 = 0x70;
    pub const CONFORMING_64: u16 = 0x78;
    pub const CODE_1: u16 = 0x81;
    pub const DATA_1: u16 = 0x89;
    pub const CODE_2: u16 = 0x92;
    pub const DATA_2: u16 = 0x9a;
    pub const DATA_16: u16 = 0xa0;
    pub const USER_DATA_16: u16 = 0xab;
    pub const OTHER_TSS: u16 = 0xb0;
    pub const FAULT_TSS: u16 = 0xc0;
    /// Entries from here on are the scenario's.
    pub const FREE: u16 = 0x100;
}

/// Vector of the software interrupt that ends a scenario.
pub const END_VECTOR: u8 = 0xe0;
