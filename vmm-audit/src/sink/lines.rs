//! Lines of text: files, standard output, pipes.

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::{Delivery, Sink, SinkError, describe};
use crate::event::{rfc3339, to_ocsf};

/// What a line has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An event as JSON, with the names of the [field dictionary](crate::event).
    Json,
    /// OCSF JSON.
    Ocsf,
    /// Time and what happened, for people.
    Text,
}

/// Writes a line for each entry.
pub struct Lines<W: Write> {
    name: String,
    pub(super) to: BufWriter<W>,
    form: Form,
}

impl<W: Write> Lines<W> {
    /// Lines of this form to a writer, which `name` stands for in messages.
    pub fn new(name: impl Into<String>, to: W, form: Form) -> Self {
        Self { name: name.into(), to: BufWriter::new(to), form }
    }

    fn failed(&self, source: io::Error) -> SinkError {
        SinkError::Io { sink: self.name.clone(), source }
    }
}

impl Lines<std::fs::File> {
    /// Lines at the end of a file, which only its owner may read if it is made.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn file(path: &Path, form: Form) -> Result<Self, SinkError> {
        let sink = path.display().to_string();
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        let file = file.map_err(|source| SinkError::Io { sink: sink.clone(), source })?;
        Ok(Self::new(sink, file, form))
    }
}

impl Lines<io::Stdout> {
    /// Lines to standard output.
    pub fn stdout(form: Form) -> Self {
        Self::new("standard output", io::stdout(), form)
    }
}

/// A line without its end.
pub(crate) fn line(delivery: &Delivery, form: Form) -> String {
    match form {
        Form::Json => delivery.to_json().to_string(),
        Form::Ocsf => to_ocsf(&delivery.event, delivery.seq, delivery.source).to_string(),
        Form::Text => {
            // A name with control characters must not move the terminal's cursor.
            let text = describe(&delivery.event).replace(char::is_control, "\u{fffd}");
            format!("{} {:>8} {text}", rfc3339(delivery.event.wall), delivery.seq)
        }
    }
}

impl<W: Write> Sink for Lines<W> {
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError> {
        let mut line = line(delivery, self.form);
        line.push('\n');
        self.to.write_all(line.as_bytes()).map_err(|e| self.failed(e))
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.to.flush().map_err(|e| self.failed(e))
    }
}
