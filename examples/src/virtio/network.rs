//! Network devices of the guest.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::num::NonZeroU16;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use vmm_devices::channel::{Gatekeeper, NetworkAttach, Party, VmIdentity};
use vmm_devices::net::switch::broker::{ClientConfig, SwitchClient};
use vmm_devices::net::{MacAddr, NetBackend, Offloads, Tap};
use vmm_devices::virtio::Net;
use vmm_devices::virtio::net::{NetBuilder, NetHandle};

use crate::socket;

const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Bytes that one client may say.
const LONGEST_TALK: u64 = 1 << 20;

/// What a network device is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A tap device of this machine, by its name.
    Tap(String),
    /// A switch that other guests are on, too.
    Switch {
        /// The socket of the program that has it (`net_switch`).
        path: PathBuf,
        /// What the network is called there.
        network: String,
        /// What the guest is called there, if it is to have a name of its own.
        name: Option<String>,
        /// Whether the program may connect again when the other one is gone, for which it keeps the right to open sockets.
        reconnect: bool,
    },
}

/// A network device, and what it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Where its frames come out.
    pub place: Place,
    /// The guest's address, if that is not to be one of the program's.
    pub mac: Option<MacAddr>,
    /// Pairs of queues: for several, the tap device has to be made for several.
    pub queues: NonZeroU16,
    /// Whether checksums and the cutting of frames may be left to the other side.
    pub offloads: bool,
    /// Where clients pull the cable: `down`, `up` and `announce`, a line each.
    pub cable: Option<PathBuf>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "network {name}"),
            Self::Switch { path, network, .. } => write!(f, "network {network} at {}", path.display()),
        }
    }
}

impl FromStr for Network {
    type Err = anyhow::Error;

    /// `tap=NAME` or `switch=PATH`, and behind that `[,mac=ADDRESS][,offloads=off][,cable=PATH]`; of a tap device `[,queues=N]`, of a switch
    /// `[,network=NAME][,name=NAME][,reconnect=on]`.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let mut place = match parts.next().and_then(|part| part.split_once('=')) {
            Some(("tap", name)) if !name.is_empty() => Place::Tap(name.to_owned()),
            Some(("switch", path)) if !path.is_empty() => {
                let network = "lan".to_owned();
                Place::Switch { path: path.into(), network, name: None, reconnect: false }
            }
            _ => bail!(
                "{text:?} is not tap=NAME[,mac=ADDRESS][,queues=N][,offloads=off][,cable=PATH], and not \
                 switch=PATH[,network=NAME][,name=NAME][,mac=ADDRESS][,offloads=off][,cable=PATH][,reconnect=on]"
            ),
        };
        let (mut mac, mut queues, mut offloads, mut cable) = (None, NonZeroU16::MIN, true, None);
        for part in parts {
            match (part.split_once('='), &mut place) {
                (Some(("mac", address)), _) => mac = Some(address.parse::<MacAddr>()?.unicast()?),
                (Some(("queues", number)), Place::Tap(_)) => {
                    let number = number.parse::<NonZeroU16>().ok().filter(|number| number.get() <= 64);
                    queues = number.with_context(|| format!("{part:?}: 1 to 64 queues are possible"))?;
                }
                (Some(("offloads", "off")), _) => offloads = false,
                (Some(("cable", path)), _) if !path.is_empty() => cable = Some(path.into()),
                (Some(("network", value)), Place::Switch { network, .. }) => *network = value.to_owned(),
                (Some(("name", value)), Place::Switch { name, .. }) => *name = Some(value.to_owned()),
                (Some(("reconnect", "on")), Place::Switch { reconnect, .. }) => *reconnect = true,
                (_, Place::Tap(_)) => {
                    bail!("{part:?} is none of mac=ADDRESS, queues=N, offloads=off and cable=PATH")
                }
                (_, Place::Switch { .. }) => {
                    bail!(
                        "{part:?} is none of network=NAME, name=NAME, mac=ADDRESS, offloads=off, cable=PATH and \
                         reconnect=on"
                    )
                }
            }
        }
        Ok(Self { place, mac, queues, offloads, cable })
    }
}

impl Network {
    /// The device, `number` in the order of the command line. The user has named the network, so the gate lets it through.
    pub(super) fn device(&self, number: usize, gatekeeper: &Gatekeeper) -> Result<NetBuilder> {
        let number = u32::try_from(number)?;
        ensure!(number < 1 << 16, "{number} network devices");
        // Those of guests that run at the same time are not to be the same.
        let mac = self.mac.unwrap_or_else(|| MacAddr::local(process::id() << 8 | number & 0xff));
        let guest = Party::Vm(VmIdentity::new(process::id().into(), 1));
        let open = |network: &str| gatekeeper.open(guest, None, NetworkAttach { network: network.into() });
        let backend: Arc<dyn NetBackend> = match &self.place {
            Place::Tap(name) => Arc::new(Tap::open(open(name)?, name, self.queues)?),
            Place::Switch { path, network, name, reconnect } => {
                let own = || format!("vm-{}-{number}", process::id());
                let config = ClientConfig::new(name.clone().unwrap_or_else(own)).mac(mac);
                Arc::new(SwitchClient::connect(open(network)?, path, config.reconnect(*reconnect))?)
            }
        };
        let device = Net::builder(backend, mac).pairs(self.queues);
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
            (network.place, network.mac, network.queues.get(), network.offloads),
            (Place::Tap("t0".to_owned()), None, 1, true)
        );
        let network: Network = "tap=t1,mac=52:54:00:00:00:07,queues=4,offloads=off".parse().unwrap();
        let mac = Some(MacAddr([0x52, 0x54, 0, 0, 0, 7]));
        assert_eq!(
            (network.place, network.mac, network.queues.get(), network.offloads),
            (Place::Tap("t1".to_owned()), mac, 4, false)
        );
        let network: Network = "switch=/run/lan,network=n,name=web,reconnect=on".parse().unwrap();
        let (path, name) = ("/run/lan".into(), Some("web".to_owned()));
        assert_eq!(network.place, Place::Switch { path, network: "n".to_owned(), name, reconnect: true });
        for (wrong, why) in [
            ("switch=", "is not tap=NAME"),
            ("switch=/run/lan,queues=2", "is none of network=NAME"),
            ("tap=t0,name=web", "is none of"),
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
