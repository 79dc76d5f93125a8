//! A virtual machine: what its vCPUs share.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion};
use vmm_memory::{DirtyLog, GuestRegion, PAGE_SIZE, PageBitmap};

use super::alarm::Alarm;
use super::apic::Inbox;
use super::clock::Clock;
use super::core::CodeStore;
use super::exclusive::Exclusive;
use super::hypervisor::TranslateOptions;
use super::memory::{MemoryMap, Slot, VcpuSet};
use super::signals::Signals;
use super::vcpu::TranslateVcpu;
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::state::{ClockState, VmState};
use crate::vcpu::Vcpu;
use crate::vm::{
    GuestAccess, GuestDirtyLog, Hypercalls, MsiMessage, MsiSink, MsrFilter, MsrRange, Vm, VmClock,
};

/// What a virtual machine shares with its vCPUs.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Whose virtual machine it is, for errors.
    pub(crate) backend: &'static str,
    pub(crate) cpuid: CpuidTable,
    pub(crate) interrupts: InterruptMode,
    pub(crate) max_vcpus: u32,
    pub(crate) clock: Arc<Clock>,
    pub(crate) passed_on: Arc<PassedOn>,
    map: Mutex<Arc<MemoryMap>>,
    /// Counts changes of the map and of what is watched.
    epoch: AtomicU64,
    /// What the local APICs are reached by, of all vCPUs that may be, by index; empty where there are none.
    pub(crate) inboxes: Vec<Arc<Inbox>>,
    /// How to reach those that exist.
    peers: Mutex<Vec<Peer>>,
    created: Mutex<BTreeSet<u32>>,
    pub(crate) exclusive: Exclusive,
    pub(crate) options: TranslateOptions,
    /// For vCPUs whose code is translated and whose time is the host's.
    pub(crate) alarm: Option<Alarm>,
}

fn start_alarm(clock: &Arc<Clock>) -> Option<Alarm> {
    Alarm::start(Arc::clone(clock))
        .inspect_err(
            |error| tracing::warn!(%error, "translate: no thread for timers, blocks are interpreted"),
        )
        .ok()
}

/// How to reach one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) index: u32,
    pub(crate) signals: Arc<Signals>,
}

impl Shared {
    pub(crate) fn new(
        cpuid: CpuidTable,
        interrupts: InterruptMode,
        max_vcpus: u32,
        clock: Clock,
        options: TranslateOptions,
    ) -> Self {
        let apics = if interrupts == InterruptMode::LocalApic { max_vcpus } else { 0 };
        let clock = Arc::new(clock);
        let wants_alarm = options.translate_after.is_some() && !clock.is_deterministic();
        let alarm = if wants_alarm { start_alarm(&clock) } else { None };
        Self {
            backend: super::NAME,
            cpuid,
            interrupts,
            max_vcpus,
            inboxes: (0..apics).map(|index| Arc::new(Inbox::new(index))).collect(),
            clock,
            passed_on: Arc::default(),
            map: Mutex::default(),
            epoch: AtomicU64::new(1),
            peers: Mutex::default(),
            created: Mutex::default(),
            exclusive: Exclusive::default(),
            options,
            alarm,
        }
    }

    pub(crate) fn map(&self) -> Arc<MemoryMap> {
        Arc::clone(&self.locked_map())
    }

    fn locked_map(&self) -> MutexGuard<'_, Arc<MemoryMap>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peers(&self) -> MutexGuard<'_, Vec<Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Changes the memory map, and comes back when no vCPU uses the old one.
    fn change_map<T>(&self, change: impl FnOnce(&mut MemoryMap) -> Result<T>) -> Result<T> {
        let result = {
            let mut map = self.locked_map();
            let mut changed = MemoryMap::clone(&map);
            let result = change(&mut changed)?;
            *map = Arc::new(changed);
            result
        };
        self.synchronize();
        Ok(result)
    }

    /// Makes all vCPUs look at the map and at what is watched anew, and waits until they have, or are out of the guest.
    /// The caller is none of them, or out of the guest.
    pub(crate) fn synchronize(&self) {
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        let peers = self.peers().clone();
        for peer in &peers {
            peer.signals.attract();
        }
        for peer in &peers {
            peer.signals.wait_for(epoch);
        }
    }

    /// Makes all vCPUs but `own` look at what is watched anew, soon; the epoch from which on they have.
    pub(crate) fn ask_others(&self, own: u32) -> u64 {
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        for peer in self.peers().iter().filter(|peer| peer.index != own) {
            peer.signals.attract();
        }
        epoch
    }

    /// Whether all vCPUs but `own` have looked since `epoch`, or will before they access memory.
    pub(crate) fn others_have_seen(&self, own: u32, epoch: u64) -> bool {
        self.peers().iter().filter(|peer| peer.index != own).all(|peer| peer.signals.has_seen(epoch))
    }

    /// Waits until all vCPUs but `own` are out of the guest; what keeps them there is set.
    pub(crate) fn wait_until_outside(&self, own: u32) {
        let others: Vec<Peer> = self.peers().iter().filter(|peer| peer.index != own).cloned().collect();
        for peer in &others {
            peer.signals.attract();
        }
        for peer in &others {
            peer.signals.wait_until_outside();
        }
    }

    /// Tells other vCPUs, those of a set, that code may have changed.
    pub(crate) fn post_code_store(&self, own: u32, others: VcpuSet, store: CodeStore) {
        for peer in self.peers().iter().filter(|peer| peer.index != own && others.contains(peer.index)) {
            peer.signals.post_code_store(store);
        }
    }
}

/// Which accesses go to the VMM although they would not have to.
#[derive(Debug, Default)]
pub(crate) struct PassedOn {
    /// There are ranges of registers. vCPUs write registers all the time, to end interrupts too, and take no lock for it.
    any_msrs: AtomicBool,
    choice: Mutex<Choice>,
}

#[derive(Debug, Default)]
struct Choice {
    msrs: Vec<MsrRange>,
    unknown_msrs: bool,
    hypercalls: BTreeSet<u64>,
}

/// Most ranges of registers that can be passed on.
const MAX_RANGES: usize = 64;

impl PassedOn {
    pub(crate) fn msr_read(&self, index: u32) -> bool {
        self.has_msrs() && self.choice().msrs.iter().any(|range| range.reads && contains(range, index))
    }

    pub(crate) fn msr_write(&self, index: u32) -> bool {
        self.has_msrs() && self.choice().msrs.iter().any(|range| range.writes && contains(range, index))
    }

    fn has_msrs(&self) -> bool {
        self.any_msrs.load(Ordering::Acquire)
    }

    pub(crate) fn unknown_msrs(&self) -> bool {
        self.choice().unknown_msrs
    }

    pub(crate) fn hypercall(&self, nr: u64) -> bool {
        self.choice().hypercalls.contains(&nr)
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn contains(range: &MsrRange, index: u32) -> bool {
    index.checked_sub(range.first).is_some_and(|offset| offset < range.count)
}

impl MsrFilter for PassedOn {
    fn pass_on(&self, ranges: &[MsrRange], unknown: bool) -> Result<()> {
        if ranges.len() > MAX_RANGES {
            return Err(Error::invalid("number of MSR ranges", ranges.len(), format!("0 to {MAX_RANGES}")));
        }
        for range in ranges {
            if range.count == 0 || range.first.checked_add(range.count - 1).is_none() {
                let value = format!("{} registers from {:#x}", range.count, range.first);
                return Err(Error::invalid("MSR range", value, "1 or more, up to 0xffffffff"));
            }
        }
        let mut choice = self.choice();
        choice.msrs = ranges.to_vec();
        choice.unknown_msrs = unknown;
        self.any_msrs.store(!ranges.is_empty(), Ordering::Release);
        Ok(())
    }
}

/// Most hypercall numbers that can be passed on.
const MAX_HYPERCALLS: usize = 4096;

impl Hypercalls for PassedOn {
    fn pass_on(&self, nr: u64) -> Result<()> {
        let mut choice = self.choice();
        if choice.hypercalls.len() >= MAX_HYPERCALLS {
            return Err(Error::invalid("hypercall", nr, format!("one of {MAX_HYPERCALLS} at most")));
        }
        choice.hypercalls.insert(nr);
        Ok(())
    }
}

/// A virtual machine, as the trait shows it.
#[derive(Debug)]
pub(crate) struct TranslateVm(pub(crate) Arc<Shared>);

impl TranslateVm {
    /// As [`Vm::create_vcpu`].
    pub(crate) fn new_vcpu(&self, index: u32) -> Result<TranslateVcpu> {
        let limit = self.0.max_vcpus;
        if index >= limit {
            let reason = "VmConfig::max_vcpus of this virtual machine";
            return Err(Error::TooManyVcpus { index, limit, reason });
        }
        if !self.0.created.lock().unwrap_or_else(PoisonError::into_inner).insert(index) {
            return Err(Error::VcpuExists { index });
        }
        Ok(TranslateVcpu::new(index, Arc::clone(&self.0)))
    }

    pub(crate) fn restore_clock(&self, state: Option<ClockState>) -> Result<()> {
        let Some(state) = state else { return Ok(()) };
        let tsc_khz = self.0.clock.tsc_khz();
        if state.tsc_khz != tsc_khz {
            let problem =
                format!("the rate was {} kHz, that of this machine is {tsc_khz} kHz", state.tsc_khz);
            return Err(Error::InvalidState { element: "clock.tsc_khz", problem });
        }
        self.0.clock.set(state.guest_ns);
        Ok(())
    }
}

impl Vm for TranslateVm {
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        let (gpa, len) = (region.start_addr().0, region.len());
        if !gpa.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Error::invalid("region", format_args!("{gpa:#x}+{len:#x}"), "whole pages of 4 KiB"));
        }
        let needed = match access {
            GuestAccess::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            GuestAccess::ReadOnly => libc::PROT_READ,
        };
        // The guest's accesses go to the host mapping itself.
        if region.prot() & needed != needed {
            return Err(Error::invalid(
                "host protection of the region",
                format_args!("{:#x} at {gpa:#x}", region.prot()),
                format_args!("one that includes {needed:#x}, for {access:?}"),
            ));
        }
        self.0.change_map(|map| map.insert(Slot::new(region, access)))
    }

    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        self.0.change_map(|map| map.remove(gpa.0).map(|slot| slot.region).ok_or(Error::NoSuchRegion { gpa }))
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.new_vcpu(index)?))
    }

    fn save(&self) -> Result<VmState> {
        let clock = ClockState { guest_ns: self.0.clock.nanoseconds(), tsc_khz: self.0.clock.tsc_khz() };
        Ok(VmState { clock: Some(clock), ..VmState::default() })
    }

    fn msi(&self) -> Option<Arc<dyn MsiSink>> {
        let present = self.0.interrupts == InterruptMode::LocalApic;
        present.then(|| Arc::new(Messages(Arc::clone(&self.0))) as Arc<dyn MsiSink>)
    }

    fn dirty_log(&self) -> Option<Arc<dyn GuestDirtyLog>> {
        Some(Arc::new(WriteLog(Arc::clone(&self.0))))
    }

    fn msr_filter(&self) -> Option<Arc<dyn MsrFilter>> {
        Some(Arc::clone(&self.0.passed_on) as Arc<dyn MsrFilter>)
    }

    fn hypercalls(&self) -> Option<Arc<dyn Hypercalls>> {
        Some(Arc::clone(&self.0.passed_on) as Arc<dyn Hypercalls>)
    }

    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        Some(Arc::clone(&self.0.clock) as Arc<dyn VmClock>)
    }
}

/// Message-signalled interrupts, to the local APICs.
#[derive(Debug)]
struct Messages(Arc<Shared>);

impl MsiSink for Messages {
    fn send(&self, message: MsiMessage) -> Result<bool> {
        super::interrupts::send(&self.0, message)
    }
}

/// The pages that vCPUs wrote.
#[derive(Debug)]
struct WriteLog(Arc<Shared>);

impl DirtyLog for WriteLog {
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let gpa = region.start_addr().0;
        let map = self.0.map();
        let Some(dirty) = map
            .slots()
            .iter()
            .find(|slot| slot.start == gpa && std::ptr::eq(&*slot.region, region))
            .and_then(|slot| slot.dirty.as_ref())
        else {
            return Ok(());
        };
        into.or_words(&dirty.take());
        // Stores that went unnoticed because their page was dirty are noticed again from here on.
        self.0.synchronize();
        Ok(())
    }
}

impl GuestDirtyLog for WriteLog {
    fn start(&self, gpa: GuestAddress) -> Result<()> {
        self.0.change_map(|map| {
            map.slot_starting_at(gpa.0).ok_or(Error::NoSuchRegion { gpa })?.start_log();
            Ok(())
        })
    }

    fn stop(&self, gpa: GuestAddress) -> Result<()> {
        self.0.change_map(|map| {
            map.slot_starting_at(gpa.0).ok_or(Error::NoSuchRegion { gpa })?.dirty = None;
            Ok(())
        })
    }
}
