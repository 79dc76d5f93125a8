//! A guest of QEMU's (TCG), with QEMU's own device, as a peer at our server.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use vmm_examples::debian::{self, MODULES, ModuleTree, Series};
use vmm_examples::guest_command::{GuestRun, Hardware, Session, Wiring};
use vmm_examples::initramfs::{AddedFile, Userspace, userspace};
use vmm_examples::race::{QEMU, qemu_version};

use crate::guest::{Guest, LONGEST, PROGRAM, Place, packages, sha256};

struct Qemu {
    child: Child,
    directory: tempfile::TempDir,
}

impl Qemu {
    fn start(socket: &Path, line: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = debian::kernel(Series::V6_1).unwrap();
        let busybox = debian::busybox().unwrap();
        let modules = ModuleTree::open(&kernel.modules).unwrap().select(&MODULES).unwrap();
        let added: [AddedFile; 1] = [format!("{PROGRAM}:/bin/ivshmem").parse().unwrap()];
        let tree = Userspace::new(&busybox).modules(&kernel.release, &modules).files(&added);
        let session = Session::Command { line: line.to_owned(), input: None };
        let hardware = Hardware { modules: &["uio_pci_generic"], ..Wiring::SerialPorts.into() };
        let run =
            GuestRun::new(kernel.image.clone(), &userspace(&tree).unwrap(), &session, hardware, "panic=-1")
                .unwrap();
        let initrd = directory.path().join("initrd");
        fs::write(&initrd, &run.initrd).unwrap();
        let mut command = Command::new(QEMU);
        command.args([
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "256",
            "-no-reboot",
            "-display",
            "none",
            "-monitor",
            "none",
        ]);
        command.args(["-nic", "none"]);
        for port in ["console", "output", "errors", "control"] {
            command.arg("-serial").arg(format!("file:{}", directory.path().join(port).display()));
        }
        command.arg("-chardev").arg(format!("socket,id=server,path={}", socket.display()));
        command.args(["-device", "ivshmem-doorbell,vectors=2,chardev=server"]);
        command
            .arg("-kernel")
            .arg(&run.kernel)
            .arg("-initrd")
            .arg(initrd)
            .arg("-append")
            .arg(&run.command_line);
        let log = fs::File::create(directory.path().join("qemu")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, directory }
    }

    fn file(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join(name)).unwrap_or_default()).into_owned()
    }

    /// What its guest has printed, when that has ended.
    fn output(&mut self) -> String {
        let begun = Instant::now();
        while self.child.try_wait().unwrap().is_none() && !self.file("control").contains("status") {
            let state = || ["qemu", "errors", "output", "console"].map(|name| self.file(name)).join("\n--\n");
            assert!(begun.elapsed() < LONGEST, "QEMU's guest has not ended:\n{}", state());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(
            self.file("control").contains("status 0"),
            "{}{}{}",
            self.file("qemu"),
            self.file("errors"),
            self.file("console")
        );
        self.file("output")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let (Ok(()) | Err(_)) = self.child.kill();
        let (Ok(_) | Err(_)) = self.child.wait();
    }
}

/// QEMU's device has no pin, and Debian's kernel has nothing that would take its messages but the processor itself: the message
/// that our guest's ring becomes there is seen in the log of its kernel.
const THEIRS: &str = "set -e
    dd if=/dev/urandom of=data bs=64k count=4 2>/dev/null
    ivshmem write 0x100000 <data
    sha256sum <data
    ivshmem position
    ivshmem arm 0 205
    ivshmem store 0 1
    ivshmem await 8 1 150
    ivshmem read 0x200000 0x40000 | sha256sum
    for n in $(seq 20); do ivshmem ring 1 0; sleep 0.2; done
    ivshmem await 8 2 100
    sleep 1
    dmesg | grep -o 'No irq handler for vector' | head -1";

const OURS: &str = "set -e
    dd if=/dev/urandom of=data bs=64k count=4 2>/dev/null
    ivshmem await 0 1 150
    ivshmem read 0x100000 0x40000 | sha256sum
    ivshmem write 0x200000 <data
    sha256sum <data
    (ivshmem wait 1 120; ivshmem ring 0 0; ivshmem store 8 2) &
    sleep 1
    ivshmem store 8 1
    wait";

#[test]
fn a_guest_of_qemu_s_is_a_peer() {
    if !packages("QEMU") {
        return;
    }
    let Some(version) = qemu_version() else {
        println!("QEMU: skipped: there is no {QEMU}");
        return;
    };
    let place = Place::new(usize::MAX);
    let mut theirs = Qemu::start(&place.path(), THEIRS);
    place.has(1);
    let ours = Guest::start(&place.path(), "", OURS).output();
    let theirs = theirs.output().replace('\r', "");
    println!("QEMU {version}:\n{theirs}\nours:\n{ours}");
    let (one, two) = (sha256(&place.bytes(0x10_0000, 1 << 18)), sha256(&place.bytes(0x20_0000, 1 << 18)));
    assert_eq!(theirs.lines().collect::<Vec<_>>(), [&*one, "0", &*two, "No irq handler for vector"]);
    assert_eq!(ours.lines().collect::<Vec<_>>(), [&*one, &*two, "1 interrupts"]);
}
