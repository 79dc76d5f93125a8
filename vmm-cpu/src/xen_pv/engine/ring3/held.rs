//! Traps that the backend holds back and does not tell of.
//!
//! KVM does not report INT3 and INTO in KVM_GET_VCPU_EVENTS, since the guest comes to them again as long as RIP is at the
//! instruction. Without hardware assistance it is behind it: when a kick comes between the trap and its delivery, KVM's
//! queue is the only place that knows of the trap, and setting the general registers empties it. The guest would go on
//! behind the INT3 as if it had been a NOP; in a kernel that patches itself, that is the middle of an instruction.

use super::{MAX_STAYS, PAGE_FAULT, Ring3, Stay};
use crate::error::Result;
use crate::state::{GeneralRegisters, SystemRegisters};
use crate::xen_pv::engine::private;

impl Ring3 {
    /// Lets the backend deliver a trap that it may hold back, to be called before registers are set after a kick. The trap's
    /// vector and the registers at its stub; `None` if there was none, and the registers of the vCPU are not the guest's any more.
    ///
    /// The engine's own root shows no code to ring 3 but the stubs, so the guest does not execute anything meanwhile: where
    /// there is no trap, it faults. To look for the INT3 before RIP instead would not do: another processor may have replaced it.
    pub(super) fn held_trap(&mut self, system: &SystemRegisters) -> Result<Option<(u8, GeneralRegisters)>> {
        self.vcpu.set_segment_registers(&SystemRegisters { cr3: self.private.own_root(), ..*system })?;
        for _ in 0..MAX_STAYS {
            match self.stay()? {
                Stay::Interrupted => {}
                Stay::Port(port) => {
                    let vector = port.wrapping_sub(private::PORT_EXCEPTION);
                    if vector == PAGE_FAULT {
                        return Ok(None);
                    }
                    if vector < private::EXCEPTIONS {
                        return Ok(Some((vector, self.vcpu.registers()?)));
                    }
                    tracing::debug!(
                        vcpu = self.index,
                        port,
                        "xen-pv: a guest without code left by another port"
                    );
                    break;
                }
                Stay::Crashed => break,
            }
        }
        tracing::debug!(vcpu = self.index, "xen-pv: a guest without code has no end");
        self.crashed = true;
        Ok(None)
    }
}
