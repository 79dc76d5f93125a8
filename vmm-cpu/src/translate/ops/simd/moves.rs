//! Moves between XMM registers and memory.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{is_xmm, number};
use crate::translate::core::{Flow, Machine};
use crate::translate::ops::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::segment::low32;
use crate::translate::word::halves;

fn register_register(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let value = m.cpu.xmm(op.b);
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

fn load_aligned(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.aligned_place(op, 16, false)?;
    let value = m.load_16(place)?;
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

fn load_unaligned(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 16, false)?;
    let value = m.load_16(place)?;
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

fn store_aligned(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.aligned_place(op, 16, true)?;
    m.store_16(place, m.cpu.xmm(op.a))
}

fn store_unaligned(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 16, true)?;
    m.store_16(place, m.cpu.xmm(op.a))
}

/// MOVQ and MOVSD, MOVD and MOVSS from memory: the rest of the register becomes zero.
fn load_8(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 8, false)?;
    let value = m.load::<u64>(place)?;
    m.cpu.set_xmm(op.a, value.into());
    Ok(())
}

fn load_4(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 4, false)?;
    let value = m.load::<u32>(place)?;
    m.cpu.set_xmm(op.a, value.into());
    Ok(())
}

fn store_8(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 8, true)?;
    let [low, _] = halves(m.cpu.xmm(op.a));
    m.store(place, low)
}

/// MOVHPS and MOVHPD to memory.
fn store_high(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 8, true)?;
    let [_, high] = halves(m.cpu.xmm(op.a));
    m.store(place, high)
}

fn store_4(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 4, true)?;
    let [low, _] = halves(m.cpu.xmm(op.a));
    m.store(place, low32(low))
}

/// MOVQ between XMM registers.
fn low_half(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let [low, _] = halves(m.cpu.xmm(op.b));
    m.cpu.set_xmm(op.a, low.into());
    Ok(())
}

fn from_general_8(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let value = m.cpu.get::<u64>(op.b);
    m.cpu.set_xmm(op.a, value.into());
    Ok(())
}

fn from_general_4(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let value = m.cpu.get::<u32>(op.b);
    m.cpu.set_xmm(op.a, value.into());
    Ok(())
}

fn to_general_8(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let [low, _] = halves(m.cpu.xmm(op.b));
    m.cpu.set::<u64>(op.a, low);
    Ok(())
}

fn to_general_4(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let [low, _] = halves(m.cpu.xmm(op.b));
    m.cpu.set::<u32>(op.a, low);
    Ok(())
}

/// The handler of an instruction of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let (loads, stores) = (is_xmm(instruction, 0), is_xmm(instruction, 1));
    if !loads && !stores {
        return None;
    }
    let memory = instruction.op0_kind() == OpKind::Memory || instruction.op1_kind() == OpKind::Memory;
    if loads {
        op.a = number(instruction.op0_register());
    }
    match (loads, stores) {
        (true, true) => op.b = number(instruction.op1_register()),
        (false, true) => op.a = number(instruction.op1_register()),
        _ => {}
    }
    Some(match mnemonic {
        M::Movaps | M::Movapd | M::Movdqa | M::Movups | M::Movupd | M::Movdqu if !memory => register_register,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntdqa if loads => load_aligned,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntdq | M::Movntps | M::Movntpd => store_aligned,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu if loads => load_unaligned,
        M::Movups | M::Movupd | M::Movdqu => store_unaligned,
        M::Movsd | M::Movq if memory && loads => load_8,
        M::Movsd | M::Movq | M::Movlps | M::Movlpd if memory && !loads => store_8,
        M::Movhps | M::Movhpd if memory && !loads => store_high,
        M::Movss | M::Movd if memory && loads => load_4,
        M::Movss | M::Movd if memory => store_4,
        M::Movq if loads && stores => low_half,
        M::Movd | M::Movq if !memory => {
            let general = u32::from(loads);
            if !instruction.op_register(general).is_gpr() {
                return None;
            }
            let slot = register_slot(instruction.op_register(general));
            let wide = operand_bytes(instruction, general) == 8;
            if loads {
                op.b = slot;
                if wide { from_general_8 } else { from_general_4 }
            } else {
                (op.b, op.a) = (op.a, slot);
                if wide { to_general_8 } else { to_general_4 }
            }
        }
        _ => return None,
    })
}
