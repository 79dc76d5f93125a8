//! Instructions that are the kernel's, and those that tell of what is.

use crate::catch::{Outcome, Registers, attempt};
use crate::code::Code;
use crate::report::Report;

/// What has no business in a program: a signal, and no register is changed.
const REFUSED: [(&str, &[u8]); 43] = [
    ("HLT", &[0xf4]),
    ("CLI", &[0xfa]),
    ("STI", &[0xfb]),
    ("CLTS", &[0x0f, 0x06]),
    ("INVD", &[0x0f, 0x08]),
    ("WBINVD", &[0x0f, 0x09]),
    ("LGDT", &[0x0f, 0x01, 0x17]),
    ("LIDT", &[0x0f, 0x01, 0x1f]),
    ("LLDT", &[0x0f, 0x00, 0xd2]),
    ("LTR", &[0x0f, 0x00, 0xda]),
    ("LMSW", &[0x0f, 0x01, 0xf2]),
    ("INVLPG", &[0x0f, 0x01, 0x3f]),
    ("INVPCID", &[0x66, 0x0f, 0x38, 0x82, 0x07]),
    ("MOV RAX, CR0", &[0x0f, 0x20, 0xc0]),
    ("MOV RAX, CR2", &[0x0f, 0x20, 0xd0]),
    ("MOV RAX, CR3", &[0x0f, 0x20, 0xd8]),
    ("MOV RAX, CR4", &[0x0f, 0x20, 0xe0]),
    ("MOV RAX, CR8", &[0x44, 0x0f, 0x20, 0xc0]),
    ("MOV CR0, RAX", &[0x0f, 0x22, 0xc0]),
    ("MOV CR2, RAX", &[0x0f, 0x22, 0xd0]),
    ("MOV CR3, RAX", &[0x0f, 0x22, 0xd8]),
    ("MOV CR4, RAX", &[0x0f, 0x22, 0xe0]),
    ("MOV CR8, RAX", &[0x44, 0x0f, 0x22, 0xc0]),
    ("MOV RAX, DR0", &[0x0f, 0x21, 0xc0]),
    ("MOV RAX, DR7", &[0x0f, 0x21, 0xf8]),
    ("MOV DR0, RAX", &[0x0f, 0x23, 0xc0]),
    ("MOV DR7, RAX", &[0x0f, 0x23, 0xf8]),
    ("SWAPGS", &[0x0f, 0x01, 0xf8]),
    ("XSETBV", &[0x0f, 0x01, 0xd1]),
    ("STAC", &[0x0f, 0x01, 0xcb]),
    ("CLAC", &[0x0f, 0x01, 0xca]),
    ("RSM", &[0x0f, 0xaa]),
    ("MONITOR", &[0x0f, 0x01, 0xc8]),
    ("MWAIT", &[0x0f, 0x01, 0xc9]),
    ("VMRUN", &[0x0f, 0x01, 0xd8]),
    ("VMLOAD", &[0x0f, 0x01, 0xda]),
    ("STGI", &[0x0f, 0x01, 0xdc]),
    ("CLGI", &[0x0f, 0x01, 0xdd]),
    ("SKINIT", &[0x0f, 0x01, 0xde]),
    ("INVLPGA", &[0x0f, 0x01, 0xdf]),
    ("VMXOFF", &[0x0f, 0x01, 0xc4]),
    ("VMLAUNCH", &[0x0f, 0x01, 0xc2]),
    ("GETSEC", &[0x0f, 0x37]),
];

/// What some processors or kernels let programs have, and what changes no more than the program itself.
const ALLOWED: [(&str, &[u8]); 17] = [
    ("SGDT", &[0x0f, 0x01, 0x07]),
    ("SIDT", &[0x0f, 0x01, 0x0f]),
    ("SLDT", &[0x0f, 0x00, 0xc0]),
    ("STR", &[0x0f, 0x00, 0xc8]),
    ("SMSW", &[0x0f, 0x01, 0xe0]),
    ("RDFSBASE", &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
    ("WRGSBASE", &[0xf3, 0x48, 0x0f, 0xae, 0xd9]),
    ("RDPKRU", &[0x0f, 0x01, 0xee]),
    ("RDPMC", &[0x0f, 0x33]),
    ("RDTSCP", &[0x0f, 0x01, 0xf9]),
    ("XGETBV", &[0x0f, 0x01, 0xd0]),
    ("CPUID", &[0x53, 0x0f, 0xa2, 0x5b]),
    ("CPUID as Xen's kernels ask for it", &[0x53, 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2, 0x5b]),
    ("VMCALL", &[0x0f, 0x01, 0xc1]),
    ("VMMCALL", &[0x0f, 0x01, 0xd9]),
    // All flags but TF.
    ("POPF", &[0x68, 0xd7, 0x7e, 0x3f, 0x00, 0x9d, 0xfc]),
    ("CLFLUSH", &[0x0f, 0xae, 0x3f]),
];

/// MSRs: time-stamp counter, APIC base, EFER, STAR, LSTAR, bases, and ones that are not.
const MSRS: [u64; 14] = [
    0x10,
    0x1b,
    0x174,
    0x176,
    0x277,
    0x4000_0000,
    0x4b56_4d00,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
];

/// I/O ports, those of the engine's stubs among them (see `vmm_cpu::xen_pv::engine`).
const PORTS: [u16; 16] =
    [0, 0x20, 0x21, 0x40, 0x42, 0x4d, 0x4e, 0x5f, 0x60, 0x70, 0x80, 0xf4, 0x3f8, 0x604, 0xcf8, 0xffff];

pub(crate) fn all(report: &mut Report, code: &mut Code) {
    let scratch = code.add(&[0; 64]);
    let registers = Registers { rax: scratch, rdi: scratch, rsi: scratch, rcx: 0, ..Registers::default() };
    let returning = |bytes: &[u8]| [bytes, &[0xc3]].concat();
    report.subject("privileged instructions");
    for (name, bytes) in REFUSED {
        let stub = code.add(&returning(bytes));
        let outcome = attempt(stub, &registers);
        report.record(is_refused_at(outcome, stub, scratch), outcome.kind(), name, outcome);
    }
    for msr in MSRS {
        for (name, bytes) in [("RDMSR", [0x0f, 0x32]), ("WRMSR", [0x0f, 0x30])] {
            let stub = code.add(&returning(&bytes));
            let outcome = attempt(stub, &Registers { rcx: msr, ..registers });
            let expected = is_refused_at(outcome, stub, scratch);
            report.record(expected, outcome.kind(), format_args!("{name} {msr:#x}"), outcome);
        }
    }
    report.subject("port I/O");
    for port in PORTS {
        let cases: [(&str, &[u8]); 10] = [
            ("IN AL", &[0xec]),
            ("IN EAX", &[0xed]),
            ("OUT AL", &[0xee]),
            ("OUT AX", &[0x66, 0xef]),
            ("OUT EAX", &[0xef]),
            ("INSB", &[0x6c]),
            ("REP INSD", &[0xf3, 0x6d]),
            ("OUTSB", &[0x6e]),
            ("REP OUTSD", &[0xf3, 0x6f]),
            ("OUT imm8", &[0xe6, port as u8]),
        ];
        for (name, bytes) in cases {
            let stub = code.add(&returning(bytes));
            let outcome = attempt(stub, &Registers { rdx: port.into(), rcx: 1, ..registers });
            let expected = is_refused_at(outcome, stub, scratch);
            report.record(expected, outcome.kind(), format_args!("{name}, port {port:#x}"), outcome);
        }
    }
    report.subject("instructions that may be allowed");
    for (name, bytes) in ALLOWED {
        let stub = code.add(&returning(bytes));
        let outcome = attempt(stub, &registers);
        let expected = matches!(outcome, Outcome::Returned(_)) || outcome.is_signal();
        report.record(expected, outcome.kind(), name, outcome);
    }
}

/// A signal at the instruction, with RAX as it was.
fn is_refused_at(outcome: Outcome, rip: u64, rax: u64) -> bool {
    match outcome {
        Outcome::Signal(caught) => {
            matches!(outcome.kind(), "SIGSEGV" | "SIGILL" | "SIGBUS")
                && (caught.rip, caught.rax) == (rip, rax)
        }
        _ => false,
    }
}
