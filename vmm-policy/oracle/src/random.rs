//! Policies and requests at random, of what both can say.

use std::fmt::Write;

use vmm_policy::{Kind, Uuid, ValueKind};

pub(crate) const KINDS: [Kind; 6] =
    [Kind::Vsock, Kind::Disk, Kind::Region, Kind::Ethernet, Kind::Balloon, Kind::Verb];
pub(crate) const NAMES: [&str; 6] = ["d-0", "d-1", "d-12", "r-0", "x", "pause"];
pub(crate) const FLAGS: [&str; 2] = ["f", "g"];

/// A policy of a few machines.
pub(crate) fn policy(rng: &mut fastrand::Rng) -> (String, usize) {
    let mut text = String::from(
        "family tenant: red, blue, green\nfamily zone: east, west\nlabels l0, l1, l2\nsecrecy low < high\nintegrity poor < good\n\
         categories c0, c1\n",
    );
    if rng.bool() {
        text.push_str("wall banks: red, blue\n");
    }
    let machines = rng.usize(2..6);
    for at in 0..machines {
        let mut body = format!("uuid {} ", Uuid::from_u128(1 + at as u128));
        let labels = labels(rng);
        if !labels.is_empty() {
            body.push_str(&format!("labels {labels} "));
        }
        if rng.u8(0..4) == 0 {
            body.push_str(
                ["secrecy high ", "secrecy low with c0 ", "secrecy high with c0, c1 "][rng.usize(..3)],
            );
        }
        if rng.u8(0..4) == 0 {
            body.push_str("integrity good ");
        }
        if rng.u8(0..6) == 0 {
            body.push_str("guard ");
        }
        writeln!(text, "vm v{at} {{ {body}}}").ok();
    }
    for _ in 0..rng.usize(1..40) {
        let effect = if rng.u8(0..5) == 0 { "deny" } else { "allow" };
        let (asker, access) = (expr(rng, 2), access(rng));
        let peer = match rng.u8(0..4) {
            0 => String::new(),
            _ => {
                let relation =
                    ["", "", " in same tenant", " in other tenant", " in same zone"][rng.usize(..5)];
                format!(" of {}{relation}", expr(rng, 2))
            }
        };
        let when = match rng.u8(0..4) {
            0 => format!(" when {}", condition(rng, 2)),
            1 => format!(" unless {}", condition(rng, 2)),
            _ => String::new(),
        };
        writeln!(text, "{effect} {asker} to {access}{peer}{when}").ok();
    }
    (text, machines)
}

fn labels(rng: &mut fastrand::Rng) -> String {
    let choices: [&[&str]; 3] = [&["red", "blue", "green"], &["east", "west"], &["l0", "l1", "l2"]];
    let some: Vec<&str> = choices
        .iter()
        .filter_map(|all| if rng.u8(0..3) == 0 { None } else { Some(all[rng.usize(..all.len())]) })
        .collect();
    some.join(", ")
}

fn expr(rng: &mut fastrand::Rng, depth: u8) -> String {
    let leaf = [
        "any", "any", "any vm", "any host", "red", "blue", "green", "east", "west", "l0", "l1", "l2", "v0",
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
    if rng.u8(0..4) == 0 {
        return "anything".to_owned();
    }
    let kind = KINDS[rng.usize(..KINDS.len())];
    let actions = kind.actions();
    let action = actions[rng.usize(..actions.len())].0;
    let values = match (kind.value_kind(), rng.u8(0..4)) {
        (_, 0) | (ValueKind::Nothing, _) => String::new(),
        (ValueKind::Number(_), _) => {
            let first = rng.u8(0..8);
            format!(" {first}..{}, {}", first + rng.u8(0..8), rng.u8(0..12))
        }
        (ValueKind::Name, 1) => " d-*".to_owned(),
        (ValueKind::Name, 2) => " d-1*, pause".to_owned(),
        (ValueKind::Name, _) => format!(" {}", NAMES[rng.usize(..NAMES.len())]),
    };
    if kind == Kind::Verb { format!("administer{values}") } else { format!("{action} {kind}{values}") }
}

fn condition(rng: &mut fastrand::Rng, depth: u8) -> String {
    let leaf = ["running", "peer running", "attested", "peer attested", "peer paused", "flag f", "flag g"];
    match rng.u8(0..6) {
        0 if depth > 0 => format!("({} or {})", condition(rng, depth - 1), condition(rng, depth - 1)),
        1 if depth > 0 => format!("({} and {})", condition(rng, depth - 1), condition(rng, depth - 1)),
        2 if depth > 0 => format!("not {}", condition(rng, depth - 1)),
        _ => leaf[rng.usize(..leaf.len())].to_owned(),
    }
}
