//! Two guests that are joined by a switch, with drivers that keep the rules of queues and no other; a monitor that connects, sends, reads,
//! dies and revokes meanwhile; and what must hold all the same.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use vmm_devices::ManualClock;
use vmm_devices::channel::{AllowAll, Gatekeeper, Party, VmIdentity, VsockConnect, VsockListen};
use vmm_devices::testkit::{Driver, DriverQueue, Memory, MmioDriver, guest_memory};
use vmm_devices::virtio::vsock::{ANY_PORT, HEADER, Header, Kind, Switch, Vsock, VsockHandle, operation};

/// Descriptors of each queue.
const LEN: u16 = 32;
const OUT: u64 = 0x1_0000;
const IN: u64 = 0x20_0000;
const STRIDE: u64 = 0x1_1000;
const END: u64 = 0x50_0000;
/// Connections that a device may have.
const CONNECTIONS: usize = 8;
/// Monitor's ends that are kept.
const STREAMS: usize = 6;

/// A packet of a guest's, mostly one that means something.
#[derive(Clone, Debug, Arbitrary)]
pub(crate) struct Packet {
    op: u8,
    /// Which connection of those that the guest has heard of, or a new one.
    which: u8,
    flags: u8,
    seqpacket: bool,
    len: u16,
    /// What the header says beside what is so, now and then.
    lie: (u8, u32, u32, u32),
    /// Any header at all, seldom.
    wild: (u8, [u8; HEADER]),
}

/// One thing that happens.
#[derive(Clone, Debug, Arbitrary)]
pub(crate) enum Step {
    Packet(bool, Packet),
    /// Buffers: how many, and of which size.
    Give(bool, u8, u16),
    /// The guest takes what came, and says so or not.
    Take(bool, bool),
    /// It accepts what was asked for last.
    Answer(bool),
    Connect(bool, bool),
    Send(u8, u16),
    Read(u8),
    Close(u8, u8),
    Revoke(u8),
    Pass(u32),
    TransportReset(bool),
    Restart(bool),
}

/// What a guest knows of a connection.
#[derive(Clone, Copy)]
struct Known {
    key: (u32, u64, u32),
    kind: u16,
    came: u32,
}

struct Guest {
    cid: u32,
    driver: MmioDriver,
    memory: Memory,
    queues: Vec<DriverQueue<Memory>>,
    handle: VsockHandle,
    known: Vec<Known>,
}

impl Guest {
    fn start(&mut self) {
        self.known.clear();
        self.queues =
            (1..4).map(|place| DriverQueue::new(self.memory.clone(), 0x1000 * place, LEN).unwrap()).collect();
        let queues: Vec<_> = (0..).zip(&self.queues).collect();
        self.driver.start(7, &queues).unwrap();
    }

    fn room(&self, queue: usize) -> u16 {
        let ring = &self.queues[queue];
        LEN - ring.submitted().wrapping_sub(ring.used_index().unwrap())
    }

    fn send(&mut self, header: &[u8; HEADER], data: usize) {
        if self.room(1) < 1 {
            return;
        }
        let ring = &mut self.queues[1];
        let at = OUT + STRIDE * u64::from(ring.next_head());
        ring.put(at, header).unwrap();
        ring.chain().readable(at, (HEADER + data) as u32).submit().unwrap();
        self.driver.notify(1);
        while self.queues[1].take_used().unwrap().is_some() {}
    }

    fn give(&mut self, count: u8, len: u16) {
        for _ in 0..u16::from(count % 16).min(self.room(0)) {
            let ring = &mut self.queues[0];
            let at = IN + STRIDE * u64::from(ring.next_head());
            ring.chain().writable(at, len.into()).submit().unwrap();
        }
        self.driver.notify(0);
    }

    /// How many packets came.
    fn take(&mut self, says_so: bool) -> usize {
        let mut count = 0;
        while let Some((head, len)) = self.queues[0].take_used().unwrap() {
            count += 1;
            if (len as usize) < HEADER {
                continue;
            }
            let bytes = self.queues[0].get(IN + STRIDE * u64::from(head), HEADER).unwrap();
            let header = Header::parse(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize + HEADER, len as usize);
            assert!(header.dst_cid == u64::from(self.cid) || header.op == operation::RST);
            let key = (header.dst_port, header.src_cid, header.src_port);
            match header.op {
                operation::RST => self.known.retain(|known| known.key != key),
                operation::REQUEST if self.known.len() < 2 * CONNECTIONS => {
                    self.known.push(Known { key, kind: header.kind, came: 0 });
                }
                _ => {}
            }
            if let Some(known) = self.known.iter_mut().find(|known| known.key == key) {
                known.came = known.came.wrapping_add(header.len);
                if says_so && header.op == operation::RW {
                    let known = *known;
                    let update = self.header(known, operation::CREDIT_UPDATE);
                    self.send(&update.to_bytes(), 0);
                }
            }
        }
        count
    }

    fn header(&self, known: Known, op: u16) -> Header {
        let (src_port, dst_cid, dst_port) = known.key;
        Header {
            src_cid: self.cid.into(),
            dst_cid,
            src_port,
            dst_port,
            kind: known.kind,
            op,
            buf_alloc: 60_000,
            fwd_cnt: known.came,
            ..Header::default()
        }
    }

    fn packet(&mut self, packet: &Packet, other: u32) {
        if let (0..8, wild) = &packet.wild {
            self.send(wild, usize::from(packet.len));
            return;
        }
        let op = u16::from(packet.op % 9);
        if op == operation::REQUEST && self.known.len() < 2 * CONNECTIONS {
            // To the other guest, the host, or nobody.
            let cid = [other, other, 2, 99][usize::from(packet.which % 4)];
            let key = (1000 + u32::from(packet.which % 16), cid.into(), 80);
            self.known.push(Known { key, kind: 1 + u16::from(packet.seqpacket), came: 0 });
        }
        let last = self.known.len().checked_sub(1);
        let index = if op == operation::REQUEST {
            last
        } else {
            usize::from(packet.which).checked_rem(self.known.len())
        };
        let Some(known) = index.and_then(|index| self.known.get(index)).copied() else { return };
        let len = if op == operation::RW { u32::from(packet.len) } else { 0 };
        let mut header = Header { flags: packet.flags.into(), len, ..self.header(known, op) };
        if let (0..24, len, buf_alloc, fwd_cnt) = packet.lie {
            header = Header { len, buf_alloc, fwd_cnt, ..header };
        }
        self.send(&header.to_bytes(), usize::from(packet.len));
    }
}

/// What bytes say, to the last.
pub(crate) fn steps(bytes: &[u8]) -> Vec<Step> {
    let mut left = Unstructured::new(bytes);
    std::iter::from_fn(|| if left.is_empty() { None } else { left.arbitrary().ok() }).collect()
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) opened: u64,
    pub(crate) breaches: u64,
    pub(crate) read: u64,
}

/// Runs it all, and looks whether the devices work afterwards.
pub(crate) fn run(steps: &[Step]) -> Sum {
    let (switch, gatekeeper, clock) =
        (Switch::new(), Gatekeeper::new(AllowAll), Arc::new(ManualClock::new(0)));
    let vm = |cid: u32| Party::Vm(VmIdentity::new(cid.into(), 1));
    let reachable = Gatekeeper::new(AllowAll);
    let mut guests = [3, 4].map(|cid| {
        let grant = reachable.open(vm(cid), None, VsockListen { port: ANY_PORT }).unwrap();
        let device = Vsock::builder(cid, Arc::clone(&clock)).gatekeeper(vm(cid), gatekeeper.clone());
        let device =
            device.connections(CONNECTIONS).buffer(64 << 10).switch(switch.join(cid, grant).unwrap());
        let device = device.build().unwrap();
        let (handle, memory) = (device.handle(), guest_memory(END).unwrap());
        let (driver, _) = MmioDriver::of(device, &memory).unwrap();
        let mut guest = Guest { cid, driver, memory, queues: Vec::new(), handle, known: Vec::new() };
        guest.start();
        guest
    });
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut sum = Sum::default();
    for step in steps {
        let at = |which: u8| usize::from(which).checked_rem(streams.len());
        match step {
            Step::Packet(side, packet) => {
                let other = guests[usize::from(!side)].cid;
                guests[usize::from(*side)].packet(packet, other);
            }
            Step::Give(side, count, len) => guests[usize::from(*side)].give(*count, *len),
            Step::Take(side, says_so) => {
                guests[usize::from(*side)].take(*says_so);
            }
            Step::Answer(side) => {
                let guest = &mut guests[usize::from(*side)];
                guest.give(2, 4096);
                guest.take(true);
                if let Some(known) = guest.known.last().copied() {
                    guest.send(&guest.header(known, operation::RESPONSE).to_bytes(), 0);
                }
            }
            Step::Connect(side, seqpacket) => {
                let guest = &guests[usize::from(*side)];
                let kind = if *seqpacket { Kind::SeqPacket } else { Kind::Stream };
                let host = Party::Host("monitor".into());
                let grant = gatekeeper.open(host, Some(vm(guest.cid)), VsockConnect { port: 80 }).unwrap();
                if let Ok(stream) = guest.handle.connect(grant, kind) {
                    let stream = UnixStream::from(stream);
                    stream.set_nonblocking(true).unwrap();
                    streams.truncate(STREAMS - 1);
                    streams.insert(0, stream);
                }
            }
            Step::Send(which, len) => {
                if let Some(at) = at(*which) {
                    let (Ok(_) | Err(_)) = streams[at].write(&vec![7; usize::from(*len)]);
                }
            }
            Step::Read(which) => {
                if let Some(at) = at(*which) {
                    sum.read += streams[at].read(&mut [0; 5000]).unwrap_or(0) as u64;
                }
            }
            Step::Close(which, how) => {
                if let Some(at) = at(*which) {
                    match how % 3 {
                        0 => drop(streams.remove(at)),
                        1 => drop(streams[at].shutdown(std::net::Shutdown::Write)),
                        _ => drop(streams[at].shutdown(std::net::Shutdown::Read)),
                    }
                }
            }
            Step::Revoke(which) => {
                let open = gatekeeper.open_channels();
                if let Some(channel) = usize::from(*which).checked_rem(open.len()).and_then(|at| open.get(at))
                {
                    gatekeeper.revoke(channel.id);
                }
            }
            Step::Pass(ns) => clock.advance(u64::from(*ns) << 4),
            Step::TransportReset(side) => guests[usize::from(*side)].handle.transport_reset(),
            Step::Restart(side) => guests[usize::from(*side)].start(),
        }
        for guest in &guests {
            assert_eq!(guest.driver.status(), 0xf);
            assert!(guest.handle.counters().connections as usize <= CONNECTIONS);
        }
    }
    for guest in &guests {
        let counters = guest.handle.counters();
        sum.opened += counters.opened;
        sum.breaches += counters.breaches;
    }
    // A guest that takes all, and time enough: nothing hangs.
    drop(streams);
    for _ in 0..100 {
        clock.advance(3_000_000_000);
        let taken = guests.iter_mut().map(|guest| {
            guest.give(16, 4096);
            guest.take(true)
        });
        if taken.sum::<usize>() == 0 {
            break;
        }
    }
    for guest in &mut guests {
        guest.start();
        assert_eq!(guest.handle.counters().connections, 0);
    }
    assert_eq!(gatekeeper.open_channels(), []);
    sum
}
