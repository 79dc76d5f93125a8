//! The domain builder: puts a paravirtual kernel into guest memory, with all that it finds there when it starts
//! (Xen public/xen.h, "Start-of-day memory layout").
//!
//! [`PvBoot`] says what is to start, [`PvBoot::plan`] where everything goes, and [`Plan::write`] writes it. The
//! [`PvEntry`] that comes back sets an engine's registers.
//!
//! Threat model: the kernel image is hostile. Its notes and segments place nothing outside of the domain's RAM, and
//! need no more room than that.

mod error;
mod plan;
mod start_info;
mod tables;

use std::borrow::Cow;

use vmm_memory::boot::{ImageFormat, KernelImage};
use vmm_memory::vm_memory::GuestAddress;

pub use error::{BuildError, BuildItem};
pub use plan::{Plan, Rings};

use super::engine::{Engine, GuestMode, Layout};
use crate::state::{GeneralRegisters, rflags};

/// Longest command line in bytes, without the NUL (`MAX_GUEST_CMDLINE`).
pub const MAX_COMMAND_LINE: usize = 1023;

/// The ELF, as it came or out of a bzImage.
#[derive(Clone, Debug)]
enum Kernel<'a> {
    Given(&'a KernelImage<'a>),
    Extracted(KernelImage<'static>),
}

/// What is to start.
#[derive(Clone, Debug)]
pub struct PvBoot<'a> {
    kernel: Kernel<'a>,
    command_line: Cow<'a, str>,
    initrd: &'a [u8],
}

impl<'a> PvBoot<'a> {
    /// A kernel: an ELF with Xen's notes, or a bzImage that holds one.
    ///
    /// # Errors
    /// [`BuildError::Image`] if the ELF in a bzImage cannot be had; [`BuildError::NotPv`] for other kernels.
    pub fn new(kernel: &'a KernelImage<'a>) -> Result<Self, BuildError> {
        let kernel = match kernel.extract_elf()? {
            Some(elf) => Kernel::Extracted(elf),
            None => Kernel::Given(kernel),
        };
        let boot = Self { kernel, command_line: Cow::Borrowed(""), initrd: &[] };
        let format = boot.kernel().format();
        if format != ImageFormat::Elf64 {
            return Err(BuildError::NotPv { what: format!("it is a file of format {format}") });
        }
        if !boot.kernel().xen_notes().is_some_and(vmm_memory::boot::XenNotes::is_pv) {
            return Err(BuildError::NotPv { what: "it has no Xen note ENTRY".to_owned() });
        }
        Ok(boot)
    }

    fn kernel(&self) -> &KernelImage<'_> {
        match &self.kernel {
            Kernel::Given(kernel) => kernel,
            Kernel::Extracted(kernel) => kernel,
        }
    }

    /// The command line, without a NUL, up to [`MAX_COMMAND_LINE`] bytes.
    #[must_use]
    pub fn command_line(mut self, text: impl Into<Cow<'a, str>>) -> Self {
        self.command_line = text.into();
        self
    }

    /// The initial RAM disk; empty is none.
    #[must_use]
    pub fn initrd(mut self, bytes: &'a [u8]) -> Self {
        self.initrd = bytes;
        self
    }

    /// Finds a place for everything in a domain of that layout.
    ///
    /// # Errors
    /// [`BuildError`] naming the note, segment or string that does not fit.
    pub fn plan(&self, layout: Layout) -> Result<Plan<'_>, BuildError> {
        Plan::new(self, layout)
    }
}

/// How the first virtual processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PvEntry {
    /// Guest-virtual address of the first instruction.
    pub rip: u64,
    /// End of the boot stack.
    pub rsp: u64,
    /// Guest-virtual address of the start information.
    pub start_info: u64,
    /// The root of the page tables.
    pub root: GuestAddress,
}

impl PvEntry {
    /// Sets an engine's registers and root (Xen's `arch_set_info_guest` with what the toolstack gives).
    ///
    /// # Errors
    /// What the engine says.
    pub fn apply(&self, engine: &mut dyn Engine) -> crate::Result<()> {
        engine.prepare_root(self.root, GuestMode::Kernel)?;
        engine.set_kernel_root(self.root)?;
        let context = engine.context();
        context.switch_mode(GuestMode::Kernel);
        context.general = GeneralRegisters {
            rip: self.rip,
            rsp: self.rsp,
            rsi: self.start_info,
            rflags: rflags::FIXED | rflags::IF,
            ..GeneralRegisters::default()
        };
        (context.cs, context.ss) = (super::engine::FLAT_CS64, super::engine::FLAT_SS);
        (context.ds, context.es, context.fs, context.gs) = (0, 0, 0, 0);
        (context.fs_base, context.gs_base, context.other_gs_base) = (0, 0, 0);
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
