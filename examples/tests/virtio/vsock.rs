//! Sockets between programs of guests and of this machine, and between those of two guests, with the driver of Debian's kernel.

use std::fs;
use std::io::{Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, connect, listen, recv,
    send, socket,
};

use crate::guest::{Guest, linux, wait_for};

/// The program that guests run.
const PROGRAM: &str = env!("VSOCK_GUEST");

/// More than all buffers on the way hold.
const DATA: usize = 3 << 20;

/// Data that is made here, and seen by checksums in guests.
fn data(seed: u64) -> Vec<u8> {
    (0..DATA as u64).map(|n| ((n + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn guest(linux: Command, line: &str, vsock: &str) -> Guest {
    let mut linux = linux;
    linux.args(["--memory", "128", "--add", &format!("{PROGRAM}:/root/vsock"), "--vsock", vsock]);
    Guest::start(linux, line)
}

/// Where a program listens for the guest.
fn service(path: &Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", path.display()))
}

/// Sends back what one client sends, until that ends.
fn echo_stream(path: PathBuf) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut back = client.try_clone().unwrap();
        std::io::copy(&mut client, &mut back).unwrap();
    });
}

fn seqpacket() -> OwnedFd {
    socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap()
}

fn message(socket: &OwnedFd) -> Vec<u8> {
    let mut room = vec![MaybeUninit::uninit(); 1 << 18];
    let ((bytes, _), _) = recv(socket, &mut room[..], RecvFlags::empty()).unwrap();
    bytes.to_vec()
}

fn echo_messages(path: PathBuf) {
    let listener = seqpacket();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    std::thread::spawn(move || {
        let client = accept(&listener).unwrap();
        loop {
            let message = message(&client);
            if message.is_empty() {
                break;
            }
            send(&client, &message, SendFlags::NOSIGNAL).unwrap();
        }
    });
}

/// A program of this machine's that connects to the guest's port.
fn client(path: &Path, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(path).unwrap();
    writeln!(client, "CONNECT {port}").unwrap();
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') {
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0].into());
    }
    assert!(line.starts_with("OK "), "{line}");
    client
}

const HOST_LINE: &str = "
    cd /root
    head -c 3145728 /dev/urandom >data
    for kind in stream seqpacket; do
        port=$([ $kind = stream ] && echo 5000 || echo 5001)
        ./vsock send $kind 2 $port <data | cmp - data && echo $kind to the host >&3
        { ./vsock echo $kind 80; echo $kind done $? >&3; } | { read word; echo $kind $word >&3; cat; }
    done
    echo refused $(./vsock refused stream 2 5999) $(./vsock refused stream 9 80) $(./vsock refused seqpacket 2 5999) >&3
    read looked <&3
    echo all is done";

#[test]
fn a_guest_and_this_machine_connect_both_ways_over_mmio() {
    a_guest_and_this_machine_connect_both_ways("mmio");
}

#[test]
fn a_guest_and_this_machine_connect_both_ways_over_pci() {
    a_guest_and_this_machine_connect_both_ways("pci");
}

fn a_guest_and_this_machine_connect_both_ways(transport: &str) {
    let Some(command) = linux("vsock", transport) else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    echo_stream(service(&path, 5000));
    echo_messages(service(&path, 5001));
    let mut guest = guest(command, HOST_LINE, &format!("3,{}", path.display()));

    assert_eq!(guest.hear(), "stream to the host");
    assert_eq!(guest.hear(), "stream listening");
    let (text, mut stream) = (data(1), client(&path, 80));
    let (mut reader, sent) = (stream.try_clone().unwrap(), text.clone());
    let writer = std::thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream
    });
    let mut back = Vec::new();
    reader.read_to_end(&mut back).unwrap();
    drop(writer.join().unwrap());
    assert!(back == text, "{} of {} bytes came back", back.len(), text.len());
    assert_eq!(guest.hear(), "stream done 0");

    assert_eq!(guest.hear(), "seqpacket to the host");
    assert_eq!(guest.hear(), "seqpacket listening");
    let client = seqpacket();
    connect(&client, &SocketAddrUnix::new(format!("{}_seqpacket", path.display())).unwrap()).unwrap();
    send(&client, b"CONNECT 80\n", SendFlags::empty()).unwrap();
    assert!(message(&client).starts_with(b"OK "));
    for len in [1, 2, 1000, 4096, 59_999, 60_000] {
        let part = text.get(..len).unwrap();
        send(&client, part, SendFlags::empty()).unwrap();
        assert!(message(&client) == part, "{len}");
    }
    drop(client);
    assert_eq!(guest.hear(), "seqpacket done 0");

    assert_eq!(guest.hear(), "refused ConnectionReset ConnectionReset ConnectionReset");
    let figures = guest.figures();
    let sent = figures.of("transferred_bytes", "vsock0", "write");
    assert!(sent >= 3.0 * DATA as f64, "{figures:?}");
    assert_eq!(figures.get("virtio_vsock_opened_total{device=\"vsock0\"}"), 4.0);
    assert_eq!(figures.get("virtio_vsock_breaches_total{device=\"vsock0\"}"), 0.0);
    guest.say("looked");
    assert_eq!(guest.output(), "all is done\n");
}

/// A broker of its own process.
struct Switch {
    child: Child,
    path: PathBuf,
}

impl Switch {
    fn start(directory: &Path, arguments: &[&str]) -> Self {
        let path = directory.join("broker");
        let child =
            Command::new(env!("CARGO_BIN_EXE_vsock_switch")).arg(&path).args(arguments).spawn().unwrap();
        wait_for("a broker", || fs::symlink_metadata(&path).ok());
        Self { child, path }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let (Ok(()) | Err(_)) = self.child.kill();
        let (Ok(_) | Err(_)) = self.child.wait();
    }
}

const SERVER_LINE: &str = "
    cd /root
    { ./vsock echo stream 80; echo stream done $? >&3; } | { read word; echo $word >&3; cat; }
    { ./vsock echo seqpacket 81; echo seqpacket done $? >&3; } | { read word; echo $word >&3; cat; }
    { ./vsock echo stream 82; echo last done $? >&3; } | { read word; echo $word >&3; cat; }
    echo all is served";

const CLIENT_LINE: &str = "
    cd /root
    head -c 3145728 /dev/urandom >data
    read go <&3
    ./vsock send stream 4 80 <data | cmp - data && echo stream >&3
    read go <&3
    ./vsock send seqpacket 4 81 <data | cmp - data && echo seqpacket >&3
    read go <&3
    echo refused $(./vsock refused stream 4 99) >&3
    { echo before; read go <&3; echo after; } | ./vsock send stream 4 82 >back
    cat back >&3
    echo refused $(./vsock refused stream 4 82) >&3
    echo all is asked";

#[test]
fn two_guests_connect_over_mmio() {
    two_guests_connect("mmio");
}

#[test]
fn two_guests_connect_over_pci() {
    two_guests_connect("pci");
}

fn two_guests_connect(transport: &str) {
    let (Some(first), Some(second)) = (linux("vsock", transport), linux("vsock", transport)) else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut switch =
        Switch::start(directory.path(), &["--allow", "3,4,80", "--allow", "3,4,81", "--allow", "3,4,82"]);
    let vsock = |cid: u32| {
        format!("{cid},{},switch={}", directory.path().join(cid.to_string()).display(), switch.path.display())
    };
    let mut server = guest(first, SERVER_LINE, &vsock(4));
    let mut client = guest(second, CLIENT_LINE, &vsock(3));
    for kind in ["stream", "seqpacket"] {
        assert_eq!(server.hear(), "listening");
        client.say("go");
        assert_eq!(client.hear(), kind);
        assert_eq!(server.hear(), format!("{kind} done 0"));
    }
    assert_eq!(server.hear(), "listening");
    client.say("go");
    // The gate's refusal, which the guest sees as that of nobody who listens.
    assert_eq!(client.hear(), "refused ConnectionReset");
    // The broker dies while a connection is open, which goes on; a new one has nobody who makes it.
    let opened = "virtio_vsock_opened_total{device=\"vsock0\"}";
    wait_for("a connection", || (client.figures().get(opened) == 3.0).then_some(()));
    switch.kill();
    client.say("go");
    assert_eq!(client.hear(), "before");
    assert_eq!(client.hear(), "after");
    assert_eq!(client.hear(), "refused ConnectionReset");
    assert_eq!(server.hear(), "last done 0");
    assert_eq!(server.output(), "all is served\n");
    assert_eq!(client.output(), "all is asked\n");
}

/// A monitor that is killed: the other guest's connection is reset, and its device goes on.
#[test]
fn a_monitor_that_is_killed_resets_the_other_guest() {
    let (Some(first), Some(second)) = (linux("vsock", "pci"), linux("vsock", "pci")) else { return };
    let directory = tempfile::tempdir().unwrap();
    let switch = Switch::start(directory.path(), &[]);
    let vsock = |cid: u32| {
        format!("{cid},{},switch={}", directory.path().join(cid.to_string()).display(), switch.path.display())
    };
    let mut server =
        guest(first, "cd /root; ./vsock echo stream 80 | { read word; echo $word >&3; cat; }", &vsock(4));
    let line = "
        cd /root
        { echo before; read go <&3; } | ./vsock send stream 4 80; echo ended $? >&3
        echo refused $(./vsock refused stream 4 80) >&3
        echo all is asked";
    assert_eq!(server.hear(), "listening");
    let mut client = guest(second, line, &vsock(3));
    let opened = "virtio_vsock_opened_total{device=\"vsock0\"}";
    wait_for("a connection", || (server.figures().get(opened) == 1.0).then_some(()));
    server.kill();
    client.say("go");
    // What the program had sent came back before or not; it hears of the end in any case.
    let ended = client.hear();
    assert!(ended.starts_with("ended "), "{ended}");
    assert_eq!(client.hear(), "refused ConnectionReset");
    let output = client.output();
    assert!(output.ends_with("all is asked\n"), "{output}");
}
