//! An instruction of a form, with operands of its kinds.

use iced_x86::{Code, Instruction, MemorySize, OpCodeOperandKind as Kind, OpKind, Register};

use super::builder::{Builder, Pointer, RBX};
use super::layout::Destination;
use super::{implicit, memory, values};
use crate::case::Mode;

/// An instruction of form `code`. None where an operand is of a kind that no case has.
pub(super) fn instruction(builder: &mut Builder<'_>, code: Code) -> Option<Instruction> {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let op_code = code.op_code();
    let mut has_memory = false;
    for (place, kind) in (0..).zip(op_code.op_kinds()) {
        let register = match kind {
            Kind::mem
            | Kind::mem_offs
            | Kind::mem_mpx
            | Kind::mem_mib
            | Kind::sibmem
            | Kind::mem_vsib32x
            | Kind::mem_vsib64x
            | Kind::mem_vsib32y
            | Kind::mem_vsib64y
            | Kind::mem_vsib32z
            | Kind::mem_vsib64z => None,
            Kind::seg_rBX_al => {
                // XLATB: AL is whatever it is.
                let address = builder.aim(256, 1);
                let base = if builder.mode == Mode::Long { Register::RBX } else { Register::EBX };
                builder.fix(RBX, address);
                instruction.set_memory_base(base);
                instruction.set_memory_index(Register::AL);
                instruction.try_set_op_kind(place, OpKind::Memory).ok()?;
                continue;
            }
            Kind::seg_rSI | Kind::es_rDI | Kind::seg_rDI => {
                let is_narrow = builder.one_in(12);
                let kind = string_kind(builder.mode, *kind, is_narrow);
                instruction.try_set_op_kind(place, kind).ok()?;
                continue;
            }
            _ => match immediate(builder, &mut instruction, place, *kind) {
                Some(done) => {
                    done.then_some(())?;
                    continue;
                }
                None => Some(register(builder, *kind)?),
            },
        };
        match register {
            // A register, or in half of the cases where it may be that, memory.
            Some(register) if !is_either(*kind) || builder.random.bool() => {
                instruction.try_set_op_kind(place, OpKind::Register).ok()?;
                instruction.try_set_op_register(place, register).ok()?;
            }
            _ => {
                instruction.try_set_op_kind(place, OpKind::Memory).ok()?;
                has_memory = true;
            }
        }
    }
    if op_code.require_op_mask_register() {
        instruction.set_op_mask(Register::K1 + builder.random.u32(..7));
    }
    if has_memory {
        place(builder, &mut instruction);
        if implicit::is_far_bit(&instruction) {
            return None;
        }
    }
    implicit::arrange(builder, &mut instruction);
    Some(instruction)
}

/// Where the memory operand is, and what it holds.
fn place(builder: &mut Builder<'_>, instruction: &mut Instruction) {
    let code = instruction.code();
    let vector = code.op_code().op_kinds().iter().find_map(|kind| match kind {
        Kind::mem_vsib32x | Kind::mem_vsib64x => Some(Register::XMM0),
        Kind::mem_vsib32y | Kind::mem_vsib64y => Some(Register::YMM0),
        Kind::mem_vsib32z | Kind::mem_vsib64z => Some(Register::ZMM0),
        _ => None,
    });
    if code.op_code().op_kinds().contains(&Kind::mem_offs) {
        let wide = builder.mode == Mode::Long && !builder.one_in(4);
        let address = builder.aim(8, 1);
        instruction.set_memory_displ_size(if wide { 8 } else { 4 });
        instruction.set_memory_displacement64(if wide { address } else { address & 0xffff_ffff });
        put_operand(builder, address, code.op_code().memory_size());
        return;
    }
    let size = code.op_code().memory_size();
    let (bytes, alignment) = implicit::extent(code);
    let address = builder.aim(bytes, alignment);
    memory::address(builder, instruction, address);
    if let Some(first) = vector {
        instruction.set_memory_index(first + builder.random.u32(..8));
        instruction.set_memory_index_scale(1);
    }
    if !implicit::fill(builder, instruction, address) {
        put_operand(builder, address, size);
    }
}

/// Puts a value there that is worth having, or leaves the pattern.
fn put_operand(builder: &mut Builder<'_>, address: u64, size: MemorySize) {
    if size.size() == 0 || builder.one_in(5) {
        return;
    }
    let is_integer = !size.is_packed() && matches!(size.size(), 1 | 2 | 4 | 8);
    let is_float = matches!(size.element_type(), MemorySize::Float32 | MemorySize::Float64);
    let bytes = if is_integer && !is_float {
        let bits = u32::try_from(8 * size.size()).unwrap_or(64);
        builder.integer(bits).to_le_bytes().into_iter().take(size.size()).collect()
    } else {
        values::operand(builder.random, size)
    };
    builder.put(address, bytes);
}

fn is_either(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::r8_or_mem
            | Kind::r16_or_mem
            | Kind::r32_or_mem
            | Kind::r32_or_mem_mpx
            | Kind::r64_or_mem
            | Kind::r64_or_mem_mpx
            | Kind::mm_or_mem
            | Kind::xmm_or_mem
            | Kind::ymm_or_mem
            | Kind::zmm_or_mem
            | Kind::bnd_or_mem_mpx
            | Kind::k_or_mem
    )
}

fn string_kind(mode: Mode, kind: Kind, is_narrow: bool) -> OpKind {
    // The address size that a prefix gives is the other one.
    let size = match (mode, is_narrow) {
        (Mode::Long, false) => 64,
        (Mode::Long, true) | (Mode::Compatibility, false) => 32,
        (Mode::Compatibility, true) => 16,
    };
    match (kind, size) {
        (Kind::seg_rSI, 64) => OpKind::MemorySegRSI,
        (Kind::seg_rSI, 32) => OpKind::MemorySegESI,
        (Kind::seg_rSI, _) => OpKind::MemorySegSI,
        (Kind::seg_rDI, 64) => OpKind::MemorySegRDI,
        (Kind::seg_rDI, 32) => OpKind::MemorySegEDI,
        (Kind::seg_rDI, _) => OpKind::MemorySegDI,
        (_, 64) => OpKind::MemoryESRDI,
        (_, 32) => OpKind::MemoryESEDI,
        _ => OpKind::MemoryESDI,
    }
}

/// A register of this kind. None where it is none of one.
fn register(builder: &mut Builder<'_>, kind: Kind) -> Option<Register> {
    let is_long = builder.mode == Mode::Long;
    let count = if is_long { 16 } else { 8 };
    let any = |builder: &mut Builder<'_>| builder.random.u32(..count);
    Some(match kind {
        Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => match is_long {
            // AL to BH, SPL to DIL, R8L to R15L.
            true => Register::AL + builder.random.u32(..20),
            false => Register::AL + builder.random.u32(..8),
        },
        Kind::r16_or_mem | Kind::r16_reg | Kind::r16_rm | Kind::r16_opcode => Register::AX + any(builder),
        Kind::r32_or_mem
        | Kind::r32_or_mem_mpx
        | Kind::r32_reg
        | Kind::r32_rm
        | Kind::r32_opcode
        | Kind::r32_vvvv => Register::EAX + any(builder),
        Kind::r64_or_mem
        | Kind::r64_or_mem_mpx
        | Kind::r64_reg
        | Kind::r64_rm
        | Kind::r64_opcode
        | Kind::r64_vvvv => Register::RAX + any(builder),
        // An address in a register: of the code's address size.
        Kind::r16_reg_mem => Register::AX + any(builder),
        Kind::r32_reg_mem => Register::EAX + any(builder),
        Kind::r64_reg_mem => Register::RAX + any(builder),
        Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Register::MM0 + builder.random.u32(..8),
        Kind::xmm_or_mem
        | Kind::xmm_reg
        | Kind::xmm_rm
        | Kind::xmm_vvvv
        | Kind::xmmp3_vvvv
        | Kind::xmm_is4
        | Kind::xmm_is5 => Register::XMM0 + any(builder),
        Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 | Kind::ymm_is5 => {
            Register::YMM0 + any(builder)
        }
        Kind::zmm_or_mem | Kind::zmm_reg | Kind::zmm_rm | Kind::zmm_vvvv | Kind::zmmp3_vvvv => {
            Register::ZMM0 + any(builder)
        }
        Kind::k_or_mem | Kind::k_reg | Kind::kp1_reg | Kind::k_rm | Kind::k_vvvv => {
            Register::K0 + builder.random.u32(..8)
        }
        Kind::seg_reg => Register::ES + builder.random.u32(..6),
        Kind::cr_reg => {
            let there = if is_long { [0, 2, 3, 4, 8] } else { [0, 2, 3, 4, 0] };
            let any = any(builder);
            Register::CR0 + if builder.one_in(16) { any } else { builder.pick(&there, 0) }
        }
        Kind::dr_reg => Register::DR0 + builder.random.u32(..8),
        Kind::tr_reg => Register::TR0 + builder.random.u32(..8),
        Kind::bnd_or_mem_mpx | Kind::bnd_reg => Register::BND0 + builder.random.u32(..4),
        Kind::tmm_reg | Kind::tmm_rm | Kind::tmm_vvvv => Register::TMM0 + builder.random.u32(..8),
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        Kind::gs => Register::GS,
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::dx => Register::DX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::st0 => Register::ST0,
        Kind::sti_opcode => Register::ST0 + builder.random.u32(..8),
        _ => return None,
    })
}

/// Sets operand `place` if it is an immediate or a branch target, which fails for those of no case. None if it is
/// neither.
fn immediate(
    builder: &mut Builder<'_>,
    instruction: &mut Instruction,
    place: u32,
    kind: Kind,
) -> Option<bool> {
    let before = usize::try_from(place).ok().and_then(|place| place.checked_sub(1));
    let before = before.and_then(|place| instruction.code().op_code().op_kinds().get(place));
    let is_second = matches!(before, Some(Kind::imm8 | Kind::imm16));
    let (op_kind, bits) = match kind {
        Kind::imm8 | Kind::imm4_m2z if is_second => (OpKind::Immediate8_2nd, 8),
        Kind::imm8 | Kind::imm4_m2z => (OpKind::Immediate8, 8),
        Kind::imm8_const_1 => {
            instruction.try_set_op_kind(place, OpKind::Immediate8).ok()?;
            instruction.set_immediate8(1);
            return Some(true);
        }
        Kind::imm8sex16 => (OpKind::Immediate8to16, 8),
        Kind::imm8sex32 => (OpKind::Immediate8to32, 8),
        Kind::imm8sex64 => (OpKind::Immediate8to64, 8),
        Kind::imm16 => (OpKind::Immediate16, 16),
        Kind::imm32 => (OpKind::Immediate32, 32),
        Kind::imm32sex64 => (OpKind::Immediate32to64, 32),
        Kind::imm64 => (OpKind::Immediate64, 64),
        Kind::br16_1 | Kind::br16_2 => return Some(branch(builder, instruction, OpKind::NearBranch16)),
        Kind::br32_1 | Kind::br32_4 => return Some(branch(builder, instruction, OpKind::NearBranch32)),
        Kind::br64_1 | Kind::br64_4 => return Some(branch(builder, instruction, OpKind::NearBranch64)),
        Kind::xbegin_2 | Kind::xbegin_4 => {
            let is_long = builder.mode == Mode::Long;
            let kind = if is_long { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
            return Some(branch(builder, instruction, kind));
        }
        Kind::farbr2_2 | Kind::farbr4_2 => {
            let is_narrow = kind == Kind::farbr2_2;
            let kind = if is_narrow { OpKind::FarBranch16 } else { OpKind::FarBranch32 };
            instruction.try_set_op_kind(place, kind).ok()?;
            let selector = implicit::selector(builder);
            instruction.set_far_branch_selector(selector);
            builder.pointers.push((Pointer::Operand, Destination::Later));
            return Some(true);
        }
        Kind::brdisp_2 | Kind::brdisp_4 => return Some(false),
        _ => return None,
    };
    instruction.try_set_op_kind(place, op_kind).ok()?;
    let value =
        implicit::immediate(builder, instruction.code(), place).unwrap_or_else(|| builder.integer(bits));
    let shift = 64 - bits;
    let signed = (value << shift).cast_signed() >> shift;
    match op_kind {
        OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => {
            instruction.try_set_immediate_i64(place, signed).ok()?;
        }
        _ => instruction.try_set_immediate_u64(place, value & (u64::MAX >> shift)).ok()?,
    }
    Some(true)
}

fn branch(builder: &mut Builder<'_>, instruction: &mut Instruction, kind: OpKind) -> bool {
    let destination = Destination::any(builder);
    builder.pointers.push((Pointer::Operand, destination));
    instruction.set_op0_kind(kind);
    true
}
