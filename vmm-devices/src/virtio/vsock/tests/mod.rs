//! The device under a driver that is well-behaved, or not, over MMIO; with programs of the host, and other guests.

#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths here are small, and bytes of patterns are meant"
)]

mod broker;
mod connection;
mod ends;
mod flaws;
mod host;
mod messages;
mod model;
mod passed;
mod revoked;
mod shares;
mod switch;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::ManualClock;
use crate::channel::{AllowAll, Gatekeeper, Party, VmIdentity, VsockListen};
use crate::testkit::{Driver, DriverQueue, Memory, MmioDriver, guest_memory};

/// Descriptors of each queue of the driver.
const LEN: u16 = 64;
/// Where packets of the driver are put, 128 KiB for each chain.
const OUT: u64 = 0x10_0000;
/// Where its buffers lie, 128 KiB for each.
const IN: u64 = 0xa0_0000;
const STRIDE: u64 = 0x2_0000;
/// The end of the RAM.
const END: u64 = 24 << 20;

/// All of a driver's credit.
const CREDIT: u32 = 256 << 10;

fn vm(cid: u32) -> Party {
    Party::Vm(VmIdentity::new(cid.into(), 1))
}

/// A grant to be reached.
fn reachable(gatekeeper: &Gatekeeper, cid: u32) -> crate::channel::Grant<VsockListen> {
    gatekeeper.open(vm(cid), None, VsockListen { port: ANY_PORT }).unwrap()
}

/// A device with its driver.
struct Guest {
    cid: u32,
    driver: MmioDriver,
    queues: Vec<DriverQueue<Memory>>,
    handle: VsockHandle,
    memory: Memory,
}

impl Guest {
    fn new(vsock: Vsock) -> Self {
        Self::with_features(vsock, 7)
    }

    fn with_features(vsock: Vsock, features: u64) -> Self {
        let handle = vsock.handle();
        let memory = guest_memory(END).unwrap();
        let (driver, _) = MmioDriver::of(vsock, &memory).unwrap();
        let mut guest = Self { cid: handle.cid(), driver, queues: Vec::new(), handle, memory };
        guest.start(features);
        guest
    }

    fn start(&mut self, features: u64) {
        self.queues =
            (1..4).map(|place| DriverQueue::new(self.memory.clone(), 0x1000 * place, LEN).unwrap()).collect();
        let queues: Vec<_> = (0..).zip(&self.queues).collect();
        self.driver.start(features, &queues).unwrap();
    }

    /// Has the device look.
    fn poll(&self) {
        self.driver.notify(RX);
    }

    /// Gives buffers, as far as the queue has room for them.
    fn give(&mut self, count: u16, len: u32) {
        let ring = &mut self.queues[0];
        let there = ring.submitted().wrapping_sub(ring.used_index().unwrap());
        for _ in 0..count.min(LEN - there) {
            let place = IN + STRIDE * u64::from(ring.next_head());
            ring.chain().writable(place, HEADER as u32 + len).submit().unwrap();
        }
        self.poll();
    }

    /// Sends a packet as it is.
    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        let ring = &mut self.queues[1];
        let place = OUT + STRIDE * u64::from(ring.next_head());
        ring.put(place, &[&header.to_bytes()[..], data].concat()).unwrap();
        let len = HEADER as u32 + u32::try_from(data.len()).unwrap();
        ring.chain().readable(place, len).submit().unwrap();
        self.driver.notify(TX);
        while self.queues[1].take_used().unwrap().is_some() {}
    }

    /// The next packet to the driver.
    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.queues[0].take_used().unwrap()?;
        let bytes = self.queues[0].get(IN + STRIDE * u64::from(head), len as usize).unwrap();
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(header);
        assert_eq!(header.len as usize, data.len());
        Some((header, data.to_vec()))
    }

    /// The next packet, with a buffer given for it.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        match self.packet() {
            None => {
                self.give(1, 64 << 10);
                self.packet()
            }
            some => some,
        }
    }

    /// What it is, without credit updates.
    fn next_op(&mut self) -> Option<u16> {
        loop {
            let op = self.next()?.0.op;
            if op != operation::CREDIT_UPDATE {
                return Some(op);
            }
        }
    }

    /// Nothing comes, though there is a buffer for it.
    fn no_more(&mut self) {
        self.give(1, 64 << 10);
        assert_eq!(self.packet(), None);
    }

    /// A packet of the guest's to somebody.
    fn header(&self, key: Ends, op: u16, len: usize) -> Header {
        Header {
            src_cid: self.cid.into(),
            dst_cid: key.cid.into(),
            src_port: key.guest_port,
            dst_port: key.port,
            len: u32::try_from(len).unwrap(),
            kind: key.kind.number(),
            op,
            flags: 0,
            buf_alloc: CREDIT,
            fwd_cnt: 0,
        }
    }

    fn say(&mut self, key: Ends, op: u16) {
        let header = self.header(key, op, 0);
        self.send_raw(&header, &[]);
    }

    fn shut(&mut self, key: Ends, flags: u32) {
        let header = Header { flags, ..self.header(key, operation::SHUTDOWN, 0) };
        self.send_raw(&header, &[]);
    }

    fn send(&mut self, key: Ends, data: &[u8]) {
        let header = self.header(key, operation::RW, data.len());
        self.send_raw(&header, data);
    }

    /// Connects, and is accepted.
    fn connect(&mut self, key: Ends) {
        self.say(key, operation::REQUEST);
        assert_eq!(self.next_op(), Some(operation::RESPONSE));
    }

    /// Waits for a request, and accepts it.
    fn accept(&mut self) -> Ends {
        let key = self.hear_request();
        self.say(key, operation::RESPONSE);
        key
    }

    fn hear_request(&mut self) -> Ends {
        self.poll();
        let (header, _) = self.next().expect("a request");
        assert_eq!(header.op, operation::REQUEST);
        assert_eq!(header.dst_cid, u64::from(self.cid));
        Ends {
            guest_port: header.dst_port,
            cid: u32::try_from(header.src_cid).unwrap(),
            port: header.src_port,
            kind: Kind::of(header.kind).unwrap(),
        }
    }

    fn open(&self) -> u32 {
        self.handle.counters().connections
    }
}

/// The two ends of a connection, from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    guest_port: u32,
    cid: u32,
    port: u32,
    kind: Kind,
}

/// To the host.
fn to_host(guest_port: u32, port: u32) -> Ends {
    Ends { guest_port, cid: HOST_CID, port, kind: Kind::Stream }
}

/// A guest that has a host.
struct Hosted {
    guest: Guest,
    clock: Arc<ManualClock>,
    gatekeeper: Gatekeeper,
    directory: tempfile::TempDir,
}

impl Hosted {
    fn new() -> Self {
        Self::built(Gatekeeper::new(AllowAll), |builder| builder)
    }

    fn built(gatekeeper: Gatekeeper, with: impl FnOnce(VsockBuilder) -> VsockBuilder) -> Self {
        Self::of(gatekeeper, |host| host, with)
    }

    fn of(
        gatekeeper: Gatekeeper,
        host: impl FnOnce(HostSockets) -> HostSockets,
        with: impl FnOnce(VsockBuilder) -> VsockBuilder,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let clock = Arc::new(ManualClock::new(1));
        let allowed = Gatekeeper::new(AllowAll);
        let host = host(HostSockets::listen(&path, reachable(&allowed, 3)).unwrap());
        let builder = Vsock::builder(3, Arc::clone(&clock)).gatekeeper(vm(3), gatekeeper.clone()).host(host);
        let guest = Guest::new(with(builder).build().unwrap());
        Self { guest, clock, gatekeeper, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("v")
    }

    /// Where a program listens for the guest.
    fn service(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("v_{port}"))
    }

    /// A program that connects to the guest, which has not answered yet.
    fn client(&self, port: u32) -> UnixStream {
        client(&self.path(), port)
    }
}

fn client(path: &Path, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(path).unwrap();
    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    client
}

/// A line, as it comes.
fn line(client: &mut UnixStream) -> String {
    client.set_nonblocking(false).unwrap();
    client.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        match client.read(&mut byte).unwrap() {
            0 => break,
            _ => line.push(byte[0]),
        }
    }
    String::from_utf8(line).unwrap()
}

/// All that is there now; `None` at the end.
fn taken(client: &mut UnixStream) -> Option<Vec<u8>> {
    client.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; 1 << 20];
    match client.read(&mut bytes) {
        Ok(0) => None,
        Ok(len) => {
            bytes.truncate(len);
            Some(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Vec::new()),
        Err(_) => None,
    }
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let build = |cid| Vsock::builder(cid, || 0);
    let error = |builder: VsockBuilder| builder.build().unwrap_err().to_string();
    for cid in [0, 1, 2, u32::MAX] {
        assert!(error(build(cid)).contains("those are 3 to 4294967294"));
    }
    assert!(error(build(3).connections(0)).contains("1 to 65536"));
    assert!(error(build(3).buffer(100)).contains("4096 to 16777216 bytes, not 100"));
    let gatekeeper = Gatekeeper::new(AllowAll);
    let switch = Switch::new();
    let seat = switch.join(5, reachable(&gatekeeper, 5)).unwrap();
    assert!(error(build(3).switch(seat)).contains("identifier 3, and its place at the switch 5"));
    let long = HostSockets::listen("x".repeat(97), reachable(&gatekeeper, 3)).unwrap_err();
    assert!(long.to_string().contains("97 bytes; 1 to 96"));
}

#[test]
fn the_configuration_is_the_identifier() {
    let hosted = Hosted::new();
    let mut config = [0xff; 12];
    hosted.guest.driver.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn headers_are_read_as_they_are_written() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 2,
        src_port: 3,
        dst_port: 4,
        len: 5,
        kind: 6,
        op: 7,
        flags: 8,
        buf_alloc: 9,
        fwd_cnt: 10,
    };
    let bytes = header.to_bytes();
    assert_eq!(bytes[..9], [8, 7, 6, 5, 4, 3, 2, 1, 2]);
    assert_eq!(bytes[28..34], [6, 0, 7, 0, 8, 0]);
    assert_eq!(Header::parse(&bytes), header);
}
