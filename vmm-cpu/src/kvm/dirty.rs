//! Pages that the guest wrote: KVM's bitmaps, or the rings of the vCPUs.
//!
//! With a bitmap the kernel keeps one bit a page and looks at all of them when it is asked. With rings
//! ([`KvmOptions::dirty_ring`](super::KvmOptions::dirty_ring)) it notes each page when it is first written, so that harvesting
//! takes time by what was written and not by how much memory there is. A full ring ends KVM_RUN; the run loop then moves its
//! contents to bitmaps of our own, which are bounded by the guest's memory, and goes on.
//!
//! A ring has room left when KVM_RUN ends for it, as much as the kernel can note before that. A kernel that notes more
//! writes over what was not collected, without a word. That shows: the ring is full to the last entry, or
//! KVM_RESET_DIRTY_RINGS finds other entries than were collected. Then nobody knows which pages are missing, so all are
//! reported, and every harvest is an error from then on: [`Error::DirtyRingOverrun`].

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{DirtyLog, GuestRegion, PageBitmap};

use super::rings::DirtyRing;
use super::vm::VmInner;
use super::{NAME, host, sys};
use crate::error::{Error, Result};
use crate::vm::GuestDirtyLog;

/// How often KVM_RESET_DIRTY_RINGS may do nothing before that is taken to be all. A signal that is waiting has it do nothing
/// once.
const MOST_TRIES: u32 = 100;

/// The rings of a virtual machine, and what was collected from them.
#[derive(Debug)]
pub(super) struct DirtyRings {
    /// Entries of each.
    entries: u32,
    /// The kernel keeps a bitmap beside them, of what it writes on behalf of no vCPU.
    with_bitmap: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Of all vCPUs that ever were.
    rings: Vec<DirtyRing>,
    /// What was collected for each slot that is logged, by its number.
    logs: BTreeMap<u32, PageBitmap>,
    /// Entries collected that the kernel was not told of yet.
    collected: u64,
    overrun: bool,
}

impl DirtyRings {
    pub(super) fn new(entries: u32, with_bitmap: bool) -> Self {
        Self { entries, with_bitmap, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<()> {
        let ring = DirtyRing::map(vcpu, self.entries).map_err(|source| Error::Host {
            backend: NAME,
            operation: "mapping a dirty ring",
            source,
        })?;
        self.state().rings.push(ring);
        Ok(())
    }

    /// Makes room in the rings.
    pub(super) fn empty(&self, vm: &VmFd) -> Result<()> {
        self.state().collect(vm, self.entries)
    }

    fn start(&self, vm: &VmFd, slot: u32, region: &GuestRegion) -> Result<()> {
        let mut state = self.state();
        // What was noted for the slot while it was logged before.
        state.collect(vm, self.entries)?;
        state.logs.insert(slot, PageBitmap::for_region(region));
        Ok(())
    }

    /// Forgets the log of a slot.
    pub(super) fn stop(&self, slot: u32) {
        self.state().logs.remove(&slot);
    }

    fn harvest(&self, vm: &VmFd, slot: u32, region: &GuestRegion, into: &mut PageBitmap) -> Result<()> {
        let mut state = self.state();
        let collected = state.collect(vm, self.entries);
        if let Some(log) = state.logs.get_mut(&slot) {
            into.or_words(log.words());
            *log = PageBitmap::for_region(region);
        }
        if state.overrun {
            into.set_range(0..into.pages());
        }
        collected
    }
}

impl State {
    /// Moves what the rings have to the logs, and lets the kernel go on with them.
    fn collect(&mut self, vm: &VmFd, entries: u32) -> Result<()> {
        let Self { rings, logs, collected, overrun } = self;
        let unreadable =
            |source: io::Error| Error::Host { backend: NAME, operation: "reading a dirty ring", source };
        for ring in rings {
            let taken = ring
                .collect(|entry| {
                    if let Some(log) = logs.get_mut(&entry.slot) {
                        log.set(entry.page);
                    }
                })
                .map_err(unreadable)?;
            *collected += u64::from(taken);
            *overrun |= taken == entries;
        }
        // A signal to this thread ends the request early; it is made again until nothing is left, or nothing comes any more.
        let mut tries = 0;
        while *collected > 0 && tries < MOST_TRIES {
            let reset = sys::reset_dirty_rings(vm).map_err(|errno| host("KVM_RESET_DIRTY_RINGS", errno))?;
            tries = if reset == 0 { tries + 1 } else { 0 };
            *overrun |= reset > *collected;
            *collected = collected.saturating_sub(reset);
        }
        *overrun |= *collected > 0;
        *collected = 0;
        if *overrun { Err(Error::DirtyRingOverrun { entries }) } else { Ok(()) }
    }
}

/// The dirty log of one VM.
#[derive(Debug)]
pub(super) struct KvmDirtyLog(pub(super) Arc<VmInner>);

impl DirtyLog for KvmDirtyLog {
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let slots = self.0.slots();
        let Some(slot) = slots.get(&region.start_addr().0) else { return Ok(()) };
        if slot.flags & KVM_MEM_LOG_DIRTY_PAGES == 0 || slot.region.len() != region.len() {
            return Ok(());
        }
        let rings = self.0.dirty_rings.as_ref();
        if rings.is_none_or(|rings| rings.with_bitmap) {
            let len = usize::try_from(region.len())?;
            let words = self
                .0
                .fd
                .get_dirty_log(slot.number, len)
                .map_err(|errno| host("KVM_GET_DIRTY_LOG", errno))?;
            into.or_words(&words);
        }
        if let Some(finish) = &self.0.finish {
            finish.harvest(region, into)?;
        }
        match rings {
            Some(rings) => Ok(rings.harvest(&self.0.fd, slot.number, region, into)?),
            None => Ok(()),
        }
    }
}

impl GuestDirtyLog for KvmDirtyLog {
    fn start(&self, gpa: GuestAddress) -> Result<()> {
        self.set_logging(gpa, true)
    }

    fn stop(&self, gpa: GuestAddress) -> Result<()> {
        self.set_logging(gpa, false)
    }
}

impl KvmDirtyLog {
    fn set_logging(&self, gpa: GuestAddress, logging: bool) -> Result<()> {
        let mut slots = self.0.slots();
        let slot = slots.get_mut(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?;
        let without = slot.flags & !KVM_MEM_LOG_DIRTY_PAGES;
        let flags = if logging { without | KVM_MEM_LOG_DIRTY_PAGES } else { without };
        if flags == slot.flags {
            return Ok(());
        }
        if slot.guest_memfd.is_some() {
            return Err(Error::unsupported("a dirty log of memory in a guest_memfd", "KVM keeps none"));
        }
        // Before the kernel begins to note, and after it has ended.
        if logging && let Some(rings) = &self.0.dirty_rings {
            rings.start(&self.0.fd, slot.number, &slot.region)?;
        }
        if let Some(finish) = &self.0.finish {
            finish.log_writes(gpa, logging);
        }
        sys::set_memory_slot(&self.0.fd, slot.number, &slot.region, slot.region.len(), flags)
            .map_err(|errno| host("KVM_SET_USER_MEMORY_REGION", errno))?;
        slot.flags = flags;
        if !logging && let Some(rings) = &self.0.dirty_rings {
            rings.stop(slot.number);
        }
        Ok(())
    }
}
