//! What passes, what is asked, and what hostile senders get.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use etherparse::{IcmpEchoHeader, PacketBuilder};
use vmm_memory::vm_memory::VolatileSlice;

use super::super::head::Head;
use super::super::judge::{Flow, FlowJudge, Headers, Verdict};
use super::super::table::PortId;
use super::*;
use crate::channel::{AllowAll, Gatekeeper, Grant, NetworkAttach, Party, VmIdentity};
use crate::clock::{Clock as _, ManualClock};

/// Allows what it is told to, in words, and writes down what it is asked.
#[derive(Default)]
struct Rules {
    epoch: AtomicU64,
    allowed: Mutex<BTreeSet<String>>,
    limit: Mutex<Option<Rate>>,
    asked: Mutex<Vec<String>>,
    owner: Mutex<Option<(String, IpAddr)>>,
}

impl FlowPolicy for Rules {
    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn decide(&self, flow: &NewFlow<'_>) -> FlowVerdict {
        let words = format!("{} {} {}", flow.from.name, flow.kind, flow.to.name);
        let again = if flow.again { " again" } else { "" };
        self.asked.lock().unwrap().push(format!("{words}{again}"));
        if !self.allowed.lock().unwrap().contains(&words) {
            return FlowVerdict::Drop;
        }
        self.limit.lock().unwrap().map_or(FlowVerdict::Pass, |rate| FlowVerdict::Limited { rate, rule: 1 })
    }

    fn owns(&self, port: &FlowPort, address: IpAddr) -> bool {
        self.owner.lock().unwrap().as_ref().is_none_or(|(name, of)| *of != address || **name == *port.name)
    }
}

struct Lan {
    rules: Arc<Rules>,
    table: FlowTable<Arc<Rules>>,
    clock: Arc<ManualClock>,
    ports: Vec<(FlowPort, Grant<NetworkAttach>)>,
}

impl Lan {
    fn new(allowed: &[&str]) -> Self {
        Self::with(allowed, |builder| builder)
    }

    fn with(
        allowed: &[&str],
        with: impl FnOnce(FlowTableBuilder<Arc<Rules>>) -> FlowTableBuilder<Arc<Rules>>,
    ) -> Self {
        let rules = Arc::new(Rules::default());
        rules.allowed.lock().unwrap().extend(allowed.iter().map(|words| (*words).to_owned()));
        let clock = Arc::new(ManualClock::new(1));
        let table = with(FlowTable::builder(Arc::clone(&rules))).build();
        let gatekeeper = Gatekeeper::new(AllowAll);
        let port = |(name, number): (&str, u32)| {
            let vm = Party::Vm(VmIdentity::new(1, 1));
            let grant = gatekeeper.open(vm, None, NetworkAttach { network: "lan".into() }).unwrap();
            (FlowPort { id: PortId(number), name: name.into(), grant: grant.id() }, grant)
        };
        // The table knows pairs by the order of their grants, so both orders are tried.
        let ports = [("b", 2), ("a", 1), ("c", 3)].map(port).into();
        Self { rules, table, clock, ports }
    }

    fn port(&self, name: &str) -> &FlowPort {
        self.ports.iter().map(|(port, _)| port).find(|port| &*port.name == name).unwrap()
    }

    /// Whether a frame passes.
    fn passes(&self, from: &str, to: &str, frame: &[u8]) -> bool {
        let (from, to) = (self.port(from), self.port(to));
        let headers = parse(frame);
        let vlan = VlanId::DEFAULT;
        let now_ns = self.clock.now_ns();
        let flow = Flow { from, to, vlan, len: frame.len(), flooded: false, now_ns, headers: &headers };
        self.table.judge(&flow) == Verdict::Pass
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.rules.asked.lock().unwrap())
    }

    fn reload(&self, allowed: &[&str]) {
        *self.rules.allowed.lock().unwrap() = allowed.iter().map(|words| (*words).to_owned()).collect();
        self.rules.epoch.fetch_add(1, Ordering::SeqCst);
    }
}

fn parse(frame: &[u8]) -> Headers {
    let mut frame = frame.to_vec();
    let mut head = Head::new();
    head.read(&[VolatileSlice::from(&mut frame[..])]).unwrap();
    Headers::parse(&head)
}

fn number(name: &str) -> u8 {
    name.as_bytes()[0] - b'a' + 1
}

fn mac(name: &str) -> [u8; 6] {
    [2, 0, 0, 0, 0, number(name)]
}

fn address(name: &str) -> [u8; 4] {
    [10, 0, 0, number(name)]
}

#[derive(Clone, Copy)]
enum Packet {
    Syn,
    SynAck,
    Data,
    Udp,
    Echo,
    Reply,
}

fn packet(packet: Packet, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    let ip = PacketBuilder::ethernet2(mac(from.0), mac(to.0)).ipv4(address(from.0), address(to.0), 64);
    let mut frame = Vec::new();
    let echo = IcmpEchoHeader { id: 1, seq: 1 };
    match packet {
        Packet::Syn => ip.tcp(from.1, to.1, 1, 1).syn().write(&mut frame, &[]),
        Packet::SynAck => ip.tcp(from.1, to.1, 1, 1).syn().ack(1).write(&mut frame, &[]),
        Packet::Data => ip.tcp(from.1, to.1, 1, 1).ack(1).write(&mut frame, &[7; 100]),
        Packet::Udp => ip.udp(from.1, to.1).write(&mut frame, &[7; 100]),
        Packet::Echo => ip.icmpv4(etherparse::Icmpv4Type::EchoRequest(echo)).write(&mut frame, &[]),
        Packet::Reply => ip.icmpv4(etherparse::Icmpv4Type::EchoReply(echo)).write(&mut frame, &[]),
    }
    .unwrap();
    frame
}

fn arp(from: &str, to: &str, says: (&str, &str), operation: u8) -> Vec<u8> {
    let (mac_of, ip_of) = says;
    [
        &mac(to)[..],
        &mac(from),
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
        &mac(mac_of),
        &address(ip_of),
        &[0; 6],
        &address(to),
    ]
    .concat()
}

const OPEN: &[&str] = &["a tcp 80 b", "a udp 53 b", "a icmp 8 b"];

#[test]
fn a_connection_is_asked_about_once_and_its_answers_pass() {
    for (one, other) in [("a", "b"), ("c", "a"), ("b", "c")] {
        let lan = Lan::new(&[&format!("{one} tcp 80 {other}")]);
        let (client, server) = ((one, 4000), (other, 80));
        assert!(lan.passes(one, other, &packet(Packet::Syn, client, server)));
        assert!(lan.passes(other, one, &packet(Packet::SynAck, server, client)));
        for _ in 0..3 {
            assert!(lan.passes(one, other, &packet(Packet::Data, client, server)));
            assert!(lan.passes(other, one, &packet(Packet::Data, server, client)));
        }
        assert_eq!(lan.asked(), [format!("{one} tcp 80 {other}")]);
        assert_eq!((lan.table.totals().allowed, lan.table.len()), (1, 1));
    }
}

#[test]
fn what_belongs_to_no_connection_does_not_pass_as_an_answer() {
    let lan = Lan::new(OPEN);
    // An answer that nobody asked for, from the port that clients would hear.
    assert!(!lan.passes("b", "a", &packet(Packet::Data, ("b", 80), ("a", 4000))));
    assert!(!lan.passes("b", "a", &packet(Packet::SynAck, ("b", 80), ("a", 4000))));
    assert!(!lan.passes("a", "b", &packet(Packet::Data, ("a", 4000), ("b", 80))));
    assert_eq!((lan.table.totals().stray, lan.asked().len()), (3, 0));
    // A server's SYN to a port of a client's is its own.
    assert!(lan.passes("a", "b", &packet(Packet::Syn, ("a", 4000), ("b", 80))));
    assert!(!lan.passes("b", "a", &packet(Packet::Syn, ("b", 80), ("a", 4000))));
    assert!(lan.passes("a", "b", &packet(Packet::Data, ("a", 4000), ("b", 80))), "and ends nothing");
    // Other ports, other addresses, another VLAN, another machine: other flows.
    assert!(!lan.passes("b", "a", &packet(Packet::Data, ("b", 80), ("a", 4001))));
    assert!(!lan.passes("c", "a", &packet(Packet::Data, ("b", 80), ("a", 4000))));
    let headers = parse(&packet(Packet::Data, ("b", 80), ("a", 4000)));
    let vlan = VlanId::new(9).unwrap();
    let (from, to) = (lan.port("b"), lan.port("a"));
    let now_ns = lan.clock.now_ns();
    let flow = Flow { from, to, vlan, len: 60, flooded: false, now_ns, headers: &headers };
    assert_eq!(lan.table.judge(&flow), Verdict::Drop);
}

#[test]
fn datagrams_are_answered_for_a_while() {
    let lan = Lan::new(OPEN);
    let (question, answer) =
        (packet(Packet::Udp, ("a", 4000), ("b", 53)), packet(Packet::Udp, ("b", 53), ("a", 4000)));
    assert!(!lan.passes("b", "a", &answer));
    assert!(lan.passes("a", "b", &question));
    assert!(lan.passes("b", "a", &answer));
    lan.clock.advance(119_000_000_000);
    assert!(lan.passes("b", "a", &answer));
    lan.clock.advance(120_000_000_000);
    assert!(!lan.passes("b", "a", &answer));
    assert_eq!(lan.asked(), ["b udp 4000 a", "a udp 53 b", "b udp 4000 a"]);

    assert!(!lan.passes("b", "a", &packet(Packet::Reply, ("b", 0), ("a", 0))));
    assert!(lan.passes("a", "b", &packet(Packet::Echo, ("a", 0), ("b", 0))));
    assert!(lan.passes("b", "a", &packet(Packet::Reply, ("b", 0), ("a", 0))));
    assert!(!lan.passes("b", "a", &packet(Packet::Echo, ("b", 0), ("a", 0))), "a question is no answer");
}

#[test]
fn another_policy_ends_what_it_does_not_allow_and_nothing_else() {
    let lan = Lan::new(&["a tcp 80 b", "a tcp 81 b"]);
    for port in [80, 81] {
        assert!(lan.passes("a", "b", &packet(Packet::Syn, ("a", 4000), ("b", port))));
    }
    lan.asked();
    lan.reload(&["a tcp 81 b"]);
    // The answer comes first: it is asked about by who began it.
    assert!(!lan.passes("b", "a", &packet(Packet::Data, ("b", 80), ("a", 4000))));
    assert!(!lan.passes("a", "b", &packet(Packet::Data, ("a", 4000), ("b", 80))));
    for _ in 0..2 {
        assert!(lan.passes("b", "a", &packet(Packet::Data, ("b", 81), ("a", 4000))));
    }
    assert_eq!(lan.asked(), ["a tcp 80 b again", "a tcp 81 b again"]);
    // What was ended stays so, though a later policy would allow it.
    lan.reload(&["a tcp 80 b", "a tcp 81 b"]);
    assert!(!lan.passes("a", "b", &packet(Packet::Data, ("a", 4000), ("b", 80))));
    assert!(lan.passes("a", "b", &packet(Packet::Syn, ("a", 4000), ("b", 80))));
}

#[test]
fn addresses_that_are_anothers_are_not_sent_from() {
    let lan = Lan::new(&["a udp 53 b", "a ethernet 0x0806 b", "c udp 53 b", "c ethernet 0x0806 b"]);
    *lan.rules.owner.lock().unwrap() = Some(("a".to_owned(), address("a").into()));
    assert!(lan.passes("a", "b", &packet(Packet::Udp, ("a", 1), ("b", 53))));
    assert!(lan.passes("a", "b", &arp("a", "b", ("a", "a"), 1)));
    assert!(!lan.passes("c", "b", &packet(Packet::Udp, ("a", 1), ("b", 53))));
    assert!(!lan.passes("c", "b", &arp("c", "b", ("c", "a"), 2)), "the address of another's");
    assert_eq!(lan.table.totals().spoofed, 2);
    assert!(lan.passes("c", "b", &arp("c", "b", ("c", "c"), 2)));
    assert!(!lan.passes("c", "b", &arp("c", "b", ("a", "c"), 2)), "the MAC of another's");
    assert!(!lan.passes("c", "b", &arp("c", "b", ("c", "c"), 3)), "reverse ARP");
    assert!(!lan.passes("b", "a", &arp("b", "a", ("b", "b"), 2)), "an answer is asked about as well");
    // The address becomes another's while its flow goes on, both ways.
    *lan.rules.owner.lock().unwrap() = Some(("c".to_owned(), address("a").into()));
    lan.rules.epoch.fetch_add(1, Ordering::SeqCst);
    assert!(!lan.passes("b", "a", &packet(Packet::Udp, ("b", 53), ("a", 1))), "an answer to what is no more");
    assert!(!lan.passes("a", "b", &packet(Packet::Udp, ("a", 1), ("b", 53))));
    assert!(lan.passes("c", "b", &packet(Packet::Udp, ("a", 1), ("b", 53))));
}

/// CVE-2021-27853, CVE-2021-27854, CVE-2021-27862: what is behind tags, lengths and fragments is not what it was judged as.
#[test]
fn cve_2021_27853_what_may_be_something_else_is_dropped_unasked() {
    let lan = Lan::new(&["a tcp 80 b", "a ethernet 0x88b5 b", "a ethernet 0x8100 b", "a ethernet 0x0040 b"]);
    let syn = packet(Packet::Syn, ("a", 4000), ("b", 80));
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = syn.clone();
        change(&mut frame);
        frame
    };
    let hostile = [
        with(&|frame| frame[20] |= 0x20),            // more fragments
        with(&|frame| frame[21] = 1),                // a later one
        with(&|frame| frame.truncate(14 + 20 + 10)), // half a header of TCP
        with(&|frame| frame.truncate(14 + 10)),      // half of IP
        with(&|frame| frame[14] = 0x41),             // a header of 4 bytes
        with(&|frame| frame[14] = 0x65),             // another version
        with(&|frame| drop(frame.splice(12..12, [0x81, 0, 0, 1, 0x81, 0, 0, 1]))), // two tags
        with(&|frame| drop(frame.splice(12..12, [0x88, 0xa8, 0, 1]))), // a service tag
        with(&|frame| drop(frame.splice(12..12, [0x91, 0, 0, 1]))), // an old one
        // A length, LLC and SNAP before the type.
        with(&|frame| drop(frame.splice(12..12, [0, 0x40, 0xaa, 0xaa, 3, 0, 0, 0]))),
        with(&|frame| drop(frame.splice(12..12, [5, 0xff, 0xaa, 0xaa, 3, 0, 0, 0]))),
        arp("a", "b", ("a", "a"), 1)[..30].to_vec(),
    ];
    for (index, frame) in hostile.iter().enumerate() {
        assert!(!lan.passes("a", "b", frame), "{index}: {frame:x?}");
    }
    assert_eq!((lan.asked(), lan.table.len()), (vec![], 0));
    assert_eq!(lan.table.totals().unclear, hostile.len() as u64);
    // A type of its own is asked about.
    let experiment = [&mac("b")[..], &mac("a"), &[0x88, 0xb5, 1, 2, 3]].concat();
    assert!(lan.passes("a", "b", &experiment));
    assert!(!lan.passes("b", "a", &[&mac("a")[..], &mac("b"), &[0x88, 0xb5]].concat()));
    // And so is a tunnel.
    let mut tunnel = Vec::new();
    let ip = PacketBuilder::ethernet2(mac("a"), mac("b")).ipv4(address("a"), address("b"), 9);
    ip.write(&mut tunnel, etherparse::IpNumber::IPV4, &[0x45; 40]).unwrap();
    assert!(!lan.passes("a", "b", &tunnel));
    assert_eq!(lan.asked().last().unwrap(), "a ip 4 b");
}

#[test]
fn no_bytes_whatever_pass_unasked_or_panic() {
    let lan = Lan::new(&[]);
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap()
    };
    let base = packet(Packet::Syn, ("a", 4000), ("b", 80));
    for _ in 0..20_000 {
        let mut frame = base.clone();
        for _ in 0..1 + random() % 8 {
            let at = 12 + random() % (frame.len() - 12);
            frame[at] = random().to_le_bytes()[0];
        }
        frame.truncate(14 + random() % (frame.len() - 13));
        assert!(!lan.passes("a", "b", &frame), "{frame:x?}");
    }
    assert!(lan.table.is_empty());
}

#[test]
fn who_opens_many_flows_displaces_those_of_the_same_two_alone() {
    let lan = Lan::with(&["a udp 53 b", "a udp 53 c", "c udp 53 a"], |table| table.flows(16).pairs(2));
    assert!(lan.passes("a", "c", &packet(Packet::Udp, ("a", 1), ("c", 53))));
    for port in 1..2000 {
        assert!(lan.passes("a", "b", &packet(Packet::Udp, ("a", port), ("b", 53))));
        assert!(lan.table.len() <= 17);
    }
    assert!(lan.passes("c", "a", &packet(Packet::Udp, ("c", 53), ("a", 1))), "of others");
    assert!(lan.passes("b", "a", &packet(Packet::Udp, ("b", 53), ("a", 1999))), "the last");
    assert!(!lan.passes("b", "a", &packet(Packet::Udp, ("b", 53), ("a", 1))), "the first");
    // One pair too many: the one that was silent for longest goes.
    lan.reload(&["a udp 53 b", "a udp 53 c", "b udp 53 c"]);
    lan.clock.advance(1);
    assert!(lan.passes("a", "b", &packet(Packet::Udp, ("a", 1999), ("b", 53))));
    assert!(lan.passes("b", "c", &packet(Packet::Udp, ("b", 1), ("c", 53))));
    assert!(!lan.passes("c", "a", &packet(Packet::Udp, ("c", 53), ("a", 1))));
    assert!(lan.passes("b", "a", &packet(Packet::Udp, ("b", 53), ("a", 1999))));
    lan.table.forget(lan.port("b").grant);
    assert!(lan.table.is_empty());
}

#[test]
fn a_limit_is_that_of_all_flows_under_one_rule() {
    let lan = Lan::new(OPEN);
    let question = |port| packet(Packet::Udp, ("a", port), ("b", 53));
    let len = question(1).len() as u64;
    *lan.rules.limit.lock().unwrap() = Rate::new(len, 3 * len);
    for port in 1..=3 {
        assert!(lan.passes("a", "b", &question(port)));
    }
    assert!(!lan.passes("a", "b", &question(4)), "another flow has no bucket of its own");
    assert!(!lan.passes("b", "a", &packet(Packet::Udp, ("b", 53), ("a", 1))), "nor an answer");
    lan.clock.advance(1_000_000_000);
    assert!(lan.passes("a", "b", &question(1)));
    assert!(!lan.passes("a", "b", &question(1)));
    assert_eq!(lan.table.totals().throttled, 3);
}
