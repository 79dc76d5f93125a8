//! On an event loop, with a peer at the other end of a socket.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::*;
use crate::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
use crate::net::FrameSocket;
use crate::virtio::{EventLoop, LoopThread};

const PATIENCE: Duration = Duration::from_secs(20);

struct Machine {
    memory: Memory,
    driver: MmioDriver,
    rx: DriverQueue<Memory>,
    tx: DriverQueue<Memory>,
    handle: NetHandle,
    peer: OwnedFd,
    _thread: LoopThread,
}

fn machine() -> Machine {
    let grant = Gatekeeper::new(AllowAll)
        .open(Party::Vm(VmIdentity::new(1, 1)), None, NetworkAttach { network: "lan".into() })
        .unwrap();
    let (ours, peer) = FrameSocket::pair().unwrap();
    let socket = FrameSocket::new(grant, ours, Offloads::ALL).unwrap();
    let net = Net::builder(Arc::new(socket), MAC).build().unwrap();
    let thread = EventLoop::new(|| 0).unwrap().spawn("net").unwrap();
    let (memory, handle) = (memory(), net.handle());
    let builder = VirtioMmio::builder(net, memory.clone(), LineRecorder::default());
    let transport = builder.executor(thread.executor()).build().unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let [rx, tx] = [0x1000, 0x3000].map(|at| DriverQueue::new(memory.clone(), at, 128).unwrap());
    driver.start(feature::MRG_RXBUF | feature::STATUS, &[(0, &rx), (1, &tx)]).unwrap();
    Machine { memory, driver, rx, tx, handle, peer, _thread: thread }
}

/// A peer that does not read, until the socket is full; then it reads, and everything comes, in order.
#[test]
fn a_peer_that_is_slow_gets_everything_in_order() {
    let mut machine = machine();
    machine.memory.memory().write_slice(&[0; HEADER], GuestAddress(SEND)).unwrap();
    let peer = machine.peer.try_clone().unwrap();
    rustix::io::ioctl_fionbio(&peer, false).unwrap();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let mut bytes = vec![0; 70_000];
        (0..400_u32).all(|number| {
            let len = rustix::io::read(&peer, &mut bytes).unwrap();
            len == HEADER + 60_000 && bytes[HEADER..HEADER + 4] == number.to_le_bytes()
        })
    });
    for number in 0..400_u32 {
        // Each in a place of its own, for as many as are in the queue.
        let at = SEND + 0x100 + u64::from(number % 16) * 0x1_0000;
        machine.tx.put(at, &number.to_le_bytes()).unwrap();
        machine.tx.chain().readable(SEND, 12).readable(at, 60_000).submit().unwrap();
        machine.driver.notify(1);
        if number >= 15 {
            assert!(machine.tx.await_used(PATIENCE).unwrap().is_some(), "frame {number}");
        }
    }
    assert!(reader.join().unwrap());
    assert_eq!(machine.driver.status(), 0xf);
}

/// Frames that come while nothing is asked for wake the loop; those that find no buffers wait in the socket.
#[test]
fn frames_of_the_peer_wake_the_loop() {
    let mut machine = machine();
    for number in 0..100_u8 {
        let bytes = [&[0; HEADER][..], &frame(MAC, 60 + usize::from(number))].concat();
        rustix::io::write(&machine.peer, &bytes).unwrap();
        if number % 3 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        machine.rx.chain().writable(BUFFERS, 2000).submit().unwrap();
        machine.driver.notify(0);
        let used = machine.rx.await_used(PATIENCE).unwrap();
        assert_eq!(used.map(|(_, len)| len), Some(72 + u32::from(number)));
    }
    // What is no frame is dropped, and what comes behind it does not wait for another event.
    let sent: [&[u8]; 4] = [&[1], &[0xff; 60], &[0; 20], &[&[0; HEADER][..], &frame(MAC, 99)].concat()];
    for bytes in sent {
        rustix::io::write(&machine.peer, bytes).unwrap();
    }
    machine.rx.chain().writable(BUFFERS, 2000).submit().unwrap();
    machine.driver.notify(0);
    assert_eq!(machine.rx.await_used(PATIENCE).unwrap().map(|(_, len)| len), Some(111));
    assert_eq!(machine.handle.counters().receive_dropped, 3);
}

#[test]
fn a_peer_that_is_gone_is_a_cable_that_is_out() {
    let Machine { driver, mut rx, mut tx, handle, peer, _thread, .. } = machine();
    // Without a buffer it would look for no frame, and for no end.
    rx.chain().writable(BUFFERS, 2000).submit().unwrap();
    driver.notify(0);
    assert!(handle.link().up);
    drop(peer);
    let begun = std::time::Instant::now();
    while handle.link().up {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    let mut config = [0; 8];
    driver.read_config(0, &mut config);
    assert_eq!(config[6], 0);
    tx.chain().readable(SEND, 100).submit().unwrap();
    driver.notify(1);
    assert!(tx.await_used(PATIENCE).unwrap().is_some());
    assert_eq!(handle.counters().send_dropped, 1);
}
