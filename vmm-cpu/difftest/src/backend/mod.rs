//! The side of the backend: cases run in ring 3 of a small guest, one virtual machine for the whole run.

mod kernel;
mod machine;

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use vmm_cpu::state::CpuState;
use vmm_cpu::{ExactStop, Halt, VcpuHandle, VcpuIo};

use crate::case::{Case, Ending, Mode, Outcome, Registers};
use crate::memory::{self, IMAGE, MOST_CHANGES};
use crate::start::{Prepared, START, Start, at};
use kernel::{STACK_TOP, end};
use machine::{AREA_IMAGE, Machine, STATE};

/// Instructions that a case may execute. Those of the processor may run for some ten milliseconds.
const PATIENCE: u64 = 200_000;
/// As many as the processor may get to in its time.
const MUCH_PATIENCE: u64 = 200_000_000;

/// Bytes of the page with the state.
const PAGE: usize = STACK_TOP as usize;

/// What executes guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// The interpreter.
    #[default]
    #[value(name = "0")]
    Interpreter,
    /// The translator, from the first time that a block runs.
    #[value(name = "1")]
    Translator,
    /// The same, and programs access memory through the address window.
    #[value(name = "window")]
    Window,
    /// Each of them: all must do as the processor.
    All,
}

/// Who it was that executed a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Interpreter,
    Translator,
    /// The translator, which had translated the code already and linked its blocks.
    TranslatorAgain,
    /// The translator, with memory in an address window.
    Window,
    /// Likewise.
    WindowAgain,
}

impl Who {
    /// The same once more, if that may be something else.
    pub(crate) fn again(self) -> Option<Self> {
        match self {
            Self::Translator => Some(Self::TranslatorAgain),
            Self::Window => Some(Self::WindowAgain),
            _ => None,
        }
    }

    /// Whoever it is the first time.
    pub(crate) fn first(self) -> Self {
        match self {
            Self::TranslatorAgain => Self::Translator,
            Self::WindowAgain => Self::Window,
            who => who,
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Interpreter => "interpreter",
            Self::Translator => "translator",
            Self::TranslatorAgain => "linked code",
            Self::Window => "window",
            Self::WindowAgain => "linked window",
        })
    }
}

/// The backend on one tier, ready for a case.
pub(crate) struct Backend {
    machine: Machine,
    /// Where ring 0 begins, for when a case did not come back there.
    fresh: CpuState,
    port: Port,
    now: Box<[u8; IMAGE]>,
    expected: Box<[u8; IMAGE]>,
    changes: Vec<u8>,
}

/// The guest's one device: it ends the stay.
struct Port {
    handle: Arc<dyn VcpuHandle>,
    done: bool,
}

impl VcpuIo for Port {
    fn pio_write(&mut self, port: u16, _: usize, _: &[u8]) {
        if port == kernel::DONE {
            self.done = true;
            self.handle.kick();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

/// The state as ring 0 loads it.
fn bytes(start: &Start) -> [u8; START] {
    let mut bytes = [0; START];
    let words = [
        start.rip,
        start.cs,
        start.rflags,
        start.rsp,
        start.ss,
        start.fs_base,
        start.gs_base,
        start.data_selector,
    ];
    let words = start.general.iter().chain(&words);
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    if let Some(place) = bytes.get_mut(at::FXSAVE..) {
        place.copy_from_slice(&start.fxsave);
    }
    bytes
}

impl Backend {
    pub(crate) fn new(who: Who) -> Result<Self> {
        let mut machine = machine::build(who).context("cannot make the guest")?;
        let fresh = machine.vcpu.save()?;
        let port = Port { handle: machine.vcpu.handle(), done: false };
        Ok(Self {
            machine,
            fresh,
            port,
            now: Box::new(*memory::pristine()),
            expected: Box::new(*memory::pristine()),
            changes: vec![0; MOST_CHANGES],
        })
    }

    /// Runs a case.
    pub(crate) fn run(&mut self, case: &Case, prepared: &Prepared) -> Result<Outcome> {
        self.run_for(case, prepared, PATIENCE)
    }

    /// Runs a case that may be a long loop.
    pub(crate) fn run_patiently(&mut self, case: &Case, prepared: &Prepared) -> Result<Outcome> {
        self.run_for(case, prepared, MUCH_PATIENCE)
    }

    fn run_for(&mut self, case: &Case, prepared: &Prepared, patience: u64) -> Result<Outcome> {
        self.machine.ram.write(STATE, &bytes(&prepared.start))?;
        self.put(&prepared.memory)?;
        memory::put(&mut self.expected, &prepared.memory);
        let stay = self.stay(patience)?;
        let mut page = [0; PAGE];
        self.machine.ram.read(STATE, &mut page)?;
        self.machine.ram.read(AREA_IMAGE, &mut *self.now)?;
        let used = memory::changes(&self.now, &self.expected, &mut self.changes);
        let changes = self.changes.get(..used).unwrap_or_default();
        let stores: Vec<(u64, Vec<u8>)> =
            memory::runs(changes).map(|(address, data)| (address, data.to_vec())).collect();
        memory::take(&mut self.expected, &prepared.memory);
        for (address, data) in memory::runs(&prepared.memory).chain(memory::runs(changes)) {
            let Some(at) = memory::offset(address, data.len()) else { continue };
            let old = memory::pristine().get(at..at + data.len()).unwrap_or_default();
            self.machine.ram.write(AREA_IMAGE + at as u64, old)?;
        }
        let mut outcome = outcome(case, &page, stores);
        if let Some(ending) = stay {
            // The state is still that of the start: it did not come to its end.
            self.machine.vcpu.restore(&self.fresh)?;
            outcome.ending = ending;
        }
        Ok(outcome)
    }

    fn put(&self, list: &[u8]) -> Result<()> {
        for (address, data) in memory::runs(list) {
            if let Some(at) = memory::offset(address, data.len()) {
                self.machine.ram.write(AREA_IMAGE + at as u64, data)?;
            }
        }
        Ok(())
    }

    /// Runs the guest until a case has ended; how it ended instead, if it did not.
    fn stay(&mut self, patience: u64) -> Result<Option<Ending>> {
        self.port.done = false;
        let stops = self.machine.vcpu.exact_stops().context("the interpreter counts instructions")?;
        let stop = ExactStop::none().at_instructions(stops.instructions() + patience);
        stops.stop_at(stop);
        loop {
            match self.machine.vcpu.run(&mut self.port) {
                Ok(Halt::Interrupted) if self.port.done => return Ok(None),
                Ok(Halt::Interrupted) => {}
                Ok(Halt::ExactStop) => return Ok(Some(Ending::TimedOut)),
                Ok(_) | Err(vmm_cpu::Error::Unhandled(_)) => return Ok(Some(Ending::Unhandled)),
                Err(error) => return Err(error).context("the interpreter cannot run"),
            }
        }
    }
}

fn outcome(case: &Case, page: &[u8; PAGE], stores: Vec<(u64, Vec<u8>)>) -> Outcome {
    let frame: [u64; 7] = std::array::from_fn(|field| word(page, end::FRAME + 8 * field));
    let [vector, error, rip, cs, rflags, rsp, ss] = frame;
    let mut general: [u64; 16] = std::array::from_fn(|register| word(page, end::FRAME - 8 * (register + 1)));
    if let Some(place) = general.get_mut(4) {
        *place = rsp;
    }
    let mut fxsave = [0; 512];
    if let Some(image) = page.get(end::FXSAVE..end::FXSAVE + 416) {
        let (filled, _) = fxsave.split_at_mut(416);
        filled.copy_from_slice(image);
    }
    let mut registers = Registers {
        general,
        rflags,
        fs_base: word(page, end::FS_BASE),
        gs_base: word(page, end::GS_BASE),
        fxsave,
    };
    if case.mode == Mode::Compatibility {
        registers.only_32_bits();
    }
    let [ds, es, fs, gs] = std::array::from_fn(|number| half(page, end::SELECTORS + 2 * number));
    let (ending, rip) = match vector {
        kernel::SYSTEM_CALL | 0x80 => (Ending::SystemCall, rip),
        _ => Ending::of_exception(case, vector, error, word(page, end::CR2), rip),
    };
    let selectors = [es, cs as u16, ss as u16, ds, fs, gs];
    Outcome { ending, rip, registers, selectors, stores }
}

#[cfg(test)]
mod tests;
