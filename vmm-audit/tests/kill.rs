//! Processes that are killed while they write: emitter, collector, both, at each step and at random moments. Whatever was
//! acknowledged is in the log, once, and the log is intact.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]
#![cfg(feature = "collector")]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{ORIGIN, OnDisk, decision};
use vmm_audit::collector::{Collector, CollectorOptions, RingOptions, Step, attach};
use vmm_audit::event::{Event, Kind, Party};
use vmm_audit::gaps::gaps;
use vmm_audit::keys::FileKeys;
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::pipeline::{AuditLog, PipelineOptions};
use vmm_audit::storage::FsStorage;
use vmm_audit::{Entries, Item};

const LONG: Duration = Duration::from_secs(120);
const ROLE: &str = "VMM_AUDIT_TEST_ROLE";
const DIR: &str = "VMM_AUDIT_TEST_DIR";
const STEP: &str = "VMM_AUDIT_TEST_STEP";
const PIECE: &str = "VMM_AUDIT_TEST_PIECE";

fn kill_self() -> ! {
    let pid = rustix::process::getpid();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Not a test: what the processes run that the tests start. Without their environment it does nothing.
#[test]
fn process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let dir = std::path::PathBuf::from(std::env::var(DIR).unwrap());
    let options = || LogOptions::new().segment_bytes(1 << 16);
    let storage = || Arc::new(FsStorage::create(dir.join("log")).unwrap());
    let keys = || Box::new(FileKeys::new(dir.join("keys")));
    match role.as_str() {
        // Writes into a log of its own, and says what was acknowledged.
        "writer" => {
            let (log, _) =
                AuditLog::open(storage(), keys(), ORIGIN, options(), PipelineOptions::new()).unwrap();
            let emitter = log.emitter(Party::host("writer"));
            for n in 0.. {
                for m in 0..20 {
                    emitter.emit(&Event::new(Kind::Traffic).amount(0, m)).unwrap();
                }
                let Ok(receipt) = emitter.admit(&decision(n)) else { continue };
                say(receipt.wait(LONG).unwrap().unwrap());
            }
        }
        "emitter" => {
            let options = RingOptions::default().rings(64, 64);
            let attached = attach(dir.join("socket"), &Party::host("emitter"), options, LONG).unwrap();
            let emitter = attached.emitter();
            for n in 0.. {
                drop(emitter.emit(&Event::new(Kind::Traffic).amount(0, n)));
                let receipt = emitter.admit(&decision(n)).unwrap();
                receipt.wait(LONG).unwrap();
                say(n);
            }
        }
        "collector" => {
            let die_at: u64 = std::env::var(STEP).ok().and_then(|step| step.parse().ok()).unwrap_or(u64::MAX);
            let (log, _) = LogWriter::open(storage(), keys(), ORIGIN, options()).unwrap();
            let steps = AtomicU64::new(0);
            let step = move |_: Step| {
                if steps.fetch_add(1, Ordering::Relaxed) == die_at {
                    kill_self();
                }
            };
            let collector = Collector::bind(dir.join("socket"), log, CollectorOptions::default()).unwrap();
            say(0);
            collector.on_step(step).run(&AtomicBool::new(false)).unwrap();
        }
        role => panic!("{role}"),
    }
}

fn say(n: u64) {
    let mut out = std::io::stdout().lock();
    // The other end may be gone.
    writeln!(out, "acknowledged {n}").and_then(|()| out.flush()).ok();
}

struct Process {
    child: Child,
    said: std::sync::mpsc::Receiver<u64>,
}

impl Process {
    fn start(role: &str, dir: &Path, step: Option<u64>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process", "--nocapture"]).env(ROLE, role).env(DIR, dir);
        if let Some(step) = step {
            command.env(STEP, step.to_string());
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (tell, said) = std::sync::mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if let Some(n) = line.split("acknowledged ").nth(1).and_then(|n| n.parse().ok()) {
                    tell.send(n).ok();
                }
            }
        });
        Self { child, said }
    }

    fn wait_for_word(&self) -> u64 {
        self.said.recv_timeout(LONG).unwrap()
    }

    /// Kills it, and returns the last number that it has said.
    fn kill(mut self) -> Vec<u64> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        self.said.iter().collect()
    }

    fn died(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

/// All decisions in the log, by their request digests; none is there twice.
fn decisions(disk: &OnDisk) -> Vec<vmm_audit::Digest> {
    let mut entries = Entries::new(disk.storage());
    let mut found = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        match item {
            Item::Entry(entry) => found.extend(entry.event.unwrap().request.filter(|_| entry.source != 0)),
            Item::Damage { place, why, .. } => panic!("{place}: {why}"),
            _ => {}
        }
    }
    found
}

/// Opens the log as a writer would, and closes it.
fn recover(disk: &OnDisk) {
    disk.open(LogOptions::new()).close().unwrap();
    let result = disk.verify(false);
    assert!(result.intact, "{:?}", result.findings);
}

/// How often the long tests kill, and from which random number on: `250/2` has them do 250, and others than `250/1`.
fn piece() -> (u64, u64) {
    let said = std::env::var(PIECE).unwrap_or_else(|_| "1000/0".to_owned());
    let (times, number) = said.split_once('/').unwrap();
    (times.parse().unwrap(), number.parse().unwrap())
}

fn writer_killed((times, piece): (u64, u64)) {
    let disk = OnDisk::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15 ^ piece;
    let mut acknowledged = Vec::new();
    for round in 0..times {
        let writer = Process::start("writer", disk.folder.path(), None);
        acknowledged.push(writer.wait_for_word());
        std::thread::sleep(Duration::from_micros(random(&mut seed) % 30_000));
        acknowledged.extend(writer.kill());
        if round % 50 == 49 || round + 1 == times {
            recover(&disk);
        }
    }
    // Sequence numbers that were acknowledged are those of decisions.
    let mut entries = Entries::new(disk.storage());
    let mut decided = std::collections::BTreeSet::new();
    while let Some(item) = entries.next().unwrap() {
        if let Item::Entry(entry) = item
            && entry.event.unwrap().kind == Kind::Decision
        {
            decided.insert(entry.seq);
        }
    }
    for seq in &acknowledged {
        assert!(decided.contains(seq), "entry {seq} was acknowledged");
    }
    assert!(acknowledged.len() as u64 >= times);
}

#[test]
fn a_writer_killed_at_20_random_moments_loses_nothing_acknowledged() {
    writer_killed((20, 0));
}

#[test]
#[ignore = "takes minutes; run it by name"]
fn a_writer_killed_at_1000_random_moments_loses_nothing_acknowledged() {
    writer_killed(piece());
}

/// Collector and emitters are killed in turn, or together.
fn collected_killed((times, piece): (u64, u64)) {
    let disk = OnDisk::new();
    let dir = disk.folder.path();
    let mut seed = 0x1234_5678_9abc_def1 ^ piece;
    let start_collector = || {
        let collector = Process::start("collector", dir, None);
        collector.wait_for_word();
        collector
    };
    let mut collector = start_collector();
    let mut emitter = Process::start("emitter", dir, None);
    // Decisions n that each emitter was told are safe: all up to the last.
    let mut safe = 0u64;
    for round in 0..times {
        safe += 1;
        emitter.wait_for_word();
        std::thread::sleep(Duration::from_micros(random(&mut seed) % 20_000));
        match round % 3 {
            0 => {
                collector.kill();
                collector = start_collector();
            }
            1 => {
                safe += emitter.kill().len() as u64;
                emitter = Process::start("emitter", dir, None);
            }
            _ => {
                safe += emitter.kill().len() as u64;
                collector.kill();
                collector = start_collector();
                emitter = Process::start("emitter", dir, None);
            }
        }
    }
    // The last one may not have found the collector that is there now, which then knows nothing of its end: one more does.
    safe += emitter.kill().len() as u64;
    let emitter = Process::start("emitter", dir, None);
    emitter.wait_for_word();
    safe += 1 + emitter.kill().len() as u64;
    let begun = Instant::now();
    while gaps(disk.storage()).unwrap().accounts.last().is_none_or(|account| !account.ended) {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(20));
    }
    collector.kill();
    recover(&disk);
    let found = decisions(&disk);
    assert!(found.len() as u64 >= safe, "{} in the log, {safe} acknowledged", found.len());
    for account in gaps(disk.storage()).unwrap().accounts {
        // An emitter that is killed may have taken a number for one event and put it nowhere.
        assert!(account.missing <= 1, "{account:?}");
    }
}

#[test]
fn emitter_and_collector_killed_at_12_random_moments_lose_nothing_acknowledged() {
    collected_killed((12, 0));
}

#[test]
#[ignore = "takes minutes; run it by name"]
fn emitter_and_collector_killed_at_1000_random_moments_lose_nothing_acknowledged() {
    collected_killed(piece());
}

/// The collector dies at its n-th step, for each n of a few rounds; the next one goes on, and takes nothing twice.
#[test]
fn a_collector_killed_at_each_step_takes_everything_once() {
    for step in 0..14 {
        let disk = OnDisk::new();
        let dir = disk.folder.path();
        let mut collector = Process::start("collector", dir, Some(step));
        collector.wait_for_word();
        let socket = dir.join("socket");
        let options = RingOptions::default().rings(64, 64);
        let attached = attach(&socket, &Party::host("test"), options, LONG).unwrap();
        let mut receipts = Vec::new();
        let begun = Instant::now();
        let mut sent = 0;
        while !collector.died() {
            assert!(begun.elapsed() < LONG, "step {step}");
            if sent < 30 {
                receipts.push(attached.emitter().admit(&decision(sent)).unwrap());
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(3));
            if sent == 30 && step > 10 {
                break;
            }
        }
        collector.kill();
        let second = Process::start("collector", dir, None);
        second.wait_for_word();
        receipts.push(attached.emitter().admit(&decision(sent)).unwrap());
        for receipt in receipts {
            receipt.wait(LONG).unwrap();
        }
        drop(attached);
        second.kill();
        recover(&disk);
        let found = decisions(&disk);
        let expected: Vec<_> = (0..=sent).map(|n| decision(n).request.unwrap()).collect();
        assert_eq!(found, expected, "step {step}");
    }
}
