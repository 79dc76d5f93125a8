//! A guest that is saved at any moment, over and over, and goes on in machines made anew, ends as one that nobody disturbed.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use vmm_memory::boot::KernelImage;
use vmm_memory::snapshot::{RamOptions, Snapshot, SnapshotWriter};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

use super::guest::{RAM, expected, furnish, kernel, ticks};
use crate::cpuid::CpuModel;
use crate::error::Error;
use crate::hypervisor::{Hypervisor, VmConfig};
use crate::state::{CpuState, VmState};
use crate::vcpu::{EmptyBus, Halt, VcpuIo};
use crate::vm::Vm as _;
use crate::xen_pv::abi::sched::ShutdownReason;
use crate::xen_pv::builder::PvBoot;
use crate::xen_pv::{ConsoleSink, ConsoleSource, DomainDevices, NAME, XenPvHypervisor, XenPvVm};
use crate::{Result, VcpuThreads};

#[derive(Debug)]
pub(super) struct Printed(pub(super) Sender<Vec<u8>>);

impl ConsoleSink for Printed {
    fn write(&mut self, _: ConsoleSource, bytes: &[u8]) {
        self.0.send(bytes.to_vec()).unwrap();
    }
}

/// A saved machine.
pub(super) struct Saved {
    pub(super) ram: GuestRam,
    pub(super) vm: VmState,
    pub(super) vcpus: Vec<CpuState>,
}

/// One that lives.
pub(super) struct Life {
    pub(super) vm: Arc<XenPvVm>,
    pub(super) threads: VcpuThreads,
    pub(super) printed: Receiver<Vec<u8>>,
}

/// The backends below, each without and with a shim.
pub(super) fn engines() -> Vec<(&'static str, Arc<dyn Hypervisor>, bool)> {
    let mut engines = Vec::new();
    for name in crate::backend_names().iter().filter(|name| **name != NAME) {
        match crate::open_backend(name) {
            Ok(backend) => {
                let backend: Arc<dyn Hypervisor> = Arc::from(backend);
                engines.push((*name, Arc::clone(&backend), false));
                engines.push((*name, backend, true));
            }
            Err(error) => println!("skipped on {name}: {error}"),
        }
    }
    engines
}

/// Copies what there is in the RAM: another process would have no more.
fn copied(from: &GuestRam) -> GuestRam {
    let size = from.size();
    let to = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), size)).build().unwrap();
    let mut chunk = vec![0; 1 << 16];
    for start in (0..size).step_by(chunk.len()) {
        from.memory().read_slice(&mut chunk, GuestAddress(start)).unwrap();
        if chunk.iter().any(|byte| *byte != 0) {
            to.memory().write_slice(&chunk, GuestAddress(start)).unwrap();
        }
    }
    to
}

fn config(vcpus: u32) -> VmConfig {
    VmConfig::new(CpuModel::Host).vcpus(vcpus)
}

impl Life {
    pub(super) fn first(below: &Arc<dyn Hypervisor>, shim: bool, vcpus: u32) -> Self {
        let (elf, second) = kernel(vcpus);
        let image = KernelImage::parse(&elf).unwrap();
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), RAM)).build().unwrap();
        let (sender, printed) = channel();
        let devices = DomainDevices::default().console(Printed(sender));
        let hypervisor = XenPvHypervisor::new(Arc::clone(below)).unwrap().shim(shim);
        let vm = hypervisor.create_domain(&config(vcpus), &ram, devices).unwrap();
        let entry = vm.boot(&PvBoot::new(&image).unwrap()).unwrap();
        furnish(&ram, &entry, second);
        let all = (0..vcpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>>>().unwrap();
        let threads = VcpuThreads::spawn(all.into_iter().map(|vcpu| (vcpu, bus())).collect()).unwrap();
        Self { vm, threads, printed }
    }

    pub(super) fn next(below: &Arc<dyn Hypervisor>, shim: bool, saved: &Saved) -> Result<Self> {
        Self::next_with(below, shim, &config(u32::try_from(saved.vcpus.len()).unwrap()), saved)
    }

    fn next_with(below: &Arc<dyn Hypervisor>, shim: bool, config: &VmConfig, saved: &Saved) -> Result<Self> {
        let (sender, printed) = channel();
        let devices = DomainDevices::default().console(Printed(sender));
        let hypervisor = XenPvHypervisor::new(Arc::clone(below))?.shim(shim);
        let vm = hypervisor.restore_domain(config, &saved.ram, devices, &saved.vm)?;
        let all = (0..)
            .zip(&saved.vcpus)
            .map(|(index, state)| vm.restore_vcpu(index, state))
            .collect::<Result<Vec<_>>>()?;
        let threads = VcpuThreads::spawn(all.into_iter().map(|vcpu| (vcpu, bus())).collect())?;
        Ok(Self { vm, threads, printed })
    }

    /// Lets it run for a while; whether it ended.
    pub(super) fn live(&self, for_a_while: Duration) -> bool {
        self.threads.resume();
        let end = self.threads.wait(Some(for_a_while));
        self.threads.pause();
        if let Some(exit) = end.or_else(|| self.threads.wait(Some(Duration::ZERO))) {
            assert_eq!(exit.reason.unwrap(), Halt::Shutdown);
            assert_eq!(self.vm.shutdown_reason(), Some(ShutdownReason::PowerOff));
            return true;
        }
        false
    }

    pub(super) fn save(&self) -> Saved {
        let vcpus = self.threads.indices();
        Saved {
            ram: copied(&self.vm.ram().unwrap()),
            vm: self.vm.save().unwrap(),
            vcpus: vcpus
                .into_iter()
                .map(|index| self.threads.with_vcpu(index, |vcpu| vcpu.save().unwrap()).unwrap())
                .collect(),
        }
    }

    fn printed(&self) -> Vec<u8> {
        self.printed.try_iter().flatten().collect()
    }
}

pub(super) fn bus() -> Box<dyn VcpuIo + Send> {
    Box::new(EmptyBus)
}

/// Numbers that look random.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Lives of up to so many microseconds, each on the engine that `next` chooses.
fn many_lives(
    first: &(&str, Arc<dyn Hypervisor>, bool),
    vcpus: u32,
    longest: u64,
    next: &dyn Fn(u32) -> (Arc<dyn Hypervisor>, bool),
) {
    let (name, below, shim) = first;
    let mut random = Random(u64::from(vcpus) + longest);
    let mut life = Life::first(below, *shim, vcpus);
    let (mut lives, mut printed) = (1, Vec::new());
    let mut times = Vec::new();
    // After so many it may end in peace.
    let mut while_it_lives = |lives: u32| {
        if lives < 40 { Duration::from_micros(random.below(longest)) } else { Duration::from_secs(120) }
    };
    while !life.live(while_it_lives(lives)) {
        let saved = life.save();
        let time = life.vm.clock().unwrap().now().unwrap();
        printed.extend(life.printed());
        drop(life);
        let (below, shim) = next(lives);
        life = Life::next(&below, shim, &saved).unwrap();
        let after = life.vm.clock().unwrap().now().unwrap();
        times.push(after.saturating_sub(saved.vm.clock.unwrap().guest_ns));
        assert!(after + 1_000_000 >= saved.vm.clock.unwrap().guest_ns, "{time} and then {after}");
        lives += 1;
        assert!(lives <= 40, "it comes no further");
    }
    printed.extend(life.printed());
    let ticks = ticks(&life.vm.ram().unwrap());
    println!("{name}, shim {shim}, {vcpus} vCPUs: {lives} lives, {ticks} ticks");
    assert_eq!(printed, expected(vcpus), "{name}, shim {shim}, {vcpus} vCPUs, after {lives} lives");
    assert!(ticks >= 48, "it waited for that many");
}

#[test]
fn an_undisturbed_guest_has_the_expected_result() {
    for engine in engines() {
        for vcpus in [1, 2] {
            let life = Life::first(&engine.1, engine.2, vcpus);
            assert!(life.live(Duration::from_secs(120)));
            assert_eq!(life.printed(), expected(vcpus), "{}, shim {}, {vcpus} vCPUs", engine.0, engine.2);
        }
    }
}

#[test]
fn a_guest_of_many_lives_ends_as_one_of_one() {
    for engine in engines() {
        for vcpus in [1, 2] {
            let same = (Arc::clone(&engine.1), engine.2);
            many_lives(&engine, vcpus, 20_000, &|_| same.clone());
        }
    }
}

/// What tells the second process of a test where the snapshot is.
const SNAPSHOT: &str = "XEN_PV_SNAPSHOT";

#[test]
fn a_guest_goes_on_in_another_process() {
    for (name, below, shim) in engines() {
        let life = Life::first(&below, shim, 2);
        assert!(!life.live(Duration::from_millis(10)), "too short a guest");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guest");
        let hypervisor = XenPvHypervisor::new(Arc::clone(&below)).unwrap();
        let mut writer = SnapshotWriter::create(&path).unwrap();
        writer.put("config", &config(2).resolve(&hypervisor, &*life.vm).unwrap()).unwrap();
        writer.put("vm", &life.vm.save().unwrap()).unwrap();
        for index in 0..2 {
            let state = life.threads.with_vcpu(index, |vcpu| vcpu.save().unwrap()).unwrap();
            writer.put(&format!("cpu/{index}"), &state).unwrap();
        }
        writer.put_ram(&life.vm.ram().unwrap(), &RamOptions::new()).unwrap();
        writer.finish().unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture"])
            .arg(concat!(module_path!(), "::the_second_process").split_once("::").unwrap().1)
            .env(SNAPSHOT, format!("{} {name} {shim}", path.display()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let result = format!("printed {:02x?}", expected(2));
        assert!(
            text.contains(&result),
            "{name}, shim {shim}: {text} {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
#[ignore = "the second process of a_guest_goes_on_in_another_process"]
fn the_second_process() {
    let Ok(task) = std::env::var(SNAPSHOT) else { return };
    let [path, name, shim] = task.split(' ').collect::<Vec<_>>()[..] else { panic!("{task}") };
    let snapshot = Snapshot::open(path).unwrap();
    let config: VmConfig = snapshot.get("config").unwrap();
    let state: VmState = snapshot.get("vm").unwrap();
    let vcpus: Vec<CpuState> = (0..2).map(|index| snapshot.get(&format!("cpu/{index}")).unwrap()).collect();
    snapshot.finish().unwrap();
    let ram = snapshot.map_ram(false, &RamOptions::new()).unwrap();
    let below: Arc<dyn Hypervisor> = Arc::from(crate::open_backend(name).unwrap());
    let saved = Saved { ram, vm: state, vcpus };
    let life = Life::next_with(&below, shim == "true", &config, &saved).unwrap();
    assert!(life.live(Duration::from_secs(120)));
    println!("printed {:02x?}", life.printed());
}

/// Whether there is a shim is nothing that a guest sees.
#[test]
fn a_guest_goes_on_with_and_without_a_shim() {
    for engine in engines().into_iter().filter(|engine| !engine.2) {
        let below = Arc::clone(&engine.1);
        many_lives(&engine, 2, 20_000, &|life| (Arc::clone(&below), life % 2 == 1));
    }
}

/// Where another engine cannot have what the guest was told of, it says what that is; else the guest goes on there.
#[test]
fn another_backend_takes_a_guest_or_says_why_not() {
    let engines = engines();
    for (from, to) in engines.iter().flat_map(|from| engines.iter().map(move |to| (from, to))) {
        if from.0 == to.0 || from.2 != to.2 {
            continue;
        }
        let life = Life::first(&from.1, from.2, 1);
        assert!(!life.live(Duration::from_millis(5)), "too short a guest");
        let saved = life.save();
        drop(life);
        match Life::next(&to.1, to.2, &saved) {
            Ok(life) => {
                println!("from {} to {}: goes on", from.0, to.0);
                assert!(life.live(Duration::from_secs(120)));
                assert_eq!(life.printed(), expected(1), "from {} to {}", from.0, to.0);
            }
            Err(error @ Error::InvalidState { element, .. }) => {
                println!("from {} to {}: {error}", from.0, to.0);
                let known = ["backend.cpuid", "backend.compatibility_mode", "system.xcr0", "xsave"];
                assert!(known.contains(&element), "{error}");
            }
            Err(error) => panic!("{error}"),
        }
        // Nothing was lost by the attempt.
        let life = Life::next(&from.1, from.2, &saved).unwrap();
        assert!(life.live(Duration::from_secs(120)));
        assert_eq!(life.printed(), expected(1), "again on {}", from.0);
    }
}
