//! Guest RAM that the host shares with both engines: a memfd for each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, Result};
use vmm_memory::SharedMemory;

use crate::arena::{Arena, descriptor, gate};
use crate::harness;
use crate::layout::*;

/// The RAM of one engine.
#[derive(Clone, Debug)]
pub struct Memory {
    pub file: Arc<File>,
    pub bytes: u64,
}

impl Memory {
    /// RAM for `scenarios` arenas, with what the harness needs at its start.
    pub fn new(scenarios: u64) -> Result<Self> {
        // Whole MiB, which is what QEMU takes.
        let bytes = (ARENAS + scenarios * ARENA).next_multiple_of(2 << 20);
        let shared = SharedMemory::create("ring0test", bytes)?;
        let memory = Self { file: Arc::new(File::from(shared.try_clone_fd()?)), bytes };
        memory.put(control::COUNT, 4, scenarios)?;
        for (at, limit, base) in [
            (control::GDTR, 0x1f, control::GDT),
            (control::IDTR, 0x7ff, HARNESS_IDT),
            (control::NO_IDT, 0, 0),
        ] {
            memory.put(at, 2, limit)?;
            memory.put(at + 2, 8, base)?;
        }
        for (selector, entry) in [
            (selector::CODE_32, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
            (selector::DATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
            (selector::CODE_64, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
        ] {
            memory.put(control::GDT + u64::from(selector), 8, entry)?;
        }
        for vector in 0x10..0x100 {
            memory.put(HARNESS_IDT + 8 * vector, 8, gate(selector::CODE_32, harness::DRAIN, 0x8e, 0))?;
        }
        Ok(memory)
    }

    /// Writes the low `bytes` bytes of a value.
    pub fn put(&self, gpa: u64, bytes: usize, value: u64) -> Result<()> {
        let value = value.to_le_bytes();
        let value = value.get(..bytes).context("at most 8 bytes")?;
        self.file.write_all_at(value, gpa).context("writing guest RAM")
    }

    /// Reads a word of 32 bits.
    pub fn word(&self, gpa: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.file.read_exact_at(&mut bytes, gpa).context("reading guest RAM")?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes what an arena holds.
    pub fn load(&self, arena: &Arena) -> Result<()> {
        for (offset, page) in arena.pages() {
            self.file.write_all_at(page, arena.at(offset)).context("writing guest RAM")?;
        }
        Ok(())
    }

    /// Reads an arena.
    pub fn arena(&self, base: u64, into: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(into, base).context("reading guest RAM")
    }
}
