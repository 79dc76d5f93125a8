//! Boots Debian's stock kernel, or another, to a shell or through one command.
//!
//! With no kernel given it gets Debian's cloud kernel and its static busybox as packages, makes an initial RAM disk of
//! them, and keeps both under `target/`. `--command` runs a shell line in the guest: standard output and standard error are
//! the line's, and the exit status is. Statuses of the program's own begin at 124.
//!
//! The kernel is entered by PVH, the ELF payload of a bzImage directly. The machine is `vmm_examples::pc`'s. With
//! `--backend xen-pv` the kernel runs as a paravirtual Xen guest instead, which has no PC but a console. Before the guest
//! runs, the process gives up all that it does not need (`vmm_examples::confine`).

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use vmm_cpu::entry::entry_state;
use vmm_cpu::gdb::{Debuggee, Debugger, Event};
use vmm_cpu::xen_pv::abi::sched::ShutdownReason;
use vmm_cpu::xen_pv::builder::PvBoot;
use vmm_cpu::xen_pv::{self, DomainDevices, XenPvHypervisor};
use vmm_cpu::{
    ClockSource, CpuModel, EmptyBus, Error, Halt, Hypervisor, InterruptMode, Vcpu, VcpuExit, VcpuIo,
    VcpuThreads, Vm as _, VmConfig, open_backend,
};
use vmm_devices::platform::PlatformEvent;
use vmm_examples::confine::{Confinement, Engine, inherited_descriptors};
use vmm_examples::debian::{self, MODULES, ModuleTree, Series};
use vmm_examples::debug::{DebugOptions, Devices};
use vmm_examples::guest_command::{GuestRun, GuestStreams, Screen, SerialPort, Session, Wiring};
use vmm_examples::initramfs::{AddedFile, Userspace, userspace};
use vmm_examples::pc::{Buses, Clocks, Output, Pc};
use vmm_examples::pv_console::PvConsole;
use vmm_examples::replay::{Finish, Machine, Rerun, RerunOptions};
use vmm_examples::terminal::{self, EscapeKeys, RawMode};
use vmm_memory::boot::{Boot, BootProtocol, KernelImage};
use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{GuestRam, RegionConfig};

/// Statuses of the program's own; those of commands end at 123 by custom, and a debug exit's is QEMU's.
const TIME_IS_UP: u8 = 124;
const VMM_FAILURE: u8 = 125;

/// Rate of the guest's time-stamp counter. The kernel is told, so that it need not measure it.
const TSC_KHZ: u32 = 1_000_000;

/// Boots Debian's stock kernel, or another, to a shell or through one command.
#[derive(Parser)]
struct Options {
    /// What runs the guest: kvm, translate, xen-pv, or auto, which takes hardware assistance where the processor has it.
    #[arg(long, default_value = "auto")]
    backend: String,
    /// What executes the guest of backend xen-pv: kvm, translate, or auto.
    #[arg(long, default_value = "auto")]
    engine: String,
    /// Kernel: bzImage, ELF with a PVH note, or multiboot image. Debian's cloud kernel if not given.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Which of Debian's kernels to get.
    #[arg(long, value_enum, default_value_t, conflicts_with = "kernel")]
    series: Series,
    /// Initial RAM disk instead of the program's own; module of a multiboot kernel.
    #[arg(long, conflicts_with_all = ["command", "packages"])]
    initrd: Option<PathBuf>,
    /// Added to the kernel's command line; all of it for kernels other than Linux.
    #[arg(long, default_value = "")]
    append: String,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// RAM in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    memory: u64,
    /// Runs this shell line in the guest and exits with its status.
    #[arg(long)]
    command: Option<String>,
    /// Gives the program's standard input to the command; without it the command has none.
    #[arg(long, requires = "command")]
    stdin: bool,
    /// Debian packages to add to the guest's userspace, with what they depend on.
    #[arg(long, value_delimiter = ',')]
    packages: Vec<String>,
    /// Adds a file of this machine to the guest's, at PATH or in /root. Repeatable.
    #[arg(long, value_name = "FILE[:PATH]", conflicts_with = "initrd")]
    add: Vec<AddedFile>,
    /// Ends the run after that time, with status 124.
    #[arg(long)]
    seconds: Option<u64>,
    #[command(flatten)]
    rerun: RerunOptions,
    #[command(flatten)]
    debug: DebugOptions,
    /// Times, exits by kind, instructions and memory, on standard error at the end.
    #[arg(long)]
    timings: bool,
}

fn main() -> ExitCode {
    let started = Instant::now();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    run(&Options::parse(), started).map(ExitCode::from).unwrap_or_else(|error| {
        terminal::restore();
        eprintln!("linux: {error:#}");
        ExitCode::from(VMM_FAILURE)
    })
}

fn run(options: &Options, started: Instant) -> Result<u8> {
    let inherited = inherited_descriptors()?;
    if options.backend == xen_pv::NAME {
        return run_paravirtual(options, started, &inherited);
    }
    ensure!(options.engine == "auto", "--engine goes with --backend {}", xen_pv::NAME);
    // Before anything is fetched: without a backend there is no use for it.
    let hypervisor = choose(&options.backend)?;
    let endpoint = options.debug.endpoint(options.rerun.is_deterministic())?;
    let rerun = Rerun::open(&options.rerun, options.cpus)?;
    let session = match rerun.session() {
        Some(session) => session,
        None => session(options)?,
    };
    let guest = Guest::get(options, &session, Wiring::SerialPorts)?;

    let ram = GuestRam::builder().ram(options.memory << 20).track_dirty(rerun.hashes()).build()?;
    let kernel = KernelImage::parse(&guest.image).with_context(|| guest.name())?;
    let is_linux = kernel.setup_header().is_some();
    let mut boot = Boot::new(&kernel).command_line(guest.command_line.trim());
    if let Some(initrd) = &guest.initrd {
        boot = boot.initrd(initrd);
    }
    let tables = Pc::write_tables(&ram, options.cpus)?;
    if is_linux {
        // The payload's own PVH entry: the guest need not decompress itself. Other kernels find the tables where a BIOS
        // leaves them.
        boot = boot.protocol(BootProtocol::Pvh).rsdp(tables);
    }
    let entry = boot.load(&*ram.memory()).with_context(|| guest.name())?;

    let vm =
        hypervisor.create_vm(&machine(&*hypervisor, options.rerun.is_deterministic()).vcpus(options.cpus))?;
    vm.map_ram(&ram)?;
    let mut vcpus = (0..options.cpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>, _>>()?;
    let bootstrap = vcpus.first_mut().context("a machine has a vCPU")?;
    entry_state(&entry)?.apply(&mut **bootstrap)?;
    let bootstrap = bootstrap.handle();

    let stop = Arc::new(StopSign::default());
    let watch = Arc::new(Watch::new(&session, Arc::clone(&stop), started));
    let messages = vm.msi().context("the backend takes no interrupt messages")?;
    let at_end = Arc::clone(&stop);
    // One clock for all where it may stop.
    let one_clock = options.rerun.is_deterministic() || endpoint.is_some();
    let clocks = if one_clock { rerun.clocks(&*vm)? } else { Clocks::host() };
    let output = |port| Watch::port(&watch, port);
    let pc = Arc::new(Pc::with_clocks(clocks, messages, output, move || at_end.raise())?);
    if options.rerun.is_deterministic() {
        let mut vcpu = vcpus.pop().context("a machine has a vCPU")?;
        stop.reaches(move || bootstrap.kick());
        let started_with = (&*guest.image, guest.initrd.as_deref(), guest.command_line.trim());
        let header = rerun.header(started_with, options.memory, (&*hypervisor, &*vm), session.clone());
        let (director, typist) = rerun.director(&header, &ram, &*vm)?;
        let raw =
            if typist.is_some() && matches!(session, Session::Shell(_)) { RawMode::enter()? } else { None };
        if let Some(typist) = typist.filter(|_| !matches!(session, Session::Command { .. })) {
            read_keys(move |keys| typist.type_in(keys), &watch, raw.is_some())?;
        }
        let time_is_up = alarm(options.seconds, &stop)?;
        let memory = options.timings.then(|| Memory::open(&ram)).transpose()?;
        confine(&*hypervisor, &inherited, false)?;
        let machine = Machine { vm: &*vm, vcpu: &mut *vcpu, pc: &pc };
        let guest_ended = || pc.end().is_some() || watch.done.load(Ordering::SeqCst);
        let wanted = || {
            let user = watch.enough.load(Ordering::SeqCst) || watch.broken.load(Ordering::SeqCst);
            let time = time_is_up.load(Ordering::SeqCst);
            if user { Some(Finish::User) } else { time.then_some(Finish::Time) }
        };
        let finish = director.run(machine, guest_ended, wanted);
        let end = finish.and_then(|finish| {
            ensure!(!watch.broken.load(Ordering::SeqCst), "the guest's output cannot be written");
            Ok(match (finish, pc.end()) {
                (Finish::User, _) => End::User,
                (Finish::Time, _) => End::TimeIsUp,
                (Finish::Guest, end) => End::of(end)?,
            })
        });
        drop(raw);
        return conclude(options, &session, &watch, started, &[vcpu], memory, end);
    }
    let with_buses = |vcpu| (vcpu, Box::new(Buses(Arc::clone(&pc))) as Box<dyn VcpuIo + Send>);
    let threads = Arc::new(VcpuThreads::spawn(vcpus.into_iter().map(with_buses).collect())?);
    let pause = threads.pause_handle();
    let (tell, told) = mpsc::channel();
    let stopped = tell.clone();
    stop.reaches(move || {
        pause.pause();
        // Without a debugger nobody receives it.
        drop(stopped.send(None));
    });
    pc.start(bootstrap);
    let raw = if matches!(session, Session::Shell(_)) { RawMode::enter()? } else { None };
    if !matches!(session, Session::Command { .. }) {
        let typed = Arc::clone(&pc);
        read_keys(move |keys| typed.type_in(keys), &watch, raw.is_some())?;
    }
    let time_is_up = alarm(options.seconds, &stop)?;
    let memory = options.timings.then(|| Memory::open(&ram)).transpose()?;
    let debugger = match endpoint {
        Some(endpoint) => {
            let clock = vm.clock().context("the backend's clock cannot be stopped")?;
            let debuggee = Debuggee::new(Arc::clone(&threads), ram.clone()).clock(clock);
            let event = move |event| drop(tell.send(Some(event)));
            Some(Debugger::start(endpoint, debuggee.monitor(Devices(Arc::clone(&pc))), event)?)
        }
        None => None,
    };
    confine(&*hypervisor, &inherited, debugger.is_some())?;

    match &debugger {
        None => threads.resume(),
        Some(debugger) if !options.debug.waits() => debugger.resume(),
        Some(_) => {}
    }
    let end = match debugger {
        None => end_by(threads.wait(None), pc.end(), &watch, &time_is_up),
        Some(debugger) => {
            let end = match told.recv()? {
                Some(Event::Exit(exit)) => end_by(Some(exit), pc.end(), &watch, &time_is_up),
                Some(_) => Ok(End::User),
                None => end_by(None, pc.end(), &watch, &time_is_up),
            };
            debugger.finish(if let Ok(End::DebugExit(status)) = end { status } else { 0 });
            end
        }
    };
    let vcpus = Arc::into_inner(threads).context("somebody holds the vCPUs")?.stop();
    drop(raw);
    conclude(options, &session, &watch, started, &vcpus, memory, end)
}

/// As [`run`], with a guest that asks for what it wants.
fn run_paravirtual(options: &Options, started: Instant, inherited: &[std::os::fd::RawFd]) -> Result<u8> {
    let engine: Arc<dyn Hypervisor> = Arc::from(choose(&options.engine)?);
    let hypervisor = XenPvHypervisor::new(Arc::clone(&engine))?;
    ensure!(!options.rerun.is_deterministic(), "deterministic runs go with --backend translate");
    ensure!(!options.debug.is_wanted(), "--gdb does not go with --backend {}", xen_pv::NAME);
    let session = session(options)?;
    let guest = Guest::get(options, &session, Wiring::PvConsole)?;

    // Without the hole that a PC has below 4 GiB.
    let whole = RegionConfig::new(GuestAddress(0), options.memory << 20);
    let ram = GuestRam::builder().region(whole).build()?;
    let kernel = KernelImage::parse(&guest.image).with_context(|| guest.name())?;
    let mut boot =
        PvBoot::new(&kernel).with_context(|| guest.name())?.command_line(guest.command_line.trim());
    if let Some(initrd) = &guest.initrd {
        boot = boot.initrd(initrd);
    }
    let mut config = VmConfig::new(CpuModel::Host).vcpus(options.cpus);
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz = Some(TSC_KHZ);
    }
    let stop = Arc::new(StopSign::default());
    let watch = Arc::new(Watch::new(&session, Arc::clone(&stop), started));
    let console = PvConsole::new(&session, |port| Watch::port(&watch, port));
    let vm = hypervisor.create_domain(&config, &ram, DomainDevices::default().console(console))?;
    vm.boot(&boot).with_context(|| guest.name())?;
    let with_nothing = |index| Ok((vm.create_vcpu(index)?, Box::new(EmptyBus) as Box<dyn VcpuIo + Send>));
    let vcpus = (0..options.cpus).map(with_nothing).collect::<Result<Vec<_>, Error>>()?;
    let threads = VcpuThreads::spawn(vcpus)?;
    let pause = threads.pause_handle();
    stop.reaches(move || pause.pause());
    let raw = if matches!(session, Session::Shell(_)) { RawMode::enter()? } else { None };
    if !matches!(session, Session::Command { .. }) {
        let domain = Arc::clone(vm.domain()?);
        read_keys(move |keys| domain.console_input(keys), &watch, raw.is_some())?;
    }
    let time_is_up = alarm(options.seconds, &stop)?;
    let memory = options.timings.then(|| Memory::open(&ram)).transpose()?;
    confine(&*engine, inherited, false)?;

    threads.resume();
    let end = end_by(threads.wait(None), None, &watch, &time_is_up);
    let vcpus = threads.stop();
    drop(raw);
    if let Some(reason @ (ShutdownReason::Crash | ShutdownReason::Watchdog)) = vm.shutdown_reason() {
        eprintln!("linux: the guest shut down: {reason:?}");
    }
    conclude(options, &session, &watch, started, &vcpus, memory, end)
}

/// Reports, and says with what status the program ends.
fn conclude(
    options: &Options,
    session: &Session,
    watch: &Watch,
    started: Instant,
    vcpus: &[Box<dyn Vcpu>],
    memory: Option<Memory>,
    end: Result<End>,
) -> Result<u8> {
    let ended = started.elapsed();
    let status = watch.finish()?;
    if options.timings {
        report(watch, ended, vcpus, memory)?;
    }
    match end? {
        End::TimeIsUp => {
            match options.seconds {
                Some(seconds) => eprintln!("linux: the guest was still running after {seconds} s"),
                None => eprintln!("linux: the guest was still running when its time was up"),
            }
            Ok(TIME_IS_UP)
        }
        End::DebugExit(status) => Ok(status),
        End::User => Ok(0),
        End::Guest => match (session, status) {
            (_, Some(status)) => Ok(status),
            (Session::Command { .. }, None) => bail!("the guest ended before the command did"),
            (_, None) => Ok(0),
        },
    }
}

/// The backend of that name. The program says what `auto` has chosen, and why.
fn choose(name: &str) -> Result<Box<dyn Hypervisor>> {
    if name != "auto" {
        return Ok(open_backend(name)?);
    }
    let why = match open_backend("kvm") {
        Ok(kvm) if kvm.capabilities().hardware_assisted == Some(true) => {
            eprintln!("linux: backend kvm, since the processor has hardware assistance");
            return Ok(kvm);
        }
        Ok(_) => "since /dev/kvm has no hardware assistance behind it".to_owned(),
        Err(Error::HostInterfaceAbsent { path, .. }) => format!("since there is no {path}"),
        Err(error) => format!("since kvm is not to be had: {error}"),
    };
    eprintln!("linux: backend translate, {why}");
    Ok(open_backend("translate")?)
}

/// The machine that [`Pc`] goes with.
fn machine(hypervisor: &dyn Hypervisor, deterministic: bool) -> VmConfig {
    let mut config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic);
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz = Some(TSC_KHZ);
    }
    if deterministic {
        config.clock.source = ClockSource::Deterministic;
    }
    config
}

/// What the guest is to do.
fn session(options: &Options) -> Result<Session> {
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

/// What the machine is started with.
struct Guest {
    kernel: PathBuf,
    image: Vec<u8>,
    initrd: Option<Vec<u8>>,
    command_line: String,
}

impl Guest {
    fn get(options: &Options, session: &Session, wiring: Wiring) -> Result<Self> {
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
        let append = format!("tsc_early_khz={TSC_KHZ} {}", options.append);
        if let Some(initrd) = &options.initrd {
            let command_line = format!("{} panic=-1 {append}", wiring.parameters());
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
        let run = GuestRun::new(kernel.clone(), &userspace(&tree)?, session, wiring, &[], &append)?;
        Ok(Self { kernel, image, initrd: Some(run.initrd), command_line: run.command_line })
    }

    fn name(&self) -> String {
        format!("kernel {}", self.kernel.display())
    }
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// Stops the vCPUs when there is a reason to look why; those who raise it say so first.
#[derive(Default)]
struct StopSign(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl StopSign {
    fn reaches(&self, vcpus: impl Fn() + Send + Sync + 'static) {
        self.0.get_or_init(|| Box::new(vcpus));
    }

    fn raise(&self) {
        if let Some(stop) = self.0.get() {
            stop();
        }
    }
}

/// What the program sees of the guest: its output, and when which came.
struct Watch {
    streams: Mutex<Option<Streams>>,
    stop: Arc<StopSign>,
    started: Instant,
    first_output: OnceLock<Duration>,
    init: OnceLock<Duration>,
    /// The command has ended.
    done: AtomicBool,
    /// The user wants the machine to end.
    enough: AtomicBool,
    /// An output that cannot be written ends the machine.
    broken: AtomicBool,
}

type Streams = GuestStreams<io::BufWriter<io::Stdout>, io::Stderr>;

impl Watch {
    fn new(session: &Session, stop: Arc<StopSign>, started: Instant) -> Self {
        let streams = GuestStreams::new(session, io::BufWriter::new(io::stdout()), io::stderr());
        Self {
            streams: Mutex::new(Some(streams)),
            stop,
            started,
            first_output: OnceLock::new(),
            init: OnceLock::new(),
            done: AtomicBool::new(false),
            enough: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        }
    }

    /// What takes the output of a serial port.
    fn port(watch: &Arc<Self>, port: SerialPort) -> Output {
        Box::new(PortWriter { watch: Arc::clone(watch), port })
    }

    fn receive(&self, port: SerialPort, bytes: &[u8]) -> io::Result<()> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(streams) = streams.as_mut() else { return Ok(()) };
        self.first_output.get_or_init(|| self.started.elapsed());
        let result = streams.receive(port, bytes).and_then(|()| {
            // A line that is complete is to be seen.
            if bytes.contains(&b'\n') { streams.flush() } else { Ok(()) }
        });
        if result.is_err() {
            self.broken.store(true, Ordering::SeqCst);
            self.stop.raise();
        }
        if streams.init_has_begun() {
            self.init.get_or_init(|| self.started.elapsed());
        }
        if streams.status().is_some() && !self.done.swap(true, Ordering::SeqCst) {
            self.stop.raise();
        }
        result
    }

    fn end_by_user(&self) {
        self.enough.store(true, Ordering::SeqCst);
        self.stop.raise();
    }

    /// Ends the streams; the exit status, if the guest gave one.
    fn finish(&self) -> Result<Option<u8>> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).take();
        streams.map_or(Ok(None), GuestStreams::finish)
    }
}

/// One serial port's way to the streams.
struct PortWriter {
    watch: Arc<Watch>,
    port: SerialPort,
}

impl Write for PortWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch.receive(self.port, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the thread that types at the console what comes from standard input.
fn read_keys(type_in: impl Fn(&[u8]) + Send + 'static, watch: &Arc<Watch>, raw: bool) -> Result<()> {
    let watch = Arc::clone(watch);
    let keys = move || {
        let (mut escape, mut buffer) = (EscapeKeys::default(), [0; 256]);
        // An input that ends, or breaks, is one that nothing comes from any more.
        while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
            let typed = buffer.get(..length).unwrap_or_default();
            if !raw {
                type_in(typed);
                continue;
            }
            let mut for_guest = Vec::with_capacity(length);
            let ends = escape.take(typed, &mut for_guest);
            type_in(&for_guest);
            if ends {
                watch.end_by_user();
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".to_owned()).spawn(keys)?;
    Ok(())
}

/// Starts the thread that stops the vCPUs when the time is up; what tells that it is.
fn alarm(seconds: Option<u64>, stop: &Arc<StopSign>) -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    if let Some(seconds) = seconds {
        let (flag, stop) = (Arc::clone(&flag), Arc::clone(stop));
        let alarm = move || {
            std::thread::sleep(Duration::from_secs(seconds));
            flag.store(true, Ordering::SeqCst);
            stop.raise();
        };
        std::thread::Builder::new().name("alarm".to_owned()).spawn(alarm)?;
    }
    Ok(flag)
}

/// Gives up what the process does not need from here on. Where debuggers may connect, it lets them.
fn confine(hypervisor: &dyn Hypervisor, inherited: &[std::os::fd::RawFd], debuggers: bool) -> Result<()> {
    let engine = if hypervisor.name() == "kvm" { Engine::Kvm } else { Engine::Interpreter };
    let confinement = Confinement::new(engine).deny_descriptors(inherited);
    if debuggers {
        return confinement.allow(libc::SYS_accept4).allow(libc::SYS_setsockopt).enter();
    }
    confinement.enter()
}

/// What ended the run.
enum End {
    /// Power-off, reset, shutdown, or the end of the command.
    Guest,
    DebugExit(u8),
    User,
    TimeIsUp,
}

impl End {
    /// The end by that event, or by none of the platform's.
    fn of(event: Option<PlatformEvent>) -> Result<Self> {
        Ok(match event {
            Some(PlatformEvent::DebugExit { status }) => Self::DebugExit(u8::try_from(status & 0xff)?),
            _ => Self::Guest,
        })
    }
}

/// What the end is that an exit of a vCPU, or a pause, stands for, and what the platform says of it. The first vCPU that
/// stops ends the machine.
fn end_by(
    exit: Option<VcpuExit>,
    platform: Option<PlatformEvent>,
    watch: &Watch,
    time_is_up: &AtomicBool,
) -> Result<End> {
    if watch.broken.load(Ordering::SeqCst) {
        bail!("the guest's output cannot be written");
    }
    if let Some(end) = platform {
        return End::of(Some(end));
    }
    if watch.done.load(Ordering::SeqCst) {
        return Ok(End::Guest);
    }
    if watch.enough.load(Ordering::SeqCst) {
        return Ok(End::User);
    }
    if time_is_up.load(Ordering::SeqCst) {
        return Ok(End::TimeIsUp);
    }
    match exit {
        Some(VcpuExit { reason: Ok(Halt::Reset | Halt::Shutdown), .. }) => Ok(End::Guest),
        Some(VcpuExit { index, reason }) => bail!("vCPU {index} stopped: {:?}", reason?),
        None => bail!("the vCPUs were stopped by nobody"),
    }
}

/// What tells the memory that the program uses, opened while it still may.
struct Memory {
    maps: File,
    guest: Vec<(usize, usize)>,
}

impl Memory {
    fn open(ram: &GuestRam) -> Result<Self> {
        let range = |region: &Arc<vmm_memory::GuestRegion>| {
            let start = region.as_ptr().addr();
            (start, start + usize::try_from(region.len()).unwrap_or(0))
        };
        let guest = ram.regions().iter().map(range).collect();
        Ok(Self { maps: File::open("/proc/self/smaps").context("/proc/self/smaps")?, guest })
    }

    /// Resident bytes of the guest's RAM, and of everything else.
    fn resident(mut self) -> Result<(u64, u64)> {
        let mut text = String::new();
        self.maps.read_to_string(&mut text).context("/proc/self/smaps")?;
        let (mut guest, mut other, mut is_guest) = (0, 0, false);
        for line in text.lines() {
            let word = line.split(' ').next().unwrap_or_default();
            if let Some((start, end)) = word.split_once('-') {
                let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
                let (start, end) = (number(start), number(end));
                is_guest = self.guest.iter().any(|range| start < range.1 && range.0 < end);
            } else if word == "Rss:" {
                let kib: u64 = line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
                *(if is_guest { &mut guest } else { &mut other }) += kib << 10;
            }
        }
        Ok((guest, other))
    }
}

fn report(watch: &Watch, ended: Duration, vcpus: &[Box<dyn Vcpu>], memory: Option<Memory>) -> Result<()> {
    let at = |what: &str, time: Option<&Duration>| {
        if let Some(time) = time {
            eprintln!("{what}: {:.3} s", time.as_secs_f64());
        }
    };
    at("first line of the kernel", watch.first_output.get());
    at("init", watch.init.get());
    at("end", Some(&ended));
    for vcpu in vcpus {
        // With one vCPU there is no doubt whose they are.
        let whose = if vcpus.len() > 1 { format!("vCPU {}: ", vcpu.index()) } else { String::new() };
        for (kind, count) in vcpu.exit_counts().into_iter().filter(|(_, count)| *count > 0) {
            eprintln!("{whose}{kind}: {count}");
        }
    }
    if let Some(memory) = memory {
        let (guest, other) = memory.resident()?;
        eprintln!("guest memory in use: {:.1} MiB", guest as f64 / f64::from(1 << 20));
        eprintln!("host memory beyond that: {:.1} MiB", other as f64 / f64::from(1 << 20));
    }
    Ok(())
}
