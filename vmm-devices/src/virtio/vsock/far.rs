//! The far end of a connection: a Unix socket, that never blocks. The kernel's buffers are all that lies between both ends, so
//! nothing grows where nobody reads.
//!
//! | [`Framing`] | whose | what |
//! |---|---|---|
//! | `Bytes` | programs of the host | SOCK_STREAM |
//! | `Messages` | programs of the host | SOCK_SEQPACKET: a message is a packet. The end of a record (EOR) is lost, as Unix sockets have none |
//! | `Records` | other devices | SOCK_SEQPACKET: each packet begins with a byte that says what it is, so that the other side can tell an end from a death |

use std::io::IoSlice;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType, send, sendmsg,
    socketpair, sockopt,
};

use super::backlog::Backlog;
use super::packet::{Kind, boundary, shutdown};
use super::socket::Socket;

/// How data lies in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Bytes,
    Messages,
    Records,
}

/// The first byte of a record.
mod record {
    /// Data. With a flag of [`super::boundary`] added, a message ends with it.
    pub(super) const DATA: u8 = 0x10;
    /// The connection is accepted.
    pub(super) const ACCEPTED: u8 = 0x20;
    /// With flags of [`super::shutdown`] added: no more of that.
    pub(super) const SHUT: u8 = 0x30;
    pub(super) const KIND: u8 = 0xf0;
}

/// Bytes of data that one record holds at most.
const RECORD: usize = 32 << 10;

/// Bytes that a socket is asked to hold: a message of the largest buffer that connections have has to fit.
const SOCKET_BUFFER: usize = 1 << 20;

/// Bytes of a message from a program of the host, at most; longer ones end the connection.
pub(super) const MAX_MESSAGE: usize = 1 << 20;

/// The socket.
#[derive(Clone, Debug)]
pub(super) struct Far {
    socket: Arc<Socket>,
    pub(super) framing: Framing,
}

/// What came of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All that could be sent was.
    All,
    /// There is no room.
    Full,
    /// Nobody takes it any more.
    Gone,
}

/// What came of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// So many bytes, with flags of [`boundary`].
    Data(usize, u32),
    /// The connection is accepted.
    Accepted,
    /// Flags of [`shutdown`].
    Shut(u32),
    /// Nothing now.
    Nothing,
    /// Nothing any more, in order.
    End,
    /// Nothing any more, as the other side died or broke the rules.
    Broken,
}

impl Far {
    pub(super) fn new(socket: Socket, framing: Framing) -> Self {
        // As much as the host allows; a message that does not fit ends its connection.
        let (Ok(()) | Err(_)) = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
        Self { socket: Arc::new(socket), framing }
    }

    pub(super) fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Lets it go. The broker has a copy of what connects two devices, which the other side must not wait for.
    pub(super) fn cut(&self) {
        if self.framing == Framing::Records {
            // What is not connected any more needs none.
            let (Ok(()) | Err(_)) = rustix::net::shutdown(self.as_fd(), Shutdown::Both);
        }
    }

    /// Sends what waits, as far as there is room; adds to `left` how many bytes have left.
    pub(super) fn send_backlog(&self, backlog: &mut Backlog, kind: Kind, left: &mut u32) -> Sent {
        loop {
            if backlog.is_empty() {
                return Sent::All;
            }
            let end = backlog.first_end();
            let all = backlog.bytes();
            let (part, flags) = match (self.framing, end) {
                (Framing::Bytes, _) => (all, 0),
                // A message that is not here as a whole waits.
                (Framing::Messages, None) => return Sent::All,
                (Framing::Messages, Some(end)) => (all.get(..end.len()).unwrap_or(all), boundary::MESSAGE),
                (Framing::Records, _) => {
                    let whole = end.map_or(all, |end| all.get(..end.len()).unwrap_or(all));
                    let part = whole.get(..RECORD).unwrap_or(whole);
                    let last = kind == Kind::SeqPacket && end.is_some() && part.len() == whole.len();
                    let eor = if end.is_some_and(|end| end.is_record()) { boundary::RECORD } else { 0 };
                    (part, if last { boundary::MESSAGE | eor } else { 0 })
                }
            };
            let sent = match self.framing {
                Framing::Records => self.send_record(record::DATA | low_bits(flags), part),
                _ => again(|| send(self.as_fd(), part, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)),
            };
            match sent {
                Ok(sent) => {
                    let sent = sent.min(part.len());
                    backlog.take(sent);
                    *left = left.saturating_add(u32::try_from(sent).unwrap_or(u32::MAX));
                    if flags & boundary::MESSAGE != 0 {
                        backlog.take_end();
                    }
                }
                Err(Errno::AGAIN) => return Sent::Full,
                Err(_) => return Sent::Gone,
            }
        }
    }

    /// Bytes of `data` that were sent.
    fn send_record(&self, first: u8, data: &[u8]) -> Result<usize, Errno> {
        let parts = [IoSlice::new(std::slice::from_ref(&first)), IoSlice::new(data)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = again(|| sendmsg(self.as_fd(), &parts, &mut SendAncillaryBuffer::default(), flags))?;
        Ok(sent.saturating_sub(1))
    }

    /// Tells the other device that the connection is accepted.
    pub(super) fn say_accepted(&self) -> Sent {
        sent(self.send_record(record::ACCEPTED, &[]))
    }

    /// Tells the other side what the guest does no more, all of whose data has left.
    pub(super) fn say_shut(&self, flags: u32) -> Sent {
        if self.framing == Framing::Records {
            return sent(self.send_record(record::SHUT | low_bits(flags), &[]));
        }
        let how = match flags & shutdown::BOTH {
            shutdown::RECEIVE => Shutdown::Read,
            shutdown::SEND => Shutdown::Write,
            _ => Shutdown::Both,
        };
        // What is not connected any more needs none.
        let (Ok(()) | Err(_)) = rustix::net::shutdown(self.as_fd(), how);
        Sent::All
    }

    /// Sends a line to a program of the host that has just connected, and for which there is room therefore.
    pub(super) fn say_line(&self, line: &str) -> Sent {
        match again(|| send(self.as_fd(), line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)) {
            Ok(sent) if sent == line.len() => Sent::All,
            _ => Sent::Gone,
        }
    }

    /// Reads into `room`: a part of a stream, or one message or record as a whole, which `room` is to be large enough for.
    pub(super) fn receive(&self, room: &mut [u8]) -> Came {
        let most = room.len();
        let is_stream = self.framing == Framing::Bytes;
        let mut came = self.socket.receive(room, is_stream);
        if came == Err(Errno::CONNRESET) && !is_stream {
            // Told once, before what came earlier.
            came = self.socket.receive(room, is_stream);
        }
        let (got, len) = match came {
            Ok((got, len)) => (got, len),
            Err(Errno::AGAIN) => return Came::Nothing,
            Err(_) => return Came::Broken,
        };
        match self.framing {
            Framing::Bytes if len == 0 => Came::End,
            Framing::Bytes => Came::Data(got, 0),
            _ if len > most => Came::Broken,
            Framing::Messages if len == 0 => self.after_nothing(),
            Framing::Messages => Came::Data(got, boundary::MESSAGE),
            Framing::Records => {
                let Some((first, _)) = room.split_first().filter(|_| len > 0) else { return Came::Broken };
                let low = u32::from(first & !record::KIND);
                match first & record::KIND {
                    record::DATA => Came::Data(got - 1, low & (boundary::MESSAGE | boundary::RECORD)),
                    record::ACCEPTED => Came::Accepted,
                    record::SHUT => Came::Shut(low & shutdown::BOTH),
                    _ => Came::Broken,
                }
            }
        }
    }

    /// A message of no bytes, or the end: both look the same. An empty one just before the end is taken for the end.
    fn after_nothing(&self) -> Came {
        let mut ended = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        if again(|| poll(&mut ended, Some(&Timespec::default()))) == Ok(0) {
            return Came::Data(0, boundary::MESSAGE);
        }
        match self.socket.look(&mut [0]) {
            Ok((1.., _)) => Came::Data(0, boundary::MESSAGE),
            Ok(_) => Came::End,
            Err(_) => Came::Broken,
        }
    }

    /// How far the data of a record lies behind its beginning.
    pub(super) fn prefix(&self) -> usize {
        usize::from(self.framing == Framing::Records)
    }
}

fn low_bits(flags: u32) -> u8 {
    u8::try_from(flags & u32::from(!record::KIND)).unwrap_or(0)
}

fn sent(result: Result<usize, Errno>) -> Sent {
    match result {
        Ok(_) => Sent::All,
        Err(Errno::AGAIN) => Sent::Full,
        Err(_) => Sent::Gone,
    }
}

/// Once more when a signal came between.
pub(super) fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// The two ends of a connection between devices, or between a device and its monitor.
pub(super) fn pair(framing: Framing) -> std::io::Result<(OwnedFd, OwnedFd)> {
    let of = if framing == Framing::Bytes { SocketType::STREAM } else { SocketType::SEQPACKET };
    Ok(socketpair(AddressFamily::UNIX, of, SocketFlags::CLOEXEC, None)?)
}
