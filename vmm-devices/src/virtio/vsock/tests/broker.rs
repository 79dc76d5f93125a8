//! Guests of several monitors, which a broker joins. Each monitor is a thread's here; its death is that of its sockets.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket,
    socketpair,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::super::broker::BrokerHandle;
use super::super::fabric::{Delivery, Dial, Fabric as _};
use super::super::wire::{Message, VERSION, what};
use super::*;
use crate::channel::{Refusal, Request};
use crate::closer::tests::{soon, stubborn};

struct Served {
    directory: tempfile::TempDir,
    gatekeeper: Gatekeeper,
    handle: BrokerHandle,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new(gatekeeper: Gatekeeper) -> Self {
        Self::with(gatekeeper, |broker| broker)
    }

    fn with(gatekeeper: Gatekeeper, with: impl FnOnce(Broker) -> Broker) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let broker = with(Broker::listen(directory.path().join("broker"), gatekeeper.clone()).unwrap());
        let handle = broker.handle();
        let thread = Some(std::thread::spawn(move || broker.run()));
        Self { directory, gatekeeper, handle, thread }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("broker")
    }

    fn join(&self, cid: u32) -> Result<Member, VsockError> {
        Member::join(self.path(), cid, reachable(&Gatekeeper::new(AllowAll), cid))
    }

    fn guest(&self, cid: u32) -> Guest {
        let member = self.join(cid).unwrap();
        let builder = Vsock::builder(cid, || 0).gatekeeper(vm(cid), Gatekeeper::new(AllowAll));
        Guest::new(builder.broker(member).build().unwrap())
    }

    fn kill(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The next packet, which may take a while.
fn wait(guest: &mut Guest) -> (Header, Vec<u8>) {
    let begun = Instant::now();
    loop {
        guest.poll();
        match guest.next() {
            Some((header, _)) if header.op == operation::CREDIT_UPDATE => {}
            Some(packet) => return packet,
            None => assert!(begun.elapsed() < Duration::from_secs(20), "in vain"),
        }
        std::thread::yield_now();
    }
}

fn connect_waiting(a: &mut Guest, b: &mut Guest, kind: Kind) -> [Ends; 2] {
    let key = Ends { guest_port: 1000, cid: b.cid, port: 80, kind };
    a.say(key, operation::REQUEST);
    let (header, _) = wait(b);
    assert_eq!((header.op, header.src_cid, header.src_port), (operation::REQUEST, a.cid.into(), 1000));
    let theirs = Ends { guest_port: 80, cid: a.cid, port: 1000, kind };
    b.say(theirs, operation::RESPONSE);
    assert_eq!(wait(a).0.op, operation::RESPONSE);
    [key, theirs]
}

#[test]
fn guests_of_two_monitors_speak_also_when_the_broker_is_gone() {
    let mut served = Served::new(Gatekeeper::new(AllowAll));
    let (mut a, mut b) = (served.guest(3), served.guest(4));
    let keys = connect_waiting(&mut a, &mut b, Kind::Stream);
    a.send(keys[0], b"hello");
    assert_eq!(wait(&mut b).1, b"hello");
    let asked = served.gatekeeper.open_channels();
    let words: Vec<_> = asked.iter().map(|channel| channel.request.to_string()).collect();
    assert!(words.iter().any(|word| word.contains("connect vsock port 80 of vm")), "{words:?}");
    served.kill();
    b.send(keys[1], b"still here");
    // The broker's copies are cut as it ends in order: its connections end with it. One that is killed cuts nothing.
    let (header, data) = wait(&mut a);
    assert!(header.op == operation::RW && data == b"still here", "{header:?}");
    a.say(Ends { guest_port: 1001, ..keys[0] }, operation::REQUEST);
    assert_eq!(wait(&mut a).0.op, operation::RST, "nobody connects them any more");
    b.send(keys[1], b"and here");
    assert_eq!(wait(&mut a).1, b"and here");
}

#[test]
fn who_is_refused_hears_why() {
    let gatekeeper = Gatekeeper::new(|request: &Request| {
        let port = request.object().port();
        if port == Some(80) || port == Some(ANY_PORT) && request.asker() != &vm(9) {
            Ok(())
        } else {
            Err(Refusal::new("80 alone"))
        }
    });
    let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
    let served = Served::with(gatekeeper, |broker| {
        broker.identify(move |credentials, cid, claimed| {
            (credentials.uid == uid && cid != 10).then_some(claimed)
        })
    });
    let mut a = served.guest(3);
    let mut b = served.guest(4);
    for (cid, why) in [
        (3, "it is taken"),
        (9, "its gate refuses it"),
        (10, "does not take the process"),
        (2, "none of a guest's"),
    ] {
        let error = served.join(cid).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    for (cid, port) in [(4, 81), (5, 80), (3, 80)] {
        a.say(Ends { guest_port: 1, cid, port, kind: Kind::Stream }, operation::REQUEST);
        assert_eq!(wait(&mut a).0.op, operation::RST, "{cid}, {port}");
    }
    connect_waiting(&mut a, &mut b, Kind::SeqPacket);
}

#[test]
fn what_the_broker_revokes_ends_on_both_sides() {
    let served = Served::new(Gatekeeper::new(AllowAll));
    let (mut a, mut b) = (served.guest(3), served.guest(4));
    connect_waiting(&mut a, &mut b, Kind::Stream);
    let revoked = served.gatekeeper.revoke_all(|request| request.object().port() == Some(80));
    assert_eq!(revoked, 1);
    assert_eq!((wait(&mut a).0.op, wait(&mut b).0.op), (operation::RST, operation::RST));
    // The place itself.
    served.gatekeeper.revoke_all(|request| request.asker() == &vm(4));
    let begun = Instant::now();
    while served.gatekeeper.open_channels().len() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    a.say(Ends { guest_port: 5, cid: 4, port: 80, kind: Kind::Stream }, operation::REQUEST);
    assert_eq!(wait(&mut a).0.op, operation::RST);
}

/// Of the caller's monitor, and of the other one: in each case the other side is reset, and the broker forgets the connection.
#[test]
fn a_monitor_that_dies_resets_its_connections() {
    for caller in [true, false] {
        let served = Served::new(Gatekeeper::new(AllowAll));
        let (mut a, mut b) = (served.guest(3), served.guest(4));
        let keys = connect_waiting(&mut a, &mut b, Kind::Stream);
        let (dead, mut left, key) = if caller { (a, b, keys[1]) } else { (b, a, keys[0]) };
        left.send(key, b"x");
        drop(dead);
        assert_eq!(wait(&mut left).0.op, operation::RST, "{caller}");
        let begun = Instant::now();
        // Its own place remains.
        while served.gatekeeper.open_channels().len() > 1 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", served.gatekeeper.open_channels());
            std::thread::yield_now();
        }
        let mut again = served.guest(if caller { 3 } else { 4 });
        connect_waiting(&mut left, &mut again, Kind::Stream);
    }
}

fn socket_of_messages() -> OwnedFd {
    socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap()
}

fn raw(path: PathBuf) -> OwnedFd {
    let socket = socket_of_messages();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

/// Whether the broker has hung up.
fn is_ended(socket: impl AsFd) -> bool {
    let begun = Instant::now();
    loop {
        let flags = RecvFlags::DONTWAIT;
        match rustix::net::recv(&socket, &mut [0; 100], flags) {
            Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => return true,
            Ok(_) => {}
            Err(_) if begun.elapsed() > Duration::from_secs(10) => return false,
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn a_monitor_that_speaks_nonsense_is_let_go_and_no_other() {
    let served = Served::new(Gatekeeper::new(AllowAll));
    let (mut a, mut b) = (served.guest(3), served.guest(4));
    let join = |version: u32, cid: u32| {
        let words = [1, 0, cid, version, 0, 0];
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.resize(56, 0);
        bytes
    };
    for nonsense in [vec![], vec![1], vec![0; 56], vec![0xff; 56], vec![1; 100], join(1, 7), join(2, 3)] {
        let socket = raw(served.path());
        // An empty message is the end.
        send(&socket, &nonsense, SendFlags::NOSIGNAL).unwrap();
        assert!(is_ended(&socket), "{nonsense:?}");
    }
    // One that calls and never reads what it is told.
    let flood = raw(served.path());
    send(&flood, &join(2, 7), SendFlags::NOSIGNAL).unwrap();
    let mut dial: Vec<u8> = [4, 1, 3, 80, 9, 0_u32].into_iter().flat_map(u32::to_le_bytes).collect();
    dial.resize(56, 0);
    let begun = Instant::now();
    while send(&flood, &dial, SendFlags::NOSIGNAL).is_ok() {
        a.poll();
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not let go");
    }
    // Others hear of none of it, but for being called.
    a.driver.set_status(0);
    a.start(7);
    while a.next().is_some() {}
    connect_waiting(&mut b, &mut a, Kind::Stream);
}

#[test]
fn who_says_nothing_is_let_go() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let directory = tempfile::tempdir().unwrap();
    let mut broker = Broker::listen(directory.path().join("broker"), gatekeeper).unwrap();
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(directory.path().join("broker")).unwrap()).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(5500) {
        broker.run_once(Duration::from_millis(100));
    }
    assert!(is_ended(&socket));
    assert!(broker.cids().is_empty() && broker.connections() == 0);
}

/// A broker that works when it is told to.
struct Told {
    directory: tempfile::TempDir,
    gatekeeper: Gatekeeper,
    broker: Broker,
}

impl Told {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gatekeeper = Gatekeeper::new(AllowAll);
        let broker = Broker::listen(directory.path().join("broker"), gatekeeper.clone()).unwrap();
        Self { directory, gatekeeper, broker }
    }

    fn work(&mut self) {
        self.broker.run_once(Duration::ZERO);
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("broker")
    }

    fn join(&mut self, cid: u32) -> Member {
        let path = self.path();
        let joining = std::thread::spawn(move || {
            Member::join(path, cid, reachable(&Gatekeeper::new(AllowAll), cid)).unwrap()
        });
        while !joining.is_finished() {
            self.broker.run_once(Duration::from_millis(1));
        }
        joining.join().unwrap()
    }

    /// What the broker says to a member next.
    fn next(&mut self, member: &Member) -> Delivery {
        let begun = Instant::now();
        loop {
            if let Some(delivery) = member.next() {
                return delivery;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "in vain");
            self.broker.run_once(Duration::from_millis(1));
        }
    }
}

fn dial(member: &Member, tag: u64, cid: u32) -> bool {
    member.dial(Dial {
        tag,
        cid,
        port: 80,
        from_port: 1000,
        kind: Kind::Stream,
        wanted: std::sync::Weak::new(),
    })
}

/// Others call a member until its socket is full: it is not let go for that, and hears the answers to its own calls.
#[test]
fn a_member_does_not_pay_for_those_who_call_it() {
    let mut told = Told::new();
    let [caller, called, other] = [3, 5, 4].map(|cid| told.join(cid));
    let mut taken = 0;
    for tag in 0..400 {
        assert!(dial(&caller, tag, 5));
        let Delivery::Dialed { socket, .. } = told.next(&caller) else { panic!() };
        taken += usize::from(socket.is_some());
    }
    assert!((1..=64).contains(&taken), "{taken} calls wait");
    // There is a place for another's.
    assert!(dial(&other, 1, 5));
    assert!(matches!(told.next(&other), Delivery::Dialed { tag: 1, socket: Some(_) }));
    assert!(dial(&called, 7, 3));
    told.work();
    let mut arrived = 0;
    let socket = loop {
        match told.next(&called) {
            Delivery::Dialed { tag, socket } => {
                assert_eq!(tag, 7);
                break socket;
            }
            Delivery::Arrived { .. } => arrived += 1,
        }
    };
    assert!(socket.is_some());
    assert_eq!((arrived, told.broker.cids()), (taken + 1, vec![3, 4, 5]));
    assert!(matches!(told.next(&caller), Delivery::Arrived { cid: 5, .. }));
    // What it has taken waits no more.
    told.work();
    assert!(dial(&caller, 401, 5));
    assert!(matches!(told.next(&caller), Delivery::Dialed { tag: 401, socket: Some(_) }));
}

/// One that calls more than it reads is not heard until it has read.
#[test]
fn a_member_may_read_its_answers_late() {
    let mut told = Told::new();
    let member = told.join(3);
    let mut tags = 0;
    while tags < 400 && dial(&member, tags, 9) {
        told.work();
        tags += 1;
    }
    assert!(tags >= 300, "{tags}");
    for tag in 0..tags {
        assert!(matches!(told.next(&member), Delivery::Dialed { tag: same, socket: None } if same == tag));
    }
    assert_eq!(told.broker.cids(), [3]);
}

/// Closing a descriptor may block for as long as whoever gave it likes (FUSE, `flush`). That it is not closed shows here by a lock of this
/// process, which it would lose by closing any descriptor of the file.
#[test]
fn what_a_member_passes_is_not_taken() {
    use rustix::fs::{FlockOperation, fcntl_lock};
    use std::os::unix::fs::MetadataExt as _;

    let file = tempfile::tempfile().unwrap();
    fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let is_locked = || std::fs::read_to_string("/proc/locks").unwrap().contains(&inode);
    assert!(is_locked());
    let served = Served::new(Gatekeeper::new(AllowAll));
    for joined in [false, true] {
        let socket = raw(served.path());
        let message = Message { what: what::JOIN, cid: 3, port: VERSION, ..Message::default() };
        if joined {
            assert_eq!(message.send(&socket, None), Ok(true));
        }
        assert_eq!(message.send(&socket, Some(file.as_fd())), Ok(true));
        assert!(is_ended(&socket));
        assert!(is_locked(), "{joined}");
    }
}

fn joins(cid: u32) -> Message {
    Message { what: what::JOIN, cid, port: VERSION, ..Message::default() }
}

/// In messages of each kind, and in such that are never read.
#[test]
fn what_a_member_passes_does_not_hold_up_the_broker() {
    for way in 0..5 {
        let ends = soon("the broker", move || {
            let mut told = Told::new();
            let (stubborn, ends) = stubborn();
            let socket = raw(told.path());
            let says = |message: Message, passed: Option<_>| {
                assert_eq!(message.send(&socket, passed), Ok(true));
            };
            match way {
                0 => says(joins(3), Some(stubborn.as_fd())),
                1 => {
                    // Nonsense, behind which nothing is read.
                    says(Message::default(), None);
                    says(joins(3), Some(stubborn.as_fd()));
                }
                _ => {
                    says(joins(3), None);
                    while told.broker.cids().is_empty() {
                        told.work();
                    }
                    says(joins(3), Some(stubborn.as_fd()));
                }
            }
            drop(stubborn);
            match way {
                3 => assert_eq!(told.gatekeeper.revoke_all(|_| true), 1),
                // With who has not said anything.
                4 => drop(std::mem::replace(&mut told.broker, Told::new().broker)),
                _ => {}
            }
            for _ in 0..10 {
                told.broker.run_once(Duration::from_millis(2));
            }
            assert!(told.broker.cids().is_empty());
            assert!(is_ended(&socket));
            ends
        });
        drop(ends);
    }
}

/// The called one passes it through the connection, of which the broker has the last copy, and then who revokes.
#[test]
fn what_goes_through_a_connection_does_not_hold_up_the_broker() {
    for way in 0..3 {
        let ends = soon("the broker", move || {
            let mut told = Told::new();
            let [caller, called] = [3, 4].map(|cid| told.join(cid));
            assert!(dial(&caller, 1, 4));
            let Delivery::Dialed { socket: Some(ours), .. } = told.next(&caller) else { panic!() };
            let Delivery::Arrived { socket: theirs, .. } = told.next(&called) else { panic!() };
            let (ours, theirs) = (ours.into_fd(), theirs.into_fd());
            let (stubborn, ends) = stubborn();
            assert_eq!(Message::default().send(&theirs, Some(stubborn.as_fd())), Ok(true));
            drop((stubborn, ours));
            assert_eq!(told.broker.connections(), 1);
            match way {
                0 => drop(theirs),
                1 => drop(caller),
                _ => {
                    let revoked = told.gatekeeper.revoke_all(|request| request.object().port() == Some(80));
                    assert_eq!(revoked, 1);
                }
            }
            for _ in 0..10 {
                told.broker.run_once(Duration::from_millis(2));
            }
            assert_eq!(told.broker.connections(), 0);
            ends
        });
        drop(ends);
    }
}

impl Told {
    /// Has `caller` call the guest of `called`, whose monitor passes that, and nothing else, through the connection. Then both let go
    /// of it, and the broker as well.
    fn pass(&mut self, [caller, called]: [&Member; 2], passed: OwnedFd) {
        assert!(dial(caller, 1, called.cid()));
        let Delivery::Dialed { socket: Some(ours), .. } = self.next(caller) else { panic!() };
        let Delivery::Arrived { socket: theirs, .. } = self.next(called) else { panic!() };
        let (ours, theirs) = (ours.into_fd(), theirs.into_fd());
        assert_eq!(Message::default().send(&theirs, Some(passed.as_fd())), Ok(true));
        drop((passed, ours, theirs));
        while self.broker.connections() > 0 {
            self.work();
        }
    }

    /// Whether it is connected to that one.
    fn reaches(&mut self, caller: &Member, cid: u32) -> bool {
        assert!(dial(caller, 1, cid));
        let Delivery::Dialed { socket, .. } = self.next(caller) else { panic!() };
        socket.is_some()
    }
}

#[test]
fn what_one_passes_does_not_keep_that_of_others() {
    let mut told = Told::new();
    let [caller, good, bad] = [3, 4, 5].map(|cid| told.join(cid));
    let mut kept = Vec::new();
    for _ in 0..10 {
        let (stubborn, ends) = stubborn();
        told.pass([&caller, &bad], stubborn);
        kept.push(ends);
    }
    let (mut read, write) = std::io::pipe().unwrap();
    told.pass([&caller, &good], write.into());
    assert_eq!(soon("the close of the last end", move || read.read(&mut [0]).unwrap()), 0);
}

#[test]
fn what_waits_at_the_door_does_not_hold_up_the_end() {
    let told = Told::new();
    let path = told.path();
    let socket = raw(path.clone());
    let (stubborn, ends) = stubborn();
    assert_eq!(joins(3).send(&socket, Some(stubborn.as_fd())), Ok(true));
    drop(stubborn);
    let Told { directory, broker, .. } = told;
    soon("the end", move || drop(broker));
    // Nobody is let in there any more, and another may take its place.
    let late = socket_of_messages();
    assert_eq!(connect(&late, &SocketAddrUnix::new(&path).unwrap()), Err(rustix::io::Errno::CONNREFUSED));
    Broker::listen(&path, Gatekeeper::new(AllowAll)).unwrap();
    drop((ends, directory));
}

/// Nobody else is let in while more is to be closed than may be, and those who are in go on.
#[test]
fn members_that_cannot_be_closed_are_bounded() {
    let mut told = Told::new();
    let [caller, called] = [3, 4].map(|cid| told.join(cid));
    let mut kept = Vec::new();
    for _ in 0..80 {
        let (stubborn, ends) = stubborn();
        let socket = raw(told.path());
        assert_eq!(joins(5).send(&socket, Some(stubborn.as_fd())), Ok(true));
        kept.push((socket, ends));
        drop(stubborn);
        told.work();
    }
    let (socket, _) = kept.last().unwrap();
    told.broker.run_once(Duration::from_millis(100));
    let waits = rustix::net::recv(socket, &mut [0; 1], RecvFlags::DONTWAIT);
    assert_eq!(waits, Err(rustix::io::Errno::AGAIN));
    assert!(dial(&caller, 1, 4));
    assert!(matches!(told.next(&caller), Delivery::Dialed { tag: 1, socket: Some(_) }));
    drop(called);
    drop(kept);
    assert_eq!(told.join(6).cid(), 6);
}

const CHILD: &str = "VSOCK_BROKER_WITHOUT_DESCRIPTORS";

/// Whether this is a process for that test of this file only. Else it runs there, and is over: a bound is the process's.
fn alone(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let name = format!("{}::{test}", module_path!());
    let name = name.split_once("::").unwrap().1;
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact"])
        .env(CHILD, "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// Those that one has passed and that are still to be closed are as many as the connections that it may have; nobody else has fewer.
#[test]
fn what_one_passes_is_bounded() {
    if !alone("what_one_passes_is_bounded") {
        return;
    }
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), ..before }).unwrap();
    let mut told = Told::new();
    let [caller, good, bad] = [3, 4, 5].map(|cid| told.join(cid));
    let mut kept = Vec::new();
    for _ in 0..256 / 8 {
        let (stubborn, ends) = stubborn();
        told.pass([&caller, &bad], stubborn);
        kept.push(ends);
    }
    assert!(!told.reaches(&caller, bad.cid()));
    assert!(told.reaches(&caller, good.cid()) && told.reaches(&bad, good.cid()));
    // It has room again when they are closed.
    drop(kept);
    let begun = Instant::now();
    while !told.reaches(&caller, bad.cid()) {
        assert!(begun.elapsed() < Duration::from_secs(20), "in vain");
    }
}

#[test]
fn who_comes_when_there_are_no_descriptors_is_let_in_later() {
    if !alone("who_comes_when_there_are_no_descriptors_is_let_in_later") {
        return;
    }
    let mut told = Told::new();
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let address = SocketAddrUnix::new(told.directory.path().join("broker")).unwrap();
    connect(&socket, &address).unwrap();
    send(&socket, &[1; 3], SendFlags::NOSIGNAL).unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..before }).unwrap();
    for _ in 0..3 {
        told.work();
    }
    setrlimit(Resource::Nofile, before).unwrap();
    let begun = Instant::now();
    told.broker.run_once(Duration::from_secs(20));
    assert!(begun.elapsed() < Duration::from_secs(10));
    told.work();
    assert!(is_ended(&socket), "it is heard, and let go as what it says is nonsense");
}

/// The kernel has too many descriptors of the broker's user on their way (ETOOMANYREFS), as others do not read theirs: connections are
/// refused, whichever side cannot be given its end, and nobody loses its place.
#[test]
fn connections_that_cannot_be_handed_over_are_refused() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a user that nobody else is takes root");
        return;
    }
    if !alone("connections_that_cannot_be_handed_over_are_refused") {
        return;
    }
    let mut told = Told::new();
    let [caller, called] = [3, 4].map(|cid| told.join(cid));
    let (one, other) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&one, 1 << 20).unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), ..before }).unwrap();
    rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(1_000_000 + std::process::id())).unwrap();
    let (passed, _) = std::io::pipe().unwrap();
    let flood = || (0..1000).find_map(|_| Message::default().send(&one, Some(passed.as_fd())).err());
    assert_eq!(flood(), Some(rustix::io::Errno::TOOMANYREFS));
    // For the called one, and then none for the caller.
    assert!(rustix::net::recv(&other, &mut [0; 100], RecvFlags::empty()).is_ok());
    assert!(!told.reaches(&caller, called.cid()));
    let Delivery::Arrived { socket, .. } = told.next(&called) else { panic!() };
    assert!(is_ended(&socket));
    assert_eq!(told.broker.connections(), 0);
    // Nor for the called one.
    assert_eq!(flood(), Some(rustix::io::Errno::TOOMANYREFS));
    assert!(!told.reaches(&caller, called.cid()));
    assert!(called.next().is_none());
    assert_eq!(told.broker.cids(), [3, 4]);
    drop((one, other));
    assert!(told.reaches(&caller, called.cid()));
}
