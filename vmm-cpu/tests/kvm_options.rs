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

#[cfg(feature = "translate")]
mod privileged_in_software {
    use std::thread;
    use std::time::{Duration, Instant};

    use vmm_cpu::cpuid::Feature;
    use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters, rflags};
    use vmm_cpu::vmm_memory::GuestRam;
    use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
    use vmm_cpu::{EmptyBus, Halt, InterruptMode};

    use super::*;

    const PAGE_TABLES: u64 = 0x1_0000;
    const CODE: u64 = 0x2_0000;

    #[test]
    fn it_does_not_go_with_what_needs_kvm_for_everything() {
        let options = KvmOptions::default().privileged_in_software(true);
        for other in [options.clone().dirty_ring(Some(4096)), options.software_protected(true)] {
            match kvm(other) {
                None => return,
                Some(Err(Error::Unsupported { .. })) => {}
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn kernels_find_16_byte_exchanges_and_vector_state_and_local_apics() {
        let Some(kvm) = kvm(KvmOptions::default().privileged_in_software(true)) else { return };
        let kvm = kvm.unwrap();
        assert!(kvm.supported_cpuid().has(Feature::CX16));
        assert!(!kvm.supported_cpuid().has(Feature::AVX2), "software has no such instructions");
        let capabilities = kvm.capabilities();
        assert_eq!(capabilities.interrupt_modes, [InterruptMode::External, InterruptMode::LocalApic]);
        assert_eq!((capabilities.hardware_assisted, capabilities.shadowed_page_tables), (Some(false), false));
    }

    /// A program that does nothing but compute begins in software and goes on on KVM.
    #[test]
    fn a_program_that_computes_goes_to_kvm() {
        let Some(kvm) = kvm(KvmOptions::default().privileged_in_software(true)) else { return };
        let ram = GuestRam::builder().ram(1 << 20).build().unwrap();
        for (gpa, entry) in [
            (PAGE_TABLES, PAGE_TABLES + 0x1007),
            (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2007),
            (PAGE_TABLES + 0x2000, 0x87),
        ] {
            ram.memory().write_obj(entry, GuestAddress(gpa)).unwrap();
        }
        // INC RAX; JMP to it.
        ram.memory().write_slice(&[0x48, 0xff, 0xc0, 0xeb, 0xfb], GuestAddress(CODE)).unwrap();
        let vm = kvm.unwrap().create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
        vm.map_ram(&ram).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let data = Segment { dpl: 3, ..Segment::data32(0x2b) };
        vcpu.set_system_registers(&SystemRegisters {
            cs: Segment { dpl: 3, ..Segment::code64(0x33) },
            ss: data,
            ds: data,
            es: data,
            cr0: 0x8000_0033,
            cr3: PAGE_TABLES,
            cr4: SystemRegisters::CR4_PAE,
            efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
            ..SystemRegisters::at_reset()
        })
        .unwrap();
        let registers =
            GeneralRegisters { rip: CODE, rflags: rflags::FIXED | rflags::IF, ..GeneralRegisters::default() };
        vcpu.set_registers(&registers).unwrap();
        let count = |counts: &[(&str, u64)], name| {
            counts.iter().find(|(other, _)| *other == name).map_or(0, |(_, count)| *count)
        };
        let start = Instant::now();
        // On a busy machine it may not have run at all when the kick comes.
        loop {
            let handle = vcpu.handle();
            let kick = thread::spawn(move || {
                thread::sleep(Duration::from_millis(20));
                handle.kick();
            });
            assert_eq!(vcpu.run(&mut EmptyBus).unwrap(), Halt::Interrupted);
            kick.join().unwrap();
            let counts = vcpu.exit_counts();
            if count(&counts, "program-interrupted") > 0 {
                assert!(count(&counts, "program-stays-in-software") > 0, "{counts:?}");
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it is still in software: {counts:?}");
        }
        assert!(vcpu.registers().unwrap().rax > 0);
    }
}
