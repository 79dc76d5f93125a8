//! A saved virtual processor, as others see it.

use zerocopy::{FromBytes as _, IntoBytes as _};

use super::*;
use crate::error::Result;
use crate::xen_pv::abi::{PAGE_SIZE, shared_info};
use crate::xen_pv::memory::DomainMemory;
use crate::xen_pv::saved::{ProcessorState, RunstateState, invalid};
use crate::xen_pv::start::check_start;

impl Processor {
    pub(crate) fn save(&self) -> ProcessorState {
        let RunstateInfo { state, state_entry_time, time, .. } = self.runstate_as_entered();
        ProcessorState {
            info: self.info(),
            info_registered: self.info_is_registered(),
            nmi: self.has_nmi(),
            up: self.is_up(),
            initialised: self.is_initialised(),
            start: lock(&self.start).as_ref().map(|start| start.as_bytes().to_vec()),
            runstate: RunstateState { state, entered: state_entry_time, time },
            runstate_area: self.runstate_area().unwrap_or(0),
            time_area: self.time_area().unwrap_or(0),
        }
    }

    /// Virtual processor `index` as it was saved; `info` is where its `vcpu_info` is at first.
    pub(crate) fn restore(
        index: u32,
        info: u64,
        saved: &ProcessorState,
        memory: &DomainMemory,
    ) -> Result<Self> {
        let problem = |what: &str| Err(invalid("backend.processors", format!("number {index}: {what}")));
        let place = saved.info % PAGE_SIZE;
        let registered = memory.is_ram(saved.info / PAGE_SIZE)
            && place.is_multiple_of(8)
            && place <= PAGE_SIZE - shared_info::VCPU_INFO_SIZE;
        if !(if saved.info_registered { registered } else { saved.info == info }) {
            return problem(&format!("a vcpu_info at {:#x}, where none can be", saved.info));
        }
        let start = match saved.start.as_ref().map(|start| VcpuGuestContext::read_from_bytes(start)) {
            None => None,
            Some(Err(_)) => return problem("a start of another size"),
            Some(Ok(start)) if check_start(memory, &start).is_err() => {
                return problem("a start with addresses, frames or descriptors that are none");
            }
            Some(Ok(start)) => Some(Box::new(start)),
        };
        if !saved.initialised && (saved.up || start.is_some() || index == 0) {
            return problem("it was never initialised, and is up, about to start, or the first one");
        }
        if saved.runstate.state > runstate::OFFLINE {
            return problem(&format!("run state {}, allowed are 0 to 3", saved.runstate.state));
        }
        let processor = Self::new(saved.info);
        processor.info_registered.store(saved.info_registered, Ordering::Release);
        processor.nmi.store(saved.nmi, Ordering::SeqCst);
        processor.up.store(saved.up, Ordering::SeqCst);
        processor.initialised.store(saved.initialised, Ordering::Release);
        *lock(&processor.start) = start;
        *lock(&processor.runstate) = RunstateInfo {
            state: saved.runstate.state,
            pad: 0,
            state_entry_time: saved.runstate.entered,
            time: saved.runstate.time,
        };
        processor.set_runstate_area(saved.runstate_area);
        processor.set_time_area(saved.time_area);
        Ok(processor)
    }
}
