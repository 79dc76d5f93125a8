//! Doorbells: guest writes that signal a notifier without a call on the VMM.

use std::sync::Arc;

use iced_x86::code_asm::{al, ax, byte_ptr, dword_ptr, dx, eax, qword_ptr, rax, rbx, word_ptr};
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::{Doorbell, DoorbellAddress, Doorbells, Error, Notifier};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    port_of_every_width_rings_on_its_value,
    mmio_of_every_width_rings_on_its_value,
    without_a_value_every_write_rings,
    other_widths_and_reads_go_to_the_vmm,
    two_values_at_one_address,
    detached_doorbell_is_silent,
    rings_are_counted,
    impossible_doorbells_are_refused,
];

const PORT: u16 = 0x5658;
const VALUES: [u64; 3] = [0x11, 0x22, 0x33];

/// A guest that writes each of `values` with `width` bytes to `address`.
fn writing_guest(address: DoorbellAddress, width: u8, values: &[u64]) -> Outcome<Image> {
    let mut p = Program::new()?;
    for value in values {
        p.mov(rax, *value)?;
        match address {
            DoorbellAddress::Pio(port) => {
                p.mov(dx, u32::from(port))?;
                match width {
                    1 => p.out(dx, al)?,
                    2 => p.out(dx, ax)?,
                    _ => p.out(dx, eax)?,
                }
            }
            DoorbellAddress::Mmio(gpa) => {
                p.mov(rbx, gpa.0)?;
                match width {
                    1 => p.mov(byte_ptr(rbx), al)?,
                    2 => p.mov(word_ptr(rbx), ax)?,
                    4 => p.mov(dword_ptr(rbx), eax)?,
                    _ => p.mov(qword_ptr(rbx), rax)?,
                }
            }
            other => return Err(Stop::failed(format!("{other:?}"))),
        }
    }
    p.end()?;
    p.assemble()
}

fn machine(backend: &Backend, image: &Image) -> Outcome<(Machine, Arc<dyn Doorbells>)> {
    let machine = Machine::new(backend, image)?;
    let doorbells = machine.vm.doorbells().ok_or_else(|| Stop::skipped("no doorbells"))?;
    Ok((machine, doorbells))
}

/// The access by which a write of `width` bytes arrives at the VMM.
fn arrival(address: DoorbellAddress, width: u8, value: u64) -> Outcome<Access> {
    let data = value.to_le_bytes()[..usize::from(width)].to_vec();
    match address {
        DoorbellAddress::Pio(port) => Ok(Access::Out { port, size: width.into(), data }),
        DoorbellAddress::Mmio(gpa) => Ok(Access::Store { gpa: gpa.0, data }),
        other => Err(Stop::failed(format!("{other:?}"))),
    }
}

fn rings_on_its_value(backend: &Backend, address: DoorbellAddress, width: u8) -> Outcome {
    // The topmost byte of the width differs, so that a comparison of fewer bytes shows.
    let high = 0x80_u64 << (8 * (u32::from(width) - 1));
    let values = VALUES.map(|value| value | high);
    let mut all = values.to_vec();
    all.push(values[1] ^ high);
    let (mut machine, doorbells) = machine(backend, &writing_guest(address, width, &all)?)?;
    let notifier = Notifier::new()?;
    doorbells.attach_doorbell(&Doorbell::new(address, width).matching(values[1]), &notifier)?;
    machine.run_to_end()?;
    let others = [values[0], values[2], all[3]];
    let expected =
        others.into_iter().map(|value| arrival(address, width, value)).collect::<Outcome<Vec<_>>>()?;
    assert_eq!(machine.bus.log, expected, "width {width}");
    assert_eq!(notifier.take()?, 1, "width {width}");
    Ok(())
}

fn port_of_every_width_rings_on_its_value(backend: &Backend) -> Outcome {
    [1, 2, 4].into_iter().try_for_each(|width| rings_on_its_value(backend, DoorbellAddress::Pio(PORT), width))
}

fn mmio_of_every_width_rings_on_its_value(backend: &Backend) -> Outcome {
    let address = DoorbellAddress::Mmio(GuestAddress(layout::MMIO + 0x40));
    [1, 2, 4, 8].into_iter().try_for_each(|width| rings_on_its_value(backend, address, width))
}

fn without_a_value_every_write_rings(backend: &Backend) -> Outcome {
    for address in [DoorbellAddress::Pio(PORT), DoorbellAddress::Mmio(GuestAddress(layout::MMIO))] {
        let (mut machine, doorbells) = machine(backend, &writing_guest(address, 4, &VALUES)?)?;
        let notifier = Notifier::new()?;
        doorbells.attach_doorbell(&Doorbell::new(address, 4), &notifier)?;
        machine.run_to_end()?;
        assert_eq!(machine.bus.log, [], "{address:?}");
        assert_eq!(notifier.take()?, 3, "{address:?}");
    }
    Ok(())
}

fn other_widths_and_reads_go_to_the_vmm(backend: &Backend) -> Outcome {
    let gpa = layout::MMIO;
    let mut p = Program::new()?;
    p.mov(rbx, gpa)?;
    p.mov(eax, 0x11)?;
    p.mov(word_ptr(rbx), ax)?;
    p.mov(eax, dword_ptr(rbx))?;
    p.mov(eax, 0x11)?;
    p.mov(dword_ptr(rbx + 4), eax)?;
    p.mov(dword_ptr(rbx), eax)?;
    p.end()?;
    let (mut machine, doorbells) = machine(backend, &p.assemble()?)?;
    let notifier = Notifier::new()?;
    let doorbell = Doorbell::new(DoorbellAddress::Mmio(GuestAddress(gpa)), 4).matching(0x11);
    doorbells.attach_doorbell(&doorbell, &notifier)?;
    machine.run_to_end()?;
    let expected = [
        Access::Store { gpa, data: vec![0x11, 0] },
        Access::Load { gpa, bytes: 4 },
        Access::Store { gpa: gpa + 4, data: vec![0x11, 0, 0, 0] },
    ];
    assert_eq!(machine.bus.log, expected);
    assert_eq!(notifier.take()?, 1);
    Ok(())
}

fn two_values_at_one_address(backend: &Backend) -> Outcome {
    let address = DoorbellAddress::Mmio(GuestAddress(layout::MMIO));
    let (mut machine, doorbells) = machine(backend, &writing_guest(address, 2, &VALUES)?)?;
    let (first, second) = (Notifier::new()?, Notifier::new()?);
    doorbells.attach_doorbell(&Doorbell::new(address, 2).matching(VALUES[0]), &first)?;
    doorbells.attach_doorbell(&Doorbell::new(address, 2).matching(VALUES[2]), &second)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log, [arrival(address, 2, VALUES[1])?]);
    assert_eq!((first.take()?, second.take()?), (1, 1));
    Ok(())
}

fn detached_doorbell_is_silent(backend: &Backend) -> Outcome {
    let address = DoorbellAddress::Pio(PORT);
    let (mut machine, doorbells) = machine(backend, &writing_guest(address, 4, &VALUES)?)?;
    let notifier = Notifier::new()?;
    let doorbell = Doorbell::new(address, 4);
    doorbells.attach_doorbell(&doorbell, &notifier)?;
    doorbells.detach_doorbell(&doorbell, &notifier)?;
    machine.run_to_end()?;
    assert_eq!(machine.bus.log.len(), 3);
    assert_eq!(notifier.take()?, 0);
    let error = doorbells.detach_doorbell(&doorbell, &notifier);
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    Ok(())
}

fn rings_are_counted(backend: &Backend) -> Outcome {
    let address = DoorbellAddress::Mmio(GuestAddress(layout::MMIO));
    let (mut machine, doorbells) = machine(backend, &writing_guest(address, 4, &[7; 500])?)?;
    let notifier = Notifier::new()?;
    doorbells.attach_doorbell(&Doorbell::new(address, 4).matching(7), &notifier)?;
    machine.run_to_end()?;
    assert_eq!(notifier.take()?, 500);
    Ok(())
}

fn impossible_doorbells_are_refused(backend: &Backend) -> Outcome {
    let (pio, mmio) = (DoorbellAddress::Pio(PORT), DoorbellAddress::Mmio(GuestAddress(layout::MMIO)));
    let (_machine, doorbells) = machine(backend, &writing_guest(pio, 1, &VALUES)?)?;
    let notifier = Notifier::new()?;
    let refused = |doorbell: Doorbell| {
        let error = doorbells.attach_doorbell(&doorbell, &notifier);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{doorbell:?}: {error:?}");
    };
    for width in [0, 3, 5, 16, 255] {
        refused(Doorbell::new(pio, width));
        refused(Doorbell::new(mmio, width));
    }
    refused(Doorbell::new(pio, 8));
    refused(Doorbell::new(pio, 1).matching(0x100));
    refused(Doorbell::new(mmio, 4).matching(1 << 32));
    let doorbell = Doorbell::new(mmio, 4).matching(1);
    doorbells.attach_doorbell(&doorbell, &notifier)?;
    refused(doorbell);
    Ok(())
}
