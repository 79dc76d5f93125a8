//! Saved domains and virtual processors: what the ABI knows of them and guest memory does not hold, as plain data. It goes into the
//! backend's own part of [`VmState`](crate::state::VmState) and [`CpuState`](crate::state::CpuState); registers, debug registers, XCR0 and
//! the extended state are where other backends have them too.
//!
//! Nothing here is an engine's: what an engine keeps in guest memory is made anew, so a domain may go on on another engine.
//!
//! Threat model: all of it comes from a file, and is as hostile as a guest's hypercalls. What is restored is checked as a whole before any of it is
//! taken over. What a guest may have in its registers and tables anyway is taken as it is.

mod domain;
#[cfg(test)]
mod tests;
mod vcpu;

use vmm_memory::snapshot::SnapshotState;

pub(crate) use self::domain::check_config;
use super::NAME;
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};
use crate::state::BackendBlob;

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainState {
    /// Bytes.
    pub(crate) ram: u64,
    /// Whether 32-bit programs could run.
    pub(crate) compatibility_mode: bool,
    /// What the guest kernel was told of the processor.
    pub(crate) cpuid: CpuidTable,
    pub(crate) assists: u64,
    /// Xen's number.
    pub(crate) shutdown: Option<u8>,
    pub(crate) shutdown_code: Option<u8>,
    pub(crate) console: ConsoleState,
    /// By number; that of number 0 is free.
    pub(crate) ports: Vec<PortState>,
    pub(crate) grant_frames: u32,
    pub(crate) processors: Vec<ProcessorState>,
    pub(crate) shared: Vec<SharedPage>,
    pub(crate) marks: Vec<MarkRun>,
    pub(crate) m2p: Vec<M2pRun>,
}

/// The console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConsoleState {
    /// Frame.
    pub(crate) ring: Option<u64>,
    pub(crate) port: Option<u32>,
    /// Input that waits for room in the ring.
    pub(crate) input: Vec<u8>,
}

/// An event channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortState {
    pub(crate) kind: PortKind,
    /// The domain at the other end, or that it waits for.
    pub(crate) remote: u16,
    /// The other end's port, or the number of the virtual interrupt.
    pub(crate) other: u32,
    pub(crate) vcpu: u32,
    /// The guest sent something, and nobody was at the other end.
    pub(crate) sent: bool,
}

/// What an event channel is connected with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortKind {
    Free,
    Unbound,
    /// Something outside, which made the port.
    Backend,
    /// Something outside, which the guest bound.
    Bound,
    Loop,
    Virq,
    Ipi,
}

/// A virtual processor as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProcessorState {
    /// Guest-physical.
    pub(crate) info: u64,
    pub(crate) info_registered: bool,
    pub(crate) nmi: bool,
    pub(crate) up: bool,
    pub(crate) initialised: bool,
    /// A `vcpu_guest_context` that it did not take over yet.
    pub(crate) start: Option<Vec<u8>>,
    pub(crate) runstate: RunstateState,
    /// Guest-virtual, 0 for none.
    pub(crate) runstate_area: u64,
    pub(crate) time_area: u64,
}

/// A run state and the time in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RunstateState {
    pub(crate) state: u32,
    pub(crate) entered: u64,
    pub(crate) time: [u64; 4],
}

/// A frame that the domain shares with the ABI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SharedPage {
    /// From the first of them on.
    pub(crate) index: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Frames that are page tables of one level, pinned or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MarkRun {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) mark: u8,
}

/// Entries of the machine-to-physical table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct M2pRun {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// The first value.
    pub(crate) value: u64,
    /// The next ones count up; else all are the same.
    pub(crate) counts: bool,
}

/// A virtual processor as its thread sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VcpuState {
    pub(crate) online: bool,
    /// A program runs, not the kernel.
    pub(crate) in_program: bool,
    /// CS, SS, DS, ES, FS, GS.
    pub(crate) selectors: [u16; 6],
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) other_gs_base: u64,
    pub(crate) kernel_sp: u64,
    pub(crate) kernel_ss: u16,
    /// Guest-physical. None of a virtual processor that was never started.
    pub(crate) kernel_root: Option<u64>,
    pub(crate) user_root: Option<u64>,
    pub(crate) gdt_frames: Vec<u64>,
    pub(crate) gdt_entries: u64,
    /// Those that are not 0.
    pub(crate) descriptors: Vec<DescriptorState>,
    /// Those that have a handler.
    pub(crate) traps: Vec<TrapState>,
    pub(crate) event: CallbackState,
    pub(crate) failsafe: CallbackState,
    pub(crate) syscall: CallbackState,
    pub(crate) syscall32: CallbackState,
    pub(crate) sysenter: CallbackState,
    pub(crate) nmi: CallbackState,
    pub(crate) task_switched: bool,
    pub(crate) cr4: u64,
    pub(crate) iopl: u64,
    /// When the timer runs out, in system time.
    pub(crate) singleshot: Option<u64>,
    pub(crate) periodic: Option<PeriodicState>,
    /// When it was saved.
    pub(crate) system_time: u64,
}

/// An entry of the descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DescriptorState {
    pub(crate) index: u16,
    pub(crate) value: u64,
}

/// A handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrapState {
    pub(crate) vector: u8,
    pub(crate) flags: u8,
    pub(crate) cs: u16,
    pub(crate) address: u64,
}

/// An entry point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallbackState {
    pub(crate) rip: u64,
    pub(crate) masks_events: bool,
}

/// A timer that runs out again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeriodicState {
    pub(crate) period: u64,
    pub(crate) next: u64,
}

pub(crate) fn invalid(element: &'static str, problem: impl Into<String>) -> Error {
    Error::InvalidState { element, problem: problem.into() }
}

/// Checks that runs, of first and count, follow each other and end before `end`.
pub(crate) fn runs_ascend(
    element: &'static str,
    runs: impl Iterator<Item = (u64, u64)>,
    end: u64,
) -> Result<()> {
    let mut free = 0;
    for (first, count) in runs {
        let next = first.checked_add(count);
        match next.filter(|next| first >= free && count != 0 && *next <= end) {
            Some(next) => free = next,
            None => {
                let problem = format!("{count} from {first} on, allowed are those from {free} to {end}");
                return Err(invalid(element, problem));
            }
        }
    }
    Ok(())
}

/// A state as the backend's own part of another.
fn to_blob<S: SnapshotState>(state: &S) -> Result<BackendBlob> {
    let version = S::FORMAT.newest;
    let data = state.encode(version).map_err(|source| Error::Backend { backend: NAME, source })?;
    Ok(BackendBlob { backend: NAME.to_owned(), version: version.into(), data })
}

fn from_blob<S: SnapshotState>(blob: Option<&BackendBlob>) -> Result<S> {
    let Some(blob) = blob.filter(|blob| blob.backend == NAME) else {
        let found = blob.map_or("there is none", |blob| &blob.backend);
        return Err(invalid(
            "backend",
            format!("{found:?}; a paravirtual domain goes on from one of {NAME:?}"),
        ));
    };
    let (oldest, newest) = (S::FORMAT.oldest, S::FORMAT.newest);
    match u16::try_from(blob.version) {
        Ok(version) if (oldest..=newest).contains(&version) => {
            S::decode(&blob.data, version).map_err(|error| invalid("backend", error.to_string()))
        }
        _ => {
            let problem = format!("version {}, those from {oldest} to {newest} are known", blob.version);
            Err(invalid("backend", problem))
        }
    }
}
