//! Frames of hostile guests through a switch whose flows are judged, beside a model that goes through a list.
//!
//! Ports of TCP and UDP are few, so that frames meet flows of others; nothing is displaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::Arbitrary;
use vmm_devices::ManualClock;
use vmm_devices::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
use vmm_devices::net::switch::flows::{FlowKind, FlowPolicy, FlowTable, FlowVerdict, NewFlow};
use vmm_devices::net::switch::{PortConfig, Switch, SwitchPort};
use vmm_devices::net::{Agreed, MAX_FRAME, MacAddr, NetBackend as _, NetEvents, NetPort, PacketInfo, Sent};
use vmm_devices::vmm_memory::vm_memory::VolatileSlice;

const GUESTS: u8 = 3;

/// What somebody does.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) enum Action {
    /// A guest sends to another.
    Send { from: u8, to: u8, packet: Packet },
    /// It sends what is nearly a packet of that kind.
    Broken { from: u8, to: u8, packet: Packet, changes: Vec<(u8, u8)>, len: u8 },
    /// Another policy: bits say what is allowed.
    Reload { bits: u64 },
    /// Time goes by.
    Advance { seconds: u16 },
}

/// A packet.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    Tcp { source: u8, destination: u8, syn: bool, ack: bool },
    Udp { source: u8, destination: u8 },
    Echo { reply: bool },
    Unreachable,
    Tunnel,
    Arp { answer: bool },
    Experiment,
}

/// What is allowed, by bits.
struct Bits {
    bits: AtomicU64,
    epoch: AtomicU64,
}

impl Bits {
    /// Puts another one in force.
    fn change(&self, bits: u64) {
        self.bits.store(bits, Ordering::SeqCst);
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }
}

/// Which bit of a policy is about that: 3 senders, 3 receivers, 7 kinds.
fn allows(bits: u64, from: u8, kind: FlowKind, to: u8) -> bool {
    let kind = match kind {
        FlowKind::Tcp { port } => port % 2,
        FlowKind::Udp { port } => 2 + port % 2,
        FlowKind::Icmp { kind } => 4 + u16::from(kind == 3),
        _ => 6,
    };
    bits >> ((u16::from(from * GUESTS + to) * 7 + kind) % 64) & 1 == 1
}

fn guest(name: &str) -> u8 {
    name.parse().unwrap()
}

impl FlowPolicy for Bits {
    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn decide(&self, flow: &NewFlow<'_>) -> FlowVerdict {
        let (from, to) = (guest(&flow.from.name), guest(&flow.to.name));
        if allows(self.bits.load(Ordering::SeqCst), from, flow.kind, to) {
            FlowVerdict::Pass
        } else {
            FlowVerdict::Drop
        }
    }
}

/// A flow as the model knows it.
#[derive(Clone, Copy, Debug)]
struct Known {
    from: u8,
    to: u8,
    /// Protocol, and the ports as its beginner says them.
    class: (u16, u8, u8),
    kind: FlowKind,
    last: u64,
    epoch: u64,
}

#[derive(Default)]
struct Model {
    bits: u64,
    epoch: u64,
    now: u64,
    flows: Vec<Known>,
}

fn patience(kind: FlowKind) -> u64 {
    match kind {
        FlowKind::Tcp { .. } => 124 * 60,
        FlowKind::Udp { .. } => 120,
        _ => 60,
    }
}

impl Model {
    /// Whether it arrives.
    fn send(&mut self, from: u8, to: u8, packet: Packet) -> bool {
        let (protocol, ports, kind) = match packet {
            Packet::Tcp { source, destination, .. } => {
                (6, (source, destination), FlowKind::Tcp { port: destination.into() })
            }
            Packet::Udp { source, destination } => {
                (17, (source, destination), FlowKind::Udp { port: destination.into() })
            }
            Packet::Echo { reply } => (1, (8, 8), FlowKind::Icmp { kind: if reply { 0 } else { 8 } }),
            Packet::Unreachable => (1, (3, 3), FlowKind::Icmp { kind: 3 }),
            Packet::Tunnel => (4, (0, 0), FlowKind::Ip { protocol: 4 }),
            Packet::Arp { .. } => (0x806, (0, 0), FlowKind::Ethernet { ether_type: 0x806 }),
            Packet::Experiment => (0x88b5, (0, 0), FlowKind::Ethernet { ether_type: 0x88b5 }),
        };
        let two_way = matches!(packet, Packet::Tcp { .. } | Packet::Udp { .. });
        let answer = packet == Packet::Echo { reply: true };
        let (ahead, back) = ((protocol, ports.0, ports.1), (protocol, ports.1, ports.0));
        let is = |flow: &Known| {
            let forward = (flow.from, flow.to, flow.class) == (from, to, ahead);
            let backward = (flow.from, flow.to, flow.class) == (to, from, back);
            (forward && !answer) || (backward && (two_way || answer))
        };
        let (now, epoch, bits) = (self.now, self.epoch, self.bits);
        self.flows.retain(|flow| !is(flow) || now - flow.last < patience(flow.kind));
        let begins = matches!(packet, Packet::Tcp { syn: true, ack: false, .. });
        let known = self.flows.iter().position(is);
        if let Some(at) = known.filter(|_| !begins) {
            let flow = &mut self.flows[at];
            if flow.epoch == epoch || allows(bits, flow.from, flow.kind, flow.to) {
                (flow.epoch, flow.last) = (epoch, now);
                return true;
            }
            let own = flow.from == from;
            self.flows.remove(at);
            if own {
                return false;
            }
        }
        let may_begin = begins || !(matches!(packet, Packet::Tcp { .. }) || answer);
        if !may_begin || !allows(bits, from, kind, to) {
            return false;
        }
        self.flows.retain(|flow| !is(flow));
        self.flows.push(Known { from, to, class: ahead, kind, last: now, epoch });
        true
    }
}

struct Quiet;

impl NetEvents for Quiet {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {}
}

fn mac(guest: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, guest]
}

fn frame(from: u8, to: u8, packet: Packet) -> Vec<u8> {
    let ip = |protocol, payload: &[u8]| {
        let len = u8::try_from(20 + payload.len()).unwrap();
        let header = [0x45, 0, 0, len, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, from, 10, 0, 0, to];
        [&[8, 0][..], &header, payload].concat()
    };
    let payload = match packet {
        Packet::Tcp { source, destination, syn, ack } => {
            let flags = u8::from(syn) << 1 | u8::from(ack) << 4;
            ip(6, &[0, source, 0, destination, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 255, 255, 0, 0, 0, 0])
        }
        Packet::Udp { source, destination } => ip(17, &[0, source, 0, destination, 0, 8, 0, 0]),
        Packet::Echo { reply } => ip(1, &[if reply { 0 } else { 8 }, 0, 0, 0, 0, 1, 0, 1]),
        Packet::Unreachable => ip(1, &[3, 3, 0, 0, 0, 0, 0, 0]),
        Packet::Tunnel => ip(4, &[0x45; 20]),
        Packet::Arp { answer } => [
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + u8::from(answer)][..],
            &mac(from),
            &[10, 0, 0, from],
            &mac(to),
            &[10, 0, 0, to],
        ]
        .concat(),
        Packet::Experiment => vec![0x88, 0xb5, 1, 2, 3],
    };
    [&mac(to)[..], &mac(from), &payload].concat()
}

fn few(packet: Packet) -> Packet {
    match packet {
        Packet::Tcp { source, destination, syn, ack } => {
            Packet::Tcp { source: source % 3, destination: destination % 3, syn, ack }
        }
        Packet::Udp { source, destination } => {
            Packet::Udp { source: source % 3, destination: destination % 3 }
        }
        other => other,
    }
}

/// Does all of it.
///
/// # Panics
/// If something arrives that the model does not let pass, or the other way round.
pub(crate) fn exercise(actions: &[Action]) {
    let clock = Arc::new(ManualClock::new(1));
    let policy = Arc::new(Bits { bits: AtomicU64::new(0), epoch: AtomicU64::new(0) });
    let switch = Switch::builder("lan", Arc::clone(&clock)).build();
    switch.set_judge(Some(Arc::new(FlowTable::builder(Arc::clone(&policy)).build())));
    let gatekeeper = Gatekeeper::new(AllowAll);
    let mut guests: Vec<(SwitchPort, Box<dyn NetPort>)> = (0..GUESTS)
        .map(|guest| {
            let vm = Party::Vm(VmIdentity::new(guest.into(), 1));
            let grant = gatekeeper.open(vm, None, NetworkAttach { network: "lan".into() }).unwrap();
            let port =
                switch.attach(grant, PortConfig::new(guest.to_string()).mac(MacAddr(mac(guest)))).unwrap();
            let driver = port.attach(&Agreed::new(1), Arc::new(Quiet)).unwrap().remove(0);
            (port, driver)
        })
        .collect();
    let mut model = Model { now: 1, ..Model::default() };
    for action in actions {
        match action {
            Action::Reload { bits } => {
                policy.change(*bits);
                (model.bits, model.epoch) = (*bits, model.epoch + 1);
            }
            Action::Advance { seconds } => {
                clock.advance(u64::from(*seconds) * 1_000_000_000);
                model.now += u64::from(*seconds);
            }
            Action::Send { from, to, packet } => {
                let (from, to, packet) = (from % GUESTS, to % GUESTS, few(*packet));
                if from != to {
                    let arrived = through(&mut guests, from, to, frame(from, to, packet));
                    assert_eq!(arrived, model.send(from, to, packet), "{from} to {to}: {packet:?}");
                }
            }
            Action::Broken { from, to, packet, changes, len } => {
                let (from, to) = (from % GUESTS, to % GUESTS);
                if from == to {
                    continue;
                }
                let mut bytes = frame(from, to, few(*packet));
                for (at, value) in changes {
                    // The type and what is behind it.
                    let at = 12 + usize::from(*at) % (bytes.len() - 12);
                    bytes[at] = *value;
                }
                bytes.truncate(usize::from(*len).max(14));
                // Nothing is allowed meanwhile, and what is known is asked about again.
                policy.change(0);
                assert!(!through(&mut guests, from, to, bytes.clone()), "{bytes:x?}");
                // It may have been a frame that ended a flow.
                model.flows.clear();
                policy.change(0);
                drain_flows(&mut guests);
                policy.change(model.bits);
                model.epoch += 1;
            }
        }
    }
}

/// Has each flow that there may be end, as nothing is allowed.
fn drain_flows(guests: &mut [(SwitchPort, Box<dyn NetPort>)]) {
    for from in 0..GUESTS {
        for to in (0..GUESTS).filter(|to| *to != from) {
            for source in 0..3 {
                for destination in 0..3 {
                    let ack = Packet::Tcp { source, destination, syn: false, ack: true };
                    through(guests, from, to, frame(from, to, ack));
                    through(guests, from, to, frame(from, to, Packet::Udp { source, destination }));
                }
            }
            for packet in [
                Packet::Echo { reply: false },
                Packet::Unreachable,
                Packet::Tunnel,
                Packet::Arp { answer: false },
                Packet::Experiment,
            ] {
                through(guests, from, to, frame(from, to, packet));
            }
        }
    }
}

/// Whether a frame arrives where it is to, and nowhere else.
fn through(guests: &mut [(SwitchPort, Box<dyn NetPort>)], from: u8, to: u8, mut frame: Vec<u8>) -> bool {
    let (_, driver) = &mut guests[usize::from(from)];
    let sent = driver.transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut frame[..])]).unwrap();
    assert_eq!(sent, Sent::Done);
    driver.flush();
    let mut room = vec![0; MAX_FRAME];
    let mut arrived = false;
    for (guest, (_, driver)) in guests.iter_mut().enumerate() {
        while driver.receive(&[VolatileSlice::from(&mut room[..])]).unwrap().is_some() {
            assert_eq!(guest, usize::from(to), "it arrives at another");
            arrived = true;
        }
    }
    arrived
}
