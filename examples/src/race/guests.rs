//! The guests that race: Debian's kernel with a small userspace, on whatever is to be compared.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::qemu::{install_qemu, microvm};
use super::{Runner, clock};
use crate::debian::{self, Kernel, Series};
use crate::initramfs::Archive;
use crate::trial::built_linux;

/// The program that works in the guest and natively, which the build made.
const WORKLOAD: &str = env!("WORKLOAD_GUEST");

/// What works on the pieces of `$rows`, separated by commas, in the guest and natively. One that fails is none of the others'
/// business.
const WORK: &str = "$workload clock
IFS=,
for row in $rows; do
    $workload time $row || echo \"failed $row\"
done
$workload clock
echo 'race: end of work'
";

/// The guest's first process. The kernel puts what it does not know of its command line into the environment.
const INIT: &str = "#!/bin/busybox sh
echo 'race: init'
/bin/workload clock
if [ -n \"$rows\" ]; then
    /bin/busybox mount -t proc proc /proc
    workload=/bin/workload
";
const INIT_END: &str = "fi
exec /bin/busybox poweroff -f
";

/// What the kernel says when it can do no more.
const LAST_LINE: &str = "reboot: Power down";

/// Without it a kernel compares the time-stamp counter with its own count of ticks, and on a busy host, where a guest on TCG loses
/// ticks, it takes those for right.
const CLOCK: &str = "tsc=reliable";

/// A guest on QEMU that must measure the rate of its clock may hang; it is booted so often.
const ATTEMPTS: u32 = 3;

/// What all guests are made of.
#[derive(Debug)]
pub struct Guests {
    kernel: Kernel,
    busybox: PathBuf,
    linux: PathBuf,
    initrd: PathBuf,
    /// Where the initial RAM disk is.
    _directory: TempDir,
}

/// What runs a guest, or programs of it without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What it is called in reports.
    pub name: String,
    /// Added to the kernel's command line.
    append: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// No machine: programs run on the host.
    Native,
    /// QEMU's microvm on TCG.
    Tcg,
    /// `linux` with these arguments.
    Ours(Vec<String>),
}

/// Times of one boot, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BootTimes {
    /// From the start of the program to a line of init.
    pub init: f64,
    /// What the guest's clock showed then.
    pub init_by_guest: f64,
    /// From the start of the program to its end; of QEMU, to the kernel's last line.
    pub power_off: f64,
}

impl Machine {
    /// The host itself.
    pub fn native(name: &str) -> Self {
        Self { name: name.to_owned(), append: String::new(), kind: Kind::Native }
    }

    /// QEMU's translator, with `append` on the kernel's command line.
    pub fn tcg(name: &str, append: &str) -> Self {
        Self { name: name.to_owned(), append: append.to_owned(), kind: Kind::Tcg }
    }

    /// The program `linux` with these arguments.
    pub fn ours(name: &str, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self { name: name.to_owned(), append: String::new(), kind: Kind::Ours(arguments) }
    }

    /// Whether there is a guest.
    pub fn boots(&self) -> bool {
        self.kind != Kind::Native
    }
}

impl Guests {
    /// Gets what is absent: Debian's kernel and busybox, QEMU, and `linux` as it is now.
    ///
    /// # Errors
    /// Fails if one of them cannot be had.
    pub fn get(series: Series) -> Result<Self> {
        let kernel = debian::kernel(series)?;
        let busybox = debian::busybox()?;
        install_qemu()?;
        let directory = tempfile::tempdir()?;
        let initrd = directory.path().join("initrd");
        let archive = archive(std::fs::read(&busybox)?)?;
        std::fs::write(&initrd, archive).context("writing the initial RAM disk")?;
        Ok(Self { kernel, busybox, linux: built_linux()?, initrd, _directory: directory })
    }

    /// What `uname -r` prints in a guest.
    pub fn release(&self) -> &str {
        &self.kernel.release
    }

    /// Starts what works on `rows`, names that `examples/guest/workload` knows. A guest boots first, for at most `boot`.
    ///
    /// # Errors
    /// Fails if it cannot be started, or does not come to its init.
    pub fn work(&self, machine: &Machine, rows: &[&str], boot: Duration) -> Result<Runner> {
        let rows = rows.join(",");
        if machine.boots() {
            return Ok(self.until_init(machine, &format!("rows={rows}"), boot)?.0);
        }
        let mut command = Command::new(&self.busybox);
        command.args(["sh", "-c", WORK]).env("rows", rows).env("workload", WORKLOAD);
        command.env("busybox", &self.busybox).env_remove("RUST_BACKTRACE");
        Runner::start(command, boot)
    }

    /// Boots until init says that it runs; when that was. The runner has `limit` from its start for all that follows.
    ///
    /// # Errors
    /// Fails if it does not get there within `limit`, all attempts together where it may try again.
    pub fn until_init(&self, machine: &Machine, append: &str, limit: Duration) -> Result<(Runner, Duration)> {
        let mut left = if machine.kind == Kind::Tcg { ATTEMPTS } else { 1 };
        let limit_of_one = limit / left;
        loop {
            let mut runner = Runner::start(self.boot(machine, append)?, limit_of_one)?;
            left -= 1;
            match runner.until("race: init") {
                Ok((time, _)) => {
                    runner.allow(limit);
                    return Ok((runner, time));
                }
                Err(error) if left > 0 => eprintln!("not counted: {error:#}"),
                Err(error) => return Err(error),
            }
        }
    }

    /// Boots to init and then to power-off.
    ///
    /// # Errors
    /// Fails if a guest does not get there within `limit`.
    pub fn times(&self, machine: &Machine, limit: Duration) -> Result<BootTimes> {
        let (mut runner, init) = self.until_init(machine, "", limit)?;
        let init_by_guest = clock(&runner.until("clock ")?.1)?.as_secs_f64();
        let power_off = if machine.kind == Kind::Tcg {
            runner.until(LAST_LINE)?.0
        } else {
            let (time, status) = runner.end()?;
            ensure!(status.success(), "it ended with {status}");
            time
        };
        Ok(BootTimes { init: init.as_secs_f64(), init_by_guest, power_off: power_off.as_secs_f64() })
    }

    fn boot(&self, machine: &Machine, append: &str) -> Result<Command> {
        let append = format!("quiet {CLOCK} {append} {}", machine.append);
        match &machine.kind {
            Kind::Native => bail!("{} has no guest that could boot", machine.name),
            Kind::Tcg => Ok(microvm(&self.kernel.image, &self.initrd, &append)),
            Kind::Ours(arguments) => {
                let mut command = Command::new(&self.linux);
                command.args(arguments).args(["--append", &append]).env_remove("RUST_LOG");
                command.arg("--kernel").arg(&self.kernel.image).arg("--initrd").arg(&self.initrd);
                Ok(command)
            }
        }
    }
}

/// Busybox, the workload and init.
fn archive(busybox: Vec<u8>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "proc", "tmp"] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.device("dev/zero", 0o666, 1, 5)?;
    archive.file("bin/busybox", 0o755, busybox)?;
    archive.file("bin/workload", 0o755, std::fs::read(WORKLOAD).with_context(|| WORKLOAD)?)?;
    archive.file("init", 0o755, format!("{INIT}{WORK}{INIT_END}").into_bytes())?;
    archive.to_bytes()
}

/// The order in which `count` machines take their turns in the pair of that number, from 0: each second pair goes the other way
/// round, and every two pairs the first machine is another.
pub fn order(pair: u32, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.rotate_left(usize::try_from(pair / 2).unwrap_or(0) % count.max(1));
    if pair % 2 == 1 {
        order.reverse();
    }
    order
}

/// Does `one` for each machine, `pairs` times by turns. The results by machine.
///
/// # Errors
/// The first of `one`, with the machine's name.
pub fn by_turns<T>(
    machines: &[Machine],
    pairs: u32,
    mut one: impl FnMut(u32, &Machine) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut results: Vec<Vec<T>> = machines.iter().map(|_| Vec::new()).collect();
    for pair in 0..pairs {
        for index in order(pair, machines.len()) {
            if let (Some(machine), Some(results)) = (machines.get(index), results.get_mut(index)) {
                results.push(one(pair + 1, machine).with_context(|| machine.name.clone())?);
            }
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::super::Report;
    use super::*;

    /// The shell and the program as in a guest, but here.
    #[test]
    fn a_row_that_fails_is_none_of_the_others_business() {
        const ROWS: [&str; 3] = ["getppid", "nobody", "fib"];
        let mut command = Command::new("sh");
        command.args(["-c", WORK]).env("rows", ROWS.join(",")).env("workload", WORKLOAD);
        let mut runner = Runner::start(command, Duration::from_secs(60)).unwrap();
        let report = Report::of(&mut runner, &ROWS, Duration::from_secs(60));
        assert_eq!(report.figures.keys().collect::<Vec<_>>(), ["fib", "getppid"]);
        assert!(report.failures["nobody"].contains("no work is named \"nobody\""), "{report:?}");
        // Each of two rows takes a fifth of a second.
        let (by_guest, by_host) = report.clocks().unwrap();
        assert!(by_guest > 0.4 && (by_guest - by_host).abs() < 30.0, "{by_guest} {by_host}");
    }

    #[test]
    fn turns_alternate() {
        assert_eq!([0, 1, 2, 3].map(|pair| order(pair, 2)), [[0, 1], [1, 0], [1, 0], [0, 1]]);
        assert_eq!([0, 1, 2].map(|pair| order(pair, 3)), [[0, 1, 2], [2, 1, 0], [1, 2, 0]]);
        assert!(order(7, 0).is_empty());

        let machines = ["a", "b"].map(Machine::native);
        let mut turns = Vec::new();
        let results = by_turns(&machines, 2, |pair, machine| {
            turns.push(format!("{}{pair}", machine.name));
            Ok(pair)
        });
        assert_eq!(results.unwrap(), [[1, 2], [1, 2]]);
        assert_eq!(turns, ["a1", "b1", "b2", "a2"]);
        let error = by_turns::<()>(&machines, 2, |_, _| bail!("no")).unwrap_err();
        assert_eq!(format!("{error:#}"), "a: no");
    }
}
