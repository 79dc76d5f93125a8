//! The state of a whole machine as a number: vCPU, virtual machine, devices, RAM.
//!
//! RAM is a tree: each page has a hash, 64 pages together, and all of those. A new hash of the whole costs what was written
//! since the last one, which the backend's dirty log and the devices' bitmaps tell. The rest is hashed as text in which
//! every field has its name, so that a field which is added to a state is in the hash too: two hashes compare if the same
//! build of the program made them.
//!
//! BLAKE3, since what a guest has in memory is its own choice: a hash that it can steer would hide a difference.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use blake3::{Hash, Hasher};
use vmm_cpu::{Vcpu, Vm};
use vmm_memory::vm_memory::{Bytes as _, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_memory::{DirtyTracker, GuestRam, GuestRegion, PAGE_SIZE};

use crate::pc::Pc;

/// [`PAGE_SIZE`] as a length.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Pages that are hashed together.
const GROUP: usize = 64;

/// Hashes a machine again and again.
pub struct StateHash {
    tracker: DirtyTracker,
    regions: Vec<Region>,
    /// Each hash is compared with one from scratch.
    check: bool,
    /// Pages hashed so far.
    pages: u64,
}

impl StateHash {
    /// For the machine `vm` with `ram`, which records writes of devices too
    /// ([`track_dirty`](vmm_memory::GuestRamBuilder::track_dirty)). With `check`, each hash is compared with one from
    /// scratch, which takes long.
    ///
    /// # Errors
    /// If the backend keeps no log of the guest's writes.
    pub fn new(ram: &GuestRam, vm: &dyn Vm, check: bool) -> Result<Self> {
        let log = vm.dirty_log().context("the backend keeps no log of what the guest writes")?;
        let tracker = DirtyTracker::new(ram);
        for region in ram.regions() {
            log.start(region.start_addr())?;
        }
        tracker.add_log(log);
        let untracked = tracker.harvest()?.untracked_regions().to_vec();
        ensure!(untracked.is_empty(), "writes of devices to {untracked:x?} are not recorded");
        let regions = ram.regions().into_iter().map(Region::new).collect::<Result<_>>()?;
        Ok(Self { tracker, regions, check, pages: 0 })
    }

    /// The hash of the machine as it is. Its vCPU stands still.
    ///
    /// # Errors
    /// If a state cannot be had, or if a hash from scratch is another one.
    pub fn hash(&mut self, vcpu: &mut dyn Vcpu, vm: &dyn Vm, pc: &Pc) -> Result<Hash> {
        let dirty = self.tracker.harvest()?;
        for (base, pages) in dirty.regions() {
            let region = self.regions.iter_mut().find(|region| region.region.start_addr() == base);
            let region = region.with_context(|| format!("no region at {base:x?}"))?;
            let mut groups = Vec::new();
            for page in pages.ranges().flatten() {
                region.hash_page(page)?;
                self.pages += 1;
                let group = usize::try_from(page)? / GROUP;
                if groups.last() != Some(&group) {
                    groups.push(group);
                }
            }
            for group in groups {
                region.hash_group(group);
            }
        }
        if self.check {
            for region in &self.regions {
                let fresh = Region::new(Arc::clone(&region.region))?;
                let wrong = fresh.pages.iter().zip(&region.pages).position(|(new, old)| new != old);
                ensure!(wrong.is_none(), "page {wrong:?} was written unnoticed");
                ensure!(fresh.groups == region.groups, "pages were hashed and are not in the hash");
            }
        }
        let mut text = Text(Hasher::new());
        write!(text, "{:?}{:?}", vcpu.save()?, vm.save()?)?;
        pc.show(&mut text)?;
        let Text(mut hasher) = text;
        for region in &self.regions {
            hasher.update(&region.region.start_addr().0.to_le_bytes());
            hasher.update(&region.region.len().to_le_bytes());
            for group in &region.groups {
                hasher.update(group.as_bytes());
            }
        }
        Ok(hasher.finalize())
    }

    /// How many pages had to be hashed so far, after the first time.
    #[must_use]
    pub fn pages_hashed(&self) -> u64 {
        self.pages
    }
}

/// One region of RAM with its hashes.
struct Region {
    region: Arc<GuestRegion>,
    pages: Vec<Hash>,
    groups: Vec<Hash>,
}

impl Region {
    fn new(region: Arc<GuestRegion>) -> Result<Self> {
        let pages = usize::try_from(region.len() / PAGE_SIZE)?;
        let none = Hash::from_bytes([0; 32]);
        let mut this = Self { region, pages: vec![none; pages], groups: vec![none; pages.div_ceil(GROUP)] };
        for page in 0..pages {
            this.hash_page(u64::try_from(page)?)?;
        }
        for group in 0..this.groups.len() {
            this.hash_group(group);
        }
        Ok(this)
    }

    fn hash_page(&mut self, page: u64) -> Result<()> {
        let mut bytes = [0; PAGE];
        self.region.read_slice(&mut bytes, MemoryRegionAddress(page * PAGE_SIZE))?;
        if let Some(hash) = self.pages.get_mut(usize::try_from(page)?) {
            *hash = blake3::hash(&bytes);
        }
        Ok(())
    }

    fn hash_group(&mut self, group: usize) {
        let pages = self.pages.chunks(GROUP).nth(group);
        if let (Some(pages), Some(hash)) = (pages, self.groups.get_mut(group)) {
            let mut hasher = Hasher::new();
            for page in pages {
                hasher.update(page.as_bytes());
            }
            *hash = hasher.finalize();
        }
    }
}

/// Hashes text as it is written.
struct Text(Hasher);

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}
