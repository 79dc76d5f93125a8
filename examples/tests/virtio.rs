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

/// What one guest has written, the next one reads, and so does the host.
#[test]
fn a_disk_keeps_what_was_written_across_reboots() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
    let disk = path.to_str().unwrap();
    let write = "dd if=/dev/urandom of=/dev/vda bs=64k count=25 2>/dev/null; sync; cat /sys/block/vda/serial; echo; sha256sum </dev/vda";
    let Some(text) = in_guest("disk", &["--disk", disk], write) else { return };
    let (name, sum) = text.trim().split_once('\n').unwrap();
    assert_eq!((name, sum.len()), ("disk", 67), "{text}");
    let here = Command::new("sha256sum").stdin(std::fs::File::open(&path).unwrap()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&here.stdout).trim(), sum);
    // Read-only, so that the guest cannot write if it tries.
    let read = "dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null; cat /sys/block/vda/ro; sha256sum </dev/vda";
    let text = in_guest("disk", &["--disk", &format!("{disk},ro")], read).unwrap();
    assert_eq!(text.trim(), format!("1\n{sum}"));
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
