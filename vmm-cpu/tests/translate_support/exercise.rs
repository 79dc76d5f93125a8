//! Runs a hostile guest, and checks what must hold whatever it does.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use vmm_cpu::state::{
    CpuState, ExceptionEvent, ExceptionStage, InterruptEvent, LocalApicState, Msr, RunState, XsaveArea,
};
use vmm_cpu::translate::TranslateHypervisor;
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, DebugRequest, Error, Halt, HardwareStop, Hypervisor, InterruptMode,
    MsrRange, Vcpu, VcpuHandle, VmConfig,
};

use super::arena::{Arena, BELOW_4G, MOVABLE};
use super::bus::{Board, Bus};
use super::code::Assembler;
use super::guest::{Guest, Mutation, Start, Step};
use super::{layout, watchdog};

/// Single steps in a row.
const STEPS: u32 = 64;

/// How runs ended: the test looks whether its inputs reach all of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub runs: u64,
    pub halted: u64,
    pub shutdown: u64,
    pub debug: u64,
    pub interrupted: u64,
    pub unhandled: u64,
    pub calls: u64,
    pub instructions: u64,
    pub restored: u64,
    pub refused: u64,
}

impl Tally {
    /// Adds those of another input.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.halted += other.halted;
        self.shutdown += other.shutdown;
        self.debug += other.debug;
        self.interrupted += other.interrupted;
        self.unhandled += other.unhandled;
        self.calls += other.calls;
        self.instructions += other.instructions;
        self.restored += other.restored;
        self.refused += other.refused;
    }
}

struct Machine<'a> {
    guest: &'a Guest,
    hypervisor: &'a TranslateHypervisor,
    config: VmConfig,
    // vCPUs and bus before the board with the memory.
    vcpus: Vec<Box<dyn Vcpu>>,
    current: usize,
    bus: Bus,
    board: Rc<Board>,
    paused: bool,
    tally: Tally,
}

fn hypervisor() -> Arc<TranslateHypervisor> {
    thread_local! {
        static HYPERVISOR: Arc<TranslateHypervisor> = Arc::new(TranslateHypervisor::new());
    }
    HYPERVISOR.with(Arc::clone)
}

/// Runs the guest of an input.
pub fn exercise(guest: &Guest) -> Tally {
    let hypervisor = hypervisor();
    let deterministic = guest.deterministic && !guest.two;
    let mut clock = ClockConfig::default();
    if deterministic {
        clock.source = ClockSource::Deterministic;
    }
    let interrupts = if guest.local_apic { InterruptMode::LocalApic } else { InterruptMode::External };
    let config =
        VmConfig::new(CpuModel::Host).vcpus(1 + u32::from(guest.two)).interrupts(interrupts).clock(clock);
    let arena = Rc::new(Arena::new());
    let vm = hypervisor.create_vm(&config).unwrap();
    arena.map(&*vm);
    let vcpus: Vec<_> = (0..config.max_vcpus).map(|index| vm.create_vcpu(index).unwrap()).collect();
    let board =
        Rc::new(Board { vm, log: RefCell::new(None), taken: RefCell::new(None), arena: Rc::clone(&arena) });
    let bus = Bus {
        board: Rc::clone(&board),
        handle: vcpus[0].handle(),
        reactions: guest.reactions.clone(),
        answers: guest.answers.clone(),
        calls: 0,
        put: false,
        next: 0,
    };
    let mut machine = Machine {
        guest,
        hypervisor: &hypervisor,
        config,
        vcpus,
        current: 0,
        bus,
        board,
        paused: false,
        tally: Tally::default(),
    };
    machine.prepare();
    machine.start(&guest.start, 0);
    machine.run();
    for step in &guest.steps {
        machine.step(step);
    }
    machine.finish();
    let tally = machine.tally;
    drop(machine);
    arena.check();
    tally
}

impl Machine<'_> {
    fn prepare(&mut self) {
        let (guest, arena) = (self.guest, &self.board.arena);
        // Whoever gets off the track halts.
        arena.write(layout::HANDLERS, &[0xf4; 0xc000]);
        arena.write(BELOW_4G.gpa, &[0xf4; 0x1_0000]);
        layout::write_page_tables(arena, &guest.entries);
        layout::write_tables(arena, guest.start.mode, guest.handlers, &guest.descriptors);
        let mut assembler = Assembler::new(guest.start.mode.code_bits());
        for instruction in &guest.code {
            assembler.emit(instruction);
        }
        let mut code = assembler.finish();
        code.truncate(layout::CODE_SIZE.into());
        arena.write(layout::CODE, &code);
    }

    fn vcpu(&mut self) -> &mut dyn Vcpu {
        &mut *self.vcpus[self.current]
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.vcpus[self.current].handle()
    }

    /// Puts the vCPU into a start, if it is one that a processor can be in.
    fn start(&mut self, start: &Start, entry: u8) {
        // One that was halted, or waits for another processor, is woken.
        let mut state = self.vcpu().save().unwrap();
        if state.run_state != RunState::Running {
            state.run_state = RunState::Running;
            self.vcpu().restore(&state).unwrap();
        }
        let now = self.vcpu().system_registers().unwrap();
        let system = layout::system_registers(start, &now);
        let mut general = layout::general_registers(start);
        general.rip += u64::from(entry);
        match self.vcpu().set_system_registers(&system) {
            Ok(()) => {}
            Err(Error::InvalidState { .. }) => {
                assert_eq!(self.vcpu().system_registers().unwrap(), now, "refused, but something changed");
                let system = layout::system_registers(&start.sane(), &now);
                self.vcpu().set_system_registers(&system).unwrap();
            }
            Err(error) => panic!("{error:?}"),
        }
        self.vcpu().set_registers(&general).unwrap();
        assert_eq!(self.vcpu().registers().unwrap().rip, general.rip);
    }

    fn run(&mut self) -> Option<Halt> {
        let handle = self.handle();
        self.bus.rewind(Arc::clone(&handle));
        let watch = watchdog::watch(handle, || format!("{:#?}", self.guest));
        let result = self.vcpus[self.current].run(&mut self.bus);
        drop(watch);
        let tally = &mut self.tally;
        tally.runs += 1;
        tally.calls += u64::from(self.bus.calls);
        match &result {
            Ok(Halt::Halted) => tally.halted += 1,
            Ok(Halt::Shutdown) => tally.shutdown += 1,
            Ok(Halt::Debug(_)) => tally.debug += 1,
            Ok(Halt::Interrupted) => tally.interrupted += 1,
            Ok(other) => panic!("{other:?}"),
            Err(Error::Unhandled(unhandled)) => {
                tally.unhandled += 1;
                assert!(!unhandled.to_string().is_empty() && unhandled.bytes.len() <= 15);
            }
            // The clock is paused.
            Err(Error::Unsupported { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        result.ok()
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Run | Step::Run2 => {
                self.run();
            }
            Step::Walk(count) => self.walk(u32::from(*count)),
            Step::Enter(entry) => {
                let start = self.guest.start.clone();
                self.start(&start, *entry);
                self.run();
            }
            Step::Start(start) => {
                self.start(start, 0);
                self.run();
            }
            Step::Switch => self.current = (self.current + 1) % self.vcpus.len(),
            Step::Registers(register, value) => {
                let mut general = self.vcpu().registers().unwrap();
                change_general(&mut general, *register, value.get());
                self.vcpu().set_registers(&general).unwrap();
            }
            Step::SetMsr(index, value) => match self.vcpu().set_msr(index.get(), value.get()) {
                Ok(()) | Err(Error::InvalidArgument { .. }) => {}
                Err(error) => panic!("{error:?}"),
            },
            Step::Msr(index) => match self.vcpu().msr(index.get()) {
                Ok(_) | Err(Error::InvalidArgument { .. }) => {}
                Err(error) => panic!("{error:?}"),
            },
            Step::Nmi => self.handle().nmi().unwrap(),
            Step::Intr(asserted) => self.handle().set_intr(*asserted).unwrap(),
            Step::Message(address, data) => self.board.message(*address, *data),
            Step::Kick => {
                self.handle().kick();
                if !self.paused {
                    // Whatever else there is to do, the kick comes first.
                    assert_eq!(self.run(), Some(Halt::Interrupted));
                }
            }
            Step::Debug { step, int3, stops } => {
                let mut request = DebugRequest::none();
                (request.single_step, request.software_breakpoints) = (*step, *int3);
                for (address, kind) in stops {
                    let length = kind >> 2;
                    let address = address.get();
                    request = request.at(match kind & 3 {
                        0 | 1 => HardwareStop::execute(address),
                        2 => HardwareStop::write(address & !u64::from(length), 1 << (length & 3)),
                        _ => HardwareStop::access(address, length),
                    });
                }
                match self.vcpu().debug_stops().unwrap().request(&request) {
                    Ok(()) | Err(Error::InvalidArgument { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            Step::Translate(value) => {
                let page = self.vcpu().translate(value.get()).unwrap();
                assert!(page.is_none_or(|gpa| gpa.0 >> 52 == 0), "{page:?}");
            }
            Step::Save => self.save_and_restore(),
            Step::Restore(mutations) => self.restore(mutations),
            Step::TakeMemory => self.board.take_memory(),
            Step::PutMemory => self.board.put_memory(),
            Step::Log(what) => match what & 3 {
                0 | 1 => self.board.start_log(),
                2 => self.board.stop_log(),
                _ => self.board.harvest(),
            },
            Step::Filter(index, count, unknown) => {
                let range = MsrRange::new(index.get(), u32::from(*count));
                match self.board.vm.msr_filter().unwrap().pass_on(&[range], *unknown) {
                    Ok(()) | Err(Error::InvalidArgument { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            Step::Hypercall(nr) => self.board.vm.hypercalls().unwrap().pass_on(u64::from(nr & 7)).unwrap(),
            Step::Write(at, value) => self.board.write(at.get(), &value.to_le_bytes()),
            Step::Clock(pause) => {
                self.paused = *pause;
                let clock = self.board.vm.clock().unwrap();
                if *pause { clock.pause() } else { clock.resume() }.unwrap();
            }
        }
    }

    fn walk(&mut self, count: u32) {
        let request = DebugRequest::none().step();
        self.vcpu().debug_stops().unwrap().request(&request).unwrap();
        for _ in 0..count.min(STEPS) {
            if !matches!(self.run(), Some(Halt::Debug(_))) {
                break;
            }
        }
        self.vcpu().debug_stops().unwrap().request(&DebugRequest::none()).unwrap();
    }

    /// What was saved is accepted, here and by a new vCPU, and is the same when it is saved again.
    fn save_and_restore(&mut self) {
        let state = self.vcpu().save().unwrap();
        self.vcpu().restore(&state).unwrap_or_else(|error| panic!("{error}: {state:?}"));
        let again = self.vcpu().save().unwrap();
        assert_eq!(without_time(&state), without_time(&again));
        let config = self.config.clone().vcpus(2).clock(ClockConfig::default());
        let other = self.hypervisor.create_vm(&config).unwrap();
        let index = self.current as u32;
        other.restore_vcpu(index, &state).unwrap_or_else(|error| panic!("{error}: {state:?}"));
    }

    /// A state from a hostile file is refused with a reason, or works.
    fn restore(&mut self, mutations: &[Mutation]) {
        let good = self.vcpu().save().unwrap();
        let mut state = good.clone();
        for mutation in mutations {
            mutate(&mut state, mutation);
        }
        match self.vcpu().restore(&state) {
            Ok(()) => {
                self.tally.restored += 1;
                self.save_and_restore();
                self.run();
            }
            Err(error @ Error::InvalidState { .. }) => {
                self.tally.refused += 1;
                assert!(!error.to_string().is_empty());
                let now = self.vcpu().save().unwrap();
                assert_eq!(
                    without_time(&good),
                    without_time(&now),
                    "refused, but something changed: {error}"
                );
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn finish(&mut self) {
        for vcpu in &mut self.vcpus {
            let counts = vcpu.exit_counts();
            let instructions = counts.iter().find(|(name, _)| *name == "instructions");
            self.tally.instructions += instructions.map_or(0, |(_, count)| *count);
        }
        self.board.vm.clock().unwrap().resume().unwrap();
        self.save_and_restore();
        self.board.stop_log();
        self.board.vm.save().unwrap();
        if let Some(bytes) = self.board.taken.borrow_mut().take() {
            assert!(self.board.arena.bytes(MOVABLE) == bytes, "memory was written after it was taken away");
        }
    }
}

/// Without what goes on by itself: time, and what depends on it.
fn without_time(state: &CpuState) -> CpuState {
    let mut state = state.clone();
    state.msrs.retain(|msr| !matches!(msr.index, 0x10 | 0x6e0));
    if let Some(apic) = &mut state.local_apic {
        apic.registers[0x39] = 0;
        // The timer may have expired meanwhile.
        let vector = (apic.registers[0x32] & 0xff) as usize;
        apic.registers[0x20 + vector / 32] &= !(1 << (vector % 32));
        apic.registers[0x28] = 0;
        apic.registers[0x0a] = 0;
    }
    state
}

fn change_general(general: &mut vmm_cpu::state::GeneralRegisters, register: u8, value: u64) {
    let g = general;
    let registers = [
        &mut g.rax,
        &mut g.rbx,
        &mut g.rcx,
        &mut g.rdx,
        &mut g.rsi,
        &mut g.rdi,
        &mut g.rsp,
        &mut g.rbp,
        &mut g.r8,
        &mut g.r9,
        &mut g.r15,
        &mut g.rflags,
        &mut g.rip,
    ];
    let count = registers.len();
    for (n, place) in registers.into_iter().enumerate() {
        if n == usize::from(register) % count {
            *place = value;
        }
    }
}

fn mutate(state: &mut CpuState, mutation: &Mutation) {
    let control = |state: &mut CpuState, n: u8, change: &dyn Fn(&mut u64)| {
        let s = &mut state.system;
        let [d0, d1, d2, d3] = &mut s.dr;
        let registers = [
            &mut s.cr0,
            &mut s.cr2,
            &mut s.cr3,
            &mut s.cr4,
            &mut s.cr8,
            &mut s.efer,
            &mut s.apic_base,
            d0,
            d1,
            d2,
            d3,
            &mut s.dr6,
            &mut s.dr7,
            &mut s.xcr0,
        ];
        let count = registers.len();
        for (index, register) in registers.into_iter().enumerate() {
            if index == usize::from(n) % count {
                change(register);
            }
        }
    };
    match *mutation {
        Mutation::General(register, value) => change_general(&mut state.general, register, value.get()),
        Mutation::Control(n, value) => control(state, n, &|register| *register = value.get()),
        Mutation::ControlBit(n, bit) => control(state, n, &|register| *register ^= 1 << (bit & 63)),
        Mutation::Segment(change) => layout::change_segment(&mut state.system, &change),
        Mutation::Table(n, base, limit) => {
            let table = if n & 1 == 0 { &mut state.system.gdtr } else { &mut state.system.idtr };
            (table.base, table.limit) = (base.get(), limit);
        }
        Mutation::Xsave(at, byte) => {
            let mut bytes = state.xsave.bytes().to_vec();
            bytes.resize(bytes.len().max(576 + usize::from(at >> 12) * 1000), 0x5a);
            let at = usize::from(at) % bytes.len().min(640);
            bytes[at] = byte;
            state.xsave = XsaveArea::from_bytes(bytes).unwrap();
        }
        Mutation::Msr(index, value) => {
            state.msrs.retain(|msr| msr.index != index.get());
            state.msrs.push(Msr { index: index.get(), value: value.get() });
        }
        Mutation::Apic(register, value) => {
            if let Some(apic) = &mut state.local_apic {
                apic.registers[usize::from(register & 63)] = value;
            }
        }
        Mutation::NoApic => state.local_apic = None,
        Mutation::AnApic => {
            state.local_apic.get_or_insert_with(LocalApicState::default);
        }
        Mutation::Exception { vector, error, pending, payload } => {
            let mut event = ExceptionEvent::injected(vector & 0x3f, error);
            if pending {
                event.stage = ExceptionStage::Pending;
            }
            event.payload = payload.map(super::guest::Value::get);
            state.events.exception = Some(event);
        }
        Mutation::Interrupt { vector, software } => {
            state.events.interrupt = Some(InterruptEvent::new(vector, software));
        }
        Mutation::Nmi(bits) => {
            let events = &mut state.events;
            events.nmi.injected = bits & 1 != 0;
            events.nmi.pending = bits & 2 != 0;
            events.nmi.masked = bits & 4 != 0;
            events.shadow.sti = bits & 8 != 0;
            events.shadow.mov_ss = bits & 16 != 0;
            events.intr = bits & 32 != 0;
        }
        Mutation::Run(n) => {
            let states = [RunState::Running, RunState::Halted, RunState::WaitForInit, RunState::WaitForSipi];
            state.run_state = states[usize::from(n & 3)];
        }
    }
}
