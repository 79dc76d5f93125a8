//! The program `ivshmem_server`, and what is left when it or its clients are killed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, Party, RegionMap};
use vmm_devices::ivshmem::server::ClientConfig;
use vmm_devices::ivshmem::{Client, Member};
use vmm_memory::Access;

use crate::guest::{Guest, packages, wait_for};

struct Program {
    child: Child,
    orders: ChildStdin,
    says: BufReader<std::process::ChildStdout>,
}

impl Program {
    fn start(path: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ivshmem_server"))
            .arg("--path")
            .arg(path)
            .args(["--size", "1024", "--vectors", "2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, says) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut program = Self { child, orders, says };
        assert_eq!(program.line(), "ready");
        program
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn list(&mut self) -> Vec<String> {
        writeln!(self.orders, "list").unwrap();
        let mut lines = Vec::new();
        loop {
            match self.line() {
                line if line == "that is all" => return lines,
                line => lines.push(line),
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let (Ok(()) | Err(_)) = self.child.kill();
        let (Ok(_) | Err(_)) = self.child.wait();
    }
}

fn join(path: &Path, config: ClientConfig) -> Member {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let (region, host): (Arc<str>, _) = ("r".into(), Party::Host("test".into()));
    let map = RegionMap { region: Arc::clone(&region), access: Access::ReadWrite };
    let map = gatekeeper.open(host.clone(), None, map).unwrap();
    let ring = gatekeeper.open(host, None, DoorbellRing { region: Arc::clone(&region) }).unwrap();
    Client::connect(path, region, config).unwrap().join(map, Some(ring)).unwrap()
}

#[test]
fn a_server_that_is_killed_closes_who_depends_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut program = Program::start(&path);
    let config = ClientConfig::default().vectors(2);
    let (leaves, stays) = (join(&path, config), join(&path, config.outlives_server(true)));
    wait_for("peers", || (stays.peers() == [0, 1]).then_some(()));
    assert_eq!(program.list().len(), 2);
    writeln!(program.orders, "disconnect 7").unwrap();
    assert_eq!(program.line(), "there is no such client");
    // SIGKILL.
    program.child.kill().unwrap();
    wait_for("one to close", || (!leaves.is_open()).then_some(()));
    assert!(stays.is_open());
    assert_eq!(stays.peers(), [0, 1]);
}

#[test]
fn a_guest_that_is_killed_is_gone_for_its_peers() {
    if !packages("killed") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut program = Program::start(&path);
    let member = join(&path, ClientConfig::default().vectors(2));
    let mut guest = Guest::start(&path, "", "ivshmem position; sleep 100");
    wait_for("the guest", || (member.peers() == [0, 1]).then_some(()));
    // When it has used the device.
    let mut said = String::new();
    BufReader::new(guest.child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "1\n");
    // SIGKILL.
    guest.child.kill().unwrap();
    wait_for("it to be gone", || (member.peers() == [0]).then_some(()));
    assert_eq!(program.list().len(), 1);
    writeln!(program.orders, "disconnect 0").unwrap();
    assert_eq!(program.line(), "disconnected");
    wait_for("the end of the other", || (!member.is_open()).then_some(()));
}
