//! Memory slots and the capabilities of a virtual machine.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_cpuid_entry2, kvm_enable_cap,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_memory::{GuestMemfdRange, GuestRegion, PAGE_SIZE};

use super::clock::{ClockAccount, KvmClock};
use super::coalesced::{Coalesced, KvmCoalescedWrites};
use super::dirty::{DirtyRings, KvmDirtyLog};
use super::finish::Finish;
use super::guest_memfd::{KvmGuestMemfds, KvmPrivateMemory};
use super::handle::Shared;
use super::irq::{AttachedNotifiers, KvmInterrupts, KvmNotifiers};
use super::sys::{self, RunPage};
use super::vcpu::KvmVcpu;
use super::{NAME, host, platform_state};
use crate::coalesced::CoalescedWrites;
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::private_memory::{GuestMemfds, PrivateMemory};
use crate::state::VmState;
use crate::vcpu::Vcpu;
use crate::vm::{
    Doorbells, GuestAccess, GuestDirtyLog, Hypercalls, InterruptLines, InterruptNotifiers, MsiSink,
    MsrFilter, MsrRange, Vm, VmClock,
};

/// Ranges in KVM's MSR filter.
const MAX_MSR_RANGES: usize = 16;

/// Registers in one range of the filter: 0x600 bytes of bitmap.
const MAX_MSRS_PER_RANGE: u32 = 0x600 * 8;

/// The x2APIC registers, which KVM never filters.
const X2APIC_MSRS: std::ops::Range<u64> = 0x800..0x900;

/// KVM's hypercall that asks for memory attributes: the only one it forwards.
const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// One KVM memory slot.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) region: Arc<GuestRegion>,
    pub(super) flags: u32,
    pub(super) guest_memfd: Option<GuestMemfdRange>,
}

/// What a virtual machine, its vCPUs and its capabilities share.
#[derive(Debug)]
pub(super) struct VmInner {
    // The descriptor first: it is closed before the memory regions are released.
    pub(super) fd: VmFd,
    // The rings next: their mappings hold on to the virtual machine as well.
    pub(super) dirty_rings: Option<DirtyRings>,
    pub(super) coalesced: Coalesced,
    /// Page of a vCPU's mapping where the ring of gathered writes is (KVM_CAP_COALESCED_MMIO).
    coalesced_page: Option<u32>,
    /// By first guest-physical address.
    slots: Mutex<BTreeMap<u64, Slot>>,
    pub(super) clock: ClockAccount,
    notifiers: Mutex<AttachedNotifiers>,
    /// Executes what KVM cannot, where that is wanted.
    pub(super) finish: Option<Finish>,
    pub(super) interrupts: InterruptMode,
    pub(super) legacy_timer: bool,
    cpuid: CpuidTable,
    max_vcpus: u32,
    max_slots: u32,
    run_page_size: usize,
    pub(super) xsave_size: usize,
    /// Whether the kernel keeps pending exceptions apart from injected ones.
    pub(super) exception_payloads: bool,
    /// Whether KVM_RUN hands over registers in the `kvm_run` page.
    pub(super) syncs_registers: bool,
    /// MSRs that make up a vCPU's state.
    pub(super) saved_msrs: Vec<u32>,
    /// Live vCPUs, for the log.
    pub(super) vcpus: AtomicU32,
}

/// What [`VmInner::new`] is told by the hypervisor.
#[derive(Debug)]
pub(super) struct VmParts {
    pub(super) fd: VmFd,
    pub(super) interrupts: InterruptMode,
    pub(super) legacy_timer: bool,
    pub(super) cpuid: CpuidTable,
    pub(super) max_vcpus: u32,
    pub(super) max_slots: u32,
    pub(super) run_page_size: usize,
    pub(super) saved_msrs: Vec<u32>,
    pub(super) dirty_rings: Option<DirtyRings>,
    pub(super) finish: Option<Finish>,
}

impl VmInner {
    pub(super) fn new(parts: VmParts) -> Self {
        let xsave_size = usize::try_from(parts.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let exception_payloads = enable_cap(&parts.fd, KVM_CAP_EXCEPTION_PAYLOAD, 1).is_ok();
        let fields = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
        let syncable = u32::try_from(parts.fd.check_extension_int(Cap::SyncRegs)).unwrap_or(0);
        let syncs_registers = syncable & fields == fields;
        let coalesced_page = u32::try_from(parts.fd.check_extension_int(Cap::CoalescedMmio)).ok();
        Self {
            fd: parts.fd,
            dirty_rings: parts.dirty_rings,
            coalesced: Coalesced::default(),
            coalesced_page: coalesced_page.filter(|page| *page > 0),
            slots: Mutex::default(),
            clock: ClockAccount::default(),
            notifiers: Mutex::default(),
            finish: parts.finish,
            interrupts: parts.interrupts,
            legacy_timer: parts.legacy_timer,
            cpuid: parts.cpuid,
            max_vcpus: parts.max_vcpus,
            max_slots: parts.max_slots,
            run_page_size: parts.run_page_size,
            xsave_size: xsave_size.max(size_of::<kvm_bindings::kvm_xsave>()),
            exception_payloads,
            syncs_registers,
            saved_msrs: parts.saved_msrs,
            vcpus: AtomicU32::new(0),
        }
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, BTreeMap<u64, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn attached_notifiers(&self) -> MutexGuard<'_, AttachedNotifiers> {
        self.notifiers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// At most `len` bytes of guest memory at `gpa`.
    pub(super) fn read_memory(&self, gpa: GuestAddress, len: usize) -> Vec<u8> {
        let slots = self.slots();
        let Some((start, slot)) = slots.range(..=gpa.0).next_back() else { return Vec::new() };
        let mut bytes = vec![0; len];
        let read = slot.region.read(&mut bytes, MemoryRegionAddress(gpa.0 - start)).unwrap_or(0);
        bytes.truncate(read);
        bytes
    }

    /// The number of a slot that is not in use.
    pub(super) fn free_slot(&self, slots: &BTreeMap<u64, Slot>) -> Result<u32> {
        (0..self.max_slots)
            .find(|number| slots.values().all(|slot| slot.number != *number))
            .ok_or_else(|| Error::invalid("number of memory regions", slots.len() + 1, self.max_slots))
    }

    /// Maps a region, of which a half or all may be in a guest_memfd.
    pub(super) fn map_region(
        &self,
        region: Arc<GuestRegion>,
        access: GuestAccess,
        guest_memfd: Option<&GuestMemfdRange>,
    ) -> Result<()> {
        let (gpa, len) = (region.start_addr(), region.len());
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || !gpa.0.is_multiple_of(PAGE_SIZE) {
            return Err(Error::invalid(
                "memory region",
                format_args!("{:#x}+{len:#x}", gpa.0),
                format_args!("base and length in multiples of {PAGE_SIZE:#x}, not empty"),
            ));
        }
        let mut slots = self.slots();
        let end = gpa.0.saturating_add(len);
        if let Some((&other, slot)) = slots.range(..end).next_back()
            && other.saturating_add(slot.region.len()) > gpa.0
        {
            let (other_gpa, other_len) = (GuestAddress(other), slot.region.len());
            return Err(Error::RegionOverlap { gpa, len, other_gpa, other_len });
        }
        let number = self.free_slot(&slots)?;
        let flags = match access {
            GuestAccess::ReadWrite => 0,
            GuestAccess::ReadOnly => KVM_MEM_READONLY,
        };
        match guest_memfd {
            None => sys::set_memory_slot(&self.fd, number, &region, len, flags)
                .map_err(|errno| host("KVM_SET_USER_MEMORY_REGION", errno))?,
            Some(range) => sys::set_guest_memfd_slot(&self.fd, number, &region, range)
                .map_err(|errno| host("KVM_SET_USER_MEMORY_REGION2", errno))?,
        }
        tracing::debug!(gpa = gpa.0, len, slot = number, ?access, "kvm: memory mapped");
        if let Some(finish) = &self.finish {
            finish.map_memory(&region, access, guest_memfd.is_some());
        }
        slots.insert(gpa.0, Slot { number, region, flags, guest_memfd: guest_memfd.cloned() });
        Ok(())
    }

    pub(super) fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        let mut slots = self.slots();
        let slot = slots.get(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?;
        // The kernel waits until no vCPU uses the slot any more.
        sys::set_memory_slot(&self.fd, slot.number, &slot.region, 0, 0)
            .map_err(|errno| host("KVM_SET_USER_MEMORY_REGION", errno))?;
        let slot = slots.remove(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?;
        if let Some(rings) = &self.dirty_rings {
            rings.stop(slot.number);
        }
        if let Some(finish) = &self.finish {
            finish.unmap_memory(gpa);
        }
        tracing::debug!(gpa = gpa.0, slot = slot.number, "kvm: memory unmapped");
        Ok(slot.region)
    }

    /// Whether `len` bytes at `gpa` are whole pages of regions with a half in a guest_memfd.
    pub(super) fn has_private_half(&self, gpa: GuestAddress, len: u64) -> bool {
        let slots = self.slots();
        let end = gpa
            .0
            .checked_add(len)
            .filter(|_| gpa.0.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE));
        let Some(end) = end.filter(|end| *end > gpa.0) else { return false };
        let mut at = gpa.0;
        while at < end {
            let Some((start, slot)) = slots.range(..=at).next_back() else { return false };
            let slot_end = start.saturating_add(slot.region.len());
            if slot.guest_memfd.is_none() || slot_end <= at {
                return false;
            }
            at = slot_end;
        }
        true
    }

    pub(super) fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<KvmVcpu> {
        if index >= self.max_vcpus {
            return Err(Error::TooManyVcpus {
                index,
                limit: self.max_vcpus,
                reason: "VmConfig::max_vcpus of this virtual machine",
            });
        }
        sys::install_kick_handler().map_err(|errno| host("sigaction", errno))?;
        let fd = self.fd.create_vcpu(u64::from(index)).map_err(|errno| match errno.errno() {
            libc::EEXIST => Error::VcpuExists { index },
            _ => host("KVM_CREATE_VCPU", errno),
        })?;
        let page = RunPage::map(&fd, self.run_page_size).map_err(|source| Error::Host {
            backend: NAME,
            operation: "mapping kvm_run",
            source,
        })?;
        if let Some(page) = self.coalesced_page {
            self.coalesced.map(&fd, page)?;
        }
        if let Some(rings) = &self.dirty_rings {
            rings.add(&fd)?;
        }
        self.set_tsc_rate(&fd)?;
        fd.set_cpuid2(&cpuid_to_kvm(&self.cpuid.for_vcpu(index, self.max_vcpus))?)
            .map_err(|errno| host("KVM_SET_CPUID2", errno))?;
        let shared = Arc::new(Shared::new(page, self.interrupts != InterruptMode::Platform));
        self.coalesced.add(&shared);
        self.vcpus.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(vcpu = index, "kvm: vCPU created");
        Ok(KvmVcpu::new(fd, shared, Arc::clone(self), index))
    }

    /// Gives a vCPU the VM's TSC rate, where it has another.
    fn set_tsc_rate(&self, fd: &kvm_ioctls::VcpuFd) -> Result<()> {
        let wanted = self.clock.tsc_khz();
        if wanted == 0 || fd.get_tsc_khz().is_ok_and(|khz| khz == wanted) {
            return Ok(());
        }
        fd.set_tsc_khz(wanted).map_err(|errno| host("KVM_SET_TSC_KHZ", errno))
    }
}

/// KVM_ENABLE_CAP with one argument.
pub(super) fn enable_cap(fd: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    if let Some(first) = enable.args.first_mut() {
        *first = argument;
    }
    fd.enable_cap(&enable)
}

impl Drop for VmInner {
    fn drop(&mut self) {
        tracing::debug!("kvm: virtual machine dropped");
    }
}

fn cpuid_to_kvm(table: &CpuidTable) -> Result<CpuId> {
    /// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
    const SUBLEAF_MATTERS: u32 = 1;
    let entries: Vec<kvm_cpuid_entry2> = table
        .entries()
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: if entry.subleaf.is_some() { SUBLEAF_MATTERS } else { 0 },
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        Error::invalid(
            "number of CPUID entries",
            entries.len(),
            format_args!("0 to {}", kvm_bindings::KVM_MAX_CPUID_ENTRIES),
        )
    })
}

/// A virtual machine on KVM, as the trait shows it.
#[derive(Debug)]
pub(super) struct KvmVm(pub(super) Arc<VmInner>);

impl Vm for KvmVm {
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        self.0.map_region(region, access, None)
    }

    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        self.0.unmap_memory(gpa)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.0.create_vcpu(index)?))
    }

    fn save(&self) -> Result<VmState> {
        platform_state::save(&self.0)
    }

    fn interrupt_lines(&self) -> Option<Arc<dyn InterruptLines>> {
        (self.0.interrupts != InterruptMode::External)
            .then(|| Arc::new(KvmInterrupts(Arc::clone(&self.0))) as Arc<dyn InterruptLines>)
    }

    fn msi(&self) -> Option<Arc<dyn MsiSink>> {
        (self.0.interrupts != InterruptMode::External)
            .then(|| Arc::new(KvmInterrupts(Arc::clone(&self.0))) as Arc<dyn MsiSink>)
    }

    fn interrupt_notifiers(&self) -> Option<Arc<dyn InterruptNotifiers>> {
        let present = self.0.interrupts != InterruptMode::External && self.0.fd.check_extension(Cap::Irqfd);
        present.then(|| Arc::new(KvmNotifiers(Arc::clone(&self.0))) as Arc<dyn InterruptNotifiers>)
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        let present = self.0.fd.check_extension(Cap::Ioeventfd);
        present.then(|| Arc::new(KvmNotifiers(Arc::clone(&self.0))) as Arc<dyn Doorbells>)
    }

    fn dirty_log(&self) -> Option<Arc<dyn GuestDirtyLog>> {
        Some(Arc::new(KvmDirtyLog(Arc::clone(&self.0))))
    }

    fn coalesced_writes(&self) -> Option<Arc<dyn CoalescedWrites>> {
        self.0.coalesced_page?;
        let ports = self.0.fd.check_extension(Cap::CoalescedPio);
        Some(Arc::new(KvmCoalescedWrites { vm: Arc::clone(&self.0), ports }))
    }

    fn guest_memfds(&self) -> Option<Arc<dyn GuestMemfds>> {
        let present = self.0.fd.check_extension_raw(u64::from(KVM_CAP_GUEST_MEMFD)) > 0;
        present.then(|| Arc::new(KvmGuestMemfds(Arc::clone(&self.0))) as Arc<dyn GuestMemfds>)
    }

    fn private_memory(&self) -> Option<Arc<dyn PrivateMemory>> {
        KvmPrivateMemory::of(&self.0).map(|memory| Arc::new(memory) as Arc<dyn PrivateMemory>)
    }

    fn msr_filter(&self) -> Option<Arc<dyn MsrFilter>> {
        let present =
            self.0.fd.check_extension(Cap::X86UserSpaceMsr) && self.0.fd.check_extension(Cap::X86MsrFilter);
        present.then(|| Arc::new(KvmMsrFilter(Arc::clone(&self.0))) as Arc<dyn MsrFilter>)
    }

    fn hypercalls(&self) -> Option<Arc<dyn Hypercalls>> {
        let forwarded = self.0.fd.check_extension_raw(u64::from(KVM_CAP_EXIT_HYPERCALL));
        (forwarded > 0).then(|| Arc::new(KvmHypercalls(Arc::clone(&self.0))) as Arc<dyn Hypercalls>)
    }

    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        Some(Arc::new(KvmClock(Arc::clone(&self.0))))
    }
}

/// KVM's MSR filter and its exits.
#[derive(Debug)]
struct KvmMsrFilter(Arc<VmInner>);

fn check_msr_range(range: &MsrRange) -> Result<()> {
    let (first, end) = (u64::from(range.first), u64::from(range.first) + u64::from(range.count));
    let shown = || format!("{first:#x} to {end:#x} (end excluded)");
    if range.count == 0 || range.count > MAX_MSRS_PER_RANGE || end > 1 << 32 {
        return Err(Error::invalid(
            "MSR range",
            shown(),
            format_args!("1 to {MAX_MSRS_PER_RANGE} registers below 2^32"),
        ));
    }
    if first < X2APIC_MSRS.end && end > X2APIC_MSRS.start {
        return Err(Error::invalid("MSR range", shown(), "outside of the x2APIC registers, 0x800 to 0x8ff"));
    }
    if !range.reads && !range.writes {
        return Err(Error::invalid("MSR range", shown(), "reads, writes or both"));
    }
    Ok(())
}

impl MsrFilter for KvmMsrFilter {
    fn pass_on(&self, ranges: &[MsrRange], unknown: bool) -> Result<()> {
        if ranges.len() > MAX_MSR_RANGES {
            return Err(Error::invalid(
                "number of MSR ranges",
                ranges.len(),
                format_args!("0 to {MAX_MSR_RANGES}"),
            ));
        }
        ranges.iter().try_for_each(check_msr_range)?;
        let mut reasons = KVM_MSR_EXIT_REASON_FILTER;
        if unknown {
            reasons |= KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;
        }
        enable_cap(&self.0.fd, KVM_CAP_X86_USER_SPACE_MSR, u64::from(reasons))
            .map_err(|errno| host("KVM_ENABLE_CAP(X86_USER_SPACE_MSR)", errno))?;
        // A zero bit denies the access, and a denied access becomes an exit.
        let bitmap = vec![0; 0x600];
        let filter: Vec<MsrFilterRange<'_>> = ranges
            .iter()
            .map(|range| {
                let mut flags = MsrFilterRangeFlags::empty();
                flags.set(MsrFilterRangeFlags::READ, range.reads);
                flags.set(MsrFilterRangeFlags::WRITE, range.writes);
                MsrFilterRange { flags, base: range.first, msr_count: range.count, bitmap: &bitmap }
            })
            .collect();
        self.0
            .fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &filter)
            .map_err(|errno| host("KVM_X86_SET_MSR_FILTER", errno))
    }
}

/// The one hypercall that KVM forwards.
#[derive(Debug)]
struct KvmHypercalls(Arc<VmInner>);

impl Hypercalls for KvmHypercalls {
    fn pass_on(&self, nr: u64) -> Result<()> {
        if nr != KVM_HC_MAP_GPA_RANGE {
            return Err(Error::unsupported(
                "forwarding a hypercall",
                format!("KVM forwards number {KVM_HC_MAP_GPA_RANGE} (KVM_HC_MAP_GPA_RANGE) only, not {nr}"),
            ));
        }
        enable_cap(&self.0.fd, KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
            .map_err(|errno| host("KVM_ENABLE_CAP(EXIT_HYPERCALL)", errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msr_ranges_are_bounded() {
        assert!(check_msr_range(&MsrRange::new(0x10, 1)).is_ok());
        assert!(check_msr_range(&MsrRange::new(0x10, 0)).is_err());
        assert!(check_msr_range(&MsrRange::new(0x10, MAX_MSRS_PER_RANGE + 1)).is_err());
        assert!(check_msr_range(&MsrRange::new(u32::MAX, 2)).is_err());
        assert!(check_msr_range(&MsrRange::new(0x7ff, 2)).is_err());
        assert!(check_msr_range(&MsrRange::new(0x8ff, 1)).is_err());
        assert!(check_msr_range(&MsrRange::new(0x900, 1)).is_ok());
    }
}
