//! Programs of the host.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;

use super::super::VsockError;
use super::*;
use crate::channel::{Refusal, Request};

#[test]
fn a_guest_connects_to_a_service() {
    let Hosted { mut guest, directory, .. } = Hosted::new();
    let service = UnixListener::bind(directory.path().join("v_52")).unwrap();
    let key = to_host(1000, 52);
    guest.connect(key);
    let (mut stream, _) = service.accept().unwrap();
    guest.send(key, b"hello");
    assert_eq!(taken(&mut stream).unwrap(), b"hello");
    stream.write_all(b"who is there?").unwrap();
    let (header, data) = guest.next().unwrap();
    assert_eq!((header.op, &data[..]), (operation::RW, &b"who is there?"[..]));
    assert_eq!((header.src_cid, header.src_port, header.dst_port), (2, 52, 1000));
    // Nobody listens there.
    guest.say(to_host(1001, 53), operation::REQUEST);
    assert_eq!(guest.next_op(), Some(operation::RST));
    assert_eq!(guest.open(), 1);
}

#[test]
fn a_program_connects_to_the_guest() {
    let mut hosted = Hosted::new();
    let mut client = hosted.client(80);
    client.write_all(b"and more at once").unwrap();
    let key = hosted.guest.hear_request();
    assert_eq!((key.guest_port, key.cid), (80, HOST_CID));
    assert_eq!(taken(&mut client).unwrap(), b"", "not before the guest has accepted");
    hosted.guest.say(key, operation::RESPONSE);
    assert_eq!(line(&mut client), format!("OK {}\n", key.port));
    assert_eq!(hosted.guest.next().unwrap().1, b"and more at once");
    hosted.guest.send(key, b"answer");
    assert_eq!(taken(&mut client).unwrap(), b"answer");
    // Ports of this side differ.
    let mut other = hosted.client(80);
    let second = hosted.guest.hear_request();
    assert_ne!(second.port, key.port);
    hosted.guest.say(second, operation::RST);
    assert_eq!(taken(&mut other), None);
    assert_eq!(hosted.guest.handle.counters().resets, 1);
}

#[test]
fn nonsense_and_silence_are_let_go() {
    let mut hosted = Hosted::new();
    for nonsense in ["GET / HTTP/1.1\n", "CONNECT 99999999999\n", "CONNECT 1 2\n", &"x".repeat(33)] {
        let mut client = UnixStream::connect(hosted.path()).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        hosted.guest.poll();
        assert_eq!(taken(&mut client), None, "{nonsense:?}");
    }
    // So many who say nothing, or half of it, and one behind them.
    let mut silent: Vec<_> = (0..64).map(|_| UnixStream::connect(hosted.path()).unwrap()).collect();
    silent[0].write_all(b"CONNECT 8").unwrap();
    hosted.guest.poll();
    let _client = hosted.client(81);
    hosted.guest.give(1, 64);
    assert_eq!(hosted.guest.packet(), None);
    silent[0].write_all(b"0\n").unwrap();
    hosted.guest.poll();
    assert_eq!(hosted.guest.packet().unwrap().0.dst_port, 80);
    assert_eq!(hosted.guest.hear_request().guest_port, 81, "there is a place again");
    hosted.clock.advance(2_000_000_000);
    hosted.guest.poll();
    assert!(silent[1..].iter_mut().all(|client| taken(client).is_none()));
}

#[test]
fn a_program_that_gives_up_asks_no_more() {
    let mut hosted = Hosted::new();
    let client = hosted.client(80);
    let key = hosted.guest.hear_request();
    drop(client);
    hosted.guest.poll();
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    // What the guest says late is no connection.
    hosted.guest.say(key, operation::RESPONSE);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!(hosted.guest.open(), 0);
}

#[test]
fn who_is_not_answered_is_not_kept_waiting_for_ever() {
    let mut hosted = Hosted::new();
    let mut client = hosted.client(80);
    let _ = hosted.guest.hear_request();
    hosted.clock.advance(1_999_999_999);
    hosted.guest.poll();
    assert_eq!(taken(&mut client).unwrap(), b"");
    hosted.clock.advance(1);
    hosted.guest.poll();
    assert_eq!(taken(&mut client), None);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!((hosted.guest.open(), hosted.guest.handle.counters().timeouts), (0, 1));
}

#[test]
fn the_gate_is_asked_and_refusal_is_a_reset() {
    let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
    let ears = Arc::clone(&heard);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        ears.lock().unwrap().push(request.to_string());
        if request.object().port() == Some(52) { Ok(()) } else { Err(Refusal::new("52 alone")) }
    });
    let mut hosted = Hosted::built(gatekeeper, |builder| builder);
    let listeners = [52, 53].map(|port| UnixListener::bind(hosted.service(port)).unwrap());
    listeners[1].set_nonblocking(true).unwrap();
    hosted.guest.say(to_host(9, 53), operation::REQUEST);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert!(listeners[1].accept().is_err(), "it is not even tried");
    hosted.guest.connect(to_host(9, 52));
    let mut refused = hosted.client(53);
    hosted.guest.poll();
    assert_eq!(taken(&mut refused), None);
    hosted.guest.no_more();
    let _client = hosted.client(52);
    assert_eq!(hosted.guest.hear_request().guest_port, 52);
    let guest = "vm 00000000-0000-0000-0000-000000000003#1";
    assert_eq!(
        *heard.lock().unwrap(),
        [
            format!("{guest}: connect vsock port 53 of host host"),
            format!("{guest}: connect vsock port 52 of host host"),
            format!("host host: connect vsock port 53 of {guest}"),
            format!("host host: connect vsock port 52 of {guest}"),
        ]
    );
    assert_eq!(hosted.guest.handle.counters().refused, 2);
    assert_eq!(hosted.gatekeeper.open_channels().len(), 2);
}

/// Nothing opens unless somebody says so.
#[test]
fn the_default_gate_refuses() {
    let mut hosted = Hosted::built(Gatekeeper::default(), |builder| builder);
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    service.set_nonblocking(true).unwrap();
    hosted.guest.say(to_host(9, 52), operation::REQUEST);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert!(service.accept().is_err());
    let mut client = hosted.client(80);
    hosted.guest.poll();
    assert_eq!(taken(&mut client), None);
    hosted.guest.no_more();
}

#[test]
fn a_port_can_be_all_that_is_reachable() {
    let directory = tempfile::tempdir().unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let grant = gatekeeper.open(vm(3), None, VsockListen { port: 80 }).unwrap();
    let id = grant.id();
    let host = HostSockets::listen(directory.path().join("v"), grant).unwrap();
    let vsock = Vsock::builder(3, || 0).gatekeeper(vm(3), gatekeeper.clone()).host(host).build().unwrap();
    let mut guest = Guest::new(vsock);
    let mut refused = client(&directory.path().join("v"), 81);
    guest.poll();
    assert_eq!(taken(&mut refused), None);
    let _client = client(&directory.path().join("v"), 80);
    assert_eq!(guest.hear_request().guest_port, 80);
    assert!(gatekeeper.revoke(id));
    let mut late = client(&directory.path().join("v"), 80);
    guest.poll();
    assert_eq!(taken(&mut late), None);
}

#[test]
fn sockets_are_for_their_owner_alone_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let path = directory.path().join("v");
    let host = HostSockets::listen(&path, reachable(&gatekeeper, 3)).unwrap();
    for name in ["v", "v_seqpacket"] {
        let data = fs::metadata(directory.path().join(name)).unwrap();
        assert!(data.file_type().is_socket());
        assert_eq!(data.permissions().mode() & 0o777, 0o600, "{name}");
    }
    // Somebody listens.
    let taken = HostSockets::listen(&path, reachable(&gatekeeper, 3)).unwrap_err();
    assert!(matches!(taken, VsockError::Socket { .. }), "{taken}");
    assert!(UnixStream::connect(&path).is_ok());
    drop(host);
    // Nobody does.
    let host = HostSockets::listen_with_mode(&path, 0o620, reachable(&gatekeeper, 3)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o700, 0o600);
    host.remove_files().unwrap();
    assert!(!path.exists());
    fs::write(&path, "a file of somebody's").unwrap();
    HostSockets::listen(&path, reachable(&gatekeeper, 3)).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"a file of somebody's");
}

#[test]
fn the_monitor_connects_without_a_file() {
    let mut hosted = Hosted::new();
    let grant = |port| {
        let host = Party::Host("monitor".into());
        hosted.gatekeeper.open(host, Some(vm(3)), crate::channel::VsockConnect { port }).unwrap()
    };
    let (first, second) = (grant(80), grant(81));
    let mut stream = UnixStream::from(hosted.guest.handle.connect(first, Kind::Stream).unwrap());
    let key = hosted.guest.accept();
    hosted.guest.send(key, b"hello");
    assert_eq!(taken(&mut stream).unwrap(), b"hello");
    hosted.guest.driver.set_status(0);
    assert_eq!(taken(&mut stream), None);
    let error = hosted.guest.handle.connect(second, Kind::Stream).unwrap_err();
    assert!(matches!(error, VsockError::NoDriver { cid: 3 }), "{error}");
}

/// Whatever came in between is told once, and all of it arrives.
#[test]
fn much_goes_both_ways_at_once() {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let key = to_host(1000, 52);
    hosted.guest.connect(key);
    let (mut stream, _) = service.accept().unwrap();
    let text: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let (mut sent, mut forwarded, mut written) = (0, 0_u32, 0);
    let (mut told, mut alloc) = (0_u32, CREDIT);
    for _ in 0..10_000 {
        let free = alloc.saturating_sub((sent as u32).wrapping_sub(told)) as usize;
        let part = &text[sent..text.len().min(sent + free.min(50_000))];
        if !part.is_empty() {
            let header = Header { fwd_cnt: forwarded, ..hosted.guest.header(key, operation::RW, part.len()) };
            hosted.guest.send_raw(&header, part);
            sent += part.len();
        }
        stream.set_nonblocking(true).unwrap();
        if written < text.len()
            && let Ok(len) = stream.write(&text[written..text.len().min(written + 70_000)])
        {
            written += len;
        }
        up.extend(taken(&mut stream).unwrap());
        hosted.guest.give(4, 4096);
        while let Some((header, data)) = hosted.guest.packet() {
            (told, alloc) = (header.fwd_cnt, header.buf_alloc);
            match header.op {
                operation::RW => down.extend(data),
                operation::CREDIT_REQUEST => {}
                op => assert_eq!(op, operation::CREDIT_UPDATE),
            }
        }
        assert!(down.len() - forwarded as usize <= CREDIT as usize);
        if down.len() - forwarded as usize > 100_000 {
            forwarded = down.len() as u32;
            let update =
                Header { fwd_cnt: forwarded, ..hosted.guest.header(key, operation::CREDIT_UPDATE, 0) };
            hosted.guest.send_raw(&update, &[]);
        }
        if up.len() == text.len() && down.len() == text.len() {
            break;
        }
    }
    assert!(up == text && down == text, "{} and {} of {}", up.len(), down.len(), text.len());
}
