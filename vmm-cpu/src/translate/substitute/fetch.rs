//! Which instruction it is, what it needs of the vCPU's state, and whose affair it is.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use super::Substitute;
use crate::translate::block::DECODING;
use crate::translate::core::{Core, Machine, Place, Reason};
use crate::translate::memory::{Access, PAGE, PAGE_MASK};
use crate::translate::ops::{self, Op};

/// Longest instruction in bytes (Intel SDM 2A 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// MSRs by number (Intel SDM 4, AMD APM 2 appendix A).
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];

/// An instruction as it was found in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetched {
    pub(super) instruction: Instruction,
    bytes: [u8; MAX_INSTRUCTION],
}

impl Substitute {
    /// Fetches the instruction at RIP.
    ///
    /// # Errors
    /// Where there is none that software may execute, the reason.
    pub(crate) fn fetch(&mut self) -> Result<Fetched, String> {
        let core = &mut self.core;
        core.signals.enter_guest();
        core.see_epoch();
        let fetched = fetch(core);
        core.signals.leave_guest();
        core.reason = Reason::None;
        let fetched = fetched?;
        match fetched.engines_own() {
            Some(why) => Err(why.to_owned()),
            None => Ok(fetched),
        }
    }
}

fn fetch(core: &mut Core) -> Result<Fetched, String> {
    let code_bits = core.mode.code_bits;
    let start = if code_bits == 64 {
        core.cpu.rip
    } else {
        core.cpu.cs().base.wrapping_add(core.cpu.rip) & 0xffff_ffff
    };
    let mut bytes = [0; MAX_INSTRUCTION];
    let mut read = 0;
    while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
        let va = start.wrapping_add(read as u64) & if code_bits == 64 { u64::MAX } else { 0xffff_ffff };
        let here = usize::try_from(PAGE - (va & !PAGE_MASK)).unwrap_or(1).min(rest.len());
        let Some(piece) = rest.get_mut(..here) else { break };
        let Ok(page) = core.translate(Place::data(va), Access::Execute) else { break };
        if !core.map().read(page.gpa | va & !PAGE_MASK, piece) {
            break;
        }
        read += here;
    }
    if read == 0 {
        return Err("its bytes cannot be fetched".to_owned());
    }
    let code = bytes.get(..read).unwrap_or_default();
    let instruction = Decoder::with_ip(code_bits, code, 0, DECODING).decode();
    let Some(length) = Some(instruction.len()).filter(|_| !instruction.is_invalid()) else {
        return Err("its bytes are no instruction".to_owned());
    };
    if code_bits != 64 && core.cpu.rip.saturating_add(length as u64 - 1) > u64::from(core.cpu.cs().limit) {
        return Err("it ends behind the code segment".to_owned());
    }
    // Whose processor the guest believes to have decides about a few, with 16-bit branches and far pointers among them.
    let other = Decoder::with_ip(code_bits, code, 0, DecoderOptions::NO_WBNOINVD).decode();
    if &core.cpuid.vendor() != b"AuthenticAMD" && (other.code(), other.len()) != (instruction.code(), length)
    {
        return Err("Intel's processors decode it in another way".to_owned());
    }
    for byte in bytes.iter_mut().skip(length) {
        *byte = 0;
    }
    Ok(Fetched { instruction, bytes })
}

impl Fetched {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.instruction.len()).unwrap_or_default()
    }

    /// Its mnemonic, as text.
    pub(crate) fn name(&self) -> String {
        format!("{:?}", self.instruction.mnemonic()).to_lowercase()
    }

    pub(super) fn lower(&self, m: &mut Machine<'_>) -> Op {
        let code_bits = m.mode.code_bits;
        ops::lower(m, &self.instruction, self.bytes(), 0, code_bits).op
    }

    /// Whether it has operands, explicit or implicit, in x87, MMX or vector registers, or needs any of their state.
    pub(crate) fn needs_vectors(&self) -> bool {
        use CpuidFeature as F;
        let of_state = self.instruction.cpuid_features().iter().any(|feature| {
            !matches!(
                feature,
                F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::CMOV
                    | F::CMPXCHG16B
                    | F::CX8
                    | F::MSR
                    | F::SMAP
                    | F::FSGSBASE
                    | F::SEP
                    | F::SYSCALL
                    | F::MULTIBYTENOP
                    | F::POPCNT
                    | F::MOVBE
                    | F::BMI1
                    | F::BMI2
                    | F::LZCNT
                    | F::ADX
            )
        });
        of_state && self.instruction.mnemonic() != Mnemonic::Crc32
    }

    /// The MSRs that it reads.
    pub(crate) fn msrs(&self) -> &'static [u32] {
        match self.instruction.mnemonic() {
            Mnemonic::Syscall => &[STAR, LSTAR, CSTAR, FMASK],
            Mnemonic::Sysret | Mnemonic::Sysretq => &[STAR],
            Mnemonic::Sysenter | Mnemonic::Sysexit | Mnemonic::Sysexitq => &SYSENTER,
            Mnemonic::Swapgs => &[KERNEL_GS_BASE],
            _ => &[],
        }
    }

    /// The MSRs that it writes, other than those that are bases of segments.
    pub(crate) fn written_msrs(&self) -> &'static [u32] {
        if self.instruction.mnemonic() == Mnemonic::Swapgs { &[KERNEL_GS_BASE] } else { &[] }
    }

    /// Why it is the engine's own affair, if it is.
    fn engines_own(&self) -> Option<&'static str> {
        use Mnemonic as M;
        let instruction = &self.instruction;
        let writes = |register: Register| instruction.op0_register() == register;
        Some(match instruction.mnemonic() {
            M::Invlpg | M::Invpcid | M::Invlpga | M::Invlpgb | M::Tlbsync => {
                "it invalidates translations that the engine has"
            }
            M::Mov if instruction.op0_register().is_cr() && !writes(Register::CR2) => {
                "it writes a control register, which the engine acts on"
            }
            M::Lmsw | M::Xsetbv => "it writes a control register, which the engine acts on",
            M::Rdmsr | M::Wrmsr | M::Rdmsrlist | M::Wrmsrlist | M::Wrmsrns => {
                "the engine has the model-specific registers"
            }
            M::Rdtsc | M::Rdtscp | M::Rdpmc => "the engine has the clock",
            M::Cpuid => "the engine answers CPUID",
            M::Hlt
            | M::Mwait
            | M::Mwaitx
            | M::Monitor
            | M::Monitorx
            | M::Umwait
            | M::Umonitor
            | M::Tpause => "the engine waits",
            M::Vmcall | M::Vmmcall => "the engine takes hypercalls",
            M::Rsm => "the engine has system-management mode",
            _ if instruction.flow_control() == FlowControl::XbeginXabortXend => "it is of a transaction",
            _ => return None,
        })
    }

    /// Whether tier 0 takes it for undefined because it belongs to an extension that tier 0 does not have, whatever the
    /// guest's processor has.
    pub(super) fn is_beyond_tier_0(&self) -> bool {
        use CpuidFeature as F;
        let code = self.instruction.code();
        if matches!(
            code,
            Code::Ud0 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64 | Code::Ud2
        ) || matches!(code, Code::Ud1_r16_rm16 | Code::Ud1_r32_rm32 | Code::Ud1_r64_rm64)
        {
            return false;
        }
        !self.instruction.cpuid_features().iter().all(|feature| {
            matches!(
                feature,
                F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::ADX
                    | F::AES
                    | F::BMI1
                    | F::BMI2
                    | F::CLFLUSHOPT
                    | F::CLFSH
                    | F::CMOV
                    | F::CMPXCHG16B
                    | F::CX8
                    | F::FPU
                    | F::FPU287
                    | F::FPU387
                    | F::FSGSBASE
                    | F::FXSR
                    | F::LZCNT
                    | F::MMX
                    | F::MOVBE
                    | F::MULTIBYTENOP
                    | F::PAUSE
                    | F::PCLMULQDQ
                    | F::POPCNT
                    | F::PREFETCHW
                    | F::SEP
                    | F::SHA
                    | F::SMAP
                    | F::SSE
                    | F::SSE2
                    | F::SSE3
                    | F::SSE4_1
                    | F::SSE4_2
                    | F::SSSE3
                    | F::SYSCALL
            )
        })
    }

    /// Whether it accesses memory with the bus locked.
    pub(super) fn locks(&self) -> bool {
        let instruction = &self.instruction;
        let of_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        of_memory && (instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg)
    }

    /// Bytes of the memory operand, at least one.
    pub(super) fn operand_bytes(&self) -> usize {
        self.instruction.memory_size().size().max(1)
    }
}
