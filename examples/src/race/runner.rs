//! A guest that runs, and when it says what.

use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest line of a guest's that is kept, in bytes; of a longer one, the begin is.
const LONGEST_LINE: u16 = 4096;

/// Lines that are kept for whoever looks at them later. A guest that prints more waits.
const MOST_LINES: usize = 4096;

/// A program whose guest runs, or which runs by itself; killed when dropped.
#[derive(Debug)]
pub struct Runner {
    name: String,
    child: Child,
    started: Instant,
    limit: Duration,
    lines: Receiver<(Duration, String)>,
    /// The last that was not empty, and the last with which the program itself reports an error: its name comes first.
    last: String,
    error: Option<String>,
}

impl Runner {
    /// Starts `command`, whose guest's console is standard output, and gives it so much time for everything. What it prints on
    /// standard error is among the lines, since it tells why a guest has ended.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(mut command: Command, limit: Duration) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
        let name = name.display().to_string();
        let (output, writer) = io::pipe().context("a pipe")?;
        command.stdin(Stdio::null()).stderr(writer.try_clone().context("a pipe")?).stdout(writer);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        // It holds the pipe's other end open.
        drop(command);
        let (tell, lines) = sync_channel(MOST_LINES);
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            while let Ok(Some(line)) = next_line(&mut output) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                // Nobody may want it any more.
                if tell.send((started.elapsed(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { name, child, started, limit, lines, last: String::new(), error: None })
    }

    /// Gives it another time for everything, from the start.
    pub fn allow(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The next line, and when it came, from the start; `None` at the end of the output.
    ///
    /// # Errors
    /// Fails when the time is up.
    pub fn line(&mut self) -> Result<Option<(Duration, String)>> {
        let left = self.limit.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            // A guest that never falls silent gets no more time than another.
            Ok((time, line)) if !left.is_zero() => {
                if line.strip_prefix(&*self.name).is_some_and(|rest| rest.starts_with(": ")) {
                    self.error = Some(line.clone());
                }
                if !line.is_empty() {
                    line.clone_into(&mut self.last);
                }
                Ok(Some((time, line)))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                bail!("{} was still running after {} s{}", self.name, self.limit.as_secs(), self.last_words())
            }
        }
    }

    /// The next line that has `mark` in it, and when it came, from the start.
    ///
    /// # Errors
    /// Fails if the output ends before or the time is up.
    pub fn until(&mut self, mark: &str) -> Result<(Duration, String)> {
        while let Some((time, line)) = self.line()? {
            if line.contains(mark) {
                return Ok((time, line));
            }
        }
        bail!("{} ended before its guest said {mark:?}{}", self.name, self.last_words())
    }

    /// Why it may have ended, or hang, as the end of an error.
    pub fn last_words(&self) -> String {
        match &self.error {
            Some(error) => format!("; {error}"),
            None if self.last.is_empty() => String::new(),
            None => format!("; its last line: {:?}", self.last),
        }
    }

    /// Waits for the program's own end: when that was, and with what status.
    ///
    /// # Errors
    /// Fails when the time is up.
    pub fn end(mut self) -> Result<(Duration, ExitStatus)> {
        while self.line()?.is_some() {}
        let status = self.child.wait()?;
        Ok((self.started.elapsed(), status))
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // One that has ended already is none to kill.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(|_| ())) {
            eprintln!("{}: {error}", self.name);
        }
    }
}

fn next_line(output: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    output.by_ref().take(LONGEST_LINE.into()).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        output.skip_until(b'\n')?;
    }
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str, seconds: u64) -> Runner {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        Runner::start(command, Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn lines_come_with_their_time() {
        let mut runner = shell("echo one; sleep 0.2; printf 'the mark\\r\\n'; exit 3", 60);
        let (time, line) = runner.until("mark").unwrap();
        assert_eq!(line, "the mark");
        assert!(time >= Duration::from_millis(200), "{time:?}");
        let (end, status) = runner.end().unwrap();
        assert!(end >= time);
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn what_ends_early_or_never_is_an_error() {
        let error = shell("echo one; echo 'why it ended' >&2", 60).until("two").unwrap_err().to_string();
        assert!(error.contains("\"two\"; its last line: \"why it ended\""), "{error}");
        let line = "echo one; echo 'sh: what broke' >&2; echo 'sharp: registers' >&2";
        let error = shell(line, 60).until("two").unwrap_err().to_string();
        assert!(error.ends_with("\"two\"; sh: what broke"), "{error}");
        let error = shell("sleep 100", 1).until("two").unwrap_err().to_string();
        assert!(error.ends_with("after 1 s"), "{error}");
        let error = shell("while :; do echo one; done", 1).until("two").unwrap_err().to_string();
        assert!(error.contains("after 1 s"), "{error}");
    }

    #[test]
    fn of_an_overlong_line_the_begin_is_kept() {
        let longest = "x".repeat(LONGEST_LINE.into());
        let text = format!("{longest}yz\n\nnext\nno line feed");
        let mut output = text.as_bytes();
        let mut next = || next_line(&mut output).unwrap().map(|line| String::from_utf8(line).unwrap());
        assert_eq!(next(), Some(longest.clone()));
        assert_eq!(next().as_deref(), Some("\n"));
        assert_eq!(next().as_deref(), Some("next\n"));
        assert_eq!(next().as_deref(), Some("no line feed"));
        assert_eq!(next(), None);
    }
}
