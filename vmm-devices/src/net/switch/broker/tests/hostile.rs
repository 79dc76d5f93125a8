//! Clients that break the rules lose their own port, and nobody else's.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::MemfdFlags;
use vmm_memory::vm_memory::{MmapRegion, VolatileMemory as _};

use super::*;
use crate::closer::tests::{soon, stubborn};
use crate::net::switch::broker::message::{Hello, Message};
use crate::net::switch::ring::CONTROL;

const RING: usize = 256 << 10;

fn hello(ring: usize) -> Message {
    Message::Hello(Hello {
        transmit: Offloads::ALL,
        ring: u32::try_from(ring).unwrap(),
        mac: None,
        name: "bad".to_owned(),
        network: "lan".to_owned(),
        token: Vec::new(),
    })
}

/// A connection, with its memory and bell.
struct Bad {
    socket: OwnedFd,
    memory: Arc<MmapRegion<()>>,
    _bell: OwnedFd,
}

impl Bad {
    fn new(path: &Path) -> Self {
        let (fd, memory) = memory::create(RING).unwrap();
        let (bell, theirs) = socket::bell().unwrap();
        let socket = socket::connect(path).unwrap();
        socket::send_with(&socket, &hello(RING), &[&fd, &theirs]).unwrap();
        let heard = wait_for("an answer", || match socket::receive(&socket).unwrap() {
            socket::Heard::Message(message) => Some(message),
            _ => None,
        });
        assert!(matches!(heard, Message::Welcome { .. }), "{heard:?}");
        Self { socket, memory, _bell: bell }
    }

    fn word(&self, at: usize, value: u64) {
        let word = self.memory.get_atomic_ref::<std::sync::atomic::AtomicU64>(at).unwrap();
        word.store(value, Ordering::SeqCst);
    }

    fn ring(&self) {
        socket::send(&self.socket, &Message::Bell).unwrap();
    }
}

/// Two good clients, which talk whatever happens.
struct Good(Device, Device);

impl Good {
    fn new(path: &Path) -> Self {
        Self(Device::new(path, "a", 1), Device::new(path, "b", 2))
    }

    fn talk(&mut self) {
        talk(&mut self.0, 2, 1, &mut self.1);
        talk(&mut self.1, 1, 2, &mut self.0);
    }
}

#[test]
fn rings_that_lie_end_their_client() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    good.talk();
    let memory = 64 + CONTROL;
    for (at, value) in [(0, u64::MAX), (0, RING as u64 + 1), (0, 16)] {
        let bad = Bad::new(&path);
        bad.memory.get_slice(CONTROL, 4).unwrap().copy_from(&u32::MAX.to_le_bytes());
        bad.word(at, value);
        bad.ring();
        let reason = broker.reason();
        assert!(reason.contains("other side says") || reason.contains("a frame of"), "{reason}");
        good.talk();
    }
    // What was taken out of the ring to it: frames for it are dropped, and it may go on sending.
    let bad = Bad::new(&path);
    socket::send(&bad.socket, &Message::Driver { present: true, receive: Offloads::ALL }).unwrap();
    bad.word(memory + RING, u64::MAX);
    for _ in 0..20 {
        good.0.send(&[&[0xff; 6][..], &mac(1).0, &vec![0; 30_000]].concat());
        good.1.try_receive();
    }
    good.talk();
    assert_eq!(broker.ports().len(), 3);
}

#[test]
fn messages_out_of_turn_end_their_client() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    for message in [&b"\x01"[..], b"", b"\xff\xff", &[3; 500], &[1; 500]] {
        let socket = socket::connect(&path).unwrap();
        rustix::net::send(&socket, message, rustix::net::SendFlags::NOSIGNAL).unwrap();
        assert!(!broker.reason().is_empty());
    }
    for message in
        [Message::Bell, Message::Driver { present: true, receive: Offloads::ALL }, Message::Link { up: true }]
    {
        let socket = socket::connect(&path).unwrap();
        socket::send(&socket, &message).unwrap();
        assert!(broker.reason().contains("turn"));
    }
    let bad = Bad::new(&path);
    socket::send(&bad.socket, &hello(RING)).unwrap();
    assert!(broker.reason().contains("turn"));
    good.talk();
    assert_eq!(broker.ports().len(), 2);
}

/// CVE-2020-35517's like: memory that can be cut off under the broker's feet, or is no memory.
#[test]
fn cve_2020_35517_descriptors_that_are_something_else_are_refused() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    let memfd = |len: usize| {
        let fd = rustix::fs::memfd_create("bad", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, len as u64).unwrap();
        fd
    };
    let whole = 2 * (CONTROL + RING);
    let (short, _) = memory::create(RING).unwrap();
    let read_only =
        std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&short))).unwrap();
    let (bell, _theirs) = socket::bell().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(whole as u64).unwrap();
    let cases: Vec<(OwnedFd, usize, &str)> = vec![
        (memfd(whole), RING, "F_SEAL_SHRINK"),
        (short.as_fd().try_clone_to_owned().unwrap(), 2 * RING, "two rings"),
        (short.as_fd().try_clone_to_owned().unwrap(), RING + 1, "powers of two"),
        (short, 1 << 30, "the most"),
        (read_only.into(), RING, "writ"),
        (file.into(), RING, "seal"),
        (bell, RING, "no seals"),
        (std::fs::File::open("/dev/zero").unwrap().into(), RING, "no seals"),
    ];
    for (fd, ring, expected) in cases {
        let (_own, theirs) = socket::bell().unwrap();
        let socket = socket::connect(&path).unwrap();
        socket::send_with(&socket, &hello(ring), &[&fd, &theirs]).unwrap();
        let reason = broker.reason();
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
    // None at all, or one.
    let (memory, _) = memory::create(RING).unwrap();
    for descriptors in [&[][..], &[&memory]] {
        let socket = socket::connect(&path).unwrap();
        socket::send_with(&socket, &hello(RING), descriptors).unwrap();
        assert_eq!(broker.reason(), "a hello has two descriptors");
    }
    good.talk();
    assert_eq!(broker.gatekeeper.open_channels().len(), 2);
}

/// A bell that is full, or blocking: the broker does not wait for anybody.
#[test]
fn a_bell_that_nobody_hears_stalls_nobody() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    for full in [false, true] {
        let (memory_fd, _memory) = memory::create(RING).unwrap();
        let (bell, theirs) = socket::bell().unwrap();
        // It is the broker's as well: both have the same open file.
        rustix::fs::fcntl_setfl(&theirs, rustix::fs::OFlags::empty()).unwrap();
        if full {
            while rustix::net::send(&theirs, &[0], rustix::net::SendFlags::DONTWAIT).is_ok() {}
        }
        let socket = socket::connect(&path).unwrap();
        socket::send_with(&socket, &hello(RING), &[&memory_fd, &theirs]).unwrap();
        wait_for("it to be there", || broker.ports().contains(&"bad".to_owned()).then_some(()));
        socket::send(&socket, &Message::Driver { present: true, receive: Offloads::ALL }).unwrap();
        for _ in 0..5 {
            // To everybody, it among them.
            good.0.send(&[&[0xff; 6][..], &mac(1).0, b"\x88\xb5hear"].concat());
            good.talk();
        }
        drop((socket, bell));
        wait_for("it to be gone", || (broker.ports().len() == 2).then_some(()));
    }
}

/// A send on what is no unix socket of datagrams may wait, whatever its flags say: none of that becomes a bell.
#[test]
fn a_bell_that_is_something_else_is_refused() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    let (memory, _memory) = memory::create(RING).unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let (pipe, _write) = std::io::pipe().unwrap();
    let bells: [OwnedFd; 6] = [tcp.into(), connected.into(), udp.into(), stream.into(), eventfd, pipe.into()];
    for bell in bells {
        let socket = socket::connect(&path).unwrap();
        socket::send_with(&socket, &hello(RING), &[&memory, &bell]).unwrap();
        let reason = broker.reason();
        assert!(reason.contains("a bell that is no unix socket"), "{reason}");
    }
    good.talk();
    assert_eq!(broker.ports().len(), 2);
}

/// Descriptors whose close waits for the client, of which the broker has the last: in messages of each kind, and in such that are never
/// read. The broker has no thread of its own, so that it is known what is under way.
#[test]
fn what_a_client_passes_is_closed_where_nobody_waits() {
    let (tell, told) = std::sync::mpsc::channel();
    // If it is held up, so is this thread, for ever.
    std::thread::spawn(move || {
        let (_directory, path) = place();
        let switch = Switch::builder("lan", ManualClock::new(1)).build();
        let builder = SwitchServer::builder(switch.clone(), Gatekeeper::new(AllowAll));
        let mut server = builder.listen(&path).unwrap();
        let mut turns = || {
            for _ in 0..10 {
                server.turn(Some(Duration::from_millis(2))).unwrap();
            }
        };
        let mut peers = Vec::new();
        for way in 0..4 {
            let (slow, peer) = stubborn();
            peers.push(peer);
            let (memory, _memory) = memory::create(RING).unwrap();
            let (_bell, theirs) = socket::bell().unwrap();
            let socket = socket::connect(&path).unwrap();
            match way {
                0 => socket::send_with(&socket, &Message::Bell, &[&slow]).unwrap(),
                1 => socket::send_with(&socket, &hello(RING), &[&slow, &memory]).unwrap(),
                2 => {
                    socket::send(&socket, &Message::Bell).unwrap();
                    socket::send_with(&socket, &Message::Bell, &[&slow]).unwrap();
                }
                _ => {
                    socket::send_with(&socket, &hello(RING), &[&memory, &theirs]).unwrap();
                    turns();
                    assert_eq!(switch.ports().len(), 1);
                    socket::send_with(&socket, &Message::Bell, &[&slow]).unwrap();
                }
            }
            drop(slow);
            turns();
            assert_eq!(switch.ports().len(), 0);
        }
        drop(server);
        tell.send(()).unwrap();
        // Nobody has read, and nobody is held up.
        drop(peers);
    });
    told.recv_timeout(LONGEST).unwrap();
}

/// With those who have connected and were not let in.
#[test]
fn what_waits_at_the_door_does_not_hold_up_the_end() {
    let (_directory, path) = place();
    let switch = Switch::builder("lan", ManualClock::new(1)).build();
    let server = SwitchServer::builder(switch, Gatekeeper::new(AllowAll)).listen(&path).unwrap();
    let client = socket::connect(&path).unwrap();
    let (slow, ends) = stubborn();
    socket::send_with(&client, &Message::Bell, &[&slow]).unwrap();
    drop(slow);
    soon("the end", move || drop(server));
    // Nobody is let in there any more, and another may take its place.
    assert!(matches!(socket::connect(&path), Err(BrokerError::Socket { what: "nobody listens there", .. })));
    socket::listen(&path).unwrap();
    drop(ends);
}

/// The end of a pipe that is passed out of turn is closed when its message is, and never becomes the broker's.
#[test]
fn descriptors_out_of_turn_are_not_taken() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    for message in [Message::Bell, Message::Driver { present: true, receive: Offloads::ALL }, hello(RING)] {
        let bad = Bad::new(&path);
        let (read, write) = std::io::pipe().unwrap();
        let read = OwnedFd::from(read);
        socket::send_with(&bad.socket, &message, &[&read]).unwrap();
        drop(read);
        assert!(broker.reason().contains("descriptors out of turn"));
        wait_for("it to be closed", || {
            (rustix::io::write(&write, &[0]) == Err(rustix::io::Errno::PIPE)).then_some(())
        });
    }
    good.talk();
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let (_directory, path) = place();
    let broker = Broker::with(&path, AllowAll, |builder| {
        builder.hello_timeout(Duration::from_millis(100)).max_clients(4)
    });
    let mut good = Good::new(&path);
    let silent = [(); 2].map(|()| socket::connect(&path).unwrap());
    let refused = SwitchClient::connect(grant(), &path, ClientConfig::new("c")).map(drop);
    assert!(matches!(refused, Err(BrokerError::Refused { reason }) if reason.contains("the most")));
    good.talk();
    for reason in ["there are 4 clients", "in time", "in time"] {
        let heard = broker.reason();
        assert!(heard.contains(reason), "{heard}");
    }
    SwitchClient::connect(grant(), &path, ClientConfig::new("c")).unwrap();
    drop(silent);
}

/// A ring that is filled all the time: others have their turn, and the broker ends when it is told.
#[test]
fn a_flood_leaves_others_their_turn() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut good = Good::new(&path);
    let mut flood = Device::new(&path, "flood", 7);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = frame(9, 7, &[0; 50_000]);
            while !done.load(Ordering::SeqCst) {
                flood.try_send(&PacketInfo::default(), &bytes);
            }
        });
        for _ in 0..50 {
            good.talk();
        }
        done.store(true, Ordering::SeqCst);
    });
    drop(broker);
}
