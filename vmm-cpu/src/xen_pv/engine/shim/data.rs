//! The data page of the shim.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What shim and engine tell each other, field by field as in `code.s`. The guest kernel can write there, so what the engine
/// reads is no more than a guess of the guest's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct Data {
    pub(crate) kernel_root_slot: u64,
    pub(crate) kernel_root: u64,
    pub(crate) user_root: u64,
    pub(crate) kernel_sp: u64,
    pub(crate) mode: u64,
    pub(crate) other_gs: u64,
    pub(crate) syscall_rip: u64,
    pub(crate) fault_rip: u64,
    pub(crate) fault_masks: u64,
    /// Address of the `vcpu_info`, in the window.
    pub(crate) info: u64,
    pub(crate) window: u64,
    pub(crate) marks: u64,
    pub(crate) frames: u64,
    pub(crate) map_frames: u64,
    pub(crate) m2p: u64,
    pub(crate) alone: u64,
    pub(crate) enabled: u64,
    pub(crate) kind: u64,
    pub(crate) flush: u64,
    pub(crate) flush_va: u64,
    pub(crate) saved: Saved,
    pub(crate) to: To,
    pub(crate) fast_hypercalls: u64,
    pub(crate) fast_system_calls: u64,
    pub(crate) fast_faults: u64,
    pub(crate) fast_returns: u64,
    pub(crate) frame_trap: [u64; 5],
    pub(crate) frame_fault: [u64; 5],
    pub(crate) frame_hypercall: [u64; 5],
    /// Whether the guest's selectors 0x33 and 0x2b are those of flat 64-bit code and data.
    pub(crate) flat_user: u64,
    pub(crate) syscall_masks: u64,
    pub(crate) vcpus: u64,
    pub(crate) frame_protection: [u64; 5],
    pub(crate) protection_rax: u64,
    /// Stays 0: what the shim divides by.
    pub(crate) zero: u64,
    /// Where the shim starts.
    pub(crate) base: u64,
    /// Whether the engine loads a null selector into GS.
    pub(crate) null_gs: u64,
}

/// The registers that the shim began with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct Saved {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rbp: u64,
    pub(crate) rsp: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
    pub(crate) r12: u64,
    pub(crate) r13: u64,
    pub(crate) r14: u64,
    pub(crate) r15: u64,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) cs: u64,
    pub(crate) ss: u64,
    pub(crate) error: u64,
    pub(crate) cr2: u64,
}

/// What the shim leaves with; the other registers are those it began with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct To {
    pub(crate) rax: u64,
    pub(crate) rcx: u64,
    pub(crate) r11: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
    pub(crate) gs: u64,
    pub(crate) other_gs: u64,
    pub(crate) mask: u64,
}

/// Values of [`Data::kind`].
pub(super) const KIND_HYPERCALL: u64 = 1;
pub(super) const KIND_TRAP: u64 = 2;
pub(super) const KIND_FAULT: u64 = 3;
pub(super) const KIND_PROTECTION: u64 = 4;

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::xen_pv::abi::mmu::{self, mmuext, uvmf};
    use crate::xen_pv::abi::vcpu::{VGCF_IN_SYSCALL, segbase, vcpuop};
    use crate::xen_pv::abi::{FLAT_CS64, FLAT_SS64, domid, nr, shared_info};

    #[test]
    fn numbers_are_those_of_the_abi() {
        let source = include_str!("code.s");
        for (name, number) in [
            ("NR_MMU_UPDATE", nr::MMU_UPDATE),
            ("NR_STACK_SWITCH", nr::STACK_SWITCH),
            ("NR_MULTICALL", nr::MULTICALL),
            ("NR_UPDATE_VA_MAPPING", nr::UPDATE_VA_MAPPING),
            ("NR_IRET", nr::IRET),
            ("NR_VCPU_OP", nr::VCPU_OP),
            ("NR_SET_SEGMENT_BASE", nr::SET_SEGMENT_BASE),
            ("NR_MMUEXT_OP", nr::MMUEXT_OP),
            ("MMU_MACHPHYS_UPDATE", mmu::MACHPHYS_UPDATE),
            ("MMU_PT_UPDATE_PRESERVE_AD", mmu::PT_UPDATE_PRESERVE_AD),
            ("MMUEXT_NEW_BASEPTR", mmuext::NEW_BASEPTR.into()),
            ("MMUEXT_TLB_FLUSH_LOCAL", mmuext::TLB_FLUSH_LOCAL.into()),
            ("MMUEXT_INVLPG_LOCAL", mmuext::INVLPG_LOCAL.into()),
            ("MMUEXT_TLB_FLUSH_MULTI", mmuext::TLB_FLUSH_MULTI.into()),
            ("MMUEXT_INVLPG_MULTI", mmuext::INVLPG_MULTI.into()),
            ("MMUEXT_TLB_FLUSH_ALL", mmuext::TLB_FLUSH_ALL.into()),
            ("MMUEXT_INVLPG_ALL", mmuext::INVLPG_ALL.into()),
            ("MMUEXT_NEW_USER_BASEPTR", mmuext::NEW_USER_BASEPTR.into()),
            ("SEGBASE_GS_USER", segbase::GS_USER),
            ("SEGBASE_GS_KERNEL", segbase::GS_KERNEL),
            ("SEGBASE_GS_USER_SEL", segbase::GS_USER_SEL),
            ("UVMF_INVLPG", uvmf::INVLPG),
            ("VCPUOP_IS_UP", vcpuop::IS_UP),
            ("INFO_PENDING", shared_info::UPCALL_PENDING),
            ("INFO_MASK", shared_info::UPCALL_MASK),
            ("INFO_CR2", shared_info::CR2),
        ] {
            assert!(source.contains(&format!(".set {name}, {number}\n")), "{name} is {number}");
        }
        for (name, number) in [
            ("DOMID_SELF", u64::from(domid::SELF)),
            ("VGCF_IN_SYSCALL", VGCF_IN_SYSCALL),
            ("FLAT_CS64", FLAT_CS64.into()),
            ("FLAT_SS64", FLAT_SS64.into()),
        ] {
            assert!(source.contains(&format!(".set {name}, {number:#x}\n")), "{name} is {number:#x}");
        }
    }

    #[test]
    fn fields_are_where_the_code_has_them() {
        let source = include_str!("code.s");
        for (name, offset) in [
            ("kernel_root_slot", offset_of!(Data, kernel_root_slot)),
            ("kernel_root", offset_of!(Data, kernel_root)),
            ("user_root", offset_of!(Data, user_root)),
            ("kernel_sp", offset_of!(Data, kernel_sp)),
            ("mode", offset_of!(Data, mode)),
            ("other_gs", offset_of!(Data, other_gs)),
            ("syscall_rip", offset_of!(Data, syscall_rip)),
            ("fault_rip", offset_of!(Data, fault_rip)),
            ("fault_masks", offset_of!(Data, fault_masks)),
            ("info", offset_of!(Data, info)),
            ("window", offset_of!(Data, window)),
            ("marks", offset_of!(Data, marks)),
            ("frames", offset_of!(Data, frames)),
            ("map_frames", offset_of!(Data, map_frames)),
            ("m2p", offset_of!(Data, m2p)),
            ("alone", offset_of!(Data, alone)),
            ("enabled", offset_of!(Data, enabled)),
            ("kind", offset_of!(Data, kind)),
            ("flush", offset_of!(Data, flush)),
            ("flush_va", offset_of!(Data, flush_va)),
            ("saved_rax", offset_of!(Data, saved)),
            ("saved_r15", offset_of!(Data, saved) + offset_of!(Saved, r15)),
            ("saved_cr2", offset_of!(Data, saved) + offset_of!(Saved, cr2)),
            ("to_rax", offset_of!(Data, to)),
            ("to_rip", offset_of!(Data, to) + offset_of!(To, rip)),
            ("to_mask", offset_of!(Data, to) + offset_of!(To, mask)),
            ("fast_hypercalls", offset_of!(Data, fast_hypercalls)),
            ("fast_returns", offset_of!(Data, fast_returns)),
            ("frame_trap", offset_of!(Data, frame_trap)),
            ("frame_hypercall", offset_of!(Data, frame_hypercall)),
            ("flat_user", offset_of!(Data, flat_user)),
            ("vcpus", offset_of!(Data, vcpus)),
            ("base", offset_of!(Data, base)),
            ("null_gs", offset_of!(Data, null_gs)),
            ("zero", offset_of!(Data, zero)),
        ] {
            let line = format!(".set {name}, DATA + {offset:#05x}\n");
            assert!(source.contains(&line), "{line}");
        }
    }
}
