//! The guests: one kernel, one initial RAM disk, one disk and one tap device, on either monitor.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use vmm_examples::debian::{self, Kernel, ModuleTree, Series};
use vmm_examples::guest_command::Wiring;
use vmm_examples::initramfs::Archive;
use vmm_examples::race::{QEMU, Report, Runner, host_tsc_khz, install_qemu};
use vmm_examples::trial;

/// The program that works in the guest.
pub(crate) const WORKLOAD: &str = env!("WORKLOAD_GUEST");

/// Bytes of the disk.
const DISK: u64 = 256 << 20;

/// Who serves the guest's connections.
pub(crate) const SERVER: &str = "10.0.2.1:7000";

/// Time that a guest may take to its init, and in which something must come of each row.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const ROW_LIMIT: Duration = Duration::from_secs(90);

/// The guest's first process. The kernel puts what it does not know of its command line into the environment.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t proc proc /proc
for module in $(busybox cat /modules/order); do busybox insmod /modules/$module; done
until [ -b /dev/vda ]; do busybox sleep 0.1; done
busybox ip link set eth0 up
busybox ip addr add 10.0.2.2/24 dev eth0
until busybox ping -c 1 -W 1 10.0.2.1 >/dev/null 2>&1; do busybox sleep 0.1; done
echo 'race: init'
workload clock
export disk=/dev/vda
IFS=,
for row in $rows; do
    workload time $row || echo \"failed $row\"
done
workload clock
echo 'race: end of work'
busybox poweroff -f
";

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    Ours,
    Qemu,
}

/// What guests are made of.
#[derive(Debug)]
pub(crate) struct IoGuests {
    kernel: Kernel,
    linux: PathBuf,
    initrd: PathBuf,
    disk: PathBuf,
    /// Where these are.
    _directory: TempDir,
}

impl IoGuests {
    /// Gets what is absent: Debian's kernel and busybox, and QEMU.
    ///
    /// # Errors
    /// Fails if one of them cannot be had.
    pub(crate) fn get() -> Result<Self> {
        let kernel = debian::kernel(Series::V6_1)?;
        let busybox = debian::busybox()?;
        install_qemu()?;
        let directory = tempfile::tempdir()?;
        let initrd = directory.path().join("initrd");
        std::fs::write(&initrd, archive(&kernel, std::fs::read(&busybox)?)?)?;
        let disk = directory.path().join("disk");
        // Written, so that no reads of holes are measured.
        let mut file = File::create(&disk)?;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0xa5), DISK), &mut file)?;
        file.sync_all()?;
        Ok(Self { kernel, linux: trial::linux()?, initrd, disk, _directory: directory })
    }

    /// Boots one, and has it work on `rows`.
    ///
    /// # Errors
    /// Fails if it does not come to its init.
    pub(crate) fn work(&self, monitor: Monitor, rows: &[&str]) -> Result<Report> {
        let append = format!("quiet tsc=reliable server={SERVER} rows={}", rows.join(","));
        let command = match monitor {
            Monitor::Ours => self.ours(&append),
            Monitor::Qemu => self.qemu(&append),
        };
        let mut runner = Runner::start(command, BOOT_LIMIT)?;
        runner.until("race: init")?;
        let report = Report::of(&mut runner, rows, ROW_LIMIT);
        if let Ok((guest, host)) = report.clocks() {
            ensure!((guest / host - 1.0).abs() < 0.1, "its clock says {guest:.3} s of {host:.3}");
        }
        Ok(report)
    }

    fn ours(&self, append: &str) -> Command {
        let mut command = Command::new(&self.linux);
        command.args([
            "--backend",
            "translate",
            "--transport",
            "pci",
            "--net",
            "tap=vmm0,mac=52:54:00:00:00:02",
        ]);
        command.arg("--disk").arg(&self.disk).arg("--kernel").arg(&self.kernel.image);
        command.arg("--initrd").arg(&self.initrd).args(["--append", append]).env_remove("RUST_LOG");
        command
    }

    fn qemu(&self, append: &str) -> Command {
        let rate = host_tsc_khz().map(|khz| format!(" tsc_early_khz={khz}")).unwrap_or_default();
        let append = format!("{} panic=-1 {append}{rate}", Wiring::SerialPorts.parameters());
        let drive = format!("if=none,id=disk,format=raw,file={}", self.disk.display());
        let mut command = Command::new(QEMU);
        command.args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "256",
            "-no-reboot",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-append", &append]);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(&self.initrd);
        command.args(["-object", "iothread,id=io", "-drive", &drive]);
        command.args(["-device", "virtio-blk-pci,drive=disk,iothread=io,disable-legacy=on"]);
        command.args(["-netdev", "tap,id=net,ifname=vmm0,script=no,downscript=no,vhost=off"]);
        command
            .args(["-device", "virtio-net-pci,netdev=net,mac=52:54:00:00:00:02,disable-legacy=on,romfile="]);
        command
    }
}

fn archive(kernel: &Kernel, busybox: Vec<u8>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "proc", "tmp", "modules"] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("bin/busybox", 0o755, busybox)?;
    archive.file("bin/workload", 0o755, std::fs::read(WORKLOAD).with_context(|| WORKLOAD)?)?;
    let modules = ModuleTree::open(&kernel.modules)?.select(&["virtio_pci", "virtio_blk", "virtio_net"])?;
    let mut order = String::new();
    for module in modules {
        let name = format!("{}.ko", module.name);
        order += &format!("{name}\n");
        archive.file(&format!("modules/{name}"), 0o644, module.content)?;
    }
    archive.file("modules/order", 0o644, order.into_bytes())?;
    archive.file("init", 0o755, INIT.as_bytes().to_vec())?;
    archive.to_bytes()
}
