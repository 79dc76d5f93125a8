//! The in-guest fast path: code in the guest that does what needs no VMM, so that the guest leaves for the rest alone.
//!
//! It takes over the frequent hypercalls (updates of page tables, roots, flushes, segment bases, IRET), system calls and page
//! faults of programs. Whatever it does not know, and whatever is unusual about what it knows, it leaves to the VMM, which
//! begins anew with the registers that the guest had: so nothing is wrong if the shim does nothing at all, and the ABI
//! is written once, in Rust, with this as an excerpt of it.
//!
//! # Where it runs
//! In ring 3, on the guest kernel's page tables, with the rights of the guest kernel and no more. Processors differ in where
//! SYSCALL goes: architecturally to ring 0, on one kind of KVM to ring 3; the same code serves both. (Where ring 0 is
//! cheap, a shim in ring 0 would save an IRETQ a call; it would have to be trusted not to be misled by the guest kernel,
//! which this one needs not.) Ring 0 has a few instructions only, which load CR3, flush a page, or leave by a port.
//!
//! # What protects whom
//! The user root shows one page of the shim to programs, readable and executable, and nothing to write. What loads CR3
//! on the way into the guest kernel takes it from a page that programs cannot reach, and so does what says where
//! the kernel is entered. The guest kernel can overwrite all of the shim: it is its own guest that suffers. The VMM
//! believes nothing that it reads in the data page; any value there is one that the guest could have had in a register.
//!
//! # Interruptions
//! A kick may find the guest in the middle of the shim. Before its last steps (`go_on_*` in `code.s`) it has changed nothing
//! that cannot be done again, so the VMM starts over from the saved registers; after that it finds the outcome in the
//! data page, and takes that.

mod code;
mod data;
mod pages;
mod place;

pub(super) use data::Data;
pub(super) use pages::ShimPages;
pub(super) use place::{Outcome, Place};

/// Slot of top-level tables with the shim's pages.
pub(super) const SHIM_SLOT: usize = 257;

/// Slot of kernel roots with the domain's memory, by guest-physical address.
pub(super) const WINDOW_SLOT: usize = 260;

/// Guest-virtual address of [`SHIM_SLOT`].
const SHIM_VA: u64 = 0xffff_8080_0000_0000;

/// Guest-virtual address of [`WINDOW_SLOT`].
const WINDOW_VA: u64 = 0xffff_8200_0000_0000;
