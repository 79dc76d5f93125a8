//! Control, debug and model-specific registers, CPUID, HLT, cache and TLB control, XSAVE, hypercalls.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{Activity, RAX, RBX, RCX, RDX, RSI, cr0, cr4, efer};
use crate::translate::exception::{Exception, dr6, vector};
use crate::translate::flags::bits;
use crate::translate::segment::{index, low8, low16, low32};
use crate::vcpu::Hypercall;

impl Machine<'_> {
    /// #GP(0) unless at privilege level 0.
    pub(crate) fn require_cpl0(&mut self) -> Flow {
        if self.mode.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    fn set_cr0(&mut self, value: u64) -> Flow {
        let (old, value) = (self.cpu.cr0, value & cr0::ALL | cr0::ET);
        let pae_missing = self.cpu.efer & efer::LME != 0
            && old & cr0::PG == 0
            && value & cr0::PG != 0
            && (self.cpu.cr4 & cr4::PAE == 0
                || self.cpu.cs().has(crate::translate::segment::attribute::LONG));
        let leaves_long = value & cr0::PG == 0 && self.cpu.long_mode() && self.is_64();
        let bad = value & (cr0::PG | cr0::PE) == cr0::PG || value & (cr0::NW | cr0::CD) == cr0::NW;
        if bad || pae_missing || leaves_long {
            return Err(self.gp(0));
        }
        if (old ^ value) & cr0::PG != 0 && self.cpu.efer & efer::LME != 0 {
            let on = value & cr0::PG != 0;
            self.cpu.efer = if on { self.cpu.efer | efer::LMA } else { self.cpu.efer & !efer::LMA };
        }
        if value & cr0::PG != 0 && old & cr0::PG == 0 && !self.cpu.long_mode() && self.cpu.cr4 & cr4::PAE != 0
        {
            self.check_page_directory_pointers(self.cpu.cr3)?;
        }
        self.cpu.cr0 = value;
        if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// PAE paging loads four entries with CR3; reserved bits in a present one are #GP (Intel SDM 3A 5.4.1).
    fn check_page_directory_pointers(&mut self, cr3: u64) -> Flow {
        let table = cr3 & 0xffff_ffe0;
        for entry in 0..4 {
            let value = self.map().load::<u64>(table + entry * 8).unwrap_or(0);
            if value & 1 != 0 && value & 0xfff0_0000_0000_01e6 != 0 {
                return Err(self.gp(0));
            }
        }
        Ok(())
    }

    fn set_cr3(&mut self, value: u64) -> Flow {
        let beyond = !((1 << 46) - 1);
        if self.cpu.long_mode() {
            if value & beyond != 0 {
                return Err(self.gp(0));
            }
        } else if self.cpu.cr0 & cr0::PG != 0 && self.cpu.cr4 & cr4::PAE != 0 {
            self.check_page_directory_pointers(value)?;
        }
        self.cpu.cr3 = value;
        self.tlb.flush_local();
        self.end_block();
        Ok(())
    }

    fn set_cr4(&mut self, value: u64) -> Flow {
        let old = self.cpu.cr4;
        let pae_off_in_long = self.cpu.long_mode() && value & cr4::PAE == 0;
        if value & !self.cr4_allowed != 0 || pae_off_in_long {
            return Err(self.gp(0));
        }
        let changes_paging = (old ^ value) & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP) != 0;
        if changes_paging && value & cr4::PAE != 0 && self.cpu.cr0 & cr0::PG != 0 && !self.cpu.long_mode() {
            self.check_page_directory_pointers(self.cpu.cr3)?;
        }
        self.cpu.cr4 = value;
        if changes_paging {
            self.tlb.flush_all();
        }
        self.update_mode();
        Ok(())
    }
}

fn read_control(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.require_cpl0()?;
    let value = match instruction.op1_register() {
        Register::CR0 => m.cpu.cr0,
        Register::CR2 => m.cpu.cr2,
        Register::CR3 => m.cpu.cr3,
        Register::CR4 => m.cpu.cr4,
        Register::CR8 => m.cr8(),
        _ => return Err(m.ud()),
    };
    write_wide(m, register_slot(instruction.op0_register()), value);
    Ok(())
}

/// Writes a register whose width is that of the mode.
fn write_wide(m: &mut Machine<'_>, register: u8, value: u64) {
    if m.is_64() {
        m.cpu.set::<u64>(register, value);
    } else {
        m.cpu.set::<u32>(register, value);
    }
}

fn read_wide(m: &Machine<'_>, register: u8) -> u64 {
    if m.is_64() { m.cpu.get::<u64>(register) } else { m.cpu.get::<u32>(register) }
}

fn write_control(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.require_cpl0()?;
    m.serialize();
    let value = read_wide(m, register_slot(instruction.op1_register()));
    match instruction.op0_register() {
        Register::CR0 if value >> 32 != 0 => Err(m.gp(0)),
        Register::CR0 => m.set_cr0(value),
        Register::CR2 => {
            m.cpu.cr2 = value;
            Ok(())
        }
        Register::CR3 => m.set_cr3(value),
        Register::CR4 => m.set_cr4(value),
        Register::CR8 if value > 15 => Err(m.gp(0)),
        Register::CR8 => {
            m.set_cr8(low8(value));
            Ok(())
        }
        _ => Err(m.ud()),
    }
}

/// LMSW: sets the low four bits of CR0, but does not clear PE.
fn lmsw(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_cpl0()?;
    let value = word_operand(m, op)?;
    let low = value & 0xf | m.cpu.cr0 & cr0::PE;
    m.set_cr0(m.cpu.cr0 & !0xf | low)
}

fn word_operand(m: &mut Machine<'_>, op: &Op) -> Flow<u64> {
    let instruction = m.rare(op);
    if instruction.op0_kind() == OpKind::Register {
        return Ok(m.cpu.get::<u16>(register_slot(instruction.op0_register())));
    }
    let place = m.place(op, 2, false)?;
    Ok(u64::from(m.load::<u16>(place)?))
}

fn smsw(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    if m.cpu.cr4 & cr4::UMIP != 0 && m.mode.cpl != 0 {
        return Err(m.gp(0));
    }
    let value = m.cpu.cr0;
    if instruction.op0_kind() == OpKind::Register {
        let register = register_slot(instruction.op0_register());
        match operand_bytes(&instruction, 0) {
            2 => m.cpu.set::<u16>(register, value),
            4 => m.cpu.set::<u32>(register, value),
            _ => m.cpu.set::<u64>(register, value),
        }
        return Ok(());
    }
    let place = m.place(op, 2, true)?;
    m.store(place, low16(value))
}

fn clts(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    m.cpu.cr0 &= !cr0::TS;
    m.update_mode();
    Ok(())
}

/// DR7.GD: any access is #DB (Intel SDM 3B 19.2.4).
fn check_debug_access(m: &mut Machine<'_>, register: usize) -> Flow {
    m.require_cpl0()?;
    if m.cpu.cr4 & cr4::DE != 0 && (register == 4 || register == 5) {
        return Err(m.ud());
    }
    if m.cpu.dr7 & 1 << 13 != 0 {
        return Err(m.raise(Exception::debug(dr6::BD)));
    }
    Ok(())
}

fn debug_number(register: Register) -> usize {
    register.number()
}

fn read_debug(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let number = debug_number(instruction.op1_register());
    check_debug_access(m, number)?;
    let value = match number {
        4 | 6 => m.cpu.dr6,
        5 | 7 => m.cpu.dr7,
        number => m.cpu.dr.get(number).copied().unwrap_or(0),
    };
    write_wide(m, register_slot(instruction.op0_register()), value);
    Ok(())
}

fn write_debug(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let number = debug_number(instruction.op0_register());
    check_debug_access(m, number)?;
    let value = read_wide(m, register_slot(instruction.op1_register()));
    if number >= 4 && value >> 32 != 0 {
        return Err(m.gp(0));
    }
    match number {
        4 | 6 => m.cpu.dr6 = value & 0xe00f | 0xffff_0ff0,
        5 | 7 => m.cpu.dr7 = value & 0xffff_23ff | 0x400,
        number => {
            if let Some(register) = m.cpu.dr.get_mut(number) {
                *register = value;
            }
        }
    }
    m.serialize();
    m.update_debug();
    Ok(())
}

fn rdmsr(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    let value = m.guest_rdmsr(low32(m.cpu.r(RCX)))?;
    m.cpu.set_r(RAX, u64::from(low32(value)));
    m.cpu.set_r(RDX, value >> 32);
    Ok(())
}

fn wrmsr(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    let value = m.cpu.r(RDX) << 32 | u64::from(low32(m.cpu.r(RAX)));
    m.guest_wrmsr(low32(m.cpu.r(RCX)), value)?;
    m.serialize();
    Ok(())
}

fn cpuid(m: &mut Machine<'_>, _: &Op) -> Flow {
    let (leaf, subleaf) = (low32(m.cpu.r(RAX)), low32(m.cpu.r(RCX)));
    let [a, b, c, d] = if m.asks_native && m.runs_program() {
        super::super::cpuid::without_vectors(leaf, subleaf, m.guest_cpuid(leaf, subleaf))
    } else {
        m.guest_cpuid(leaf, subleaf)
    };
    m.cpu.set_r(RAX, u64::from(a));
    m.cpu.set_r(RBX, u64::from(b));
    m.cpu.set_r(RCX, u64::from(c));
    m.cpu.set_r(RDX, u64::from(d));
    m.serialize();
    Ok(())
}

fn rdtsc(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    if m.cpu.cr4 & cr4::TSD != 0 && m.mode.cpl != 0 {
        return Err(m.gp(0));
    }
    let tsc = m.guest_tsc();
    m.cpu.set_r(RAX, u64::from(low32(tsc)));
    m.cpu.set_r(RDX, tsc >> 32);
    if instruction.mnemonic() == Mnemonic::Rdtscp {
        let aux = m.cpu.msr.tsc_aux;
        m.cpu.set_r(RCX, u64::from(low32(aux)));
    }
    Ok(())
}

/// There are no performance counters.
fn rdpmc(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.gp(0))
}

fn hlt(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    m.cpu.activity = Activity::Halted;
    m.counts.halt += 1;
    m.urgent = true;
    Ok(())
}

fn invlpg(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.require_cpl0()?;
    let offset = m.effective_address(op);
    // No limit and no rights are checked.
    let segment = op.segment();
    let base = if m.is_64() && segment < index::FS { 0 } else { m.cpu.segment(segment).base };
    let va = base.wrapping_add(offset);
    let va = if m.is_64() { va } else { va & 0xffff_ffff };
    m.tlb.flush_page(va);
    m.serialize();
    Ok(())
}

/// INVD, WBINVD: there is no cache to speak of.
fn cache_control(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    m.serialize();
    Ok(())
}

/// STAC, CLAC.
fn set_alignment_check(m: &mut Machine<'_>, op: &Op) -> Flow {
    let on = m.rare(op).mnemonic() == Mnemonic::Stac;
    if m.mode.cpl != 0 {
        return Err(m.ud());
    }
    m.cpu.flags.set_control(bits::AC, on);
    m.update_reach();
    Ok(())
}

fn xgetbv(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(m.ud());
    }
    if low32(m.cpu.r(RCX)) != 0 {
        return Err(m.gp(0));
    }
    let value = m.cpu.xcr0;
    m.cpu.set_r(RAX, u64::from(low32(value)));
    m.cpu.set_r(RDX, value >> 32);
    Ok(())
}

fn xsetbv(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(m.ud());
    }
    m.require_cpl0()?;
    let value = m.cpu.r(RDX) << 32 | u64::from(low32(m.cpu.r(RAX)));
    if low32(m.cpu.r(RCX)) != 0 || value & 1 == 0 || value & !m.xcr0_allowed() != 0 {
        return Err(m.gp(0));
    }
    m.cpu.xcr0 = value;
    m.end_block();
    Ok(())
}

/// RDFSBASE and the like.
fn segment_base(m: &mut Machine<'_>, op: &Op) -> Flow {
    use Mnemonic as M;
    let instruction = m.rare(op);
    if m.cpu.cr4 & cr4::FSGSBASE == 0 || !m.is_64() {
        return Err(m.ud());
    }
    let mnemonic = instruction.mnemonic();
    let segment = if matches!(mnemonic, M::Rdfsbase | M::Wrfsbase) { index::FS } else { index::GS };
    let register = register_slot(instruction.op0_register());
    let wide = instruction.op0_register().size() == 8;
    if matches!(mnemonic, M::Rdfsbase | M::Rdgsbase) {
        let base = m.cpu.segment(segment).base;
        if wide {
            m.cpu.set::<u64>(register, base)
        } else {
            m.cpu.set::<u32>(register, base)
        }
        return Ok(());
    }
    let base = if wide { m.cpu.get::<u64>(register) } else { m.cpu.get::<u32>(register) };
    if !m.is_canonical(base) {
        return Err(m.gp(0));
    }
    m.cpu.segment_mut(segment).base = base;
    Ok(())
}

/// VMCALL and VMMCALL.
fn hypercall(m: &mut Machine<'_>, _: &Op) -> Flow {
    let long_mode = m.is_64();
    let argument = |register| if long_mode { m.cpu.r(register) } else { u64::from(low32(m.cpu.r(register))) };
    let nr = argument(RAX);
    let args = [argument(RBX), argument(RCX), argument(RDX), argument(RSI)];
    if !m.shared.passed_on.hypercall(nr) {
        return Err(m.ud());
    }
    if m.mode.cpl != 0 {
        // As KVM answers programs: -KVM_EPERM.
        write_wide(m, RAX, (-1_i64).cast_unsigned());
        return Ok(());
    }
    m.counts.hypercall += 1;
    m.end_block();
    let call = Hypercall::new(nr, args, long_mode);
    let result = m.leave_guest(|io| io.hypercall(&call));
    write_wide(m, RAX, result);
    Ok(())
}

/// WAIT: #NM if MP and TS are set, then whatever is pending in the x87.
fn check_wait(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(m.raise(Exception::new(vector::NM)));
    }
    m.check_x87_pending()
}

/// RSM outside of system-management mode.
fn invalid(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.ud())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Mnemonic as M;
    let register = |n: u32| match instruction.op_kind(n) {
        OpKind::Register => instruction.op_register(n),
        _ => Register::None,
    };
    Some(match instruction.mnemonic() {
        M::Mov if register(1).is_cr() => (read_control, false),
        M::Mov if register(0).is_cr() => (write_control, true),
        M::Mov if register(1).is_dr() => (read_debug, false),
        M::Mov if register(0).is_dr() => (write_debug, true),
        M::Lmsw => (lmsw, true),
        M::Smsw => (smsw, false),
        M::Clts => (clts, true),
        M::Rdmsr => (rdmsr, false),
        M::Wrmsr => (wrmsr, true),
        M::Cpuid => (cpuid, true),
        M::Rdtsc | M::Rdtscp => (rdtsc, false),
        M::Rdpmc => (rdpmc, true),
        M::Hlt => (hlt, true),
        M::Invlpg => (invlpg, true),
        M::Invd | M::Wbinvd => (cache_control, true),
        M::Stac | M::Clac => (set_alignment_check, false),
        M::Xgetbv => (xgetbv, false),
        M::Xsetbv => (xsetbv, true),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => (segment_base, false),
        M::Vmcall | M::Vmmcall => (hypercall, true),
        M::Wait => (check_wait, false),
        M::Rsm | M::Vmlaunch | M::Vmresume | M::Vmxoff | M::Ud0 | M::Ud1 | M::Ud2 => (invalid, true),
        _ => return None,
    })
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
