//! STI, CLI, PUSHF, POPF.

use iced_x86::{Instruction, Mnemonic};

use crate::translate::core::{Flow, Machine};
use crate::translate::flags::bits;
use crate::translate::memory::HostWord;
use crate::translate::ops::op::{Handler, Op};

impl Machine<'_> {
    /// #GP(0) in virtual-8086 mode unless IOPL is 3.
    pub(super) fn require_virtual_iopl(&mut self) -> Flow {
        if self.cpu.virtual_8086() && self.cpu.iopl() < 3 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// #GP(0) unless the privilege level may change the interrupt flag.
    fn require_iopl(&mut self) -> Flow {
        if self.mode.cpl > self.cpu.iopl() { Err(self.gp(0)) } else { Ok(()) }
    }

    /// The flags that POPF and IRET with operands of that many bytes may change, RF aside.
    pub(super) fn changeable_flags(&self, bytes: usize) -> u64 {
        let mut mask = bits::STATUS | bits::TF | bits::DF | bits::NT;
        if bytes > 2 {
            mask |= bits::AC | bits::ID;
        }
        if self.mode.cpl <= self.cpu.iopl() {
            mask |= bits::IF;
        }
        if self.mode.cpl == 0 {
            mask |= bits::IOPL;
        }
        mask
    }
}

fn enable(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_iopl()?;
    if !m.cpu.flags.control(bits::IF) {
        m.cpu.flags.set_control(bits::IF, true);
        m.cpu.shadow_sti = true;
        m.urgent = true;
    }
    Ok(())
}

fn disable(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_iopl()?;
    m.cpu.flags.set_control(bits::IF, false);
    Ok(())
}

fn push<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_virtual_iopl()?;
    let flags = m.cpu.flags.get() & !(bits::VM | bits::RF);
    m.push::<W>(flags)
}

fn pop<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_virtual_iopl()?;
    let popped = m.peek::<W>(0)?;
    m.drop_stack(W::BYTES as u64);
    let old = m.cpu.flags.get();
    let mask = m.changeable_flags(W::BYTES);
    let new = old & !(mask | bits::RF) | popped & mask;
    m.cpu.flags.set(new);
    let changed = old ^ new;
    if changed & bits::AC != 0 {
        m.update_reach();
    }
    if changed & (bits::IF | bits::TF) & new != 0 {
        // Whatever waited for that is due now.
        m.urgent = true;
        m.end_block();
    }
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    Some(match instruction.mnemonic() {
        Mnemonic::Cli => (disable, false),
        Mnemonic::Sti => (enable, true),
        Mnemonic::Pushf => (push::<u16>, false),
        Mnemonic::Pushfd => (push::<u32>, false),
        Mnemonic::Pushfq => (push::<u64>, false),
        Mnemonic::Popf => (pop::<u16>, false),
        Mnemonic::Popfd => (pop::<u32>, false),
        Mnemonic::Popfq => (pop::<u64>, false),
        _ => return None,
    })
}
