//! The guest's first file system: an archive in the kernel's `newc` format (Documentation/driver-api/early-userspace
//! of the kernel), made in memory, uncompressed, because the guest would have to decompress it, and always the same
//! bytes for the same content.
//!
//! [`userspace`] makes the one that the examples run: busybox, an init, kernel modules and, over these, Debian
//! packages. What differs from one run to the next is in a second, small archive that follows it:
//! [`guest_command`](crate::guest_command) makes that.

mod archive;

pub use archive::Archive;

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::debian::Module;

/// The guest's first process.
const INIT: &str = include_str!("init.sh");

/// What init mounts, all of it with one program.
const FSTAB: &str = "devtmpfs /dev devtmpfs mode=0755,nosuid 0 0\nproc /proc proc nosuid,noexec,nodev 0 0\n\
                     sysfs /sys sysfs nosuid,noexec,nodev 0 0\n";

/// Major number of the memory devices, and of the console.
const MEMORY: u32 = 1;
const CONSOLE: u32 = 5;

/// What the userspace of a guest is made of.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Userspace<'a> {
    busybox: &'a Path,
    release: &'a str,
    modules: &'a [Module],
    packages: Option<&'a Path>,
    files: &'a [AddedFile],
}

/// A file of this machine that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedFile {
    /// Where it is here.
    pub host: PathBuf,
    /// Where it is in the guest.
    pub guest: String,
}

impl FromStr for AddedFile {
    type Err = anyhow::Error;

    /// `FILE:PATH`, or just `FILE`, which goes to `/root` under its own name.
    fn from_str(text: &str) -> Result<Self> {
        let (host, guest) = match text.rsplit_once(':') {
            Some((host, guest)) => (host, guest.to_owned()),
            None => {
                let name = Path::new(text).file_name().and_then(OsStr::to_str);
                (text, format!("/root/{}", name.with_context(|| format!("{text:?} names no file"))?))
            }
        };
        ensure!(
            !host.is_empty() && guest.starts_with('/'),
            "{text:?} is not FILE[:PATH] with an absolute PATH"
        );
        Ok(Self { host: host.into(), guest })
    }
}

impl<'a> Userspace<'a> {
    /// One that has `busybox` only, a static program for x86-64 that also this machine can run.
    #[must_use]
    pub fn new(busybox: &'a Path) -> Self {
        Self { busybox, release: "", modules: &[], packages: None, files: &[] }
    }

    /// Adds modules of the kernel `release`, in an order in which they load, for `modprobe` in the guest.
    #[must_use]
    pub fn modules(self, release: &'a str, modules: &'a [Module]) -> Self {
        Self { release, modules, ..self }
    }

    /// Adds unpacked packages. Their programs go before busybox's of the same name.
    #[must_use]
    pub fn packages(self, tree: &'a Path) -> Self {
        Self { packages: Some(tree), ..self }
    }

    /// Adds files, over everything else.
    #[must_use]
    pub fn files(self, files: &'a [AddedFile]) -> Self {
        Self { files, ..self }
    }
}

/// The archive with `userspace` and an init, which wants a second archive from
/// [`guest_command`](crate::guest_command).
///
/// # Errors
/// Names a file that cannot be read or does not fit into an archive.
pub fn userspace(userspace: &Userspace<'_>) -> Result<Archive> {
    let mut archive = Archive::new();
    // Debian's layout since version 12.
    for name in ["bin", "sbin", "lib", "lib64"] {
        archive.directory(&format!("usr/{name}"), 0o755)?;
        archive.symlink(name, &format!("usr/{name}"))?;
    }
    for name in ["dev", "proc", "sys", "run", "var", "vmm"] {
        archive.directory(name, 0o755)?;
    }
    archive.directory("root", 0o700)?;
    archive.directory("tmp", 0o1777)?;
    // The kernel opens the console for init before init has mounted anything.
    archive.device("dev/console", 0o600, CONSOLE, 1)?;
    archive.device("dev/null", 0o666, MEMORY, 3)?;
    if let Some(tree) = userspace.packages {
        archive.tree(tree).with_context(|| format!("adding {}", tree.display()))?;
    }
    archive.file("init", 0o755, INIT.as_bytes().to_vec())?;
    archive.file("etc/fstab", 0o644, FSTAB.as_bytes().to_vec())?;
    add_if_absent(&mut archive, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")?;
    add_if_absent(&mut archive, "etc/group", "root:x:0:\n")?;
    add_shell(&mut archive)?;
    add_busybox(&mut archive, userspace.busybox)?;
    if !userspace.modules.is_empty() {
        add_modules(&mut archive, userspace.release, userspace.modules)?;
    }
    for AddedFile { host, guest } in userspace.files {
        let failed = || format!("reading {}", host.display());
        let mode = std::fs::metadata(host).with_context(failed)?.permissions().mode() & 0o777;
        archive.file(guest, mode, std::fs::read(host).with_context(failed)?)?;
    }
    Ok(archive)
}

fn add_if_absent(archive: &mut Archive, path: &str, content: &str) -> Result<()> {
    if archive.contains(path)? { Ok(()) } else { archive.file(path, 0o644, content.as_bytes().to_vec()) }
}

/// Makes a shell among the packages the system's, which an installation script would have done: busybox's shell runs
/// its own programs even where the packages have others of the same name.
fn add_shell(archive: &mut Archive) -> Result<()> {
    for shell in ["dash", "bash"] {
        if !archive.contains("bin/sh")? && archive.contains(&format!("bin/{shell}"))? {
            archive.symlink("bin/sh", shell)?;
        }
    }
    Ok(())
}

/// Adds busybox, and a link for each program it can be. Its list is asked of it here: the guest would make the links
/// in more time than the kernel needs to unpack them.
fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    const PROGRAM: &str = "usr/bin/busybox";
    let content = std::fs::read(busybox).with_context(|| format!("reading {}", busybox.display()))?;
    archive.file(PROGRAM, 0o755, content)?;
    let list = Command::new(busybox).arg("--list-full").output();
    let list = list.with_context(|| format!("running {}", busybox.display()))?;
    ensure!(list.status.success(), "{} --list-full ended with {}", busybox.display(), list.status);
    let list = String::from_utf8(list.stdout)
        .with_context(|| format!("reading what {} prints", busybox.display()))?;
    for path in list.lines().filter(|path| path.contains('/')) {
        if !archive.contains(path)? {
            archive.symlink(path, "/usr/bin/busybox")?;
        }
    }
    Ok(())
}

/// Adds modules and the indices that `modprobe` reads.
fn add_modules(archive: &mut Archive, release: &str, modules: &[Module]) -> Result<()> {
    let directory = format!("usr/lib/modules/{release}");
    let (mut depends, mut aliases) = (String::new(), String::new());
    for module in modules {
        archive.file(&format!("{directory}/{}", module.path), 0o644, module.content.clone())?;
        // What is needed comes in the order in which it is unloaded, as depmod writes it.
        let needed = needed_by(module, modules);
        let needed: String = needed.iter().rev().map(|needed| format!(" {}", needed.path)).collect();
        depends.push_str(&format!("{}:{needed}\n", module.path));
        for alias in &module.aliases {
            aliases.push_str(&format!("alias {alias} {}\n", module.name));
        }
    }
    archive.file(&format!("{directory}/modules.dep"), 0o644, depends.into_bytes())?;
    archive.file(&format!("{directory}/modules.alias"), 0o644, aliases.into_bytes())
}

/// All that `module` needs, directly or not, in the order of `modules`, in which it loads.
fn needed_by<'a>(module: &Module, modules: &'a [Module]) -> Vec<&'a Module> {
    let mut names: Vec<&str> = module.depends.iter().map(String::as_str).collect();
    let before = modules.iter().rev().skip_while(|other| other.name != module.name).skip(1);
    let mut needed = Vec::new();
    for other in before {
        if names.contains(&&*other.name) {
            names.extend(other.depends.iter().map(String::as_str));
            needed.push(other);
        }
    }
    needed.reverse();
    needed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str]) -> Module {
        Module {
            name: name.to_owned(),
            path: format!("kernel/{name}.ko"),
            content: name.as_bytes().to_vec(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            aliases: vec![format!("test:{name}*")],
        }
    }

    /// A stand-in for busybox that this machine can run.
    fn busybox(directory: &Path) -> std::path::PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = directory.join("busybox");
        let list = "#!/bin/sh\nprintf 'bin/sh\\nusr/bin/env\\nsbin/modprobe\\nbin/cat\\nlinuxrc\\n'\n";
        std::fs::write(&path, list).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_userspace_has_what_init_needs() {
        let directory = tempfile::tempdir().unwrap();
        let busybox = busybox(directory.path());
        let modules = [module("virtio", &[]), module("virtio_blk", &["virtio"])];
        let made = userspace(&Userspace::new(&busybox).modules("6.1.0-1", &modules)).unwrap();
        for path in [
            "init",
            "bin/busybox",
            "bin/sh",
            "bin/cat",
            "sbin/modprobe",
            "etc/fstab",
            "etc/passwd",
            "proc",
            "tmp",
        ] {
            assert!(made.contains(path).unwrap(), "no {path}");
        }
        assert!(made.contains("lib/modules/6.1.0-1/kernel/virtio_blk.ko").unwrap());
        assert!(!made.contains("linuxrc").unwrap());
        assert_eq!(made.to_bytes().unwrap(), made.to_bytes().unwrap());
    }

    #[test]
    fn programs_of_packages_go_before_those_of_busybox() {
        let directory = tempfile::tempdir().unwrap();
        let busybox = busybox(directory.path());
        let packages = directory.path().join("packages");
        std::fs::create_dir_all(packages.join("bin")).unwrap();
        std::fs::write(packages.join("bin/cat"), "a cat of its own").unwrap();
        std::fs::write(packages.join("bin/bash"), "a shell of its own").unwrap();
        let made = userspace(&Userspace::new(&busybox).packages(&packages)).unwrap().to_bytes().unwrap();
        let text = String::from_utf8_lossy(&made);
        assert!(text.contains("usr/bin/cat\0") && text.contains("a cat of its own"), "{text}");
        let link = text.split_once("usr/bin/sh\0").unwrap().1.trim_start_matches('\0');
        assert!(link.starts_with("bash"), "{link}");
    }

    #[test]
    fn needed_modules_are_found_through_others_and_in_order() {
        let modules = [
            module("virtio", &[]),
            module("failover", &[]),
            module("net_failover", &["failover"]),
            module("virtio_net", &["net_failover", "virtio"]),
        ];
        let needed: Vec<&str> = needed_by(&modules[3], &modules).iter().map(|module| &*module.name).collect();
        assert_eq!(needed, ["virtio", "failover", "net_failover"]);
        assert_eq!(needed_by(&modules[0], &modules), Vec::<&Module>::new());
    }
}
