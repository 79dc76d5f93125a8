//! That every instruction of the extensions is here, or known to be elsewhere.

use std::collections::BTreeSet;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind as Operand};

use super::super::*;

/// Where an instruction's operation is.
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "only the differential tests call the operations")
)]
pub(super) enum Operation {
    Xmm(VectorOp),
    Mmx(MmxOp),
    Masked(MaskedOp),
    Extract(ExtractOp),
    Insert(InsertOp),
    MmxExtract(MmxExtractOp),
    MmxInsert(MmxInsertOp),
    /// A function of its own, see [`NAMED`].
    Named,
}

impl Operation {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Xmm(_) => "xmm_op",
            Self::Mmx(_) => "mmx_op",
            Self::Masked(_) => "masked_op",
            Self::Extract(_) => "xmm_extract",
            Self::Insert(_) => "xmm_insert",
            Self::MmxExtract(_) => "mmx_extract",
            Self::MmxInsert(_) => "mmx_insert",
            Self::Named => "named",
        }
    }
}

/// Instructions whose operation is a function that the interpreter names.
const NAMED: [&[Mnemonic]; 3] = [SINGLE, STRINGS, BITS];

const SINGLE: &[Mnemonic] = &[Mnemonic::Ptest, Mnemonic::Crc32];

pub(super) const STRINGS: &[Mnemonic] = &[
    Mnemonic::Pcmpestri,
    Mnemonic::Pcmpestri64,
    Mnemonic::Pcmpestrm,
    Mnemonic::Pcmpestrm64,
    Mnemonic::Pcmpistri,
    Mnemonic::Pcmpistrm,
];

pub(super) const BITS: &[Mnemonic] = &[
    Mnemonic::Andn,
    Mnemonic::Bextr,
    Mnemonic::Blsi,
    Mnemonic::Blsmsk,
    Mnemonic::Blsr,
    Mnemonic::Bzhi,
    Mnemonic::Mulx,
    Mnemonic::Pdep,
    Mnemonic::Pext,
    Mnemonic::Rorx,
    Mnemonic::Sarx,
    Mnemonic::Shlx,
    Mnemonic::Shrx,
];

/// Plain moves between registers and memory.
const MOVES: &[Mnemonic] = &[
    Mnemonic::Lddqu,
    Mnemonic::Maskmovdqu,
    Mnemonic::Maskmovq,
    Mnemonic::Movapd,
    Mnemonic::Movaps,
    Mnemonic::Movd,
    Mnemonic::Movdq2q,
    Mnemonic::Movdqa,
    Mnemonic::Movdqu,
    Mnemonic::Movntdq,
    Mnemonic::Movntdqa,
    Mnemonic::Movnti,
    Mnemonic::Movntpd,
    Mnemonic::Movntps,
    Mnemonic::Movntq,
    Mnemonic::Movq,
    Mnemonic::Movq2dq,
    Mnemonic::Movupd,
    Mnemonic::Movups,
];

/// The stores of mnemonics whose loads or merges are here.
const STORES: &[Code] = &[
    Code::Movhpd_m64_xmm,
    Code::Movhps_m64_xmm,
    Code::Movlpd_m64_xmm,
    Code::Movlps_m64_xmm,
    Code::Movsd_xmmm64_xmm,
    Code::Movss_xmmm32_xmm,
];

/// Floating-point arithmetic, comparison and conversion.
const FLOATING_POINT: &[Mnemonic] = &[
    Mnemonic::Addpd,
    Mnemonic::Addps,
    Mnemonic::Addsd,
    Mnemonic::Addss,
    Mnemonic::Addsubpd,
    Mnemonic::Addsubps,
    Mnemonic::Cmppd,
    Mnemonic::Cmpps,
    Mnemonic::Cmpsd,
    Mnemonic::Cmpss,
    Mnemonic::Comisd,
    Mnemonic::Comiss,
    Mnemonic::Cvtdq2pd,
    Mnemonic::Cvtdq2ps,
    Mnemonic::Cvtpd2dq,
    Mnemonic::Cvtpd2pi,
    Mnemonic::Cvtpd2ps,
    Mnemonic::Cvtpi2pd,
    Mnemonic::Cvtpi2ps,
    Mnemonic::Cvtps2dq,
    Mnemonic::Cvtps2pd,
    Mnemonic::Cvtps2pi,
    Mnemonic::Cvtsd2si,
    Mnemonic::Cvtsd2ss,
    Mnemonic::Cvtsi2sd,
    Mnemonic::Cvtsi2ss,
    Mnemonic::Cvtss2sd,
    Mnemonic::Cvtss2si,
    Mnemonic::Cvttpd2dq,
    Mnemonic::Cvttpd2pi,
    Mnemonic::Cvttps2dq,
    Mnemonic::Cvttps2pi,
    Mnemonic::Cvttsd2si,
    Mnemonic::Cvttss2si,
    Mnemonic::Divpd,
    Mnemonic::Divps,
    Mnemonic::Divsd,
    Mnemonic::Divss,
    Mnemonic::Dppd,
    Mnemonic::Dpps,
    Mnemonic::Haddpd,
    Mnemonic::Haddps,
    Mnemonic::Hsubpd,
    Mnemonic::Hsubps,
    Mnemonic::Maxpd,
    Mnemonic::Maxps,
    Mnemonic::Maxsd,
    Mnemonic::Maxss,
    Mnemonic::Minpd,
    Mnemonic::Minps,
    Mnemonic::Minsd,
    Mnemonic::Minss,
    Mnemonic::Mulpd,
    Mnemonic::Mulps,
    Mnemonic::Mulsd,
    Mnemonic::Mulss,
    Mnemonic::Rcpps,
    Mnemonic::Rcpss,
    Mnemonic::Roundpd,
    Mnemonic::Roundps,
    Mnemonic::Roundsd,
    Mnemonic::Roundss,
    Mnemonic::Rsqrtps,
    Mnemonic::Rsqrtss,
    Mnemonic::Sqrtpd,
    Mnemonic::Sqrtps,
    Mnemonic::Sqrtsd,
    Mnemonic::Sqrtss,
    Mnemonic::Subpd,
    Mnemonic::Subps,
    Mnemonic::Subsd,
    Mnemonic::Subss,
    Mnemonic::Ucomisd,
    Mnemonic::Ucomiss,
];

/// State, ordering and hints; x87 and the general registers.
const OTHERS: &[Mnemonic] = &[
    Mnemonic::Emms,
    Mnemonic::Fisttp,
    Mnemonic::Ldmxcsr,
    Mnemonic::Lfence,
    Mnemonic::Mfence,
    Mnemonic::Prefetchnta,
    Mnemonic::Prefetcht0,
    Mnemonic::Prefetcht1,
    Mnemonic::Prefetcht2,
    Mnemonic::Sfence,
    Mnemonic::Stmxcsr,
    Mnemonic::Tzcnt,
];

/// Every encoding of the extensions: legacy ones of MMX to SSE4.2, AES, SHA and PCLMULQDQ, and VEX ones of BMI.
pub(super) fn encodings() -> impl Iterator<Item = Code> {
    Code::values().filter(|code| {
        let legacy = code.encoding() == EncodingKind::Legacy;
        code.cpuid_features().iter().any(|feature| match feature {
            CpuidFeature::MMX
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::SSE3
            | CpuidFeature::SSSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::AES
            | CpuidFeature::SHA
            | CpuidFeature::PCLMULQDQ => legacy,
            CpuidFeature::BMI1 | CpuidFeature::BMI2 => true,
            _ => false,
        })
    })
}

/// The operation of an encoding, found as the interpreter finds it: by its mnemonic and the kinds of its operands.
pub(super) fn operation(code: Code) -> Option<Operation> {
    let mnemonic = code.mnemonic();
    if NAMED.concat().contains(&mnemonic) {
        return Some(Operation::Named);
    }
    let operands = code.op_code().op_kinds();
    let general = |operand: Option<&Operand>| {
        operand.is_some_and(|operand| {
            matches!(operand, Operand::r32_reg | Operand::r64_reg | Operand::r32_or_mem | Operand::r64_or_mem)
        })
    };
    let second_is_mm =
        operands.get(1).is_some_and(|operand| *operand == Operand::mm_reg || *operand == Operand::mm_rm);
    match operands.first()? {
        Operand::xmm_reg | Operand::xmm_rm if general(operands.get(1)) => {
            xmm_insert(mnemonic).map(Operation::Insert)
        }
        Operand::xmm_reg | Operand::xmm_rm => {
            xmm_op(mnemonic).map(Operation::Xmm).or_else(|| masked_op(mnemonic).map(Operation::Masked))
        }
        Operand::mm_reg | Operand::mm_rm if general(operands.get(1)) => {
            mmx_insert(mnemonic).map(Operation::MmxInsert)
        }
        Operand::mm_reg | Operand::mm_rm => mmx_op(mnemonic).map(Operation::Mmx),
        _ if general(operands.first()) && second_is_mm => mmx_extract(mnemonic).map(Operation::MmxExtract),
        _ if general(operands.first()) => xmm_extract(mnemonic).map(Operation::Extract),
        _ => None,
    }
}

#[test]
fn every_encoding_is_here_or_known_to_be_elsewhere() {
    let elsewhere = [MOVES, FLOATING_POINT, OTHERS].concat();
    let mut seen = BTreeSet::new();
    for code in encodings() {
        let listed = elsewhere.contains(&code.mnemonic()) || STORES.contains(&code);
        assert_ne!(operation(code).is_some(), listed, "{code:?} is to be either here or listed as elsewhere");
        seen.insert(code.mnemonic());
    }
    for mnemonic in elsewhere.iter().chain(NAMED.into_iter().flatten()) {
        assert!(seen.contains(mnemonic), "{mnemonic:?} is listed but not in the extensions");
    }
}

#[test]
fn a_look_up_answers_only_for_instructions_that_exist() {
    let existing: BTreeSet<_> = encodings()
        .filter_map(|code| Some((code.mnemonic(), operation(code)?.kind())))
        .filter(|(_, kind)| *kind != "named")
        .collect();
    let mut found = BTreeSet::new();
    for mnemonic in Mnemonic::values() {
        let operations = [
            xmm_op(mnemonic).map(Operation::Xmm),
            mmx_op(mnemonic).map(Operation::Mmx),
            masked_op(mnemonic).map(Operation::Masked),
            xmm_extract(mnemonic).map(Operation::Extract),
            xmm_insert(mnemonic).map(Operation::Insert),
            mmx_extract(mnemonic).map(Operation::MmxExtract),
            mmx_insert(mnemonic).map(Operation::MmxInsert),
        ];
        found.extend(operations.iter().flatten().map(|operation| (mnemonic, operation.kind())));
    }
    assert_eq!(found, existing);
}
