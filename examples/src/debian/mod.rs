//! What the guests are made of: Debian's cloud kernels with their modules, its static busybox, and any other of its
//! packages, fetched with apt from whatever mirror this machine is set up with. Nothing is installed and nothing
//! needs root.
//!
//! Everything is kept under `debian` in cargo's target directory, one directory a package or set of packages, which
//! appears there whole: programs that fetch at the same time do not meet. Removing a directory fetches it anew.

mod apt;
mod modules;

pub use modules::{MODULES, Module, ModuleTree};

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// What an error about something absent ends with.
const BY_HAND: &str =
    "pass a bzImage or vmlinux with --kernel, for example /boot/vmlinuz-* of a Debian machine";

/// What of an unpacked package no guest reads.
const UNREAD: [&str; 7] = ["bug", "doc", "info", "lintian", "locale", "man", "doc-base"];

/// The longest name that a file system takes, in bytes.
const LONGEST_NAME: usize = 255;

/// A series of kernels that Debian ships for the cloud.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[non_exhaustive]
pub enum Series {
    /// Debian 12's own.
    #[default]
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's own, also offered by the security and backports archives of Debian 12.
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

impl Series {
    /// What the names of this series' packages begin with.
    fn package_prefix(self) -> String {
        format!("linux-image-{self}.")
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel itself, a bzImage.
    pub image: PathBuf,
    /// What `uname -r` prints in a guest of this kernel.
    pub release: String,
    /// The directory of its modules, `lib/modules/RELEASE` of the package.
    pub modules: PathBuf,
}

/// The newest cloud kernel of `series` in the cache, or else the newest that apt offers.
///
/// # Errors
/// Fails where there is no apt, where apt offers no kernel of the series (the error says which it has), and where
/// the download fails.
pub fn kernel(series: Series) -> Result<Kernel> {
    let cache = cache_directory()?;
    let kept = newest(names_in(&cache)?.into_iter().filter(|name| is_cloud_kernel(name, series)));
    let directory = match kept {
        Some(name) => cache.join(name),
        None => apt::newest_kernel(series)
            .and_then(|package| cached(&cache, &package, |work, tree| apt::fetch(&[&*package], work, tree)))
            .with_context(|| format!("no Debian kernel {series} could be fetched; {BY_HAND}"))?,
    };
    Kernel::open(&directory)
}

/// Path of Debian's static busybox.
///
/// # Errors
/// Fails where there is no apt, and where the download fails.
pub fn busybox() -> Result<PathBuf> {
    const PACKAGE: &str = "busybox-static";
    let cache = cache_directory()?;
    let tree = cached(&cache, PACKAGE, |work, tree| apt::fetch(&[PACKAGE], work, tree))
        .context("Debian's busybox-static could not be fetched; pass an initial RAM disk with --initrd")?;
    let places = [tree.join("bin/busybox"), tree.join("usr/bin/busybox")];
    let [first, ..] = &places;
    places
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .with_context(|| format!("{} is absent", first.display()))
}

/// A directory with the files of `names` and of everything they depend on, without documentation and without what
/// installation scripts would have made.
///
/// # Errors
/// Fails where there is no apt, for a package that apt does not know, and where the download fails.
pub fn packages(names: &[&str]) -> Result<PathBuf> {
    let mut sorted = names.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    for name in &sorted {
        // Also keeps options and paths away from apt.
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
        ensure!(
            name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain),
            "{name:?} is no package name: those have lower case letters, digits, '+', '-' and '.'"
        );
    }
    let key = format!("packages,{}", sorted.join(","));
    ensure!(!sorted.is_empty(), "no package is asked for");
    ensure!(
        key.len() <= LONGEST_NAME,
        "the {} package names together have {} bytes, allowed are {LONGEST_NAME}",
        sorted.len(),
        key.len()
    );
    cached(&cache_directory()?, &key, |work, tree| {
        let closure = apt::closure(&sorted)?;
        apt::fetch(&closure.iter().map(String::as_str).collect::<Vec<_>>(), work, tree)
    })
    .with_context(|| format!("Debian's {} could not be fetched", sorted.join(", ")))
}

impl Kernel {
    /// The kernel in `tree`, an unpacked package.
    fn open(tree: &Path) -> Result<Self> {
        let boot = tree.join("boot");
        let image = newest(names_in(&boot)?.into_iter().filter(|name| name.starts_with("vmlinuz-")));
        let image = image.with_context(|| format!("{} holds no kernel", boot.display()))?;
        let release = image.trim_start_matches("vmlinuz-").to_owned();
        let places = ["lib/modules", "usr/lib/modules"].map(|place| tree.join(place).join(&release));
        let modules = places.iter().find(|path| path.is_dir()).cloned();
        let modules = modules.with_context(|| format!("{} holds no modules of {release}", tree.display()))?;
        Ok(Self { image: boot.join(image), release, modules })
    }
}

/// Cargo's target directory: the one above `program` that cargo has marked. It writes the first of these files only if
/// it creates the directory itself.
fn target_directory(program: &Path) -> Option<&Path> {
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    program.ancestors().skip(1).find(|directory| marks.iter().any(|mark| directory.join(mark).exists()))
}

/// `debian` in cargo's target directory.
fn cache_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program's own path")?;
    let target = target_directory(&program)
        .with_context(|| format!("{} is in no target directory of cargo; {BY_HAND}", program.display()))?;
    let cache = target.join("debian");
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    Ok(cache)
}

/// The directory `name` of the cache. If it is absent, `make` fills the second directory it is given (with the first
/// for its own use), and what it has made becomes that directory.
fn cached(cache: &Path, name: &str, make: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
    let kept = cache.join(name);
    if kept.is_dir() {
        return Ok(kept);
    }
    let work = tempfile::Builder::new().prefix("fetching-").tempdir_in(cache);
    let work = work.with_context(|| format!("creating a directory in {}", cache.display()))?;
    let tree = work.path().join("tree");
    fs::create_dir(&tree).with_context(|| format!("creating {}", tree.display()))?;
    make(work.path(), &tree)?;
    remove_unread(&tree)?;
    match fs::rename(&tree, &kept) {
        Ok(()) => eprintln!("debian: kept as {}", kept.display()),
        // Another program was faster.
        Err(_) if kept.is_dir() => {}
        Err(error) => bail!("moving {} to {}: {error}", tree.display(), kept.display()),
    }
    Ok(kept)
}

/// Removes what no guest reads, which is much of a package.
fn remove_unread(tree: &Path) -> Result<()> {
    for name in UNREAD {
        let directory = tree.join("usr/share").join(name);
        if directory.is_dir() {
            fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
        }
    }
    Ok(())
}

fn is_cloud_kernel(package: &str, series: Series) -> bool {
    package.starts_with(&series.package_prefix()) && package.ends_with("-cloud-amd64")
}

/// Names of what `directory` holds, in no order.
fn names_in(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

/// The name with the highest numbers, compared one after another.
fn newest(names: impl IntoIterator<Item = String>) -> Option<String> {
    let numbers = |name: &String| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.into_iter().max_by_key(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_directory_is_found_by_either_mark() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("target");
        let program = target.join("release/linux");
        fs::create_dir_all(target.join("release")).unwrap();
        for mark in ["CACHEDIR.TAG", ".rustc_info.json"] {
            assert_eq!(target_directory(&program), None);
            fs::write(target.join(mark), "").unwrap();
            assert_eq!(target_directory(&program), Some(target.as_path()));
            fs::remove_file(target.join(mark)).unwrap();
        }
    }

    #[test]
    fn newest_compares_numbers_not_text() {
        let names =
            ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-47-cloud-amd64"].map(str::to_owned);
        assert_eq!(newest(names).as_deref(), Some("linux-image-6.1.0-47-cloud-amd64"));
        assert_eq!(newest(Vec::new()), None);
    }

    #[test]
    fn a_series_is_told_from_one_whose_number_begins_alike() {
        assert!(is_cloud_kernel("linux-image-6.1.0-9-cloud-amd64", Series::V6_1));
        assert!(!is_cloud_kernel("linux-image-6.12.9+deb12-cloud-amd64", Series::V6_1));
        assert!(is_cloud_kernel("linux-image-6.12.9+deb12-cloud-amd64", Series::V6_12));
        assert!(!is_cloud_kernel("linux-image-6.1.0-9-amd64", Series::V6_1));
    }

    #[test]
    fn what_is_cached_is_made_once_and_only_whole() {
        let cache = tempfile::tempdir().unwrap();
        let fail = cached(cache.path(), "thing", |_, tree| {
            fs::write(tree.join("half"), "")?;
            bail!("no network")
        });
        assert_eq!(fail.unwrap_err().to_string(), "no network");
        assert_eq!(names_in(cache.path()).unwrap(), Vec::<String>::new());

        let made = cached(cache.path(), "thing", |_, tree| Ok(fs::write(tree.join("whole"), "")?)).unwrap();
        assert_eq!(names_in(&made).unwrap(), ["whole"]);
        assert_eq!(cached(cache.path(), "thing", |_, _| bail!("made twice")).unwrap(), made);
        assert_eq!(names_in(cache.path()).unwrap(), ["thing"]);
    }

    #[test]
    fn the_slower_of_two_programs_takes_what_the_faster_made() {
        let cache = tempfile::tempdir().unwrap();
        let slow = cached(cache.path(), "thing", |_, slow| {
            fs::write(slow.join("slow"), "")?;
            cached(cache.path(), "thing", |_, tree| Ok(fs::write(tree.join("fast"), "")?))?;
            Ok(())
        });
        assert_eq!(names_in(&slow.unwrap()).unwrap(), ["fast"]);
    }

    #[test]
    fn a_package_name_is_no_option_and_no_path() {
        for name in ["-y", "../bash", "bash;reboot", ""] {
            assert!(packages(&[name]).unwrap_err().to_string().contains("is no package name"), "{name}");
        }
    }
}
