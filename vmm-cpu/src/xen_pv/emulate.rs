//! Privileged instructions of the guest, which fault in ring 3 (Xen's pv/emul-priv-op.c), and INT.
//!
//! Threat model: the instruction is read from guest memory after it faulted, so it may be another one by now. What is
//! emulated is what is found, and all of it is harmless.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use vmm_memory::vm_memory::GuestAddress;

use super::abi::{PAGE_SIZE, shared_info};
use super::engine::{Engine, GuestMode};
use super::memory::is_canonical;
use super::trap::{GENERAL_PROTECTION, INVALID_OPCODE};
use super::vcpu_abi::{Action, VcpuAbi};
use crate::cpuid::Feature;
use crate::error::Result;
use crate::state::GeneralRegisters;

/// UD2 and the letters "xen": the CPUID that follows is Xen's to answer (public/arch-x86/xen.h).
const PREFIX: [u8; 5] = [0x0f, 0x0b, b'x', b'e', b'n'];
const CPUID: [u8; 2] = [0x0f, 0xa2];
const SYSENTER: [u8; 2] = [0x0f, 0x34];

/// Longest instruction.
pub(crate) const MAX: usize = 15;

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
const CR0_TS: u64 = 1 << 3;
/// PAE, OSFXSR, OSXMMEXCPT.
pub(crate) const CR4_AT_START: u64 = 0x620;
const CR4_OSXSAVE: u64 = 1 << 18;

mod msr {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const UCODE_REV: u32 = 0x8b;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// SCE, LME, LMA, NXE.
const EFER: u64 = 0xd01;
/// Enabled, bootstrap processor, at the usual address.
const APIC_BASE: u64 = 0xfee0_0800;
const APIC_BASE_BSP: u64 = 1 << 8;
/// WB, WT, UC-, UC, WC, WP, UC, UC: the table that Xen gives guests.
const PAT: u64 = 0x0000_0501_0007_0406;

/// What an emulated instruction came to.
enum Emulated {
    /// RIP moves on.
    Done,
    /// RIP moves on, and this follows.
    Then(Action),
    /// It faults as it did.
    Refused,
}

impl VcpuAbi {
    /// Emulates what faulted, if it is one of those instructions. `None` leaves the fault to the guest.
    pub(crate) fn emulate(
        &mut self,
        engine: &mut dyn Engine,
        vector: u8,
        error_code: u32,
    ) -> Result<Option<Action>> {
        let mode = engine.context().mode;
        // A gate of the interrupt table that ring 3 may not use: INT.
        if vector == GENERAL_PROTECTION && error_code & 7 == 2 {
            let number = error_code >> 3;
            return self.software_interrupt(engine, mode, u8::try_from(number & 0xff).unwrap_or(0));
        }
        if vector == GENERAL_PROTECTION && error_code != 0 {
            return Ok(None);
        }
        let root = match mode {
            GuestMode::Kernel => engine.kernel_root(),
            GuestMode::User => match engine.user_root() {
                Some(root) => root,
                None => return Ok(None),
            },
        };
        let rip = engine.context().general.rip;
        let (bytes, len) = self.fetch(root, rip);
        let bytes = bytes.get(..len).unwrap_or_default();
        // #UD on AMD's processors, #GP with no code segment for it on others.
        if mode == GuestMode::User && bytes.starts_with(&SYSENTER) {
            return self.user_sysenter(engine);
        }
        if vector == INVALID_OPCODE {
            if bytes.starts_with(&PREFIX)
                && bytes.get(PREFIX.len()..).is_some_and(|rest| rest.starts_with(&CPUID))
            {
                self.answer_cpuid(engine);
                engine.context().general.rip = rip.wrapping_add(7);
                return Ok(Some(Action::Continue));
            }
            // Where the engine's processor refuses INT outright.
            if let [0xcd, number, ..] = bytes {
                return self.software_interrupt(engine, mode, *number);
            }
            return Ok(None);
        }
        if mode != GuestMode::Kernel {
            return Ok(None);
        }
        let instruction = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return Ok(None);
        }
        let action = match self.execute(engine, &instruction)? {
            Emulated::Refused => return Ok(None),
            Emulated::Done => Action::Continue,
            Emulated::Then(action) => action,
        };
        engine.context().general.rip = instruction.next_ip();
        Ok(Some(action))
    }

    /// As many bytes at `rip` as are readable, at most 15.
    pub(crate) fn fetch(&self, root: GuestAddress, rip: u64) -> ([u8; MAX], usize) {
        let space = self.domain.memory.space(root);
        let mut bytes = [0; MAX];
        if space.read_bytes(rip, &mut bytes).is_ok() {
            return (bytes, MAX);
        }
        let in_page = usize::try_from(PAGE_SIZE - rip % PAGE_SIZE).unwrap_or(0).min(MAX);
        let read = bytes.get_mut(..in_page).is_some_and(|part| space.read_bytes(rip, part).is_ok());
        (bytes, if read { in_page } else { 0 })
    }

    fn software_interrupt(
        &mut self,
        engine: &mut dyn Engine,
        mode: GuestMode,
        number: u8,
    ) -> Result<Option<Action>> {
        if !self.may_use_vector(number, mode) {
            return self.inject(engine, GENERAL_PROTECTION, u32::from(number) << 3 | 2).map(Some);
        }
        let general = &mut engine.context().general;
        general.rip = general.rip.wrapping_add(2);
        self.inject_software(engine, number).map(Some)
    }

    fn answer_cpuid(&self, engine: &mut dyn Engine) {
        let general = &mut engine.context().general;
        let [leaf, subleaf] = [general.rax, general.rcx].map(low);
        let [eax, ebx, mut ecx, edx] = self
            .domain
            .cpuid
            .get(leaf, subleaf)
            .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        if leaf == 1 {
            // Not a copy of the guest's CR4, but on from the start, as Xen shows it to kernels that ask this way: Linux
            // believes in XSAVE only if both bits are set before it touches CR4 (xen_check_xsave).
            ecx &= !Feature::OSXSAVE.mask();
            if ecx & Feature::XSAVE.mask() != 0 {
                ecx |= Feature::OSXSAVE.mask();
            }
        }
        [general.rax, general.rbx, general.rcx, general.rdx] = [eax, ebx, ecx, edx].map(u64::from);
    }

    fn execute(&mut self, engine: &mut dyn Engine, instruction: &Instruction) -> Result<Emulated> {
        Ok(match instruction.mnemonic() {
            Mnemonic::Rdmsr => {
                let index = low(engine.context().general.rcx);
                let Some(value) = self.read_msr(engine, index)? else { return Ok(Emulated::Refused) };
                let general = &mut engine.context().general;
                (general.rax, general.rdx) = (value & u64::from(u32::MAX), value >> 32);
                Emulated::Done
            }
            Mnemonic::Wrmsr => {
                let general = &engine.context().general;
                let (index, value) =
                    (low(general.rcx), u64::from(low(general.rdx)) << 32 | u64::from(low(general.rax)));
                if self.write_msr(engine, index, value) { Emulated::Done } else { Emulated::Refused }
            }
            Mnemonic::Xsetbv => {
                let general = &engine.context().general;
                let value = u64::from(low(general.rdx)) << 32 | u64::from(low(general.rax));
                let allowed = low(general.rcx) == 0 && self.control.cr4 & CR4_OSXSAVE != 0;
                if allowed && engine.set_xcr0(value).is_ok() { Emulated::Done } else { Emulated::Refused }
            }
            Mnemonic::Clts => {
                self.set_task_switched(engine, false);
                Emulated::Done
            }
            // As Xen: not mapped to event masking, since POPF could not undo it.
            Mnemonic::Cli | Mnemonic::Sti | Mnemonic::Wbinvd | Mnemonic::Invd => Emulated::Done,
            Mnemonic::Hlt => {
                // As Xen: the same as SCHEDOP_block.
                let mask = self.info() + shared_info::UPCALL_MASK;
                if self.domain.memory.swap_byte(mask, 0).is_err() {
                    return Ok(Emulated::Refused);
                }
                let action = if self.upcall_is_due() { Action::Continue } else { Action::Block };
                Emulated::Then(action)
            }
            Mnemonic::In => {
                let general = engine.context().general;
                let Some(port) = port(instruction, &general, 1) else { return Ok(Emulated::Refused) };
                // Nothing is there. A timer that counts nothing is found absent at once; one of all ones is waited for.
                let value = if matches!(port, 0x40..=0x43 | 0x61) { 0 } else { u64::from(u32::MAX) };
                let general = &mut engine.context().general;
                general.rax = match instruction.op0_register() {
                    Register::AL => general.rax & !0xff | value & 0xff,
                    Register::AX => general.rax & !0xffff | value & 0xffff,
                    _ => value,
                };
                Emulated::Done
            }
            Mnemonic::Out => Emulated::Done,
            Mnemonic::Mov => self.move_special(engine, instruction)?,
            _ => Emulated::Refused,
        })
    }

    pub(crate) fn set_task_switched(&mut self, engine: &mut dyn Engine, set: bool) {
        self.control.task_switched = set;
        engine.set_task_switched(set);
    }

    /// MOV from and to control and debug registers.
    fn move_special(&mut self, engine: &mut dyn Engine, instruction: &Instruction) -> Result<Emulated> {
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        match instruction.code() {
            Code::Mov_r64_cr => {
                let value = match from {
                    Register::CR0 if self.control.task_switched => CR0 | CR0_TS,
                    Register::CR0 => CR0,
                    Register::CR2 => self.control.cr2,
                    Register::CR3 => engine.kernel_root().0,
                    Register::CR4 => self.control.cr4,
                    _ => return Ok(Emulated::Refused),
                };
                set_register(&mut engine.context().general, to, value);
            }
            Code::Mov_cr_r64 => {
                let value = register(&engine.context().general, from);
                match to {
                    Register::CR0 => self.set_task_switched(engine, value & CR0_TS != 0),
                    Register::CR2 => self.control.cr2 = value,
                    Register::CR4 => self.control.cr4 = value,
                    // Roots are changed by hypercall.
                    _ => return Ok(Emulated::Refused),
                }
            }
            Code::Mov_r64_dr => {
                let Some(number) = debug_number(from) else { return Ok(Emulated::Refused) };
                let value = engine.debug_register(number);
                set_register(&mut engine.context().general, to, value);
            }
            Code::Mov_dr_r64 => {
                let Some(number) = debug_number(to) else { return Ok(Emulated::Refused) };
                let value = register(&engine.context().general, from);
                if engine.set_debug_register(number, value).is_err() {
                    return Ok(Emulated::Refused);
                }
            }
            _ => return Ok(Emulated::Refused),
        }
        Ok(Emulated::Done)
    }

    /// Whether the guest can take a fault. Before it can, registers that do not exist read as 0.
    fn takes_faults(&self) -> bool {
        self.traps.get(usize::from(GENERAL_PROTECTION)).is_some_and(|trap| trap.address != 0)
    }

    fn read_msr(&mut self, engine: &mut dyn Engine, index: u32) -> Result<Option<u64>> {
        Ok(Some(match index {
            msr::FS_BASE => engine.context().fs_base,
            msr::GS_BASE => engine.context().gs_base,
            msr::KERNEL_GS_BASE => engine.context().other_gs_base,
            msr::TSC => engine.time_stamp()?,
            msr::EFER => EFER,
            msr::PAT => PAT,
            msr::APIC_BASE if self.index == 0 => APIC_BASE | APIC_BASE_BSP,
            msr::APIC_BASE => APIC_BASE,
            msr::MISC_ENABLE | msr::UCODE_REV => 0,
            _ if self.takes_faults() => return Ok(None),
            _ => 0,
        }))
    }

    fn write_msr(&self, engine: &mut dyn Engine, index: u32, value: u64) -> bool {
        let context = engine.context();
        match index {
            msr::FS_BASE | msr::GS_BASE | msr::KERNEL_GS_BASE if !is_canonical(value) => false,
            msr::FS_BASE => {
                context.fs_base = value;
                true
            }
            msr::GS_BASE => {
                context.gs_base = value;
                true
            }
            msr::KERNEL_GS_BASE => {
                context.other_gs_base = value;
                true
            }
            msr::EFER => value == EFER,
            msr::PAT => value == PAT,
            msr::MISC_ENABLE | msr::UCODE_REV | msr::APIC_BASE => true,
            _ => !self.takes_faults(),
        }
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}

/// The port of IN or OUT, whose operand `operand` is an immediate byte or DX.
fn port(instruction: &Instruction, general: &GeneralRegisters, operand: u32) -> Option<u64> {
    match instruction.op_kind(operand) {
        OpKind::Immediate8 => Some(instruction.immediate8().into()),
        OpKind::Register => Some(general.rdx & 0xffff),
        _ => None,
    }
}

fn debug_number(register: Register) -> Option<u8> {
    Some(match register {
        Register::DR0 => 0,
        Register::DR1 => 1,
        Register::DR2 => 2,
        Register::DR3 => 3,
        Register::DR4 | Register::DR6 => 6,
        Register::DR5 | Register::DR7 => 7,
        _ => return None,
    })
}

/// The place of a 64-bit register.
pub(crate) fn place(general: &mut GeneralRegisters, register: Register) -> Option<&mut u64> {
    Some(match register {
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

fn register(general: &GeneralRegisters, register: Register) -> u64 {
    let mut copy = *general;
    place(&mut copy, register).map_or(0, |place| *place)
}

fn set_register(general: &mut GeneralRegisters, register: Register, value: u64) {
    if let Some(place) = place(general, register) {
        *place = value;
    }
}

#[cfg(test)]
mod tests;
