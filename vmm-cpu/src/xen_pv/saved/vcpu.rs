//! A virtual processor's state from it, and the other way round.

use std::sync::Arc;

use super::{
    CallbackState, DescriptorState, PeriodicState, TrapState, VcpuState, from_blob, invalid, to_blob,
};
use crate::error::Result;
use crate::state::{CpuState, Msr, RunState};
use crate::vcpu::Vcpu as _;
use crate::xen_pv::abi::vcpu::TrapInfo;
use crate::xen_pv::abi::{FIRST_RESERVED_GDT_ENTRY, PAGE_SIZE};
use crate::xen_pv::engine::{Engine as _, GuestMode, Mmu as _, Ring3};
use crate::xen_pv::hypercall::vcpu::{MAX_PERIOD, MIN_PERIOD};
use crate::xen_pv::memory::is_canonical;
use crate::xen_pv::processor::Processor;
use crate::xen_pv::vcpu::{XenPvVcpu, msr};
use crate::xen_pv::vcpu_abi::{Callback, VcpuAbi};
use vmm_memory::vm_memory::GuestAddress;

/// Descriptors of a frame.
const DESCRIPTORS: u64 = PAGE_SIZE / 8;

impl XenPvVcpu {
    /// The whole state. It stands between two instructions of the guest, or before a hypercall that is made again.
    pub(in crate::xen_pv) fn saved(&mut self) -> Result<CpuState> {
        let mut system = self.system_registers()?;
        system.xcr0 = self.engine.xcr0_in_use();
        let state = save(&self.abi, &mut self.engine)?;
        Ok(CpuState {
            general: self.engine.context().general,
            system,
            xsave: self.engine.extended_state()?,
            msrs: vec![
                Msr { index: msr::TSC, value: self.engine.time_stamp()? },
                Msr { index: msr::KERNEL_GS_BASE, value: state.other_gs_base },
            ],
            run_state: if state.online { RunState::Running } else { RunState::WaitForInit },
            backend: Some(to_blob(&state)?),
            ..CpuState::default()
        })
    }

    /// Takes over a state, of which nothing is taken over if anything does not fit.
    pub(in crate::xen_pv) fn restore_saved(&mut self, cpu: &CpuState) -> Result<()> {
        if self.abi.domain.republished.is_none() || self.has_run {
            let problem =
                "it goes to a virtual processor that did not run yet, of a domain that was restored";
            return Err(invalid("backend", problem));
        }
        let state: VcpuState = from_blob(cpu.backend.as_ref())?;
        check(&state, &self.abi)?;
        let descriptors = state.descriptors.iter().map(|entry| (entry.index, entry.value));
        self.engine.check_saved(&cpu.system, &cpu.xsave, descriptors)?;
        // The one thing that the backend below may refuse.
        self.engine.restore_extended_state(&cpu.xsave)?;
        self.engine.restore_system(&cpu.system)?;
        self.engine.context().general = cpu.general;
        self.abi.control.cr2 = cpu.system.cr2;
        restore(&state, &mut self.abi, &mut self.engine)
    }
}

fn save(abi: &VcpuAbi, engine: &mut Ring3) -> Result<VcpuState> {
    let time_stamp = engine.time_stamp()?;
    let context = *engine.context();
    let descriptors = (0..=u16::MAX)
        .take(usize::try_from(abi.gdt_entries).unwrap_or(0))
        .map(|index| DescriptorState { index, value: engine.descriptor(index) })
        .filter(|descriptor| descriptor.value != 0)
        .collect();
    let traps = (0..=u8::MAX)
        .zip(abi.traps.iter())
        .filter(|(_, trap)| trap.address != 0)
        .map(|(vector, trap)| TrapState { vector, flags: trap.flags, cs: trap.cs, address: trap.address })
        .collect();
    Ok(VcpuState {
        online: abi.online,
        in_program: context.mode == GuestMode::User,
        selectors: [context.cs, context.ss, context.ds, context.es, context.fs, context.gs],
        fs_base: context.fs_base,
        gs_base: context.gs_base,
        other_gs_base: context.other_gs_base,
        kernel_sp: context.kernel_sp,
        kernel_ss: abi.kernel_ss,
        kernel_root: engine.guest_root().map(|root| root.0),
        user_root: engine.user_root().map(|root| root.0),
        gdt_frames: abi.gdt.clone(),
        gdt_entries: abi.gdt_entries,
        descriptors,
        traps,
        event: abi.event.into(),
        failsafe: abi.failsafe.into(),
        syscall: abi.syscall.into(),
        syscall32: abi.syscall32.into(),
        sysenter: abi.sysenter.into(),
        nmi: abi.nmi.into(),
        task_switched: abi.control.task_switched,
        cr4: abi.control.cr4,
        iopl: abi.control.iopl,
        singleshot: abi.singleshot,
        periodic: abi.periodic.map(|(period, next)| PeriodicState { period, next }),
        system_time: abi.domain.clock.stands_at(time_stamp),
    })
}

/// Whether a virtual processor of this domain can be in that state.
fn check(state: &VcpuState, abi: &VcpuAbi) -> Result<()> {
    let memory = &abi.domain.memory;
    if state.online && !abi.processor().is_some_and(Processor::is_up) {
        return Err(invalid("backend.online", "it is, and the domain says that it is down"));
    }
    for (element, root) in
        [("backend.kernel_root", state.kernel_root), ("backend.user_root", state.user_root)]
    {
        if let Some(root) =
            root.filter(|root| !root.is_multiple_of(PAGE_SIZE) || !memory.is_ram(root / PAGE_SIZE))
        {
            return Err(invalid(element, format!("{root:#x}, which is no page of the domain's RAM")));
        }
    }
    let callbacks = [state.event, state.failsafe, state.syscall, state.syscall32, state.sysenter, state.nmi];
    let bases = [state.fs_base, state.gs_base, state.other_gs_base];
    for (element, address) in (bases.iter().map(|base| ("backend.bases", *base)))
        .chain(callbacks.iter().map(|callback| ("backend.callbacks", callback.rip)))
        .chain(state.traps.iter().map(|trap| ("backend.traps", trap.address)))
    {
        if !is_canonical(address) {
            return Err(invalid(element, format!("{address:#x}, which is not canonical")));
        }
    }
    if state.traps.len() > abi.traps.len() {
        return Err(invalid("backend.traps", format!("{} of them, 256 at most", state.traps.len())));
    }
    let entries = state.gdt_entries;
    let frames = u64::try_from(state.gdt_frames.len()).unwrap_or(u64::MAX);
    if entries > FIRST_RESERVED_GDT_ENTRY || frames != entries.div_ceil(DESCRIPTORS) {
        let problem = format!(
            "{entries} entries in {frames} frames, allowed are {FIRST_RESERVED_GDT_ENTRY} of {DESCRIPTORS} each"
        );
        return Err(invalid("backend.gdt_entries", problem));
    }
    if let Some(frame) = state.gdt_frames.iter().find(|frame| !memory.is_ram(**frame)) {
        return Err(invalid("backend.gdt_frames", format!("{frame:#x}, which is not RAM")));
    }
    let mut next = 0;
    for descriptor in &state.descriptors {
        let index = u64::from(descriptor.index);
        if !(next..entries).contains(&index) {
            let problem = format!("entry {index}, allowed are {next} to {entries}");
            return Err(invalid("backend.descriptors", problem));
        }
        next = index + 1;
    }
    if state.iopl > 3 {
        return Err(invalid("backend.iopl", format!("{}, allowed are 0 to 3", state.iopl)));
    }
    match state.periodic {
        Some(timer) if !(MIN_PERIOD..=MAX_PERIOD).contains(&timer.period) => {
            let problem = format!("{} ns, allowed are {MIN_PERIOD} to {MAX_PERIOD}", timer.period);
            Err(invalid("backend.periodic", problem))
        }
        _ => Ok(()),
    }
}

/// Takes over a state that was checked.
fn restore(state: &VcpuState, abi: &mut VcpuAbi, engine: &mut Ring3) -> Result<()> {
    let domain = Arc::clone(&abi.domain);
    domain.clock.go_on_from(state.system_time);
    let roots = [(state.kernel_root, GuestMode::Kernel), (state.user_root, GuestMode::User)];
    for (root, mode) in roots {
        let root = root.map(GuestAddress);
        if let Some(root) = root {
            // Whatever engine it was of has left its entries there.
            domain.tables.become_root(root.0 / PAGE_SIZE, mode == GuestMode::User);
            engine.prepare_root(root, mode)?;
        }
        match (mode, root) {
            (GuestMode::Kernel, Some(root)) => engine.set_kernel_root(root)?,
            (GuestMode::Kernel, None) => {}
            (GuestMode::User, root) => engine.set_user_root(root)?,
        }
    }
    for index in (0..=u16::MAX).take(usize::try_from(abi.gdt_entries).unwrap_or(0)) {
        engine.set_descriptor(index, 0);
    }
    for descriptor in &state.descriptors {
        engine.set_descriptor(descriptor.index, descriptor.value);
    }
    let context = engine.context();
    context.mode = if state.in_program { GuestMode::User } else { GuestMode::Kernel };
    [context.cs, context.ss, context.ds, context.es, context.fs, context.gs] = state.selectors;
    (context.fs_base, context.gs_base) = (state.fs_base, state.gs_base);
    (context.other_gs_base, context.kernel_sp) = (state.other_gs_base, state.kernel_sp);
    abi.traps.fill(TrapInfo::default());
    for trap in &state.traps {
        if let Some(entry) = abi.traps.get_mut(usize::from(trap.vector)) {
            let TrapState { vector, flags, cs, address } = *trap;
            *entry = TrapInfo { vector, flags, cs, address, pad: 0 };
        }
    }
    abi.kernel_ss = state.kernel_ss;
    abi.event = state.event.into();
    abi.failsafe = state.failsafe.into();
    abi.syscall = state.syscall.into();
    abi.syscall32 = state.syscall32.into();
    abi.sysenter = state.sysenter.into();
    abi.nmi = state.nmi.into();
    (abi.gdt, abi.gdt_entries) = (state.gdt_frames.clone(), state.gdt_entries);
    abi.set_task_switched(engine, state.task_switched);
    (abi.control.cr4, abi.control.iopl) = (state.cr4, state.iopl);
    abi.singleshot = state.singleshot;
    abi.periodic = state.periodic.map(|timer| (timer.period, timer.next));
    abi.timers_due = true;
    abi.polling = None;
    abi.time_published = false;
    abi.online = state.online;
    Ok(())
}

impl From<Callback> for CallbackState {
    fn from(callback: Callback) -> Self {
        Self { rip: callback.rip, masks_events: callback.masks_events }
    }
}

impl From<CallbackState> for Callback {
    fn from(callback: CallbackState) -> Self {
        Self { rip: callback.rip, masks_events: callback.masks_events }
    }
}
