//! A small 64-bit guest. Every vector has a handler that stores all registers on a stack of its own and calls the test,
//! which looks at the trap and changes what it likes: registers, memory, page tables.
//!
//! | guest-physical | is |
//! |---|---|
//! | 0x1000 | GDT, IDT, TSS, a page each |
//! | 0x4000 | page tables: one of each level, and that of the window |
//! | 0x9000 | code of the handlers |
//! | 0xf000 | the end of the handlers' stack |
//! | 0x10000 | what tests use: [`CODE`], [`STACK`], [`DATA`] |
//!
//! Linear addresses are guest-physical ones, but for the [`WINDOW`] where tests map pages as they like. From
//! [`HIGH`] on, all of that is there once more.

use std::fmt::Debug;
use std::sync::Arc;

use vmm_cpu::state::{DescriptorTable, GeneralRegisters, RunState, Segment, SystemRegisters, XsaveArea};
use vmm_cpu::translate::{AddressWindow, TranslateHypervisor, TranslateOptions};
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, GuestAccess, Halt, Hypervisor, InterruptMode, Vcpu, VcpuIo, Vm,
    VmConfig,
};
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, GuestRegion, RegionConfig};

use super::program::{Code, handlers};

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
pub const PML4: u64 = 0x4000;
pub const POINTERS: u64 = 0x5000;
pub const DIRECTORY: u64 = 0x6000;
const LOW_TABLE: u64 = 0x7000;
const WINDOW_TABLE: u64 = 0x8000;
const HANDLERS: u64 = 0x9000;
/// Where the handlers' stack ends.
pub const TRAP_STACK: u64 = 0xf000;
/// Code of tests.
pub const CODE: u64 = 0x2_0000;
/// Top of the stack of tests.
pub const STACK: u64 = 0x3_0000;
/// Data of tests.
pub const DATA: u64 = 0x4_0000;
const RAM: u64 = 0x20_0000;
pub const PAGE: u64 = 0x1000;
/// 2 MiB of linear addresses that lead nowhere at first.
pub const WINDOW: u64 = RAM;
/// Distance at which everything is there once more.
pub const HIGH: u64 = 0xffff_ff80_0000_0000;
/// Guest-physical addresses without memory.
pub const MMIO: u64 = 0xd000_0000;

/// Port by which handlers call the test.
pub const TRAP_PORT: u16 = 0x10;

const HLT: u8 = 0xf4;
const RESUME_FLAG: u64 = 1 << 16;

const KERNEL_CS: u16 = 0x08;
const KERNEL_DS: u16 = 0x10;
const USER_DS: u16 = 0x1b;
const USER_CS: u16 = 0x23;
const TASK: u16 = 0x28;

/// Bits of page-table entries.
pub mod entry {
    pub const PRESENT: u64 = 1;
    pub const WRITABLE: u64 = 2;
    pub const USER: u64 = 4;
    pub const GLOBAL: u64 = 1 << 8;
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// For everybody and everything.
    pub const ALL: u64 = PRESENT | WRITABLE | USER;
}

/// What executes the guest.
#[derive(Clone, Copy, Debug)]
pub struct Tier {
    translate_after: Option<u32>,
    clock: ClockSource,
    window: AddressWindow,
    /// The guest begins at privilege level 3.
    pub user: bool,
}

impl Tier {
    pub const INTERPRETED: Self = Self {
        translate_after: None,
        clock: ClockSource::Deterministic,
        window: AddressWindow::Never,
        user: false,
    };
    /// Translated code that counts instructions.
    pub const COUNTED: Self = Self { translate_after: Some(0), ..Self::INTERPRETED };
    /// Translated code in host time.
    pub const FREE: Self = Self { clock: ClockSource::Host, ..Self::COUNTED };
    /// The same, whose memory accesses at privilege level 3 go through the address window.
    pub const WINDOW: Self = Self { window: AddressWindow::Always, ..Self::FREE };

    /// The same for a guest that begins at privilege level 3, if `user`.
    pub fn at(self, user: bool) -> Self {
        Self { user, ..self }
    }
}

/// Runs `test` on each tier, with guests at privilege level 0, which must come to the same, and returns that.
pub fn on_each_tier<T: PartialEq + Debug>(test: impl Fn(Tier) -> T) -> T {
    on_each_tier_at(false, test)
}

/// The same at privilege level 3, if `user`.
pub fn on_each_tier_at<T: PartialEq + Debug>(user: bool, test: impl Fn(Tier) -> T) -> T {
    let expected = test(Tier::INTERPRETED.at(user));
    for tier in [Tier::COUNTED, Tier::FREE, Tier::WINDOW] {
        if tier.window == AddressWindow::Always && !user {
            continue;
        }
        let result = test(tier.at(user));
        assert!(result == expected, "{tier:?}, {user}: {result:#x?}\ninterpreted: {expected:#x?}");
    }
    expected
}

/// The same at both levels, which come to the same as well: HLT ends all guests.
pub fn on_each_tier_and_level<T: PartialEq + Debug>(test: impl Fn(Tier) -> T) -> T {
    let [kernel, user] = [false, true].map(|user| on_each_tier_at(user, &test));
    assert!(kernel == user, "at privilege level 0: {kernel:#x?}\nat level 3: {user:#x?}");
    kernel
}

/// What a handler was called for, with all registers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u64,
    pub error: u64,
    pub cs: u64,
    pub ss: u64,
    pub cr2: u64,
    pub general: GeneralRegisters,
}

/// Words of a trap on the handlers' stack: 15 registers from R15 up to RAX, vector, error code and the frame.
const TRAP_WORDS: u64 = 15 + 2 + 5;
const TRAP_FRAME: u64 = TRAP_STACK - TRAP_WORDS * 8;

impl Trap {
    fn load(ram: &Ram) -> Self {
        let word = |n: u64| ram.word(TRAP_FRAME + n * 8);
        Self {
            vector: word(15),
            error: word(16),
            cs: word(18),
            ss: word(21),
            cr2: ram.word(TRAP_FRAME - 8),
            general: GeneralRegisters {
                r15: word(0),
                r14: word(1),
                r13: word(2),
                r12: word(3),
                r11: word(4),
                r10: word(5),
                r9: word(6),
                r8: word(7),
                rdi: word(8),
                rsi: word(9),
                rbp: word(10),
                rdx: word(11),
                rcx: word(12),
                rbx: word(13),
                rax: word(14),
                rip: word(17),
                rflags: word(19),
                rsp: word(20),
            },
        }
    }

    fn store(&self, ram: &Ram) {
        let g = &self.general;
        let words = [
            g.r15,
            g.r14,
            g.r13,
            g.r12,
            g.r11,
            g.r10,
            g.r9,
            g.r8,
            g.rdi,
            g.rsi,
            g.rbp,
            g.rdx,
            g.rcx,
            g.rbx,
            g.rax,
            self.vector,
            self.error,
            g.rip,
            self.cs,
            g.rflags,
            g.rsp,
            self.ss,
        ];
        for (n, word) in (0..).zip(words) {
            ram.set_word(TRAP_FRAME + n * 8, word);
        }
    }

    /// The handler does not return to where it came from, but halts.
    pub fn end(&mut self) {
        (self.general.rip, self.cs, self.ss) = (HANDLERS, KERNEL_CS.into(), KERNEL_DS.into());
    }
}

/// Guest memory as the test sees it.
#[derive(Clone)]
pub struct Ram(Arc<GuestRegion>);

impl Ram {
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.0.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_slice(&mut bytes, MemoryRegionAddress(gpa)).unwrap();
        bytes
    }

    pub fn word(&self, gpa: u64) -> u64 {
        self.0.read_obj(MemoryRegionAddress(gpa)).unwrap()
    }

    pub fn set_word(&self, gpa: u64, word: u64) {
        self.0.write_obj(word, MemoryRegionAddress(gpa)).unwrap();
    }

    /// The byte of code at a linear address.
    fn byte_at(&self, address: u64) -> u8 {
        let low = address % (2 * RAM);
        let gpa = if low < WINDOW {
            low
        } else {
            (self.word(window_entry((low - WINDOW) / PAGE)) & !(PAGE - 1)) + low % PAGE
        };
        self.bytes(gpa, 1)[0]
    }

    /// Sets the page-table entry of page `page` of the window; handlers flush the TLB before they return.
    pub fn map(&self, page: u64, entry: u64) {
        self.set_word(window_entry(page), entry);
    }
}

/// Guest-physical address of the page-table entry of page `page` of the window.
pub fn window_entry(page: u64) -> u64 {
    assert!(page < 512, "the window has 512 pages");
    WINDOW_TABLE + page * 8
}

/// See the module.
pub struct Machine {
    pub vcpu: Box<dyn Vcpu>,
    other: Option<Box<dyn Vcpu>>,
    pub vm: Arc<dyn Vm>,
    pub ram: Ram,
    /// What was asked where there is no memory.
    pub device: Device,
    tier: Tier,
}

impl Machine {
    /// A guest that is about to execute `code`, without interrupts.
    pub fn new(tier: Tier, code: &Code) -> Self {
        Self::with(tier, InterruptMode::External, code)
    }

    /// The same with interrupts in that mode.
    pub fn with(tier: Tier, interrupts: InterruptMode, code: &Code) -> Self {
        Self::of(tier, interrupts, 1, code)
    }

    fn of(tier: Tier, interrupts: InterruptMode, vcpus: u32, code: &Code) -> Self {
        let mut clock = ClockConfig::default();
        clock.source = tier.clock;
        let options =
            TranslateOptions::default().translate_after(tier.translate_after).address_window(tier.window);
        let config = VmConfig::new(CpuModel::Host).vcpus(vcpus).interrupts(interrupts).clock(clock);
        let vm = TranslateHypervisor::with_options(options).create_vm(&config).unwrap();
        // Shared, as the address window needs it.
        let memory = RegionConfig::new(GuestAddress(0), RAM).backing(Backing::Memfd);
        let memory = GuestRam::builder().region(memory).build().unwrap();
        let region = memory.regions().into_iter().next().unwrap();
        vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite).unwrap();
        let ram = Ram(region);
        write_tables(&ram);
        ram.write(code.address & (RAM - 1), &code.bytes);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let now = vcpu.system_registers().unwrap();
        vcpu.set_system_registers(&system_registers(&now)).unwrap();
        let general =
            GeneralRegisters { rip: code.address, rsp: STACK, rflags: 2, ..GeneralRegisters::default() };
        vcpu.set_registers(&general).unwrap();
        let mut machine = Self { vcpu, other: None, vm, ram, device: Device::default(), tier };
        if tier.user {
            machine.enter_user();
        }
        machine
    }

    /// A guest of two vCPUs, which take turns: see [`Machine::switch`]. Host time is all that there is for them.
    pub fn of_two(tier: Tier, code: &Code) -> Self {
        let tier = Tier { clock: ClockSource::Host, ..tier };
        let mut machine = Self::of(tier, InterruptMode::External, 2, code);
        let mut other = machine.vm.create_vcpu(1).unwrap();
        other.restore(&machine.vcpu.save().unwrap()).unwrap();
        machine.other = Some(other);
        machine
    }

    /// The other vCPU from here on.
    pub fn switch(&mut self) {
        std::mem::swap(&mut self.vcpu, self.other.as_mut().unwrap());
    }

    /// Sets the first vector register.
    pub fn set_xmm0(&mut self, value: [u8; 16]) {
        let mut state = self.vcpu.save().unwrap();
        let mut image = state.xsave.bytes().to_vec();
        image[160..176].copy_from_slice(&value);
        // SSE is in use.
        image[512] |= 2;
        state.xsave = XsaveArea::from_bytes(image).unwrap();
        self.vcpu.restore(&state).unwrap();
    }

    /// Lets the guest go on at privilege level 3.
    fn enter_user(&mut self) {
        let mut system = self.vcpu.system_registers().unwrap();
        system.cs = Segment { dpl: 3, ..Segment::code64(USER_CS) };
        system.ss = Segment { dpl: 3, ..Segment::data32(USER_DS) };
        self.vcpu.set_system_registers(&system).unwrap();
    }

    /// Changes general registers.
    pub fn set(&mut self, change: impl FnOnce(&mut GeneralRegisters)) {
        let mut general = self.vcpu.registers().unwrap();
        change(&mut general);
        self.vcpu.set_registers(&general).unwrap();
    }

    /// Runs to a HLT, without traps; the registers there.
    pub fn run(&mut self) -> GeneralRegisters {
        self.run_with(|trap, _| panic!("{trap:x?}"))
    }

    /// Runs from `rip` on.
    pub fn run_at(&mut self, rip: u64) -> GeneralRegisters {
        self.set(|general| general.rip = rip);
        self.run()
    }

    /// Runs to a HLT; the registers there.
    pub fn run_with(&mut self, mut on_trap: impl FnMut(&mut Trap, &Ram)) -> GeneralRegisters {
        let mut end = None;
        let ends_itself = self.tier.user;
        let on_trap = |trap: &mut Trap, ram: &Ram| {
            if ends_itself && trap.vector == 13 && ram.byte_at(trap.general.rip) == HLT {
                end = Some(GeneralRegisters { rip: trap.general.rip + 1, ..trap.general });
                trap.end();
            } else {
                on_trap(trap, ram);
            }
        };
        let mut bus = Bus { ram: self.ram.clone(), on_trap, device: std::mem::take(&mut self.device) };
        let general = self.run_on(&mut bus);
        self.device = bus.device;
        // As it would be where it may halt: the fault pushed RF.
        end.map_or(general, |end| GeneralRegisters { rflags: end.rflags & !RESUME_FLAG, ..end })
    }

    fn run_on<F: FnMut(&mut Trap, &Ram)>(&mut self, bus: &mut Bus<F>) -> GeneralRegisters {
        // A run after a HLT, which may have been the handlers'.
        let mut state = self.vcpu.save().unwrap();
        if state.run_state == RunState::Halted {
            state.run_state = RunState::Running;
            self.vcpu.restore(&state).unwrap();
            if self.tier.user {
                self.enter_user();
            }
        }
        let halt = self.vcpu.run(bus).unwrap();
        assert_eq!(halt, Halt::Halted, "{:?}: {}", self.tier, self.vcpu.registers().unwrap());
        self.check_tier();
        self.vcpu.registers().unwrap()
    }

    /// That tier was it. Where there is no translator, the interpreter is all that there is.
    pub fn check_tier(&self) {
        let counts = self.vcpu.exit_counts();
        let translations = counts.iter().find(|(name, _)| *name == "translations").map_or(0, |(_, n)| *n);
        let translates = self.tier.translate_after.is_some()
            && cfg!(all(target_arch = "x86_64", target_os = "linux", not(vmm_portable)));
        assert_eq!(translations != 0, translates, "{:?}: {counts:?}", self.tier);
        // What the window needs of the host's processor.
        #[cfg(target_arch = "x86_64")]
        if translates
            && self.tier.window == AddressWindow::Always
            && std::arch::is_x86_feature_detected!("bmi2")
        {
            let pages = counts.iter().find(|(name, _)| *name == "window-activations").unwrap();
            assert_ne!(pages.1, 0, "{:?}: {counts:?}", self.tier);
        }
    }
}

/// A device: what it was asked, and bytes that count up for whoever reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Reads without data, and writes.
    pub log: Vec<(u64, Vec<u8>)>,
}

/// The VMM.
pub struct Bus<F> {
    pub ram: Ram,
    pub on_trap: F,
    pub device: Device,
}

impl<F: FnMut(&mut Trap, &Ram)> VcpuIo for Bus<F> {
    fn pio_write(&mut self, port: u16, _: usize, _: &[u8]) {
        assert_eq!(port, TRAP_PORT);
        let mut trap = Trap::load(&self.ram);
        (self.on_trap)(&mut trap, &self.ram);
        trap.store(&self.ram);
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        self.device.log.push((gpa.0, Vec::new()));
        for (byte, address) in data.iter_mut().zip(gpa.0..) {
            *byte = address as u8 ^ 0xa5;
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.device.log.push((gpa.0, data.to_vec()));
    }
}

fn write_tables(ram: &Ram) {
    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | TSS << 16,
        0,
    ];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        ram.set_word(at, descriptor);
    }
    // RSP0, and the first entry of the interrupt stack table, which all gates use.
    ram.set_word(TSS + 4, TRAP_STACK);
    ram.set_word(TSS + 0x24, TRAP_STACK);
    let handlers = handlers(HANDLERS);
    assert!(HANDLERS + (handlers.code.bytes.len() as u64) < TRAP_FRAME - 8);
    ram.write(HANDLERS, &handlers.code.bytes);
    for (vector, handler) in (0_u64..).zip(handlers.vectors) {
        let rights = if vector < 0x80 { 0x8e } else { 0xee };
        let gate = handler & 0xffff
            | u64::from(KERNEL_CS) << 16
            | 1 << 32
            | rights << 40
            | (handler >> 16 & 0xffff) << 48;
        ram.set_word(IDT + vector * 16, gate);
        ram.set_word(IDT + vector * 16 + 8, handler >> 32);
    }
    ram.set_word(PML4, POINTERS | entry::ALL);
    ram.set_word(PML4 + 511 * 8, POINTERS | entry::ALL);
    ram.set_word(POINTERS, DIRECTORY | entry::ALL);
    ram.set_word(DIRECTORY, LOW_TABLE | entry::ALL);
    ram.set_word(DIRECTORY + 8, WINDOW_TABLE | entry::ALL);
    for page in 0..RAM / PAGE {
        ram.set_word(LOW_TABLE + page * 8, (page * PAGE) | entry::ALL);
    }
}

fn system_registers(now: &SystemRegisters) -> SystemRegisters {
    let data = Segment::data32(KERNEL_DS);
    SystemRegisters {
        cs: Segment::code64(KERNEL_CS),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(TASK, TSS),
        ldtr: Segment::null(),
        gdtr: DescriptorTable { base: GDT, limit: 0x37 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        // PE MP ET NE WP PG.
        cr0: 0x8001_0033,
        cr3: PML4,
        // PAE PGE OSFXSR OSXMMEXCPT.
        cr4: 0x6a0,
        // SCE LME LMA NXE.
        efer: 0xd01,
        ..*now
    }
}
