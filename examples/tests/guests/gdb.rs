//! Debian's GDB debugs Debian's kernel, run by the program `linux`: as a kernel developer would.
//!
//! The addresses come from the kernel's own symbol table, which a first boot prints: Debian's packages have none.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use vmm_examples::debian::{self, Series};

const LINUX: &str = env!("CARGO_BIN_EXE_linux");
/// A guest, or a debugger, that takes longer has failed.
const LONGEST_SECONDS: &str = "400";

/// Addresses of kernel symbols; `None`, with a reason printed, where the tests cannot run.
fn symbols(test: &str) -> Option<&'static BTreeMap<String, u64>> {
    static SYMBOLS: OnceLock<BTreeMap<String, u64>> = OnceLock::new();
    if Command::new("gdb").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("{test}: skipped: gdb is not on this machine");
        return None;
    }
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return None;
    }
    Some(SYMBOLS.get_or_init(|| {
        let names = "start_kernel|start_secondary|rest_init|linux_banner|system_state";
        let line = format!("grep -E ' ({names})$' /proc/kallsyms");
        let output = Command::new(LINUX)
            .args(["--backend", "translate", "--seconds", LONGEST_SECONDS, "--append", "nokaslr"])
            .args(["--command", &line])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let symbol = |line: &str| {
            let (address, name) = (line.split(' ').next()?, line.split(' ').nth(2)?);
            Some((name.to_owned(), u64::from_str_radix(address, 16).ok()?))
        };
        let symbols: BTreeMap<_, _> = text.lines().filter_map(symbol).collect();
        assert_eq!(symbols.len(), 5, "{text}");
        symbols
    }))
}

/// The guest, stopped before its first instruction.
fn waiting_guest(socket: &Path, arguments: &[&str]) -> Child {
    Command::new(LINUX)
        .args(["--gdb", &format!("unix:{}", socket.display()), "--gdb-wait"])
        .args(["--seconds", LONGEST_SECONDS, "--append", "nokaslr"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs GDB with `script` on the guest, and returns what both have said.
fn debug(arguments: &[&str], script: &str) -> (String, Output) {
    let directory = tempfile::tempdir().unwrap();
    let (socket, commands) = (directory.path().join("socket"), directory.path().join("commands"));
    let guest = waiting_guest(&socket, arguments);
    let prologue = "set confirm off\nset pagination off\nset width 0\nset tcp auto-retry on\n";
    std::fs::write(&commands, format!("{prologue}target remote {}\n{script}", socket.display())).unwrap();
    while !socket.exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let gdb = Command::new("timeout")
        .args([LONGEST_SECONDS, "gdb", "-nx", "-q", "-batch", "-x"])
        .arg(&commands)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!("{}\n{}", String::from_utf8_lossy(&gdb.stdout), String::from_utf8_lossy(&gdb.stderr));
    let output = guest.wait_with_output().unwrap();
    println!("{said}\n{}", String::from_utf8_lossy(&output.stderr));
    (said, output)
}

/// That `said` has `expected`, one after another.
fn assert_in_order(said: &str, expected: &[String]) {
    let mut rest = said;
    for text in expected {
        let at = rest.find(text.as_str());
        let Some(at) = at else { panic!("no {text:?} (in its place) in {said}") };
        rest = &rest[at + text.len()..];
    }
}

#[test]
fn gdb_follows_the_boot_on_translate() {
    let Some(symbols) = symbols("gdb on translate") else { return };
    let at = |name| symbols[name];
    let script = format!(
        "hbreak *{start:#x}\ncontinue\n\
         printf \"at %#lx, opcode %#x\\n\", $rip, *(unsigned char *)$rip\n\
         stepi\nstepi\nstepi\nprintf \"stepped %d\\n\", $rip != {start:#x}\n\
         x/s {banner:#x}\nmonitor translate {start:#x}\n\
         break *{rest:#x}\ncontinue\nprintf \"at %#lx, opcode %d\\n\", $rip, *(unsigned char *)$rip != 0xcc\n\
         delete\nwatch *(unsigned int *){state:#x}\ncontinue\nmonitor interrupts\nmonitor controllers\n\
         set $rbx_before = $rbx\nset $rbx = 7\nprintf \"rbx %d\\n\", $rbx\nset $rbx = $rbx_before\n\
         delete\ncontinue\n",
        start = at("start_kernel"),
        banner = at("linux_banner"),
        rest = at("rest_init"),
        state = at("system_state"),
    );
    let (said, output) = debug(&["--backend", "translate", "--command", "echo booted; exit 5"], &script);
    assert_in_order(
        &said,
        &[
            "Hardware assisted breakpoint 1".to_owned(),
            format!("at {:#x}, opcode ", at("start_kernel")),
            "stepped 1".to_owned(),
            "Linux version 6.1.".to_owned(),
            format!("at {:#x}, opcode 1", at("rest_init")),
            "Hardware watchpoint".to_owned(),
            "Old value = 0\nNew value = 1".to_owned(),
            "rbx 7".to_owned(),
            "exited normally".to_owned(),
        ],
    );
    // What `monitor` says goes to standard error.
    let monitor = [format!("{:#x} is guest-physical", at("start_kernel")), "local APIC: ".to_owned()];
    assert_in_order(&said, &[&monitor[..], &["IoApicState".to_owned()]].concat());
    assert_eq!((output.status.code(), &*output.stdout), (Some(5), &b"booted\n"[..]));
}

#[test]
fn gdb_sees_two_vcpus_as_threads() {
    let Some(symbols) = symbols("gdb and two vCPUs") else { return };
    let script = format!(
        "info threads\nhbreak *{:#x}\ncontinue\ndelete\n\
         break *{:#x}\ncontinue\ninfo threads\nstepi\nstepi\nthread 1\n\
         printf \"of vCPU 0: %#lx\\n\", $rip\ndelete\ndetach\n",
        symbols["start_kernel"], symbols["start_secondary"]
    );
    let (said, output) = debug(&["--backend", "translate", "--cpus", "2", "--command", "nproc"], &script);
    assert_in_order(
        &said,
        &[
            "(vCPU 0: Running".to_owned(),
            "(vCPU 1: WaitForInit".to_owned(),
            format!("Thread 2 hit Breakpoint 2, {:#018x}", symbols["start_secondary"]),
            "* 2 ".to_owned(),
            "of vCPU 0: 0xffffffff".to_owned(),
            "detached".to_owned(),
        ],
    );
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"2\n"[..]));
}

#[test]
fn gdb_stops_and_steps_on_kvm() {
    let kvm = match vmm_cpu::open_backend("kvm") {
        Ok(kvm) => kvm,
        Err(error) => return println!("gdb on kvm: skipped: {error}"),
    };
    let Some(symbols) = symbols("gdb on kvm") else { return };
    let start = symbols["start_kernel"];
    // Where KVM emulates the kernel, the boot does not go much further.
    let whole = kvm.capabilities().hardware_assisted == Some(true);
    let end = if whole { "delete\ncontinue\n" } else { "kill\n" };
    let script = format!(
        "hbreak *{start:#x}\ncontinue\nprintf \"at %#lx\\n\", $rip\nstepi\nstepi\nstepi\n\
         printf \"stepped %d\\n\", $rip != {start:#x}\nx/s {:#x}\n{end}",
        symbols["linux_banner"]
    );
    let (said, output) = debug(&["--backend", "kvm", "--command", "echo booted"], &script);
    let after = if whole { "exited normally" } else { "killed" };
    assert_in_order(
        &said,
        &[
            format!("at {start:#x}"),
            "stepped 1".to_owned(),
            "Linux version 6.1.".to_owned(),
            after.to_owned(),
        ],
    );
    if whole {
        assert_eq!(output.stdout, b"booted\n");
    }
}

#[test]
fn a_deterministic_run_takes_no_debugger() {
    let output = Command::new(LINUX)
        .args(["--backend", "translate", "--gdb", ":0", "--deterministic"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("--gdb goes with no deterministic run"), "{text}");
}

#[test]
fn a_place_where_nobody_can_connect_is_an_error_that_names_it() {
    let output = Command::new(LINUX)
        .args(["--backend", "translate", "--gdb", "unix:/no/such/place"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("\"unix:/no/such/place\" is no place to wait for a debugger"), "{text}");
}
