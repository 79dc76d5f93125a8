//! Programs of a paravirtual guest: what they may not reach, and work whose results are known, on each engine. The same programs
//! run longer as `xen_pv_probe --long` and `xen_pv_soak`.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::Command;

use vmm_examples::debian::{self, Series};

/// Engines, and the backend that each needs.
const ENGINES: [(&str, &str); 3] = [("translate", "translate"), ("kvm", "kvm"), ("kvm-shim", "kvm")];

/// Engines that are to be had here. Says what is skipped, and why.
fn engines(test: &str) -> Vec<&'static str> {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return Vec::new();
    }
    let engine_over = |(engine, backend)| match vmm_cpu::open_backend(backend) {
        Ok(_) => Some(engine),
        Err(error) => {
            println!("{test}: skipped on {engine}: {error}");
            None
        }
    };
    ENGINES.into_iter().filter_map(engine_over).collect()
}

fn output(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

#[test]
fn a_program_reaches_nothing_that_is_not_its_own() {
    for engine in engines("probe") {
        let arguments = ["--engine", engine, "--seconds", "600"];
        let (well, text) = output(env!("CARGO_BIN_EXE_xen_pv_probe"), &arguments);
        assert!(well, "on {engine}: {text}");
        // What is expected is not there by accident: the program did all that it does.
        for subject in ["memory, execute: ", "INT n: ", "SYSCALL: ", "far CALL: ", "IRET: ", "entry pages: "]
        {
            assert!(text.contains(subject), "on {engine}: no {subject:?} in {text}");
        }
        let probes = text.lines().last().unwrap().strip_prefix("probes: ").unwrap();
        let (probes, unexpected) = probes.split_once(" unexpected: ").unwrap();
        assert_eq!(unexpected, "0", "on {engine}: {text}");
        assert!(probes.parse::<u64>().unwrap() > 40_000, "on {engine}: {text}");
    }
}

#[test]
fn programs_work_on_one_two_and_four_processors() {
    for engine in engines("soak") {
        let arguments = ["--engine", engine, "--runs", "3", "--cpus", "1,2,4", "--seconds", "600"];
        let (well, text) = output(env!("CARGO_BIN_EXE_xen_pv_soak"), &arguments);
        assert!(well && text.ends_with("runs: 3 failures: 0\n"), "on {engine}: {text}");
    }
}
