//! The table that compares backends with QEMU, as far as it takes a few seconds.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::{Command, Output};

use vmm_examples::debian::{self, Series};
use vmm_examples::race::{host_tsc_khz, qemu_version};

fn versus_qemu(arguments: &[&str]) -> (Output, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_versus_qemu"));
    // `linux` is there, and as it is to be.
    let output = command.args(arguments).env_remove("RUST_LOG").env_remove("CARGO").output().unwrap();
    let [out, errors] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    (output, out, errors)
}

/// Why it cannot be run here.
fn missing() -> Option<String> {
    if qemu_version().is_none() {
        return Some("QEMU is not on this machine".to_owned());
    }
    if host_tsc_khz().is_none() {
        let reason = "no KVM that tells the rate of the clock, and a guest on TCG that measures it may hang on a busy host";
        return Some(reason.to_owned());
    }
    debian::kernel(Series::V6_1).and_then(|_| debian::busybox()).err().map(|error| format!("{error:#}"))
}

#[test]
fn a_table_has_a_figure_for_each_row_and_column() {
    if let Some(reason) = missing() {
        println!("table: skipped: {reason}");
        return;
    }
    let rows = "init,power-off,fib,gzip-KiB,getppid";
    let (output, out, errors) =
        versus_qemu(&["--backend", "xen-pv/kvm-shim", "--rows", rows, "--pairs", "1"]);
    assert!(output.status.success(), "{out}{errors}");
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let lines: Vec<Vec<String>> = out.lines().take_while(|line| line.starts_with('|')).map(cells).collect();
    assert_eq!(lines[0], ["", "native", "TCG", "xen-pv/kvm-shim"]);
    let labels: Vec<&str> = lines[2..].iter().map(|line| &*line[0]).collect();
    assert_eq!(labels, ["exec to init, s", "exec to off, s", "fib, ms", "gzip, us", "getppid, us"]);
    for line in &lines[2..] {
        // What boots does not boot natively.
        let is_boot = line[0].starts_with("exec");
        assert_eq!(line[1].is_empty(), is_boot, "{out}");
        let figures: Vec<f64> =
            line[1..].iter().filter_map(|cell| cell.split(' ').next()?.parse().ok()).collect();
        assert_eq!(figures.len(), if is_boot { 2 } else { 3 }, "{out}");
        assert!(line[3].contains(" ×"), "{out}");
    }
    assert!(out.contains("\n- fib: 832039 recursive calls") || out.contains("; fib: 832039"), "{out}");
    assert!(errors.contains("versus_qemu: took "), "{errors}");
}

#[test]
fn names_that_are_none_are_refused_before_anything_runs() {
    for (arguments, reason) in [
        (["--rows", "fib,gzip"], "no row is named \"gzip\"; there are init, power-off, alu"),
        (["--backend", "bochs"], "there is no \"bochs\"; there are translate, kvm"),
        (["--backend", "xen-pv/bochs"], "--backend: "),
    ] {
        let (output, out, errors) = versus_qemu(&arguments);
        assert_eq!((output.status.code(), &*out), (Some(1), ""), "{errors}");
        assert!(errors.contains(reason), "{errors}");
    }
}
