//! Portable state to and from the interpreter's.

use super::core::Core;
use super::cpu::{Activity, Cpu, TableRegister, cr0, cr4, efer};
use super::exception::{Event, Exception, vector};
use super::segment::index;
use super::x87::{FXSAVE_X87_BYTES, PointerFormat, X87State};
use super::{apic, msr};
use crate::error::{Error, Result};
use crate::state::{
    CpuState, DescriptorTable, ExceptionEvent, ExceptionStage, GeneralRegisters, InterruptEvent,
    InterruptShadow, LocalApicState, Msr, NmiState, PendingEvents, RunState, Segment, SystemRegisters,
    XsaveArea,
};

/// Exceptions have vectors below (Intel SDM 3A 7.2).
const EXCEPTIONS: u8 = 32;
/// Where FXSAVE puts MXCSR, its mask, and the XMM registers.
const MXCSR: usize = 24;
const XMM: usize = 160;
/// In the header: which components are in use.
const XSTATE_BV: usize = 512;
/// MXCSR bits that can be set.
const MXCSR_MASK: u32 = 0xffff;
/// XSTATE_BV: x87 and SSE.
const X87_AND_SSE: u64 = 3;

fn invalid(element: &'static str, problem: String) -> Error {
    Error::InvalidState { element, problem }
}

/// Whether a processor can be in this mode (Intel SDM 3A 2.2 and 2.5).
fn check_system(system: &SystemRegisters, cr4_allowed: u64) -> Result<()> {
    let (paging, protected) = (system.cr0 & cr0::PG != 0, system.cr0 & cr0::PE != 0);
    let long_mode = system.efer & efer::LME != 0 && paging;
    let segments = [system.cs, system.ds, system.es, system.fs, system.gs, system.ss, system.tr, system.ldtr];
    let fail = |problem: String| Err(invalid("system", problem));
    if system.cr0 >> 32 != 0 {
        return fail(format!("CR0 is {:#x}, wider than 32 bits", system.cr0));
    }
    if paging && !protected {
        return fail(format!("CR0 is {:#x}: paging without protection", system.cr0));
    }
    if system.cr8 > 15 {
        return fail(format!("CR8 is {:#x}, allowed is 0 to 15", system.cr8));
    }
    if system.cr4 & !(cr4_allowed | cr4::OSXSAVE) != 0 {
        return fail(format!("CR4 is {:#x}, allowed are the bits {cr4_allowed:#x}", system.cr4));
    }
    if system.efer & !(efer::ALL | efer::FFXSR) != 0 {
        return fail(format!("EFER is {:#x}, allowed are the bits {:#x}", system.efer, efer::ALL));
    }
    if (system.efer & efer::LMA != 0) != long_mode {
        return fail(format!(
            "EFER is {:#x} with CR0 {:#x}: LMA must be LME and PG",
            system.efer, system.cr0
        ));
    }
    if long_mode && system.cr4 & cr4::PAE == 0 {
        return fail(format!("CR4 is {:#x}: long mode without PAE", system.cr4));
    }
    if segments.iter().any(|segment| segment.kind > 15 || segment.dpl > 3) {
        return fail("a segment's type is above 15 or its DPL above 3".to_owned());
    }
    Ok(())
}

/// The root of the page tables, and what says how they are read.
fn paging_registers(cpu: &Cpu) -> (u64, [u64; 3]) {
    const CR0: u64 = cr0::PG | cr0::WP | cr0::PE;
    const CR4: u64 = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP;
    (cpu.cr3, [cpu.cr0 & CR0, cpu.cr4 & CR4, cpu.efer & (efer::LMA | efer::NXE)])
}

impl Core {
    pub(crate) fn general_registers(&self) -> GeneralRegisters {
        let r = |slot| self.cpu.r(slot);
        GeneralRegisters {
            rax: r(0),
            rcx: r(1),
            rdx: r(2),
            rbx: r(3),
            rsp: r(4),
            rbp: r(5),
            rsi: r(6),
            rdi: r(7),
            r8: r(8),
            r9: r(9),
            r10: r(10),
            r11: r(11),
            r12: r(12),
            r13: r(13),
            r14: r(14),
            r15: r(15),
            rip: self.cpu.rip,
            rflags: self.flags(),
        }
    }

    pub(crate) fn set_general_registers(&mut self, registers: &GeneralRegisters) {
        let g = registers;
        let values = [
            g.rax, g.rcx, g.rdx, g.rbx, g.rsp, g.rbp, g.rsi, g.rdi, g.r8, g.r9, g.r10, g.r11, g.r12, g.r13,
            g.r14, g.r15,
        ];
        for (slot, value) in (0..).zip(values) {
            self.cpu.set_r(slot, value);
        }
        self.cpu.rip = g.rip;
        self.cpu.flags.set(g.rflags);
        self.rf_loaded_at = Some(self.instructions);
        self.reported = None;
        self.update_mode();
    }

    pub(crate) fn system_registers(&self) -> SystemRegisters {
        let cpu = &self.cpu;
        let segment = |n| Segment::from(cpu.segment(n));
        let table = |table: TableRegister| DescriptorTable { base: table.base, limit: table.limit };
        SystemRegisters {
            cs: segment(index::CS),
            ds: segment(index::DS),
            es: segment(index::ES),
            fs: segment(index::FS),
            gs: segment(index::GS),
            ss: segment(index::SS),
            tr: (&cpu.tr).into(),
            ldtr: (&cpu.ldtr).into(),
            gdtr: table(cpu.gdtr),
            idtr: table(cpu.idtr),
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            cr8: self.cr8(),
            efer: cpu.efer,
            apic_base: cpu.apic_base,
            dr: cpu.dr,
            dr6: cpu.dr6,
            dr7: cpu.dr7,
            xcr0: cpu.xcr0,
        }
    }

    pub(crate) fn set_system_registers(&mut self, system: &SystemRegisters) -> Result<()> {
        check_system(system, self.cr4_allowed)?;
        let xcr0_allowed = self.xcr0_allowed();
        if system.xcr0 & 1 == 0 || system.xcr0 & !xcr0_allowed & !X87_AND_SSE != 0 {
            let problem = format!("XCR0 is {:#x}, allowed are bit 0 and {xcr0_allowed:#x}", system.xcr0);
            return Err(invalid("system", problem));
        }
        if let Some(apic) = &mut self.apic {
            apic.load_base(system.apic_base)?;
            apic.set_cr8(super::segment::low8(system.cr8));
        }
        let before = paging_registers(&self.cpu);
        self.put_system_registers(system);
        // What CPUID does not offer cannot be on, whoever saved it.
        self.cpu.cr4 = system.cr4 & self.cr4_allowed;
        let after = paging_registers(&self.cpu);
        if before.1 != after.1 {
            self.tlb.flush_all();
        } else if before.0 != after.0 {
            self.tlb.flush_local();
        }
        self.update_debug();
        self.refresh_deadline();
        self.update_mode();
        Ok(())
    }

    /// Sets registers to what was checked elsewhere. Nothing that follows from them is brought up to date.
    pub(crate) fn put_system_registers(&mut self, system: &SystemRegisters) {
        let cpu = &mut self.cpu;
        let segments = [
            (index::CS, &system.cs),
            (index::DS, &system.ds),
            (index::ES, &system.es),
            (index::FS, &system.fs),
            (index::GS, &system.gs),
            (index::SS, &system.ss),
        ];
        for (n, segment) in segments {
            *cpu.segment_mut(n) = segment.into();
        }
        (cpu.tr, cpu.ldtr) = ((&system.tr).into(), (&system.ldtr).into());
        cpu.gdtr = TableRegister { base: system.gdtr.base, limit: system.gdtr.limit };
        cpu.idtr = TableRegister { base: system.idtr.base, limit: system.idtr.limit };
        (cpu.cr0, cpu.cr2, cpu.cr3) = (system.cr0 & cr0::ALL | cr0::ET, system.cr2, system.cr3);
        (cpu.cr4, cpu.cr8) = (system.cr4, system.cr8);
        (cpu.efer, cpu.apic_base) = (system.efer & efer::ALL, system.apic_base);
        (cpu.dr, cpu.dr6, cpu.dr7) = (system.dr, system.dr6, system.dr7);
        cpu.xcr0 = system.xcr0;
    }

    pub(crate) fn save_state(&mut self) -> CpuState {
        let (now, tsc) = (self.now(), self.guest_tsc());
        let mut msrs = Vec::new();
        for index in msr::saved() {
            msrs.extend(self.msr(index).map(|value| Msr { index, value }));
        }
        if self.apic.is_some() {
            let deadline = self.msr(apic::MSR_TSC_DEADLINE);
            msrs.extend(deadline.map(|value| Msr { index: apic::MSR_TSC_DEADLINE, value }));
        }
        msrs.sort_unstable_by_key(|msr| msr.index);
        let local_apic = self.apic.as_mut().map(|apic| apic.save(now, tsc));
        let cpu = &self.cpu;
        let (exception, interrupt) = saved_event(self.injected);
        let events = PendingEvents {
            exception,
            interrupt,
            nmi: NmiState { injected: false, pending: cpu.nmi_pending, masked: cpu.nmi_masked },
            shadow: InterruptShadow { sti: cpu.shadow_sti, mov_ss: cpu.shadow_mov_ss },
            // An interrupt that came as a message of that kind has the pin to come back by.
            intr: self.signals.intr.is_high() || self.ext_int,
            sipi_vector: 0,
        };
        let run_state = match cpu.activity {
            Activity::Running => RunState::Running,
            Activity::Halted => RunState::Halted,
            Activity::WaitForInit => RunState::WaitForInit,
            Activity::WaitForSipi => RunState::WaitForSipi,
        };
        CpuState {
            general: self.general_registers(),
            system: self.system_registers(),
            xsave: self.xsave_area(),
            msrs,
            local_apic,
            events,
            run_state,
            backend: None,
        }
    }

    /// Replaces the state. On an error the vCPU is as it was.
    pub(crate) fn load_state(&mut self, state: &CpuState) -> Result<()> {
        check_events(&state.events)?;
        let waits = matches!(state.run_state, RunState::WaitForInit | RunState::WaitForSipi);
        if waits && self.apic.is_none() {
            return Err(invalid(
                "run_state",
                "without local APICs no vCPU waits for INIT or SIPI".to_owned(),
            ));
        }
        let old_cpu = self.cpu.clone();
        let (now, tsc) = (self.now(), self.guest_tsc());
        let deadline = self.msr(apic::MSR_TSC_DEADLINE).unwrap_or(0);
        let old_apic = self.apic.as_mut().map(|apic| apic.save(now, tsc));
        let result = self.load_checked(state);
        if result.is_err() {
            self.cpu = old_cpu;
            if let (Some(apic), Some(old)) = (&mut self.apic, old_apic) {
                apic.restore(self.cpu.apic_base, &old, now)?;
                self.set_apic_msr(apic::MSR_TSC_DEADLINE, deadline);
            }
            self.update_debug();
            self.update_mode();
        }
        result
    }

    fn load_checked(&mut self, state: &CpuState) -> Result<()> {
        self.cpu = Cpu::at_reset();
        self.set_system_registers(&state.system)?;
        // Memory may have changed as well.
        self.tlb.flush_all();
        self.load_xsave(&state.xsave)?;
        self.load_extended(&state.xsave);
        for Msr { index, value } in &state.msrs {
            if *index == apic::MSR_TSC_DEADLINE {
                continue;
            }
            self.check_counter(*index, *value)?;
            // Registers that this processor lacks are dropped; those that it has must take the value.
            if self.msr(*index).is_some() && self.set_msr(*index, *value).is_none() {
                return Err(invalid("msrs", format!("{index:#x} cannot hold {value:#x}")));
            }
        }
        let now = self.now();
        match (&mut self.apic, &state.local_apic) {
            (Some(apic), Some(registers)) => apic.restore(state.system.apic_base, registers, now)?,
            (None, Some(registers)) => refuse_interrupts_in_service(registers)?,
            _ => {}
        }
        if self.apic.is_some()
            && let Some(deadline) = state.msr(apic::MSR_TSC_DEADLINE)
            && deadline != 0
        {
            self.set_apic_msr(apic::MSR_TSC_DEADLINE, deadline);
        }
        self.set_general_registers(&state.general);
        let cpu = &mut self.cpu;
        cpu.nmi_pending = state.events.nmi.pending || state.events.nmi.injected;
        cpu.nmi_masked = state.events.nmi.masked && !state.events.nmi.injected;
        (cpu.shadow_sti, cpu.shadow_mov_ss) = (state.events.shadow.sti, state.events.shadow.mov_ss);
        cpu.activity = match state.run_state {
            RunState::Running => Activity::Running,
            RunState::Halted => Activity::Halted,
            RunState::WaitForInit => Activity::WaitForInit,
            RunState::WaitForSipi => Activity::WaitForSipi,
        };
        self.injected = injected_event(&state.events);
        self.ext_int = false;
        self.refresh_deadline();
        self.update_mode();
        Ok(())
    }

    /// A time-stamp counter that cannot be set must not go back.
    fn check_counter(&self, index: u32, value: u64) -> Result<()> {
        let Some(counter) = self.shared.clock.counter().filter(|_| index == msr::TSC) else {
            return Ok(());
        };
        if value <= counter {
            return Ok(());
        }
        let problem = format!(
            "the time-stamp counter was {value:#x}, and the host's own, which this machine has, is {counter:#x}"
        );
        Err(invalid("msrs", problem))
    }

    /// x87 and SSE in the standard format.
    fn xsave_area(&self) -> XsaveArea {
        self.xsave_over(self.extended.clone().unwrap_or_default())
    }

    /// x87 and SSE over what an area holds of them; its other components stay.
    pub(crate) fn xsave_over(&self, area: XsaveArea) -> XsaveArea {
        let in_use = area.xstate_bv() | X87_AND_SSE;
        let mut bytes = area.bytes().to_vec();
        let mut x87 = [0; FXSAVE_X87_BYTES];
        self.cpu.x87.to_fxsave(&mut x87, PointerFormat::Offsets);
        let mut put = |at: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(0, &x87);
        put(MXCSR, &self.cpu.mxcsr.to_le_bytes());
        put(MXCSR + 4, &MXCSR_MASK.to_le_bytes());
        for register in 0..16 {
            put(XMM + 16 * usize::from(register), &self.cpu.xmm(register).to_le_bytes());
        }
        put(XSTATE_BV, &in_use.to_le_bytes());
        XsaveArea::from_bytes(bytes).unwrap_or_default()
    }

    pub(crate) fn load_xsave(&mut self, area: &XsaveArea) -> Result<()> {
        // The components defined so far end with bit 19 (Intel SDM 1 13.1).
        if area.xstate_bv() >> 20 != 0 {
            return Err(invalid("xsave", format!("XSTATE_BV is {:#x}", area.xstate_bv())));
        }
        if area.mxcsr() & !MXCSR_MASK != 0 {
            return Err(invalid("xsave", format!("MXCSR is {:#x}, wider than 16 bits", area.mxcsr())));
        }
        let mut x87 = [0; FXSAVE_X87_BYTES];
        if let Some(bytes) = area.bytes().get(..FXSAVE_X87_BYTES) {
            x87.copy_from_slice(bytes);
        }
        let in_use = |component: u32| area.xstate_bv() >> component & 1 != 0;
        self.cpu.x87 =
            if in_use(0) { X87State::from_fxsave(&x87, PointerFormat::Offsets) } else { X87State::default() };
        self.cpu.mxcsr = area.mxcsr();
        for register in 0..16 {
            let value = area.xmm(register.into()).filter(|_| in_use(1)).unwrap_or(0);
            self.cpu.set_xmm(register, value);
        }
        Ok(())
    }
}

impl Core {
    /// Takes over components beyond SSE, where this processor has any.
    pub(crate) fn load_extended(&mut self, area: &XsaveArea) {
        let Some(extended) = &self.extended else { return };
        let mut bytes = area.bytes().to_vec();
        bytes.resize(extended.bytes().len(), 0);
        self.extended = XsaveArea::from_bytes(bytes);
    }
}

/// What was about to be delivered.
fn injected_event(events: &PendingEvents) -> Option<Event> {
    if let Some(exception) = events.exception {
        let mut event = Exception::new(exception.vector);
        event.error = exception.error_code;
        // Side effects of an injected one are applied already.
        if exception.stage == ExceptionStage::Pending {
            match exception.vector {
                vector::PF => event.cr2 = exception.payload,
                vector::DB => event = Exception::debug(exception.payload.unwrap_or(0)),
                _ => {}
            }
        }
        return Some(Event::Exception(event));
    }
    events.interrupt.map(|interrupt| match interrupt.software {
        true => Event::Software { vector: interrupt.vector },
        false => Event::External { vector: interrupt.vector },
    })
}

/// What [`injected_event`] made of a state that was not run since.
fn saved_event(event: Option<Event>) -> (Option<ExceptionEvent>, Option<InterruptEvent>) {
    match event {
        Some(Event::Exception(exception)) => {
            let mut saved = ExceptionEvent::injected(exception.vector, exception.error);
            let is_debug = exception.vector == vector::DB && exception.dr6 != 0;
            if exception.cr2.is_some() || is_debug {
                saved.stage = ExceptionStage::Pending;
                saved.payload = exception.cr2.or(Some(exception.dr6));
            }
            (Some(saved), None)
        }
        Some(Event::Software { vector }) => (None, Some(InterruptEvent::new(vector, true))),
        Some(Event::External { vector }) => (None, Some(InterruptEvent::new(vector, false))),
        _ => (None, None),
    }
}

fn check_events(events: &PendingEvents) -> Result<()> {
    match events.exception {
        Some(exception) if exception.vector >= EXCEPTIONS => {
            Err(invalid("events", format!("exception {}, allowed is 0 to 31", exception.vector)))
        }
        Some(exception) if !matches!(exception.stage, ExceptionStage::Pending | ExceptionStage::Injected) => {
            Err(invalid("events", "an exception that is neither pending nor injected".to_owned()))
        }
        _ => Ok(()),
    }
}

/// A local APIC cannot be carried over to where there is none; one that holds nothing is no loss.
fn refuse_interrupts_in_service(registers: &LocalApicState) -> Result<()> {
    let [_, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, rest @ ..] = &registers.registers;
    // ISR, TMR and IRR, eight registers each.
    let in_service = rest.iter().take(8).chain(rest.iter().skip(16).take(8));
    if in_service.into_iter().any(|word| *word != 0) {
        return Err(invalid(
            "local_apic",
            "interrupts are pending, and there is no local APIC here".to_owned(),
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
