//! Every virtio device on every transport, on the buses of a machine that has no processor: one good request for each queue, and
//! what of it reached the outside.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use vmm_devices::channel::{AllowAll, Gatekeeper, Party, VmIdentity, VsockConnect};
use vmm_devices::net::{MacAddr, Offloads};
use vmm_devices::pci::{HostBridge, PciFunction, PciLayout};
use vmm_devices::testkit::{
    Driver, DriverQueue, LineRecorder, Memory, MmioDriver, OutputRecorder, PciDriver, TestFrame, TestNetwork,
};
use vmm_devices::virtio::balloon::{Balloon, BalloonHandle, MemoryRelease};
use vmm_devices::virtio::block::{Block, BlockHandle, MemoryDisk};
use vmm_devices::virtio::console::{Console, Port, PortConfig, Ports};
use vmm_devices::virtio::net::{Net, NetHandle};
use vmm_devices::virtio::rate::{Limits, Rate, RateLimiter};
use vmm_devices::virtio::vsock::{self, HEADER as PACKET, Header, Kind as SocketKind, Vsock, VsockHandle};
use vmm_devices::virtio::{DeviceMemory, Rng, VirtioDevice, VirtioMmio, VirtioPci};
use vmm_devices::vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_devices::{BusRange, ManualClock, MmioBus, PioBus};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub(crate) enum Kind {
    Block,
    Console,
    Rng,
    Balloon,
    Net,
    Vsock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub(crate) enum Transport {
    Mmio,
    Pci,
}

/// Bytes of the disk that the guest has; behind them are as many that it has not, and that keep [`MARK`].
pub(crate) const DISK: usize = 64 << 10;
pub(crate) const MARK: u8 = 0xa7;
/// Each byte that the entropy device gives.
pub(crate) const RANDOM: u8 = 0x5a;
/// Descriptors of each queue.
pub(crate) const LEN: u16 = 16;
/// Rings, a page for each queue.
pub(crate) const RINGS: u64 = 0x1000;
/// A header of a request to the disk, what it says at the end, and control messages to the console.
pub(crate) const HEADER: u64 = 0xa000;
pub(crate) const STATUS: u64 = 0xa100;
pub(crate) const MESSAGE: u64 = 0xa200;
pub(crate) const REPLY: u64 = 0xb000;
/// The page that the balloon is given, by number and by address.
pub(crate) const PAGE: u64 = 0x1c;

/// Where the registers are on the bus.
const MMIO: u64 = 0xd000_0000;
const BAR: u64 = 0xe800_0000;

/// A guest's page that went back to the host: first page and number of pages.
#[derive(Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Vec<(u64, u64)>>>);

impl MemoryRelease for Ledger {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().push((gpa.0 / 4096, len / 4096));
        Ok(())
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.release(gpa, len)
    }
}

/// What a device has to do with beside its driver.
pub(crate) enum Outside {
    Block { disk: Arc<MemoryDisk>, handle: BlockHandle },
    Console { screen: OutputRecorder, port: Port, ports: Ports },
    Rng,
    Balloon { ledger: Ledger, handle: BalloonHandle },
    Net { network: TestNetwork, handle: NetHandle },
    Vsock { monitor: Socket },
}

/// A monitor's end of a connection to its guest, whose other end is `guest` and `port`.
pub(crate) struct Socket {
    pub(crate) handle: VsockHandle,
    pub(crate) gatekeeper: Gatekeeper,
    stream: Option<UnixStream>,
    port: u32,
}

/// Identifier and port of the guest.
const CID: u32 = 3;
const PORT: u32 = 80;
/// What a driver says that its buffer holds.
const CREDIT: u32 = 1 << 30;

/// A packet of the guest's to port `port` of the monitor.
pub(crate) fn packet(port: u32, op: u16, len: u32) -> [u8; PACKET] {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: vsock::HOST_CID.into(),
        src_port: PORT,
        dst_port: port,
        len,
        kind: 1,
        op,
        buf_alloc: CREDIT,
        ..Header::default()
    };
    header.to_bytes()
}

impl Socket {
    /// Asks the guest for a connection.
    pub(crate) fn connect(&mut self) {
        let guest = Party::Vm(VmIdentity::new(CID.into(), 1));
        let grant =
            self.gatekeeper.open(Party::Host("monitor".into()), Some(guest), VsockConnect { port: PORT });
        // There may be no driver, or too many who wait.
        self.stream = self.handle.connect(grant.unwrap(), SocketKind::Stream).ok().map(UnixStream::from);
        if let Some(stream) = &self.stream {
            stream.set_nonblocking(true).unwrap();
        }
    }

    /// Sends something to the guest, as far as there is room, and a connection.
    pub(crate) fn send(&mut self, data: &[u8]) {
        if let Some(stream) = &mut self.stream {
            let (Ok(_) | Err(_)) = stream.write(data);
        }
    }

    /// What the guest has sent.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(stream) = &mut self.stream {
            // At the end, or when there is no more for now.
            let (Ok(_) | Err(_)) = stream.read_to_end(&mut bytes);
        }
        bytes
    }

    /// What the guest says of the connection.
    pub(crate) fn packet(&self, op: u16, len: u32) -> [u8; PACKET] {
        packet(self.port, op, len)
    }
}

/// A device, and what it has to do with, whose rates go by that clock.
pub(crate) fn device<M: DeviceMemory>(
    kind: Kind,
    clock: &Arc<ManualClock>,
) -> (Box<dyn VirtioDevice<M>>, Outside) {
    // So much that just a request of 64 KiB, and what comes behind it, has to wait.
    let limits = Limits { bytes: Rate::new(1 << 20, 1 << 15), ..Limits::default() };
    let limiter = RateLimiter::new(Arc::clone(clock), limits);
    match kind {
        Kind::Block => {
            let disk = Arc::new(MemoryDisk::new(2 * DISK as u64));
            disk.write(DISK as u64, &[MARK; DISK]).unwrap();
            let block = Block::builder(disk.clone()).rate(limiter).build().unwrap();
            let handle = block.handle();
            handle.set_capacity(DISK as u64).unwrap();
            (Box::new(block), Outside::Block { disk, handle })
        }
        Kind::Console => {
            let (console, ports) = Console::multiport(2).unwrap();
            let screen = OutputRecorder::default();
            let port = ports.add(0, PortConfig::console(screen.clone())).unwrap();
            (Box::new(console), Outside::Console { screen, port, ports })
        }
        Kind::Rng => {
            let rng = Rng::new(io::repeat(RANDOM)).rate(limiter);
            (Box::new(rng), Outside::Rng)
        }
        Kind::Balloon => {
            let ledger = Ledger::default();
            let balloon = Balloon::new(ledger.clone());
            let handle = balloon.handle();
            (Box::new(balloon), Outside::Balloon { ledger, handle })
        }
        Kind::Net => {
            let network = TestNetwork::new(1, Offloads::ALL, Offloads::ALL);
            let net = Net::builder(Arc::new(network.clone()), MacAddr::local(1)).send_rate(limiter);
            let net = net.build().unwrap();
            let handle = net.handle();
            (Box::new(net), Outside::Net { network, handle })
        }
        Kind::Vsock => {
            let gatekeeper = Gatekeeper::new(AllowAll);
            let guest = VmIdentity::new(CID.into(), 1);
            let device = Vsock::builder(CID, Arc::clone(clock)).gatekeeper(guest, gatekeeper.clone());
            let device = device.rate(limiter).build().unwrap();
            let monitor = Socket { handle: device.handle(), gatekeeper, stream: None, port: 0 };
            (Box::new(device), Outside::Vsock { monitor })
        }
    }
}

/// A device, its transport on the bus, and its driver, whose queues lie in the first pages.
pub(crate) struct Guest {
    pub(crate) kind: Kind,
    pub(crate) outside: Outside,
    /// What rates go by.
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) mmio: Arc<MmioBus>,
    pub(crate) pio: Arc<PioBus>,
    /// Its registers.
    pub(crate) registers: BusRange,
    /// The doorbell of queue 0 among them.
    pub(crate) doorbell: u64,
    pub(crate) memory: Memory,
    pub(crate) queues: Vec<DriverQueue<Memory>>,
    /// Why it gave up.
    pub(crate) failures: Arc<Mutex<Vec<String>>>,
    _bridge: Option<HostBridge>,
}

impl Guest {
    /// Its driver has done nothing so far. The device sees `seen`, which is `memory` for the driver.
    pub(crate) fn new<M: DeviceMemory>(kind: Kind, transport: Transport, memory: Memory, seen: M) -> Self {
        let clock = Arc::new(ManualClock::new(0));
        let (device, outside) = device(kind, &clock);
        let (mmio, pio): (Arc<MmioBus>, Arc<PioBus>) = Default::default();
        let failures = Arc::<Mutex<Vec<String>>>::default();
        let heard = Arc::clone(&failures);
        let failed = move |why: &dyn std::error::Error| heard.lock().unwrap().push(why.to_string());
        let (driver, bridge, registers, doorbell): (Box<dyn Driver>, _, _, _) = match transport {
            Transport::Mmio => {
                let builder = VirtioMmio::builder(device, seen, LineRecorder::default());
                let transport = Arc::new(Mutex::new(builder.on_failure(failed).build().unwrap()));
                let registers = BusRange::new(MMIO, VirtioMmio::<M>::SIZE);
                mmio.insert("virtio", registers, transport.clone()).unwrap();
                (Box::new(MmioDriver::new(transport)), None, registers, MMIO + 0x50)
            }
            Transport::Pci => {
                let bridge = HostBridge::new(PciLayout::default(), &mmio, &pio).unwrap();
                let builder = VirtioPci::builder(device, seen, |_: u64, _: u32| {});
                let function: Arc<Mutex<dyn PciFunction>> =
                    Arc::new(Mutex::new(builder.on_failure(failed).build().unwrap()));
                let address = bridge.add(Arc::clone(&function)).unwrap();
                let devfn = u64::from(address.device()) << 3 | u64::from(address.function());
                let config = PciLayout::default().ecam.0 + (devfn << 12);
                mmio.write(GuestAddress(config + 0x10), &u32::try_from(BAR).unwrap().to_le_bytes());
                mmio.write(GuestAddress(config + 4), &6_u16.to_le_bytes());
                let size = bridge.mappings()[0].range.size;
                let driver = PciDriver::new(function).unwrap();
                (Box::new(driver), Some(bridge), BusRange::new(BAR, size), BAR + 0x3000)
            }
        };
        Self {
            kind,
            outside,
            clock,
            driver,
            mmio,
            pio,
            registers,
            doorbell,
            memory,
            queues: Vec::new(),
            failures,
            _bridge: bridge,
        }
    }

    /// Starts the device with all that it offers but VIRTIO_F_EVENT_IDX, and all of its queues.
    pub(crate) fn start(&mut self) {
        let there = |index: &u16| self.driver.queue_max_size(*index) > 0;
        let count = (0..8).filter(there).count() as u64;
        self.queues = (0..count)
            .map(|index| DriverQueue::new(self.memory.clone(), RINGS * (index + 1), LEN).unwrap())
            .collect();
        let queues: Vec<_> = (0..).zip(&self.queues).collect();
        let features = self.driver.device_features() & !(1 << 29);
        self.driver.start(features, &queues).unwrap();
        if self.kind == Kind::Console {
            // It is opened, so that input comes.
            for (event, value) in [(0, 1), (3, 1), (6, 1)] {
                self.say(0, event, value);
            }
        }
        if let Outside::Vsock { monitor } = &mut self.outside {
            monitor.connect();
            // An end of the time before may come first.
            let request = loop {
                self.queues[0].chain().writable(REPLY, 64).submit().unwrap();
                self.driver.notify(0);
                assert!(self.queues[0].take_used().unwrap().is_some(), "no request comes");
                let request = Header::parse(&self.get(REPLY, PACKET).try_into().unwrap());
                if request.op == vsock::operation::REQUEST {
                    break request;
                }
            };
            let Outside::Vsock { monitor } = &mut self.outside else { return };
            monitor.port = request.src_port;
            let response = monitor.packet(vsock::operation::RESPONSE, 0);
            self.put(HEADER, &response);
            self.queues[1].chain().readable(HEADER, PACKET as u32).submit().unwrap();
            self.driver.notify(1);
            assert!(self.queues[1].take_used().unwrap().is_some());
        }
    }

    /// A control message of the console's driver.
    pub(crate) fn say(&mut self, id: u32, event: u16, value: u16) {
        let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.put(MESSAGE, &bytes);
        self.queues[2].chain().writable(REPLY, 64).submit().unwrap();
        self.queues[3].chain().readable(MESSAGE, 8).submit().unwrap();
        self.driver.notify(3);
        while self.queues[2].take_used().unwrap().is_some() {}
        assert!(self.queues[3].take_used().unwrap().is_some(), "the device always listens");
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Makes one good request on `queue`, with its data, 512 bytes at most, at `at`; its head. The queues for control have none.
    pub(crate) fn submit(&mut self, queue: u16, at: u64, write: bool) -> u16 {
        if self.kind == Kind::Block {
            let header = [u64::from(write), 2].map(u64::to_le_bytes).concat();
            self.put(HEADER, &header);
            self.put(STATUS, &[0xff]);
        }
        if self.kind == Kind::Net {
            self.put(HEADER, &[0; 12]);
        }
        if let Outside::Vsock { monitor } = &self.outside {
            self.put(HEADER, &monitor.packet(vsock::operation::RW, 8));
        }
        let ring = &mut self.queues[usize::from(queue)];
        let chain = match (self.kind, queue) {
            (Kind::Block, _) if write => {
                ring.chain().readable(HEADER, 16).readable(at, 512).writable(STATUS, 1)
            }
            (Kind::Block, _) => ring.chain().readable(HEADER, 16).writable(at, 512).writable(STATUS, 1),
            (Kind::Net, 1) => ring.chain().readable(HEADER, 12).readable(at, 64),
            (Kind::Net, 2) => ring.chain().readable(at, 3).writable(STATUS, 1),
            (Kind::Console, 0 | 4) | (Kind::Net, _) | (Kind::Rng, _) => ring.chain().writable(at, 64),
            (Kind::Balloon, 4) => ring.chain().writable(at, 0x1000),
            (Kind::Vsock, 1) => ring.chain().readable(HEADER, PACKET as u32).readable(at, 8),
            (Kind::Vsock, _) => ring.chain().writable(at, 64),
            _ => ring.chain().readable(at, 8),
        };
        chain.submit().unwrap()
    }

    /// Time enough for whatever waits for a rate.
    pub(crate) fn pass(&self) {
        self.clock.advance(1_000_000_000);
    }

    /// Which queues take a request of [`Guest::submit`], and, for the disk, whether it is a write; of others, whether something is
    /// written beside the data.
    pub(crate) fn requests(&self) -> &'static [(u16, bool)] {
        match self.kind {
            Kind::Block => &[(0, true), (0, false)],
            Kind::Console => &[(1, false), (0, false)],
            Kind::Rng => &[(0, false)],
            Kind::Balloon => &[(0, false), (1, false), (2, false), (4, false)],
            // A command has its answer written, wherever it lies.
            Kind::Net => &[(1, false), (0, false), (2, true)],
            Kind::Vsock => &[(1, false), (0, false)],
        }
    }

    /// Does each good request once, with its data at `at`, and looks whether all came where it was to.
    pub(crate) fn exchange(&mut self, at: u64) {
        self.pass();
        for &(queue, write) in self.requests() {
            let data: Vec<u8> = match self.kind {
                Kind::Balloon => [PAGE, PAGE].map(|page| u32::try_from(page).unwrap().to_le_bytes()).concat(),
                Kind::Net if queue == 2 => vec![0, 0, 1],
                _ => (1..=255).cycle().take(512).collect(),
            };
            // A report names memory, which need not hold anything.
            let at = if (self.kind, queue) == (Kind::Balloon, 4) { PAGE * 4096 } else { at };
            let fills = matches!((self.kind, queue), (Kind::Console, 0) | (Kind::Rng, _) | (Kind::Net, 0));
            self.put(
                at,
                &if fills || self.kind == Kind::Block && !write { vec![0; 512] } else { data.clone() },
            );
            if let (Outside::Console { port, .. }, 0) = (&self.outside, queue) {
                assert_eq!(port.enqueue(&data[..64]), 64);
            }
            if let (Outside::Net { network, .. }, 0) = (&self.outside, queue) {
                network.give(TestFrame::new(&data[..52]));
            }
            if let (Outside::Vsock { monitor }, 0) = (&mut self.outside, queue) {
                monitor.send(&data[..20]);
            }
            let head = self.submit(queue, at, write);
            self.driver.notify(queue);
            let kept = (self.kind, queue) == (Kind::Balloon, 2);
            if let (Outside::Balloon { handle, .. }, true) = (&self.outside, kept) {
                // One that is to be asked for.
                assert!(handle.request_statistics());
            }
            let used = self.queues[usize::from(queue)].take_used().unwrap();
            let (id, written) = used.unwrap_or_else(|| panic!("{:?}: queue {queue} hangs", self.kind));
            assert_eq!(id, u32::from(head));
            let expected = match (&self.outside, queue) {
                (Outside::Block { disk, .. }, _) => {
                    assert_eq!(self.get(STATUS, 1), [0]);
                    let mut sector = [0; 512];
                    disk.read(1024, &mut sector).unwrap();
                    assert!(sector[..] == data && self.get(at, 512) == data);
                    if write { 1 } else { 513 }
                }
                (Outside::Console { .. }, 0) => {
                    assert_eq!(self.get(at, 65), [&data[..64], &[0]].concat());
                    64
                }
                (Outside::Console { screen, .. }, _) => {
                    assert_eq!(screen.take(), data[..8]);
                    0
                }
                (Outside::Rng, _) => {
                    assert_eq!(self.get(at, 65), [&[RANDOM; 64][..], &[0]].concat());
                    64
                }
                (Outside::Net { .. }, 0) => {
                    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
                    assert_eq!(self.get(at, 65), [&header[..], &data[..52], &[0]].concat());
                    64
                }
                (Outside::Net { network, .. }, 1) => {
                    assert_eq!(network.take_sent(), [TestFrame::new(&data[..64])]);
                    0
                }
                (Outside::Net { .. }, _) => {
                    assert_eq!(self.get(STATUS, 1), [0]);
                    1
                }
                (Outside::Vsock { .. }, 0) => {
                    assert_eq!(self.get(at + PACKET as u64, 21), [&data[..20], &[data[64]]].concat());
                    64
                }
                (Outside::Vsock { .. }, _) => 0,
                (Outside::Balloon { ledger, .. }, 2) => {
                    assert_eq!(ledger.take(), []);
                    0
                }
                (Outside::Balloon { ledger, .. }, _) => {
                    assert_eq!(ledger.take(), [(PAGE, 1)]);
                    0
                }
            };
            assert_eq!(written, expected, "{:?}, queue {queue}", self.kind);
            if let (Outside::Vsock { monitor }, 1) = (&mut self.outside, queue) {
                assert_eq!(monitor.take(), data[..8]);
            }
        }
        assert_eq!(self.driver.status(), 0xf, "{:?}", self.failures.lock().unwrap());
    }

    /// Another monitor's end, for what happens while the guest is used. It begins without a connection.
    pub(crate) fn lend_socket(&self) -> Option<Socket> {
        let Outside::Vsock { monitor } = &self.outside else { return None };
        let (handle, gatekeeper) = (monitor.handle.clone(), monitor.gatekeeper.clone());
        Some(Socket { handle, gatekeeper, stream: None, port: 0 })
    }

    /// Nothing of what is outside was touched since the device was made, or since the last [`Guest::exchange`].
    pub(crate) fn assert_outside_untouched(&self) {
        match &self.outside {
            Outside::Block { .. } => self.assert_disk(0),
            Outside::Console { screen, .. } => assert_eq!(screen.take(), []),
            Outside::Rng => {}
            Outside::Balloon { ledger, .. } => assert_eq!(ledger.take(), []),
            Outside::Net { network, .. } => assert_eq!(network.take_sent(), []),
            // What the guest could send to is seen by [`Socket::take`].
            Outside::Vsock { .. } => {}
        }
    }

    /// Nothing that is not the guest's was written.
    pub(crate) fn assert_beyond_untouched(&self) {
        if let Outside::Block { disk, .. } = &self.outside {
            let mut bytes = vec![0; DISK];
            disk.read(DISK as u64, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == MARK), "sectors beyond the disk were written");
        }
    }

    /// The guest's part of the disk is full of `byte`.
    fn assert_disk(&self, byte: u8) {
        if let Outside::Block { disk, .. } = &self.outside {
            let mut bytes = vec![0; DISK];
            disk.read(0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|found| *found == byte), "the disk was written");
        }
        self.assert_beyond_untouched();
    }
}

impl Ledger {
    pub(crate) fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}
