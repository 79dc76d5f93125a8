//! What is found in a log, and what is missed.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic, also in functions that it calls"
)]

use vmm_audit::Digest;
use vmm_audit::event::{Launch, Object};

use super::*;

/// What is in a log: two decisions, a channel that was closed, and the launches.
fn events() -> Vec<(&'static str, Event)> {
    let decision = |kind, verdict: Verdict, line| {
        let event = Event::new(kind).subject(Party::vm(0xa1, 1)).peer(Party::vm(0xa2, 1));
        let event = event.action(Action::Connect).object(Object::numbered(ObjectClass::Vsock, 5432));
        let event = event.verdict(verdict).reason("layer type").policy(Digest::of(b"policy"));
        event.rule("allow  web\n to connect", line).attribute("file", "a.policy")
    };
    let launch =
        MEASURED.into_iter().fold(Launch::new(), |launch, name| launch.measure(name, Digest::of(b"")));
    let mut events = vec![
        (POLICY, decision(Kind::Decision, Verdict::Allow, 4)),
        (POLICY, decision(Kind::Decision, Verdict::Deny, 5)),
        (POLICY, decision(Kind::Revoked, Verdict::Deny, 6)),
    ];
    events.extend(ROLES.map(|role| (role.name, Event::launch(Party::vm(role.number.into(), 1), &launch))));
    events
}

fn written(events: &[(&'static str, Event)]) -> Written {
    let mut written = Written::default();
    events.iter().for_each(|(source, event)| written.add(source, event.clone()));
    written
}

/// What has to be there then.
fn shown() -> Shown {
    let said = |verdict: &str, line: u32| Said {
        who: "web-red".to_owned(),
        peer: Some("db-red".to_owned()),
        action: "connect".to_owned(),
        object: "vsock 5432".to_owned(),
        verdict: verdict.to_owned(),
        layer: "type".to_owned(),
        rule: Some(format!("a.policy:{line}: allow web to connect")),
        policy: Digest::of(b"policy").to_string(),
    };
    let taken = Taken {
        who: "web-red".to_owned(),
        peer: Some("db-red".to_owned()),
        object: "vsock 5432".to_owned(),
        why: "deny (type): a.policy:6: allow web to connect".to_owned(),
    };
    let launched =
        |(source, event): &(&str, Event)| Some(((*source).to_owned(), event.launch_digest?.to_string()));
    Shown {
        said: [(3, said("allow", 4)), (4, said("deny", 5))].into(),
        taken: vec![taken],
        allowed: 1,
        refused: 1,
        launched: events().iter().filter_map(launched).collect(),
    }
}

fn failed(events: &[(&'static str, Event)], shown: &Shown) -> Vec<usize> {
    let checks = compare(&written(events), shown);
    checks.iter().zip(0..).filter(|((_, good), _)| !good).map(|(_, at)| at).collect()
}

#[test]
fn what_was_shown_is_found() {
    assert!(failed(&events(), &shown()).is_empty());
    // Another decision is one too many.
    let mut more = events();
    more.push(more[0].clone());
    assert_eq!(failed(&more, &shown()), [1]);
    // Those that were counted are decisions.
    let mut counted = events();
    let counter = Event::new(Kind::Coalesced).verdict(Verdict::Deny).attribute("of", "decision");
    counted.push((POLICY, counter.clone().amount(2, 0)));
    counted.push((POLICY, counter.amount(3, 0)));
    let shown = Shown { refused: 4, ..shown() };
    assert!(failed(&counted, &shown).is_empty());
}

#[test]
fn what_is_not_there_or_other_is_seen() {
    for (at, checks) in [(0, vec![0, 1]), (1, vec![0, 1]), (2, vec![2]), (3, vec![3]), (7, vec![3])] {
        let mut less = events();
        less.remove(at);
        assert_eq!(failed(&less, &shown()), checks, "without {at}");
    }
    // The gate's are not the policy's.
    let mut moved = events();
    moved[0].0 = GATE;
    assert_eq!(failed(&moved, &shown()), [0, 1]);
    let change = |change: &dyn Fn(&mut Event)| {
        let mut changed = events();
        change(&mut changed[1].1);
        failed(&changed, &shown())
    };
    assert_eq!(change(&|event| event.subject = Some(Party::vm(0xb1, 1))), [0]);
    assert_eq!(change(&|event| event.peer = None), [0]);
    assert_eq!(change(&|event| event.object = Some(Object::numbered(ObjectClass::Vsock, 22))), [0]);
    assert_eq!(change(&|event| event.rule_line = 7), [0]);
    assert_eq!(change(&|event| event.policy = Some(Digest::of(b"other"))), [0]);
    assert_eq!(change(&|event| event.reason = Some("layer wall".into())), [0]);
    assert_eq!(change(&|event| event.verdict = Some(Verdict::Allow)), [0, 1]);
    // A machine that does something before its launch is written down, and one that was launched from something else.
    let mut early = events();
    early.insert(3, (ROLES[0].name, Event::new(Kind::Reset)));
    assert_eq!(failed(&early, &shown()), [3]);
    let mut other = events();
    other[3].1.launch_digest = Some(Digest::of(b"other"));
    assert_eq!(failed(&other, &shown()), [3]);
}
