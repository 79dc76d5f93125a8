//! A switch, with devices that are nothing but their end of a port.

mod broken;
mod devices;
mod judged;
mod life;
mod model;
mod offloads;
mod rules;
mod threads;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::VolatileSlice;

use super::*;
use crate::ManualClock;
use crate::channel::{AllowAll, Gatekeeper, Party, VmIdentity};
use crate::net::{
    Agreed, MAX_FRAME, NetBackend as _, NetEvents, NetPort, Offloads, PacketInfo, Received, Sent,
};

/// What a device hears.
#[derive(Default)]
struct Ears {
    ready: Mutex<Vec<u16>>,
    links: AtomicUsize,
}

impl NetEvents for Ears {
    fn ready(&self, pair: u16) {
        self.ready.lock().unwrap().push(pair);
    }

    fn link_changed(&self) {
        self.links.fetch_add(1, Ordering::SeqCst);
    }
}

struct Lan {
    switch: Switch,
    clock: Arc<ManualClock>,
    gatekeeper: Gatekeeper,
}

/// The end of a port.
struct Device {
    backend: SwitchPort,
    ports: Vec<Box<dyn NetPort>>,
    ears: Arc<Ears>,
}

impl Lan {
    fn new() -> Self {
        Self::with(|builder| builder)
    }

    fn with(config: impl FnOnce(SwitchBuilder) -> SwitchBuilder) -> Self {
        let clock = Arc::new(ManualClock::new(1_000_000_000));
        let switch = config(Switch::builder("lan", Arc::clone(&clock))).build();
        Self { switch, clock, gatekeeper: Gatekeeper::new(AllowAll) }
    }

    fn grant(&self, network: &str) -> Grant<NetworkAttach> {
        let vm = Party::Vm(VmIdentity::new(1, 1));
        self.gatekeeper.open(vm, None, NetworkAttach { network: network.into() }).unwrap()
    }

    fn try_attach(&self, config: PortConfig) -> Result<SwitchPort, SwitchError> {
        self.switch.attach(self.grant("lan"), config)
    }

    fn device(&self, config: PortConfig) -> Device {
        self.device_with(config, Offloads::ALL)
    }

    fn device_with(&self, config: PortConfig, receives: Offloads) -> Device {
        let pairs = config.queues;
        let backend = self.try_attach(config).unwrap();
        let ears = Arc::<Ears>::default();
        backend.listen(Arc::<Ears>::clone(&ears));
        let mut device = Device { backend, ports: Vec::new(), ears };
        device.drive(pairs, receives);
        device
    }

    fn plain(&self, name: &str) -> Device {
        self.device(PortConfig::new(name))
    }

    fn port(&self, name: &str) -> PortStatus {
        self.switch.ports().into_iter().find(|port| &*port.port.name == name).unwrap()
    }

    fn dropped(&self, name: &str, reason: DropReason) -> u64 {
        self.port(name).metrics.dropped(reason)
    }
}

impl Device {
    /// A driver comes.
    fn drive(&mut self, pairs: u16, receive: Offloads) {
        self.ports.clear();
        let agreed = Agreed { transmit: Offloads::ALL, receive, ..Agreed::new(pairs) };
        self.ports = self.backend.attach(&agreed, Arc::<Ears>::clone(&self.ears)).unwrap();
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_as(&PacketInfo::default(), frame);
    }

    /// In pieces, as guests have it.
    fn send_as(&mut self, info: &PacketInfo, frame: &[u8]) {
        let mut frame = frame.to_vec();
        let pieces: Vec<_> = frame.chunks_mut(1000).map(VolatileSlice::from).collect();
        let [port, ..] = &mut self.ports[..] else { panic!("no driver") };
        assert_eq!(port.transmit(info, &pieces).unwrap(), Sent::Done);
        port.flush();
    }

    fn receive_at(&mut self, pair: usize) -> Option<(PacketInfo, Vec<u8>)> {
        let mut buffer = vec![0xee; MAX_FRAME];
        let (one, two) = buffer.split_at_mut(100);
        let slices = [VolatileSlice::from(one), VolatileSlice::from(two)];
        let Received { info, len } = self.ports[pair].receive(&slices).unwrap()?;
        buffer.truncate(len);
        Some((info, buffer))
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        self.receive_at(0).map(|(_, frame)| frame)
    }

    fn received(&mut self) -> usize {
        std::iter::from_fn(|| self.receive()).count()
    }

    fn heard(&self) -> Vec<u16> {
        std::mem::take(&mut *self.ears.ready.lock().unwrap())
    }
}

fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}

fn frame_of(to: MacAddr, from: MacAddr, rest: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, rest].concat()
}

/// Of an experimental type, from one number to another.
fn frame(to: u8, from: u8, text: &str) -> Vec<u8> {
    frame_of(mac(to), mac(from), &[&[0x88, 0xb5], text.as_bytes()].concat())
}

fn tagged(to: u8, from: u8, tags: &[u16], text: &str) -> Vec<u8> {
    let mut rest = Vec::new();
    for tag in tags {
        rest.extend([0x81, 0]);
        rest.extend(tag.to_be_bytes());
    }
    rest.extend([0x88, 0xb5]);
    rest.extend(text.bytes());
    frame_of(mac(to), mac(from), &rest)
}

fn access(vlan: u16) -> PortVlans {
    PortVlans::Access(VlanId::new(vlan).unwrap())
}

fn trunk(native: Option<u16>, allowed: &[u16]) -> PortVlans {
    let vlan = |number: &u16| VlanId::new(*number).unwrap();
    PortVlans::Trunk { native: native.as_ref().map(vlan), allowed: allowed.iter().map(vlan).collect() }
}
