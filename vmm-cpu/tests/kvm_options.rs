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
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use vmm_cpu::cpuid::Feature;
    use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters, rflags};
    use vmm_cpu::vmm_memory::GuestRam;
    use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
    use vmm_cpu::{EmptyBus, Halt, InterruptMode, Vcpu, Vm};

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

    /// A virtual machine that is about to run a program, which sees what is at `there` in the second GiB.
    fn program(
        hypervisor: &KvmHypervisor,
        code: &[u8],
        there: u64,
    ) -> (Arc<dyn Vm>, GuestRam, Box<dyn Vcpu>) {
        let ram = GuestRam::builder().ram(1 << 20).build().unwrap();
        for (gpa, entry) in [
            (PAGE_TABLES, PAGE_TABLES + 0x1007),
            (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2007),
            (PAGE_TABLES + 0x1008, PAGE_TABLES + 0x3007),
            (PAGE_TABLES + 0x2000, 0x87),
            (PAGE_TABLES + 0x3000, there | 0x87),
            (PAGE_TABLES + 0x3008, (there + (2 << 20)) | 0x87),
        ] {
            ram.memory().write_obj(entry, GuestAddress(gpa)).unwrap();
        }
        ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
        vm.map_ram(&ram).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let vectors = hypervisor.supported_cpuid().get(0xd, 0).map_or(0, |leaf| u64::from(leaf.eax));
        let data = Segment { dpl: 3, ..Segment::data32(0x2b) };
        vcpu.set_system_registers(&SystemRegisters {
            cs: Segment { dpl: 3, ..Segment::code64(0x33) },
            ss: data,
            ds: data,
            es: data,
            cr0: 0x8000_0033,
            cr3: PAGE_TABLES,
            // OSFXSR and OSXMMEXCPT; OSXSAVE where there is something to it.
            cr4: SystemRegisters::CR4_PAE | 3 << 9 | u64::from(vectors != 0) << 18,
            xcr0: vectors.max(1),
            efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
            ..SystemRegisters::at_reset()
        })
        .unwrap();
        let registers =
            GeneralRegisters { rip: CODE, rflags: rflags::FIXED | rflags::IF, ..GeneralRegisters::default() };
        vcpu.set_registers(&registers).unwrap();
        (vm, ram, vcpu)
    }

    /// Runs it until `time` has passed.
    fn run_for(vcpu: &mut dyn Vcpu, time: Duration) -> Result<Halt, Error> {
        let handle = vcpu.handle();
        let kick = thread::spawn(move || {
            thread::sleep(time);
            handle.kick();
        });
        let halt = vcpu.run(&mut EmptyBus);
        kick.join().unwrap();
        halt
    }

    /// A program that does nothing but compute begins in software and goes on on KVM.
    #[test]
    fn a_program_that_computes_goes_to_kvm() {
        let Some(kvm) = kvm(KvmOptions::default().privileged_in_software(true)) else { return };
        // INC RAX; JMP to it.
        let (_vm, _ram, mut vcpu) = program(&kvm.unwrap(), &[0x48, 0xff, 0xc0, 0xeb, 0xfb], 0);
        let count = |counts: &[(&str, u64)], name| {
            counts.iter().find(|(other, _)| *other == name).map_or(0, |(_, count)| *count)
        };
        let start = Instant::now();
        // On a busy machine it may not have run at all when the kick comes.
        loop {
            assert_eq!(run_for(&mut *vcpu, Duration::from_millis(20)).unwrap(), Halt::Interrupted);
            let counts = vcpu.exit_counts();
            if count(&counts, "program-interrupted") > 0 {
                assert!(count(&counts, "program-stays-in-software") > 0, "{counts:?}");
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it is still in software: {counts:?}");
        }
        assert!(vcpu.registers().unwrap().rax > 0);
    }

    /// Where the engine keeps its pages: at the end of what KVM has.
    fn pages_of_the_engine() -> u64 {
        (1 << KvmHypervisor::open().unwrap().capabilities().gpa_bits) - (4 << 20)
    }

    /// A program stores to so many pages from the second GiB on, 8 bytes in 64, and goes on with that code.
    fn overwrites(pages: u32, then: &[u8]) -> Vec<u8> {
        // MOV EDI, 1 << 30; MOV ECX, count; MOV RAX, JMPs to themselves
        let mut code = vec![0xbf, 0, 0, 0, 0x40, 0xb9];
        code.extend((pages * 64).to_le_bytes());
        code.extend([0x48, 0xb8, 0xeb, 0xfe, 0xeb, 0xfe, 0xeb, 0xfe, 0xeb, 0xfe]);
        // again: MOV [RDI], RAX; ADD RDI, 64; LOOP again
        code.extend([0x48, 0x89, 0x07, 0x48, 0x83, 0xc7, 64, 0xe2, 0xf7]);
        code.extend(then);
        code
    }

    #[test]
    fn what_the_engine_works_with_cannot_be_written_by_programs() {
        let options = KvmOptions::default().privileged_in_software(true).all_programs(true);
        let Some(kvm) = kvm(options) else { return };
        // Stubs, descriptor tables, lists, tables; then INC RBX; JMP to it.
        let code = overwrites(16, &[0x48, 0xff, 0xc3, 0xeb, 0xfb]);
        let (_vm, _ram, mut vcpu) = program(&kvm.unwrap(), &code, pages_of_the_engine());
        let start = Instant::now();
        while vcpu.registers().unwrap().rbx == 0 {
            assert_eq!(run_for(&mut *vcpu, Duration::from_millis(50)).unwrap(), Halt::Interrupted);
            assert!(start.elapsed() < Duration::from_secs(60), "{}", vcpu.registers().unwrap());
        }
        assert!(vcpu.exit_counts().iter().any(|(name, stays)| *name == "program-stays" && *stays > 0));
    }

    /// It ends the guest, if the program likes, and nothing else.
    #[test]
    fn a_guest_that_destroys_the_engines_pages_can_be_stopped() {
        let options = KvmOptions::default().privileged_in_software(true).all_programs(true);
        let Some(kvm) = kvm(options) else { return };
        let kvm = kvm.unwrap();
        // UD2, at whose stub, or whatever is there now, nothing comes back.
        let code = overwrites(1024, &[0x0f, 0x0b]);
        let (_vm, _ram, mut vcpu) = program(&kvm, &code, pages_of_the_engine());
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(60), "{}", vcpu.registers().unwrap());
            match run_for(&mut *vcpu, Duration::from_millis(200)) {
                Ok(Halt::Interrupted) => {}
                Ok(Halt::Shutdown) | Err(Error::UnexpectedExit { .. }) => break,
                other => panic!("{other:?}"),
            }
        }
    }
}
