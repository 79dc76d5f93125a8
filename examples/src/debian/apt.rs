//! What is asked of apt: which packages there are, which ones a set of packages needs, and to download and unpack
//! them. None of it changes this machine but `apt-get update`, which is tried where apt knows nothing.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::{Series, is_cloud_kernel, newest};

/// Name of the newest cloud kernel package of `series`.
pub(super) fn newest_kernel(series: Series) -> Result<String> {
    let in_series =
        |names: &[String]| newest(names.iter().filter(|name| is_cloud_kernel(name, series)).cloned());
    let mut names = cloud_kernels()?;
    let mut found = in_series(&names);
    // Where that takes more rights than this program has, what there is is all there is.
    if found.is_none() && update().is_ok() {
        names = cloud_kernels()?;
        found = in_series(&names);
    }
    found.with_context(|| match names.as_slice() {
        [] => "apt knows no cloud kernel package".to_owned(),
        names => format!("apt has no cloud kernel {series}, only {}", names.join(", ")),
    })
}

fn cloud_kernels() -> Result<Vec<String>> {
    let pattern = r"^linux-image-[0-9.]+[0-9].*-cloud-amd64$";
    let listing = output(Command::new("apt-cache").args(["search", "--names-only", pattern]))?;
    Ok(listing.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

/// `packages` and all that they need, as apt would choose it on a machine that has nothing installed.
pub(super) fn closure(packages: &[&str]) -> Result<Vec<String>> {
    let choose = || {
        output(
            Command::new("apt-get")
                .args(["-q", "--simulate", "--no-install-recommends"])
                .args(["-o", "Dir::State::status=/dev/null", "install"])
                .args(packages),
        )
    };
    let plan = with_fresh_lists(choose)?;
    let chosen = planned(&plan);
    ensure!(!chosen.is_empty(), "apt would install nothing for {}", packages.join(" "));
    Ok(chosen)
}

/// The packages that a simulated installation installs.
fn planned(plan: &str) -> Vec<String> {
    let name = |line: &str| line.strip_prefix("Inst ")?.split(' ').next().map(str::to_owned);
    plan.lines().filter_map(name).collect()
}

/// Downloads `packages` into `work` and unpacks them into `tree`.
pub(super) fn fetch(packages: &[&str], work: &Path, tree: &Path) -> Result<()> {
    match packages {
        [package] => eprintln!("debian: downloading {package}"),
        packages => eprintln!("debian: downloading {} packages", packages.len()),
    }
    // The user that apt downloads as, where root started it, may not write here.
    let download = || {
        let arguments = ["-q", "-o", "APT::Sandbox::User=root", "download"];
        run(Command::new("apt-get").args(arguments).args(packages).current_dir(work).stdout(Stdio::null()))
    };
    with_fresh_lists(download)?;

    let archives = archives_in(work)?;
    ensure!(
        archives.len() == packages.len(),
        "apt-get left {} packages in {}, asked for were {}",
        archives.len(),
        work.display(),
        packages.len()
    );
    eprintln!("debian: unpacking");
    for archive in archives {
        run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(tree))?;
    }
    Ok(())
}

fn archives_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut archives = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            archives.push(path);
        }
    }
    archives.sort();
    Ok(archives)
}

/// Tries once more with the package lists updated: there may be none yet, or the mirror no longer has what they name.
fn with_fresh_lists<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    attempt().or_else(|first| if update().is_ok() { attempt() } else { Err(first) })
}

fn update() -> Result<()> {
    eprintln!("debian: updating the package lists");
    run(Command::new("apt-get").args(["-q", "update"]).stdout(Stdio::null()))
}

/// Runs `command` and wants its success.
fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status();
    let status = status.map_err(|error| absent(command, &error))?;
    ensure!(status.success(), "{} ended with {status}", described(command));
    Ok(())
}

/// Runs `command`, wants its success and returns what it prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).env("LC_ALL", "C").output();
    let output = output.map_err(|error| absent(command, &error))?;
    if !output.status.success() {
        bail!("{} ended with {}", described(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("reading what {} prints", described(command)))
}

/// The program and its first words, as much as tells two calls apart.
fn described(command: &Command) -> String {
    let words = command.get_args().filter_map(|word| word.to_str()).filter(|word| !word.starts_with('-'));
    let words: Vec<&str> = words.filter(|word| !word.contains('=')).take(2).collect();
    format!("{} {}", command.get_program().display(), words.join(" "))
}

fn absent(command: &Command, error: &std::io::Error) -> anyhow::Error {
    let program = command.get_program().display();
    match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!("{program} is not on this machine"),
        _ => anyhow::anyhow!("{program} cannot be started: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_an_installation_is_read() {
        let plan = "Building dependency tree...\nThe following NEW packages will be installed:\n  bash libc6\n\
                    Inst libc6 (2.36-9 Debian:12/oldstable [amd64]) []\nInst bash (5.2 Debian:12 [amd64])\n\
                    Conf libc6 (2.36-9 Debian:12/oldstable [amd64])\n";
        assert_eq!(planned(plan), ["libc6", "bash"]);
    }

    #[test]
    fn a_program_that_is_absent_is_named() {
        let error = run(&mut Command::new("no-such-package-tool")).unwrap_err();
        assert_eq!(error.to_string(), "no-such-package-tool is not on this machine");
        let error = output(Command::new("false").args(["-q", "install", "bash"])).unwrap_err();
        assert_eq!(error.to_string(), "false install bash ended with exit status: 1");
    }
}
