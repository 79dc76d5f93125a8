//! A machine that is saved instead of ended, and one that goes on from there in another process.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use vmm_cpu::state::{CpuState, VmState};
use vmm_cpu::{Hypervisor, Vcpu, VcpuExit, VcpuThreads, Vm, VmConfig};
use vmm_examples::guest_command::{Heard, Session};
use vmm_examples::moment::{Moment, SAVED};
use vmm_examples::pc::Pc;
use vmm_examples::pc_state::PcState;
use vmm_examples::terminal;
use vmm_examples::virtio::Served;
use vmm_memory::GuestRam;
use vmm_memory::snapshot::mirror::{Family, VersionMap, Versionize, VersionizeResult};
use vmm_memory::snapshot::{LazyRam, RamOptions, SnapshotError, SnapshotWriter, StateFormat};
use vmm_memory::{snapshot_mirror, snapshot_states};

use crate::VMM_FAILURE;
use crate::end::End;
use crate::increment::{Chain, Changes};
use crate::watch::{StopSign, Watch};

/// The options for snapshots.
#[derive(Args)]
pub(crate) struct SnapshotOptions {
    /// Saves the machine in FILE and ends, when a program of the guest asks for it by running `snapshot`, or when --snapshot-after says.
    #[arg(long, value_name = "FILE")]
    snapshot_to: Option<PathBuf>,
    /// Saves it when the guest has run for so many milliseconds here.
    #[arg(long, value_name = "MILLISECONDS", requires = "snapshot_to")]
    snapshot_after: Option<u64>,
    /// Compresses its RAM, which has to be loaded then and cannot be mapped.
    #[arg(long, requires = "snapshot_to")]
    snapshot_packed: bool,
    /// Saves those pages of its RAM alone that have changed since the snapshot of --restore-from, on which it is based then.
    #[arg(long, requires_all = ["snapshot_to", "restore_from"])]
    snapshot_incremental: bool,
    /// Goes on from a snapshot instead of booting a kernel. Devices are given again as they were when it was saved; RAM and vCPUs are as
    /// they were.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["kernel", "initrd", "command", "packages", "add", "cpus", "memory", "hugepages", "audit"]
    )]
    restore_from: Option<PathBuf>,
    /// The snapshot that the one of --restore-from is based on. Repeatable, for one that is based on another itself: each behind its base.
    #[arg(long, value_name = "FILE", requires = "restore_from")]
    restore_base: Vec<PathBuf>,
    /// How RAM comes out of the snapshot.
    #[arg(long, value_enum, default_value_t, requires = "restore_from")]
    restore_ram: RestoreRam,
}

/// How RAM comes out of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum RestoreRam {
    /// Shared with the file and its other guests until it is written, and checked beside the guest; backend translate then does without
    /// address windows
    #[default]
    Map,
    /// Copied, and checked before the guest runs
    Load,
    /// Copied and checked as the guest touches it
    Lazy,
}

/// What this program knew of the guest.
struct Known {
    text: String,
}

/// The same, as JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KnownJson {
    session: Session,
    heard: Heard,
    /// Of the one console of a paravirtual guest: what has come of a line.
    line: Vec<u8>,
}

struct ProgramStates;

impl Family for ProgramStates {
    const FORMAT: StateFormat = StateFormat { name: "vmm-examples/linux", newest: 1, oldest: 1 };

    fn versions() -> VersionMap {
        VersionMap::new()
    }
}

snapshot_mirror!(KnownText of Known { text: String });
snapshot_states!(ProgramStates: Known);

/// A snapshot that is to be written.
pub(crate) struct Saving {
    writer: SnapshotWriter,
    packed: bool,
    path: PathBuf,
}

/// What is saved.
pub(crate) struct Machine<'a> {
    pub(crate) hypervisor: &'a dyn Hypervisor,
    pub(crate) config: &'a VmConfig,
    pub(crate) vm: &'a dyn Vm,
    pub(crate) threads: &'a VcpuThreads,
    /// A paravirtual guest has none.
    pub(crate) pc: Option<&'a Pc>,
    pub(crate) devices: Option<&'a Served>,
    pub(crate) ram: &'a GuestRam,
    pub(crate) session: &'a Session,
    pub(crate) line: Vec<u8>,
    /// Events of a paravirtual guest that wait to be taken.
    pub(crate) events: u32,
    /// What has changed since the snapshot that it is to be based on.
    pub(crate) changes: Option<&'a Changes>,
}

impl SnapshotOptions {
    pub(crate) fn are_given(&self) -> bool {
        self.snapshot_to.is_some() || self.restore_from.is_some()
    }

    pub(crate) fn is_lazy(&self) -> bool {
        self.restore_from.is_some() && self.restore_ram == RestoreRam::Lazy
    }

    /// Whether what a guest writes is followed.
    pub(crate) fn tracks_changes(&self) -> bool {
        self.snapshot_incremental
    }

    pub(crate) fn saves(&self) -> bool {
        self.snapshot_to.is_some()
    }

    /// Begins the snapshot, while the process may still open files.
    pub(crate) fn saving(&self) -> Result<Option<Saving>> {
        let Some(path) = &self.snapshot_to else { return Ok(None) };
        let writer = SnapshotWriter::create(path).context("--snapshot-to")?;
        Ok(Some(Saving { writer, packed: self.snapshot_packed, path: path.clone() }))
    }

    /// Opens the snapshot to go on from.
    pub(crate) fn restored(&self, has_pc: bool) -> Result<Option<Restored>> {
        let Some(path) = &self.restore_from else { return Ok(None) };
        let chain = Chain::open(&self.restore_base, path).context("--restore-from")?;
        if let Some(to) = self.snapshot_to.as_ref().filter(|_| self.snapshot_incremental) {
            chain.check_apart(to).context("--snapshot-incremental")?;
        }
        let mut restored = Restored::new(chain, self.restore_ram, has_pc).context("--restore-from")?;
        restored.tracks_changes = self.snapshot_incremental;
        Ok(Some(restored))
    }

    /// Starts the thread that stops the vCPUs when it is time for the snapshot; what tells that it is.
    pub(crate) fn moment(&self, stop: &Arc<StopSign>) -> Result<Arc<AtomicBool>> {
        let due = Arc::new(AtomicBool::new(false));
        if let Some(milliseconds) = self.snapshot_after {
            let (due, stop) = (Arc::clone(&due), Arc::clone(stop));
            let wait = move || {
                std::thread::sleep(Duration::from_millis(milliseconds));
                due.store(true, Ordering::SeqCst);
                stop.raise();
            };
            std::thread::Builder::new().name("snapshot".to_owned()).spawn(wait)?;
        }
        Ok(due)
    }
}

/// Waits for the end of the run. A snapshot that cannot be written is none: the program says why, and the guest goes on without.
///
/// `end_of` says what an exit is the end of, `save` saves, and `go_on` forgets that somebody wanted a snapshot, and lets devices go on.
pub(crate) fn run_or_save(
    threads: &VcpuThreads,
    saving: &mut Option<Saving>,
    end_of: impl Fn(Option<VcpuExit>) -> Result<End>,
    save: impl Fn(Saving) -> Result<()>,
    go_on: impl Fn() -> Result<()>,
) -> Result<End> {
    loop {
        let exit = threads.wait(None);
        // A vCPU that has stopped by itself does not go on.
        let can_go_on = exit.is_none();
        let end = end_of(exit);
        if !can_go_on || !matches!(end, Ok(End::Snapshot)) {
            return end;
        }
        match saving.take().map(&save) {
            Some(Ok(())) => return end,
            Some(Err(error)) => eprintln!("linux: --snapshot-to: {error:#}; the guest goes on without"),
            None => {}
        }
        go_on()?;
        threads.resume();
    }
}

impl Saving {
    /// Writes the machine, whose vCPUs and devices stand still afterwards. If it cannot, nothing is left of the file.
    pub(crate) fn finish(mut self, machine: Machine<'_>, watch: &Watch) -> Result<()> {
        let started = Instant::now();
        let Machine { hypervisor, config, vm, threads, pc, devices, ram, session, line, events, changes } =
            machine;
        let writer = &mut self.writer;
        threads.pause();
        // Nothing of the platform and its devices comes to a vCPU that has been saved.
        let (drained, carried) = devices.map(Served::pause).unwrap_or_default();
        let still = pc.map(Pc::still);
        let session = match session {
            // Its input is in the guest.
            Session::Command { line, .. } => Session::Command { line: line.clone(), input: None },
            other => other.clone(),
        };
        let known = KnownJson { session, heard: watch.heard(), line };
        writer.put("program", &Known { text: serde_json::to_string(&known)? })?;
        writer.put("vm/config", &config.resolve(hypervisor, vm)?)?;
        let mut moment = Moment { interrupts: events, drained, carried, ..Moment::default() };
        for index in threads.indices() {
            let name = format!("cpu/{index}");
            let state = threads.with_vcpu(index, |vcpu| {
                let state = vcpu.save()?;
                moment.add(vcpu, &state, ram);
                Ok::<_, vmm_cpu::Error>(state)
            });
            writer.put(&name, &state.flatten().with_context(|| name.clone())?)?;
        }
        writer.put("vm", &vm.save()?)?;
        if let Some(devices) = devices {
            devices.states()?.put(writer)?;
        }
        if let (Some(pc), Some(still)) = (pc, &still) {
            pc.state(still).put(writer)?;
        }
        // The process has confined itself to the threads that it has.
        let options = RamOptions::new().packed(self.packed).threads(NonZeroUsize::MIN);
        let stats = match changes {
            // Nothing writes RAM any more.
            Some(changes) => writer.put_ram(ram, &options.since(changes.base(), &changes.harvest()?))?,
            None => writer.put_ram(ram, &options)?,
        };
        let digest = self.writer.finish()?;
        eprintln!(
            "linux: {}: {} of {} pages, {:.1} MiB, in {:.3} s; digest {digest}",
            self.path.display(),
            stats.stored,
            stats.pages,
            stats.bytes as f64 / f64::from(1 << 20),
            started.elapsed().as_secs_f64()
        );
        eprintln!("linux: {SAVED}{moment}");
        Ok(())
    }
}

/// A machine that goes on from a snapshot: all that the snapshot has, and nothing else.
pub(crate) struct Restored {
    chain: Chain,
    how: RestoreRam,
    /// It is to be saved with what it has changed alone.
    tracks_changes: bool,
    pub(crate) session: Session,
    pub(crate) heard: Heard,
    pub(crate) config: VmConfig,
    pub(crate) line: Vec<u8>,
    pub(crate) vm: VmState,
    cpus: Vec<CpuState>,
    pc: Option<PcState>,
}

impl Restored {
    fn new(chain: Chain, how: RestoreRam, has_pc: bool) -> Result<Self> {
        let snapshot = chain.last();
        let Known { text } = snapshot.get("program")?;
        let KnownJson { session, heard, line } =
            serde_json::from_str(&text).context("the state \"program\"")?;
        let config: VmConfig = snapshot.get("vm/config")?;
        ensure!((1..=256).contains(&config.max_vcpus), "a machine of {} vCPUs", config.max_vcpus);
        let cpus = (0..config.max_vcpus).map(|index| snapshot.get(&format!("cpu/{index}")));
        Ok(Self {
            session,
            heard,
            line,
            vm: snapshot.get("vm")?,
            cpus: cpus.collect::<Result<_, _>>()?,
            pc: if has_pc { Some(PcState::get(snapshot)?) } else { None },
            config,
            chain,
            how,
            tracks_changes: false,
        })
    }

    /// Nothing of the snapshot is left.
    pub(crate) fn finish(&self) -> Result<()> {
        self.chain.last().finish().context("--restore-from")
    }

    /// Makes platform and devices what they were, if they are those that the snapshot has.
    pub(crate) fn machine(&self, pc: &Pc, devices: Option<&Served>, ram: &GuestRam) -> Result<()> {
        let snapshot = self.chain.last();
        let states = devices.map(|devices| devices.get(snapshot)).transpose();
        let states = states.and_then(|states| snapshot.finish().map(|()| states).map_err(Into::into));
        let states = states.context("--restore-from: other devices are given than it was saved with")?;
        pc.restore(self.pc.as_ref().context("a machine without a PC")?)?;
        if let (Some(devices), Some(states)) = (devices, states) {
            devices.restore(&states)?;
            devices.resume()?;
        }
        pc.renew_generation(ram)
    }

    pub(crate) fn ram(&self, load: impl FnOnce(u64) -> Result<GuestRam>) -> Result<GuestRam> {
        let (options, snapshot) = (RamOptions::new(), self.chain.last());
        let size = snapshot.ram_layout().map_or(0, |layout| layout.size());
        match self.how {
            RestoreRam::Map => Ok(snapshot.map_ram(self.tracks_changes, &options)?),
            RestoreRam::Load => {
                let ram = load(size)?;
                snapshot.load_ram(&ram, &options)?;
                Ok(ram)
            }
            RestoreRam::Lazy => Ok(GuestRam::builder().ram(size).track_dirty(self.tracks_changes).build()?),
        }
    }

    pub(crate) fn vm(&self, hypervisor: &dyn Hypervisor) -> Result<Arc<dyn Vm>> {
        Ok(hypervisor.restore_vm(&self.config, &self.vm)?)
    }

    pub(crate) fn vcpus(&self, vm: &dyn Vm) -> Result<Vec<Box<dyn Vcpu>>> {
        let restore = |(index, state)| vm.restore_vcpu(index, state).with_context(|| format!("cpu/{index}"));
        (0..).zip(&self.cpus).map(restore).collect()
    }

    /// Begins to follow what changes, if that is wanted, with RAM mapped, and before anything writes it.
    pub(crate) fn changes(&self, vm: &dyn Vm, ram: &GuestRam) -> Result<Option<Changes>> {
        let begin = || Changes::since(self.chain.last(), vm, ram).context("--snapshot-incremental");
        self.tracks_changes.then(begin).transpose()
    }

    /// Starts the thread that gives RAM as it is touched, if it is to come so. It ends with what is returned.
    pub(crate) fn give(&self, ram: &GuestRam) -> Result<Option<LazyRam>> {
        if self.how != RestoreRam::Lazy {
            return Ok(None);
        }
        let failed = |error: &SnapshotError| {
            // A vCPU that waits for its memory cannot be stopped.
            terminal::restore();
            eprintln!("linux: --restore-from: {error}");
            std::process::exit(VMM_FAILURE.into());
        };
        Ok(Some(self.chain.last().load_ram_lazily(ram, failed)?))
    }

    /// Starts the thread that checks RAM that is mapped, once it is told to, and stops the guest if it is not what was saved.
    pub(crate) fn check_beside(&self, watch: &Arc<Watch>) -> Result<Option<mpsc::Sender<()>>> {
        if self.how != RestoreRam::Map {
            return Ok(None);
        }
        let (snapshots, watch) = (self.chain.snapshots().cloned().collect::<Vec<_>>(), Arc::clone(watch));
        let (tell, told) = mpsc::channel();
        let check = move || {
            if told.recv().is_err() {
                return;
            }
            let options = RamOptions::new().threads(NonZeroUsize::MIN);
            if let Err(error) = snapshots.iter().try_for_each(|snapshot| snapshot.verify_ram(&options)) {
                watch.fail(format!("--restore-from: {error}"));
            }
        };
        std::thread::Builder::new().name("check".to_owned()).spawn(check)?;
        Ok(Some(tell))
    }
}
