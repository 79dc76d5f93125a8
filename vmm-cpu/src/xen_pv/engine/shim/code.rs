//! The machine code of the shim, assembled into this crate, and where its parts are.
#![allow(unsafe_code, reason = "the image and its labels are data that an assembler puts into the binary")]

/// Bytes of the image.
pub(super) const SIZE: usize = 0x2000;

/// Offsets in the image, in the order of `code.s`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Labels {
    pub(super) user_syscall: u32,
    pub(super) user_syscall_end: u32,
    pub(super) user_landing: u32,
    pub(super) user_landing_end: u32,
    pub(super) user_trap: u32,
    pub(super) user_trap_swapped: u32,
    pub(super) user_fault: u32,
    pub(super) user_fault_swapped: u32,
    pub(super) kernel_protection: u32,
    pub(super) gates_end: u32,
    pub(super) kernel_trap: u32,
    pub(super) patch_leave_user: u32,
    pub(super) patch_leave_user_whole: u32,
    pub(super) patch_load_root: u32,
    pub(super) patch_flush_page: u32,
    pub(super) leave_user: u32,
    pub(super) leave_user_whole: u32,
    pub(super) load_root: u32,
    pub(super) flush_page: u32,
    pub(super) hypercall: u32,
    pub(super) hypercall_saved: u32,
    pub(super) hypercall_ring3: u32,
    pub(super) go_on_user: u32,
    pub(super) go_on_entry: u32,
    pub(super) go_on_masking: u32,
    pub(super) go_on_kernel: u32,
    pub(super) go_on_end: u32,
    pub(super) fault: u32,
    pub(super) fault_swapped: u32,
    pub(super) fault_saved: u32,
    pub(super) trap: u32,
    pub(super) trap_swapped: u32,
    pub(super) trap_saved: u32,
    pub(super) program_saved: u32,
    pub(super) protection: u32,
    pub(super) protection_kept: u32,
    pub(super) protection_checked: u32,
    pub(super) protection_saved: u32,
    pub(super) protection_copied: u32,
}

#[cfg(target_arch = "x86_64")]
mod image {
    use super::{Labels, SIZE};

    core::arch::global_asm!(include_str!("code.s"));

    unsafe extern "C" {
        #[link_name = "vmm_cpu_xen_pv_shim_image"]
        static IMAGE: [u8; SIZE];
        #[link_name = "vmm_cpu_xen_pv_shim_labels"]
        static LABELS: Labels;
    }

    pub(super) fn get() -> Option<(&'static [u8; SIZE], Labels)> {
        // SAFETY: code.s defines both in a read-only section, the image with as many bytes as its last `.org` says, the
        // labels with one 32-bit word for each field, aligned to 4 bytes.
        Some(unsafe { (&IMAGE, LABELS) })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod image {
    use super::{Labels, SIZE};

    pub(super) fn get() -> Option<(&'static [u8; SIZE], Labels)> {
        None
    }
}

/// The image and its labels, where this crate has them.
pub(super) fn image() -> Option<(&'static [u8; SIZE], Labels)> {
    image::get()
}
