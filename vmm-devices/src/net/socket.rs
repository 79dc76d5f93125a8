//! Frames on a unix socket: the peer is another program, a test, or a second device.
//!
//! Each message is a frame behind the header of Virtio 1.3, 5.1.6 ([`HEADER`] bytes, the number of buffers 0). Both sides agree by other
//! means upon what the headers may ask for.
//!
//! # Threat model
//! The peer is hostile: frames are checked, and what it sends beside one (descriptors, which could take as long to close as it likes) is not
//! taken. It stays in the socket, of which nothing more is heard then, and goes with it, on a thread that nobody waits for.

use std::fmt;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::epoll;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SocketFlags, SocketType, recvmsg, socketpair,
    sockopt,
};
use vmm_memory::vm_memory::VolatileSlice;

use super::backend::{Agreed, Link, NetBackend, NetEvents, NetPort, Received, Sent};
use super::error::NetError;
use super::membership::Membership;
use super::packet::{HEADER, Offloads, PacketInfo};
use crate::channel::{Grant, NetworkAttach};
use crate::closer::Closer;
use crate::vectored;

/// Bytes that may be under way, as far as the host allows: 32 of the longest frames.
const ROOM: usize = 2 << 20;

/// Frames of an earlier driver's that are thrown away at most.
const STALE: usize = 1000;

/// A network at the other end of a unix socket: SEQPACKET, or DGRAM, of which nobody knows whether the peer is there.
pub struct FrameSocket {
    socket: Arc<Socket>,
    offloads: Offloads,
}

struct Socket {
    /// `None` at the end.
    fd: Option<OwnedFd>,
    closer: Closer,
    /// The peer is gone, or speaks another language.
    closed: AtomicBool,
    /// Whose end can be seen.
    has_end: bool,
    membership: Arc<Membership>,
}

impl fmt::Debug for FrameSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameSocket").field("offloads", &self.offloads).finish_non_exhaustive()
    }
}

impl FrameSocket {
    /// Takes one end of a connected socket. `offloads` is what both sides can do. The thread that closes the socket in the end is started
    /// here.
    ///
    /// # Errors
    /// If it keeps no messages apart, or its kind is not known, or the host has no thread.
    pub fn new(grant: Grant<NetworkAttach>, fd: OwnedFd, offloads: Offloads) -> Result<Self, NetError> {
        let kind = sockopt::socket_type(&fd).map_err(io::Error::from)?;
        if ![SocketType::SEQPACKET, SocketType::DGRAM].contains(&kind) {
            let why = "a socket that frames go by keeps messages apart: it is SEQPACKET or DGRAM";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
        }
        // Less will do, at more waits.
        let (Ok(()) | Err(_)) = sockopt::set_socket_send_buffer_size(&fd, ROOM);
        // What the kernel adds to a message would be taken for what the peer does. Only unix sockets have that.
        let (Ok(()) | Err(_)) = sockopt::set_socket_passcred(&fd, false);
        let (closed, has_end) = (AtomicBool::new(false), kind == SocketType::SEQPACKET);
        let membership = Membership::new(grant)?;
        let closer = Closer::new("net-close", 1, None)?;
        let socket = Socket { fd: Some(fd), closer, closed, has_end, membership };
        Ok(Self { socket: Arc::new(socket), offloads })
    }

    /// Two connected ends, for [`FrameSocket::new`] and whoever is the peer.
    ///
    /// # Errors
    /// If the host has no more descriptors.
    pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
    }
}

impl Socket {
    fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            self.membership.tell_link();
        }
    }

    /// Receives a message; how many bytes, and whether some of it found no room.
    fn receive(&self, head: &mut [u8], buffers: &[VolatileSlice<'_>]) -> io::Result<(usize, bool)> {
        let mut none = RecvAncillaryBuffer::default();
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let peeked = recvmsg(self, &mut [IoSliceMut::new(&mut [])], &mut none, flags)?;
        if peeked.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        vectored::receive_message(self.as_fd(), head, buffers)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // No socket, where there is none any more.
        self.fd.as_ref().map_or(rustix::fs::CWD, AsFd::as_fd)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.closer.close(self.fd.take());
    }
}

impl NetBackend for FrameSocket {
    fn transmit_offloads(&self) -> Offloads {
        self.offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.offloads
    }

    fn link(&self) -> Link {
        let up = !self.socket.closed.load(Ordering::SeqCst);
        self.socket.membership.link(if up { Link::UP } else { Link::DOWN })
    }

    fn listen(&self, events: Arc<dyn NetEvents>) {
        self.socket.membership.listen(events);
    }

    fn attach(&self, agreed: &Agreed, _: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError> {
        if agreed.pairs != 1 {
            return Err(NetError::Pairs { pairs: agreed.pairs, most: 1 });
        }
        let mut port = SocketPort::new(Arc::clone(&self.socket))?;
        port.forget();
        Ok(vec![Box::new(port)])
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        // The peer cannot be told; what the driver does not take is dropped by the device.
        let _ = offloads;
        Ok(())
    }
}

struct SocketPort {
    socket: Arc<Socket>,
    /// Readable when the socket is, or, while that is waited for, when it takes messages again.
    ready: OwnedFd,
    waits: bool,
}

impl fmt::Debug for SocketPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketPort").field("waits", &self.waits).finish_non_exhaustive()
    }
}

const READABLE: epoll::EventFlags =
    epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP).union(epoll::EventFlags::ET);

impl SocketPort {
    fn new(socket: Arc<Socket>) -> Result<Self, NetError> {
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&ready, &*socket, data, READABLE).map_err(io::Error::from)?;
        Ok(Self { socket, ready, waits: false })
    }

    /// Whether it is to wake the device when there is room. It looks at once, so that none is missed.
    fn wait(&mut self, waits: bool) -> Result<(), NetError> {
        if waits || self.waits {
            let flags = if waits { READABLE | epoll::EventFlags::OUT } else { READABLE };
            let data = epoll::EventData::new_u64(0);
            epoll::modify(&self.ready, &*self.socket, data, flags).map_err(io::Error::from)?;
            self.waits = waits;
        }
        Ok(())
    }

    /// Throws away what waits.
    fn forget(&mut self) {
        let mut scrap = [0; HEADER];
        for _ in 0..STALE {
            match self.socket.receive(&mut scrap, &[]) {
                Ok((0, _)) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

impl NetPort for SocketPort {
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError> {
        let socket = Arc::clone(&self.socket);
        let sent =
            socket.membership.frame(|| Ok(vectored::send_message(socket.as_fd(), &info.to_bytes(0), frame)?));
        match sent {
            Ok(_) => {
                self.wait(false)?;
                Ok(Sent::Done)
            }

            Err(NetError::Host(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wait(true)?;
                Ok(Sent::Full)
            }
            Err(error) => {
                if matches!(&error, NetError::Host(error) if error.kind() == io::ErrorKind::BrokenPipe) {
                    socket.close();
                }
                Err(error)
            }
        }
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError> {
        let socket = &self.socket;
        let received = socket.membership.frame(|| {
            let mut header = [0; HEADER];
            let (len, cut) = socket.receive(&mut header, buffers)?;
            if len == 0 && socket.has_end {
                // Told of when the frame is over, which the device may wait for.
                return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
            }
            let len = len.checked_sub(HEADER).filter(|_| !cut).ok_or(NetError::Frame { len })?;
            Ok(Some(Received { info: PacketInfo::from_bytes(&header)?, len }))
        });
        match received {
            Err(NetError::Revoked) => Ok(None),
            Err(NetError::Host(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(NetError::Host(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                socket.close();
                Ok(None)
            }
            received => received,
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ready.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::channel::{AllowAll, Gatekeeper, Party};
    use crate::closer::tests::{soon, stubborn};

    struct Deaf;

    impl NetEvents for Deaf {
        fn ready(&self, _: u16) {}

        fn link_changed(&self) {}
    }

    fn grant(gatekeeper: &Gatekeeper) -> Grant<NetworkAttach> {
        let channel = NetworkAttach { network: "lan".into() };
        gatekeeper.open(Party::Host("peer".into()), None, channel).unwrap()
    }

    #[test]
    fn what_the_kernel_says_of_the_peer_is_not_the_peers() {
        let (ours, theirs) = FrameSocket::pair().unwrap();
        sockopt::set_socket_passcred(&ours, true).unwrap();
        let socket = FrameSocket::new(grant(&Gatekeeper::new(AllowAll)), ours, Offloads::NONE).unwrap();
        let mut ports = socket.attach(&Agreed::new(1), Arc::new(Deaf)).unwrap();
        rustix::io::write(&theirs, &[0; HEADER + 60]).unwrap();
        let mut room = [0; 100];
        let received = ports[0].receive(&[VolatileSlice::from(&mut room[..])]).unwrap();
        assert_eq!(received.map(|received| received.len), Some(60));
        assert!(socket.link().up);
    }

    /// Neither whoever takes its frames, or attaches it, nor who takes the right back.
    #[test]
    fn what_the_peer_passes_holds_up_nobody() {
        for (kind, early) in
            [(SocketType::SEQPACKET, false), (SocketType::SEQPACKET, true), (SocketType::DGRAM, false)]
        {
            let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap();
            let gatekeeper = Gatekeeper::new(AllowAll);
            let socket = FrameSocket::new(grant(&gatekeeper), ours, Offloads::NONE).unwrap();
            let mut ends = Vec::new();
            let mut pass = || {
                let (stubborn, end) = stubborn();
                let passed = [stubborn.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
                sendmsg(&theirs, &[IoSlice::new(&[0; HEADER + 60])], &mut control, SendFlags::empty())
                    .unwrap();
                ends.push(end);
            };
            if early {
                pass();
            }
            let (socket, mut ports) = soon("to be attached", move || {
                let ports = socket.attach(&Agreed::new(1), Arc::new(Deaf)).unwrap();
                (socket, ports)
            });
            if !early {
                pass();
            }
            let ports = soon("a frame", move || {
                assert!(ports[0].receive(&[]).unwrap().is_none());
                ports
            });
            assert!(!socket.link().up);
            assert_eq!(soon("a revocation", move || gatekeeper.revoke_all(|_| true)), 1);
            soon("the end", move || drop((ports, socket)));
            drop(ends);
        }
    }
}
