//! The program, as people and scripts call it.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn tenants() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/two-tenants.policy")
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_vmm-policy")).args(arguments).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn with(extra: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.policy");
    fs::write(&path, format!("{}{extra}", fs::read_to_string(tenants()).unwrap())).unwrap();
    (folder, path.to_str().unwrap().to_owned())
}

#[test]
fn a_good_policy_is_good_and_a_bad_one_is_shown() {
    let (_folder, good) = with("");
    let (status, out, err) = run(&["check", &good, "--strict"]);
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    let (_folder, bad) = with("allow wep to connect vsok 1 of db\n");
    let (status, _, err) = run(&["check", &bad]);
    assert_eq!(status, 2);
    for part in [
        "found \"vsok\"",
        "did you mean \"vsock\"?",
        "p.policy:99:",
        "allow wep to connect vsok 1 of db",
        "^^^^",
    ] {
        assert!(err.contains(part), "{part} is missing in\n{err}");
    }
    assert_eq!(run(&["check", "/nowhere/at/all"]).0, 2);
}

#[test]
fn a_proof_is_an_exit_status() {
    let (_folder, file) = with("");
    assert_eq!(run(&["prove", &file, "red", "blue"]), (0, "no path\n".into(), String::new()));
    let (status, out, _) = run(&["prove", &file, "red", "blue", "--distrust-guards"]);
    assert_eq!(status, 1);
    assert!(out.contains("web-red -> gateway") && out.contains("gateway -> web-blue"), "{out}");
    let (status, _, err) = run(&["prove", &file, "red", "bleu"]);
    assert_eq!(status, 2);
    assert!(err.contains("did you mean \"blue\"?"), "{err}");
}

#[test]
fn explanations_and_pictures_are_for_programs_too() {
    let (folder, file) = with("");
    let (status, out, _) =
        run(&["explain", &file, "web-red", "to", "connect", "vsock", "5432", "of", "db-red"]);
    assert!(status == 0 && out.contains("allow web to connect vsock 5432 of db in same tenant"), "{out}");
    let (status, out, _) = run(&["--json", "explain", &file, "web-red to connect vsock 5432 of db-blue"]);
    let explained: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (status, explained["verdict"].as_str(), explained["layer"].as_str()),
        (1, Some("deny"), Some("wall"))
    );
    let picture = folder.path().join("p.svg");
    assert_eq!(run(&["graph", &file, "-o", picture.to_str().unwrap()]).0, 0);
    assert!(fs::read_to_string(picture).unwrap().starts_with("<svg"));
    assert!(run(&["graph", &file]).1.starts_with("digraph"));
}

#[test]
fn differences_formats_and_logs() {
    let (folder, file) = with("");
    let (_other, more) = with("allow edge to use msr 1\n");
    assert_eq!(run(&["diff", &file, &file]), (0, String::new(), String::new()));
    let (status, out, _) = run(&["diff", &file, &more]);
    assert_eq!(
        (status, out.as_str()),
        (1, "+ gateway to use msr 1: deny -> allow (line 99: allow edge to use msr 1)\n")
    );

    let ugly = folder.path().join("u.policy");
    fs::write(&ugly, "labels   a,b # x\n\n\n\nallow a\n  to use balloon").unwrap();
    let ugly = ugly.to_str().unwrap();
    assert_eq!(run(&["fmt", "--check", ugly]).0, 1);
    assert_eq!(run(&["fmt", ugly]).0, 0);
    assert_eq!(fs::read_to_string(ugly).unwrap(), "labels a, b  # x\n\nallow a to use balloon\n");
    assert_eq!(run(&["fmt", "--check", ugly]).0, 0);

    let log = folder.path().join("log");
    fs::write(&log, "allow\tweb-red to connect vsock 5432 of db-red\n# a note\nallow\tweb-red to connect vsock 1 of db-red\n").unwrap();
    let (status, out, _) = run(&["simulate", &file, log.to_str().unwrap()]);
    assert_eq!(status, 1, "one differs from what was recorded");
    assert!(
        out.contains("! deny") && out.contains("denied without a rule: 1") && out.contains("not needed:"),
        "{out}"
    );
}

#[test]
fn a_policy_is_a_document_for_programs() {
    let (folder, file) = with("");
    let (status, document, err) = run(&["fmt", "--json", &file]);
    assert_eq!((status, err.as_str()), (0, ""));
    let path = folder.path().join("p.json");
    fs::write(&path, &document).unwrap();
    let path = path.to_str().unwrap();
    let digest = |file: &str| {
        let (status, out, err) = run(&["check", "--json", file]);
        assert_eq!((status, err.as_str()), (0, ""));
        serde_json::from_str::<serde_json::Value>(&out).unwrap()["digest"].clone()
    };
    assert_eq!(digest(path), digest(&file));
    assert_eq!(run(&["prove", path, "red", "blue"]), (0, "no path\n".into(), String::new()));
    let (status, text, _) = run(&["fmt", path]);
    assert_eq!((status, text), (0, fs::read_to_string(&file).unwrap()));
    fs::write(folder.path().join("bad.json"), "{\"statements\": [{\"allow\": 1}]}").unwrap();
    assert_eq!(run(&["check", folder.path().join("bad.json").to_str().unwrap()]).0, 2);
}
