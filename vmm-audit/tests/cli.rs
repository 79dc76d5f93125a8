//! The program.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]
#![cfg(feature = "cli")]

mod support;

use std::process::{Command, Output};

use serde_json::Value;
use support::{OnDisk, append, decision, program};
use vmm_audit::event::{Event, Kind, Party};
use vmm_audit::keys::FileKeys;
use vmm_audit::log::LogOptions;
use vmm_audit::pipeline::{AuditLog, PipelineOptions};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmm-audit")).args(arguments).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", out(output)))
}

/// A log through the whole pipeline, with some of everything.
fn log() -> OnDisk {
    let disk = OnDisk::new();
    let keys = Box::new(FileKeys::new(&disk.keys));
    let (log, _) =
        AuditLog::open(disk.storage(), keys, support::ORIGIN, LogOptions::new(), PipelineOptions::new())
            .unwrap();
    let emitter = log.emitter(Party::host("vmm <b>&"));
    for n in 0..600 {
        emitter.emit(&decision(n)).unwrap();
        if n == 300 {
            log.flush(std::time::Duration::from_secs(60)).unwrap();
            log.rotate();
            emitter.emit(&Event::new(Kind::PolicyLoaded).reason("<script>alert(1)</script>")).unwrap();
        }
    }
    log.close().unwrap();
    disk
}

#[test]
fn verify_says_yes_and_where_not() {
    let disk = log();
    let (dir, key) = (disk.log.to_str().unwrap(), disk.verifier().to_string());
    let kept = disk.folder.path().join("kept");
    let good = run(&["verify", dir, "--key", &key, "--save-checkpoint", kept.to_str().unwrap()]);
    assert_eq!(good.status.code(), Some(0), "{}", out(&good));
    assert!(out(&good).contains("intact"), "{}", out(&good));
    let since = run(&["verify", dir, "--key", &key, "--since", kept.to_str().unwrap(), "--json"]);
    assert_eq!((since.status.code(), &json(&since)["intact"]), (Some(0), &Value::Bool(true)));
    let consistent = run(&["consistency", dir, "--key", &key, "--since", kept.to_str().unwrap()]);
    assert_eq!(consistent.status.code(), Some(0), "{}", out(&consistent));

    let segment = disk.log.join("segments/0000000000");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[2000] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let bad = run(&["verify", dir, "--key", &key]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(out(&bad).contains("segments/0000000000, byte "), "{}", out(&bad));
    assert_eq!(run(&["verify", "/nowhere", "--key", &key]).status.code(), Some(2));
    assert_eq!(run(&["verify", dir, "--key", "x+y+z"]).status.code(), Some(2));
}

#[test]
fn proofs_are_checked_without_the_log() {
    let disk = log();
    let (dir, key) = (disk.log.to_str().unwrap(), disk.verifier().to_string());
    let proof = run(&["prove", dir, "450", "--key", &key]);
    assert_eq!(proof.status.code(), Some(0), "{}", String::from_utf8_lossy(&proof.stderr));
    let file = disk.folder.path().join("proof");
    std::fs::write(&file, &proof.stdout).unwrap();
    let checked = run(&["prove", "--check", file.to_str().unwrap(), "--key", &key]);
    assert_eq!((checked.status.code(), &json(&checked)["index"]), (Some(0), &450.into()));
    let mut changed = json(&proof);
    changed["index"] = 449.into();
    std::fs::write(&file, changed.to_string()).unwrap();
    assert_eq!(run(&["prove", "--check", file.to_str().unwrap(), "--key", &key]).status.code(), Some(1));
}

#[test]
fn gaps_tail_and_query_read_the_log() {
    let disk = log();
    let dir = disk.log.to_str().unwrap();
    let gaps = run(&["gaps", dir, "--json"]);
    assert_eq!(gaps.status.code(), Some(0));
    let account = &json(&gaps)["accounts"][0];
    assert_eq!((&account["issued"], &account["missing"]), (&602.into(), &0.into()));
    assert!(out(&run(&["gaps", dir])).contains("602"));

    let tail = out(&run(&["tail", dir, "-n", "3"]));
    assert_eq!(tail.lines().count(), 3);
    assert!(tail.contains("log-closed"), "{tail}");
    let denied = run(&["query", dir, "--verdict", "deny", "--kind", "decision", "--json"]);
    let lines: Vec<Value> = out(&denied).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 200);
    assert!(lines.iter().all(|line| line["verdict"] == "deny" && line["rule"] == "tenants-apart"));
    let one = run(&["query", dir, "--vm", "00000000-0000-0000-0000-000011110002", "--limit", "5", "--json"]);
    assert_eq!(out(&one).lines().count(), 5);
    assert_eq!(run(&["query", dir, "--verdict", "perhaps"]).status.code(), Some(2));
}

#[test]
fn export_writes_json_ocsf_and_tiles_and_goes_on_at_its_cursor() {
    let disk = log();
    let dir = disk.log.to_str().unwrap();
    let (file, cursor) = (disk.folder.path().join("out"), disk.folder.path().join("cursor"));
    let (file, cursor) = (file.to_str().unwrap(), cursor.to_str().unwrap());
    assert_eq!(run(&["export", dir, "--out", file, "--cursor", cursor]).status.code(), Some(0));
    let first = std::fs::read_to_string(file).unwrap().lines().count();
    assert!(first > 600);
    let mut log = disk.open(LogOptions::new());
    append(&mut log, 1);
    log.close().unwrap();
    assert_eq!(run(&["export", dir, "--out", file, "--cursor", cursor]).status.code(), Some(0));
    let text = std::fs::read_to_string(file).unwrap();
    let numbers: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (0..first as u64 + 3).collect::<Vec<_>>());
    let ocsf = run(&["export", dir, "--format", "ocsf"]);
    let line = out(&ocsf).lines().nth(10).unwrap().to_owned();
    assert!(serde_json::from_str::<Value>(&line).unwrap()["class_uid"].is_u64());
    let tiles = disk.folder.path().join("tiles");
    assert_eq!(
        run(&["export", dir, "--format", "tiles", "--out", tiles.to_str().unwrap()]).status.code(),
        Some(0)
    );
    assert!(tiles.join("tile/entries/000").is_file());
}

#[test]
fn the_report_is_one_page_that_a_browser_shows() {
    let disk = log();
    let page = disk.folder.path().join("report.html");
    let key = disk.verifier().to_string();
    let done = run(&["report", disk.log.to_str().unwrap(), "--key", &key, "--out", page.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(!html.contains("<script") && !html.contains("http://") && !html.contains("https://"));
    assert!(html.contains("&lt;script&gt;"));
    let Some(browser) = program(&["chromium", "chromium-browser", "google-chrome"]) else {
        println!("skipped: there is no browser");
        return;
    };
    let profile = disk.folder.path().join("profile");
    let shown = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"])
        // It looks for nobody on the network.
        .args(["--no-first-run", "--disable-background-networking", "--disable-component-update"])
        .args(["--disable-sync", "--disable-quic"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let dom = out(&shown);
    if dom.is_empty() {
        println!("skipped: the browser does not run here: {}", String::from_utf8_lossy(&shown.stderr));
        return;
    }
    for part in ["data-intact=\"true\"", "class=\"timeline\"", "class=\"flows\"", "tenants-apart", "</main>"]
    {
        assert!(dom.contains(part), "{part}");
    }
    assert_eq!(dom.matches("<g class=\"node vm\">").count(), 9);
}
