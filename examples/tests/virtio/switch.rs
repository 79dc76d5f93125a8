//! Guests that a switch joins: programs of their own, and one more that has the switch.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Guest, linux};

/// Does what it is told, line by line. Descriptor 5 never ends: a listener whose input ends hangs up.
const OBEY: &str = "mkfifo /open; exec 5<>/open; while read -r line <&3; do eval \"$line\" >&3 2>&1; done";

/// Bytes each way.
const DATA: &str = "bs=64k count=48";

/// `net_switch`, which listens.
struct Broker {
    child: Child,
    commands: ChildStdin,
    lines: BufReader<ChildStdout>,
    directory: tempfile::TempDir,
}

impl Broker {
    fn start(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::at(directory, options)
    }

    fn at(directory: tempfile::TempDir, options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_net_switch"))
            .arg("--socket")
            .arg(directory.path().join("lan"))
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, lines) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut broker = Self { child, commands, lines, directory };
        broker.hears("listening at");
        broker
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("lan")
    }

    /// Waits for a line that has that in it.
    fn hears(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it ended before {text:?}");
            if line.contains(text) {
                return line;
            }
        }
    }

    fn command(&mut self, line: &str) {
        writeln!(self.commands, "{line}").unwrap();
    }

    /// Ends it as whoever started it does.
    fn end(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

fn guest(transport: &str, path: &Path, number: u32, options: &str) -> Option<Guest> {
    let mut linux = linux("switch", transport)?;
    let net = format!("switch={},name=g{number},mac=52:54:00:00:00:0{number}{options}", path.display());
    linux.args(["--memory", "128", "--net", &net]);
    Some(Guest::start(linux, OBEY))
}

fn ask(guest: &mut Guest, line: &str) -> String {
    guest.say(line);
    guest.hear()
}

fn address(guest: &mut Guest, number: u32) {
    let line = format!(
        "ip link set eth0 up; ip addr add 10.9.0.{number}/24 dev eth0; echo has $(cat /sys/class/net/eth0/carrier)"
    );
    assert_eq!(ask(guest, &line), "has 1");
}

/// Random data from one guest to the other over TCP, to the port of that number.
fn sends(from: &mut Guest, to: &mut Guest, number: u32, port: u32) {
    to.say(&format!("nc -l -p {port} <&5 >got; sha256sum <got"));
    from.say(&format!("dd if=/dev/urandom of=data {DATA} 2>/dev/null; sha256sum <data"));
    let sum = from.hear();
    assert!(sum.ends_with("  -") && sum.len() == 67, "{sum}");
    assert_eq!(
        ask(
            from,
            &format!("until nc 10.9.0.{number} {port} <data; do sleep 0.2; done 2>/dev/null; echo sent")
        ),
        "sent"
    );
    assert_eq!(to.hear(), sum, "what arrived is something else");
}

#[test]
fn tcp_between_guests_over_mmio() {
    tcp_between_guests("mmio", true);
}

#[test]
fn tcp_between_guests_over_pci() {
    tcp_between_guests("pci", false);
}

/// Two guests of one VLAN and, where that is asked for, one of another, who hears nothing of them.
fn tcp_between_guests(transport: &str, stranger: bool) {
    let mut broker = Broker::start(&["--vlan", "g1=7", "--vlan", "g2=7", "--vlan", "g3=8"]);
    let path = broker.path();
    let Some(mut one) = guest(transport, &path, 1, "") else { return };
    // Without offloads: what the first one leaves to others is done by the switch.
    let mut two = guest(transport, &path, 2, if stranger { "" } else { ",offloads=off" }).unwrap();
    let mut three = stranger.then(|| guest(transport, &path, 3, "").unwrap());
    address(&mut one, 1);
    address(&mut two, 2);
    if let Some(three) = &mut three {
        address(three, 3);
    }
    sends(&mut one, &mut two, 2, 5000);
    sends(&mut two, &mut one, 1, 5001);
    if let Some(mut three) = three {
        let heard = ask(
            &mut three,
            "ping -c 3 -W 1 10.9.0.1 >/dev/null; echo $? $(cat /sys/class/net/eth0/statistics/rx_packets)",
        );
        assert_eq!(heard, "1 0", "answers, and frames that it heard");
        three.say("exit 0");
        three.output();
    }
    broker.command("macs");
    broker.hears("mac 52:54:00:00:00:01 VLAN 7");
    for guest in [&mut one, &mut two] {
        guest.say("exit 0");
    }
    one.output();
    two.output();
    let left = [broker.hears("left g"), broker.hears("left g")].concat();
    assert!(!left.contains("spoofed"), "{left}");
    broker.end();
}

/// A guest whose right is taken back sees its cable pulled, and is back when it has it again; so it is when the switch ends.
#[test]
fn a_guest_sees_a_revocation_and_the_end_of_the_switch() {
    let mut broker = Broker::start(&[]);
    let path = broker.path();
    let Some(mut one) = guest("mmio", &path, 1, ",reconnect=on") else { return };
    let mut two = guest("mmio", &path, 2, ",reconnect=on").unwrap();
    address(&mut one, 1);
    address(&mut two, 2);
    let reaches = |guest: &mut Guest, number: u32| {
        let ping = format!("until ping -c 1 -W 1 10.9.0.{number}; do :; done >/dev/null; echo reached");
        assert_eq!(ask(guest, &ping), "reached");
    };
    let carrier = |guest: &mut Guest, value: u32| {
        let line = format!(
            "until [ $(cat /sys/class/net/eth0/carrier) = {value} ]; do sleep 0.1; done; echo is {value}"
        );
        assert_eq!(ask(guest, &line), format!("is {value}"));
    };
    reaches(&mut one, 2);
    broker.command("revoke g1");
    broker.hears("revoked 1 of g1");
    carrier(&mut one, 0);
    let lost = ask(&mut two, "ping -c 2 -W 1 10.9.0.1 >/dev/null; echo $?");
    assert_eq!(lost, "1");
    broker.hears("g1 was sent away");
    broker.command("allow g1");
    broker.hears("attached g1");
    carrier(&mut one, 1);
    reaches(&mut one, 2);

    // Killed, so that it says nothing to anybody.
    broker.child.kill().unwrap();
    broker.child.wait().unwrap();
    carrier(&mut one, 0);
    carrier(&mut two, 0);
    let mut broker = Broker::at(broker.directory, &[]);
    broker.hears("attached g");
    broker.hears("attached g");
    carrier(&mut one, 1);
    carrier(&mut two, 1);
    reaches(&mut two, 1);
    for guest in [&mut one, &mut two] {
        guest.say("exit 0");
    }
    one.output();
    two.output();
    broker.end();
}

#[test]
fn who_is_not_on_the_list_hears_so() {
    let mut broker = Broker::start(&["--allow", "g2"]);
    let Some(mut linux) = linux("switch", "mmio") else { return };
    let net = format!("switch={},name=g1", broker.path().display());
    let output = linux.args(["--memory", "128", "--net", &net, "--command", "true"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{errors}");
    assert!(errors.contains("g1 is not on the list"), "{errors}");
    broker.hears("refused g1");
    broker.command("nonsense");
    broker.hears("is none of ports");
    broker.end();
}
