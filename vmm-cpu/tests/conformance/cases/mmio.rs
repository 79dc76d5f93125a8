//! Accesses to guest-physical addresses without memory.

use iced_x86::code_asm::{al, ax, byte_ptr, cl, dword_ptr, eax, ptr, qword_ptr, rax, rbx, word_ptr};

use vmm_cpu::Halt;

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::Program;
use crate::suite::recorder::{Access, address_pattern};

cases![
    store_of_every_size,
    load_of_every_size,
    store_of_an_immediate,
    unaligned,
    store_across_a_page,
    load_across_a_page,
    load_from_memory_and_device,
    store_to_memory_and_device,
    read_modify_write,
    bytes_of_a_narrow_load_only,
    kick_from_a_store_ends_the_run_behind_it,
];

const VALUE: u64 = 0x1122_3344_5566_7788;

fn store(p: &mut Program, size: usize, gpa: u64) -> Outcome {
    p.mov(rbx, gpa)?;
    match size {
        1 => p.mov(byte_ptr(rbx), al)?,
        2 => p.mov(word_ptr(rbx), ax)?,
        4 => p.mov(dword_ptr(rbx), eax)?,
        _ => p.mov(qword_ptr(rbx), rax)?,
    }
    Ok(())
}

fn load(p: &mut Program, size: usize, gpa: u64) -> Outcome {
    p.mov(rbx, gpa)?;
    match size {
        1 => p.mov(al, byte_ptr(rbx))?,
        2 => p.mov(ax, word_ptr(rbx))?,
        4 => p.mov(eax, dword_ptr(rbx))?,
        _ => p.mov(rax, qword_ptr(rbx))?,
    }
    Ok(())
}

/// The log of a guest that stores [`VALUE`] once.
fn stored(backend: &Backend, size: usize, gpa: u64) -> Outcome<Machine> {
    let mut p = Program::new()?;
    p.mov(rax, VALUE)?;
    store(&mut p, size, gpa)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    Ok(machine)
}

/// RAX of a guest that loads once into a RAX of zero.
fn loaded(backend: &Backend, size: usize, gpa: u64) -> Outcome<(Machine, u64)> {
    let mut p = Program::new()?;
    p.mov(eax, 0)?;
    load(&mut p, size, gpa)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.write(layout::RAM_SIZE - 8, &VALUE.to_le_bytes())?;
    machine.run_to_end()?;
    let value = machine.vcpu.registers()?.rax;
    Ok((machine, value))
}

/// What the recorder's devices hold at `gpa`.
fn device_bytes(gpa: u64, size: usize) -> Vec<u8> {
    (gpa..).take(size).map(address_pattern).collect()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn store_of_every_size(backend: &Backend) -> Outcome {
    for size in [1, 2, 4, 8] {
        let machine = stored(backend, size, layout::MMIO)?;
        let data = VALUE.to_le_bytes()[..size].to_vec();
        assert_eq!(machine.bus.log, [Access::Store { gpa: layout::MMIO, data }], "{size} bytes");
    }
    Ok(())
}

fn load_of_every_size(backend: &Backend) -> Outcome {
    for size in [1, 2, 4, 8] {
        let (machine, value) = loaded(backend, size, layout::MMIO)?;
        assert_eq!(machine.bus.log, [Access::Load { gpa: layout::MMIO, bytes: size }], "{size} bytes");
        assert_eq!(value, number(&device_bytes(layout::MMIO, size)), "{size} bytes");
    }
    Ok(())
}

fn store_of_an_immediate(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(dword_ptr(rbx + 0x10), 0x1234_5678)?;
    p.mov(qword_ptr(rbx + 0x18), -2)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    let expected = [
        Access::Store { gpa: layout::MMIO + 0x10, data: vec![0x78, 0x56, 0x34, 0x12] },
        Access::Store { gpa: layout::MMIO + 0x18, data: (-2_i64).to_le_bytes().to_vec() },
    ];
    assert_eq!(machine.bus.log, expected);
    Ok(())
}

fn unaligned(backend: &Backend) -> Outcome {
    for size in [2, 4, 8] {
        let gpa = layout::MMIO + 0x21;
        let machine = stored(backend, size, gpa)?;
        assert_eq!(joined_stores(&machine.bus.log), [(gpa, VALUE.to_le_bytes()[..size].to_vec())]);
        let (machine, value) = loaded(backend, size, gpa)?;
        assert_eq!(joined_loads(&machine.bus.log), [(gpa, size)]);
        assert_eq!(value, number(&device_bytes(gpa, size)));
    }
    Ok(())
}

fn store_across_a_page(backend: &Backend) -> Outcome {
    for (size, before) in [(2, 1), (4, 1), (4, 3), (8, 2), (8, 5)] {
        let gpa = layout::MMIO + 0x1000 - before;
        let machine = stored(backend, size, gpa)?;
        assert_eq!(joined_stores(&machine.bus.log), [(gpa, VALUE.to_le_bytes()[..size].to_vec())]);
        assert!(machine.bus.log.len() >= 2, "one call a page: {:?}", machine.bus.log);
    }
    Ok(())
}

fn load_across_a_page(backend: &Backend) -> Outcome {
    for (size, before) in [(2, 1), (4, 1), (4, 3), (8, 2), (8, 5)] {
        let gpa = layout::MMIO + 0x1000 - before;
        let (machine, value) = loaded(backend, size, gpa)?;
        assert_eq!(joined_loads(&machine.bus.log), [(gpa, size)]);
        assert_eq!(
            value,
            number(&device_bytes(gpa, size)),
            "{size} bytes, {before} of them on the first page"
        );
    }
    Ok(())
}

fn load_from_memory_and_device(backend: &Backend) -> Outcome {
    let end = layout::RAM_SIZE;
    let (machine, value) = loaded(backend, 8, end - 3)?;
    assert_eq!(joined_loads(&machine.bus.log), [(end, 5)]);
    let mut expected = VALUE.to_le_bytes()[5..].to_vec();
    expected.extend(device_bytes(end, 5));
    assert_eq!(value, number(&expected));
    Ok(())
}

fn store_to_memory_and_device(backend: &Backend) -> Outcome {
    let end = layout::RAM_SIZE;
    let machine = stored(backend, 8, end - 3)?;
    assert_eq!(joined_stores(&machine.bus.log), [(end, VALUE.to_le_bytes()[3..].to_vec())]);
    assert_eq!(machine.bytes(end - 3, 3)?, VALUE.to_le_bytes()[..3]);
    Ok(())
}

fn read_modify_write(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.add(dword_ptr(rbx), 1)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.mmio = |_| 0xff;
    machine.run_to_end()?;
    let expected = [
        Access::Load { gpa: layout::MMIO, bytes: 4 },
        Access::Store { gpa: layout::MMIO, data: vec![0, 0, 0, 0] },
    ];
    assert_eq!(machine.bus.log, expected);
    Ok(())
}

fn bytes_of_a_narrow_load_only(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rax, u64::MAX)?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(al, byte_ptr(rbx))?;
    p.movzx(eax, al)?;
    p.mov(cl, al)?;
    p.mov(ptr(layout::DATA), rax)?;
    p.end()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.run_to_end()?;
    assert_eq!(machine.word(layout::DATA)?, u64::from(address_pattern(layout::MMIO)));
    Ok(())
}

/// Stores, with neighbours that follow each other in the log joined, as one access may come in several calls.
fn joined_stores(log: &[Access]) -> Vec<(u64, Vec<u8>)> {
    let mut joined: Vec<(u64, Vec<u8>)> = Vec::new();
    for access in log {
        let Access::Store { gpa, data } = access else { panic!("{access:?} among stores") };
        match joined.last_mut() {
            Some((start, bytes)) if *start + bytes.len() as u64 == *gpa => bytes.extend(data),
            _ => joined.push((*gpa, data.clone())),
        }
    }
    joined
}

/// Loads, joined likewise.
fn joined_loads(log: &[Access]) -> Vec<(u64, usize)> {
    let mut joined: Vec<(u64, usize)> = Vec::new();
    for access in log {
        let Access::Load { gpa, bytes } = access else { panic!("{access:?} among loads") };
        match joined.last_mut() {
            Some((start, length)) if *start + *length as u64 == *gpa => *length += bytes,
            _ => joined.push((*gpa, *bytes)),
        }
    }
    joined
}

/// The whole store was made, once, and the guest goes on where it is sent.
fn kick_from_a_store_ends_the_run_behind_it(backend: &Backend) -> Outcome {
    for (size, offset) in
        [(1, 0), (2, 0), (4, 0), (8, 0), (1, 0xfff), (8, 0xff8), (2, 0xfff), (4, 0xffe), (8, 0xffc)]
    {
        let mut p = Program::new()?;
        p.mov(rax, VALUE)?;
        store(&mut p, size, layout::MMIO + offset)?;
        let behind = p.here()?;
        p.report(0x10, 1)?;
        p.end()?;
        let elsewhere = p.here()?;
        p.report(0x10, 2)?;
        p.end()?;
        let image = p.assemble()?;
        for jumps in [false, true] {
            let mut machine = Machine::new(backend, &image)?;
            let handle = machine.vcpu.handle();
            machine.bus.hook = Some(Box::new(move |access| {
                if matches!(access, Access::Store { .. }) {
                    handle.kick();
                }
            }));
            machine.run_until(&Halt::Interrupted)?;
            let mut registers = machine.vcpu.registers()?;
            assert_eq!(registers.rip, image.address_of(behind)?, "{size} bytes at {offset:#x}");
            if jumps {
                registers.rip = image.address_of(elsewhere)?;
                machine.vcpu.set_registers(&registers)?;
            }
            machine.run_to_end()?;
            assert_eq!(machine.bus.output(0x10), [if jumps { 2 } else { 1 }], "{size} bytes at {offset:#x}");
            let stored = machine.bus.log.iter().filter_map(|access| match access {
                Access::Store { data, .. } => Some(data.as_slice()),
                _ => None,
            });
            let stored: Vec<u8> = stored.flatten().copied().collect();
            assert_eq!(stored, VALUE.to_le_bytes()[..size], "at {offset:#x}");
        }
    }
    Ok(())
}
