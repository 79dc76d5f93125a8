//! Runs a hostile guest, and checks what must hold whatever it does.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use vmm_cpu::state::{CpuState, RunState};
use vmm_cpu::translate::TranslateHypervisor;
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, DebugRequest, Error, Halt, HardwareStop, Hypervisor, InterruptMode,
    MsrRange, Vcpu, VcpuHandle, VmConfig,
};

use super::arena::{Arena, BELOW_4G, EXTENTS, MOVABLE};
use super::bus::{Board, Bus};
use super::code::Assembler;
use super::compare::{self, Record};
use super::guest::{Guest, Mutation, Start, Step, Tier};
use super::mutate::{change_general, mutate};
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
    /// Runs that went the same way on both tiers.
    pub compared: u64,
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
        self.compared += other.compared;
    }
}

struct Machine<'a> {
    guest: &'a Guest,
    config: VmConfig,
    // vCPUs and bus before the board with the memory.
    vcpus: Vec<Box<dyn Vcpu>>,
    current: usize,
    bus: Bus,
    board: Rc<Board>,
    paused: bool,
    tally: Tally,
}

/// The backend with that tier. It is asked for what it offers once, which takes a while.
fn hypervisor(tier: Tier) -> Arc<TranslateHypervisor> {
    thread_local! {
        static HYPERVISORS: [Arc<TranslateHypervisor>; 4] =
            Tier::ALL.map(|tier| Arc::new(TranslateHypervisor::with_options(tier.options())));
    }
    HYPERVISORS.with(|all| Arc::clone(&all[tier as usize]))
}

/// Runs the guest of an input, on all tiers if it says so.
pub fn exercise(guest: &Guest) -> Tally {
    if guest.compared && is_deterministic(guest) {
        compare::compare(guest)
    } else {
        exercise_on(guest, guest.tier, None).0
    }
}

/// Whether all that the guest sees follows from the input.
pub fn is_deterministic(guest: &Guest) -> bool {
    guest.deterministic && !guest.two
}

/// Runs the guest of an input on `tier`; adds to `record` what is seen of it.
pub fn exercise_on(guest: &Guest, tier: Tier, record: Option<Record>) -> (Tally, Option<Record>) {
    let hypervisor = hypervisor(tier);
    let mut clock = ClockConfig::default();
    if is_deterministic(guest) {
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
        record,
    };
    let mut machine =
        Machine { guest, config, vcpus, current: 0, bus, board, paused: false, tally: Tally::default() };
    machine.prepare();
    machine.start(&guest.start, 0);
    machine.run();
    for step in &guest.steps {
        machine.step(step);
    }
    machine.finish();
    let (tally, record) = (machine.tally, machine.bus.record.take());
    drop(machine);
    arena.check();
    (tally, record)
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
        let vcpu = &mut self.vcpus[self.current];
        let kick_after = if self.bus.record.is_some() {
            let now = self.board.vm.clock().unwrap().now().unwrap();
            compare::limit(&mut **vcpu, now);
            compare::KICK_AFTER
        } else {
            watchdog::KICK_AFTER
        };
        let watch = watchdog::watch(handle, kick_after, || format!("{:#?}", self.guest));
        let result = vcpu.run(&mut self.bus);
        let kicked = watch.end();
        if let Some(record) = &mut self.bus.record {
            record.note(&mut **vcpu, &result, kicked);
        }
        let tally = &mut self.tally;
        tally.runs += 1;
        tally.calls += u64::from(self.bus.calls);
        match &result {
            Ok(Halt::Halted) => tally.halted += 1,
            Ok(Halt::Shutdown) => tally.shutdown += 1,
            Ok(Halt::Debug(_)) => tally.debug += 1,
            Ok(Halt::Interrupted | Halt::ExactStop) => tally.interrupted += 1,
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
        // Whatever saved it: state does not tell.
        let other = hypervisor(Tier::Interpreted).create_vm(&config).unwrap();
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
        if let Some(record) = &mut self.bus.record {
            record.memory = EXTENTS.iter().map(|extent| self.board.arena.bytes(*extent)).collect();
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
