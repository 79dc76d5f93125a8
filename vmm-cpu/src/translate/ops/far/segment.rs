//! MOV, PUSH and POP of segment registers; LDS, LES, LFS, LGS, LSS.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RSP;
use crate::translate::memory::HostWord;
use crate::translate::ops::op::{Handler, Op, register_slot, segment_slot};
use crate::translate::segment::{index, low16};

impl Machine<'_> {
    /// A 16-bit register or memory operand.
    pub(super) fn word_operand(&mut self, op: &Op, instruction: &Instruction, n: u32) -> Flow<u16> {
        if instruction.op_kind(n) == OpKind::Register {
            return Ok(low16(self.cpu.r(register_slot(instruction.op_register(n)))));
        }
        let place = self.place(op, 2, false)?;
        self.load(place)
    }

    /// Stores a 16-bit value: to memory as it is, to a register extended to its width.
    pub(super) fn set_word_operand(&mut self, op: &Op, instruction: &Instruction, value: u16) -> Flow {
        if instruction.op0_kind() == OpKind::Register {
            let register = instruction.op0_register();
            self.set_register(register, u64::from(value));
            return Ok(());
        }
        let place = self.place(op, 2, true)?;
        self.store(place, value)
    }

    /// Writes a general register by its name's width.
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let slot = register_slot(register);
        match register.size() {
            2 => self.cpu.set::<u16>(slot, value),
            4 => self.cpu.set::<u32>(slot, value),
            _ => self.cpu.set::<u64>(slot, value),
        }
    }

    /// A far pointer in memory: selector and offset.
    pub(super) fn far_pointer<W: HostWord>(&mut self, op: &Op) -> Flow<(u16, u64)> {
        let place = self.place(op, W::BYTES, false)?;
        let offset = self.load::<W>(place)?.extend();
        let place = self.place_at(op, W::BYTES as u64, 2, false)?;
        Ok((self.load(place)?, offset))
    }
}

fn store_segment(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let selector = m.cpu.segment(segment_slot(instruction.op1_register())).selector;
    m.set_word_operand(op, &instruction, selector)
}

fn load_data_segment(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let selector = m.word_operand(op, &instruction, 1)?;
    m.load_segment(segment_slot(instruction.op0_register()), selector)
}

fn load_stack_segment(m: &mut Machine<'_>, op: &Op) -> Flow {
    load_data_segment(m, op)?;
    m.cpu.shadow_mov_ss = true;
    Ok(())
}

fn push<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let segment = segment_slot(m.rare(op).op0_register());
    let selector = m.cpu.segment(segment).selector;
    m.push::<W>(u64::from(selector))
}

fn pop<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let segment = segment_slot(m.rare(op).op0_register());
    let selector = low16(m.peek::<W>(0)?);
    // The old stack segment's size says what of the stack pointer moves.
    let (rsp, mask) = (m.cpu.r(RSP), m.mode.stack_mask);
    m.load_segment(segment, selector)?;
    m.cpu.set_r(RSP, rsp & !mask | rsp.wrapping_add(W::BYTES as u64) & mask);
    if segment == index::SS {
        m.cpu.shadow_mov_ss = true;
    }
    Ok(())
}

/// LDS and the like, with an offset of width `W`.
fn load_pointer<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let segment = match instruction.mnemonic() {
        Mnemonic::Les => index::ES,
        Mnemonic::Lss => index::SS,
        Mnemonic::Lfs => index::FS,
        Mnemonic::Lgs => index::GS,
        _ => index::DS,
    };
    let (selector, offset) = m.far_pointer::<W>(op)?;
    m.load_segment(segment, selector)?;
    m.cpu.set::<W>(register_slot(instruction.op0_register()), offset);
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Code as C;
    let loads_stack =
        instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::SS;
    Some(match instruction.code() {
        C::Mov_rm16_Sreg | C::Mov_r32m16_Sreg | C::Mov_r64m16_Sreg => (store_segment as Handler, false),
        C::Mov_Sreg_rm16 | C::Mov_Sreg_r32m16 | C::Mov_Sreg_r64m16 => {
            // There is no MOV to CS.
            if instruction.op0_register() == Register::CS {
                return None;
            }
            if loads_stack { (load_stack_segment, true) } else { (load_data_segment, false) }
        }
        C::Lds_r16_m1616 | C::Les_r16_m1616 | C::Lfs_r16_m1616 | C::Lgs_r16_m1616 => {
            (load_pointer::<u16>, false)
        }
        C::Lds_r32_m1632 | C::Les_r32_m1632 | C::Lfs_r32_m1632 | C::Lgs_r32_m1632 => {
            (load_pointer::<u32>, false)
        }
        C::Lfs_r64_m1664 | C::Lgs_r64_m1664 => (load_pointer::<u64>, false),
        C::Lss_r16_m1616 => (load_pointer::<u16>, true),
        C::Lss_r32_m1632 => (load_pointer::<u32>, true),
        C::Lss_r64_m1664 => (load_pointer::<u64>, true),
        C::Pushw_ES | C::Pushw_CS | C::Pushw_SS | C::Pushw_DS | C::Pushw_FS | C::Pushw_GS => {
            (push::<u16>, false)
        }
        C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS => {
            (push::<u32>, false)
        }
        C::Pushq_FS | C::Pushq_GS => (push::<u64>, false),
        C::Popw_ES | C::Popw_SS | C::Popw_DS | C::Popw_FS | C::Popw_GS => (pop::<u16>, loads_stack),
        C::Popd_ES | C::Popd_SS | C::Popd_DS | C::Popd_FS | C::Popd_GS => (pop::<u32>, loads_stack),
        C::Popq_FS | C::Popq_GS => (pop::<u64>, false),
        _ => return None,
    })
}
