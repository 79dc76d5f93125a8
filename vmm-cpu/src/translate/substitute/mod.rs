//! Single instructions in place of another engine, which runs the guest and gives up on one here and there.
//!
//! The engine hands over the registers in front of the instruction, tier 0 executes it in the guest's memory, and the engine
//! goes on with the registers behind it. Nothing is kept from one instruction to the next, no translation of an address and no
//! decoded code, since the guest has run elsewhere in between. What software cannot do as the guest's own processor would, it
//! refuses, and then nothing has happened.
//!
//! | matter | answer |
//! |---|---|
//! | exceptions of the instruction, single steps | come back as such; the engine delivers them |
//! | LOCK | the host's own locked instruction on guest memory; one that is not aligned is refused where there are other vCPUs |
//! | dirty log, read-only memory | the interpreter's, of a memory map that follows the engine's |
//! | page tables | walked for each access, protection keys looked at, accessed and dirty bits set; whether a store replaced what reads as a present entry is told, for an engine that keeps shadows |
//! | what the engine alone knows: its clock, its MSRs, what it has cached of page tables | refused: `RDTSC`, `WRMSR`, `INVLPG`, moves to control registers |
//! | AVX and AVX-512 | moves between a register and memory; the rest is refused |
//!
//! Threat model: registers and memory are the guest's. Everything here is the interpreter's safe code.

mod fetch;
mod memory;
mod wide;

use std::sync::Arc;

pub(crate) use fetch::Fetched;
pub(crate) use memory::SubstituteVm;

use super::core::{Core, Flow, Machine, Reason};
use super::cpu::{BLOCK, cr4};
use super::exception::{Exception, dr6, vector};
use super::flags::bits;
use super::ops::Op;
use super::signals::Signals;
use super::vm::Peer;
use crate::error::Result;
use crate::state::{GeneralRegisters, InterruptShadow, SystemRegisters, XsaveArea};
use crate::vcpu::VcpuIo;

/// Enable bits of the breakpoints, in DR7 (Intel SDM 3B 19.2.4).
const BREAKPOINTS_ON: u64 = 0xff;

/// What became of an instruction.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is executed, or a part of it with RIP still there. Then DR6 gets these bits by a debug exception, if any.
    Done { trap: u64 },
    /// It faults. Registers are those before it, but for what iterations of a REP have done.
    Fault(Exception),
    /// Software cannot do it, for this reason. Nothing happened.
    Refused(String),
}

/// Registers between two instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Between {
    pub(crate) general: GeneralRegisters,
    pub(crate) system: SystemRegisters,
    pub(crate) shadow: InterruptShadow,
    pub(crate) nmi_masked: bool,
}

/// One vCPU's substitute.
#[derive(Debug)]
pub(crate) struct Substitute {
    core: Core,
    /// Vector registers and x87, where the instruction needs them: all of the engine's, also what tier 0 does not know.
    area: Option<XsaveArea>,
}

impl Substitute {
    pub(crate) fn new(vm: &SubstituteVm, index: u32) -> Self {
        let shared = Arc::clone(vm.shared());
        let signals = Arc::new(Signals::new());
        shared.peers().push(Peer { index, signals: Arc::clone(&signals) });
        let mut core = Core::new(index, shared, signals, None);
        core.keeps_nothing = true;
        Self { core, area: None }
    }

    /// Takes over the registers before an instruction.
    ///
    /// # Errors
    /// For a mode that software does not know.
    pub(crate) fn load(&mut self, before: &Between) -> std::result::Result<(), String> {
        memory::check_mode(&before.system)?;
        (self.area, self.core.cpu.pkru) = (None, 0);
        self.core.put_system_registers(&before.system);
        self.core.set_general_registers(&before.general);
        if before.system.dr7 & BREAKPOINTS_ON != 0 || self.core.watching {
            self.core.update_debug();
        }
        let cpu = &mut self.core.cpu;
        (cpu.shadow_sti, cpu.shadow_mov_ss) = (before.shadow.sti, before.shadow.mov_ss);
        (cpu.nmi_masked, cpu.nmi_pending) = (before.nmi_masked, false);
        cpu.activity = super::cpu::Activity::Running;
        (self.core.entries_replaced, self.core.reason) = (false, Reason::None);
        (self.core.watch_hits, self.core.keeps_rf) = (0, false);
        Ok(())
    }

    /// Takes over vector registers and x87.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) for what no processor holds.
    pub(crate) fn load_vectors(&mut self, area: XsaveArea) -> Result<()> {
        self.core.load_xsave(&area)?;
        self.core.cpu.pkru = wide::pkru(&self.core, &area);
        self.area = Some(area);
        Ok(())
    }

    /// Whether protection keys count, so that vector registers have to be loaded before anything is fetched.
    pub(crate) fn has_keys(&self) -> bool {
        self.core.cpu.cr4 & cr4::PKE != 0
    }

    /// Sets a register that an instruction reads, see [`Fetched::msrs`].
    pub(crate) fn put_msr(&mut self, index: u32, value: u64) {
        // One that cannot hold the value is none of those.
        let _ = self.core.set_msr(index, value);
    }

    /// Reads it behind the instruction.
    pub(crate) fn msr(&mut self, index: u32) -> Option<u64> {
        self.core.msr(index)
    }

    /// The registers behind the instruction.
    pub(crate) fn registers(&self) -> Between {
        let cpu = &self.core.cpu;
        Between {
            general: self.core.general_registers(),
            system: self.core.system_registers(),
            shadow: InterruptShadow { sti: cpu.shadow_sti, mov_ss: cpu.shadow_mov_ss },
            nmi_masked: cpu.nmi_masked,
        }
    }

    /// Vector registers and x87 behind the instruction.
    pub(crate) fn vectors(&mut self) -> Option<XsaveArea> {
        let area = self.area.take()?;
        Some(self.core.xsave_over(area))
    }

    /// Whether a store changed something that reads as a present entry of a page table, in another way than by setting
    /// accessed and dirty bits.
    pub(crate) fn has_replaced_entries(&self) -> bool {
        self.core.entries_replaced
    }

    /// Executes the instruction at RIP.
    pub(crate) fn execute(&mut self, fetched: &Fetched, io: &mut dyn VcpuIo) -> Outcome {
        let Self { core, area } = self;
        let _in_guest = InGuest::enter(core);
        let mut m = Machine::new(core, io);
        let steps = m.cpu.flags.control(bits::TF);
        (m.trap_pending, m.held) = (steps, (m.cpu.shadow_sti, m.cpu.shadow_mov_ss));
        (m.cpu.shadow_sti, m.cpu.shadow_mov_ss) = (false, false);
        m.rare.clear();
        let rip = m.cpu.rip;
        m.cpu.set_r(BLOCK, rip);
        m.cpu.rip = rip.wrapping_add(fetched.bytes().len() as u64) & m.mode.ip_mask;
        (m.limit, m.position) = (1, 0);
        let op = fetched.lower(&mut m);
        let result = require_aligned(&mut m, fetched, &op).and_then(|()| match area {
            Some(area) if wide::is_wide(&fetched.instruction) => {
                wide::run(&mut m, &fetched.instruction, &op, area)
            }
            _ => (op.run)(&mut m, &op),
        });
        if result.is_ok() {
            return behind(&mut m);
        }
        m.cpu.rip = rip;
        match std::mem::take(&mut m.reason) {
            Reason::None => {
                (m.cpu.shadow_sti, m.cpu.shadow_mov_ss) = m.held;
                Outcome::Done { trap: if steps { dr6::BS } else { 0 } }
            }
            Reason::Exception(exception) => {
                (m.cpu.shadow_sti, m.cpu.shadow_mov_ss) = m.held;
                // A move of this module's own knows when the processor refuses it.
                let unknown = fetched.is_beyond_tier_0() && !wide::is_wide(&fetched.instruction);
                if exception.vector == vector::UD && unknown {
                    let name = fetched.name();
                    return Outcome::Refused(format!("{name} is none of the instructions that software has"));
                }
                Outcome::Fault(exception)
            }
            Reason::Halt(halt) => Outcome::Refused(format!("it ends in {halt:?}")),
            Reason::Unhandled(reason) => Outcome::Refused(reason),
        }
    }
}

/// What comes after an instruction: RF goes, and single steps and watchpoints of the guest tell.
fn behind(m: &mut Machine<'_>) -> Outcome {
    let hits = std::mem::take(&mut m.watch_hits);
    if !std::mem::take(&mut m.keeps_rf) {
        m.cpu.flags.set_control(bits::RF, false);
    }
    let mut trap = u64::from(hits & 0xf);
    if std::mem::take(&mut m.trap_pending) {
        trap |= dr6::BS;
    }
    if m.cpu.shadow_mov_ss {
        // The stack pointer comes first (Intel SDM 3A 7.8.3).
        trap = 0;
    }
    Outcome::Done { trap }
}

/// Refuses a locked access that is not aligned: it would be one only with all other vCPUs out of the way, and they run elsewhere.
fn require_aligned(m: &mut Machine<'_>, fetched: &Fetched, op: &Op) -> Flow {
    if m.shared.max_vcpus == 1 || !fetched.locks() {
        return Ok(());
    }
    let bytes = fetched.operand_bytes();
    let va = m.place(op, bytes, true)?.va;
    // CMPXCHG16B faults by itself.
    if va.is_multiple_of(bytes as u64) || bytes == 16 {
        return Ok(());
    }
    Err(m.unhandled(format!("a locked access of {bytes} bytes at {va:#x}, which is not aligned")))
}

/// In the guest until dropped, also by a panic of a callback.
struct InGuest(Arc<Signals>);

impl InGuest {
    fn enter(core: &mut Core) -> Self {
        let this = Self(Arc::clone(&core.signals));
        core.enter_guest();
        this
    }
}

impl Drop for InGuest {
    fn drop(&mut self) {
        self.0.leave_guest();
    }
}

impl Drop for Substitute {
    fn drop(&mut self) {
        let index = self.core.index;
        self.core.shared.peers().retain(|peer| peer.index != index);
    }
}

#[cfg(test)]
mod tests;
