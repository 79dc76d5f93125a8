//! An audit log that a process of its own writes: the monitor has shared rings and no key, so that a guest which breaks out of it can
//! neither change nor sign what is in the log.
//!
//! | in the directory | what |
//! |---|---|
//! | `log` | the log; `vmm-audit verify log --key key.pub` |
//! | `key.pub` | its public key: to be kept elsewhere |
//! | `keys` | its secret keys, for the owner only |
//! | `socket` | where the monitor hands over its rings |
//!
//! The process that writes is this program once more. It ends when the monitor does, however that ends, and writes down first what is in the
//! rings.

mod machine;

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vmm_audit::collector::{Attached, Collector, CollectorOptions, RingOptions, attach_once};
use vmm_audit::event::Party;
use vmm_audit::keys::FileKeys;
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::note::Verifier;
use vmm_audit::storage::FsStorage;

use crate::confine::Confinement;

pub use machine::{Failure, MachineLog, OnFailure};

/// How long the log may stand still before nothing opens any more.
const DEADLINE: Duration = Duration::from_secs(2);

/// Bytes that the monitor may say at its end.
const MOST_SAID: u64 = 16 << 20;

/// The process that writes the log, from where it was started.
pub struct LogProcess {
    socket: PathBuf,
    /// It ends when this does.
    monitor: ChildStdin,
    /// And this ends when the log is closed.
    says: BufReader<ChildStdout>,
    id: u32,
    /// Waits for its end, whenever that is, so that nothing is left of it.
    ended: JoinHandle<io::Result<ExitStatus>>,
}

impl LogProcess {
    /// Starts the process that writes the log in `dir`: this program, with `argument` and the directory.
    ///
    /// # Errors
    /// If the directory cannot be made, or the process does not begin.
    pub fn start(dir: &Path, argument: &str) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let program = std::env::current_exe().context("this program")?;
        let mut command = Command::new(program);
        // Of a group of its own, so that the terminal's interrupt is the monitor's.
        command.arg(argument).arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("the process that writes the audit log")?;
        let monitor = child.stdin.take().context("its standard input")?;
        let mut says = BufReader::new(child.stdout.take().context("its standard output")?);
        let id = child.id();
        let wait = move || child.wait();
        let ended = std::thread::Builder::new().name("audit-log-end".to_owned()).spawn(wait)?;
        let mut line = String::new();
        says.read_line(&mut line)?;
        ensure!(line == "ready\n", "the process that writes the audit log did not begin");
        Ok(Self { socket: dir.join("socket"), monitor, says, id, ended })
    }

    /// With what waiting for its end needs: a call that is interrupted is made again.
    pub fn confinement(&self, confinement: Confinement) -> Confinement {
        confinement.allow_if(libc::SYS_wait4, 0, self.id.into())
    }

    /// A ring of its own for `who`. If the process ends before this one, nothing is admitted any more.
    ///
    /// # Errors
    /// If it is not taken.
    pub fn attach(&self, who: &Party) -> Result<Attached> {
        Ok(attach_once(&self.socket, who, RingOptions::default(), DEADLINE)?)
    }

    /// Tells it that there is nothing more to come, and `said`. Whoever is attached should be no more. What it says once the log is
    /// closed.
    ///
    /// # Errors
    /// If it does not get closed, or the process fails.
    pub fn end(mut self, said: &str) -> Result<String> {
        self.monitor.write_all(said.as_bytes()).context("the process that writes the audit log")?;
        drop(self.monitor);
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        ensure!(line == "closed\n", "the audit log was not closed: {line:?}");
        let mut rest = String::new();
        self.says.read_to_string(&mut rest)?;
        let status =
            self.ended.join().map_err(|_| anyhow::anyhow!("the thread that waits for it panicked"))??;
        ensure!(status.success(), "the process that writes the audit log ended with {status}");
        Ok(rest)
    }
}

/// What is there when the monitor has ended.
pub struct Collected {
    /// What the monitor said at its end.
    pub said: String,
    /// The log's key.
    pub key: Verifier,
    /// Entries that were there before this run.
    pub before: u64,
}

/// What the process that writes does: collects until the monitor ends, and closes the log. `origin` is the log's name, which its key has too.
///
/// # Errors
/// If the log cannot be opened, or fails.
pub fn collect(dir: &Path, origin: &str) -> Result<Collected> {
    let storage = Arc::new(FsStorage::create(dir.join("log"))?);
    let keys = Box::new(FileKeys::new(dir.join("keys")));
    let (log, recovered) = LogWriter::open(storage, keys, origin, LogOptions::new())?;
    let key = log.verifier().clone();
    std::fs::write(dir.join("key.pub"), format!("{key}\n"))?;
    let collector = Collector::bind(dir.join("socket"), log, CollectorOptions::default())?;
    println!("ready");
    io::stdout().flush()?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let hear = move || {
        let mut said = String::new();
        // Its end is what is waited for, be it by an error: a monitor that was killed has said nothing, or half of it.
        let heard = io::stdin().lock().take(MOST_SAID).read_to_string(&mut said);
        stopping.store(true, Ordering::Release);
        heard.map(|_| said)
    };
    let monitor = std::thread::Builder::new().name("monitor".to_owned()).spawn(hear)?;
    collector.run(&stop)?;
    // A monitor that was killed does not hear it.
    drop(writeln!(io::stdout(), "closed"));
    let said =
        monitor.join().map_err(|_| anyhow::anyhow!("the thread that hears the monitor panicked"))??;
    Ok(Collected { said, key, before: recovered.entries })
}
