//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS.
//!
//! Where the vendors differ, this is AMD's processor, which is what CPUID says (AMD64 APM 3): SYSCALL works from
//! compatibility and legacy mode, and SYSRET to an address that is not canonical faults at privilege level 3, when the
//! instruction there is fetched. TF as SYSCALL and SYSRET leave it decides about a single-step trap. SYSENTER and
//! SYSEXIT are undefined in long mode, compatibility mode included.

use iced_x86::{Code, Instruction};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{R11, RCX, RDX, RSP, efer};
use crate::translate::descriptor::is_null;
use crate::translate::exception::{Event, Exception, dr6};
use crate::translate::flags::bits;
use crate::translate::ops::op::{Handler, Op};
use crate::translate::segment::{SegmentRegister, index, low16};

/// Attributes of the flat segments that these instructions load, privilege level aside: code and data, both with 4-KiB
/// granularity.
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;

fn flat(selector: u16, attributes: u16, cpl: u8) -> SegmentRegister {
    let attributes = attributes | u16::from(cpl) << 5;
    SegmentRegister { base: 0, limit: u32::MAX, selector, attributes }
}

impl Machine<'_> {
    /// Continues in flat segments with the given selectors, RPL replaced by the new privilege level.
    fn set_flat(&mut self, cs: u16, ss: u16, cpl: u8, is_64: bool, rip: u64) {
        let rpl = u16::from(cpl);
        let code = if is_64 { CODE_64 } else { CODE_32 };
        *self.cpu.segment_mut(index::CS) = flat(cs & !3 | rpl, code, cpl);
        *self.cpu.segment_mut(index::SS) = flat(ss & !3 | rpl, DATA, cpl);
        self.cpu.rip = rip;
        self.update_mode();
    }
}

fn syscall(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.efer & efer::SCE == 0 || !m.cpu.protected() || m.cpu.virtual_8086() {
        return Err(m.ud());
    }
    let (msr, rip, flags) = (m.cpu.msr, m.cpu.rip, m.cpu.flags.get());
    let cs = low16(msr.star >> 32);
    m.cpu.set_r(RCX, rip);
    if m.cpu.long_mode() {
        m.cpu.set_r(R11, flags & !bits::RF);
        m.cpu.flags.set(flags & !(msr.fmask | bits::RF));
        let target = if m.is_64() { msr.lstar } else { msr.cstar };
        m.trap_pending &= m.cpu.flags.control(bits::TF);
        m.set_flat(cs, cs.wrapping_add(8), 0, true, target);
    } else {
        m.cpu.flags.set(flags & !(bits::IF | bits::RF));
        m.set_flat(cs, cs.wrapping_add(8), 0, false, msr.star & 0xffff_ffff);
    }
    Ok(())
}

fn sysret(m: &mut Machine<'_>, op: &Op) -> Flow {
    if m.cpu.efer & efer::SCE == 0 || !m.cpu.protected() {
        return Err(m.ud());
    }
    m.require_cpl0()?;
    let is_64 = m.rare(op).code() == Code::Sysretq;
    let base = low16(m.cpu.msr.star >> 48);
    let flags =
        if m.cpu.long_mode() { m.cpu.r(R11) & !(bits::RF | bits::VM) } else { m.cpu.flags.get() | bits::IF };
    m.cpu.flags.set(flags);
    let rip = m.cpu.r(RCX);
    if is_64 {
        m.set_flat(base.wrapping_add(16), base.wrapping_add(8), 3, true, rip);
    } else {
        m.set_flat(base, base.wrapping_add(8), 3, false, rip & 0xffff_ffff);
    }
    // Where another instruction has to be started with TF, this one traps itself.
    if m.cpu.flags.control(bits::TF) {
        return m.take(Event::Exception(Exception::debug(dr6::BS)));
    }
    m.trap_pending = false;
    Ok(())
}

fn sysenter(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.cpu.long_mode() {
        return Err(m.ud());
    }
    let cs = low16(m.cpu.msr.sysenter_cs);
    if !m.cpu.protected() || is_null(cs) {
        return Err(m.gp(0));
    }
    m.cpu.flags.set_control(bits::VM | bits::IF | bits::RF, false);
    let (rsp, rip) = (m.cpu.msr.sysenter_esp & 0xffff_ffff, m.cpu.msr.sysenter_eip & 0xffff_ffff);
    m.cpu.set_r(RSP, rsp);
    m.set_flat(cs, cs.wrapping_add(8), 0, false, rip);
    Ok(())
}

fn sysexit(m: &mut Machine<'_>, _: &Op) -> Flow {
    if m.mode.cpl != 0 {
        return Err(m.gp(0));
    }
    if m.cpu.long_mode() {
        return Err(m.ud());
    }
    let cs = low16(m.cpu.msr.sysenter_cs);
    if !m.cpu.protected() || is_null(cs) {
        return Err(m.gp(0));
    }
    let (rsp, rip) = (m.cpu.r(RCX) & 0xffff_ffff, m.cpu.r(RDX) & 0xffff_ffff);
    m.cpu.set_r(RSP, rsp);
    m.set_flat(cs.wrapping_add(16), cs.wrapping_add(24), 3, false, rip);
    Ok(())
}

fn swapgs(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.require_cpl0()?;
    let cpu = &mut m.cpu;
    let gs = cpu.segment(index::GS).base;
    cpu.segment_mut(index::GS).base = cpu.msr.kernel_gs_base;
    cpu.msr.kernel_gs_base = gs;
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    Some(match instruction.code() {
        Code::Syscall => (syscall as Handler, true),
        Code::Sysretd | Code::Sysretq => (sysret, true),
        Code::Sysenter => (sysenter, true),
        Code::Sysexitd | Code::Sysexitq => (sysexit, true),
        Code::Swapgs => (swapgs, false),
        _ => return None,
    })
}
