//! Builds the guests that the programs and tests run, with the host's own compiler for the host's own target, since a
//! bare-metal target may not be installed: `hello`, freestanding, a static ELF with a PVH note; `xen`, the same with the
//! notes of a paravirtual kernel; and static programs for guests with a kernel. Their paths go to the programs as
//! `HELLO_GUEST`, `STRESS_GUEST` and so on.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

fn main() {
    println!("cargo::rerun-if-changed=guest");
    let guest = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("guest");
    build("hello", &guest.join("hello.rs"), &freestanding(&guest.join("link.ld")));
    build("xen", &guest.join("xen/main.rs"), &freestanding(&guest.join("xen/link.ld")));
    let arguments = ["-Copt-level=2", "-Ctarget-feature=+crt-static,+cmpxchg16b"].map(String::from);
    for name in ["digest", "ivshmem", "probe", "stress", "tenant", "vsock", "workload"] {
        build(name, &guest.join(name).join("main.rs"), &arguments);
    }
}

/// Arguments for a guest with no kernel under it, placed by a linker script.
fn freestanding(script: &Path) -> Vec<String> {
    let link_args = [
        "-nostartfiles".to_owned(),
        "-nostdlib".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        format!("-Wl,-T,{}", script.display()),
        "-Wl,-z,max-page-size=0x1000".to_owned(),
        "-Wl,--build-id=none".to_owned(),
    ];
    let freestanding =
        ["-Copt-level=s", "-Crelocation-model=static", "-Ccode-model=small", "-Ctarget-feature=+crt-static"];
    let link_args = link_args.map(|argument| format!("-Clink-arg={argument}"));
    freestanding.map(String::from).into_iter().chain(link_args).collect()
}

fn variable(name: &str) -> std::ffi::OsString {
    env::var_os(name).unwrap_or_else(|| fail(&format!("{name} is not set by cargo")))
}

fn build(name: &str, source: &Path, arguments: &[String]) {
    let output = PathBuf::from(variable("OUT_DIR")).join(format!("{name}.elf"));
    let mut rustc = Command::new(variable("RUSTC"));
    rustc
        .arg("--edition=2024")
        .args(["--crate-name", &format!("{name}_guest"), "--crate-type", "bin"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-Cpanic=abort", "-Cstrip=debuginfo", "-Dwarnings"])
        .args(arguments)
        .arg("-o")
        .arg(&output)
        .arg(source);
    match rustc.status() {
        Ok(status) if status.success() => {
            println!("cargo::rustc-env={}_GUEST={}", name.to_uppercase(), output.display());
        }
        Ok(status) => fail(&format!("building the guest {name}: rustc ended with {status}")),
        Err(error) => fail(&format!("building the guest {name}: rustc cannot be started: {error}")),
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
