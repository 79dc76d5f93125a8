//! A page about a log: one HTML file that needs nothing else.

mod collect;
mod graph;
mod page;

pub use collect::{Flow, ReportData, collect};
pub use page::render;

/// Escapes text for HTML, in elements and in attributes with quotes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_log_becomes_markup() {
        assert_eq!(escape("<script>\"'&\n"), "&lt;script&gt;&quot;&#39;&amp;\u{fffd}");
    }
}
