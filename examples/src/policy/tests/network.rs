//! What goes through a switch.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vmm_devices::ManualClock;
use vmm_devices::channel::{NetworkAttach, VmIdentity};
use vmm_devices::net::switch::flows::FlowTable;
use vmm_devices::net::switch::{PortConfig, Switch, SwitchPort};
use vmm_devices::net::{Agreed, MAX_FRAME, MacAddr, NetBackend as _, NetEvents, NetPort, PacketInfo, Sent};
use vmm_memory::vm_memory::VolatileSlice;
use vmm_policy::Policy;

use super::{Enforcement, GATEWAY, PolicyFlows, WEB_BLUE, WEB_RED, of, two_tenants};

struct Quiet;

impl NetEvents for Quiet {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {}
}

/// A network with a machine at each of some ports.
struct Lan {
    switch: Switch,
    table: Arc<FlowTable<PolicyFlows>>,
    clock: Arc<ManualClock>,
    ends: Vec<(SwitchPort, Box<dyn NetPort>)>,
}

impl Lan {
    fn new(enforcement: &Enforcement, machines: &[VmIdentity]) -> Self {
        let clock = Arc::new(ManualClock::new(1));
        let switch = Switch::builder("lan", Arc::clone(&clock)).build();
        let table = Arc::new(FlowTable::builder(enforcement.flows()).build());
        let judge = Arc::clone(&table);
        switch.set_judge(Some(judge));
        let end = |vm: &VmIdentity| {
            let right =
                enforcement.gatekeeper().open((*vm).into(), None, NetworkAttach { network: "lan".into() });
            let config = PortConfig::new(format!("{:x}", vm.uuid())).mac(mac(*vm));
            let port = switch.attach(right.unwrap(), config).unwrap();
            let driver = port.attach(&Agreed::new(1), Arc::new(Quiet)).unwrap().remove(0);
            (port, driver)
        };
        let ends = machines.iter().map(end).collect();
        Self { switch, table, clock, ends }
    }

    fn send(&mut self, from: usize, mut frame: Vec<u8>) {
        let (_, driver) = &mut self.ends[from];
        let sent = driver.transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut frame[..])]);
        assert!(matches!(sent, Ok(Sent::Done)));
        driver.flush();
    }

    fn arrived(&mut self, to: usize) -> usize {
        let mut room = vec![0; MAX_FRAME];
        let (_, driver) = &mut self.ends[to];
        std::iter::from_fn(|| driver.receive(&[VolatileSlice::from(&mut room[..])]).unwrap()).count()
    }
}

fn mac(vm: VmIdentity) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, vm.uuid().to_le_bytes()[0]])
}

/// IPv4 and TCP between two machines; no checksums, which nobody looks at here.
fn tcp(from: VmIdentity, to: VmIdentity, ports: (u16, u16), flags: u8) -> Vec<u8> {
    let last = |vm: VmIdentity| vm.uuid().to_le_bytes()[0];
    let ip = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, last(from), 10, 9, 0, last(to)];
    let tcp = [0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    let ports = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    [&mac(to).0[..], &mac(from).0, &[8, 0], &ip, &ports, &tcp].concat()
}

fn arp(from: VmIdentity, asks_for: VmIdentity) -> Vec<u8> {
    let last = |vm: VmIdentity| vm.uuid().to_le_bytes()[0];
    [
        &MacAddr::BROADCAST.0[..],
        &mac(from).0,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac(from).0,
        &[10, 9, 0, last(from), 0, 0, 0, 0, 0, 0, 10, 9, 0, last(asks_for)],
    ]
    .concat()
}

const SYN: u8 = 2;
const ACK: u8 = 0x10;

#[test]
fn tenants_reach_the_gateway_by_a_switch_and_not_each_other() {
    let enforcement = two_tenants();
    let machines = [WEB_RED, WEB_BLUE, GATEWAY];
    let mut lan = Lan::new(&enforcement, &machines);
    let arrives = |lan: &mut Lan, from: usize, to: usize, ports, flags| {
        lan.send(from, tcp(machines[from], machines[to], ports, flags));
        lan.arrived(to) == 1
    };
    assert!(arrives(&mut lan, 0, 2, (4000, 443), SYN));
    assert!(arrives(&mut lan, 2, 0, (443, 4000), SYN | ACK));
    assert!(arrives(&mut lan, 0, 2, (4000, 443), ACK));
    assert!(arrives(&mut lan, 1, 2, (4000, 443), SYN));
    for (from, to, ports, flags) in [
        (0, 2, (4000, 22), SYN),
        (0, 1, (4000, 443), SYN),
        (1, 0, (4000, 443), SYN),
        (1, 0, (443, 4000), SYN | ACK),
        (2, 0, (4000, 443), SYN),
        (2, 0, (443, 4001), ACK),
    ] {
        assert!(!arrives(&mut lan, from, to, ports, flags), "{from} {to} {ports:?} {flags}");
    }
    // A question to all is heard by the gateway alone.
    lan.send(0, arp(WEB_RED, WEB_BLUE));
    assert_eq!((lan.arrived(1), lan.arrived(2)), (0, 1));

    // Another policy ends the connection, both ways.
    let less =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/tenants.policy")).unwrap();
    let rules =
        "allow web or db or edge to attach network lan\nallow web and blue to connect tcp 443 of edge";
    let cut = enforcement.reload(Policy::parse(&format!("{less}\n{rules}")).unwrap()).unwrap();
    assert_eq!(cut.closed.len(), 0, "the ports stay");
    assert!(!arrives(&mut lan, 2, 0, (443, 4000), ACK));
    assert!(!arrives(&mut lan, 0, 2, (4000, 443), ACK));
    assert!(arrives(&mut lan, 1, 2, (4000, 443), ACK));
    enforcement.reload(Policy::deny_all()).unwrap();
    assert!(lan.switch.ports().is_empty());
}

#[test]
fn a_machine_sends_from_its_own_addresses() {
    let enforcement = two_tenants();
    for vm in [WEB_RED, GATEWAY] {
        assert!(enforcement.bind_address(vm, [10, 9, 0, vm.uuid().to_le_bytes()[0]].into()));
    }
    let mut lan = Lan::new(&enforcement, &[WEB_RED, WEB_BLUE, GATEWAY]);
    lan.send(0, tcp(WEB_RED, GATEWAY, (1, 443), SYN));
    assert_eq!(lan.arrived(2), 1);
    // Blue calls itself red; red calls itself somebody that nobody is.
    let as_red = |vm: VmIdentity| {
        let mut frame = tcp(WEB_RED, GATEWAY, (2, 443), SYN);
        frame[6..12].copy_from_slice(&mac(vm).0);
        frame
    };
    lan.send(1, as_red(WEB_BLUE));
    let mut unknown = as_red(WEB_RED);
    unknown[29] = 99;
    lan.send(0, unknown);
    assert_eq!((lan.arrived(2), lan.table.totals().spoofed), (0, 2));
}

#[test]
fn a_throttled_flow_keeps_to_its_rate() {
    let text = "labels l\nnetwork lan { filtered }\nallow l to attach network lan\n\
         throttle l to connect tcp 80 of l at 200 KiB per second";
    let (enforcement, vms) = of(text, &[(1, "l"), (2, "l")]);
    let mut lan = Lan::new(&enforcement, &vms);
    let syn = tcp(vms[0], vms[1], (1, 80), SYN);
    let frames = 200 * 1024 / syn.len() + 100;
    for _ in 0..frames {
        lan.send(0, syn.clone());
    }
    let arrived = lan.arrived(1);
    // The last one goes into debt.
    assert_eq!(arrived, (200 * 1024_usize).div_ceil(syn.len()));
    lan.clock.advance(1_000_000_000);
    lan.send(0, syn);
    assert_eq!(lan.arrived(1), 1);
}
