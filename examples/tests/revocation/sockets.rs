//! Guests with many connections: devices with a driver of the kit, and no kernel.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_devices::ManualClock;
use vmm_devices::channel::{Party, VmIdentity, VsockConnect};
use vmm_devices::testkit::{Driver as _, DriverQueue, Memory, MmioDriver, guest_memory};
use vmm_devices::virtio::vsock::{Header, Kind, Vsock, VsockHandle, operation};
use vmm_examples::policy::Enforcement;

/// Who connects.
pub(crate) const HOST: &str = "backup";

/// Descriptors of a queue, and bytes between buffers.
const LEN: u16 = 256;
const STRIDE: u64 = 0x1000;
const IN: u64 = 0x10_0000;
const OUT: u64 = 0x30_0000;
const END: u64 = 0x50_0000;

const RX: u16 = 0;
const TX: u16 = 1;

/// What the guest offers for data.
const CREDIT: u32 = 1 << 16;

/// A guest with a driver.
pub(crate) struct Guest {
    cid: u32,
    who: VmIdentity,
    driver: MmioDriver,
    queues: Vec<DriverQueue<Memory>>,
    handle: VsockHandle,
}

/// A connection, from both ends.
pub(crate) struct Connection {
    pub(crate) port: u32,
    /// The host's.
    pub(crate) stream: UnixStream,
    /// Of the host's end, as the guest sees it.
    theirs: u32,
}

impl Guest {
    pub(crate) fn new(enforcement: &Enforcement, who: VmIdentity, cid: u32) -> Self {
        let vsock = Vsock::builder(cid, Arc::new(ManualClock::new(1)));
        let vsock = vsock.gatekeeper(who, enforcement.gatekeeper()).build().unwrap();
        let handle = vsock.handle();
        let memory = guest_memory(END).unwrap();
        let (driver, _) = MmioDriver::of(vsock, &memory).unwrap();
        let queues: Vec<_> =
            (1..4).map(|place| DriverQueue::new(memory.clone(), 0x4000 * place, LEN).unwrap()).collect();
        let started: Vec<_> = (0..).zip(&queues).collect();
        driver.start(1, &started).unwrap();
        Self { cid, who, driver, queues, handle }
    }

    /// Next packet to the guest.
    fn hear(&mut self) -> Option<Header> {
        let ring = &mut self.queues[0];
        if ring.submitted() == ring.used_index().unwrap() {
            let place = IN + STRIDE * u64::from(ring.next_head());
            ring.chain().writable(place, 4096).submit().unwrap();
        }
        self.driver.notify(RX);
        let (head, _) = self.queues[0].take_used().unwrap()?;
        let bytes = self.queues[0].get(IN + STRIDE * u64::from(head), 44).unwrap();
        Some(Header::parse(&bytes.try_into().unwrap()))
    }

    fn say(&mut self, connection: (u32, u32), op: u16, data: &[u8]) {
        let (port, theirs) = connection;
        let header = Header {
            src_cid: self.cid.into(),
            dst_cid: 2,
            src_port: port,
            dst_port: theirs,
            len: u32::try_from(data.len()).unwrap(),
            kind: Kind::Stream.number(),
            op,
            buf_alloc: CREDIT,
            ..Header::default()
        };
        // Whoever else serves the device at the moment does so for this guest too, when it has the processor.
        while self.queues[1].submitted().wrapping_sub(self.queues[1].used_index().unwrap()) == LEN {
            self.hear();
            self.driver.notify(TX);
            std::thread::yield_now();
        }
        let ring = &mut self.queues[1];
        let place = OUT + STRIDE * u64::from(ring.next_head());
        ring.put(place, &[&header.to_bytes()[..], data].concat()).unwrap();
        ring.chain().readable(place, 44 + header.len).submit().unwrap();
        self.driver.notify(TX);
        while self.queues[1].take_used().unwrap().is_some() {}
    }

    /// The host connects to a port of the guest's, which accepts.
    pub(crate) fn connect(&mut self, enforcement: &Enforcement, port: u32) -> Connection {
        let host = Party::Host(HOST.into());
        let right = enforcement.gatekeeper().open(host, Some(self.who.into()), VsockConnect { port });
        let stream = UnixStream::from(self.handle.connect(right.unwrap(), Kind::Stream).unwrap());
        let request = self.hear().expect("a request");
        assert_eq!((request.op, request.dst_port), (operation::REQUEST, port));
        let theirs = request.src_port;
        self.say((port, theirs), operation::RESPONSE, &[]);
        Connection { port, stream, theirs }
    }

    /// Sends something; whether the host has it.
    pub(crate) fn reaches_host(&mut self, connection: &mut Connection) -> bool {
        self.say((connection.port, connection.theirs), operation::RW, b"x");
        connection.stream.set_nonblocking(true).unwrap();
        matches!(connection.stream.read(&mut [0; 8]), Ok(1))
    }

    /// How many resets the guest hears of now.
    pub(crate) fn resets(&mut self) -> usize {
        let mut resets = 0;
        while let Some(header) = self.hear() {
            if header.op == operation::RST {
                resets += 1;
            }
        }
        resets
    }

    /// Connections that the device has.
    pub(crate) fn open(&self) -> u32 {
        self.driver.notify(RX);
        self.handle.counters().connections
    }
}
