//! The one place where a mapping gets a NUMA policy: `mbind(2)` takes an address.

#![allow(unsafe_code, reason = "mbind(2) takes an address, and no crate here wraps it")]

use std::io;

use vm_memory::{MmapRegion, VolatileMemory};

use crate::numa::{NodeSet, NumaPolicy};
use crate::region::GuestRegion;

/// Linux `include/uapi/linux/mempolicy.h`.
const MPOL_PREFERRED: libc::c_ulong = 1;
const MPOL_BIND: libc::c_ulong = 2;
const MPOL_INTERLEAVE: libc::c_ulong = 3;
const MPOL_PREFERRED_MANY: libc::c_ulong = 5;

const BITS: u32 = libc::c_ulong::BITS;

/// Gives the whole mapping of `region` the policy, for pages that it gets from now on.
pub(crate) fn apply(region: &GuestRegion, policy: &NumaPolicy) -> io::Result<()> {
    let mode = match policy {
        NumaPolicy::Bind(_) => MPOL_BIND,
        NumaPolicy::Interleave(_) => MPOL_INTERLEAVE,
        NumaPolicy::Preferred(nodes) if nodes.len() == 1 => MPOL_PREFERRED,
        NumaPolicy::Preferred(_) => MPOL_PREFERRED_MANY,
    };
    let mask = mask(policy.nodes());
    // The kernel takes one bit off.
    let bits = libc::c_ulong::from(BITS) * mask.len() as libc::c_ulong + 1;
    let slice = MmapRegion::get_slice(region, 0, region.size()).map_err(io::Error::other)?;
    let address = slice.ptr_guard().as_ptr();
    // SAFETY: the range is a mapping that `region` keeps alive, the mask has as many bits as are said and is only read. A
    // policy changes neither contents nor rights of a mapping.
    let result =
        unsafe { libc::syscall(libc::SYS_mbind, address, region.size(), mode, mask.as_ptr(), bits, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One bit a node.
fn mask(nodes: &NodeSet) -> Vec<libc::c_ulong> {
    let words = nodes.iter().max().map_or(0, |last| last / BITS + 1);
    let word = |index| {
        nodes.iter().filter(|node| node / BITS == index).fold(0, |word, node| word | 1 << (node % BITS))
    };
    (0..words).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_one_bit_a_node() {
        let of = |text: &str| mask(&text.parse().unwrap());
        assert_eq!(of("0"), [1]);
        assert_eq!(of("1,3-5,63"), [1 << 63 | 0b11_1010]);
        assert_eq!(of("64,130"), [0, 1, 4]);
    }
}
