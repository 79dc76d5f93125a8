//! Words to statements, and files that include each other to one document.

use super::ast::{Document, Item, Level, Party, PartyKind, Statement, Word};
use super::cursor::{Cursor, Parsed, STATEMENTS};
use super::error::Report;
use super::rule;
use super::source::{Loader, Sources, Span};
use super::token::{Tokens, tokens};
use crate::limits;
use crate::model::{Kind, ValueKind};

/// What has been read: one document for each file, in the order in which their statements count, and the statements of all of them
/// in that order.
pub(crate) struct Parsing<'l> {
    pub(crate) sources: Sources,
    pub(crate) report: Report,
    loader: &'l dyn Loader,
    /// The files that are being read, from the outermost in.
    open: Vec<String>,
    /// Those that have been.
    done: Vec<String>,
    bytes: usize,
    statements: usize,
}

/// Reads `text` and what it includes. The first document is that of `text` itself; the second has the statements of all files in
/// their place.
pub(crate) fn parse_all(
    name: &str,
    text: String,
    loader: &dyn Loader,
) -> (Document, Vec<Statement>, Sources, Report) {
    let mut parsing = Parsing {
        sources: Sources::default(),
        report: Report::default(),
        loader,
        open: Vec::new(),
        done: Vec::new(),
        bytes: 0,
        statements: 0,
    };
    let mut all = Vec::new();
    let document = parsing.file(name, text, Span::default(), &mut all);
    (document, all, parsing.sources, parsing.report)
}

/// Reads `text` alone.
pub(crate) fn parse_one(name: &str, text: String, report: &mut Report) -> (Document, Sources) {
    let mut parsing = Parsing {
        sources: Sources::default(),
        report: std::mem::take(report),
        loader: &super::NoIncludes,
        open: Vec::new(),
        done: Vec::new(),
        bytes: 0,
        statements: 0,
    };
    let document = if text.len() > limits::POLICY_BYTES {
        parsing.sources.add(name, String::new());
        parsing.report.add(
            Span::default(),
            format!("the policy has more than {} bytes", limits::POLICY_BYTES),
            None,
        );
        Document::default()
    } else {
        let file = parsing.sources.add(name, text);
        parsing.statements(file)
    };
    *report = parsing.report;
    (document, parsing.sources)
}

impl Parsing<'_> {
    fn file(&mut self, name: &str, text: String, included: Span, all: &mut Vec<Statement>) -> Document {
        self.bytes = self.bytes.saturating_add(text.len());
        if self.bytes > limits::POLICY_BYTES {
            if self.open.is_empty() {
                self.sources.add(name, String::new());
            }
            self.report.add(
                included,
                format!("the policy has more than {} bytes", limits::POLICY_BYTES),
                None,
            );
            return Document::default();
        }
        let file = self.sources.add(name, text);
        self.open.push(name.to_owned());
        let document = self.statements(file);
        for statement in &document.statements {
            match &statement.item {
                Item::Include(path) => self.include(path, all),
                _ => all.push(statement.clone()),
            }
        }
        self.done.extend(self.open.pop());
        document
    }

    fn include(&mut self, path: &Word, all: &mut Vec<Statement>) {
        if self.report.is_full() {
            return;
        }
        if self.open.len() >= limits::INCLUDE_DEPTH {
            let message = format!("files include each other {} deep", self.open.len());
            return self.report.add(
                path.span,
                message,
                Some(format!("{} is the most", limits::INCLUDE_DEPTH)),
            );
        }
        if self.done.len() + self.open.len() >= limits::FILES {
            return self.report.add(
                path.span,
                format!("the policy has more than {} files", limits::FILES),
                None,
            );
        }
        let from = self.open.last().cloned().unwrap_or_default();
        match self.loader.load(&from, &path.text) {
            Err(error) => {
                self.report.add(path.span, format!("{:?} cannot be included: {error}", path.text), None)
            }
            Ok((name, _)) if self.open.contains(&name) => {
                let help = Some(format!("{} is where it begins", self.open.join(" includes ")));
                self.report.add(path.span, format!("{name:?} would include itself"), help);
            }
            // Twice is once.
            Ok((name, _)) if self.done.contains(&name) => (),
            Ok((name, text)) => {
                self.file(&name, text, path.span, all);
            }
        }
    }

    fn statements(&mut self, file: u32) -> Document {
        let Tokens { tokens, comments } = tokens(self.sources.contents(file), file, &mut self.report);
        let length = self.sources.contents(file).len() as u32;
        let end = Span { file, start: length, end: length };
        let mut cursor = Cursor::new(&tokens, end, &mut self.report);
        let mut comments = comments.into_iter().peekable();
        let mut document = Document::default();
        while let Some(first) = cursor.peek() {
            if cursor.report.is_full() {
                return document;
            }
            self.statements += 1;
            if self.statements > limits::STATEMENTS {
                let message = format!("the policy has more than {} statements", limits::STATEMENTS);
                cursor.report.add(first.span, message, None);
                return document;
            }
            let mut own = Vec::new();
            // Before the first there is nothing to be apart from.
            let begins = document.statements.is_empty();
            let mut apart = first.apart;
            while let Some(comment) = comments.next_if(|comment| comment.start < first.span.start) {
                if own.is_empty() {
                    apart = comment.apart;
                } else if comment.apart {
                    own.push(String::new());
                }
                own.push(comment.text);
            }
            if !own.is_empty() && first.apart {
                own.push(String::new());
            }
            let Ok(item) = statement(&mut cursor) else {
                cursor.recover();
                continue;
            };
            let span = first.span.to(cursor.last_span());
            // Comments within a statement go before it, so that none is lost.
            let mut trailing = None;
            let next = if cursor.is_at_end() { u32::MAX } else { cursor.span().start };
            while let Some(comment) = comments
                .next_if(|comment| comment.start < span.end || (comment.trails && comment.start < next))
            {
                if comment.start >= span.end && trailing.is_none() {
                    trailing = Some(comment.text);
                } else {
                    own.push(comment.text);
                }
            }
            document.statements.push(Statement {
                comments: own,
                trailing,
                apart: apart && !begins,
                item,
                span,
            });
        }
        for comment in comments {
            if comment.apart && !document.comments.is_empty() {
                document.comments.push(String::new());
            }
            document.comments.push(comment.text);
        }
        document
    }
}

fn statement(cursor: &mut Cursor<'_>) -> Parsed<Item> {
    let Some(word) = cursor.peek_word().filter(|word| STATEMENTS.contains(word)) else {
        let result = cursor.expected_one_of("a statement", STATEMENTS);
        cursor.advance();
        return result;
    };
    cursor.advance();
    match word {
        "policy" => Ok(Item::Policy(cursor.name("the policy's title in quotes")?.text.into())),
        "include" => Ok(Item::Include(cursor.name("a file in quotes")?)),
        "labels" => Ok(Item::Labels(cursor.list(|cursor| cursor.name("a label"))?)),
        "categories" => Ok(Item::Categories(cursor.list(|cursor| cursor.name("a category"))?)),
        "family" => {
            let (name, labels) = named_list(cursor, "the family's name")?;
            Ok(Item::Family { name, labels })
        }
        "wall" => {
            let (name, labels) = named_list(cursor, "the wall's name")?;
            Ok(Item::Wall { name, labels })
        }
        "secrecy" => Ok(Item::Secrecy(ladder(cursor)?)),
        "integrity" => Ok(Item::Integrity(ladder(cursor)?)),
        "vm" => party(cursor, PartyKind::Vm),
        "host" => party(cursor, PartyKind::Host),
        "limit" => rule::limit(cursor),
        "escalate" => rule::escalate(cursor),
        _ => match Kind::from_word(word) {
            Some(kind) if kind.value_kind() == ValueKind::Name => party(cursor, PartyKind::Object(kind)),
            _ => rule::rule(cursor, word),
        },
    }
}

fn named_list(cursor: &mut Cursor<'_>, what: &str) -> Parsed<(Word, Vec<Word>)> {
    let name = cursor.name(what)?;
    cursor.expect_sign(':')?;
    Ok((name, cursor.list(|cursor| cursor.name("a label"))?))
}

/// `LOW < MIDDLE < HIGH`
fn ladder(cursor: &mut Cursor<'_>) -> Parsed<Vec<Word>> {
    let mut levels = vec![cursor.name("a level")?];
    while cursor.eat_sign('<') {
        levels.push(cursor.name("a level")?);
        if levels.len() > limits::LEVELS {
            let span = cursor.last_span();
            return cursor.fail(span, format!("more than {} levels", limits::LEVELS), None);
        }
    }
    Ok(levels)
}

/// `NAME [{ .. }]`
fn party(cursor: &mut Cursor<'_>, kind: PartyKind) -> Parsed<Item> {
    let name = cursor.name("a name")?;
    let mut party = Party {
        kind,
        name,
        uuid: None,
        labels: Vec::new(),
        secrecy: None,
        integrity: None,
        guard: false,
        filtered: false,
    };
    if !cursor.eat_sign('{') {
        return Ok(Item::Party(party));
    }
    let mut seen: Vec<&str> = Vec::new();
    loop {
        while cursor.eat_sign(';') {}
        if cursor.eat_sign('}') {
            return Ok(Item::Party(party));
        }
        let span = cursor.span();
        let known: &[&str] = match kind {
            PartyKind::Vm => &["uuid", "labels", "secrecy", "integrity", "guard"],
            PartyKind::Host => &["labels", "secrecy", "integrity", "guard"],
            PartyKind::Object(Kind::Network) => &["labels", "secrecy", "integrity", "filtered"],
            PartyKind::Object(_) => &["labels", "secrecy", "integrity"],
        };
        let Some(word) = cursor.peek_word().filter(|word| known.contains(word)) else {
            return cursor.expected_one_of("what it has", known);
        };
        if seen.contains(&word) {
            return cursor.fail(span, format!("{word:?} is given twice"), None);
        }
        seen.push(word);
        cursor.advance();
        match word {
            "uuid" => party.uuid = Some(cursor.name("a UUID")?),
            "labels" => party.labels = cursor.list(|cursor| cursor.name("a label"))?,
            "integrity" => party.integrity = Some(cursor.name("a level")?),
            "guard" => party.guard = true,
            "filtered" => party.filtered = true,
            _ => {
                let level = cursor.name("a level")?;
                let categories = if cursor.eat("with") {
                    cursor.list(|cursor| cursor.name("a category"))?
                } else {
                    Vec::new()
                };
                party.secrecy = Some(Level { level, categories });
            }
        }
    }
}
