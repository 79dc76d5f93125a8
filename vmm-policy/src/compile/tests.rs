//! The table says what the rules say, one by one.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use super::*;
use crate::analysis::evaluate;
use crate::model::Op;
use crate::policy::Policy;
use crate::{Kind, ValueKind};

/// A policy of everything that rules can be about, at random; it may be refused.
pub(crate) fn random_policy(rng: &mut fastrand::Rng, rules: usize, conditional: bool) -> String {
    let mut text = String::from(
        "family tenant: red, blue, green\nfamily zone: east, west\nlabels l0, l1, l2\nsecrecy low < high\nintegrity poor < good\n\
         categories c0, c1\nwall banks: red, blue\n",
    );
    for at in 0..rng.usize(2..7) {
        let labels = labels(rng);
        let kind = if rng.u8(0..5) == 0 { "host" } else { "vm" };
        let mut body = if labels.is_empty() { String::new() } else { format!("labels {labels} ") };
        if rng.u8(0..3) == 0 {
            let with = if rng.bool() { " with c0" } else { "" };
            write!(body, "secrecy high{with} ").unwrap();
        }
        if rng.u8(0..4) == 0 {
            body.push_str("integrity good ");
        }
        if rng.u8(0..6) == 0 {
            body.push_str("guard ");
        }
        writeln!(text, "{kind} v{at} {{ {body}}}").unwrap();
    }
    for name in ["disk d-0", "disk d-1", "region r-0"] {
        if rng.bool() {
            let labels = labels(rng);
            let body = if labels.is_empty() { String::new() } else { format!(" {{ labels {labels} }}") };
            writeln!(text, "{name}{body}").unwrap();
        }
    }
    for _ in 0..rules {
        let asker = expr(rng, 2);
        let access = access(rng);
        let peer = match rng.u8(0..4) {
            0 => String::new(),
            _ => {
                let relation = match rng.u8(0..5) {
                    0 => " in same tenant",
                    1 => " in other tenant",
                    2 if rng.bool() => " in same zone",
                    _ => "",
                };
                format!(" of {}{relation}", expr(rng, 2))
            }
        };
        let when = match rng.u8(0..4) {
            _ if !conditional => String::new(),
            0 => format!(" when {}", condition(rng, 2)),
            1 if rng.bool() => format!(" unless {}", condition(rng, 2)),
            _ => String::new(),
        };
        match rng.u8(0..10) {
            0..5 => writeln!(text, "allow {asker} to {access}{peer}{when}"),
            5..7 => writeln!(text, "deny {asker} to {access}{peer}{when}"),
            7 => {
                writeln!(text, "throttle {asker} to {access}{peer} at {} KiB per second{when}", rng.u8(1..4))
            }
            8 => writeln!(text, "quarantine {asker} to {access}{peer}{when}"),
            _ => writeln!(text, "limit {asker} to {access}{peer} at {} open", rng.u8(1..4)),
        }
        .unwrap();
    }
    text
}

fn labels(rng: &mut fastrand::Rng) -> String {
    let mut all = Vec::new();
    let choices: [&[&str]; 3] = [&["red", "blue", "green"], &["east", "west"], &["l0", "l1", "l2"]];
    for family in choices {
        if rng.u8(0..3) > 0 {
            all.push(family[rng.usize(..family.len())]);
        }
    }
    all.join(", ")
}

fn expr(rng: &mut fastrand::Rng, depth: u8) -> String {
    let leaf = [
        "any",
        "any",
        "any vm",
        "any host",
        "any object",
        "red",
        "blue",
        "green",
        "east",
        "west",
        "l0",
        "l1",
        "l2",
        "v0",
        "v1",
    ];
    match rng.u8(0..6) {
        0 if depth > 0 => format!("({} or {})", expr(rng, depth - 1), expr(rng, depth - 1)),
        1 if depth > 0 => format!("({} and {})", expr(rng, depth - 1), expr(rng, depth - 1)),
        2 if depth > 0 => format!("not {}", expr(rng, depth - 1)),
        _ => leaf[rng.usize(..leaf.len())].to_owned(),
    }
}

fn access(rng: &mut fastrand::Rng) -> String {
    if rng.u8(0..12) == 0 {
        return "anything".to_owned();
    }
    let kind = [Kind::Vsock, Kind::Disk, Kind::Region, Kind::Ethernet, Kind::Balloon][rng.usize(..5)];
    let actions = kind.actions();
    let action = actions[rng.usize(..actions.len())].0;
    let values = match (kind.value_kind(), rng.u8(0..4)) {
        (_, 0) | (ValueKind::Nothing, _) => String::new(),
        (ValueKind::Number(_), 1) => format!(" {}", rng.u8(0..8)),
        (ValueKind::Number(_), _) => {
            let first = rng.u8(0..8);
            format!(" {first}..{}, {}", first + rng.u8(0..8), rng.u8(0..12))
        }
        (ValueKind::Name, 1) => " d-*".to_owned(),
        (ValueKind::Name, 2) => " d-1*, r-0".to_owned(),
        (ValueKind::Name, _) => format!(" {}", ["d-0", "d-1", "r-0", "x"][rng.usize(..4)]),
    };
    format!("{action} {kind}{values}")
}

fn condition(rng: &mut fastrand::Rng, depth: u8) -> String {
    let leaf = ["running", "peer running", "attested", "peer paused", "flag f", "flag g", "measured abcd"];
    match rng.u8(0..6) {
        0 if depth > 0 => format!("({} or {})", condition(rng, depth - 1), condition(rng, depth - 1)),
        1 if depth > 0 => format!("({} and {})", condition(rng, depth - 1), condition(rng, depth - 1)),
        2 if depth > 0 => format!("not {}", condition(rng, depth - 1)),
        _ => leaf[rng.usize(..leaf.len())].to_owned(),
    }
}

pub(crate) fn random_facts(rng: &mut fastrand::Rng) -> Facts {
    let subject = |rng: &mut fastrand::Rng| {
        1 << rng.u8(0..5) | u64::from(rng.bool()) << 8 | u64::from(rng.bool()) << 16
    };
    Facts { asker: subject(rng), peer: subject(rng), environment: rng.u64(..4) << 32 }
}

/// How many answers there were.
#[derive(Default)]
struct Compared {
    /// That open something.
    opened: usize,
    /// By the table's front, at a glance and lane by lane.
    at_a_glance: usize,
    by_lanes: usize,
}

/// Compares table and rules for one request of each pair and action.
fn compare(policy: &Policy, table: &Table, rng: &mut fastrand::Rng, text: &str, counts: &mut Compared) {
    let model = &*policy.model;
    for asker in
        (1..table.class_count()).filter(|class| table.keys[*class as usize].kind != ClassKind::Object)
    {
        for peer in 0..table.class_count() {
            for op in Op::all() {
                let value = match op.kind().value_kind() {
                    ValueKind::Number(_) => rng.u64(..16),
                    ValueKind::Name => {
                        model.atom(op.kind(), ["d-0", "d-1", "d-12", "d-2", "r-0", "x", "y"][rng.usize(..7)])
                    }
                    ValueKind::Nothing => 0,
                };
                let facts = random_facts(rng);
                let key = |class: u32| &table.keys[class as usize];
                let wanted =
                    evaluate(model, op, key(asker), (peer != NOBODY).then(|| key(peer)), value, &facts);
                let found = table.decide(model, op, asker, peer, value, &facts);
                assert_eq!(
                    (found.verdict(model), found.layer, found.rule()),
                    wanted,
                    "class {asker} to {op} {value} of class {peer}, {facts:?}\n{text}"
                );
                counts.opened += usize::from(!found.denies());
                // Declared objects are not asked of the front.
                if key(peer).kind != ClassKind::Object {
                    let (glanced, looked) =
                        front(policy, table, (op, asker, peer, value), &facts, found, text);
                    counts.at_a_glance += usize::from(glanced);
                    counts.by_lanes += usize::from(looked);
                }
            }
        }
    }
}

/// Compares the table's front, whether it tells at a glance and whether lane by lane, with what the table has found.
pub(super) fn front(
    policy: &Policy,
    table: &Table,
    (op, asker, peer, value): (Op, u32, u32, u64),
    facts: &Facts,
    found: Ruling,
    text: &str,
) -> (bool, bool) {
    let (model, conditions) = (&*policy.model, &policy.model.conditions);
    let (one, other) = (table.class(asker).unwrap(), table.class(peer).unwrap());
    let asked = Asked {
        row: table.row(op.kind(), op.action()).unwrap(),
        asker: &table.brief(asker),
        peer: &table.brief(peer),
        value,
        terms: conditions.asker_terms(facts.asker)
            & conditions.peer_terms(facts.peer)
            & conditions.environment_terms(facts.environment),
        walled: table.forbidden_by(one.wall) & other.wall != 0,
    };
    let wanted = (found.verdict(model), found.layer, found.rule());
    let limits = |limits: &Limits| {
        let mut all: Vec<u32> = limits.lists().to_vec();
        all.sort_unstable();
        all
    };
    let of_table = limits(&table.limits_of(op, one, other, value));
    let shown = || format!("class {asker} to {op} {value} of class {peer}, {facts:?}\n{text}");
    let near = table.near(asked.row, asked.asker, asked.peer).unwrap();
    let glanced = table.glance(near, asked);
    if let Some(ruling) = glanced {
        let found = (ruling.verdict(model), ruling.layer, ruling.rule());
        assert_eq!(found, wanted, "at a glance: {}", shown());
        assert!(ruling.limited || of_table.is_empty(), "at a glance: limits of {}", shown());
    }
    if let Some(list) = table.list_at(near, asked) {
        assert_eq!(of_table, [list], "at a glance: the list of limits of {}", shown());
    }
    let looked = table.look(asked);
    if let Some((ruling, of_front)) = &looked {
        let found = (ruling.verdict(model), ruling.layer, ruling.rule());
        assert_eq!(found, wanted, "lane by lane: {}", shown());
        assert_eq!(limits(of_front), of_table, "lane by lane: limits of {}", shown());
    }
    (glanced.is_some(), looked.is_some())
}

#[test]
fn the_table_says_what_the_rules_say() {
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut read, mut counts) = (0, Compared::default());
    for _ in 0..300 {
        let rules = rng.usize(..30);
        let text = random_policy(&mut rng, rules, true);
        let Ok(policy) = Policy::parse(&text) else { continue };
        read += 1;
        compare(&policy, &policy.table, &mut rng, &text, &mut counts);
    }
    let Compared { opened, at_a_glance, by_lanes } = counts;
    assert!(
        read > 250 && opened > 10_000 && at_a_glance > 100_000 && by_lanes > at_a_glance + 10_000,
        "{read} policies with {opened} answers that open something, {at_a_glance} at a glance and {by_lanes} lane by lane, test little"
    );
}

#[test]
fn a_table_that_grew_is_the_one_that_was_made_whole() {
    let mut rng = fastrand::Rng::with_seed(2);
    for _ in 0..60 {
        let text = random_policy(&mut rng, 20, true);
        let Ok(policy) = Policy::parse(&text) else { continue };
        let model = &*policy.model;
        let mut grown = Arc::clone(&policy.table);
        let mut keys = Vec::new();
        for _ in 0..4 {
            let words = labels(&mut rng);
            let mut numbers: Vec<u32> = words
                .split(", ")
                .filter_map(|word| model.label_index.get(word).copied())
                .filter(|label| model.label_used[*label as usize])
                .collect();
            numbers.sort_unstable();
            let wall = model.wall_mask(&numbers);
            let key = ClassKey { kind: ClassKind::Vm, labels: numbers, wall, ..ClassKey::default() };
            if let Some(wider) = grown.with_class(model, &key).unwrap() {
                grown = Arc::new(wider);
            }
            keys.push(key);
        }
        compare(&policy, &grown, &mut rng, &text, &mut Compared::default());
        let whole = Table::new(model, &keys).unwrap();
        assert_eq!(
            (whole.class_count(), whole.cells.keys().len()),
            (grown.class_count(), grown.cells.keys().len())
        );
    }
}

#[test]
fn the_outcomes_of_a_pair_are_those_of_its_objects() {
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..100 {
        let text = random_policy(&mut rng, 25, true);
        let Ok(policy) = Policy::parse(&text) else { continue };
        let (model, table) = (&*policy.model, &*policy.table);
        for op in [
            Op::new(Kind::Vsock, crate::Action::Connect).unwrap(),
            Op::new(Kind::Disk, crate::Action::Attach).unwrap(),
        ] {
            for asker in
                (1..table.class_count()).filter(|class| table.keys[*class as usize].kind != ClassKind::Object)
            {
                for peer in 0..table.class_count() {
                    let mut ranges = Vec::new();
                    table.outcomes(op, asker, peer, |outcome| ranges.push(outcome));
                    for pair in ranges.windows(2) {
                        assert!(pair[0].last < pair[1].first, "{pair:?}\n{text}");
                    }
                    let is_subject =
                        !matches!(table.keys[peer as usize].kind, ClassKind::Object | ClassKind::Nobody);
                    // An object that is asked for itself comes with its own class, and no number is beyond the names.
                    let names = model.names[op.kind() as usize].last();
                    let is_asked_for = |value: &u64| match op.kind() {
                        Kind::Disk => {
                            *value <= names && (is_subject || table.object_class(op.kind(), *value) == peer)
                        }
                        _ => is_subject || peer == NOBODY,
                    };
                    for value in (0..16).filter(is_asked_for) {
                        let open = ranges.iter().any(|range| {
                            (range.first..=range.last).contains(&value) && range.opened_by.is_some()
                        });
                        // Whatever the facts, what is opened under some of them is opened here.
                        for _ in 0..4 {
                            let facts = random_facts(&mut rng);
                            let ruling = table.decide(model, op, asker, peer, value, &facts);
                            assert!(open || ruling.denies(), "{asker} {op} {value} {peer}\n{text}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn ten_thousand_rules_take_no_more_cells_than_pairs() {
    let mut text = String::from("labels x\n");
    for vm in 0..100 {
        writeln!(text, "vm v{vm}").unwrap();
    }
    for at in 0..10_000 {
        writeln!(text, "allow v{} to connect vsock {} of v{}", at % 100, at, at / 100).unwrap();
    }
    writeln!(text, "deny any to connect vsock 22 of any").unwrap();
    let begin = Instant::now();
    let policy = Policy::parse(&text).unwrap();
    assert_eq!(policy.table.cells.keys().len(), 10_001);
    assert!(begin.elapsed().as_secs() < 60, "{:?}", begin.elapsed());
}
