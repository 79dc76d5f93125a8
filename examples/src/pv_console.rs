//! One console for everything: a paravirtual guest has no serial ports, so a command's two streams and what init says of
//! the run share the console with the kernel's log.
//!
//! Init puts each of the three into lines with a mark: `O` and `E` with base64, `C` with text. A line without a mark is
//! the kernel's. The kernel is told to print nothing but its last words meanwhile, so lines stay whole. In a shell the
//! console is the user's, and nothing is looked for in it.
//!
//! The guest is hostile: a line that is no base64 is passed over, and no more than `LONGEST` bytes of one are held.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_cpu::xen_pv::{ConsoleSink, ConsoleSource};

use crate::guest_command::{SerialPort, Session};
use crate::pc::Output;

/// The longest line with a mark, in bytes. The guest's base64 has 76 characters.
const LONGEST: usize = 256;

/// Takes the console apart.
pub struct PvConsole {
    outputs: Mutex<Vec<(SerialPort, Output)>>,
    /// Whether lines may have marks.
    marked: bool,
    /// Whether the user sees everything.
    verbatim: bool,
    line: PvLine,
}

/// What has come of a line of the console that has not ended. A clone is the same.
#[derive(Clone, Debug, Default)]
pub struct PvLine(Arc<Mutex<Vec<u8>>>);

impl PvLine {
    /// The bytes, for a console in another process that goes on from here.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PvConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PvConsole")
            .field("marked", &self.marked)
            .field("line", &self.line)
            .finish_non_exhaustive()
    }
}

impl PvConsole {
    /// The console of a guest that runs `session`; each part goes to what `output` makes for that port.
    pub fn new(session: &Session, output: impl Fn(SerialPort) -> Output) -> Self {
        Self {
            outputs: Mutex::new(SerialPort::ALL.map(|port| (port, output(port))).into()),
            marked: !matches!(session, Session::Shell(_)),
            verbatim: !matches!(session, Session::Command { .. }),
            line: PvLine::default(),
        }
    }

    /// Goes on in the middle of a line, of which no more is taken than a line may have.
    #[must_use]
    pub fn begun(self, line: &[u8]) -> Self {
        *self.line.lock() = line.get(..LONGEST - 1).unwrap_or(line).to_vec();
        self
    }

    /// The line that has begun.
    #[must_use]
    pub fn line(&self) -> PvLine {
        self.line.clone()
    }

    fn send(&self, port: SerialPort, bytes: &[u8]) {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, output) in outputs.iter_mut().filter(|(other, _)| *other == port) {
            // Whoever made it hears of what cannot be written.
            if let Err(error) = output.write_all(bytes) {
                tracing::debug!(%error, "console");
            }
        }
    }

    fn take_line(&self, line: &[u8]) {
        let text = line.strip_suffix(b"\r").unwrap_or(line);
        match text.split_at_checked(2) {
            Some((b"C ", rest)) => self.send(SerialPort::Control, &[rest, b"\n"].concat()),
            Some((b"O ", rest)) if !self.verbatim => self.send(SerialPort::Output, &decode(rest)),
            Some((b"E ", rest)) if !self.verbatim => self.send(SerialPort::Errors, &decode(rest)),
            _ if self.verbatim => {}
            _ => self.send(SerialPort::Console, &[line, b"\n"].concat()),
        }
    }

    fn take(&self, bytes: &[u8]) {
        for &byte in bytes {
            let mut begun = self.line.lock();
            if byte == b'\n' {
                let line = std::mem::take(&mut *begun);
                drop(begun);
                self.take_line(&line);
                continue;
            }
            begun.push(byte);
            if begun.len() >= LONGEST {
                let line = std::mem::take(&mut *begun);
                drop(begun);
                if !self.verbatim {
                    self.send(SerialPort::Console, &line);
                }
            }
        }
    }
}

impl ConsoleSink for PvConsole {
    fn write(&mut self, source: ConsoleSource, bytes: &[u8]) {
        // What comes by hypercall is the kernel's early console, which knows no terminal.
        if self.verbatim || source == ConsoleSource::Hypercall {
            self.send(SerialPort::Console, bytes);
        }
        if self.marked && source != ConsoleSource::Hypercall {
            self.take(bytes);
        }
    }
}

/// The bytes that `text` stands for (RFC 4648); nothing from the first character on that is none of base64's.
fn decode(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0_u32, 0);
    for &character in text {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        word = word << 6 & 0xffff | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            let [byte, ..] = (word >> bits).to_le_bytes();
            bytes.push(byte);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_command::Screen;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.bytes().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }
    }

    /// What console, output, errors and control got of `input`, whatever pieces it came in.
    fn streams(session: &Session, input: &[u8]) -> [Vec<u8>; 4] {
        let got = [1, 2, 7, 4096].map(|size| {
            let sinks = SerialPort::ALL.map(|port| (port, Sink::default()));
            let output = |port| {
                let sink = sinks.iter().find(|(other, _)| *other == port).unwrap().1.clone();
                Box::new(sink) as Output
            };
            let mut console = PvConsole::new(session, output);
            for piece in input.chunks(size) {
                console.write(ConsoleSource::Ring, piece);
            }
            console.write(ConsoleSource::Hypercall, b"O early\n");
            sinks.map(|(_, sink)| sink.bytes().clone())
        });
        assert!(got.iter().all(|streams| *streams == got[0]), "{got:?}");
        got[0].clone()
    }

    fn command() -> Session {
        Session::Command { line: "true".to_owned(), input: None }
    }

    #[test]
    fn marked_lines_go_where_their_mark_says() {
        let input = b"[1] boot\r\nC init\r\nO aGVs\r\nE b2g=\r\nO bG8KAP8=\r\nC status 3\r\n";
        let [console, output, errors, control] = streams(&command(), input);
        assert_eq!(console, b"[1] boot\r\nO early\n");
        assert_eq!(output, b"hello\n\0\xff");
        assert_eq!(errors, b"oh");
        assert_eq!(control, b"init\nstatus 3\n");
    }

    #[test]
    fn a_shells_console_is_left_alone() {
        let screen = Screen { rows: 24, columns: 80, term: "linux".to_owned() };
        let [console, output, errors, control] = streams(&Session::Shell(screen), b"# O aGVs\nC status 1\n");
        assert_eq!(console, b"# O aGVs\nC status 1\nO early\n");
        assert!(output.is_empty() && errors.is_empty() && control.is_empty());
    }

    #[test]
    fn a_log_is_seen_whole_and_control_is_heard() {
        let [console, output, _, control] = streams(&Session::Log, b"O aGVs\nC init\n");
        assert_eq!(console, b"O aGVs\nC init\nO early\n");
        assert!(output.is_empty());
        assert_eq!(control, b"init\n");
    }

    #[test]
    fn lines_without_end_are_not_held() {
        let [console, ..] = streams(&command(), &[b'x'; 10_000]);
        assert!(console.len() >= 10_000 - LONGEST);
    }

    #[test]
    fn what_is_no_base64_ends_the_line() {
        assert_eq!(decode(b""), b"");
        assert_eq!(decode(b"Zg=="), b"f");
        assert_eq!(decode(b"Zm9v\xffZm9v"), b"foo");
        assert_eq!(decode(b"+/+/"), [0xfb, 0xff, 0xbf]);
    }
}
