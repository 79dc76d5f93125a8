//! What RAM is made of, where the user says so.

use std::str::FromStr;

use clap::Args;
use vmm_memory::{Backing, GuestRamBuilder, HugePageSize, NodeSet, NumaPolicy, RegionConfig};

/// The options for RAM, beside its size.
#[derive(Args)]
pub(crate) struct RamOptions {
    /// Takes RAM from the host's pool of huge pages of that size: 2M or 1G. Backend translate then does without address
    /// windows.
    #[arg(long, value_name = "SIZE")]
    hugepages: Option<HugePageSize>,
    /// On which of the host's NUMA nodes RAM is: `0`, `0,2-3`, or with another policy `prefer:0`, `interleave:0,1`.
    #[arg(long, value_name = "[bind:|prefer:|interleave:]NODE[,NODE]")]
    numa: Option<Numa>,
}

/// A policy as the command line has it.
#[derive(Clone)]
struct Numa(NumaPolicy);

impl FromStr for Numa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (policy, nodes) = text.split_once(':').unwrap_or(("bind", text));
        let nodes: NodeSet = nodes.parse()?;
        Ok(Self(match policy {
            "bind" => NumaPolicy::Bind(nodes),
            "prefer" => NumaPolicy::Preferred(nodes),
            "interleave" => NumaPolicy::Interleave(nodes),
            _ => return Err(format!("NUMA policy {policy:?}; there are bind, prefer and interleave")),
        }))
    }
}

impl RamOptions {
    /// RAM of what the options say, of `backing` where they say nothing.
    pub(crate) fn apply(&self, ram: GuestRamBuilder, backing: Backing) -> GuestRamBuilder {
        let ram = ram.backing(self.huge().unwrap_or(backing));
        match &self.numa {
            Some(Numa(policy)) => ram.numa(policy.clone()),
            None => ram,
        }
    }

    /// The same for RAM that is one region.
    pub(crate) fn apply_to_region(&self, region: RegionConfig) -> RegionConfig {
        let region = region.backing(self.huge().unwrap_or_default());
        match &self.numa {
            Some(Numa(policy)) => region.numa(policy.clone()),
            None => region,
        }
    }

    fn huge(&self) -> Option<Backing> {
        self.hugepages.map(|page_size| Backing::HugeTlb { page_size })
    }
}
