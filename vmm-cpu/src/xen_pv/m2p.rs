//! Loads from the machine-to-physical table where Xen has it, for engines that cannot show it there: a kernel that does
//! not ask for the table's place has [`XEN_M2P_VA`] built in. The fault tells the address, so what is left is to load.
//!
//! Threat model: the instruction is read from guest memory after it faulted, so it may be another one by now. What is done
//! is one load from a table that the guest kernel may read, whatever the instruction is.

use iced_x86::{Decoder, DecoderOptions, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::emulate::{MAX, place};
use super::engine::{Engine, XEN_M2P_VA};
use super::vcpu_abi::VcpuAbi;
use crate::state::{GeneralRegisters, rflags};

const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

impl VcpuAbi {
    /// Does the load that faulted at `address`, if it is one from the table: MOV, MOVZX, MOVSX, MOVSXD, CMP or TEST.
    /// Returns whether it was.
    pub(crate) fn load_from_m2p(&self, engine: &mut dyn Engine, address: u64) -> bool {
        let Some(offset) = address.checked_sub(XEN_M2P_VA) else { return false };
        if offset >= self.domain.memory.layout().m2p_size() {
            return false;
        }
        let root = engine.kernel_root();
        let general = &mut engine.context().general;
        let (bytes, len): ([u8; MAX], usize) = self.fetch(root, general.rip);
        let bytes = bytes.get(..len).unwrap_or_default();
        let instruction = Decoder::with_ip(64, bytes, general.rip, DecoderOptions::NONE).decode();
        let load = |data: &mut [u8]| self.domain.memory.read_m2p(offset, data).is_ok();
        if execute(&instruction, general, load).is_none() {
            return false;
        }
        general.rip = instruction.next_ip();
        true
    }
}

/// Executes an instruction whose operand in memory is what `load` gives. `None`, with nothing changed, if it is another one.
fn execute(
    instruction: &Instruction,
    general: &mut GeneralRegisters,
    load: impl Fn(&mut [u8]) -> bool,
) -> Option<()> {
    let mnemonic = instruction.mnemonic();
    let moves = matches!(mnemonic, Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd);
    if !moves && !matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test) {
        return None;
    }
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    let size = match instruction.memory_size() {
        MemorySize::UInt8 | MemorySize::Int8 => 1,
        MemorySize::UInt16 | MemorySize::Int16 => 2,
        MemorySize::UInt32 | MemorySize::Int32 => 4,
        MemorySize::UInt64 | MemorySize::Int64 => 8,
        _ => return None,
    };
    let mut bytes = [0; 8];
    if !kinds.contains(&OpKind::Memory) || !load(bytes.get_mut(..size)?) {
        return None;
    }
    let loaded = u64::from_le_bytes(bytes);
    if moves {
        let extended = if matches!(mnemonic, Mnemonic::Movsx | Mnemonic::Movsxd) {
            sign_extended(loaded, size)
        } else {
            loaded
        };
        return set(general, instruction.op0_register(), extended);
    }
    let operand = |kind, register| match kind {
        OpKind::Memory => Some(loaded),
        OpKind::Register => get(general, register),
        // Sign-extended to the operand's size.
        _ => Some(instruction.immediate(1)),
    };
    let [op0, op1] = kinds;
    let a = operand(op0, instruction.op0_register())?;
    let b = operand(op1, instruction.op1_register())?;
    general.rflags = general.rflags & !(rflags::CF | PF | AF | rflags::ZF | SF | OF)
        | if mnemonic == Mnemonic::Cmp { flags_of_difference(a, b, size) } else { flags_of(a & b, size) };
    Some(())
}

fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

fn sign_extended(value: u64, size: usize) -> u64 {
    let shift = 64 - 8 * size;
    ((value << shift).cast_signed() >> shift).cast_unsigned()
}

/// SF, ZF and PF of a result; CF, OF and AF are clear.
fn flags_of(result: u64, size: usize) -> u64 {
    let result = result & mask(size);
    let mut flags = 0;
    if result == 0 {
        flags |= rflags::ZF;
    }
    if sign_extended(result, size).cast_signed() < 0 {
        flags |= SF;
    }
    if (result & 0xff).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    flags
}

/// The flags that CMP sets.
fn flags_of_difference(a: u64, b: u64, size: usize) -> u64 {
    let (a, b) = (a & mask(size), b & mask(size));
    let result = a.wrapping_sub(b);
    let mut flags = flags_of(result, size);
    if a < b {
        flags |= rflags::CF;
    }
    if (a ^ b ^ result) & 0x10 != 0 {
        flags |= AF;
    }
    if sign_extended((a ^ b) & (a ^ result), size).cast_signed() < 0 {
        flags |= OF;
    }
    flags
}

/// The 64-bit register of which `register` is a part, the part's size, and from which bit on it is.
fn part(register: Register) -> Option<(Register, usize, u32)> {
    use Register::{AH, AL, AX, BH, BL, EAX, R15, R15D, R15L, R15W, RAX, RSP, SPL};
    let (first, _, whole, size, shift) = [
        (RAX, R15, RAX, 8, 0),
        (EAX, R15D, RAX, 4, 0),
        (AX, R15W, RAX, 2, 0),
        (AL, BL, RAX, 1, 0),
        (AH, BH, RAX, 1, 8),
        (SPL, R15L, RSP, 1, 0),
    ]
    .into_iter()
    .find(|(first, last, ..)| (*first..=*last).contains(&register))?;
    Some((whole + (register as u32 - first as u32), size, shift))
}

fn get(general: &GeneralRegisters, register: Register) -> Option<u64> {
    let (whole, size, shift) = part(register)?;
    let mut copy = *general;
    Some(*place(&mut copy, whole)? >> shift & mask(size))
}

/// Sets a register as instructions do: 32 bits clear those above, fewer leave them.
fn set(general: &mut GeneralRegisters, register: Register, value: u64) -> Option<()> {
    let (whole, size, shift) = part(register)?;
    let place = place(general, whole)?;
    let kept = if size >= 4 { 0 } else { *place & !(mask(size) << shift) };
    *place = kept | (value & mask(size)) << shift;
    Some(())
}

#[cfg(test)]
mod tests;
