//! The program `two_tenants` as its user sees it.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::Command;
use std::sync::Arc;

use vmm_audit::event::{Event, Kind, Outcome, Party};
use vmm_audit::note::Verifier;
use vmm_audit::query::Filter;
use vmm_audit::storage::FsStorage;
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_audit::{Entries, Item};
use vmm_examples::debian::{self, Series};

/// Rows that there have to be: the beginning, and what is in the rest of it.
const ROWS: &[(&str, &[&str])] = &[
    ("ok alice launch web-red done allow (type)", &["two-tenants.policy:19:"]),
    ("ok mallory destroy web-red refused deny host mallory is not registered", &[]),
    ("ok rita destroy web-red refused deny (type) no rule allows it", &[]),
    ("ok rita launch db-blue refused deny (wall)", &["tenants.policy:8:"]),
    ("ok rita reload refused deny (type) no rule allows it", &[]),
    ("ok web-red connect vsock 5432 of db-red works allow", &["two-tenants.policy:6:"]),
    ("ok web-blue connect tcp 443 of gateway works allow", &["two-tenants.policy:14:"]),
    ("ok web-red read region frames-red reads \"red\" allow", &["two-tenants.policy:10:"]),
    ("ok web-red connect vsock 5432 of db-blue ConnectionReset deny (wall)", &["tenants.policy:8:"]),
    ("ok web-red connect tcp 443 of web-blue TimedOut deny", &["tenants.policy:8:"]),
    ("ok db-blue ping db-red TimedOut deny", &["tenants.policy:8:"]),
    ("ok web-red map region frames-blue sees \"red\" alone deny", &["tenants.policy:8:"]),
    ("ok web-red write region frames-red it still says red deny", &["no rule allows it"]),
    ("ok gateway connect tcp 443 of web-red TimedOut deny", &["no rule allows it"]),
    ("ok alice reload done allow (type)", &["two-tenants.policy:20:"]),
    ("web-red: connect vsock port 5432 of db-red, in", &["two-tenants-lockdown.policy:4:"]),
    ("web-red: map-ro region \"frames-red\", in", &["two-tenants-lockdown.policy:5:"]),
    ("ok web-red hears that its connection is no more", &[]),
    ("ok web-red sees that its memory is gone", &[]),
    ("ok the other tenant's connection goes on", &[]),
    ("ok and its memory is there", &[]),
    ("ok web-red connect vsock 5432 of db-red ConnectionReset deny", &["two-tenants-lockdown.policy:4:"]),
    ("ok alice destroy web-red waits for another ask (type)", &["two-tenants.policy:21:"]),
    ("ok alice confirm alice's destroy web-red refused deny", &["host alice cannot confirm what host alice"]),
    (
        "ok rita confirm alice's destroy web-red refused deny",
        &["host rita is none of those who may confirm it"],
    ),
    ("ok bob confirm alice's destroy web-red done ask (type)", &["two-tenants.policy:21:"]),
    ("ok bob decline alice's destroy gateway will not be done", &[]),
    ("ok bob confirm alice's destroy gateway refused deny", &["it has been answered"]),
    ("ok alice confirm bob's destroy gateway done ask (type)", &["two-tenants.policy:21:"]),
    ("ok alice destroy web-red refused deny vm 00000000-0000-0000-0000-0000000000a1 is not registered", &[]),
    ("ok the log is intact and closed", &[]),
    ("ok all that its 7 sources told is accounted for", &[]),
    ("ok it has all 49 verdicts that are shown here", &[]),
    ("ok it has all decisions:", &["allowed, 11 for a second person,", "refused"]),
    ("ok it has the 2 channels that were closed, each with its rule", &[]),
    ("ok each machine's first event is its launch, with the digest that the policy has", &[]),
    ("ok it has the 11 verbs that were carried out, each before that was done", &[]),
    ("ok and the 6 that somebody wanted in vain, and who that was", &[]),
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
    // Whoever looks for what was done to a machine finds who wanted it, and who let him.
    let events = |filter: &Filter| -> Vec<Event> {
        let mut entries = Entries::new(Arc::new(FsStorage::existing(kept.join("log")).unwrap()));
        let next = || entries.next().unwrap();
        let found = std::iter::from_fn(next).filter_map(|item| match item {
            Item::Entry(found) => Some((found.seq, found.source, found.event.unwrap())),
            _ => None,
        });
        found
            .filter(|(seq, source, event)| filter.passes(*seq, *source, event))
            .map(|(.., event)| event)
            .collect()
    };
    let mut filter = Filter::new();
    (filter.kinds, filter.vm) = (vec![Kind::Administration], Some(0xc1));
    let (launch, destroy) = (("launch", None), ("destroy", Some("host alice")));
    let done = events(&filter);
    let told = done.iter().map(|event| {
        let verb = event.object.as_ref().unwrap().name.as_ref().unwrap().as_str();
        ((verb, event.get("confirmed-by")), event.outcome)
    });
    let success = Some(Outcome::Success);
    assert!(told.eq([(launch, None), (launch, success), (destroy, None), (destroy, success)]), "{done:?}");
    assert_eq!(done[2].subject, Some(Party::host("bob")));
    let segment = kept.join("log/segments/0000000000");
    let mut bytes = std::fs::read(&segment).unwrap();
    let rule = b"deny web-red to connect vsock";
    let at = bytes.windows(rule.len()).position(|window| window == rule).unwrap();
    bytes[at..at + 4].copy_from_slice(b"okay");
    std::fs::write(&segment, bytes).unwrap();
    assert!(!is_intact());
}
