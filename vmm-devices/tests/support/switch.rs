//! Guests on a switch and clients of its broker that do anything: frames of all kinds with anything left to do, messages, descriptors and rings
//! of anything.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arbitrary::Arbitrary;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
};
use vmm_devices::ManualClock;
use vmm_devices::channel::{AllowAll, Gatekeeper, Grant, NetworkAttach, Party};
use vmm_devices::net::switch::broker::SwitchServer;
use vmm_devices::net::switch::{Flow, Isolation, PortConfig, PortVlans, Switch, SwitchPort, Verdict, VlanId};
use vmm_devices::net::{
    Agreed, MAX_FRAME, MacAddr, NetBackend as _, NetEvents, NetPort, Offloads, PacketInfo,
};
use vmm_devices::vmm_memory::SharedMemory;
use vmm_devices::vmm_memory::vm_memory::{FileOffset, MmapRegion, VolatileMemory as _, VolatileSlice};

const PORTS: u8 = 6;
const RING: usize = 256 << 10;
const CONTROL: usize = 4096;
const LEARNED: usize = 4;

/// What a frame is made of.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) struct Shape {
    to: u8,
    from: u8,
    tags: Vec<u16>,
    kind: u8,
    /// What is changed of the headers.
    changes: Vec<(u8, u8)>,
    len: u16,
    info: [u8; 12],
    /// As a guest says it that means it.
    honest: bool,
}

/// What somebody does.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) enum Action {
    /// A guest sends.
    Send { port: u8, shape: Shape },
    /// It receives all that there is.
    Receive { port: u8 },
    /// Its driver changes its mind.
    Offloads { port: u8, bits: u8 },
    /// It is gone, or is back.
    Toggle { port: u8 },
    /// Its cable is pulled, or plugged in.
    Link { port: u8, up: bool },
    /// Time goes by.
    Advance { ms: u32 },
    /// A policy comes, or goes.
    Judge { on: bool },
    /// A client connects, and says hello with anything.
    Hello { ring: u32, name: Vec<u8>, seals: bool },
    /// It says anything.
    Say { bytes: Vec<u8> },
    /// It writes into its memory.
    Write { at: u32, value: u64 },
    /// It sends as it should, or nearly.
    Frame { shape: Shape, wrong: u32 },
}

struct Quiet;

impl NetEvents for Quiet {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {}
}

struct Device {
    backend: SwitchPort,
    ports: Vec<Box<dyn NetPort>>,
}

/// A client that keeps no rule.
struct Client {
    socket: OwnedFd,
    memory: Option<Arc<MmapRegion<()>>>,
    _bell: Option<OwnedFd>,
    written: u64,
}

fn grant(gatekeeper: &Gatekeeper) -> Grant<NetworkAttach> {
    let channel = NetworkAttach { network: "lan".into() };
    gatekeeper.open(Party::Host("test".into()), None, channel).unwrap()
}

fn config(port: u8) -> PortConfig {
    let vlan = |number| VlanId::new(number).unwrap();
    let config = PortConfig::new(format!("p{port}")).learned_macs(LEARNED).queue_bytes(RING);
    match port {
        0 => config,
        1 => config.mac(MacAddr([2, 0, 0, 0, 1, 1])),
        2 => config.vlans(PortVlans::Access(vlan(2))),
        3 => config.vlans(PortVlans::Trunk {
            native: Some(vlan(1)),
            allowed: [2, 3].map(vlan).into_iter().collect(),
        }),
        4 => config.isolation(Isolation::Isolated),
        _ => config.isolation(Isolation::Isolated).queues(2),
    }
}

/// Whether a frame may go from one to the other, in some VLAN.
fn may_meet(from: u8, to: u8) -> bool {
    if from == PORTS {
        // A client of the broker's, in VLAN 1.
        return to != 2;
    }
    match (from.min(to), from.max(to)) {
        (0 | 1, 2) | (2, 4 | 5) | (4, 5) => false,
        (one, two) => one != two,
    }
}

fn offloads(bits: u8) -> Offloads {
    let all = [Offloads::CSUM, Offloads::TSO4, Offloads::TSO6, Offloads::ECN, Offloads::USO4, Offloads::USO6];
    all.iter().enumerate().fold(Offloads::NONE, |sum, (bit, one)| sum.with(*one, bits >> bit & 1 != 0))
}

/// A frame of that shape from the port of that number, which is told by one byte of the source address.
fn frame(port: u8, shape: &Shape) -> (PacketInfo, Vec<u8>) {
    let to = match shape.to % 8 {
        7 => [0xff; 6],
        number => [2, 0, 0, 0, number, number],
    };
    let from = [2 | shape.from & 1, 0, 0, 0, port, if shape.from < 200 { port } else { shape.from }];
    let mut frame = [to, from].concat();
    for tag in shape.tags.iter().take(3) {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    let network = frame.len() + 2;
    let payload = usize::from(shape.len);
    let (mut start, mut offset, mut kind) = (network + 20, 16, 1);
    match shape.kind % 4 {
        0 => {
            let total = u16::try_from(40 + payload).unwrap_or(u16::MAX).to_be_bytes();
            frame.extend([
                8, 0, 0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
            frame.extend([0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        }
        1 => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64]);
            frame.extend([1; 32]);
            frame.extend([0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
            (start, kind) = (network + 40, 4);
        }
        2 => {
            frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend([0, 1, 0, 2, 0, 0, 0, 0]);
            (offset, kind) = (6, 5);
        }
        _ => frame.extend([8, 6, 0, 1, 8, 0, 6, 4]),
    }
    for (at, value) in &shape.changes {
        // The byte that tells the port stays.
        if let Some(byte) = frame.get_mut(usize::from(*at) + 12) {
            *byte = *value;
        }
    }
    frame.resize((frame.len() + payload).min(MAX_FRAME), 9);
    let info = if shape.honest {
        let size = u16::from_le_bytes([shape.info[4], shape.info[5]]);
        let (start, kind) = (u16::try_from(start).unwrap_or(0), if size == 0 { 0 } else { kind });
        let [[g0, g1], [s0, s1]] = [size, start].map(u16::to_le_bytes);
        [1, kind, 0, 0, g0, g1, s0, s1, offset, 0, 0, 0]
    } else {
        shape.info
    };
    (PacketInfo::from_bytes(&info).unwrap_or_default(), frame)
}

/// Everything.
struct World {
    switch: Switch,
    gatekeeper: Gatekeeper,
    clock: Arc<ManualClock>,
    devices: Vec<Option<Device>>,
    directory: Option<tempfile::TempDir>,
    server: Option<SwitchServer>,
    clients: Vec<Client>,
}

/// Does all that, and looks whether frames went where they may not.
///
/// # Panics
/// If they did.
pub(crate) fn exercise(actions: &[Action]) {
    let clock = Arc::new(ManualClock::new(1));
    let switch = Switch::builder("lan", Arc::clone(&clock)).max_macs(16).build();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let devices = (0..PORTS).map(|_| None).collect();
    let mut world =
        World { switch, gatekeeper, clock, devices, directory: None, server: None, clients: Vec::new() };
    for port in 0..PORTS {
        world.attach(port);
    }
    for action in actions.iter().take(200) {
        world.perform(action);
    }
    for port in 0..PORTS {
        world.receive(port);
    }
    // Nothing of any of them stays.
    world.clients.clear();
    world.server = None;
    world.devices.clear();
    assert!(world.switch.ports().is_empty() && world.switch.macs().is_empty());
    assert!(world.gatekeeper.open_channels().is_empty());
}

impl World {
    fn attach(&mut self, port: u8) {
        let attached = self.switch.attach(grant(&self.gatekeeper), config(port));
        let Ok(backend) = attached else { return };
        let mut agreed = Agreed::new(if port == 5 { 2 } else { 1 });
        (agreed.transmit, agreed.receive) =
            (Offloads::ALL, offloads(if port.is_multiple_of(2) { 0x3f } else { 0 }));
        let ports = backend.attach(&agreed, Arc::new(Quiet)).unwrap();
        self.devices[usize::from(port)] = Some(Device { backend, ports });
    }

    fn receive(&mut self, port: u8) {
        let Some(device) = &mut self.devices[usize::from(port)] else { return };
        let mut buffer = vec![0; MAX_FRAME];
        for pair in &mut device.ports {
            while let Some(received) = pair.receive(&[VolatileSlice::from(&mut buffer[..])]).unwrap() {
                assert!((14..=MAX_FRAME).contains(&received.len));
                received.info.check(received.len, Offloads::ALL).unwrap();
                let from = buffer[10];
                assert!(may_meet(from, port), "a frame of port {from} came to port {port}");
                assert!(buffer[6] & 1 == 0, "a frame of a group's");
                assert!(from != 1 || buffer[11] == 1, "a frame of port 1 from another address");
            }
        }
    }

    fn perform(&mut self, action: &Action) {
        match action {
            Action::Send { port, shape } => {
                let port = port % PORTS;
                let Some(device) = &mut self.devices[usize::from(port)] else { return };
                let (info, mut frame) = frame(port, shape);
                // As devices do.
                if info.check(frame.len(), Offloads::ALL).is_ok() && frame.len() >= 14 {
                    let third = frame.len() / 3;
                    let (one, two) = frame.split_at_mut(third);
                    let slices = [VolatileSlice::from(one), VolatileSlice::from(two)];
                    drop(device.ports[0].transmit(&info, &slices));
                    device.ports[0].flush();
                }
            }
            Action::Receive { port } => self.receive(port % PORTS),
            Action::Offloads { port, bits } => {
                if let Some(device) = &self.devices[usize::from(port % PORTS)] {
                    device.backend.set_receive_offloads(offloads(*bits)).unwrap();
                }
            }
            Action::Toggle { port } => {
                let port = port % PORTS;
                if self.devices[usize::from(port)].take().is_none() {
                    self.attach(port);
                }
            }
            Action::Link { port, up } => {
                if let Some(device) = &self.devices[usize::from(port % PORTS)] {
                    self.switch.set_link(device.backend.id(), *up);
                }
            }
            Action::Advance { ms } => self.clock.advance(u64::from(*ms) * 1_000_000),
            Action::Judge { on } => {
                let judge = |flow: &Flow<'_>| {
                    assert!(flow.len >= 14 && flow.from.id != flow.to.id);
                    if flow.headers.transport.is_none() { Verdict::Drop } else { Verdict::Pass }
                };
                self.switch.set_judge(if *on { Some(Arc::new(judge)) } else { None });
            }
            Action::Hello { ring, name, seals } => self.hello(*ring, name, *seals),
            Action::Say { bytes } => {
                if let Some(client) = self.clients.last() {
                    let bytes = &bytes[..bytes.len().min(600)];
                    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                    let (Ok(_) | Err(_)) = rustix::net::send(&client.socket, bytes, flags);
                }
                self.turn();
            }
            Action::Write { at, value } => {
                if let Some(memory) = self.clients.last().and_then(|client| client.memory.as_ref()) {
                    let at = usize::try_from(at % 512).unwrap() * 8 + (*at as usize & 1) * (CONTROL + RING);
                    let word = memory.get_atomic_ref::<AtomicU64>(at).unwrap();
                    word.store(*value, Ordering::SeqCst);
                }
            }
            Action::Frame { shape, wrong } => self.frame(shape, *wrong),
        }
        assert!(self.switch.macs().len() <= 16 + 1);
    }

    /// A few turns of the broker's; it never waits.
    fn turn(&mut self) {
        if let Some(server) = &mut self.server {
            for _ in 0..8 {
                if !server.turn(Some(Duration::ZERO)).unwrap() {
                    break;
                }
            }
        }
    }

    fn hello(&mut self, ring: u32, name: &[u8], seals: bool) {
        if self.clients.len() >= 3 {
            self.clients.remove(0);
        }
        let directory = self.directory.get_or_insert_with(|| tempfile::tempdir().unwrap());
        let path = directory.path().join("s");
        if self.server.is_none() {
            let server = SwitchServer::builder(self.switch.clone(), self.gatekeeper.clone());
            self.server = Some(server.max_clients(4).max_queue_bytes(2 * RING).listen(&path).unwrap());
        }
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let ring = if ring.is_multiple_of(4) { ring } else { u32::try_from(RING).unwrap() };
        let mut hello = vec![1, 1, 0x3f];
        hello.extend(ring.to_le_bytes());
        hello.extend([2, 0, 0, 0, PORTS, PORTS]);
        let name = if name.len().is_multiple_of(4) { name } else { &b"c"[..] };
        for text in [&name[..name.len().min(100)], b"lan", b""] {
            hello.push(u8::try_from(text.len()).unwrap());
            hello.extend(text);
        }
        let (bell, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let shared = SharedMemory::create("x", 2 * (CONTROL + RING) as u64).unwrap();
        let file = FileOffset::new(shared.try_clone_fd().unwrap().into(), 0);
        let memory = Arc::new(MmapRegion::from_file(file, 2 * (CONTROL + RING)).unwrap());
        let shared =
            if seals { shared.try_clone_fd().unwrap() } else { tempfile::tempfile().unwrap().into() };
        let fds = [shared.as_fd(), theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(&socket, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL).unwrap();
        self.clients.push(Client { socket, memory: Some(memory), _bell: Some(bell), written: 0 });
        self.turn();
        // Its driver takes what comes.
        self.perform(&Action::Say { bytes: vec![2, 1, 0x15] });
    }

    /// A frame in the client's ring, of which so many bytes are said to be wrong.
    fn frame(&mut self, shape: &Shape, wrong: u32) {
        let Some(client) = self.clients.last_mut() else { return };
        let Some(memory) = &client.memory else { return };
        let (info, frame) = frame(PORTS, shape);
        let info = if shape.honest { info.to_bytes(0) } else { shape.info };
        let wrong = if wrong.is_multiple_of(8) { wrong } else { 0 };
        let len = u32::try_from(frame.len()).unwrap().wrapping_add(wrong);
        let record = [&len.to_le_bytes()[..], &info, &frame].concat();
        for (at, byte) in record.iter().enumerate() {
            let at = CONTROL + (usize::try_from(client.written).unwrap() + at) % RING;
            memory.get_slice(at, 1).unwrap().copy_from(&[*byte]);
        }
        client.written += (record.len() as u64).next_multiple_of(16);
        memory.get_atomic_ref::<AtomicU64>(0).unwrap().store(client.written, Ordering::SeqCst);
        self.perform(&Action::Say { bytes: vec![3] });
    }
}
