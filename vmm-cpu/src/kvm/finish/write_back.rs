//! The state behind an instruction, back to KVM.

use kvm_bindings::{KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, kvm_vcpu_events};

use super::UNDEFINED;
use crate::error::Result;
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{host, state};
use crate::state::SystemRegisters;
use crate::translate::exception::{Exception, vector};
use crate::translate::substitute::Between;
use crate::vcpu::Vcpu as _;

/// An exception that KVM is to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raised {
    vector: u8,
    error: Option<u32>,
    /// What CR2 gets by #PF, or DR6 by #DB.
    payload: Option<u64>,
}

impl Raised {
    pub(super) fn fault(exception: &Exception) -> Self {
        let payload = match exception.vector {
            vector::PF => exception.cr2,
            vector::DB => Some(exception.dr6),
            _ => None,
        };
        Self { vector: exception.vector, error: exception.error, payload }
    }

    /// A debug exception behind the instruction, which sets these bits of DR6.
    pub(super) fn trap(dr6: u64) -> Self {
        Self { vector: vector::DB, error: None, payload: Some(dr6) }
    }

    /// Puts it in the place of what KVM had queued.
    fn queue(self, events: &mut kvm_vcpu_events, payloads: bool) {
        let exception = &mut events.exception;
        (exception.injected, exception.pending) = (u8::from(!payloads), u8::from(payloads));
        exception.nr = self.vector;
        exception.has_error_code = u8::from(self.error.is_some());
        exception.error_code = self.error.unwrap_or(0);
        events.exception_has_payload = u8::from(payloads && self.payload.is_some());
        events.exception_payload = self.payload.filter(|_| payloads).unwrap_or(0);
    }

    /// Without payloads, what it leaves in registers before it is delivered.
    fn apply(self, system: &mut SystemRegisters) {
        match (self.vector, self.payload) {
            (vector::PF, Some(va)) => system.cr2 = va,
            (vector::DB, Some(bits)) => system.dr6 |= bits,
            _ => {}
        }
    }
}

/// `kvm`'s registers with what an instruction changed of them: software does not keep every bit of them.
fn changed(kvm: &SystemRegisters, before: &SystemRegisters, after: &SystemRegisters) -> SystemRegisters {
    macro_rules! take {
        ($($field:ident)*) => {
            SystemRegisters {
                $($field: if after.$field == before.$field { kvm.$field } else { after.$field },)*
                cr0: kvm.cr0 ^ before.cr0 ^ after.cr0,
                ..*kvm
            }
        };
    }
    take!(cs ds es fs gs ss tr ldtr gdtr idtr cr2 cr8 dr dr6 dr7)
}

impl KvmVcpu {
    /// Takes over the registers `after` an instruction, before which KVM had those in `before` and software, which takes some
    /// for others, those in `loaded`.
    pub(super) fn write_back(
        &mut self,
        before: &Between,
        loaded: &Between,
        after: &Between,
        events: &kvm_vcpu_events,
        raised: Option<Raised>,
    ) -> Result<()> {
        let payloads = self.vm.exception_payloads;
        let mut system = changed(&before.system, &loaded.system, &after.system);
        if let Some(raised) = raised.filter(|_| !payloads) {
            raised.apply(&mut system);
        }
        if system != before.system {
            let of_debugger = |s: &SystemRegisters| (s.dr, s.dr6, s.dr7);
            if of_debugger(&system) == of_debugger(&before.system) {
                self.set_segment_registers(&system)?;
            } else {
                self.set_system_registers(&system)?;
            }
        }
        if after.general != loaded.general {
            self.set_registers(&after.general)?;
        }
        let mut wanted = *events;
        if wanted.exception.nr == UNDEFINED {
            // KVM's own answer to what it could not emulate.
            (wanted.exception.injected, wanted.exception.pending) = (0, 0);
        }
        wanted.interrupt.shadow = state::shadow_to_kvm(after.shadow);
        wanted.nmi.masked = u8::from(after.nmi_masked);
        if let Some(raised) = raised {
            raised.queue(&mut wanted, payloads);
        }
        if wanted == *events {
            return Ok(());
        }
        // What KVM takes registers over with drops exceptions.
        self.flush_registers()?;
        // Not an NMI that waits, of which one may have come meanwhile.
        wanted.flags = KVM_VCPUEVENT_VALID_SHADOW;
        if payloads {
            wanted.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        self.page_is_stale();
        self.fd().set_vcpu_events(&wanted).map_err(|errno| host("KVM_SET_VCPU_EVENTS", errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_taken_over() {
        let kvm = SystemRegisters { cr0: 0x8005_0033, efer: 0x5d01, cr2: 7, ..SystemRegisters::default() };
        let loaded = SystemRegisters { cr0: 0x8005_0033, efer: 0xd01, cr2: 7, ..SystemRegisters::default() };
        assert_eq!(changed(&kvm, &loaded, &loaded), kvm);
        let mut after = SystemRegisters { cr0: 0x8005_003b, ..loaded };
        after.cs.selector = 0x33;
        let result = changed(&kvm, &loaded, &after);
        assert_eq!((result.cr0, result.efer, result.cs.selector), (0x8005_003b, 0x5d01, 0x33));
    }

    #[test]
    fn exceptions_are_pending_with_a_payload_where_kvm_knows_that() {
        let mut events = kvm_vcpu_events::default();
        let raised = Raised::fault(&Exception::page_fault(0x1234, 2));
        raised.queue(&mut events, true);
        assert_eq!((events.exception.pending, events.exception.injected, events.exception.nr), (1, 0, 14));
        assert_eq!((events.exception_has_payload, events.exception_payload), (1, 0x1234));
        assert_eq!((events.exception.has_error_code, events.exception.error_code), (1, 2));
        raised.queue(&mut events, false);
        assert_eq!((events.exception.pending, events.exception.injected), (0, 1));
        assert_eq!((events.exception_has_payload, events.exception_payload), (0, 0));
        let mut system = SystemRegisters::default();
        raised.apply(&mut system);
        Raised::trap(1 << 14).apply(&mut system);
        assert_eq!((system.cr2, system.dr6), (0x1234, 1 << 14));
    }
}
