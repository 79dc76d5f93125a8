//! Goes over words, and says what it would rather have seen.

use super::ast::Word;
use super::error::{Report, did_you_mean, one_of};
use super::source::Span;
use super::token::{Token, TokenKind};
use crate::limits;

/// That something was wrong, and has been reported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reported;

pub(crate) type Parsed<T> = Result<T, Reported>;

/// Where the parser is.
pub(crate) struct Cursor<'t> {
    tokens: &'t [Token],
    at: usize,
    /// Behind the last word.
    end: Span,
    pub(crate) report: &'t mut Report,
    /// How deep in parentheses.
    depth: usize,
}

impl<'t> Cursor<'t> {
    pub(crate) fn new(tokens: &'t [Token], end: Span, report: &'t mut Report) -> Self {
        // What is missing is missing behind the last word.
        let end = tokens.last().map_or(end, |last| Span { start: last.span.end, ..last.span });
        Self { tokens, at: 0, end, report, depth: 0 }
    }

    pub(crate) fn peek(&self) -> Option<&'t Token> {
        self.tokens.get(self.at)
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at >= self.tokens.len()
    }

    /// Of the next word.
    pub(crate) fn span(&self) -> Span {
        self.peek().map_or(self.end, |token| token.span)
    }

    /// Of the word before.
    pub(crate) fn last_span(&self) -> Span {
        self.at.checked_sub(1).and_then(|at| self.tokens.get(at)).map_or(self.end, |token| token.span)
    }

    pub(crate) fn advance(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len());
    }

    /// The next word, if it is one without quotes.
    pub(crate) fn peek_word(&self) -> Option<&'t str> {
        match &self.peek()?.kind {
            TokenKind::Word(word) => Some(word),
            _ => None,
        }
    }

    pub(crate) fn is_word(&self, word: &str) -> bool {
        self.peek_word() == Some(word)
    }

    pub(crate) fn eat(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.advance();
        }
        found
    }

    /// The same on one line: what begins a line may begin a statement.
    pub(crate) fn eat_on_line(&mut self, word: &str) -> bool {
        self.peek().is_some_and(|token| !token.begins_line) && self.eat(word)
    }

    pub(crate) fn is_sign(&self, sign: char) -> bool {
        self.peek().is_some_and(|token| token.kind == TokenKind::Sign(sign))
    }

    pub(crate) fn eat_sign(&mut self, sign: char) -> bool {
        let found = self.is_sign(sign);
        if found {
            self.advance();
        }
        found
    }

    pub(crate) fn eat_dots(&mut self) -> bool {
        let found = self.peek().is_some_and(|token| token.kind == TokenKind::Dots);
        if found {
            self.advance();
        }
        found
    }

    /// Reports at `span`.
    pub(crate) fn fail<T>(
        &mut self,
        span: Span,
        message: impl Into<String>,
        help: Option<String>,
    ) -> Parsed<T> {
        self.report.add(span, message, help);
        Err(Reported)
    }

    /// What is next, for people.
    fn shown(&self) -> String {
        match self.peek().map(|token| &token.kind) {
            None => "the end".to_owned(),
            Some(TokenKind::Word(word)) => format!("{:?}", shortened(word)),
            Some(TokenKind::Text(text)) => format!("the text {:?}", shortened(text)),
            Some(TokenKind::Sign(sign)) => format!("\"{sign}\""),
            Some(TokenKind::Dots) => "\"..\"".to_owned(),
        }
    }

    /// Reports that something else was expected than what is next.
    pub(crate) fn expected<T>(&mut self, what: &str) -> Parsed<T> {
        let message = format!("expected {what}, found {}", self.shown());
        self.fail(self.span(), message, None)
    }

    /// Reports that one of `words` was expected, with the nearest.
    pub(crate) fn expected_one_of<T>(&mut self, what: &str, words: &[&str]) -> Parsed<T> {
        let message = format!("expected {what}, found {}", self.shown());
        let near = self.peek_word().and_then(|found| did_you_mean(found, words.iter().copied()));
        let help = near.unwrap_or_else(|| format!("it may be {}", one_of(words.iter().copied())));
        self.fail(self.span(), message, Some(help))
    }

    pub(crate) fn expect(&mut self, word: &str) -> Parsed<()> {
        if self.eat(word) { Ok(()) } else { self.expected_one_of(&format!("{word:?}"), &[word]) }
    }

    pub(crate) fn expect_sign(&mut self, sign: char) -> Parsed<()> {
        if self.eat_sign(sign) { Ok(()) } else { self.expected(&format!("\"{sign}\"")) }
    }

    /// A name: a word that means nothing to the language, or a text in quotes.
    pub(crate) fn name(&mut self, what: &str) -> Parsed<Word> {
        let span = self.span();
        let text = match self.peek().map(|token| &token.kind) {
            Some(TokenKind::Word(word)) if is_reserved(word) => {
                let help =
                    Some(format!("a name that is a word of the language stands in quotes: \"{word}\""));
                let message = format!("expected {what}, found {word:?}");
                return self.fail(span, message, help);
            }
            Some(TokenKind::Word(word)) if word.ends_with('*') => {
                return self.fail(
                    span,
                    format!("expected {what}, found a pattern"),
                    Some("patterns stand for objects, as in \"region frames-*\"".into()),
                );
            }
            Some(TokenKind::Word(word) | TokenKind::Text(word)) => word,
            _ => return self.expected(what),
        };
        if text.is_empty() || text.len() > limits::NAME_BYTES || text.chars().any(char::is_control) {
            let message = format!("a name has 1 to {} bytes and no control characters", limits::NAME_BYTES);
            return self.fail(span, message, None);
        }
        self.advance();
        Ok(Word::new(text, span))
    }

    /// Things with commas between them, one at least.
    pub(crate) fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        let mut all = vec![one(self)?];
        while self.eat_sign(',') {
            if all.len() >= limits::LIST {
                return self.fail(
                    self.last_span(),
                    format!("a list has at most {} things", limits::LIST),
                    None,
                );
            }
            all.push(one(self)?);
        }
        Ok(all)
    }

    /// A number in the digits of `word`: `10`, `0x10`, `1_000`.
    pub(crate) fn number(&mut self, what: &str, most: u64) -> Parsed<u64> {
        let Some(word) = self.peek_word() else { return self.expected(what) };
        let digits = word.replace('_', "");
        let number = match digits.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => digits.parse(),
        };
        match number {
            Ok(number) if number <= most => {
                self.advance();
                Ok(number)
            }
            _ if word.starts_with(|c: char| c.is_ascii_digit()) => self.fail(
                self.span(),
                format!("{what} is a number up to {most}, and {:?} is none", shortened(word)),
                None,
            ),
            _ => self.expected(what),
        }
    }

    /// Goes one parenthesis deeper, as long as that can be.
    pub(crate) fn deeper<T>(&mut self, inside: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth >= limits::DEPTH {
            return self.fail(
                self.span(),
                format!("more than {} parentheses and \"not\" inside each other", limits::DEPTH),
                None,
            );
        }
        self.depth += 1;
        let result = inside(self);
        self.depth -= 1;
        result
    }

    /// Goes on to the next line that seems to begin a statement.
    pub(crate) fn recover(&mut self) {
        self.depth = 0;
        while let Some(token) = self.peek() {
            if let TokenKind::Word(word) = &token.kind
                && (token.at_margin || (token.begins_line && STATEMENTS.contains(&&**word)))
            {
                return;
            }
            self.advance();
        }
    }
}

fn shortened(word: &str) -> String {
    word.chars().take(limits::SUGGESTED_BYTES).collect()
}

/// What begins a statement.
pub(crate) const STATEMENTS: &[&str] = &[
    "policy",
    "include",
    "labels",
    "family",
    "secrecy",
    "integrity",
    "categories",
    "wall",
    "vm",
    "host",
    "region",
    "network",
    "disk",
    "share",
    "console",
    "snapshot",
    "migration",
    "doorbell",
    "allow",
    "deny",
    "throttle",
    "quarantine",
    "redirect",
    "ask",
    "never",
    "limit",
    "escalate",
];

/// Words that are no names without quotes: those that begin a statement or go on with one.
pub(crate) fn is_reserved(word: &str) -> bool {
    const OTHERS: &[&str] = &[
        "any", "and", "or", "not", "to", "of", "in", "same", "other", "when", "unless", "by", "within", "at",
        "onto", "per", "burst", "anything", "reach",
    ];
    STATEMENTS.contains(&word) || OTHERS.contains(&word)
}
