//! The page that tells a kernel what it has (Xen public/xen.h, `struct start_info`).

use vmm_memory::PAGE_SIZE;
use zerocopy::{Immutable, IntoBytes};

/// `mod_start` is a frame number.
pub(super) const SIF_MOD_START_PFN: u32 = 1 << 3;

/// Nobody needs the tree of frame lists that kernels build for toolstacks.
pub(super) const SIF_VIRT_P2M_4TOOLS: u32 = 1 << 4;

const MAGIC: &[u8; 14] = b"xen-3.0-x86_64";

/// The fields by which the start information is known, without the command line.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct StartInfo {
    pub(super) magic: [u8; 32],
    pub(super) nr_pages: u64,
    pub(super) shared_info: u64,
    pub(super) flags: u32,
    pub(super) pad_0: u32,
    pub(super) store_mfn: u64,
    pub(super) store_evtchn: u32,
    pub(super) pad_1: u32,
    pub(super) console_mfn: u64,
    pub(super) console_evtchn: u32,
    pub(super) pad_2: u32,
    pub(super) pt_base: u64,
    pub(super) nr_pt_frames: u64,
    pub(super) mfn_list: u64,
    pub(super) mod_start: u64,
    pub(super) mod_len: u64,
    pub(super) cmd_line: [u8; 1024],
    pub(super) first_p2m_pfn: u64,
    pub(super) nr_p2m_frames: u64,
}

impl Default for StartInfo {
    fn default() -> Self {
        let mut magic = [0; 32];
        for (to, from) in magic.iter_mut().zip(MAGIC) {
            *to = *from;
        }
        Self {
            magic,
            nr_pages: 0,
            shared_info: 0,
            flags: 0,
            pad_0: 0,
            store_mfn: 0,
            store_evtchn: 0,
            pad_1: 0,
            console_mfn: 0,
            console_evtchn: 0,
            pad_2: 0,
            pt_base: 0,
            nr_pt_frames: 0,
            mfn_list: 0,
            mod_start: 0,
            mod_len: 0,
            cmd_line: [0; 1024],
            first_p2m_pfn: 0,
            nr_p2m_frames: 0,
        }
    }
}

impl StartInfo {
    /// The command line; what does not fit with its NUL is cut off.
    pub(super) fn set_command_line(&mut self, text: &str) {
        for (to, from) in self.cmd_line.iter_mut().zip(text.bytes().take(super::MAX_COMMAND_LINE)) {
            *to = from;
        }
    }

    /// The whole page.
    pub(super) fn to_page(self) -> Vec<u8> {
        let mut page = self.as_bytes().to_vec();
        page.resize(usize::try_from(PAGE_SIZE).unwrap_or(page.len()), 0);
        page
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn fields_lie_where_the_abi_says() {
        assert_eq!(offset_of!(StartInfo, nr_pages), 32);
        assert_eq!(offset_of!(StartInfo, store_mfn), 56);
        assert_eq!(offset_of!(StartInfo, console_mfn), 72);
        assert_eq!(offset_of!(StartInfo, pt_base), 88);
        assert_eq!(offset_of!(StartInfo, cmd_line), 128);
        assert_eq!(offset_of!(StartInfo, first_p2m_pfn), 1152);
        assert_eq!(size_of::<StartInfo>(), 1168);
    }
}
