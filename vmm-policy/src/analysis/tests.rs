//! Proofs, rules that do nothing, differences, and pictures.

use fixedbitset::FixedBitSet;

use crate::compile::random_facts_for_tests as random_facts;
use crate::compile::{ClassKind, Facts, NOBODY, random_policy_for_tests as random_policy};
use crate::model::Op;
use crate::{
    Action, Coverage, Kind, Monitor, Object, Policy, Request, SubjectSpec, Usage, Uuid, Value, ValueKind,
    Verdict,
};

const TENANTS: &str = include_str!("../../policies/two-tenants.policy");

fn tenants() -> Policy {
    Policy::parse(TENANTS).unwrap()
}

/// Who learns of whom, by trying all that may be asked for: subjects by number, then each name of each kind of object.
fn tried_edges(policy: &Policy, facts: &[Facts]) -> Vec<(usize, usize)> {
    let (model, table) = (&*policy.model, &*policy.table);
    let subjects = subject_classes(policy);
    edges_by(subjects.len(), |asker, peer, op, value| {
        let (value, object) = match value {
            Value::Number(number) => (number, NOBODY),
            Value::Name(name) => {
                let atom = model.atom(op.kind(), name);
                (atom, table.object_class(op.kind(), atom))
            }
        };
        let class = peer.map_or(object, |peer| subjects[peer]);
        let side = |class| table.class(class).unwrap();
        facts.iter().any(|facts| {
            let ruling = table.decide(model, op, subjects[asker], class, value, facts);
            let ruling = if peer.is_some() && object != NOBODY {
                let (asker, peer, object) = (side(subjects[asker]), side(class), side(object));
                table.decide_beside(model, op, asker, peer, object, value, facts, ruling)
            } else {
                ruling
            };
            !ruling.denies()
        })
    })
}

/// The same, by what is asked.
fn edges_by(
    subjects: usize,
    opens: impl Fn(usize, Option<usize>, Op, Value<'_>) -> bool,
) -> Vec<(usize, usize)> {
    let names = ["d-0", "d-1", "d-12", "d-2", "r-0", "x", "y"];
    let station = |kind: Kind, name: usize| subjects + kind as usize * names.len() + name;
    let mut edges: Vec<(usize, usize)> = Vec::new();
    for a in 0..subjects {
        for op in Op::all() {
            let flow = op.flow();
            let mut try_one = |peer: Option<usize>, value: Value<'_>, name: Option<usize>| {
                if !opens(a, peer, op, value) {
                    return;
                }
                let mut add = |one, other| {
                    if flow.writes() {
                        edges.push((one, other));
                    }
                    if flow.reads() {
                        edges.push((other, one));
                    }
                };
                match (op.kind().is_station(), name, peer) {
                    (true, Some(name), _) => {
                        let station = station(op.kind(), name);
                        add(a, station);
                        if let Some(peer) = peer {
                            edges.extend([(peer, station), (station, peer)]);
                        }
                    }
                    (false, _, Some(peer)) => add(a, peer),
                    _ => (),
                }
            };
            for peer in std::iter::once(None).chain((0..subjects).map(Some)) {
                match op.kind().value_kind() {
                    ValueKind::Number(_) => {
                        (0..24).for_each(|value| try_one(peer, Value::Number(value), None));
                    }
                    ValueKind::Name => {
                        (0..names.len()).for_each(|name| try_one(peer, Value::Name(names[name]), Some(name)));
                    }
                    ValueKind::Nothing => try_one(peer, Value::Number(0), None),
                }
            }
        }
    }
    edges.sort_unstable();
    edges.dedup();
    edges
}

fn subject_classes(policy: &Policy) -> Vec<u32> {
    let subjects = policy.model.parties.iter().filter(|party| party.class.kind != ClassKind::Object);
    subjects.map(|party| policy.table.class_of(&party.class).unwrap()).collect()
}

/// Whether there is a way along the edges that no guard is on.
fn joined(policy: &Policy, edges: &[(usize, usize)], from: usize, to: usize) -> bool {
    let subjects = subject_classes(policy);
    let is_guard =
        |at: usize| subjects.get(at).is_some_and(|class| policy.table.class(*class).unwrap().exempt);
    let mut seen = FixedBitSet::with_capacity(1000);
    let mut work = vec![from];
    while let Some(at) = work.pop() {
        for (_, next) in edges.iter().filter(|(one, _)| *one == at) {
            if *next == to {
                return true;
            }
            if !seen.put(*next) && !is_guard(*next) {
                work.push(*next);
            }
        }
    }
    false
}

fn prove_and_try(seed: u64, policies: usize, conditional: bool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut together, mut apart) = (0, 0);
    for _ in 0..policies {
        let text = random_policy(&mut rng, 5, conditional);
        let Ok(policy) = Policy::parse(&text) else { continue };
        let facts: Vec<Facts> =
            (0..if conditional { 12 } else { 1 }).map(|_| random_facts(&mut rng)).collect();
        let edges = tried_edges(&policy, &facts);
        let names: Vec<String> =
            policy.parties().filter(|name| name.starts_with('v')).map(str::to_owned).collect();
        for (from, one) in names.iter().enumerate() {
            for (to, other) in names.iter().enumerate().filter(|(to, _)| *to != from) {
                let path = policy.prove_no_path(one, other).unwrap();
                let tried = joined(&policy, &edges, from, to);
                if conditional {
                    assert!(path.is_some() || !tried, "{one} to {other} was proven apart\n{text}");
                } else {
                    assert_eq!(path.is_some(), tried, "{one} to {other}: {path:?}\n{text}");
                }
                if tried { together += 1 } else { apart += 1 }
            }
        }
    }
    assert!(together > policies && apart > policies, "{together} joined, {apart} apart: that tests little");
}

/// What a monitor allows those that a policy declares, by asking it for all there is.
fn monitored_edges(policy: &Policy) -> Vec<(usize, usize)> {
    let monitor = Monitor::new(policy.clone());
    let mut ids = Vec::new();
    for party in policy.model.parties.iter().filter(|party| party.object.is_none()) {
        let uuid = policy.model.uuid_index.iter().find(|(_, at)| {
            policy.model.parties.get(**at as usize).is_some_and(|other| other.name == party.name)
        });
        let spec = match uuid {
            Some((uuid, _)) => SubjectSpec::vm(*uuid),
            None => SubjectSpec::host(&party.name),
        };
        ids.push(monitor.register(spec).unwrap());
    }
    edges_by(ids.len(), |asker, peer, op, value| {
        let object = Object::new(op.kind(), value).unwrap();
        let mut request = Request::new(ids[asker], op.action(), object);
        request.peer = peer.map(|peer| ids[peer]);
        monitor.check(&request).verdict != Verdict::Deny
    })
}

#[test]
fn what_is_proven_is_what_a_monitor_allows() {
    let mut rng = fastrand::Rng::with_seed(9);
    let (mut together, mut apart) = (0, 0);
    for _ in 0..120 {
        let mut text = random_policy(&mut rng, 6, false);
        for at in 0..8 {
            let uuid = Uuid::from_u128(1 + at);
            text = text.replace(&format!("vm v{at} {{"), &format!("vm v{at} {{ uuid {uuid}"));
        }
        let Ok(policy) = Policy::parse(&text) else { continue };
        let edges = monitored_edges(&policy);
        let names: Vec<&str> = policy.parties().filter(|name| name.starts_with('v')).collect();
        for (from, one) in names.iter().enumerate() {
            for (to, other) in names.iter().enumerate().filter(|(to, _)| *to != from) {
                let path = policy.prove_no_path(one, other).unwrap();
                let tried = joined(&policy, &edges, from, to);
                assert_eq!(path.is_some(), tried, "{one} to {other}: {path:?}\n{text}");
                if tried { together += 1 } else { apart += 1 }
            }
        }
    }
    assert!(together > 100 && apart > 100, "{together} joined, {apart} apart: that tests little");
}

#[test]
fn who_names_another_owner_does_not_get_what_is_not_that_ones() {
    let text = "family tenant: red, blue\nlabels db, payroll\n\
         vm a { uuid 00000000-0000-0000-0000-000000000001 labels red, db }\n\
         vm b { uuid 00000000-0000-0000-0000-000000000002 labels red }\n\
         vm c { uuid 00000000-0000-0000-0000-000000000003 labels blue }\n\
         disk red.img { labels red }\ndisk blue.img { labels blue }\ndisk pay.img { labels payroll }\ndisk any.img\n\
         allow db to attach disk of any in same tenant\n\
         deny any to attach disk of payroll\n";
    let policy = Policy::parse(text).unwrap();
    let monitor = Monitor::new(policy.clone());
    let vm = |uuid| monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid))).unwrap();
    let (a, b, c) = (vm(1), vm(2), vm(3));
    let ask = |disk, peer| monitor.check(&Request::new(a, Action::Attach, Object::disk(disk)).of(peer));
    assert!(ask("red.img", b).permits() && ask("any.img", b).permits() && ask("elsewhere", b).permits());
    let refused = ask("blue.img", b);
    assert_eq!(
        (refused.verdict, refused.layer),
        (Verdict::Deny, crate::Layer::Identity),
        "it is no red one's"
    );
    assert_eq!(ask("blue.img", c).layer, crate::Layer::Type, "no rule leads to another tenant");
    let refused = ask("pay.img", b);
    let rule = policy.rule(refused.rule.unwrap()).unwrap();
    assert_eq!((refused.verdict, rule.text), (Verdict::Deny, "deny any to attach disk of payroll"));

    // The prover and the explanation say the same.
    for apart in ["blue.img", "c", "pay.img"] {
        assert_eq!(policy.prove_no_path("a or b", apart).unwrap(), None, "{apart}");
        assert_eq!(policy.prove_no_path(apart, "a or b").unwrap(), None, "{apart}");
    }
    assert!(policy.prove_no_path("a", "red.img").unwrap().is_some());
    let explained = policy.explain("a to attach disk blue.img of b").unwrap();
    assert_eq!((explained.verdict, explained.layer), (Verdict::Deny, crate::Layer::Identity), "{explained}");
    let explained = policy.explain("a to attach disk pay.img of b").unwrap();
    assert_eq!(explained.verdict, Verdict::Deny, "{explained}");
    assert!(explained.to_string().contains("deny any to attach disk of payroll"), "{explained}");
}

#[test]
fn proofs_about_rules_without_conditions_are_exact() {
    prove_and_try(7, 150, false);
}

#[test]
fn what_is_proven_holds_under_whatever_conditions() {
    prove_and_try(8, 25, true);
}

#[test]
fn tenants_are_joined_by_the_gateway_alone() {
    let policy = tenants();
    assert_eq!(policy.prove_no_path("red", "blue").unwrap(), None);
    assert_eq!(policy.prove_no_path("web-red", "db-blue or frames-blue").unwrap(), None);
    let path = policy.find_path("red", "blue", false).unwrap().unwrap();
    assert_eq!(path.steps.len(), 2);
    assert_eq!(path.steps[0].to, "gateway");
    let path = policy.prove_no_path("web-red", "db-red").unwrap().unwrap();
    assert!(path.to_string().contains("connect vsock 5432"), "{path}");
    assert!(policy.prove_no_path("red and blue", "edge").is_err(), "nobody is both");
    assert!(policy.prove_no_path("rad", "edge").unwrap_err().to_string().contains("did you mean \"red\"?"));
}

#[test]
fn what_is_never_to_be_is_refused_with_an_example() {
    // Without the wall, which would keep the two apart whatever rules say.
    let text = TENANTS.replace("wall tenants: red, blue\n", "");
    // Objects of one kind have nothing to do with requests for another's, and those of a tenant are asked for by its own.
    assert_eq!(Policy::parse(&text).unwrap().prove_no_path("red", "blue").unwrap(), None);
    let refusal = |line: &str| Policy::parse(&format!("{text}{line}\n")).unwrap_err().to_string();
    let found = refusal("allow web to connect vsock 80 of db");
    assert!(found.contains("this opens what line 95 of policy says is never to be"), "{found}");
    assert!(found.contains("for example web-red to connect vsock 80 of db-blue"), "{found}");
    // Nothing joins them directly, and both have the same disk.
    let found = refusal("disk common { secrecy internal }\nallow web to attach disk common");
    assert!(found.contains("there is a path; web-red -> disk common"), "{found}");
    Policy::parse(&format!("{TENANTS}allow web to connect vsock 80 of db\n")).unwrap();
}

#[test]
fn rules_that_do_nothing_are_found() {
    let text = "labels a, b, c\nsecrecy low < high\nvm x { labels a }\nvm y { labels b secrecy high }\n\
         allow a to connect vsock 1 of a\n\
         allow a to connect vsock 1..5 of c\n\
         allow a to connect vsock of b\n\
         deny a to connect tcp of a\n\
         allow a to connect tcp 7 of a\n\
         allow a to send udp 7 of a\n\
         allow a to send udp 7..8 of a when running\n\
         limit c to connect vsock of any at 1 open\n";
    let usage = Policy::parse(text).unwrap().usage().unwrap();
    let shown: Vec<String> = usage.iter().map(ToString::to_string).collect();
    let of = |line: usize| {
        usage.iter().find(|report| report.line == line).map(|report| report.usage.clone()).unwrap()
    };
    assert_eq!(of(5), Usage::Used, "{shown:#?}");
    assert_eq!(of(6), Usage::Dead);
    assert_eq!(of(7), Usage::Barred { example: "x to connect vsock 0 of y".into() });
    assert_eq!(of(8), Usage::Used);
    assert_eq!(of(9), Usage::Shadowed { example: "x to connect tcp 7 of x".into(), by_line: 8 });
    assert_eq!(of(10), Usage::Used);
    assert_eq!(of(11), Usage::Used, "port 8 is its own");
    assert_eq!(of(12), Usage::Dead);
}

#[test]
fn a_difference_is_what_is_answered_otherwise() {
    let head = "labels a, b\nvm x { labels a }\nvm y { labels b }\n";
    let policy = |rules: &str| Policy::parse(&format!("{head}{rules}")).unwrap();
    let diff = |one: &str, other: &str| -> Vec<String> {
        policy(one).diff(&policy(other)).unwrap().iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        diff(
            "allow a to connect vsock 1..9 of b",
            "allow a to connect vsock 1..5 of b\nallow a to connect vsock 4..9 of b"
        ),
        [""; 0]
    );
    assert_eq!(
        diff("allow a to connect vsock 1..9 of b", "allow a to connect vsock 3..12 of b"),
        [
            "- x to connect vsock 1..2 of y: allow (line 4: allow a to connect vsock 1..9 of b) -> deny",
            "+ x to connect vsock 10..12 of y: deny -> allow (line 4: allow a to connect vsock 3..12 of b)",
        ]
    );
    assert_eq!(
        diff(
            "allow a to attach disk img-*",
            "allow a to attach disk img-*, old\ndeny a to attach disk img-1"
        ),
        [
            "- x to attach disk img-1: allow (line 4: allow a to attach disk img-*) -> deny",
            "+ x to attach disk old: deny -> allow (line 4: allow a to attach disk img-*, old)",
        ]
    );
    let when = diff("allow a to use balloon", "allow a to use balloon when running");
    assert_eq!(when.len(), 1, "{when:?}");
    assert!(when[0].starts_with("~ x to use balloon: allow"), "{when:?}");
    assert_eq!(tenants().diff(&tenants()).unwrap(), []);
    assert!(tenants().diff(&Policy::deny_all()).unwrap().iter().all(crate::Change::closes));
}

#[test]
fn an_explanation_names_each_layer_and_rule() {
    let policy = tenants();
    let explain = |sentence: &str| policy.explain(sentence).unwrap();
    let allowed = explain("web-red to connect vsock 5432 of db-red");
    assert_eq!((allowed.verdict, allowed.layer), (Verdict::Allow, crate::Layer::Type));
    assert_eq!(allowed.rules.len(), 1);
    let across = explain("web-red to connect vsock 5432 of db-blue");
    assert_eq!((across.verdict, across.layer), (Verdict::Deny, crate::Layer::Wall));
    assert!(across.to_string().contains("never any to anything of any in other tenant"), "{across}");
    let paused = explain("web-red to attach disk red.img when paused");
    assert_eq!((paused.verdict, paused.layer), (Verdict::Deny, crate::Layer::Attribute), "{paused}");
    assert_eq!(explain("web-red to attach disk red.img").verdict, Verdict::Allow);
    assert_eq!(explain("alice to administer destroy of web-red").verdict, Verdict::Ask);
    assert_eq!(explain("web-red to connect tcp 80 of gateway").verdict.word(), "throttle");
    assert_eq!(explain("web-red to map-ro region frames-blue").layer, crate::Layer::Wall);
    assert!(
        policy
            .explain("web-rad to use balloon")
            .unwrap_err()
            .to_string()
            .contains("did you mean \"web-red\"?")
    );
}

#[test]
fn coverage_counts_what_a_log_needed() {
    let policy = tenants();
    let mut coverage = Coverage::new(&policy);
    for _ in 0..3 {
        assert_eq!(
            coverage.record("web-red to connect vsock 5432 of db-red").unwrap().verdict,
            Verdict::Allow
        );
    }
    assert_eq!(coverage.record("web-red to connect vsock 22 of db-red").unwrap().verdict, Verdict::Deny);
    let used: Vec<u64> =
        policy.rules().map(|rule| coverage.count_of(rule)).filter(|count| *count > 0).collect();
    assert_eq!((used, coverage.denied_by_default()), (vec![3], 1));
    assert_eq!(coverage.unused().count() + 1, policy.model.rules.len());
}

#[test]
fn pictures_have_everybody_and_the_proof() {
    let graph = tenants().graph().unwrap();
    assert_eq!(graph.groups, ["red", "blue"]);
    assert_eq!(graph.apart, [(0, 1)]);
    let (dot, svg) = (graph.to_dot(), graph.to_svg());
    for name in ["web-red", "db-blue", "gateway", "alice, bob", "frames-red", "blue.img", "lan"] {
        assert!(dot.contains(name) && svg.contains(name), "{name} is missing");
    }
    assert!(svg.contains("no path") && svg.contains("vsock 5432") && svg.starts_with("<svg"));
    assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
    let odd = Policy::parse("policy \"a<b & \\\"c\\\"\"\nvm \"x<y\"").unwrap().graph().unwrap();
    assert!(odd.to_svg().contains("x&lt;y") && odd.to_dot().contains("a<b & \\\"c\\\""));
}
