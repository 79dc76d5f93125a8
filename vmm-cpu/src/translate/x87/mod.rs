//! The x87 unit: its state, and every x87 instruction of 64-bit processors, bit for bit.
//!
//! | file | is |
//! |---|---|
//! | `state` | registers, control, status and tag words; the MMX view of them |
//! | `image` | FXSAVE, FNSAVE and FNSTENV images |
//! | `f80` | the double extended format: taking apart, putting together, NaNs |
//! | `arithmetic` | the basic operations on it |
//! | `execute` | the instructions, on top of these |
//! | `transfer` | the instructions that load and store |
//! | `transcendental` | F2XM1 to FSINCOS in portable code |
//! | `host` | the same executed by an x86-64 host |
//!
//! Arithmetic is exact in portable code, which is as fast here as the detour over the host's x87 unit
//! would be. The transcendental instructions are the exception: their last bits are the processor's own,
//! so an x86-64 host executes them; elsewhere, and with `--cfg vmm_portable`, they are accurate to about
//! double precision.
//!
//! The register contents and memory operands come from a guest and may be any bits.

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod against_host;
mod arithmetic;
mod execute;
mod f80;
#[cfg(all(target_arch = "x86_64", any(test, not(vmm_portable))))]
mod host;
mod image;
mod state;
#[cfg(test)]
mod tests;
mod transcendental;
mod transfer;

pub(crate) use execute::{execute, waits};
pub(crate) use image::{FXSAVE_X87_BYTES, PointerFormat};
pub(crate) use state::X87State;

/// What an x87 instruction needs of the processor around it.
pub(crate) trait X87Machine {
    /// Why an access to memory ended the instruction, a page fault say.
    type Stop;

    /// Reads the instruction's memory operand, all of it.
    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Self::Stop>;

    /// Writes the instruction's memory operand: all of it, or nothing and an error.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Self::Stop>;

    /// FNSTSW AX.
    fn set_ax(&mut self, value: u16);

    /// FCOMI and kin: sets ZF, PF and CF; OF, SF and AF become 0.
    fn set_compare_flags(&mut self, zf: bool, pf: bool, cf: bool);

    /// RFLAGS, for FCMOVcc.
    fn flags(&self) -> u64;
}

/// Where the instruction stands: what the instruction and data pointers of the unit are set from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct X87Context {
    /// Offset of the instruction, its prefixes included.
    pub(crate) instruction_pointer: u64,
    /// CS.
    pub(crate) code_selector: u16,
    /// Offset of the memory operand, if there is one.
    pub(crate) data_pointer: u64,
    /// The segment register of the memory operand.
    pub(crate) data_selector: u16,
    /// The low three bits of the first opcode byte (bits 8 to 10) and the ModRM byte.
    pub(crate) opcode: u16,
    /// Real-address or virtual-8086 mode, where environments have a layout of their own.
    pub(crate) real_mode: bool,
}

/// Why an instruction did not complete. The x87 state is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum X87Stop<S> {
    /// Memory access stopped it.
    Machine(S),
    /// An unmasked exception of an earlier instruction is pending: #MF, or FERR with CR0.NE clear.
    Pending,
    /// No such instruction on a 64-bit processor: #UD.
    Invalid,
}
