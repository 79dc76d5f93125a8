//! The policies of the program `two_tenants`, in front of devices that have no virtual machines.

mod disks;
mod network;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_cpu::xen_pv::Gate as _;
use vmm_devices::channel::{
    ClosedChannel, DoorbellRing, NetworkAttach, Party, Refusal, RegionMap, VmIdentity, VsockConnect,
    VsockListen,
};
use vmm_devices::ivshmem::{Hub, Region};
use vmm_devices::virtio::balloon::MemoryRelease;
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{Access, SharedMemory};
use vmm_policy::{Monitor, Policy};

use super::*;

const WEB_RED: VmIdentity = VmIdentity::new(0xa1, 1);
const DB_RED: VmIdentity = VmIdentity::new(0xa2, 1);
const WEB_BLUE: VmIdentity = VmIdentity::new(0xb1, 1);
const DB_BLUE: VmIdentity = VmIdentity::new(0xb2, 1);
const GATEWAY: VmIdentity = VmIdentity::new(0xc1, 1);
const ALL: [VmIdentity; 5] = [WEB_RED, DB_RED, WEB_BLUE, DB_BLUE, GATEWAY];

fn policy(name: &str) -> Policy {
    Policy::from_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("policies").join(name)).unwrap()
}

fn two_tenants() -> Enforcement {
    let enforcement = Enforcement::new(Monitor::new(policy("two-tenants.policy")));
    for vm in ALL {
        enforcement.register(vm).unwrap();
    }
    enforcement
}

fn of(text: &str, machines: &[(u128, &str)]) -> (Enforcement, Vec<VmIdentity>) {
    let enforcement = Enforcement::new(Monitor::new(Policy::parse(text).unwrap()));
    let register = |(uuid, label): &(u128, &str)| {
        let vm = VmIdentity::new(*uuid, 1);
        enforcement.register_as(vm, |spec| spec.label(label)).unwrap();
        vm
    };
    let machines = machines.iter().map(register).collect();
    (enforcement, machines)
}

fn map(region: &str, access: Access) -> RegionMap {
    RegionMap { region: region.into(), access }
}

#[test]
fn each_answer_says_layer_rule_and_line() {
    let enforcement = two_tenants();
    let gatekeeper = enforcement.gatekeeper();
    let connect = |asker: VmIdentity, peer: VmIdentity, port| {
        gatekeeper.open(asker.into(), Some(peer.into()), VsockConnect { port }).map(drop)
    };
    connect(WEB_RED, DB_RED, 5432).unwrap();
    connect(WEB_BLUE, DB_BLUE, 5432).unwrap();
    for (asker, peer, port) in
        [(WEB_RED, DB_RED, 22), (DB_RED, WEB_RED, 5432), (GATEWAY, DB_RED, 5432), (WEB_RED, GATEWAY, 443)]
    {
        let refusal = connect(asker, peer, port).unwrap_err();
        assert_eq!(refusal.reason(), "deny (type): no rule allows it", "{asker} {peer} {port}");
    }
    // Across tenants the wall comes first.
    for (asker, peer) in [(WEB_RED, DB_BLUE), (WEB_BLUE, DB_RED), (DB_BLUE, DB_RED)] {
        let refusal = connect(asker, peer, 5432).unwrap_err();
        assert!(refusal.reason().starts_with("deny (wall): "), "{refusal}");
    }
    let open = |vm: VmIdentity, channel| gatekeeper.open(vm.into(), None, channel).map(drop);
    open(WEB_RED, map("frames-red", Access::ReadOnly)).unwrap();
    open(DB_BLUE, map("frames-blue", Access::ReadWrite)).unwrap();
    open(WEB_RED, map("frames-red", Access::ReadWrite)).unwrap_err();
    open(WEB_RED, map("frames-blue", Access::ReadOnly)).unwrap_err();
    open(WEB_RED, map("another", Access::ReadOnly)).unwrap_err();
    gatekeeper.open(WEB_RED.into(), None, DoorbellRing { region: "frames-red".into() }).unwrap_err();
    gatekeeper.open(DB_RED.into(), Some(WEB_RED.into()), VsockListen { port: 5432 }).map(drop).unwrap();
    gatekeeper.open(DB_RED.into(), Some(WEB_BLUE.into()), VsockListen { port: 5432 }).unwrap_err();
    assert_eq!(enforcement.monitor().open_channels(), [], "what is closed has given its right back");

    enforcement.reload(policy("two-tenants-lockdown.policy")).unwrap();
    let refusal = connect(WEB_RED, DB_RED, 5432).unwrap_err();
    let expected = "deny (type): two-tenants-lockdown.policy:4: deny web-red to connect vsock of any";
    assert_eq!(refusal.reason(), expected);
}

#[test]
fn another_life_and_a_stranger_are_nobody() {
    let enforcement = two_tenants();
    let gatekeeper = enforcement.gatekeeper();
    let attach = |party: Party| gatekeeper.open(party, None, NetworkAttach { network: "lan".into() });
    drop(attach(WEB_RED.into()).unwrap());
    for party in [
        VmIdentity::new(0xa1, 2).into(),
        VmIdentity::new(0xa1, 0).into(),
        VmIdentity::new(9, 1).into(),
        Party::Host("web-red".into()),
    ] {
        let refusal = attach(party).unwrap_err();
        assert!(refusal.reason().contains("is not registered"), "{refusal}");
    }
    // A program of the host's is one that was registered as such.
    let (enforcement, _) = of("host backup {}\nnetwork lan {}\nallow backup to attach network lan", &[]);
    let gatekeeper = enforcement.gatekeeper();
    let attach = || {
        let lan = NetworkAttach { network: "lan".into() };
        gatekeeper.open(Party::Host("backup".into()), None, lan).map(drop)
    };
    attach().unwrap_err();
    enforcement.register_host("backup").unwrap();
    attach().unwrap();
}

#[test]
fn the_next_life_begins_with_nothing() {
    let enforcement = two_tenants();
    let gatekeeper = enforcement.gatekeeper();
    let attach = |party: Party| gatekeeper.open(party, None, NetworkAttach { network: "lan".into() });
    let right = attach(WEB_RED.into()).unwrap();
    let cut = enforcement.unregister(WEB_RED).unwrap();
    assert_eq!((cut.closed.len(), right.is_live()), (1, false));
    assert!(enforcement.register(WEB_RED).is_err(), "an incarnation is used once");
    let next = VmIdentity::new(0xa1, 2);
    enforcement.register(next).unwrap();
    assert!(attach(WEB_RED.into()).is_err() && attach(next.into()).is_ok());
}

#[test]
fn a_reload_closes_in_devices_what_it_does_not_allow_and_nothing_else() {
    let enforcement = two_tenants();
    let gatekeeper = enforcement.gatekeeper();
    let hub = |name: &str| {
        let memory = SharedMemory::create(name, 0x1_0000).unwrap();
        Hub::new(Region::new(name, memory).unwrap(), 1).unwrap()
    };
    let (red, blue) = (hub("frames-red"), hub("frames-blue"));
    let seat = |hub: &Hub, vm: VmIdentity, access| {
        let right = gatekeeper.open(vm.into(), None, map(hub.region().name(), access)).unwrap();
        hub.join(right, None).unwrap()
    };
    let members = [
        seat(&red, DB_RED, Access::ReadWrite),
        seat(&red, WEB_RED, Access::ReadOnly),
        seat(&blue, WEB_BLUE, Access::ReadOnly),
    ];
    let connection =
        gatekeeper.open(WEB_RED.into(), Some(DB_RED.into()), VsockConnect { port: 5432 }).unwrap();
    let cut = enforcement.reload(policy("two-tenants-lockdown.policy")).unwrap();
    let action = |closed: &ClosedChannel| closed.channel.request.action().to_string();
    let mut closed: Vec<_> = cut.closed.iter().map(|closed| (action(closed), closed.why.reason())).collect();
    closed.sort();
    assert_eq!(
        closed,
        [
            (
                "connect".to_owned(),
                "deny (type): two-tenants-lockdown.policy:4: deny web-red to connect vsock of any"
            ),
            (
                "map-ro".to_owned(),
                "deny (type): two-tenants-lockdown.policy:5: deny web-red to map-ro, map-rw region of any"
            ),
        ]
    );
    assert!(!connection.is_live());
    assert_eq!(members.each_ref().map(|member| member.is_open()), [true, false, true]);
    // What is undone opens again, and what was closed stays so.
    enforcement.reload(policy("two-tenants.policy")).unwrap();
    assert!(!connection.is_live() && !members[1].is_open());
    drop(seat(&red, WEB_RED, Access::ReadOnly));
}

#[test]
fn no_path_joins_the_tenants_in_either_policy() {
    for name in ["two-tenants.policy", "two-tenants-lockdown.policy"] {
        let policy = policy(name);
        for (from, to) in [("web-red", "web-blue"), ("db-red", "db-blue"), ("web-blue", "db-red")] {
            assert_eq!(policy.prove_no_path(from, to).unwrap().map(|path| path.to_string()), None, "{name}");
            assert!(policy.prove_no_path(to, from).unwrap().is_none(), "{name}");
        }
        // The proof finds ways where there are some.
        let path = policy.prove_no_path("db-red", "gateway").unwrap();
        assert!(path.is_some(), "{name}");
    }
}

#[test]
fn pages_and_open_channels_are_counted() {
    let text = "labels l\nregion big {}\nregion small {}\nallow l to map-ro region\nallow l to connect vsock of l\n\
         limit l to map-ro region at 3 pages\nlimit l to connect vsock of any at 2 open";
    let (enforcement, vms) = of(text, &[(1, "l"), (2, "l")]);
    enforcement.region_size("big", 3 * 4096);
    enforcement.region_size("small", 4096);
    let gatekeeper = enforcement.gatekeeper();
    let open = |name| gatekeeper.open(vms[0].into(), None, map(name, Access::ReadOnly));
    let big = open("big").unwrap();
    let refusal = open("small").unwrap_err();
    assert!(refusal.reason().contains("(quota)") && refusal.reason().contains("at 3 pages"), "{refusal}");
    drop(big);
    let _small = open("small").unwrap();
    open("big").unwrap_err();
    let connect = || gatekeeper.open(vms[0].into(), Some(vms[1].into()), VsockConnect { port: 1 });
    let rights = [connect().unwrap(), connect().unwrap()];
    assert!(connect().unwrap_err().reason().contains("at 2 open"));
    drop(rights);
    drop(connect().unwrap());
}

#[test]
fn a_balloon_keeps_to_its_rate() {
    #[derive(Default)]
    struct Released(AtomicU64);
    impl MemoryRelease for Released {
        fn release(&self, _: GuestAddress, len: u64) -> io::Result<()> {
            self.0.fetch_add(len, Ordering::SeqCst);
            Ok(())
        }
    }
    let text = "labels l, m\nallow l to use balloon\nlimit l to use balloon at 8 KiB per hour burst 8 KiB";
    let (enforcement, vms) = of(text, &[(1, "l"), (2, "m")]);
    let released = Arc::new(Released::default());
    let balloon =
        |vm| PolicedBalloon::new(&enforcement, enforcement.subject(vm).unwrap(), Arc::clone(&released));
    let (allowed, refused) = (balloon(vms[0]), balloon(vms[1]));
    assert!(refused.release(GuestAddress(0), 4096).is_err());
    for page in 0..2 {
        allowed.release(GuestAddress(page * 4096), 4096).unwrap();
    }
    assert!(allowed.release(GuestAddress(8192), 4096).is_err());
    assert_eq!(released.0.load(Ordering::SeqCst), 8192);
    allowed.reclaim(GuestAddress(0), 4096).unwrap();
}

#[test]
fn as_much_is_plugged_as_a_limit_says() {
    let text = "labels l\nallow l to attach hotplug device\nlimit l to attach hotplug at 2 open";
    let (enforcement, vms) = of(text, &[(1, "l")]);
    let plug = |what| enforcement.plug(vms[0], what);
    assert!(plug("cpu").unwrap_err().reason().contains("no rule allows it"));
    assert!(enforcement.plug(VmIdentity::new(9, 1), "device").is_err());
    let (one, two) = (plug("device").unwrap(), plug("device").unwrap());
    assert!(plug("device").unwrap_err().reason().contains("at 2 open"));
    drop(one);
    let three = plug("device").unwrap();
    let unplugged = Arc::new(AtomicU64::new(0));
    for hold in [&two, &three] {
        let counts = Arc::clone(&unplugged);
        hold.on_revoked(move || {
            counts.fetch_add(1, Ordering::SeqCst);
        });
    }
    enforcement.reload(Policy::parse("labels l").unwrap()).unwrap();
    assert_eq!(unplugged.load(Ordering::SeqCst), 2);
}

#[test]
fn a_folder_is_shared_as_the_policy_says_until_it_says_otherwise() {
    let text = "labels one, two\nallow one to attach share docs\nallow two to attach-ro share docs";
    let (enforcement, vms) = of(text, &[(1, "one"), (2, "two")]);
    let why = |refused: Result<_, Refusal>| refused.unwrap_err().reason().to_owned();
    let hold = enforcement.share(vms[0], "docs", Access::ReadWrite).unwrap();
    let reads = enforcement.share(vms[1], "docs", Access::ReadOnly).unwrap();
    assert!(why(enforcement.share(vms[1], "docs", Access::ReadWrite)).contains("no rule allows it"));
    assert!(why(enforcement.share(vms[0], "other", Access::ReadOnly)).contains("no rule allows it"));
    assert!(
        why(enforcement.share(VmIdentity::new(9, 1), "docs", Access::ReadOnly)).contains("not registered")
    );
    let ended = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&ended);
    hold.on_revoked(move || {
        counts.fetch_add(1, Ordering::SeqCst);
    });
    enforcement.reload(Policy::parse("labels one, two\nallow two to attach-ro share docs").unwrap()).unwrap();
    assert_eq!(ended.load(Ordering::SeqCst), 1);
    assert!(!hold.is_live() && reads.is_live());
}

#[test]
fn a_paravirtual_guest_reaches_the_domains_that_the_policy_names() {
    let text = "labels front, back, third\nallow front to connect event-channel of back\nallow back to map-rw grant of front\n\
         allow front to connect event-channel of third";
    let (enforcement, vms) = of(text, &[(1, "front"), (2, "back"), (3, "third")]);
    let subject = |index: usize| enforcement.subject(vms[index]).unwrap();
    let gate = XenGate::new(&enforcement, subject(0), [(1, subject(1)), (2, subject(2))]);
    assert!(gate.may_reach(0), "the monitor's own");
    assert!(gate.may_reach(1));
    assert!(!gate.may_reach(2), "half of what it takes");
    assert!(!gate.may_reach(3), "nobody");
    enforcement.reload(Policy::parse("labels front, back, third").unwrap()).unwrap();
    assert!(!gate.may_reach(1));
}
