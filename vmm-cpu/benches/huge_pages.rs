//! What a guest's access to memory costs by what the memory is made of: pages of 4 KiB, transparent huge pages, huge pages of
//! the host's pools.
//!
//! On each backend, a guest at privilege level 3 adds to a word of each page of a large region, twice: the first time the host
//! has no memory for the pages yet, the second time it has. Then it jumps about in the region, where TLBs count. What the
//! monitor does beside that, mapping and prefaulting the region on all processors, has figures of its own.
//!
//! Each figure is the median of a few machines, which take turns. It informs and decides nothing. Huge pages are added to the
//! host's pools for the time of the measurement, which takes root.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, qword_ptr, rax, rbx, rcx};
use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{Backing, GuestRam, HugePageSize, RegionConfig, ReservedHugePages};
use vmm_cpu::{CpuModel, Halt, Vcpu, VcpuHandle, VcpuIo, VmConfig, open_backend};

const CODE: u64 = 0x1_0000;
const PAGE_TABLES: u64 = 0x4000;
const REGION: u64 = 1 << 30;
const SIZE: u64 = 512 << 20;
const PAGE: u64 = 4096;
const PAGES: u64 = SIZE / PAGE;
/// Accesses of the guest that jumps about.
const JUMPS: u64 = 1 << 20;
const RUNS: usize = 5;

type Failure = Box<dyn std::error::Error>;

/// What the region is made of.
#[derive(Clone, Copy)]
enum Kind {
    Small,
    Transparent,
    Pool(HugePageSize),
}

impl Kind {
    fn name(self) -> String {
        match self {
            Self::Small => "4 KiB".to_owned(),
            Self::Transparent => "transparent".to_owned(),
            Self::Pool(size) => format!("pool, {size}"),
        }
    }

    fn region(self) -> RegionConfig {
        let bytes = if let Self::Pool(size) = self { SIZE.next_multiple_of(size.bytes()) } else { SIZE };
        let region = RegionConfig::new(GuestAddress(REGION), bytes);
        match self {
            Self::Small => region.huge_pages(false),
            Self::Transparent => region,
            Self::Pool(page_size) => region.backing(Backing::HugeTlb { page_size }),
        }
    }

    /// Pages for one region at a time, if they are from a pool.
    fn reserve(self) -> Result<Option<ReservedHugePages>, Failure> {
        let Self::Pool(size) = self else { return Ok(None) };
        Ok(Some(ReservedHugePages::reserve(size, SIZE.div_ceil(size.bytes()))?))
    }
}

/// Sweeps over the region twice and then jumps about; OUT ends each part.
fn guest() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    for _ in 0..2 {
        let mut again = a.create_label();
        a.mov(rbx, REGION)?;
        a.mov(rcx, PAGES)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rbx))?;
        a.add(rbx, i32::try_from(PAGE).unwrap_or(0))?;
        a.dec(rcx)?;
        a.jnz(again)?;
        a.out(0x80, al)?;
    }
    let mut again = a.create_label();
    a.mov(rax, 1_u64)?;
    a.mov(rcx, JUMPS)?;
    a.set_label(&mut again)?;
    a.imul_3(rax, rax, 0x0019_660d)?;
    a.add(rax, 0x3c6e_f35f)?;
    a.mov(rbx, rax)?;
    a.and(rbx, i32::try_from(SIZE - 8).unwrap_or(0))?;
    a.inc(qword_ptr(rbx + i32::try_from(REGION).unwrap_or(0)))?;
    a.dec(rcx)?;
    a.jnz(again)?;
    a.out(0x80, al)?;
    a.hlt()?;
    a.assemble(CODE)
}

/// Ends the run at an OUT.
struct End(Arc<dyn VcpuHandle>);

impl VcpuIo for End {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        self.0.kick();
    }
}

/// 64-bit mode at privilege level 3, with the first 2 GiB mapped one to one in pages of 2 MiB, and the right to use ports.
fn enter(vcpu: &mut dyn Vcpu, ram: &GuestRam) -> Result<(), Failure> {
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let memory = ram.memory();
    let [pml4, pdpt, directories] = [0, 1, 2].map(|table| PAGE_TABLES + table * PAGE);
    memory.write_obj(pdpt | PRESENT_WRITABLE_USER, GuestAddress(pml4))?;
    for gib in 0..2 {
        memory.write_obj((directories + gib * PAGE) | PRESENT_WRITABLE_USER, GuestAddress(pdpt + gib * 8))?;
    }
    for entry in 0..1024 {
        memory
            .write_obj(entry << 21 | LARGE | PRESENT_WRITABLE_USER, GuestAddress(directories + entry * 8))?;
    }
    let now = vcpu.system_registers()?;
    let data = Segment { dpl: 3, ..Segment::data32(0x2b) };
    vcpu.set_system_registers(&SystemRegisters {
        cs: Segment { dpl: 3, ..Segment::code64(0x33) },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(0x18, 0),
        ldtr: Segment::null(),
        cr0: SystemRegisters::CR0_PE | SystemRegisters::CR0_ET | SystemRegisters::CR0_PG,
        cr3: PAGE_TABLES,
        cr4: SystemRegisters::CR4_PAE,
        efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
        cr8: now.cr8,
        apic_base: now.apic_base,
        ..SystemRegisters::at_reset()
    })?;
    vcpu.set_registers(&GeneralRegisters { rip: CODE, rflags: 0x3002, ..GeneralRegisters::default() })?;
    Ok(())
}

/// Nanoseconds: a page of each of two sweeps, and a jump.
fn guest_figures(backend: &str, kind: Kind) -> Result<[f64; 3], Failure> {
    let ram = GuestRam::builder().ram(2 << 20).region(kind.region()).build()?;
    ram.memory().write_slice(&guest()?, GuestAddress(CODE))?;
    let vm = open_backend(backend)?.create_vm(&VmConfig::new(CpuModel::Host))?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    enter(&mut *vcpu, &ram)?;
    let mut figures = [0.0; 3];
    for (figure, accesses) in figures.iter_mut().zip([PAGES, PAGES, JUMPS]) {
        let mut io = End(vcpu.handle());
        let start = Instant::now();
        let halt = vcpu.run(&mut io)?;
        *figure = nanoseconds(start.elapsed()) / accesses as f64;
        assert_eq!(halt, Halt::Interrupted);
    }
    let word: u64 = ram.memory().read_obj(GuestAddress(REGION + SIZE - PAGE))?;
    assert!(word >= 2, "{word}");
    Ok(figures)
}

/// Milliseconds: mapping the region, and making it resident.
fn monitor_figures(kind: Kind) -> Result<[f64; 2], Failure> {
    let start = Instant::now();
    let ram = GuestRam::builder().region(kind.region()).build()?;
    let mapped = start.elapsed();
    ram.prefault(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))?;
    Ok([mapped, start.elapsed() - mapped].map(|time| nanoseconds(time) / 1e6))
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

fn medians<const N: usize>(runs: &[[f64; N]]) -> [f64; N] {
    let mut medians = [0.0; N];
    for (at, median) in medians.iter_mut().enumerate() {
        let mut figures: Vec<f64> = runs.iter().filter_map(|run| run.get(at).copied()).collect();
        figures.sort_by(f64::total_cmp);
        *median = figures.get(figures.len() / 2).copied().unwrap_or_default();
    }
    medians
}

fn measure(backend: Option<&str>) -> Result<(), Failure> {
    let kinds =
        [Kind::Small, Kind::Transparent, Kind::Pool(HugePageSize::TwoMib), Kind::Pool(HugePageSize::OneGib)];
    let mut guests = [const { Vec::new() }; 4];
    let mut monitors = [const { Vec::new() }; 4];
    for _ in 0..RUNS {
        for ((kind, guests), monitors) in kinds.into_iter().zip(&mut guests).zip(&mut monitors) {
            let Ok(_pages) = kind.reserve() else { continue };
            match backend {
                Some(backend) => guests.push(guest_figures(backend, kind)?),
                None => monitors.push(monitor_figures(kind)?),
            }
        }
    }
    for ((kind, guests), monitors) in kinds.into_iter().zip(&guests).zip(&monitors) {
        let name = kind.name();
        if guests.is_empty() && monitors.is_empty() {
            println!("{name:12} skipped: no such pages to be had");
        } else if backend.is_some() {
            let [first, second, jump] = medians(guests);
            println!("{name:12} {first:9.1} {second:9.1} {jump:9.1}");
        } else {
            let [map, prefault] = medians(monitors);
            println!("{name:12} {map:9.2} {prefault:9.1}");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    println!("{} MiB, medians of {RUNS}", SIZE >> 20);
    println!("\nmonitor      map, ms  prefault, ms");
    let mut result = measure(None);
    for backend in ["kvm", "translate"] {
        match open_backend(backend) {
            Err(error) => println!("\n{backend}: skipped: {error}"),
            Ok(_) if result.is_ok() => {
                println!("\n{backend}: ns a page at first touch, again, ns a jump");
                result = measure(Some(backend));
            }
            Ok(_) => {}
        }
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("huge_pages: {error}");
            ExitCode::FAILURE
        }
    }
}
