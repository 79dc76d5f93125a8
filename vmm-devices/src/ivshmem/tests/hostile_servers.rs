//! Servers that do not keep to the protocol.

use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::closer::tests::{soon, stubborn};
use crate::ivshmem::server::{ClientConfig, ProtocolError};

/// Sends what it is told to.
pub(super) struct Liar(pub(super) UnixStream);

impl Liar {
    fn pair() -> (Self, UnixStream) {
        let (liar, client) = UnixStream::pair().unwrap();
        (Self(liar), client)
    }

    pub(super) fn say(&self, number: i64, descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let bytes = number.to_le_bytes();
        sendmsg(&self.0, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
    }

    fn bell(&self, number: i64, fd: &OwnedFd) {
        self.say(number, &[fd.as_fd()]).unwrap();
    }

    /// The beginning, as it should be.
    fn greet(&self) {
        self.say(0, &[]).unwrap();
        self.say(5, &[]).unwrap();
        let memory = SharedMemory::create("liar", SIZE).unwrap();
        self.say(-1, &[memory.as_fd()]).unwrap();
    }
}

fn bell() -> OwnedFd {
    super::super::eventfd::create().unwrap()
}

fn config() -> ClientConfig {
    ClientConfig::default().vectors(2).max_peers(3).patience(Duration::from_millis(200))
}

fn connect(client: UnixStream) -> Result<Client, IvshmemError> {
    Client::over(client, "r", config())
}

/// The device of a client whose server has begun well.
fn started() -> (Liar, Machine) {
    let (liar, client) = Liar::pair();
    liar.greet();
    let client = connect(client).unwrap();
    assert_eq!((client.position(), client.size()), (5, SIZE));
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "r", Access::ReadWrite);
    (liar, Machine::ready(client.join(map, Some(ring)).unwrap()))
}

fn protocol_error(client: UnixStream) -> String {
    match connect(client).unwrap_err() {
        IvshmemError::Protocol { source, .. } => source.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn beginnings_that_are_wrong_are_named() {
    let memory = SharedMemory::create("wrong", SIZE).unwrap();
    type Said<'a> = &'a [(i64, bool)];
    let cases: [(Said<'_>, &str); 9] = [
        (&[(1, false)], "it speaks version 1 of the protocol; known is 0"),
        (&[(0, true)], "message 0 comes with a descriptor"),
        (&[(0, false), (-1, false)], "it says -1 where a position, 0 to 65535, is expected"),
        (&[(0, false), (65536, false)], "it says 65536 where a position"),
        (&[(0, false), (i64::MIN, false)], "it says -9223372036854775808 where"),
        (&[(0, false), (3, true)], "message 3 comes with a descriptor"),
        (&[(0, false), (3, false), (-1, false)], "message -1 comes without a descriptor"),
        (&[(0, false), (3, false), (4, true)], "it says 4 where -1, for the memory, is expected"),
        (&[(0, false), (3, false)], "it did not say the memory within 200 ms"),
    ];
    for (said, expected) in cases {
        let (liar, client) = Liar::pair();
        for (number, with) in said {
            let descriptors: &[BorrowedFd<'_>] = if *with { &[memory.as_fd()] } else { &[] };
            liar.say(*number, descriptors).unwrap();
        }
        let error = protocol_error(client);
        assert!(error.starts_with(expected), "{error}");
    }
    let (liar, client) = Liar::pair();
    drop(liar);
    assert_eq!(protocol_error(client), ProtocolError::Closed.to_string());
}

#[test]
fn messages_may_come_in_pieces() {
    let (mut liar, client) = Liar::pair();
    let memory = SharedMemory::create("pieces", SIZE).unwrap();
    let speaker = thread::spawn(move || {
        for byte in [[0; 8], 9_i64.to_le_bytes()].concat() {
            liar.0.write_all(&[byte]).unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        liar.say(-1, &[memory.as_fd()]).unwrap();
        liar
    });
    assert_eq!(connect(client).unwrap().position(), 9);
    drop(speaker.join().unwrap());
}

#[test]
fn memory_that_is_none_or_could_shrink_is_refused() {
    let file = |size, seals| {
        let fd = rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let sealed = SealFlags::SHRINK | SealFlags::GROW;
    let (socket, _other) = UnixStream::pair().unwrap();
    for (memory, unsealed, expected) in [
        (file(SIZE, SealFlags::empty()), false, "lacks F_SEAL_SHRINK, F_SEAL_GROW"),
        (file(SIZE, SealFlags::GROW), false, "lacks F_SEAL_SHRINK"),
        (file(0x3000, sealed), false, "powers of two"),
        (file(0x3001, sealed), true, "multiples of"),
        (file(0, sealed), false, "size 0"),
        (bell(), false, "not a memfd"),
        (bell(), true, "not a memfd"),
        (socket.into(), true, "not a memfd"),
    ] {
        let (liar, client) = Liar::pair();
        liar.say(0, &[]).unwrap();
        liar.say(0, &[]).unwrap();
        liar.bell(-1, &memory);
        let error = Client::over(client, "r", config().unsealed(unsealed)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // The opt-in, for servers such as QEMU's.
    let (liar, client) = Liar::pair();
    liar.say(0, &[]).unwrap();
    liar.say(0, &[]).unwrap();
    liar.bell(-1, &file(SIZE, SealFlags::empty()));
    Client::over(client, "r", config().unsealed(true)).unwrap();
}

/// What a server says later ends the connection, and that closes the device.
#[test]
fn what_is_wrong_later_closes_the_device() {
    type Lie = fn(&Liar) -> rustix::io::Result<usize>;
    let lies: [Lie; 6] = [
        |liar| liar.say(-1, &[bell().as_fd()]),
        |liar| liar.say(70000, &[]),
        |liar| liar.say(1, &[std::io::pipe().unwrap().1.as_fd()]),
        |liar| liar.say(5, &[tempfile::tempfile().unwrap().as_fd()]),
        |liar| liar.say(1, &[bell().as_fd(), bell().as_fd()]),
        |liar| liar.say(1, &vec![bell().as_fd(); 64]),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (liar, machine) = started();
        assert!(machine.is_open());
        lie(&liar).unwrap();
        holds(&format!("lie {number} to close the device"), || !machine.is_open());
        assert_eq!(lock(&machine.guest.sees).len(), 0);
    }
}

#[test]
fn thousands_of_descriptors_are_not_kept() {
    let (liar, machine) = started();
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let bell = bell();
    liar.bell(5, &bell);
    holds("its own vector", || lock(&machine.function).member().peers() == [5]);
    let before = count();
    for round in 0..300 {
        // Vectors without end of three peers and of itself, and peers without end.
        for peer in [5, 1, 2, 3, 100 + round] {
            liar.bell(peer, &bell);
        }
    }
    holds("all to be heard", || machine.figures().beyond_limits >= 300 * 5 - 3 * 2 - 1);
    // Three peers with two vectors, and one more of its own; other tests open and close theirs meanwhile.
    assert!(machine.is_open());
    assert_eq!(lock(&machine.function).member().peers(), [1, 2, 3, 5]);
    holds("no more descriptors than those", || count() < before + 100);
    // Coming and going without end.
    for _ in 0..1000 {
        liar.say(1, &[]).unwrap();
        liar.bell(1, &bell);
    }
    liar.say(9999, &[]).unwrap();
    holds("the end of it", || machine.figures().beyond_limits >= 300 * 5 - 3 * 2);
    assert!(machine.is_open());
}

/// Two doorbells that are the same eventfd, in a loop that a guest has set up: a ring is one message.
#[test]
fn a_peer_whose_bell_is_ones_own_is_no_loop() {
    let (liar, machine) = started();
    let bell = bell();
    liar.bell(5, &bell);
    liar.bell(1, &bell);
    holds("both", || lock(&machine.function).member().peers() == [1, 5]);
    machine.ring(1, 0);
    holds("a ring", || machine.heard() == [0]);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.heard(), Vec::<u32>::new());
}

/// An eventfd that a peer has made a blocking one and filled.
fn full_bell() -> OwnedFd {
    let full = bell();
    let flags = rustix::fs::fcntl_getfl(&full).unwrap();
    rustix::fs::fcntl_setfl(&full, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    full
}

fn is_rung(bell: &OwnedFd) {
    holds("a ring", || super::super::eventfd::take(bell) == Ok(true));
}

/// A peer makes an eventfd a blocking one and fills it. A vCPU that rings does not wait, nor does a revocation.
#[test]
fn a_bell_that_is_full_stops_nobody() {
    let (liar, machine) = started();
    let full = full_bell();
    liar.bell(1, &full);
    liar.bell(5, &bell());
    holds("both", || lock(&machine.function).member().peers() == [1, 5]);
    let machine = Arc::new(machine);
    let (tell, told) = std::sync::mpsc::channel();
    let theirs = Arc::clone(&machine);
    thread::spawn(move || {
        for _ in 0..1000 {
            theirs.ring(1, 0);
        }
        lock(&theirs.function).member().close();
        tell.send(())
    });
    told.recv_timeout(Duration::from_secs(10)).expect("rings and a revocation do not wait");
    assert!(!machine.is_open());
    // Whoever waits there is let go, so that the test leaves nothing behind.
    rustix::io::read(&full, &mut [0; 8]).unwrap();
}

/// Peers whose bells are full keep no ring from another, however many they are.
#[test]
fn a_bell_that_is_full_keeps_no_ring_from_another_peer() {
    let (liar, machine) = started();
    let (full, good) = ([(); 5].map(|()| full_bell()), bell());
    // Two peers with two vectors each, and the device's own.
    for (peer, bell) in [1, 1, 2, 2, 5].into_iter().zip(&full) {
        liar.bell(peer, bell);
    }
    liar.bell(3, &good);
    holds("all", || lock(&machine.function).member().peers() == [1, 2, 3, 5]);
    for (peer, vector) in [(1, 0), (1, 1), (2, 0), (2, 1), (5, 0)] {
        machine.ring(peer, vector);
    }
    for _ in 0..10 {
        machine.ring(3, 0);
        is_rung(&good);
    }
    drop(machine);
    // Whoever waits there is let go, so that the test leaves nothing behind.
    for full in &full {
        super::super::eventfd::take(full).unwrap();
    }
}

/// Peers that come and go with such bells, more than are taken at once.
#[test]
fn bells_of_who_is_gone_keep_no_thread() {
    let (liar, machine) = started();
    let good = bell();
    liar.bell(3, &good);
    let kept: Vec<OwnedFd> = (100..110)
        .map(|peer| {
            let full = full_bell();
            liar.bell(peer, &full);
            holds("it to come", || lock(&machine.function).member().peers() == [3, peer as u16]);
            machine.ring(peer as u16, 0);
            // Until somebody waits there.
            thread::sleep(Duration::from_millis(5));
            liar.say(peer, &[]).unwrap();
            holds("it to go", || lock(&machine.function).member().peers() == [3]);
            machine.ring(3, 0);
            is_rung(&good);
            full
        })
        .collect();
    drop(kept);
}

#[test]
fn a_descriptor_that_nobody_can_close_stops_no_connecting_client() {
    let wrong: [&[i64]; 3] = [&[0], &[0, 5, -1], &[0, 5, 6]];
    for said in wrong {
        let (liar, client) = Liar::pair();
        let (stubborn, _ends) = stubborn();
        let (last, first) = said.split_last().unwrap();
        first.iter().for_each(|number| assert!(liar.say(*number, &[]).is_ok()));
        liar.bell(*last, &stubborn);
        drop(stubborn);
        soon("connecting", move || connect(client).unwrap_err());
    }
}

/// Whether it is too much, or no eventfd, or beyond what the client takes.
#[test]
fn a_descriptor_that_nobody_can_close_stops_no_revocation() {
    // Who outlives the server is closed by the revocation; who does not, by what comes first.
    for ((number, times), outlives) in
        [(1, 1), (5, 1), (-1, 1), (1, 2), (4, 1)].into_iter().flat_map(|lie| [(lie, false), (lie, true)])
    {
        let (liar, client) = Liar::pair();
        liar.greet();
        let client = Client::over(client, "r", config().outlives_server(outlives)).unwrap();
        let (stubborn, _ends) = stubborn();
        (1..=3).for_each(|peer| liar.bell(peer, &bell()));
        liar.say(number, &vec![stubborn.as_fd(); times]).unwrap();
        drop(stubborn);
        let gatekeeper = Gatekeeper::new(AllowAll);
        let (map, ring) = rights(&gatekeeper, "r", Access::ReadWrite);
        let id = map.id();
        let machine = Machine::ready(client.join(map, Some(ring)).unwrap());
        soon("a revocation", move || gatekeeper.revoke(id));
        assert!(!machine.is_open());
        holds("the end of the connection", || liar.say(0, &[]).is_err());
    }
}

/// What has no reads that do not wait is no bell, nor is what nobody can read; whichever peer it is said to be of.
#[test]
fn a_descriptor_whose_read_would_wait_closes_the_device() {
    use rustix::event::epoll;
    use rustix::fs::inotify;
    let wrong: [OwnedFd; 2] = [
        inotify::init(inotify::CreateFlags::CLOEXEC).unwrap(),
        epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
    ];
    for descriptor in &wrong {
        for peer in [5, 1] {
            let (liar, machine) = started();
            liar.bell(peer, descriptor);
            holds("the device to close", || !machine.is_open());
        }
    }
}
