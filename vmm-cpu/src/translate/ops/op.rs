//! A decoded instruction, ready to run.

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::translate::core::{Flow, Machine, Place};
use crate::translate::cpu::{BLOCK, HIGH_BYTE, ZERO};
use crate::translate::segment::{index, low8};

/// Executes one instruction.
pub(crate) type Handler = fn(&mut Machine<'_>, &Op) -> Flow;

/// Bits of [`Op::address`].
mod address {
    /// Segment register.
    pub(super) const SEGMENT: u8 = 7;
    /// The offset is not the linear address.
    pub(super) const SLOW: u8 = 1 << 3;
    /// Addresses have 32 bits.
    pub(super) const BITS_32: u8 = 1 << 4;
    /// Addresses have 16 bits.
    pub(super) const BITS_16: u8 = 1 << 5;
    /// LOCK prefix, or an instruction that locks by itself.
    pub(super) const LOCK: u8 = 1 << 7;
}

/// A decoded instruction: what executes it, and its operands in the form that the handler wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) run: Handler,
    /// Immediate; for near branches the target and for rare instructions their place in
    /// [`Core::rare`](crate::translate::core::Core::rare).
    pub(crate) imm: u64,
    displacement: i32,
    base: u8,
    index: u8,
    scale: u8,
    address: u8,
    /// First register, mostly the destination.
    pub(crate) a: u8,
    /// Second register.
    pub(crate) b: u8,
    /// Offset of the instruction within its block.
    pub(crate) start: u16,
}

impl Op {
    pub(crate) fn new(run: Handler, start: u16) -> Self {
        Self {
            run,
            imm: 0,
            displacement: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            address: 0,
            a: 0,
            b: 0,
            start,
        }
    }

    /// Takes the memory operand of `instruction`, if it has one. `false` if its displacement does not fit: that of an
    /// absolute 64-bit address.
    pub(crate) fn take_memory(&mut self, instruction: &Instruction, code_bits: u32) -> bool {
        let has = |n| instruction.op_kind(n) == OpKind::Memory;
        self.address = if instruction.has_lock_prefix() { address::LOCK } else { 0 };
        if !(0..instruction.op_count()).any(has) {
            return true;
        }
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let displacement = instruction.memory_displacement64().cast_signed();
        let address_bits = match (base, index) {
            (Register::None, Register::None) => match instruction.memory_displ_size() {
                2 => 16,
                4 => 32,
                8 => 64,
                _ => code_bits,
            },
            (Register::RIP, _) => 64,
            (Register::EIP, _) => 32,
            (Register::None, register) | (register, _) => 8 * u32::try_from(register.size()).unwrap_or(8),
        };
        // An absolute 32-bit address in 64-bit code is sign-extended unless the address-size prefix says otherwise.
        let address_bits = if code_bits == 64 && base == Register::None && index == Register::None {
            if instruction.memory_displacement64() > u64::from(u32::MAX) || displacement < 0 {
                64
            } else {
                address_bits
            }
        } else {
            address_bits
        };
        self.base = match base {
            Register::None => ZERO,
            Register::RIP | Register::EIP => BLOCK,
            register => register_slot(register),
        };
        self.index = if index == Register::None { ZERO } else { register_slot(index) };
        self.scale = low8(u64::from(instruction.memory_index_scale().trailing_zeros()));
        let segment = match segment_slot(instruction.memory_segment()) {
            // In 64-bit code other prefixes do not even change which exception a bad address is.
            segment if code_bits == 64 && segment < index::FS => default_segment(base),
            segment => segment,
        };
        self.address |= low8(segment as u64);
        match address_bits {
            16 => self.address |= address::BITS_16,
            32 => self.address |= address::BITS_32,
            _ => {}
        }
        if code_bits != 64 || address_bits != 64 || segment >= index::FS {
            self.address |= address::SLOW;
        }
        let narrow = match address_bits {
            64 => i32::try_from(displacement).ok(),
            // The address is cut to its width, so the low half says it all.
            _ => Some(crate::translate::segment::low32(displacement.cast_unsigned()).cast_signed()),
        };
        self.displacement = narrow.unwrap_or(0);
        narrow.is_some()
    }

    /// Whether the memory access must be atomic.
    #[inline(always)]
    pub(crate) fn locked(&self) -> bool {
        self.address & address::LOCK != 0
    }

    /// Index of the memory operand's segment register.
    pub(crate) fn segment(&self) -> usize {
        usize::from(self.address & address::SEGMENT)
    }

    /// What of an address counts.
    pub(crate) fn address_mask(&self) -> u64 {
        if self.address & address::BITS_16 != 0 {
            0xffff
        } else if self.address & address::BITS_32 != 0 {
            0xffff_ffff
        } else {
            u64::MAX
        }
    }
}

impl Machine<'_> {
    #[inline(always)]
    fn sum(&self, op: &Op) -> u64 {
        let index = self.cpu.r(op.index) << (op.scale & 3);
        self.cpu.r(op.base).wrapping_add(index).wrapping_add(i64::from(op.displacement).cast_unsigned())
    }

    /// The memory operand's effective address (LEA).
    #[inline(always)]
    pub(crate) fn effective_address(&self, op: &Op) -> u64 {
        self.sum(op) & op.address_mask()
    }

    /// Where the memory operand of `bytes` bytes lies.
    #[inline(always)]
    pub(crate) fn place(&mut self, op: &Op, bytes: usize, write: bool) -> Flow<Place> {
        let sum = self.sum(op);
        if op.address & address::SLOW == 0 {
            Ok(Place { va: sum, segment: op.address & address::SEGMENT })
        } else {
            self.slow_place(op, sum, 0, bytes, write)
        }
    }

    /// Where the memory operand lies, moved by `offset` before the address is cut to its width: bit strings, far
    /// pointers.
    pub(crate) fn place_at(&mut self, op: &Op, offset: u64, bytes: usize, write: bool) -> Flow<Place> {
        let sum = self.sum(op);
        if op.address & address::SLOW == 0 {
            Ok(Place { va: sum.wrapping_add(offset), segment: op.address & address::SEGMENT })
        } else {
            self.slow_place(op, sum, offset, bytes, write)
        }
    }

    #[inline(never)]
    fn slow_place(&mut self, op: &Op, sum: u64, offset: u64, bytes: usize, write: bool) -> Flow<Place> {
        // RIP is relative to the block even where it is used with 32 bits.
        let effective = sum.wrapping_add(offset) & op.address_mask();
        self.place_in(op.segment(), effective, bytes, write)
    }

    /// The linear address of an offset in a segment.
    pub(crate) fn place_in(&mut self, segment: usize, offset: u64, bytes: usize, write: bool) -> Flow<Place> {
        if self.is_64() {
            let place = Place { va: offset, segment: low8(segment as u64) };
            if segment < index::FS {
                return Ok(place);
            }
            // The offset alone must be canonical on AMD's processors.
            self.require_canonical(place)?;
            Ok(place.plus(self.cpu.segment(segment).base))
        } else {
            self.legacy_place(segment, offset, bytes as u64, write)
        }
    }
}

/// The segment of an operand that RSI or RDI is the address of. In 64-bit code prefixes but those of FS and GS do not even
/// change which exception a bad address is.
pub(crate) fn implicit_segment(instruction: &Instruction, is_64: bool) -> usize {
    match segment_slot(instruction.memory_segment()) {
        segment if is_64 && segment < index::FS => index::DS,
        segment => segment,
    }
}

/// The segment of addresses with this base register.
fn default_segment(base: Register) -> usize {
    match base {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => index::SS,
        _ => index::DS,
    }
}

/// Slot of a general register in the register file, with [`HIGH_BYTE`] for AH, CH, DH and BH.
pub(crate) fn register_slot(register: Register) -> u8 {
    let slot = low8(register.full_register().number() as u64);
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => slot | HIGH_BYTE,
        _ => slot,
    }
}

/// Index of a segment register.
pub(crate) fn segment_slot(register: Register) -> usize {
    match register {
        Register::ES => index::ES,
        Register::CS => index::CS,
        Register::SS => index::SS,
        Register::FS => index::FS,
        Register::GS => index::GS,
        _ => index::DS,
    }
}

/// Size in bytes of operand `n`: of its register or of memory; of an immediate, that of the first operand.
pub(crate) fn operand_bytes(instruction: &Instruction, n: u32) -> usize {
    match instruction.op_kind(n) {
        OpKind::Register => instruction.op_register(n).size(),
        OpKind::Memory
        | OpKind::MemorySegSI
        | OpKind::MemorySegESI
        | OpKind::MemorySegRSI
        | OpKind::MemorySegDI
        | OpKind::MemorySegEDI
        | OpKind::MemorySegRDI
        | OpKind::MemoryESDI
        | OpKind::MemoryESEDI
        | OpKind::MemoryESRDI => instruction.memory_size().size(),
        _ if n == 0 => 0,
        _ => operand_bytes(instruction, 0),
    }
}

/// Whether an instruction is invalid in every mode.
pub(crate) fn is_invalid(instruction: &Instruction) -> bool {
    instruction.code() == Code::INVALID
}
