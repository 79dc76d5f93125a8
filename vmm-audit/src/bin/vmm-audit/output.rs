//! What people see.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};

pub(crate) const GOOD: Style = AnsiColor::Green.on_default().bold();
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(crate) const QUIET: Style = Style::new().dimmed();

/// The text in a style; [`anstream`] takes it away where nobody sees it.
pub(crate) fn styled(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

pub(crate) fn error(error: &dyn std::fmt::Display) {
    anstream::eprintln!("{} {error}", styled(BAD, "vmm-audit:"));
}

/// A line on a terminal's standard error that says how far something is.
pub(crate) struct Progress {
    what: &'static str,
    begun: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, begun: Instant::now(), shown: None, terminal: std::io::stderr().is_terminal() }
    }

    pub(crate) fn show(&mut self, done: u64, total: u64) {
        let soon = self.begun.elapsed() < Duration::from_millis(300);
        let recent = self.shown.is_some_and(|shown| shown.elapsed() < Duration::from_millis(100));
        if !self.terminal || soon || recent || total == 0 {
            return;
        }
        self.shown = Some(Instant::now());
        let (percent, mib) = (done * 100 / total, done >> 20);
        let rate = done as f64 / 1e6 / self.begun.elapsed().as_secs_f64();
        let line = format!("\r\x1b[K{} {percent}% ({mib} MiB, {rate:.0} MB/s)", self.what);
        // A terminal that is gone is of no account here.
        std::io::stderr().write_all(line.as_bytes()).ok();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            std::io::stderr().write_all(b"\r\x1b[K").ok();
        }
    }
}
