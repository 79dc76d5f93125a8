//! Virtual processors: traps, callbacks, state and time (public/vcpu.h, callback.h, arch-x86/xen.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct trap_info`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct TrapInfo {
    pub vector: u8,
    pub flags: u8,
    pub cs: u16,
    pub pad: u32,
    pub address: u64,
}

impl TrapInfo {
    /// The lowest privilege that may use INT with this vector.
    pub fn dpl(&self) -> u8 {
        self.flags & 3
    }

    /// Whether event delivery is masked on entry.
    pub fn masks_events(&self) -> bool {
        self.flags & 4 != 0
    }
}

/// `struct iret_context`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct IretContext {
    pub rax: u64,
    pub r11: u64,
    pub rcx: u64,
    pub flags: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// `VGCF_in_syscall` of [`IretContext::flags`]: RCX and R11 need not be restored.
pub const VGCF_IN_SYSCALL: u64 = 1 << 8;

/// `struct callback_register`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct CallbackRegister {
    pub kind: u16,
    pub flags: u16,
    pub pad: u32,
    pub address: u64,
}

/// Types of callbacks, and the commands and flag of `callback_op`.
#[allow(missing_docs, reason = "each constant is the type of its name")]
pub mod callback {
    pub const OP_REGISTER: u64 = 0;
    pub const OP_UNREGISTER: u64 = 1;
    pub const EVENT: u16 = 0;
    pub const FAILSAFE: u16 = 1;
    pub const SYSCALL: u16 = 2;
    pub const SYSENTER_DEPRECATED: u16 = 3;
    pub const NMI: u16 = 4;
    pub const SYSENTER: u16 = 5;
    pub const SYSCALL32: u16 = 7;
    pub const MASK_EVENTS: u16 = 1;
}

/// Commands of `set_segment_base`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod segbase {
    pub const FS: u64 = 0;
    pub const GS_USER: u64 = 1;
    pub const GS_KERNEL: u64 = 2;
    pub const GS_USER_SEL: u64 = 3;
}

/// Commands of `vcpu_op`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod vcpuop {
    pub const INITIALISE: u64 = 0;
    pub const UP: u64 = 1;
    pub const DOWN: u64 = 2;
    pub const IS_UP: u64 = 3;
    pub const GET_RUNSTATE_INFO: u64 = 4;
    pub const REGISTER_RUNSTATE_MEMORY_AREA: u64 = 5;
    pub const SET_PERIODIC_TIMER: u64 = 6;
    pub const STOP_PERIODIC_TIMER: u64 = 7;
    pub const SET_SINGLESHOT_TIMER: u64 = 8;
    pub const STOP_SINGLESHOT_TIMER: u64 = 9;
    pub const REGISTER_VCPU_INFO: u64 = 10;
    pub const SEND_NMI: u64 = 11;
    pub const GET_PHYSID: u64 = 12;
    pub const REGISTER_VCPU_TIME_MEMORY_AREA: u64 = 13;
}

/// `struct vcpu_runstate_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct RunstateInfo {
    pub state: u32,
    pub pad: u32,
    pub state_entry_time: u64,
    pub time: [u64; 4],
}

/// States of a virtual processor.
#[allow(missing_docs, reason = "each constant is the state of its name")]
pub mod runstate {
    pub const RUNNING: u32 = 0;
    pub const RUNNABLE: u32 = 1;
    pub const BLOCKED: u32 = 2;
    pub const OFFLINE: u32 = 3;
    /// In `state_entry_time`: an update is in progress.
    pub const UPDATE: u64 = 1 << 63;
}

/// `struct vcpu_set_singleshot_timer`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct SingleshotTimer {
    pub timeout_abs_ns: u64,
    pub flags: u32,
    pub pad: u32,
}

/// `VCPU_SSHOTTMR_future`: a time in the past is an error.
pub const SINGLESHOT_FUTURE: u32 = 1;

/// `struct vcpu_register_vcpu_info`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct RegisterVcpuInfo {
    pub mfn: u64,
    pub offset: u32,
    pub rsvd: u32,
}

/// `struct vcpu_time_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct TimeInfo {
    pub version: u32,
    pub pad0: u32,
    pub tsc_timestamp: u64,
    pub system_time: u64,
    pub tsc_to_system_mul: u32,
    pub tsc_shift: i8,
    pub flags: u8,
    pub pad1: [u8; 2],
}

/// `struct cpu_user_regs` as guests see it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct UserRegs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub error_code: u32,
    pub entry_vector: u32,
    pub rip: u64,
    pub cs: u16,
    pub pad0: u16,
    pub saved_upcall_mask: u8,
    pub pad1: [u8; 3],
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub es: u64,
    pub ds: u64,
    pub fs: u64,
    pub gs: u64,
}

/// `struct vcpu_guest_context`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct VcpuGuestContext {
    pub fpu: [u8; 512],
    pub flags: u64,
    pub user_regs: UserRegs,
    pub traps: [TrapInfo; 256],
    pub ldt_base: u64,
    pub ldt_ents: u64,
    pub gdt_frames: [u64; 16],
    pub gdt_ents: u64,
    pub kernel_ss: u64,
    pub kernel_sp: u64,
    pub ctrlreg: [u64; 8],
    pub debugreg: [u64; 8],
    pub event_callback_eip: u64,
    pub failsafe_callback_eip: u64,
    pub syscall_callback_eip: u64,
    pub vm_assist: u64,
    pub fs_base: u64,
    pub gs_base_kernel: u64,
    pub gs_base_user: u64,
}

/// Flags of [`VcpuGuestContext::flags`].
#[allow(missing_docs, reason = "each constant is the flag of its name")]
pub mod vgcf {
    pub const IN_KERNEL: u64 = 1 << 2;
    pub const FAILSAFE_DISABLES_EVENTS: u64 = 1 << 3;
    pub const SYSCALL_DISABLES_EVENTS: u64 = 1 << 4;
    pub const ONLINE: u64 = 1 << 5;
}
