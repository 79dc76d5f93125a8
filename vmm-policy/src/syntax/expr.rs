//! Who and what: the part of a rule before its `when`.

use super::ast::{Access, Expr, Relation, Targets, ValuePattern, Word};
use super::cursor::{Cursor, Parsed, is_reserved};
use super::error::{PolicyError, Report};
use super::source::Sources;
use super::token::{TokenKind, tokens};
use crate::limits;
use crate::model::{Action, Kind, Op, ValueKind};

/// `EXPR to ACCESS [of EXPR] [in same|other FAMILY]`, from behind `to` on.
pub(super) fn targets(cursor: &mut Cursor<'_>, asker: Expr) -> Parsed<Targets> {
    let access = access(cursor)?;
    let peer = if cursor.eat("of") { Some(expr(cursor)?) } else { None };
    let relation = if cursor.eat("in") {
        let same = match cursor.peek_word() {
            Some("same") => true,
            Some("other") => false,
            _ => return cursor.expected_one_of("\"same\" or \"other\"", &["same", "other"]),
        };
        cursor.advance();
        if peer.is_none() {
            let span = cursor.last_span();
            return cursor.fail(
                span,
                "nobody is named whose family could be the same",
                Some("add \"of any\" before \"in\"".into()),
            );
        }
        Some(Relation { same, family: cursor.name("the name of a family")? })
    } else {
        None
    };
    Ok(Targets { asker, access, peer, relation })
}

/// Whom: `or` and commas bind least, then `and`, then `not`.
pub(super) fn expr(cursor: &mut Cursor<'_>) -> Parsed<Expr> {
    let mut all = vec![conjunction(cursor)?];
    while cursor.eat("or") || cursor.eat_sign(',') {
        if all.len() >= limits::LIST {
            let span = cursor.last_span();
            return cursor.fail(span, format!("more than {} alternatives", limits::LIST), None);
        }
        all.push(conjunction(cursor)?);
    }
    Ok(if all.len() == 1 { all.swap_remove(0) } else { Expr::Or(all) })
}

fn conjunction(cursor: &mut Cursor<'_>) -> Parsed<Expr> {
    let mut all = vec![unary(cursor)?];
    while cursor.eat("and") {
        if all.len() >= limits::LIST {
            let span = cursor.last_span();
            return cursor.fail(span, format!("more than {} labels joined by \"and\"", limits::LIST), None);
        }
        all.push(unary(cursor)?);
    }
    Ok(if all.len() == 1 { all.swap_remove(0) } else { Expr::And(all) })
}

fn unary(cursor: &mut Cursor<'_>) -> Parsed<Expr> {
    if cursor.eat("not") {
        return Ok(Expr::Not(Box::new(cursor.deeper(unary)?)));
    }
    if cursor.eat_sign('(') {
        let inner = cursor.deeper(expr)?;
        cursor.expect_sign(')')?;
        return Ok(inner);
    }
    if cursor.eat("any") {
        return Ok(if cursor.eat_on_line("vm") {
            Expr::AnyVm
        } else if cursor.eat_on_line("host") {
            Expr::AnyHost
        } else if cursor.eat_on_line("object") {
            Expr::AnyObject
        } else {
            Expr::Any
        });
    }
    Ok(Expr::Label(cursor.name("a label, a name or \"any\"")?))
}

fn kind_words() -> Vec<&'static str> {
    Kind::ALL.iter().map(|kind| kind.word()).collect()
}

/// `anything [KIND [VALUES]]`, `administer [VERBS]`, `ACTION, .. KIND [VALUES]`.
fn access(cursor: &mut Cursor<'_>) -> Parsed<Access> {
    if cursor.eat("anything") {
        let same_line = cursor.peek().is_some_and(|token| !token.begins_line);
        let kind = cursor.peek_word().filter(|_| same_line).and_then(Kind::from_word);
        let values = match kind {
            Some(kind) => {
                cursor.advance();
                values(cursor, kind)?
            }
            None => Vec::new(),
        };
        return Ok(Access { actions: Vec::new(), kind, values });
    }
    if cursor.eat("administer") {
        let values = values(cursor, Kind::Verb)?;
        return Ok(Access { actions: vec![Action::Administer], kind: Some(Kind::Verb), values });
    }
    let actions = cursor.list(|cursor| {
        let span = cursor.span();
        match cursor.peek_word().and_then(Action::from_word) {
            Some(action) => {
                cursor.advance();
                Ok((action, span))
            }
            None => {
                let mut words: Vec<_> = Action::ALL.iter().map(|action| action.word()).collect();
                words.push("anything");
                cursor.expected_one_of("what is done", &words)
            }
        }
    })?;
    let Some(kind) = cursor.peek_word().and_then(Kind::from_word) else {
        return cursor.expected_one_of("a kind of object", &kind_words());
    };
    cursor.advance();
    for (action, span) in &actions {
        if Op::new(kind, *action).is_none() {
            let known: Vec<_> = kind.actions().iter().map(|(action, _)| action.word()).collect();
            let help = format!("{kind} knows {}", super::one_of(known));
            return cursor.fail(*span, format!("nobody can {action} {kind}"), Some(help));
        }
    }
    let values = values(cursor, kind)?;
    Ok(Access { actions: actions.into_iter().map(|(action, _)| action).collect(), kind: Some(kind), values })
}

/// The objects of `kind` that are named, if any are.
fn values(cursor: &mut Cursor<'_>, kind: Kind) -> Parsed<Vec<ValuePattern>> {
    let follows = match cursor.peek().map(|token| &token.kind) {
        Some(TokenKind::Word(word)) => !is_reserved(word),
        Some(TokenKind::Text(_)) => true,
        _ => false,
    };
    match kind.value_kind() {
        _ if !follows => Ok(Vec::new()),
        ValueKind::Nothing => {
            let span = cursor.span();
            cursor.fail(span, format!("{kind} has no numbers or names"), None)
        }
        ValueKind::Number(most) => cursor.list(|cursor| {
            let what = format!("a {kind} number");
            let first_span = cursor.span();
            let first = cursor.number(&what, most)?;
            let last = if cursor.eat_dots() { cursor.number(&what, most)? } else { first };
            if last < first {
                let span = first_span.to(cursor.last_span());
                return cursor.fail(
                    span,
                    "the range ends before it begins",
                    Some(format!("{last}..{first}")),
                );
            }
            Ok(ValuePattern::Range(first, last))
        }),
        ValueKind::Name => cursor.list(|cursor| {
            if let Some(TokenKind::Word(word)) = cursor.peek().map(|token| &token.kind)
                && let Some(prefix) = word.strip_suffix('*')
            {
                let span = cursor.span();
                cursor.advance();
                return Ok(ValuePattern::Prefix(Word::new(prefix, span)));
            }
            let name = cursor.name("a name")?;
            // Within quotes as well, for names with characters that words have not.
            Ok(match name.text.strip_suffix('*') {
                Some(prefix) => ValuePattern::Prefix(Word::new(prefix, name.span)),
                None => ValuePattern::Name(name),
            })
        }),
    }
}

/// A request in the words of a rule: `web-red to connect vsock 5432 of db-red`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sentence {
    /// Who asks.
    pub(crate) asker: Word,
    /// For what.
    pub(crate) action: Action,
    /// With what kind of object.
    pub(crate) kind: Kind,
    /// Which one.
    pub(crate) value: ValuePattern,
    /// Of whom.
    pub(crate) peer: Option<Word>,
    /// What holds at the time.
    pub(crate) when: Option<super::Condition>,
}

/// Reads an expression: whom a question is about.
pub(crate) fn expression(text: &str) -> Result<Expr, PolicyError> {
    whole(text, expr)
}

/// Reads `text`, all of which is what `parse` takes.
fn whole<T>(text: &str, parse: impl FnOnce(&mut Cursor<'_>) -> Parsed<T>) -> Result<T, PolicyError> {
    let mut sources = Sources::default();
    let mut report = Report::default();
    let file = sources.add("request", text.chars().take(limits::LIST).collect());
    let words = tokens(sources.contents(file), file, &mut report);
    let length = sources.contents(file).len() as u32;
    let end = super::Span { file, start: length, end: length };
    let mut cursor = Cursor::new(&words.tokens, end, &mut report);
    let mut parsed = parse(&mut cursor);
    if parsed.is_ok() && !cursor.is_at_end() {
        parsed = cursor.expected("nothing more");
    }
    report.finish(&sources)?;
    parsed.map_err(|_| PolicyError::Nobody { text: sources.contents(file).to_owned() })
}

/// Reads a [`Sentence`].
pub(crate) fn sentence(text: &str) -> Result<Sentence, PolicyError> {
    whole(text, parse_sentence)
}

fn parse_sentence(cursor: &mut Cursor<'_>) -> Parsed<Sentence> {
    let asker = cursor.name("who asks")?;
    cursor.expect("to")?;
    let span = cursor.span();
    let access = access(cursor)?;
    let span = span.to(cursor.last_span());
    let (Some(kind), [action]) = (access.kind, access.actions.as_slice()) else {
        return cursor.fail(span, "a request is for one action", None);
    };
    let value = match (kind.value_kind(), access.values.as_slice()) {
        (ValueKind::Nothing, []) => ValuePattern::Range(0, 0),
        (_, [value @ ValuePattern::Name(_)]) => value.clone(),
        (_, [ValuePattern::Range(first, last)]) if first == last => ValuePattern::Range(*first, *first),
        _ => return cursor.fail(span, format!("a request is for one {kind}"), None),
    };
    let peer = if cursor.eat("of") { Some(cursor.name("the peer")?) } else { None };
    let when = if cursor.eat("when") { Some(super::condition::condition(cursor)?) } else { None };
    Ok(Sentence { asker, action: *action, kind, value, peer, when })
}
