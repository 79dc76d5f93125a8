//! Bytes to a policy that mostly means something, and what is asked of it: for the fuzz target `policy_evaluator`, and a test that runs
//! the same on bytes at random.

#![allow(dead_code, reason = "a target and two tests, of which each uses a part")]

use vmm_policy::{Coverage, Policy, PolicyError};

/// Takes bytes as choices; zeros when there are none left.
struct Choices<'b>(&'b [u8]);

impl Choices<'_> {
    fn next(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first)
    }

    fn of<'w>(&mut self, words: &[&'w str]) -> &'w str {
        let at = self.next() % words.len().max(1);
        words.get(at).copied().unwrap_or("")
    }
}

const NAMES: [&str; 4] = ["v0", "v1", "v2", "h"];

fn expr(choices: &mut Choices<'_>, depth: u8) -> String {
    match choices.next() % 8 {
        0 if depth > 0 => format!("({} or {})", expr(choices, depth - 1), expr(choices, depth - 1)),
        1 if depth > 0 => format!("({} and {})", expr(choices, depth - 1), expr(choices, depth - 1)),
        2 if depth > 0 => format!("not {}", expr(choices, depth - 1)),
        _ => choices
            .of(&["any", "any vm", "any host", "any object", "red", "blue", "l0", "l1", "v0", "v1", "l0"])
            .to_owned(),
    }
}

fn access(choices: &mut Choices<'_>) -> String {
    let what = [
        "anything",
        "connect vsock",
        "accept vsock",
        "connect tcp",
        "send udp",
        "map-ro region",
        "map-rw, create region",
        "attach disk",
        "attach-ro share",
        "notify doorbell",
        "administer",
        "use hypercall",
        "use mmio",
        "attach network",
        "use balloon",
        "anything disk",
    ];
    let what = choices.of(&what).to_owned();
    let values = match what.rsplit(' ').next() {
        Some("vsock" | "tcp" | "udp" | "hypercall" | "mmio") => {
            let first = choices.next();
            vec![String::new(), format!(" {first}"), format!(" {first}..{}, 7", first + choices.next())]
                .swap_remove(choices.next() % 3)
        }
        Some("region" | "disk" | "share" | "doorbell" | "administer" | "network") => {
            choices.of(&["", " d", " d-1", " d-*", " d-1*, d-2", " *"]).to_owned()
        }
        _ => String::new(),
    };
    what + &values
}

fn condition(choices: &mut Choices<'_>) -> &'static str {
    choices.of(&[
        "",
        "",
        "",
        " when running",
        " unless peer running and attested",
        " when flag f or not flag g",
        " when between 22:00 and 06:00 on fri..mon",
        " when measured abcd",
        " when not (paused or peer attested)",
    ])
}

fn statement(choices: &mut Choices<'_>) -> String {
    let effect = choices.of(&[
        "allow",
        "allow",
        "allow",
        "deny",
        "never",
        "quarantine",
        "throttle",
        "ask",
        "redirect",
        "limit",
        "reach",
    ]);
    let asker = expr(choices, 2);
    if effect == "reach" {
        return format!("never {asker} to reach {}\n", expr(choices, 2));
    }
    let access = access(choices);
    let peer = match choices.next() % 4 {
        0 => String::new(),
        1 => format!(" of {} in {} t", expr(choices, 1), choices.of(&["same", "other"])),
        _ => format!(" of {}", expr(choices, 2)),
    };
    let tail = match effect {
        "throttle" => format!(" at {} KiB per minute", choices.next() + 1),
        "ask" => format!(" by {} within 5 minutes", expr(choices, 1)),
        "redirect" => format!(" onto {}", choices.of(&NAMES)),
        "limit" => return format!("limit {asker} to {access}{peer} at {} open\n", choices.next() + 1),
        _ => String::new(),
    };
    let when = if effect == "never" { "" } else { condition(choices) };
    format!("{effect} {asker} to {access}{peer}{tail}{when}\n")
}

/// What a fuzzer's input does: reads the policy, and whether the table and the explanation of each request say the same, whatever holds; a
/// proof, a picture and a comparison end. Returns whether the policy was one.
pub(crate) fn exercise(bytes: &[u8]) -> bool {
    let mut choices = Choices(bytes);
    let text = text(&mut choices);
    let policy = match Policy::parse(&text) {
        Ok(policy) => policy,
        Err(PolicyError::Invalid(problems)) => {
            assert!(problems.iter().all(|problem| problem.line >= 1), "{problems}");
            return false;
        }
        Err(_) => return false,
    };
    ask(&policy, &text, &mut choices)
}

/// The text of a policy.
pub(crate) fn policy(bytes: &[u8]) -> String {
    text(&mut Choices(bytes))
}

fn text(choices: &mut Choices<'_>) -> String {
    let mut text = String::from("family t: red, blue\nlabels l0, l1\nsecrecy low < high\n");
    if choices.next().is_multiple_of(2) {
        text.push_str("wall w: red, blue\n");
    }
    for name in NAMES {
        let kind = if name == "h" { "host" } else { "vm" };
        let labels = choices.of(&[
            "",
            " { labels red }",
            " { labels blue, l0 }",
            " { labels l1 secrecy high }",
            " { labels l0, l1 guard }",
        ]);
        text.push_str(&format!("{kind} {name}{labels}\n"));
    }
    text.push_str(choices.of(&[
        "",
        "disk d { labels red }\n",
        "region d-1 { labels blue secrecy high }\n",
        "network d { filtered }\n",
    ]));
    for _ in 0..choices.next() % 12 {
        text.push_str(&statement(choices));
    }
    text
}

fn ask(policy: &Policy, text: &str, choices: &mut Choices<'_>) -> bool {
    let mut coverage = Coverage::new(policy);
    for _ in 0..40 {
        let what = choices.of(&[
            "connect vsock 7",
            "accept vsock 3",
            "connect tcp 443",
            "send udp 53",
            "map-ro region d-1",
            "map-rw region d-2",
            "attach disk d",
            "attach disk d-11",
            "attach-ro share x",
            "notify doorbell d",
            "administer d",
            "use hypercall 5",
            "use mmio 18446744073709551615",
            "attach network d",
            "use balloon",
            "export snapshot d",
        ]);
        let peer = choices.of(&["", "", " of v0", " of v1", " of v2", " of h"]);
        let when = choices.of(&[
            "",
            " when paused",
            " when attested and peer attested",
            " when flag f",
            " when measured abcd and flag g",
        ]);
        let sentence = format!("{} to {what}{peer}{when}", choices.of(&NAMES));
        let (Ok(entry), Ok(explanation)) = (coverage.record(&sentence), policy.explain(&sentence)) else {
            panic!("{sentence} is no request\n{text}");
        };
        assert_eq!(
            (entry.verdict, entry.layer),
            (explanation.verdict, explanation.layer),
            "{sentence}\n{text}\n{explanation}"
        );
        if entry.verdict.permits()
            && let Some(peer) = peer.strip_prefix(" of ")
            && let Some(asker) = sentence.split(' ').next()
            && asker != peer
            && what.starts_with("connect")
        {
            let path = policy.prove_no_path(asker, peer);
            assert!(
                path.is_ok_and(|path| path.is_some()),
                "{sentence} is allowed, and no path was found\n{text}"
            );
        }
    }
    let changed = policy.diff(policy);
    assert!(changed.is_ok_and(|changes| changes.is_empty()), "a policy differs from itself\n{text}");
    assert!(policy.usage().is_ok());
    if let Ok(graph) = policy.graph() {
        assert!(graph.to_svg().ends_with("</svg>\n") && graph.to_dot().ends_with("}\n"));
    }
    true
}
