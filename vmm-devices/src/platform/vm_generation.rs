//! The generation of a virtual machine: a number of 128 bits in its memory that is another one whenever the machine goes on from an earlier state,
//! so that no two of it use the same random numbers, keys or transaction identifiers ("Virtual Machine Generation ID", Microsoft 2012).
//!
//! The guest finds where it lies by ACPI ([`AcpiBuilder::vm_generation`](crate::acpi::AcpiBuilder::vm_generation)), and is told of a new one by an
//! interrupt of a Generic Event Device (ACPI 6.5, 5.6.9). Linux has it from 5.18 on (`CONFIG_VMGENID`): it reseeds its random number generator.
//!
//! The monitor calls it; the guest may overwrite the number, which is its own affair. Nothing of the guest is read.

use std::fmt;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::interrupt::InterruptLine;
use crate::virtio::DeviceMemory;

/// Bytes of the number, and of those that it has to itself.
pub const VM_GENERATION_SIZE: u64 = 16;

/// Where the generation cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmGenerationError {
    /// Not at a multiple of 8.
    #[error("a generation at {gpa:#x}; a multiple of 8 is needed")]
    Alignment {
        /// The address.
        gpa: u64,
    },
    /// Not in RAM.
    #[error("a generation at {gpa:#x}, where there is no RAM")]
    Memory {
        /// The address.
        gpa: u64,
        /// Why.
        source: GuestMemoryError,
    },
    /// It is the one before.
    #[error("generation {generation:#x} is that of before; each is to be another one")]
    Same {
        /// The number.
        generation: u128,
    },
}

/// The generation of a machine. To be random: [`renew`](Self::renew) it when the machine goes on from a saved state, before its vCPUs run and
/// after its interrupt controllers are what they were.
pub struct VmGeneration<M: DeviceMemory> {
    memory: M,
    gpa: GuestAddress,
    line: Box<dyn InterruptLine>,
}

impl<M: DeviceMemory> fmt::Debug for VmGeneration<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmGeneration").field("gpa", &self.gpa).finish_non_exhaustive()
    }
}

impl<M: DeviceMemory> VmGeneration<M> {
    /// One at `gpa`, a multiple of 8, in memory that the guest's memory map has as reserved; `line` is the edge-triggered interrupt of which the
    /// tables speak. The number is what lies there: 0 in a new machine, until it is [renewed](Self::renew).
    ///
    /// # Errors
    /// If it cannot be there.
    pub fn new(
        memory: M,
        gpa: GuestAddress,
        line: impl InterruptLine + 'static,
    ) -> Result<Self, VmGenerationError> {
        if !gpa.0.is_multiple_of(8) {
            return Err(VmGenerationError::Alignment { gpa: gpa.0 });
        }
        let this = Self { memory, gpa, line: Box::new(line) };
        this.get()?;
        Ok(this)
    }

    /// The number, as far as the guest has not overwritten it.
    ///
    /// # Errors
    /// If its memory is there no more.
    pub fn get(&self) -> Result<u128, VmGenerationError> {
        let mut bytes = [0; 16];
        let memory = self.memory.memory();
        memory.read_slice(&mut bytes, self.gpa).map_err(|source| self.not_there(source))?;
        Ok(u128::from_le_bytes(bytes))
    }

    /// Writes another number, and tells the guest. A guest that has not found it yet reads it when it does.
    ///
    /// # Errors
    /// If it is the same one, or its memory is there no more.
    pub fn renew(&self, generation: u128) -> Result<(), VmGenerationError> {
        if self.get()? == generation {
            return Err(VmGenerationError::Same { generation });
        }
        let memory = self.memory.memory();
        let written = memory.write_slice(&generation.to_le_bytes(), self.gpa);
        written.map_err(|source| self.not_there(source))?;
        self.line.set_level(true);
        self.line.set_level(false);
        Ok(())
    }

    fn not_there(&self, source: GuestMemoryError) -> VmGenerationError {
        VmGenerationError::Memory { gpa: self.gpa.0, source }
    }
}

#[cfg(test)]
mod tests {
    use vmm_memory::vm_memory::GuestAddressSpace as _;

    use super::*;
    use crate::testkit::{LineRecorder, guest_memory};

    #[test]
    fn a_new_number_is_in_memory_before_the_guest_hears_of_it() {
        let memory = guest_memory(1 << 20).unwrap();
        let (line, seen) = (LineRecorder::default(), memory.clone());
        let theirs = line.clone();
        let look = move |level: bool| {
            let mut bytes = [0; 16];
            seen.memory().read_slice(&mut bytes, GuestAddress(0xf0f0)).unwrap();
            assert_eq!(u128::from_le_bytes(bytes), 0x0102_0304);
            theirs.set_level(level);
        };
        let generation = VmGeneration::new(memory.clone(), GuestAddress(0xf0f0), look).unwrap();
        assert_eq!(generation.get().unwrap(), 0);
        generation.renew(0x0102_0304).unwrap();
        assert_eq!((line.take(), generation.get().unwrap()), (vec![true, false], 0x0102_0304));
        let mut bytes = [9; 18];
        memory.memory().read_slice(&mut bytes, GuestAddress(0xf0ef)).unwrap();
        assert_eq!(bytes, [0, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let error = generation.renew(0x0102_0304).unwrap_err().to_string();
        assert_eq!(error, "generation 0x1020304 is that of before; each is to be another one");
        assert!(line.take().is_empty());
    }

    #[test]
    fn it_lies_in_ram() {
        let memory = guest_memory(1 << 20).unwrap();
        for (gpa, problem) in [
            (4, "a generation at 0x4; a multiple of 8 is needed"),
            ((1 << 20) - 8, "a generation at 0xffff8, where there is no RAM"),
            (u64::MAX - 7, "a generation at 0xfffffffffffffff8, where there is no RAM"),
        ] {
            let error = VmGeneration::new(memory.clone(), GuestAddress(gpa), LineRecorder::default());
            assert_eq!(error.unwrap_err().to_string(), problem);
        }
    }
}
