//! Nothing is open that no rule opens.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use vmm_policy::{
    Action, Decision, Honours, Kind, Monitor, Object, Op, Policy, Request, SubjectSpec, Uuid, Value,
    ValueKind, Verdict,
};

/// Objects of a kind: the first, the last, and one between; names that exist nowhere.
fn objects(kind: Kind) -> Vec<Object<'static>> {
    let values = match kind.value_kind() {
        ValueKind::Number(most) => vec![Value::Number(0), Value::Number(most / 2), Value::Number(most)],
        ValueKind::Name => vec![Value::Name(""), Value::Name("x"), Value::Name("\u{10ffff}")],
        ValueKind::Nothing => vec![Value::Number(0)],
    };
    values.into_iter().map(|value| Object::new(kind, value).unwrap()).collect()
}

fn each(monitor: &Monitor, mut check: impl FnMut(&Request<'_>, Option<Op>, Decision)) -> usize {
    let subject = |spec| monitor.register(spec).unwrap();
    let (vm, other, host) = (
        subject(SubjectSpec::vm(Uuid::from_u128(1))),
        subject(SubjectSpec::vm(Uuid::from_u128(2))),
        subject(SubjectSpec::host("h")),
    );
    let mut count = 0;
    for kind in Kind::ALL {
        for action in Action::ALL {
            for object in objects(*kind) {
                for asker in [vm, host] {
                    for peer in [None, Some(vm), Some(other), Some(host)] {
                        let mut request = Request::new(asker, *action, object);
                        request.peer = peer;
                        check(&request, Op::new(*kind, *action), monitor.authorize(&request));
                        count += 1;
                    }
                }
            }
        }
    }
    count
}

#[test]
fn an_empty_policy_opens_nothing() {
    let monitor = Monitor::default();
    let count = each(&monitor, |request, _, decision| {
        assert_eq!(decision.verdict, Verdict::Deny, "{request:?}");
        assert!(monitor.hold(request, Honours::THROTTLE | Honours::QUARANTINE | Honours::REDIRECT).is_err());
    });
    assert_eq!(count, (Kind::ALL.len() - 2) * Action::ALL.len() * 3 * 8 + 2 * Action::ALL.len() * 8);
}

#[test]
fn a_policy_that_opens_all_opens_what_there_is() {
    let monitor = Monitor::new(Policy::parse("allow any to anything of any\nallow any to anything").unwrap());
    each(&monitor, |request, op, decision| {
        assert_eq!(decision.permits(), op.is_some(), "{request:?}: what cannot be done is never allowed");
    });
}

#[test]
fn one_rule_opens_one_thing() {
    for op in Op::all() {
        // `administer` names verbs without their kind.
        let access = if op.kind() == Kind::Verb {
            "administer".to_owned()
        } else {
            format!("{} {}", op.action(), op.kind())
        };
        let monitor = Monitor::new(Policy::parse(&format!("allow any vm to {access} of any host")).unwrap());
        let host = |request: &Request<'_>| {
            monitor.subject("h") == request.peer && monitor.subject("h") != Some(request.asker)
        };
        each(&monitor, |request, asked, decision| {
            assert_eq!(decision.permits(), asked == Some(op) && host(request), "{request:?} with {access}");
        });
    }
}
