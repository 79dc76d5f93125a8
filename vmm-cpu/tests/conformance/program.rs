//! Guest programs, assembled in the test.

use std::ops::{Deref, DerefMut};

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{CodeAssembler, CodeAssemblerResult, CodeLabel, al};

use super::case::Outcome;
use super::machine::layout;

/// OUT to this port ends a guest: the recorder kicks the vCPU.
pub(crate) const END_PORT: u16 = 0xf4;

/// A program in the making: an assembler that also notes interrupt handlers.
pub(crate) struct Program {
    assembler: CodeAssembler,
    gates: Vec<(u8, CodeLabel)>,
}

/// Machine code with the addresses of its interrupt handlers.
pub(crate) struct Image {
    pub(crate) base: u64,
    pub(crate) gates: Vec<(u8, u64)>,
    code: CodeAssemblerResult,
}

impl Program {
    /// A 64-bit program.
    pub(crate) fn new() -> Outcome<Self> {
        Self::of_bits(64)
    }

    /// A program of 16-, 32- or 64-bit code.
    pub(crate) fn of_bits(bits: u32) -> Outcome<Self> {
        Ok(Self { assembler: CodeAssembler::new(bits)?, gates: Vec::new() })
    }

    /// A label on the next instruction.
    pub(crate) fn here(&mut self) -> Outcome<CodeLabel> {
        let mut label = self.assembler.create_label();
        self.assembler.set_label(&mut label)?;
        Ok(label)
    }

    /// The next instruction begins the handler of `vector`.
    pub(crate) fn handler(&mut self, vector: u8) -> Outcome<CodeLabel> {
        let label = self.here()?;
        self.gates.push((vector, label));
        Ok(label)
    }

    /// OUT of AL to `port` (0 to 255).
    pub(crate) fn report(&mut self, port: u8, value: u8) -> Outcome {
        self.assembler.mov(al, u32::from(value))?;
        self.assembler.out(u32::from(port), al)?;
        Ok(())
    }

    /// Comes back to the test as [`Program::end`] does; run again, the guest goes on behind it.
    pub(crate) fn checkpoint(&mut self) -> Outcome {
        Ok(self.assembler.out(u32::from(END_PORT), al)?)
    }

    /// Ends the guest; changes no register. Run again, it ends again.
    pub(crate) fn end(&mut self) -> Outcome {
        // Room for a label of the caller's on the end.
        self.assembler.nop()?;
        let again = self.here()?;
        self.checkpoint()?;
        self.assembler.jmp(again)?;
        Ok(())
    }

    /// The program for address `base`.
    pub(crate) fn assemble_at(mut self, base: u64) -> Outcome<Image> {
        let code =
            self.assembler.assemble_options(base, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let gates = self.gates.iter().map(|(vector, label)| Ok((*vector, code.label_ip(label)?)));
        let gates = gates.collect::<Outcome<Vec<_>>>()?;
        Ok(Image { base, gates, code })
    }

    /// The program for [`layout::CODE`].
    pub(crate) fn assemble(self) -> Outcome<Image> {
        self.assemble_at(layout::CODE)
    }
}

impl Deref for Program {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.assembler
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.assembler
    }
}

impl Image {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.code.inner.code_buffer
    }

    /// Address of an instruction.
    pub(crate) fn address_of(&self, label: CodeLabel) -> Outcome<u64> {
        Ok(self.code.label_ip(&label)?)
    }
}
