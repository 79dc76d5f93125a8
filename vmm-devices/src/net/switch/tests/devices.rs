//! Network devices on both ends, with drivers over MMIO: frames go from one guest's memory to the other's.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::net::{Checksum, Gso, GsoKind, HEADER};
use crate::testkit::{Driver as _, DriverQueue, LineRecorder, Memory, MmioDriver, guest_memory};
use crate::virtio::net::feature;
use crate::virtio::{Net, VirtioMmio};

const SEND: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
/// Of a driver's buffers, which are merged for large frames.
const BUFFER: u32 = 4096;

const PLAIN: u64 = feature::MAC | feature::STATUS | feature::MRG_RXBUF;
const ALL: u64 = PLAIN
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::HOST_TSO4
    | feature::HOST_ECN;

struct Guest {
    memory: Memory,
    driver: MmioDriver,
    rx: DriverQueue<Memory>,
    tx: DriverQueue<Memory>,
    handle: crate::virtio::net::NetHandle,
    buffers: Vec<u64>,
}

impl Guest {
    fn new(lan: &Lan, number: u8, features: u64) -> Self {
        let config = PortConfig::new(format!("vm{number}")).mac(mac(number));
        let port = Arc::new(lan.try_attach(config).unwrap());
        let net = Net::builder(port, mac(number)).build().unwrap();
        let (memory, handle) = (guest_memory(4 << 20).unwrap(), net.handle());
        let transport = VirtioMmio::new(net, memory.clone(), LineRecorder::default()).unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        let [rx, tx] = [0x1000, 0x3000].map(|at| DriverQueue::new(memory.clone(), at, 64).unwrap());
        driver.start(features, &[(0, &rx), (1, &tx)]).unwrap();
        let mut guest = Self { memory, driver, rx, tx, handle, buffers: vec![0; 64] };
        for number in 0..32 {
            guest.offer(BUFFERS + number * u64::from(BUFFER));
        }
        guest.driver.notify(0);
        guest
    }

    fn offer(&mut self, at: u64) {
        let head = self.rx.chain().writable(at, BUFFER).submit().unwrap();
        self.buffers[usize::from(head)] = at;
    }

    fn send(&mut self, info: PacketInfo, frame: &[u8]) {
        self.memory.memory().write_slice(&info.to_bytes(0), GuestAddress(SEND)).unwrap();
        self.memory.memory().write_slice(frame, GuestAddress(SEND + 0x100)).unwrap();
        let chain = self.tx.chain().readable(SEND, u32::try_from(HEADER).unwrap());
        chain.readable(SEND + 0x100, u32::try_from(frame.len()).unwrap()).submit().unwrap();
        self.driver.notify(1);
        assert!(self.tx.take_used().unwrap().is_some(), "the sender waits for nobody");
    }

    /// The next frame, out of as many buffers as it is in, which are given back.
    fn receive(&mut self) -> Option<(PacketInfo, Vec<u8>)> {
        let mut bytes = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, len) = self.rx.take_used().unwrap()?;
            let at = self.buffers[usize::try_from(head).unwrap()];
            let mut piece = vec![0; usize::try_from(len).unwrap()];
            self.memory.memory().read_slice(&mut piece, GuestAddress(at)).unwrap();
            if bytes.is_empty() {
                left = usize::from(u16::from_le_bytes([piece[10], piece[11]]));
            }
            bytes.extend(piece);
            left -= 1;
            self.offer(at);
        }
        self.driver.notify(0);
        let frame = bytes.split_off(HEADER);
        let mut header = [0; HEADER];
        header.copy_from_slice(&bytes);
        Some((PacketInfo::from_bytes(&header).unwrap(), frame))
    }
}

fn large() -> (PacketInfo, Vec<u8>) {
    let builder =
        etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    let mut frame = Vec::new();
    let data: Vec<u8> = (0..253).cycle().take(40_000).collect();
    builder.tcp(1, 2, 3, 4).write(&mut frame, &data).unwrap();
    let info = PacketInfo {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false }),
        data_valid: false,
        header_len: 54,
    };
    (info, frame)
}

#[test]
fn frames_go_from_one_guest_s_memory_to_the_other_s() {
    let lan = Lan::new();
    let mut a = Guest::new(&lan, 1, ALL);
    let mut b = Guest::new(&lan, 2, ALL);
    let mut c = Guest::new(&lan, 3, PLAIN);
    for round in 0..100_u8 {
        let [there, back] = [frame(2, 1, &"x".repeat(usize::from(round) * 13)), frame(1, 2, "back")];
        a.send(PacketInfo::default(), &there);
        assert_eq!(b.receive(), Some((PacketInfo::default(), there)));
        b.send(PacketInfo::default(), &back);
        assert_eq!(a.receive(), Some((PacketInfo::default(), back)));
    }
    let (info, frame) = large();
    a.send(info, &frame);
    assert_eq!(b.receive(), Some((info, frame.clone())), "in many buffers, as it was sent");
    // One that cannot gets it in pieces.
    let mut to_c = frame;
    to_c[5] = 3;
    a.send(info, &to_c);
    let pieces = std::iter::from_fn(|| c.receive()).count();
    assert_eq!((pieces, lan.port("vm3").metrics.segmented), (40_000_usize.div_ceil(1448), 1));
    assert_eq!(lan.port("vm3").metrics.all_dropped(), 0);
}

#[test]
fn a_guest_whose_right_is_taken_back_sees_its_link_go_down() {
    let lan = Lan::new();
    let mut a = Guest::new(&lan, 1, PLAIN);
    let mut b = Guest::new(&lan, 2, PLAIN);
    a.send(PacketInfo::default(), &frame(2, 1, ""));
    assert!(b.receive().is_some() && a.handle.link().up);
    lan.gatekeeper.revoke(lan.port("vm1").port.grant);
    assert!(!a.handle.link().up);
    assert_eq!(a.driver.interrupt_status() & 2, 2, "the configuration is another one");
    b.send(PacketInfo::default(), &frame(1, 2, ""));
    a.send(PacketInfo::default(), &frame(2, 1, ""));
    assert_eq!((a.receive(), b.receive()), (None, None));
    // Neither device is worse for it.
    assert_eq!((a.driver.status(), b.driver.status()), (0xf, 0xf));
}
