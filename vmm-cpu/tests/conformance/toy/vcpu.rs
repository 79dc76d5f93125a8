//! A vCPU of the toy backend: the run loop around the interpreter.

use std::sync::Arc;
use std::time::Duration;

use vmm_cpu::state::{CpuState, GeneralRegisters, RunState, SystemRegisters, rflags};
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::{
    CpuidTable, DebugReason, DebugRequest, DebugStop, DebugStops, Error, Halt, HardwareStopKind, Result,
    Vcpu, VcpuHandle, VcpuIo,
};

use super::interpreter::{Interpreter, Stop};
use super::signals::Signals;
use super::system::{Cpu, check_system, is_canonical};
use super::vm::Shared;

/// As many as the architecture has.
const MAX_HARDWARE: usize = 4;

/// The address in a page-table entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// A vCPU.
#[derive(Debug)]
pub(super) struct ToyVcpu {
    index: u32,
    vm: Arc<Shared>,
    cpuid: CpuidTable,
    cpu: Cpu,
    signals: Arc<Signals>,
    debug: DebugRequest,
    /// The breakpoint here was reported; the instruction is due.
    reported: Option<u64>,
}

impl ToyVcpu {
    pub(super) fn new(index: u32, vm: Arc<Shared>, cpuid: CpuidTable) -> Self {
        Self {
            index,
            vm,
            cpuid,
            cpu: Cpu::at_reset(),
            signals: Arc::default(),
            debug: DebugRequest::none(),
            reported: None,
        }
    }

    /// Looks at the pins; whether a kick arrived.
    fn look_at_pins(&mut self) -> bool {
        let mut pins = self.signals.pins();
        let events = &mut self.cpu.state.events;
        events.intr = pins.intr;
        events.nmi.pending |= std::mem::take(&mut pins.nmi);
        std::mem::take(&mut pins.kick)
    }

    /// Takes an NMI or an interrupt, if one is there and not blocked.
    fn take_event(&mut self, io: &mut dyn VcpuIo) -> Result<(), Stop> {
        let (events, flags) = (&mut self.cpu.state.events, self.cpu.state.general.rflags);
        if std::mem::take(&mut events.shadow.sti) {
            return Ok(());
        }
        if events.nmi.pending && !events.nmi.masked {
            events.nmi.pending = false;
            events.nmi.masked = true;
            return self.interrupt(io, 2);
        }
        if events.intr && flags & rflags::IF != 0 {
            // The callback may change the pins, this one included.
            match io.acknowledge_interrupt() {
                Some(vector) => return self.interrupt(io, vector),
                None => self.signals.pins().intr = false,
            }
            self.cpu.state.events.intr = false;
        }
        Ok(())
    }

    fn interrupt(&mut self, io: &mut dyn VcpuIo, vector: u8) -> Result<(), Stop> {
        self.cpu.state.run_state = RunState::Running;
        self.interpreter(io).deliver(vector, None)
    }

    fn interpreter<'a>(&'a mut self, io: &'a mut dyn VcpuIo) -> Interpreter<'a> {
        Interpreter::new(&mut self.cpu, &self.vm, &self.cpuid, io, &self.debug)
    }

    /// One instruction.
    fn step(&mut self, io: &mut dyn VcpuIo) -> Result<(), Stop> {
        let rip = self.cpu.state.general.rip;
        let hits = self.hits(|kind, address| kind == HardwareStopKind::Execute && address == rip);
        if hits != 0 && self.reported.replace(rip) != Some(rip) {
            return Err(Stop::Halt(Halt::Debug(DebugStop::new(rip, DebugReason::Hardware { hits }))));
        }
        self.reported = None;
        let mut interpreter = self.interpreter(io);
        interpreter.execute()?;
        let touched = interpreter.touched;
        let hits = self.hits(|kind, address| match kind {
            HardwareStopKind::Write { length } => touched.writes(address, length),
            HardwareStopKind::Access { length } => {
                touched.writes(address, length) || touched.reads(address, length)
            }
            _ => false,
        });
        let rip = self.cpu.state.general.rip;
        if hits != 0 {
            return Err(Stop::Halt(Halt::Debug(DebugStop::new(rip, DebugReason::Hardware { hits }))));
        }
        if self.debug.single_step {
            return Err(Stop::Halt(Halt::Debug(DebugStop::new(rip, DebugReason::SingleStep))));
        }
        Ok(())
    }

    /// The hardware stops that `is_hit`, one bit each.
    fn hits(&self, is_hit: impl Fn(HardwareStopKind, u64) -> bool) -> u8 {
        let stops = self.debug.hardware.iter().enumerate();
        stops
            .filter(|(_, stop)| is_hit(stop.kind, stop.address))
            .fold(0, |hits, (index, _)| hits | 1 << index)
    }

    /// Follows the guest's page tables (Intel SDM 3A 5.5), which the interpreter takes for an identity map.
    fn walk(&self, gva: u64) -> Option<u64> {
        let system = &self.cpu.state.system;
        if system.cr0 & SystemRegisters::CR0_PG == 0 {
            return Some(gva);
        }
        let (present, large) = (1, 1 << 7);
        let mut table = system.cr3;
        for shift in [39, 30, 21, 12] {
            let mut entry = [0; 8];
            let gpa = (table & FRAME) + (gva >> shift & 0x1ff) * 8;
            let in_memory = is_canonical(gva) && self.vm.memory.read(gpa, &mut entry);
            table = u64::from_le_bytes(entry);
            if !in_memory || table & present == 0 {
                return None;
            }
            if shift == 12 || shift < 39 && table & large != 0 {
                let offset = (1 << shift) - 1;
                return Some(table & FRAME & !offset | gva & offset);
            }
        }
        None
    }

    fn go_on(&mut self, io: &mut dyn VcpuIo) -> Result<Halt, Stop> {
        loop {
            if self.signals.take_attention() && self.look_at_pins() {
                return Ok(Halt::Interrupted);
            }
            self.take_event(io)?;
            if self.cpu.state.run_state == RunState::Halted {
                return Ok(Halt::Halted);
            }
            self.step(io)?;
        }
    }
}

impl Vcpu for ToyVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<Halt> {
        if self.vm.clock.is_paused() {
            return Err(Error::unsupported("running a vCPU", "the clock is paused"));
        }
        match self.go_on(io) {
            Ok(halt) | Err(Stop::Halt(halt)) => Ok(halt),
            Err(Stop::Unhandled { reason, bytes }) => {
                let unhandled = super::unhandled(self.index, reason, bytes, &self.cpu.state);
                Err(Error::Unhandled(Box::new(unhandled)))
            }
        }
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::clone(&self.signals) as Arc<dyn VcpuHandle>
    }

    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        let takes_interrupts = self.cpu.state.general.rflags & rflags::IF != 0;
        self.signals.wait(timeout, takes_interrupts)
    }

    fn registers(&mut self) -> Result<GeneralRegisters> {
        Ok(self.cpu.state.general)
    }

    fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()> {
        self.cpu.state.general = *registers;
        self.cpu.state.general.rflags |= rflags::FIXED;
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        Ok(self.cpu.state.system)
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        check_system(registers)?;
        self.cpu.state.system = *registers;
        Ok(())
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        let value = self.cpu.msr(index, self.vm.clock.tsc());
        value.ok_or_else(|| {
            Error::invalid("MSR", format_args!("{index:#x}"), "a register of the toy processor")
        })
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        let done = self.cpu.set_msr(index, value, self.vm.clock.tsc());
        done.ok_or_else(|| {
            Error::invalid(
                "MSR",
                format_args!("{value:#x} in {index:#x}"),
                "a register and a value that it can hold",
            )
        })
    }

    fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>> {
        Ok(self.walk(gva).map(GuestAddress))
    }

    fn save(&mut self) -> Result<CpuState> {
        let kick = self.look_at_pins();
        self.signals.pins().kick = kick;
        Ok(self.cpu.to_state(self.vm.clock.tsc()))
    }

    fn restore(&mut self, state: &CpuState) -> Result<()> {
        self.cpu = Cpu::from_state(state, self.vm.clock.tsc())?;
        self.signals.change(|pins| pins.intr = state.events.intr);
        self.reported = None;
        Ok(())
    }

    fn debug_stops(&mut self) -> Option<&mut dyn DebugStops> {
        Some(self)
    }
}

impl DebugStops for ToyVcpu {
    fn max_hardware(&self) -> usize {
        MAX_HARDWARE
    }

    fn request(&mut self, request: &DebugRequest) -> Result<()> {
        if request.hardware.len() > MAX_HARDWARE {
            return Err(Error::invalid("number of hardware stops", request.hardware.len(), "0 to 4"));
        }
        for stop in &request.hardware {
            if let HardwareStopKind::Write { length } | HardwareStopKind::Access { length } = stop.kind {
                if !matches!(length, 1 | 2 | 4 | 8) {
                    return Err(Error::invalid("length of a watchpoint", length, "1, 2, 4 or 8"));
                }
                if !stop.address.is_multiple_of(u64::from(length)) {
                    let address = format!("{:#x}", stop.address);
                    return Err(Error::invalid(
                        "address of a watchpoint",
                        address,
                        format!("a multiple of {length}"),
                    ));
                }
            }
        }
        self.debug = request.clone();
        Ok(())
    }
}
