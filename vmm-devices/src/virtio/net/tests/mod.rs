//! The device in isolation: driven over MMIO by the kit's driver, on a network that a test has in hand.

mod control;
mod device;
mod flaws;
mod model;
mod receive;
#[cfg(feature = "event-loop")]
mod threads;
mod transmit;

use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::ManualClock;
use crate::net::{Checksum, Gso, GsoKind, HEADER, Link, PacketInfo};
use crate::testkit::{
    Driver as _, DriverQueue, LineRecorder, Memory, MmioDriver, TestFrame, TestNetwork, guest_memory_of,
};
use crate::virtio::VirtioMmio;
use crate::virtio::rate::{Limits, Rate};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
const PEER: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 2]);

/// Where the driver has frames to send, and buffers for those that come.
const SEND: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4_0000;
const COMMAND: u64 = 0x9000;
const ANSWER: u64 = 0x9f00;
/// Where there is neither RAM nor anything else.
const NOWHERE: u64 = 0x4000_0000;
/// What is in buffers before a frame.
const POISON: u8 = 0xee;
/// Bytes of a driver's buffers.
const BUFFER: u32 = 1600;

/// Everything that a driver of today takes of a network that can do everything.
const ALL: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::CTRL_GUEST_OFFLOADS
    | feature::MAC
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MRG_RXBUF
    | feature::STATUS
    | feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::GUEST_ANNOUNCE
    | feature::CTRL_MAC_ADDR
    | feature::GUEST_USO4
    | feature::GUEST_USO6
    | feature::HOST_USO;

/// A guest with one network device of one pair of queues.
struct Rig {
    memory: Memory,
    driver: MmioDriver,
    rx: DriverQueue<Memory>,
    tx: DriverQueue<Memory>,
    control: DriverQueue<Memory>,
    network: TestNetwork,
    handle: NetHandle,
    line: LineRecorder,
    /// Buffers that the driver has made available, by head.
    buffers: Vec<(u16, u64, u32)>,
    /// So many were.
    offered: u64,
}

fn everything() -> TestNetwork {
    TestNetwork::new(1, Offloads::ALL, Offloads::ALL)
}

/// Two regions that touch at 0x20000.
fn memory() -> Memory {
    guest_memory_of(&[(0, 0x2_0000), (0x2_0000, 0x1e_0000)]).unwrap()
}

impl Rig {
    fn new(features: u64) -> Self {
        Self::with(everything(), features, |builder| builder)
    }

    fn with(network: TestNetwork, features: u64, change: impl FnOnce(NetBuilder) -> NetBuilder) -> Self {
        let net = change(Net::builder(Arc::new(network.clone()), MAC)).build().unwrap();
        let (memory, line, handle) = (memory(), LineRecorder::default(), net.handle());
        let transport = VirtioMmio::new(net, memory.clone(), line.clone()).unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        let [rx, tx, control] =
            [0x1000, 0x3000, 0x5000].map(|at| DriverQueue::new(memory.clone(), at, 64).unwrap());
        let mut rig =
            Self { memory, driver, rx, tx, control, network, handle, line, buffers: Vec::new(), offered: 0 };
        rig.start(features);
        rig
    }

    /// A driver comes, or comes anew.
    fn start(&mut self, features: u64) {
        let again = |at| DriverQueue::new(self.memory.clone(), at, 64).unwrap();
        (self.rx, self.tx, self.control) = (again(0x1000), again(0x3000), again(0x5000));
        self.buffers.clear();
        let mut queues = vec![(0, &self.rx), (1, &self.tx)];
        if features & feature::CTRL_VQ != 0 {
            queues.push((2, &self.control));
        }
        self.driver.start(features, &queues).unwrap();
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Sends a frame in one piece, header and all.
    fn send(&mut self, info: PacketInfo, frame: &[u8]) -> Vec<TestFrame> {
        self.send_raw(&info.to_bytes(0), frame);
        self.network.take_sent()
    }

    fn send_raw(&mut self, header: &[u8], frame: &[u8]) {
        self.put(SEND, header);
        self.put(SEND + 0x100, frame);
        let chain = self.tx.chain().readable(SEND, u32::try_from(header.len()).unwrap());
        let head = chain.readable(SEND + 0x100, u32::try_from(frame.len()).unwrap()).submit().unwrap();
        self.driver.notify(1);
        assert_eq!(self.tx.take_used().unwrap(), Some((head.into(), 0)), "nothing is written to it");
    }

    /// Makes a poisoned buffer available, the next of many, and rings.
    fn offer(&mut self, len: u32) {
        let at = BUFFERS + self.offered % 64 * 0x4000;
        self.offered += 1;
        self.put(at, &vec![POISON; len as usize + 1]);
        let head = self.rx.chain().writable(at, len).submit().unwrap();
        self.buffers.push((head, at, len));
        self.driver.notify(0);
    }

    /// The next buffers that the device has used: how many there were to the frame as its header says, and what was written.
    fn receive(&mut self) -> Option<(PacketInfo, Vec<Vec<u8>>)> {
        let mut header = None;
        let mut parts = Vec::new();
        loop {
            let Some((id, written)) = self.rx.take_used().unwrap() else {
                assert!(header.is_none(), "a frame is shown in part");
                return None;
            };
            let place = self.buffers.iter().position(|(head, ..)| u32::from(*head) == id).unwrap();
            let (_, at, len) = self.buffers.remove(place);
            let bytes = self.get(at, len as usize + 1);
            assert!(written <= len && bytes[len as usize] == POISON);
            let mut bytes = bytes[..written as usize].to_vec();
            let (_, left) = header.get_or_insert_with(|| {
                let head: [u8; HEADER] = bytes.drain(..HEADER).collect::<Vec<_>>().try_into().unwrap();
                (PacketInfo::from_bytes(&head).unwrap(), u16::from_le_bytes([head[10], head[11]]))
            });
            parts.push(bytes);
            *left -= 1;
            if *left == 0 {
                return header.map(|(info, _)| (info, parts));
            }
        }
    }

    /// A frame that came in one buffer or several, as one.
    fn received(&mut self) -> Option<TestFrame> {
        self.receive().map(|(info, parts)| TestFrame::new(parts.concat()).with_info(info))
    }

    /// Gives a command; whether it was obeyed.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        self.put(COMMAND, &[&[class, command], data].concat());
        self.put(ANSWER, &[POISON, POISON]);
        let chain = self.control.chain().readable(COMMAND, 2);
        let chain = if data.is_empty() {
            chain
        } else {
            chain.readable(COMMAND + 2, u32::try_from(data.len()).unwrap())
        };
        let head = chain.writable(ANSWER, 1).submit().unwrap();
        self.driver.notify(2);
        assert_eq!(self.control.take_used().unwrap(), Some((head.into(), 1)));
        let answer = self.get(ANSWER, 2);
        assert!(answer[0] <= 1 && answer[1] == POISON, "{answer:?}");
        answer[0] == 0
    }

    fn config(&self) -> [u8; 17] {
        let mut config = [0; 17];
        self.driver.read_config(0, &mut config);
        config
    }
}

/// A frame from the peer to `to`, of `len` bytes, each of which tells where it is.
fn frame(to: MacAddr, len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|at| u8::try_from(at % 239).unwrap()).collect();
    let start = [&to.0[..], &PEER.0, &[8, 0]].concat();
    let len = start.len().min(len);
    frame[..len].copy_from_slice(&start[..len]);
    frame
}

/// What a sender says of 64 KiB of TCP.
fn segmented() -> PacketInfo {
    PacketInfo {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false }),
        header_len: 66,
        ..PacketInfo::default()
    }
}

fn limiter(clock: &Arc<ManualClock>, bytes: u64) -> RateLimiter {
    RateLimiter::new(Arc::clone(clock), Limits { bytes: Rate::new(1 << 20, bytes), ..Limits::default() })
}
