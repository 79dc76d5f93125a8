//! The grant table: what frames a guest lets others use (public/grant_table.h, version 1).
//!
//! Threat model: the table lies in guest memory and changes at any time. A grant is taken into use with one
//! compare-and-swap of its flags, as in Xen, so that the guest sees that it is used; the frame is read before and must
//! be RAM of the domain.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::PAGE_SIZE;
use super::abi::errno::Errno;
use super::abi::grant::{ENTRIES_PER_FRAME, GrantEntry, gntst, gtf};
use super::domain::Domain;
use super::memory::{Access, DomainMemory};
use zerocopy::IntoBytes;

/// Attempts to change an entry that the guest keeps changing.
const ATTEMPTS: u32 = 16;

/// The grant table of one domain.
#[derive(Debug)]
pub(crate) struct Grants {
    frames: AtomicU32,
    /// How often each reference is in use, for reading and for writing.
    used: Mutex<HashMap<u32, Uses>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    readers: u32,
    writers: u32,
}

impl Grants {
    pub(crate) fn new() -> Self {
        Self { frames: AtomicU32::new(1), used: Mutex::new(HashMap::new()) }
    }

    /// Frames that the table has.
    pub(crate) fn frames(&self) -> u32 {
        self.frames.load(Ordering::Acquire)
    }

    pub(crate) fn grow(&self, frames: u32) {
        self.frames.fetch_max(frames, Ordering::AcqRel);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Uses>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where entry `reference` lies.
    fn place(&self, memory: &DomainMemory, reference: u32) -> Result<u64, i16> {
        if reference / ENTRIES_PER_FRAME >= self.frames() {
            return Err(gntst::BAD_GNTREF);
        }
        let (first, _) = memory.grant_frames();
        Ok(first * PAGE_SIZE + u64::from(reference) * 8)
    }

    fn read(memory: &DomainMemory, at: u64) -> Result<GrantEntry, i16> {
        let mut entry = GrantEntry::default();
        memory.read(at, entry.as_mut_bytes()).map_err(|_| gntst::BAD_GNTREF)?;
        Ok(entry)
    }

    /// Takes a grant into use for `domid` and returns its frame.
    fn take(&self, memory: &DomainMemory, reference: u32, domid: u16, access: Access) -> Result<u64, i16> {
        let at = self.place(memory, reference)?;
        let mut used = self.lock();
        for _ in 0..ATTEMPTS {
            let entry = Self::read(memory, at)?;
            if entry.flags & gtf::TYPE_MASK != gtf::PERMIT_ACCESS || entry.flags & gtf::SUB_PAGE != 0 {
                return Err(gntst::BAD_GNTREF);
            }
            if entry.domid != domid {
                return Err(gntst::PERMISSION_DENIED);
            }
            let mark = match access {
                Access::Read => gtf::READING,
                Access::Write if entry.flags & gtf::READONLY != 0 => return Err(gntst::PERMISSION_DENIED),
                Access::Write => gtf::READING | gtf::WRITING,
            };
            let frame = u64::from(entry.frame);
            if !memory.is_ram(frame) {
                return Err(gntst::BAD_PAGE);
            }
            match memory.exchange_u16(at, entry.flags, entry.flags | mark) {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => continue,
                Err(_) => return Err(gntst::BAD_GNTREF),
            }
            // The guest may have written another frame or domain before the mark; from here on it must not.
            let again = Self::read(memory, at)?;
            let uses = used.entry(reference).or_default();
            match access {
                Access::Read => uses.readers += 1,
                Access::Write => uses.writers += 1,
            }
            if again.domid != domid || u64::from(again.frame) != frame {
                Self::drop_use(&mut used, memory, at, reference, access);
                continue;
            }
            return Ok(frame);
        }
        Err(gntst::GENERAL_ERROR)
    }

    fn give_back(&self, memory: &DomainMemory, reference: u32, access: Access) {
        if let Ok(at) = self.place(memory, reference) {
            Self::drop_use(&mut self.lock(), memory, at, reference, access);
        }
    }

    fn drop_use(
        used: &mut HashMap<u32, Uses>,
        memory: &DomainMemory,
        at: u64,
        reference: u32,
        access: Access,
    ) {
        let Some(uses) = used.get_mut(&reference) else { return };
        match access {
            Access::Read => uses.readers = uses.readers.saturating_sub(1),
            Access::Write => uses.writers = uses.writers.saturating_sub(1),
        }
        let mut clear = 0;
        if uses.writers == 0 {
            clear |= gtf::WRITING;
            if uses.readers == 0 {
                clear |= gtf::READING;
                used.remove(&reference);
            }
        }
        for _ in 0..ATTEMPTS {
            let Ok(entry) = Self::read(memory, at) else { return };
            match memory.exchange_u16(at, entry.flags, entry.flags & !clear) {
                Ok(Err(_)) => {}
                _ => return,
            }
        }
    }

    /// Exchanges two entries that nobody uses.
    pub(crate) fn swap(&self, memory: &DomainMemory, a: u32, b: u32) -> Result<(), i16> {
        let (place_a, place_b) = (self.place(memory, a)?, self.place(memory, b)?);
        let used = self.lock();
        if used.contains_key(&a) || used.contains_key(&b) {
            return Err(gntst::GENERAL_ERROR);
        }
        let (one, other) = (Self::read(memory, place_a)?, Self::read(memory, place_b)?);
        let bad = |_: Errno| gntst::BAD_GNTREF;
        memory.write(place_a, other.as_bytes()).map_err(bad)?;
        memory.write(place_b, one.as_bytes()).map_err(bad)
    }
}

#[cfg(feature = "snapshot")]
impl Grants {
    /// The table of a saved domain. Nobody uses any of its grants yet: back ends take what they had again, and what they do not
    /// take is the guest's again.
    pub(crate) fn restore(frames: u32, memory: &DomainMemory) -> crate::Result<Self> {
        let (_, max) = memory.grant_frames();
        if frames == 0 || u64::from(frames) > max {
            let problem = format!("{frames}, allowed are 1 to {max}");
            return Err(crate::xen_pv::saved::invalid("backend.grant_frames", problem));
        }
        let grants = Self::new();
        grants.grow(frames);
        Ok(grants)
    }

    /// Takes the marks of use away, once the frames are there.
    pub(crate) fn forget_uses(&self, memory: &DomainMemory) {
        for reference in 0..self.frames().saturating_mul(ENTRIES_PER_FRAME) {
            let Ok(at) = self.place(memory, reference) else { return };
            let Ok(entry) = Self::read(memory, at) else { return };
            let marks = entry.flags & (gtf::READING | gtf::WRITING);
            if entry.flags & gtf::TYPE_MASK == gtf::PERMIT_ACCESS
                && marks != 0
                && memory.exchange_u16(at, entry.flags, entry.flags & !marks).is_err()
            {
                tracing::debug!(reference, "no such entry");
            }
        }
    }
}

/// A grant of the guest in use by a back end, until dropped.
#[derive(Debug)]
pub struct GrantedFrame {
    domain: Arc<Domain>,
    reference: u32,
    access: Access,
    frame: u64,
}

impl GrantedFrame {
    /// Guest-physical address of the granted page.
    pub fn address(&self) -> vmm_memory::vm_memory::GuestAddress {
        vmm_memory::vm_memory::GuestAddress(self.frame * PAGE_SIZE)
    }

    /// Whether it may be written to.
    pub fn is_writable(&self) -> bool {
        self.access == Access::Write
    }
}

impl Drop for GrantedFrame {
    fn drop(&mut self) {
        self.domain.grants.give_back(&self.domain.memory, self.reference, self.access);
    }
}

/// A grant that cannot be taken into use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grant reference {reference} cannot be used by domain {domid}: {reason}")]
pub struct GrantError {
    reference: u32,
    domid: u16,
    reason: &'static str,
}

impl Domain {
    /// Takes a grant of the guest into use on behalf of `domid`.
    ///
    /// # Errors
    /// [`GrantError`] if the guest has not granted that, to that domain, in that way.
    pub fn use_grant(
        self: &Arc<Self>,
        reference: u32,
        domid: u16,
        writable: bool,
    ) -> Result<GrantedFrame, GrantError> {
        let access = if writable { Access::Write } else { Access::Read };
        let taken = self.grants.take(&self.memory, reference, domid, access);
        let frame = taken.map_err(|status| GrantError {
            reference,
            domid,
            reason: match status {
                gntst::BAD_GNTREF => "there is no such grant of a whole page",
                gntst::PERMISSION_DENIED => "it is for another domain or for reading only",
                gntst::BAD_PAGE => "its frame is not RAM of the domain",
                _ => "the guest keeps changing it",
            },
        })?;
        Ok(GrantedFrame { domain: Arc::clone(self), reference, access, frame })
    }
}
