//! Debian's guest is saved, and goes on in another process.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmm_examples::debian::{self, Series};

const LINUX: &str = env!("CARGO_BIN_EXE_linux");
const VMM_FAILURE: i32 = 125;

/// The backends that Debian's guest runs on here; none without Debian's packages.
fn backends(test: &str) -> Vec<&'static str> {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return Vec::new();
    }
    match vmm_cpu::open_backend("kvm") {
        Ok(_) => vec!["translate", "kvm"],
        Err(error) => {
            println!("{test}: kvm: skipped: {error}");
            vec!["translate"]
        }
    }
}

fn linux(backend: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(LINUX);
    command.args(["--backend", backend, "--seconds", "300"]).args(arguments).env_remove("RUST_LOG");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

/// Saves a guest that runs `line`, where it says `snapshot`; what it had said by then.
fn saved(backend: &str, path: &Path, line: &str, more: &[&str]) -> String {
    let path = path.to_str().unwrap();
    let output = linux(backend, &[&["--snapshot-to", path, "--command", line], more].concat());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{backend}: {said}");
    assert!(said.contains("; digest ") && said.contains("saved in the middle of: running "), "{said}");
    text(&output.stdout)
}

fn restored(backend: &str, path: &Path, more: &[&str]) -> Output {
    linux(backend, &[&["--restore-from", path.to_str().unwrap()], more].concat())
}

fn place(directory: &tempfile::TempDir, name: &str) -> PathBuf {
    directory.path().join(name)
}

#[test]
fn a_guest_goes_on_in_another_process_however_its_memory_comes() {
    let directory = tempfile::tempdir().unwrap();
    for backend in backends("a guest goes on") {
        let line = "x=5; nproc; snapshot; echo $x $(nproc) $(uname -r); echo bad >&2; exit 9";
        for (packed, ways) in [(false, &["map", "load", "lazy"][..]), (true, &["load", "lazy"])] {
            let path = place(&directory, "vm");
            let more: &[&str] = if packed { &["--cpus", "2", "--snapshot-packed"] } else { &["--cpus", "2"] };
            assert_eq!(saved(backend, &path, line, more), "2\n");
            for way in ways {
                let output = restored(backend, &path, &["--restore-ram", way]);
                let said = text(&output.stdout);
                assert_eq!(output.status.code(), Some(9), "{backend}, {way}: {said}{}", text(&output.stderr));
                assert!(said.starts_with("5 2 6.1."), "{backend}, {way}: {said}");
                assert_eq!(text(&output.stderr), "bad\n", "{backend}, {way}");
            }
        }
    }
}

#[test]
fn the_date_is_right_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    for backend in backends("the date is right") {
        let path = place(&directory, "vm");
        saved(backend, &path, "snapshot; sleep 3; date +%s", &[]);
        std::thread::sleep(Duration::from_secs(5));
        let output = restored(backend, &path, &[]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let date: u64 = text(&output.stdout).trim().parse().unwrap();
        assert!((now - 2..=now).contains(&date), "{backend}: {date}, and it is {now}");
    }
}

#[test]
fn what_has_changed_is_saved_alone_and_goes_on_with_its_base() {
    let directory = tempfile::tempdir().unwrap();
    for backend in backends("what has changed") {
        let [whole, second, third] = ["whole", "second", "third"].map(|name| place(&directory, name));
        let [whole, second, third] = [&whole, &second, &third].map(|path| path.to_str().unwrap());
        let line = "head -c 3000000 /dev/urandom >a; md5sum a >sums; snapshot; \
                    head -c 3000000 /dev/urandom >b; md5sum b >>sums; snapshot; rm a; cp b a; snapshot; \
                    cmp a b && md5sum -c sums; exit 9";
        saved(backend, Path::new(whole), line, &["--cpus", "2"]);
        let pages = |stderr: &[u8]| {
            let said = text(stderr);
            let (_, rest) = said.split_once(": ").and_then(|(_, rest)| rest.split_once(": ")).unwrap();
            rest.split_once(" of 65536 pages").expect(&said).0.parse::<u32>().unwrap()
        };
        for how in ["map", "load", "lazy"] {
            let from = |from: &[&str], to: &str| {
                let more = ["--snapshot-to", to, "--snapshot-incremental", "--restore-ram", how];
                let output = linux(backend, &[&["--restore-from"], from, &more].concat());
                assert_eq!(output.status.code(), Some(0), "{backend}, {how}: {}", text(&output.stderr));
                pages(&output.stderr)
            };
            // Each has what the guest has written, and not the whole kernel.
            for stored in [from(&[whole], second), from(&[second, "--restore-base", whole], third)] {
                assert!((700..6000).contains(&stored), "{backend}, {how}: {stored} pages");
            }
            let bases = ["--restore-base", whole, "--restore-base", second];
            let output = restored(backend, Path::new(third), &[&bases, &["--restore-ram", how][..]].concat());
            let said = text(&output.stdout);
            assert_eq!(output.status.code(), Some(9), "{backend}, {how}: {said}{}", text(&output.stderr));
            assert_eq!(said, "a: FAILED\nb: OK\n", "{backend}, {how}");
        }
        for (arguments, expected) in [
            (&["--restore-from", second][..], "and has to be opened with that"),
            (&["--restore-from", third, "--restore-base", whole], "it is based on "),
            (&["--restore-from", whole, "--restore-base", whole], "it is based on no other"),
            (
                &["--restore-from", whole, "--snapshot-to", whole, "--snapshot-incremental"],
                "whose place it takes",
            ),
        ] {
            let output = linux(backend, arguments);
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(VMM_FAILURE), "{said}");
            assert!(said.contains(expected), "no {expected:?} in {said}");
        }
    }
}

/// Where KVM emulates the guest's kernel it shows the host's time-stamp counter, so the guest had it from the beginning.
#[test]
fn a_guest_changes_its_backend_and_comes_back() {
    let backends = backends("a guest changes its backend");
    if backends.len() < 2 {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [first, second, third] = ["1", "2", "3"].map(|name| place(&directory, name));
    let line = "i=0; for n in 1 2 3; do i=$((i + n)); echo $i; snapshot; done; exit $i";
    let said = saved("translate", &first, line, &["--host-tsc"]);
    let mut all = said;
    for (backend, from, to) in [("kvm", &first, &second), ("translate", &second, &third)] {
        let output = restored(backend, from, &["--snapshot-to", to.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{backend}: {}", text(&output.stderr));
        all += &text(&output.stdout);
    }
    let output = restored("kvm", &third, &[]);
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    assert_eq!(all + &text(&output.stdout), "1\n3\n6\n");
    // One that had a counter of its own is told what is missing.
    let path = place(&directory, "own");
    saved("translate", &path, "snapshot", &[]);
    let output = restored("kvm", &path, &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(VMM_FAILURE), "{said}");
    assert!(said.contains("another TSC frequency is not supported"), "{said}");
}

#[test]
fn damage_and_what_does_not_fit_are_told() {
    if backends("damage").is_empty() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, "vm");
    saved("translate", &path, "snapshot; sleep 20; echo not this", &[]);
    let refused = |more: &[&str], expected: &str| {
        let output = restored("translate", &path, more);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(VMM_FAILURE), "{said}");
        assert!(said.contains(expected), "no {expected:?} in {said}");
        assert_eq!(text(&output.stdout), "");
    };
    // In RAM: found before the guest runs, or while it does.
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let change = |at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    // The last page, where no loader puts anything, and the kernel's own.
    for at in [4096 + (256 << 20) - 1, 4096 + (16 << 20)] {
        change(at);
        for way in ["map", "load", "lazy"] {
            refused(&["--restore-ram", way], "is damaged, in RAM at 0x");
        }
        change(at);
    }
    let end = file.metadata().unwrap().len();
    for (at, expected) in [
        (100, "in the header"),
        (4096 + (256 << 20) + 20, "in the state \"program\""),
        (end - 1, "in the table"),
    ] {
        change(at);
        refused(&[], expected);
        change(at);
    }
    file.set_len(end - 1).unwrap();
    refused(&[], "in its length");
    std::fs::write(&path, "something else").unwrap();
    refused(&[], "is not a snapshot");
}

#[test]
fn a_guest_for_which_there_is_no_room_goes_on() {
    // In a mount namespace of its own.
    let probe = Command::new("unshare").args(["--mount", "true"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        println!("no room: skipped: no mount namespace is to be had");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, "vm");
    let script = "mount -t tmpfs -o size=4m none \"$0\" || exit 1
        \"$@\"; status=$?; echo \"left: $(ls -A \"$0\")\" >&2; exit $status";
    for backend in backends("no room") {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(directory.path()).arg(LINUX);
        command.args(["--backend", backend, "--cpus", "2", "--transport", "pci", "--seconds", "300"]);
        command.args(["--snapshot-to", path.to_str().unwrap(), "--command"]);
        command.arg("snapshot; sleep 1; snapshot; head -c 9 /dev/hwrng >/dev/null; nproc; exit 9");
        let output = command.env_remove("RUST_LOG").output().unwrap();
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), &*text(&output.stdout)), (Some(9), "2\n"), "{backend}: {said}");
        assert!(said.contains("No space left on device") && said.ends_with("left: \n"), "{backend}: {said}");
    }
}

/// What a machine computes does not depend on when it is saved.
#[test]
fn digests_of_guests_that_are_saved_at_random_moments_are_the_same() {
    for backend in backends("digests") {
        let soak = env!("CARGO_BIN_EXE_snapshot_soak");
        let arguments = ["--saves", "8", "--disk", "pci", "--backend", backend];
        let output = Command::new(soak).args(arguments).output().unwrap();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success() && said.contains("digests: the same"), "{said}");
        assert!(said.contains("disks: the same"), "{said}");
    }
}
