//! KVM's interrupt controllers, timer and clock to and from the portable state.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};

use super::clock::KvmClock;
use super::vm::VmInner;
use super::{host, same_fields, sys};
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::state::{ClockState, IoApicState, PicState, PitChannelState, PitState, VmState};
use crate::vm::VmClock as _;

fn pic_from_kvm(p: &kvm_pic_state) -> PicState {
    same_fields!(p => PicState {
        last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
        auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask,
    })
}

fn pic_to_kvm(p: &PicState) -> kvm_pic_state {
    same_fields!(p => kvm_pic_state {
        last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
        auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask,
    })
}

fn channel_from_kvm(c: &kvm_pit_channel_state) -> PitChannelState {
    same_fields!(c => PitChannelState {
        count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch,
        rw_mode, mode, bcd, gate, count_load_time,
    })
}

fn channel_to_kvm(c: &PitChannelState) -> kvm_pit_channel_state {
    same_fields!(c => kvm_pit_channel_state {
        count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch,
        rw_mode, mode, bcd, gate, count_load_time,
    })
}

fn get_chip(vm: &VmInner, chip_id: u32) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd.get_irqchip(&mut chip).map_err(|errno| host("KVM_GET_IRQCHIP", errno))?;
    Ok(chip)
}

fn set_chip(vm: &VmInner, chip_id: u32, chip: kvm_irqchip__bindgen_ty_1) -> Result<()> {
    vm.fd.set_irqchip(&kvm_irqchip { chip_id, pad: 0, chip }).map_err(|errno| host("KVM_SET_IRQCHIP", errno))
}

pub(super) fn save(vm: &Arc<VmInner>) -> Result<VmState> {
    let mut state = VmState::default();
    if vm.interrupts == InterruptMode::Platform {
        let master = sys::pic_of(&get_chip(vm, KVM_IRQCHIP_PIC_MASTER)?);
        let slave = sys::pic_of(&get_chip(vm, KVM_IRQCHIP_PIC_SLAVE)?);
        state.pics = Some([pic_from_kvm(&master), pic_from_kvm(&slave)]);
        let (apic, redirection) = sys::ioapic_of(&get_chip(vm, KVM_IRQCHIP_IOAPIC)?);
        state.io_apic = Some(IoApicState {
            base: apic.base_address,
            select: apic.ioregsel,
            id: apic.id,
            irr: apic.irr,
            redirection,
        });
    }
    if vm.legacy_timer {
        let pit = vm.fd.get_pit2().map_err(|errno| host("KVM_GET_PIT2", errno))?;
        state.pit =
            Some(PitState { channels: pit.channels.each_ref().map(channel_from_kvm), flags: pit.flags });
    }
    let clock = KvmClock(Arc::clone(vm));
    state.clock = Some(ClockState { guest_ns: clock.now()?, tsc_khz: clock.tsc_khz() });
    Ok(state)
}

/// An element of the state that this VM has no place for.
fn misplaced(element: &'static str, needs: &str) -> Error {
    Error::InvalidState {
        element,
        problem: format!("the configuration has no place for it: it needs {needs}"),
    }
}

pub(super) fn restore(vm: &Arc<VmInner>, state: &VmState) -> Result<()> {
    let platform = vm.interrupts == InterruptMode::Platform;
    if let Some([master, slave]) = &state.pics {
        if !platform {
            return Err(misplaced("pics", "InterruptMode::Platform"));
        }
        set_chip(vm, KVM_IRQCHIP_PIC_MASTER, kvm_irqchip__bindgen_ty_1 { pic: pic_to_kvm(master) })?;
        set_chip(vm, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip__bindgen_ty_1 { pic: pic_to_kvm(slave) })?;
    }
    if let Some(apic) = &state.io_apic {
        if !platform {
            return Err(misplaced("io_apic", "InterruptMode::Platform"));
        }
        let ioapic = kvm_ioapic_state {
            base_address: apic.base,
            ioregsel: apic.select,
            id: apic.id,
            irr: apic.irr,
            pad: 0,
            redirtbl: apic.redirection.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
        };
        set_chip(vm, KVM_IRQCHIP_IOAPIC, kvm_irqchip__bindgen_ty_1 { ioapic })?;
    }
    if let Some(pit) = &state.pit {
        if !vm.legacy_timer {
            return Err(misplaced("pit", "VmConfig::legacy_timer"));
        }
        let pit = kvm_pit_state2 {
            channels: pit.channels.each_ref().map(channel_to_kvm),
            flags: pit.flags,
            ..Default::default()
        };
        vm.fd.set_pit2(&pit).map_err(|errno| host("KVM_SET_PIT2", errno))?;
    }
    if let Some(clock) = state.clock {
        let khz = vm.clock.tsc_khz();
        if clock.tsc_khz != 0 && khz != 0 && !rates_agree(clock.tsc_khz, khz) {
            return Err(Error::InvalidState {
                element: "clock.tsc_khz",
                problem: format!(
                    "the state was saved at {} kHz, this VM's TSC runs at {khz} kHz; \
                     ask for the saved rate in VmConfig::clock where the host can scale",
                    clock.tsc_khz
                ),
            });
        }
        let data = kvm_clock_data { clock: clock.guest_ns, ..Default::default() };
        vm.fd.set_clock(&data).map_err(|errno| host("KVM_SET_CLOCK", errno))?;
    }
    Ok(())
}

/// Whether two TSC rates differ by no more than what a guest's own clock discipline absorbs: 250 parts in
/// a million, KVM's own tolerance.
fn rates_agree(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a.max(b)) * 250
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_agree_within_kvms_tolerance() {
        assert!(rates_agree(2_600_000, 2_600_650));
        assert!(!rates_agree(2_600_000, 2_601_000));
        assert!(rates_agree(u32::MAX, u32::MAX - 1));
    }
}
