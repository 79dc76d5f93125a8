//! A domain's state from the domain, and a domain from its state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{ConsoleState, DomainState, PortKind, from_blob, invalid, to_blob};
use crate::cpuid::{CpuModel, CpuidTable};
use crate::error::{Error, Result};
use crate::hypervisor::VmConfig;
use crate::state::{BackendBlob, ClockState, VmState};
use crate::xen_pv::abi::sched::ShutdownReason;
use crate::xen_pv::abi::{domid, vm_assist};
use crate::xen_pv::domain::{ConsoleChannel, Domain, DomainConfig, Parts};
use crate::xen_pv::events::Ports;
use crate::xen_pv::grants::Grants;
use crate::xen_pv::memory::DomainMemory;
use crate::xen_pv::processor::Processor;
use crate::xen_pv::tables::Tables;

/// The assists that a guest can have.
const ASSISTS: u64 = 1 << vm_assist::FOUR_GB_SEGMENTS
    | 1 << vm_assist::FOUR_GB_SEGMENTS_NOTIFY
    | 1 << vm_assist::WRITABLE_PAGETABLES
    | 1 << vm_assist::ARCHITECTURAL_IOPL
    | 1 << vm_assist::RUNSTATE_UPDATE_FLAG;

/// The leaf of the extended state.
const STATE_LEAF: u32 = 0xd;

/// The state of a domain in that of its virtual machine, as far as it can be told before there is memory.
///
/// # Errors
/// [`Error::InvalidState`] if there is none, or it is one of another configuration.
pub(crate) fn check_config(config: &VmConfig, state: &VmState) -> Result<DomainState> {
    let misplaced =
        [("io_apic", state.io_apic.is_some()), ("pics", state.pics.is_some()), ("pit", state.pit.is_some())];
    if let Some((element, _)) = misplaced.into_iter().find(|(_, there)| *there) {
        return Err(invalid(element, "a paravirtual domain has event channels instead"));
    }
    if state.clock.is_some_and(|clock| clock.tsc_khz == 0) {
        return Err(invalid("clock.tsc_khz", "0, which is no rate"));
    }
    let domain: DomainState = from_blob(state.backend.as_ref())?;
    if domain.processors.len() != config.max_vcpus as usize {
        let problem = format!(
            "{} virtual processors; the configuration has {}",
            domain.processors.len(),
            config.max_vcpus
        );
        return Err(invalid("backend.processors", problem));
    }
    Ok(domain)
}

fn no_memory<E>(_: E) -> Error {
    Error::invalid("guest memory", "no shared frames or table", "all parts of the layout")
}

impl Domain {
    /// What belongs to no single virtual processor. Meaningful while none runs.
    pub(crate) fn save(&self, compatibility_mode: bool, clock: Option<ClockState>) -> Result<VmState> {
        let (ring, input) = self.console.save();
        let shutdown_code = self.latched_shutdown().map(ShutdownReason::number);
        let state = DomainState {
            ram: self.memory.layout().ram(),
            compatibility_mode,
            cpuid: self.cpuid.clone(),
            assists: self.assists.load(Ordering::Relaxed),
            shutdown: self.shutdown_reason().map(ShutdownReason::number),
            shutdown_code,
            console: ConsoleState { ring, port: self.open_console_port(), input },
            ports: self.ports.save(),
            grant_frames: self.grants.frames(),
            processors: self.processors.iter().map(Processor::save).collect(),
            shared: self.memory.save_shared().map_err(no_memory)?,
            marks: self.tables.save(),
            m2p: self.memory.save_m2p().map_err(no_memory)?,
        };
        let backend: Option<BackendBlob> = Some(to_blob(&state)?);
        Ok(VmState { clock, backend, ..VmState::default() })
    }

    /// A domain that goes on from `state`, with `config` as the machine here has it. Of guest memory, what is not RAM is written.
    ///
    /// # Errors
    /// [`Error::InvalidState`] naming the element that does not fit. Nothing was written then.
    pub(crate) fn restore(
        mut config: DomainConfig,
        compatibility_mode: bool,
        state: &DomainState,
    ) -> Result<Arc<Self>> {
        let layout = config.layout;
        if state.ram != layout.ram() {
            let problem = format!("{:#x} bytes; the domain here has {:#x}", state.ram, layout.ram());
            return Err(invalid("backend.ram", problem));
        }
        if state.compatibility_mode && !compatibility_mode {
            let problem = "32-bit programs could run where it was saved, and this engine runs none";
            return Err(invalid("backend.compatibility_mode", problem));
        }
        check_cpuid(&state.cpuid, &config.cpuid)?;
        config.cpuid = state.cpuid.clone();
        if state.assists & !ASSISTS != 0 {
            let problem = format!("{:#x}, allowed are the bits {ASSISTS:#x}", state.assists);
            return Err(invalid("backend.assists", problem));
        }
        let shutdown = reason("backend.shutdown", state.shutdown)?;
        let shutdown_code = reason("backend.shutdown_code", state.shutdown_code)?;
        let memory = DomainMemory::new(&config.ram, layout)?;
        let processors = (0..config.vcpus)
            .zip(&state.processors)
            .map(|(index, saved)| Processor::restore(index, memory.legacy_info(index), saved, &memory))
            .collect::<Result<Vec<_>>>()?;
        if processors.len() != state.processors.len() || processors.len() != config.vcpus as usize {
            return Err(invalid(
                "backend.processors",
                format!("{} virtual processors", state.processors.len()),
            ));
        }
        if let Some(frame) = state.console.ring.filter(|frame| !memory.is_ram(*frame)) {
            return Err(invalid("backend.console.ring", format!("frame {frame:#x}, which is not RAM")));
        }
        let ports = Ports::restore(&state.ports, config.vcpus)?;
        let grants = Grants::restore(state.grant_frames, &memory)?;
        memory.check_shared(&state.shared)?;
        memory.check_m2p(&state.m2p)?;
        Tables::check(&state.marks, layout.frames())?;
        let tables = Tables::shown(memory.map(), layout);
        let parts = Parts { tables, ports, grants, processors: processors.into(), memory, restored: true };
        let domain = Arc::new(Self::assemble(config, parts)?);
        domain.set_shutdown(shutdown, shutdown_code);
        domain.assists.store(state.assists, Ordering::Relaxed);
        domain.restore_console(&state.console)?;
        domain.memory.restore_shared(&state.shared).map_err(no_memory)?;
        domain.memory.restore_m2p(&state.m2p).map_err(no_memory)?;
        domain.tables.restore(&state.marks);
        domain.grants.forget_uses(&domain.memory);
        domain.bind_again(state);
        // Input that found no room, and output that nobody took.
        domain.service_console();
        Ok(domain)
    }

    fn restore_console(self: &Arc<Self>, console: &ConsoleState) -> Result<()> {
        if !self.console.restore(console.ring, &console.input) {
            return Err(invalid("backend.console.input", format!("{} bytes", console.input.len())));
        }
        if let Some(port) = console.port {
            let sink = Arc::new(ConsoleChannel(Arc::downgrade(self)));
            let connected = self.ports.connect(port, domid::BACKEND, sink);
            if connected.is_err() || self.console_port.set(port).is_err() {
                let problem = format!("port {port}, which leads to no back end");
                return Err(invalid("backend.console.port", problem));
            }
        }
        Ok(())
    }

    /// Asks the gate anew for the other ends of channels that the guest had bound. Those that it refuses wait for somebody to
    /// connect.
    fn bind_again(&self, state: &DomainState) {
        for (number, port) in (0..).zip(&state.ports).filter(|(_, port)| port.kind == PortKind::Bound) {
            if let Some(sink) = self.gate.bind(port.remote, port.other)
                && self.ports.connect(number, port.remote, Arc::clone(&sink)) == Ok(true)
            {
                sink.notify();
            }
        }
    }
}

fn reason(element: &'static str, number: Option<u8>) -> Result<Option<ShutdownReason>> {
    let Some(number) = number else { return Ok(None) };
    match ShutdownReason::from_number(number.into()) {
        Some(reason) => Ok(Some(reason)),
        None => Err(invalid(element, format!("{number}, allowed are 0 to 4"))),
    }
}

/// Whether a guest that was told `told` finds it on a processor of which it would be told `here`.
fn check_cpuid(told: &CpuidTable, here: &CpuidTable) -> Result<()> {
    const ELEMENT: &str = "backend.cpuid";
    CpuModel::Exact(told.clone()).resolve(here).map_err(|error| invalid(ELEMENT, error.to_string()))?;
    // Where the parts of the extended state lie.
    for entry in told.entries().iter().filter(|entry| entry.leaf == STATE_LEAF) {
        let component = entry.subleaf.unwrap_or(0);
        let place = |table: &CpuidTable| table.get(STATE_LEAF, component).map(|found| (found.eax, found.ebx));
        if component > 1 && entry.eax != 0 && place(told) != place(here) {
            let problem = format!(
                "component {component} of the extended state is {:x?} (size, offset) here and was {:x?}",
                place(here),
                place(told)
            );
            return Err(invalid(ELEMENT, problem));
        }
    }
    Ok(())
}
