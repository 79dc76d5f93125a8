//! What is found in a log, and what is missed.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic, also in functions that it calls"
)]

use vmm_audit::Digest;
use vmm_audit::event::{Action, Event, Launch, Object, ObjectClass, Outcome};

use super::*;

/// A decision about a verb, or what is said of the verb itself.
fn verb(kind: Kind, verb: &str, of: &Role) -> Event {
    let event = Event::new(kind).subject(Party::host("alice")).action(Action::Administer);
    let event = event.object(Object::named(ObjectClass::Verb, verb)).policy(Digest::of(b"policy"));
    let event = event.rule("allow alice", 9).attribute("file", "a.policy");
    event.peer(Party::vm(of.number.into(), 1))
}

fn allowed(of: &Role) -> Event {
    verb(Kind::Decision, "launch", of).verdict(Verdict::Allow).reason("layer type")
}

/// One that waits for somebody, or that bob has confirmed.
fn asked(is_confirmed: bool) -> Event {
    let event = verb(Kind::Decision, "destroy", &ROLES[0]).verdict(Verdict::Ask).reason("layer type");
    let event = event.attribute("ticket", "1");
    if is_confirmed { event.attribute("confirmed-by", "host bob") } else { event }
}

/// What is in a log: decisions about channels, one that was closed, the launches of machines, and the end of one, for which the wrong one, and
/// then another, has given his leave.
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
    let administration = |name, role: &Role, operation: &str| {
        verb(Kind::Administration, name, role).attribute("operation", operation)
    };
    for role in &ROLES {
        let begun = administration("launch", role, role.name);
        events.push((POLICY, allowed(role)));
        events.push((POLICY, begun.clone()));
        events.push((role.name, Event::launch(Party::vm(role.number.into(), 1), &launch)));
        events.push((POLICY, begun.outcome(Outcome::Success)));
    }
    let refused =
        verb(Kind::Decision, "destroy", &ROLES[0]).subject(Party::host("rita")).verdict(Verdict::Deny);
    let refused = refused.reason("she may not").attribute("ticket", "1").attribute("asked-by", "host alice");
    let begun = administration("destroy", &ROLES[0], "destroy").attribute("confirmed-by", "host bob");
    events.extend([
        (POLICY, asked(false)),
        (POLICY, refused),
        (POLICY, asked(true)),
        (POLICY, begun.clone()),
        (ROLES[0].name, Event::new(Kind::Shutdown).subject(Party::vm(ROLES[0].number.into(), 1))),
        (POLICY, begun.outcome(Outcome::Success)),
    ]);
    events
}

/// Where the launch of the first machine begins, and where its end does.
const LAUNCH: usize = 3;
const DESTROY: usize = LAUNCH + 4 * ROLES.len();

fn written(events: &[(&'static str, Event)]) -> Written {
    let mut written = Written::default();
    (0..).zip(events).for_each(|(seq, (source, event))| written.add(seq, source, event.clone()));
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
        confirmed_by: None,
    };
    let verbs = ROLES.iter().map(allowed).chain([asked(false), asked(true)]);
    let verbs: Vec<_> = verbs.map(|event| written::said(&event).unwrap()).collect();
    let done = |said: &Said| Done {
        who: "alice".to_owned(),
        verb: said.object.clone(),
        of: said.peer.clone(),
        confirmed_by: said.confirmed_by.clone(),
        rule: Some("a.policy:9: allow alice".to_owned()),
        policy: Digest::of(b"policy").to_string(),
    };
    let rejected = Rejected {
        who: "rita".to_owned(),
        of: Some("web-red".to_owned()),
        ticket: Some(1),
        asked_by: Some("alice".to_owned()),
        why: "she may not".to_owned(),
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
        done: verbs
            .iter()
            .filter(|said| said.verdict == "allow" || said.confirmed_by.is_some())
            .map(done)
            .collect(),
        rejected: vec![rejected],
        said: (5..).zip(verbs).chain([(3, said("allow", 4)), (4, said("deny", 5))]).collect(),
        taken: vec![taken],
        counts: [6, 2, 2],
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
    let shown = Shown { counts: [6, 2, 5], ..shown() };
    assert!(failed(&counted, &shown).is_empty());
}

#[test]
fn what_is_not_there_or_other_is_seen() {
    let first = [(0, vec![0, 1]), (1, vec![0, 1]), (2, vec![2])];
    let launch = [(0, vec![0, 1, 4]), (1, vec![4]), (2, vec![3, 4]), (3, vec![4])];
    let destroy =
        [(0, vec![0, 1]), (1, vec![1, 5]), (2, vec![0, 1, 4]), (3, vec![4]), (4, vec![4]), (5, vec![4])];
    let launch = launch.map(|(at, checks)| (LAUNCH + at, checks));
    let destroy = destroy.map(|(at, checks)| (DESTROY + at, checks));
    for (at, checks) in first.into_iter().chain(launch).chain(destroy) {
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
    early.insert(LAUNCH + 2, (ROLES[0].name, Event::new(Kind::Reset)));
    assert_eq!(failed(&early, &shown()), [3, 4]);
    let mut other = events();
    other[LAUNCH + 2].1.launch_digest = Some(Digest::of(b"other"));
    assert_eq!(failed(&other, &shown()), [3]);
}

#[test]
fn a_verb_is_decided_and_written_down_before_it_has_an_effect() {
    let moved = |from: usize, to: usize| {
        let mut events = events();
        let event = events.remove(from);
        events.insert(to, event);
        failed(&events, &shown())
    };
    // Begun before the decision, or the confirmation; and noticed by the machine before it was begun.
    assert_eq!(moved(LAUNCH, LAUNCH + 1), [4]);
    assert_eq!(moved(DESTROY + 2, DESTROY + 3), [4]);
    assert_eq!(moved(LAUNCH + 2, LAUNCH), [4]);
    assert_eq!(moved(DESTROY + 4, DESTROY), [4]);
    // Which does something after its end.
    let mut alive = events();
    alive.push((ROLES[0].name, Event::new(Kind::Reset)));
    assert_eq!(failed(&alive, &shown()), [4]);

    let change = |at: usize, change: &dyn Fn(&mut Event)| {
        let mut changed = events();
        change(&mut changed[at].1);
        failed(&changed, &shown())
    };
    // What was allowed to another, of another machine, by another rule; what has failed.
    assert_eq!(change(LAUNCH + 1, &|event| event.subject = Some(Party::host("rita"))), [4]);
    assert_eq!(change(LAUNCH + 1, &|event| event.peer = None), [4]);
    assert_eq!(change(LAUNCH + 1, &|event| event.rule_line = 7), [4]);
    assert_eq!(change(LAUNCH + 3, &|event| event.outcome = Some(Outcome::Failed)), [4]);
    // Nobody has confirmed it, or somebody else; another was refused.
    let unconfirmed =
        |event: &mut Event| event.attributes.retain(|(name, _)| name.as_str() != "confirmed-by");
    assert_eq!(change(DESTROY + 2, &unconfirmed), [0, 4]);
    assert_eq!(change(DESTROY + 3, &unconfirmed), [4]);
    assert_eq!(change(DESTROY + 1, &|event| event.subject = Some(Party::host("bob"))), [5]);
    // One that nobody was shown.
    let mut more = events();
    let again: Vec<_> =
        more[LAUNCH + 1..LAUNCH + 4].iter().filter(|(source, _)| *source == POLICY).cloned().collect();
    more.extend(again);
    assert_eq!(failed(&more, &shown()), [4]);
}
