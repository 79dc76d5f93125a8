//! The one place where the host is told something about the memory behind a region: `madvise(2)` takes an address.

#![allow(unsafe_code, reason = "madvise(2) takes an address")]

use rustix::io::Errno;
use vm_memory::{GuestMemoryRegion, MmapRegion, VolatileMemory};

use crate::region::GuestRegion;

/// What is asked of the host. None of it unmaps anything or changes what the mapping permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Transparent huge pages, please.
    HugePages,
    /// None of them.
    SmallPages,
    /// Page tables for reading, now.
    PopulateRead,
    /// Page tables for writing, now.
    PopulateWrite,
    /// Gives the pages back. Private anonymous memory then reads as zero.
    Discard,
}

/// Gives `advice` for `size` bytes of `region` from `offset` on; `FAULT` if they do not lie within it.
pub(crate) fn advise(region: &GuestRegion, offset: u64, size: u64, advice: Advice) -> Result<(), Errno> {
    let (Ok(offset), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else {
        return Err(Errno::OVERFLOW);
    };
    let slice = MmapRegion::get_slice(region, offset, size).map_err(|_| Errno::FAULT)?;
    let address = slice.ptr_guard().as_ptr().cast_mut();
    let advice = match advice {
        Advice::HugePages => rustix::mm::Advice::LinuxHugepage,
        Advice::SmallPages => rustix::mm::Advice::LinuxNoHugepage,
        Advice::PopulateRead => rustix::mm::Advice::LinuxPopulateRead,
        Advice::PopulateWrite => rustix::mm::Advice::LinuxPopulateWrite,
        Advice::Discard => rustix::mm::Advice::LinuxDontNeed,
    };
    // SAFETY: the range lies within a mapping that `region` keeps alive, as `get_slice` has checked, and no advice above takes
    // that away. What discarding does to the contents is what a guest may do to them at any time, for which reason they are
    // accessed as volatile memory alone.
    unsafe { rustix::mm::madvise(address.cast(), size, advice) }
}

/// Asks for transparent huge pages, or for none. A kernel that was built without them has no need to be asked.
pub(crate) fn advise_huge_pages(region: &GuestRegion, wanted: bool) -> Result<(), Errno> {
    let advice = if wanted { Advice::HugePages } else { Advice::SmallPages };
    match advise(region, 0, GuestMemoryRegion::len(region), advice) {
        Err(Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// Number of pages that have host memory of their own. The shared zero page, which a read maps,
/// does not count (Linux admin-guide/mm/pagemap: bit 63 present, bit 56 exclusively mapped).
#[cfg(test)]
pub(crate) fn resident(region: &GuestRegion) -> u64 {
    use std::os::unix::fs::FileExt;

    const OWN: u64 = 1 << 63 | 1 << 56;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; region.size() / 4096 * 8];
    pagemap.read_exact_at(&mut entries, region.as_ptr().addr() as u64 / crate::PAGE_SIZE * 8).unwrap();
    let entries = entries.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry));
    entries.filter(|entry| entry & OWN == OWN).count() as u64
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::RegionConfig;

    /// What the kernel notes of the mapping that holds `region`.
    fn flags_of(region: &GuestRegion) -> String {
        let address = format!("{:x}-", region.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = maps.lines().skip_while(|line| !line.starts_with(&address));
        mapping.into_iter().find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
    }

    #[test]
    fn huge_pages_are_asked_for_and_refused() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            println!("skipped: the host has no transparent huge pages");
            return;
        }
        let region = |config: RegionConfig| config.map(false).unwrap();
        // Apart from each other, so that the kernel does not make one mapping of two.
        let config = |size| RegionConfig::new(GuestAddress(0), size);
        for (region, flag) in
            [(region(config(4 << 20)), " hg "), (region(config(4 << 20).huge_pages(false)), " nh ")]
        {
            let flags = flags_of(&region);
            assert!(format!("{flags} ").contains(flag), "{flags}");
        }
    }

    #[test]
    fn nothing_outside_of_the_region_is_touched() {
        let region = RegionConfig::new(GuestAddress(0), 0x4000).map(false).unwrap();
        for (offset, size) in [(0, 0x5000), (0x4000, 0x1000), (u64::MAX, 1), (0x1000, u64::MAX)] {
            for advice in [Advice::Discard, Advice::PopulateWrite] {
                assert_eq!(advise(&region, offset, size, advice), Err(Errno::FAULT), "{offset:#x}");
            }
        }
        advise(&region, 0x3000, 0x1000, Advice::PopulateWrite).unwrap();
        assert_eq!(resident(&region), 1);
    }
}
