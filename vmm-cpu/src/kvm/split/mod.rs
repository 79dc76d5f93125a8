//! Programs on KVM, everything else in software: for hosts whose KVM emulates privileged code.
//!
//! A KVM without VT-x or SVM beneath it emulates privilege level 0 one instruction at a time, at some 2 million a second, with an
//! emulator that was made for accesses of devices. Programs, privilege level 3 of 64-bit code, it runs natively. Here the two
//! backends share one virtual machine: `translate` is the machine, with its local APICs, its clock and its translator for the
//! guest's kernel, and lends programs to a vCPU of KVM.
//!
//! | module | holds |
//! |---|---|
//! | `pace` | which programs run on KVM, and which in software as well |
//! | `programs` | a stay of a program: registers to KVM and back, what an exit means |
//! | `tables` | what KVM's shadows of page tables have to be told |
//! | `pages` | stubs, descriptor tables and page tables in guest-physical memory |
//!
//! A program runs with an interrupt descriptor table of the engine's own, so each exception and each SYSCALL ends the stay; it
//! is delivered in software, through the guest's tables. A stay costs some 50 microseconds, see `pace`.
//!
//! Threat model: programs and the guest's kernel are hostile. The kernel owns the tables that programs run on, so it can let
//! a program reach what the engine keeps in guest-physical memory. What the engine itself works with is read-only there; the
//! rest, once destroyed, ends the guest, which can be kicked and paused all the while. Code that comes to run at privilege level
//! 0 of KVM's vCPU in that way reaches the guest's own memory and devices. What a program can choose of its flags is masked
//! before the guest's kernel sees it, and programs whose kernel does not keep all vector registers apart do not come here.

mod pace;
mod pages;
mod programs;
mod tables;

use std::error::Error as StdError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{DirtyLog, GuestRegion, PageBitmap};

use self::pages::Pages;
use self::programs::Programs;
use self::tables::Tables;
use super::dirty::KvmDirtyLog;
use super::finish::shadows::SparePage;
use super::vm::VmInner;
use crate::error::{Error, Result};
use crate::hypervisor::VmConfig;
use crate::state::VmState;
use crate::translate::native::{SoftwareVm, new_software_vm};
use crate::vcpu::Vcpu;
use crate::vm::{GuestAccess, GuestDirtyLog, Hypercalls, MsiSink, MsrFilter, Vm, VmClock};

pub(super) use self::pages::MAX_VCPUS;

/// What a virtual machine shares with its programs.
#[derive(Debug)]
struct Split {
    kvm: Arc<VmInner>,
    pages: Pages,
    tables: Mutex<Tables>,
    spare: SparePage,
    /// All programs run on KVM, whatever that costs.
    always: bool,
    /// There may be other vCPUs.
    has_others: bool,
    /// Components of XCR0 that programs find, whatever their kernel knows of them.
    vectors: u64,
    /// Stays that have begun, and of these those that have ended, of all vCPUs.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Some of the guest's memory cannot be shown.
    is_blind: AtomicBool,
}

impl Split {
    fn sees_all(&self) -> bool {
        !self.is_blind.load(Ordering::Relaxed)
    }
}

/// A virtual machine whose programs run on KVM.
#[derive(Debug)]
pub(super) struct SplitVm {
    software: SoftwareVm,
    split: Arc<Split>,
}

impl SplitVm {
    /// Of two: `kvm` without interrupt controllers, and software with all the rest, as `config` says.
    pub(super) fn new(
        kvm: Arc<VmInner>,
        gpa_bits: u8,
        vectors: u64,
        config: &VmConfig,
        cpuid: crate::cpuid::CpuidTable,
        tsc_khz: u32,
        always: bool,
    ) -> Result<Self> {
        let software = new_software_vm(config, cpuid, tsc_khz, crate::tsc::host_tsc, super::NAME)?;
        let pages = Pages::new(gpa_bits)?;
        let [fixed, written] = pages.regions();
        kvm.map_region(Arc::clone(fixed), GuestAccess::ReadOnly, None)?;
        kvm.map_region(Arc::clone(written), GuestAccess::ReadWrite, None)?;
        let split = Split {
            kvm,
            pages,
            tables: Mutex::new(Tables::new()),
            spare: SparePage::default(),
            always,
            has_others: config.max_vcpus > 1,
            vectors,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            is_blind: AtomicBool::new(false),
        };
        Ok(Self { software, split: Arc::new(split) })
    }
}

impl SplitVm {
    /// Takes over a saved state, which has been none of a machine with more controllers.
    pub(super) fn restore(&self, state: &VmState) -> Result<()> {
        crate::translate::native::check_restored(state)?;
        self.software.restore_clock(state.clock)
    }
}

impl Vm for SplitVm {
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        self.software.map_memory(Arc::clone(&region), access)?;
        let gpa = region.start_addr();
        let end = gpa.0.saturating_add(region.len());
        let mapped = self.split.kvm.map_region(region, access, None).and_then(|()| {
            if !self.split.pages.show_memory(gpa.0, end)? {
                tracing::debug!(end, "kvm: programs run in software from here on");
                self.split.is_blind.store(true, Ordering::Relaxed);
            }
            Ok(())
        });
        if mapped.is_err() {
            self.software.unmap_memory(gpa)?;
        }
        mapped
    }

    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        // What is the engine's own is not the caller's.
        if self.split.pages.regions().iter().any(|region| region.start_addr() == gpa) {
            return Err(Error::NoSuchRegion { gpa });
        }
        self.split.kvm.unmap_memory(gpa)?;
        self.software.unmap_memory(gpa)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let software = self.software.new_vcpu(index)?;
        let vcpu = self.split.kvm.create_vcpu(index)?;
        let programs = Programs::new(vcpu, Arc::clone(&self.split))?;
        let (kick, vectors) = (programs.kick(), programs.vectors()?);
        Ok(Box::new(software.with_native(Box::new(programs), kick, vectors)))
    }

    fn save(&self) -> Result<VmState> {
        self.software.save()
    }

    fn msi(&self) -> Option<Arc<dyn MsiSink>> {
        self.software.msi()
    }

    fn dirty_log(&self) -> Option<Arc<dyn GuestDirtyLog>> {
        let software = self.software.dirty_log()?;
        Some(Arc::new(BothLogs { software, kvm: KvmDirtyLog(Arc::clone(&self.split.kvm)) }))
    }

    fn msr_filter(&self) -> Option<Arc<dyn MsrFilter>> {
        self.software.msr_filter()
    }

    fn hypercalls(&self) -> Option<Arc<dyn Hypercalls>> {
        self.software.hypercalls()
    }

    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        self.software.clock()
    }
}

/// Pages that software wrote, and programs.
#[derive(Debug)]
struct BothLogs {
    software: Arc<dyn GuestDirtyLog>,
    kvm: KvmDirtyLog,
}

impl DirtyLog for BothLogs {
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> std::result::Result<(), Box<dyn StdError + Send + Sync>> {
        self.software.harvest(region, into)?;
        self.kvm.harvest(region, into)
    }
}

impl GuestDirtyLog for BothLogs {
    fn start(&self, gpa: GuestAddress) -> Result<()> {
        self.software.start(gpa)?;
        self.kvm.start(gpa).inspect_err(|_| {
            // Nothing of it is lost: it logs, and nobody asks.
            drop(self.software.stop(gpa));
        })
    }

    fn stop(&self, gpa: GuestAddress) -> Result<()> {
        self.software.stop(gpa)?;
        self.kvm.stop(gpa)
    }
}
