//! Errors with the lines that they are about.

use std::io::IsTerminal;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use vmm_policy::{PolicyError, Problem};

/// Prints an error; those of a policy with their lines.
pub(crate) fn error(error: &anyhow::Error) {
    match error.downcast_ref::<PolicyError>() {
        Some(PolicyError::Invalid(problems)) => problems.iter().for_each(problem),
        _ => eprintln!("error: {error:#}"),
    }
}

fn problem(problem: &Problem) {
    let renderer = if std::io::stderr().is_terminal() { Renderer::styled() } else { Renderer::plain() };
    // Columns are characters, spans bytes.
    let byte =
        |column: usize| problem.source.char_indices().nth(column).map_or(problem.source.len(), |(at, _)| at);
    let begin = byte(problem.column.saturating_sub(1));
    let end =
        byte(problem.column.saturating_sub(1) + problem.text.lines().next().unwrap_or("").chars().count());
    let note = problem.help.as_deref().unwrap_or("");
    let annotation = AnnotationKind::Primary.span(begin..end.max(begin)).label(note);
    let snippet =
        Snippet::source(&problem.source).line_start(problem.line).path(&problem.file).annotation(annotation);
    let group = Level::ERROR.primary_title(&problem.message).element(snippet);
    eprintln!("{}", renderer.render(&[group]));
}
