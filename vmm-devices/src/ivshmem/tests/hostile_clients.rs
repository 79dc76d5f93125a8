//! Clients that do not keep to the protocol, and their server.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::hostile_servers::Liar;
use super::processes::{machine, sees, server};
use super::*;
use crate::channel::{DenyAll, GrantId};
use crate::closer::tests::{soon, stubborn};
use crate::ivshmem::server::ClientConfig;

#[test]
fn whoever_says_something_is_disconnected() {
    let server = server("r", 1);
    let good = machine(&server, ClientConfig::default());
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    server.admit(theirs).unwrap();
    sees(&good, &[0, 1]);
    ours.write_all(b"0").unwrap();
    sees(&good, &[0]);
    assert_eq!(server.peers().len(), 1);
}

/// One that never reads, while others come and go: what is kept for it is bounded by who is there, and nobody waits for it.
#[test]
fn what_a_client_does_not_read_is_bounded() {
    let server = Server::builder(region("r"), 8, Gatekeeper::new(AllowAll)).max_peers(3).unbound().unwrap();
    let (theirs, _deaf) = UnixStream::pair().unwrap();
    assert_eq!(server.admit(theirs).unwrap(), 0);
    for _ in 0..400 {
        let (theirs, ours) = UnixStream::pair().unwrap();
        server.admit(theirs).unwrap();
        drop(ours);
        holds("it to be gone", || server.peers().len() < 2);
        let behind = server.peers().first().map_or(0, |peer| peer.behind);
        assert!(behind <= 2 * (8 + 1), "{behind} messages");
    }
    machine(&server, ClientConfig::default());
}

/// What the kernel keeps for one that never reads counts against a limit that it has in common with all.
#[test]
fn few_descriptors_are_on_their_way_to_a_client_that_does_not_read() {
    let server = Server::builder(region("r"), 8, Gatekeeper::new(AllowAll)).max_peers(8).unbound().unwrap();
    let (theirs, deaf) = UnixStream::pair().unwrap();
    server.admit(theirs).unwrap();
    let _others: Vec<Machine> = (0..4).map(|_| machine(&server, ClientConfig::default())).collect();
    let unread = rustix::io::ioctl_fionread(&deaf).unwrap() / 8;
    assert!((4..=8).contains(&unread), "{unread} messages");
    // All the same it has everything if it reads.
    let mut receiver = crate::ivshmem::server::Receiver::new();
    for heard in 0..3 + 5 * 8 {
        eventually(&format!("message {heard}"), || receiver.receive(&deaf).unwrap());
    }
}

const ALONE: &str = "VMM_DEVICES_IVSHMEM_ALONE";

/// Runs a test in a process of its own, without privileges and with few descriptors. Whether this is that process.
fn alone(test: &str) -> bool {
    if std::env::var(ALONE).is_ok() {
        let none = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
            .unwrap();
        setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum: Some(256) }).unwrap();
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let test = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let output = child.args(["--exact", "--nocapture", &test]).env(ALONE, "1").output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// Descriptors that nobody receives, as many as the kernel lets this user have on their way.
fn flood() -> (UnixStream, UnixStream) {
    let (one, other) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&one, 1 << 20).unwrap();
    let flood = Liar(one);
    let bell = super::super::eventfd::create().unwrap();
    let refused = (0..1000).find_map(|_| flood.say(1, &[bell.as_fd()]).err());
    assert_eq!(refused, Some(rustix::io::Errno::TOOMANYREFS));
    (flood.0, other)
}

/// The host takes no more descriptors (ETOOMANYREFS) while a client joins: those who are there stay, and hear of it later.
#[test]
fn descriptors_that_others_do_not_read_cost_nobody_its_seat() {
    if !alone("descriptors_that_others_do_not_read_cost_nobody_its_seat") {
        return;
    }
    let server = server("r", 2);
    let steady = machine(&server, ClientConfig::default().vectors(2));
    sees(&steady, &[0]);
    let flood = flood();
    let (theirs, ours) = UnixStream::pair().unwrap();
    assert_eq!(server.admit(theirs).unwrap(), 1);
    thread::sleep(Duration::from_millis(100));
    assert!(steady.is_open());
    assert_eq!(server.peers().len(), 2);
    drop(flood);
    sees(&steady, &[0, 1]);
    let client = Client::over(ours, "r", ClientConfig::default()).unwrap();
    assert_eq!(client.position(), 1);
}

/// The same by clients of the server's own, which do not read while others come and go.
#[test]
fn clients_that_do_not_read_cost_nobody_its_seat() {
    if !alone("clients_that_do_not_read_cost_nobody_its_seat") {
        return;
    }
    let server = server("r", 8);
    let steady = machine(&server, ClientConfig::default());
    let _deaf: Vec<UnixStream> = (0..4)
        .map(|_| {
            let (theirs, ours) = UnixStream::pair().unwrap();
            server.admit(theirs).unwrap();
            ours
        })
        .collect();
    for _ in 0..60 {
        let (theirs, ours) = UnixStream::pair().unwrap();
        server.admit(theirs).unwrap();
        drop(ours);
        holds("it to be gone", || server.peers().len() == 5);
    }
    sees(&steady, &[0, 1, 2, 3, 4]);
    assert!(steady.is_open());
}

#[test]
fn more_than_there_is_room_for_are_refused() {
    let server = Server::builder(region("r"), 1, Gatekeeper::new(AllowAll)).max_peers(2).unbound().unwrap();
    let _kept = [machine(&server, ClientConfig::default()), machine(&server, ClientConfig::default())];
    let (theirs, _ours) = UnixStream::pair().unwrap();
    assert!(matches!(server.admit(theirs), Err(IvshmemError::Full { max: 2, .. })));
    assert_eq!(server.peers().len(), 2);
}

#[test]
fn a_storm_of_clients_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let gatekeeper = Gatekeeper::new(AllowAll);
    let server = Server::builder(region("r"), 2, gatekeeper.clone()).max_peers(8).bind(&path).unwrap();
    let steady = {
        let client = Client::connect(&path, "r", ClientConfig::default()).unwrap();
        let (map, ring) = rights(&Gatekeeper::new(AllowAll), "r", Access::ReadWrite);
        Machine::ready(client.join(map, Some(ring)).unwrap())
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    drop(UnixStream::connect(&path));
                }
            });
        }
    });
    holds("all to be gone", || server.peers().len() == 1);
    sees(&steady, &[0]);
    holds("their rights as well", || gatekeeper.open_channels().len() == 2);
    assert!(steady.is_open());
    drop(server);
    assert!(!path.exists());
}

/// A client whose server has not read what it has passed, which nobody can close until what comes with it is dropped: the server's
/// end, and its own.
fn unread() -> (UnixStream, UnixStream, TcpStream) {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let client = Liar(ours);
    let (stubborn, ends) = stubborn();
    client.say(0, &[stubborn.as_fd()]).unwrap();
    (theirs, client.0, ends)
}

#[test]
fn what_a_client_passes_does_not_hold_up_its_server() {
    let server = Arc::new(server("r", 1));
    let good = machine(&server, ClientConfig::default());
    let mut kept = Vec::new();
    for _ in 0..2 {
        let (theirs, ours, ends) = unread();
        let admitting = Arc::clone(&server);
        // It may be gone by then.
        soon("to be let in", move || drop(admitting.admit(theirs)));
        holds("it to be gone", || server.peers().len() == 1);
        sees(&good, &[0]);
        kept.push((ours, ends));
    }
    let server = Arc::into_inner(server).unwrap();
    soon("the end", move || drop(server));
}

#[test]
fn what_a_client_passes_holds_up_nobody_who_refuses_it() {
    let denies = Server::builder(region("r"), 1, Gatekeeper::new(DenyAll)).unbound().unwrap();
    let full = Server::builder(region("r"), 1, Gatekeeper::new(AllowAll)).max_peers(0).unbound().unwrap();
    for server in [denies, full] {
        let (theirs, ours, ends) = unread();
        soon("a refusal", move || server.admit(theirs).map(drop).unwrap_err());
        drop((ours, ends));
    }
}

/// A server whose thread is busy with who connects first, as long as that is locked.
struct Busy {
    directory: tempfile::TempDir,
    gatekeeper: Gatekeeper,
    server: Arc<Server>,
    hold: Arc<Mutex<()>>,
    is_busy: Arc<AtomicBool>,
}

impl Busy {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let gatekeeper = Gatekeeper::new(AllowAll);
        let (hold, is_busy) = (Arc::new(Mutex::new(())), Arc::new(AtomicBool::new(false)));
        let (held, entered) = (Arc::clone(&hold), Arc::clone(&is_busy));
        let identify = move |_: &_| {
            entered.store(true, Ordering::SeqCst);
            drop(lock(&held));
            Party::Host("client".into())
        };
        let builder = Server::builder(region("r"), 1, gatekeeper.clone()).identify(identify);
        let server = Arc::new(builder.listen(listener).unwrap());
        Self { directory, gatekeeper, server, hold, is_busy }
    }

    fn connect(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.directory.path().join("socket"))
    }

    /// Has it be busy with that one.
    fn keep(&self) -> UnixStream {
        self.is_busy.store(false, Ordering::SeqCst);
        let next = self.connect().unwrap();
        holds("the server to be busy", || self.is_busy.load(Ordering::SeqCst));
        next
    }
}

/// The server's own thread does something else, so that it is not the one that sees what the client has sent.
#[test]
fn what_a_client_passes_does_not_hold_up_who_takes_its_right_back() {
    type Way = fn(&Server, &Gatekeeper, u16, [GrantId; 2]);
    let ways: [Way; 3] = [
        |server, _, position, _| assert!(server.disconnect(position)),
        |_, gatekeeper, _, [map, _]| assert!(gatekeeper.revoke(map)),
        // That it has hung up is seen when it is told of the others.
        |_, gatekeeper, _, [_, ring]| assert!(gatekeeper.revoke(ring)),
    ];
    for way in ways {
        let busy = Busy::new();
        let good = machine(&busy.server, ClientConfig::default());
        let (theirs, ours) = UnixStream::pair().unwrap();
        let position = busy.server.admit(theirs).unwrap();
        let client = Liar(ours);
        let rights = busy.gatekeeper.open_channels();
        let rights = [2, 3].map(|which: usize| rights.get(which).unwrap().id);

        let holding = lock(&busy.hold);
        let next = busy.keep();
        let (stubborn, ends) = stubborn();
        client.say(0, &[stubborn.as_fd()]).unwrap();
        drop((stubborn, client));
        let (revoking, revoker) = (Arc::clone(&busy.server), busy.gatekeeper.clone());
        soon("a revocation", move || way(&revoking, &revoker, position, rights));
        assert!(busy.server.peers().iter().all(|peer| peer.position != position));
        drop(holding);
        sees(&good, &[0, position + 1]);
        let server = Arc::into_inner(busy.server).unwrap();
        soon("the end", move || drop(server));
        drop((next, ends));
    }
}

/// With those who have connected and were not let in, more than are at once.
#[test]
fn what_waits_at_the_door_does_not_hold_up_the_end() {
    let busy = Busy::new();
    let hold = Arc::clone(&busy.hold);
    let holding = lock(&hold);
    let first = busy.keep();
    let others: Vec<_> = (0..20).map(|_| busy.connect().unwrap()).collect();
    let last = Liar(busy.connect().unwrap());
    let (stubborn, ends) = stubborn();
    last.say(0, &[stubborn.as_fd()]).unwrap();
    drop(stubborn);
    let Busy { directory, server, .. } = busy;
    let server = Arc::into_inner(server).unwrap();
    let ending = thread::spawn(move || soon("the end", move || drop(server)));
    // It has been told that it is over, and then goes on.
    thread::sleep(Duration::from_millis(200));
    drop(holding);
    ending.join().unwrap();
    let late = UnixStream::connect(directory.path().join("socket")).unwrap_err();
    assert_eq!(late.kind(), std::io::ErrorKind::ConnectionRefused);
    drop((first, others, last, ends));
}

/// Nobody else is let in while more is to be closed than may be, and those who are in go on.
#[test]
fn connections_that_cannot_be_closed_are_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = Server::builder(region("r"), 1, Gatekeeper::new(AllowAll)).bind(&path).unwrap();
    let [one, other] = [(); 2].map(|()| machine(&server, ClientConfig::default()));
    let mut kept = Vec::new();
    let refused = (0..200).find_map(|_| {
        let (theirs, ours, ends) = unread();
        kept.push((ours, ends));
        let refused = server.admit(theirs).err();
        holds("it to be gone", || server.peers().len() == 2);
        // Else it has been gone before it was in.
        refused.filter(|error| matches!(error, IvshmemError::Closing { max: 64, .. }))
    });
    assert!(refused.is_some());
    assert!(kept.len() < 100, "{} are kept", kept.len());
    let next = UnixStream::connect(&path).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(server.peers().len(), 2);
    one.ring(1, 0);
    holds("a ring", || other.heard() == [0]);
    drop(kept);
    holds("room for who waits", || server.peers().len() == 3);
    drop(next);
}
