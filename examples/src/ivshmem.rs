//! Memory that a guest has in common with others, at a server: what the command line says of it, and how it gets into the guest.

use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use vmm_cpu::{GuestAccess, Vm};
use vmm_devices::channel::{DoorbellRing, Gatekeeper, Party, RegionMap, VmIdentity};
use vmm_devices::ivshmem::server::ClientConfig;
use vmm_devices::ivshmem::{Client, MAX_VECTORS, Member, RegionMapper};
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{Access, GuestRegion};

/// A region at a server.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    path: PathBuf,
    read_only: bool,
    config: ClientConfig,
}

impl FromStr for SharedRegion {
    type Err = anyhow::Error;

    /// `path=SOCKET` and what else there may be, with commas between.
    fn from_str(text: &str) -> Result<Self> {
        let mut region = Self { path: PathBuf::new(), read_only: false, config: ClientConfig::default() };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("path", path)) => region.path = path.into(),
                Some(("vectors", vectors)) => {
                    let found = vectors.parse().ok().filter(|vectors| (1..=MAX_VECTORS).contains(vectors));
                    let found = found
                        .with_context(|| format!("{vectors} vectors; allowed are 1 to {MAX_VECTORS}"))?;
                    region.config = region.config.vectors(found);
                }
                None if part == "ro" => region.read_only = true,
                None if part == "unsealed" => region.config = region.config.unsealed(true),
                None if part == "keep" => region.config = region.config.outlives_server(true),
                None if part == "direct" => region.config = region.config.rings_directly(true),
                _ => bail!("{part:?} is none of path=SOCKET, vectors=N, ro, unsealed, keep and direct"),
            }
        }
        ensure!(!region.path.as_os_str().is_empty(), "{text:?} has no path=SOCKET");
        Ok(region)
    }
}

impl SharedRegion {
    /// Takes a seat, if `gatekeeper` lets it; the server asks its gate as well.
    ///
    /// # Errors
    /// If there is no server, or it refuses.
    pub fn join(&self, gatekeeper: &Gatekeeper) -> Result<Member> {
        let shown = self.path.display();
        let name: Arc<str> = shown.to_string().into();
        let client = Client::connect(&self.path, Arc::clone(&name), self.config)
            .with_context(|| format!("ivshmem server at {shown}"))?;
        let vm = Party::Vm(VmIdentity::new(u128::from(std::process::id()), 1));
        let access = if self.read_only { Access::ReadOnly } else { client.access() };
        let map = gatekeeper.open(vm.clone(), None, RegionMap { region: Arc::clone(&name), access })?;
        let ring = gatekeeper.open(vm, None, DoorbellRing { region: name })?;
        client.join(map, Some(ring)).with_context(|| format!("ivshmem server at {shown}"))
    }
}

/// A virtual machine into which a device maps memory.
#[derive(Clone, Debug)]
pub struct Mapper(pub Arc<dyn Vm>);

impl RegionMapper for Mapper {
    fn map(&mut self, region: Arc<GuestRegion>, access: Access) -> Result<(), Box<dyn Error + Send + Sync>> {
        let access = match access {
            Access::ReadOnly => GuestAccess::ReadOnly,
            Access::ReadWrite => GuestAccess::ReadWrite,
        };
        Ok(self.0.map_memory(region, access)?)
    }

    fn unmap(&mut self, gpa: GuestAddress) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0.unmap_memory(gpa)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let region: SharedRegion = "path=/run/a,vectors=4,ro,unsealed".parse().unwrap();
        assert_eq!((region.path.to_str(), region.read_only), (Some("/run/a"), true));
        assert_eq!((region.config.vectors, region.config.unsealed), (4, true));
        for (wrong, says) in [
            ("", "none of"),
            ("ro", "no path"),
            ("path=", "no path"),
            ("path=/a,vectors=0", "1 to 64"),
            ("path=/a,vectors=65", "1 to 64"),
            ("path=/a,rw", "none of"),
        ] {
            let error = wrong.parse::<SharedRegion>().unwrap_err().to_string();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
