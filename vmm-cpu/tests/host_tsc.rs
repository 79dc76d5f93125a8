//! Machines whose time-stamp counter is the host's own.

#![cfg(all(feature = "translate", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, unsafe_code, reason = "a test, which reads the counter as well")]

use std::sync::Arc;

use vmm_cpu::translate::TranslateHypervisor;
use vmm_cpu::{ClockConfig, ClockSource, CpuModel, Error, Hypervisor as _, Vm, VmConfig};

const TSC: u32 = 0x10;

fn config(tsc_khz: Option<u32>) -> VmConfig {
    let mut clock = ClockConfig::default();
    (clock.tsc_khz, clock.source) = (tsc_khz, ClockSource::HostTsc);
    VmConfig::new(CpuModel::Host).vcpus(2).clock(clock)
}

fn machine() -> (TranslateHypervisor, Arc<dyn Vm>) {
    let hypervisor = TranslateHypervisor::new();
    let vm = hypervisor.create_vm(&config(Some(2_000_000))).unwrap();
    (hypervisor, vm)
}

fn host_tsc() -> u64 {
    // SAFETY: an instruction of every x86-64 processor.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[test]
fn the_counter_is_the_hosts_whatever_is_written_to_it() {
    let (hypervisor, vm) = machine();
    for index in 0..2 {
        let mut vcpu = vm.create_vcpu(index).unwrap();
        for written in [0, 1 << 60] {
            vcpu.set_msr(TSC, written).unwrap();
            let before = host_tsc();
            let read = vcpu.msr(TSC).unwrap();
            assert!((before..=host_tsc()).contains(&read), "{read:#x}");
        }
    }
    // A machine like this one has it, too.
    let resolved = config(Some(2_000_000)).resolve(&hypervisor, &*vm).unwrap();
    assert_eq!((resolved.clock.source, resolved.clock.tsc_khz), (ClockSource::HostTsc, Some(2_000_000)));
    let other = VmConfig::new(CpuModel::Host);
    let vm = hypervisor.create_vm(&other).unwrap();
    assert_eq!(other.resolve(&hypervisor, &*vm).unwrap().clock.source, ClockSource::Host);
}

#[test]
fn a_counter_that_was_ahead_of_the_hosts_is_refused() {
    let (_, vm) = machine();
    let mut saved = vm.create_vcpu(0).unwrap().save().unwrap();
    vm.restore_vcpu(1, &saved).unwrap();
    let (_, vm) = machine();
    let counter = saved.msrs.iter_mut().find(|msr| msr.index == TSC).unwrap();
    // A day at 3 GHz.
    counter.value += 86_400 * 3_000_000_000;
    let error = vm.restore_vcpu(0, &saved).unwrap_err();
    assert!(matches!(error, Error::InvalidState { element: "msrs", .. }), "{error:?}");
    assert!(error.to_string().contains("the host's own, which this machine has, is 0x"), "{error}");
}

#[test]
fn a_rate_is_needed() {
    let error = TranslateHypervisor::new().create_vm(&config(None)).unwrap_err();
    assert!(error.to_string().contains("the rate of the host's time-stamp counter"), "{error}");
}

#[cfg(feature = "kvm")]
#[test]
fn kvm_alone_has_an_offset() {
    let kvm = match vmm_cpu::open_backend("kvm") {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped: no KVM: {error}");
            return;
        }
    };
    let error = kvm.create_vm(&config(None)).unwrap_err();
    assert!(error.to_string().contains("privileged_in_software"), "{error}");
}
