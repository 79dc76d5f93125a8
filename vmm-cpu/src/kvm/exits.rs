//! Exit counters, and the report of an instruction that KVM could not execute.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};

use super::sys::InternalError;

/// Exits of one vCPU since its creation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ExitCounts {
    pub(super) pio_in: u64,
    pub(super) pio_out: u64,
    pub(super) mmio_read: u64,
    pub(super) mmio_write: u64,
    pub(super) msr: u64,
    pub(super) hypercall: u64,
    pub(super) eoi: u64,
    pub(super) halt: u64,
    pub(super) debug: u64,
    pub(super) interrupt_window: u64,
    pub(super) interrupted: u64,
    pub(super) dirty_ring_full: u64,
    pub(super) other: u64,
    /// Instructions that software executed, and how often that made KVM forget its shadows of page tables.
    pub(super) finished: u64,
    pub(super) shadows_dropped: u64,
}

impl ExitCounts {
    pub(super) fn named(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("pio-in", self.pio_in),
            ("pio-out", self.pio_out),
            ("mmio-read", self.mmio_read),
            ("mmio-write", self.mmio_write),
            ("msr", self.msr),
            ("hypercall", self.hypercall),
            ("eoi", self.eoi),
            ("halt", self.halt),
            ("debug", self.debug),
            ("interrupt-window", self.interrupt_window),
            ("interrupted", self.interrupted),
            ("dirty-ring-full", self.dirty_ring_full),
            ("other", self.other),
            ("finished-in-software", self.finished),
            ("shadows-dropped", self.shadows_dropped),
        ]
    }
}

/// KVM's reason in words.
pub(super) fn internal_error_reason(error: &InternalError, software: Option<&str>) -> String {
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate it",
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while delivering another",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM met an exit while delivering an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "KVM met a hardware exit that it does not know",
        _ => "KVM gave up",
    };
    let kvm = format!("{what} (internal error {}, data {:x?})", error.suberror, error.data);
    match software {
        Some(why) => format!("{kvm}; software cannot finish it: {why}"),
        None => kvm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_names_the_suberror() {
        let error =
            InternalError { suberror: KVM_INTERNAL_ERROR_DELIVERY_EV, bytes: vec![], data: vec![0x10] };
        assert_eq!(
            internal_error_reason(&error, None),
            "KVM met an exit while delivering an event (internal error 3, data [10])"
        );
        assert!(internal_error_reason(&error, Some("why")).ends_with("; software cannot finish it: why"));
    }
}
