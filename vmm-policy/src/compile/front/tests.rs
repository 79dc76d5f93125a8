//! The front says what the table says, however little room there is.

use std::fmt::Write;

use super::{Asked, Line};
use crate::compile::conditions::TERMS;
use crate::compile::table::Table;
use crate::compile::tests::{front, random_facts};
use crate::model::{Action, Kind, Op};
use crate::policy::Policy;

/// Asks about objects of one number below and one above each end of a range, and returns how often the front told, at a glance and lane by
/// lane, and how often it was asked.
fn compare(text: &str, op: (Kind, Action), values: impl IntoIterator<Item = u64>) -> [usize; 3] {
    let policy = Policy::parse(text).unwrap();
    let table = &*policy.table;
    let op = Op::new(op.0, op.1).unwrap();
    let mut rng = fastrand::Rng::with_seed(7);
    let mut counts = [0; 3];
    for value in values {
        for asker in 1..table.class_count() {
            for peer in 0..table.class_count() {
                let facts = random_facts(&mut rng);
                let found = table.decide(&policy.model, op, asker, peer, value, &facts);
                let (glanced, looked) = front(&policy, table, (op, asker, peer, value), &facts, found, text);
                counts = [counts[0] + usize::from(glanced), counts[1] + usize::from(looked), counts[2] + 1];
            }
        }
    }
    counts
}

#[test]
fn one_pair_may_have_any_number_of_rules() {
    for rules in 0..20 {
        let mut text = String::from("vm a\nvm b\nvm c\n");
        for at in 0..rules {
            let (verb, when) =
                [("allow", ""), ("deny", " when running"), ("allow", " unless attested")][at % 3];
            writeln!(text, "{verb} a to connect vsock {}..{} of b{when}", at * 10, at * 10 + 14).unwrap();
        }
        let [_, looked, asked] = compare(&text, (Kind::Vsock, Action::Connect), 0..220);
        // A rule has one lane; what has no more than twelve stands there.
        assert_eq!(looked == asked, rules <= 12, "{rules} rules, {looked} of {asked} lane by lane");
        assert!(looked * 10 > asked * 8);
    }
}

#[test]
fn numbers_that_do_not_fit_are_left_to_the_table() {
    let top = u64::from(u32::MAX);
    let about = [top - 1, top, top + 1, u64::MAX - 1, u64::MAX, 0, 1, 7];
    for (range, fits) in [
        (format!("0..{}", top - 1), true),
        (format!("7..{}", u64::MAX), true),
        (format!("0..{top}"), false),
        (format!("{top}"), false),
        (format!("{}..{}", top + 1, top + 7), false),
        (format!("{}..{}", top - 1, u64::MAX - 1), false),
    ] {
        let text = format!("vm a\nvm b\nallow a to use hypercall {range}\ndeny b to use hypercall {range}");
        let [_, looked, asked] = compare(&text, (Kind::Hypercall, Action::Use), about);
        assert_eq!(looked == asked, fits, "{range}: {looked} of {asked}");
    }
    // Of a kind whose numbers end there, each fits.
    let text =
        format!("vm a\nvm b\nallow a to connect vsock 7..{top} of b\nallow b to connect vsock {top} of a");
    let [_, looked, asked] = compare(&text, (Kind::Vsock, Action::Connect), [0, 6, 7, 8, top - 1, top]);
    assert_eq!(looked, asked);
}

#[test]
fn conditions_beyond_the_terms_are_left_to_the_table() {
    let mut text = String::from("vm a\nvm b\n");
    for at in 0..TERMS as u64 + 10 {
        let digest = at % 30;
        let state = ["running", "paused", "migrating"][at as usize / 30];
        writeln!(text, "allow a to connect vsock {at} of b when measured {digest:04x} and {state}").unwrap();
    }
    // More rules than a pair may have for the front but for their peers.
    let text = text.replace(" of b", " of any");
    let [_, looked, asked] = compare(&text, (Kind::Vsock, Action::Connect), 0..80);
    assert!(looked < asked);
    let one = |condition: &str| {
        let text = format!("{text}allow b to connect tcp 1..9 of a when {condition}\n");
        compare(&text, (Kind::Tcp, Action::Connect), 0..12)
    };
    let ([_, known, asked], [_, further, _]) = (one("measured 0000 and running"), one("attested"));
    assert!(known == asked && further < asked, "{known} and {further} of {asked}");
}

#[test]
fn whatever_the_ways_to_name_asker_and_peer() {
    let text = "family tenant: red, blue\nfamily zone: east, west\n\
        vm a { labels red, east }\nvm b { labels blue, east }\nvm c { labels red, west }\nvm d\n\
        allow any to connect vsock 1..9 of any in same tenant\n\
        deny any to connect vsock 3 of any when running\n\
        limit any to connect vsock of any at 3 open\n\
        quarantine any to connect vsock 5..6 of any in other tenant\n\
        allow a to connect vsock 20..30 of any\n\
        allow any to connect vsock 25..35 of d unless attested\n\
        limit a to connect vsock 22 of any at 1 open\n\
        allow a to connect vsock 40 of b\n";
    let [glanced, looked, asked] = compare(text, (Kind::Vsock, Action::Connect), 0..45);
    assert!(looked == asked && glanced == 0, "the first family has a line; {looked} of {asked}");
    // Those of another family have none.
    let text = format!("{text}deny any to connect vsock 7 of any in other zone\n");
    let [_, looked, _] = compare(&text, (Kind::Vsock, Action::Connect), 0..45);
    assert_eq!(looked, 0);
}

#[test]
fn limits_are_found_at_a_glance_where_there_are_no_others() {
    let asked = |table: &Table, class| {
        let (asker, peer) = (table.brief(class), table.brief(class + 1));
        let row = table.row(Kind::Vsock, Action::Connect).unwrap();
        let near = table.near(row, &asker, &peer).unwrap();
        table.list_at(near, Asked { row, asker: &asker, peer: &peer, value: 5, terms: 0, walled: false })
    };
    // Of the pair, with as many rules as stand in its lines or in a block, and of whomever.
    for (rules, own, wide, found) in [
        (2, false, false, false),
        (2, true, false, true),
        (2, false, true, true),
        (2, true, true, false),
        (10, true, false, false),
        (10, true, true, false),
    ] {
        let mut text = String::from("family x: l, m\nvm a { labels l }\nvm b { labels m }\n");
        for at in 0..rules {
            writeln!(text, "allow a to connect vsock {}..{} of b", at * 2, at * 3 + 9).unwrap();
        }
        text += if own { "limit a to connect vsock 1..7 of b at 2 open\n" } else { "" };
        text += if wide { "limit any to connect vsock of any at 3 open\n" } else { "" };
        compare(&text, (Kind::Vsock, Action::Connect), 0..40);
        let mut table = (*Policy::parse(&text).unwrap().table).clone();
        assert_eq!(asked(&table, 1).is_some(), found, "{text}");
        table.front.lines.iter_mut().for_each(Line::spill);
        assert_eq!(asked(&table, 1), None, "there may be more than what is there");
    }
}

fn rules_of_many_pairs() -> String {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut text = String::new();
    for vm in 0..40 {
        writeln!(text, "vm v{vm}").unwrap();
    }
    for _ in 0..2000 {
        let (asker, peer, first) = (rng.u8(..40), rng.u8(..40), rng.u16(..1000));
        writeln!(text, "allow v{asker} to connect vsock {first}..{} of v{peer}", first + 100).unwrap();
    }
    text
}

#[test]
fn many_pairs_have_room_for_their_rules() {
    let values = [0, 50, 333, 500, 999];
    let [glanced, looked, asked] = compare(&rules_of_many_pairs(), (Kind::Vsock, Action::Connect), values);
    assert!(looked * 100 > asked * 99 && glanced * 100 > asked * 95, "{glanced} and {looked} of {asked}");
}

#[test]
fn factors_that_scatter_badly_are_not_kept() {
    let text = rules_of_many_pairs();
    for _ in 0..100 {
        let front = Policy::parse(&text).unwrap().table.front.clone();
        let spilled = front.lines.iter().filter(|line| line.is_spilled()).count();
        assert!(
            spilled * 32 <= front.lines.len(),
            "{spilled} of {} with {:#x}",
            front.lines.len(),
            front.factor
        );
    }
}
