//! What a broker and its members say to each other: messages of one size on a SOCK_SEQPACKET socket, with a descriptor beside some.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg, sockopt,
};

use super::far::again;
use super::socket::Socket;
use crate::channel::VmIdentity;
use crate::closer::Closer;

/// Which language. Another one is refused.
pub(super) const VERSION: u32 = 2;

/// What a message is.
pub(super) mod what {
    /// From a member: wants a place. `port` is the version.
    pub(in super::super) const JOIN: u32 = 1;
    /// To it: has one, or not, for `port`.
    pub(in super::super) const JOINED: u32 = 2;
    pub(in super::super) const REFUSED: u32 = 3;
    /// From a member: wants a connection.
    pub(in super::super) const DIAL: u32 = 4;
    /// To it: has one, with the socket, or without is refused.
    pub(in super::super) const DIALED: u32 = 5;
    /// To the other: somebody wants one.
    pub(in super::super) const ARRIVED: u32 = 6;
    /// From a member: has taken so many of those, which is `tag`.
    pub(in super::super) const TAKEN: u32 = 7;
}

/// Why a member has no place.
pub(super) mod reason {
    pub(in super::super) const VERSION: u32 = 1;
    pub(in super::super) const TAKEN: u32 = 2;
    pub(in super::super) const GATE: u32 = 3;
    pub(in super::super) const WHO: u32 = 4;

    pub(in super::super) fn text(reason: u32) -> &'static str {
        match reason {
            VERSION => "it speaks another version of the protocol",
            TAKEN => "it is taken",
            GATE => "its gate refuses it",
            WHO => {
                "it does not take the process for who it says it is, or the identifier is none of a guest's"
            }
            _ => "no reason is given",
        }
    }
}

/// Bytes of a message.
const SIZE: usize = 56;

/// A message. Not all fields mean something in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) what: u32,
    /// See [`super::packet::Kind`].
    pub(super) kind: u32,
    pub(super) cid: u32,
    pub(super) port: u32,
    pub(super) from_port: u32,
    pub(super) tag: u64,
    pub(super) uuid: u128,
    pub(super) incarnation: u64,
}

impl Message {
    pub(super) fn identity(&self) -> VmIdentity {
        VmIdentity::new(self.uuid, self.incarnation)
    }

    fn to_bytes(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let words = [self.what, self.kind, self.cid, self.port, self.from_port, 0];
        let fields = words
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .chain(self.tag.to_le_bytes())
            .chain(self.uuid.to_le_bytes())
            .chain(self.incarnation.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(place, byte)| *place = byte);
        bytes
    }

    fn parse(bytes: &[u8; SIZE]) -> Self {
        fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let Some((field, behind)) = rest.split_first_chunk() else { return [0; N] };
            *rest = behind;
            *field
        }
        let mut rest = &bytes[..];
        let words: [u32; 6] = std::array::from_fn(|_| u32::from_le_bytes(take(&mut rest)));
        let [what, kind, cid, port, from_port, _] = words;
        let (tag, uuid) = (u64::from_le_bytes(take(&mut rest)), u128::from_le_bytes(take(&mut rest)));
        let incarnation = u64::from_le_bytes(take(&mut rest));
        Self { what, kind, cid, port, from_port, tag, uuid, incarnation }
    }

    /// Sends it, with a descriptor; `Ok(false)` if there is no room now. It fails with [`Errno::TOOMANYREFS`] if too many descriptors are
    /// on their way, to anybody.
    pub(super) fn send(&self, to: impl AsFd, socket: Option<BorrowedFd<'_>>) -> Result<bool, Errno> {
        let bytes = self.to_bytes();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let sockets = socket.map(|socket| [socket]);
        if let Some(sockets) = &sockets
            && !control.push(SendAncillaryMessage::ScmRights(sockets))
        {
            return Err(Errno::NOBUFS);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match again(|| sendmsg(&to, &[IoSlice::new(&bytes)], &mut control, flags)) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::NOBUFS) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// What came.
#[derive(Debug)]
pub(super) enum Received {
    /// With an end of a connection, or without.
    Message(Message, Option<Socket>),
    Nothing,
    /// The other side is gone, or speaks another language.
    End,
}

/// The next message of a member, which passes no descriptors. One that does speaks another language, and stays in the socket: to close its
/// descriptors, which the kernel does where there is no room for them, could take as long as the member likes. The close of the socket is
/// that of them.
pub(super) fn hear_member(from: impl AsFd) -> Received {
    let mut none = RecvAncillaryBuffer::default();
    match receive_with(&from, RecvFlags::DONTWAIT | RecvFlags::PEEK, &mut none) {
        Heard::Message(_) => match receive_with(from, RecvFlags::DONTWAIT, &mut none) {
            Heard::Message(message) => Received::Message(message, None),
            Heard::Nothing => Received::Nothing,
            Heard::End => Received::End,
        },
        Heard::Nothing => Received::Nothing,
        Heard::End => Received::End,
    }
}

/// As whose the member closes what the broker has sent, of which it is not known who else could have it.
pub(super) const BROKER: u32 = 0;

/// Descriptors beside a message at most, as the kernel has it (SCM_MAX_FD). With less room for them it would close the others here and now.
const MOST_DESCRIPTORS: usize = 253;

/// The next message of the broker, and the end of a connection that is beside it. What else is goes to `closer`.
pub(super) fn receive(from: impl AsFd, flags: RecvFlags, closer: &Arc<Closer>) -> Received {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let heard = receive_with(from, flags, &mut control);
    let passed = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(passed) => Some(passed),
        _ => None,
    });
    let (mut connection, mut all) = (None, 0);
    for passed in passed.flatten() {
        all += 1;
        if is_connection(&passed) {
            connection = Some(Socket::of(passed, closer, BROKER));
        } else {
            closer.close_of(BROKER, passed);
        }
    }
    match heard {
        Heard::Message(message) if all <= 1 => Received::Message(message, connection),
        Heard::Nothing => Received::Nothing,
        Heard::Message(_) | Heard::End => Received::End,
    }
}

/// What came, descriptors apart.
enum Heard {
    Message(Message),
    Nothing,
    End,
}

fn receive_with(from: impl AsFd, flags: RecvFlags, control: &mut RecvAncillaryBuffer<'_>) -> Heard {
    let mut bytes = [0; SIZE];
    let flags = flags | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
    let came = again(|| recvmsg(&from, &mut [IoSliceMut::new(&mut bytes)], control, flags));
    let came = match came {
        Ok(came) => came,
        Err(Errno::AGAIN) => return Heard::Nothing,
        Err(_) => return Heard::End,
    };
    let cut = came.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if came.bytes != SIZE || cut { Heard::End } else { Heard::Message(Message::parse(&bytes)) }
}

/// Whether that is a socket such as connections are made of.
fn is_connection(socket: &OwnedFd) -> bool {
    sockopt::socket_type(socket) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_domain(socket) == Ok(rustix::net::AddressFamily::UNIX)
}
