//! INT n, INT3, INTO, INT1.

use iced_x86::{Instruction, Mnemonic};

use crate::debug::{DebugReason, DebugStop};
use crate::translate::core::{Flow, Machine, Reason};
use crate::translate::cpu::BLOCK;
use crate::translate::exception::Event;
use crate::translate::ops::op::{Handler, Op};
use crate::translate::segment::low8;
use crate::vcpu::Halt;

fn software(m: &mut Machine<'_>, op: &Op) -> Flow {
    let vector = low8(m.rare(op).immediate(0));
    m.deliver(Event::Software { vector })
}

fn breakpoint(m: &mut Machine<'_>, op: &Op) -> Flow {
    if m.debug.software_breakpoints {
        let rip = m.cpu.r(BLOCK).wrapping_add(u64::from(op.start)) & m.mode.ip_mask;
        let linear = if m.is_64() { rip } else { m.cpu.cs().base.wrapping_add(rip) & 0xffff_ffff };
        let stop = DebugStop::new(linear, DebugReason::SoftwareBreakpoint);
        return Err(m.leave(Reason::Halt(Halt::Debug(stop))));
    }
    m.deliver(Event::Breakpoint)
}

fn overflow(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.flags.of() { m.deliver(Event::Overflow) } else { Ok(()) }
}

fn int1(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.deliver(Event::Int1)
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    Some(match instruction.mnemonic() {
        Mnemonic::Int => (software as Handler, true),
        Mnemonic::Int3 => (breakpoint, true),
        Mnemonic::Into => (overflow, true),
        Mnemonic::Int1 => (int1, true),
        _ => return None,
    })
}
