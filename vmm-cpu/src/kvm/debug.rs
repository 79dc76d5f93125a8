//! Breakpoints and single step by KVM_SET_GUEST_DEBUG.

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug,
    kvm_guest_debug_arch,
};

use super::host;
use super::vcpu::KvmVcpu;
use crate::debug::{DebugReason, DebugRequest, DebugStop, DebugStops, HardwareStop, HardwareStopKind};
use crate::error::{Error, Result};

/// Debug address registers of the architecture.
const MAX_HARDWARE: usize = 4;

/// Vector of INT3.
const BREAKPOINT_EXCEPTION: u32 = 3;

/// DR6.BS: single step (Intel SDM 3B 19.2.3).
const DR6_BS: u64 = 1 << 14;

/// The 4-bit R/W and LEN fields of DR7 for one stop (Intel SDM 3B 19.2.4).
fn dr7_field(stop: &HardwareStop) -> Result<u64> {
    let length_bits = |length: u8| {
        let bits = match length {
            1 => 0b00,
            2 => 0b01,
            4 => 0b11,
            8 => 0b10,
            _ => return Err(Error::invalid("length of a watchpoint", length, "1, 2, 4 or 8 bytes")),
        };
        if !stop.address.is_multiple_of(u64::from(length)) {
            return Err(Error::invalid(
                "address of a watchpoint",
                format_args!("{:#x}", stop.address),
                format_args!("a multiple of its length, {length}"),
            ));
        }
        Ok(bits)
    };
    Ok(match stop.kind {
        HardwareStopKind::Execute => 0b0000,
        HardwareStopKind::Write { length } => 0b01 | length_bits(length)? << 2,
        HardwareStopKind::Access { length } => 0b11 | length_bits(length)? << 2,
    })
}

/// DR0 to DR3 and DR7 for `stops`.
fn debug_registers(stops: &[HardwareStop]) -> Result<kvm_guest_debug_arch> {
    if stops.len() > MAX_HARDWARE {
        return Err(Error::invalid(
            "number of hardware stops",
            stops.len(),
            format_args!("0 to {MAX_HARDWARE}"),
        ));
    }
    // GE and LE, and bit 10 which always reads as one.
    let mut dr7 = 0x700;
    let mut arch = kvm_guest_debug_arch::default();
    for ((index, stop), register) in stops.iter().enumerate().zip(&mut arch.debugreg) {
        *register = stop.address;
        dr7 |= 0b10 << (index * 2) | dr7_field(stop)? << (16 + index * 4);
    }
    if let Some(register) = arch.debugreg.last_mut() {
        *register = dr7;
    }
    Ok(arch)
}

/// The stop that a KVM_EXIT_DEBUG tells of.
pub(super) fn stop_of(exit: &kvm_debug_exit_arch) -> DebugStop {
    // The low four bits are B0 to B3.
    let hits = (exit.dr6 & 0xf) as u8;
    let reason = if exit.exception == BREAKPOINT_EXCEPTION {
        DebugReason::SoftwareBreakpoint
    } else if hits != 0 && exit.dr6 & DR6_BS == 0 {
        DebugReason::Hardware { hits }
    } else {
        DebugReason::SingleStep
    };
    DebugStop::new(exit.pc, reason)
}

impl DebugStops for KvmVcpu {
    fn max_hardware(&self) -> usize {
        MAX_HARDWARE
    }

    fn can_hold_interrupts(&self) -> bool {
        // The answer is a mask of flags, zero from a kernel that does not know the question.
        let flags = self.vm.fd.check_extension_raw(u64::from(KVM_CAP_SET_GUEST_DEBUG2));
        flags.cast_unsigned() & KVM_GUESTDBG_BLOCKIRQ != 0
    }

    fn request(&mut self, request: &DebugRequest) -> Result<()> {
        let holds = request.single_step && request.hold_interrupts && self.can_hold_interrupts();
        let arch = debug_registers(&request.hardware)?;
        self.flush_registers()?;
        let mut control = 0;
        for (wanted, bits) in [
            (request.single_step, KVM_GUESTDBG_SINGLESTEP),
            (request.software_breakpoints, KVM_GUESTDBG_USE_SW_BP),
            (!request.hardware.is_empty(), KVM_GUESTDBG_USE_HW_BP),
            (holds, KVM_GUESTDBG_BLOCKIRQ),
        ] {
            if wanted {
                control |= KVM_GUESTDBG_ENABLE | bits;
            }
        }
        let debug = kvm_guest_debug { control, pad: 0, arch };
        self.fd().set_guest_debug(&debug).map_err(|errno| host("KVM_SET_GUEST_DEBUG", errno))?;
        (self.single_step, self.holds_interrupts) = (request.single_step, holds);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr7_has_enable_kind_and_length_per_stop() {
        let stops =
            [HardwareStop::execute(0x1001), HardwareStop::write(0x2008, 8), HardwareStop::access(0x3004, 4)];
        let arch = debug_registers(&stops).unwrap();
        assert_eq!(arch.debugreg[..3], [0x1001, 0x2008, 0x3004]);
        assert_eq!(arch.debugreg[7], 0x700 | 0b10_1010 | 0b1001 << 20 | 0b1111 << 24);
    }

    #[test]
    fn impossible_stops_are_refused() {
        assert!(debug_registers(&[HardwareStop::execute(0); 5]).is_err());
        assert!(debug_registers(&[HardwareStop::write(0, 3)]).is_err());
        assert!(debug_registers(&[HardwareStop::access(0x1002, 4)]).is_err());
    }

    #[test]
    fn reason_follows_exception_and_dr6() {
        let exit = |exception, dr6| kvm_debug_exit_arch { exception, dr6, pc: 5, ..Default::default() };
        assert_eq!(stop_of(&exit(3, 0)), DebugStop::new(5, DebugReason::SoftwareBreakpoint));
        assert_eq!(stop_of(&exit(1, 0xffff_0ff2)).reason, DebugReason::Hardware { hits: 2 });
        assert_eq!(stop_of(&exit(1, 0xffff_0ff0 | DR6_BS)).reason, DebugReason::SingleStep);
    }
}
