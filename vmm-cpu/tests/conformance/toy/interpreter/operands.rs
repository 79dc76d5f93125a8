//! Operands: registers, immediates, memory.

use iced_x86::{Instruction, OpKind, Register};
use vmm_cpu::state::GeneralRegisters;
use vmm_cpu::vmm_memory::PAGE_SIZE;
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;

use super::super::alu;
use super::super::system::is_canonical;
use super::{Fault, GP, Interpreter};

impl Interpreter<'_> {
    /// Size of an operand in bytes.
    pub(super) fn size(&self, i: &Instruction, operand: u32) -> Result<usize, Fault> {
        Ok(match i.op_kind(operand) {
            OpKind::Register => i.op_register(operand).size(),
            OpKind::Memory => i.memory_size().size(),
            _ => 8,
        })
        .and_then(|size| if (1..=8).contains(&size) { Ok(size) } else { Err(unknown_operand()) })
    }

    pub(super) fn read(&mut self, i: &Instruction, operand: u32) -> Result<u64, Fault> {
        match i.op_kind(operand) {
            OpKind::Register => self.register(i.op_register(operand)),
            OpKind::Memory => {
                let (address, size) = (self.address(i, operand)?, self.size(i, operand)?);
                let mut data = [0; 8];
                self.load(address, &mut data[..size])?;
                Ok(u64::from_le_bytes(data))
            }
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Ok(i.immediate(operand)),
            _ => Err(unknown_operand()),
        }
    }

    pub(super) fn write(&mut self, i: &Instruction, operand: u32, value: u64) -> Result<(), Fault> {
        match i.op_kind(operand) {
            OpKind::Register => self.set_register(i.op_register(operand), value),
            OpKind::Memory => {
                let (address, size) = (self.address(i, operand)?, self.size(i, operand)?);
                self.store(address, &value.to_le_bytes()[..size])
            }
            _ => Err(unknown_operand()),
        }
    }

    pub(super) fn address(&mut self, i: &Instruction, operand: u32) -> Result<u64, Fault> {
        let address = i.virtual_address(operand, 0, |register, _, _| match register {
            Register::FS => Some(self.cpu.state.system.fs.base),
            Register::GS => Some(self.cpu.state.system.gs.base),
            register if register.is_segment_register() => Some(0),
            register => self.register(register).ok(),
        });
        address.ok_or_else(unknown_operand)
    }

    pub(super) fn register(&self, register: Register) -> Result<u64, Fault> {
        if register == Register::CR8 {
            return Ok(self.cpu.state.system.cr8);
        }
        let mut general = self.cpu.state.general;
        let whole = *slot(&mut general, register).ok_or_else(unknown_operand)?;
        Ok(alu::truncate(whole >> shift_of(register), register.size()))
    }

    pub(super) fn set_register(&mut self, register: Register, value: u64) -> Result<(), Fault> {
        if register == Register::CR8 {
            // Without a local APIC it holds back no interrupt.
            self.cpu.state.system.cr8 = value & 0xf;
            return Ok(());
        }
        let whole = slot(&mut self.cpu.state.general, register).ok_or_else(unknown_operand)?;
        let (size, shift) = (register.size(), shift_of(register));
        *whole = if size >= 4 {
            alu::truncate(value, size)
        } else {
            let mask = alu::truncate(u64::MAX, size) << shift;
            *whole & !mask | value << shift & mask
        };
        Ok(())
    }

    /// Loads from memory or, page by page, from the VMM.
    pub(super) fn load(&mut self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.touched.read = Some((address, data.len()));
        let (first, second) = data.split_at_mut(split(address, data.len())?);
        for (gpa, part) in [(address, &mut *first), (page_after(address), second)] {
            if !part.is_empty() && !self.vm.memory.read(gpa, part) {
                self.io.mmio_read(GuestAddress(gpa), part);
            }
        }
        Ok(())
    }

    /// Stores to memory or, page by page, at the VMM.
    pub(super) fn store(&mut self, address: u64, data: &[u8]) -> Result<(), Fault> {
        self.touched.written = Some((address, data.len()));
        let (first, second) = data.split_at(split(address, data.len())?);
        for (gpa, part) in [(address, first), (page_after(address), second)] {
            if !part.is_empty() && !self.vm.memory.write(gpa, part) {
                self.io.mmio_write(GuestAddress(gpa), part);
            }
        }
        Ok(())
    }
}

fn unknown_operand() -> Fault {
    Fault::Unhandled("an operand that the toy backend does not know".to_owned())
}

/// How many of `length` bytes (at most 8) at `address` are on its page.
fn split(address: u64, length: usize) -> Result<usize, Fault> {
    if !is_canonical(address) || !is_canonical(address.wrapping_add(length as u64)) {
        return Err(GP);
    }
    let on_page = PAGE_SIZE - address % PAGE_SIZE;
    Ok(usize::try_from(on_page).map_or(length, |on_page| on_page.min(length)))
}

fn page_after(address: u64) -> u64 {
    (address | (PAGE_SIZE - 1)).wrapping_add(1)
}

fn shift_of(register: Register) -> u32 {
    if matches!(register, Register::AH | Register::BH | Register::CH | Register::DH) { 8 } else { 0 }
}

fn slot(general: &mut GeneralRegisters, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut general.rax,
        Register::RBX => &mut general.rbx,
        Register::RCX => &mut general.rcx,
        Register::RDX => &mut general.rdx,
        Register::RSI => &mut general.rsi,
        Register::RDI => &mut general.rdi,
        Register::RSP => &mut general.rsp,
        Register::RBP => &mut general.rbp,
        Register::R8 => &mut general.r8,
        Register::R9 => &mut general.r9,
        Register::R10 => &mut general.r10,
        Register::R11 => &mut general.r11,
        Register::R12 => &mut general.r12,
        Register::R13 => &mut general.r13,
        Register::R14 => &mut general.r14,
        Register::R15 => &mut general.r15,
        _ => return None,
    })
}
