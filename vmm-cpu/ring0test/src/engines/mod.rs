//! The engines that run the same image.

mod qemu;
mod translate;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};

pub use qemu::{QEMU, install, version};

use crate::layout::control;
use crate::memory::Memory;

/// How a scenario can end other than by an event that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The processor shut down: a triple fault.
    Shutdown,
    /// It went on without end.
    Hang,
    /// `translate` does not know an instruction.
    Unhandled,
    /// QEMU's process crashed.
    Died,
}

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// `translate`, interpreted.
    Interpreter,
    /// `translate`, translated wherever it can be, from the first run on.
    Translator,
    Qemu,
}

impl Engine {
    /// Runs all scenarios in `memory`. What is returned are those that ended the guest.
    pub fn run(self, image: &Path, memory: &Memory) -> Result<BTreeMap<u64, End>> {
        let mut ends = BTreeMap::new();
        while memory.word(control::DONE)? == 0 {
            let before = memory.word(control::STARTED)?;
            let end = match self {
                Engine::Interpreter => translate::boot(image, memory, None)?,
                Engine::Translator => translate::boot(image, memory, Some(0))?,
                Engine::Qemu => qemu::boot(image, memory)?,
            };
            if let Some(end) = end {
                let started = memory.word(control::STARTED)?;
                ensure!(started > before, "{self:?}: the harness ended before its first scenario: {end:?}");
                ends.insert(u64::from(started) - 1, end);
            }
        }
        Ok(ends)
    }
}
