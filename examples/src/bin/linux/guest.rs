//! What the machine is started with: a kernel, what it begins from, and what it is told.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use vmm_cpu::entry::{EntryState, entry_state};
use vmm_examples::debian::{self, MODULES, ModuleTree};
use vmm_examples::guest_command::{GuestRun, Hardware, Session};
use vmm_examples::initramfs::{Userspace, userspace};
use vmm_memory::GuestRam;
use vmm_memory::boot::{Boot, BootProtocol, KernelImage};
use vmm_memory::vm_memory::GuestAddress;

use crate::options::Options;

/// What the machine is started with.
pub(crate) struct Guest {
    kernel: PathBuf,
    pub(crate) image: Vec<u8>,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) command_line: String,
}

impl Guest {
    /// For a machine with that `hardware`, whose time-stamp counter has that rate: the kernel is told, so that it need not
    /// measure it.
    pub(crate) fn get(
        options: &Options,
        session: &Session,
        hardware: Hardware<'_>,
        tsc_khz: u32,
    ) -> Result<Self> {
        let debian = if options.kernel.is_none() { Some(debian::kernel(options.series)?) } else { None };
        let kernel = match (&options.kernel, &debian) {
            (Some(path), _) => path.clone(),
            (None, Some(debian)) => debian.image.clone(),
            (None, None) => bail!("no kernel"),
        };
        let image = read(&kernel)?;
        let is_linux = KernelImage::parse(&image)
            .with_context(|| format!("kernel {}", kernel.display()))?
            .setup_header()
            .is_some();
        if !is_linux {
            ensure!(options.command.is_none(), "--command needs a Linux kernel (a bzImage)");
            let initrd = options.initrd.as_deref().map(read).transpose()?;
            return Ok(Self { kernel, image, initrd, command_line: options.append.clone() });
        }
        let append = format!("tsc_early_khz={tsc_khz} {}", options.append);
        if let Some(initrd) = &options.initrd {
            let command_line = format!("{} panic=-1 {append}", hardware.wiring.parameters());
            return Ok(Self { kernel, image, initrd: Some(read(initrd)?), command_line });
        }
        let modules = match &debian {
            Some(debian) => ModuleTree::open(&debian.modules)?.select(&MODULES)?,
            None => Vec::new(),
        };
        let busybox = debian::busybox()?;
        let mut tree = Userspace::new(&busybox).files(&options.add);
        if let Some(debian) = &debian {
            tree = tree.modules(&debian.release, &modules);
        }
        let names: Vec<&str> = options.packages.iter().map(String::as_str).collect();
        let packages = if names.is_empty() { None } else { Some(debian::packages(&names)?) };
        if let Some(packages) = &packages {
            tree = tree.packages(packages);
        }
        // Some are part of one kernel and not of another.
        let is_there = |name: &&str| modules.iter().any(|module| module.name == *name);
        let load: Vec<&str> = hardware.modules.iter().copied().filter(is_there).collect();
        let hardware = Hardware { modules: &load, ..hardware };
        let run = GuestRun::new(kernel.clone(), &userspace(&tree)?, session, hardware, &append)?;
        Ok(Self { kernel, image, initrd: Some(run.initrd), command_line: run.command_line })
    }

    /// Loads it to RAM that has the machine's tables, whose root pointer is at `rsdp`; how the first vCPU begins.
    pub(crate) fn load(&self, ram: &GuestRam, rsdp: GuestAddress) -> Result<EntryState> {
        let kernel = KernelImage::parse(&self.image).with_context(|| self.name())?;
        let mut boot = Boot::new(&kernel).command_line(self.command_line.trim());
        if let Some(initrd) = &self.initrd {
            boot = boot.initrd(initrd);
        }
        if kernel.setup_header().is_some() {
            // The payload's own PVH entry: the guest need not decompress itself. Other kernels find the tables where a BIOS
            // leaves them.
            boot = boot.protocol(BootProtocol::Pvh).rsdp(rsdp);
        }
        Ok(entry_state(&boot.load(&*ram.memory()).with_context(|| self.name())?)?)
    }

    pub(crate) fn name(&self) -> String {
        format!("kernel {}", self.kernel.display())
    }
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}
