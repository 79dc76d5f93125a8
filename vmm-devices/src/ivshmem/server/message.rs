//! Messages: a number, and maybe a descriptor.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::dialogue::ProtocolError;

/// A message of the server's.
#[derive(Debug)]
pub struct Message {
    /// Version, position, or -1 for the memory.
    pub number: i64,
    /// What came with it.
    pub descriptor: Option<OwnedFd>,
}

/// Puts messages together, which may come in pieces. After an error it keeps what came until it is dropped; to close that may take as
/// long as the sender likes (a file of FUSE's).
#[derive(Debug, Default)]
pub struct Receiver {
    bytes: [u8; 8],
    filled: usize,
    descriptors: Vec<OwnedFd>,
}

impl Receiver {
    /// With nothing received.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next message; `None` if it is not there yet, on a socket that does not wait. A piece that has come is kept.
    ///
    /// # Errors
    /// [`ProtocolError::Closed`] at the end, [`ProtocolError::Descriptors`] if more than one descriptor is with a message, and
    /// [`ProtocolError::Socket`].
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Option<Message>, ProtocolError> {
        loop {
            // Room for one more than there may be, so that it is seen. What has no room, the kernel closes.
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut room);
            let piece = self.bytes.get_mut(self.filled..).unwrap_or_default();
            // No more than the message: descriptors come with the first byte of theirs.
            let received = recvmsg(
                &socket,
                &mut [IoSliceMut::new(piece)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            );
            let received = match received {
                Ok(received) => received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(ProtocolError::Socket(error.into())),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    self.descriptors.extend(descriptors);
                }
            }
            if self.descriptors.len() > 1 || received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(ProtocolError::Descriptors);
            }
            if received.bytes == 0 {
                return Err(ProtocolError::Closed);
            }
            self.filled = self.filled.saturating_add(received.bytes);
            if self.filled >= self.bytes.len() {
                self.filled = 0;
                let number = i64::from_le_bytes(self.bytes);
                return Ok(Some(Message { number, descriptor: self.descriptors.pop() }));
            }
        }
    }
}

/// What became of a message that was to be sent at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Whole,
    /// There is no room for it now. The socket becomes writable when there is.
    NoRoom,
    /// The host takes none now: too many descriptors of this user's are on their way (unix(7), ETOOMANYREFS), to whomever that is, or
    /// there is no memory. Nothing tells when that is over.
    Refused,
}

/// Sends a message at once, or not.
pub(super) fn send(
    socket: impl AsFd,
    number: i64,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<Sent, Errno> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let bytes = number.to_le_bytes();
    loop {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, flags) {
            Ok(sent) if sent == bytes.len() => return Ok(Sent::Whole),
            // So few bytes go as a whole or not at all.
            Ok(_) => return Err(Errno::MSGSIZE),
            Err(Errno::AGAIN) => return Ok(Sent::NoRoom),
            Err(Errno::TOOMANYREFS | Errno::NOBUFS | Errno::NOMEM) => return Ok(Sent::Refused),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
