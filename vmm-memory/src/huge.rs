//! Huge pages of the host's pools (hugetlb): their sizes, what a pool has, and adding to one.
//!
//! Nothing here is reached by a guest. The host's operator decides how large a pool is; a region takes its pages when it is
//! mapped, so that a guest which touches its memory later never finds the pool empty.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::PathBuf;
use std::str::FromStr;

use rustix::fs::{FlockOperation, MemfdFlags, flock, fstatfs};

use crate::numa::NodeSet;
use crate::{MemoryError, PAGE_SIZE};

/// Size of the pages of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HugePageSize {
    /// 2 MiB: one entry of a page directory (Intel SDM 3A 5.5.4).
    TwoMib,
    /// 1 GiB: one entry of a page-directory-pointer table.
    OneGib,
}

impl HugePageSize {
    /// All of them, ascending.
    pub const ALL: [Self; 2] = [Self::TwoMib, Self::OneGib];

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::TwoMib => 2 << 20,
            Self::OneGib => 1 << 30,
        }
    }

    /// The host's pool of pages of this size; `None` if the host has no such pages.
    pub fn pool(self) -> Option<HugePagePool> {
        let count = |name| number(&self.directory().join(name));
        Some(HugePagePool {
            total: count("nr_hugepages")?,
            free: count("free_hugepages")?,
            reserved: count("resv_hugepages")?,
        })
    }

    fn directory(self) -> PathBuf {
        PathBuf::from(format!("/sys/kernel/mm/hugepages/{}", self.pool_name()))
    }

    fn pool_name(self) -> String {
        format!("hugepages-{}kB", self.bytes() >> 10)
    }

    /// The file whose number is the size of the pool.
    fn control(self) -> PathBuf {
        self.directory().join("nr_hugepages")
    }

    /// Pages of this size that nobody uses on `nodes`. Those reserved elsewhere are among them.
    pub(crate) fn free_on(self, nodes: &NodeSet) -> u64 {
        let free = |node| {
            let pool = self.pool_name();
            number(&PathBuf::from(format!(
                "/sys/devices/system/node/node{node}/hugepages/{pool}/free_hugepages"
            )))
        };
        nodes.iter().filter_map(free).sum()
    }

    pub(crate) const fn map_flag(self) -> i32 {
        map_flags(self.bytes())
    }

    pub(crate) const fn memfd_flags(self) -> MemfdFlags {
        let size = match self {
            Self::TwoMib => MemfdFlags::HUGE_2MB,
            Self::OneGib => MemfdFlags::HUGE_1GB,
        };
        MemfdFlags::HUGETLB.union(size)
    }

    /// What to say where `size` bytes at `gpa` did not get their pages.
    pub(crate) fn shortage(self, gpa: u64, size: u64) -> MemoryError {
        let needed = size.div_ceil(self.bytes());
        match self.pool() {
            None => self.unknown(),
            Some(pool) => {
                let available = pool.available();
                let wanted = pool.total + needed.saturating_sub(available);
                let file = self.control().display().to_string();
                MemoryError::HugePages { gpa, size, page_size: self, needed, available, wanted, file }
            }
        }
    }

    pub(crate) fn unknown(self) -> MemoryError {
        let sizes: Vec<String> =
            Self::ALL.iter().filter(|size| size.pool().is_some()).map(Self::to_string).collect();
        let supported = if sizes.is_empty() { "none".to_owned() } else { sizes.join(", ") };
        MemoryError::HugePageSize { page_size: self, supported }
    }
}

impl fmt::Display for HugePageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoMib => "2 MiB",
            Self::OneGib => "1 GiB",
        })
    }
}

/// As the kernel's `hugepagesz=` takes it: `2M` or `1G`.
impl FromStr for HugePageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "2M" => Ok(Self::TwoMib),
            "1G" => Ok(Self::OneGib),
            _ => Err(format!("huge pages of {text:?}; there are 2M and 1G")),
        }
    }
}

/// What the host's pool of one size has, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HugePagePool {
    /// All pages of the pool.
    pub total: u64,
    /// Those that are not in use.
    pub free: u64,
    /// Those among the free ones that a mapping has a right to and did not touch yet.
    pub reserved: u64,
}

impl HugePagePool {
    /// Pages that a new region can have.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }
}

/// Pages that were added to the host's pool, until this is dropped: for programs that run as root and look after their
/// memory themselves, and for tests.
///
/// Several programs may do so at the same time. Pages that are still mapped when this is dropped leave the pool as they
/// become free.
#[derive(Debug)]
pub struct ReservedHugePages {
    page_size: HugePageSize,
    pages: u64,
}

impl ReservedHugePages {
    /// Adds `pages` pages.
    ///
    /// # Errors
    /// [`MemoryError::HugePageSize`] if the host has no such pages; [`MemoryError::HugePagePool`] if it does not let this
    /// user have them or finds no room: what could be had is given back.
    pub fn reserve(page_size: HugePageSize, pages: u64) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::HugePagePool { page_size, pages, source };
        if page_size.pool().is_none() {
            return Err(page_size.unknown());
        }
        let (before, after) = change(page_size, |total| total.saturating_add(pages)).map_err(failed)?;
        let got = Self { page_size, pages: after.saturating_sub(before) };
        if got.pages < pages {
            let text = format!("the host had room for {} of them", got.pages);
            return Err(failed(io::Error::new(io::ErrorKind::OutOfMemory, text)));
        }
        Ok(got)
    }
}

impl Drop for ReservedHugePages {
    fn drop(&mut self) {
        // Who was allowed to add them is allowed to take them away; were it not so, the pool would stay larger, as one that
        // an operator has made so.
        drop(change(self.page_size, |total| total.saturating_sub(self.pages)));
    }
}

/// Changes the size of a pool, one program at a time; its size before and after.
fn change(page_size: HugePageSize, wanted: impl FnOnce(u64) -> u64) -> io::Result<(u64, u64)> {
    let mut control = OpenOptions::new().read(true).write(true).open(page_size.control())?;
    flock(&control, FlockOperation::LockExclusive)?;
    let before = parsed(&mut control)?;
    control.write_all(wanted(before).to_string().as_bytes())?;
    let after = parsed(&mut control)?;
    Ok((before, after))
}

fn parsed(control: &mut File) -> io::Result<u64> {
    let mut text = String::new();
    control.rewind()?;
    control.read_to_string(&mut text)?;
    control.rewind()?;
    text.trim().parse().map_err(io::Error::other)
}

fn number(file: &PathBuf) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// What tells mmap(2) about pages of so many bytes, a power of two.
pub(crate) const fn map_flags(page_size: u64) -> i32 {
    libc::MAP_HUGETLB | (page_size.trailing_zeros().cast_signed() << libc::MAP_HUGE_SHIFT)
}

/// Size of the host's pages behind a mapping made with those flags, if they say that.
pub(crate) fn page_size_of_flags(flags: i32) -> Option<u64> {
    let shift = flags.cast_unsigned() >> libc::MAP_HUGE_SHIFT;
    (flags & libc::MAP_HUGETLB != 0 && shift != 0).then(|| 1_u64.checked_shl(shift)).flatten()
}

/// Size of the host's pages that a mapping of `file` is made of.
pub(crate) fn page_size_of_file(file: &File) -> u64 {
    /// Linux `include/uapi/linux/magic.h`, HUGETLBFS_MAGIC.
    const HUGETLBFS: i64 = 0x9584_58f6;
    match fstatfs(file) {
        Ok(system) if system.f_type == HUGETLBFS => {
            u64::try_from(system.f_bsize).ok().filter(|size| size.is_power_of_two()).unwrap_or(PAGE_SIZE)
        }
        _ => PAGE_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_named_as_the_kernel_names_them() {
        for (text, size, bytes) in
            [("2M", HugePageSize::TwoMib, 0x20_0000), ("1G", HugePageSize::OneGib, 0x4000_0000)]
        {
            assert_eq!((text.parse(), size.bytes()), (Ok(size), bytes));
            assert_eq!(page_size_of_flags(size.map_flag() | libc::MAP_SHARED), Some(bytes));
        }
        let error = "4K".parse::<HugePageSize>().unwrap_err();
        assert!(error.contains("4K") && error.contains("2M"), "{error}");
        assert_eq!(page_size_of_flags(libc::MAP_PRIVATE), None);
    }

    #[test]
    fn a_shortage_says_how_many_pages_and_where() {
        let Some(pool) = HugePageSize::TwoMib.pool() else {
            println!("skipped: the host has no huge pages of 2 MiB");
            return;
        };
        let error = HugePageSize::TwoMib.shortage(0x1000, 5 << 40).to_string();
        let wanted = pool.total + (5 << 19) - pool.available();
        assert!(
            error
                .contains(&format!("echo {wanted} > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")),
            "{error}"
        );
    }
}
