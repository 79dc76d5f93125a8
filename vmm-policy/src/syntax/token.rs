//! Text to words.

use winnow::ModalResult;
use winnow::combinator::{alt, cut_err, delimited, opt, preceded, repeat};
use winnow::prelude::*;
use winnow::stream::{LocatingSlice, Location};
use winnow::token::{any, one_of, take_while};

use super::error::Report;
use super::source::Span;
use crate::limits;

/// What a word is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Letters, digits and `_`, with `-`, `.` and `/` between them, and perhaps a `*` at the end.
    Word(Box<str>),
    /// Whatever stands between `"` and `"`.
    Text(Box<str>),
    /// `,`, `:`, `;`, `{`, `}`, `(`, `)`, `<`.
    Sign(char),
    /// `..`
    Dots,
}

/// One word.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) span: Span,
    /// Whether no other one is before it on its line.
    pub(crate) begins_line: bool,
    /// Whether it begins its line without a space before it.
    pub(crate) at_margin: bool,
    /// Whether the line before is empty.
    pub(crate) apart: bool,
}

/// A comment.
#[derive(Clone, Debug)]
pub(crate) struct Comment {
    pub(crate) text: String,
    pub(crate) start: u32,
    /// Whether something is before it on its line.
    pub(crate) trails: bool,
    pub(crate) apart: bool,
}

/// The words of one file, and its comments.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<Token>,
    pub(crate) comments: Vec<Comment>,
}

type Input<'a> = LocatingSlice<&'a str>;

#[derive(Clone)]
enum Lexeme<'a> {
    Newline,
    Blank,
    Comment(&'a str),
    Token(TokenKind),
    /// A `"` without its end on the line.
    OpenText,
    Stranger(char),
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// `a-b`, `db.img`, `a/b`, `web-*`; not the dots of `0..9`.
fn word<'a>(input: &mut Input<'a>) -> ModalResult<&'a str> {
    let joint = alt((take_while(1.., ['-', '/']), "."));
    let more = repeat::<_, _, (), _, _>(0.., (joint, take_while(1.., is_word)));
    let star = opt(alt(("-*", "/*", ".*", "*")));
    (take_while(1.., is_word), more, star).take().parse_next(input)
}

fn text(input: &mut Input<'_>) -> ModalResult<String> {
    let plain = take_while(1.., |c: char| !matches!(c, '"' | '\\' | '\n')).map(str::to_owned);
    let escaped = preceded('\\', one_of(['"', '\\'])).map(String::from);
    let inner = repeat(0.., alt((plain, escaped))).fold(String::new, |mut all: String, part: String| {
        all.push_str(&part);
        all
    });
    delimited('"', inner, cut_err('"')).parse_next(input)
}

fn lexeme<'a>(input: &mut Input<'a>) -> ModalResult<Lexeme<'a>> {
    alt((
        alt(("\r\n", "\n")).value(Lexeme::Newline),
        take_while(1.., [' ', '\t', '\r']).value(Lexeme::Blank),
        preceded('#', take_while(0.., |c: char| c != '\n')).map(Lexeme::Comment),
        "..".value(Lexeme::Token(TokenKind::Dots)),
        word.map(|word: &str| Lexeme::Token(TokenKind::Word(word.into()))),
        one_of([',', ':', ';', '{', '}', '(', ')', '<']).map(|sign| Lexeme::Token(TokenKind::Sign(sign))),
    ))
    .parse_next(input)
}

/// The words of `source`, which is file number `file`. What is none is reported and left out.
pub(crate) fn tokens(source: &str, file: u32, report: &mut Report) -> Tokens {
    let mut input = LocatingSlice::new(source.strip_prefix('\u{feff}').unwrap_or(source));
    let base = source.len() - input.len();
    let mut found = Tokens::default();
    let (mut fresh_line, mut indented, mut empty_lines) = (true, false, 0_u32);
    while !input.is_empty() && !report.is_full() {
        let start = base + input.current_token_start();
        let lexeme = next(&mut input);
        let end = base + input.current_token_start();
        let span = Span { file, start: start as u32, end: end as u32 };
        let is_kept = matches!(lexeme, Lexeme::Token(_) | Lexeme::Comment(_));
        if is_kept && found.tokens.len() + found.comments.len() >= limits::WORDS {
            report.add(span, format!("the policy has more than {} words", limits::WORDS), None);
            break;
        }
        match lexeme {
            Lexeme::Newline => {
                empty_lines = if fresh_line { empty_lines + 1 } else { 0 };
                (fresh_line, indented) = (true, false);
            }
            Lexeme::Blank => indented = true,
            Lexeme::Comment(text) => {
                found.comments.push(Comment {
                    text: comment_text(text),
                    start: span.start,
                    trails: !fresh_line,
                    apart: empty_lines > 0,
                });
                (fresh_line, empty_lines) = (false, 0);
            }
            Lexeme::Token(kind) => {
                let at_margin = fresh_line && !indented;
                found.tokens.push(Token {
                    kind,
                    span,
                    begins_line: fresh_line,
                    at_margin,
                    apart: empty_lines > 0,
                });
                (fresh_line, empty_lines) = (false, 0);
            }
            Lexeme::OpenText => report.add(
                span,
                "the text in quotes does not end on its line",
                Some("close it with '\"'; inside, a quote is \\\" and a backslash \\\\".into()),
            ),
            Lexeme::Stranger(c) => report.add(
                span,
                format!("{c:?} means nothing here"),
                Some("a name with such a character stands in quotes".into()),
            ),
        }
    }
    found
}

/// Without the space after `#`; a space if there is nothing else, as no text stands for an empty line.
fn comment_text(text: &str) -> String {
    let text = text.trim_end();
    let text = text.strip_prefix(' ').unwrap_or(text);
    if text.is_empty() { " ".to_owned() } else { text.to_owned() }
}

/// One lexeme; at least one character is taken.
fn next<'a>(input: &mut Input<'a>) -> Lexeme<'a> {
    let before = *input;
    if let Ok(found) = lexeme(input) {
        return found;
    }
    *input = before;
    if input.starts_with('"') {
        if let Ok(text) = text(input) {
            return Lexeme::Token(TokenKind::Text(text.into()));
        }
        *input = before;
        let rest: ModalResult<&str> = take_while(0.., |c: char| c != '\n').parse_next(input);
        if rest.is_ok_and(|rest| !rest.is_empty()) {
            return Lexeme::OpenText;
        }
    }
    let stranger: ModalResult<char> = any.parse_next(input);
    Lexeme::Stranger(stranger.unwrap_or('\u{fffd}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        let mut report = Report::default();
        let found = tokens(source, 0, &mut report);
        assert!(report.is_empty(), "{report:?}");
        let shown = |token: Token| match token.kind {
            TokenKind::Word(word) => word.into(),
            TokenKind::Text(text) => format!("\"{text}\""),
            TokenKind::Sign(sign) => sign.to_string(),
            TokenKind::Dots => "..".to_owned(),
        };
        found.tokens.into_iter().map(shown).collect()
    }

    #[test]
    fn words_end_where_they_should() {
        assert_eq!(words("vsock 0..1023,db.img a/b"), ["vsock", "0", "..", "1023", ",", "db.img", "a/b"]);
        assert_eq!(words("web-* 08:00 a<b"), ["web-*", "08", ":", "00", "a", "<", "b"]);
        assert_eq!(words(r#""a \"b\" \\ # c" # d"#), ["\"a \"b\" \\ # c\""]);
        assert_eq!(words("map-ro logs/* x*"), ["map-ro", "logs/*", "x*"]);
    }

    #[test]
    fn comments_know_where_they_are() {
        let found = tokens("# one\n\na # two\n", 0, &mut Report::default());
        assert_eq!(
            found.comments.iter().map(|c| (c.text.as_str(), c.trails)).collect::<Vec<_>>(),
            [("one", false), ("two", true)]
        );
        assert!(found.tokens[0].apart && found.tokens[0].begins_line);
    }

    #[test]
    fn what_is_no_word_is_reported_once_and_left_out() {
        let mut report = Report::default();
        let found = tokens("a \"b\nc \u{1f980} d", 0, &mut report);
        assert_eq!(found.tokens.len(), 3);
        let mut sources = super::super::Sources::default();
        sources.add("f", "a \"b\nc \u{1f980} d".into());
        let error = report.finish(&sources).unwrap_err().to_string();
        assert!(error.starts_with("f:1:3: the text in quotes does not end on its line"), "{error}");
        assert!(error.contains("f:2:3: '\u{1f980}' means nothing here"), "{error}");
    }
}
