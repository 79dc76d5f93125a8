//! Entries into the guest kernel and returns from it: bounce frames, exceptions, system calls of programs, IRET.

use zerocopy::IntoBytes;

use super::abi::vcpu::{IretContext, VGCF_IN_SYSCALL};
use super::abi::{FLAT_CS32, FLAT_CS64, FLAT_SS64, shared_info, vm_assist};
use super::engine::{Engine, GuestMode, has_error_code};
use super::vcpu_abi::{Action, Callback, VcpuAbi};
use crate::error::Result;
use crate::state::rflags;

/// RFLAGS bits beside those of [`rflags`].
const IOPL: u64 = 3 << 12;
const NT: u64 = 1 << 14;
const RF: u64 = 1 << 16;
const VM: u64 = 1 << 17;
const AC: u64 = 1 << 18;
/// The bits that exist.
const ALL: u64 = 0x003f_7fd5;

/// Error code of a page fault: the page was present, a store, from user mode.
pub(crate) const PF_PRESENT: u32 = 1;
pub(crate) const PF_WRITE: u32 = 2;
pub(crate) const PF_USER: u32 = 4;
/// A reserved bit was set.
pub(crate) const PF_RESERVED: u32 = 8;

pub(crate) const INVALID_OPCODE: u8 = 6;
pub(crate) const DEVICE_NOT_AVAILABLE: u8 = 7;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
pub(crate) const PAGE_FAULT: u8 = 14;

/// An entry into the guest kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounce {
    pub(crate) rip: u64,
    pub(crate) error_code: Option<u32>,
    /// Whether events are masked in the handler.
    pub(crate) mask: bool,
}

impl VcpuAbi {
    /// Enters the guest kernel with a frame of what ran before (Xen's `create_bounce_frame`).
    pub(crate) fn bounce(&mut self, engine: &mut dyn Engine, bounce: Bounce) -> Result<Action> {
        let memory = &self.domain.memory;
        let mask_at = self.info() + shared_info::UPCALL_MASK;
        let masked = memory.load_byte(mask_at).unwrap_or(1) != 0;
        let root = engine.kernel_root();
        let context = engine.context();
        let before = *context;
        let (stack, cs) = match before.mode {
            GuestMode::Kernel => (before.general.rsp, before.cs & !3),
            GuestMode::User => (before.kernel_sp, before.cs),
        };
        let mut flags = before.general.rflags & !(rflags::IF | IOPL);
        if !masked {
            flags |= rflags::IF;
        }
        if self.domain.has_assist(vm_assist::ARCHITECTURAL_IOPL) {
            flags |= self.control.iopl << 12;
        }
        let mut frame = [0; 8];
        let mut words = frame.iter_mut();
        let head = [before.general.rcx, before.general.r11];
        let body = [
            before.general.rip,
            u64::from(cs) | u64::from(masked) << 32,
            flags,
            before.general.rsp,
            before.ss.into(),
        ];
        let error = bounce.error_code.map(u64::from);
        let mut count: u64 = 0;
        for (word, value) in words.by_ref().zip(head.into_iter().chain(error).chain(body)) {
            *word = value;
            count += 1;
        }
        let rsp = (stack & !15).wrapping_sub(count * 8);
        let bytes = frame.as_bytes().get(..usize::try_from(count * 8).unwrap_or(0)).unwrap_or_default();
        if memory.space(root).write_bytes(rsp, bytes).is_err() {
            return Ok(Action::Crash(format!(
                "no stack for an entry of the guest kernel: {rsp:#x}, from rip {:#x}",
                before.general.rip
            )));
        }
        if bounce.mask && memory.swap_byte(mask_at, 1).is_err() {
            return Ok(Action::Crash("no vcpu_info".to_owned()));
        }
        context.switch_mode(GuestMode::Kernel);
        context.general.rflags &= !(AC | VM | RF | NT | rflags::TF);
        context.general.rsp = rsp;
        context.general.rip = bounce.rip;
        context.cs = FLAT_CS64;
        context.ss = FLAT_SS64;
        Ok(Action::Continue)
    }

    /// Enters the guest's handler of a trap.
    pub(crate) fn inject(&mut self, engine: &mut dyn Engine, vector: u8, error_code: u32) -> Result<Action> {
        let trap = self.traps.get(usize::from(vector)).copied().unwrap_or_default();
        if trap.address == 0 {
            let general = engine.context().general;
            return Ok(Action::Crash(format!(
                "exception {vector} (error code {error_code:#x}, CR2 {:#x}) without a handler: {general}",
                self.control.cr2
            )));
        }
        let error_code = has_error_code(vector).then_some(error_code);
        self.bounce(engine, Bounce { rip: trap.address, error_code, mask: trap.masks_events() })
    }

    /// Enters the handler of an INT instruction, of which RIP is behind already.
    pub(crate) fn inject_software(&mut self, engine: &mut dyn Engine, vector: u8) -> Result<Action> {
        let trap = self.traps.get(usize::from(vector)).copied().unwrap_or_default();
        self.bounce(engine, Bounce { rip: trap.address, error_code: None, mask: trap.masks_events() })
    }

    /// Whether INT with this vector is allowed to whoever runs.
    pub(crate) fn may_use_vector(&self, vector: u8, mode: GuestMode) -> bool {
        let needed = if mode == GuestMode::Kernel { 1 } else { 3 };
        self.traps.get(usize::from(vector)).is_some_and(|trap| trap.address != 0 && trap.dpl() >= needed)
    }

    pub(crate) fn exception(
        &mut self,
        engine: &mut dyn Engine,
        vector: u8,
        error_code: u32,
        address: u64,
    ) -> Result<Action> {
        match vector {
            PAGE_FAULT => self.page_fault(engine, error_code, address),
            GENERAL_PROTECTION | INVALID_OPCODE => match self.emulate(engine, vector, error_code)? {
                Some(action) => Ok(action),
                None => self.inject(engine, vector, error_code),
            },
            DEVICE_NOT_AVAILABLE => {
                // As Xen: the guest's handler finds the flag clear.
                self.set_task_switched(engine, false);
                self.inject(engine, vector, error_code)
            }
            _ => self.inject(engine, vector, error_code),
        }
    }

    fn page_fault(&mut self, engine: &mut dyn Engine, error_code: u32, address: u64) -> Result<Action> {
        let mode = engine.context().mode;
        if mode == GuestMode::Kernel
            && error_code & PF_PRESENT != 0
            && self.repair(engine, error_code, address)?
        {
            return Ok(Action::Continue);
        }
        if mode == GuestMode::Kernel && error_code & PF_WRITE == 0 && self.load_from_m2p(engine, address) {
            return Ok(Action::Continue);
        }
        self.control.cr2 = address;
        if self.domain.memory.store(self.info() + shared_info::CR2, address).is_err() {
            return Ok(Action::Crash("no vcpu_info".to_owned()));
        }
        let user = if mode == GuestMode::User { PF_USER } else { 0 };
        self.inject(engine, PAGE_FAULT, error_code & !PF_USER | user)
    }

    /// SYSCALL of a program: by the entry for 32-bit code, if that is what ran and there is one.
    pub(crate) fn user_syscall(&mut self, engine: &mut dyn Engine) -> Result<Action> {
        let context = engine.context();
        let entry = match self.syscall32 {
            Callback { rip: 0, .. } => self.syscall,
            entry if context.cs == FLAT_CS32 => entry,
            _ => self.syscall,
        };
        let general = &mut context.general;
        if entry.rip == 0 {
            general.rip = general.rip.wrapping_sub(2);
            return self.inject(engine, INVALID_OPCODE, 0);
        }
        general.rcx = general.rip;
        general.r11 = general.rflags;
        self.enter_for_program(engine, entry)
    }

    /// SYSENTER of a program, which faulted; RIP and RSP are lost, as the instruction has it. `None` if the guest has no
    /// entry for it.
    pub(crate) fn user_sysenter(&mut self, engine: &mut dyn Engine) -> Result<Option<Action>> {
        if self.sysenter.rip == 0 {
            return Ok(None);
        }
        let context = engine.context();
        (context.general.rip, context.general.rsp) = (0, 0);
        (context.cs, context.ss) = (3, FLAT_SS64);
        context.general.rflags &= !(NT | rflags::TF);
        self.enter_for_program(engine, self.sysenter).map(Some)
    }

    fn enter_for_program(&mut self, engine: &mut dyn Engine, entry: Callback) -> Result<Action> {
        let bounce = Bounce { rip: entry.rip, error_code: None, mask: entry.masks_events };
        let action = self.bounce(engine, bounce)?;
        // The ABI has no mask of SYSCALL's flags: Xen clears this one, and a kernel that got it would copy backwards.
        engine.context().general.rflags &= !rflags::DF;
        Ok(action)
    }

    /// The IRET hypercall.
    pub(crate) fn iret(&mut self, engine: &mut dyn Engine) -> Action {
        let memory = &self.domain.memory;
        let root = engine.kernel_root();
        let to_user_possible = engine.user_root().is_some();
        let context = engine.context();
        let Ok(frame) = memory.space(root).read::<IretContext>(context.general.rsp) else {
            return Action::Crash(format!("no frame for IRET at {:#x}", context.general.rsp));
        };
        let [cs, ss] = [frame.cs, frame.ss].map(|selector| {
            let [low, high, ..] = selector.to_le_bytes();
            u16::from_le_bytes([low, high]) | 3
        });
        if frame.cs & 3 == 3 {
            if !to_user_possible {
                return Action::Crash("IRET to user mode without page tables for it".to_owned());
            }
            context.switch_mode(GuestMode::User);
        }
        if self.domain.has_assist(vm_assist::ARCHITECTURAL_IOPL) {
            self.control.iopl = (frame.rflags & IOPL) >> 12;
        }
        context.general.rip = frame.rip;
        context.general.rflags = frame.rflags & ALL & !(IOPL | VM) | rflags::IF | rflags::FIXED;
        context.general.rsp = frame.rsp;
        context.general.rax = frame.rax;
        // As SYSRET leaves them if the entry was by SYSCALL.
        let by_syscall = frame.flags & VGCF_IN_SYSCALL != 0;
        context.general.r11 = if by_syscall { context.general.rflags } else { frame.r11 };
        context.general.rcx = if by_syscall { frame.rip } else { frame.rcx };
        context.cs = cs;
        context.ss = ss;
        let mask = u8::from(frame.rflags & rflags::IF == 0);
        if memory.swap_byte(self.info() + shared_info::UPCALL_MASK, mask).is_err() {
            return Action::Crash("no vcpu_info".to_owned());
        }
        Action::Continue
    }
}

#[cfg(test)]
mod tests;
