//! What the examples give a guest, on Debian's own kernels: that the packages hold what is expected of them, and, under
//! QEMU where it is installed, that the guest's side of a session works on a monitor that is not ours.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::path::Path;
use std::process::{Command, Stdio};

use vmm_examples::debian::{self, Kernel, MODULES, Module, ModuleTree, Series};
use vmm_examples::guest_command::{GuestRun, GuestStreams, Hardware, SerialPort, Session, Wiring};
use vmm_examples::initramfs::{Userspace, userspace};
use vmm_memory::boot::KernelImage;

/// How long a guest may take. One that takes longer has failed.
const LONGEST_SECONDS: &str = "300";

const SERIES: [Series; 2] = [Series::V6_1, Series::V6_12];

/// What was found, or says why the test is skipped.
fn or_skip<T>(test: &str, found: anyhow::Result<T>) -> Option<T> {
    found.map_err(|error| println!("{test}: skipped: {error:#}")).ok()
}

fn modules(kernel: &Kernel) -> Vec<Module> {
    ModuleTree::open(&kernel.modules).unwrap().select(&MODULES).unwrap()
}

#[test]
fn debians_kernels_load_and_have_the_modules() {
    for series in SERIES {
        let Some(kernel) = or_skip(&format!("kernel {series}"), debian::kernel(series)) else { continue };
        let image = std::fs::read(&kernel.image).unwrap();
        KernelImage::parse(&image).unwrap();
        assert!(kernel.release.starts_with(&format!("{series}.")), "{}", kernel.release);
        let modules = modules(&kernel);
        let position = |name| modules.iter().position(|module| module.name == name).unwrap();
        assert!(position("failover") < position("net_failover"));
        assert!(position("net_failover") < position("virtio_net"));
        for module in &modules {
            assert!(
                module.content.starts_with(b"\x7fELF") && module.path.ends_with(".ko"),
                "{}",
                module.path
            );
        }
    }
}

/// Runs `line` under QEMU. Returns the status, standard output and standard error.
fn under_qemu(test: &str, series: Series, line: &str, input: &[u8], packages: &[&str]) -> Option<Ran> {
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("{test}: skipped: qemu-system-x86_64 is not on this machine");
        return None;
    }
    let kernel = or_skip(test, debian::kernel(series))?;
    let busybox = or_skip(test, debian::busybox())?;
    let modules = modules(&kernel);
    let mut parts = Userspace::new(&busybox).modules(&kernel.release, &modules);
    let tree = (!packages.is_empty()).then(|| debian::packages(packages));
    let tree = or_skip(test, tree.transpose())?;
    if let Some(tree) = &tree {
        parts = parts.packages(tree);
    }
    let session = Session::Command { line: line.to_owned(), input: Some(input.to_vec()) };
    let archive = userspace(&parts).unwrap();
    let hardware = Hardware { modules: &["virtio_net", "overlay"], ..Wiring::SerialPorts.into() };
    let run = GuestRun::new(kernel.image, &archive, &session, hardware, "").unwrap();

    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, &run.initrd).unwrap();
    let port = |serial: SerialPort| directory.path().join(serial.device().replace('/', "-"));
    let file = |path: &Path| format!("file:{}", path.display());
    let status = Command::new("timeout")
        .args([LONGEST_SECONDS, "qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", "512"])
        .args(["-display", "none", "-monitor", "none", "-no-reboot"])
        .args(SerialPort::ALL.iter().flat_map(|serial| ["-serial".to_owned(), file(&port(*serial))]))
        .arg("-kernel")
        .arg(&run.kernel)
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", &run.command_line])
        .status();
    assert!(status.unwrap().success());

    let mut ran = Ran { status: None, output: Vec::new(), errors: Vec::new() };
    let mut streams = GuestStreams::new(&session, &mut ran.output, &mut ran.errors);
    for serial in SerialPort::ALL {
        streams.receive(serial, &std::fs::read(port(serial)).unwrap()).unwrap();
    }
    assert!(streams.init_has_begun());
    ran.status = streams.finish().unwrap();
    Some(ran)
}

#[derive(Debug, PartialEq, Eq)]
struct Ran {
    status: Option<u8>,
    output: Vec<u8>,
    errors: Vec<u8>,
}

#[test]
fn a_command_gets_its_input_and_gives_its_output_byte_for_byte() {
    let input: Vec<u8> = (0..100_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let line = "cat; sed -n 's/ .*//p' /proc/modules | sort >&2; tty >&2; printf 'it'\"'\"'s' >&2; exit 7";
    for series in SERIES {
        let Some(ran) = under_qemu("a command", series, line, &input, &[]) else { return };
        let errors = String::from_utf8_lossy(&ran.errors).into_owned();
        assert_eq!(ran.status, Some(7), "{errors}");
        assert!(ran.output == input, "{} bytes", ran.output.len());
        assert!(errors.starts_with("failover\nnet_failover\noverlay\n"), "{errors}");
        assert!(errors.ends_with("not a tty\nit's"), "{errors}");
    }
}

/// Those that hold the ends of the pipes would keep the guest running.
#[test]
fn what_a_command_leaves_running_ends_with_it() {
    let line = "for name in a b; do (setsid sh -c 'while :; do sleep 100; done' &); done; kill -9 $$";
    let Some(ran) = under_qemu("left running", Series::V6_1, line, b"", &[]) else { return };
    assert_eq!((ran.status, &*ran.output), (Some(128 + 9), &b""[..]));
}

#[test]
fn a_guest_that_ends_without_a_status_shows_its_log() {
    let line = "echo before; echo c >/proc/sysrq-trigger";
    let Some(ran) = under_qemu("no status", Series::V6_1, line, b"", &[]) else { return };
    let errors = String::from_utf8_lossy(&ran.errors).into_owned();
    assert_eq!(ran.status, None);
    assert!(errors.contains("Kernel panic - not syncing: sysrq triggered crash"), "{errors}");
}

#[test]
fn debians_own_programs_run() {
    const PACKAGES: [&str; 4] = ["bash", "coreutils", "perl-base", "python3-minimal"];
    let line = "ls --version | head -n1; a=(1 2 3); echo ${#a[@]}; perl -e 'print 6*7, qq(\\n)'; \
                python3 -c 'print(sum(range(1001)))'";
    let Some(ran) = under_qemu("packages", Series::V6_1, line, b"", &PACKAGES) else { return };
    let output = String::from_utf8_lossy(&ran.output).into_owned();
    assert_eq!(ran.status, Some(0), "{ran:?}");
    assert!(output.starts_with("ls (GNU coreutils)") && output.ends_with("\n3\n42\n500500\n"), "{output}");
}
