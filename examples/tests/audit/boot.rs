//! `linux --audit`: a guest boots, and its log has the launch, the channels and the end, and verifies with the log's own program.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_audit::event::{Event, Kind, Launch, Verdict};
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

/// The monitor is killed while its guest runs: the process that writes the log closes it all the same, with all that was in the ring.
#[test]
fn a_monitor_that_is_killed_leaves_a_log_that_is_closed() {
    let _alone = crate::alone();
    if let Err(error) = debian::kernel(Series::default()) {
        return println!("skipped: {error:#}");
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("audit");
    let mut command = Command::new(env!("CARGO_BIN_EXE_linux"));
    command.args(["--backend", "translate", "--seconds", LONGEST_SECONDS, "--audit"]).arg(&dir);
    command.args(["--command", "echo it runs; sleep 200"]).stdout(Stdio::piped());
    let mut linux = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(linux.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "it runs\n");
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
    // Nobody has said how the machine ended; the log says that both of its sources are gone.
    assert_eq!((count(Kind::Launch), count(Kind::Shutdown), count(Kind::EmitterGone)), (1, 0, 2));
}
