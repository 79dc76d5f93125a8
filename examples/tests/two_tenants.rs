//! The program `two_tenants` as its user sees it.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::Command;

use vmm_audit::note::Verifier;
use vmm_audit::storage::FsStorage;
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_examples::debian::{self, Series};

/// Rows that there have to be: the beginning, and what is in the rest of it.
const ROWS: &[(&str, &[&str])] = &[
    ("ok web-red connect vsock 5432 of db-red works allow", &["two-tenants.policy:6:"]),
    ("ok web-blue connect tcp 443 of gateway works allow", &["two-tenants.policy:14:"]),
    ("ok web-red read region frames-red reads \"red\" allow", &["two-tenants.policy:10:"]),
    ("ok web-red connect vsock 5432 of db-blue ConnectionReset deny (wall)", &["tenants.policy:8:"]),
    ("ok web-red connect tcp 443 of web-blue TimedOut deny", &["tenants.policy:8:"]),
    ("ok db-blue ping db-red TimedOut deny", &["tenants.policy:8:"]),
    ("ok web-red map region frames-blue sees \"red\" alone deny", &["tenants.policy:8:"]),
    ("ok web-red write region frames-red it still says red deny", &["no rule allows it"]),
    ("ok gateway connect tcp 443 of web-red TimedOut deny", &["no rule allows it"]),
    ("web-red: connect vsock port 5432 of db-red, in", &["two-tenants-lockdown.policy:4:"]),
    ("web-red: map-ro region \"frames-red\", in", &["two-tenants-lockdown.policy:5:"]),
    ("ok web-red hears that its connection is no more", &[]),
    ("ok web-red sees that its memory is gone", &[]),
    ("ok the other tenant's connection goes on", &[]),
    ("ok and its memory is there", &[]),
    ("ok web-red connect vsock 5432 of db-red ConnectionReset deny", &["two-tenants-lockdown.policy:4:"]),
    ("ok the log is intact and closed", &[]),
    ("ok all that its 7 sources told is accounted for", &[]),
    ("ok it has all 29 verdicts that are shown here", &[]),
    ("ok it has all decisions:", &["allowed", "refused"]),
    ("ok it has the 2 channels that were closed, each with its rule", &[]),
    ("ok each machine's first event is its launch, with the digest that the policy has", &[]),
];

#[test]
fn tenants_reach_what_they_may_and_a_reload_cuts_them_off() {
    if let Err(error) = debian::kernel(Series::default()).and_then(|_| debian::busybox()) {
        println!("two tenants: skipped: {error:#}");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_two_tenants"));
    program.arg("--out").arg(out.path()).arg("--log").arg(out.path().join("kept"));
    let output = program.args(["--backend", "translate"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    // Columns are as wide as they are.
    let rows: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert!(output.status.success(), "{text}{errors}");
    assert!(!text.contains("WRONG"), "{text}");
    for (row, parts) in ROWS {
        let found =
            rows.iter().find(|line| line.starts_with(row) && parts.iter().all(|part| line.contains(part)));
        assert!(found.is_some(), "no {row:?} with {parts:?} in\n{text}");
    }
    for from in ["web-red", "db-red"] {
        for to in ["web-blue", "db-blue"] {
            for (from, to) in [(from, to), (to, from)] {
                let proofs =
                    rows.iter().filter(|row| **row == format!("ok proven: no path from {from} to {to}"));
                assert_eq!(proofs.count(), 2, "one for each policy");
            }
        }
    }
    let graph = std::fs::read_to_string(out.path().join("graph.svg")).unwrap();
    assert!(graph.starts_with("<svg") || graph.starts_with("<?xml"), "{graph}");
    for name in ["web-red", "db-blue", "gateway"] {
        assert!(graph.contains(name), "{name}");
    }
    assert!(out.path().join("two-tenants-lockdown.policy").is_file());

    // The log that is kept is one that anybody with its key can verify, and in which nobody changes a verdict.
    let kept = out.path().join("kept");
    let key: Verifier = std::fs::read_to_string(kept.join("key.pub")).unwrap().trim().parse().unwrap();
    let is_intact = || {
        let storage = FsStorage::existing(kept.join("log")).unwrap();
        let result = verify(&storage, &VerifyOptions::new(key.clone()), &mut |_, _| ()).unwrap();
        result.intact && result.closed
    };
    assert!(is_intact());
    let segment = kept.join("log/segments/0000000000");
    let mut bytes = std::fs::read(&segment).unwrap();
    let rule = b"deny web-red to connect vsock";
    let at = bytes.windows(rule.len()).position(|window| window == rule).unwrap();
    bytes[at..at + 4].copy_from_slice(b"okay");
    std::fs::write(&segment, bytes).unwrap();
    assert!(!is_intact());
}
