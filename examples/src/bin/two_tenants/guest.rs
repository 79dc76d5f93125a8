//! What all of the guests are started with.

use anyhow::{Context as _, Result};
use vmm_examples::debian::{self, Module, ModuleTree, Series};
use vmm_examples::guest_command::{GuestRun, Hardware, Session};
use vmm_examples::initramfs::{AddedFile, Archive, Userspace, userspace};

use crate::machine::WIRING;

/// The program in the guest, which the build made.
const PROGRAM: &str = env!("TENANT_GUEST");

/// Modules that some of them want, with what these need.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_net", "vmw_vsock_virtio_transport"];

/// Debian's kernel, and a userspace with the program.
pub(crate) struct Image {
    pub(crate) kernel: Vec<u8>,
    path: std::path::PathBuf,
    userspace: Archive,
    modules: Vec<Module>,
}

impl Image {
    pub(crate) fn get() -> Result<Self> {
        let debian = debian::kernel(Series::default())?;
        let modules = ModuleTree::open(&debian.modules)?.select(&MODULES)?;
        let files = [AddedFile { host: PROGRAM.into(), guest: "/bin/tenant".to_owned() }];
        let busybox = debian::busybox()?;
        let tree = Userspace::new(&busybox).files(&files).modules(&debian.release, &modules);
        let userspace = userspace(&tree)?;
        let kernel = std::fs::read(&debian.image).with_context(|| debian.image.display().to_string())?;
        Ok(Self { kernel, path: debian.image, userspace, modules })
    }

    /// For a guest that does `setup` before it listens.
    pub(crate) fn run(&self, setup: &str) -> Result<GuestRun> {
        // Some are part of the kernel.
        let is_there = |name: &&str| self.modules.iter().any(|module| module.name == *name);
        let load: Vec<&str> = MODULES.into_iter().filter(is_there).collect();
        let hardware = Hardware { modules: &load, ..WIRING.into() };
        let session = Session::Command { line: format!("{setup} exec tenant"), input: None };
        GuestRun::new(self.path.clone(), &self.userspace, &session, hardware, "")
    }
}
