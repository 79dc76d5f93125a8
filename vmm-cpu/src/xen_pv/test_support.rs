//! A domain with memory and page tables, and an engine that executes nothing: what it is told is kept for the test to look
//! at.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::errno::Errno;
use super::abi::mmu::entry;
use super::abi::{PAGE_SIZE, shared_info};
use super::console::{ConsoleSink, ConsoleSource};
use super::domain::{Domain, DomainConfig};
use super::engine::{Context, Engine, EngineCapabilities, EngineExit, EngineHandle, GuestMode, Layout, Mmu};
use super::gate::EventSink;
use super::vcpu_abi::{Action, VcpuAbi};
use crate::cpuid::{CpuidEntry, CpuidTable};
use crate::error::{Error, Result};

/// RAM of the domain.
pub(crate) const RAM: u64 = 8 << 20;
pub(crate) const FRAMES: u64 = RAM / PAGE_SIZE;
/// Where the guest maps all its frames, shared ones too.
pub(crate) const DIRECT: u64 = 0xffff_8880_0000_0000;
/// Frames of the tables that do that.
pub(crate) const L4: u64 = 16;
pub(crate) const L3: u64 = 17;
pub(crate) const L2: u64 = 18;
pub(crate) const L1: u64 = 19;
/// The guest kernel's stack pointer, at first.
pub(crate) const STACK: u64 = DIRECT + 0x8_0000;
/// Where [`Guest::put`] puts things.
const ARENA: u64 = 0x20_0000;
/// Frames from here on are free for the test.
pub(crate) const FREE: u64 = 0x400;
pub(crate) const TSC_KHZ: u32 = 1_000_000;

/// Kicks and flushes.
#[derive(Debug, Default)]
pub(crate) struct TestHandle {
    pub(crate) kicks: AtomicU32,
    pub(crate) flushes: AtomicU32,
}

impl EngineHandle for TestHandle {
    fn kick(&self) {
        self.kicks.fetch_add(1, Ordering::SeqCst);
    }

    fn flush(&self) {
        self.flushes.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct TestEngine {
    pub(crate) ram: GuestRam,
    pub(crate) context: Context,
    pub(crate) kernel_root: u64,
    pub(crate) user_root: Option<u64>,
    pub(crate) prepared: Vec<(u64, GuestMode)>,
    pub(crate) live_stores: Vec<(u64, u64)>,
    /// How many of them are published.
    pub(crate) published: usize,
    pub(crate) flushed: Vec<Option<u64>>,
    pub(crate) descriptors: Vec<u64>,
    pub(crate) debug: [u64; 8],
    pub(crate) task_switched: bool,
    pub(crate) xcr0: u64,
    pub(crate) tsc: Arc<AtomicU64>,
    pub(crate) handle: Arc<TestHandle>,
}

impl fmt::Debug for TestEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestEngine").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Mmu for TestEngine {
    fn write_entry_keeping(&mut self, gpa: GuestAddress, value: u64, keep: u64) -> Result<()> {
        let old: u64 = self.ram.memory().load(gpa, Ordering::Relaxed).unwrap_or(0);
        self.write_entry(gpa, value | old & keep)
    }

    fn write_entry(&mut self, gpa: GuestAddress, value: u64) -> Result<()> {
        if !gpa.0.is_multiple_of(8) || gpa.0 >= RAM {
            return Err(Error::invalid("page-table entry", gpa.0, "aligned, in RAM"));
        }
        self.live_stores.push((gpa.0, value));
        self.ram
            .memory()
            .store(value, gpa, Ordering::Relaxed)
            .map_err(|_| Error::invalid("entry", gpa.0, "RAM"))
    }

    fn publish_entries(&mut self) -> Result<()> {
        self.published = self.live_stores.len();
        Ok(())
    }

    fn prepare_root(&mut self, gpa: GuestAddress, mode: GuestMode) -> Result<()> {
        self.prepared.push((gpa.0, mode));
        Ok(())
    }

    fn set_kernel_root(&mut self, gpa: GuestAddress) -> Result<()> {
        self.kernel_root = gpa.0;
        Ok(())
    }

    fn set_user_root(&mut self, gpa: Option<GuestAddress>) -> Result<()> {
        self.user_root = gpa.map(|gpa| gpa.0);
        Ok(())
    }

    fn kernel_root(&self) -> GuestAddress {
        GuestAddress(self.kernel_root)
    }

    fn user_root(&self) -> Option<GuestAddress> {
        self.user_root.map(GuestAddress)
    }

    fn flush_all(&mut self) {
        self.flushed.push(None);
    }

    fn flush_page(&mut self, va: u64) {
        self.flushed.push(Some(va));
    }
}

impl Engine for TestEngine {
    fn run(&mut self) -> Result<EngineExit> {
        Ok(EngineExit::Interrupted)
    }

    fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    fn handle(&self) -> Arc<dyn EngineHandle> {
        Arc::<TestHandle>::clone(&self.handle)
    }

    fn capabilities(&self) -> EngineCapabilities {
        EngineCapabilities { tsc_khz: TSC_KHZ, xcr0: 7, compatibility_mode: false }
    }

    fn time_stamp(&mut self) -> Result<u64> {
        Ok(self.tsc.load(Ordering::SeqCst))
    }

    fn set_descriptor(&mut self, index: u16, descriptor: u64) -> bool {
        self.descriptors[usize::from(index)] = descriptor;
        true
    }

    fn descriptor(&self, index: u16) -> u64 {
        self.descriptors[usize::from(index)]
    }

    fn set_task_switched(&mut self, set: bool) {
        self.task_switched = set;
    }

    fn set_xcr0(&mut self, value: u64) -> Result<()> {
        if value & 1 == 0 || value & !7 != 0 {
            return Err(Error::invalid("XCR0", value, "1 to 7, odd"));
        }
        self.xcr0 = value;
        Ok(())
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        self.debug[usize::from(number)]
    }

    fn set_debug_register(&mut self, number: u8, value: u64) -> Result<()> {
        self.debug[usize::from(number)] = value;
        Ok(())
    }
}

/// What the console got.
#[derive(Clone, Debug, Default)]
pub(crate) struct Printed(Arc<Mutex<Vec<(ConsoleSource, u8)>>>);

impl Printed {
    /// What was printed that way.
    pub(crate) fn by(&self, wanted: ConsoleSource) -> Vec<u8> {
        let printed = self.0.lock().unwrap();
        printed.iter().filter(|(source, _)| *source == wanted).map(|(_, byte)| *byte).collect()
    }
}

impl ConsoleSink for Printed {
    fn write(&mut self, source: ConsoleSource, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes.iter().map(|byte| (source, *byte)));
    }
}

/// Counts events.
#[derive(Debug, Default)]
pub(crate) struct Counter(pub(crate) AtomicU32);

impl EventSink for Counter {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct Guest {
    pub(crate) domain: Arc<Domain>,
    pub(crate) vcpu: VcpuAbi,
    pub(crate) engine: TestEngine,
    pub(crate) printed: Printed,
    arena: u64,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(configure: impl FnOnce(&mut DomainConfig)) -> Self {
        let layout = Layout::new(RAM).unwrap();
        let ram = GuestRam::builder()
            .region(RegionConfig::new(GuestAddress(0), layout.private().0))
            .build()
            .unwrap();
        let printed = Printed::default();
        let mut config = DomainConfig::new(ram.clone(), layout, TSC_KHZ);
        config.vcpus = 2;
        config.cpuid = super::pv_cpuid(&CpuidTable::new(vec![CpuidEntry::new(1, None, [1, 2, u32::MAX, 4])]));
        config.console = Box::new(printed.clone());
        configure(&mut config);
        let domain = Domain::new(config).unwrap();
        domain.identity_m2p().unwrap();
        let engine = Self::engine_on(&ram);
        domain.set_handle(0, engine.handle()).unwrap();
        let vcpu = VcpuAbi::new(Arc::clone(&domain), 0).unwrap();
        let mut guest = Self { domain, vcpu, engine, printed, arena: ARENA };
        guest.map_everything();
        let Self { vcpu, engine, .. } = &mut guest;
        vcpu.adopt_initial_root(engine, L4).unwrap();
        assert_eq!(vcpu.before_entry(engine).unwrap(), Action::Continue);
        engine.prepared.clear();
        engine.live_stores.clear();
        engine.context.general.rsp = STACK;
        engine.context.general.rip = 0xffff_ffff_8100_0002;
        guest
    }

    /// An engine that was told nothing yet.
    pub(crate) fn engine_on(ram: &GuestRam) -> TestEngine {
        TestEngine {
            ram: ram.clone(),
            context: Context::default(),
            kernel_root: 0,
            user_root: None,
            prepared: Vec::new(),
            live_stores: Vec::new(),
            published: 0,
            flushed: Vec::new(),
            descriptors: vec![0; 8192],
            debug: [0; 8],
            task_switched: false,
            xcr0: 1,
            tsc: Arc::default(),
            handle: Arc::default(),
        }
    }

    fn map_everything(&mut self) {
        let link = |frame: u64| (frame * PAGE_SIZE) | entry::PRESENT | entry::WRITABLE;
        self.store(L4, (DIRECT >> 39) & 511, link(L3));
        self.store(L3, 0, link(L2));
        for table in 0..=FRAMES / 512 {
            self.store(L2, table, link(L1 + table));
        }
        for frame in 0..self.domain.memory.layout().abi_frames().end {
            self.store(L1 + frame / 512, frame % 512, link(frame));
        }
    }

    /// Stores an entry of a table behind everybody's back.
    pub(crate) fn store(&self, table: u64, index: u64, value: u64) {
        let at = GuestAddress(table * PAGE_SIZE + index * 8);
        self.engine.ram.memory().write_obj(value, at).unwrap();
    }

    pub(crate) fn load(&self, table: u64, index: u64) -> u64 {
        self.engine.ram.memory().read_obj(GuestAddress(table * PAGE_SIZE + index * 8)).unwrap()
    }

    /// Where a guest-physical address is mapped.
    pub(crate) fn va(gpa: u64) -> u64 {
        DIRECT + gpa
    }

    /// Puts bytes into guest memory and gives their guest-virtual address.
    pub(crate) fn put_bytes(&mut self, bytes: &[u8]) -> u64 {
        let at = self.arena;
        self.arena += (bytes.len() as u64).next_multiple_of(64);
        assert!(self.arena < FREE * PAGE_SIZE, "the arena is full");
        self.engine.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        Self::va(at)
    }

    pub(crate) fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, value: &T) -> u64 {
        self.put_bytes(value.as_bytes())
    }

    pub(crate) fn get<T: FromBytes>(&self, va: u64) -> T {
        let mut bytes = vec![0; size_of::<T>()];
        self.engine.ram.memory().read_slice(&mut bytes, GuestAddress(va - DIRECT)).unwrap();
        T::read_from_bytes(&bytes).unwrap()
    }

    /// Makes a hypercall as the guest kernel would: what comes of it, and RAX.
    pub(crate) fn syscall(&mut self, nr: u64, args: &[u64]) -> (Action, u64) {
        let general = &mut self.engine.context.general;
        general.rax = nr;
        let mut registers = [0; 6];
        registers[..args.len()].copy_from_slice(args);
        [general.rdi, general.rsi, general.rdx, general.r10, general.r8, general.r9] = registers;
        let action = self.vcpu.handle_exit(&mut self.engine, EngineExit::Syscall).unwrap();
        (action, self.engine.context.general.rax)
    }

    /// A hypercall that does nothing but answer, made again as often as it wants.
    pub(crate) fn call(&mut self, nr: u64, args: &[u64]) -> Result<u64, Errno> {
        let rip = self.engine.context.general.rip;
        let (mut action, mut rax) = self.syscall(nr, args);
        let mut rounds = 0;
        while self.engine.context.general.rip == rip - 2 {
            rounds += 1;
            assert!(rounds < 100_000, "the call never ends");
            self.engine.context.general.rip = rip;
            action = self.vcpu.handle_exit(&mut self.engine, EngineExit::Syscall).unwrap();
            rax = self.engine.context.general.rax;
        }
        assert_eq!(action, Action::Continue);
        match rax.cast_signed() {
            negative @ -4095..=-1 => Err(Errno(u16::try_from(-negative).unwrap())),
            _ => Ok(rax),
        }
    }

    pub(crate) fn exception(&mut self, vector: u8, error_code: u32, address: u64) -> Action {
        let exit = EngineExit::Exception { vector, error_code, address };
        self.vcpu.handle_exit(&mut self.engine, exit).unwrap()
    }

    pub(crate) fn before_entry(&mut self) -> Action {
        self.vcpu.before_entry(&mut self.engine).unwrap()
    }

    /// A kick ends a stay in the guest, and another begins.
    pub(crate) fn interrupt(&mut self) {
        let action = self.vcpu.handle_exit(&mut self.engine, EngineExit::Interrupted).unwrap();
        assert_eq!(action, Action::Continue);
        self.before_entry();
    }

    /// A byte of the `vcpu_info`.
    pub(crate) fn info_byte(&self, offset: u64) -> u8 {
        self.domain.memory.load_byte(self.vcpu.info() + offset).unwrap()
    }

    pub(crate) fn set_mask(&self, masked: bool) {
        let at = self.vcpu.info() + shared_info::UPCALL_MASK;
        self.domain.memory.swap_byte(at, masked.into()).unwrap();
    }

    pub(crate) fn shared_word(&self, offset: u64) -> u64 {
        self.domain.memory.load(self.domain.memory.shared_info() + offset).unwrap()
    }

    /// Lets time pass, in nanoseconds.
    pub(crate) fn pass(&self, ns: u64) {
        self.engine.tsc.fetch_add(ns, Ordering::SeqCst);
    }
}
