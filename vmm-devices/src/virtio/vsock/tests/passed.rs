//! Descriptors that programs of the host, other monitors and brokers send beside what they say, and whose close waits: nobody waits for it.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, accept, bind, connect, listen, recv, send, sendmsg, socket, socketpair,
};

use super::super::fabric::{Delivery, Fabric as _, Who};
use super::super::wire::{Message, what};
use super::*;
use crate::closer::tests::{soon, stubborn};

/// A guest with a host whose kernel lets descriptors into sockets.
fn hosted() -> Hosted {
    Hosted::of(Gatekeeper::new(AllowAll), HostSockets::before_linux_6_16, |builder| builder)
}

/// Sends that, with descriptors beside it.
fn pass(to: impl AsFd, data: &[u8], passed: &[BorrowedFd<'_>], flags: SendFlags) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(passed)));
    assert_eq!(sendmsg(&to, &[IoSlice::new(data)], &mut control, flags), Ok(data.len()));
}

/// The same with a stubborn one, and what ends that when it is dropped.
fn pass_stubborn(to: impl AsFd, data: &[u8], flags: SendFlags) -> TcpStream {
    let (stubborn, ends) = stubborn();
    pass(to, data, &[stubborn.as_fd()], flags);
    ends
}

fn listener_at(path: &Path, kind: Kind) -> OwnedFd {
    let of = if kind == Kind::Stream { SocketType::STREAM } else { SocketType::SEQPACKET };
    let listener = socket(AddressFamily::UNIX, of, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    listener
}

/// The next operation that is neither data nor credit.
fn ends_with(guest: &mut Guest) -> u16 {
    loop {
        guest.poll();
        match guest.next_op() {
            Some(operation::RW) => {}
            Some(op) => return op,
            None => std::thread::yield_now(),
        }
    }
}

/// How a program sends it.
fn send_it(to: &OwnedFd, way: usize) -> TcpStream {
    let flags = SendFlags::empty();
    match way {
        0 => pass_stubborn(to, b"x", flags),
        1 => {
            // Behind something, also such that looks like the end.
            send(to, b"", flags).unwrap();
            send(to, b"hello", flags).unwrap();
            pass_stubborn(to, b"x", flags)
        }
        2 => {
            send(to, b"", flags).unwrap();
            pass_stubborn(to, b"x", flags)
        }
        // Urgent data, which others look past, alone and behind something.
        3 => pass_stubborn(to, b"x", SendFlags::OOB),
        _ => {
            send(to, b"hello", flags).unwrap();
            let ends = pass_stubborn(to, b"x", SendFlags::OOB);
            send(to, b"on", flags).unwrap();
            ends
        }
    }
}

const WAYS: [(Kind, usize); 8] = [
    (Kind::Stream, 0),
    (Kind::Stream, 1),
    (Kind::Stream, 2),
    (Kind::Stream, 3),
    (Kind::Stream, 4),
    (Kind::SeqPacket, 0),
    (Kind::SeqPacket, 1),
    (Kind::SeqPacket, 2),
];

/// A guest that is connected to a program, which has sent it that way.
fn connected(kind: Kind, way: usize) -> (Hosted, Ends, OwnedFd, TcpStream) {
    let mut hosted = hosted();
    let listener = listener_at(&hosted.service(52), kind);
    let key = Ends { kind, ..to_host(1000, 52) };
    hosted.guest.connect(key);
    let stream = accept(&listener).unwrap();
    let ends = send_it(&stream, way);
    (hosted, key, stream, ends)
}

#[test]
fn what_a_program_passes_does_not_hold_up_the_device() {
    for (kind, way) in WAYS {
        let (mut hosted, _, stream, ends) = connected(kind, way);
        let hosted = soon("the device", move || {
            assert_eq!(ends_with(&mut hosted.guest), operation::RST, "{kind:?} {way}");
            assert_eq!(hosted.guest.open(), 0);
            hosted
        });
        soon("the end of the device", move || drop(hosted));
        drop((stream, ends));
    }
}

#[test]
fn what_a_program_passes_and_nobody_reads_does_not_hold_up_the_device() {
    for (kind, way) in WAYS {
        let (mut hosted, key, stream, ends) = connected(kind, way);
        soon("the device", move || {
            hosted.guest.say(key, operation::RST);
            assert_eq!(hosted.guest.open(), 0, "{kind:?} {way}");
            drop(hosted);
        });
        drop((stream, ends));
    }
}

#[test]
fn what_a_program_passes_does_not_hold_up_who_revokes() {
    for (kind, way) in WAYS {
        let (mut hosted, _, stream, ends) = connected(kind, way);
        soon("a revocation", move || {
            assert_eq!(hosted.gatekeeper.revoke_all(|_| true), 1, "{kind:?} {way}");
            assert_eq!(ends_with(&mut hosted.guest), operation::RST);
            assert_eq!(hosted.guest.open(), 0);
        });
        drop((stream, ends));
    }
}

/// Where the kernel helps, nothing of it gets in, and the connection goes on.
#[test]
fn what_the_kernel_keeps_out_costs_no_connection() {
    let probe = connection();
    if !super::super::sys::take_no_descriptors(&probe.0) {
        println!("skipped: sockets of this kernel take descriptors (before Linux 6.16)");
        return;
    }
    let mut hosted = Hosted::new();
    let listener = listener_at(&hosted.service(52), Kind::Stream);
    let key = to_host(1000, 52);
    hosted.guest.connect(key);
    let dialed = accept(&listener).unwrap();
    let client = OwnedFd::from(hosted.client(80));
    hosted.guest.accept();
    let channel = crate::channel::VsockConnect { port: 81 };
    let grant = hosted.gatekeeper.open(Party::Host("monitor".into()), Some(vm(3)), channel).unwrap();
    let monitors = hosted.guest.handle.connect(grant, Kind::SeqPacket).unwrap();
    hosted.guest.accept();
    for stream in [dialed, client, monitors] {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let passed = [probe.0.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
        let sent = sendmsg(&stream, &[IoSlice::new(b"x")], &mut control, SendFlags::empty());
        assert_eq!(sent, Err(rustix::io::Errno::PERM));
        send(&stream, b"hello", SendFlags::empty()).unwrap();
        let data = loop {
            let (header, data) = hosted.guest.next().unwrap();
            if header.op == operation::RW {
                break data;
            }
        };
        assert_eq!(data, b"hello");
    }
}

/// Programs that come in: beside the line, behind it, with nonsense, and with nothing that anybody would hear.
#[test]
fn what_waits_at_the_door_does_not_hold_up_the_device() {
    for kind in [Kind::Stream, Kind::SeqPacket] {
        for way in 0..4 {
            let mut hosted = hosted();
            let of = if kind == Kind::Stream { SocketType::STREAM } else { SocketType::SEQPACKET };
            let client = socket(AddressFamily::UNIX, of, None).unwrap();
            let name = if kind == Kind::Stream { "v" } else { "v_seqpacket" };
            let path = hosted.directory.path().join(name);
            connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            let line = if way == 2 { &b"nonsense\n"[..] } else { b"CONNECT 80\n" };
            let flags = SendFlags::empty();
            if way == 1 {
                send(&client, line, flags).unwrap();
            }
            let ends = pass_stubborn(&client, line, flags);
            soon(&format!("the device, {kind:?}, way {way}"), move || {
                match way {
                    // Of a stream the line is looked at together with what is behind it.
                    1 if kind == Kind::SeqPacket => {
                        let key = hosted.guest.hear_request();
                        hosted.guest.say(key, operation::RESPONSE);
                        assert_eq!(ends_with(&mut hosted.guest), operation::RST);
                    }
                    // Nobody looks.
                    3 => {}
                    _ => {
                        hosted.guest.poll();
                        hosted.guest.no_more();
                    }
                }
                assert_eq!(hosted.guest.open(), 0);
                drop(hosted);
            });
            drop((client, ends));
        }
    }
}

/// Nobody else is let in while more is to be closed than may be, and those who are in go on.
#[test]
fn programs_that_cannot_be_closed_are_bounded() {
    let mut hosted = hosted();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let key = to_host(1000, 52);
    hosted.guest.connect(key);
    let mut stream = service.accept().unwrap().0;
    let mut kept = Vec::new();
    for _ in 0..64 {
        let client = UnixStream::connect(hosted.path()).unwrap();
        let ends = pass_stubborn(&client, b"CONNECT 80\n", SendFlags::empty());
        hosted.guest.poll();
        kept.push((client, ends));
    }
    let late = hosted.client(81);
    hosted.guest.poll();
    hosted.guest.no_more();
    hosted.guest.say(to_host(1001, 52), operation::REQUEST);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    hosted.guest.send(key, b"hello");
    assert_eq!(taken(&mut stream).unwrap(), b"hello");
    drop(kept);
    let begun = Instant::now();
    let request = loop {
        hosted.clock.advance(50_000_000);
        hosted.guest.poll();
        if let Some((header, _)) = hosted.guest.next() {
            break header;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "in vain");
    };
    assert_eq!((request.op, request.dst_port), (operation::REQUEST, 81));
    drop(late);
}

/// A broker that says what it is told to.
struct Rogue {
    directory: tempfile::TempDir,
    member: Option<Member>,
    socket: OwnedFd,
}

impl Rogue {
    /// With a member, to which it sends something beside its answer, and keeps no copy of that.
    fn new(beside: Option<OwnedFd>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broker");
        let listener = listener_at(&path, Kind::SeqPacket);
        let (member, socket) = std::thread::scope(|scope| {
            let joining =
                scope.spawn(|| Member::join(&path, 3, reachable(&Gatekeeper::new(AllowAll), 3)).unwrap());
            let socket = accept(&listener).unwrap();
            assert!(recv(&socket, &mut [0; 100], RecvFlags::empty()).is_ok());
            let answers = socket.try_clone().unwrap();
            // Aside: if the member has closed what it got by the time that this does, the last copy is here, and its close waits.
            std::thread::spawn(move || {
                let joined = Message { what: what::JOINED, ..Message::default() };
                assert_eq!(joined.send(&answers, beside.as_ref().map(OwnedFd::as_fd)), Ok(true));
                drop(beside);
            });
            (joining.join().unwrap(), socket)
        });
        Self { directory, member: Some(member), socket }
    }

    fn guest(&mut self) -> Guest {
        let builder = Vsock::builder(3, || 0).gatekeeper(vm(3), Gatekeeper::new(AllowAll));
        Guest::new(builder.broker(self.member.take().unwrap()).build().unwrap())
    }
}

/// That guest 4 calls.
fn arrived() -> Message {
    Message {
        what: what::ARRIVED,
        kind: Kind::Stream.number().into(),
        cid: 4,
        port: 80,
        from_port: 1000,
        uuid: 4,
        incarnation: 1,
        ..Message::default()
    }
}

/// The ends of a connection.
fn connection() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap()
}

/// Beside what it says, in the sockets that it hands out, and in what is not heard any more.
#[test]
fn what_a_broker_passes_does_not_hold_up_its_member() {
    for way in 0..6 {
        let (stubborn, ends) = stubborn();
        let (beside, stubborn) = if way == 0 { (Some(stubborn), None) } else { (None, Some(stubborn)) };
        let mut rogue = Rogue::new(beside);
        let member = rogue.member.take().unwrap();
        let (ours, theirs) = connection();
        let passed = || stubborn.as_ref().unwrap().as_fd();
        match way {
            0 => {}
            // Neither is a connection; one more than there is to be.
            1 => {
                assert_eq!(arrived().send(&rogue.socket, Some(passed())), Ok(true));
                let dialed = Message { what: what::DIALED, ..Message::default() };
                assert_eq!(dialed.send(&rogue.socket, Some(passed())), Ok(true));
            }
            2 => {
                pass(&rogue.socket, &[what::JOINED as u8; 56], &[ours.as_fd(), passed()], SendFlags::empty())
            }
            // In a connection that nobody wants; behind a message that looks like the end.
            3 | 4 => {
                if way == 4 {
                    send(&theirs, b"", SendFlags::empty()).unwrap();
                }
                pass(&theirs, b"x", &[passed()], SendFlags::empty());
                assert_eq!(arrived().send(&rogue.socket, Some(ours.as_fd())), Ok(true));
            }
            _ => assert_eq!(arrived().send(&rogue.socket, Some(passed())), Ok(true)),
        }
        drop((stubborn, ours));
        soon("the member", move || {
            if way < 5 {
                while let Some(delivery) = member.next() {
                    match delivery {
                        Delivery::Dialed { socket, .. } => assert!(way == 1 && socket.is_none()),
                        Delivery::Arrived { .. } => assert!(way == 3 || way == 4),
                    }
                }
                assert_eq!(member.who(4) == Who::Nobody, way == 2, "{way}");
            }
            drop(member);
        });
        drop((rogue.directory, theirs, ends));
    }
}

/// Through a connection that is open, either side having begun it, read or not.
#[test]
fn what_another_monitor_passes_does_not_hold_up_the_device() {
    for (begins, reads) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut rogue = Rogue::new(None);
        let mut guest = rogue.guest();
        let (ours, theirs) = connection();
        let key = if begins {
            let key = Ends { guest_port: 1000, cid: 4, port: 80, kind: Kind::Stream };
            guest.say(key, operation::REQUEST);
            let mut dial = [0; 56];
            assert!(recv(&rogue.socket, &mut dial, RecvFlags::empty()).is_ok());
            let tag = u64::from_le_bytes(dial[24..32].try_into().unwrap());
            let dialed = Message { what: what::DIALED, tag, ..Message::default() };
            assert_eq!(dialed.send(&rogue.socket, Some(ours.as_fd())), Ok(true));
            // The record that says so.
            send(&theirs, &[0x20], SendFlags::empty()).unwrap();
            guest.poll();
            assert_eq!(guest.next_op(), Some(operation::RESPONSE));
            key
        } else {
            assert_eq!(arrived().send(&rogue.socket, Some(ours.as_fd())), Ok(true));
            guest.accept()
        };
        drop(ours);
        let ends = pass_stubborn(&theirs, &[0x10, 1], SendFlags::empty());
        soon("the device", move || {
            if reads {
                assert_eq!(ends_with(&mut guest), operation::RST);
            } else {
                guest.say(key, operation::RST);
            }
            assert_eq!(guest.open(), 0);
            drop(guest);
        });
        drop((rogue, theirs, ends));
    }
}

/// What others have sent is not let in while more of it is to be closed than may be.
#[test]
fn calls_that_cannot_be_closed_are_bounded() {
    let mut rogue = Rogue::new(None);
    let member = rogue.member.take().unwrap();
    let mut kept = Vec::new();
    for _ in 0..64 {
        let (stubborn, ends) = stubborn();
        assert_eq!(arrived().send(&rogue.socket, Some(stubborn.as_fd())), Ok(true));
        // Before the member has it, so that this is never the last copy.
        drop(stubborn);
        assert!(!member.is_full() && member.next().is_none());
        kept.push(ends);
    }
    assert!(member.is_full());
    drop(kept);
    let begun = Instant::now();
    while member.is_full() {
        assert!(begun.elapsed() < Duration::from_secs(20), "in vain");
        std::thread::yield_now();
    }
}
