//! Sockets of broker and client. No call on one waits, whatever the other side has done to it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use smallvec::SmallVec;

use super::BrokerError;
use super::message::{MOST, Message};

/// Descriptors of a message that is sent.
const DESCRIPTORS: usize = 2;

/// Those that a message can have at most (Linux, include/net/scm.h, SCM_MAX_FD). There is room for all: the kernel closes what finds none, and
/// who receives waits for that.
const MOST_DESCRIPTORS: usize = 253;

/// What is taken of a bell at once.
const RINGS: u8 = 16;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

fn failed(path: &Path, what: &'static str) -> impl FnOnce(Errno) -> BrokerError {
    move |error| BrokerError::Socket { path: path.to_owned(), what, source: error.into() }
}

fn socket(path: &Path) -> Result<(OwnedFd, SocketAddrUnix), BrokerError> {
    let address = SocketAddrUnix::new(path).map_err(failed(path, "no path of a socket"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((socket, address))
}

/// Listens. A socket that nobody listens at any more is replaced.
pub(super) fn listen(path: &Path) -> Result<OwnedFd, BrokerError> {
    let (listener, address) = socket(path)?;
    let bound = match rustix::net::bind(&listener, &address) {
        Err(Errno::ADDRINUSE) if is_left_behind(path) => {
            rustix::fs::unlink(path).and_then(|()| rustix::net::bind(&listener, &address))
        }
        bound => bound,
    };
    bound.map_err(failed(path, "cannot be listened at; a path is wanted that is free"))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn is_left_behind(path: &Path) -> bool {
    // A file that is no socket refuses connections, too.
    let is_socket = rustix::fs::lstat(path)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket);
    is_socket
        && socket(path)
            .is_ok_and(|(socket, address)| rustix::net::connect(&socket, &address) == Err(Errno::CONNREFUSED))
}

pub(super) fn connect(path: &Path) -> Result<OwnedFd, BrokerError> {
    let (socket, address) = socket(path)?;
    rustix::net::connect(&socket, &address).map_err(failed(path, "nobody listens there"))?;
    Ok(socket)
}

pub(super) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => Ok(Some(socket)),
        // Those who gave up meanwhile are none of the caller's business.
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A pair of sockets by which one side wakes the other.
pub(super) fn bell() -> Result<(OwnedFd, OwnedFd), BrokerError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?)
}

/// Whether that can be rung without a wait: of other sockets, a send may wait for who else uses them, whatever its flags.
pub(super) fn check_bell(bell: impl AsFd) -> Result<(), BrokerError> {
    let kind = (sockopt::socket_domain(&bell), sockopt::socket_type(&bell));
    if kind != (Ok(AddressFamily::UNIX), Ok(SocketType::DGRAM)) {
        return Err(BrokerError::Protocol { what: "a bell that is no unix socket of datagrams" });
    }
    Ok(())
}

const FLAGS: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

/// Rings a bell. Where that is not possible, it has been rung, or there is nobody.
pub(super) fn ring(bell: impl AsFd) {
    let (Ok(_) | Err(_)) = rustix::net::send(bell, &[0], FLAGS);
}

/// Takes what a bell has rung: more than who rings once for each sleep and each wait has rung since it was last taken. A peer that rings
/// without end does not hold up who listens; it wakes it again.
pub(super) fn hush(bell: impl AsFd) {
    let mut scrap = [0; 8];
    let heard = |_: &u8| rustix::net::recv(&bell, &mut scrap[..], RecvFlags::DONTWAIT).is_ok();
    (0..RINGS).take_while(heard).for_each(drop);
}

/// Whether it was sent; if not, there is no room for it.
pub(super) fn send(socket: impl AsFd, message: &Message) -> Result<bool, BrokerError> {
    match rustix::net::send(socket, &message.to_bytes(), FLAGS) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn send_with(
    socket: impl AsFd,
    message: &Message,
    descriptors: &[&OwnedFd],
) -> Result<(), BrokerError> {
    let descriptors: SmallVec<[_; DESCRIPTORS]> = descriptors.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(BrokerError::Protocol { what: "more descriptors than a message has" });
    }
    let bytes = message.to_bytes();
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, FLAGS)?;
    Ok(())
}

/// What was received.
pub(super) enum Heard {
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
    /// A message.
    Message(Message),
}

/// Receives a message, which carries no descriptors.
///
/// # Errors
/// If it does. It stays in the socket, whose close is then that of the descriptors.
pub(super) fn receive(socket: impl AsFd) -> Result<Heard, BrokerError> {
    let mut bytes = [0; MOST];
    let peeked = again(|| {
        let mut none = RecvAncillaryBuffer::new(&mut []);
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut none, flags)
    });
    match peeked {
        Ok(peeked) if peeked.flags.contains(ReturnFlags::CTRUNC) => {
            return Err(BrokerError::Protocol { what: "descriptors out of turn" });
        }
        Ok(_) => {}
        Err(error) => return heard(Err(error), &bytes),
    }
    let received = again(|| rustix::net::recv(&socket, &mut bytes[..], RecvFlags::DONTWAIT));
    heard(received.map(|(received, _)| received), &bytes)
}

/// Receives a message that may carry descriptors, which are added to `descriptors` whatever comes of it.
pub(super) fn receive_with(socket: impl AsFd, descriptors: &mut Vec<OwnedFd>) -> Result<Heard, BrokerError> {
    let mut bytes = [0; MOST];
    let received = again(|| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received =
            rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        Ok(received.bytes)
    });
    heard(received, &bytes)
}

/// Calls that once more if the other side has closed before it read everything, which is said once, before what it has sent.
fn again<T>(mut receive: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    match receive() {
        Err(Errno::CONNRESET) => receive(),
        received => received,
    }
}

fn heard(received: Result<usize, Errno>, bytes: &[u8]) -> Result<Heard, BrokerError> {
    match received {
        Ok(0) | Err(Errno::CONNRESET) => Ok(Heard::End),
        Ok(received) => Ok(Heard::Message(Message::from_bytes(bytes.get(..received).unwrap_or_default())?)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Heard::Nothing),
        Err(error) => Err(error.into()),
    }
}
