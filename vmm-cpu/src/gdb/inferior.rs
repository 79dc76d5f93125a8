//! The virtual machine under the debugger's hand (its "inferior"): running, pausing, and what stopped it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use vmm_memory::GuestRam;

use super::debuggee::Debuggee;
use super::monitor::Monitor;
use super::stops::{Hit, Stops};
use crate::debug::{DebugReason, DebugRequest, DebugStop};
use crate::error::{Error, Result};
use crate::threads::{VcpuExit, VcpuThreads};
use crate::vcpu::{Halt, Vcpu};
use crate::vm::VmClock;

/// See the module.
pub(super) struct Inferior {
    pub(super) threads: Arc<VcpuThreads>,
    pub(super) ram: GuestRam,
    pub(super) monitors: Vec<Box<dyn Monitor>>,
    clock: Option<Arc<dyn VmClock>>,
    pub(super) stops: Stops,
    /// What each vCPU is to do when the debugger lets them go: those that are not here run.
    actions: Vec<(u32, Action)>,
    /// Those that are not in `actions` stand still instead.
    locked: bool,
    /// Stops of other vCPUs at the same time as one that was told.
    pending: VecDeque<(u32, DebugStop)>,
    /// What ended a vCPU for good. The debugger is told first, the VMM when the debugger lets the vCPUs go.
    fate: VecDeque<VcpuExit>,
    /// A vCPU that executes an INT3 of the guest's own, and whether the debugger wanted it to step.
    passing: Option<(u32, bool)>,
    /// The debugger has let the vCPUs run.
    let_go: bool,
    /// The vCPU that stopped last.
    pub(super) current: u32,
}

/// What a vCPU is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Run,
    Step,
}

/// Why the vCPUs stand still.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stop {
    Step,
    Software,
    Hardware(Hit),
    /// A vCPU ended for good.
    Ended,
}

impl Inferior {
    pub(super) fn new(debuggee: Debuggee) -> Self {
        let Debuggee { threads, ram, clock, monitors } = debuggee;
        let current = threads.indices().first().copied().unwrap_or(0);
        Self {
            threads,
            ram,
            monitors,
            clock,
            stops: Stops::default(),
            actions: Vec::new(),
            locked: false,
            pending: VecDeque::new(),
            fate: VecDeque::new(),
            passing: None,
            let_go: false,
            current,
        }
    }

    /// Calls `look` with a vCPU, which stands still.
    pub(super) fn with<R>(&self, index: u32, look: impl FnOnce(&mut dyn Vcpu) -> Result<R>) -> Result<R> {
        self.threads.with_vcpu(index, look)?
    }

    /// Stops all vCPUs. What they tell on the way is kept.
    pub(super) fn pause(&mut self) -> Result<()> {
        self.threads.pause();
        while let Some(exit) = self.threads.wait(Some(Duration::ZERO)) {
            self.keep(exit);
        }
        self.passing = None;
        if let Some(clock) = &self.clock {
            clock.pause()?;
        }
        Ok(())
    }

    fn keep(&mut self, exit: VcpuExit) {
        match exit.reason {
            Ok(Halt::Debug(stop)) => self.pending.push_back((exit.index, stop)),
            _ => self.fate.push_back(exit),
        }
    }

    /// How many hardware stops every vCPU has.
    pub(super) fn max_hardware(&self) -> usize {
        let max = |vcpu: &mut dyn Vcpu| Ok(vcpu.debug_stops().map_or(0, |stops| stops.max_hardware()));
        let of = |index| self.with(index, max).unwrap_or(0);
        self.threads.indices().into_iter().map(of).min().unwrap_or(0)
    }

    pub(super) fn clear_actions(&mut self) {
        self.actions.clear();
        self.locked = false;
    }

    pub(super) fn set_action(&mut self, index: u32, action: Action) {
        self.actions.retain(|(other, _)| *other != index);
        self.actions.push((index, action));
    }

    pub(super) fn lock_others(&mut self) {
        self.locked = true;
    }

    fn action(&self, index: u32) -> Option<Action> {
        let action = self.actions.iter().find(|(other, _)| *other == index).map(|(_, action)| *action);
        action.or_else(|| (!self.locked).then_some(Action::Run))
    }

    /// Lets the vCPUs go as the actions say. Nothing goes while there is something left to tell.
    ///
    /// # Errors
    /// If the backend refuses the stops.
    pub(super) fn resume(&mut self) -> Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        let mut still = Vec::with_capacity(pending.len());
        for (index, stop) in &pending {
            still.push(self.action(*index).is_none() || self.still_holds(*index, *stop)?);
        }
        let mut still = still.into_iter();
        pending.retain(|_| still.next() == Some(true));
        self.pending = pending;
        if self.has_stop_to_tell() || !self.fate.is_empty() {
            return Ok(());
        }
        let request = self.stops.request();
        for index in self.threads.indices() {
            let steps = self.action(index) == Some(Action::Step);
            self.ask(index, if steps { request.clone().step_without_interrupts() } else { request.clone() })?;
        }
        self.let_go = true;
        self.go()
    }

    /// Whether a stop that was not told yet still is one, after whatever the debugger has done meanwhile.
    fn still_holds(&self, index: u32, stop: DebugStop) -> Result<bool> {
        let hit = match stop.reason {
            DebugReason::Hardware { hits } => self.stops.hit(hits),
            DebugReason::SoftwareBreakpoint => Some(Hit::Breakpoint),
            // The debugger says anew who steps.
            DebugReason::SingleStep => None,
        };
        match hit {
            None => Ok(false),
            Some(Hit::Watchpoint { .. }) => Ok(true),
            Some(Hit::Breakpoint) => self.with(index, |vcpu| {
                let (registers, system) = (vcpu.registers()?, vcpu.system_registers()?);
                let base = if system.code_bits() == 64 { 0 } else { system.cs.base };
                let gpa = vcpu.translate(stop.rip)?.map_or(u64::MAX, |gpa| gpa.0);
                let is_set = stop.reason != DebugReason::SoftwareBreakpoint || self.stops.is_patched(gpa);
                Ok(is_set && base.wrapping_add(registers.rip) == stop.rip)
            }),
        }
    }

    /// Whether a stop of that vCPU is to be told now.
    fn is_of_interest(&self, index: u32) -> bool {
        match self.passing {
            Some((passing, _)) => passing == index,
            None => self.action(index).is_some(),
        }
    }

    fn has_stop_to_tell(&self) -> bool {
        self.pending.iter().any(|(index, _)| self.is_of_interest(*index))
    }

    /// The vCPUs are to run when the debugger is gone.
    pub(super) fn let_go(&mut self) {
        self.let_go = true;
    }

    /// Whether the debugger has let the vCPUs run since it attached.
    pub(super) fn was_let_go(&self) -> bool {
        self.let_go
    }

    /// Asks one vCPU for stops.
    fn ask(&self, index: u32, request: DebugRequest) -> Result<()> {
        self.with(index, |vcpu| match vcpu.debug_stops() {
            Some(stops) => stops.request(&request),
            None if request == DebugRequest::none() => Ok(()),
            None => Err(Error::unsupported("stopping for a debugger", "the backend has no debug stops")),
        })
    }

    fn go(&self) -> Result<()> {
        if let Some(clock) = &self.clock {
            clock.resume()?;
        }
        if self.locked {
            self.threads.resume_only(&self.actions.iter().map(|(index, _)| *index).collect::<Vec<_>>());
        } else {
            self.threads.resume();
        }
        Ok(())
    }

    /// What ended a vCPU, for the VMM; taken once the debugger was told and has let the vCPUs go.
    pub(super) fn take_fate(&mut self) -> Option<VcpuExit> {
        self.fate.pop_front()
    }

    /// The next stop to tell a debugger that waits for one, if there is any: which vCPU and why. All stand still then.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    pub(super) fn next_stop(&mut self) -> Result<Option<(u32, Stop)>> {
        loop {
            let next = self.pending.iter().position(|(index, _)| self.is_of_interest(*index));
            if let Some((index, stop)) = next.and_then(|next| self.pending.remove(next)) {
                if let Some(stop) = self.judge(index, stop)? {
                    self.current = index;
                    return Ok(Some((index, stop)));
                }
                continue;
            }
            let Some(exit) = self.threads.wait(Some(Duration::ZERO)) else { return Ok(None) };
            let passing = self.passing;
            self.keep(exit);
            self.pause()?;
            if let Some(exit) = self.fate.front() {
                self.current = exit.index;
                return Ok(Some((exit.index, Stop::Ended)));
            }
            self.passing = passing;
        }
    }

    /// Why a vCPU stopped. `None` if that is no business of the debugger's: then the vCPUs go on.
    fn judge(&mut self, index: u32, stop: DebugStop) -> Result<Option<Stop>> {
        if let Some((passing, steps)) = self.passing.filter(|(passing, _)| *passing == index) {
            self.passing = None;
            // It is where the guest's handler begins.
            if stop.reason == DebugReason::SingleStep {
                if steps {
                    return Ok(Some(Stop::Step));
                }
                self.ask(passing, self.stops.request())?;
                if !self.has_stop_to_tell() {
                    self.go()?;
                }
                return Ok(None);
            }
        }
        Ok(match stop.reason {
            DebugReason::SingleStep => Some(Stop::Step),
            DebugReason::Hardware { hits } => Some(self.stops.hit(hits).map_or(Stop::Step, Stop::Hardware)),
            DebugReason::SoftwareBreakpoint => {
                let gpa = self.with(index, |vcpu| vcpu.translate(stop.rip))?;
                if gpa.is_some_and(|gpa| self.stops.is_patched(gpa.0)) {
                    Some(Stop::Software)
                } else {
                    self.pass(index)?;
                    None
                }
            }
        })
    }

    /// Lets a vCPU, alone, execute an INT3 that is the guest's own.
    fn pass(&mut self, index: u32) -> Result<()> {
        let mut request = self.stops.request().step_without_interrupts();
        request.software_breakpoints = false;
        self.ask(index, request)?;
        self.passing = Some((index, self.action(index) == Some(Action::Step)));
        if let Some(clock) = &self.clock {
            clock.resume()?;
        }
        self.threads.resume_only(&[index]);
        Ok(())
    }

    /// Leaves the machine as if there had been no debugger; if it `goes_on`, the vCPUs run.
    ///
    /// # Errors
    /// If the backend refuses.
    pub(super) fn release(&mut self, goes_on: bool) -> Result<()> {
        self.pause()?;
        self.stops.clear(&self.ram);
        self.clear_actions();
        self.pending.clear();
        self.let_go = false;
        for index in self.threads.indices() {
            self.ask(index, DebugRequest::none())?;
        }
        if goes_on && self.fate.is_empty() {
            return self.go();
        }
        // The VMM may let them run itself.
        self.clock.as_ref().map_or(Ok(()), |clock| clock.resume())
    }
}
