//! Two vCPUs, one of which stores to the other one's page of code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use iced_x86::code_asm::{al, dword_ptr, eax, qword_ptr, rax, rbx, rcx, rdx};
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::cpuid::CpuModel;
use crate::hypervisor::{Hypervisor, VmConfig};
use crate::state::{GeneralRegisters, Segment, SystemRegisters};
use crate::translate::TranslateHypervisor;
use crate::vcpu::VcpuHandle;

const PAGE_TABLES: u64 = 0x4000;
const READER: u64 = 0x8000;
const WRITER: u64 = 0x9000;
/// The page of code with a counter, and two functions of it.
const SHARED: u64 = 0x1_0000;
const COUNTER: u64 = SHARED + 0x800;
const OF_BOTH: u64 = SHARED + 0x100;
const STACK: u64 = 0x2_0000;
/// How often the reader has called its function.
const PROGRESS: u64 = 0x3_0000;

/// MOV EAX, `value`; RET.
fn function(value: u8) -> [u8; 6] {
    [0xb8, value, 0, 0, 0, 0xc3]
}

/// Ends a vCPU's run at its OUT.
struct End(Arc<dyn VcpuHandle>);

impl VcpuIo for End {
    fn pio_write(&mut self, _: u16, _: usize, _: &[u8]) {
        self.0.kick();
    }
}

fn registers(rip: u64) -> (GeneralRegisters, SystemRegisters) {
    let data = Segment::data32(0x10);
    let system = SystemRegisters {
        cs: Segment::code64(8),
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
    let rsp = STACK + (rip & 0xf000);
    (GeneralRegisters { rip, rsp, rflags: 2, ..GeneralRegisters::default() }, system)
}

fn code(at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

fn low(address: u64) -> i32 {
    i32::try_from(address).unwrap()
}

/// Counts in the shared page and calls a function of it; first some rounds, and when the other vCPU has run again, the others.
/// In the end it changes the result of the function that the other vCPU calls.
fn writer(rounds: [u64; 2]) -> Vec<u8> {
    code(WRITER, |a| {
        for count in rounds {
            let (mut again, mut wait) = (a.create_label(), a.create_label());
            a.mov(rcx, count)?;
            a.set_label(&mut again)?;
            a.inc(dword_ptr(low(COUNTER)))?;
            a.call(OF_BOTH)?;
            a.add(rbx, rax)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.mov(rdx, qword_ptr(low(PROGRESS)))?;
            a.add(rdx, 1000)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(qword_ptr(low(PROGRESS)), rdx)?;
            a.jb(wait)?;
        }
        a.mov(dword_ptr(low(SHARED + 1)), 2)?;
        a.out(0x80, al)?;
        a.hlt()
    })
}

/// Counts and calls a function until that says 2.
fn reader() -> Vec<u8> {
    code(READER, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(low(PROGRESS)))?;
        a.call(SHARED)?;
        a.cmp(eax, 2)?;
        a.jne(again)?;
        a.out(0x80, al)?;
        a.hlt()
    })
}

#[test]
fn changes_of_code_in_a_page_that_is_stored_to_reach_the_other_vcpu() {
    const ROUNDS: u64 = 300_000;
    for after in [None, Some(0), Some(2)] {
        let ram = GuestRam::builder().ram(2 << 20).build().unwrap();
        let memory = ram.memory();
        let put = |at, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        for (at, entry) in [(0, 0x5007_u64), (0x1000, 0x6007), (0x2000, 0x87)] {
            put(PAGE_TABLES + at, &entry.to_le_bytes());
        }
        put(READER, &reader());
        put(WRITER, &writer([ROUNDS / 10, ROUNDS - ROUNDS / 10]));
        put(SHARED, &function(1));
        put(OF_BOTH, &function(3));
        let options = TranslateOptions::default().translate_after(after);
        let config = VmConfig::new(CpuModel::Host).vcpus(2);
        let vm = TranslateHypervisor::with_options(options).create_vm(&config).unwrap();
        vm.map_ram(&ram).unwrap();
        let vcpus: Vec<_> = [READER, WRITER]
            .into_iter()
            .zip(0..)
            .map(|(rip, index)| {
                let mut vcpu = vm.create_vcpu(index).unwrap();
                let (general, mut system) = registers(rip);
                let now = vcpu.system_registers().unwrap();
                (system.cr8, system.apic_base) = (now.cr8, now.apic_base);
                vcpu.set_system_registers(&system).unwrap();
                vcpu.set_registers(&general).unwrap();
                vcpu
            })
            .collect();
        let handles: Vec<_> = vcpus.iter().map(|vcpu| vcpu.handle()).collect();
        let done = AtomicBool::new(false);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                let start = Instant::now();
                while !done.load(Ordering::Relaxed) && start.elapsed() < Duration::from_secs(100) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                handles.iter().for_each(|handle| handle.kick());
            });
            let runs: Vec<_> = vcpus
                .into_iter()
                .map(|mut vcpu| {
                    scope.spawn(move || {
                        let mut end = End(vcpu.handle());
                        assert_eq!(vcpu.run(&mut end).unwrap(), Halt::Interrupted);
                        vcpu
                    })
                })
                .collect();
            let ended: Vec<_> = runs.into_iter().map(|run| run.join().unwrap()).collect();
            done.store(true, Ordering::Relaxed);
            ended
        });
        let [mut reader, mut writer] = <[_; 2]>::try_from(ended).unwrap_or_else(|_| panic!("two"));
        let (read, written) = (reader.registers().unwrap(), writer.registers().unwrap());
        assert_eq!((read.rax, written.rcx, written.rbx), (2, 0, 3 * ROUNDS), "{after:?}");
        let counted: u32 = memory.read_obj(GuestAddress(COUNTER)).unwrap();
        assert_eq!(u64::from(counted), ROUNDS);
        if after.is_none() {
            continue;
        }
        // As soon as the other vCPU had heard of it, no store was noticed any more.
        let counts = writer.exit_counts();
        let interpreted = counts.iter().find(|(name, _)| *name == "translated-interpreted").unwrap().1;
        assert!(interpreted < ROUNDS / 2, "{interpreted}");
    }
}
