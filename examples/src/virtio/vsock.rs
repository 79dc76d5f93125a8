//! A socket device: programs of the guest and programs here connect to each other, and to those of other guests.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vmm_devices::Clock;
use vmm_devices::channel::{Gatekeeper, Party, VmIdentity, VsockListen};
use vmm_devices::virtio::Vsock;
use vmm_devices::virtio::metrics::Metrics;
use vmm_devices::virtio::vsock::{ANY_PORT, HostSockets, Member};

/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A socket device that a user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockOptions {
    /// The guest's context identifier.
    pub cid: u32,
    /// Sockets of this machine: programs connect at `path`, and the guest to `path_PORT`.
    pub path: PathBuf,
    /// The broker that joins it to other guests.
    pub broker: Option<PathBuf>,
}

impl FromStr for VsockOptions {
    type Err = anyhow::Error;

    /// `CID,PATH` or `CID,PATH,switch=BROKER`.
    fn from_str(text: &str) -> Result<Self> {
        let (text, broker) = match text.split_once(",switch=") {
            Some((text, broker)) => (text, Some(broker)),
            None => (text, None),
        };
        let parts = text.split_once(',').filter(|(_, path)| !path.is_empty() && broker != Some(""));
        let (cid, path) = parts.with_context(|| format!("{text:?} is not CID,PATH[,switch=BROKER]"))?;
        let cid = cid.parse().ok().filter(|cid| (3..u32::MAX).contains(cid));
        let cid = cid.with_context(|| format!("{text:?}: a guest's CID is 3 to {}", u32::MAX - 1))?;
        ensure!(!path.contains(",switch"), "{text:?} is not CID,PATH[,switch=BROKER]");
        Ok(Self { cid, path: path.into(), broker: broker.map(PathBuf::from) })
    }
}

impl VsockOptions {
    /// The device. Whoever started the program has named each channel that it can open: the sockets of its path, and the broker,
    /// which has a gate of its own.
    pub(super) fn device(
        &self,
        metrics: Arc<dyn Metrics>,
        clock: Arc<dyn Clock>,
        gatekeeper: &Gatekeeper,
    ) -> Result<Vsock> {
        let Self { cid, path, broker } = self;
        // Another run is another life.
        let life = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let vm: Party = VmIdentity::new((*cid).into(), u64::try_from(life.as_nanos())?).into();
        let reachable = |from| gatekeeper.open(vm.clone(), from, VsockListen { port: ANY_PORT });
        let host = HostSockets::listen(path, reachable(Some(Party::Host("host".into())))?)?;
        let mut device = Vsock::builder(*cid, clock).gatekeeper(vm.clone(), gatekeeper.clone()).host(host);
        if let Some(broker) = broker {
            device = device.broker(Member::join(broker, *cid, reachable(None)?)?);
        }
        // A guest on a translator that has little of the processor answers late.
        Ok(device.connect_timeout(PATIENCE).metrics(metrics).build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_who_and_where() {
        let parsed: VsockOptions = "3,/run/v".parse().unwrap();
        assert_eq!(parsed, VsockOptions { cid: 3, path: "/run/v".into(), broker: None });
        let parsed: VsockOptions = "4,v,switch=/run/b".parse().unwrap();
        assert_eq!(parsed, VsockOptions { cid: 4, path: "v".into(), broker: Some("/run/b".into()) });
        for wrong in ["", "3", "3,", "2,v", "4294967295,v", "x,v", "3,v,switch=", "3,v,switch"] {
            assert!(wrong.parse::<VsockOptions>().is_err(), "{wrong}");
        }
    }
}
