//! A hostile kernel on the Xen ABI of `xen_pv`: hypercalls, page tables, faults, privileged instructions, and back ends
//! that answer.

#![no_main]

use libfuzzer_sys::fuzz_target;

// The robustness test of vmm-cpu uses the rest.
#[path = "../../vmm-cpu/tests/xen_pv_support/mod.rs"]
mod xen_pv_support;

use xen_pv_support::exercise::exercise;
use xen_pv_support::guest::Kernel;

fuzz_target!(|kernel: Kernel| {
    exercise(&kernel);
});
