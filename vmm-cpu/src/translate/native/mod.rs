//! Programs that another engine runs natively, while everything else of the guest stays here.
//!
//! The run loop asks the engine before it executes code of privilege level 3. The engine takes the registers over, runs the
//! program until something happens that is not the program's own affair, leaves the registers behind, and says what it was:
//! exceptions are delivered here, through the guest's own tables, and what the engine cannot execute is executed here, one
//! instruction at a time. Nothing of a program's code is kept here, since its pages may change unseen.
//!
//! Called by [`run`](crate::translate::run). Threat model: what the engine leaves behind is the hostile program's choice, as its registers
//! are in any case; the engine sees to flags that a program may not choose.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::cpuid::CpuidTable;
use crate::error::Result;
use crate::hypervisor::VmConfig;
use crate::state::{GeneralRegisters, SystemRegisters, XsaveArea};
use crate::translate::block;
use crate::translate::clock::Clock;
use crate::translate::code_stores::Watch;
pub(crate) use crate::translate::core::Machine;
use crate::translate::core::{Flow, Place, Reason};
pub(crate) use crate::translate::cpuid::supported_with_vectors;
pub(crate) use crate::translate::exception::{Event, Exception, vector};
pub(crate) use crate::translate::hypervisor::check_restored;
use crate::translate::hypervisor::{AddressWindow, TranslateOptions};
use crate::translate::memory::PAGE_MASK;
pub(crate) use crate::translate::memory::{Access, Invalidated, MemoryMap};
use crate::translate::run::{execute_one, leave};
use crate::translate::segment::index;
pub(crate) use crate::translate::signals::InNative;
use crate::translate::vm::{Shared, TranslateVm};
use crate::vcpu::Halt;

/// A virtual machine whose programs another engine runs.
pub(crate) type SoftwareVm = TranslateVm;

/// Makes one with that CPUID, whose time-stamp counter is that of the programs: what `counter` reads.
///
/// # Errors
/// As [`Hypervisor::create_vm`](crate::Hypervisor::create_vm).
pub(crate) fn new_software_vm(
    config: &VmConfig,
    cpuid: CpuidTable,
    tsc_khz: u32,
    counter: fn() -> u64,
    backend: &'static str,
) -> Result<SoftwareVm> {
    crate::translate::hypervisor::check(config)?;
    let clock = Clock::with_counter(tsc_khz, counter);
    // Programs that compute run elsewhere.
    let options = TranslateOptions::default().address_window(AddressWindow::Never);
    let mut shared = Shared::new(cpuid, config.interrupts, config.max_vcpus, clock, options);
    shared.backend = backend;
    Ok(TranslateVm(Arc::new(shared)))
}

/// An engine that runs programs of one vCPU.
pub(crate) trait Native: fmt::Debug + Send {
    /// Runs the program from the vCPU's registers on. Nothing else is due when this is called.
    ///
    /// # Errors
    /// What the host says.
    fn run(&mut self, m: &mut Machine<'_>) -> Result<Stay>;

    /// Whether programs have run since software last executed code of privilege level 3: they may have changed it unseen.
    fn may_have_changed_code(&mut self) -> bool;

    /// Software runs the program that was declined, which has not left for its kernel since.
    fn goes_on(&mut self, m: &Machine<'_>);

    /// Software does not have the instruction at RIP: whether the engine runs the program from there on.
    fn has_it(&mut self, m: &Machine<'_>) -> bool;

    /// What happened so far, by kind.
    fn counts(&self) -> Vec<(&'static str, u64)>;
}

/// Why a program came back, or did not go.
#[derive(Debug)]
pub(crate) enum Stay {
    /// It is none that the engine runs: software does.
    Declined,
    /// Somebody wants something of the vCPU, or the program just goes on.
    Over,
    /// This is to be delivered.
    Event(Event),
    /// Software is to execute the instruction at RIP. Where that is one that software does not have, it is this exception.
    Instruction(Option<Exception>),
    /// The vCPU cannot go on.
    Halt(Halt),
}

/// The engine that runs a vCPU's programs, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere(pub(crate) Option<Box<dyn Native>>);

impl Elsewhere {
    /// Lets the engine run the program, unless just one instruction is to be executed, and does what it came back for. Where
    /// software is to run it instead, the loop goes on; else it looks around, or returns with the halt.
    ///
    /// # Errors
    /// As [`Native::run`], and what software does not know.
    pub(crate) fn run(&mut self, m: &mut Machine<'_>, single: bool) -> Result<ControlFlow<Option<Halt>>> {
        let Some(native) = &mut self.0 else { return Ok(ControlFlow::Continue(())) };
        let stay = if m.runs_program() && !single { native.run(m)? } else { Stay::Declined };
        let result = match stay {
            Stay::Declined => {
                if native.may_have_changed_code() {
                    // What is known of it is compared with memory when it is next looked up.
                    m.tlb.forget_lookups();
                }
                return Ok(ControlFlow::Continue(()));
            }
            Stay::Over => return Ok(ControlFlow::Break(None)),
            Stay::Halt(halt) => return Ok(ControlFlow::Break(Some(halt))),
            Stay::Event(event) => m.take(event),
            Stay::Instruction(otherwise) => m.execute_unkept(otherwise),
        };
        let halt = if result.is_err() { leave(m)? } else { None };
        Ok(ControlFlow::Break(halt))
    }

    /// The loop looks around while software runs the program.
    pub(crate) fn goes_on(&mut self, m: &Machine<'_>) {
        if let Some(native) = &mut self.0 {
            native.goes_on(m);
        }
    }

    /// Whether an exception is for want of an instruction that the engine may have; then it is none.
    pub(crate) fn has_it(&mut self, m: &mut Machine<'_>) -> bool {
        let is_undefined = matches!(&m.reason, Reason::Exception(raised) if raised.vector == vector::UD);
        let has_it = is_undefined && self.0.as_mut().is_some_and(|native| native.has_it(m));
        if has_it {
            m.reason = Reason::None;
        }
        has_it
    }

    /// What happened so far, by kind.
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        self.0.as_ref().map_or(Vec::new(), |native| native.counts())
    }
}

impl Machine<'_> {
    /// The fault of an access of the program, if it has one: KVM's word is not taken for it.
    pub(crate) fn program_fault(&mut self, va: u64, access: Access) -> Option<Exception> {
        let fault = self.translate(Place::data(va), access).is_err();
        match std::mem::take(&mut self.reason) {
            Reason::Exception(exception) if fault => Some(exception),
            _ => None,
        }
    }

    /// Hands over the vector registers and x87 of the program. Components that its kernel has not turned on, and does not keep
    /// apart, are as after reset.
    pub(crate) fn program_vectors(&self) -> XsaveArea {
        let mut area = self.extended.clone().unwrap_or_default();
        area.retain(self.cpu.xcr0);
        self.xsave_over(area)
    }

    /// Takes them back.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) for what no processor holds.
    pub(crate) fn take_program_vectors(&mut self, area: XsaveArea) -> Result<()> {
        self.load_xsave(&area)?;
        self.extended = Some(area);
        Ok(())
    }

    /// Takes back the program's registers: general ones, and the segments that it can load by itself.
    pub(crate) fn take_program(&mut self, general: &GeneralRegisters, system: &SystemRegisters) {
        let segments = [
            (index::DS, &system.ds),
            (index::ES, &system.es),
            (index::FS, &system.fs),
            (index::GS, &system.gs),
        ];
        for (n, segment) in segments {
            *self.cpu.segment_mut(n) = segment.into();
        }
        self.set_general_registers(general);
    }

    /// Whether there is somebody who ends a stay when the next timer is due.
    pub(crate) fn has_program_alarm(&self) -> bool {
        self.shared.alarm.is_some()
    }

    /// Has the loop look around when the next timer is due.
    pub(crate) fn set_program_alarm(&self) {
        if let Some(alarm) = &self.shared.alarm {
            alarm.set(self.index, self.deadline, &self.signals);
        }
    }

    /// Whether the loop may ask the engine.
    pub(crate) fn runs_program(&self) -> bool {
        self.mode.cpl == 3 && self.mode.code_bits == 64 && self.cpu.long_mode()
    }

    /// Executes the instruction at RIP, of which nothing is kept.
    pub(crate) fn execute_unkept(&mut self, otherwise: Option<Exception>) -> Flow {
        let kept = self.rare.len();
        let rip = self.cpu.rip;
        let result = self.fetch_and_execute(rip);
        self.rare.truncate(kept);
        if result.is_err()
            && let Some(exception) = otherwise
        {
            let unknown = match &self.reason {
                Reason::Exception(raised) => raised.vector == vector::UD,
                Reason::Unhandled(_) => true,
                _ => false,
            };
            if unknown {
                self.reason = Reason::Exception(exception);
            }
        }
        result
    }

    fn fetch_and_execute(&mut self, rip: u64) -> Flow {
        let page = self.translate(Place::data(rip), Access::Execute)?;
        let block = block::build(self, rip, page.gpa | rip & !PAGE_MASK, Watch::Unsettled)?;
        execute_one(self, &block, rip, 0).map(drop)
    }
}
