//! What the command line says.

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};
use vmm_cpu::translate::{AddressWindow, TranslateHypervisor, TranslateOptions};
use vmm_cpu::{CpuModel, Hypervisor};
use vmm_examples::debian::Series;
use vmm_examples::debug::DebugOptions;
use vmm_examples::guest_command::{Screen, Session, Wiring};
use vmm_examples::initramfs::AddedFile;
use vmm_examples::ivshmem::SharedRegion;
use vmm_examples::metrics::Exporter;
use vmm_examples::pc::Output;
use vmm_examples::replay::RerunOptions;
use vmm_examples::terminal;
use vmm_examples::virtio::{
    Disk, NamedPort, Network, Place, Transport, VirtioConsole, VirtioDevices, VsockOptions,
};
use vmm_memory::{Backing, GuestRam};

use crate::audited::Audited;
use crate::memory::RamOptions;
use crate::snapshot::SnapshotOptions;

/// Boots Debian's stock kernel, or another, to a shell or through one command.
#[derive(Parser)]
pub(crate) struct Options {
    /// What runs the guest: kvm, translate, xen-pv, or auto, which takes hardware assistance where the processor has it.
    #[arg(long, default_value = "auto")]
    pub(crate) backend: String,
    /// What executes the guest of backend xen-pv: kvm, kvm-shim (with its fast path in the guest), translate, translate-shim, or
    /// auto.
    #[arg(long, default_value = "auto")]
    pub(crate) engine: String,
    /// Interprets all of the guest's instructions instead of translating those that are executed more than once or twice.
    #[arg(long)]
    pub(crate) interpret: bool,

    /// The processor that the guest sees: `host`, a level such as `x86-64-v2`, or one with features added or taken away, `x86-64-v3,-avx2`.
    #[arg(long, value_name = "MODEL", default_value = "host", conflicts_with = "restore_from")]
    pub(crate) cpu: CpuModel,
    /// Gives the guest the host's own time-stamp counter with backend translate: it can then be saved and go on on a KVM without
    /// virtualization hardware.
    #[arg(long, conflicts_with = "restore_from")]
    pub(crate) host_tsc: bool,

    /// What executes the guest's privileged code with backend kvm.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) privileged: Privileged,

    /// Which of the guest's programs access memory through the host's MMU with backend translate
    #[arg(long, value_enum, default_value_t)]
    pub(crate) address_window: Windows,
    /// KiB of memory for translated code that each vCPU has with backend translate, instead of 64 MiB.
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    pub(crate) code_memory: Option<u32>,
    /// Has the backend compute a digest of the registers at the start of each basic block, which --timings shows at the end.
    #[arg(long)]
    pub(crate) digest: bool,
    /// Kernel: bzImage, ELF with a PVH note (with backend xen-pv, Xen's notes), or multiboot image. Debian's cloud kernel
    /// if not given.
    #[arg(long)]
    pub(crate) kernel: Option<PathBuf>,
    /// Which of Debian's kernels to get.
    #[arg(long, value_enum, default_value_t, conflicts_with = "kernel")]
    pub(crate) series: Series,
    /// Initial RAM disk instead of the program's own; module of a multiboot kernel.
    #[arg(long, conflicts_with_all = ["command", "packages"])]
    pub(crate) initrd: Option<PathBuf>,
    /// Added to the kernel's command line; all of it for kernels other than Linux.
    #[arg(long, default_value = "")]
    pub(crate) append: String,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: u32,
    /// RAM in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    pub(crate) memory: u64,
    #[command(flatten)]
    pub(crate) ram: RamOptions,
    /// Runs this shell line in the guest and exits with its status.
    #[arg(long)]
    pub(crate) command: Option<String>,
    /// Gives the program's standard input to the command; without it the command has none.
    #[arg(long, requires = "command")]
    pub(crate) stdin: bool,
    /// Debian packages to add to the guest's userspace, with what they depend on.
    #[arg(long, value_delimiter = ',')]
    pub(crate) packages: Vec<String>,
    /// Adds a file of this machine to the guest's, at PATH or in /root. Repeatable.
    #[arg(long, value_name = "FILE[:PATH]", conflicts_with = "initrd")]
    pub(crate) add: Vec<AddedFile>,
    /// How the guest finds its virtio devices, of which an entropy device is always one. `mmio` where other options want
    /// devices.
    #[arg(long, value_enum)]
    pub(crate) transport: Option<Transport>,
    /// Gives the guest a disk: a file or block device, taken for the disk's bytes as they are. With `iops` it serves so many requests
    /// a second at most. Repeatable.
    #[arg(long, value_name = "FILE[,ro][,iops=N]")]
    pub(crate) disk: Vec<Disk>,
    /// Gives the guest a network device whose frames come out at the tap device NAME of this machine, which has to be there (`ip
    /// tuntap add dev NAME mode tap`), or go to the switch of the program `net_switch` at PATH. At the Unix socket of `cable` programs
    /// here say `down`, `up` and `announce`. Repeatable.
    #[arg(
        long,
        value_name = "tap=NAME[,queues=N]|switch=PATH[,network=NAME][,name=NAME][,reconnect=on][,mac=ADDRESS][,offloads=off][,cable=PATH]"
    )]
    pub(crate) net: Vec<Network>,
    /// Gives the guest a memory balloon, and has it fill that with so many MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) balloon: Option<u64>,
    /// Which console the shell has: `serial`, or `virtio`, where it is on /dev/hvc0 and sees the terminal's size change. The
    /// kernel's log is on the serial one; add `--append console=hvc0` to have it on both.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) console: ConsoleKind,
    /// Joins /dev/virtio-ports/NAME of the guest to a Unix socket, which programs here connect to, one at a time. Repeatable.
    #[arg(long, value_name = "NAME,PATH")]
    pub(crate) port: Vec<NamedPort>,
    /// Joins the guest to memory that it has in common with others, at the socket of an ivshmem server (`ivshmem_server`, or QEMU's), over
    /// PCI. `ro` maps it read-only, `unsealed` takes memory that the server could truncate, as QEMU's is, `keep` goes on when
    /// the server is gone, `direct` rings peers that are trusted without a thread between. Repeatable.
    #[arg(long, value_name = "path=SOCKET[,vectors=N][,ro][,unsealed][,keep][,direct]")]
    pub(crate) ivshmem: Vec<SharedRegion>,
    /// Gives the guest a socket device (AF_VSOCK) with context identifier CID. Programs here connect to its ports at PATH, by a line
    /// `CONNECT PORT`, and its programs to PATH_PORT. With a BROKER, which `vsock_switch` is, also to other guests.
    #[arg(long, value_name = "CID,PATH[,switch=BROKER]")]
    pub(crate) vsock: Option<VsockOptions>,
    /// Serves what virtio devices have done to Prometheus (`GET /metrics`) at HOST:PORT, at :PORT on the loopback interface, or
    /// at unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<String>,
    /// Writes an audit log in this directory: what the guest was started from, the channels that opened, drivers that broke the rules, how
    /// it ended. A process of its own has the log's keys; `vmm-audit verify DIR/log --key DIR/key.pub` checks it.
    #[arg(long, value_name = "DIR")]
    pub(crate) audit: Option<PathBuf>,
    /// Is the process that writes that log.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(crate) write_audit: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) snapshot: SnapshotOptions,
    /// Ends the run after that time, with status 124.
    #[arg(long)]
    pub(crate) seconds: Option<u64>,
    #[command(flatten)]
    pub(crate) rerun: RerunOptions,
    #[command(flatten)]
    pub(crate) debug: DebugOptions,
    /// When the program was wanted, in nanoseconds of CLOCK_MONOTONIC: times are counted from there, and not from where it begins.
    #[arg(long, value_name = "NANOSECONDS", value_parser = nanoseconds, hide = true)]
    pub(crate) wanted_at: Option<Duration>,
    /// Times, exits by kind, instructions and memory, on standard error at the end.
    #[arg(long)]
    pub(crate) timings: bool,
}

fn nanoseconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_nanos)
}

/// What executes privileged code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Privileged {
    /// KVM, or software where the processor has no hardware assistance and KVM would emulate it
    #[default]
    Auto,
    /// KVM
    Kvm,
    /// The translator of backend translate; KVM runs programs
    Software,
}

/// Which programs have an address window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Windows {
    /// None
    Never,
    /// Those that run long enough
    #[default]
    Adaptive,
    /// All
    Always,
}

/// Which console the shell has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConsoleKind {
    /// The first serial port of a PC.
    #[default]
    Serial,
    /// A virtio device.
    Virtio,
}

/// The virtio devices of a machine, and what the monitor keeps of them.
#[derive(Default)]
pub(crate) struct Virtio {
    pub(crate) devices: Option<VirtioDevices>,
    pub(crate) console: Option<VirtioConsole>,
    pub(crate) exporter: Option<Exporter>,
}

impl Options {
    /// The backend that needs nothing of the host, executing as the options say.
    pub(crate) fn translator(&self) -> Box<dyn Hypervisor> {
        let mut options = TranslateOptions::default().digest(self.digest);
        if self.interpret {
            options = options.translate_after(None);
        }
        if let Some(bytes) = self.code_memory.and_then(|kib| usize::try_from(kib).ok()?.checked_mul(1024)) {
            options = options.code_memory(bytes);
        }
        options = options.address_window(match self.address_window {
            Windows::Never => AddressWindow::Never,
            Windows::Adaptive => AddressWindow::Adaptive,
            Windows::Always => AddressWindow::Always,
        });
        Box::new(TranslateHypervisor::with_options(options))
    }

    /// KVM, executing as the options say.
    pub(crate) fn kvm(&self) -> Result<Box<dyn Hypervisor>> {
        let kvm = KvmHypervisor::open()?;
        let software = match self.privileged {
            Privileged::Auto => kvm.capabilities().hardware_assisted == Some(false),
            Privileged::Kvm => false,
            Privileged::Software => true,
        };
        if !software {
            return Ok(Box::new(kvm));
        }
        let options = KvmOptions::default().privileged_in_software(true);
        Ok(Box::new(kvm.options(options)?))
    }

    /// What RAM is made of for that backend: what it maps a second time, into address windows, has to be shared.
    pub(crate) fn translated_ram(&self) -> Backing {
        match self.address_window {
            Windows::Never => Backing::Anonymous,
            Windows::Adaptive | Windows::Always => Backing::Memfd,
        }
    }

    /// The transport of virtio devices, if any are wanted.
    pub(crate) fn wanted_transport(&self) -> Option<Transport> {
        let wanted = self.metrics.is_some() || self.unrecorded().is_some();
        let otherwise = if self.ivshmem.is_empty() { Transport::Mmio } else { Transport::Pci };
        self.transport.or(wanted.then_some(otherwise))
    }

    /// The first of the options for devices that do something to a run which is not recorded.
    fn unrecorded(&self) -> Option<&'static str> {
        let given = [
            (!self.disk.is_empty(), "--disk"),
            (!self.net.is_empty(), "--net"),
            (self.balloon.is_some(), "--balloon"),
            (self.console == ConsoleKind::Virtio, "--console virtio"),
            (!self.port.is_empty(), "--port"),
            (!self.ivshmem.is_empty(), "--ivshmem"),
            (self.vsock.is_some(), "--vsock"),
        ];
        given.into_iter().find_map(|(given, name)| given.then_some(name))
    }

    /// Whether a network device is on a switch; and whether one may connect again.
    pub(crate) fn on_switches(&self) -> (bool, bool) {
        let switches = self.net.iter().filter_map(|network| match network.place {
            Place::Switch { reconnect, .. } => Some(reconnect),
            Place::Tap(_) => None,
        });
        switches.fold((false, false), |(_, any), reconnect| (true, any || reconnect))
    }

    /// Whether the program has sockets that others connect to while the guest runs.
    pub(crate) fn has_clients(&self) -> bool {
        let cables = self.net.iter().any(|network| network.cable.is_some());
        self.debug.is_wanted() || self.metrics.is_some() || !self.port.is_empty() || cables
    }

    /// What connects the guest with the program.
    pub(crate) fn wiring(&self) -> Wiring {
        match self.console {
            ConsoleKind::Serial => Wiring::SerialPorts,
            ConsoleKind::Virtio => Wiring::VirtioConsole,
        }
    }

    /// The virtio devices that are asked for, with the output of a console going where `output` says. A run that can be had
    /// again has the same random numbers each time.
    pub(crate) fn virtio(
        &self,
        ram: &GuestRam,
        audit: Option<&Audited>,
        output: impl FnOnce() -> Output,
    ) -> Result<Virtio> {
        let Some(transport) = self.wanted_transport() else { return Ok(Virtio::default()) };
        let deterministic = self.rerun.is_deterministic();
        if let Some(option) = self.unrecorded().filter(|_| deterministic) {
            bail!(
                "{option} goes with no deterministic run: what it does to one is not recorded, so leave {option} or \
                 --deterministic, --record, --replay and --state-hashes out"
            );
        }
        let seed: Option<&[u8]> = deterministic.then_some(b"entropy device");
        let mut devices = VirtioDevices::new(transport, deterministic)?;
        if let Some(audit) = audit {
            devices = devices.gatekeeper(audit.gatekeeper()).on_failure(audit.on_failure());
        }
        devices = devices.entropy(seed)?;
        for disk in &self.disk {
            devices = devices.disk(disk)?;
        }
        for network in &self.net {
            devices = devices.network(network)?;
        }
        if let Some(mib) = self.balloon {
            devices = devices.balloon(ram, mib)?;
        }
        let mut console = None;
        if self.console == ConsoleKind::Virtio {
            let (with_console, keyboard) = devices.console(output(), terminal::size())?;
            (devices, console) = (with_console, Some(keyboard));
        }
        if !self.port.is_empty() {
            devices = devices.ports(&self.port)?;
        }
        for region in &self.ivshmem {
            devices = devices.region(region)?;
        }
        if let Some(vsock) = &self.vsock {
            devices = devices.vsock(vsock)?;
        }
        let exporter = self.metrics.as_deref().map(Exporter::listen).transpose().context("--metrics")?;
        Ok(Virtio { devices: Some(devices), console, exporter })
    }
}

/// What the guest is to do.
pub(crate) fn session(options: &Options) -> Result<Session> {
    if let Some(line) = &options.command {
        let input = if options.stdin {
            let mut input = Vec::new();
            io::stdin().read_to_end(&mut input).context("reading standard input")?;
            Some(input)
        } else {
            None
        };
        return Ok(Session::Command { line: line.clone(), input });
    }
    let is_terminal = io::IsTerminal::is_terminal(&io::stdin());
    Ok(if is_terminal {
        let (rows, columns) = terminal::size().unwrap_or((24, 80));
        Session::Shell(Screen { rows, columns, term: terminal::kind() })
    } else {
        Session::Log
    })
}
