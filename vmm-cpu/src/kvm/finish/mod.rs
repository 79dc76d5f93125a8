//! Instructions that KVM gives up on (KVM_EXIT_INTERNAL_ERROR, emulation failure), executed in software.
//!
//! KVM emulates an instruction when it touches a device, when the processor cannot run the guest's mode, and on hosts without
//! VT-x or SVM whenever privilege level 0 runs. Its emulator lacks what operating systems rarely do to devices, and what it
//! was never meant for: MMIO by vector instructions, `cmpxchg16b`, far transfers and `iret` of protected mode. Here
//! `translate`'s interpreter executes that one instruction from the vCPU's state and in the guest's memory, the state goes
//! back, and hardware goes on. A vCPU that never meets such an instruction pays nothing, not even for the interpreter's state.
//!
//! One instruction at a time: a processor that runs privileged code has the next one sooner than the state could be of use here.
//! Where KVM emulates all of it, that is not enough (Debian's kernel was more than a minute on its way to its first program, and
//! programs there pass it by at SYSCALL): see `split`, which is for such hosts, and boots it in a second.
//!
//! | matter | answer |
//! |---|---|
//! | exceptions, single steps | handed to KVM as pending exceptions, which it delivers as its own |
//! | interrupt shadow, blocking of NMIs | read before and written behind the instruction, with the events |
//! | an event that is being delivered meanwhile | nothing is executed: the error of before |
//! | LOCK | the host's locked instructions in the same memory; see `translate::substitute` |
//! | MMIO, ports | callbacks as ever; doorbells (ioeventfd) ring; what the kernel's own devices serve is refused |
//! | dirty log, read-only memory | software notes what it writes, harvesting gathers both |
//! | shadows of page tables | a store that replaced what reads as a present entry drops all of KVM's, see `shadows` |
//! | privilege level 3 | KVM_CAP_EXIT_ON_EMULATION_FAILURE, else the guest would get #UD |
//! | neither can do it | [`Error::Unhandled`](crate::Error::Unhandled) with both reasons; the state is that before the instruction |
//!
//! Threat model: the guest chooses the instruction, all registers and all memory. One exit executes at most one instruction,
//! or what the interpreter does of a REP between two looks around.

mod io;
pub(super) mod shadows;
mod write_back;

use std::error::Error as StdError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_INTERNAL_ERROR_EMULATION, kvm_vcpu_events};
use kvm_ioctls::VmFd;
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestRegion, PageBitmap};

use super::vcpu::{KvmVcpu, Step};
use super::vm::enable_cap;
use super::{host, state, sys};
use crate::cpuid::CpuidTable;
use crate::debug::{DebugReason, DebugStop};
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::state::XsaveArea;
use crate::translate::substitute::{Between, Outcome, Substitute, SubstituteVm};
use crate::vcpu::{Halt, Vcpu as _, VcpuIo};
use crate::vm::{Doorbell, GuestAccess, Notifier};
use io::Devices;

/// Vector of the exception that KVM queues for an instruction that it cannot emulate.
const UNDEFINED: u8 = 6;

/// What the vCPUs of one virtual machine share for this.
#[derive(Debug)]
pub(super) struct Finish {
    memory: SubstituteVm,
    interrupts: InterruptMode,
    /// KVM keeps shadows of page tables.
    shadowed: bool,
    doorbells: Mutex<Vec<(Doorbell, Notifier)>>,
    /// Software does not see all of the guest's memory.
    blind: AtomicBool,
    page: shadows::SparePage,
}

/// One vCPU's part: nothing before it is first needed.
#[derive(Debug, Default)]
pub(super) struct Finisher(Option<Box<Substitute>>);

impl Finish {
    /// For a virtual machine of up to so many vCPUs with that CPUID.
    pub(super) fn new(
        fd: &VmFd,
        cpuid: &CpuidTable,
        max_vcpus: u32,
        interrupts: InterruptMode,
        shadowed: bool,
    ) -> Result<Self> {
        if fd.check_extension_raw(u64::from(KVM_CAP_EXIT_ON_EMULATION_FAILURE)) > 0 {
            enable_cap(fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
                .map_err(|errno| host("KVM_ENABLE_CAP(EXIT_ON_EMULATION_FAILURE)", errno))?;
        }
        Ok(Self {
            memory: SubstituteVm::new(cpuid.clone(), max_vcpus),
            interrupts,
            shadowed,
            doorbells: Mutex::default(),
            blind: AtomicBool::new(false),
            page: shadows::SparePage::default(),
        })
    }

    /// Follows KVM's memory slots. Of a region with a `hidden` half, software does not see all.
    pub(super) fn map_memory(&self, region: &Arc<GuestRegion>, access: GuestAccess, hidden: bool) {
        let mapped = if hidden { Ok(()) } else { self.memory.map_memory(Arc::clone(region), access) };
        // KVM takes memory, too, that this process may not access.
        if hidden || mapped.is_err() {
            tracing::debug!(?mapped, "kvm: no instruction is finished in software from here on");
            self.blind.store(true, Ordering::Relaxed);
        }
    }

    /// As [`Finish::map_memory`]; comes back when software does not use the region any more.
    pub(super) fn unmap_memory(&self, gpa: GuestAddress) {
        if let Err(error) = self.memory.unmap_memory(gpa) {
            tracing::debug!(%error, "kvm: software did not have that region");
        }
    }

    /// Follows KVM's dirty log.
    pub(super) fn log_writes(&self, gpa: GuestAddress, on: bool) {
        if let Err(error) = self.memory.log_writes(gpa, on) {
            tracing::debug!(%error, "kvm: software did not have that region");
        }
    }

    /// Adds the pages that software wrote.
    pub(super) fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        self.memory.harvest(region, into)
    }

    /// Follows KVM's doorbells.
    pub(super) fn set_doorbell(&self, doorbell: &Doorbell, notifier: &Notifier, attached: bool) {
        let mut doorbells = self.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
        if attached {
            match notifier.try_clone() {
                Ok(notifier) => doorbells.push((*doorbell, notifier)),
                Err(error) => {
                    tracing::debug!(%error, "kvm: no instruction is finished in software from here on");
                    self.blind.store(true, Ordering::Relaxed);
                }
            }
        } else {
            let is_it = |other: &Notifier| Arc::ptr_eq(other.identity(), notifier.identity());
            doorbells.retain(|(other, of)| other != doorbell || !is_it(of));
        }
    }
}

/// What stands in the way of executing anything: KVM is about to deliver something.
fn in_the_way(events: &kvm_vcpu_events) -> Option<&'static str> {
    let exception = &events.exception;
    let other_exception = (exception.injected | exception.pending) != 0 && exception.nr != UNDEFINED;
    if other_exception || events.interrupt.injected != 0 || events.nmi.injected != 0 {
        return Some("an event is being delivered");
    }
    (events.smi.smm != 0).then_some("the vCPU is in system-management mode")
}

impl KvmVcpu {
    /// After a KVM_EXIT_INTERNAL_ERROR: has software execute the instruction, if it can.
    #[cold]
    pub(super) fn finish(&mut self, io: &mut dyn VcpuIo) -> Result<Step> {
        let vm = Arc::clone(&self.vm);
        let is_emulation = self.shared.page.internal_error().suberror == KVM_INTERNAL_ERROR_EMULATION;
        let Some(finish) = vm.finish.as_ref().filter(|_| is_emulation) else {
            self.counts.other += 1;
            return Err(self.unhandled(None));
        };
        let mut substitute =
            self.finisher.0.take().unwrap_or_else(|| Box::new(Substitute::new(&finish.memory, self.index())));
        let result = self.finish_with(finish, &mut substitute, io);
        self.finisher.0 = Some(substitute);
        if let Err(why) = result? {
            self.counts.other += 1;
            return Err(self.unhandled(Some(&why)));
        }
        self.counts.finished += 1;
        if self.single_step {
            let rip = state::linear_rip(self)?;
            return Ok(Step::Stop(Halt::Debug(DebugStop::new(rip, DebugReason::SingleStep))));
        }
        Ok(Step::Continue)
    }

    /// Executes the instruction at RIP; otherwise why software cannot, and nothing has changed.
    fn finish_with(
        &mut self,
        finish: &Finish,
        substitute: &mut Substitute,
        io: &mut dyn VcpuIo,
    ) -> Result<Result<(), String>> {
        if finish.blind.load(Ordering::Relaxed) {
            return Ok(Err("some of the guest's memory or doorbells are out of software's reach".to_owned()));
        }
        let events = self.events()?;
        if let Some(why) = in_the_way(&events) {
            return Ok(Err(why.to_owned()));
        }
        let general = self.registers()?;
        let system = self.system_registers()?;
        let shadow = state::interrupt_shadow(&events);
        let before = Between { general, system, shadow, nmi_masked: events.nmi.masked != 0 };
        if let Err(why) = substitute.load(&before) {
            return Ok(Err(why));
        }
        let loaded = substitute.registers();
        let mut vectors = None;
        if substitute.has_keys() {
            vectors = Some(self.load_vectors(substitute)?);
        }
        let fetched = match substitute.fetch() {
            Ok(fetched) => fetched,
            Err(why) => return Ok(Err(why)),
        };
        if fetched.needs_vectors() && vectors.is_none() {
            vectors = Some(self.load_vectors(substitute)?);
        }
        for index in fetched.msrs() {
            substitute.put_msr(*index, self.msr(*index)?);
        }
        let mut devices = Devices::new(io, finish, &system);
        let outcome = substitute.execute(&fetched, &mut devices);
        tracing::trace!(
            vcpu = self.index(),
            rip = general.rip,
            name = fetched.name(),
            ?outcome,
            "kvm: in software"
        );
        if let Some(why) = devices.kernels_own() {
            return Ok(Err(why.to_owned()));
        }
        if finish.shadowed && substitute.has_replaced_entries() {
            self.vm.drop_shadows(&finish.page)?;
            self.counts.shadows_dropped += 1;
        }
        let exception = match outcome {
            Outcome::Refused(why) => return Ok(Err(why)),
            Outcome::Fault(exception) => Some(write_back::Raised::fault(&exception)),
            Outcome::Done { trap: 0 } => None,
            Outcome::Done { trap } => Some(write_back::Raised::trap(trap)),
        };
        for index in fetched.written_msrs() {
            if let Some(value) = substitute.msr(*index) {
                self.set_msr(*index, value)?;
            }
        }
        if let (Some(old), Some(new)) = (vectors, substitute.vectors())
            && old != new
        {
            sys::set_xsave(self.fd(), self.vm.xsave_size, new.bytes())
                .map_err(|errno| host("KVM_SET_XSAVE", errno))?;
        }
        self.write_back(&before, &loaded, &substitute.registers(), &events, exception)?;
        Ok(Ok(()))
    }

    /// Hands over the vector registers; what they are.
    fn load_vectors(&self, substitute: &mut Substitute) -> Result<XsaveArea> {
        let size = self.vm.xsave_size;
        let bytes = sys::xsave(self.fd(), size).map_err(|errno| host("KVM_GET_XSAVE", errno))?;
        let area = XsaveArea::from_bytes(bytes).ok_or_else(|| Error::InvalidState {
            element: "xsave",
            problem: format!("KVM's area of {size} bytes is too large"),
        })?;
        substitute.load_vectors(area.clone())?;
        Ok(area)
    }
}
