//! On which of the host's NUMA nodes guest memory lies.
//!
//! The operator's to say; a guest has no part in it. A policy is given to a mapping before anything touches it, and holds
//! for the pages that it gets from then on.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::str::FromStr;

use crate::MemoryError;

/// Most nodes that Linux can be built for (`CONFIG_NODES_SHIFT` is at most 10).
const MAX_NODES: u32 = 1024;

/// Where the host finds memory for a region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NumaPolicy {
    /// On these nodes and nowhere else (`MPOL_BIND`). When they have none left, the host ends the process that touches more:
    /// prefault such memory.
    Bind(NodeSet),
    /// On these nodes while they have some, then on others (`MPOL_PREFERRED`; `MPOL_PREFERRED_MANY` for more than one, from
    /// Linux 5.15 on).
    Preferred(NodeSet),
    /// On these nodes by turns, page by page (`MPOL_INTERLEAVE`).
    Interleave(NodeSet),
}

impl NumaPolicy {
    /// The nodes that it names.
    pub fn nodes(&self) -> &NodeSet {
        match self {
            Self::Bind(nodes) | Self::Preferred(nodes) | Self::Interleave(nodes) => nodes,
        }
    }

    /// Whether this host has memory on all of the nodes.
    ///
    /// # Errors
    /// [`MemoryError::NoNumaNodes`] for an empty set, [`MemoryError::NumaNode`] with the first node that is absent.
    pub fn check(&self) -> Result<(), MemoryError> {
        if self.nodes().is_empty() {
            return Err(MemoryError::NoNumaNodes { present: NodeSet::of_host() });
        }
        let present = NodeSet::of_host();
        match self.nodes().iter().find(|node| !present.contains(*node)) {
            Some(node) => Err(MemoryError::NumaNode { node, present }),
            None => Ok(()),
        }
    }
}

/// Some of the host's NUMA nodes, by number.
///
/// As text it is what the kernel makes of it: `0,2-3`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSet(BTreeSet<u32>);

impl NodeSet {
    /// The nodes of this host that have memory. A kernel without NUMA has node 0.
    pub fn of_host() -> Self {
        ["has_memory", "online"]
            .iter()
            .find_map(|name| {
                fs::read_to_string(format!("/sys/devices/system/node/{name}")).ok()?.trim().parse().ok()
            })
            .unwrap_or_else(|| Self::from(0))
    }

    /// Whether there is none in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has that one.
    pub fn contains(&self, node: u32) -> bool {
        self.0.contains(&node)
    }

    /// The nodes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }
}

impl From<u32> for NodeSet {
    fn from(node: u32) -> Self {
        Self([node].into())
    }
}

impl FromIterator<u32> for NodeSet {
    fn from_iter<T: IntoIterator<Item = u32>>(nodes: T) -> Self {
        Self(nodes.into_iter().collect())
    }
}

impl FromStr for NodeSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            part.parse::<u32>().ok().filter(|node| *node < MAX_NODES).ok_or_else(|| {
                format!(
                    "NUMA node {part:?} in {text:?}; nodes are numbers from 0 to {}, as in 0,2-3",
                    MAX_NODES - 1
                )
            })
        };
        let mut nodes = BTreeSet::new();
        for part in text.split(',') {
            match part.split_once('-') {
                None => nodes.extend([number(part)?]),
                Some((first, last)) => nodes.extend(number(first)?..=number(last)?),
            }
        }
        Ok(Self(nodes))
    }
}

impl fmt::Display for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nodes = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = nodes.next() {
            let mut last = first;
            while let Some(next) = nodes.next_if(|node| *node == last + 1) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, GuestRam, HugePageSize, RegionConfig};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn sets_are_read_and_written_as_the_kernel_does() {
        for text in ["0", "0,2-3", "1-5,63", "1023"] {
            assert_eq!(text.parse::<NodeSet>().unwrap().to_string(), text);
        }
        assert_eq!("3,1,2,2".parse::<NodeSet>().unwrap().to_string(), "1-3");
        for text in ["", "x", "1,", "-1", "1-", "1024", "0-4294967295", "1-2-3"] {
            let error = text.parse::<NodeSet>().unwrap_err();
            assert!(error.contains("0 to 1023"), "{error}");
        }
    }

    #[test]
    fn an_absent_node_is_named_with_those_that_are_there() {
        let absent = (0..MAX_NODES).find(|node| !NodeSet::of_host().contains(*node)).unwrap();
        let error = NumaPolicy::Preferred([0, absent].into_iter().collect()).check().unwrap_err();
        assert!(matches!(error, MemoryError::NumaNode { node, .. } if node == absent), "{error}");
        assert!(error.to_string().contains(&NodeSet::of_host().to_string()), "{error}");
        let empty = NumaPolicy::Bind(NodeSet::default()).check().unwrap_err();
        assert!(matches!(empty, MemoryError::NoNumaNodes { .. }), "{empty}");
    }

    /// The policy that the kernel notes of the mapping at `address` (`/proc/self/numa_maps`).
    fn noted(address: usize) -> Option<String> {
        let maps = fs::read_to_string("/proc/self/numa_maps").ok()?;
        let line = maps.lines().find(|line| line.starts_with(&format!("{address:x} ")))?;
        line.split_whitespace().nth(1).map(str::to_owned)
    }

    #[test]
    fn mappings_get_the_policy() {
        let node = NodeSet::of_host().iter().next().unwrap();
        for (policy, expected) in [
            (NumaPolicy::Bind(node.into()), format!("bind:{node}")),
            (NumaPolicy::Preferred(node.into()), format!("prefer:{node}")),
            (NumaPolicy::Interleave(node.into()), format!("interleave:{node}")),
        ] {
            for backing in [Backing::Anonymous, Backing::Memfd] {
                let config =
                    RegionConfig::new(GuestAddress(0), 1 << 20).backing(backing.clone()).numa(policy.clone());
                let ram = match GuestRam::builder().region(config).build() {
                    Err(MemoryError::Numa { source, .. }) if source.raw_os_error() == Some(libc::ENOSYS) => {
                        println!("skipped: the host's kernel knows no NUMA policies");
                        return;
                    }
                    other => other.unwrap(),
                };
                let address = ram.regions().remove(0).as_ptr().addr();
                let Some(policy) = noted(address) else {
                    println!("skipped: no /proc/self/numa_maps");
                    return;
                };
                assert_eq!(policy, expected, "{backing:?}");
                ram.memory().write_obj(1_u8, GuestAddress(0x5000)).unwrap();
            }
        }
    }

    #[test]
    fn the_page_cache_takes_no_policy() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        if rustix::fs::fcntl_get_seals(&file).is_ok() {
            println!("skipped: /var/tmp is in memory");
            return;
        }
        file.set_len(1 << 20).unwrap();
        let backing = Backing::File { file: std::sync::Arc::new(file), offset: 0 };
        let policy = NumaPolicy::Bind(NodeSet::of_host());
        let config = RegionConfig::new(GuestAddress(0), 1 << 20).backing(backing).numa(policy);
        let error = GuestRam::builder().region(config).build().unwrap_err();
        assert!(matches!(error, MemoryError::NumaBacking { gpa: 0, .. }), "{error}");
    }

    #[test]
    fn an_absent_node_is_found_before_huge_pages_are_taken() {
        let absent = (0..MAX_NODES).find(|node| !NodeSet::of_host().contains(*node)).unwrap();
        let config = RegionConfig::new(GuestAddress(0), 2 << 20)
            .backing(Backing::HugeTlb { page_size: HugePageSize::TwoMib })
            .numa(NumaPolicy::Bind(absent.into()));
        let error = GuestRam::builder().region(config).build().unwrap_err();
        assert!(matches!(error, MemoryError::NumaNode { .. }), "{error}");
    }
}
