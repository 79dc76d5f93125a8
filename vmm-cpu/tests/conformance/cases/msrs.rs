//! Model-specific registers: the backend's own, those passed on, and those that nobody has.

use iced_x86::code_asm::{eax, ecx, edx, ptr, rax, rdx};
use std::sync::Arc;
use vmm_cpu::{Error, MsrFilter, MsrRange};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    unknown_register_faults,
    write_and_read_back_in_the_guest,
    write_of_a_value_that_is_not_allowed_faults,
    passed_on_read_gets_the_vmms_value,
    passed_on_read_that_the_vmm_refuses_faults,
    passed_on_write_arrives_with_its_value,
    passed_on_write_that_the_vmm_refuses_faults,
    reads_alone_can_be_passed_on,
    unknown_registers_can_be_passed_on,
    ranges_have_edges,
    new_choice_replaces_the_old_one,
    impossible_ranges_are_refused,
];

/// SYSENTER_ESP: every processor has it and nothing here depends on it.
const KNOWN: u32 = 0x175;
const LSTAR: u32 = 0xc000_0082;
/// No processor has it.
const UNKNOWN: u32 = 0x4000_1234;
const VALUE: u64 = 0x0000_1234_89ab_cdef;
const GENERAL_PROTECTION: u8 = 13;

/// A guest that reads `index` and stores the value; after a fault it ends with AL set.
fn reading_guest(index: u32) -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(ecx, index)?;
    p.rdmsr()?;
    p.mov(ptr(layout::DATA), rax)?;
    p.mov(ptr(layout::DATA + 8), rdx)?;
    p.report(0x10, 0)?;
    finish(p)
}

/// A guest that writes `value` to `index`.
fn writing_guest(index: u32, value: u64) -> Outcome<Image> {
    let mut p = Program::new()?;
    let [low, high] = [value & 0xffff_ffff, value >> 32];
    p.mov(ecx, index)?;
    p.mov(eax, u32::try_from(low)?)?;
    p.mov(edx, u32::try_from(high)?)?;
    p.wrmsr()?;
    p.report(0x10, 0)?;
    finish(p)
}

/// The end of a guest, and a handler that reports the fault and its error code and ends as well.
fn finish(mut p: Program) -> Outcome<Image> {
    p.end()?;
    p.handler(GENERAL_PROTECTION)?;
    p.pop(rax)?;
    p.mov(ptr(layout::DATA + 16), rax)?;
    p.report(0x10, GENERAL_PROTECTION)?;
    p.end()?;
    p.assemble()
}

/// Whether the access went well; the error code of a fault must be 0.
fn went_well(machine: &mut Machine) -> Outcome<bool> {
    machine.write(layout::DATA + 16, &[0xff; 8])?;
    machine.run_to_end()?;
    match machine.bus.output(0x10)[..] {
        [0] => Ok(true),
        [GENERAL_PROTECTION] => {
            assert_eq!(machine.word(layout::DATA + 16)?, 0, "error code");
            Ok(false)
        }
        ref other => Err(Stop::failed(format!("{other:?}"))),
    }
}

/// EDX:EAX of a reading guest.
fn value_read(machine: &Machine) -> Outcome<u64> {
    let (low, high) = (machine.word(layout::DATA)?, machine.word(layout::DATA + 8)?);
    assert_eq!((low >> 32, high >> 32), (0, 0), "RDMSR clears the high halves");
    Ok(high << 32 | low)
}

fn filter(machine: &Machine) -> Outcome<Arc<dyn MsrFilter>> {
    machine.vm.msr_filter().ok_or_else(|| Stop::skipped("no MSR filter"))
}

/// The accesses to registers in the log.
fn msr_accesses(machine: &Machine) -> Vec<Access> {
    let of_msr = |access: &&Access| matches!(access, Access::ReadMsr(_) | Access::WriteMsr(..));
    machine.bus.log.iter().filter(of_msr).cloned().collect()
}

fn unknown_register_faults(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &reading_guest(UNKNOWN)?)?;
    assert!(!went_well(&mut machine)?);
    let mut machine = Machine::new(backend, &writing_guest(UNKNOWN, VALUE)?)?;
    assert!(!went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), []);
    Ok(())
}

fn write_and_read_back_in_the_guest(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &writing_guest(LSTAR, VALUE)?)?;
    assert!(went_well(&mut machine)?);
    assert_eq!(machine.vcpu.msr(LSTAR)?, VALUE);
    let mut machine = Machine::new(backend, &reading_guest(LSTAR)?)?;
    machine.vcpu.set_msr(LSTAR, VALUE)?;
    assert!(went_well(&mut machine)?);
    assert_eq!(value_read(&machine)?, VALUE);
    Ok(())
}

fn write_of_a_value_that_is_not_allowed_faults(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &writing_guest(LSTAR, 1 << 62)?)?;
    assert!(!went_well(&mut machine)?, "an address that is not canonical");
    Ok(())
}

fn passed_on_read_gets_the_vmms_value(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &reading_guest(KNOWN)?)?;
    filter(&machine)?.pass_on(&[MsrRange::new(KNOWN, 1)], false)?;
    machine.bus.msrs.insert(KNOWN, VALUE);
    assert!(went_well(&mut machine)?);
    assert_eq!(value_read(&machine)?, VALUE);
    assert_eq!(msr_accesses(&machine), [Access::ReadMsr(KNOWN)]);
    Ok(())
}

fn passed_on_read_that_the_vmm_refuses_faults(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &reading_guest(KNOWN)?)?;
    filter(&machine)?.pass_on(&[MsrRange::new(KNOWN, 1)], false)?;
    assert!(!went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), [Access::ReadMsr(KNOWN)]);
    Ok(())
}

fn passed_on_write_arrives_with_its_value(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &writing_guest(KNOWN, VALUE)?)?;
    filter(&machine)?.pass_on(&[MsrRange::new(KNOWN, 1)], false)?;
    machine.bus.msrs.insert(KNOWN, 0);
    assert!(went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), [Access::WriteMsr(KNOWN, VALUE)]);
    assert_eq!(machine.vcpu.msr(KNOWN)?, 0, "the backend's own register stays as it was");
    Ok(())
}

fn passed_on_write_that_the_vmm_refuses_faults(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &writing_guest(KNOWN, VALUE)?)?;
    filter(&machine)?.pass_on(&[MsrRange::new(KNOWN, 1)], false)?;
    assert!(!went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), [Access::WriteMsr(KNOWN, VALUE)]);
    Ok(())
}

fn reads_alone_can_be_passed_on(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &writing_guest(KNOWN, VALUE)?)?;
    filter(&machine)?.pass_on(&[MsrRange::new(KNOWN, 1).reads_only()], false)?;
    assert!(went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), []);
    assert_eq!(machine.vcpu.msr(KNOWN)?, VALUE, "the backend serves the write");
    Ok(())
}

fn unknown_registers_can_be_passed_on(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &reading_guest(UNKNOWN)?)?;
    filter(&machine)?.pass_on(&[], true)?;
    machine.bus.msrs.insert(UNKNOWN, VALUE);
    assert!(went_well(&mut machine)?);
    assert_eq!(value_read(&machine)?, VALUE);
    let mut machine = Machine::new(backend, &reading_guest(KNOWN)?)?;
    filter(&machine)?.pass_on(&[], true)?;
    machine.vcpu.set_msr(KNOWN, VALUE)?;
    assert!(went_well(&mut machine)?);
    assert_eq!(value_read(&machine)?, VALUE, "the backend serves what it has");
    assert_eq!(msr_accesses(&machine), []);
    Ok(())
}

fn ranges_have_edges(backend: &Backend) -> Outcome {
    for (index, inside) in [(0x174, false), (0x175, true), (0x176, true), (0x277, false)] {
        let mut machine = Machine::new(backend, &reading_guest(index)?)?;
        filter(&machine)?.pass_on(&[MsrRange::new(0xc000_0081, 1), MsrRange::new(0x175, 2)], false)?;
        machine.bus.msrs.insert(index, VALUE);
        assert!(went_well(&mut machine)?);
        assert_eq!(!msr_accesses(&machine).is_empty(), inside, "{index:#x}");
    }
    Ok(())
}

fn new_choice_replaces_the_old_one(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &reading_guest(KNOWN)?)?;
    let filter = filter(&machine)?;
    filter.pass_on(&[MsrRange::new(KNOWN, 1)], true)?;
    filter.pass_on(&[MsrRange::new(LSTAR, 1)], false)?;
    assert!(went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), []);
    let mut machine = Machine::new(backend, &reading_guest(UNKNOWN)?)?;
    let filter = self::filter(&machine)?;
    filter.pass_on(&[], true)?;
    filter.pass_on(&[], false)?;
    assert!(!went_well(&mut machine)?);
    assert_eq!(msr_accesses(&machine), []);
    Ok(())
}

fn impossible_ranges_are_refused(backend: &Backend) -> Outcome {
    let machine = Machine::new(backend, &reading_guest(KNOWN)?)?;
    let filter = filter(&machine)?;
    for range in [MsrRange::new(KNOWN, 0), MsrRange::new(u32::MAX, 2)] {
        let error = filter.pass_on(&[range], false);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{range:?}: {error:?}");
    }
    Ok(())
}
