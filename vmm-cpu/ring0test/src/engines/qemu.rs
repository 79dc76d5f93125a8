//! QEMU's translator, TCG, on its smallest machine.

use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::End;
use crate::layout::control;
use crate::memory::Memory;

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";

/// What `translate` says that it is, as far as QEMU knows it.
const CPU: &str =
    "qemu64,vendor=AuthenticAMD,+smep,+smap,+umip,+fsgsbase,+pdpe1gb,+rdtscp,+syscall,-svm,-vme";

/// What it dies of.
const SIGSEGV: i32 = 11;

/// How long a scenario may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// QEMU's version, `None` where there is none.
pub fn version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned)
}

/// Installs Debian's package where QEMU is absent.
pub fn install() -> Result<()> {
    if version().is_some() {
        return Ok(());
    }
    eprintln!("installing qemu-system-x86 (about 100 MB with what it needs)");
    for arguments in
        [&["-q", "update"][..], &["-qy", "install", "--no-install-recommends", "qemu-system-x86"]]
    {
        let mut apt = Command::new("apt-get");
        let status =
            apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()).status();
        if !status.is_ok_and(|status| status.success()) {
            break;
        }
    }
    ensure!(
        version().is_some(),
        "{QEMU} is absent and cannot be installed here; install Debian's package qemu-system-x86"
    );
    Ok(())
}

/// A child that does not outlive this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait().map(|_| ())) {
            eprintln!("{QEMU}: {error}");
        }
    }
}

/// Boots the image. `None`: all scenarios are done.
pub(super) fn boot(image: &Path, memory: &Memory) -> Result<Option<End>> {
    let backend = format!(
        "memory-backend-file,id=ram,size={},share=on,mem-path=/proc/{}/fd/{}",
        memory.bytes,
        std::process::id(),
        memory.file.as_raw_fd()
    );
    let mut command = Command::new(QEMU);
    command.args(["-M", "microvm,acpi=off,rtc=off,memory-backend=ram", "-accel", "tcg,thread=single"]);
    command.args(["-cpu", CPU, "-m", &format!("{}M", memory.bytes >> 20), "-object", &backend]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"]).arg(image);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
    let mut child = Killed(child.with_context(|| format!("starting {QEMU}"))?);
    let mut progress = (memory.word(control::STARTED)?, Instant::now());
    loop {
        if let Some(status) = child.0.try_wait()? {
            if memory.word(control::DONE)? != 0 {
                return Ok(None);
            }
            if status.success() {
                return Ok(Some(End::Shutdown));
            }
            if status.signal() == Some(SIGSEGV) {
                return Ok(Some(End::Died));
            }
            bail!("{QEMU} ended with {status}");
        }
        let started = memory.word(control::STARTED)?;
        if started != progress.0 {
            progress = (started, Instant::now());
        } else if progress.1.elapsed() > PATIENCE {
            return Ok(Some(End::Hang));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
