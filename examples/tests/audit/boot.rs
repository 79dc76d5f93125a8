//! `linux --audit`: a guest boots, and its log has the launch, the channels and the end, and verifies with the log's own program.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_audit::event::{Event, Kind, Launch, Outcome, Party, Verdict};
use vmm_audit::note::Verifier;
use vmm_audit::storage::{FsStorage, Storage as _};
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_audit::{Digest, Entries, Item};
use vmm_examples::debian::{self, Series};

/// How long a guest may take. One that takes longer has failed.
const LONGEST_SECONDS: &str = "300";
/// How long a log may take to be closed.
const PATIENCE: Duration = Duration::from_secs(30);

fn linux(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linux"));
    command.args(["--backend", "translate", "--seconds", LONGEST_SECONDS]).args(arguments);
    command.output().unwrap()
}

/// The events, each with its source.
fn events(dir: &Path) -> Vec<(u32, Event)> {
    let storage = Arc::new(FsStorage::existing(dir.join("log")).unwrap());
    let mut entries = Entries::new(storage);
    let mut events = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        match item {
            Item::Entry(found) => events.push((found.source, found.event.unwrap())),
            Item::Damage { place, why, .. } => panic!("{place}: {why}"),
            _ => {}
        }
    }
    events
}

fn key(dir: &Path) -> Verifier {
    std::fs::read_to_string(dir.join("key.pub")).unwrap().trim().parse().unwrap()
}

/// The log's program, which is built here if it is not there yet.
fn program() -> PathBuf {
    let linux = PathBuf::from(env!("CARGO_BIN_EXE_linux"));
    let program = linux.with_file_name("vmm-audit");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("Cargo.toml");
    let (profile, target) = (linux.parent().unwrap(), linux.ancestors().nth(2).unwrap());
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--offline", "-p", "vmm-audit", "--features", "cli", "--bin", "vmm-audit"]);
    cargo.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(target);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success());
    program
}

#[test]
fn a_guest_that_boots_leaves_a_log_that_verifies() {
    let _alone = crate::alone();
    if let Err(error) = debian::kernel(Series::default()) {
        return println!("skipped: {error:#}");
    }
    let folder = tempfile::tempdir().unwrap();
    let (dir, vsock) = (folder.path().join("audit"), folder.path().join("vsock"));
    let (dir_text, vsock) = (dir.to_str().unwrap(), format!("3,{}", vsock.display()));
    let ran = linux(&["--audit", dir_text, "--vsock", &vsock, "--command", "echo it runs; exit 7"]);
    let says = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(7), "{says}");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "it runs\n", "{says}");

    let storage = FsStorage::existing(dir.join("log")).unwrap();
    let result = verify(&storage, &VerifyOptions::new(key(&dir)), &mut |_, _| ()).unwrap();
    assert!(result.intact && result.closed, "{:?}", result.findings);

    let events = events(&dir);
    let (source, launch) = events.iter().find(|(_, event)| event.kind == Kind::Launch).unwrap();
    // The launch is the machine's first event, and its end the last.
    let own: Vec<_> = events.iter().filter(|(other, _)| other == source).map(|(_, event)| event).collect();
    assert_eq!((own[0].kind, own[own.len() - 1].kind), (Kind::Launch, Kind::Shutdown));
    assert!(own.iter().all(|event| event.subject == launch.subject));
    let names: Vec<_> = launch.measured.iter().map(|measured| measured.name.as_str()).collect();
    assert_eq!(names, ["kernel", "initrd", "command-line", "cpu-model", "vmm"]);
    let kernel = std::fs::read(debian::kernel(Series::default()).unwrap().image).unwrap();
    assert_eq!(launch.measured[0].digest, Digest::of(&kernel));
    let again = launch
        .measured
        .iter()
        .fold(Launch::new(), |launch, measured| launch.measure(measured.name.clone(), measured.digest));
    assert_eq!(launch.launch_digest, Some(again.digest()));
    let opened = events.iter().filter(|(_, event)| event.kind == Kind::Opened);
    assert!(opened.clone().all(|(_, event)| event.verdict == Some(Verdict::Allow)) && opened.count() > 0);

    // Who started the program has it launched, which is in the log before the launch is, and after the guest ran.
    let launching = verbs(&events);
    let place = |wanted: &Event| events.iter().position(|(_, event)| event == wanted).unwrap();
    let at = launching.iter().map(|event| place(event)).collect::<Vec<_>>();
    assert!(at.len() == 2 && at[0] < place(launch) && place(launch) < at[1], "{at:?}");
    let told = launching.iter().map(|event| (verb(event), event.outcome));
    assert!(told.eq([("launch", None), ("launch", Some(Outcome::Success))]));

    // And by the program, whose answer is its status.
    let program = program();
    let check = |key: &Path| {
        let mut command = Command::new(&program);
        command.arg("verify").arg(dir.join("log")).arg("--key").arg(key).output().unwrap()
    };
    let good = check(&dir.join("key.pub"));
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stdout));
    let segment = dir.join("log/segments/0000000000");
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let bad = check(&dir.join("key.pub"));
    let says = String::from_utf8_lossy(&bad.stdout);
    assert_eq!(bad.status.code(), Some(1), "{says}");
    assert!(says.contains("segments/0000000000, byte"), "{says}");
}

/// What the user wanted of the machine.
fn verbs(events: &[(u32, Event)]) -> Vec<&Event> {
    let user = Party::host(format!("uid {}", rustix::process::getuid().as_raw()));
    let verbs = events.iter().map(|(_, event)| event).filter(|event| event.kind == Kind::Administration);
    verbs.inspect(|event| assert_eq!(event.subject, Some(user.clone()))).collect()
}

fn verb(event: &Event) -> &str {
    event.object.as_ref().unwrap().name.as_ref().unwrap().as_str()
}

/// A guest that does not end by itself is stopped, which is in the log before its end.
#[test]
fn a_guest_whose_time_is_up_is_stopped_by_whoever_started_it() {
    let _alone = crate::alone();
    if let Err(error) = debian::kernel(Series::default()) {
        return println!("skipped: {error:#}");
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("audit");
    let mut command = Command::new(env!("CARGO_BIN_EXE_linux"));
    command.args(["--backend", "translate", "--seconds", "1", "--audit"]).arg(&dir);
    let ran = command.args(["--command", "sleep 200"]).output().unwrap();
    assert_eq!(ran.status.code(), Some(124), "{}", String::from_utf8_lossy(&ran.stderr));
    let events = events(&dir);
    let verbs = verbs(&events);
    let told = verbs.iter().map(|event| (verb(event), event.outcome));
    let done = Some(Outcome::Success);
    assert!(told.eq([("launch", None), ("launch", done), ("stop", None), ("stop", done)]), "{verbs:?}");
    assert_eq!(verbs[2].get("why"), Some("its time was up"));
    let kinds: Vec<_> = events.iter().map(|(_, event)| (event.kind, event.outcome)).collect();
    let place = |kind, outcome| kinds.iter().rposition(|told| *told == (kind, outcome)).unwrap();
    let end = place(Kind::Shutdown, Some(Outcome::Killed));
    assert!(place(Kind::Administration, None) < end, "{kinds:?}");
}

/// A monitor whose guest runs, and goes on doing so.
fn running(dir: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linux"));
    command.args(["--backend", "translate", "--seconds", LONGEST_SECONDS, "--audit"]).arg(dir);
    command.args(["--command", "echo it runs; sleep 200"]).stdout(Stdio::piped());
    let mut linux = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(linux.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "it runs\n");
    linux
}

/// Nothing is left of a process that writes the log and ends before its time, and the monitor goes on.
#[test]
fn a_log_that_is_killed_leaves_no_process() {
    let _alone = crate::alone();
    if !Path::new("/proc/thread-self/children").exists() {
        return println!("skipped: /proc does not say whose child a process is");
    }
    if let Err(error) = debian::kernel(Series::default()) {
        return println!("skipped: {error:#}");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut linux = running(&folder.path().join("audit"));

    // Each thread has children of its own.
    let children = |linux: u32| -> Vec<u32> {
        let threads = std::fs::read_dir(format!("/proc/{linux}/task")).unwrap();
        let of = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
        let lists: Vec<String> = threads.filter_map(|thread| of(thread.ok()?)).collect();
        lists.iter().flat_map(|list| list.split_whitespace()).map(|pid| pid.parse().unwrap()).collect()
    };
    let before = children(linux.id());
    assert_eq!(before.len(), 1, "the process that writes the log");
    let log = rustix::process::Pid::from_raw(before[0].cast_signed()).unwrap();
    rustix::process::kill_process(log, rustix::process::Signal::KILL).unwrap();
    let begun = Instant::now();
    while !children(linux.id()).is_empty() {
        assert!(begun.elapsed() < PATIENCE, "it is a zombie");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(linux.try_wait().unwrap().is_none(), "the monitor goes on");
    linux.kill().unwrap();
    linux.wait().unwrap();
}

/// The monitor is killed while its guest runs: the process that writes the log closes it all the same, with all that was in the ring.
#[test]
fn a_monitor_that_is_killed_leaves_a_log_that_is_closed() {
    let _alone = crate::alone();
    if let Err(error) = debian::kernel(Series::default()) {
        return println!("skipped: {error:#}");
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("audit");
    let mut linux = running(&dir);
    linux.kill().unwrap();
    linux.wait().unwrap();

    let begun = Instant::now();
    let storage = FsStorage::existing(dir.join("log")).unwrap();
    while storage.lock().unwrap().is_none() {
        assert!(begun.elapsed() < PATIENCE, "somebody still writes");
        std::thread::sleep(Duration::from_millis(20));
    }
    let result = verify(&storage, &VerifyOptions::new(key(&dir)), &mut |_, _| ()).unwrap();
    assert!(result.intact && result.closed, "{:?}", result.findings);
    let events = events(&dir);
    let count = |kind| events.iter().filter(|(_, event)| event.kind == kind).count();
    // Nobody has said how the machine ended; the log says that its three sources are gone.
    assert_eq!((count(Kind::Launch), count(Kind::Shutdown), count(Kind::EmitterGone)), (1, 0, 3));
}
