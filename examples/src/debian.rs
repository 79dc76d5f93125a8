//! Debian's cloud kernel, fetched as a package with apt from whatever mirror this machine is set up with.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The series that the examples are tried with, which is Debian 12's.
const SERIES: &str = "6.1.";

/// Names of Debian's signed cloud kernel packages have these around the version.
const PACKAGE: (&str, &str) = ("linux-image-", "-cloud-amd64");

/// What the whole of it says when it does not work.
const BY_HAND: &str =
    "pass a bzImage or vmlinux with --kernel, for example /boot/vmlinuz-* of a Debian machine";

/// Path of a cloud kernel (a bzImage), from the cache under target/ or freshly fetched.
pub fn kernel() -> Result<PathBuf> {
    let cache = cache_directory()?;
    match newest(kernels_in(&cache)?) {
        Some(kernel) => Ok(cache.join(kernel)),
        None => fetch(&cache).with_context(|| format!("no Debian kernel could be fetched; {BY_HAND}")),
    }
}

/// `debian` in cargo's target directory, which is the one above this program that cargo has marked.
fn cache_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program's own path")?;
    let target = program
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").exists())
        .with_context(|| format!("{} is in no target directory of cargo; {BY_HAND}", program.display()))?;
    let cache = target.join("debian");
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    Ok(cache)
}

/// Names of the complete kernels in `directory`.
fn kernels_in(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with("vmlinuz-")
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// The name with the highest numbers, compared one after another.
fn newest(names: Vec<String>) -> Option<String> {
    let numbers = |name: &String| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.into_iter().max_by_key(numbers)
}

fn fetch(cache: &Path) -> Result<PathBuf> {
    let package = match find_package()? {
        Some(package) => package,
        None => {
            eprintln!("debian: updating the package lists");
            run(Command::new("apt-get").args(["-q", "update"]).stdout(Stdio::null()))?;
            find_package()?.context("apt knows no cloud kernel package")?
        }
    };

    // A directory of its own, so that programs which fetch at the same time do not meet.
    let work = cache.join(format!("fetching-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let kernel = fetch_into(&work, &package).and_then(|kernel| {
        let name = kernel.file_name().context("the kernel has no name")?;
        let cached = cache.join(name);
        fs::rename(&kernel, &cached).with_context(|| format!("moving the kernel to {}", cached.display()))?;
        eprintln!("debian: kept as {}", cached.display());
        Ok(cached)
    });
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    kernel
}

/// The newest package of the series, or else what the distribution calls its cloud kernel.
fn find_package() -> Result<Option<String>> {
    let (before, after) = PACKAGE;
    let search = |pattern: &str| output(Command::new("apt-cache").args(["search", "--names-only", pattern]));
    let listing = search(&format!("^{before}.*{after}$"))?;
    let names: Vec<String> =
        listing.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
    let in_series =
        |name: &&String| name.strip_prefix(before).is_some_and(|version| version.starts_with(SERIES));
    let preferred: Vec<String> = names.iter().filter(in_series).cloned().collect();
    Ok(newest(preferred).or_else(|| newest(names)))
}

fn fetch_into(work: &Path, package: &str) -> Result<PathBuf> {
    eprintln!("debian: downloading {package} (about 26 MB)");
    // The user that apt downloads as, where root started it, may not write here.
    let download = ["-q", "-o", "APT::Sandbox::User=root", "download", package];
    run(Command::new("apt-get").args(download).current_dir(work).stdout(Stdio::null()))?;
    let mut archives = fs::read_dir(work)?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let archive = archives
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get left no package in {}", work.display()))?;
    eprintln!("debian: unpacking");
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(work))?;
    let boot = work.join("boot");
    let kernel = newest(kernels_in(&boot)?).with_context(|| format!("{package} holds no kernel"))?;
    Ok(boot.join(kernel))
}

/// Runs `command` and wants its success.
fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status();
    let status = status.map_err(|error| absent(command, error))?;
    ensure!(status.success(), "{} ended with {status}", command.get_program().display());
    Ok(())
}

/// Runs `command`, wants its success and returns what it prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| absent(command, error))?;
    if !output.status.success() {
        bail!("{} ended with {}", command.get_program().display(), output.status);
    }
    String::from_utf8(output.stdout).context("reading the list of packages")
}

fn absent(command: &Command, error: std::io::Error) -> anyhow::Error {
    let program = command.get_program().display();
    match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!("{program} is not on this machine"),
        _ => anyhow::anyhow!("{program} cannot be started: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn newest_compares_numbers_not_text() {
        let names =
            ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-47-cloud-amd64"].map(str::to_owned);
        assert_eq!(newest(names.to_vec()).as_deref(), Some("linux-image-6.1.0-47-cloud-amd64"));
        assert_eq!(newest(Vec::new()), None);
    }
}
