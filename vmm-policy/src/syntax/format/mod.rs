//! A document as text, in the one way that `vmm-policy fmt` writes it.

mod facts;

use std::fmt::{self, Display, Formatter, Write};

use facts::{Bytes, Time};

use super::ast::*;
use super::cursor::is_reserved;
use crate::model::Kind;

/// Columns; what does not fit goes on in the next line.
const WIDTH: usize = 100;

impl Display for Document {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (nth, statement) in self.statements.iter().enumerate() {
            if statement.apart && nth > 0 {
                f.write_char('\n')?;
            }
            writeln!(f, "{statement}")?;
        }
        if !self.comments.is_empty() {
            if !self.statements.is_empty() {
                f.write_char('\n')?;
            }
            comments(f, &self.comments)?;
        }
        Ok(())
    }
}

fn comments(f: &mut Formatter<'_>, lines: &[String]) -> fmt::Result {
    lines.iter().try_for_each(|line| {
        // A comment of a document that no text was read for may have several.
        line.split('\n').try_for_each(|line| match line {
            "" => f.write_char('\n'),
            line => writeln!(f, "{}", format!("# {line}").trim_end()),
        })
    })
}

impl Display for Statement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        comments(f, &self.comments)?;
        let text = self.item.to_string();
        f.write_str(&text)?;
        match &self.trailing {
            Some(comment) => {
                let line: String = comment.chars().map(|c| if c == '\n' { ' ' } else { c }).collect();
                f.write_str(format!("  # {line}").trim_end())
            }
            None => Ok(()),
        }
    }
}

/// Bare where that is read as a name again.
impl Display for Word {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let text = &*self.text;
        if is_bare(text) && !is_reserved(text) { f.write_str(text) } else { quoted(f, text) }
    }
}

fn is_bare(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    text.chars().all(inner)
        && edge(text.chars().next())
        && edge(text.chars().next_back())
        && ["..", "./", "/.", "-.", ".-"].iter().all(|odd| !text.contains(odd))
}

fn quoted(f: &mut Formatter<'_>, text: &str) -> fmt::Result {
    f.write_char('"')?;
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            f.write_char('\\')?;
        }
        f.write_char(c)?;
    }
    f.write_char('"')
}

/// With commas between.
struct Listed<'a, T>(&'a [T]);

impl<T: Display> Display for Listed<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        joined(f, self.0, ", ", |f, one| one.fmt(f))
    }
}

fn joined<T>(
    f: &mut Formatter<'_>,
    all: &[T],
    between: &str,
    one: impl Fn(&mut Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (nth, item) in all.iter().enumerate() {
        if nth > 0 {
            f.write_str(between)?;
        }
        one(f, item)?;
    }
    Ok(())
}

impl Display for Item {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(title) => {
                f.write_str("policy ")?;
                quoted(f, title)
            }
            Self::Include(path) => {
                f.write_str("include ")?;
                quoted(f, &path.text)
            }
            Self::Labels(labels) => write!(f, "labels {}", Listed(labels)),
            Self::Categories(names) => write!(f, "categories {}", Listed(names)),
            Self::Family { name, labels } => write!(f, "family {name}: {}", Listed(labels)),
            Self::Wall { name, labels } => write!(f, "wall {name}: {}", Listed(labels)),
            Self::Secrecy(levels) => {
                f.write_str("secrecy ")?;
                joined(f, levels, " < ", |f, level| level.fmt(f))
            }
            Self::Integrity(levels) => {
                f.write_str("integrity ")?;
                joined(f, levels, " < ", |f, level| level.fmt(f))
            }
            Self::Party(party) => party.fmt(f),
            Self::Rule(rule) => rule.fmt(f),
            Self::Limit(limit) => write!(f, "limit {} at {}", limit.targets, limit.quantity),
            Self::Escalate(escalation) => {
                write!(f, "escalate {}: ", escalation.asker)?;
                joined(f, &escalation.steps, ", ", |f, (step, count)| write!(f, "{step} after {count}"))?;
                write!(f, " per {}", Time(escalation.seconds))
            }
        }
    }
}

impl Display for Party {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            PartyKind::Vm => "vm",
            PartyKind::Host => "host",
            PartyKind::Object(kind) => kind.word(),
        };
        write!(f, "{kind} {}", self.name)?;
        let mut lines: Vec<String> = Vec::new();
        if let Some(uuid) = &self.uuid {
            lines.push(format!("uuid {uuid}"));
        }
        if !self.labels.is_empty() {
            lines.push(format!("labels {}", Listed(&self.labels)));
        }
        if let Some(Level { level, categories }) = &self.secrecy {
            let with =
                if categories.is_empty() { String::new() } else { format!(" with {}", Listed(categories)) };
            lines.push(format!("secrecy {level}{with}"));
        }
        if let Some(level) = &self.integrity {
            lines.push(format!("integrity {level}"));
        }
        for (flag, word) in [(self.guard, "guard"), (self.filtered, "filtered")] {
            if flag {
                lines.push(word.to_owned());
            }
        }
        match lines.as_slice() {
            [] => Ok(()),
            [one] => write!(f, " {{ {one} }}"),
            _ => {
                f.write_str(" {\n")?;
                lines.iter().try_for_each(|line| writeln!(f, "    {line}"))?;
                f.write_char('}')
            }
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let targets = &self.targets;
        let head = match &self.effect {
            Effect::Allow => format!("allow {targets}"),
            Effect::Deny => format!("deny {targets}"),
            Effect::Quarantine => format!("quarantine {targets}"),
            Effect::Never => format!("never {targets}"),
            Effect::NeverReach => {
                let peer = targets.peer.as_ref().unwrap_or(&Expr::Any);
                format!("never {} to reach {peer}", targets.asker)
            }
            Effect::Throttle(rate) => {
                format!("throttle {targets} at {} per {}", Bytes(rate.bytes), Time(rate.seconds))
            }
            Effect::Redirect { onto, number } => {
                let number = number.map_or(String::new(), |number| format!(" {number}"));
                format!("redirect {targets} onto {onto}{number}")
            }
            Effect::Ask { by, seconds } => format!("ask {targets} by {by} within {}", Time(*seconds)),
        };
        f.write_str(&head)?;
        let tail = match &self.when {
            None => return Ok(()),
            Some(Condition::Not(inner)) => format!("unless {}", Grouped(&**inner, Binds::Loosely)),
            Some(condition) => format!("when {condition}"),
        };
        let gap = if head.chars().count() + tail.chars().count() < WIDTH { " " } else { "\n    " };
        write!(f, "{gap}{tail}")
    }
}

impl Display for Targets {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.asker, self.access)?;
        if let Some(peer) = &self.peer {
            write!(f, " of {peer}")?;
        }
        match &self.relation {
            Some(Relation { same, family }) => {
                write!(f, " in {} {family}", if *same { "same" } else { "other" })
            }
            None => Ok(()),
        }
    }
}

impl Display for Access {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (self.actions.as_slice(), self.kind) {
            ([], None) => return f.write_str("anything"),
            ([], Some(kind)) => write!(f, "anything {kind}")?,
            (actions, None | Some(Kind::Verb)) => Listed(actions).fmt(f)?,
            (actions, Some(kind)) => write!(f, "{} {kind}", Listed(actions))?,
        }
        if self.values.is_empty() {
            return Ok(());
        }
        f.write_char(' ')?;
        joined(f, &self.values, ", ", |f, value| pattern(f, self.kind, value))
    }
}

pub(crate) fn number(f: &mut Formatter<'_>, kind: Option<Kind>, number: u64) -> fmt::Result {
    match kind {
        Some(Kind::Mmio | Kind::Msr | Kind::Pio | Kind::Ethernet) => write!(f, "{number:#x}"),
        _ => write!(f, "{number}"),
    }
}

fn pattern(f: &mut Formatter<'_>, kind: Option<Kind>, pattern: &ValuePattern) -> fmt::Result {
    match pattern {
        ValuePattern::Range(first, last) => {
            number(f, kind, *first)?;
            if first != last {
                f.write_str("..")?;
                number(f, kind, *last)?;
            }
            Ok(())
        }
        ValuePattern::Name(name) => name.fmt(f),
        ValuePattern::Prefix(prefix) => {
            let bare = is_bare(prefix.text.trim_end_matches(['-', '/', '.'])) && !is_reserved(&prefix.text);
            let odd = prefix.text.len() - prefix.text.trim_end_matches(['-', '/', '.']).len() > 1;
            if bare && !odd { write!(f, "{}*", prefix.text) } else { quoted(f, &format!("{}*", prefix.text)) }
        }
    }
}

/// How tightly what is around an expression binds.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Binds {
    Loosely,
    And,
    Not,
}

struct Grouped<'a, T>(&'a T, Binds);

impl Display for Expr {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Grouped(self, Binds::Loosely).fmt(f)
    }
}

impl Display for Grouped<'_, Expr> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(expr, around) = *self;
        match expr {
            Expr::Any => f.write_str("any"),
            Expr::AnyVm => f.write_str("any vm"),
            Expr::AnyHost => f.write_str("any host"),
            Expr::AnyObject => f.write_str("any object"),
            Expr::Label(word) => word.fmt(f),
            Expr::Not(inner) => write!(f, "not {}", Grouped(&**inner, Binds::Not)),
            Expr::And(all) => parenthesised(f, around > Binds::Loosely, |f| {
                joined(f, all, " and ", |f, one| Grouped(one, Binds::And).fmt(f))
            }),
            Expr::Or(all) => parenthesised(f, around > Binds::Loosely, |f| {
                // `or` within `or`, which only a program writes, keeps its shape.
                joined(f, all, " or ", |f, one| match one {
                    Expr::Or(_) => Grouped(one, Binds::And).fmt(f),
                    _ => Grouped(one, Binds::Loosely).fmt(f),
                })
            }),
        }
    }
}

impl Display for Condition {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Grouped(self, Binds::Loosely).fmt(f)
    }
}

impl Display for Grouped<'_, Condition> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(condition, around) = *self;
        match condition {
            Condition::Is { fact, peer } => {
                if *peer {
                    f.write_str("peer ")?;
                }
                fact.fmt(f)
            }
            Condition::Not(inner) => write!(f, "not {}", Grouped(&**inner, Binds::Not)),
            Condition::And(all) => parenthesised(f, around > Binds::Loosely, |f| {
                joined(f, all, " and ", |f, one| Grouped(one, Binds::And).fmt(f))
            }),
            Condition::Or(all) => parenthesised(f, around > Binds::Loosely, |f| {
                joined(f, all, " or ", |f, one| match one {
                    Condition::Or(_) => Grouped(one, Binds::And).fmt(f),
                    _ => Grouped(one, Binds::Loosely).fmt(f),
                })
            }),
        }
    }
}

fn parenthesised(
    f: &mut Formatter<'_>,
    really: bool,
    inside: impl Fn(&mut Formatter<'_>) -> fmt::Result,
) -> fmt::Result {
    if !really {
        return inside(f);
    }
    f.write_char('(')?;
    inside(f)?;
    f.write_char(')')
}
