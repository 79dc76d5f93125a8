//! Starts: the root that the domain builder made, and virtual processors that another one initialised.

use super::abi::errno::Errno;
use super::abi::vcpu::{VcpuGuestContext, runstate, vgcf};
use super::abi::{FIRST_RESERVED_GDT_ENTRY, PAGE_SIZE, shared_info};
use super::engine::{Engine, GuestMode};
use super::hypercall::{Call, Failure};
use super::memory::{DomainMemory, frame_of, is_canonical};
use super::vcpu_abi::{Callback, VcpuAbi};
use crate::error::{Error, Result};
use crate::state::{GeneralRegisters, rflags};

impl VcpuAbi {
    /// Makes the page tables under a top-level table known, pins that as Xen's builder does, and makes it the root of mode
    /// kernel. Entries get the form that the engine needs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for tables that a guest could not pin; else what the engine's host refuses.
    pub fn adopt_initial_root(&mut self, engine: &mut dyn Engine, frame: u64) -> Result<()> {
        let adopted = self
            .settle(engine, |call| call.pin(frame, 4))
            .and_then(|()| self.settle(engine, |call| call.new_root(frame, GuestMode::Kernel)));
        adopted.map_err(|failure| match failure {
            Failure::Host(error) => error,
            Failure::Later => Error::invalid("initial page table", frame, "one that does not change"),
            Failure::Guest(errno) => {
                let allowed = format_args!(
                    "a frame of page tables that a guest could pin, not one with error {}",
                    errno.0
                );
                Error::invalid("initial page table", frame, allowed)
            }
        })
    }

    /// Takes a step that may want to be made again, which only other virtual processors that tear down the tables meanwhile
    /// can make endless.
    fn settle(
        &mut self,
        engine: &mut dyn Engine,
        mut step: impl FnMut(&mut Call<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        for _ in 0..=self.domain.memory.layout().frames() / 256 {
            match step(&mut Call::new(self, engine)) {
                Err(Failure::Later) => {}
                settled => return settled,
            }
        }
        Err(Failure::Later)
    }

    /// Whether the virtual processor is online. One that was initialised and brought up since the last call takes over
    /// its registers here, on its own thread.
    ///
    /// # Errors
    /// Only what the engine's host refuses. A start that the guest made impossible takes the virtual processor offline again.
    pub fn start(&mut self, engine: &mut dyn Engine) -> Result<bool> {
        if !self.is_up() {
            return Ok(false);
        }
        if self.online {
            return Ok(true);
        }
        // One that was taken offline and is up again goes on where it was.
        let context = self.processor().and_then(|processor| processor.take_start());
        match context.map_or(Ok(()), |context| self.load(engine, &context)) {
            Ok(()) => self.online = true,
            Err(Failure::Host(error)) => return Err(error),
            Err(failure @ (Failure::Guest(_) | Failure::Later)) => {
                tracing::warn!(index = self.index, ?failure, "a virtual processor could not be started");
                if let Some(processor) = self.processor() {
                    processor.set_up(false);
                }
                return Ok(false);
            }
        }
        let now = self.now(engine)?;
        if let Some(processor) = self.processor() {
            processor.set_runstate(runstate::RUNNING, now);
        }
        Ok(true)
    }

    fn load(&mut self, engine: &mut dyn Engine, context: &VcpuGuestContext) -> Result<(), Failure> {
        let [cr0, user_root, _, root, cr4, ..] = context.ctrlreg;
        self.settle(engine, |call| call.new_root(frame_of(root), GuestMode::Kernel))?;
        if user_root == 0 {
            engine.set_user_root(None)?;
        } else {
            self.settle(engine, |call| call.new_root(frame_of(user_root), GuestMode::User))?;
        }
        let entries = context.gdt_ents;
        let frames = usize::try_from(entries.div_ceil(PAGE_SIZE / 8)).unwrap_or(usize::MAX);
        let frames = context.gdt_frames.iter().take(frames).copied().collect();
        self.load_gdt(engine, frames, entries)?;
        // One for each vector, unlike the list of `set_trap_table`.
        *self.traps = context.traps;
        let callback = |rip, flag| Callback { rip, masks_events: context.flags & flag != 0 };
        self.event = callback(context.event_callback_eip, 0);
        self.failsafe = callback(context.failsafe_callback_eip, vgcf::FAILSAFE_DISABLES_EVENTS);
        self.syscall = callback(context.syscall_callback_eip, vgcf::SYSCALL_DISABLES_EVENTS);
        engine.context().kernel_sp = context.kernel_sp;
        self.kernel_ss = selector(context.kernel_ss) | 3;
        self.set_task_switched(engine, cr0 & (1 << 3) != 0);
        if cr4 != 0 {
            self.control.cr4 = cr4;
        }
        for (number, value) in (0..).zip(context.debugreg) {
            if matches!(number, 0..=3 | 6 | 7)
                && value != 0
                && engine.set_debug_register(number, value).is_err()
            {
                tracing::debug!(number, value, "a debug register could not be set");
            }
        }
        self.load_registers(engine, context);
        self.domain.memory.swap_byte(self.info() + shared_info::UPCALL_MASK, 1)?;
        Ok(())
    }

    fn load_registers(&self, engine: &mut dyn Engine, start: &VcpuGuestContext) {
        let regs = &start.user_regs;
        let context = engine.context();
        let in_kernel = start.flags & vgcf::IN_KERNEL != 0;
        context.mode = if in_kernel { GuestMode::Kernel } else { GuestMode::User };
        context.general = GeneralRegisters {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rip: regs.rip,
            rflags: regs.rflags | rflags::FIXED,
        };
        context.cs = regs.cs | 3;
        context.ss = selector(regs.ss) | 3;
        [context.ds, context.es, context.fs, context.gs] = [regs.ds, regs.es, regs.fs, regs.gs].map(selector);
        context.fs_base = start.fs_base;
        let bases = (start.gs_base_kernel, start.gs_base_user);
        (context.gs_base, context.other_gs_base) = if in_kernel { bases } else { (bases.1, bases.0) };
    }
}

/// What can be told of a start before the virtual processor makes it.
pub(crate) fn check_start(memory: &DomainMemory, context: &VcpuGuestContext) -> Result<(), Errno> {
    let [_, user_root, _, root, ..] = context.ctrlreg;
    // The user root is kept in place of CR1, where 0 is none.
    let users = user_root == 0 || memory.is_ram(frame_of(user_root));
    if !memory.is_ram(frame_of(root)) || !users {
        return Err(Errno::EINVAL);
    }
    let addresses = [
        context.fs_base,
        context.gs_base_kernel,
        context.gs_base_user,
        context.event_callback_eip,
        context.failsafe_callback_eip,
        context.syscall_callback_eip,
    ];
    let traps = context.traps.iter().map(|trap| trap.address);
    if !addresses.into_iter().chain(traps).all(is_canonical) {
        return Err(Errno::EINVAL);
    }
    if context.gdt_ents > FIRST_RESERVED_GDT_ENTRY || context.ldt_ents != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn selector(value: u64) -> u16 {
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests;
