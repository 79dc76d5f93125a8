//! Virtio devices with the drivers of Debian's kernel, on backend `translate`, which needs nothing of the host.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::Command;

use vmm_examples::debian::{self, Series};

/// Runs a shell line in a guest with the devices; what it prints. `None` where Debian's packages are not to be had.
fn in_guest(test: &str, arguments: &[&str], line: &str) -> Option<String> {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return None;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_linux"))
        .args(["--backend", "translate", "--memory", "128", "--seconds", "300"])
        .args(arguments)
        .args(["--command", line])
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    Some(text.into_owned())
}

#[test]
fn the_entropy_device_gives_its_numbers_to_the_kernel() {
    let line = "cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=64 count=2 2>/dev/null | hexdump -v -e '64/1 \"%02x\" \"\\n\"'";
    let Some(text) = in_guest("entropy device", &["--transport", "mmio"], line) else { return };
    let lines: Vec<&str> = text.lines().collect();
    let [driver, first, second] = lines[..] else { panic!("{text}") };
    assert_eq!(driver, "virtio_rng.0");
    assert!(first.len() == 128 && second.len() == 128 && first != second, "{text}");
}
