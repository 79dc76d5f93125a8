//! On a tap device in a network namespace of the test's own.

use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::channel::{AllowAll, Gatekeeper, Party, VmIdentity};

fn gatekeeper() -> (Gatekeeper, Grant<NetworkAttach>) {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let vm = Party::Vm(VmIdentity::new(1, 1));
    let grant = gatekeeper.open(vm, None, NetworkAttach { network: "lan".into() }).unwrap();
    (gatekeeper, grant)
}

/// Runs the test in a process and a network namespace of its own, where `commands` have made what it needs; `false` there.
fn elsewhere(test: &str, commands: &str) -> bool {
    const INSIDE: &str = "VMM_DEVICES_TAP_TEST";
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let possible = Command::new("unshare")
        .args(["-n", "sh", "-c", "ip tuntap add dev probe mode tap"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !possible.is_ok_and(|status| status.success()) {
        println!("{test}: skipped: no network namespace, no ip(8) or no tap device to be had");
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let line = format!("set -e; {commands}; exec \"$0\" --exact --nocapture net::tap::tests::{test}");
    let mut command = Command::new("unshare");
    command.args(["-n", "sh", "-c", &line]).arg(program).env(INSIDE, "1");
    let status = command.status().unwrap();
    assert!(status.success(), "{status}");
    true
}

struct Deaf;

impl NetEvents for Deaf {
    fn ready(&self, _: u16) {}
    fn link_changed(&self) {}
}

fn attach(tap: &Tap, pairs: u16, receive: Offloads) -> Vec<Box<dyn NetPort>> {
    let agreed = Agreed { receive, ..Agreed::new(pairs) };
    tap.attach(&agreed, Arc::new(Deaf)).unwrap()
}

/// The next frame for which `wanted`: the kernel sends some of its own.
fn await_frame(port: &mut dyn NetPort, wanted: impl Fn(&[u8]) -> bool) -> (PacketInfo, Vec<u8>) {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < Duration::from_secs(10), "no frame comes");
        // Two pieces, so that it is one that is scattered.
        let (mut first, mut second) = (vec![0; 20], vec![0; 70_000]);
        let slices = [VolatileSlice::from(&mut *first), VolatileSlice::from(&mut *second)];
        if let Some(Received { info, len }) = port.receive(&slices).unwrap() {
            let frame = [first, second].concat()[..len].to_vec();
            if wanted(&frame) {
                return (info, frame);
            }
        }
    }
}

/// Waits until the host lets frames through, which it does some time after somebody has attached, and forgets what comes until then.
fn settle(port: &mut dyn NetPort) {
    let begun = Instant::now();
    let mut buffer = vec![0; 70_000];
    let mut last = Instant::now();
    let mut came = false;
    while !came || last.elapsed() < Duration::from_millis(100) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the device does not come up");
        if !came {
            let host = UdpSocket::bind("10.0.2.1:0").unwrap();
            host.send_to(b"is somebody there?", "10.0.2.2:9").unwrap();
        }
        match port.receive(&[VolatileSlice::from(&mut *buffer)]).unwrap() {
            Some(Received { len, .. }) => {
                came |= is_udp(&buffer[..len]);
                last = Instant::now();
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Whether it is of UDP over IPv4.
fn is_udp(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0] && frame[23] == 17
}

const ONE: &str = "ip tuntap add dev t0 mode tap; ip link set t0 mtu 1400; ip addr add 10.0.2.1/24 dev t0; \
                   ip neigh add 10.0.2.2 lladdr 52:54:00:00:00:01 dev t0; ip link set t0 up";

#[test]
fn frames_go_to_the_host_and_come_from_it() {
    if elsewhere("frames_go_to_the_host_and_come_from_it", ONE) {
        return;
    }
    let (gatekeeper, grant) = gatekeeper();
    let id = grant.id();
    let tap = Tap::open(grant, "t0", NonZeroU16::MIN).unwrap();
    assert_eq!((tap.name(), tap.mtu(), tap.max_pairs(), tap.link().up), ("t0", Some(1400), 1, true));
    assert!(tap.transmit_offloads().contains(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6));
    let mut port = attach(&tap, 1, Offloads::CSUM).pop().unwrap();
    settle(&mut *port);
    let host = UdpSocket::bind("10.0.2.1:7").unwrap();
    host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    host.send_to(b"to the guest", "10.0.2.2:9").unwrap();
    let (info, frame) = await_frame(&mut *port, is_udp);
    assert_eq!(frame[..6], [0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!(&frame[42..], b"to the guest");
    // The host leaves the checksum to the guest, which has agreed to that.
    assert_eq!(info.checksum.map(|sum| (sum.start, sum.offset)), Some((34, 6)));

    // The way back, with the checksum left to the host.
    let mut answer = frame.clone();
    answer[0..6].copy_from_slice(&frame[6..12]);
    answer[6..12].copy_from_slice(&frame[0..6]);
    answer[26..30].copy_from_slice(&frame[30..34]);
    answer[30..34].copy_from_slice(&frame[26..30]);
    answer[34..36].copy_from_slice(&frame[36..38]);
    answer[36..38].copy_from_slice(&frame[34..36]);
    answer[42..].copy_from_slice(b"to the host!");
    let mut send = |port: &mut dyn NetPort, info: &PacketInfo| {
        let (first, second) = answer.split_at_mut(33);
        port.transmit(info, &[VolatileSlice::from(first), VolatileSlice::from(second)])
    };
    assert_eq!(send(&mut *port, &info).unwrap(), Sent::Done);
    let mut got = [0; 100];
    assert_eq!(host.recv(&mut got).map(|len| got[..len].to_vec()).unwrap(), b"to the host!");

    // For a guest that takes nothing over, the host does it itself.
    tap.set_receive_offloads(Offloads::NONE).unwrap();
    host.send_to(b"to the guest", "10.0.2.2:9").unwrap();
    assert_eq!(await_frame(&mut *port, is_udp).0, PacketInfo::default());

    // What came for an earlier driver is not for the next.
    host.send_to(b"too late", "10.0.2.2:9").unwrap();
    drop(port);
    let mut port = attach(&tap, 1, Offloads::NONE).pop().unwrap();
    host.send_to(b"in time", "10.0.2.2:9").unwrap();
    assert_eq!(&await_frame(&mut *port, is_udp).1[42..], b"in time");

    // The kernel has the last word on what it is told of a frame.
    let beyond = crate::net::Checksum { start: 0xff00, offset: 0 };
    let error =
        send(&mut *port, &PacketInfo { checksum: Some(beyond), ..PacketInfo::default() }).unwrap_err();
    assert!(matches!(error, NetError::Host(error) if error.kind() == io::ErrorKind::InvalidInput));

    // A right that is taken back.
    gatekeeper.revoke(id);
    assert!(!tap.link().up);
    assert!(matches!(send(&mut *port, &info), Err(NetError::Revoked)));
    host.send_to(b"nobody", "10.0.2.2:9").unwrap();
    let mut buffer = [0; 100];
    assert_eq!(port.receive(&[VolatileSlice::from(&mut buffer[..])]).unwrap(), None);
}

const SEVERAL: &str = "ip tuntap add dev t0 mode tap multi_queue; ip addr add 10.0.2.1/24 dev t0; \
                       ip neigh add 10.0.2.2 lladdr 52:54:00:00:00:01 dev t0; ip link set t0 up";

#[test]
fn frames_come_by_the_queues_that_are_in_use() {
    if elsewhere("frames_come_by_the_queues_that_are_in_use", SEVERAL) {
        return;
    }
    let tap = Tap::open(gatekeeper().1, "t0", NonZeroU16::new(4).unwrap()).unwrap();
    let mut ports = attach(&tap, 4, Offloads::CSUM);
    let by_queue = |ports: &mut Vec<Box<dyn NetPort>>| {
        let mut counts = [0; 4];
        for port in 0..200_u16 {
            let host = UdpSocket::bind("10.0.2.1:0").unwrap();
            host.send_to(b"x", ("10.0.2.2", 1000 + port)).unwrap();
        }
        let mut buffer = vec![0; 70_000];
        for (port, count) in ports.iter_mut().zip(&mut counts) {
            while let Ok(Some(Received { len, .. })) = port.receive(&[VolatileSlice::from(&mut *buffer)]) {
                *count += usize::from(is_udp(&buffer[..len]));
            }
        }
        assert_eq!(counts.iter().sum::<usize>(), 200, "{counts:?}");
        counts
    };
    settle(&mut *ports[0]);
    assert_eq!(by_queue(&mut ports), [200, 0, 0, 0]);
    tap.set_pairs(4).unwrap();
    let counts = by_queue(&mut ports);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    tap.set_pairs(2).unwrap();
    let counts = by_queue(&mut ports);
    assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
    for pairs in [0, 5] {
        assert!(matches!(tap.set_pairs(pairs), Err(NetError::Pairs { most: 4, .. })));
    }
    // A driver that comes anew has one.
    drop(ports);
    let mut ports = attach(&tap, 4, Offloads::NONE);
    assert_eq!(by_queue(&mut ports), [200, 0, 0, 0]);
}

#[test]
fn what_is_no_tap_device_is_refused_with_a_way_out() {
    let open = |name: &str, queues| {
        Tap::open(gatekeeper().1, name, NonZeroU16::new(queues).unwrap()).unwrap_err().to_string()
    };
    for name in ["", "a/b", "a b", "sixteen-bytes-16", "..", "a:1", "tap%d"] {
        assert!(open(name, 1).contains("is no name of a network device"), "{name}");
    }
    assert!(open("nobody-has-it", 1).contains("ip tuntap add dev NAME mode tap"));
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = Tap::from_descriptors(gatekeeper().1, vec![null.into()]).unwrap_err();
    assert!(error.to_string().contains("asking what it is"), "{error}");
    assert!(matches!(Tap::from_descriptors(gatekeeper().1, vec![]), Err(NetError::Pairs { .. })));
    let commands = "ip tuntap add dev t0 mode tap; ip tuntap add dev t1 mode tap multi_queue; ip tuntap add dev n0 mode tun";
    if elsewhere("what_is_no_tap_device_is_refused_with_a_way_out", commands) {
        return;
    }
    assert!(open("t0", 2).contains("it was made for another number of queues"));
    assert!(open("lo", 1).contains("lo"));
    assert!(open("n0", 1).contains("n0"));
    let first = Tap::open(gatekeeper().1, "t0", NonZeroU16::MIN).unwrap();
    assert!(open("t0", 1).contains("somebody is attached to it already"));
    drop(first);
    // One made for several takes one.
    let tap = Tap::open(gatekeeper().1, "t1", NonZeroU16::MIN).unwrap();
    assert_eq!(attach(&tap, 1, Offloads::NONE).len(), 1);
    // A descriptor that another has opened.
    let again = tap.device.queues[0].try_clone().unwrap();
    let tap = Tap::from_descriptors(gatekeeper().1, vec![again]).unwrap();
    assert_eq!((tap.name(), tap.max_pairs(), tap.mtu()), ("t1", 1, None));
}
