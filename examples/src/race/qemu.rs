//! QEMU.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use vmm_cpu::{CpuModel, VmConfig, open_backend};

use crate::guest_command::Wiring;

/// QEMU's program; Debian's package of it is `qemu-system-x86`.
pub const QEMU: &str = "qemu-system-x86_64";

/// QEMU's version, `None` where there is none.
pub fn qemu_version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").stderr(Stdio::null()).output().ok()?;
    // "QEMU emulator version 7.2.22 (Debian ...)".
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.split_whitespace().nth(3).unwrap_or("of some version").to_owned())
}

/// Installs QEMU by apt if it is absent.
///
/// # Errors
/// Fails if that cannot be done.
pub fn install_qemu() -> Result<()> {
    if qemu_version().is_some() {
        return Ok(());
    }
    eprintln!("installing qemu-system-x86 (about 100 MB with what it needs)");
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()).status()
    };
    let installed = apt(&["-q", "update"])
        .and_then(|_| apt(&["-qy", "install", "--no-install-recommends", "qemu-system-x86"]));
    ensure!(
        installed.is_ok_and(|status| status.success()) && qemu_version().is_some(),
        "{QEMU} is absent and cannot be installed here; install Debian's package qemu-system-x86"
    );
    Ok(())
}

/// QEMU's translator on its smallest machine, with the RAM and the command line that `linux` gives a guest, and its console
/// on standard output. That machine does not end when the guest powers off.
pub fn microvm(kernel: &Path, initrd: &Path, append: &str) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-M", "microvm", "-accel", "tcg", "-m", "256", "-no-reboot", "-display", "none"]);
    command.args(["-monitor", "none", "-serial", "stdio", "-kernel"]).arg(kernel).arg("-initrd").arg(initrd);
    command.arg("-append").arg(format!("{} panic=-1 {append}", Wiring::SerialPorts.parameters()));
    command
}

/// The rate in kHz of this machine's time-stamp counter, which is that of TCG's guests, if there is a KVM that knows it.
///
/// A guest on TCG that has to measure it gets it wrong on a busy host, or never done.
pub fn host_tsc_khz() -> Option<u32> {
    let vm = open_backend("kvm").ok()?.create_vm(&VmConfig::new(CpuModel::Host)).ok()?;
    Some(vm.clock()?.tsc_khz()).filter(|khz| *khz != 0)
}
