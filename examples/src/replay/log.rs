//! The log of a run: a line of JSON each for what it was started with, its inputs, hashes of its state, and its end.
//!
//! Whoever replays one has it from the one who recorded it; still it may be damaged, cut short, or of another run. Each of
//! that is an error which says where: line and column, or the field that differs.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::guest_command::Session;

/// What the first line says that the file is.
const FORMAT: &str = "vmm run";
/// Version of the format.
const VERSION: u32 = 1;
/// The longest line in bytes: a command with its input is in the first one.
const LONGEST_LINE: u64 = 64 << 20;

/// What a run was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    format: String,
    version: u32,
    /// BLAKE3 of the kernel image, in hexadecimal.
    pub kernel: String,
    /// That of the initial RAM disk.
    pub initrd: Option<String>,
    /// The kernel's command line.
    pub command_line: String,
    /// RAM in MiB.
    pub memory: u64,
    /// BLAKE3 of what CPUID tells.
    pub cpu: String,
    /// Rate of the time-stamp counter.
    pub tsc_khz: u32,
    /// An input: nanoseconds since 1970-01-01 UTC at guest time zero.
    pub date: u64,
    /// What the guest was told to do.
    pub session: Session,
}

/// The BLAKE3 of bytes, in hexadecimal.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

impl Header {
    /// Of a run with that kernel, initial RAM disk, command line, MiB of RAM, CPUID and counter, which begins at `date`.
    #[must_use]
    pub fn new(
        (kernel, initrd, command_line): (&[u8], Option<&[u8]>, &str),
        memory: u64,
        (cpu, tsc_khz): (&str, u32),
        date: u64,
        session: Session,
    ) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            kernel: digest(kernel),
            initrd: initrd.map(digest),
            command_line: command_line.to_owned(),
            memory,
            cpu: digest(cpu.as_bytes()),
            tsc_khz,
            date,
            session,
        }
    }

    /// Whether the machine `here` is the one that was recorded. The date is taken from the log.
    ///
    /// # Errors
    /// Names the field that differs.
    pub fn check(&self, here: &Self) -> Result<()> {
        let none = "none";
        let fields: [(&str, &str, &str); 6] = [
            ("kernel", &self.kernel, &here.kernel),
            ("initrd", self.initrd.as_deref().unwrap_or(none), here.initrd.as_deref().unwrap_or(none)),
            ("command_line", &self.command_line, &here.command_line),
            ("memory", &self.memory.to_string(), &here.memory.to_string()),
            ("cpu", &self.cpu, &here.cpu),
            ("tsc_khz", &self.tsc_khz.to_string(), &here.tsc_khz.to_string()),
        ];
        for (field, logged, found) in fields {
            ensure!(
                logged == found,
                "the log is of another run: {field} was {logged:?}, here it is {found:?}"
            );
        }
        Ok(())
    }
}

/// A point of a run. Guest time alone tells which; the count helps those who read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Guest time in nanoseconds.
    pub ns: u64,
    /// Instructions retired.
    pub instructions: u64,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest did it.
    Guest,
    /// The user's escape key.
    User,
    /// The time limit.
    Time,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// Bytes were typed at the console.
    Console {
        /// Where.
        at: Point,
        /// What.
        bytes: Vec<u8>,
    },
    /// The state was hashed.
    State {
        /// Where.
        at: Point,
        /// The hash, in hexadecimal.
        hash: String,
    },
    /// The run ended; nothing follows.
    End {
        /// Where.
        at: Point,
        /// Why.
        reason: EndReason,
    },
}

impl Record {
    /// Where it happened.
    #[must_use]
    pub fn at(&self) -> Point {
        match self {
            Self::Console { at, .. } | Self::State { at, .. } | Self::End { at, .. } => *at,
        }
    }
}

/// Writes a log.
pub struct LogWriter(BufWriter<File>);

impl LogWriter {
    /// Begins a log.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        let mut this = Self(BufWriter::new(file));
        this.line(header)?;
        Ok(this)
    }

    /// Adds a record.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.line(record)?;
        // What ends the program must not take inputs with it.
        if !matches!(record, Record::State { .. }) {
            self.0.flush().context("writing the log")?;
        }
        Ok(())
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.0, value).context("writing the log")?;
        self.0.write_all(b"\n").context("writing the log")
    }
}

/// A log that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// What the run was started with.
    pub header: Header,
    /// What happened, in order; the last record is the end.
    pub records: Vec<Record>,
}

impl Log {
    /// Reads a log whole.
    ///
    /// # Errors
    /// Says which line, and where in it, is not as it has to be.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("opening {name}"))?;
        let mut lines = Lines { name, file: BufReader::new(file), number: 0 };
        let Some(header) = lines.next::<Header>()? else { bail!("{}: the log is empty", lines.name) };
        ensure!(header.format == FORMAT, "{}: format is {:?}, not {FORMAT:?}", lines.place(), header.format);
        let version = header.version;
        ensure!(version == VERSION, "{}: version is {version}, known is {VERSION}", lines.place());
        let mut records: Vec<Record> = Vec::new();
        while let Some(record) = lines.next::<Record>()? {
            let (place, at) = (lines.place(), record.at());
            match records.last() {
                Some(Record::End { .. }) => bail!("{place}: something follows the end of the run"),
                Some(before) if at.ns < before.at().ns || at.instructions < before.at().instructions => {
                    bail!("{place}: {at:?} comes before {:?} of the line above", before.at())
                }
                _ => records.push(record),
            }
        }
        let place = lines.place();
        ensure!(
            matches!(records.last(), Some(Record::End { .. })),
            "{place}: the log stops before the run's end"
        );
        Ok(Self { header, records })
    }
}

struct Lines {
    name: String,
    file: BufReader<File>,
    number: usize,
}

impl Lines {
    fn place(&self) -> String {
        format!("{}: line {}", self.name, self.number)
    }

    fn next<T: serde::de::DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let mut line = Vec::new();
        let mut limited = (&mut self.file).take(LONGEST_LINE);
        let length =
            limited.read_until(b'\n', &mut line).with_context(|| format!("reading {}", self.name))?;
        if length == 0 {
            return Ok(None);
        }
        self.number += 1;
        let complete = line.ends_with(b"\n");
        serde_json::from_slice(&line).map(Some).map_err(|error| {
            let text = error.to_string();
            let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
            let cut = if complete { "" } else { " (the line is cut short)" };
            anyhow!("{}, column {}: {what}{cut}", self.place(), error.column())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header::new((b"kernel", None, "quiet"), 256, ("cpu", 1_000_000), 7, Session::Log)
    }

    fn written(records: &[Record]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut log = LogWriter::create(file.path(), &header()).unwrap();
        for record in records {
            log.write(record).unwrap();
        }
        drop(log);
        std::fs::read_to_string(file.path()).unwrap()
    }

    fn read(text: &str) -> Result<Log> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Log::read(file.path())
    }

    fn records() -> Vec<Record> {
        let at = |n| Point { ns: 10 * n, instructions: n };
        vec![
            Record::Console { at: at(1), bytes: b"\x00l\xffs\n".to_vec() },
            Record::State { at: at(2), hash: "ab".to_owned() },
            Record::End { at: at(3), reason: EndReason::User },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let log = read(&written(&records())).unwrap();
        assert_eq!((log.header, log.records), (header(), records()));
    }

    #[test]
    fn damage_is_an_error_that_says_where() {
        let text = written(&records());
        for (from, to, expected) in [
            ("\"ns\":20", "\"ns\":-2", "line 3, column"),
            ("\"ns\":20", "\"ns\":1", "line 3: Point { ns: 1"),
            ("\"console\"", "\"consolf\"", "line 2, column 10: unknown variant"),
            ("\"version\":1", "\"version\":2", "line 1: version is 2"),
            ("\"vmm run\"", "\"tar\"", "line 1: format is"),
            ("\"user\"", "\"nobody\"", "line 4, column"),
        ] {
            assert!(text.contains(from));
            let error = read(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(expected), "{from}: {error}");
        }
        let error = read(&format!("{text}{}", text.lines().nth(2).unwrap())).unwrap_err().to_string();
        assert!(error.contains("line 5: something follows"), "{error}");
    }

    #[test]
    fn a_log_that_is_cut_anywhere_is_an_error() {
        let text = written(&records());
        // Without its last newline it is whole.
        for length in 0..text.len() - 1 {
            let error = read(&text[..length]).unwrap_err().to_string();
            assert!(error.contains("line ") || length == 0, "{length}: {error}");
        }
        let error = read(&text[..text.len() - 5]).unwrap_err().to_string();
        assert!(error.contains("line 4, column") && error.contains("cut short"), "{error}");
    }

    #[test]
    fn another_run_is_refused_by_the_name_of_what_differs() {
        let logged = header();
        assert!(logged.check(&Header { date: 8, ..header() }).is_ok());
        for (here, field) in [
            (Header { kernel: String::new(), ..header() }, "kernel"),
            (Header { initrd: Some(String::new()), ..header() }, "initrd"),
            (Header { command_line: String::new(), ..header() }, "command_line"),
            (Header { memory: 1, ..header() }, "memory"),
            (Header { cpu: String::new(), ..header() }, "cpu"),
            (Header { tsc_khz: 1, ..header() }, "tsc_khz"),
        ] {
            let error = logged.check(&here).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
