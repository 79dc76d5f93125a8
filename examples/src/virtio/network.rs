//! Network devices of the guest.

use std::num::NonZeroU16;
use std::process;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use vmm_devices::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
use vmm_devices::net::{MacAddr, Offloads, Tap};
use vmm_devices::virtio::Net;
use vmm_devices::virtio::net::NetBuilder;

/// A network device, and the tap device of this machine at which its frames come out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// What the tap device is called.
    pub tap: String,
    /// The guest's address, if that is not to be one of the program's.
    pub mac: Option<MacAddr>,
    /// Pairs of queues: for several, the tap device has to be made for several.
    pub queues: NonZeroU16,
    /// Whether checksums and the cutting of frames may be left to the other side.
    pub offloads: bool,
}

impl FromStr for Network {
    type Err = anyhow::Error;

    /// `tap=NAME[,mac=ADDRESS][,queues=N][,offloads=off]`.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let tap = parts.next().and_then(|part| part.strip_prefix("tap=")).filter(|name| !name.is_empty());
        let tap =
            tap.with_context(|| format!("{text:?} is not tap=NAME[,mac=ADDRESS][,queues=N][,offloads=off]"))?;
        let mut network = Self { tap: tap.to_owned(), mac: None, queues: NonZeroU16::MIN, offloads: true };
        for part in parts {
            match part.split_once('=') {
                Some(("mac", address)) => network.mac = Some(address.parse::<MacAddr>()?.unicast()?),
                Some(("queues", number)) => {
                    let number = number.parse::<NonZeroU16>().ok().filter(|number| number.get() <= 64);
                    network.queues =
                        number.with_context(|| format!("{part:?}: 1 to 64 queues are possible"))?;
                }
                Some(("offloads", "off")) => network.offloads = false,
                _ => bail!("{part:?} is none of mac=ADDRESS, queues=N and offloads=off"),
            }
        }
        Ok(network)
    }
}

impl Network {
    /// The device, `number` in the order of the command line. The user has named the network, so the gate lets it through.
    pub(super) fn device(&self, number: usize) -> Result<NetBuilder> {
        let gatekeeper = Gatekeeper::new(AllowAll);
        let guest = Party::Vm(VmIdentity::new(process::id().into(), 1));
        let grant = gatekeeper.open(guest, None, NetworkAttach { network: self.tap.as_str().into() })?;
        let tap = Tap::open(grant, &self.tap, self.queues)?;
        let number = u32::try_from(number)?;
        ensure!(number < 1 << 16, "{number} network devices");
        // Those of guests that run at the same time are not to be the same.
        let mac = self.mac.unwrap_or_else(|| MacAddr::local(process::id() << 8 | number & 0xff));
        let device = Net::builder(Arc::new(tap), mac).pairs(self.queues);
        let none = Offloads::NONE;
        Ok(if self.offloads { device } else { device.offloads(none, none) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_named_on_the_command_line() {
        let network: Network = "tap=t0".parse().unwrap();
        assert_eq!(
            (&*network.tap, network.mac, network.queues.get(), network.offloads),
            ("t0", None, 1, true)
        );
        let network: Network = "tap=t1,mac=52:54:00:00:00:07,queues=4,offloads=off".parse().unwrap();
        let mac = Some(MacAddr([0x52, 0x54, 0, 0, 0, 7]));
        assert_eq!(
            (&*network.tap, network.mac, network.queues.get(), network.offloads),
            ("t1", mac, 4, false)
        );
        for (wrong, why) in [
            ("t0", "is not tap=NAME"),
            ("tap=", "is not tap=NAME"),
            ("tap=t0,mac=1", "no Ethernet address"),
            ("tap=t0,mac=ff:ff:ff:ff:ff:ff", "cannot be a device's address"),
            ("tap=t0,queues=0", "1 to 64 queues"),
            ("tap=t0,queues=65", "1 to 64 queues"),
            ("tap=t0,offloads", "is none of"),
        ] {
            let error = format!("{:#}", wrong.parse::<Network>().unwrap_err());
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }
}
