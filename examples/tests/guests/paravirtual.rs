//! Paravirtual kernels other than Linux, run by `linux` on each engine.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::{Command, Output};

/// The kernel that tries what a small one needs.
const KERNEL: &str = env!("XEN_GUEST");
const VMM_FAILURE: i32 = 125;

/// Runs that kernel on every engine that is there.
fn on_each_engine(test: &str, arguments: &[&str], look: impl Fn(&Output, &str)) {
    for engine in ["translate", "kvm", "translate-shim", "kvm-shim"] {
        if let Err(error) = vmm_cpu::open_backend(engine.trim_end_matches("-shim")) {
            println!("{test}: skipped on {engine}: {error}");
            continue;
        }
        let output = Command::new(env!("CARGO_BIN_EXE_linux"))
            .args(["--backend", "xen-pv", "--engine", engine, "--kernel", KERNEL, "--memory", "32"])
            .args(["--seconds", "240"])
            .args(arguments)
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        let [out, errors] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        look(&output, &format!("on {engine}:\n{out}\n{errors}"));
    }
}

/// Lines of subjects that went well.
fn passed(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("ok ")).count()
}

#[test]
fn a_small_kernel_finds_what_it_needs() {
    on_each_engine("small kernel", &["--cpus", "2", "--append", "one two"], |output, text| {
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("Hello from a paravirtual kernel: 8192 pages, \"one two\""), "{text}");
        assert!(text.contains("All is well.") && !text.contains("FAILED"), "{text}");
        assert_eq!(passed(text), 21, "{text}");
    });
    on_each_engine("small kernel on one processor", &[], |output, text| {
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("All is well.") && text.contains("there is one processor"), "{text}");
        assert_eq!(passed(text), 18, "{text}");
    });
}

#[test]
fn a_kernel_that_crashes_is_no_success() {
    on_each_engine("crash", &["--append", "crash"], |output, text| {
        assert_eq!(output.status.code(), Some(VMM_FAILURE), "{text}");
        assert!(text.contains("the guest shut down: Crash"), "{text}");
    });
}
