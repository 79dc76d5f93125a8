//! What `Vcpu::run` and its callback add to a port-I/O exit, beside the same guest on bare `kvm-ioctls`.
//!
//! The guest is an endless `out dx, al; jmp`; a round is a fixed number of exits. Three VMs run in this process, in
//! rounds that take turns, so that drift of the machine meets all of them: one behind the traits and two on bare ioctls.
//! Two VMs of the very same kind can differ by tens of nanoseconds an exit for as long as they live, because of where
//! their pages came to lie. So the VMs are made anew many times, in every order, and the figure is the median over these
//! placements; the second bare VM shows how much of it is chance.
//!
//! The last line is `added_ns: N`, nanoseconds per exit. It informs and decides nothing.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_cpu::entry::real_mode_entry;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};
use vmm_cpu::vmm_memory::{GuestRam, GuestRegion};
use vmm_cpu::{CpuModel, Halt, Hypervisor, Vcpu, VcpuHandle, VcpuIo, Vm, VmConfig};

const ENTRY: u16 = 0x1000;
const PORT: u16 = 0x80;
/// `out 0x80, al; jmp` back to it.
const GUEST: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];

/// How often the VMs are made anew.
const PLACEMENTS: usize = 48;
/// Rounds of each VM at each placement.
const ROUNDS: usize = 600;
const EXITS: u32 = 50;

type Failure = Box<dyn std::error::Error>;

fn guest_ram() -> Result<GuestRam, Failure> {
    let ram = GuestRam::builder().ram(1 << 20).build()?;
    ram.memory().write_slice(&GUEST, GuestAddress(u64::from(ENTRY)))?;
    Ok(ram)
}

/// Counts the exits of a round. Time runs from the first to the last one, so that what begins and ends a
/// stay in `run` (a kick, a signal) is in neither side's figure.
#[derive(Default)]
struct Round {
    seen: u32,
    start: Option<Instant>,
    time: Duration,
}

impl Round {
    /// Counts one exit; whether it was the last.
    fn exit(&mut self, port: u16, data: &[u8]) -> bool {
        assert_eq!((port, data.len()), (PORT, 1));
        let start = *self.start.get_or_insert_with(Instant::now);
        let last = self.seen == EXITS;
        if last {
            self.time = start.elapsed();
        }
        self.seen += 1;
        last
    }
}

struct Counter {
    vcpu: Arc<dyn VcpuHandle>,
    round: Round,
}

impl VcpuIo for Counter {
    fn pio_write(&mut self, port: u16, _size: usize, data: &[u8]) {
        if self.round.exit(port, data) {
            self.vcpu.kick();
        }
    }
}

/// One of the VMs that are compared.
trait Subject {
    fn round(&mut self) -> Result<Duration, Failure>;
}

/// The VM behind the traits of this crate.
struct Traits {
    vcpu: Box<dyn Vcpu>,
    _vm: Arc<dyn Vm>,
}

impl Traits {
    fn new() -> Result<Self, Failure> {
        let vm = vmm_cpu::kvm::KvmHypervisor::open()?.create_vm(&VmConfig::new(CpuModel::Host))?;
        vm.map_ram(&guest_ram()?)?;
        let mut vcpu = vm.create_vcpu(0)?;
        real_mode_entry(0, ENTRY).apply(&mut *vcpu)?;
        Ok(Self { vcpu, _vm: vm })
    }
}

impl Subject for Traits {
    fn round(&mut self) -> Result<Duration, Failure> {
        let mut counter = Counter { vcpu: self.vcpu.handle(), round: Round::default() };
        let halt = self.vcpu.run(&mut counter)?;
        assert_eq!((halt, counter.round.seen), (Halt::Interrupted, EXITS + 1));
        Ok(counter.round.time)
    }
}

/// The peer: memory, vCPU and loop written straight on kvm-ioctls.
struct Bare {
    vcpu: VcpuFd,
    _vm: VmFd,
    _ram: GuestRam,
}

impl Bare {
    fn new() -> Result<Self, Failure> {
        let ram = guest_ram()?;
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.set_identity_map_address(0xfffb_c000)?;
        vm.set_tss_address(0xfffb_d000)?;
        for region in ram.regions() {
            map(&vm, &region)?;
        }
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        regs.rip = u64::from(ENTRY);
        vcpu.set_regs(&regs)?;
        Ok(Self { vcpu, _vm: vm, _ram: ram })
    }
}

impl Subject for Bare {
    fn round(&mut self) -> Result<Duration, Failure> {
        let mut round = Round::default();
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(port, data) => {
                    if round.exit(port, data) {
                        return Ok(round.time);
                    }
                }
                exit => return Err(format!("unexpected exit {exit:?}").into()),
            }
        }
    }
}

#[allow(unsafe_code, reason = "the peer maps its memory by hand, as programs on bare kvm-ioctls do")]
fn map(vm: &VmFd, region: &GuestRegion) -> Result<(), Failure> {
    let slot = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the region's mapping is as long as the slot and outlives the VM: `Bare` drops it last.
    unsafe { vm.set_user_memory_region(slot) }?;
    Ok(())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

fn ns_per_exit(round: Duration) -> f64 {
    round.as_secs_f64() * 1e9 / f64::from(EXITS)
}

/// Medians at one placement, in nanoseconds per exit.
struct Placement {
    traits: f64,
    ioctls: f64,
    /// Traits less bare ioctls, and one bare VM less the other, each within its round.
    added: f64,
    control: f64,
}

/// `order` is a permutation of the three VMs: in which order they are made.
fn measure(order: [usize; 3]) -> Result<Placement, Failure> {
    let mut subjects: [Option<Box<dyn Subject>>; 3] = [None, None, None];
    for which in order {
        let subject: Box<dyn Subject> =
            if which == 0 { Box::new(Traits::new()?) } else { Box::new(Bare::new()?) };
        *subjects.get_mut(which).ok_or("no such VM")? = Some(subject);
    }
    let [Some(mut traits), Some(mut bare), Some(mut other)] = subjects else {
        return Err("an order that leaves a VM out".into());
    };
    let mut rounds = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + 10 {
        // Whoever runs later may find the machine in another state: take turns, the pair that counts as well as the
        // control.
        let mut times = [0.0; 3];
        let mut turn: [(usize, &mut dyn Subject); 3] = [(0, &mut *traits), (1, &mut *bare), (2, &mut *other)];
        turn.rotate_left(round % 3);
        if round / 3 % 2 == 1 {
            turn.reverse();
        }
        for (which, subject) in turn {
            if let Some(time) = times.get_mut(which) {
                *time = ns_per_exit(subject.round()?);
            }
        }
        // The first rounds find everything cold.
        if round >= 10 {
            rounds.push(times);
        }
    }
    let over = |figure: fn(&[f64; 3]) -> f64| median(rounds.iter().map(figure).collect());
    Ok(Placement {
        traits: over(|[traits, _, _]| *traits),
        ioctls: over(|[_, bare, other]| f64::midpoint(*bare, *other)),
        added: over(|[traits, bare, other]| traits - f64::midpoint(*bare, *other)),
        control: over(|[_, bare, other]| bare - other),
    })
}

fn measure_all() -> Result<Vec<Placement>, Failure> {
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [1, 0, 2], [0, 2, 1]];
    ORDERS.into_iter().cycle().take(PLACEMENTS).map(measure).collect()
}

/// Median and the quartiles around it.
fn spread(figures: Vec<f64>) -> String {
    let mut sorted = figures.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |quarter: usize| sorted.get(sorted.len() * quarter / 4).copied().unwrap_or(0.0);
    format!("{:.1} ns (quartiles {:.1} to {:.1})", median(figures), at(1), at(3))
}

fn main() -> ExitCode {
    if let Err(error) = vmm_cpu::open_backend("kvm") {
        println!("skipped: {error}");
        return ExitCode::SUCCESS;
    }
    match measure_all() {
        Ok(placements) => {
            let over = |figure: fn(&Placement) -> f64| placements.iter().map(figure).collect::<Vec<_>>();
            println!(
                "{PLACEMENTS} placements of 3 VMs, {ROUNDS} rounds of {EXITS} exits each; medians per exit"
            );
            println!("Vcpu::run:            {}", spread(over(|at| at.traits)));
            println!("kvm-ioctls:           {}", spread(over(|at| at.ioctls)));
            println!("control, bare - bare: {}", spread(over(|at| at.control)));
            println!("added:                {}", spread(over(|at| at.added)));
            println!("added_ns: {:.1}", median(over(|at| at.added)));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("exit_overhead: {error}");
            ExitCode::FAILURE
        }
    }
}
