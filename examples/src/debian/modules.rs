//! A kernel package's modules. Which ones a module needs is written in the module itself, which is read here: the
//! index that `modprobe` uses is made when a kernel is installed, and none is here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use lzma_rust2::XzReader;
use object::{Object as _, ObjectSection as _};

/// The modules that a guest of these programs has a device for.
pub const MODULES: [&str; 14] = [
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtiofs",
    "vsock",
    "vmw_vsock_virtio_transport",
    "overlay",
    "uio_pci_generic",
];

/// The largest module that is read, in bytes; Debian's largest has about 5 MB.
const LARGEST: u64 = 64 << 20;

/// A module, decompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Its path in the kernel's module directory, with the name of a module that is not compressed.
    pub path: String,
    /// The ELF file, with its signature.
    pub content: Vec<u8>,
    /// Names of the modules that it needs directly.
    pub depends: Vec<String>,
    /// Patterns of the devices and services that it is for.
    pub aliases: Vec<String>,
}

/// The modules of one kernel: those in files and those that are part of it.
#[derive(Debug)]
pub struct ModuleTree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl ModuleTree {
    /// Finds the modules in `root`, the directory `lib/modules/RELEASE`.
    ///
    /// # Errors
    /// Fails if the directory cannot be read.
    pub fn open(root: &Path) -> Result<Self> {
        let mut tree = Self { root: root.to_owned(), files: BTreeMap::new(), built_in: BTreeSet::new() };
        let list = root.join("modules.builtin");
        let list = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        tree.built_in.extend(list.lines().filter_map(|line| module_name(Path::new(line))));

        let mut directories = vec![root.join("kernel")];
        while let Some(directory) = directories.pop() {
            let entries = fs::read_dir(&directory);
            for entry in entries.with_context(|| format!("reading {}", directory.display()))? {
                let entry = entry?;
                // A link is neither, so that the walk ends.
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    directories.push(entry.path());
                } else if kind.is_file()
                    && let Some(name) = module_name(&entry.path())
                {
                    tree.files.insert(name, entry.path());
                }
            }
        }
        Ok(tree)
    }

    /// `wanted` and what they need, in an order in which they load. What is part of the kernel is left out.
    ///
    /// # Errors
    /// Names a module that the kernel does not have, and one that cannot be read.
    pub fn select(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut selected = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), &mut seen, &mut selected)?;
        }
        Ok(selected)
    }

    /// Adds `name` after what it needs. Each is visited once, whatever the modules say of each other.
    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, selected: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name);
        let path =
            path.with_context(|| format!("the kernel in {} has no module {name}", self.root.display()))?;
        let module = self.read(name, path).with_context(|| format!("module {}", path.display()))?;
        for needed in &module.depends {
            self.visit(needed, seen, selected)?;
        }
        selected.push(module);
        Ok(())
    }

    fn read(&self, name: &str, path: &Path) -> Result<Module> {
        let mut file = File::open(path)?.take(LARGEST + 1);
        let mut content = Vec::new();
        let relative = path.strip_prefix(&self.root)?.to_str().context("the name is not UTF-8")?;
        let plain = match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => {
                file.read_to_end(&mut content)?;
                relative
            }
            Some("xz") => {
                XzReader::new(file, false).take(LARGEST + 1).read_to_end(&mut content)?;
                relative.trim_end_matches(".xz")
            }
            _ => bail!("it is compressed in a way that is not known: only .ko and .ko.xz are"),
        };
        ensure!(content.len() as u64 <= LARGEST, "it has more than {LARGEST} bytes");
        let info = Info::parse(&content)?;
        Ok(Module {
            name: name.to_owned(),
            path: plain.to_owned(),
            content,
            depends: info.depends,
            aliases: info.aliases,
        })
    }
}

/// What a module says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    depends: Vec<String>,
    aliases: Vec<String>,
}

impl Info {
    fn parse(elf: &[u8]) -> Result<Self> {
        let file = object::File::parse(elf)?;
        let section = file.section_by_name(".modinfo").context("it has no section .modinfo")?;
        let mut info = Self::default();
        for item in section.data()?.split(|byte| *byte == 0) {
            match std::str::from_utf8(item).ok().and_then(|item| item.split_once('=')) {
                Some(("depends", names)) => {
                    let names = names.split(',').filter(|name| !name.is_empty());
                    info.depends.extend(names.map(|name| name.replace('-', "_")));
                }
                Some(("alias", pattern)) => info.aliases.push(pattern.to_owned()),
                _ => {}
            }
        }
        Ok(info)
    }
}

/// The name of a module, from the path of its file.
fn module_name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    // The kernel and its tools take both for the same.
    Some(name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF object with one section beside the one of section names.
    fn elf_with_section(name: &str, content: &[u8]) -> Vec<u8> {
        const HEADER: u64 = 64;
        let names = format!("\0{name}\0.shstrtab\0");
        let (content_at, names_at) = (HEADER, HEADER + content.len() as u64);
        let sections_at = (names_at + names.len() as u64).next_multiple_of(8);
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([1, 0, 62, 0, 1, 0, 0, 0]);
        for value in [0, 0, sections_at] {
            elf.extend(value.to_le_bytes());
        }
        elf.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
        elf.extend(content);
        elf.extend(names.as_bytes());
        elf.resize(usize::try_from(sections_at).unwrap(), 0);
        let strings = name.len() as u64 + 2;
        for (name, kind, at, size) in [
            (0, 0, 0, 0),
            (1, 1, content_at, content.len() as u64),
            (strings, 3, names_at, names.len() as u64),
        ] {
            for value in [name | kind << 32, 0, 0, at, size, 0, 1, 0_u64] {
                elf.extend(value.to_le_bytes());
            }
        }
        elf
    }

    /// `lib/modules/RELEASE` with the given modules, each with what it needs.
    fn tree(modules: &[(&str, &str)], built_in: &str) -> (tempfile::TempDir, ModuleTree) {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("modules.builtin"), built_in).unwrap();
        for (path, depends) in modules {
            let path = root.path().join("kernel").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let info = format!("license=GPL\0alias=test:{}\0depends={depends}\0name=x\0", path.display());
            fs::write(path, elf_with_section(".modinfo", info.as_bytes())).unwrap();
        }
        let tree = ModuleTree::open(root.path()).unwrap();
        (root, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| &*module.name).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let (_root, tree) = tree(
            &[
                ("drivers/virtio/virtio.ko", ""),
                ("drivers/virtio/virtio_ring.ko", "virtio"),
                ("drivers/net/virtio_net.ko", "virtio_ring,virtio,net-failover"),
                ("drivers/net/net_failover.ko", "failover"),
                ("net/core/failover.ko", ""),
                ("drivers/char/virtio-rng.ko", "virtio"),
                ("drivers/other.ko", ""),
            ],
            "",
        );
        let selected = tree.select(&["virtio_net", "virtio-rng", "virtio"]).unwrap();
        assert_eq!(
            names(&selected),
            ["virtio", "virtio_ring", "failover", "net_failover", "virtio_net", "virtio_rng"]
        );
        assert_eq!(selected[5].path, "kernel/drivers/char/virtio-rng.ko");
        assert_eq!(selected[0].aliases.len(), 1);
    }

    #[test]
    fn what_is_part_of_the_kernel_is_left_out() {
        let (_root, tree) = tree(
            &[("drivers/virtio_blk.ko", "virtio,virtio_ring")],
            "kernel/drivers/virtio/virtio.ko\nkernel/drivers/virtio/virtio_ring.ko\n",
        );
        assert_eq!(names(&tree.select(&["virtio", "virtio_blk"]).unwrap()), ["virtio_blk"]);
    }

    #[test]
    fn a_module_that_is_absent_is_named() {
        let (_root, tree) = tree(&[("a.ko", "b")], "");
        let error = format!("{:#}", tree.select(&["a"]).unwrap_err());
        assert!(error.contains("has no module b"), "{error}");
    }

    #[test]
    fn modules_that_need_each_other_end() {
        let (_root, tree) = tree(&[("a.ko", "b"), ("b.ko", "a")], "");
        assert_eq!(names(&tree.select(&["a"]).unwrap()), ["b", "a"]);
    }

    #[test]
    fn a_damaged_module_is_named() {
        let (root, tree) = tree(&[("a.ko", "")], "");
        for content in [&b"no ELF"[..], &elf_with_section(".other", b"depends=\0")] {
            fs::write(root.path().join("kernel/a.ko"), content).unwrap();
            let error = format!("{:#}", tree.select(&["a"]).unwrap_err());
            assert!(error.contains("a.ko"), "{error}");
        }
    }
}
