//! What executes the deprivileged guest: the traits [`Engine`] and [`Mmu`] that the Xen ABI works against.
//!
//! An engine runs guest kernel and guest user in ring 3 on page tables that the guest owns, and says why it came back.
//! It knows privilege modes, page-table roots and exceptions, and nothing of hypercalls.
//!
//! Threat model: all registers and all memory belong to a hostile guest, which may also destroy what the engine keeps
//! in guest-physical memory, since it owns its page tables. That ends the guest and nothing else: the host is protected
//! by the engine's confinement to guest-physical memory, and the engine believes nothing that it reads back.

mod descriptors;
mod exits;
mod layout;
mod machine;
mod native;
mod private;
mod ring3;
mod shim;

use std::fmt;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;

pub use descriptors::{FLAT_CS32, FLAT_CS64, FLAT_SS};
pub use layout::{Layout, PRIVATE_SLOT, PRIVATE_VA};
pub use machine::{Ring3Config, Ring3Machine};
pub use private::{M2P_SLOT, M2P_VA, XEN_M2P_VA};
pub use ring3::Ring3;

use crate::error::Result;
use crate::state::GeneralRegisters;

/// Which half of the guest runs. Both are in ring 3; what differs is the page-table root and what an exit means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestMode {
    /// The guest kernel, on the kernel root.
    #[default]
    Kernel,
    /// A program of the guest, on the user root.
    User,
}

/// The registers of one virtual processor that the ABI may look at and change between two stays in the guest.
///
/// Selectors are those that the guest sees; [`Engine::run`] loads them as IRET and MOV would, from the descriptors that
/// [`Engine::set_descriptor`] holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field without a text is the register of its name")]
pub struct Context {
    /// General registers, RIP and RFLAGS. The engine forces those flags that the guest may not choose: IF is set;
    /// IOPL, NT, VM, VIF and VIP are clear.
    pub general: GeneralRegisters,
    /// Which half runs, and so which root is active.
    pub mode: GuestMode,
    pub cs: u16,
    pub ss: u16,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
    pub fs_base: u64,
    /// GS base of the mode that runs.
    pub gs_base: u64,
    /// GS base of the other mode, which [`Context::switch_mode`] exchanges as SWAPGS does.
    pub other_gs_base: u64,
    /// Where the stack of mode kernel starts when it is entered from mode user.
    pub kernel_sp: u64,
}

impl Context {
    /// Changes the mode; the GS bases change places if it is another one.
    pub fn switch_mode(&mut self, mode: GuestMode) {
        if self.mode != mode {
            self.mode = mode;
            std::mem::swap(&mut self.gs_base, &mut self.other_gs_base);
        }
    }
}

/// Why [`Engine::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineExit {
    /// SYSCALL. RIP is the instruction after it and RFLAGS is as before it; RCX and R11 hold copies of both, or what a
    /// guest put there that came by another way. In mode kernel this is a hypercall.
    Syscall,
    /// An exception, with RIP where the processor says for it: at the instruction for faults, after it for traps.
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code; 0 for vectors without one ([`has_error_code`]).
        error_code: u32,
        /// The address that faulted (CR2), for vector 14; else 0.
        address: u64,
    },
    /// [`EngineHandle::kick`] arrived.
    Interrupted,
    /// The guest destroyed what the engine needs to go on, or ran into a triple fault. Running again gives this again.
    Crashed,
}

/// Whether an exception pushes an error code (Intel SDM 3A table 7-1).
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// What an engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineCapabilities {
    /// Rate of the time-stamp counter that the guest reads, in kHz.
    pub tsc_khz: u32,
    /// Bits of XCR0 that [`Engine::set_xcr0`] takes; 0 where the guest has no XSAVE.
    pub xcr0: u64,
    /// Whether 32-bit programs run in the guest's user mode.
    pub compatibility_mode: bool,
}

impl EngineCapabilities {
    /// A guest with that rate of the time-stamp counter, without XSAVE and 32-bit programs.
    pub fn new(tsc_khz: u32) -> Self {
        Self { tsc_khz, xcr0: 0, compatibility_mode: false }
    }
}

/// What an engine needs to know to do the ABI's work by itself, if it can: enter the guest kernel for system calls and page
/// faults of programs, and come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FastPath {
    /// Whether it may do any of it.
    pub enabled: bool,
    /// Where system calls enter the guest kernel; 0 to leave them to the ABI.
    pub syscall: u64,
    /// Whether that masks events.
    pub syscall_masks: bool,
    /// Where page faults enter the guest kernel; 0 to leave them to the ABI.
    pub page_fault: u64,
    /// Whether that masks events.
    pub page_fault_masks: bool,
    /// The `vcpu_info` of the virtual processor.
    pub vcpu_info: GuestAddress,
}

/// Page tables and what the processor caches of them.
///
/// Addresses are guest-physical and have been checked by the caller: page tables lie in the domain's RAM.
/// Methods act on this virtual processor; [`EngineHandle::flush`] reaches another one.
pub trait Mmu {
    /// Stores a page-table entry that may be live, aligned to 8 bytes, as one access. A change that takes away rights takes
    /// effect with the flush that the guest asks for; any change, on other virtual processors, with
    /// [`Mmu::publish_entries`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no RAM or the address is not aligned.
    fn write_entry(&mut self, gpa: GuestAddress, value: u64) -> Result<()>;

    /// As [`Mmu::write_entry`], and sets those bits of the mask `keep` that were set before, also where a processor sets
    /// them at this moment: accessed and dirty bits, which must not get lost. For a present entry in place of a present one.
    ///
    /// # Errors
    /// As [`Mmu::write_entry`].
    fn write_entry_keeping(&mut self, gpa: GuestAddress, value: u64, keep: u64) -> Result<()>;

    /// Lets entries that were written take effect on all virtual processors, those that are in the guest too.
    /// [`Engine::run`] begins with it, so it is for who tells another one of an entry before that: by a flush, by an event.
    /// An engine whose entries take effect as they are written has nothing to do.
    ///
    /// # Errors
    /// Whatever the host says.
    fn publish_entries(&mut self) -> Result<()> {
        Ok(())
    }

    /// Writes the engine's own entries, and the machine-to-physical table, into a top-level table that is to become
    /// a root, kernel or user. Call it once a table is pinned, and after the guest wrote to reserved slots. An engine
    /// that cannot show the table at [`XEN_M2P_VA`] too leaves loads from there to the ABI, as page faults.
    ///
    /// # Errors
    /// As [`Mmu::write_entry`].
    fn prepare_root(&mut self, gpa: GuestAddress, mode: GuestMode) -> Result<()>;

    /// The root of mode kernel. Flushes what the processor cached of non-global pages, as MOV to CR3 does.
    ///
    /// # Errors
    /// As [`Mmu::write_entry`].
    fn set_kernel_root(&mut self, gpa: GuestAddress) -> Result<()>;

    /// The root of mode user; `None` while there is none, and mode user cannot be entered.
    ///
    /// # Errors
    /// As [`Mmu::write_entry`].
    fn set_user_root(&mut self, gpa: Option<GuestAddress>) -> Result<()>;

    /// The root of mode kernel.
    fn kernel_root(&self) -> GuestAddress;

    /// The root of mode user.
    fn user_root(&self) -> Option<GuestAddress>;

    /// Forgets all cached translations, global ones too, before the guest runs again.
    fn flush_all(&mut self);

    /// Forgets the cached translation of one guest-virtual address, before the guest runs again.
    fn flush_page(&mut self, va: u64);
}

/// One virtual processor of a deprivileged guest.
pub trait Engine: Mmu + fmt::Debug + Send {
    /// Executes the guest until it needs the ABI or a kick arrives.
    ///
    /// Selectors of [`Engine::context`] that cannot be loaded give a #GP or #NP exit with the selector as error code
    /// before any instruction; so does mode user without a root: #GP(0).
    ///
    /// # Errors
    /// Only what the host or the backend below refuses; nothing that a guest does.
    fn run(&mut self) -> Result<EngineExit>;

    /// The registers. Changes count from the next [`Engine::run`].
    fn context(&mut self) -> &mut Context;

    /// Reaches this virtual processor from other threads.
    fn handle(&self) -> Arc<dyn EngineHandle>;

    /// What this engine can do.
    fn capabilities(&self) -> EngineCapabilities;

    /// The time-stamp counter as the guest would read it now.
    ///
    /// # Errors
    /// Whatever the host says.
    fn time_stamp(&mut self) -> Result<u64>;

    /// Entry `index` (0 to 8191) of the descriptor table that selectors are looked up in. Indices from 7168 up are
    /// the engine's own: they hold the flat segments of Xen's ABI. Code and data segments of privilege level 3 are
    /// taken; anything else is entered as not present, and the answer is `false`.
    fn set_descriptor(&mut self, index: u16, descriptor: u64) -> bool;

    /// What [`Engine::set_descriptor`] put there, or the engine's own; 0 where there is none.
    fn descriptor(&self, index: u16) -> u64;

    /// Whether the next floating-point instruction gives exception 7 (CR0.TS).
    fn set_task_switched(&mut self, set: bool);

    /// Says what the engine may do by itself. One that leaves everything to the ABI has no use for it.
    fn set_fast_path(&mut self, path: &FastPath) {
        let _ = path;
    }

    /// Sets XCR0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if it is not within [`EngineCapabilities::xcr0`].
    fn set_xcr0(&mut self, value: u64) -> Result<()>;

    /// A debug register: DR0 to DR3, DR6, DR7.
    fn debug_register(&mut self, number: u8) -> u64;

    /// Sets DR0 to DR3, DR6 or DR7. The engine clears in DR7 what would stop outside of the guest's own code.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no such register or it cannot hold the value.
    fn set_debug_register(&mut self, number: u8, value: u64) -> Result<()>;
}

/// Reaches a running [`Engine`] from any thread.
pub trait EngineHandle: fmt::Debug + Send + Sync {
    /// Makes [`Engine::run`], the current or the next one, return [`EngineExit::Interrupted`]. Kicks that arrive
    /// before it does count as one; none is lost.
    fn kick(&self);

    /// Lets that virtual processor forget its cached translations and returns when it has done so, or when it is
    /// not in the guest and will do so before it runs again.
    fn flush(&self);
}

#[cfg(test)]
mod tests;
