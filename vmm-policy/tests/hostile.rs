//! Policies that are made to cost: refused, or compiled in bounded time and memory.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test")]

use std::fmt::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_policy::syntax::MemoryLoader;
use vmm_policy::{Policy, PolicyError, limits};

/// What it says to `text`, and that it does not take forever: seconds where it should be a fraction, since the machine may be busy.
fn refusal(text: &str) -> String {
    let begin = Instant::now();
    let refusal = Policy::parse(text).unwrap_err().to_string();
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?} for {refusal}", begin.elapsed());
    refusal
}

#[test]
fn a_million_rules_are_refused() {
    let found = refusal(&"allow any to use balloon\n".repeat(1_000_000));
    let lines: Vec<&str> = found.lines().collect();
    assert_eq!(
        lines,
        [
            "policy:250001:1: the policy has more than 250000 statements",
            "policy:800001:1: the policy has more than 4000000 words",
        ]
    );
    let found = refusal(&"#".repeat(limits::POLICY_BYTES + 1));
    assert_eq!(found, "policy:1:1: the policy has more than 67108864 bytes");
}

/// The most memory that the process has had, in MiB; `None` where the system does not say.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? >> 10)
}

#[test]
fn as_many_rules_as_may_be_are_compiled_in_bounded_time_and_memory() {
    let mut text = String::from("labels l\n");
    for vm in 0..500 {
        writeln!(text, "vm v{vm} {{ labels l }}").unwrap();
    }
    for at in 0..limits::STATEMENTS - 501 {
        writeln!(text, "allow v{} to connect vsock {} of v{}", at % 500, at / 500, at / 500 % 500).unwrap();
    }
    let begin = Instant::now();
    let policy = Policy::parse(&text).unwrap();
    assert_eq!(policy.rules().count(), limits::STATEMENTS - 501);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    match peak() {
        Some(peak) => assert!(peak < 3072, "{peak} MiB"),
        None => println!("skipped: the system does not say how much memory there was"),
    }
}

#[test]
fn depth_is_refused_before_it_costs() {
    let deep = |open: &str, close: &str| format!("{}any{}", open.repeat(100_000), close.repeat(100_000));
    for text in [
        format!("allow {} to use balloon", deep("(", ")")),
        format!("allow {} to use balloon", deep("not ", "")),
        format!("allow any to use balloon when {}", deep("(", ")").replace("any", "running")),
        format!("allow any to use balloon when {}", deep("not ", "").replace("any", "running")),
        format!("never {} to reach any", deep("(not ", ")")),
    ] {
        let found = refusal(&text);
        assert!(found.contains("inside each other"), "{found}");
    }
}

#[test]
fn rules_about_everybody_and_everybody_are_refused_where_they_are_too_wide() {
    let mut text = String::from("labels l\n");
    for vm in 0..4000 {
        writeln!(text, "vm v{vm} {{ labels l }}").unwrap();
    }
    for vm in 0..4000 {
        // Each name is used, so that each is a class of its own.
        writeln!(text, "allow v{vm} to use balloon").unwrap();
    }
    let wide = refusal(&format!("{text}allow l to connect vsock of l"));
    assert_eq!(
        wide,
        format!(
            "pairs of asker and peer that rules are about come to more than {}: line 8002 of policy is one too many",
            limits::CELL_RULES
        )
    );
    // Of any and any there is one cell.
    Policy::parse(&format!("{text}allow any to connect vsock of any")).unwrap();
}

#[test]
fn nested_ranges_and_conditions_have_bounds() {
    let mut text = String::new();
    for at in 0..20_000 {
        writeln!(text, "allow any to connect vsock {at}..{} of any", 100_000 - at).unwrap();
    }
    Policy::parse(&text).unwrap();
    let mut text = String::new();
    for at in 0..1000 {
        writeln!(text, "throttle any to connect vsock of any at {} KiB per second when running", at + 1)
            .unwrap();
    }
    assert_eq!(
        refusal(&text),
        "rules with conditions that are about one request come to more than 64: line 65 is one too many"
    );
    let mut text = String::new();
    for at in 0..1000 {
        writeln!(text, "limit any to use balloon at {} per second", at + 1).unwrap();
    }
    assert_eq!(
        refusal(&text),
        "limits that are about one request come to more than 16: line 1000 is one too many"
    );
    let flags: Vec<String> =
        (0..40).map(|at| format!("allow any to use balloon when flag f{at}\n")).collect();
    assert!(refusal(&flags.concat()).contains("the policy's conditions name more than 32 flags"));
    let either: Vec<String> = (0..8).map(|at| format!("(flag a{at} or flag b{at})")).collect();
    let found = refusal(&format!("allow any to use balloon when {}", either.join(" and ")));
    assert!(found.contains("the condition can hold in more than 16 ways"), "{found}");
}

#[test]
fn levels_that_contradict_each_other_are_refused() {
    assert_eq!(refusal("secrecy a < b < a"), "policy:1:17: \"a\" is twice in it");
    assert!(refusal("secrecy a < b\nsecrecy b < a").contains("policy:2:1: \"secrecy\" is said twice"));
    assert!(
        refusal("family f: a\nfamily g: a").contains("policy:2:11: \"a\" is declared already, in line 1")
    );
    assert!(refusal("family f: a, b\nvm x { labels a, b }").contains("are both of the family \"f\""));
    assert!(
        refusal("labels a, b\nwall w: a, b\nvm x { labels a, b }")
            .contains("stands on both sides of the wall \"w\"")
    );
    assert!(refusal("vm x { uuid 1-2 }").contains("\"1-2\" is no UUID"));
    assert!(
        refusal("vm x { secrecy high }")
            .contains("there is no level of secrecy \"high\"; declare it: secrecy LOW < high")
    );
    assert!(
        refusal("labels web\nallow wep to use balloon")
            .contains("policy:2:7: nobody is called \"wep\", and no label is; did you mean \"web\"?")
    );
    assert!(refusal("redirect any to send udp 53 of any onto dns").contains("\"dns\" is no virtual machine"));
}

#[test]
fn files_that_include_each_other_have_bounds() {
    let chain = (0..40).map(|at| (format!("f{at}"), format!("include \"f{}\"", at + 1))).collect();
    let found = Policy::parse_with("top", "include \"f0\"", &MemoryLoader(chain)).unwrap_err().to_string();
    assert!(found.starts_with("f14:1:9: files include each other 16 deep; 16 is the most"), "{found}");
    let cycle = [("a", "include \"b\""), ("b", "include \"a\"")]
        .map(|(name, text)| (name.to_owned(), text.to_owned()));
    let found =
        Policy::parse_with("top", "include \"a\"", &MemoryLoader(cycle.into())).unwrap_err().to_string();
    assert!(
        found.contains("\"a\" would include itself; top includes a includes b is where it begins"),
        "{found}"
    );
    let many: String = (0..300).map(|at| format!("include \"f{at}\"\n")).collect();
    let files = (0..300).map(|at| (format!("f{at}"), String::new())).collect();
    let found = Policy::parse_with("top", &many, &MemoryLoader(files)).unwrap_err().to_string();
    assert!(found.contains("the policy has more than 256 files"), "{found}");
}

/// Words that mean something, at random.
fn soup() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "allow", "deny", "never", "vm", "host", "labels", "family", "any", "to", "of", "in", "same", "when",
        "unless", "connect", "attach", "vsock", "disk", "region", "anything", "reach", "a", "b", "t", "1",
        "0..9", "x-*", "\"q\"", "(", ")", "{", "}", ",", ":", "<", "not", "and", "or", "running", "limit",
        "at", "per", "second", "open", "pages", "\n", "\n", "# c\n", "between", "08:00", "\"", "escalate",
        "kill", "after", "wall", "secrecy", "by", "within", "ask", "redirect", "onto", "throttle", "\u{e9}",
        "uuid", "guard",
    ]);
    prop::collection::vec(words, 0..60).prop_map(|words| words.join(" "))
}

fn is_located(text: &str) {
    match Policy::parse(text) {
        Ok(policy) => {
            // What is read can be written, and is the same then.
            let written = policy.document().to_string();
            let again = Policy::parse(&written).unwrap();
            assert_eq!(again.document(), policy.document(), "{text:?}\n{written}");
            assert_eq!(again.digest(), policy.digest());
        }
        Err(PolicyError::Invalid(problems)) => {
            let lines = text.lines().count().max(1) + 1;
            for problem in problems.iter() {
                assert!((1..=lines).contains(&problem.line) && problem.column >= 1, "{problem:?}");
                assert!(!problem.message.is_empty());
            }
        }
        Err(other) => assert!(matches!(other, PolicyError::TooLarge { .. }), "{other}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn words_at_random_are_refused_with_their_place(text in soup()) {
        is_located(&text);
    }

    #[test]
    fn text_at_random_is_refused_with_its_place(text in "\\PC{0,200}") {
        is_located(&text);
    }

    #[test]
    fn a_policy_that_was_damaged_is_refused_with_its_place(at in 0_usize..3000, with in "\\PC{0,3}", cut in 0_usize..40) {
        let whole = include_str!("../policies/two-tenants.policy");
        let mut text: Vec<char> = whole.chars().collect();
        let at = at.min(text.len());
        let end = (at + cut).min(text.len());
        text.splice(at..end, with.chars());
        is_located(&text.into_iter().collect::<String>());
    }
}

#[path = "support/words.rs"]
mod words;

#[test]
fn bytes_at_random_do_what_the_fuzz_target_does() {
    let mut rng = fastrand::Rng::with_seed(4);
    let good =
        (0..400).filter(|_| words::exercise(&(0..300).map(|_| rng.u8(..)).collect::<Vec<_>>())).count();
    assert!(good > 40, "{good} of 400 were policies: that tests little");
}
