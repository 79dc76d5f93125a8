//! Builds the freestanding guest that `hello` and the tests run: a static ELF with a PVH note, made
//! by the host's own compiler for the host's own target, since a bare-metal target may not be
//! installed. Its path goes to the programs as `HELLO_GUEST`.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    println!("cargo::rerun-if-changed=guest");
    let variable = |name| env::var_os(name).unwrap_or_else(|| fail(&format!("{name} is not set by cargo")));
    let guest = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("guest");
    let output = PathBuf::from(variable("OUT_DIR")).join("hello.elf");
    let script = guest.join("link.ld");
    let link_args = [
        "-nostartfiles".to_owned(),
        "-nostdlib".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        format!("-Wl,-T,{}", script.display()),
        "-Wl,-z,max-page-size=0x1000".to_owned(),
        "-Wl,--build-id=none".to_owned(),
    ];
    let mut rustc = Command::new(variable("RUSTC"));
    rustc
        .arg("--edition=2024")
        .args(["--crate-name", "hello_guest", "--crate-type", "bin", "--target", "x86_64-unknown-linux-gnu"])
        .args(["-Cpanic=abort", "-Copt-level=s", "-Crelocation-model=static", "-Ccode-model=small"])
        .args(["-Ctarget-feature=+crt-static", "-Cstrip=debuginfo", "-Dwarnings"])
        .args(link_args.map(|argument| format!("-Clink-arg={argument}")))
        .arg("-o")
        .arg(&output)
        .arg(guest.join("hello.rs"));
    match rustc.status() {
        Ok(status) if status.success() => {
            println!("cargo::rustc-env=HELLO_GUEST={}", output.display());
        }
        Ok(status) => fail(&format!("building the guest: rustc ended with {status}")),
        Err(error) => fail(&format!("building the guest: rustc cannot be started: {error}")),
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
