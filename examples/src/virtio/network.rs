//! Network devices of the guest.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::num::NonZeroU16;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use vmm_devices::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
use vmm_devices::net::{MacAddr, Offloads, Tap};
use vmm_devices::virtio::Net;
use vmm_devices::virtio::net::{NetBuilder, NetHandle};

use crate::socket;

const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Bytes that one client may say.
const LONGEST_TALK: u64 = 1 << 20;

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
    /// Where clients pull the cable: `down`, `up` and `announce`, a line each.
    pub cable: Option<PathBuf>,
}

impl FromStr for Network {
    type Err = anyhow::Error;

    /// `tap=NAME[,mac=ADDRESS][,queues=N][,offloads=off][,cable=PATH]`.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let tap = parts.next().and_then(|part| part.strip_prefix("tap=")).filter(|name| !name.is_empty());
        let tap = tap.with_context(|| {
            format!("{text:?} is not tap=NAME[,mac=ADDRESS][,queues=N][,offloads=off][,cable=PATH]")
        })?;
        let mut network =
            Self { tap: tap.to_owned(), mac: None, queues: NonZeroU16::MIN, offloads: true, cable: None };
        for part in parts {
            match part.split_once('=') {
                Some(("mac", address)) => network.mac = Some(address.parse::<MacAddr>()?.unicast()?),
                Some(("queues", number)) => {
                    let number = number.parse::<NonZeroU16>().ok().filter(|number| number.get() <= 64);
                    network.queues =
                        number.with_context(|| format!("{part:?}: 1 to 64 queues are possible"))?;
                }
                Some(("offloads", "off")) => network.offloads = false,
                Some(("cable", path)) if !path.is_empty() => network.cable = Some(path.into()),
                _ => bail!("{part:?} is none of mac=ADDRESS, queues=N, offloads=off and cable=PATH"),
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

/// Starts the thread that does what clients say of the cable: one client at a time, a word a line.
pub(super) fn serve_cable(path: &Path, handle: NetHandle) -> Result<()> {
    let listener = socket::listen(path)?;
    let clients = move || {
        loop {
            let client = listener.accept().map(|(client, _)| client);
            if let Err(error) = client.and_then(|client| follow(&client, &handle)) {
                tracing::debug!(%error, "a client of a cable is gone");
                // For want of descriptors, it fails again at once.
                std::thread::sleep(AFTER_FAILURE);
            }
        }
    };
    std::thread::Builder::new().name("cable".to_owned()).spawn(clients).context("a thread")?;
    Ok(())
}

/// Answers each line: `ok`, or what it may be.
fn follow(mut client: &UnixStream, handle: &NetHandle) -> io::Result<()> {
    for line in BufReader::new(client.take(LONGEST_TALK)).lines() {
        let done = match line?.trim() {
            "up" => {
                handle.set_link(true);
                true
            }
            "down" => {
                handle.set_link(false);
                true
            }
            "announce" => handle.announce(),
            _ => false,
        };
        let answer: &[u8] = if done { b"ok\n" } else { b"up, down, or announce to a driver that can\n" };
        client.write_all(answer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cable_is_pulled_and_plugged_in_again() {
        let none = Offloads::NONE;
        let network = vmm_devices::testkit::TestNetwork::new(1, none, none);
        let device = Net::builder(Arc::new(network), MacAddr::local(1)).build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cable");
        serve_cable(&path, device.handle()).unwrap();
        for _ in 0..2 {
            let client = UnixStream::connect(&path).unwrap();
            let mut answers = BufReader::new(&client).lines();
            for (word, answer, up) in
                [("down", "ok", false), ("sideways", "up, d", false), ("up", "ok", true)]
            {
                (&client).write_all(format!("{word}\n").as_bytes()).unwrap();
                let found = answers.next().unwrap().unwrap();
                assert!(found.starts_with(answer), "{found}");
                assert_eq!(device.handle().link().up, up);
            }
            // No driver is there.
            (&client).write_all(b"announce\n").unwrap();
            assert!(answers.next().unwrap().unwrap().ends_with("that can"));
        }
    }

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
            ("tap=t0,cable=", "is none of"),
        ] {
            let error = format!("{:#}", wrong.parse::<Network>().unwrap_err());
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }
}
