//! The console, at a terminal that the test has the other end of, and a port with a name beside it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::guest::{connect, linux, sha256, wait_for};

/// More than ports and sockets hold.
const DATA: usize = 3 << 20;

/// A shell in a guest, and who types there.
struct User {
    child: Child,
    terminal: File,
    seen: Arc<Mutex<String>>,
}

impl User {
    fn start(mut linux: Command, size: (u16, u16)) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap();
        let user: OwnedFd =
            open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let terminal = File::from(control);
        set_size(&terminal, size);
        linux.env("TERM", "dumb").stdin(user.try_clone().unwrap()).stdout(user).stderr(Stdio::inherit());
        let child = linux.spawn().unwrap();
        // Its end of the terminal is the child's alone, which ends what is read when it ends.
        drop(linux);
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut reader, text) = (terminal.try_clone().unwrap(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(buffer.get(..length).unwrap()));
            }
        });
        Self { child, terminal, seen }
    }

    fn types(&mut self, line: &str) {
        self.terminal.write_all(line.as_bytes()).unwrap();
        self.terminal.write_all(b"\r").unwrap();
    }

    /// Waits until the guest has shown that.
    fn sees(&self, text: &str) {
        wait_for(text, || {
            let seen = self.seen.lock().unwrap();
            seen.contains(text).then_some(())
        });
    }

    fn resizes(&self, size: (u16, u16)) {
        set_size(&self.terminal, size);
        // What the kernel does for the terminal of a session.
        kill_process(Pid::from_child(&self.child), Signal::WINCH).unwrap();
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.child.kill().unwrap();
            eprintln!("the terminal showed:\n{}", self.seen.lock().unwrap());
        }
    }
}

fn set_size(terminal: &File, (rows, columns): (u16, u16)) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn a_user_has_a_shell_and_programs_have_a_port_over_mmio() {
    a_user_has_a_shell_and_programs_have_a_port("mmio");
}

#[test]
fn a_user_has_a_shell_and_programs_have_a_port_over_pci() {
    a_user_has_a_shell_and_programs_have_a_port("pci");
}

fn a_user_has_a_shell_and_programs_have_a_port(transport: &str) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let Some(mut command) = linux("console", transport) else { return };
    command.args(["--memory", "128", "--console", "virtio", "--port", &format!("talk,{}", socket.display())]);
    let mut user = User::start(command, (37, 101));

    // What is typed before somebody reads is lost, as with any terminal.
    user.sees("~ # ");
    // What is typed is shown as well: what is waited for has to be another text.
    user.types("echo $((6*7)) on $(tty), $(stty size)");
    user.sees("42 on /dev/hvc0, 37 101\r\n");
    user.types("seq -s ' ' 1 500 | sed 's/$/ end/'");
    let numbers: Vec<String> = (1..=500).map(|number| number.to_string()).collect();
    user.sees(&format!("{} end\r\n", numbers.join(" ")));
    user.resizes((50, 120));
    user.types("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.1; done; echo now $(stty size)");
    user.sees("now 50 120\r\n");

    let data: Vec<u8> =
        (0..DATA as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let mut client = connect(&socket);
    user.types(&format!("head -c {DATA} </dev/virtio-ports/talk >data; sha256sum <data"));
    client.write_all(&data).unwrap();
    user.sees(&sha256(&data[..]));
    user.types("cat data >/dev/virtio-ports/talk; echo $((7*7)) sent");
    let mut back = vec![0; DATA];
    client.read_exact(&mut back).unwrap();
    assert!(back == data);
    user.sees("49 sent\r\n");

    // The end of one client is the end of the file; there may be another one.
    drop(client);
    let mut client = connect(&socket);
    client.write_all(b"the last ").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    user.types("cat </dev/virtio-ports/talk; echo words");
    user.sees("the last words\r\n");
    assert_eq!(client.read(&mut back).unwrap(), 0);

    user.types("exit");
    assert!(user.child.wait().unwrap().success());
}
