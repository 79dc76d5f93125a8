//! What only the KVM backend has: its options, and memory that the host turns out not to have.

#![cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the lint spares test functions only, not what they call"
)]

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use vmm_cpu::entry::real_mode_entry;
use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{Backing, GuestRam, RegionConfig};
use vmm_cpu::{CpuModel, EmptyBus, Error, Hypervisor, VmConfig};

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

/// A file that became shorter: the guest's access to what is gone ends in an error that says where.
#[test]
fn memory_that_the_host_has_lost_is_named() {
    const PAGE: u64 = 4096;
    let Some(kvm) = kvm(KvmOptions::default()) else { return };
    let file = Arc::new(unnamed_file());
    file.set_len(4 * PAGE).unwrap();
    let backing = Backing::File { file: Arc::clone(&file), offset: 0 };
    let ram = GuestRam::builder()
        .region(RegionConfig::new(GuestAddress(0), 16 * PAGE))
        .region(RegionConfig::new(GuestAddress(0x2_0000), 4 * PAGE).backing(backing))
        .build()
        .unwrap();
    // mov ax, 0x2000; mov ds, ax; mov [0x1000], al; hlt
    let code = [0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x10, 0xf4];
    ram.memory().write_slice(&code, GuestAddress(0x1000)).unwrap();
    let vm = kvm.unwrap().create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
    vm.map_ram(&ram).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    real_mode_entry(0, 0x1000).apply(&mut *vcpu).unwrap();
    file.set_len(0).unwrap();
    match vcpu.run(&mut EmptyBus) {
        Err(Error::NoHostMemory { index: 0, gpa, .. }) => assert_eq!(gpa.0 & !0xfff, 0x2_1000),
        // Kernels that do not tell where.
        Err(Error::Host { operation: "KVM_RUN", source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(libc::EFAULT))
        }
        other => panic!("{other:?}"),
    }
}

/// A file that nobody else finds.
fn unnamed_file() -> File {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kvm-options-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    fs::remove_file(path).unwrap();
    file
}
