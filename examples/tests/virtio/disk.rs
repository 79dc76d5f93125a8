//! Disks, the entropy device, and what all that is in figures.

use std::fs::File;

use crate::guest::{Guest, linux, sha256};

const WRITE: &str = "
    cat /sys/class/misc/hw_random/rng_current
    dd if=/dev/hwrng bs=64 count=2 2>/dev/null | hexdump -v -e '64/1 \"%02x\" \"\\n\"'
    dd if=/dev/urandom of=/dev/vda bs=64k count=25 conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    cat /sys/block/vda/serial; echo
    sha256sum </dev/vda
    cat /sys/block/vda/stat >&3; read looked <&3";

/// Read-only, so that the guest cannot write if it tries.
const READ: &str = "
    ls /dev/vd? | wc -l
    dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null
    cat /sys/block/vda/ro
    sha256sum </dev/vda";

#[test]
fn a_disk_keeps_what_was_written_across_reboots_over_mmio() {
    a_disk_keeps_what_was_written_across_reboots("mmio", 1);
}

#[test]
fn a_disk_keeps_what_was_written_across_reboots_over_pci() {
    a_disk_keeps_what_was_written_across_reboots("pci", 9);
}

/// What one guest has written, the next one reads, and so does the host. The next one has the disk so many times, which is more
/// over PCI than the I/O APIC has inputs for.
fn a_disk_keeps_what_was_written_across_reboots(transport: &str, times: usize) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(2 << 20).unwrap();
    let disk = path.to_str().unwrap();
    let Some(mut command) = linux("disk", transport) else { return };
    command.args(["--memory", "128", "--disk", disk]);
    let mut guest = Guest::start(command, WRITE);
    let stat = guest.hear();
    let figures = guest.figures();
    guest.say("looked");
    let text = guest.output();
    let [generator, first, second, name, sum] = text.lines().collect::<Vec<_>>()[..] else {
        panic!("{text}")
    };

    assert!(generator.starts_with("virtio_rng."), "{text}");
    assert!(first.len() == 128 && second.len() == 128 && first != second, "{text}");
    assert!(figures.of("transferred_bytes", "entropy0", "read") >= 128.0, "{figures:?}");

    assert_eq!((name, &*sha256(File::open(&path).unwrap())), ("disk", sum), "{text}");
    // Documentation/block/stat.rst: requests, merges, sectors of 512 bytes, ms; of reads, writes, discards, and then flushes.
    let stat: Vec<f64> = stat.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [reads, _, read, _, writes, _, written, ..] = stat[..] else { panic!("{stat:?}") };
    // A flush that was asked for is a write of nothing as well.
    let flushes = *stat.get(15).unwrap();
    let writes = writes - flushes;
    assert!(read * 512.0 >= f64::from(2 << 20) && written * 512.0 == f64::from(25 << 16), "{stat:?}");
    for (activity, requests, sectors) in [("read", reads, read), ("write", writes, written)] {
        assert_eq!(figures.of("requests", "block0", activity), requests, "{activity}: {stat:?}");
        assert_eq!(
            figures.of("transferred_bytes", "block0", activity),
            sectors * 512.0,
            "{activity}: {stat:?}"
        );
        assert_eq!(figures.of("request_errors", "block0", activity), 0.0, "{activity}");
    }
    // Flushes, and the question for the name, which the guest does not count.
    assert_eq!(figures.of("requests", "block0", "other"), flushes + 1.0, "{stat:?}");
    let count = figures.get("virtio_request_duration_seconds_count{device=\"block0\"}");
    assert_eq!(count, reads + writes + flushes + 1.0, "{stat:?}");

    let mut command = linux("disk", transport).unwrap();
    command.args(["--memory", "128"]).args(["--disk", &format!("{disk},ro")].repeat(times));
    assert_eq!(Guest::start(command, READ).output().trim(), format!("{times}\n1\n{sum}"));
    assert_eq!(sha256(File::open(&path).unwrap()), sum);
}

/// An image that is written by two is destroyed.
#[test]
fn a_disk_that_another_program_has_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    let path = file.path().to_str().unwrap();
    for (read_only, lock, says) in [
        (false, File::try_lock_shared as fn(&File) -> _, "another program or disk has it open"),
        (true, File::try_lock, "it is written to by another program or disk"),
    ] {
        let Some(mut linux) = linux("disk of another", "mmio") else { return };
        lock(file.as_file()).unwrap();
        let disk = format!("{path}{}", if read_only { ",ro" } else { "" });
        let output = linux.args(["--disk", &disk, "--command", "true"]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{errors}");
        assert!(errors.contains(says), "{errors}");
        file.as_file().unlock().unwrap();
    }
}
