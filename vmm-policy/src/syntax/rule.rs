//! Statements about who may do what.

use super::ast::{Access, Effect, Escalation, Item, Limit, Quantity, Rule, Step, Targets};
use super::condition::when;
use super::cursor::{Cursor, Parsed};
use super::expr::{expr, targets};
use crate::model::Rate;

/// From behind the word `effect` on.
pub(super) fn rule(cursor: &mut Cursor<'_>, effect: &str) -> Parsed<Item> {
    let asker = expr(cursor)?;
    cursor.expect("to")?;
    if effect == "never" && cursor.eat("reach") {
        let peer = Some(expr(cursor)?);
        let access = Access { actions: Vec::new(), kind: None, values: Vec::new() };
        let targets = Targets { asker, access, peer, relation: None };
        return Ok(Item::Rule(Rule { effect: Effect::NeverReach, targets, when: None }));
    }
    let targets = targets(cursor, asker)?;
    let effect = match effect {
        "allow" => Effect::Allow,
        "deny" => Effect::Deny,
        "quarantine" => Effect::Quarantine,
        "never" => Effect::Never,
        "throttle" => {
            cursor.expect("at")?;
            let span = cursor.span();
            match amount(cursor)? {
                Amount::Bytes(0) => return cursor.fail(span, "to throttle to nothing is to deny", None),
                Amount::Bytes(bytes) => Effect::Throttle(Rate { bytes, seconds: per(cursor)? }),
                _ => {
                    return cursor.fail(
                        span,
                        "a rule throttles bytes",
                        Some("requests are counted by \"limit\"".into()),
                    );
                }
            }
        }
        "redirect" => {
            cursor.expect("onto")?;
            let onto = cursor.name("the name of whom it leads to")?;
            let number =
                cursor.peek_word().is_some_and(|word| word.starts_with(|c: char| c.is_ascii_digit()));
            let number = if number { Some(cursor.number("a port", u32::MAX.into())?) } else { None };
            Effect::Redirect { onto, number }
        }
        _ => {
            cursor.expect("by")?;
            let by = expr(cursor)?;
            cursor.expect("within")?;
            Effect::Ask { by, seconds: time(cursor)? }
        }
    };
    let begin = cursor.span();
    let when = when(cursor)?;
    if when.is_some() && effect == Effect::Never {
        return cursor.fail(
            begin,
            "\"never\" has no condition: it is always so",
            Some("\"deny\" may have one".into()),
        );
    }
    Ok(Item::Rule(Rule { effect, targets, when }))
}

/// From behind `limit` on.
pub(super) fn limit(cursor: &mut Cursor<'_>) -> Parsed<Item> {
    let asker = expr(cursor)?;
    cursor.expect("to")?;
    let targets = targets(cursor, asker)?;
    cursor.expect("at")?;
    let span = cursor.span();
    let quantity = match amount(cursor)? {
        Amount::Open(count) => Quantity::Open(count),
        Amount::Pages(count) => Quantity::Pages(count),
        Amount::Bytes(count) => {
            let seconds = per(cursor)?;
            let burst_span = cursor.span();
            let burst = match cursor.eat("burst").then(|| amount(cursor)).transpose()? {
                None => count,
                Some(Amount::Bytes(burst)) => burst,
                Some(_) => return cursor.fail(burst_span, "a burst of bytes is bytes", None),
            };
            Quantity::Bytes { count, seconds, burst }
        }
        Amount::Number(count) => {
            let seconds = per(cursor)?;
            let burst = if cursor.eat("burst") { cursor.number("a burst", u32::MAX.into())? } else { count };
            Quantity::Requests { count, seconds, burst }
        }
    };
    let nothing = match quantity {
        Quantity::Open(count) | Quantity::Pages(count) => count == 0,
        Quantity::Bytes { count, burst, .. } | Quantity::Requests { count, burst, .. } => {
            count == 0 || burst == 0
        }
    };
    if nothing {
        return cursor.fail(span, "to limit to nothing is to deny", Some("write a \"deny\" rule".into()));
    }
    Ok(Item::Limit(Limit { targets, quantity }))
}

/// From behind `escalate` on.
pub(super) fn escalate(cursor: &mut Cursor<'_>) -> Parsed<Item> {
    let asker = expr(cursor)?;
    cursor.expect_sign(':')?;
    let steps = cursor.list(|cursor| {
        let step = match cursor.peek_word() {
            Some("throttle") => Step::Throttle,
            Some("reset") => Step::Reset,
            Some("pause") => Step::Pause,
            Some("kill") => Step::Kill,
            _ => return cursor.expected_one_of("what is done", &["throttle", "reset", "pause", "kill"]),
        };
        let span = cursor.span();
        cursor.advance();
        cursor.expect("after")?;
        let count = cursor.number("how many violations", u32::MAX.into())? as u32;
        Ok((step, count, span))
    })?;
    for pair in steps.windows(2) {
        if let [(earlier, few, _), (later, many, span)] = pair
            && (later <= earlier || many < few)
        {
            let message = "each step is harsher than the one before, and comes later";
            return cursor.fail(*span, message, Some("throttle, reset, pause, kill is the order".into()));
        }
    }
    let steps: Vec<(Step, u32)> = steps.into_iter().map(|(step, count, _)| (step, count)).collect();
    if steps.first().is_some_and(|(_, count)| *count == 0) {
        let span = cursor.last_span();
        return cursor.fail(span, "nothing follows from no violation", None);
    }
    Ok(Item::Escalate(Escalation { asker, steps, seconds: per(cursor)? }))
}

enum Amount {
    Number(u64),
    Bytes(u64),
    Pages(u64),
    Open(u64),
}

/// `100`, `64 MiB`, `4096 pages`, `8 open`.
fn amount(cursor: &mut Cursor<'_>) -> Parsed<Amount> {
    let span = cursor.span();
    let count = cursor.number("an amount", u64::from(u32::MAX))?;
    let unit = match cursor.peek_word() {
        Some("bytes") => 0,
        Some("KiB") => 10,
        Some("MiB") => 20,
        Some("GiB") => 30,
        Some("pages") => {
            cursor.advance();
            return Ok(Amount::Pages(count));
        }
        Some("open") => {
            cursor.advance();
            return Ok(Amount::Open(count));
        }
        Some("per") => return Ok(Amount::Number(count)),
        _ => {
            return cursor.expected_one_of("a unit", &["bytes", "KiB", "MiB", "GiB", "pages", "open", "per"]);
        }
    };
    cursor.advance();
    match count.checked_mul(1 << unit).filter(|bytes| *bytes <= 1 << 50) {
        Some(bytes) => Ok(Amount::Bytes(bytes)),
        None => cursor.fail(span, "that is more than 2^50 bytes", None),
    }
}

/// `per second`, `per 5 minutes`.
fn per(cursor: &mut Cursor<'_>) -> Parsed<u32> {
    cursor.expect("per")?;
    time(cursor)
}

/// `second`, `10 minutes`: in seconds, at most 31 days.
fn time(cursor: &mut Cursor<'_>) -> Parsed<u32> {
    let span = cursor.span();
    let counted = cursor.peek_word().is_some_and(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let count = if counted { cursor.number("how long", 31 * 86_400)? as u32 } else { 1 };
    let unit = match cursor.peek_word() {
        Some("second" | "seconds") => 1,
        Some("minute" | "minutes") => 60,
        Some("hour" | "hours") => 3600,
        Some("day" | "days") => 86_400,
        _ => return cursor.expected_one_of("a unit of time", &["second", "minute", "hour", "day"]),
    };
    cursor.advance();
    match count.checked_mul(unit).filter(|seconds| (1..=31 * 86_400).contains(seconds)) {
        Some(seconds) => Ok(seconds),
        None => cursor.fail(span, "a time is a second to 31 days", None),
    }
}
