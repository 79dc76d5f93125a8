//! Brokers that break the rules take their clients' links down, and hold nobody up.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{Timespec, epoll};
use vmm_memory::vm_memory::{MmapRegion, VolatileMemory as _};

use super::*;
use crate::channel::GrantId;
use crate::net::NetError;
use crate::net::switch::broker::memory::Side;
use crate::net::switch::broker::message::Message;
use crate::net::switch::broker::socket::Heard;
use crate::net::switch::ring::CONTROL;

const RING: usize = 256 << 10;

/// What no call on a client takes, on a host that has much else to do.
const PROMPT: Duration = Duration::from_secs(5);

/// A broker of one client, with no thread: it does what a test says.
struct Liar {
    _listener: OwnedFd,
    socket: OwnedFd,
    memory: Arc<MmapRegion<()>>,
    bell: OwnedFd,
    gatekeeper: Gatekeeper,
    grant: GrantId,
}

impl Liar {
    fn new(path: &Path) -> (Self, Device) {
        let listener = socket::listen(path).unwrap();
        let gatekeeper = Gatekeeper::new(AllowAll);
        let channel = NetworkAttach { network: "lan".into() };
        let right = gatekeeper.open(Party::Host("a".into()), None, channel).unwrap();
        let grant = right.id();
        let at = path.to_owned();
        let client = std::thread::spawn(move || {
            let config = ClientConfig::new("a").mac(mac(1)).queue_bytes(RING).reconnect(false);
            Device::of(SwitchClient::connect(right, &at, config).unwrap(), Offloads::ALL)
        });
        let socket = wait_for("a client", || socket::accept(&listener).unwrap());
        let (memory, bell) = wait_for("its hello", || hello(&socket));
        socket::send(&socket, &Message::Welcome { mtu: None, up: true }).unwrap();
        let memory = memory::take(&memory, RING).unwrap();
        (Self { _listener: listener, socket, memory, bell, gatekeeper, grant }, client.join().unwrap())
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        self.memory.get_atomic_ref(at).unwrap()
    }
}

fn hello(socket: &OwnedFd) -> Option<(OwnedFd, OwnedFd)> {
    let mut descriptors = Vec::new();
    match socket::receive_with(socket, &mut descriptors).unwrap() {
        Heard::Message(Message::Hello(_)) => {
            let bell = descriptors.pop().unwrap();
            Some((descriptors.pop().unwrap(), bell))
        }
        _ => None,
    }
}

/// Ends a test's threads, however it ends.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A client that waits for room, whose broker makes some between the device's look at what it sends and its look at what has come: what
/// rang for the one is not taken for the other.
#[test]
fn room_that_is_made_between_two_looks_is_not_missed() {
    let (_directory, path) = place();
    let (liar, mut device) = Liar::new(&path);
    let (_, mut consumer) = memory::ends(&liar.memory, RING, Side::Broker).unwrap();
    let port = &mut device.ports[0];
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&poll, port.source().unwrap(), epoll::EventData::new_u64(0), edge).unwrap();
    let woken = || {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 4];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        !epoll::wait(&poll, &mut events, Some(&now)).unwrap().0.is_empty()
    };
    let mut bytes = frame(2, 1, &[0; 60_000]);
    for round in 0..100 {
        // As devices do: hush, send, receive.
        port.hush();
        while port.transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut bytes[..])]).unwrap()
            == Sent::Done
        {}
        port.flush();
        while let Some(front) = consumer.front().unwrap() {
            consumer.pop(&front).unwrap();
        }
        assert!(consumer.wakes().unwrap(), "it waits");
        socket::ring(&liar.bell);
        let mut buffer = vec![0; MAX_FRAME];
        assert_eq!(port.receive(&[VolatileSlice::from(&mut buffer[..])]).unwrap(), None);
        assert!(woken(), "round {round}");
        assert!(!woken());
    }
}

/// Records that are none, as many as are taken out.
#[test]
fn frames_that_are_none_without_end_hold_nobody_up() {
    let (_directory, path) = place();
    let (liar, mut device) = Liar::new(&path);
    let back = CONTROL + RING;
    // Each is empty, and asks for a segmentation that there is not.
    for at in (0..RING).step_by(16) {
        let record = [0_u8, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        liar.memory.get_slice(back + CONTROL + at, 16).unwrap().copy_from(&record);
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let consumed = liar.word(back + 64).load(Ordering::SeqCst);
                liar.word(back).store(consumed + RING as u64, Ordering::SeqCst);
                socket::ring(&liar.bell);
            }
        });
        wait_for("the first", || (liar.word(back).load(Ordering::SeqCst) > 0).then_some(()));
        let _ends = Ends(&done);
        let begun = Instant::now();
        let port = &mut device.ports[0];
        let mut buffer = vec![0; MAX_FRAME];
        for _ in 0..1000 {
            port.hush();
            let received = port.receive(&[VolatileSlice::from(&mut buffer[..])]);
            // Each is the device's to weigh.
            assert!(matches!(received, Err(NetError::Packet(_))), "{received:?}");
        }
        // A device that goes on, and a right that is taken back meanwhile.
        let ends = &done;
        scope.spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                drop(port.receive(&[VolatileSlice::from(&mut buffer[..])]));
            }
        });
        liar.gatekeeper.revoke(liar.grant);
        let took = begun.elapsed();
        assert!(took < PROMPT, "{took:?}");
    });
}

#[test]
fn messages_without_end_hold_nobody_up_and_a_link_that_stays_is_told_once() {
    let (_directory, path) = place();
    let (liar, device) = Liar::new(&path);
    let ears = Arc::clone(&device.ears);
    socket::send(&liar.socket, &Message::Link { up: false }).unwrap();
    wait_for("it to hear", || (!device.up()).then_some(()));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                // As fast as it reads; there is nobody at the end.
                drop(socket::send(&liar.socket, &Message::Link { up: false }));
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        let _ends = Ends(&done);
        let begun = Instant::now();
        drop(device);
        let took = begun.elapsed();
        assert!(took < PROMPT, "{took:?}");
    });
    assert_eq!(*ears.links.lock().unwrap(), 1);
}
