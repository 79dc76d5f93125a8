//! The cases by subject.

mod apic;
mod bad_input;
mod basics;
mod clock;
mod coalesced;
mod controllers;
mod cpuid;
mod cross_modifying;
mod debug;
mod dirty;
mod doorbells;
mod exact;
mod guest_memfd;
mod huge_pages;
mod hypercalls;
mod interrupts;
mod kicks;
mod litmus;
mod memory;
mod mmio;
mod msrs;
mod ordering;
mod pio;
mod programs;
mod shootdown;
mod smp;
mod snapshot;
mod threads;
mod transfers;
mod unemulated;

use super::case::Case;

/// Every subject with its cases.
pub(crate) const ALL: &[(&str, &[Case])] = &[
    ("basics", basics::CASES),
    ("pio", pio::CASES),
    ("mmio", mmio::CASES),
    ("memory", memory::CASES),
    ("dirty", dirty::CASES),
    ("msrs", msrs::CASES),
    ("cpuid", cpuid::CASES),
    ("clock", clock::CASES),
    ("exact", exact::CASES),
    ("interrupts", interrupts::CASES),
    ("apic", apic::CASES),
    ("doorbells", doorbells::CASES),
    ("coalesced", coalesced::CASES),
    ("huge_pages", huge_pages::CASES),
    ("guest_memfd", guest_memfd::CASES),
    ("smp", smp::CASES),
    ("ordering", ordering::CASES),
    ("litmus", litmus::CASES),
    ("shootdown", shootdown::CASES),
    ("cross_modifying", cross_modifying::CASES),
    ("debug", debug::CASES),
    ("hypercalls", hypercalls::CASES),
    ("snapshot", snapshot::CASES),
    ("controllers", controllers::CASES),
    ("kicks", kicks::CASES),
    ("threads", threads::CASES),
    ("transfers", transfers::CASES),
    ("unemulated", unemulated::CASES),
    ("programs", programs::CASES),
    ("bad_input", bad_input::CASES),
];
