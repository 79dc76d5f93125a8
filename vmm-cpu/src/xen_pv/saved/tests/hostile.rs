//! States that somebody else has written: each beginning of one, each byte of one changed, and what no virtual processor can have.

use std::sync::Arc;
use std::time::Duration;

use super::guest::RAM;
use super::lives::{Life, Random, Saved};
use super::parts::{copied, furnished, restored};
use crate::error::Error;
use crate::hypervisor::{Hypervisor, VmConfig};
use crate::state::{BackendBlob, CpuState};
use crate::vcpu::Vcpu;
use crate::vm::Vm as _;
use crate::xen_pv::engine::PRIVATE_VA;
use crate::xen_pv::saved::{
    CallbackState, DescriptorState, PeriodicState, TrapState, VcpuState, check_config, from_blob, to_blob,
};
use crate::xen_pv::vcpu_abi::VcpuAbi;
use crate::xen_pv::{DomainDevices, XenPvHypervisor};

impl VcpuState {
    /// One that was never started.
    pub(super) fn default_for_tests() -> Self {
        let none = CallbackState::default();
        Self {
            online: false,
            in_program: false,
            selectors: [0; 6],
            fs_base: 0,
            gs_base: 0,
            other_gs_base: 0,
            kernel_sp: 0,
            kernel_ss: 0,
            kernel_root: None,
            user_root: None,
            gdt_frames: Vec::new(),
            gdt_entries: 0,
            descriptors: Vec::new(),
            traps: Vec::new(),
            event: none,
            failsafe: none,
            syscall: none,
            syscall32: none,
            sysenter: none,
            nmi: none,
            task_switched: false,
            cr4: 0,
            iopl: 0,
            singleshot: None,
            periodic: None,
            system_time: 0,
        }
    }
}

/// Each beginning of the blob, and the blob with each byte changed in two ways.
fn variants(blob: &BackendBlob) -> impl Iterator<Item = BackendBlob> + '_ {
    let with = |data: Vec<u8>| BackendBlob { data, ..blob.clone() };
    let beginnings = (0..blob.data.len()).map(move |len| with(blob.data[..len].to_vec()));
    let changed = (0..blob.data.len()).flat_map(move |at| {
        [0xff, 1].map(|change| {
            let mut data = blob.data.clone();
            data[at] ^= change;
            with(data)
        })
    });
    beginnings.chain(changed)
}

#[test]
fn changed_domains_are_errors_or_domains() {
    let guest = furnished();
    let mut state = guest.domain.save(false, None).unwrap();
    let blob = state.backend.take().unwrap();
    let (config, memory) = (VmConfig::new(crate::CpuModel::Host).vcpus(2), copied(&guest));
    let (mut errors, mut domains) = (0, 0);
    for variant in variants(&blob) {
        state.backend = Some(variant);
        let domain = check_config(&config, &state).and_then(|state| restored(&memory, &state, |_| {}));
        match domain {
            Err(Error::InvalidState { element, .. }) => {
                assert!(element.starts_with("backend"), "{element}");
                errors += 1;
            }
            Err(error) => panic!("{error}"),
            Ok(domain) => {
                domains += 1;
                if domains % 8 != 0 {
                    continue;
                }
                // It takes what comes.
                for port in [0, 1, 2, 3, 4, 5, 6, 7, 8, 4095, u32::MAX] {
                    domain.events().raise(port);
                    let _sent = domain.send(port);
                }
                domain.console_input(b"hello");
                let mut vcpu = VcpuAbi::new(Arc::clone(&domain), 1).unwrap();
                let mut engine = crate::xen_pv::test_support::Guest::engine_on(&memory.0);
                let _up = vcpu.start(&mut engine).unwrap();
                let _action = vcpu.before_entry(&mut engine).unwrap();
                domain.save(false, None).unwrap();
            }
        }
    }
    println!("{} bytes: {errors} errors, {domains} domains", blob.data.len());
    assert!(errors > blob.data.len() && domains > 100);
}

/// A guest in the middle of its work, on the backend that needs nothing of the host.
fn saved() -> (Arc<dyn Hypervisor>, Saved) {
    let below: Arc<dyn Hypervisor> = Arc::from(crate::open_backend("translate").unwrap());
    let life = Life::first(&below, false, 1);
    assert!(!life.live(Duration::from_millis(30)), "too short a guest");
    (below, life.save())
}

fn vcpu_for(below: &Arc<dyn Hypervisor>, saved: &Saved) -> Box<dyn Vcpu> {
    let hypervisor = XenPvHypervisor::new(Arc::clone(below)).unwrap();
    let config = VmConfig::new(crate::CpuModel::Host);
    let vm = hypervisor.restore_domain(&config, &saved.ram, DomainDevices::default(), &saved.vm).unwrap();
    vm.create_vcpu(0).unwrap()
}

#[test]
fn changed_vcpus_are_errors_or_vcpus() {
    let (below, mut saved) = saved();
    let mut vcpu = vcpu_for(&below, &saved);
    let honest = saved.vcpus[0].clone();
    let blob = honest.backend.clone().unwrap();
    let (mut errors, mut well) = (0, Vec::new());
    for variant in variants(&blob) {
        let state = CpuState { backend: Some(variant), ..honest.clone() };
        match vcpu.restore(&state) {
            Ok(()) => well.push(state),
            Err(Error::InvalidState { element, .. }) => {
                assert!(element.starts_with("backend"), "{element}");
                errors += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    drop(vcpu);
    println!("{} bytes: {errors} errors, {} vCPUs", blob.data.len(), well.len());
    assert!(errors > blob.data.len() && well.len() > 100);
    // Some of them run. Whatever the guest then does is its own affair.
    let mut random = Random(1);
    let mut lived = 0;
    for state in well {
        if random.below(12) == 0 {
            saved.vcpus = vec![state];
            let life = Life::next(&below, random.below(2) == 0, &saved).unwrap();
            life.threads.resume();
            let end = life.threads.wait(Some(Duration::from_millis(2)));
            life.threads.pause();
            assert!(end.is_none_or(|end| end.reason.is_ok()));
            life.save();
            lived += 1;
        }
    }
    println!("{lived} of them ran");
    assert!(lived > 10);
}

#[test]
fn what_no_vcpu_can_be_is_named() {
    let (below, saved) = saved();
    let mut vcpu = vcpu_for(&below, &saved);
    let honest = saved.vcpus[0].clone();
    let mut refused = |change: &dyn Fn(&mut CpuState)| {
        let mut state = honest.clone();
        change(&mut state);
        match vcpu.restore(&state) {
            Err(Error::InvalidState { element, problem }) => {
                println!("{element}: {problem}");
                element
            }
            other => panic!("{other:?}"),
        }
    };
    for (element, change) in [
        ("system.xcr0", &(|state: &mut CpuState| state.system.xcr0 = 0) as &dyn Fn(&mut CpuState)),
        ("system.xcr0", &|state| state.system.xcr0 = 1 << 62 | 1),
        ("system.dr", &|state| state.system.dr[0] = PRIVATE_VA),
        ("system.dr", &|state| state.system.dr[3] = 1 << 63),
        ("system.dr", &|state| state.system.dr7 = 1 << 40),
        ("backend", &|state| state.backend = None),
    ] {
        assert_eq!(refused(change), element);
    }
    let callback = CallbackState { rip: 1 << 62, masks_events: false };
    let trap = TrapState { vector: 0, flags: 0, cs: 0, address: 1 << 62 };
    for (element, change) in [
        (
            "backend.kernel_root",
            &(|state: &mut VcpuState| state.kernel_root = Some(0x1001)) as &dyn Fn(&mut VcpuState),
        ),
        ("backend.kernel_root", &|state| state.kernel_root = Some(RAM)),
        ("backend.user_root", &|state| state.user_root = Some(u64::MAX << 12)),
        ("backend.bases", &|state| state.other_gs_base = 1 << 62),
        ("backend.callbacks", &|state| state.nmi = callback),
        ("backend.traps", &|state| state.traps = vec![trap]),
        ("backend.traps", &|state| state.traps = vec![TrapState { address: 1, ..trap }; 257]),
        ("backend.gdt_entries", &|state| state.gdt_entries = 1),
        ("backend.gdt_entries", &|state| {
            (state.gdt_entries, state.gdt_frames) = (7169, vec![0; 15]);
        }),
        ("backend.gdt_frames", &|state| {
            (state.gdt_entries, state.gdt_frames) = (1, vec![RAM]);
        }),
        ("backend.descriptors", &|state| state.descriptors = vec![DescriptorState { index: 5, value: 1 }]),
        ("backend.descriptors", &|state| {
            // A call gate.
            (state.gdt_entries, state.gdt_frames) = (8, vec![1]);
            state.descriptors = vec![DescriptorState { index: 5, value: 0x0000_ec00_0008_0000 }];
        }),
        ("backend.iopl", &|state| state.iopl = 4),
        ("backend.periodic", &|state| state.periodic = Some(PeriodicState { period: 0, next: 0 })),
    ] {
        let with_blob = |cpu: &mut CpuState| {
            let mut state: VcpuState = from_blob(cpu.backend.as_ref()).unwrap();
            change(&mut state);
            cpu.backend = Some(to_blob(&state).unwrap());
        };
        assert_eq!(refused(&with_blob), element);
    }
    // None of that was taken over.
    assert!(vcpu.restore(&honest).is_ok());
    assert_eq!(vcpu.registers().unwrap(), honest.general);
    assert_eq!(vcpu.save().unwrap().backend, honest.backend);
}

/// A vCPU's state without that of its domain, and one that comes too late.
#[test]
fn vcpus_are_restored_in_restored_domains_before_they_run() {
    let (below, saved) = saved();
    let life = Life::first(&below, false, 1);
    let refused = life.threads.with_vcpu(0, |vcpu| vcpu.restore(&saved.vcpus[0])).unwrap();
    assert!(matches!(refused, Err(Error::InvalidState { element: "backend", .. })), "{refused:?}");
    drop(life);
    let life = Life::next(&below, false, &saved).unwrap();
    assert!(!life.live(Duration::from_millis(1)));
    let refused = life.threads.with_vcpu(0, |vcpu| vcpu.restore(&saved.vcpus[0])).unwrap();
    assert!(matches!(refused, Err(Error::InvalidState { element: "backend", .. })), "{refused:?}");
}
