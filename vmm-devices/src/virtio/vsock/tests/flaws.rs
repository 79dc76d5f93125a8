//! Public flaws of socket devices; `tests/escapes.md` says which.

use std::os::unix::net::UnixListener;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::testkit::guest_memory_of;

fn connected() -> (Hosted, Ends, UnixStream) {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let key = to_host(1000, 52);
    hosted.guest.connect(key);
    let stream = service.accept().unwrap().0;
    (hosted, key, stream)
}

fn reset(guest: &mut Guest) {
    assert_eq!(guest.next_op(), Some(operation::RST));
    assert_eq!(guest.open(), 0);
}

/// CVE-2019-18960 (Firecracker, Cloud Hypervisor): a buffer that crosses regions of memory, and one that ends with the last of them. And
/// Firecracker #5475: data in several descriptors, of which a device took the first alone, and what lay behind it for the rest.
#[test]
fn cve_2019_18960_packets_lie_in_any_pieces() {
    let edge = 0x10_0000;
    let regions = [(0, edge), (edge, 0x1_0000)];
    let memory = guest_memory_of(&regions).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let host = HostSockets::listen(directory.path().join("v"), reachable(&gatekeeper, 3)).unwrap();
    let vsock = Vsock::builder(3, || 0).gatekeeper(vm(3), gatekeeper).host(host).build().unwrap();
    let handle = vsock.handle();
    let (driver, _) = MmioDriver::of(vsock, &memory).unwrap();
    let mut guest = Guest { cid: 3, driver, queues: Vec::new(), handle, memory };
    guest.start(7);
    let service = UnixListener::bind(directory.path().join("v_52")).unwrap();
    let key = to_host(1000, 52);
    let text: Vec<u8> = (1..=200).collect();
    let put = |guest: &mut Guest, op, data: &[u8], at: u64, pieces: &[usize]| {
        let bytes = [&guest.header(key, op, data.len()).to_bytes()[..], data].concat();
        guest.memory.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
        let mut chain = guest.queues[1].chain();
        let (mut place, mut left) = (at, bytes.len());
        for piece in pieces.iter().copied().chain([usize::MAX]) {
            let len = piece.min(left);
            chain = chain.readable(place, u32::try_from(len).unwrap());
            (place, left) = (place + len as u64, left - len);
        }
        chain.submit().unwrap();
        guest.driver.notify(TX);
        assert!(guest.queues[1].take_used().unwrap().is_some());
    };
    put(&mut guest, operation::REQUEST, &[], edge - 20, &[]);
    guest.queues[0].chain().writable(edge - 30, 40).writable(0x8000, 100).submit().unwrap();
    guest.poll();
    assert_eq!(guest.queues[0].take_used().unwrap(), Some((0, 44)));
    let mut stream = service.accept().unwrap().0;
    for pieces in [&[][..], &[44], &[10, 34], &[44, 1, 1, 100], &[50, 50]] {
        for at in [edge - 100, edge - 44, edge - 3, edge + 0x1_0000 - 244] {
            put(&mut guest, operation::RW, &text, at, pieces);
            assert_eq!(taken(&mut stream).unwrap(), text, "{pieces:?}, {at:#x}");
        }
    }
    // To the guest, around both ends.
    stream.write_all(&text).unwrap();
    let end = edge + 0x1_0000;
    guest.queues[0].chain().writable(edge - 60, 144).submit().unwrap();
    guest.queues[0].chain().writable(end - 144, 144).submit().unwrap();
    guest.poll();
    assert_eq!(guest.queues[0].get(edge - 60 + 44, 100).unwrap(), text[..100]);
    assert_eq!(guest.queues[0].get(end - 100, 100).unwrap(), text[100..]);
    // Beyond the last.
    put(&mut guest, operation::RW, &text, end - 244, &[]);
    guest.queues[1].chain().readable(end - 243, 244).submit().unwrap();
    guest.driver.notify(TX);
    assert_eq!((guest.driver.status(), taken(&mut stream).unwrap()), (0xf, text));
}

/// Lengths that are none: longer than the chain, longer than packets are, none at all, and data where no data belongs.
#[test]
fn lengths_are_checked_before_anything_is_kept() {
    for (len, data) in [(5, 4), (1, 0), (u32::MAX, 100), (MAX_DATA + 1, 70_000)] {
        let (mut hosted, key, mut stream) = connected();
        let header = Header { len, ..hosted.guest.header(key, operation::RW, 0) };
        hosted.guest.send_raw(&header, &vec![7; data]);
        reset(&mut hosted.guest);
        assert_eq!(taken(&mut stream), None, "{len}");
        assert_eq!(hosted.guest.handle.counters().breaches, 1);
    }
    let (mut hosted, key, mut stream) = connected();
    for _ in 0..1000 {
        hosted.guest.send(key, b"");
    }
    let header = Header { len: 9, ..hosted.guest.header(key, operation::CREDIT_REQUEST, 0) };
    hosted.guest.send_raw(&header, b"no data.");
    assert_eq!(hosted.guest.next_op(), None);
    hosted.guest.send(key, b"data");
    assert_eq!(taken(&mut stream).unwrap(), b"data");
    // Behind the data may be more than there is of it.
    let header = Header { len: 2, ..hosted.guest.header(key, operation::RW, 0) };
    hosted.guest.send_raw(&header, b"ok, and more");
    assert_eq!(taken(&mut stream).unwrap(), b"ok");
    // No header.
    hosted.guest.queues[1].chain().readable(OUT, 43).submit().unwrap();
    hosted.guest.driver.notify(TX);
    assert_eq!(hosted.guest.handle.counters().ignored, 1);
}

/// Lies about credit: `buf_alloc` below what is in flight, `fwd_cnt` of what was never sent. The device sends no more than one
/// buffer ahead (Linux 60316d7f10b1, where the difference wrapped).
#[test]
fn credit_overflow_no_lie_makes_credit() {
    let (mut hosted, key, mut stream) = connected();
    stream.set_nonblocking(true).unwrap();
    stream.write_all(&[1; 100_000]).unwrap();
    let mut sent = 0;
    let lie = |hosted: &mut Hosted, buf_alloc, fwd_cnt| {
        let header = Header { buf_alloc, fwd_cnt, ..hosted.guest.header(key, operation::CREDIT_UPDATE, 0) };
        hosted.guest.send_raw(&header, &[]);
        hosted.guest.give(16, 4096);
        let mut came = 0;
        while let Some((header, data)) = hosted.guest.packet() {
            if header.op == operation::RW {
                came += data.len();
            }
        }
        came
    };
    sent += lie(&mut hosted, 1000, 0);
    assert_eq!(sent, 1000);
    for (buf_alloc, fwd_cnt) in [(500, 0), (0, 0), (1000, 1001), (1000, u32::MAX), (999, 1 << 31), (1000, 0)]
    {
        assert_eq!(lie(&mut hosted, buf_alloc, fwd_cnt), 0, "{buf_alloc}, {fwd_cnt}");
    }
    assert_eq!(lie(&mut hosted, 1000, 400), 400);
    assert_eq!(lie(&mut hosted, 1000, 1400), 1000);
}

/// More than there is credit for: whatever the guest sends, no more than a buffer of it is kept.
#[test]
fn a_guest_that_ignores_credit_is_reset() {
    let (mut hosted, key, _stream) = connected();
    let mut sent = 0_u64;
    while hosted.guest.handle.counters().breaches == 0 {
        hosted.guest.send(key, &[7; 60_000]);
        sent += 60_000;
        assert!(sent < 4 << 20);
    }
    while hosted.guest.next_op() != Some(operation::RST) {}
    assert_eq!(hosted.guest.open(), 0);
}

/// Neither side reads: both wait, and neither is kept from going on by that, nor is anybody else.
#[test]
fn credit_deadlock_nobody_reads_and_nobody_hangs() {
    const OWN: u32 = 10_000;
    let mut hosted = Hosted::new();
    let services = [52, 53].map(|port| UnixListener::bind(hosted.service(port)).unwrap());
    let (key, other) = (to_host(1000, 52), to_host(7, 53));
    let say = |guest: &mut Guest, op, data: &[u8], fwd_cnt| {
        let header = Header { buf_alloc: OWN, fwd_cnt, ..guest.header(key, op, data.len()) };
        guest.send_raw(&header, data);
    };
    say(&mut hosted.guest, operation::REQUEST, &[], 0);
    let mut stream = services[0].accept().unwrap().0;
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(len) = stream.write(&[2; 10_000]) {
        written += len;
    }
    let (mut sent, mut known, mut came) = (0_u32, 0_u32, 0_u32);
    loop {
        let part = 32_768.min(CREDIT - (sent - known));
        if part == 0 {
            break;
        }
        say(&mut hosted.guest, operation::RW, &vec![1; part as usize], 0);
        sent += part;
        hosted.guest.give(8, 4096);
        while let Some((header, data)) = hosted.guest.packet() {
            (known, came) = (header.fwd_cnt, came + data.len() as u32);
        }
    }
    assert_eq!(came, OWN);
    // Both are full. Others go on.
    hosted.guest.say(other, operation::REQUEST);
    assert_eq!(hosted.guest.next_op(), Some(operation::RESPONSE));
    let mut second = services[1].accept().unwrap().0;
    hosted.guest.send(other, b"by the side");
    assert_eq!(taken(&mut second).unwrap(), b"by the side");
    // One of both begins to read, and then the other.
    let mut read = 0;
    while let Some(bytes) = taken(&mut stream).filter(|bytes| !bytes.is_empty()) {
        read += bytes.len();
        hosted.guest.poll();
    }
    assert_eq!(read, sent as usize);
    hosted.guest.give(2, 4096);
    while let Some((header, _)) = hosted.guest.packet() {
        known = header.fwd_cnt;
    }
    assert_eq!(known, sent, "the guest may send again");
    for _ in 0..1000 {
        if came as usize == written {
            return;
        }
        say(&mut hosted.guest, operation::CREDIT_UPDATE, &[], came);
        hosted.guest.give(8, 4096);
        while let Some((_, data)) = hosted.guest.packet() {
            came += data.len() as u32;
        }
    }
    panic!("{came} of {written}");
}

/// A message that fills the buffer and does not end: the device waits for its end, and the guest for room.
#[test]
fn credit_deadlock_a_message_without_an_end_is_let_go() {
    let mut hosted = Hosted::new();
    let listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None)
            .unwrap();
    let address = rustix::net::SocketAddrUnix::new(hosted.service(52)).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    let key = Ends { kind: Kind::SeqPacket, ..to_host(1000, 52) };
    hosted.guest.connect(key);
    for _ in 0..3 {
        hosted.guest.send(key, &vec![1; 64 << 10]);
    }
    assert_eq!(hosted.guest.open(), 1);
    hosted.guest.send(key, &vec![1; 64 << 10]);
    reset(&mut hosted.guest);
    assert_eq!(hosted.guest.handle.counters().breaches, 1);
}

/// Firecracker #6031: data for a guest that gives no buffers. Nothing is done for it again and again until it does.
#[test]
fn firecracker_6031_a_guest_without_buffers_costs_nothing() {
    let (hosted, _, mut stream) = connected();
    let Hosted { mut guest, .. } = hosted;
    stream.write_all(&[7; 5000]).unwrap();
    for _ in 0..3 {
        guest.poll();
    }
    assert_eq!(guest.packet(), None);
    guest.give(2, 4096);
    let mut came = 0;
    while let Some((_, data)) = guest.packet() {
        came += data.len();
    }
    assert_eq!(came, 5000);
}

/// The same on a loop: when it has looked it sleeps, and is woken by a buffer, or by data, once for each.
#[cfg(feature = "event-loop")]
#[test]
fn firecracker_6031_a_loop_sleeps_while_the_guest_has_no_buffer() {
    use std::sync::Mutex;
    use std::time::Duration;

    use crate::channel::VsockConnect;
    use crate::testkit::LineRecorder;
    use crate::virtio::{EventLoop, VirtioMmio};

    let gatekeeper = Gatekeeper::new(AllowAll);
    let vsock = Vsock::builder(3, || 0).gatekeeper(vm(3), gatekeeper.clone()).build().unwrap();
    let (handle, memory) = (vsock.handle(), guest_memory(END).unwrap());
    let mut event_loop = EventLoop::new(|| 0).unwrap();
    let builder = VirtioMmio::builder(vsock, memory.clone(), LineRecorder::default());
    let transport = builder.executor(event_loop.executor()).build().unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let mut guest = Guest { cid: 3, driver, queues: Vec::new(), handle: handle.clone(), memory };
    guest.start(7);
    let mut rest = |what: &str| {
        let calls = (0..50).take_while(|_| event_loop.run_once(Some(Duration::ZERO)).unwrap() > 0).count();
        assert!(calls < 20, "{what}: it does not sleep");
    };
    let grant = gatekeeper.open(Party::Host("m".into()), Some(vm(3)), VsockConnect { port: 80 }).unwrap();
    let mut stream = UnixStream::from(handle.connect(grant, Kind::Stream).unwrap());
    rest("a request without a buffer");
    guest.give(1, 4096);
    rest("a request");
    let (header, _) = guest.packet().unwrap();
    let key = Ends { guest_port: 80, cid: HOST_CID, port: header.src_port, kind: Kind::Stream };
    guest.queues[1].put(OUT, &guest.header(key, operation::RESPONSE, 0).to_bytes()).unwrap();
    guest.queues[1].chain().readable(OUT, 44).submit().unwrap();
    guest.driver.notify(TX);
    rest("an answer");
    stream.write_all(&[7; 5000]).unwrap();
    rest("data without a buffer");
    guest.give(1, 4096);
    rest("a buffer");
    stream.write_all(&[7; 5000]).unwrap();
    rest("more data");
    guest.give(2, 4096);
    rest("buffers");
    let mut came = 0;
    while let Some((_, data)) = guest.packet() {
        came += data.len();
    }
    assert_eq!(came, 10_000);
}

/// Floods of connections, closes and packets for connections that there are not, by a guest that takes no answer: what is kept is
/// bounded, and when it takes answers all goes on.
#[test]
fn cve_2020_27174_floods_with_no_reader_are_not_kept() {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    service.set_nonblocking(true).unwrap();
    let before = resident();
    let mut header = hosted.guest.header(to_host(0, 52), operation::REQUEST, 0);
    let ring_full = |guest: &Guest| guest.queues[1].available_index().unwrap();
    for round in 0..200_000_u32 {
        header.src_port = round;
        header.op = [operation::REQUEST, operation::SHUTDOWN, operation::RW, operation::CREDIT_REQUEST]
            [round as usize % 4];
        if round % 4 != 0 {
            header.src_port = round / 4 * 4 + (round % 8) / 4;
        }
        header.flags = round;
        let place = OUT + STRIDE * u64::from(hosted.guest.queues[1].next_head());
        hosted.guest.queues[1].put(place, &header.to_bytes()).unwrap();
        let waiting = ring_full(&hosted.guest).wrapping_sub(hosted.guest.queues[1].used_index().unwrap());
        if waiting >= LEN {
            break;
        }
        hosted.guest.queues[1].chain().readable(place, 44).submit().unwrap();
        hosted.guest.driver.notify(TX);
        while service.accept().is_ok() {}
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    let waiting = ring_full(&hosted.guest).wrapping_sub(hosted.guest.queues[1].used_index().unwrap());
    assert_eq!(waiting, LEN, "it is not listened to any more");
    assert_eq!(hosted.guest.driver.status(), 0xf);
    // It takes the answers, and is listened to again.
    let mut answers = 0;
    while let Some((header, _)) = hosted.guest.next() {
        assert!((operation::RESPONSE..=operation::CREDIT_UPDATE).contains(&header.op));
        answers += 1;
        while service.accept().is_ok() {}
    }
    assert!(answers >= 256, "{answers}");
    assert_eq!(ring_full(&hosted.guest), hosted.guest.queues[1].used_index().unwrap());
}

/// Bytes of this process that are in RAM.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// Resets that meet resets: none is answered, whomever it names.
#[test]
fn resets_do_not_go_round_in_circles() {
    let (mut hosted, key, _stream) = connected();
    for cid in [0, 1, 2, 3, 4, u32::MAX] {
        for kind in [0, 1, 2, 3, 0xffff] {
            let header = Header {
                kind,
                dst_cid: cid.into(),
                dst_port: 9,
                ..hosted.guest.header(key, operation::RST, 0)
            };
            hosted.guest.send_raw(&header, &[]);
            hosted.guest.no_more();
        }
    }
    // In another's name.
    let header = Header { src_cid: 2, dst_cid: 3, ..hosted.guest.header(key, operation::REQUEST, 0) };
    hosted.guest.send_raw(&header, &[]);
    let header = Header { src_cid: 3 | 1 << 32, ..hosted.guest.header(key, operation::RST, 0) };
    hosted.guest.send_raw(&header, &[]);
    hosted.guest.no_more();
    assert_eq!((hosted.guest.open(), hosted.guest.handle.counters().ignored), (1, 2));
    hosted.guest.say(key, operation::RST);
    hosted.guest.no_more();
    assert_eq!(hosted.guest.open(), 0);
}

/// SHUTDOWN again and again, with any flags: each half closes once, and the answer is one reset.
#[test]
fn storms_of_shutdowns_end_once() {
    for flags in [0, 1, 2, 4, 0xffff_fffc] {
        let (mut hosted, key, mut stream) = connected();
        for _ in 0..500 {
            hosted.guest.shut(key, flags);
        }
        // A socket that is shut gives no more: of that the guest hears as well.
        let told: Vec<u16> = std::iter::from_fn(|| hosted.guest.next_op()).collect();
        assert!(told.is_empty() || flags == 1 && told == [operation::SHUTDOWN], "{flags}: {told:?}");
        hosted.guest.shut(key, 3);
        assert_eq!(hosted.guest.packet().map(|(header, _)| header.op), Some(operation::RST));
        for _ in 0..10 {
            hosted.guest.say(key, operation::RST);
        }
        hosted.guest.no_more();
        assert_eq!((hosted.guest.open(), taken(&mut stream)), (0, None));
    }
}

/// As CVE-2021-26708 (Linux: a socket used its transport after another one had come in its place): what belongs to a connection that is
/// gone reaches none that has its place and its ports.
#[test]
fn cve_2021_26708_what_comes_late_finds_no_other_connection() {
    let (mut hosted, key, old) = connected();
    let service = UnixListener::bind(hosted.service(53)).unwrap();
    let grant = hosted.gatekeeper.open_channels()[0].id;
    // The old one ends, and one with the same place begins. What the old socket and grant tell comes later.
    hosted.guest.say(key, operation::RST);
    drop(old);
    let again = to_host(1000, 53);
    hosted.guest.connect(again);
    let mut stream = service.accept().unwrap().0;
    assert!(!hosted.gatekeeper.revoke(grant));
    hosted.guest.no_more();
    hosted.guest.send(again, b"mine");
    assert_eq!(taken(&mut stream).unwrap(), b"mine");
    stream.write_all(b"yours").unwrap();
    assert_eq!(hosted.guest.next().unwrap().1, b"yours");
    // A revocation that is told after another connection has come in the place: the first connection's, by its tag.
    let (place, generation) = (0, 1 << 32);
    hosted.guest.handle.shared.revoke(generation | place);
    hosted.guest.no_more();
    hosted.guest.send(again, b"still mine");
    assert_eq!(taken(&mut stream).unwrap(), b"still mine");
    // That of the one that is there does end it.
    hosted.guest.handle.shared.revoke((2 * generation) | place);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!((hosted.guest.open(), taken(&mut stream)), (0, None));
}

/// Connections take turns: one with much for the guest does not keep others waiting.
#[test]
fn one_that_floods_does_not_starve_another() {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let keys = [to_host(1, 52), to_host(2, 52)];
    let mut streams = Vec::new();
    for key in keys {
        hosted.guest.connect(key);
        let stream = service.accept().unwrap().0;
        stream.set_nonblocking(true).unwrap();
        streams.push(stream);
    }
    while streams[0].write(&[1; 10_000]).is_ok() {}
    streams[1].write_all(b"me too").unwrap();
    hosted.guest.give(40, 4096);
    let mut ports = Vec::new();
    while let Some((header, _)) = hosted.guest.packet() {
        ports.push(header.dst_port);
    }
    let place = ports.iter().position(|port| *port == 2).expect("its turn");
    assert!(place <= 17, "{ports:?}");
    // And one whose peer does not read keeps no other from being heard.
    for _ in 0..4 {
        hosted.guest.send(keys[0], &[1; 60_000]);
    }
    hosted.guest.send(keys[1], b"heard");
    assert_eq!(taken(&mut streams[1]).unwrap(), b"heard");
}
