//! LAR, LSL, VERR, VERW, ARPL; the registers of descriptor tables and of the task.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{TableRegister, cr4};
use crate::translate::descriptor::{Descriptor, kind};
use crate::translate::exception::vector;
use crate::translate::flags::bits;
use crate::translate::ops::op::{Handler, Op, register_slot};
use crate::translate::segment::low16;

impl Machine<'_> {
    /// #UD in real and virtual-8086 mode.
    fn require_selectors(&mut self) -> Flow {
        if self.cpu.protected() && !self.cpu.virtual_8086() { Ok(()) } else { Err(self.ud()) }
    }

    /// #GP(0) at an outer privilege level if CR4.UMIP hides system registers from it.
    pub(crate) fn require_no_umip(&mut self) -> Flow {
        if self.cpu.cr4 & cr4::UMIP != 0 && self.mode.cpl > 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    fn set_zero_flag(&mut self, on: bool) {
        self.cpu.flags.replace_status(bits::ZF, if on { bits::ZF } else { 0 });
    }

    /// The descriptor of a selector if the program may know of it.
    fn visible_descriptor(&mut self, selector: u16) -> Flow<Option<Descriptor>> {
        let cpl = self.mode.cpl;
        Ok(self.find_descriptor(selector)?.filter(|descriptor| descriptor.is_reachable(cpl)))
    }
}

/// Types of system descriptors that have access rights.
fn has_rights(system_kind: u8, long_mode: bool) -> bool {
    match system_kind {
        kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL_GATE => true,
        kind::TSS_16 | kind::TSS_16_BUSY | kind::CALL_GATE_16 | kind::TASK_GATE => !long_mode,
        _ => false,
    }
}

/// Types of system descriptors that have a limit.
fn has_limit(system_kind: u8, long_mode: bool) -> bool {
    has_rights(system_kind, long_mode)
        && !matches!(system_kind, kind::CALL_GATE | kind::CALL_GATE_16 | kind::TASK_GATE)
}

/// LAR and LSL.
fn inspect(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    let instruction = m.rare(op);
    let selector = m.word_operand(op, &instruction, 1)?;
    let wants_limit = instruction.mnemonic() == Mnemonic::Lsl;
    let long_mode = m.cpu.long_mode();
    let descriptor = m.visible_descriptor(selector)?.filter(|descriptor| match descriptor.system_kind() {
        None => true,
        Some(kind) if wants_limit => has_limit(kind, long_mode),
        Some(kind) => has_rights(kind, long_mode),
    });
    if let Some(descriptor) = descriptor {
        let value = if wants_limit {
            u64::from(descriptor.register.limit)
        } else {
            // With bits 19 to 16 of the limit, which Intel leaves open and AMD's processors give.
            descriptor.raw >> 32 & 0x00ff_ff00
        };
        m.set_register(instruction.op0_register(), value);
    }
    m.set_zero_flag(descriptor.is_some());
    Ok(())
}

/// VERR and VERW.
fn verify(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    let instruction = m.rare(op);
    let selector = m.word_operand(op, &instruction, 0)?;
    let wants_write = instruction.mnemonic() == Mnemonic::Verw;
    let descriptor = m.visible_descriptor(selector)?;
    let is_fit =
        descriptor.is_some_and(|found| if wants_write { found.is_writable() } else { found.is_readable() });
    m.set_zero_flag(is_fit);
    Ok(())
}

fn adjust_rpl(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    let instruction = m.rare(op);
    let wanted = low16(m.cpu.r(register_slot(instruction.op1_register()))) & 3;
    let selector = m.word_operand(op, &instruction, 0)?;
    let adjusts = selector & 3 < wanted;
    if adjusts {
        let adjusted = u64::from(selector & !3 | wanted);
        if instruction.op0_kind() == OpKind::Register {
            m.cpu.set::<u16>(register_slot(instruction.op0_register()), adjusted);
        } else {
            let place = m.place(op, 2, true)?;
            m.store(place, low16(adjusted))?;
        }
    }
    m.set_zero_flag(adjusts);
    Ok(())
}

/// SLDT and STR.
fn store_selector(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    m.require_no_umip()?;
    let instruction = m.rare(op);
    let register = if instruction.mnemonic() == Mnemonic::Sldt { m.cpu.ldtr } else { m.cpu.tr };
    m.set_word_operand(op, &instruction, register.selector)
}

fn load_local_table(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    m.require_cpl0()?;
    let instruction = m.rare(op);
    let selector = m.word_operand(op, &instruction, 0)?;
    m.cpu.ldtr = m.local_table(selector, vector::GP)?;
    m.serialize();
    Ok(())
}

fn load_task(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_selectors()?;
    m.require_cpl0()?;
    let instruction = m.rare(op);
    let selector = m.word_operand(op, &instruction, 0)?;
    m.load_task_register(selector)?;
    m.serialize();
    Ok(())
}

/// Bytes of the base address in the operand of LGDT and the like.
fn base_bytes(m: &Machine<'_>) -> u64 {
    if m.is_64() { 8 } else { 4 }
}

/// SGDT and SIDT. The base is stored whole even with 16-bit operands.
fn store_table(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_no_umip()?;
    let is_global = m.rare(op).mnemonic() == Mnemonic::Sgdt;
    let table = if is_global { m.cpu.gdtr } else { m.cpu.idtr };
    let bytes = base_bytes(m);
    // Nothing is stored unless all of it can be, and the first part that cannot be is what faults.
    let limit = m.place(op, 2, true)?;
    m.probe_write(limit, 2)?;
    let place = m.place_at(op, 2, if bytes == 8 { 8 } else { 4 }, true)?;
    m.probe_write(place, bytes)?;
    m.store(limit, table.limit)?;
    m.store_sized(place, bytes, table.base)
}

/// LGDT and LIDT.
fn load_table(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_cpl0()?;
    let instruction = m.rare(op);
    let bytes = base_bytes(m);
    let place = m.place(op, 2, false)?;
    let limit = m.load(place)?;
    let place = m.place_at(op, 2, if bytes == 8 { 8 } else { 4 }, false)?;
    let base = m.load_sized(place, bytes)?;
    let is_narrow = matches!(instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
    let base = if is_narrow { base & 0xff_ffff } else { base };
    if m.is_64() && !m.is_canonical(base) {
        return Err(m.gp(0));
    }
    let table = TableRegister { base, limit };
    if instruction.mnemonic() == Mnemonic::Lgdt {
        m.cpu.gdtr = table;
    } else {
        m.cpu.idtr = table;
    }
    m.serialize();
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    Some(match instruction.mnemonic() {
        Mnemonic::Lar | Mnemonic::Lsl => (inspect as Handler, false),
        Mnemonic::Verr | Mnemonic::Verw => (verify, false),
        Mnemonic::Arpl => (adjust_rpl, false),
        Mnemonic::Sldt | Mnemonic::Str => (store_selector, false),
        Mnemonic::Lldt => (load_local_table, true),
        Mnemonic::Ltr => (load_task, true),
        Mnemonic::Sgdt | Mnemonic::Sidt => (store_table, false),
        Mnemonic::Lgdt | Mnemonic::Lidt => (load_table, true),
        _ => return None,
    })
}
