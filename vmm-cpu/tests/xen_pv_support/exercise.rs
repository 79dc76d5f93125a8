//! Lets a hostile kernel act, and checks what must hold whatever it does.

use std::sync::Arc;

use vmm_cpu::CpuidTable;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{GuestRam, RegionConfig};
use vmm_cpu::xen_pv::abi::vcpu::{VcpuGuestContext, vcpuop};
use vmm_cpu::xen_pv::abi::{self, PAGE_SIZE, domid, nr};
use vmm_cpu::xen_pv::engine::{Engine as _, EngineExit, GuestMode, Layout};
use vmm_cpu::xen_pv::{Action, Domain, DomainConfig, EventSink, GrantedFrame, VcpuAbi, Wake, pv_cpuid};

use zerocopy::{FromZeros, IntoBytes};

use super::engine::IdleEngine;
use super::guest::{Call, Edge, Group, Kernel, Number, Step, Value};

const RAM: u64 = 4 << 20;
const FRAMES: u64 = RAM / PAGE_SIZE;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const L4: u64 = 16;
const L3: u64 = 17;
const L2: u64 = 18;
const L1: u64 = 19;
/// Where structures lie: 32 KiB.
const ARENA: u64 = 0x10_0000;
const ARENA_SIZE: u64 = 0x8000;
const STACK: u64 = DIRECT + 0x8_0000;
const HANDLER: u64 = 0xffff_ffff_8100_0000;
const CONSOLE: u64 = 0x90;
/// What lies above all that the guest may touch.
const CANARY: u8 = 0xa5;

/// How far inputs got: the test looks whether they reach anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub succeeded: u64,
    pub failed: u64,
    pub again: u64,
    pub bounced: u64,
    pub waits: u64,
    pub ended: u64,
    pub live_stores: u64,
    pub roots: u64,
    pub grants: u64,
    pub started: u64,
    pub connected: u64,
}

impl Tally {
    /// Adds those of another input.
    pub fn add(&mut self, other: &Self) {
        self.succeeded += other.succeeded;
        self.failed += other.failed;
        self.again += other.again;
        self.bounced += other.bounced;
        self.waits += other.waits;
        self.ended += other.ended;
        self.live_stores += other.live_stores;
        self.roots += other.roots;
        self.grants += other.grants;
        self.started += other.started;
        self.connected += other.connected;
    }
}

#[derive(Debug)]
struct Deaf;

impl EventSink for Deaf {
    fn notify(&self) {}
}

struct Machine {
    layout: Layout,
    ram: GuestRam,
    domain: Arc<Domain>,
    vcpu: VcpuAbi,
    engine: IdleEngine,
    other: (VcpuAbi, IdleEngine),
    grants: Vec<GrantedFrame>,
    tally: Tally,
}

/// Runs an input.
pub fn exercise(kernel: &Kernel) -> Tally {
    let mut sum = Tally::default();
    let mut machine = Machine::new();
    for step in &kernel.0 {
        if !machine.step(step) {
            sum.add(&machine.finish());
            sum.ended += 1;
            machine = Machine::new();
        }
    }
    sum.add(&machine.finish());
    sum
}

impl Machine {
    fn new() -> Self {
        let layout = Layout::new(RAM).unwrap();
        // A page above everything, which nobody may touch.
        let size = layout.private().0 + PAGE_SIZE;
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), size)).build().unwrap();
        ram.memory().write_slice(&[CANARY; PAGE_SIZE as usize], layout.private()).unwrap();
        let gap = GuestAddress(layout.abi_frames().end * PAGE_SIZE);
        ram.memory().write_slice(&[CANARY; PAGE_SIZE as usize], gap).unwrap();
        let mut config = DomainConfig::new(ram.clone(), layout, 1_000_000);
        config.vcpus = 2;
        config.cpuid = pv_cpuid(&CpuidTable::default());
        let domain = Domain::new(config).unwrap();
        domain.identity_m2p().unwrap();
        domain.attach_console(CONSOLE).unwrap();
        let mut vcpu = VcpuAbi::new(Arc::clone(&domain), 0).unwrap();
        let mut engine = IdleEngine::new(ram.clone(), layout);
        map(&ram, layout);
        vcpu.adopt_initial_root(&mut engine, L4).unwrap();
        engine.context.general.rsp = STACK;
        engine.context.general.rip = HANDLER + 2;
        let other = (VcpuAbi::new(Arc::clone(&domain), 1).unwrap(), IdleEngine::new(ram.clone(), layout));
        let mut machine =
            Self { layout, ram, domain, vcpu, engine, other, grants: Vec::new(), tally: Tally::default() };
        machine.set_handlers();
        machine
    }

    /// Handlers for exceptions, events and system calls, a kernel stack, a user root.
    fn set_handlers(&mut self) {
        let traps = (0..32).flat_map(|vector| [vector | 4 << 8 | 0x10 << 16, HANDLER + vector]).chain([0, 0]);
        self.put(0, &traps.collect::<Vec<_>>());
        self.hypercall(nr::SET_TRAP_TABLE, [DIRECT + ARENA, 0, 0, 0]);
        self.hypercall(nr::SET_CALLBACKS, [HANDLER + 0x100, HANDLER + 0x110, HANDLER + 0x120, 0]);
        self.hypercall(nr::STACK_SWITCH, [0x18, STACK + 0x1000, 0, 0]);
        self.tally = Tally::default();
    }

    fn put(&mut self, at: u64, words: &[u64]) {
        for (offset, word) in (at..).step_by(8).zip(words) {
            // What does not fit is left out.
            if offset + 8 <= ARENA_SIZE {
                self.ram.memory().write_obj(*word, GuestAddress(ARENA + offset)).unwrap();
            }
        }
    }

    fn value(&self, value: &Value) -> u64 {
        let frame = |frame: u16| u64::from(frame) % (self.layout.abi_frames().end + 2);
        match *value {
            Value::Small(value) => value.into(),
            Value::Word(value) => value.into(),
            Value::Any(value) => value,
            Value::Arena(offset) => DIRECT + ARENA + u64::from(offset) % ARENA_SIZE,
            Value::Direct { frame: number, offset } => {
                DIRECT + frame(number) * PAGE_SIZE + u64::from(offset) % PAGE_SIZE
            }
            Value::Frame(number) => frame(number),
            Value::Entry { frame: number, bits } => {
                (frame(number) * PAGE_SIZE) | u64::from(bits & 0xfff) | u64::from(bits >> 15) << 63
            }
            Value::EntryAddress { table, index, command } => {
                (L4 + u64::from(table) % 8) * PAGE_SIZE + u64::from(index % 512) * 8 + u64::from(command % 4)
            }
            Value::Edge(edge) => match edge {
                Edge::EndOfRam => RAM,
                Edge::EndOfFrames => DIRECT + self.layout.abi_frames().end * PAGE_SIZE - 4,
                Edge::EndOfArena => DIRECT + ARENA + ARENA_SIZE - 4,
                Edge::Hole => 0xffff_8000_0000_0000,
                Edge::EndOfHole => 0xffff_87ff_ffff_fffc,
                Edge::MachineToPhysical => 0xffff_8180_0000_0000,
                Edge::NotCanonical => 1 << 47,
                Edge::Last => u64::MAX,
                Edge::LastPage => u64::MAX << 12,
                Edge::Sign => 1 << 31,
                Edge::Handler => HANDLER,
            },
            Value::Domain(domain) => match domain {
                super::guest::Domain::Own => domid::SELF.into(),
                super::guest::Domain::Io => domid::IO.into(),
                super::guest::Domain::Backend => domid::BACKEND.into(),
                super::guest::Domain::Other(other) => other.into(),
            },
        }
    }

    fn call(&self, call: &Call) -> (u64, [u64; 4]) {
        let mut args = call.args.map(|value| self.value(&value));
        let nr = match call.nr {
            Number::Plain(nr) => u64::from(nr % 64),
            Number::Any(nr) => nr,
            Number::Command { nr, command } => {
                let (nr, commands) = match nr {
                    Group::Memory => (nr::MEMORY_OP, 16),
                    Group::Version => (nr::XEN_VERSION, 10),
                    Group::Console => (nr::CONSOLE_IO, 3),
                    Group::Grant => (nr::GRANT_TABLE_OP, 13),
                    Group::Assist => (nr::VM_ASSIST, 3),
                    Group::Vcpu => (nr::VCPU_OP, 15),
                    Group::Sched => (nr::SCHED_OP, 8),
                    Group::Callback => (nr::CALLBACK_OP, 3),
                    Group::Event => (nr::EVENT_CHANNEL_OP, 15),
                    Group::Physdev => (nr::PHYSDEV_OP, 10),
                    Group::Nmi => (nr::NMI_OP, 3),
                    Group::SegmentBase => (nr::SET_SEGMENT_BASE, 5),
                };
                args[0] = u64::from(command) % commands;
                nr
            }
        };
        (nr, args)
    }

    /// Makes a hypercall as the kernel. Returns whether the domain goes on.
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> bool {
        self.switch_to_kernel();
        let general = &mut self.engine.context.general;
        [general.rdi, general.rsi, general.rdx, general.r10] = args;
        general.rax = nr;
        let rip = general.rip;
        let action = self.vcpu.handle_exit(&mut self.engine, EngineExit::Syscall).unwrap();
        let general = self.engine.context.general;
        if nr != nr::IRET {
            assert!(general.rip == rip || general.rip == rip.wrapping_sub(2), "RIP {:#x}", general.rip);
            if general.rip != rip {
                self.tally.again += 1;
            } else if (-4095..0).contains(&general.rax.cast_signed()) {
                self.tally.failed += 1;
            } else {
                self.tally.succeeded += 1;
            }
        }
        self.follow(action)
    }

    fn switch_to_kernel(&mut self) {
        self.engine.context.switch_mode(GuestMode::Kernel);
    }

    fn exception(&mut self, vector: u8, error_code: u32, address: u64) -> bool {
        let exit = EngineExit::Exception { vector: vector % 32, error_code, address };
        let rip = self.engine.context.general.rip;
        let action = self.vcpu.handle_exit(&mut self.engine, exit).unwrap();
        self.tally.bounced += u64::from(self.engine.context.general.rip != rip);
        self.follow(action)
    }

    /// Does what the loop of a virtual processor does. Returns whether the domain goes on.
    fn follow(&mut self, action: Action) -> bool {
        match action {
            Action::Continue | Action::Yield => true,
            Action::Block | Action::Offline => {
                self.tally.waits += 1;
                self.domain.kick(0);
                let wake = self.vcpu.wait(&mut self.engine).unwrap();
                self.vcpu.take_kick();
                assert!(!matches!(wake, Wake::Shutdown(_)));
                // Offline, nobody would bring it up again.
                action == Action::Block
            }
            Action::Shutdown(reason) => {
                assert!(self.domain.shutdown_reason().is_some(), "{reason:?}");
                false
            }
            Action::Crash(text) => {
                assert!(!text.is_empty() && self.domain.shutdown_reason().is_some());
                false
            }
            _ => false,
        }
    }

    fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::Write { at, words } => {
                let words: Vec<_> = words.iter().map(|value| self.value(value)).collect();
                self.put((u64::from(*at) % ARENA_SIZE) & !7, &words);
            }
            Step::Store { frame, index, value } => {
                let frame = u64::from(*frame) % self.layout.abi_frames().end;
                let at = GuestAddress(frame * PAGE_SIZE + u64::from(index % 512) * 8);
                self.ram.memory().write_obj(self.value(value), at).unwrap();
            }
            Step::Call(call) => {
                let (nr, args) = self.call(call);
                return self.hypercall(nr, args);
            }
            Step::Updates { extended, list } => return self.updates(*extended, list),
            Step::Multicall(calls) => {
                let words: Vec<_> = calls
                    .iter()
                    .flat_map(|call| {
                        let (nr, [a, b, c, d]) = self.call(call);
                        [nr, 0, a, b, c, d, 0, 0]
                    })
                    .collect();
                self.put(0x4000, &words);
                return self.hypercall(nr::MULTICALL, [DIRECT + ARENA + 0x4000, calls.len() as u64, 0, 0]);
            }
            Step::Iret { frame } => {
                let words = frame.map(|value| self.value(&value));
                self.put(0x6000, &words);
                self.engine.context.general.rsp = DIRECT + ARENA + 0x6000;
                return self.hypercall(nr::IRET, [0; 4]);
            }
            Step::Exception { vector, error_code, address } => {
                let address = self.value(address);
                return self.exception(*vector, u32::from(*error_code), address);
            }
            Step::Instruction { code, invalid } => {
                self.put(0x7000, &[u64::from_le_bytes(*code)]);
                self.engine.context.general.rip = DIRECT + ARENA + 0x7000;
                return self.exception(if *invalid { 6 } else { 13 }, 0, 0);
            }
            Step::Prefixed { leaf } => {
                let leaf = self.value(leaf);
                self.put(0x7000, &[u64::from_le_bytes([0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2, 0])]);
                self.engine.context.general.rip = DIRECT + ARENA + 0x7000;
                self.engine.context.general.rax = leaf;
                return self.exception(6, 0, 0);
            }
            Step::Register { which, value } => self.set_register(*which, self.value(value)),
            Step::User(user) => {
                let mode = if *user { GuestMode::User } else { GuestMode::Kernel };
                self.engine.context.switch_mode(mode);
            }
            Step::SystemCall => {
                self.engine.context.switch_mode(GuestMode::User);
                let action = self.vcpu.handle_exit(&mut self.engine, EngineExit::Syscall).unwrap();
                return self.follow(action);
            }
            Step::Enter => {
                let action = self.vcpu.before_entry(&mut self.engine).unwrap();
                return self.follow(action);
            }
            Step::Pass(ns) => self.engine.tsc = self.engine.tsc.saturating_add(u64::from(*ns)),
            Step::Input(count) => self.domain.console_input(&vec![b'x'; usize::from(*count)]),
            Step::Raise(port) => {
                self.domain.events().raise(u32::from(*port));
                let connected =
                    self.domain.events().connect(u32::from(*port), domid::BACKEND, Arc::new(Deaf));
                self.tally.connected += u64::from(connected.is_ok());
            }
            Step::UseGrant { reference, flags, frame, writable } => {
                // Most are within the table, whole pages for the back end.
                let reference = if *flags & 0x80 == 0 { reference % 512 } else { *reference };
                let (first, entry) = (self.layout.abi_frames().start + 1, u64::from(reference % 512) * 8);
                let frame = u64::from(*frame) % (FRAMES + 8);
                let value = u64::from(flags & 0x7f) | frame << 32;
                self.ram.memory().write_obj(value, GuestAddress(first * PAGE_SIZE + entry)).unwrap();
                if let Ok(grant) = self.domain.use_grant(u32::from(reference), domid::BACKEND, *writable) {
                    assert!(grant.address().0 < RAM, "{grant:?}");
                    self.tally.grants += 1;
                    self.grants.push(grant);
                }
            }
            Step::DropGrant => drop(self.grants.pop()),
            Step::StartOther { changes } => return self.start_other(changes),
        }
        true
    }

    fn updates(&mut self, extended: bool, list: &[(Value, Value, Value)]) -> bool {
        let words: Vec<_> = list
            .iter()
            .flat_map(|(a, b, c)| {
                let [a, b, c] = [a, b, c].map(|value| self.value(value));
                if extended { vec![a % 22, b, c] } else { vec![a, b] }
            })
            .collect();
        self.put(0x2000, &words);
        let nr = if extended { nr::MMUEXT_OP } else { nr::MMU_UPDATE };
        let args = [DIRECT + ARENA + 0x2000, list.len() as u64, DIRECT + ARENA + 0x1ff8, domid::SELF.into()];
        self.hypercall(nr, args)
    }

    fn start_other(&mut self, changes: &[(u16, Value)]) -> bool {
        let mut context = VcpuGuestContext::new_zeroed();
        context.ctrlreg[3] = L4 * PAGE_SIZE;
        context.gdt_frames[0] = ARENA / PAGE_SIZE;
        context.gdt_ents = 16;
        let mut words: Vec<_> = context
            .as_bytes()
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let count = words.len();
        for (place, value) in changes {
            words[usize::from(*place) % count] = self.value(value);
        }
        self.put(0, &words);
        let on = self.hypercall(nr::VCPU_OP, [vcpuop::INITIALISE, 1, DIRECT + ARENA, 0])
            && self.hypercall(nr::VCPU_OP, [vcpuop::UP, 1, 0, 0]);
        if on {
            let (vcpu, engine) = &mut self.other;
            self.tally.started += u64::from(vcpu.start(engine).unwrap());
            let action = vcpu.before_entry(engine).unwrap();
            return !matches!(action, Action::Shutdown(_) | Action::Crash(_));
        }
        on
    }

    fn set_register(&mut self, which: u8, value: u64) {
        let context = self.engine.context();
        let general = &mut context.general;
        let selector = value as u16;
        match which % 12 {
            0 => general.rsp = value,
            1 => general.rip = value,
            2 => general.rflags = value,
            3 => general.rax = value,
            4 => general.rcx = value,
            5 => general.rdx = value,
            6 => context.cs = selector,
            7 => context.ss = selector,
            8 => context.gs = selector,
            9 => context.fs_base = value,
            10 => context.gs_base = value,
            _ => context.other_gs_base = value,
        }
    }

    fn finish(mut self) -> Tally {
        self.grants.clear();
        for at in [self.layout.private().0, self.layout.abi_frames().end * PAGE_SIZE] {
            let mut page = [0; PAGE_SIZE as usize];
            self.ram.memory().read_slice(&mut page, GuestAddress(at)).unwrap();
            assert!(page.iter().all(|byte| *byte == CANARY), "memory at {at:#x} is not the guest's");
        }
        self.tally.live_stores += self.engine.live_stores;
        self.tally.roots += self.engine.prepared;
        self.tally
    }
}

/// All frames that the guest may map, at [`DIRECT`].
fn map(ram: &GuestRam, layout: Layout) {
    use abi::mmu::entry;
    let memory = ram.memory();
    let store = |table: u64, index: u64, frame: u64| {
        let value = (frame * PAGE_SIZE) | entry::PRESENT | entry::WRITABLE | entry::USER;
        memory.write_obj(value, GuestAddress(table * PAGE_SIZE + index * 8)).unwrap();
    };
    store(L4, (DIRECT >> 39) & 511, L3);
    store(L3, 0, L2);
    for table in 0..=FRAMES / 512 {
        store(L2, table, L1 + table);
    }
    for frame in 0..layout.abi_frames().end {
        store(L1 + frame / 512, frame % 512, frame);
    }
}
