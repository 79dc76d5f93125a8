//! Trials of a whole guest: a shell line in Debian on the program `linux`, and what its kernel logged meanwhile.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Words by which Linux's log tells that something broke (arch/x86/mm/fault.c, arch/x86/kernel/traps.c, kernel/panic.c).
const TROUBLE: [&str; 13] = [
    "BUG",
    "Oops",
    "WARNING",
    "self-detected stall",
    "detected stalls",
    "Call Trace",
    "general protection",
    "segfault",
    "traps:",
    "invalid opcode",
    "Kernel panic",
    "blocked for more than",
    "Out of memory",
];

/// By what Linux's log tells of flaws that the processor has, guest or not (arch/x86/kernel/cpu/bugs.c): some of these lines are
/// warnings too.
const OF_THE_PROCESSOR: &str = "admin-guide/hw-vuln/";

/// Time beyond a trial's limit after which `linux` is killed.
const GRACE: Duration = Duration::from_secs(60);

/// How a guest is run.
#[derive(Debug, Clone)]
pub struct Trial<'a> {
    /// What executes it: arguments of `linux`.
    pub backend: &'a [&'a str],
    /// vCPUs.
    pub cpus: u32,
    /// Time that it may take.
    pub limit: Duration,
    /// Files that it gets, as `linux --add` takes them.
    pub files: &'a [&'a str],
    /// The shell line.
    pub line: &'a str,
}

/// What came of a trial.
#[derive(Debug)]
pub struct Verdict {
    /// Standard output of the line.
    pub output: String,
    /// Its standard error and then the kernel's log; what `linux` says of itself, if the guest did not get there.
    pub log: String,
    /// That of `linux`, which is the line's.
    pub status: ExitStatus,
    /// From start to end.
    pub time: Duration,
}

impl Verdict {
    /// Lines of the log that tell of a crash.
    pub fn troubles(&self) -> impl Iterator<Item = &str> {
        let lines = self.log.lines().filter(|line| !line.contains(OF_THE_PROCESSOR));
        lines.filter(|line| TROUBLE.iter().any(|word| line.contains(word)))
    }
}

/// The program `linux` that was built with this one.
///
/// # Errors
/// Fails if it is absent.
pub fn linux() -> Result<PathBuf> {
    program("linux")
}

/// The program of that name that was built with this one.
///
/// # Errors
/// Fails if it is absent.
pub fn program(name: &str) -> Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name(name);
    ensure!(
        program.exists(),
        "{} is absent: build it with `cargo build --release --bins`",
        program.display()
    );
    Ok(program)
}

/// The program `linux`, built first if cargo has started this program.
///
/// # Errors
/// As [`built`].
pub fn built_linux() -> Result<PathBuf> {
    built("linux")
}

/// The program of that name, built first if cargo has started this program: `cargo run` builds one program only, and others would be
/// absent, or of an older source than this one.
///
/// # Errors
/// Fails if it cannot be built, or is absent.
pub fn built(name: &str) -> Result<PathBuf> {
    let Some(cargo) = std::env::var_os("CARGO") else { return program(name) };
    let this = std::env::current_exe()?;
    let directory = this.parent().context("this program is in no directory")?;
    let status = Command::new(cargo)
        .args(["build", "--bin", name, "--profile", &profile(directory)?, "--target-dir"])
        .arg(directory.parent().context("this program is in no target directory")?)
        .status()
        .with_context(|| format!("starting cargo to build {name}"))?;
    ensure!(status.success(), "`cargo build --bin {name}` ended with {status}");
    program(name)
}

/// Cargo's profile of which the programs are in `directory`.
fn profile(directory: &Path) -> Result<String> {
    let name = directory.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is named after no profile", directory.display()))?;
    Ok(if name == "debug" { "dev" } else { name }.to_owned())
}

impl Trial<'_> {
    /// Runs it on `linux`, the path of that program.
    ///
    /// # Errors
    /// Fails if `linux` cannot be run. What the guest does is in the verdict.
    pub fn run(&self, linux: &Path) -> Result<Verdict> {
        let line = format!("{{ {}\n}}\nstatus=$?\ndmesg >&2\nexit $status", self.line);
        let (cpus, seconds) = (self.cpus.to_string(), self.limit.as_secs().to_string());
        let start = Instant::now();
        let mut command = Command::new(linux);
        command.args(self.backend).args(["--cpus", &cpus, "--seconds", &seconds, "--command", &line]);
        for file in self.files {
            command.args(["--add", file]);
        }
        let child =
            command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().with_context(|| format!("starting {}", linux.display()))?;
        let (output, log) = (child.stdout.take().context("a pipe")?, child.stderr.take().context("a pipe")?);
        let (output, log) = (reader(output), reader(log));
        // `linux` ends by itself when the guest's time is up; where it does not, it hangs.
        let deadline = start + self.limit + GRACE;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                None => {
                    child.kill()?;
                    break child.wait()?;
                }
            }
        };
        let time = start.elapsed();
        let text = |reader: JoinHandle<Result<String>>| {
            reader.join().map_err(|_| anyhow::anyhow!("the thread that reads panicked"))?
        };
        Ok(Verdict { output: text(output)?, log: text(log)?, status, time })
    }
}

fn reader(mut stream: impl Read + Send + 'static) -> JoinHandle<Result<String>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).context("reading what the guest prints")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn troubles_are_found_and_nothing_else() {
        let log = "[    0.0] [Firmware Bug]: TSC doesn't count with P0 frequency!\n\
                   [    1.0] BUG: kernel NULL pointer dereference, address: 0\n\
                   [    2.0] sh[9]: segfault at 0 ip 0 sp 0 error 14\n\
                   [    3.0] WARNING: See https://kernel.org/doc/html/latest/admin-guide/hw-vuln/srso.html for options.\n\
                   [    4.0] WARNING: CPU: 0 PID: 1 at kernel/smp.c:1 f+0x1/0x2\n";
        let verdict = Verdict {
            output: String::new(),
            log: log.to_owned(),
            status: ExitStatus::from_raw(0),
            time: Duration::ZERO,
        };
        let troubles: Vec<&str> = verdict.troubles().collect();
        assert_eq!(troubles.len(), 3, "{troubles:?}");
    }

    #[test]
    fn a_profile_is_the_directorys_name_but_for_one() {
        for (directory, expected) in
            [("target/debug", "dev"), ("/t/release", "release"), ("a/bench-2", "bench-2")]
        {
            assert_eq!(profile(Path::new(directory)).unwrap(), expected);
        }
        assert!(profile(Path::new("/")).is_err());
    }

    /// In the place of `linux`, a script that runs the line here.
    #[test]
    fn the_status_is_the_lines() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("linux");
        let script =
            "#!/bin/sh\ndmesg() { echo log; }\nwhile [ \"$1\" != --command ]; do shift; done\neval \"$2\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let trial = Trial {
            backend: &["--backend", "any"],
            cpus: 1,
            limit: Duration::from_secs(1),
            files: &["a:/b"],
            line: "echo out; (exit 5)",
        };
        let verdict = trial.run(&program).unwrap();
        assert_eq!((verdict.output.as_str(), verdict.log.as_str()), ("out\n", "log\n"));
        assert_eq!(verdict.status.code(), Some(5));
    }
}
