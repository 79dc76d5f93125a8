//! What only the KVM backend has: its options.

#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the lint spares test functions only, not what they call"
)]

use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};
use vmm_cpu::{CpuModel, Error, Hypervisor, VmConfig};

/// KVM with these options; `None` if there is none here.
fn kvm(options: KvmOptions) -> Option<Result<KvmHypervisor, Error>> {
    match KvmHypervisor::with_options(options) {
        Err(Error::HostInterfaceAbsent { path, .. } | Error::PermissionDenied { path, .. }) => {
            println!("skipped: no {path}");
            None
        }
        other => Some(other),
    }
}

#[test]
fn a_dirty_ring_has_a_number_of_entries_that_can_be() {
    for entries in [0, 1, 512, 1025, 3000, 1 << 31, u32::MAX] {
        match kvm(KvmOptions::default().dirty_ring(Some(entries))) {
            None => return,
            Some(Err(Error::Unsupported { what, .. })) => {
                println!("skipped: no {what}");
                return;
            }
            Some(Err(Error::InvalidArgument { value, allowed, .. })) => {
                assert_eq!(value, entries.to_string());
                assert!(allowed.contains("power of two from 1024"), "{allowed}");
            }
            Some(other) => panic!("{other:?}"),
        }
    }
    kvm(KvmOptions::default().dirty_ring(Some(1024))).unwrap().unwrap();
}

#[test]
fn software_protected_machines_have_private_memory_or_are_refused() {
    match kvm(KvmOptions::default().software_protected(true)) {
        None => {}
        Some(Err(Error::Unsupported { why, .. })) => assert!(why.contains("KVM_CAP_VM_TYPES"), "{why}"),
        Some(kvm) => {
            let vm = kvm.unwrap().create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
            assert!(vm.private_memory().is_some() && vm.guest_memfds().is_some());
        }
    }
}
