//! Hypercalls: an optional capability.

use iced_x86::code_asm::{eax, ecx, edx, esi, rax, rbx};
use vmm_cpu::{Error, Hypercall};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::Machine;
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![passed_on_with_its_arguments, not_passed_on_fails_in_the_guest];

const NUMBER: u64 = 0x1234;

/// A guest that makes one call and ends with its result in RAX.
fn calling_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(rax, NUMBER)?;
    p.mov(rbx, 0x1111_2222_3333_4444_u64)?;
    p.mov(ecx, 2)?;
    p.mov(edx, 3)?;
    p.mov(esi, 4)?;
    p.vmcall()?;
    p.end()?;
    p.handler(6)?;
    p.mov(eax, 6)?;
    p.end()?;
    p.assemble()
}

fn passed_on_with_its_arguments(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &calling_guest()?)?;
    let calls = machine.vm.hypercalls().ok_or_else(|| Stop::skipped("no hypercalls are passed on"))?;
    match calls.pass_on(NUMBER) {
        Ok(()) => {}
        Err(error @ Error::Unsupported { .. }) => return Err(Stop::skipped(error.to_string())),
        Err(error) => return Err(error.into()),
    }
    machine.bus.hypercall_result = 0xfeed_0000_0000_beef;
    machine.run_to_end()?;
    let call = Hypercall::new(NUMBER, [0x1111_2222_3333_4444, 2, 3, 4], true);
    assert_eq!(machine.bus.log, [Access::Hypercall(call)]);
    assert_eq!(machine.vcpu.registers()?.rax, 0xfeed_0000_0000_beef);
    Ok(())
}

fn not_passed_on_fails_in_the_guest(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &calling_guest()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, []);
    let (no_such_call, undefined) = ((-1000_i64).cast_unsigned(), 6);
    let result = machine.vcpu.registers()?.rax;
    assert!(result == no_such_call || result == undefined, "neither -ENOSYS nor #UD: {result:#x}");
    Ok(())
}
