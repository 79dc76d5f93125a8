//! Single instructions on the host's processor: the only unsafe code of these tests.

#![allow(unsafe_code, reason = "generated code runs from pages of its own")]

use std::ptr::{NonNull, null_mut};

use iced_x86::code_asm::{
    CodeAssembler, mm1, mm2, qword_ptr, rax, rcx, rdi, rdx, rsi, xmm0, xmm1, xmm2, xmmword_ptr,
};
use iced_x86::{Code, CpuidFeature, Encoder, Instruction, OpCodeOperandKind as Operand, OpKind, Register};

/// What an instruction under test finds in the registers and leaves there.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// The implicit operand.
    pub(super) xmm0: u128,
    /// The first and the second operand, where they are XMM registers.
    pub(super) xmm: [u128; 2],
    /// The operand in memory, wherever it stands.
    pub(super) memory: u128,
    /// The first and the second operand, where they are MM registers.
    pub(super) mm: [u64; 2],
    /// The first, the second and the third operand, where they are general registers: RAX, RCX, RSI.
    pub(super) general: [u64; 3],
    /// The implicit operand.
    pub(super) rdx: u64,
    /// Status flags.
    pub(super) rflags: u64,
}

const XMM0: usize = 0;
const XMM: usize = 16;
const MEMORY: u8 = 48;
const MM: usize = 64;
const GENERAL: usize = 80;
const RDX: usize = 104;
const RFLAGS: usize = 112;

/// An encoding in one of its forms, compiled once for each of its immediates.
pub(super) struct Subject {
    pages: NonNull<u8>,
    length: usize,
    entries: Vec<usize>,
}

impl Subject {
    /// The encoding with its operands in registers, or with the one that may be in memory there. `None` if there is
    /// no such form.
    pub(super) fn compile(code: Code, in_memory: bool) -> Option<Self> {
        let operands = code.op_code().op_kinds();
        let exists =
            if in_memory { operands.iter().any(may_be_in_memory) } else { !operands.contains(&Operand::mem) };
        if !exists {
            return None;
        }
        let immediates = if operands.contains(&Operand::imm8) { 0..=u8::MAX } else { 0..=0 };
        let (mut bytes, mut entries) = (Vec::new(), Vec::new());
        let (before, after) = (prologue(), epilogue());
        for immediate in immediates {
            entries.push(bytes.len());
            bytes.extend(&before);
            bytes.extend(encode(&instruction(code, in_memory, immediate)));
            bytes.extend(&after);
        }
        let pages = map_executable(&bytes);
        Some(Self { pages, length: bytes.len(), entries })
    }

    /// Executes the instruction with an immediate, which counts for nothing if it has none.
    pub(super) fn run(&self, immediate: u8, state: &mut State) {
        let entry = self.entries[usize::from(immediate) % self.entries.len()];
        // SAFETY: `entry` is an offset in the mapping.
        let entry = unsafe { self.pages.as_ptr().add(entry) };
        // SAFETY: at `entry` is a whole function of this type; the mapping is executable and lives as long as `self`.
        let function = unsafe { std::mem::transmute::<*mut u8, extern "sysv64" fn(*mut State)>(entry) };
        // The function reads and writes `state` and registers that a callee may change, see `instruction`.
        function(state);
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nothing executes it any more.
        let result = unsafe { libc::munmap(self.pages.as_ptr().cast(), self.length) };
        assert_eq!(result, 0);
    }
}

/// Pages with `bytes`, no longer writable.
fn map_executable(bytes: &[u8]) -> NonNull<u8> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let pages = unsafe { libc::mmap(null_mut(), bytes.len(), access, kind, -1, 0) };
    assert_ne!(pages, libc::MAP_FAILED);
    let pages = NonNull::new(pages.cast::<u8>()).unwrap();
    // SAFETY: the mapping is as long as `bytes`, writable, and new, hence elsewhere.
    unsafe { pages.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    // SAFETY: the mapping is ours, and no reference into it exists.
    let result =
        unsafe { libc::mprotect(pages.as_ptr().cast(), bytes.len(), libc::PROT_READ | libc::PROT_EXEC) };
    assert_eq!(result, 0);
    pages
}

fn may_be_in_memory(operand: &Operand) -> bool {
    matches!(
        operand,
        Operand::mem
            | Operand::xmm_or_mem
            | Operand::mm_or_mem
            | Operand::r8_or_mem
            | Operand::r16_or_mem
            | Operand::r32_or_mem
            | Operand::r64_or_mem
    )
}

/// The instruction with operands that [`State`] holds: xmm0 to xmm2, mm1, mm2, RAX, RCX, RDX, RSI, and memory in it.
fn instruction(code: Code, in_memory: bool, immediate: u8) -> Instruction {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    for (index, operand) in (0u32..).zip(code.op_code().op_kinds()) {
        let [r16, r32, r64] = [
            [Register::AX, Register::EAX, Register::RAX],
            [Register::CX, Register::ECX, Register::RCX],
            [Register::SI, Register::ESI, Register::RSI],
        ][index as usize];
        let register = match operand {
            Operand::imm8 => {
                instruction.set_op_kind(index, OpKind::Immediate8);
                instruction.set_immediate8(immediate);
                continue;
            }
            Operand::xmm_reg | Operand::xmm_rm => Some(Register::XMM1 + index),
            Operand::mm_reg | Operand::mm_rm => Some(Register::MM1 + index),
            Operand::r32_reg | Operand::r32_vvvv => Some(r32),
            Operand::r64_reg | Operand::r64_vvvv => Some(r64),
            operand if in_memory && may_be_in_memory(operand) => None,
            Operand::xmm_or_mem => Some(Register::XMM1 + index),
            Operand::mm_or_mem => Some(Register::MM1 + index),
            // The one instruction with a byte operand has it second.
            Operand::r8_or_mem => Some(Register::CL),
            Operand::r16_or_mem => Some(r16),
            Operand::r32_or_mem => Some(r32),
            Operand::r64_or_mem => Some(r64),
            _ => panic!("an operand that the state does not hold: {operand:?} of {code:?}"),
        };
        if let Some(register) = register {
            instruction.set_op_register(index, register);
        } else {
            instruction.set_op_kind(index, OpKind::Memory);
            instruction.set_memory_base(Register::RDI);
            instruction.set_memory_displacement64(MEMORY.into());
            instruction.set_memory_displ_size(1);
        }
    }
    instruction
}

fn encode(instruction: &Instruction) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).unwrap();
    encoder.take_buffer()
}

/// Loads the registers from the state that RDI points to.
fn prologue() -> Vec<u8> {
    let mut code = CodeAssembler::new(64).unwrap();
    code.movaps(xmm0, xmmword_ptr(rdi + XMM0)).unwrap();
    code.movaps(xmm1, xmmword_ptr(rdi + XMM)).unwrap();
    code.movaps(xmm2, xmmword_ptr(rdi + XMM + 16)).unwrap();
    code.movq(mm1, qword_ptr(rdi + MM)).unwrap();
    code.movq(mm2, qword_ptr(rdi + MM + 8)).unwrap();
    code.push(qword_ptr(rdi + RFLAGS)).unwrap();
    code.popfq().unwrap();
    code.mov(rax, qword_ptr(rdi + GENERAL)).unwrap();
    code.mov(rcx, qword_ptr(rdi + GENERAL + 8)).unwrap();
    code.mov(rsi, qword_ptr(rdi + GENERAL + 16)).unwrap();
    code.mov(rdx, qword_ptr(rdi + RDX)).unwrap();
    code.assemble(0).unwrap()
}

/// Stores the registers to where they came from, and returns.
fn epilogue() -> Vec<u8> {
    let mut code = CodeAssembler::new(64).unwrap();
    code.movaps(xmmword_ptr(rdi + XMM0), xmm0).unwrap();
    code.movaps(xmmword_ptr(rdi + XMM), xmm1).unwrap();
    code.movaps(xmmword_ptr(rdi + XMM + 16), xmm2).unwrap();
    code.movq(qword_ptr(rdi + MM), mm1).unwrap();
    code.movq(qword_ptr(rdi + MM + 8), mm2).unwrap();
    code.pushfq().unwrap();
    code.pop(qword_ptr(rdi + RFLAGS)).unwrap();
    code.mov(qword_ptr(rdi + GENERAL), rax).unwrap();
    code.mov(qword_ptr(rdi + GENERAL + 8), rcx).unwrap();
    code.mov(qword_ptr(rdi + GENERAL + 16), rsi).unwrap();
    code.mov(qword_ptr(rdi + RDX), rdx).unwrap();
    code.emms().unwrap();
    code.ret().unwrap();
    code.assemble(0).unwrap()
}

/// The extension that an encoding needs and the host lacks.
pub(super) fn lacks(code: Code) -> Option<CpuidFeature> {
    let here = |feature: &CpuidFeature| match *feature {
        CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 => true,
        CpuidFeature::SSE3 => std::is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => std::is_x86_feature_detected!("aes"),
        CpuidFeature::SHA => std::is_x86_feature_detected!("sha"),
        CpuidFeature::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::BMI1 => std::is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => std::is_x86_feature_detected!("bmi2"),
        _ => false,
    };
    code.cpuid_features().iter().find(|feature| !here(feature)).copied()
}

#[test]
fn the_generated_code_addresses_the_fields() {
    assert_eq!(std::mem::offset_of!(State, xmm0), XMM0);
    assert_eq!(std::mem::offset_of!(State, xmm), XMM);
    assert_eq!(std::mem::offset_of!(State, memory), usize::from(MEMORY));
    assert_eq!(std::mem::offset_of!(State, mm), MM);
    assert_eq!(std::mem::offset_of!(State, general), GENERAL);
    assert_eq!(std::mem::offset_of!(State, rdx), RDX);
    assert_eq!(std::mem::offset_of!(State, rflags), RFLAGS);
}
