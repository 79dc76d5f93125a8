//! A broker on a thread of its own, and clients good and bad.

#[cfg(feature = "event-loop")]
mod device;
mod hostile;
mod lying;
mod processes;
mod service;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_memory::vm_memory::VolatileSlice;

use super::*;
use crate::ManualClock;
use crate::channel::{AllowAll, Gatekeeper, NetworkAttach, Party};
use crate::net::switch::{PortConfig, Switch};
use crate::net::{
    Agreed, MAX_FRAME, MacAddr, NetBackend as _, NetEvents, NetPort, Offloads, PacketInfo, Received, Sent,
};

/// Nothing here takes so long, on a host that has much else to do.
const LONGEST: Duration = Duration::from_secs(30);

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < LONGEST, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Broker {
    switch: Switch,
    gatekeeper: Gatekeeper,
    stopper: ServerStopper,
    thread: Option<JoinHandle<()>>,
    events: Receiver<ServerEvent>,
}

impl Broker {
    fn start(path: &Path) -> Self {
        Self::with(path, AllowAll, |builder| builder)
    }

    fn with(
        path: &Path,
        gate: impl crate::channel::Gate + 'static,
        config: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        let switch = Switch::builder("lan", ManualClock::new(1)).mtu(9000).build();
        let gatekeeper = Gatekeeper::new(gate);
        let (tell, events) = channel();
        let builder = SwitchServer::builder(switch.clone(), gatekeeper.clone());
        let builder = builder.events(move |event| {
            // A test that is over hears nothing.
            let (Ok(()) | Err(_)) = tell.send(event);
        });
        let mut server = config(builder).listen(path).unwrap();
        let stopper = server.stopper();
        let thread = Some(std::thread::spawn(move || server.run().unwrap()));
        Self { switch, gatekeeper, stopper, thread, events }
    }

    fn ports(&self) -> Vec<String> {
        self.switch.ports().iter().map(|port| port.port.name.to_string()).collect()
    }

    fn event(&self) -> ServerEvent {
        self.events.recv_timeout(LONGEST).unwrap()
    }

    /// Why the next one was refused or has left.
    fn reason(&self) -> String {
        loop {
            match self.event() {
                ServerEvent::Refused { reason, .. } | ServerEvent::Left { reason, .. } => return reason,
                ServerEvent::Attached { .. } => {}
            }
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("switch");
    (directory, path)
}

fn grant() -> crate::channel::Grant<NetworkAttach> {
    let gatekeeper = Gatekeeper::new(AllowAll);
    gatekeeper.open(Party::Host("test".into()), None, NetworkAttach { network: "lan".into() }).unwrap()
}

#[derive(Default)]
struct Ears {
    links: Mutex<u32>,
}

impl NetEvents for Ears {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {
        *self.links.lock().unwrap() += 1;
    }
}

/// A device whose switch is the broker's.
struct Device {
    client: SwitchClient,
    ports: Vec<Box<dyn NetPort>>,
    ears: Arc<Ears>,
}

impl Device {
    fn new(path: &Path, name: &str, number: u8) -> Self {
        Self::with(path, ClientConfig::new(name).mac(mac(number)), Offloads::ALL)
    }

    fn with(path: &Path, config: ClientConfig, receive: Offloads) -> Self {
        Self::of(SwitchClient::connect(grant(), path, config).unwrap(), receive)
    }

    fn of(client: SwitchClient, receive: Offloads) -> Self {
        let ears = Arc::<Ears>::default();
        client.listen(Arc::<Ears>::clone(&ears));
        let agreed = Agreed { transmit: Offloads::ALL, receive, ..Agreed::new(1) };
        let ports = client.attach(&agreed, Arc::<Ears>::clone(&ears)).unwrap();
        Self { client, ports, ears }
    }

    /// Whether there was room.
    fn try_send(&mut self, info: &PacketInfo, frame: &[u8]) -> bool {
        let mut frame = frame.to_vec();
        let sent = self.ports[0].transmit(info, &[VolatileSlice::from(&mut frame[..])]).unwrap();
        self.ports[0].flush();
        sent == Sent::Done
    }

    fn send(&mut self, frame: &[u8]) {
        wait_for("room", || self.try_send(&PacketInfo::default(), frame).then_some(()));
    }

    fn try_receive(&mut self) -> Option<(PacketInfo, Vec<u8>)> {
        let mut buffer = vec![0; MAX_FRAME];
        let slices = [VolatileSlice::from(&mut buffer[..])];
        let Received { info, len } = self.ports[0].receive(&slices).unwrap()?;
        buffer.truncate(len);
        Some((info, buffer))
    }

    fn receive(&mut self) -> Vec<u8> {
        wait_for("a frame", || self.try_receive()).1
    }

    fn up(&self) -> bool {
        self.client.link().up
    }
}

fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}

fn frame(to: u8, from: u8, text: &[u8]) -> Vec<u8> {
    [&mac(to).0[..], &mac(from).0, &[0x88, 0xb5], text].concat()
}

/// Frames get through from one to the other. Where the broker has just come to know of a driver, some are lost.
fn talk(a: &mut Device, to: u8, from: u8, b: &mut Device) {
    let text = Instant::now().elapsed().as_nanos().to_le_bytes();
    let expected = frame(to, from, &text);
    wait_for("a frame that gets through", || {
        a.try_send(&PacketInfo::default(), &expected);
        std::thread::sleep(Duration::from_millis(1));
        b.try_receive().filter(|(_, frame)| *frame == expected)
    });
    while b.try_receive().is_some() {}
}
