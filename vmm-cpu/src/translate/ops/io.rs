//! IN and OUT, and the permission to use a port (Intel SDM 1 chapter 19).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::op::{Handler, Op};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{RAX, RDX};
use crate::translate::segment::{low8, low16, low32};

/// Offset of the I/O map base in a task-state segment.
const IO_MAP_BASE: u64 = 0x66;
/// Smallest limit of a task-state segment that holds it.
const TSS_LIMIT: u32 = 0x67;

impl Machine<'_> {
    /// #GP(0) unless the running code may use `size` ports from `port` on.
    pub(crate) fn check_port(&mut self, port: u16, size: usize) -> Flow {
        let privileged = self.mode.cpl <= self.cpu.iopl() && !self.cpu.virtual_8086();
        if !self.cpu.protected() || privileged {
            return Ok(());
        }
        let tss = self.cpu.tr;
        // Only 32- and 64-bit task-state segments have a map: types 9 and 11.
        if tss.is_unusable() || tss.kind() & 0xd != 9 || tss.limit < TSS_LIMIT {
            return Err(self.gp(0));
        }
        let base = self.load_system::<u16>(tss.base.wrapping_add(IO_MAP_BASE))?;
        // Two bytes are read, so that one look covers an access which straddles two bytes of the map.
        let offset = u32::from(base) + u32::from(port / 8);
        if offset.saturating_add(1) > tss.limit {
            return Err(self.gp(0));
        }
        let map = self.load_system::<u16>(tss.base.wrapping_add(u64::from(offset)))?;
        let mask = (1_u32 << size) - 1;
        if u32::from(map) >> (port % 8) & mask != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// Reads whole elements of `size` bytes from a port.
    pub(crate) fn port_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        self.counts.pio_in += 1;
        self.end_block();
        self.leave_guest(|io| io.pio_read(port, size, data));
    }

    /// Writes whole elements of `size` bytes to a port.
    pub(crate) fn port_write(&mut self, port: u16, size: usize, data: &[u8]) {
        self.counts.pio_out += 1;
        self.end_block();
        self.leave_guest(|io| io.pio_write(port, size, data));
    }
}

/// Port of operand `n`: DX or an immediate.
fn port(m: &Machine<'_>, instruction: &Instruction, n: u32) -> u16 {
    if instruction.op_kind(n) == OpKind::Register {
        low16(m.cpu.r(RDX))
    } else {
        u16::from(low8(instruction.immediate(n)))
    }
}

fn input(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let size = instruction.op0_register().size();
    let port = port(m, &instruction, 1);
    m.check_port(port, size)?;
    let mut bytes = [0; 4];
    let (data, _) = bytes.split_at_mut(size.min(4));
    m.port_read(port, size, data);
    let value = u64::from(u32::from_le_bytes(bytes));
    match size {
        1 => m.cpu.set::<u8>(RAX, value),
        2 => m.cpu.set::<u16>(RAX, value),
        _ => m.cpu.set::<u32>(RAX, value),
    }
    Ok(())
}

fn output(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let size = instruction.op1_register().size();
    let port = port(m, &instruction, 0);
    m.check_port(port, size)?;
    let bytes = low32(m.cpu.r(RAX)).to_le_bytes();
    let (data, _) = bytes.split_at(size.min(4));
    m.port_write(port, size, data);
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    match instruction.mnemonic() {
        Mnemonic::In => Some((input, true)),
        Mnemonic::Out => Some((output, true)),
        _ => None,
    }
}
