//! Disks and networks: requests past the guest's cache, and TCP to the host. Each is done for a second at least.
//!
//! The disk is `$disk`; who serves the network is at `$server`: a client sends a letter and a number of eight bytes, and then gives
//! (`G`) that many bytes, gets (`T`) them, or sends each of them back and forth (`P`); what was given is answered with a byte.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::Duration;

use crate::system::{self, IoControl, IoEvent};
use crate::time::timed;

const O_DIRECT: i32 = 0o40000;
const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;
/// Requests at a time, where there are several.
const DEPTH: usize = 32;

fn disk() -> (File, u64) {
    let path = std::env::var_os("disk").expect("$disk is a disk");
    let mut file = OpenOptions::new();
    let file = file.read(true).write(true).custom_flags(O_DIRECT).open(path).expect("the disk");
    let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0)).expect("its size");
    (file, size)
}

/// Memory that a disk reads into and writes from directly.
fn buffer(len: usize) -> &'static mut [u8] {
    let layout = Layout::from_size_align(len, 4096).expect("a size");
    // SAFETY: the size is not 0, the memory is zeros, and nobody frees it.
    let buffer = unsafe { std::slice::from_raw_parts_mut(alloc_zeroed(layout), len) };
    // Touched, so that the disk's time is measured and not the memory's.
    buffer.fill(0x5a);
    buffer
}

/// Places of small requests: all over the disk, the same each time.
struct Places(u64, u64);

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Some(self.0 % (self.1 / SMALL as u64) * SMALL as u64)
    }
}

fn one_by_one(operations: u64, write: bool) -> Duration {
    let (file, size) = disk();
    let buffer = buffer(SMALL);
    let places = Places(0x9e37_79b9_7f4a_7c15, size).take(operations as usize);
    timed(|| {
        for at in places {
            if write {
                file.write_all_at(buffer, at).expect("a write");
            } else {
                file.read_exact_at(buffer, at).expect("a read");
            }
        }
    })
}

pub(crate) fn read_4k(operations: u64) -> Duration {
    one_by_one(operations, false)
}

pub(crate) fn write_4k(operations: u64) -> Duration {
    one_by_one(operations, true)
}

fn many(operations: u64, write: bool) -> Duration {
    let (file, size) = disk();
    let buffers = buffer(SMALL * DEPTH);
    let mut places = Places(0x9e37_79b9_7f4a_7c15, size);
    let context = system::io_setup(DEPTH);
    let mut control = |slot: usize| {
        let buffer = &mut buffers[slot * SMALL..][..SMALL];
        let at = places.next().expect("places do not end");
        IoControl::new(slot as u64, file.as_raw_fd(), write, buffer, at)
    };
    timed(|| {
        let mut controls: Vec<IoControl> = (0..DEPTH.min(operations as usize)).map(&mut control).collect();
        let mut begun = system::io_submit(context, &mut controls.iter_mut().collect::<Vec<_>>());
        let (mut ended, mut events) = (0, [IoEvent::default(); DEPTH]);
        while ended < operations {
            let done = system::io_getevents(context, &mut events);
            ended += done.len() as u64;
            let mut next = Vec::new();
            for event in done {
                assert_eq!(event.result, SMALL as i64, "a request");
                let slot = event.data as usize;
                if begun + (next.len() as u64) < operations {
                    controls[slot] = control(slot);
                    next.push(slot);
                }
            }
            let mut refs: Vec<&mut IoControl> = controls
                .iter_mut()
                .enumerate()
                .filter(|(slot, _)| next.contains(slot))
                .map(|(_, c)| c)
                .collect();
            if !refs.is_empty() {
                begun += system::io_submit(context, &mut refs);
            }
        }
        assert_eq!(begun, operations);
    })
}

pub(crate) fn read_4k_many(operations: u64) -> Duration {
    many(operations, false)
}

pub(crate) fn write_4k_many(operations: u64) -> Duration {
    many(operations, true)
}

fn in_order(operations: u64, write: bool) -> Duration {
    let (file, size) = disk();
    let buffer = buffer(LARGE);
    timed(|| {
        for operation in 0..operations {
            let at = operation % (size / LARGE as u64) * LARGE as u64;
            if write {
                file.write_all_at(buffer, at).expect("a write");
            } else {
                file.read_exact_at(buffer, at).expect("a read");
            }
        }
    })
}

pub(crate) fn read_1m(operations: u64) -> Duration {
    in_order(operations, false)
}

pub(crate) fn write_1m(operations: u64) -> Duration {
    in_order(operations, true)
}

fn server(what: u8, bytes: u64) -> TcpStream {
    let address = std::env::var("server").expect("$server is an address");
    let mut stream = TcpStream::connect(address).expect("the server");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    let mut header = vec![what];
    header.extend(bytes.to_le_bytes());
    stream.write_all(&header).expect("the server listens");
    stream
}

/// Gives the server MiB.
pub(crate) fn net_send(operations: u64) -> Duration {
    let mut stream = server(b'G', operations * LARGE as u64);
    let data = vec![0x5a; 256 << 10];
    timed(|| {
        for _ in 0..operations * 4 {
            stream.write_all(&data).expect("the server takes it");
        }
        stream.read_exact(&mut [0]).expect("the server's answer");
    })
}

/// Gets MiB from it.
pub(crate) fn net_receive(operations: u64) -> Duration {
    let mut data = vec![0; 256 << 10];
    timed(|| {
        let mut stream = server(b'T', operations * LARGE as u64);
        let mut left = operations * LARGE as u64;
        while left > 0 {
            let len = stream.read(&mut data).expect("what the server gives");
            assert_ne!(len, 0, "the server gave up");
            left -= len as u64;
        }
    })
}

/// A byte to the server and back.
pub(crate) fn net_ping_pong(operations: u64) -> Duration {
    let mut stream = server(b'P', operations);
    timed(|| {
        for _ in 0..operations {
            stream.write_all(&[1]).expect("the server listens");
            stream.read_exact(&mut [0]).expect("the server answers");
        }
    })
}
