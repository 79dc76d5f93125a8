//! Port I/O: single accesses and strings, in every size.

use iced_x86::code_asm::{al, ax, dx, eax, ecx, edi, esi, ptr, rax, rcx, rsi};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;
use crate::suite::recorder::Access;

cases![
    out_of_every_size,
    in_of_every_size,
    in_changes_only_its_part_of_rax,
    immediate_port,
    rep_outs_of_every_size,
    rep_ins_of_every_size,
    rep_outs_across_a_page,
    rep_outs_with_an_element_on_two_pages,
    rep_outs_backwards,
    rep_outs_of_nothing,
];

const PORT: u16 = 0x2f8;

/// Executes one string instruction of `size` bytes with REP.
fn string_io(p: &mut Program, output: bool, size: usize) -> Outcome {
    match (output, size) {
        (true, 1) => p.rep().outsb()?,
        (true, 2) => p.rep().outsw()?,
        (true, _) => p.rep().outsd()?,
        (false, 1) => p.rep().insb()?,
        (false, 2) => p.rep().insw()?,
        (false, _) => p.rep().insd()?,
    }
    Ok(())
}

fn out_of_every_size(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rax, 0x1122_3344_5566_7788_u64)?;
    p.mov(dx, u32::from(PORT))?;
    p.out(dx, al)?;
    p.out(dx, ax)?;
    p.out(dx, eax)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let out = |size, data: &[u8]| Access::Out { port: PORT, size, data: data.to_vec() };
    let expected = [out(1, &[0x88]), out(2, &[0x88, 0x77]), out(4, &[0x88, 0x77, 0x66, 0x55])];
    assert_eq!(machine.bus.log, expected);
    Ok(())
}

fn in_of_every_size(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(dx, u32::from(PORT))?;
    for (gpa, size) in (layout::DATA..).step_by(8).zip([1, 2, 4]) {
        p.mov(eax, 0)?;
        match size {
            1 => p.in_(al, dx)?,
            2 => p.in_(ax, dx)?,
            _ => p.in_(eax, dx)?,
        }
        p.mov(ptr(gpa), rax)?;
    }
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.input.extend([0x81, 0x92, 0xa3, 0xb4, 0xc5, 0xd6, 0xe7]);
    machine.run_to_end()?;
    let input = |size| Access::In { port: PORT, size, bytes: size };
    assert_eq!(machine.bus.log, [input(1), input(2), input(4)]);
    let words = [0, 8, 16].map(|offset| machine.word(layout::DATA + offset).ok());
    assert_eq!(words, [Some(0x81), Some(0xa392), Some(0xe7d6_c5b4)]);
    Ok(())
}

fn in_changes_only_its_part_of_rax(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(dx, u32::from(PORT))?;
    for (gpa, size) in (layout::DATA..).step_by(8).zip([1, 2, 4]) {
        p.mov(rax, u64::MAX)?;
        match size {
            1 => p.in_(al, dx)?,
            2 => p.in_(ax, dx)?,
            _ => p.in_(eax, dx)?,
        }
        p.mov(ptr(gpa), rax)?;
    }
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let words = [0, 8, 16].map(|offset| machine.word(layout::DATA + offset).ok());
    assert_eq!(words, [Some(!0xff), Some(!0xffff), Some(0)]);
    Ok(())
}

fn immediate_port(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.in_(al, 0x80)?;
    p.out(0x81, al)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.input.push_back(0x6d);
    machine.run_to_end()?;
    let expected =
        [Access::In { port: 0x80, size: 1, bytes: 1 }, Access::Out { port: 0x81, size: 1, data: vec![0x6d] }];
    assert_eq!(machine.bus.log, expected);
    Ok(())
}

/// Runs `rep outs` of `count` elements from `gpa`, checks the registers after it, and returns what arrived.
fn rep_outs(
    backend: &Backend,
    size: usize,
    count: u64,
    gpa: u64,
    backwards: bool,
) -> Outcome<(Machine, Vec<u8>)> {
    let mut p = Program::new()?;
    p.mov(rsi, gpa)?;
    p.mov(rcx, count)?;
    p.mov(dx, u32::from(PORT))?;
    if backwards {
        p.std()?;
    }
    string_io(&mut p, true, size)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let pattern: Vec<u8> = (0..layout::DATA_SIZE).map(|offset| (offset % 251) as u8).collect();
    machine.write(layout::DATA, &pattern)?;
    machine.run_to_end()?;
    let registers = machine.vcpu.registers()?;
    let moved = count * size as u64;
    assert_eq!(registers.rcx, 0);
    assert_eq!(registers.rsi, if backwards { gpa - moved } else { gpa + moved });
    for access in &machine.bus.log {
        assert!(matches!(access, Access::Out { port: PORT, size: s, .. } if *s == size), "{access:?}");
    }
    let arrived = machine.bus.output(PORT);
    Ok((machine, arrived))
}

fn rep_outs_of_every_size(backend: &Backend) -> Outcome {
    for size in [1, 2, 4] {
        let (machine, arrived) = rep_outs(backend, size, 300, layout::DATA, false)?;
        assert_eq!(arrived, machine.bytes(layout::DATA, 300 * size)?, "elements of {size} bytes");
    }
    Ok(())
}

fn rep_ins_of_every_size(backend: &Backend) -> Outcome {
    for size in [1, 2, 4] {
        let count = 1500;
        let mut p = Program::new()?;
        p.mov(edi, u32::try_from(layout::DATA)?)?;
        p.mov(ecx, count)?;
        p.mov(dx, u32::from(PORT))?;
        string_io(&mut p, false, size)?;
        p.end()?;
        let mut machine = Machine::new(backend, &p.assemble()?)?;
        let bytes = usize::try_from(count)? * size;
        let input: Vec<u8> = (0..bytes).map(|offset| (offset % 253) as u8).collect();
        machine.bus.input.extend(&input);
        machine.run_to_end()?;
        assert!(machine.bytes(layout::DATA, bytes)? == input, "elements of {size} bytes");
        assert_eq!(machine.bytes(layout::DATA + bytes as u64, 8)?, [0; 8], "no byte too many");
        assert!(machine.bus.input.is_empty());
        let registers = machine.vcpu.registers()?;
        assert_eq!((registers.rcx, registers.rdi), (0, layout::DATA + bytes as u64));
    }
    Ok(())
}

fn rep_outs_across_a_page(backend: &Backend) -> Outcome {
    for size in [1, 2, 4] {
        let start = layout::DATA + 0x1000 - 8;
        let (machine, arrived) = rep_outs(backend, size, 2000, start, false)?;
        assert!(arrived == machine.bytes(start, 2000 * size)?, "elements of {size} bytes");
        let lengths = machine.bus.log.iter().map(|access| match access {
            Access::Out { data, .. } => data.len(),
            _ => 0,
        });
        assert!(lengths.max() <= Some(0x1000), "a call covers one page at most");
    }
    Ok(())
}

fn rep_outs_with_an_element_on_two_pages(backend: &Backend) -> Outcome {
    for (size, before) in [(2, 3), (4, 6), (4, 5), (4, 7)] {
        let start = layout::DATA + 0x1000 - before;
        let (machine, arrived) = rep_outs(backend, size, 5, start, false)?;
        assert_eq!(arrived, machine.bytes(start, 5 * size)?, "{size} bytes, {before} before the page's end");
    }
    Ok(())
}

fn rep_outs_backwards(backend: &Backend) -> Outcome {
    let start = layout::DATA + 0x1002;
    let (machine, arrived) = rep_outs(backend, 2, 5, start, true)?;
    let mut expected = Vec::new();
    for element in 0..5 {
        expected.extend(machine.bytes(start - element * 2, 2)?);
    }
    assert_eq!(arrived, expected);
    Ok(())
}

fn rep_outs_of_nothing(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(esi, u32::try_from(layout::DATA)?)?;
    p.mov(ecx, 0)?;
    p.rep().outsb()?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, []);
    assert_eq!(machine.vcpu.registers()?.rsi, layout::DATA);
    Ok(())
}
