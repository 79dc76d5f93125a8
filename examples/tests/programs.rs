//! Runs the example programs as a user would and looks at what they print and how they end.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::{Command, Output};

/// The freestanding guest, as `hello` has it built in.
const GUEST: &str = env!("HELLO_GUEST");
/// What the guest's word for success becomes at the debug-exit port.
const GUEST_SUCCESS: i32 = 33;
const VMM_FAILURE: i32 = 125;

/// Whether a guest can be run here; says why not.
fn kvm_is_here(test: &str) -> bool {
    match vmm_cpu::open_backend("kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("{test}: skipped: {error}");
            false
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> (Output, String) {
    let output = Command::new(program).args(arguments).env_remove("RUST_LOG").output().unwrap();
    let text = format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout).replace('\r', ""),
        String::from_utf8_lossy(&output.stderr)
    );
    (output, text)
}

/// An ELF with a PVH note and one instruction: a jump to itself.
fn endless_guest() -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const HEADERS: u32 = 64 + 2 * 56;
    const NOTE: u32 = 20;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [u64::from(BASE), 64, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let length = u64::from(HEADERS + NOTE + 2);
    for (kind, offset, size) in [(1_u64, 0, length), (4, u64::from(HEADERS), u64::from(NOTE))] {
        let address = u64::from(BASE) + offset;
        for value in [kind | 5 << 32, offset, address, address, size, size, 4] {
            image.extend(value.to_le_bytes());
        }
    }
    image.extend(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    image.extend((BASE + HEADERS + NOTE).to_le_bytes());
    image.extend([0xeb, 0xfe]);
    image
}

#[test]
fn hello_says_what_it_sees_and_ends_well() {
    if !kvm_is_here("hello") {
        return;
    }
    let (output, text) =
        run(env!("CARGO_BIN_EXE_hello"), &["--memory", "64", "--append", "a command line of its own"]);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for expected in [
        "Hello from a guest in 64-bit mode.",
        "command     a command line of its own",
        "memory      0x0000100000 + 0x0003f00000 RAM",
        "primes      1229 below 10000",
    ] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
}

#[test]
fn a_backend_that_is_not_compiled_in_is_refused_by_name() {
    let (output, text) = run(env!("CARGO_BIN_EXE_hello"), &["--backend", "bochs"]);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("bochs") && text.contains("kvm"), "{text}");
}

#[test]
fn minimal_runs_the_freestanding_guest() {
    if !kvm_is_here("minimal") {
        return;
    }
    let (output, text) = run(env!("CARGO_BIN_EXE_minimal"), &[GUEST, "two", "words"]);
    assert_eq!(output.status.code(), Some(GUEST_SUCCESS), "{text}");
    assert!(text.contains("command     two words"), "{text}");
}

#[test]
fn minimal_names_a_kernel_that_it_cannot_load() {
    const NO_KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/build.rs");
    let (output, text) = run(env!("CARGO_BIN_EXE_minimal"), &[NO_KERNEL]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(NO_KERNEL) && text.contains("no kernel image"), "{text}");
}

#[test]
fn minimal_fits_on_one_page() {
    let lines = include_str!("../src/bin/minimal.rs").lines().count();
    assert!(lines <= 150, "minimal.rs has {lines} lines, allowed are 150");
}

#[test]
fn linux_ends_with_the_status_of_a_kernel_at_the_debug_exit() {
    if !kvm_is_here("linux, debug exit") {
        return;
    }
    let (output, text) = run(env!("CARGO_BIN_EXE_linux"), &["--kernel", GUEST, "--append", "some more"]);
    assert_eq!(output.status.code(), Some(GUEST_SUCCESS), "{text}");
    assert!(text.contains("some more"), "{text}");
}

#[test]
fn linux_ends_a_guest_that_never_ends() {
    if !kvm_is_here("linux, endless guest") {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), endless_guest()).unwrap();
    let kernel = image.path().to_str().unwrap();
    let (output, text) = run(env!("CARGO_BIN_EXE_linux"), &["--kernel", kernel, "--seconds", "1"]);
    assert_eq!(output.status.code(), Some(VMM_FAILURE), "{text}");
    assert!(text.contains("still running after 1 s"), "{text}");
}

/// Debian's kernel logs over the serial port. Where KVM emulates privilege level 0 it comes to an
/// instruction that KVM cannot emulate, and the error shows that instruction.
#[test]
fn linux_prints_the_log_of_the_debian_kernel() {
    const TEST: &str = "linux, Debian's kernel";
    if !kvm_is_here(TEST) {
        return;
    }
    let kernel = match vmm_examples::debian::kernel() {
        Ok(kernel) => kernel,
        Err(error) => return println!("{TEST}: skipped: {error:#}"),
    };
    let kernel = kernel.to_str().unwrap();
    let (output, text) =
        run(env!("CARGO_BIN_EXE_linux"), &["--kernel", kernel, "--memory", "64", "--seconds", "300"]);
    for expected in ["Linux version 6.", "Command line: console=ttyS0", "BIOS-e820: "] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
    match output.status.code() {
        // Without a root file system it panics, and panic=-1 is a reset.
        Some(0) => assert!(text.contains("Kernel panic - not syncing: VFS"), "{text}"),
        Some(VMM_FAILURE) => assert!(text.contains("cannot execute `") && text.contains("rip"), "{text}"),
        other => panic!("status {other:?}: {text}"),
    }
}
