//! The feature bits that this crate knows by name, and which CPU model may show them.
//!
//! Bits are as Intel SDM 2A (CPUID, tables 3-8 to 3-11) and AMD APM 3 appendix E define them. The last
//! but one column is the policy; it falls into three parts:
//!
//! - `V1` to `V4`: what programs compiled for that level of the x86-64 psABI (table 3.1) rely on. A model
//!   of that level or a higher one demands it of the host.
//! - `Platform`: what a kernel uses to run the machine, at any level: paging, protection, interrupts,
//!   clocks, context switches, fast string instructions, and the mitigations of processor flaws, which a
//!   guest kernel must know of to protect itself. Shown where the host has it, demanded nowhere.
//! - `Other`: instructions for programs that belong to no level (AES, RDRAND, ...), tracing, performance
//!   counters, nested virtualization, and what enlarges the state of a vCPU. Shown by the host model, or
//!   by [`CpuModel::with_feature`](super::CpuModel::with_feature).

use std::fmt;

use super::CpuidRegister;
use super::levels::Level;

/// Which models may show a feature; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Tier {
    /// Demanded from that level on.
    Level(Level),
    /// Shown at any level.
    Platform,
    /// Shown at none.
    Other,
}

/// One feature bit of CPUID that this crate knows by name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Feature {
    name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: CpuidRegister,
    bit: u8,
    tier: Tier,
}

impl Feature {
    /// Every feature known, ascending by leaf and subleaf.
    pub fn all() -> &'static [Self] {
        ALL
    }

    /// The feature of that [name](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.iter().copied().find(|feature| feature.name == name)
    }

    /// The feature at one bit (0 to 31) of a register.
    pub fn at(leaf: u32, subleaf: u32, register: CpuidRegister, bit: u8) -> Option<Self> {
        ALL.iter().copied().find(|feature| {
            (feature.leaf, feature.subleaf, feature.register, feature.bit) == (leaf, subleaf, register, bit)
        })
    }

    /// Its name on command lines and in messages: lower case, `avx512f`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The leaf that reports it.
    pub fn leaf(&self) -> u32 {
        self.leaf
    }

    /// The subleaf that reports it; 0 where the leaf has none.
    pub fn subleaf(&self) -> u32 {
        self.subleaf
    }

    /// The register that reports it.
    pub fn register(&self) -> CpuidRegister {
        self.register
    }

    /// The register with just this bit set.
    pub fn mask(&self) -> u32 {
        1_u32.checked_shl(self.bit.into()).unwrap_or(0)
    }

    pub(super) fn tier(&self) -> Tier {
        self.tier
    }
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Feature({self})")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The column of the table as a [`Tier`].
macro_rules! tier {
    (Platform) => {
        Tier::Platform
    };
    (Other) => {
        Tier::Other
    };
    ($level:ident) => {
        Tier::Level(Level::$level)
    };
}

/// Declares the constants and the list of them in one go: name, text, leaf, subleaf, register, bit, tier,
/// documentation.
macro_rules! features {
    ($($name:ident, $text:literal, $leaf:literal, $subleaf:literal, $register:ident, $bit:literal,
       $tier:ident, $doc:literal;)*) => {
        impl Feature {
            $(
                #[doc = $doc]
                pub const $name: Self = Self {
                    name: $text,
                    leaf: $leaf,
                    subleaf: $subleaf,
                    register: CpuidRegister::$register,
                    bit: $bit,
                    tier: tier!($tier),
                };
            )*
        }

        const ALL: &[Feature] = &[$(Feature::$name),*];
    };
}

features! {
    // Leaf 1 EDX.
    FPU, "fpu", 1, 0, Edx, 0, V1, "x87 floating-point unit.";
    VME, "vme", 1, 0, Edx, 1, Platform, "Virtual-8086 mode enhancements.";
    DE, "de", 1, 0, Edx, 2, Platform, "Debugging extensions.";
    PSE, "pse", 1, 0, Edx, 3, Platform, "4 MiB pages.";
    TSC, "tsc", 1, 0, Edx, 4, Platform, "Time-stamp counter.";
    MSR, "msr", 1, 0, Edx, 5, Platform, "RDMSR and WRMSR.";
    PAE, "pae", 1, 0, Edx, 6, Platform, "Physical address extension.";
    MCE, "mce", 1, 0, Edx, 7, Platform, "Machine-check exception.";
    CX8, "cx8", 1, 0, Edx, 8, V1, "CMPXCHG8B.";
    APIC, "apic", 1, 0, Edx, 9, Platform, "Local APIC.";
    SEP, "sep", 1, 0, Edx, 11, Platform, "SYSENTER and SYSEXIT.";
    MTRR, "mtrr", 1, 0, Edx, 12, Platform, "Memory-type range registers.";
    PGE, "pge", 1, 0, Edx, 13, Platform, "Global pages.";
    MCA, "mca", 1, 0, Edx, 14, Platform, "Machine-check architecture.";
    CMOV, "cmov", 1, 0, Edx, 15, V1, "CMOVcc.";
    PAT, "pat", 1, 0, Edx, 16, Platform, "Page attribute table.";
    PSE36, "pse36", 1, 0, Edx, 17, Platform, "4 MiB pages above 4 GiB.";
    CLFSH, "clflush", 1, 0, Edx, 19, Platform, "CLFLUSH.";
    DS, "ds", 1, 0, Edx, 21, Other, "Debug store.";
    ACPI, "acpi", 1, 0, Edx, 22, Other, "Thermal monitor and clock control registers.";
    MMX, "mmx", 1, 0, Edx, 23, V1, "MMX.";
    FXSR, "fxsr", 1, 0, Edx, 24, V1, "FXSAVE and FXRSTOR.";
    SSE, "sse", 1, 0, Edx, 25, V1, "SSE.";
    SSE2, "sse2", 1, 0, Edx, 26, V1, "SSE2.";
    SS, "ss", 1, 0, Edx, 27, Platform, "Self snoop.";
    HTT, "ht", 1, 0, Edx, 28, Platform, "More than one logical processor in the package; follows the number of vCPUs.";
    TM, "tm", 1, 0, Edx, 29, Other, "Thermal monitor.";
    PBE, "pbe", 1, 0, Edx, 31, Other, "Pending break enable.";
    // Leaf 1 ECX.
    SSE3, "sse3", 1, 0, Ecx, 0, V2, "SSE3.";
    PCLMULQDQ, "pclmulqdq", 1, 0, Ecx, 1, Other, "PCLMULQDQ.";
    MONITOR, "monitor", 1, 0, Ecx, 3, Other, "MONITOR and MWAIT.";
    VMX, "vmx", 1, 0, Ecx, 5, Other, "Virtual machine extensions.";
    SSSE3, "ssse3", 1, 0, Ecx, 9, V2, "SSSE3.";
    FMA, "fma", 1, 0, Ecx, 12, V3, "Fused multiply-add.";
    CX16, "cx16", 1, 0, Ecx, 13, V2, "CMPXCHG16B.";
    PDCM, "pdcm", 1, 0, Ecx, 15, Other, "Performance capabilities register.";
    PCID, "pcid", 1, 0, Ecx, 17, Platform, "Process-context identifiers.";
    SSE4_1, "sse4.1", 1, 0, Ecx, 19, V2, "SSE4.1.";
    SSE4_2, "sse4.2", 1, 0, Ecx, 20, V2, "SSE4.2.";
    X2APIC, "x2apic", 1, 0, Ecx, 21, Platform, "x2APIC.";
    MOVBE, "movbe", 1, 0, Ecx, 22, V3, "MOVBE.";
    POPCNT, "popcnt", 1, 0, Ecx, 23, V2, "POPCNT.";
    TSC_DEADLINE, "tsc-deadline", 1, 0, Ecx, 24, Platform, "APIC timer in TSC-deadline mode.";
    AES, "aes", 1, 0, Ecx, 25, Other, "AES instructions.";
    XSAVE, "xsave", 1, 0, Ecx, 26, V3, "XSAVE, XRSTOR, XSETBV, XGETBV.";
    OSXSAVE, "osxsave", 1, 0, Ecx, 27, Other, "Copy of CR4.OSXSAVE, kept by the backend.";
    AVX, "avx", 1, 0, Ecx, 28, V3, "AVX.";
    F16C, "f16c", 1, 0, Ecx, 29, V3, "Half-precision conversions.";
    RDRAND, "rdrand", 1, 0, Ecx, 30, Other, "RDRAND.";
    HYPERVISOR, "hypervisor", 1, 0, Ecx, 31, Platform, "Runs under a hypervisor.";
    // Leaf 6.
    ARAT, "arat", 6, 0, Eax, 2, Platform, "APIC timer runs in every idle state.";
    // Leaf 7.0 EBX.
    FSGSBASE, "fsgsbase", 7, 0, Ebx, 0, Platform, "RDFSBASE and its kin.";
    TSC_ADJUST, "tsc-adjust", 7, 0, Ebx, 1, Platform, "IA32_TSC_ADJUST.";
    SGX, "sgx", 7, 0, Ebx, 2, Other, "Software guard extensions.";
    BMI1, "bmi1", 7, 0, Ebx, 3, V3, "Bit manipulation, first group.";
    HLE, "hle", 7, 0, Ebx, 4, Other, "Hardware lock elision.";
    AVX2, "avx2", 7, 0, Ebx, 5, V3, "AVX2.";
    FDP_EXCPTN_ONLY, "fdp-excptn-only", 7, 0, Ebx, 6, Platform, "x87 data pointer changes on exceptions only.";
    SMEP, "smep", 7, 0, Ebx, 7, Platform, "Supervisor-mode execution prevention.";
    BMI2, "bmi2", 7, 0, Ebx, 8, V3, "Bit manipulation, second group.";
    ERMS, "erms", 7, 0, Ebx, 9, Platform, "Enhanced REP MOVSB and STOSB.";
    INVPCID, "invpcid", 7, 0, Ebx, 10, Platform, "INVPCID.";
    RTM, "rtm", 7, 0, Ebx, 11, Other, "Restricted transactional memory.";
    ZERO_FCS_FDS, "zero-fcs-fds", 7, 0, Ebx, 13, Platform, "x87 CS and DS are zero.";
    MPX, "mpx", 7, 0, Ebx, 14, Other, "Memory protection extensions.";
    AVX512F, "avx512f", 7, 0, Ebx, 16, V4, "AVX-512 foundation.";
    AVX512DQ, "avx512dq", 7, 0, Ebx, 17, V4, "AVX-512 doubleword and quadword.";
    RDSEED, "rdseed", 7, 0, Ebx, 18, Other, "RDSEED.";
    ADX, "adx", 7, 0, Ebx, 19, Other, "ADCX and ADOX.";
    SMAP, "smap", 7, 0, Ebx, 20, Platform, "Supervisor-mode access prevention.";
    AVX512IFMA, "avx512ifma", 7, 0, Ebx, 21, Other, "AVX-512 integer fused multiply-add.";
    CLFLUSHOPT, "clflushopt", 7, 0, Ebx, 23, Other, "CLFLUSHOPT.";
    CLWB, "clwb", 7, 0, Ebx, 24, Other, "CLWB.";
    INTEL_PT, "intel-pt", 7, 0, Ebx, 25, Other, "Processor trace.";
    AVX512PF, "avx512pf", 7, 0, Ebx, 26, Other, "AVX-512 prefetch.";
    AVX512ER, "avx512er", 7, 0, Ebx, 27, Other, "AVX-512 exponential and reciprocal.";
    AVX512CD, "avx512cd", 7, 0, Ebx, 28, V4, "AVX-512 conflict detection.";
    SHA, "sha", 7, 0, Ebx, 29, Other, "SHA instructions.";
    AVX512BW, "avx512bw", 7, 0, Ebx, 30, V4, "AVX-512 byte and word.";
    AVX512VL, "avx512vl", 7, 0, Ebx, 31, V4, "AVX-512 vector lengths.";
    // Leaf 7.0 ECX.
    AVX512VBMI, "avx512vbmi", 7, 0, Ecx, 1, Other, "AVX-512 byte permutes.";
    UMIP, "umip", 7, 0, Ecx, 2, Platform, "User-mode instruction prevention.";
    PKU, "pku", 7, 0, Ecx, 3, Other, "Protection keys of user pages.";
    OSPKE, "ospke", 7, 0, Ecx, 4, Other, "Copy of CR4.PKE, kept by the backend.";
    WAITPKG, "waitpkg", 7, 0, Ecx, 5, Other, "UMONITOR, UMWAIT, TPAUSE.";
    AVX512VBMI2, "avx512vbmi2", 7, 0, Ecx, 6, Other, "AVX-512 byte permutes, second group.";
    SHSTK, "shstk", 7, 0, Ecx, 7, Other, "Shadow stacks.";
    GFNI, "gfni", 7, 0, Ecx, 8, Other, "Galois-field instructions.";
    VAES, "vaes", 7, 0, Ecx, 9, Other, "Vector AES.";
    VPCLMULQDQ, "vpclmulqdq", 7, 0, Ecx, 10, Other, "Vector PCLMULQDQ.";
    AVX512VNNI, "avx512vnni", 7, 0, Ecx, 11, Other, "AVX-512 neural network instructions.";
    AVX512BITALG, "avx512bitalg", 7, 0, Ecx, 12, Other, "AVX-512 bit algorithms.";
    AVX512VPOPCNTDQ, "avx512vpopcntdq", 7, 0, Ecx, 14, Other, "AVX-512 population count.";
    LA57, "la57", 7, 0, Ecx, 16, Other, "57-bit linear addresses.";
    RDPID, "rdpid", 7, 0, Ecx, 22, Platform, "RDPID.";
    CLDEMOTE, "cldemote", 7, 0, Ecx, 25, Other, "CLDEMOTE.";
    MOVDIRI, "movdiri", 7, 0, Ecx, 27, Other, "MOVDIRI.";
    MOVDIR64B, "movdir64b", 7, 0, Ecx, 28, Other, "MOVDIR64B.";
    // Leaf 7.0 EDX.
    AVX512_4VNNIW, "avx512-4vnniw", 7, 0, Edx, 2, Other, "AVX-512 neural network instructions on word quadruples.";
    AVX512_4FMAPS, "avx512-4fmaps", 7, 0, Edx, 3, Other, "AVX-512 fused multiply-add on quadruples.";
    FSRM, "fsrm", 7, 0, Edx, 4, Platform, "Fast short REP MOVSB.";
    AVX512_VP2INTERSECT, "avx512-vp2intersect", 7, 0, Edx, 8, Other, "AVX-512 intersection.";
    MD_CLEAR, "md-clear", 7, 0, Edx, 10, Platform, "VERW clears buffers.";
    SERIALIZE, "serialize", 7, 0, Edx, 14, Platform, "SERIALIZE.";
    IBT, "ibt", 7, 0, Edx, 20, Other, "Indirect branch tracking.";
    AMX_BF16, "amx-bf16", 7, 0, Edx, 22, Other, "AMX on bfloat16.";
    AVX512FP16, "avx512fp16", 7, 0, Edx, 23, Other, "AVX-512 half precision.";
    AMX_TILE, "amx-tile", 7, 0, Edx, 24, Other, "AMX tile registers.";
    AMX_INT8, "amx-int8", 7, 0, Edx, 25, Other, "AMX on 8-bit integers.";
    SPEC_CTRL, "spec-ctrl", 7, 0, Edx, 26, Platform, "Indirect branch restricted speculation and barrier.";
    INTEL_STIBP, "intel-stibp", 7, 0, Edx, 27, Platform, "Single-thread indirect branch predictors.";
    FLUSH_L1D, "flush-l1d", 7, 0, Edx, 28, Platform, "IA32_FLUSH_CMD.";
    ARCH_CAPABILITIES, "arch-capabilities", 7, 0, Edx, 29, Platform, "IA32_ARCH_CAPABILITIES.";
    SSBD, "ssbd", 7, 0, Edx, 31, Platform, "Speculative store bypass disable.";
    // Leaf 7.1 EAX.
    SHA512, "sha512", 7, 1, Eax, 0, Other, "SHA-512 instructions.";
    SM3, "sm3", 7, 1, Eax, 1, Other, "SM3 instructions.";
    SM4, "sm4", 7, 1, Eax, 2, Other, "SM4 instructions.";
    AVX_VNNI, "avx-vnni", 7, 1, Eax, 4, Other, "AVX neural network instructions.";
    AVX512BF16, "avx512bf16", 7, 1, Eax, 5, Other, "AVX-512 on bfloat16.";
    FZRM, "fzrm", 7, 1, Eax, 10, Platform, "Fast zero-length REP MOVSB.";
    FSRS, "fsrs", 7, 1, Eax, 11, Platform, "Fast short REP STOSB.";
    FSRC, "fsrc", 7, 1, Eax, 12, Platform, "Fast short REP CMPSB and SCASB.";
    AMX_FP16, "amx-fp16", 7, 1, Eax, 21, Other, "AMX on half precision.";
    AVX_IFMA, "avx-ifma", 7, 1, Eax, 23, Other, "AVX integer fused multiply-add.";
    // Leaf 7.1 EDX.
    AVX_VNNI_INT8, "avx-vnni-int8", 7, 1, Edx, 4, Other, "AVX neural network instructions on 8-bit integers.";
    AVX_NE_CONVERT, "avx-ne-convert", 7, 1, Edx, 5, Other, "AVX conversions without exceptions.";
    AMX_COMPLEX, "amx-complex", 7, 1, Edx, 8, Other, "AMX on complex numbers.";
    AVX_VNNI_INT16, "avx-vnni-int16", 7, 1, Edx, 10, Other, "AVX neural network instructions on 16-bit integers.";
    AVX10, "avx10", 7, 1, Edx, 19, Other, "AVX10.";
    APX_F, "apx-f", 7, 1, Edx, 21, Other, "Advanced performance extensions.";
    // Leaf 7.2 EDX.
    PSFD, "psfd", 7, 2, Edx, 0, Platform, "Predictive store forwarding disable.";
    IPRED_CTRL, "ipred-ctrl", 7, 2, Edx, 1, Platform, "Control of indirect predictors.";
    RRSBA_CTRL, "rrsba-ctrl", 7, 2, Edx, 2, Platform, "Control of return predictors.";
    DDPD_U, "ddpd-u", 7, 2, Edx, 3, Platform, "Data-dependent prefetcher disable.";
    BHI_CTRL, "bhi-ctrl", 7, 2, Edx, 4, Platform, "Control of branch history.";
    MCDT_NO, "mcdt-no", 7, 2, Edx, 5, Platform, "No MXCSR-dependent timing.";
    // Leaf d.1 EAX.
    XSAVEOPT, "xsaveopt", 0xd, 1, Eax, 0, Platform, "XSAVEOPT.";
    XSAVEC, "xsavec", 0xd, 1, Eax, 1, Other, "XSAVEC.";
    XGETBV1, "xgetbv1", 0xd, 1, Eax, 2, Other, "XGETBV with ECX 1.";
    XSAVES, "xsaves", 0xd, 1, Eax, 3, Other, "XSAVES and IA32_XSS.";
    XFD, "xfd", 0xd, 1, Eax, 4, Other, "Extended feature disable.";
    // Leaf 80000001 ECX.
    LAHF_LM, "lahf-lm", 0x8000_0001, 0, Ecx, 0, V2, "LAHF and SAHF in 64-bit mode.";
    CMP_LEGACY, "cmp-legacy", 0x8000_0001, 0, Ecx, 1, Platform, "HTT counts cores (AMD).";
    SVM, "svm", 0x8000_0001, 0, Ecx, 2, Other, "Secure virtual machine.";
    CR8_LEGACY, "cr8-legacy", 0x8000_0001, 0, Ecx, 4, Platform, "CR8 in 32-bit mode (AMD).";
    LZCNT, "lzcnt", 0x8000_0001, 0, Ecx, 5, V3, "LZCNT.";
    SSE4A, "sse4a", 0x8000_0001, 0, Ecx, 6, Other, "SSE4a.";
    MISALIGNSSE, "misalignsse", 0x8000_0001, 0, Ecx, 7, Other, "Unaligned SSE operands.";
    PREFETCHW, "prefetchw", 0x8000_0001, 0, Ecx, 8, Other, "PREFETCHW.";
    OSVW, "osvw", 0x8000_0001, 0, Ecx, 9, Platform, "Workarounds that the system can see (AMD).";
    XOP, "xop", 0x8000_0001, 0, Ecx, 11, Other, "XOP.";
    FMA4, "fma4", 0x8000_0001, 0, Ecx, 16, Other, "Four-operand fused multiply-add.";
    TBM, "tbm", 0x8000_0001, 0, Ecx, 21, Other, "Trailing bit manipulation.";
    TOPOEXT, "topoext", 0x8000_0001, 0, Ecx, 22, Platform, "Topology extensions (AMD).";
    // Leaf 80000001 EDX.
    SYSCALL, "syscall", 0x8000_0001, 0, Edx, 11, V1, "SYSCALL and SYSRET.";
    NX, "nx", 0x8000_0001, 0, Edx, 20, Platform, "No-execute pages.";
    MMXEXT, "mmxext", 0x8000_0001, 0, Edx, 22, Other, "AMD extensions of MMX.";
    FXSR_OPT, "fxsr-opt", 0x8000_0001, 0, Edx, 25, Other, "Fast FXSAVE and FXRSTOR.";
    PDPE1GB, "pdpe1gb", 0x8000_0001, 0, Edx, 26, Platform, "1 GiB pages.";
    RDTSCP, "rdtscp", 0x8000_0001, 0, Edx, 27, Platform, "RDTSCP.";
    LM, "lm", 0x8000_0001, 0, Edx, 29, V1, "Long mode.";
    // Leaf 80000007 EDX.
    INVTSC, "invtsc", 0x8000_0007, 0, Edx, 8, Platform, "Time-stamp counter of constant rate.";
    // Leaf 80000008 EBX.
    CLZERO, "clzero", 0x8000_0008, 0, Ebx, 0, Other, "CLZERO.";
    XSAVEERPTR, "xsaveerptr", 0x8000_0008, 0, Ebx, 2, Platform, "x87 error pointers are always saved.";
    WBNOINVD, "wbnoinvd", 0x8000_0008, 0, Ebx, 9, Other, "WBNOINVD.";
    IBPB, "ibpb", 0x8000_0008, 0, Ebx, 12, Platform, "Indirect branch prediction barrier.";
    IBRS, "ibrs", 0x8000_0008, 0, Ebx, 14, Platform, "Indirect branch restricted speculation.";
    STIBP, "stibp", 0x8000_0008, 0, Ebx, 15, Platform, "Single-thread indirect branch predictors.";
    IBRS_ALWAYS, "ibrs-always", 0x8000_0008, 0, Ebx, 16, Platform, "IBRS may stay on.";
    STIBP_ALWAYS, "stibp-always", 0x8000_0008, 0, Ebx, 17, Platform, "STIBP may stay on.";
    IBRS_PREFERRED, "ibrs-preferred", 0x8000_0008, 0, Ebx, 18, Platform, "IBRS is better than software mitigation.";
    IBRS_SAME_MODE, "ibrs-same-mode", 0x8000_0008, 0, Ebx, 19, Platform, "IBRS protects within a mode.";
    AMD_SSBD, "amd-ssbd", 0x8000_0008, 0, Ebx, 24, Platform, "Speculative store bypass disable.";
    VIRT_SSBD, "virt-ssbd", 0x8000_0008, 0, Ebx, 25, Platform, "Speculative store bypass disable by VIRT_SPEC_CTRL.";
    SSB_NO, "ssb-no", 0x8000_0008, 0, Ebx, 26, Platform, "No speculative store bypass.";
    AMD_PSFD, "amd-psfd", 0x8000_0008, 0, Ebx, 28, Platform, "Predictive store forwarding disable.";
    BTC_NO, "btc-no", 0x8000_0008, 0, Ebx, 29, Platform, "No branch type confusion.";
    IBPB_RET, "ibpb-ret", 0x8000_0008, 0, Ebx, 30, Platform, "IBPB clears the return address predictor.";
    // Leaf 80000021 EAX.
    LFENCE_SERIALIZING, "lfence-serializing", 0x8000_0021, 0, Eax, 2, Platform, "LFENCE always serializes.";
    VERW_CLEAR, "verw-clear", 0x8000_0021, 0, Eax, 5, Platform, "VERW clears buffers.";
    NULL_SEL_CLR_BASE, "null-sel-clr-base", 0x8000_0021, 0, Eax, 6, Platform, "A null selector clears the base.";
    AUTO_IBRS, "auto-ibrs", 0x8000_0021, 0, Eax, 8, Platform, "Automatic IBRS.";
    SBPB, "sbpb", 0x8000_0021, 0, Eax, 27, Platform, "Selective branch predictor barrier.";
    IBPB_BRTYPE, "ibpb-brtype", 0x8000_0021, 0, Eax, 28, Platform, "IBPB clears branch types.";
    SRSO_NO, "srso-no", 0x8000_0021, 0, Eax, 29, Platform, "No speculative return stack overflow.";
    SRSO_USER_KERNEL_NO, "srso-user-kernel-no", 0x8000_0021, 0, Eax, 30, Platform, "None from user mode to the kernel.";
    // Leaf 80000021 ECX.
    TSA_SQ_NO, "tsa-sq-no", 0x8000_0021, 0, Ecx, 1, Platform, "No transient scheduler attack by the store queue.";
    TSA_L1_NO, "tsa-l1-no", 0x8000_0021, 0, Ecx, 2, Platform, "No transient scheduler attack by the L1 data cache.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_and_every_name_stands_once() {
        for (i, a) in ALL.iter().enumerate() {
            assert!(a.bit < 32, "{a}");
            assert_eq!(a.name, a.name.to_lowercase());
            for b in &ALL[i + 1..] {
                assert_ne!(a.name, b.name);
                assert_ne!(
                    (a.leaf, a.subleaf, a.register, a.bit),
                    (b.leaf, b.subleaf, b.register, b.bit),
                    "{a} {b}"
                );
            }
        }
    }

    #[test]
    fn lookups_find_what_the_constants_say() {
        for feature in Feature::all() {
            assert_eq!(Feature::from_name(feature.name()), Some(*feature));
            assert_eq!(
                Feature::at(feature.leaf, feature.subleaf, feature.register, feature.bit),
                Some(*feature)
            );
            assert_eq!(feature.mask().trailing_zeros(), u32::from(feature.bit));
        }
        assert_eq!(Feature::from_name("avx3"), None);
        assert_eq!(Feature::at(1, 0, CpuidRegister::Ecx, 16), None);
    }

    /// The processor's own names, as the standard library reads them, against the table's positions.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn positions_agree_with_the_standard_library() {
        use std::arch::is_x86_feature_detected as detected;

        let host = crate::CpuidTable::host();
        for (feature, detected) in [
            (Feature::SSE3, detected!("sse3")),
            (Feature::SSSE3, detected!("ssse3")),
            (Feature::SSE4_1, detected!("sse4.1")),
            (Feature::SSE4_2, detected!("sse4.2")),
            (Feature::POPCNT, detected!("popcnt")),
            (Feature::CX16, detected!("cmpxchg16b")),
            (Feature::MOVBE, detected!("movbe")),
            (Feature::LZCNT, detected!("lzcnt")),
            (Feature::BMI1, detected!("bmi1")),
            (Feature::BMI2, detected!("bmi2")),
            (Feature::AES, detected!("aes")),
            (Feature::PCLMULQDQ, detected!("pclmulqdq")),
            (Feature::RDRAND, detected!("rdrand")),
            (Feature::RDSEED, detected!("rdseed")),
            (Feature::ADX, detected!("adx")),
            (Feature::SHA, detected!("sha")),
            (Feature::SSE4A, detected!("sse4a")),
        ] {
            assert_eq!(host.has(feature), detected, "{feature}");
        }
    }
}
