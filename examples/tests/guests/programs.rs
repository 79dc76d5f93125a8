//! Runs the example programs as a user would and looks at what they print and how they end.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use vmm_examples::debian::{self, Series};

use crate::multiboot;

/// The freestanding guest, as `hello` has it built in.
const GUEST: &str = env!("HELLO_GUEST");
/// What the guest's word for success becomes at the debug-exit port.
const GUEST_SUCCESS: i32 = 33;
const TIME_IS_UP: i32 = 124;
const VMM_FAILURE: i32 = 125;
const LINUX: &str = env!("CARGO_BIN_EXE_linux");

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
    let lines = include_str!("../../src/bin/minimal.rs").lines().count();
    assert!(lines <= 150, "minimal.rs has {lines} lines, allowed are 150");
}

/// Runs `test` with each backend that can run guests here.
fn on_each_backend(test: &str, run: impl Fn(&str)) {
    run("translate");
    if kvm_is_here(test) {
        run("kvm");
    }
}

#[test]
fn linux_ends_with_the_status_of_a_kernel_at_the_debug_exit() {
    on_each_backend("linux, debug exit", |backend| {
        let arguments = ["--backend", backend, "--kernel", GUEST, "--append", "some more"];
        let (output, text) = run(LINUX, &arguments);
        assert_eq!(output.status.code(), Some(GUEST_SUCCESS), "{backend}: {text}");
        assert!(text.contains("some more"), "{backend}: {text}");
    });
}

#[test]
fn linux_ends_a_guest_that_never_ends() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), endless_guest()).unwrap();
    let kernel = image.path().to_str().unwrap();
    on_each_backend("linux, endless guest", |backend| {
        let (output, text) = run(LINUX, &["--backend", backend, "--kernel", kernel, "--seconds", "1"]);
        assert_eq!(output.status.code(), Some(TIME_IS_UP), "{backend}: {text}");
        assert!(text.contains("still running after 1 s"), "{backend}: {text}");
    });
}

/// A multiboot 1 kernel that prints its command line and its first module, and ends with status 43.
fn multiboot_kernel() -> Vec<u8> {
    use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, ebx, ecx, esi};

    let mut code = CodeAssembler::new(32).unwrap();
    let (mut print, mut printed) = (code.create_label(), code.create_label());
    code.mov(dx, 0x3f8).unwrap();
    code.mov(esi, dword_ptr(ebx + 16)).unwrap();
    code.set_label(&mut print).unwrap();
    code.lodsb().unwrap();
    code.test(al, al).unwrap();
    code.jz(printed).unwrap();
    code.out(dx, al).unwrap();
    code.jmp(print).unwrap();
    code.set_label(&mut printed).unwrap();
    code.mov(eax, dword_ptr(ebx + 24)).unwrap();
    code.mov(esi, dword_ptr(eax)).unwrap();
    code.mov(ecx, dword_ptr(eax + 4)).unwrap();
    code.sub(ecx, esi).unwrap();
    code.rep().outsb().unwrap();
    code.mov(al, 21).unwrap();
    code.out(0xf4, al).unwrap();
    multiboot::kernel(code)
}

#[test]
fn linux_takes_a_multiboot_kernel_with_its_command_line_and_module() {
    let directory = tempfile::tempdir().unwrap();
    let (kernel, module) = (directory.path().join("kernel"), directory.path().join("module"));
    std::fs::write(&kernel, multiboot_kernel()).unwrap();
    std::fs::write(&module, "what the module holds").unwrap();
    let (kernel, module) = (kernel.to_str().unwrap(), module.to_str().unwrap());
    on_each_backend("linux, multiboot", |backend| {
        let arguments =
            ["--backend", backend, "--kernel", kernel, "--initrd", module, "--append", "words for it|"];
        let (output, text) = run(LINUX, &arguments);
        assert_eq!(output.status.code(), Some(43), "{backend}: {text}");
        assert!(text.contains("words for it|what the module holds"), "{backend}: {text}");
    });
}

/// Whether Debian's packages are to be had; says why not.
fn debian_is_here(test: &str, series: Series) -> bool {
    let found = debian::kernel(series).and_then(|_| debian::busybox());
    found.map_err(|error| println!("{test}: skipped: {error:#}")).is_ok()
}

/// Debian's kernel on KVM, also where that emulates privilege level 0: then software executes the kernel.
#[test]
fn linux_runs_debian_on_kvm() {
    const TEST: &str = "linux, Debian's kernel on KVM";
    if !kvm_is_here(TEST) || !debian_is_here(TEST, Series::V6_1) {
        return;
    }
    for cpus in ["1", "2"] {
        let arguments = ["--backend", "kvm", "--cpus", cpus, "--seconds", "300", "--timings"];
        let (output, text) =
            run(LINUX, &[&arguments[..], &["--command", "nproc; uname -r; exit 9"]].concat());
        assert_eq!(output.status.code(), Some(9), "{cpus} vCPUs: {text}");
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let mut lines = said.lines();
        assert_eq!(lines.next(), Some(cpus), "{said}");
        assert!(lines.next().is_some_and(|release| release.starts_with("6.1.")), "{said}");
    }
}

/// Runs a shell line in Debian's guest on translate; `None` without Debian's packages.
fn in_debian(test: &str, series: Series, line: &str, more: &[&str]) -> Option<Output> {
    if !debian_is_here(test, series) {
        return None;
    }
    let series = if series == Series::V6_12 { "6.12" } else { "6.1" };
    let mut arguments =
        vec!["--backend", "translate", "--series", series, "--seconds", "600", "--command", line];
    arguments.extend(more);
    let output = Command::new(LINUX).args(arguments).env_remove("RUST_LOG").output().unwrap();
    Some(output)
}

#[test]
fn linux_runs_a_command_with_its_output_apart_and_its_status() {
    let line = "uname -srm; echo bad >&2; sha256sum /bin/busybox; \
                dd if=/dev/zero bs=64k count=16 2>/dev/null | gzip -c | gunzip -c | md5sum; exit 7";
    let Some(output) = in_debian("linux, command", Series::V6_1, line, &[]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(output.stderr, b"bad\n");
    let lines: Vec<&str> = text.lines().collect();
    let busybox = debian::busybox().unwrap();
    let digest = Command::new("sha256sum").arg(busybox).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout)[..64].to_owned();
    assert!(lines[0].starts_with("Linux 6.1.") && lines[0].ends_with(" x86_64"), "{text}");
    assert_eq!(lines[1], format!("{digest}  /bin/busybox"));
    // A mebibyte of zeros.
    assert_eq!(lines[2], "b6d81b360a5672d80c27430f39153e2c  -");
    assert_eq!(lines.len(), 3, "{text}");
}

#[test]
fn linux_boots_the_newer_kernel_and_passes_standard_input_on() {
    const TEST: &str = "linux, 6.12";
    if !debian_is_here(TEST, Series::V6_12) {
        return;
    }
    let mut child = Command::new(LINUX)
        .args(["--backend", "translate", "--series", "6.12", "--seconds", "600", "--stdin"])
        .args(["--command", "uname -r; rev"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"straight\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.starts_with("6.12.") && text.ends_with("\nthgiarts\n"), "{text}");
}

/// Debian's own programs compute.
#[test]
fn linux_runs_debians_bash_coreutils_perl_and_python() {
    const SCRIPT: &str = r#"
set -e
bash -c 'declare -A a; for i in {1..300}; do a[$((i % 7))]=$((${a[$((i % 7))]:-0} + i * i)); done; echo ${a[0]} ${a[3]} $((2 ** 40 / 7))'
seq 1 2000 | sort -R --random-source=/bin/bash | sort -n | sha256sum | cut -c1-16
perl -e 'my ($x, $s) = (1, 0); for (1 .. 2000) { $x = ($x * 1103515245 + 12345) % 2147483648; $s += sqrt($x) * sin($_) } printf "%.6f %s\n", $s, join ",", map { sprintf "%b", $_ } 5, 9'
python3 -c '
import math, hashlib
print(2 ** 521 % 1000000007, math.factorial(60) % 998244353, hashlib.sha1(b"guest").hexdigest()[:12])
print("%.12e %.12e" % (math.fsum(1 / n for n in range(1, 3000)), math.exp(math.pi) - math.gamma(5.5)))'
"#;
    const PACKAGES: &str = "bash,coreutils,perl-base,python3-minimal";
    let more = ["--packages", PACKAGES, "--memory", "512"];
    let Some(output) = in_debian("linux, userland", Series::V6_1, SCRIPT, &more) else { return };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // As a real machine computes them.
    let expected = "1253665 1291978 157073089682\n\
                    6251e5743b6fd6a7\n\
                    -71896.703013 101,1001\n\
                    213363750 563101905 35675e68f4b5\n\
                    8.583416556626e+00 -2.920208515177e+01\n";
    assert_eq!(text, expected);
}

/// Four vCPUs on however many processors this machine has: see `examples/guest/stress`.
#[test]
fn linux_runs_four_processors_that_work_against_each_other() {
    let add = concat!(env!("STRESS_GUEST"), ":/bin/stress");
    let line = "nproc; stress 2";
    let Some(output) = in_debian("linux, SMP", Series::V6_1, line, &["--cpus", "4", "--add", add]) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text.starts_with("4\n") && text.ends_with("\nstress: ok\n"), "{text}");
    assert_eq!(text.matches(": ok, 4 processors").count(), 12, "{text}");
}

/// Debian's stock kernel as a Xen guest with no Xen: what it finds, and that its one console keeps streams and status apart.
#[test]
fn linux_runs_debian_paravirtualized_on_each_engine() {
    const TEST: &str = "linux, paravirtualized";
    const LINE: &str = "cat /sys/hypervisor/type; nproc; echo bad >&2; printf 'C status 9\\nO aaaa\\n'; \
                        for i in 1 2 3 4; do sha256sum /bin/busybox | cut -c1-64 & done; wait; exit 7";
    if !debian_is_here(TEST, Series::V6_1) {
        return;
    }
    let digest = Command::new("sha256sum").arg(debian::busybox().unwrap()).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout)[..64].to_owned();
    let expected = format!("xen\n2\nC status 9\nO aaaa\n{}", format!("{digest}\n").repeat(4));
    let boot = |engine: &str| {
        let arguments = ["--backend", "xen-pv", "--engine", engine, "--cpus", "2", "--seconds", "600"];
        let output = Command::new(LINUX)
            .args(arguments)
            .args(["--command", LINE])
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(7), "{engine}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{engine}");
        assert_eq!(output.stderr, b"bad\n", "{engine}");
    };
    on_each_backend(TEST, |below| {
        boot(below);
        // In software there is nothing to win by the fast path in the guest; its own tests run it there.
        if below == "kvm" {
            boot("kvm-shim");
        }
    });
}

/// A kernel that is not one of Xen's.
#[test]
fn linux_says_that_a_kernel_cannot_run_paravirtualized() {
    let (output, text) = run(LINUX, &["--backend", "xen-pv", "--engine", "translate", "--kernel", GUEST]);
    assert_eq!(output.status.code(), Some(VMM_FAILURE), "{text}");
    assert!(text.contains(GUEST) && text.contains("no Xen note ENTRY"), "{text}");
    let (output, text) = run(LINUX, &["--backend", "translate", "--engine", "kvm", "--kernel", GUEST]);
    assert_eq!(output.status.code(), Some(VMM_FAILURE), "{text}");
    assert!(text.contains("--engine goes with --backend xen-pv"), "{text}");
}

/// With no /dev at all, and so no KVM, the default backend runs the guest in software and says so.
#[test]
fn linux_says_what_a_paravirtual_guest_does_without() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let log = log.to_str().unwrap();
    for (option, expected) in [
        (&["--gdb", "127.0.0.1:0"][..], "--gdb does not go with --backend xen-pv"),
        (&["--record", log], "--record, --replay and --state-hashes go with --backend translate"),
        (&["--replay", log], "--record, --replay and --state-hashes go with --backend translate"),
        (&["--deterministic"], "--deterministic, --record"),
    ] {
        let arguments = ["--backend", "xen-pv", "--engine", "translate", "--kernel", GUEST];
        let (output, text) = run(LINUX, &[&arguments, option].concat());
        assert_eq!(output.status.code(), Some(VMM_FAILURE), "{option:?}: {text}");
        assert!(text.contains(expected), "{option:?}: {text}");
        assert!(!std::fs::exists(log).unwrap(), "{option:?}");
    }
}

#[test]
fn linux_runs_where_there_is_no_kvm() {
    let hidden = Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh", LINUX])
        .args(["--kernel", GUEST])
        .stdin(Stdio::piped())
        .output();
    let output = match hidden {
        Ok(output) if output.status.code() != Some(1) && output.status.code() != Some(32) => output,
        other => return println!("linux, no KVM: skipped: no mount namespace for this user: {other:?}"),
    };
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(GUEST_SUCCESS), "{text}");
    assert!(text.contains("backend translate, since there is no /dev/kvm"), "{text}");
}

#[test]
fn linux_says_what_is_wrong_with_its_arguments() {
    let cases: [(&[&str], i32, &str); 8] = [
        (&["--backend", "bochs"], VMM_FAILURE, "translate"),
        (&["--kernel", "/nowhere/vmlinuz"], VMM_FAILURE, "/nowhere/vmlinuz"),
        (&["--kernel", GUEST, "--command", "true"], VMM_FAILURE, "needs a Linux kernel"),
        (&["--memory", "1"], 2, "16..="),
        (&["--stdin"], 2, "--command"),
        (&["--cpus", "0"], 2, "1.."),
        (&["--backend", "translate", "--cpus", "9", "--kernel", GUEST], VMM_FAILURE, "8"),
        (&["--add", "build.rs:relative"], 2, "FILE[:PATH]"),
    ];
    for (arguments, status, expected) in cases {
        let (output, text) = run(LINUX, arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}
