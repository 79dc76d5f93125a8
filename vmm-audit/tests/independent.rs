//! Others read our tiles and notes: a Python script written from the published formats, which shares nothing with the crate.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod support;

use std::path::Path;
use std::process::{Command, Output};

use support::{OnDisk, append, manifest, program};
use vmm_audit::export::export_tiles;
use vmm_audit::log::LogOptions;
use vmm_audit::storage::Storage;

/// A log of one epoch with `count` requests, exported.
fn exported(count: u64) -> (OnDisk, std::path::PathBuf, u64) {
    let disk = OnDisk::new();
    let mut log = disk.open(LogOptions::new());
    (0..count).for_each(|n| append(&mut log, n));
    log.close().unwrap();
    let to = disk.folder.path().join("tiles");
    let storage: std::sync::Arc<dyn Storage> = disk.storage();
    let size = export_tiles(&storage, &to).unwrap();
    (disk, to, size)
}

fn python(folder: &Path, key: &str) -> Option<Output> {
    let Some(python) = program(&["python3"]) else {
        println!("skipped: there is no python3");
        return None;
    };
    Some(Command::new(python).arg(manifest("tests/verify_tlog.py")).arg(folder).arg(key).output().unwrap())
}

#[test]
fn a_script_of_the_published_formats_verifies_our_logs() {
    for count in [0, 1, 253, 254, 255, 700] {
        let (disk, folder, size) = exported(count);
        let Some(output) = python(&folder, &disk.verifier().to_string()) else { return };
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(out.trim(), format!("ok {size}"), "{count}: {err}");
    }
}

#[test]
fn the_script_sees_what_was_changed() {
    let (disk, folder, _) = exported(300);
    let key = disk.verifier().to_string();
    for path in ["checkpoint", "tile/0/000", "tile/0/001.p/46", "tile/1/000.p/1", "tile/entries/000"] {
        let path = folder.join(path);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = bad.len() / 3;
        bad[at] ^= 1;
        std::fs::write(&path, bad).unwrap();
        let Some(output) = python(&folder, &key) else { return };
        assert!(!output.status.success(), "{}", path.display());
        std::fs::write(&path, good).unwrap();
    }
    let other = OnDisk::new();
    drop(other.open(LogOptions::new()));
    let Some(output) = python(&folder, &other.verifier().to_string()) else { return };
    assert!(!output.status.success());
}
