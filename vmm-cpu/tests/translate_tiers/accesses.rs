//! Kinds of accesses to memory, one for each way in which instructions come to one.

use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cl, dword_ptr, eax, ebx, ecx, edx, ptr, qword_ptr, r8, r9, r10, r12,
    r13, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp, st0, tbyte_ptr, word_ptr, xmm0, xmm1, xmmword_ptr,
};

use super::machine::{DATA, STACK};
use super::program::Made;

/// Where the address of what follows the instruction is, besides.
pub const NEXT_AT: u64 = DATA + 0x800;

/// One kind, with RDI at an [`image`] and RSI at [`DATA`].
pub struct Access {
    pub name: &'static str,
    pub writes: bool,
    /// Through SS, whose exception for bad addresses is #SS.
    pub by_stack: bool,
    /// What comes before: registers alone.
    pub prepare: fn(&mut CodeAssembler) -> Made,
    /// The instruction. Behind it the code goes on, wherever it branches to.
    pub instruction: fn(&mut CodeAssembler) -> Made,
}

/// What memory holds there, but for its first quadword, which is the address of what follows the instruction.
pub fn image() -> [u8; 512] {
    let mut image = std::array::from_fn(|at| (at * 7 + 3) as u8);
    // MXCSR, as FXRSTOR and LDMXCSR want it.
    image[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    // RFLAGS: all status flags.
    image[FLAGS_AT..FLAGS_AT + 8].copy_from_slice(&0x8d5_u64.to_le_bytes());
    image
}

/// Where it has an image of RFLAGS.
const FLAGS_AT: usize = 32;

type Make = fn(&mut CodeAssembler) -> Made;

const NOTHING: Make = |_| Ok(());

const fn load(name: &'static str, instruction: Make) -> Access {
    Access { name, writes: false, by_stack: false, prepare: NOTHING, instruction }
}

const fn store(name: &'static str, instruction: Make) -> Access {
    Access { name, writes: true, by_stack: false, prepare: NOTHING, instruction }
}

impl Access {
    const fn after(self, prepare: Make) -> Self {
        Self { prepare, ..self }
    }

    const fn by_stack(self) -> Self {
        Self { by_stack: true, ..self }
    }
}

/// The stack pointer so that the next push goes there, and so that the next pop comes from there.
const PUSHES: Make = |a| a.lea(rsp, ptr(rdi + 8));
const POPS: Make = |a| a.lea(rsp, ptr(rdi));

pub const ACCESSES: &[Access] = &[
    // Loads, by every way to say where.
    load("MOV of a byte", |a| a.mov(al, byte_ptr(rdi))),
    load("MOV of a high byte", |a| a.mov(iced_x86::code_asm::dh, byte_ptr(rdi))),
    load("MOV of a word", |a| a.mov(ax, word_ptr(rdi))),
    load("MOV of a doubleword", |a| a.mov(eax, dword_ptr(rdi))),
    load("MOV of a quadword", |a| a.mov(rax, qword_ptr(rdi))),
    load("MOV to where the pointer was", |a| a.mov(rdi, qword_ptr(rdi))),
    load("MOV through R12", |a| a.mov(r13, qword_ptr(r12))).after(|a| a.mov(r12, rdi)),
    load("MOV with an index", |a| a.mov(r10, qword_ptr(rdi + rcx * 8 - 24))),
    load("MOV through FS", |a| a.mov(eax, dword_ptr(rdi - 0x10).fs())),
    load("MOV through GS", |a| a.mov(r9, qword_ptr(rdi - 0x10).gs())),
    load("MOV through RBP", |a| a.mov(rax, qword_ptr(rbp + 4)))
        .after(|a| a.lea(rbp, ptr(rdi - 4)))
        .by_stack(),
    load("MOV through RSP", |a| a.mov(rax, qword_ptr(rsp + 4)))
        .after(|a| a.lea(rsp, ptr(rdi - 4)))
        .by_stack(),
    load("MOVZX", |a| a.movzx(eax, byte_ptr(rdi))),
    load("MOVSX", |a| a.movsx(rax, word_ptr(rdi))),
    load("MOVSXD", |a| a.movsxd(rax, dword_ptr(rdi))),
    load("MOVBE", |a| a.movbe(rax, qword_ptr(rdi))),
    load("ADD", |a| a.add(rax, qword_ptr(rdi))),
    load("ADC", |a| a.adc(eax, dword_ptr(rdi))),
    load("SBB", |a| a.sbb(r8, qword_ptr(rdi))),
    load("CMP with memory", |a| a.cmp(rax, qword_ptr(rdi))),
    load("CMP of memory", |a| a.cmp(dword_ptr(rdi), 0x1234)),
    load("TEST", |a| a.test(byte_ptr(rdi), 0x11)),
    load("IMUL", |a| a.imul_3(rax, qword_ptr(rdi), 77)),
    load("MUL", |a| a.mul(qword_ptr(rdi))),
    load("DIV", |a| a.div(qword_ptr(rdi))).after(|a| a.mov(edx, 1)),
    load("IDIV", |a| a.idiv(dword_ptr(rdi))).after(|a| {
        a.mov(eax, 0x7654_3210)?;
        a.mov(edx, 0)
    }),
    load("BT", |a| a.bt(dword_ptr(rdi), 3)),
    load("BT of a bit string", |a| a.bt(qword_ptr(rdi), rcx)),
    load("BSF", |a| a.bsf(rax, qword_ptr(rdi))),
    load("BSR", |a| a.bsr(eax, dword_ptr(rdi))),
    load("POPCNT", |a| a.popcnt(rax, qword_ptr(rdi))),
    load("CRC32", |a| a.crc32(rax, qword_ptr(rdi))),
    load("CMOVC", |a| a.cmovc(rax, qword_ptr(rdi))),
    load("CMOVNC, which loads too", |a| a.cmovnc(eax, dword_ptr(rdi))),
    load("XLAT", |a| a.xlatb()).after(|a| {
        a.lea(rbx, ptr(rdi - 8))?;
        a.mov(al, 8)
    }),
    // Stores, and what is both.
    store("MOV of a byte to", |a| a.mov(byte_ptr(rdi), al)),
    store("MOV of a high byte to", |a| a.mov(byte_ptr(rdi), iced_x86::code_asm::bh)),
    store("MOV of a word to", |a| a.mov(word_ptr(rdi), ax)),
    store("MOV of a doubleword to", |a| a.mov(dword_ptr(rdi), edx)),
    store("MOV of a quadword to", |a| a.mov(qword_ptr(rdi), r8)),
    store("MOV of the pointer to", |a| a.mov(qword_ptr(rdi), rdi)),
    store("MOV of an immediate to", |a| a.mov(qword_ptr(rdi), -5)),
    store("MOV through FS to", |a| a.mov(qword_ptr(rdi - 0x10).fs(), rax)),
    store("MOV through RBP to", |a| a.mov(qword_ptr(rbp), rax)).after(|a| a.mov(rbp, rdi)).by_stack(),
    store("MOVNTI to", |a| a.movnti(qword_ptr(rdi), rax)),
    store("ADD to", |a| a.add(qword_ptr(rdi), rax)),
    store("ADC to", |a| a.adc(dword_ptr(rdi), 0x55)),
    store("SBB to", |a| a.sbb(byte_ptr(rdi), al)),
    store("XOR to", |a| a.xor(word_ptr(rdi), ax)),
    store("INC", |a| a.inc(qword_ptr(rdi))),
    store("DEC", |a| a.dec(byte_ptr(rdi))),
    store("NEG", |a| a.neg(dword_ptr(rdi))),
    store("NOT", |a| a.not(qword_ptr(rdi))),
    store("SHL by 1", |a| a.shl(qword_ptr(rdi), 1)),
    store("SAR", |a| a.sar(dword_ptr(rdi), 3)),
    store("SHR by CL", |a| a.shr(dword_ptr(rdi), cl)),
    store("SHL by nothing", |a| a.shl(dword_ptr(rdi), cl)).after(|a| a.mov(ecx, 32)),
    store("RCL", |a| a.rcl(qword_ptr(rdi), 5)),
    store("ROR by CL", |a| a.ror(word_ptr(rdi), cl)),
    store("SHLD", |a| a.shld(qword_ptr(rdi), rax, 9)),
    store("SHRD by CL", |a| a.shrd(dword_ptr(rdi), eax, cl)),
    store("BTS", |a| a.bts(dword_ptr(rdi), 9)),
    store("BTR of a bit string", |a| a.btr(qword_ptr(rdi), rcx)),
    store("LOCK BTC of a bit string", |a| a.lock().btc(dword_ptr(rdi), ecx)),
    store("SETC", |a| a.setc(byte_ptr(rdi))),
    store("XCHG", |a| a.xchg(qword_ptr(rdi), rax)),
    store("XCHG of the pointer", |a| a.xchg(qword_ptr(rdi), rdi)),
    store("XADD", |a| a.xadd(dword_ptr(rdi), edx)),
    store("LOCK ADD", |a| a.lock().add(qword_ptr(rdi), 1)),
    store("LOCK XADD", |a| a.lock().xadd(qword_ptr(rdi), r8)),
    store("CMPXCHG that fails", |a| a.cmpxchg(qword_ptr(rdi), rdx)),
    store("LOCK CMPXCHG", |a| a.lock().cmpxchg(dword_ptr(rdi), ebx))
        .after(|a| a.mov(eax, dword_ptr(NEXT_AT))),
    store("CMPXCHG8B that fails", |a| a.cmpxchg8b(qword_ptr(rdi))),
    store("LOCK CMPXCHG16B that fails", |a| a.lock().cmpxchg16b(xmmword_ptr(rdi))),
    // The stack.
    load("POP", |a| a.pop(rdx)).after(POPS).by_stack(),
    load("POP of the stack pointer", |a| a.pop(rsp)).after(POPS).by_stack(),
    load("POPF", |a| a.popfq()).after(|a| a.lea(rsp, ptr(rdi + FLAGS_AT as i32))).by_stack(),
    load("LEAVE", |a| a.leave()).after(|a| a.mov(rbp, rdi)).by_stack(),
    load("RET", |a| a.ret()).after(POPS).by_stack(),
    load("RET that drops", |a| a.ret_1(24)).after(POPS).by_stack(),
    load("JMP through memory", |a| a.jmp(qword_ptr(rdi))),
    load("CALL through memory", |a| a.call(qword_ptr(rdi))).after(|a| a.mov(rsp, STACK)),
    load("PUSH of memory", |a| a.push(qword_ptr(rdi))),
    store("PUSH", |a| a.push(rdx)).after(PUSHES).by_stack(),
    store("PUSH of the stack pointer", |a| a.push(rsp)).after(PUSHES).by_stack(),
    store("PUSH of an immediate", |a| a.push(-3)).after(PUSHES).by_stack(),
    store("PUSHF", |a| a.pushfq()).after(PUSHES).by_stack(),
    store("POP of memory", |a| a.pop(qword_ptr(rdi))).after(|a| a.mov(rsp, STACK - 64)),
    store("ENTER", |a| a.enter(16, 0)).after(PUSHES).by_stack(),
    store("CALL", |a| {
        let mut next = a.create_label();
        a.call(next)?;
        a.set_label(&mut next)?;
        Ok(())
    })
    .after(PUSHES)
    .by_stack(),
    store("CALL through a register", |a| a.call(r8))
        .after(|a| {
            a.mov(r8, qword_ptr(NEXT_AT))?;
            PUSHES(a)
        })
        .by_stack(),
    // Strings. RSI is at other data.
    load("LODSB", |a| a.lodsb()).after(|a| a.mov(rsi, rdi)),
    load("LODSQ", |a| a.lodsq()).after(|a| a.mov(rsi, rdi)),
    load("SCASD", |a| a.scasd()),
    load("CMPSB", |a| a.cmpsb()),
    load("MOVSQ from there", |a| a.movsq()).after(|a| a.xchg(rsi, rdi)),
    load("REP MOVSB from there", |a| a.rep().movsb()).after(|a| a.xchg(rsi, rdi)),
    load("REPE CMPSW", |a| a.repe().cmpsw()),
    load("REPNE SCASB", |a| a.repne().scasb()),
    store("STOSB", |a| a.stosb()),
    store("STOSQ", |a| a.stosq()),
    store("MOVSD to there", |a| a.movsd()),
    store("REP STOSD", |a| a.rep().stosd()),
    store("REP STOSB backwards", |a| a.rep().stosb()).after(|a| a.std()),
    store("REP MOVSQ to there", |a| a.rep().movsq()),
    // Vectors and floating-point numbers.
    load("MOVUPS", |a| a.movups(xmm1, xmmword_ptr(rdi))),
    load("MOVAPS", |a| a.movaps(xmm1, xmmword_ptr(rdi))),
    load("MOVD", |a| a.movd(xmm1, dword_ptr(rdi))),
    load("MOVQ", |a| a.movq(xmm1, qword_ptr(rdi))),
    load("MOVSS", |a| a.movss(xmm1, dword_ptr(rdi))),
    load("MOVHPS", |a| a.movhps(xmm1, qword_ptr(rdi))),
    load("PADDB", |a| a.paddb(xmm1, xmmword_ptr(rdi))),
    load("PSHUFB", |a| a.pshufb(xmm1, xmmword_ptr(rdi))),
    load("PINSRW", |a| a.pinsrw(xmm1, word_ptr(rdi), 3)),
    load("UCOMISD", |a| a.ucomisd(xmm0, qword_ptr(rdi))),
    load("CVTSI2SD", |a| a.cvtsi2sd(xmm1, qword_ptr(rdi))),
    load("LDMXCSR", |a| a.ldmxcsr(dword_ptr(rdi + 24))),
    load("FXRSTOR", |a| a.fxrstor64(ptr(rdi))),
    load("FLD", |a| a.fld(tbyte_ptr(rdi))),
    load("FILD", |a| a.fild(qword_ptr(rdi))),
    store("MOVUPS to", |a| a.movups(xmmword_ptr(rdi), xmm0)),
    store("MOVNTDQ to", |a| a.movntdq(xmmword_ptr(rdi), xmm0)),
    store("MOVLPD to", |a| a.movlpd(qword_ptr(rdi), xmm0)),
    store("MOVSD of a vector to", |a| a.movsd_2(qword_ptr(rdi), xmm0)),
    store("PEXTRB to", |a| a.pextrb(byte_ptr(rdi), xmm0, 5)),
    store("STMXCSR", |a| a.stmxcsr(dword_ptr(rdi))),
    store("FXSAVE", |a| a.fxsave64(ptr(rdi))),
    store("FST", |a| a.fst(qword_ptr(rdi))).after(|a| a.fld(st0)),
    store("FNSTCW", |a| a.fnstcw(word_ptr(rdi))),
];
