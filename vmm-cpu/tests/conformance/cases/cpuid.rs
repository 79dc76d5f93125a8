//! CPUID: what the guest sees is what the model says, from creation on.

use iced_x86::code_asm::{eax, ecx, ptr, rax, rbx, rcx, rdi, rdx};
use vmm_cpu::cpuid::{CpuidEntry, CpuidRegister, CpuidTable, Feature};
use vmm_cpu::{CpuModel, Error, InterruptMode, VmConfig};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;

cases![
    guest_sees_the_table,
    guest_sees_no_feature_beyond_the_table,
    cleared_feature_is_gone,
    vendor_is_what_the_model_says,
    host_model_has_nothing_beyond_the_supported,
    feature_that_is_not_supported_is_refused,
    each_vcpu_has_its_apic_id,
];

/// What vCPU 0 of `model` answers to `leaves`, given as pairs of leaf and subleaf.
fn answers(backend: &Backend, model: CpuModel, leaves: &[(u32, u32)]) -> Outcome<Vec<[u32; 4]>> {
    let mut config = backend.config(InterruptMode::External)?;
    config.cpu = model;
    answers_of(backend, &config, 0, leaves)
}

fn answers_of(
    backend: &Backend,
    config: &VmConfig,
    vcpu: u32,
    leaves: &[(u32, u32)],
) -> Outcome<Vec<[u32; 4]>> {
    let mut p = Program::new()?;
    p.mov(rdi, layout::DATA)?;
    for (leaf, subleaf) in leaves {
        p.mov(eax, *leaf)?;
        p.mov(ecx, *subleaf)?;
        p.cpuid()?;
        for (offset, register) in [(0, rax), (8, rbx), (16, rcx), (24, rdx)] {
            p.mov(ptr(rdi + offset), register)?;
        }
        p.add(rdi, 32)?;
    }
    p.end()?;
    let mut machine = Machine::of_vcpu(backend, config, vcpu, &p.assemble()?)?;
    machine.run_to_end()?;
    let word = |index: usize| {
        let value = machine.word(layout::DATA + 8 * index as u64)?;
        u32::try_from(value).map_err(|_| Stop::failed(format!("CPUID left bits above 31: {value:#x}")))
    };
    (0..leaves.len())
        .map(|leaf| Ok([word(4 * leaf)?, word(4 * leaf + 1)?, word(4 * leaf + 2)?, word(4 * leaf + 3)?]))
        .collect()
}

fn registers(entry: CpuidEntry) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// The table of `model` as vCPU 0 has it, without what follows the state of the vCPU.
fn table_of(backend: &Backend, model: &CpuModel) -> Outcome<CpuidTable> {
    Ok(model.resolve(backend.hypervisor.supported_cpuid())?.for_vcpu(0, 1))
}

fn guest_sees_the_table(backend: &Backend) -> Outcome {
    let table = table_of(backend, &CpuModel::Host)?;
    // Leaf 1 and 7 mirror CR4 in a bit each, leaf 0xd XCR0; hypervisor leaves are the backend's own.
    let moving = |leaf: u32| matches!(leaf, 1 | 7 | 0xd | 0x4000_0000..=0x4fff_ffff);
    let fixed: Vec<_> =
        table.entries().iter().filter(|entry| !moving(entry.leaf)).take(64).copied().collect();
    let keys: Vec<_> = fixed.iter().map(|entry| (entry.leaf, entry.subleaf.unwrap_or(0))).collect();
    for (entry, seen) in fixed.iter().zip(answers(backend, CpuModel::Host, &keys)?) {
        assert_eq!(seen, registers(*entry), "leaf {:#x}, subleaf {:?}", entry.leaf, entry.subleaf);
    }
    Ok(())
}

/// The features that the table lacks are not there, in the two leaves that mirror bits of CR4.
fn guest_sees_no_feature_beyond_the_table(backend: &Backend) -> Outcome {
    let table = table_of(backend, &CpuModel::Host)?;
    let (os_xsave, os_pke, apic) = (1 << 27, 1 << 4, 1 << 9);
    for (leaf, mirrored) in [(1, [0, 0, os_xsave, apic]), (7, [0, 0, os_pke, 0])] {
        let [seen] = answers(backend, CpuModel::Host, &[(leaf, 0)])?[..] else { panic!("one answer") };
        let promised = table.get(leaf, 0).map_or([0; 4], registers);
        for (index, register) in CpuidRegister::ALL.iter().enumerate().skip(1) {
            let beyond = seen[index] & !promised[index] & !mirrored[index];
            assert_eq!(
                beyond, 0,
                "leaf {leaf:#x} {register}: {:#x}, the table has {:#x}",
                seen[index], promised[index]
            );
        }
    }
    Ok(())
}

fn cleared_feature_is_gone(backend: &Backend) -> Outcome {
    use CpuidRegister::{Ecx, Edx};
    let (no_execute, lahf, cx16, deadline) =
        ((0x8000_0001, Edx, 20), (0x8000_0001, Ecx, 0), (1, Ecx, 13), (1, Ecx, 24));
    let mut tried = 0;
    for (leaf, register, bit) in [no_execute, lahf, cx16, deadline] {
        let supported = backend.hypervisor.supported_cpuid().get(leaf, 0).unwrap_or_default();
        if supported.register(register) >> bit & 1 == 0 {
            continue;
        }
        let index = CpuidRegister::ALL.iter().position(|other| *other == register).unwrap_or(0);
        for (model, expected) in [
            (CpuModel::Host, 1),
            (CpuModel::Host.without(leaf, 0, register, 1 << bit), 0),
            (CpuModel::Host.without(leaf, 0, register, 1 << bit).with(leaf, 0, register, 1 << bit), 1),
        ] {
            let [seen] = answers(backend, model, &[(leaf, 0)])?[..] else { panic!("one answer") };
            assert_eq!(seen[index] >> bit & 1, expected, "leaf {leaf:#x} {register} bit {bit}");
        }
        tried += 1;
    }
    assert!(tried > 0, "no feature to clear");
    Ok(())
}

fn vendor_is_what_the_model_says(backend: &Backend) -> Outcome {
    let mut table = table_of(backend, &CpuModel::Host)?;
    let mut leaf = table.get(0, 0).ok_or_else(|| Stop::failed("no leaf 0"))?;
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    (leaf.ebx, leaf.edx, leaf.ecx) = (word(b"Conf"), word(b"orma"), word(b"nce!"));
    table.set(leaf);
    let [seen] = answers(backend, CpuModel::Exact(table), &[(0, 0)])?[..] else { panic!("one answer") };
    assert_eq!(seen, registers(leaf));
    Ok(())
}

fn host_model_has_nothing_beyond_the_supported(backend: &Backend) -> Outcome {
    let supported = backend.hypervisor.supported_cpuid();
    let table = table_of(backend, &CpuModel::Host)?;
    for feature in Feature::all() {
        assert!(!table.has(*feature) || supported.has(*feature), "{}", feature.name());
    }
    Ok(())
}

fn feature_that_is_not_supported_is_refused(backend: &Backend) -> Outcome {
    let supported = backend.hypervisor.supported_cpuid();
    let Some(absent) = Feature::all().iter().find(|feature| !supported.has(**feature)) else {
        return Err(Stop::skipped("this host supports every feature that has a name"));
    };
    let config = VmConfig::new(CpuModel::Host.with_feature(*absent));
    match backend.hypervisor.create_vm(&config) {
        Err(Error::Unsupported { .. }) => Ok(()),
        other => Err(Stop::failed(format!("{}: {other:?}", absent.name()))),
    }
}

fn each_vcpu_has_its_apic_id(backend: &Backend) -> Outcome {
    let config = backend.config(InterruptMode::External)?.vcpus(4);
    for vcpu in [0, 3] {
        let [leaf1] = answers_of(backend, &config, vcpu, &[(1, 0)])?[..] else { panic!("one answer") };
        assert_eq!(leaf1[1] >> 24, vcpu, "initial APIC ID in EBX[31:24]");
    }
    Ok(())
}
