//! Boots Debian's stock kernel, or another, to a shell or through one command.
//!
//! With no kernel given it gets Debian's cloud kernel and its static busybox as packages, makes an initial RAM disk of
//! them, and keeps both under `target/`. `--command` runs a shell line in the guest: standard output and standard error are
//! the line's, and the exit status is. Statuses of the program's own begin at 124.
//!
//! The kernel is entered by PVH, the ELF payload of a bzImage directly. The machine is `vmm_examples::pc`'s. With
//! `--backend xen-pv` the kernel runs as a paravirtual Xen guest instead, which has no PC but a console. Before the guest
//! runs, the process gives up all that it does not need (`vmm_examples::confine`).

mod audited;
mod end;
mod guest;
mod increment;
mod memory;
mod options;
mod paravirtual;
mod snapshot;
mod watch;

use std::io;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Parser as _;
use vmm_cpu::gdb::{Debuggee, Debugger, Event};
use vmm_cpu::{
    ClockSource, CpuModel, Error, Hypervisor, InterruptMode, VcpuIo, VcpuThreads, VmConfig, open_backend,
};
use vmm_cpu::{kvm, translate, xen_pv};
use vmm_examples::confine::{Confinement, Engine, TAP_REQUESTS, inherited_descriptors};
use vmm_examples::debug::Devices;
use vmm_examples::guest_command::{Hardware, SerialPort, Session, clock_line};
use vmm_examples::pc::{Buses, Clocks, Pc};
use vmm_examples::replay::{Finish, Machine, Rerun};
use vmm_examples::terminal::{self, RawMode};
use vmm_examples::virtio::{Served, VirtioDevices};
use vmm_memory::snapshot::LazyRam;
use vmm_memory::{Backing, GuestRam};

use crate::audited::Audited;
use crate::end::{End, Memory, conclude, end_by};
use crate::guest::Guest;
use crate::options::{Options, Virtio, session};
use crate::snapshot::{Machine as Saved, Saving, run_or_save};
use crate::watch::{StopSign, Watch, alarm, read_keys};

/// Statuses of the program's own; those of commands end at 123 by custom, and a debug exit's is QEMU's.
const TIME_IS_UP: u8 = 124;
const VMM_FAILURE: u8 = 125;

/// Rate of the guest's time-stamp counter where it can be chosen.
const TSC_KHZ: u32 = 1_000_000;

fn main() -> ExitCode {
    let started = Instant::now();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    let options = Options::parse();
    // Before this process was there.
    let before = options
        .wanted_at
        .map_or(Duration::ZERO, |then| vmm_examples::moment::now().saturating_sub(then + started.elapsed()));
    run(&options, started.checked_sub(before).unwrap_or(started)).map(ExitCode::from).unwrap_or_else(
        |error| {
            terminal::restore();
            eprintln!("linux: {error:#}");
            ExitCode::from(VMM_FAILURE)
        },
    )
}

fn run(options: &Options, started: Instant) -> Result<u8> {
    if let Some(dir) = &options.write_audit {
        return audited::write(dir).map(|()| 0);
    }
    let inherited = inherited_descriptors()?;
    ensure!(
        options.audit.is_none() || (options.backend != xen_pv::NAME && !options.rerun.is_deterministic()),
        "--audit goes with no deterministic run and not with --backend {}",
        xen_pv::NAME
    );
    if options.backend == xen_pv::NAME {
        return paravirtual::run(options, started, &inherited);
    }
    ensure!(options.engine == "auto", "--engine goes with --backend {}", xen_pv::NAME);
    // Before anything is fetched: without a backend there is no use for it.
    let hypervisor = choose(options, &options.backend)?;
    let endpoint = options.debug.endpoint(options.rerun.is_deterministic())?;
    ensure!(
        !options.snapshot.are_given() || !options.rerun.is_deterministic(),
        "--snapshot-to and --restore-from go with no deterministic run"
    );
    let restored = options.snapshot.restored(true)?;
    let rerun = Rerun::open(&options.rerun, options.cpus)?;
    let session = match (&restored, rerun.session()) {
        (Some(restored), _) => restored.session.clone(),
        (None, Some(session)) => session,
        (None, None) => session(options)?,
    };
    let ram_backing =
        if hypervisor.name() == translate::NAME { options.translated_ram() } else { Backing::Anonymous };
    let new_ram = |bytes| -> Result<GuestRam> {
        let ram =
            GuestRam::builder().ram(bytes).track_dirty(rerun.hashes() || options.snapshot.tracks_changes());
        Ok(options.ram.apply(ram, ram_backing).build()?)
    };
    let ram = match &restored {
        Some(restored) => restored.ram(new_ram)?,
        None => new_ram(options.memory << 20)?,
    };
    let stop = Arc::new(StopSign::default());
    let mut saving = options.snapshot.saving()?;
    let heard = restored.as_ref().map(|restored| restored.heard.clone());
    let watch = Watch::new(&session, Arc::clone(&stop), started, heard, saving.is_some());
    let watch = Arc::new(watch);
    let lazy = restored.as_ref().map(|restored| restored.give(&ram)).transpose()?;
    let output = |port| Watch::port(&watch, port);
    let mut audit = options.audit.as_deref().map(Audited::start).transpose().context("--audit")?;
    let virtio = options.virtio(&ram, audit.as_ref(), || output(SerialPort::Console))?;
    let Virtio { devices, console, exporter } = virtio;
    let modules = devices.as_ref().map(VirtioDevices::modules).unwrap_or_default();
    let ports: Vec<&str> = options.port.iter().map(|port| &*port.name).collect();
    let is_saved = options.snapshot.saves();
    let hardware = Hardware { wiring: options.wiring(), modules: &modules, ports: &ports, is_saved };
    let config = match &restored {
        Some(restored) => restored.config.clone(),
        None => machine(&*hypervisor, options)?.vcpus(options.cpus),
    };
    let vm = match &restored {
        Some(restored) => restored.vm(&*hypervisor)?,
        None => hypervisor.create_vm(&config)?,
    };
    vm.map_ram(&ram)?;
    let (mut vcpus, guest) = match &restored {
        Some(restored) => (restored.vcpus(&*vm)?, None),
        None => {
            let tsc_khz = vm.clock().map_or(TSC_KHZ, |clock| clock.tsc_khz());
            let guest = Guest::get(options, &session, hardware, tsc_khz)?;
            let further = |tables| match &devices {
                Some(devices) => devices.describe(tables),
                None => tables,
            };
            let entry = guest.load(&ram, Pc::write_tables(&ram, options.cpus, further)?)?;
            let vcpus =
                (0..options.cpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>, _>>()?;
            (vcpus, Some((guest, entry)))
        }
    };
    let bootstrap = vcpus.first_mut().context("a machine has a vCPU")?;
    if let Some((_, entry)) = &guest {
        entry.apply(&mut **bootstrap)?;
    }
    let bootstrap = bootstrap.handle();

    let messages = vm.msi().context("the backend takes no interrupt messages")?;
    let at_end = Arc::clone(&stop);
    // One clock for all where it may stop.
    let one_clock = options.rerun.is_deterministic() || endpoint.is_some();
    let clocks = if one_clock { rerun.clocks(&*vm)? } else { Clocks::host() };
    let pc = Arc::new(Pc::with_clocks(clocks, messages, output, move || at_end.raise())?);
    let served = devices.map(|devices| devices.attach(&pc, &vm, &ram, exporter)).transpose()?;
    let (mut check, mut changes) = (None, None);
    if let Some(restored) = &restored {
        changes = restored.changes(&*vm, &ram)?;
        tell_time(Arc::clone(&pc))?;
        restored.machine(&pc, served.as_ref(), &ram)?;
        check = restored.check_beside(&watch)?;
    }
    if options.rerun.is_deterministic() {
        let (guest, _) = guest.context("a run that can be had again begins with a kernel")?;
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
        confine(&*hypervisor, &inherited, options, None)?;
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
        let keyboard = console.clone();
        let type_in = move |keys: &[u8]| match &keyboard {
            Some(console) => console.type_in(keys),
            None => typed.type_in(keys),
        };
        read_keys(type_in, &watch, raw.is_some())?;
    }
    if let Some(console) = console {
        terminal::on_resize(move |rows, columns| console.resize(rows, columns))?;
    }
    let time_is_up = alarm(options.seconds, &stop)?;
    let snapshot_is_due = options.snapshot.moment(&stop)?;
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
    if let (Some(audit), Some((guest, _))) = (&mut audit, &guest) {
        audit.launch(guest, &config, &*hypervisor).context("--audit")?;
        threads.observe(audit.observer());
    }
    confine(&*hypervisor, &inherited, options, audit.as_ref())?;

    match &debugger {
        None => threads.resume(),
        Some(debugger) if !options.debug.waits() => debugger.resume(),
        Some(_) => {}
    }
    watch.begin();
    if let Some(check) = check {
        check.send(())?;
    }
    if let Some(audit) = &mut audit {
        audit.launched();
    }
    let save = |saving: Saving| {
        let machine = Saved {
            devices: served.as_ref(),
            hypervisor: &*hypervisor,
            config: &config,
            vm: &*vm,
            threads: &threads,
            pc: Some(&pc),
            ram: &ram,
            session: &session,
            line: Vec::new(),
            events: 0,
            changes: changes.as_ref(),
        };
        saving.finish(machine, &watch)
    };
    let go_on = || {
        watch.give_up_snapshots();
        snapshot_is_due.store(false, Ordering::SeqCst);
        served.as_ref().map_or(Ok(()), Served::resume)
    };
    let end_of = |exit| end_by(exit, pc.end(), &watch, &time_is_up, &snapshot_is_due);
    let end = match debugger {
        None => run_or_save(&threads, &mut saving, end_of, save, go_on),
        Some(debugger) => {
            let end = match told.recv()? {
                Some(Event::Exit(exit)) => end_of(Some(exit)),
                Some(_) => Ok(End::User),
                None => end_of(None),
            };
            debugger.finish(if let Ok(End::DebugExit(status)) = end { status } else { 0 });
            end
        }
    };
    if let (Ok(End::Snapshot), Some(saving)) = (&end, saving.take()) {
        save(saving)?;
    }
    let vcpus = Arc::into_inner(threads).context("somebody holds the vCPUs")?.stop();
    drop((raw, lazy));
    if let Some(audit) = audit {
        audit.end(pc.end(), &end).context("--audit")?;
    }
    conclude(options, &session, &watch, started, &vcpus, memory, end)
}

/// The backend of that name. The program says what `auto` has chosen, and why.
fn choose(options: &Options, name: &str) -> Result<Box<dyn Hypervisor>> {
    if name == translate::NAME {
        return Ok(options.translator());
    }
    if name != "auto" {
        ensure!(
            !options.interpret && !options.digest && options.code_memory.is_none(),
            "--interpret, --digest and --code-memory go with --backend translate"
        );
        if name == kvm::NAME && options.backend == name {
            return options.kvm();
        }
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
    Ok(options.translator())
}

/// The machine that [`Pc`] goes with.
fn machine(hypervisor: &dyn Hypervisor, options: &Options) -> Result<VmConfig> {
    let mut config = VmConfig::new(options.cpu.clone()).interrupts(InterruptMode::LocalApic);
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz = Some(TSC_KHZ);
    }
    if options.rerun.is_deterministic() {
        config.clock.source = ClockSource::Deterministic;
    }
    if options.host_tsc {
        ensure!(
            hypervisor.name() == translate::NAME && !options.rerun.is_deterministic(),
            "--host-tsc goes with --backend translate"
        );
        // KVM knows the rate.
        let kvm = open_backend(kvm::NAME)?.create_vm(&VmConfig::new(CpuModel::Host))?;
        config.clock.tsc_khz = Some(kvm.clock().context("--host-tsc: KVM does not tell its rate")?.tsc_khz());
        config.clock.source = ClockSource::HostTsc;
    }
    Ok(config)
}

/// Starts the thread that tells a guest which goes on what time it is: at once, and at the next full second.
fn tell_time(pc: Arc<Pc>) -> Result<()> {
    let tell = move || {
        let since = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let say = |time: Duration| pc.say(SerialPort::Control, clock_line(time.as_secs()).as_bytes());
        let now = since();
        say(now);
        let second = Duration::from_secs(now.as_secs() + 1);
        thread::sleep(second.saturating_sub(now));
        say(second);
    };
    thread::Builder::new().name("clock".to_owned()).spawn(tell)?;
    Ok(())
}

/// Gives up what the process does not need from here on. Where clients may connect, it lets them.
fn confine(
    hypervisor: &dyn Hypervisor,
    inherited: &[RawFd],
    options: &Options,
    audit: Option<&Audited>,
) -> Result<()> {
    let engine = if hypervisor.name() == "kvm" { Engine::Kvm } else { Engine::Interpreter };
    let mut confinement = Confinement::new(engine).deny_descriptors(inherited);
    if let Some(audit) = audit {
        confinement = audit.confinement(confinement);
    }
    if options.has_clients() {
        confinement = confinement.allow(libc::SYS_accept4).allow(libc::SYS_setsockopt);
    }
    if !options.net.is_empty() {
        confinement = confinement.allow_requests(&TAP_REQUESTS).allow_duplicates();
    }
    let (has_switch, reconnects) = options.on_switches();
    if has_switch {
        confinement = confinement.allow(libc::SYS_shutdown);
    }
    if reconnects {
        let unix = u64::try_from(libc::AF_UNIX)?;
        confinement = confinement.allow_if(libc::SYS_socket, 0, unix);
        confinement = confinement.allow(libc::SYS_connect).allow(libc::SYS_sendmsg);
    }
    if options.snapshot.is_lazy() {
        confinement = confinement.allow_requests(&LazyRam::REQUESTS.map(libc::Ioctl::from));
    }
    if options.snapshot.saves() {
        // From one name to another in its directory, or away if it fails.
        for call in [libc::SYS_ftruncate, libc::SYS_renameat, libc::SYS_unlink] {
            confinement = confinement.allow(call);
        }
    }
    if options.vsock.is_some() {
        confinement = confinement.allow_unix_sockets();
    }
    confinement.enter()
}
