//! The machine: a kernel that does what the program asks it for and notes each exception, and a program at level 3.
//!
//! | guest-physical | is |
//! |---|---|
//! | 0x1000 | GDT, IDT, TSS, a page each |
//! | 0x4000 | the kernel's code, its stack below 0x9000 |
//! | 0x1_0000 | page tables |
//! | 0x10_0000 | what the kernel has noted: one [`Event`] for each exception |
//! | 0x18_0000 | what it is to do at the next exceptions: [`Answer`]s |
//! | 0x1c_0000 | the program's code |
//! | 0x20_0000 | pages for the program, see [`page`] |
//!
//! The kernel sees all of it from [`KERNEL`] on.

use std::sync::Arc;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;
use vmm_cpu::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::translate::{AddressWindow, TranslateHypervisor, TranslateOptions};
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, GuestAccess, Halt, Hypervisor, Vcpu, VcpuIo, Vm, VmConfig,
};
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, GuestRegion, RegionConfig};

const KERNEL: u64 = 0xffff_ffff_8000_0000;
const PAGE: u64 = 0x1000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const KERNEL_CODE: u64 = 0x4000;
const KERNEL_STACK: u64 = 0x9000;
/// What the kernel remembers: where the next event goes, where the next answer is.
const NEXT_EVENT: u64 = 0x9000;
const NEXT_ANSWER: u64 = 0x9008;
/// The address spaces: CR3.
pub(crate) const SPACE: u64 = 0x1_0000;
pub(crate) const OTHER_SPACE: u64 = 0x1_1000;
const KERNEL_TABLES: u64 = 0x1_2000;
const TABLES: u64 = 0x1_4000;
const EVENTS: u64 = 0x10_0000;
const ANSWERS: u64 = 0x18_0000;
const CODE_PAGES: u64 = 0x1c_0000;
const RAM: u64 = 0x80_0000;

/// Where the program's code is, 256 KiB at most.
pub(crate) const CODE: u64 = 0x40_0000;
/// Where its stack ends: one page, [`page`] 0.
pub(crate) const STACK: u64 = 0x7fff_ffff_f000;

/// A page for the program: 0 is its stack.
pub(crate) const fn page(n: u64) -> u64 {
    0x20_0000 + n * PAGE
}

/// Bits of page table entries.
pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
pub(crate) const GLOBAL: u64 = 1 << 8;
/// A page that a program may write.
pub(crate) const DATA: u64 = PRESENT | WRITABLE | USER;

const KERNEL_CS: u16 = 0x08;
const KERNEL_DS: u16 = 0x10;
const USER_DS: u16 = 0x23;
const USER_CS: u16 = 0x2b;
const TASK: u16 = 0x30;

/// The port by which the program reaches the test.
const PORT: u16 = 0x10;

/// How a program is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    Interpreter,
    /// Counting instructions or not.
    Translator(bool),
    Window(bool),
    /// Counting instructions, with a digest of what was in the registers at each block.
    Traced,
}

const TIERS: [Tier; 6] = [
    Tier::Interpreter,
    Tier::Translator(true),
    Tier::Translator(false),
    Tier::Traced,
    Tier::Window(true),
    Tier::Window(false),
];

/// Emits a part of a program.
pub(crate) type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// What a program asks the kernel for, by SYSCALL: RCX, R11, RAX, RDI and RSI change.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// The end.
    Exit,
    /// Stores a quadword at a guest-physical address.
    Store(u64, u64),
    /// RAX becomes the quadword at a guest-physical address.
    Load(u64),
    Invalidate(u64),
    SetCr3(u64),
    SetCr4(u64),
    SetCr0(u64),
    /// DR0 and DR7.
    Watch(u64, u64),
    /// Calls the test's function with a number.
    Tell(u8),
}

/// Lets the program make a call.
pub(crate) fn call(a: &mut CodeAssembler, call: Call) {
    let (number, first, second) = match call {
        Call::Exit => (0, 0, 0),
        Call::Store(gpa, value) => (1, gpa, value),
        Call::Load(gpa) => (2, gpa, 0),
        Call::Invalidate(va) => (3, va, 0),
        Call::SetCr3(value) => (4, value, 0),
        Call::SetCr4(value) => (5, value, 0),
        Call::SetCr0(value) => (6, value, 0),
        Call::Watch(va, control) => (7, va, control),
        Call::Tell(what) => (8, what.into(), 0),
    };
    a.mov(rdi, first).unwrap();
    a.mov(rsi, second).unwrap();
    a.mov(eax, number).unwrap();
    a.syscall().unwrap();
}

/// PE MP ET NE WP AM PG; PAE PGE OSFXSR OSXMMEXCPT; SCE LME LMA NXE.
pub(crate) const CR0: u64 = 0x8005_0033;
pub(crate) const CR4: u64 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10;
const EFER: u64 = 0xd01;

/// An exception, and all that the program could see then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) vector: u64,
    pub(crate) error: u64,
    /// CR2 of a page fault, else zero.
    pub(crate) address: u64,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    /// By number.
    pub(crate) registers: [u64; 16],
}

const EVENT: u64 = 8 * 22;

/// What the kernel does after an exception, instead of ending the program.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answer {
    /// Guest-physical address of a quadword to be stored, and that; none if zero.
    pub(crate) store: (u64, u64),
    /// Linear address of a page to be invalidated, if not zero.
    pub(crate) invalidate: u64,
    /// Where the program goes on, if not where it was.
    pub(crate) resume: u64,
}

const ANSWER: u64 = 32;

/// [`Answer::resume`] that stands for the address in R8.
pub(crate) const RESUME_AT_R8: u64 = 1;

/// What a test prepares.
pub(crate) struct Setup {
    pub(crate) tier: Tier,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) ram: Arc<GuestRegion>,
    /// A region of 64 KiB, if the test wants one: at [`EXTRA`].
    pub(crate) extra: Option<Arc<GuestRegion>>,
    next_table: u64,
    answers: u64,
}

/// Where a region that the test may take away begins.
pub(crate) const EXTRA: u64 = 0x100_0000;

impl Setup {
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub(crate) fn word(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read_slice(&mut bytes, MemoryRegionAddress(gpa)).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// The program's pages.
    fn pages(&self) -> Vec<u8> {
        self.bytes(page(0), RAM)
    }

    /// The page tables.
    pub(crate) fn tables(&self) -> Vec<u8> {
        self.bytes(SPACE, self.next_table)
    }

    fn bytes(&self, start: u64, end: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        self.ram.read_slice(&mut bytes, MemoryRegionAddress(start)).unwrap();
        bytes
    }

    /// Where the entry of `va` is at a level, which is the number of its lowest bit.
    pub(crate) fn entry(&mut self, space: u64, va: u64, level: u32) -> u64 {
        let mut table = space;
        for shift in [39, 30, 21].into_iter().filter(|shift| *shift > level) {
            let place = table + (va >> shift & 0x1ff) * 8;
            if self.read(place) == 0 {
                self.word(place, self.next_table | DATA | ACCESSED);
                self.next_table += PAGE;
            }
            table = self.read(place) & 0x000f_ffff_ffff_f000;
        }
        table + (va >> level & 0x1ff) * 8
    }

    /// Maps a page; where its entry is.
    pub(crate) fn map(&mut self, space: u64, va: u64, gpa: u64, bits: u64) -> u64 {
        let place = self.entry(space, va, 12);
        self.word(place, gpa | bits);
        place
    }

    /// Maps 2 MiB; where the entry is.
    pub(crate) fn map_large(&mut self, space: u64, va: u64, gpa: u64, bits: u64) -> u64 {
        let place = self.entry(space, va, 21);
        self.word(place, gpa | bits | LARGE);
        place
    }

    /// What the kernel does after the next exception for which it has been told nothing.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let place = ANSWERS + self.answers * ANSWER;
        let words = [1 | answer.store.0, answer.store.1, answer.invalidate, answer.resume];
        for (n, word) in (0..).zip(words) {
            self.word(place + 8 * n, word);
        }
        self.answers += 1;
    }

    /// Adds the region at [`EXTRA`].
    pub(crate) fn add_extra(&mut self) {
        let region = region(EXTRA, 0x1_0000);
        self.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite).unwrap();
        self.extra = Some(region);
    }

    /// Puts code where the program's lies.
    pub(crate) fn code(&self, at: u64, code: &[u8]) {
        assert!(at >= CODE && at + code.len() as u64 <= CODE + page(0) - CODE_PAGES);
        self.write(CODE_PAGES + at - CODE, code);
    }

    /// Makes `code` the program.
    pub(crate) fn program(&self, code: &mut CodeAssembler) {
        let code = code.assemble(CODE).unwrap();
        assert!(code.len() as u64 <= page(0) - CODE_PAGES);
        self.write(CODE_PAGES, &code);
    }
}

fn region(gpa: u64, size: u64) -> Arc<GuestRegion> {
    let config = RegionConfig::new(GuestAddress(gpa), size).backing(Backing::Memfd);
    GuestRam::builder().region(config).build().unwrap().regions().remove(0)
}

/// What came of a program.
pub(crate) struct Run {
    pub(crate) setup: Setup,
    pub(crate) registers: GeneralRegisters,
    pub(crate) events: Vec<Event>,
    vcpu: Box<dyn Vcpu>,
}

impl Run {
    /// Whether the program saw the same as in another run.
    pub(crate) fn assert_same(&self, expected: &Self, program: &str) {
        let tier = self.setup.tier;
        for (n, (event, expected)) in self.events.iter().zip(&expected.events).enumerate() {
            assert_eq!(event, expected, "{tier:?}: exception {n} of {program}");
        }
        assert_eq!(self.events.len(), expected.events.len(), "{tier:?}: exceptions of {program}");
        assert_eq!(self.registers, expected.registers, "{tier:?}: end of {program}");
        let (pages, expected_pages) = (self.setup.pages(), expected.setup.pages());
        for (n, (page, expected)) in pages.chunks(4096).zip(expected_pages.chunks(4096)).enumerate() {
            assert!(page == expected, "{tier:?}: page {n} of {program}");
        }
    }

    /// A figure of the vCPU.
    pub(crate) fn count(&self, name: &str) -> u64 {
        figure(&*self.vcpu, name)
    }
}

/// A figure of a vCPU.
pub(crate) fn figure(vcpu: &dyn Vcpu, name: &str) -> u64 {
    vcpu.exit_counts().iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count)
}

/// What the program tells the test goes to the function.
struct Bus<'a, F> {
    setup: &'a mut Setup,
    told: F,
}

impl<F: FnMut(&mut Setup, u8)> VcpuIo for Bus<'_, F> {
    fn pio_write(&mut self, port: u16, _: usize, data: &[u8]) {
        assert_eq!(port, PORT);
        (self.told)(self.setup, data[0]);
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        data.fill(u8::try_from(gpa.0 & 0xff).unwrap());
    }
}

/// Runs the program that `prepare` makes on each tier, and expects the same of all; what came of it with a window.
pub(crate) fn same_on_all(prepare: impl Fn(&mut Setup)) -> Run {
    same_with(prepare, |_, _| {})
}

/// The same with a function that the program can call.
pub(crate) fn same_with(prepare: impl Fn(&mut Setup), told: impl Fn(&mut Setup, u8)) -> Run {
    let mut first: Option<Run> = None;
    let mut last = None;
    for tier in TIERS {
        let run = run_on(tier, &prepare, &told);
        let Some(expected) = &first else {
            first = Some(run);
            continue;
        };
        run.assert_same(expected, "the program");
        match tier {
            Tier::Traced => {
                assert_eq!(run.count("digest"), expected.count("digest"));
                assert!(run.count("window-pages-mapped") > 0);
            }
            Tier::Window(_) => assert!(run.count("window-pages-mapped") > 0, "{tier:?} had no window"),
            Tier::Translator(_) => {
                assert!(run.count("translated-entries") > 0 && run.count("window-pages-mapped") == 0);
            }
            Tier::Interpreter => {}
        }
        last = Some(run);
    }
    last.unwrap()
}

/// Runs the program on one tier.
pub(crate) fn run_on(tier: Tier, prepare: &impl Fn(&mut Setup), told: &impl Fn(&mut Setup, u8)) -> Run {
    let (mut setup, mut vcpu) = build(tier);
    prepare(&mut setup);
    assert_eq!(run(&mut setup, &mut *vcpu, told), Halt::Halted, "{tier:?}");
    let registers = vcpu.registers().unwrap();
    let events = events(&setup);
    Run { setup, registers, events, vcpu }
}

/// Runs a vCPU until something ends it.
pub(crate) fn run(setup: &mut Setup, vcpu: &mut dyn Vcpu, told: impl FnMut(&mut Setup, u8)) -> Halt {
    vcpu.run(&mut Bus { setup, told }).unwrap()
}

fn events(setup: &Setup) -> Vec<Event> {
    let end = setup.read(NEXT_EVENT) - KERNEL;
    (EVENTS..end)
        .step_by(EVENT as usize)
        .map(|place| {
            let word = |n| setup.read(place + 8 * n);
            let registers = std::array::from_fn(|n| match n {
                4 => word(20),
                _ => word(n as u64),
            });
            let (vector, error, rip, rflags) = (word(16), word(17), word(18), word(19));
            let address = if vector == 14 { word(21) } else { 0 };
            Event { vector, error, address, rip, rflags, registers }
        })
        .collect()
}

/// A machine whose program is not there yet.
pub(crate) fn build(tier: Tier) -> (Setup, Box<dyn Vcpu>) {
    let mut clock = ClockConfig::default();
    if !matches!(tier, Tier::Translator(false) | Tier::Window(false)) {
        clock.source = ClockSource::Deterministic;
    }
    let config = VmConfig::new(CpuModel::Host).clock(clock);
    let (translate_after, window) = match tier {
        Tier::Interpreter => (None, AddressWindow::Never),
        Tier::Translator(_) => (Some(0), AddressWindow::Never),
        Tier::Window(_) | Tier::Traced => (Some(0), AddressWindow::Always),
    };
    let options = TranslateOptions::default()
        .translate_after(translate_after)
        .address_window(window)
        .digest(matches!(tier, Tier::Interpreter | Tier::Traced));
    let vm = TranslateHypervisor::with_options(options).create_vm(&config).unwrap();
    let ram = region(0, RAM);
    vm.map_memory(Arc::clone(&ram), GuestAccess::ReadWrite).unwrap();
    let mut setup = Setup { tier, vm, ram, extra: None, next_table: TABLES, answers: 0 };
    let kernel = kernel();
    setup.write(KERNEL_CODE, &kernel.code);
    setup.word(NEXT_EVENT, KERNEL + EVENTS);
    setup.word(NEXT_ANSWER, KERNEL + ANSWERS);
    for (selector, descriptor) in [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_DS, 0x00cf_9300_0000_ffff),
        (USER_DS, 0x00cf_f300_0000_ffff),
        (USER_CS, 0x00af_fb00_0000_ffff_u64),
    ] {
        setup.word(GDT + u64::from(selector & !7), descriptor);
    }
    for (vector, handler) in (0..).zip(kernel.vectors) {
        let low = handler & 0xffff | u64::from(KERNEL_CS) << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
        setup.word(IDT + 16 * vector, low);
        setup.word(IDT + 16 * vector + 8, handler >> 32);
    }
    setup.word(TSS + 4, KERNEL + KERNEL_STACK);
    setup.word(KERNEL_TABLES + 510 * 8, (KERNEL_TABLES + PAGE) | PRESENT | WRITABLE | ACCESSED);
    for part in 0..RAM >> 21 {
        let entry = part << 21 | PRESENT | WRITABLE | ACCESSED | DIRTY | LARGE | GLOBAL;
        setup.word(KERNEL_TABLES + PAGE + part * 8, entry);
    }
    for space in [SPACE, OTHER_SPACE] {
        setup.word(space + 511 * 8, KERNEL_TABLES | PRESENT | WRITABLE | ACCESSED);
        for n in 0..(page(0) - CODE_PAGES) / PAGE {
            setup.map(space, CODE + n * PAGE, CODE_PAGES + n * PAGE, PRESENT | USER);
        }
        setup.map(space, STACK - PAGE, page(0), DATA);
    }

    let mut vcpu = setup.vm.create_vcpu(0).unwrap();
    let now = vcpu.system_registers().unwrap();
    let user = |segment: Segment| Segment { dpl: 3, ..segment };
    let data = user(Segment::data32(USER_DS));
    vcpu.set_system_registers(&SystemRegisters {
        cs: user(Segment::code64(USER_CS)),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(TASK, KERNEL + TSS),
        ldtr: Segment::null(),
        gdtr: DescriptorTable { base: KERNEL + GDT, limit: 0x7f },
        idtr: DescriptorTable { base: KERNEL + IDT, limit: 0x1ff },
        cr0: CR0,
        cr3: SPACE,
        cr4: CR4,
        efer: EFER,
        ..now
    })
    .unwrap();
    // SYSRET's selectors follow from 0x1b.
    vcpu.set_msr(0xc000_0081, 0x1b << 48 | u64::from(KERNEL_CS) << 32).unwrap();
    vcpu.set_msr(0xc000_0082, kernel.system_call).unwrap();
    vcpu.set_msr(0xc000_0084, 0x4_7700).unwrap();
    let general = GeneralRegisters { rip: CODE, rsp: STACK, rflags: 2, ..GeneralRegisters::default() };
    vcpu.set_registers(&general).unwrap();
    (setup, vcpu)
}

struct Kernel {
    code: Vec<u8>,
    vectors: Vec<u64>,
    system_call: u64,
}

/// Of a guest-physical address, as the kernel sees it.
fn seen(gpa: u64) -> AsmMemoryOperand {
    qword_ptr(KERNEL + gpa)
}

fn kernel() -> Kernel {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut common = a.create_label();
    let mut labels = Vec::new();
    for vector in 0..32 {
        let mut label = a.create_label();
        a.set_label(&mut label).unwrap();
        labels.push(label);
        if !matches!(vector, 8 | 10..=14 | 17) {
            a.push(0).unwrap();
        }
        a.push(vector).unwrap();
        a.jmp(common).unwrap();
    }
    let mut system_call = a.create_label();
    a.set_label(&mut system_call).unwrap();
    calls(&mut a).unwrap();
    a.set_label(&mut common).unwrap();
    exception(&mut a).unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let code = a.assemble_options(KERNEL + KERNEL_CODE, options).unwrap();
    let vectors = labels.iter().map(|label| code.label_ip(label).unwrap()).collect();
    let system_call = code.label_ip(&system_call).unwrap();
    Kernel { code: code.inner.code_buffer, vectors, system_call }
}

/// What the program asks for, by its number.
fn calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rdx, KERNEL)?;
    for number in 0..9 {
        let mut next = a.create_label();
        a.cmp(eax, number)?;
        a.jne(next)?;
        match number {
            0 => a.hlt()?,
            1 => a.mov(qword_ptr(rdi + rdx), rsi)?,
            2 => a.mov(rax, qword_ptr(rdi + rdx))?,
            3 => a.invlpg(byte_ptr(rdi))?,
            4 => a.mov(cr3, rdi)?,
            5 => a.mov(cr4, rdi)?,
            6 => a.mov(cr0, rdi)?,
            7 => {
                a.mov(dr0, rdi)?;
                a.mov(dr7, rsi)?;
            }
            _ => {
                a.mov(eax, edi)?;
                a.out(i32::from(PORT), al)?;
            }
        }
        a.sysretq()?;
        a.set_label(&mut next)?;
    }
    a.ud2()
}

/// Notes the exception, and does what the next answer says.
fn exception(a: &mut CodeAssembler) -> Result<(), IcedError> {
    // Behind the registers: vector, error code, RIP, CS, RFLAGS, RSP, SS.
    const SAVED: i32 = 16;
    a.push(rax)?;
    a.push(rcx)?;
    a.mov(rax, seen(NEXT_EVENT))?;
    for (n, register) in (2..).zip([rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]) {
        a.mov(qword_ptr(rax + 8 * n), register)?;
    }
    for (n, from) in
        [(0, 8), (1, 0), (16, SAVED), (17, SAVED + 8), (18, SAVED + 16), (19, SAVED + 32), (20, SAVED + 40)]
    {
        a.mov(rcx, qword_ptr(rsp + from))?;
        a.mov(qword_ptr(rax + 8 * n), rcx)?;
    }
    a.mov(rcx, cr2)?;
    a.mov(qword_ptr(rax + 8 * 21), rcx)?;
    a.add(seen(NEXT_EVENT), i32::try_from(EVENT).unwrap())?;
    a.mov(rax, seen(NEXT_ANSWER))?;
    a.mov(rcx, qword_ptr(rax))?;
    let mut known = a.create_label();
    a.test(rcx, rcx)?;
    a.jne(known)?;
    a.hlt()?;
    a.set_label(&mut known)?;
    a.add(seen(NEXT_ANSWER), i32::try_from(ANSWER).unwrap())?;
    let mut stored = a.create_label();
    a.xor(rcx, 1)?;
    a.je(stored)?;
    a.push(rdx)?;
    a.push(rbx)?;
    a.mov(rdx, qword_ptr(rax + 8))?;
    a.mov(rbx, KERNEL)?;
    a.mov(qword_ptr(rcx + rbx), rdx)?;
    a.pop(rbx)?;
    a.pop(rdx)?;
    a.set_label(&mut stored)?;
    let mut invalidated = a.create_label();
    a.mov(rcx, qword_ptr(rax + 16))?;
    a.test(rcx, rcx)?;
    a.je(invalidated)?;
    a.invlpg(byte_ptr(rcx))?;
    a.set_label(&mut invalidated)?;
    let mut resumed = a.create_label();
    a.mov(rcx, qword_ptr(rax + 24))?;
    a.test(rcx, rcx)?;
    a.je(resumed)?;
    let mut known = a.create_label();
    a.cmp(rcx, i32::try_from(RESUME_AT_R8).unwrap())?;
    a.jne(known)?;
    a.mov(rcx, r8)?;
    a.set_label(&mut known)?;
    a.mov(qword_ptr(rsp + (SAVED + 16)), rcx)?;
    a.set_label(&mut resumed)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()
}
