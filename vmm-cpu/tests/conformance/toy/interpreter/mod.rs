//! One instruction of 64-bit code.

mod delivery;
mod operands;

use iced_x86::{Code, ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use vmm_cpu::state::{GeneralRegisters, RunState, rflags};
use vmm_cpu::vmm_memory::PAGE_SIZE;
use vmm_cpu::{CpuidTable, DebugReason, DebugRequest, DebugStop, Halt, Hypercall, VcpuIo};

use super::alu;
use super::system::{Cpu, is_canonical};
use super::vm::Shared;

/// Longest instruction (Intel SDM 2A 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// Vectors (Intel SDM 3A 7.3).
const BREAKPOINT: u8 = 3;
const INVALID_OPCODE: u8 = 6;
const DOUBLE_FAULT: u8 = 8;
const GENERAL_PROTECTION: u8 = 13;

/// Why the run loop has to stop.
pub(super) enum Stop {
    Halt(Halt),
    /// The state is that before the instruction.
    Unhandled {
        reason: String,
        bytes: Vec<u8>,
    },
}

/// Why an instruction did not complete.
enum Fault {
    Exception(u8, Option<u32>),
    Halt(Halt),
    Unhandled(String),
}

const GP: Fault = Fault::Exception(GENERAL_PROTECTION, Some(0));

/// The data that an instruction has read and written last: address and length.
#[derive(Clone, Copy, Default)]
pub(super) struct Touched {
    read: Option<(u64, usize)>,
    written: Option<(u64, usize)>,
}

impl Touched {
    pub(super) fn reads(&self, address: u64, length: u8) -> bool {
        overlaps(self.read, address, length)
    }

    pub(super) fn writes(&self, address: u64, length: u8) -> bool {
        overlaps(self.written, address, length)
    }
}

fn overlaps(access: Option<(u64, usize)>, address: u64, length: u8) -> bool {
    access.is_some_and(|(start, bytes)| {
        start < address.saturating_add(length.into()) && address < start.saturating_add(bytes as u64)
    })
}

/// What one instruction works on.
pub(super) struct Interpreter<'a> {
    cpu: &'a mut Cpu,
    vm: &'a Shared,
    cpuid: &'a CpuidTable,
    io: &'a mut dyn VcpuIo,
    debug: &'a DebugRequest,
    pub(super) touched: Touched,
}

impl<'a> Interpreter<'a> {
    pub(super) fn new(
        cpu: &'a mut Cpu,
        vm: &'a Shared,
        cpuid: &'a CpuidTable,
        io: &'a mut dyn VcpuIo,
        debug: &'a DebugRequest,
    ) -> Self {
        Self { cpu, vm, cpuid, io, debug, touched: Touched::default() }
    }

    /// Executes the instruction at RIP.
    pub(super) fn execute(&mut self) -> Result<(), Stop> {
        let start = self.cpu.state.general.rip;
        let mut bytes = self.fetch(start);
        let result = if self.cpu.state.system.code_bits() == 64 {
            self.decode_and_perform(&bytes)
        } else {
            Err(Fault::Unhandled("the toy backend knows 64-bit code only".to_owned()))
        };
        match result {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.cpu.state.general.rip = start;
                match fault {
                    Fault::Exception(vector, error_code) => self.deliver(vector, error_code),
                    Fault::Halt(halt) => Err(Stop::Halt(halt)),
                    Fault::Unhandled(reason) => {
                        bytes.truncate(MAX_INSTRUCTION);
                        Err(Stop::Unhandled { reason, bytes })
                    }
                }
            }
        }
    }

    /// The bytes at `start`, as far as there is memory.
    fn fetch(&self, start: u64) -> Vec<u8> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let to_page_end = usize::try_from(PAGE_SIZE - start % PAGE_SIZE).unwrap_or(MAX_INSTRUCTION);
        let (first, second) = bytes.split_at_mut(to_page_end.min(MAX_INSTRUCTION));
        let length = if !self.vm.memory.read(start, first) {
            0
        } else if second.is_empty() || self.vm.memory.read(start + first.len() as u64, second) {
            MAX_INSTRUCTION
        } else {
            first.len()
        };
        bytes.into_iter().take(length).collect()
    }

    fn decode_and_perform(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let start = self.cpu.state.general.rip;
        let instruction = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            let whole = bytes.len() == MAX_INSTRUCTION;
            let cut = || Fault::Unhandled("there is no memory to fetch from".to_owned());
            return Err(if whole { Fault::Exception(INVALID_OPCODE, None) } else { cut() });
        }
        self.cpu.state.general.rip = instruction.next_ip();
        self.perform(&instruction, start)
    }

    fn perform(&mut self, i: &Instruction, start: u64) -> Result<(), Fault> {
        match i.mnemonic() {
            Mnemonic::Nop | Mnemonic::Pause | Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => {
                Ok(())
            }
            Mnemonic::Mov | Mnemonic::Movzx => {
                let value = self.read(i, 1)?;
                self.write(i, 0, value)
            }
            Mnemonic::Movsx | Mnemonic::Movsxd => {
                let value = alu::sign_extend(self.read(i, 1)?, self.size(i, 1)?);
                self.write(i, 0, value)
            }
            Mnemonic::Lea => {
                let address = self.address(i, 1)?;
                self.write(i, 0, address)
            }
            Mnemonic::Xchg => {
                let (a, b) = (self.read(i, 0)?, self.read(i, 1)?);
                self.write(i, 0, b)?;
                self.write(i, 1, a)
            }
            Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::Cmp
            | Mnemonic::And
            | Mnemonic::Or
            | Mnemonic::Xor
            | Mnemonic::Test
            | Mnemonic::Inc
            | Mnemonic::Dec
            | Mnemonic::Imul => self.arithmetic(i),
            Mnemonic::Push => {
                let value = self.read(i, 0)?;
                self.push(alu::sign_extend(value, self.size(i, 0)?))
            }
            Mnemonic::Pop => {
                let value = self.pop()?;
                self.write(i, 0, value)
            }
            Mnemonic::Jmp | Mnemonic::Call => {
                let near = i.op_kind(0) == OpKind::NearBranch64;
                let target = if near { i.near_branch_target() } else { self.read(i, 0)? };
                if i.mnemonic() == Mnemonic::Call {
                    self.push(i.next_ip())?;
                }
                self.jump(target)
            }
            Mnemonic::Ret if i.op_count() == 0 => {
                let target = self.pop()?;
                self.jump(target)
            }
            _ if i.is_jcc_short_or_near() => match condition(i.condition_code()) {
                Some(code) if alu::condition(code, self.cpu.state.general.rflags) => {
                    self.jump(i.near_branch_target())
                }
                _ => Ok(()),
            },
            Mnemonic::In | Mnemonic::Out => self.port(i),
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => self.string_in(i, start),
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => self.string_out(i, start),
            _ => self.perform_system(i, start),
        }
    }

    fn perform_system(&mut self, i: &Instruction, start: u64) -> Result<(), Fault> {
        match i.code() {
            Code::Hlt => {
                self.privileged()?;
                self.cpu.state.run_state = RunState::Halted;
            }
            Code::Cli => {
                self.io_privileged()?;
                self.cpu.state.general.rflags &= !rflags::IF;
            }
            Code::Sti => {
                self.io_privileged()?;
                let flags = &mut self.cpu.state.general.rflags;
                self.cpu.state.events.shadow.sti = *flags & rflags::IF == 0;
                *flags |= rflags::IF;
            }
            Code::Stc => self.cpu.state.general.rflags |= rflags::CF,
            Code::Cld => self.cpu.state.general.rflags &= !rflags::DF,
            Code::Std => self.cpu.state.general.rflags |= rflags::DF,
            Code::Int3 if self.debug.software_breakpoints => {
                return Err(Fault::Halt(Halt::Debug(DebugStop::new(start, DebugReason::SoftwareBreakpoint))));
            }
            Code::Int3 => return self.software_interrupt(BREAKPOINT),
            Code::Int_imm8 => return self.software_interrupt(i.immediate8()),
            Code::Ud2 => return Err(Fault::Exception(INVALID_OPCODE, None)),
            Code::Iretq => return self.interrupt_return(),
            Code::Rdmsr => return self.read_msr(),
            Code::Wrmsr => return self.write_msr(),
            Code::Rdtsc => {
                let now = self.vm.clock.tsc().wrapping_add(self.cpu.tsc_offset());
                self.set_edx_eax(now);
            }
            Code::Cpuid => {
                let general = &mut self.cpu.state.general;
                // The low halves select.
                let entry = self.cpuid.get(general.rax as u32, general.rcx as u32).unwrap_or_default();
                let answers = [entry.eax, entry.ebx, entry.ecx, entry.edx].map(u64::from);
                [general.rax, general.rbx, general.rcx, general.rdx] = answers;
            }
            Code::Vmcall | Code::Vmmcall => {
                let g = &mut self.cpu.state.general;
                let call = Hypercall::new(g.rax, [g.rbx, g.rcx, g.rdx, g.rsi], true);
                let no_such_call = (-1000_i64).cast_unsigned();
                g.rax =
                    if self.vm.passed_on.hypercall(g.rax) { self.io.hypercall(&call) } else { no_such_call };
            }
            _ => {
                return Err(Fault::Unhandled("an instruction that the toy backend does not know".to_owned()));
            }
        }
        Ok(())
    }

    fn arithmetic(&mut self, i: &Instruction) -> Result<(), Fault> {
        let (size, old) = (self.size(i, 0)?, self.cpu.state.general.rflags);
        let a = self.read(i, 0)?;
        let mut b = |operand| self.read(i, operand).map(|value| alu::truncate(value, size));
        let (outcome, stored) = match i.mnemonic() {
            Mnemonic::Add => (alu::add(a, b(1)?, size, old), true),
            Mnemonic::Sub => (alu::sub(a, b(1)?, size, old), true),
            Mnemonic::Cmp => (alu::sub(a, b(1)?, size, old), false),
            Mnemonic::And => (alu::logic(a & b(1)?, size, old), true),
            Mnemonic::Or => (alu::logic(a | b(1)?, size, old), true),
            Mnemonic::Xor => (alu::logic(a ^ b(1)?, size, old), true),
            Mnemonic::Test => (alu::logic(a & b(1)?, size, old), false),
            Mnemonic::Inc => (alu::keep_carry(alu::add(a, 1, size, old), old), true),
            Mnemonic::Dec => (alu::keep_carry(alu::sub(a, 1, size, old), old), true),
            Mnemonic::Imul if i.op_count() == 2 => (alu::imul(a, b(1)?, size, old), true),
            Mnemonic::Imul if i.op_count() == 3 => (alu::imul(b(1)?, b(2)?, size, old), true),
            _ => return Err(Fault::Unhandled("a form that the toy backend does not know".to_owned())),
        };
        if stored {
            self.write(i, 0, outcome.value)?;
        }
        self.cpu.state.general.rflags = outcome.flags;
        Ok(())
    }

    fn port(&mut self, i: &Instruction) -> Result<(), Fault> {
        self.io_privileged()?;
        let (value_operand, port_operand) = if i.mnemonic() == Mnemonic::In { (0, 1) } else { (1, 0) };
        let size = self.size(i, value_operand)?;
        let port = low16(self.read(i, port_operand)?);
        let mut data = [0; 8];
        if i.mnemonic() == Mnemonic::In {
            self.io.pio_read(port, size, &mut data[..size]);
            return self.write(i, 0, u64::from_le_bytes(data));
        }
        data = self.read(i, 1)?.to_le_bytes();
        self.io.pio_write(port, size, &data[..size]);
        Ok(())
    }

    /// How many elements of `size` bytes at `address` the next call of a string instruction covers.
    fn elements(&self, i: &Instruction, address: u64, size: usize) -> u64 {
        let general = &self.cpu.state.general;
        let wanted = if i.has_rep_prefix() { general.rcx } else { 1 };
        let on_page = (PAGE_SIZE - address % PAGE_SIZE) / size as u64;
        // Downwards one at a time; so does an element that lies across two pages.
        wanted.min(if general.rflags & rflags::DF != 0 { 1 } else { on_page.max(1) })
    }

    /// Moves on by `count` elements; a REP that has more to do is executed again.
    fn advance(
        &mut self,
        i: &Instruction,
        start: u64,
        count: u64,
        index: fn(&mut GeneralRegisters) -> &mut u64,
        size: usize,
    ) {
        let general = &mut self.cpu.state.general;
        let bytes = count.wrapping_mul(size as u64);
        let down = general.rflags & rflags::DF != 0;
        let index = index(general);
        *index = if down { index.wrapping_sub(bytes) } else { index.wrapping_add(bytes) };
        if i.has_rep_prefix() {
            general.rcx -= count;
            if general.rcx != 0 {
                general.rip = start;
            }
        }
    }

    fn string_in(&mut self, i: &Instruction, start: u64) -> Result<(), Fault> {
        self.io_privileged()?;
        let (size, address) = (i.memory_size().size(), self.cpu.state.general.rdi);
        let count = self.elements(i, address, size);
        if count == 0 {
            return Ok(());
        }
        let mut data = [0; PAGE_SIZE as usize];
        let data = &mut data[..count as usize * size];
        self.io.pio_read(low16(self.cpu.state.general.rdx), size, data);
        for (element, offset) in data.chunks(size).zip((0..).step_by(size)) {
            self.store(address.wrapping_add(offset), element)?;
        }
        self.advance(i, start, count, |general| &mut general.rdi, size);
        Ok(())
    }

    fn string_out(&mut self, i: &Instruction, start: u64) -> Result<(), Fault> {
        self.io_privileged()?;
        let (size, address) = (i.memory_size().size(), self.cpu.state.general.rsi);
        let count = self.elements(i, address, size);
        if count == 0 {
            return Ok(());
        }
        let mut data = [0; PAGE_SIZE as usize];
        let data = &mut data[..count as usize * size];
        for (element, offset) in data.chunks_mut(size).zip((0..).step_by(size)) {
            self.load(address.wrapping_add(offset), element)?;
        }
        self.io.pio_write(low16(self.cpu.state.general.rdx), size, data);
        self.advance(i, start, count, |general| &mut general.rsi, size);
        Ok(())
    }

    fn read_msr(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let index = self.cpu.state.general.rcx as u32;
        let passed_on = &self.vm.passed_on;
        let own = if passed_on.msr_read(index) { None } else { self.cpu.msr(index, self.vm.clock.tsc()) };
        let value = match own {
            Some(value) => value,
            None if passed_on.msr_read(index) || passed_on.unknown_msrs() => {
                self.io.msr_read(index).map_err(|_| GP)?
            }
            None => return Err(GP),
        };
        self.set_edx_eax(value);
        Ok(())
    }

    fn write_msr(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let general = &self.cpu.state.general;
        let index = general.rcx as u32;
        let value = general.rdx << 32 | alu::truncate(general.rax, 4);
        let now = self.vm.clock.tsc();
        let passed_on = &self.vm.passed_on;
        if !passed_on.msr_write(index) && self.cpu.set_msr(index, value, now).is_some() {
            return Ok(());
        }
        if passed_on.msr_write(index) || passed_on.unknown_msrs() {
            return self.io.msr_write(index, value).map_err(|_| GP);
        }
        Err(GP)
    }

    fn set_edx_eax(&mut self, value: u64) {
        let general = &mut self.cpu.state.general;
        (general.rdx, general.rax) = (value >> 32, alu::truncate(value, 4));
    }

    /// The privilege level is that of CS.
    fn privileged(&self) -> Result<(), Fault> {
        if self.cpu.state.system.cs.dpl == 0 { Ok(()) } else { Err(GP) }
    }

    fn io_privileged(&self) -> Result<(), Fault> {
        let io_privilege_level = self.cpu.state.general.rflags >> 12 & 3;
        if u64::from(self.cpu.state.system.cs.dpl) <= io_privilege_level { Ok(()) } else { Err(GP) }
    }

    fn jump(&mut self, target: u64) -> Result<(), Fault> {
        if !is_canonical(target) {
            return Err(GP);
        }
        self.cpu.state.general.rip = target;
        Ok(())
    }
}

fn low16(value: u64) -> u16 {
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// The encoding of a condition, 0 to 15.
fn condition(code: ConditionCode) -> Option<u8> {
    (code as u8).checked_sub(1)
}
