//! Code of guests, assembled in the test.

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, cr2, cr3, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx,
    rsi, rsp,
};
use iced_x86::{BlockEncoderOptions, IcedError};

use super::machine::TRAP_PORT;

/// Code and where it goes, a linear address.
#[derive(Clone, Debug)]
pub struct Code {
    pub address: u64,
    pub bytes: Vec<u8>,
}

/// What an assembler's functions return.
pub type Made<T = ()> = Result<T, IcedError>;

/// Code at `address`.
pub fn assemble(address: u64, make: impl FnOnce(&mut CodeAssembler) -> Made) -> Code {
    labelled(address, |a| make(a).map(|()| [])).0
}

/// Code at `address`, and the addresses of some labels in it.
pub fn labelled<const N: usize>(
    address: u64,
    make: impl FnOnce(&mut CodeAssembler) -> Made<[CodeLabel; N]>,
) -> (Code, [u64; N]) {
    let mut a = CodeAssembler::new(64).unwrap();
    let labels = make(&mut a).unwrap();
    let result = a.assemble_options(address, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let addresses = labels.map(|label| result.label_ip(&label).unwrap());
    (Code { address, bytes: result.inner.code_buffer }, addresses)
}

/// A label on the next instruction.
pub fn here(a: &mut CodeAssembler) -> Made<CodeLabel> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    Ok(label)
}

/// The handlers of all vectors.
pub struct Handlers {
    pub code: Code,
    pub vectors: [u64; 256],
}

/// HLT for those that do not return comes first.
pub fn handlers(address: u64) -> Handlers {
    let registers = [rax, rbx, rcx, rdx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    let (code, vectors) = labelled(address, |a| {
        a.hlt()?;
        let mut common = a.create_label();
        let mut labels = [CodeLabel::default(); 256];
        for (vector, label) in (0..).zip(&mut labels) {
            *label = here(a)?;
            if !matches!(vector, 8 | 10..=14 | 17) {
                a.push(0)?;
            }
            a.push(vector)?;
            a.jmp(common)?;
        }
        a.set_label(&mut common)?;
        for register in registers {
            a.push(register)?;
        }
        a.mov(rax, cr2)?;
        a.push(rax)?;
        a.out(u32::from(TRAP_PORT), iced_x86::code_asm::al)?;
        // The test may have changed page tables.
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.pop(rax)?;
        for register in registers.into_iter().rev() {
            a.pop(register)?;
        }
        a.add(rsp, 16)?;
        a.iretq()?;
        Ok(labels)
    });
    Handlers { code, vectors }
}
