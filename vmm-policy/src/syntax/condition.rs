//! When: the part of a rule behind `when` or `unless`.

use super::ast::{Clock, Condition, Fact, Weekdays};
use super::cursor::{Cursor, Parsed};
use crate::limits;
use crate::model::Lifecycle;

/// `[when COND | unless COND]`.
pub(super) fn when(cursor: &mut Cursor<'_>) -> Parsed<Option<Condition>> {
    if cursor.eat("when") {
        return condition(cursor).map(Some);
    }
    if cursor.eat("unless") {
        let inner = condition(cursor)?;
        return Ok(Some(Condition::Not(Box::new(inner))));
    }
    Ok(None)
}

/// `or` binds least, then `and`, then `not`.
pub(super) fn condition(cursor: &mut Cursor<'_>) -> Parsed<Condition> {
    let mut all = vec![conjunction(cursor)?];
    while cursor.eat("or") {
        all.push(conjunction(cursor)?);
        bounded(cursor, all.len())?;
    }
    Ok(if all.len() == 1 { all.swap_remove(0) } else { Condition::Or(all) })
}

fn conjunction(cursor: &mut Cursor<'_>) -> Parsed<Condition> {
    let mut all = vec![unary(cursor)?];
    while cursor.eat("and") {
        all.push(unary(cursor)?);
        bounded(cursor, all.len())?;
    }
    Ok(if all.len() == 1 { all.swap_remove(0) } else { Condition::And(all) })
}

fn bounded(cursor: &mut Cursor<'_>, length: usize) -> Parsed<()> {
    if length <= limits::CLAUSES {
        return Ok(());
    }
    let span = cursor.last_span();
    cursor.fail(span, format!("more than {} conditions joined", limits::CLAUSES), None)
}

fn unary(cursor: &mut Cursor<'_>) -> Parsed<Condition> {
    if cursor.eat("not") {
        return Ok(Condition::Not(Box::new(cursor.deeper(unary)?)));
    }
    if cursor.eat_sign('(') {
        let inner = cursor.deeper(condition)?;
        cursor.expect_sign(')')?;
        return Ok(inner);
    }
    let peer = cursor.eat("peer");
    let fact = fact(cursor, peer)?;
    Ok(Condition::Is { fact, peer })
}

fn fact(cursor: &mut Cursor<'_>, peer: bool) -> Parsed<Fact> {
    if let Some(state) = cursor.peek_word().and_then(Lifecycle::from_word) {
        cursor.advance();
        return Ok(Fact::Lifecycle(state));
    }
    match cursor.peek_word() {
        Some("attested") => {
            cursor.advance();
            Ok(Fact::Attested)
        }
        Some("measured") => {
            cursor.advance();
            let digest = cursor.name("a digest in hexadecimal digits")?;
            let digits = digest.text.len();
            if digits < 2
                || !digits.is_multiple_of(2)
                || !digest.text.bytes().all(|digit| digit.is_ascii_hexdigit())
            {
                return cursor.fail(digest.span, "a digest is an even number of hexadecimal digits", None);
            }
            Ok(Fact::Measured(digest))
        }
        Some("between") if !peer => {
            cursor.advance();
            let from = clock(cursor)?;
            cursor.expect("and")?;
            let to = clock(cursor)?;
            let days = if cursor.eat("on") { weekdays(cursor)? } else { Weekdays::ALL };
            Ok(Fact::Between { from, to, days })
        }
        Some("flag") if !peer => {
            cursor.advance();
            Ok(Fact::Flag(cursor.name("the name of a flag")?))
        }
        _ => {
            let mut words: Vec<_> = Lifecycle::ALL.iter().map(|state| state.word()).collect();
            words.extend(["attested", "measured"]);
            if !peer {
                words.extend(["between", "flag", "peer", "not"]);
            }
            cursor.expected_one_of("a condition", &words)
        }
    }
}

/// `HH:MM`
fn clock(cursor: &mut Cursor<'_>) -> Parsed<Clock> {
    let hours = cursor.number("an hour", 23)?;
    cursor.expect_sign(':')?;
    let minutes = cursor.number("a minute", 59)?;
    Ok(Clock(hours as u16 * 60 + minutes as u16))
}

/// `mon..fri, sun`
fn weekdays(cursor: &mut Cursor<'_>) -> Parsed<Weekdays> {
    let spans = cursor.list(|cursor| {
        let first = weekday(cursor)?;
        let last = if cursor.eat_dots() { weekday(cursor)? } else { first };
        Ok((first, last))
    })?;
    let mut days = 0;
    for (first, last) in spans {
        let mut day = first;
        days |= 1 << day;
        while day != last {
            day = (day + 1) % 7;
            days |= 1 << day;
        }
    }
    Ok(Weekdays(days))
}

fn weekday(cursor: &mut Cursor<'_>) -> Parsed<usize> {
    match Weekdays::NAMES.iter().position(|name| cursor.is_word(name)) {
        Some(day) => {
            cursor.advance();
            Ok(day)
        }
        None => cursor.expected_one_of("a day of the week", &Weekdays::NAMES),
    }
}
