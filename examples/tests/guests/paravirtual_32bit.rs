//! 32-bit programs in a paravirtual Debian: Linux has an entry for each of their ways into the kernel.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]
#![allow(clippy::cast_possible_truncation, reason = "texts of a few bytes")]

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_examples::debian::{self, Series};

/// Where the program lies.
const BASE: u32 = 0x0804_8000;
const HEADERS: u32 = 52 + 32;
/// The entry that the kernel offers (`AT_SYSINFO` of the auxiliary vector).
const AT_SYSINFO: u32 = 32;
const EXIT: u32 = 1;
const WRITE: u32 = 4;
const FIRST: &[u8] = b"by INT 0x80\n";
const SECOND: &[u8] = b"by the kernel's entry\n";
/// Status of a program that went through.
const STATUS: u32 = 77;

/// A static ELF of one segment, readable, writable and executable.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x01\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 3, 0, 1, 0, 0, 0]);
    image.extend([BASE + HEADERS, 52, 0, 0].map(u32::to_le_bytes).concat());
    image.extend([52_u16, 32, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    let size = HEADERS + u32::try_from(code.len()).unwrap();
    image.extend([1, 0, BASE, BASE, size, size, 7, 4096].map(u32::to_le_bytes).concat());
    image.extend(code);
    image
}

fn call(a: &mut CodeAssembler, number: u32, arguments: &[u32]) -> Result<(), IcedError> {
    for (register, value) in [ebx, ecx, edx].into_iter().zip(arguments) {
        a.mov(register, *value)?;
    }
    a.mov(eax, number)?;
    a.int(0x80)
}

/// Says something by INT 0x80, then by the kernel's entry, shows the entry's code, and ends.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut start, mut environment, mut auxiliary, mut found) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.jmp(start)?;
    // A short jump; the texts follow.
    let text = BASE + HEADERS + 2;
    a.db(FIRST)?;
    a.db(SECOND)?;
    a.set_label(&mut start)?;
    call(&mut a, WRITE, &[1, text, FIRST.len() as u32])?;
    // Past the arguments and the environment.
    a.mov(esi, esp)?;
    a.lodsd()?;
    a.lea(esi, ptr(esi + eax * 4 + 4))?;
    a.set_label(&mut environment)?;
    a.lodsd()?;
    a.test(eax, eax)?;
    a.jne(environment)?;
    a.set_label(&mut auxiliary)?;
    a.lodsd()?;
    a.mov(edi, eax)?;
    a.lodsd()?;
    a.cmp(edi, AT_SYSINFO)?;
    a.je(found)?;
    a.test(edi, edi)?;
    a.jne(auxiliary)?;
    a.ud2()?;
    a.set_label(&mut found)?;
    a.mov(esi, eax)?;
    for (register, value) in
        [(eax, WRITE), (ebx, 1), (ecx, text + FIRST.len() as u32), (edx, SECOND.len() as u32)]
    {
        a.mov(register, value)?;
    }
    a.call(esi)?;
    // The code of the entry, which says how it enters.
    a.mov(ecx, esi)?;
    a.mov(ebx, 1)?;
    a.mov(edx, 16)?;
    a.mov(eax, WRITE)?;
    a.call(esi)?;
    call(&mut a, EXIT, &[STATUS])?;
    a.assemble(u64::from(BASE + HEADERS))
}

/// What a 32-bit program comes to in Debian on that engine: its output and its status.
fn in_debian(test: &str, engine: &str) -> Option<(Vec<u8>, String)> {
    let backend = engine.split('-').next().unwrap_or(engine);
    if let Err(error) = vmm_cpu::open_backend(backend) {
        println!("{test}: skipped on {engine}: {error}");
        return None;
    }
    if let Err(error) = debian::kernel(Series::default()).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("program");
    std::fs::write(&file, elf(&program().unwrap())).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_linux"))
        .args(["--backend", "xen-pv", "--engine", engine, "--seconds", "600"])
        .arg("--add")
        .arg(format!("{}:/root/program", file.display()))
        .args(["--command", "/root/program; echo status $? >&2"])
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    Some((output.stdout, String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn programs_of_32_bits_enter_the_kernel_in_both_ways() {
    let (output, errors) = in_debian("32-bit program", "translate").unwrap_or_default();
    if errors.is_empty() {
        return;
    }
    let said = b"by INT 0x80\nby the kernel's entry\n";
    assert!(output.starts_with(said), "{}\n{errors}", output.escape_ascii());
    assert!(errors.contains(&format!("status {STATUS}")), "{errors}");
    let entry = &output[said.len()..];
    let enters = [[0x0f, 0x05], [0x0f, 0x34]];
    assert!(
        entry.windows(2).any(|code| enters.iter().any(|enter| enter == code)),
        "{}",
        entry.escape_ascii()
    );
}

/// KVM that emulates 32-bit code is given none: the program ends, and nothing else.
#[test]
fn programs_of_32_bits_end_where_there_are_none() {
    if vmm_cpu::open_backend("kvm").is_ok_and(|kvm| kvm.capabilities().hardware_assisted == Some(true)) {
        return;
    }
    for engine in ["kvm", "kvm-shim"] {
        let Some((output, errors)) = in_debian("32-bit program", engine) else { continue };
        // SIGSEGV.
        assert!(
            output.is_empty() && errors.contains("status 139"),
            "{engine}: {}\n{errors}",
            output.escape_ascii()
        );
    }
}
