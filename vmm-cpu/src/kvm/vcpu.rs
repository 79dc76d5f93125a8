//! The run loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_mp_state, kvm_msr_entry, kvm_sregs,
    kvm_vcpu_events,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::GuestAddress;

use super::exits::{ExitCounts, internal_error_reason};
#[cfg(feature = "translate")]
use super::finish::Finisher;
use super::handle::{INTR, KICK, KvmVcpuHandle, NMI, Shared};
use super::sys::RunPage;
use super::vm::VmInner;
use super::{NAME, debug, host, state, sys};
use crate::debug::{DebugReason, DebugStop, DebugStops};
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::private_memory::MemoryFault;
use crate::state::{CpuState, GeneralRegisters, RunState, SystemRegisters};
use crate::vcpu::{Halt, Hypercall, UnhandledInstruction, Vcpu, VcpuHandle, VcpuIo};

/// Longest instruction (Intel SDM 2A 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// A vCPU on KVM.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    // The descriptor first: it is closed before the memory behind `vm` may go.
    fd: VcpuFd,
    pub(super) shared: Arc<Shared>,
    pub(super) vm: Arc<VmInner>,
    index: u32,
    /// HLT was executed and nothing has ended it (only without a local APIC in KVM).
    pub(super) halted: bool,
    /// The last exit's instruction waits for KVM_RUN to complete it.
    unsettled: bool,
    /// That instruction is a store whose last piece was handed over, of which KVM_RUN completes nothing that anybody sees.
    stored: bool,
    /// How much of the VM's paused time is in this vCPU's TSC offset.
    applied_pause: u64,
    /// The registers are newer than what the `kvm_run` page says of them.
    page_stale: bool,
    /// Registers by way of the `kvm_run` page.
    sync: Sync,
    /// A debugger wants a stop after each instruction.
    pub(super) single_step: bool,
    /// Meanwhile interrupts wait. KVM sees to those of its own.
    pub(super) holds_interrupts: bool,
    pub(super) counts: ExitCounts,
    #[cfg(feature = "translate")]
    pub(super) finisher: Finisher,
}

/// Stays in the guest for which registers are handed over after somebody looked at them.
const ASKED: u8 = 4;

/// What the `kvm_run` page holds of the registers (KVM_CAP_SYNC_REGS): KVM_RUN leaves them there when it returns and takes
/// them from there when it enters, which saves an ioctl each. Leaving them there costs something, so it is asked for only
/// while somebody looks at them again and again.
#[derive(Clone, Copy, Debug, Default)]
struct Sync {
    offered: bool,
    /// KVM_RUN is told to leave them there.
    requested: bool,
    /// For how many more stays they are.
    asked: u8,
    /// General registers are those of the vCPU.
    general: bool,
    /// Segment and control registers are those of the vCPU.
    system: bool,
    /// The general registers are newer than KVM's, which takes them with the next KVM_RUN.
    general_dirty: bool,
    /// So are segment and control registers.
    system_dirty: bool,
}

/// Why one stay in KVM_RUN and its callback ended.
pub(super) enum Step {
    /// Enter again.
    Continue,
    /// EINTR: look at the requests.
    Requests,
    /// Return to the caller.
    Stop(Halt),
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, shared: Arc<Shared>, vm: Arc<VmInner>, index: u32) -> Self {
        let applied_pause = vm.clock.paused_ticks();
        let sync = Sync { offered: vm.syncs_registers, ..Sync::default() };
        Self {
            fd,
            shared,
            vm,
            index,
            halted: false,
            unsettled: false,
            stored: false,
            applied_pause,
            page_stale: true,
            sync,
            single_step: false,
            holds_interrupts: false,
            counts: ExitCounts::default(),
            #[cfg(feature = "translate")]
            finisher: Finisher::default(),
        }
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Answers the requests of handles; the halt that a kick asks for.
    fn answer_requests(&mut self) -> Result<Option<Halt>> {
        let requests = self.shared.take_requests();
        if requests & NMI != 0 {
            self.fd.nmi().map_err(|errno| host("KVM_NMI", errno))?;
            // A handler of NMIs that halts goes on halting: the next one waits for its IRET.
            self.halted = self.halted && self.events()?.nmi.masked != 0;
        }
        // INTR needs no answer: the loop looks at the pin before each entry.
        debug_assert_eq!(requests & !(NMI | KICK | INTR), 0);
        if requests & KICK != 0 {
            self.counts.interrupted += 1;
            return Ok(Some(Halt::Interrupted));
        }
        Ok(None)
    }

    /// Delivers an interrupt if INTR is asserted and the vCPU can take it, else asks for the moment when it can.
    fn service_intr(&mut self, io: &mut dyn VcpuIo) -> Result<()> {
        let mut window = self.shared.intr.is_high();
        if window && self.page_stale {
            self.refresh_page()?;
        }
        if window && self.shared.page.ready_for_interrupt() {
            let before = self.shared.intr.now();
            match io.acknowledge_interrupt() {
                Some(vector) => {
                    self.inject(vector)?;
                    self.halted = false;
                    window = self.shared.intr.is_high();
                }
                // Withdrawn: the pin is low until somebody asserts it again.
                None => {
                    window = !self.shared.intr.withdraw(before);
                }
            }
        }
        self.shared.page.request_interrupt_window(window);
        Ok(())
    }

    /// Delivers an interrupt that the vCPU is ready for and that the VMM's controller was told to be accepted.
    fn inject(&self, vector: u8) -> Result<()> {
        if self.vm.interrupts == InterruptMode::External {
            return sys::interrupt(&self.fd, vector).map_err(|errno| host("KVM_INTERRUPT", errno));
        }
        // With a local APIC in KVM, KVM_INTERRUPT puts the vector where no state shows it until the guest is
        // entered; a kick and a save in between would lose it.
        let mut events = self.events()?;
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
        self.fd.set_vcpu_events(&events).map_err(|errno| host("KVM_SET_VCPU_EVENTS", errno))?;
        let halted = self.fd.get_mp_state().map_err(|errno| host("KVM_GET_MP_STATE", errno))?;
        if halted.mp_state == KVM_MP_STATE_HALTED {
            let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(running).map_err(|errno| host("KVM_SET_MP_STATE", errno))?;
        }
        Ok(())
    }

    /// What the page holds when the KVM_RUN that follows has returned, whatever it says.
    #[inline]
    fn expect_registers(&mut self) {
        let Sync { offered, requested, asked, .. } = self.sync;
        let wanted = asked > 0;
        if wanted != requested {
            self.request_registers(wanted);
        }
        self.sync = Sync {
            offered,
            requested: wanted,
            asked: asked.saturating_sub(1),
            general: wanted,
            system: wanted,
            ..Sync::default()
        };
    }

    #[cold]
    fn request_registers(&mut self, wanted: bool) {
        for field in [SyncReg::Register, SyncReg::SystemRegister] {
            if wanted {
                self.fd.set_sync_valid_reg(field);
            } else {
                self.fd.clear_sync_valid_reg(field);
            }
        }
    }

    /// Somebody looks at the registers.
    fn ask_for_registers(&mut self) {
        if self.sync.offered {
            self.sync.asked = ASKED;
        }
    }

    /// Gives KVM the registers that it does not have yet, for ioctls that look at them.
    pub(super) fn flush_registers(&mut self) -> Result<()> {
        if std::mem::take(&mut self.sync.system_dirty) {
            self.fd.clear_sync_dirty_reg(SyncReg::SystemRegister);
            let sregs = self.fd.sync_regs().sregs;
            self.fd.set_sregs(&sregs).map_err(|errno| host("KVM_SET_SREGS", errno))?;
        }
        if std::mem::take(&mut self.sync.general_dirty) {
            self.fd.clear_sync_dirty_reg(SyncReg::Register);
            let regs = self.fd.sync_regs().regs;
            self.fd.set_regs(&regs).map_err(|errno| host("KVM_SET_REGS", errno))?;
        }
        Ok(())
    }

    /// KVM's registers change in another way than by KVM_RUN.
    fn forget_registers(&mut self) -> Result<()> {
        self.flush_registers()?;
        (self.sync.general, self.sync.system) = (false, false);
        Ok(())
    }

    /// Segment and control registers where the page has them.
    pub(super) fn synced_sregs(&self) -> Option<kvm_sregs> {
        self.sync.system.then(|| self.fd.sync_regs().sregs)
    }

    pub(super) fn events(&self) -> Result<kvm_vcpu_events> {
        self.fd.get_vcpu_events().map_err(|errno| host("KVM_GET_VCPU_EVENTS", errno))
    }

    /// Lets KVM bring the `kvm_run` page up to date without executing the guest.
    fn refresh_page(&mut self) -> Result<()> {
        self.shared.page.set_immediate_exit(true);
        self.expect_registers();
        let result = self.fd.run().map(|_| ());
        self.shared.rearm();
        self.page_stale = false;
        match result {
            Err(errno) if errno.errno() != libc::EINTR => Err(host("KVM_RUN", errno)),
            _ => Ok(()),
        }
    }

    /// Lets the TSC stand still for the time that the VM's clock was paused since the last run.
    fn apply_pauses(&mut self) -> Result<()> {
        let paused = self.vm.clock.paused_ticks();
        let delta = self.vm.clock.guest_ticks(paused.wrapping_sub(self.applied_pause));
        if delta != 0 {
            sys::adjust_tsc_offset(&self.fd, delta.wrapping_neg())
                .map_err(|errno| host("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", errno))?;
            self.applied_pause = paused;
        }
        Ok(())
    }

    /// What is to be taken off the TSC that KVM tells, in guest ticks: pauses that no run has accounted for yet.
    pub(super) fn outstanding_pause(&self) -> u64 {
        let clock = &self.vm.clock;
        clock.guest_ticks(clock.paused_ticks_now().wrapping_sub(self.applied_pause))
    }

    /// The TSC was written: what was paused before does not count for the new value.
    pub(super) fn forget_pauses(&mut self) {
        self.applied_pause = self.vm.clock.paused_ticks_now();
    }

    /// One KVM_RUN and the callback that its exit asks for.
    ///
    /// The exit is matched where it arises, in the loop's own function, and never stored: a copy of it costs more than
    /// all the rest of this.
    #[inline(always)]
    fn step(&mut self, io: &mut dyn VcpuIo) -> Result<Step> {
        self.expect_registers();
        self.stored = false;
        let (vcpu, counts) = (self.index, &mut self.counts);
        let result = self.fd.run();
        // What was written before comes first, also before a return to the caller.
        if self.shared.gathers()
            && let Err(error) = self.vm.coalesced.deliver(io)
        {
            self.unsettled = result.is_ok();
            return Err(error);
        }
        let exit = match result {
            Ok(exit) => exit,
            Err(errno) => {
                return match errno.errno() {
                    libc::EINTR => {
                        self.unsettled = false;
                        Ok(Step::Requests)
                    }
                    // A vCPU that waited for INIT or SIPI was woken.
                    libc::EAGAIN => Ok(Step::Continue),
                    _ => Err(host("KVM_RUN", errno)),
                };
            }
        };
        self.unsettled = true;
        match exit {
            VcpuExit::IoOut(port, data) => {
                counts.pio_out += 1;
                tracing::trace!(vcpu, port, len = data.len(), "kvm: port write");
                io.pio_write(port, element_size(&self.shared.page, data), data);
            }
            VcpuExit::IoIn(port, data) => {
                counts.pio_in += 1;
                tracing::trace!(vcpu, port, len = data.len(), "kvm: port read");
                io.pio_read(port, element_size(&self.shared.page, data), data);
            }
            VcpuExit::MmioRead(gpa, data) => {
                counts.mmio_read += 1;
                tracing::trace!(vcpu, gpa, len = data.len(), "kvm: MMIO read");
                io.mmio_read(GuestAddress(gpa), data);
            }
            VcpuExit::MmioWrite(gpa, data) => {
                counts.mmio_write += 1;
                tracing::trace!(vcpu, gpa, len = data.len(), "kvm: MMIO write");
                self.stored = is_whole_store(gpa, data.len());
                io.mmio_write(GuestAddress(gpa), data);
            }
            VcpuExit::X86Rdmsr(access) => {
                counts.msr += 1;
                tracing::trace!(vcpu, msr = access.index, "kvm: RDMSR");
                match io.msr_read(access.index) {
                    Ok(value) => *access.data = value,
                    Err(_) => *access.error = 1,
                }
            }
            VcpuExit::X86Wrmsr(access) => {
                counts.msr += 1;
                tracing::trace!(vcpu, msr = access.index, value = access.data, "kvm: WRMSR");
                *access.error = u8::from(io.msr_write(access.index, access.data).is_err());
            }
            VcpuExit::Hypercall(call) => {
                counts.hypercall += 1;
                tracing::trace!(vcpu, nr = call.nr, "kvm: hypercall");
                let [a, b, c, d, ..] = call.args;
                *call.ret = io.hypercall(&Hypercall::new(call.nr, [a, b, c, d], call.longmode != 0));
            }
            VcpuExit::IoapicEoi(vector) => {
                counts.eoi += 1;
                tracing::trace!(vcpu, vector, "kvm: end of interrupt");
                io.eoi(vector);
            }
            VcpuExit::IrqWindowOpen => {
                counts.interrupt_window += 1;
                tracing::trace!(vcpu, "kvm: interrupt window");
                // Asked for again before the next entry if the pin is still high; else KVM would go on telling
                // instead of running the guest.
                self.shared.page.request_interrupt_window(false);
                self.unsettled = false;
            }
            VcpuExit::Hlt => {
                counts.halt += 1;
                tracing::trace!(vcpu, "kvm: halt");
                self.unsettled = false;
                self.halted = true;
            }
            VcpuExit::Debug(exit) => {
                counts.debug += 1;
                self.unsettled = false;
                return Ok(Step::Stop(Halt::Debug(debug::stop_of(&exit))));
            }
            VcpuExit::Shutdown | VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                counts.other += 1;
                self.unsettled = false;
                return Ok(Step::Stop(Halt::Shutdown));
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
                counts.other += 1;
                self.unsettled = false;
                return Ok(Step::Stop(Halt::Reset));
            }
            // The guest lowered CR8 without a local APIC in KVM; what becomes deliverable is seen before the next entry.
            VcpuExit::Intr | VcpuExit::SetTpr => self.unsettled = false,
            VcpuExit::InternalError => {
                self.unsettled = false;
                return self.finish(io);
            }
            VcpuExit::FailEntry(reason, host_cpu) => {
                self.unsettled = false;
                return Err(Error::EntryFailed { index: self.index, reason, host_cpu });
            }
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                counts.dirty_ring_full += 1;
                self.unsettled = false;
                if let Some(rings) = &self.vm.dirty_rings {
                    rings.empty(&self.vm.fd)?;
                }
            }
            VcpuExit::MemoryFault { flags, gpa, size } => {
                counts.other += 1;
                self.unsettled = false;
                return self.memory_fault(flags, GuestAddress(gpa), size);
            }
            other => {
                let exit = format!("{other:?}");
                self.unsettled = false;
                return Err(Error::UnexpectedExit { index: self.index, exit });
            }
        }
        Ok(Step::Continue)
    }

    /// What KVM_EXIT_MEMORY_FAULT means: the other half of memory with two, or that the host has no memory.
    #[cold]
    fn memory_fault(&self, flags: u64, gpa: GuestAddress, len: u64) -> Result<Step> {
        let whole = GuestAddress(gpa.0 & !(PAGE_SIZE - 1));
        let pages = gpa.0.wrapping_sub(whole.0).saturating_add(len).max(1);
        let pages = pages.checked_next_multiple_of(PAGE_SIZE).unwrap_or(PAGE_SIZE);
        if !self.vm.has_private_half(whole, pages) {
            return Err(Error::NoHostMemory { index: self.index, gpa, len });
        }
        let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
        Ok(Step::Stop(Halt::MemoryFault(MemoryFault::new(whole, pages, private))))
    }

    /// The `kvm_run` page does not say any more what KVM would.
    #[cfg(feature = "translate")]
    pub(super) fn page_is_stale(&mut self) {
        self.page_stale = true;
    }

    /// The error for a KVM_EXIT_INTERNAL_ERROR, and why software does not execute the instruction either, if it tried.
    pub(super) fn unhandled(&mut self, software: Option<&str>) -> Error {
        let internal = self.shared.page.internal_error();
        let (registers, system) = match (self.registers(), self.system_registers()) {
            (Ok(registers), Ok(system)) => (registers, system),
            (Err(error), _) | (_, Err(error)) => return error,
        };
        let mut bytes = self.read_linear(state::linear(&registers, &system));
        if bytes.len() < internal.bytes.len() {
            bytes.clone_from(&internal.bytes);
        }
        let unhandled = Box::new(UnhandledInstruction::new(
            NAME,
            self.index,
            internal_error_reason(&internal, software),
            bytes,
            registers,
            system,
        ));
        tracing::debug!(
            vcpu = self.index,
            rip = registers.rip,
            text = unhandled.text.as_deref(),
            "kvm: unhandled instruction"
        );
        Error::Unhandled(unhandled)
    }

    /// As many bytes of an instruction at linear address `start` as the guest has mapped.
    fn read_linear(&mut self, start: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
        while bytes.len() < MAX_INSTRUCTION {
            let gva = start.wrapping_add(bytes.len() as u64);
            let Ok(Some(gpa)) = self.translate(gva) else { break };
            let left_on_page = usize::try_from(PAGE_SIZE - gva % PAGE_SIZE).unwrap_or(1);
            let wanted = left_on_page.min(MAX_INSTRUCTION - bytes.len());
            let read = self.vm.read_memory(gpa, wanted);
            let complete = read.len() == wanted;
            bytes.extend(read);
            if !complete {
                break;
            }
        }
        bytes
    }

    /// Lets KVM complete the instruction of the last exit, which a panic in a callback left open.
    fn settle(&mut self) -> Result<()> {
        if !self.unsettled {
            return Ok(());
        }
        while self.unsettled {
            self.shared.page.set_immediate_exit(true);
            self.expect_registers();
            match self.fd.run() {
                Err(errno) if errno.errno() == libc::EINTR => self.unsettled = false,
                Err(errno) => return Err(host("KVM_RUN", errno)),
                // Another fragment of the same access: it gets the zeros that stand there.
                Ok(_) => {}
            }
        }
        self.shared.rearm();
        Ok(())
    }

    /// Completes an instruction that was stepped into a callback, and stops behind it. KVM forgets the single step
    /// of an instruction that it emulates by an exit.
    fn finish_stepped_access(&mut self, io: &mut dyn VcpuIo) -> Result<Halt> {
        loop {
            self.shared.page.set_immediate_exit(true);
            match self.step(io)? {
                // The next piece of the same access.
                Step::Continue => {}
                // A kick, if there is one, stays for the next run.
                Step::Requests => {
                    self.shared.rearm();
                    let rip = state::linear_rip(self)?;
                    return Ok(Halt::Debug(DebugStop::new(rip, DebugReason::SingleStep)));
                }
                Step::Stop(halt) => {
                    self.shared.rearm();
                    return Ok(halt);
                }
            }
        }
    }

    /// As [`Vcpu::run`](crate::Vcpu::run), of a virtual machine whose clock runs.
    pub(super) fn enter(&mut self, io: &mut dyn VcpuIo) -> Result<Halt> {
        let _running = self.shared.enter()?;
        self.apply_pauses()?;
        if let Some(halt) = self.answer_requests()? {
            return Ok(halt);
        }
        let external = self.shared.has_intr();
        loop {
            if external {
                if self.shared.intr.is_high() && !self.holds_interrupts || self.halted {
                    self.service_intr(io)?;
                }
                if self.halted {
                    if let Some(halt) = self.answer_requests()? {
                        return Ok(halt);
                    }
                    // An NMI among the requests may have ended it.
                    if self.halted {
                        return Ok(Halt::Halted);
                    }
                }
            }
            match self.step(io)? {
                Step::Continue if self.single_step && self.unsettled => {
                    return self.finish_stepped_access(io);
                }
                // A callback that kicks after a store would be answered by the next KVM_RUN, which does nothing else.
                Step::Continue if self.stored && self.shared.pending() & KICK != 0 => {
                    if let Some(halt) = self.answer_requests()? {
                        return Ok(halt);
                    }
                }
                Step::Continue => {}
                Step::Requests => {
                    if let Some(halt) = self.answer_requests()? {
                        return Ok(halt);
                    }
                }
                Step::Stop(halt) => return Ok(halt),
            }
        }
    }
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<Halt> {
        if self.vm.clock.is_paused() {
            return Err(Error::unsupported(
                "running a vCPU",
                "the VM's clock is paused; call VmClock::resume first",
            ));
        }
        let result = self.enter(io);
        match &result {
            Ok(halt) => tracing::trace!(vcpu = self.index, ?halt, "kvm: run ends"),
            Err(error) => tracing::warn!(vcpu = self.index, %error, "kvm: run fails"),
        }
        result
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(KvmVcpuHandle(Arc::downgrade(&self.shared)))
    }

    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        if self.halted && self.refresh_page().is_err() {
            // The next run tells the error.
            return true;
        }
        let takes_interrupts = !self.halted || self.shared.page.interrupt_flag();
        self.shared.sleep(timeout, |shared| {
            shared.pending() & (KICK | NMI) != 0 || (takes_interrupts && shared.intr.is_high())
        })
    }

    fn registers(&mut self) -> Result<GeneralRegisters> {
        self.ask_for_registers();
        if self.sync.general {
            return Ok(state::general_from_kvm(&self.fd.sync_regs().regs));
        }
        let regs = self.fd.get_regs().map_err(|errno| host("KVM_GET_REGS", errno))?;
        Ok(state::general_from_kvm(&regs))
    }

    fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()> {
        self.page_stale = true;
        if self.sync.offered {
            self.fd.sync_regs_mut().regs = state::general_to_kvm(registers);
            self.fd.set_sync_dirty_reg(SyncReg::Register);
            (self.sync.general, self.sync.general_dirty) = (true, true);
            return Ok(());
        }
        self.fd.set_regs(&state::general_to_kvm(registers)).map_err(|errno| host("KVM_SET_REGS", errno))
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        state::read_system(self)
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        self.page_stale = true;
        // By an ioctl, which says whether the state is one that a processor can be in.
        self.flush_registers()?;
        self.sync.system = false;
        state::write_system(self, registers)
    }

    fn segment_registers(&mut self) -> Result<SystemRegisters> {
        self.ask_for_registers();
        state::read_segments(self)
    }

    fn set_segment_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        if !self.sync.offered {
            let SystemRegisters { dr, dr6, dr7, xcr0, .. } = self.system_registers()?;
            return self.set_system_registers(&SystemRegisters { dr, dr6, dr7, xcr0, ..*registers });
        }
        let sregs = state::sregs_to_kvm(registers)?;
        self.page_stale = true;
        self.shared.page.set_cr8(registers.cr8);
        self.fd.sync_regs_mut().sregs = sregs;
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        (self.sync.system, self.sync.system_dirty) = (true, true);
        Ok(())
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        self.flush_registers()?;
        let mut msrs = one_msr(index, 0)?;
        match self.fd.get_msrs(&mut msrs).map_err(|errno| host("KVM_GET_MSRS", errno))? {
            0 => Err(Error::invalid("MSR", format_args!("{index:#x}"), "a register that this vCPU has")),
            _ => {
                let value = msrs.as_slice().first().map_or(0, |entry| entry.data);
                let paused = if index == state::IA32_TSC { self.outstanding_pause() } else { 0 };
                Ok(value.wrapping_sub(paused))
            }
        }
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        // Some are part of segment registers.
        self.flush_registers()?;
        self.sync.system = false;
        let msrs = one_msr(index, value)?;
        match self.fd.set_msrs(&msrs).map_err(|errno| host("KVM_SET_MSRS", errno))? {
            0 => Err(Error::invalid(
                "MSR write",
                format_args!("{value:#x} to {index:#x}"),
                "a register that this vCPU has and a value without reserved bits",
            )),
            _ => {
                if index == state::IA32_TSC {
                    self.forget_pauses();
                }
                Ok(())
            }
        }
    }

    fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>> {
        self.flush_registers()?;
        // KVM_TRANSLATE looks at no more bits than the page tables have.
        if !state::is_canonical(&self.fd.get_sregs().map_err(|errno| host("KVM_GET_SREGS", errno))?, gva) {
            return Ok(None);
        }
        let translation = self.fd.translate_gva(gva).map_err(|errno| host("KVM_TRANSLATE", errno))?;
        Ok((translation.valid != 0).then_some(GuestAddress(translation.physical_address)))
    }

    /// KVM keeps INT3 and INTO to itself: on processors with virtualization RIP is still at the instruction.
    fn exception_pending(&mut self) -> Result<bool> {
        let exception = self.events()?.exception;
        Ok(exception.injected != 0 || exception.pending != 0)
    }

    fn cancel_fault(&mut self) -> Result<bool> {
        let mut events = self.events()?;
        let exception = &mut events.exception;
        if exception.injected == 0 && exception.pending == 0 {
            return Ok(true);
        }
        // Debug exceptions, breakpoints and overflow are traps, or may be.
        if matches!(exception.nr, 1 | 3 | 4) {
            return Ok(false);
        }
        (exception.injected, exception.pending) = (0, 0);
        self.fd.set_vcpu_events(&events).map_err(|errno| host("KVM_SET_VCPU_EVENTS", errno))?;
        Ok(true)
    }

    fn save(&mut self) -> Result<CpuState> {
        self.settle()?;
        // A waiting INIT or SIPI takes effect while the state is read.
        self.forget_registers()?;
        state::save(self)
    }

    fn restore(&mut self, cpu: &CpuState) -> Result<()> {
        self.settle()?;
        self.forget_registers()?;
        self.page_stale = true;
        // An NMI from before belongs to the state that goes.
        self.shared.withdraw(NMI);
        state::restore(self, cpu)?;
        if cpu.msr(state::IA32_TSC).is_some() {
            self.forget_pauses();
        }
        let kvm_waits = self.vm.interrupts != InterruptMode::External;
        self.halted = !kvm_waits
            && cpu.run_state == RunState::Halted
            && (!cpu.events.nmi.pending || cpu.events.nmi.masked);
        Ok(())
    }

    fn debug_stops(&mut self) -> Option<&mut dyn DebugStops> {
        Some(self)
    }

    fn exit_counts(&self) -> Vec<(&'static str, u64)> {
        self.counts.named()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.vm.vcpus.fetch_sub(1, Ordering::Relaxed);
        tracing::debug!(vcpu = self.index, "kvm: vCPU dropped");
    }
}

/// Element size of a port access. Only one of several bytes needs a look at the second mapping of kvm_run.
fn element_size(page: &RunPage, data: &[u8]) -> usize {
    if data.len() == 1 { 1 } else { page.io_size() }
}

/// Whether KVM has no further piece of the store: it hands over 8 bytes at a time, and never across a page.
fn is_whole_store(gpa: u64, len: usize) -> bool {
    len < 8 && !gpa.wrapping_add(len as u64).is_multiple_of(PAGE_SIZE)
}

fn one_msr(index: u32, data: u64) -> Result<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|error| Error::Backend { backend: NAME, source: format!("{error:?}").into() })
}
