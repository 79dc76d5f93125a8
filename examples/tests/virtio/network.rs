//! Network devices: TCP between a guest and this machine over a tap device in a network namespace of the test's own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::guest::{Guest, connect, linux, sha256, wait_for};

/// Bytes of each transfer: many times what buffers on the way hold.
const DATA: usize = 8 << 20;

const HOST: &str = "10.0.2.1";

/// Runs the test in a process and a network namespace of its own, where `commands` have made what it needs; `false` there, and `true` here,
/// where it is over.
fn elsewhere(test: &str, commands: &str) -> bool {
    const INSIDE: &str = "VMM_EXAMPLES_NETWORK_TEST";
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let mut probe = Command::new("unshare");
    probe.args(["--net", "sh", "-c", "ip tuntap add dev probe mode tap multi_queue"]);
    let probe = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!(
            "{test}: skipped: no network namespace, no ip(8) or no tap device to be had (it takes root)"
        );
        return true;
    }
    // Debian's packages come by the network that is not there.
    if linux(test, "pci").is_none() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let line =
        format!("set -e; ip link set lo up; {commands}; exec \"$0\" --exact --nocapture network::{test}");
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", &line]).arg(program).env(INSIDE, "1");
    assert!(command.status().unwrap().success());
    true
}

fn tap(name: &str, more: &str) -> String {
    format!(
        "ip tuntap add dev {name} mode tap {more}; ip addr add {HOST}/24 dev {name}; ip link set {name} up"
    )
}

fn data() -> Vec<u8> {
    (0..DATA as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// What the guest does first: its address, and a network that answers.
const UP: &str = "
    ip link set eth0 up; ip addr add 10.0.2.2/24 dev eth0
    until ping -c 1 -W 1 10.0.2.1 >/dev/null 2>&1; do sleep 0.2; done";

/// A client of the guest's, which comes when it is told to.
fn accept(listener: &TcpListener) -> TcpStream {
    let (client, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), "10.0.2.2");
    client.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    client.set_write_timeout(Some(Duration::from_secs(120))).unwrap();
    client
}

fn tcp_both_ways(transport: &str, option: &str, with_offloads: bool) {
    let Some(mut command) = linux("network", transport) else { return };
    command.args(["--memory", "128", "--net", option]);
    let [down, up] = [7001, 7002].map(|port| TcpListener::bind((HOST, port)).unwrap());
    let line = format!(
        "{UP}
        nc 10.0.2.1 7001 </dev/null | tee data | sha256sum >&3
        nc 10.0.2.1 7002 <data
        cat /sys/class/net/eth0/statistics/tx_packets /sys/class/net/eth0/statistics/rx_packets >&3
        cat /sys/class/net/eth0/device/features >&3
        nc -l -p 7003 | sha256sum >&3; read looked <&3"
    );
    let mut guest = Guest::start(command, &line);
    let data = data();
    let mut client = accept(&down);
    client.write_all(&data).unwrap();
    drop(client);
    assert_eq!(guest.hear(), sha256(&data[..]));
    let mut back = Vec::new();
    accept(&up).read_to_end(&mut back).unwrap();
    assert!(back == data, "{} bytes came back", back.len());
    let [sent, received] = [(); 2].map(|()| guest.hear().parse::<usize>().unwrap());
    let features = guest.hear();
    // Frames that are cut by the other side are few; others have 1500 bytes each.
    let most = DATA / 1500;
    assert_eq!(sent < most, with_offloads, "{sent} sent, {received} received, {features}");
    assert_eq!(received < most, with_offloads, "{sent} sent, {received} received, {features}");
    assert_eq!(features.starts_with('1'), with_offloads, "{features}");
    // To a server in the guest.
    let mut client = wait_for("the guest's server", || TcpStream::connect("10.0.2.2:7003").ok());
    client.write_all(&data).unwrap();
    drop(client);
    assert_eq!(guest.hear(), sha256(&data[..]));
    let figures = guest.figures();
    for activity in ["read", "write"] {
        assert!(figures.of("transferred_bytes", "net0", activity) > DATA as f64, "{figures:?}");
    }
    assert_eq!(figures.get("virtio_net_dropped_frames_total{device=\"net0\",reason=\"refused\"}"), 0.0);
    guest.say("looked");
    guest.output();
}

macro_rules! tests {
    ($($name:ident: $transport:literal, $option:literal, $offloads:literal;)*) => {
        $(#[test]
        fn $name() {
            if !elsewhere(stringify!($name), &tap("t0", "")) {
                tcp_both_ways($transport, $option, $offloads);
            }
        })*
    };
}

tests! {
    data_goes_both_ways_over_mmio: "mmio", "tap=t0", true;
    data_goes_both_ways_over_pci: "pci", "tap=t0", true;
    data_goes_both_ways_without_offloads_over_mmio: "mmio", "tap=t0,offloads=off", false;
    data_goes_both_ways_without_offloads_over_pci: "pci", "tap=t0,offloads=off", false;
}

/// Two vCPUs with a pair of queues each, which both are used.
#[test]
fn several_queues_share_the_work() {
    if elsewhere("several_queues_share_the_work", &tap("t0", "multi_queue")) {
        return;
    }
    for transport in ["mmio", "pci"] {
        let Some(mut command) = linux("queues", transport) else { return };
        command.args(["--memory", "160", "--cpus", "2", "--net", "tap=t0,queues=2,mac=52:54:00:00:00:07"]);
        let listener = TcpListener::bind((HOST, 7001)).unwrap();
        // Each client on a processor of its own.
        let line = format!(
            "{UP}
            cat /sys/class/net/eth0/address >&3
            ls /sys/class/net/eth0/queues | tr '\\n' ' ' >&3; echo >&3
            for cpu in 0 1 0 1; do taskset $((1 << cpu)) nc 10.0.2.1 7001 </dev/null | sha256sum & done | cat >&3
            grep -cE 'virtio[0-9]+-(input|output)\\.[01]$' /proc/interrupts >&3; read looked <&3"
        );
        let mut guest = Guest::start(command, &line);
        assert_eq!(guest.hear(), "52:54:00:00:00:07");
        assert_eq!(guest.hear().trim(), "rx-0 rx-1 tx-0 tx-1");
        let data = data();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let mut client = accept(&listener);
                let data = &data;
                scope.spawn(move || client.write_all(data).unwrap());
            }
        });
        for _ in 0..4 {
            assert_eq!(guest.hear(), sha256(&data[..]));
        }
        let interrupts: u32 = guest.hear().parse().unwrap();
        assert_eq!(interrupts, if transport == "pci" { 4 } else { 0 }, "{transport}");
        guest.say("looked");
        guest.output();
    }
}

/// A cable that is pulled out while the guest looks, and what it does when it has moved.
#[test]
fn the_guest_sees_its_cable() {
    if elsewhere("the_guest_sees_its_cable", &tap("t0", "")) {
        return;
    }
    for transport in ["mmio", "pci"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cable");
        let Some(mut command) = linux("cable", transport) else { return };
        command.args(["--memory", "128", "--net", &format!("tap=t0,cable={}", path.display())]);
        let line = format!(
            "{UP}
            echo up >&3; read looked <&3
            until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done
            ping -c 1 -W 1 10.0.2.1 >/dev/null 2>&1 || echo cut off >&3; read looked <&3
            until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done
            until ping -c 1 -W 1 10.0.2.1 >/dev/null 2>&1; do sleep 0.2; done
            echo up again >&3; read looked <&3"
        );
        let mut guest = Guest::start(command, &line);
        let cable = connect(&path);
        let mut answers = BufReader::new(cable.try_clone().unwrap());
        let mut say = |word: &str| {
            (&cable).write_all(format!("{word}\n").as_bytes()).unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            assert_eq!(answer, "ok\n", "{word}");
        };
        let link = |guest: &Guest| guest.figures().get("virtio_net_link_up{device=\"net0\"}");
        assert_eq!((guest.hear(), link(&guest)), ("up".to_owned(), 1.0));
        say("announce");
        say("down");
        guest.say("looked");
        assert_eq!((guest.hear(), link(&guest)), ("cut off".to_owned(), 0.0));
        say("up");
        guest.say("looked");
        assert_eq!((guest.hear(), link(&guest)), ("up again".to_owned(), 1.0));
        guest.say("looked");
        guest.output();
    }
}
