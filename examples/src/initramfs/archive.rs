//! An archive as a file system in memory: paths that lead through symbolic links end where they would in the guest,
//! so that a package with `/bin/ls` fits on to a system whose `/bin` is a link.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};

/// The most symbolic links that a path may lead through, as in the kernel.
const MOST_LINKS: u32 = 40;

/// The longest path, in bytes: PATH_MAX with its zero byte.
const LONGEST_PATH: usize = 4095;

/// The largest file, in bytes: what readers of the format agree upon.
const LARGEST_FILE: usize = i32::MAX as usize;

/// Permission bits, those for set-user-ID, set-group-ID and sticky included.
const PERMISSIONS: u32 = 0o7777;

/// A file system to be unpacked by the guest's kernel. All of it belongs to root.
#[derive(Debug, Clone, Default)]
pub struct Archive {
    // Sorted, so that a directory comes before what it holds.
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug, Clone)]
enum Node {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Symlink { target: String },
    Device { mode: u32, major: u32, minor: u32 },
    Fifo { mode: u32 },
}

impl Archive {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory; one that is there gets `mode`, its permission bits.
    ///
    /// # Errors
    /// Fails, as all of these do, on a path that cannot be in an archive: a relative one with `..`, one that is too
    /// long, one through something that is no directory.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.add(path, Node::Directory { mode })
    }

    /// Adds a file, or replaces what is there.
    ///
    /// # Errors
    /// See [`directory`](Self::directory); also fails on content of 2 GiB and more.
    pub fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) -> Result<()> {
        let length = content.len();
        ensure!(length <= LARGEST_FILE, "{path} has {length} bytes, allowed are {LARGEST_FILE}");
        self.add(path, Node::File { mode, content })
    }

    /// Adds a symbolic link to `target`, or replaces what is there.
    ///
    /// # Errors
    /// See [`directory`](Self::directory).
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        ensure!(
            (1..=LONGEST_PATH).contains(&target.len()) && !target.contains('\0'),
            "{path} cannot be a link to {target:?}"
        );
        self.add(path, Node::Symlink { target: target.to_owned() })
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// See [`directory`](Self::directory).
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.add(path, Node::Device { mode, major, minor })
    }

    /// Adds a named pipe.
    ///
    /// # Errors
    /// See [`directory`](Self::directory).
    pub fn fifo(&mut self, path: &str, mode: u32) -> Result<()> {
        self.add(path, Node::Fifo { mode })
    }

    /// Adds what the directory `tree` of this machine holds. A second name of one file becomes a symbolic link to
    /// the first; sockets, pipes and devices are refused.
    ///
    /// # Errors
    /// See [`directory`](Self::directory); names what cannot be read.
    pub fn tree(&mut self, tree: &Path) -> Result<()> {
        let mut first_names = BTreeMap::new();
        self.subtree(tree, "", &mut first_names)
    }

    fn subtree(
        &mut self,
        directory: &Path,
        inside: &str,
        first_names: &mut BTreeMap<(u64, u64), String>,
    ) -> Result<()> {
        let failed = || format!("reading {}", directory.display());
        let mut entries =
            fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>).with_context(failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let host = entry.path();
            let failed = || format!("reading {}", host.display());
            let name = entry.file_name();
            let name = name.to_str().with_context(|| format!("{} is not UTF-8", host.display()))?;
            let path = if inside.is_empty() { name.to_owned() } else { format!("{inside}/{name}") };
            let metadata = entry.metadata().with_context(failed)?;
            let mode = metadata.permissions().mode() & PERMISSIONS;
            if metadata.is_dir() {
                // A directory of a package is often a link in the system it is for.
                if !self.contains(&path)? {
                    self.directory(&path, mode)?;
                }
                self.subtree(&host, &path, first_names)?;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&host).with_context(failed)?;
                let target = target.to_str();
                self.symlink(&path, target.with_context(|| format!("{} is not UTF-8", host.display()))?)?;
            } else if metadata.is_file() {
                let identity = (metadata.dev(), metadata.ino());
                match first_names.get(&identity).filter(|_| metadata.nlink() > 1).cloned() {
                    Some(first) => self.symlink(&path, &format!("/{first}"))?,
                    None => {
                        self.file(&path, mode, fs::read(&host).with_context(failed)?)?;
                        first_names.insert(identity, path);
                    }
                }
            } else {
                bail!("{} is neither a file nor a directory nor a link", host.display());
            }
        }
        Ok(())
    }

    /// Whether something is at `path`, a link that leads nowhere included.
    ///
    /// # Errors
    /// See [`directory`](Self::directory).
    pub fn contains(&self, path: &str) -> Result<bool> {
        Ok(self.nodes.contains_key(&self.place(path)?))
    }

    /// The archive's bytes, a multiple of four of them: another archive may follow.
    ///
    /// # Errors
    /// Fails if there are more entries than the format can number.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            // Numbers tell hard links apart, of which there are none.
            let entry = Builder::new(path).ino(u32::try_from(index + 1)?);
            let (entry, content) = match node {
                Node::Directory { mode } => {
                    (entry.nlink(2).mode(*mode).set_mode_file_type(ModeFileType::Directory), &[][..])
                }
                Node::File { mode, content } => {
                    (entry.mode(*mode).set_mode_file_type(ModeFileType::Regular), &content[..])
                }
                Node::Symlink { target } => {
                    (entry.mode(0o777).set_mode_file_type(ModeFileType::Symlink), target.as_bytes())
                }
                Node::Device { mode, major, minor } => {
                    let entry = entry.rdev_major(*major).rdev_minor(*minor);
                    (entry.mode(*mode).set_mode_file_type(ModeFileType::Char), &[][..])
                }
                Node::Fifo { mode } => (entry.mode(*mode).set_mode_file_type(ModeFileType::Fifo), &[][..]),
            };
            let mut writer = entry.write(&mut bytes, u32::try_from(content.len())?);
            writer.write_all(content)?;
            writer.finish()?;
        }
        trailer(&mut bytes)?;
        Ok(bytes)
    }

    fn add(&mut self, path: &str, node: Node) -> Result<()> {
        let place = self.place(path)?;
        let mut parent = String::new();
        for part in place.split('/').take(place.matches('/').count()) {
            parent = joined(&parent, part);
            match self.nodes.get(&parent) {
                Some(Node::Directory { .. }) => {}
                Some(_) => bail!("{path} cannot be added: {parent} is no directory"),
                None => drop(self.nodes.insert(parent.clone(), Node::Directory { mode: 0o755 })),
            }
        }
        let is_directory = matches!(node, Node::Directory { .. });
        let below = format!("{place}/");
        let has_content =
            self.nodes.range(below.clone()..).next().is_some_and(|(name, _)| name.starts_with(&below));
        ensure!(is_directory || !has_content, "{path} cannot replace a directory that is not empty");
        self.nodes.insert(place, node);
        Ok(())
    }

    /// Where `path` is: without a leading slash, its directories followed through links, its last part not.
    fn place(&self, path: &str) -> Result<String> {
        ensure!(path.len() <= LONGEST_PATH, "a path of {} bytes, allowed are {LONGEST_PATH}", path.len());
        ensure!(!path.contains('\0'), "{path:?} has a zero byte");
        let mut links = 0;
        // Parts that are still to be gone through, the next one last.
        let mut parts: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let mut place = String::new();
        while let Some(part) = parts.pop() {
            match &*part {
                "" | "." => continue,
                ".." => {
                    place.truncate(place.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let here = joined(&place, &part);
            match self.nodes.get(&here) {
                Some(Node::Symlink { target }) if !parts.is_empty() => {
                    links += 1;
                    ensure!(links <= MOST_LINKS, "{path} leads through more than {MOST_LINKS} links");
                    if target.starts_with('/') {
                        place.clear();
                    }
                    parts.extend(target.rsplit('/').map(str::to_owned));
                }
                _ => place = here,
            }
            ensure!(place.len() <= LONGEST_PATH, "{path} leads to a path of more than {LONGEST_PATH} bytes");
        }
        ensure!(!place.is_empty(), "{path:?} is no path in an archive");
        Ok(place)
    }
}

fn joined(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Name, mode, content and device of an entry.
    type Entry = (String, u32, Vec<u8>, (u32, u32));

    /// Every entry, as another reader sees it.
    fn read_back(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(bytes).unwrap();
            let entry = reader.entry().clone();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            if entry.is_trailer() {
                assert_eq!(reader.finish().unwrap(), b"");
                return entries;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let device = (entry.rdev_major(), entry.rdev_minor());
            entries.push((entry.name().to_owned(), entry.mode(), content, device));
            bytes = reader.finish().unwrap();
        }
    }

    #[test]
    fn another_reader_finds_everything_in_order() {
        let mut archive = Archive::new();
        archive.file("/init", 0o755, b"#!/bin/sh\n".to_vec()).unwrap();
        archive.file("usr/share/odd", 0o4640, b"12345".to_vec()).unwrap();
        archive.symlink("bin", "usr/bin").unwrap();
        archive.device("dev/console", 0o600, 5, 1).unwrap();
        archive.fifo("pipe", 0o600).unwrap();
        let bytes = archive.to_bytes().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let entry = |name: &str, mode, content: &[u8], device| -> Entry {
            (name.to_owned(), mode, content.to_vec(), device)
        };
        let expected = [
            entry("bin", 0o120777, b"usr/bin", (0, 0)),
            entry("dev", 0o040755, b"", (0, 0)),
            entry("dev/console", 0o020600, b"", (5, 1)),
            entry("init", 0o100755, b"#!/bin/sh\n", (0, 0)),
            entry("pipe", 0o010600, b"", (0, 0)),
            entry("usr", 0o040755, b"", (0, 0)),
            entry("usr/share", 0o040755, b"", (0, 0)),
            entry("usr/share/odd", 0o104640, b"12345", (0, 0)),
        ];
        assert_eq!(read_back(&bytes), expected);
    }

    #[test]
    fn paths_end_where_links_lead() {
        let mut archive = Archive::new();
        archive.symlink("bin", "usr/bin").unwrap();
        archive.symlink("sbin", "/usr/sbin/").unwrap();
        archive.symlink("usr/sbin", "bin").unwrap();
        for path in ["bin/sh", "sbin/init", "./etc/../bin/x"] {
            archive.file(path, 0o755, Vec::new()).unwrap();
        }
        let names: Vec<String> =
            read_back(&archive.to_bytes().unwrap()).into_iter().map(|entry| entry.0).collect();
        assert_eq!(
            names,
            ["bin", "sbin", "usr", "usr/bin", "usr/bin/init", "usr/bin/sh", "usr/bin/x", "usr/sbin"]
        );
    }

    #[test]
    fn what_cannot_be_in_an_archive_is_refused() {
        let mut archive = Archive::new();
        archive.symlink("a", "b").unwrap();
        archive.symlink("b", "a").unwrap();
        archive.file("file", 0o644, Vec::new()).unwrap();
        archive.file("full/file", 0o644, Vec::new()).unwrap();
        for path in ["", "/", "..", "zero\0byte", "a/x", "file/x", "full", &"x".repeat(LONGEST_PATH + 1)] {
            assert!(archive.file(path, 0o644, Vec::new()).is_err(), "{path:?}");
        }
        assert!(archive.symlink("empty", "").is_err());
    }

    #[test]
    fn a_tree_of_this_machine_is_taken_over() {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir_all(host.path().join("bin")).unwrap();
        fs::write(host.path().join("bin/perl"), "perl").unwrap();
        fs::hard_link(host.path().join("bin/perl"), host.path().join("bin/perl5")).unwrap();
        std::os::unix::fs::symlink("perl", host.path().join("bin/pl")).unwrap();
        let mut archive = Archive::new();
        archive.symlink("bin", "usr/bin").unwrap();
        archive.tree(host.path()).unwrap();
        let entries = read_back(&archive.to_bytes().unwrap());
        let entries: Vec<(&str, &[u8])> = entries.iter().map(|entry| (&*entry.0, &*entry.2)).collect();
        assert_eq!(
            entries,
            [
                ("bin", &b"usr/bin"[..]),
                ("usr", b""),
                ("usr/bin", b""),
                ("usr/bin/perl", b"perl"),
                ("usr/bin/perl5", b"/bin/perl"),
                ("usr/bin/pl", b"perl"),
            ]
        );
    }
}
