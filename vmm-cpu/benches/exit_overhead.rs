//! What `Vcpu::run` and its callback add to a port-I/O exit, beside the same guest on bare `kvm-ioctls`.
//!
//! Both run in this process, in rounds that alternate, so that drift of the machine meets both. The guest is an endless
//! `out dx, al; jmp`; a round is a fixed number of exits. The last line is `added_ns: N`: nanoseconds per exit, the
//! median of the differences within each pair of rounds. It informs and decides nothing.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_cpu::entry::real_mode_entry;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};
use vmm_cpu::vmm_memory::{GuestRam, GuestRegion};
use vmm_cpu::{CpuModel, Halt, Hypervisor, Vcpu, VcpuHandle, VcpuIo, VmConfig};

const ENTRY: u16 = 0x1000;
const PORT: u16 = 0x80;
/// `out 0x80, al; jmp` back to it.
const GUEST: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];

const ROUNDS: usize = 40_000;
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

fn through_the_traits(vcpu: &mut dyn Vcpu) -> Result<Duration, Failure> {
    let mut counter = Counter { vcpu: vcpu.handle(), round: Round::default() };
    let halt = vcpu.run(&mut counter)?;
    assert_eq!((halt, counter.round.seen), (Halt::Interrupted, EXITS + 1));
    Ok(counter.round.time)
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

/// Nanoseconds per exit through the traits and through bare ioctls, one pair per round.
fn measure() -> Result<Vec<(f64, f64)>, Failure> {
    let hypervisor = vmm_cpu::kvm::KvmHypervisor::open()?;
    let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host))?;
    let ram = guest_ram()?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    real_mode_entry(0, ENTRY).apply(&mut *vcpu)?;
    let mut bare = Bare::new()?;
    let mut pairs = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + 10 {
        // The second of a pair may find the machine in another state than the first: take turns.
        let (traits, ioctls) = if round % 2 == 0 {
            let first = through_the_traits(&mut *vcpu)?;
            (first, bare.round()?)
        } else {
            let first = bare.round()?;
            (through_the_traits(&mut *vcpu)?, first)
        };
        // The first rounds find everything cold.
        if round >= 10 {
            pairs.push((ns_per_exit(traits), ns_per_exit(ioctls)));
        }
    }
    Ok(pairs)
}

fn main() -> ExitCode {
    if let Err(error) = vmm_cpu::open_backend("kvm") {
        println!("skipped: {error}");
        return ExitCode::SUCCESS;
    }
    match measure() {
        Ok(pairs) => {
            println!("{ROUNDS} pairs of rounds of {EXITS} exits; medians per exit");
            println!("Vcpu::run:   {:.1} ns", median(pairs.iter().map(|pair| pair.0).collect()));
            println!("kvm-ioctls:  {:.1} ns", median(pairs.iter().map(|pair| pair.1).collect()));
            println!("added_ns: {:.1}", median(pairs.iter().map(|pair| pair.0 - pair.1).collect()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("exit_overhead: {error}");
            ExitCode::FAILURE
        }
    }
}
