//! What a store costs that goes to the page of the code that runs, with the `translate` backend.
//!
//! Each guest is a loop that counts in memory. It is executed as a kernel and as a user program, interpreted and translated;
//! what differs is where the counter lies:
//!
//! - `apart`: in another page, where no code is. What all else is to be compared with;
//! - `beside`: in the page of the loop, far from it;
//! - `behind`: right behind the last instruction of the loop;
//! - `stack`: nowhere; the loop calls a function that lies on the stack, as trampolines do;
//! - `within`: it is a part of an instruction of the loop, which runs once for each change.
//!
//! Each figure is nanoseconds for one round of the loop, the median of a few runs. It informs and decides nothing.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, rax, rbx, rcx, rdx};
use iced_x86::{BlockEncoderOptions, IcedError};
use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::translate::{TranslateHypervisor, TranslateOptions};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{Backing, GuestRam};
use vmm_cpu::{CpuModel, Halt, Hypervisor, Vcpu, VcpuHandle, VcpuIo, VmConfig};

/// The page of the loop; the guest's addresses are its guest-physical ones.
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
/// Top of the stack, whose page has room for a function below its middle.
const STACK: u64 = 0x3_1000;
const FUNCTION: u64 = STACK - 0x800;
const PAGE_TABLES: u64 = 0x4000;

/// Where ADD of a register has its immediate.
const IMMEDIATE: u64 = 3;

/// Rounds of the loop before the first measurement, and runs.
const WARM_UP: u64 = 20_000;
const RUNS: usize = 5;
const ENOUGH: Duration = Duration::from_millis(100);

type Failure = Box<dyn std::error::Error>;

/// Where the counter lies.
#[derive(Clone, Copy)]
enum Place {
    At(u64),
    Behind,
    Stack,
    Within,
}

/// The loop, of RCX rounds, and the address of its counter, if it has one. OUT ends it.
fn guest(place: Place) -> Result<(Vec<u8>, Option<u64>), IcedError> {
    let mut counter = DATA;
    loop {
        let mut a = CodeAssembler::new(64)?;
        let (mut again, mut within) = (a.create_label(), a.create_label());
        a.mov(rdx, FUNCTION)?;
        a.set_label(&mut again)?;
        match place {
            Place::Stack => a.call(rdx)?,
            _ => a.inc(dword_ptr(counter))?,
        }
        a.set_label(&mut within)?;
        a.add(rbx, 0x100_0000)?;
        a.dec(rcx)?;
        a.jnz(again)?;
        a.out(0x80, al)?;
        a.hlt()?;
        let code = a.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let within = code.label_ip(&within)? + IMMEDIATE;
        let code = code.inner.code_buffer;
        let wanted = match place {
            Place::At(at) => at,
            Place::Behind => CODE + code.len() as u64,
            Place::Within => within,
            Place::Stack => return Ok((code, None)),
        };
        // All addresses have the same length.
        if wanted == counter {
            return Ok((code, Some(counter)));
        }
        counter = wanted;
    }
}

fn function() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.inc(rax)?;
    a.ret()?;
    a.assemble(FUNCTION)
}

/// Ends a run at the guest's OUT.
struct End(Arc<dyn VcpuHandle>);

impl VcpuIo for End {
    fn pio_write(&mut self, _: u16, _: usize, _: &[u8]) {
        self.0.kick();
    }
}

/// 64-bit mode with 2 MiB mapped one to one for all levels.
fn registers(level: u8) -> (GeneralRegisters, SystemRegisters) {
    let selector = |index: u16| index << 3 | u16::from(level);
    let data = Segment { dpl: level, ..Segment::data32(selector(2)) };
    let system = SystemRegisters {
        cs: Segment { dpl: level, ..Segment::code64(selector(1)) },
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
        ..SystemRegisters::at_reset()
    };
    // With an I/O privilege level that lets programs do OUT.
    let general = GeneralRegisters { rsp: STACK, rflags: 0x3002, ..GeneralRegisters::default() };
    (general, system)
}

/// A vCPU that runs the loop.
struct Guest {
    vcpu: Box<dyn Vcpu>,
    ram: GuestRam,
    level: u8,
    counter: Option<u64>,
}

impl Guest {
    fn new(options: TranslateOptions, place: Place, level: u8) -> Result<Self, Failure> {
        let ram = GuestRam::builder().ram(2 << 20).backing(Backing::Memfd).build()?;
        let memory = ram.memory();
        for table in 0..3 {
            let at = PAGE_TABLES + table * 0x1000;
            // The last is a large page.
            let entry = if table == 2 { 0x87 } else { at + 0x1000 + 7 };
            memory.write_obj(entry, GuestAddress(at))?;
        }
        let (code, counter) = guest(place)?;
        memory.write_slice(&code, GuestAddress(CODE))?;
        memory.write_slice(&function()?, GuestAddress(FUNCTION))?;
        let vm = TranslateHypervisor::with_options(options).create_vm(&VmConfig::new(CpuModel::Host))?;
        vm.map_ram(&ram)?;
        Ok(Self { vcpu: vm.create_vcpu(0)?, ram, level, counter })
    }

    /// How many rounds there were.
    fn counted(&mut self) -> Result<u64, Failure> {
        match self.counter {
            Some(counter) => Ok(self.ram.memory().read_obj::<u32>(GuestAddress(counter))?.into()),
            None => Ok(self.vcpu.registers()?.rax),
        }
    }

    /// How long so many rounds take.
    fn run(&mut self, rounds: u64) -> Result<Duration, Failure> {
        let (general, mut system) = registers(self.level);
        (system.cr8, system.apic_base) = {
            let now = self.vcpu.system_registers()?;
            (now.cr8, now.apic_base)
        };
        self.vcpu.set_system_registers(&system)?;
        self.vcpu.set_registers(&GeneralRegisters { rip: CODE, rcx: rounds, ..general })?;
        let before = self.counted()?;
        let mut io = End(self.vcpu.handle());
        let start = Instant::now();
        let halt = self.vcpu.run(&mut io)?;
        let time = start.elapsed();
        assert_eq!(halt, Halt::Interrupted);
        assert_eq!((self.counted()? - before) & 0xffff_ffff, rounds & 0xffff_ffff);
        Ok(time)
    }

    /// Nanoseconds for a round; after one short run, if it need not be exact.
    fn measure(&mut self, exact: bool) -> Result<f64, Failure> {
        let mut rounds = WARM_UP;
        self.run(rounds)?;
        while exact && self.run(rounds)? < ENOUGH {
            rounds *= 2;
        }
        let mut times = Vec::new();
        for _ in 0..RUNS {
            times.push(self.run(rounds)?.as_secs_f64() * 1e9 / rounds as f64);
        }
        times.sort_by(f64::total_cmp);
        Ok(times.get(RUNS / 2).copied().unwrap_or_default())
    }
}

fn report(exact: bool) -> Result<(), Failure> {
    let places = [
        ("apart", Place::At(DATA)),
        ("beside", Place::At(CODE + 0x800)),
        ("behind", Place::Behind),
        ("stack", Place::Stack),
        ("within", Place::Within),
    ];
    println!("{:8} {:>20} {:>20}", "ns", "kernel", "program");
    println!("{:8} {:>10}{:>10} {:>10}{:>10}", "", "interp.", "transl.", "interp.", "transl.");
    for (name, place) in places {
        print!("{name:8} ");
        for level in [0, 3] {
            for after in [None, Some(2)] {
                let options = TranslateOptions::default().translate_after(after);
                let time = Guest::new(options, place, level)?.measure(exact)?;
                print!("{time:>10.2}");
            }
            print!(" ");
        }
        println!();
    }
    Ok(())
}

fn main() -> ExitCode {
    // `cargo test --benches` wants to know whether it works.
    let exact = std::env::args().any(|argument| argument == "--bench");
    match report(exact) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stores_to_code: {error}");
            ExitCode::FAILURE
        }
    }
}
