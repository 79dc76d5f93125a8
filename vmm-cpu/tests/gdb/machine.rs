//! A small machine with a debugger's stub: flat 64-bit code at privilege level 0 on the translate backend.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, ptr, qword_ptr, rax, rbx, rcx};
use vmm_cpu::gdb::{Debuggee, Debugger, Endpoint, Event, Monitor, MonitorCommand};
use vmm_cpu::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::{CpuModel, EmptyBus, Vcpu, VcpuIo, VcpuThreads, Vm, VmConfig, open_backend};

use crate::client::Client;

pub(crate) const CODE: u64 = 0x8000;
pub(crate) const DATA: u64 = 0x4_0000;
pub(crate) const STACK: u64 = 0x3_0000;
const RAM: u64 = 1 << 20;
const IDT: u64 = 0x2000;
const PAGE_TABLES: u64 = 0x1_0000;

/// Pages of 4 KiB from here: two that lie in memory the other way round, one that is not mapped, one without memory.
pub(crate) const WINDOW: u64 = 0x20_0000;
/// Where the window's first and second page lie.
pub(crate) const WINDOW_PAGES: [u64; 2] = [0x5_0000, DATA];
pub(crate) const UNMAPPED: u64 = WINDOW + 0x2000;
pub(crate) const NO_MEMORY: u64 = WINDOW + 0x3000;

/// The addresses of the endless loop that most machines run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loop {
    /// `inc rbx`.
    pub(crate) top: u64,
    /// `mov [DATA], rbx`, and behind it.
    pub(crate) store: u64,
    pub(crate) stored: u64,
    /// Behind `mov rcx, [DATA + 8]`.
    pub(crate) loaded: u64,
    /// `call`, what it calls, and behind it.
    pub(crate) call: u64,
    pub(crate) called: u64,
    pub(crate) returned: u64,
}

/// Machine code of the loop.
pub(crate) fn endless() -> (Vec<u8>, Loop) {
    let mut code = CodeAssembler::new(64).unwrap();
    let mut labels: [CodeLabel; 7] = std::array::from_fn(|_| code.create_label());
    let [top, store, stored, loaded, call, called, returned] = &mut labels;
    code.set_label(top).unwrap();
    code.inc(rbx).unwrap();
    code.set_label(store).unwrap();
    code.mov(qword_ptr(DATA), rbx).unwrap();
    code.set_label(stored).unwrap();
    code.mov(rcx, ptr(DATA + 8)).unwrap();
    code.set_label(loaded).unwrap();
    code.nop().unwrap();
    code.set_label(call).unwrap();
    code.call(*called).unwrap();
    code.set_label(returned).unwrap();
    code.jmp(*top).unwrap();
    code.set_label(called).unwrap();
    code.mov(rax, rbx).unwrap();
    code.ret().unwrap();
    let code = code.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let [top, store, stored, loaded, call, called, returned] =
        labels.map(|label| code.label_ip(&label).unwrap());
    (code.inner.code_buffer, Loop { top, store, stored, loaded, call, called, returned })
}

/// A machine that is debugged.
pub(crate) struct Machine {
    pub(crate) threads: Arc<VcpuThreads>,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) ram: GuestRam,
    pub(crate) address: String,
    pub(crate) events: Receiver<Event>,
    debugger: Option<Debugger>,
}

impl Machine {
    /// `vcpus` that stand before `code`, each with a stack of its own; the handlers of `gates` are at the addresses given.
    pub(crate) fn new(vcpus: u32, code: &[u8], gates: &[(u8, u64)]) -> Self {
        let ram = GuestRam::builder().ram(RAM).build().unwrap();
        prepare(&ram, code, gates);
        let hypervisor = open_backend("translate").unwrap();
        let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host).vcpus(vcpus)).unwrap();
        vm.map_ram(&ram).unwrap();
        let vcpu = |index| {
            let mut vcpu = vm.create_vcpu(index).unwrap();
            vcpu.set_system_registers(&flat()).unwrap();
            let rsp = STACK - 0x1000 * u64::from(index);
            let start =
                GeneralRegisters { rip: CODE, rsp, rflags: rflags::FIXED, ..GeneralRegisters::default() };
            vcpu.set_registers(&start).unwrap();
            (vcpu, Box::new(EmptyBus) as Box<dyn VcpuIo + Send>)
        };
        let threads = Arc::new(VcpuThreads::spawn((0..vcpus).map(vcpu).collect()).unwrap());
        let endpoint = Endpoint::listen(":0").unwrap();
        let address = endpoint.address().to_owned();
        let debuggee = Debuggee::new(Arc::clone(&threads), ram.clone()).clock(vm.clock().unwrap());
        let (tell, events) = channel();
        let tell = move |event| drop(tell.send(event));
        let debugger = Debugger::start(endpoint, debuggee.monitor(Echo), tell).unwrap();
        Self { threads, vm, ram, address, events, debugger: Some(debugger) }
    }

    /// `vcpus` in the endless loop, not running yet.
    pub(crate) fn looping(vcpus: u32) -> (Self, Loop) {
        let (code, places) = endless();
        (Self::new(vcpus, &code, &[]), places)
    }

    /// A debugger that has just attached: the stub has answered.
    pub(crate) fn attach(&self) -> Client {
        let mut client = Client::connect(&self.address);
        assert!(client.ask("?").starts_with("T05thread:"));
        client
    }

    pub(crate) fn word(&self, gpa: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    pub(crate) fn bytes<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Looks at a vCPU, which stands still.
    pub(crate) fn with<R>(&self, index: u32, look: impl FnOnce(&mut dyn Vcpu) -> R) -> R {
        self.threads.with_vcpu(index, look).unwrap()
    }

    /// Waits until the loop has gone on.
    pub(crate) fn assert_running(&self) {
        let before = self.word(DATA);
        while self.word(DATA) == before {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn event(&self) -> Event {
        self.events.recv_timeout(Duration::from_secs(30)).unwrap()
    }

    /// Starts the machine, as its VMM would.
    pub(crate) fn resume(&self) {
        self.debugger.as_ref().unwrap().resume();
    }

    /// Ends the debugger's service.
    pub(crate) fn finish(&mut self, status: u8) {
        self.debugger.take().unwrap().finish(status);
    }
}

/// A command of the VMM's own.
struct Echo;

impl Monitor for Echo {
    fn commands(&self) -> &[MonitorCommand] {
        &[MonitorCommand { name: "echo", help: "says it again" }]
    }

    fn run(&mut self, name: &str, arguments: &str, out: &mut dyn std::fmt::Write) -> std::fmt::Result {
        write!(out, "{name}: {arguments}")
    }
}

fn prepare(ram: &GuestRam, code: &[u8], gates: &[(u8, u64)]) {
    let memory = ram.memory();
    let put = |gpa: u64, value: u64| memory.write_obj(value, GuestAddress(gpa)).unwrap();
    let [pml4, pdpt, directory, table] = [0, 1, 2, 3].map(|page| PAGE_TABLES + page * 0x1000);
    let present_writable = 3;
    put(pml4, pdpt | present_writable);
    put(pdpt, directory | present_writable);
    put(directory, 1 << 7 | present_writable);
    put(directory + 8, table | present_writable);
    for (page, gpa) in [(0, WINDOW_PAGES[0]), (1, WINDOW_PAGES[1]), (3, 0xd000_0000)] {
        put(table + 8 * page, gpa | present_writable);
    }
    for (vector, handler) in gates {
        put(IDT + 16 * u64::from(*vector), 8 << 16 | 0x8e00 << 32 | handler & 0xffff | handler >> 16 << 48);
    }
    put(0x1008, 0x00af_9b00_0000_ffff);
    put(0x1010, 0x00cf_9300_0000_ffff);
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
}

fn flat() -> SystemRegisters {
    let data = Segment::data32(0x10);
    SystemRegisters {
        cs: Segment::code64(8),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdtr: DescriptorTable { base: 0x1000, limit: 0x17 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        cr0: 0x8000_0033,
        cr3: PAGE_TABLES,
        cr4: SystemRegisters::CR4_PAE | 1 << 9,
        efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
        ..SystemRegisters::at_reset()
    }
}
