//! SOCK_SEQPACKET: messages arrive as they were sent.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, connect, listen, recv,
    send, socket,
};

use super::*;

fn packet_socket() -> OwnedFd {
    socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap()
}

fn service(path: &Path) -> OwnedFd {
    let service = packet_socket();
    bind(&service, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&service, 8).unwrap();
    service
}

/// The next message; `None` if there is none now.
fn message(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut room = vec![MaybeUninit::uninit(); 1 << 20];
    let ((bytes, _), _) = recv(socket, &mut room[..], RecvFlags::DONTWAIT).ok()?;
    Some(bytes.to_vec())
}

fn to_service(port: u32) -> Ends {
    Ends { kind: Kind::SeqPacket, ..to_host(1000, port) }
}

fn say(guest: &mut Guest, key: Ends, data: &[u8], flags: u32) {
    let header = Header { flags, ..guest.header(key, operation::RW, data.len()) };
    guest.send_raw(&header, data);
}

#[test]
fn messages_of_the_guest_arrive_whole() {
    let mut hosted = Hosted::new();
    let listener = service(&hosted.service(52));
    let key = to_service(52);
    hosted.guest.connect(key);
    let stream = accept(&listener).unwrap();
    say(&mut hosted.guest, key, b"one ", 0);
    assert_eq!(message(&stream), None, "its end has not come");
    say(&mut hosted.guest, key, b"message", boundary::MESSAGE);
    say(&mut hosted.guest, key, b"another", boundary::MESSAGE | boundary::RECORD);
    say(&mut hosted.guest, key, b"", boundary::MESSAGE);
    assert_eq!(message(&stream).unwrap(), b"one message");
    assert_eq!(message(&stream).unwrap(), b"another");
    assert_eq!(message(&stream).unwrap(), b"");
    assert_eq!(message(&stream), None);
    // As large as the buffer.
    for part in 0..4 {
        say(&mut hosted.guest, key, &vec![part; 64 << 10], if part == 3 { boundary::MESSAGE } else { 0 });
    }
    assert_eq!(message(&stream).unwrap().len(), 256 << 10);
}

#[test]
fn messages_to_the_guest_arrive_whole() {
    let mut hosted = Hosted::new();
    let path = hosted.directory.path().join("v_seqpacket");
    let client = packet_socket();
    connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    send(&client, b"CONNECT 80\n", SendFlags::empty()).unwrap();
    let key = hosted.guest.accept();
    assert_eq!(key.kind, Kind::SeqPacket);
    assert_eq!(message(&client).unwrap(), format!("OK {}\n", key.port).into_bytes());
    let long: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    for text in [&b"first"[..], b"", &long, b"last"] {
        send(&client, text, SendFlags::empty()).unwrap();
        let mut got = Vec::new();
        loop {
            // In buffers of all sizes.
            hosted.guest.give(1, 10_000 + got.len() as u32 / 7);
            let (header, data) = hosted.guest.packet().unwrap();
            assert_eq!(header.op, operation::RW);
            got.extend(data);
            if header.flags & boundary::MESSAGE != 0 {
                break;
            }
        }
        assert_eq!(got, text);
    }
    drop(client);
    hosted.guest.poll();
    assert_eq!(hosted.guest.next_op(), Some(operation::SHUTDOWN));
}

/// The guest's buffer is smaller than the message: it could never be given as a whole, and the guest would wait for its end.
#[test]
fn a_message_that_cannot_arrive_ends_the_connection() {
    let mut hosted = Hosted::new();
    let listener = service(&hosted.service(52));
    let key = to_service(52);
    let small = Header { buf_alloc: 1000, ..hosted.guest.header(key, operation::REQUEST, 0) };
    hosted.guest.send_raw(&small, &[]);
    assert_eq!(hosted.guest.next_op(), Some(operation::RESPONSE));
    let stream = accept(&listener).unwrap();
    send(&stream, &[7; 1000], SendFlags::empty()).unwrap();
    assert_eq!(hosted.guest.next().unwrap().1, [7; 1000]);
    let update =
        Header { buf_alloc: 1000, fwd_cnt: 1000, ..hosted.guest.header(key, operation::CREDIT_UPDATE, 0) };
    hosted.guest.send_raw(&update, &[]);
    send(&stream, &[7; 1001], SendFlags::empty()).unwrap();
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!(hosted.guest.open(), 0);
}

/// A driver that has not agreed upon messages has none, and one that says that it does without streams has none of those.
#[test]
fn what_was_not_agreed_upon_is_refused() {
    for (features, streams, messages) in
        [(0, true, false), (2, true, true), (1, true, false), (6, false, true), (7, true, true)]
    {
        let directory = tempfile::tempdir().unwrap();
        let gatekeeper = Gatekeeper::new(AllowAll);
        let path = directory.path().join("v");
        let host = HostSockets::listen(&path, reachable(&gatekeeper, 3)).unwrap();
        let vsock = Vsock::builder(3, || 0).gatekeeper(vm(3), gatekeeper).host(host).build().unwrap();
        let mut guest = Guest::with_features(vsock, features);
        let _services = (
            service(&directory.path().join("v_52")),
            std::os::unix::net::UnixListener::bind(directory.path().join("v_53")).unwrap(),
        );
        for (key, there) in [(to_service(52), messages), (to_host(1, 53), streams)] {
            guest.say(key, operation::REQUEST);
            let expected = if there { operation::RESPONSE } else { operation::RST };
            assert_eq!(guest.next_op(), Some(expected), "{features}, {key:?}");
        }
    }
}
