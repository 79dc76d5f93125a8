//! Guests that run by turns here and on QEMU, and when each says what.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// QEMU's program; Debian's package of it is `qemu-system-x86`.
pub const QEMU: &str = "qemu-system-x86_64";

/// Installs QEMU by apt if it is absent.
///
/// # Errors
/// Fails if that cannot be done.
pub fn install_qemu() -> Result<()> {
    let present = || Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
    if present() {
        return Ok(());
    }
    eprintln!("installing qemu-system-x86 (about 100 MB with what it needs)");
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()).status()
    };
    let installed = apt(&["-q", "update"])
        .and_then(|_| apt(&["-qy", "install", "--no-install-recommends", "qemu-system-x86"]));
    ensure!(
        installed.is_ok_and(|status| status.success()) && present(),
        "{QEMU} is absent and cannot be installed here; install Debian's package qemu-system-x86"
    );
    Ok(())
}

/// QEMU's translator on its smallest machine, with the RAM that `linux` gives a guest, and its console on standard
/// output. That machine does not end when the guest powers off.
pub fn microvm(kernel: &Path, initrd: &Path, append: &str) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-M", "microvm", "-accel", "tcg", "-m", "256", "-no-reboot", "-display", "none"]);
    command.args(["-monitor", "none", "-serial", "stdio", "-kernel"]).arg(kernel).arg("-initrd").arg(initrd);
    command.arg("-append").arg(format!("console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 {append}"));
    command
}

/// A guest that runs; killed when dropped.
#[derive(Debug)]
pub struct Runner {
    name: String,
    child: Child,
    started: Instant,
    limit: Duration,
    lines: Receiver<(Duration, String)>,
}

impl Runner {
    /// Starts `command`, whose guest's console is standard output, and gives it so much time for everything.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(command: &mut Command, limit: Duration) -> Result<Self> {
        let name = command.get_program().display().to_string();
        let started = Instant::now();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = child.with_context(|| format!("starting {name}"))?;
        let output = child.stdout.take().context("a pipe")?;
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                // Nobody may want it any more.
                if tell.send((started.elapsed(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { name, child, started, limit, lines })
    }

    /// Gives it another time for everything, from the start.
    pub fn allow(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// The next line of the guest's, and when it came, from the start; `None` at the end of its output.
    ///
    /// # Errors
    /// Fails when the time is up.
    pub fn line(&mut self) -> Result<Option<(Duration, String)>> {
        match self.lines.recv_timeout(self.limit.saturating_sub(self.started.elapsed())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!("{} was still running after {} s", self.name, self.limit.as_secs())
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
        bail!("{} ended before its guest said {mark:?}", self.name)
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

/// Least, median and most of some figures.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The median; of an even number, the upper of the two in the middle.
    pub median: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of these; zeros if there are none.
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |index: usize| figures.get(index).copied().unwrap_or(0.0);
        Self { least: at(0), median: at(figures.len() / 2), most: at(figures.len().saturating_sub(1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str, seconds: u64) -> Runner {
        Runner::start(Command::new("sh").args(["-c", line]), Duration::from_secs(seconds)).unwrap()
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
        let error = shell("echo one", 60).until("two").unwrap_err().to_string();
        assert!(error.contains("\"two\""), "{error}");
        let error = shell("sleep 100", 1).until("two").unwrap_err().to_string();
        assert!(error.contains("after 1 s"), "{error}");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { least: 1.0, median: 2.0, most: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0]).median, 4.0);
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
