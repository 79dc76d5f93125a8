//! Entries in a real systemd journal: one that the test starts, in a mount namespace of its own so that the host's is left alone.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::decision;
use vmm_audit::event::Event;
use vmm_audit::sink::{Delivery, Journald, Sink as _};

const INSIDE: &str = "VMM_AUDIT_TEST_JOURNAL";
const JOURNALD: &str = "/usr/lib/systemd/systemd-journald";
const SOCKET: &str = "/run/systemd/journal/socket";
const COUNT: u64 = 300;
const LONG: Duration = Duration::from_secs(30);

struct Journal(Child);

impl Drop for Journal {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn event(n: u64) -> Event {
    let event = decision(n);
    if n.is_multiple_of(7) { event.reason("first line\nsecond line") } else { event }
}

/// Lines of the journal as JSON.
fn lines() -> Vec<serde_json::Value> {
    let mut command = Command::new("journalctl");
    command.args(["--no-pager", "--quiet", "-o", "json", "-t", "vmm-audit"]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Not a test: what runs in the namespace. Without its environment it does nothing.
#[test]
fn inside() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let mounted = |on: &str| {
        std::fs::create_dir_all(on).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "none", on]).status().unwrap();
        assert!(status.success(), "{on}");
    };
    mounted("/run/systemd");
    mounted("/run/log");
    std::fs::create_dir_all("/run/systemd/journal").unwrap();
    std::fs::create_dir_all("/run/log/journal").unwrap();
    let child =
        Command::new(JOURNALD).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _journal = Journal(child.unwrap());
    let begun = Instant::now();
    while UnixDatagram::unbound().unwrap().connect(SOCKET).is_err() {
        assert!(begun.elapsed() < LONG, "journald does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut sink = Journald::new().unwrap();
    for seq in 0..COUNT {
        sink.send(&Delivery { seq, source: 4, event: event(seq) }).unwrap();
    }
    // It has a rate limit for each service, and tells what it has dropped.
    let begun = Instant::now();
    let lines = loop {
        let lines = lines();
        if lines.len() as u64 == COUNT {
            break lines;
        }
        assert!(begun.elapsed() < LONG, "{} of {COUNT} are in the journal", lines.len());
        std::thread::sleep(Duration::from_millis(100));
    };
    for (seq, line) in (0u64..).zip(&lines) {
        let field = |name: &str| line.get(name).and_then(|value| value.as_str()).unwrap_or_default();
        let expected = event(seq);
        assert_eq!(field("VMM_AUDIT_SEQ"), seq.to_string());
        assert_eq!(field("VMM_AUDIT_KIND"), "decision");
        assert_eq!(field("VMM_AUDIT_VERDICT"), expected.verdict.unwrap().to_string());
        assert_eq!(field("VMM_AUDIT_RULE"), expected.rule.unwrap().as_str());
        assert_eq!(field("VMM_AUDIT_REQUEST"), expected.request.unwrap().to_string());
        assert_eq!(
            field("VMM_AUDIT_REASON"),
            expected.reason.map_or(String::new(), |reason| reason.to_string())
        );
        assert_eq!(field("PRIORITY"), if seq.is_multiple_of(3) { "4" } else { "5" });
        assert_eq!(field("_TRANSPORT"), "journal");
    }
    println!("{COUNT} entries in the journal");
}

#[test]
fn a_real_journal_has_every_field_of_every_entry() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root has a mount namespace with a journal of its own");
    }
    for program in [JOURNALD, "/usr/bin/journalctl", "/usr/bin/unshare"] {
        if !Path::new(program).exists() {
            return println!("skipped: there is no {program}");
        }
    }
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private"]);
    if !unshare.arg("true").status().is_ok_and(|status| status.success()) {
        return println!("skipped: there are no mount namespaces here");
    }
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    inside.args(["--exact", "inside", "--nocapture"]).env(INSIDE, "1");
    let ran = inside.output().unwrap();
    let says = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{says}{errors}");
    assert!(says.contains("300 entries in the journal"), "{says}");
}
