//! What cannot be is refused by a typed error and leaves nothing behind.

use vmm_cpu::state::{CpuState, ExceptionEvent, RunState, SystemRegisters, XsaveArea};
use vmm_cpu::{Error, InterruptMode, VmConfig};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, flat_system_registers};
use crate::suite::program::Program;

cases![
    no_vcpus,
    more_vcpus_than_the_backend_allows,
    vcpu_beyond_the_configuration,
    vcpu_that_exists,
    interrupt_mode_or_timer_that_is_absent,
    states_that_no_processor_can_be_in,
    system_registers_that_no_processor_can_have,
];

fn external(backend: &Backend) -> Outcome<VmConfig> {
    backend.config(InterruptMode::External)
}

fn no_vcpus(backend: &Backend) -> Outcome {
    let error = backend.hypervisor.create_vm(&external(backend)?.vcpus(0));
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}

fn more_vcpus_than_the_backend_allows(backend: &Backend) -> Outcome {
    let limit = backend.hypervisor.capabilities().max_vcpus;
    assert!(limit >= 1);
    for count in [limit + 1, u32::MAX] {
        let error = backend.hypervisor.create_vm(&external(backend)?.vcpus(count));
        let matching = |index: &u32, l: &u32| (*index, *l) == (count - 1, limit);
        assert!(
            matches!(&error, Err(Error::TooManyVcpus { index, limit, .. }) if matching(index, limit)),
            "{error:?}"
        );
    }
    Ok(())
}

fn vcpu_beyond_the_configuration(backend: &Backend) -> Outcome {
    let vm = backend.hypervisor.create_vm(&external(backend)?.vcpus(2))?;
    for index in [2, u32::MAX] {
        let error = vm.create_vcpu(index);
        assert!(
            matches!(error, Err(Error::TooManyVcpus { index: i, limit: 2, .. }) if i == index),
            "{error:?}"
        );
    }
    assert_eq!(vm.create_vcpu(1)?.index(), 1);
    Ok(())
}

fn vcpu_that_exists(backend: &Backend) -> Outcome {
    let vm = backend.hypervisor.create_vm(&external(backend)?.vcpus(2))?;
    let first = vm.create_vcpu(0)?;
    for error in [vm.create_vcpu(0), vm.restore_vcpu(0, &CpuState::at_reset())] {
        assert!(matches!(error, Err(Error::VcpuExists { index: 0 })), "{error:?}");
    }
    assert_eq!((first.index(), vm.create_vcpu(1)?.index()), (0, 1));
    Ok(())
}

fn interrupt_mode_or_timer_that_is_absent(backend: &Backend) -> Outcome {
    let capabilities = backend.hypervisor.capabilities();
    let unsupported = |config: VmConfig| {
        let error = backend.hypervisor.create_vm(&config);
        assert!(matches!(error, Err(Error::Unsupported { .. })), "{config:?}: {error:?}");
    };
    for mode in [InterruptMode::External, InterruptMode::LocalApic, InterruptMode::Platform] {
        if !capabilities.interrupt_modes.contains(&mode) {
            unsupported(external(backend)?.interrupts(mode));
        }
    }
    // A timer has to have somebody to interrupt.
    unsupported(external(backend)?.legacy_timer(true));
    Ok(())
}

type Mutation = (&'static str, fn(&mut CpuState));

fn states_that_no_processor_can_be_in(backend: &Backend) -> Outcome {
    let mutations: &[Mutation] = &[
        ("paging without protection", |state| state.system.cr0 &= !SystemRegisters::CR0_PE),
        ("CR0 of more than 32 bits", |state| state.system.cr0 |= 1 << 40),
        ("long mode without PAE", |state| state.system.cr4 &= !SystemRegisters::CR4_PAE),
        ("long mode that is not enabled", |state| state.system.efer = SystemRegisters::EFER_LMA),
        ("reserved bits of EFER", |state| state.system.efer |= 1 << 60),
        ("exception 200", |state| state.events.exception = Some(ExceptionEvent::injected(200, None))),
        ("waiting for SIPI without a local APIC", |state| state.run_state = RunState::WaitForSipi),
        ("LSTAR that is not canonical", |state| {
            state.msrs.retain(|msr| msr.index != 0xc000_0082);
            state.msrs.push(vmm_cpu::state::Msr { index: 0xc000_0082, value: 1 << 62 });
        }),
        ("XSTATE_BV with components that do not exist", |state| change_xsave(state, 519, 0x40)),
        ("reserved bits of MXCSR", |state| change_xsave(state, 27, 0x80)),
    ];
    let mut p = Program::new()?;
    p.end()?;
    let image = p.assemble()?;
    let good = Machine::new(backend, &image)?.vcpu.save()?;
    for (name, mutate) in mutations {
        let mut state = good.clone();
        mutate(&mut state);
        let mut machine = Machine::new(backend, &image)?;
        match machine.vcpu.restore(&state) {
            Err(error @ Error::InvalidState { .. }) => {
                assert!(error.to_string().len() > 20, "{name}: {error}");
            }
            other => return Err(Stop::failed(format!("{name}: {other:?}"))),
        }
        // The vCPU takes a good one after it.
        machine.vcpu.restore(&good)?;
        machine.run_to_end()?;
    }
    Ok(())
}

fn change_xsave(state: &mut CpuState, offset: usize, bits: u8) {
    let mut bytes = state.xsave.bytes().to_vec();
    bytes[offset] |= bits;
    if let Some(area) = XsaveArea::from_bytes(bytes) {
        state.xsave = area;
    }
}

fn system_registers_that_no_processor_can_have(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let before = machine.vcpu.system_registers()?;
    let flat = SystemRegisters { apic_base: before.apic_base, ..flat_system_registers() };
    for wrong in [
        SystemRegisters { cr0: flat.cr0 & !SystemRegisters::CR0_PE, ..flat },
        SystemRegisters { cr4: 0, ..flat },
        SystemRegisters { efer: SystemRegisters::EFER_LMA, ..flat },
    ] {
        let error = machine.vcpu.set_system_registers(&wrong);
        assert!(matches!(error, Err(Error::InvalidState { .. })), "{error:?}");
        assert_eq!(machine.vcpu.system_registers()?, before, "nothing changed");
    }
    machine.run_to_end()
}
