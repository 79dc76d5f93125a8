//! What joins a device to others: a [`Switch`](super::Switch) of this process, or a [`Broker`](super::Broker) of another.

use std::os::fd::BorrowedFd;
use std::sync::Weak;

use super::packet::Kind;
use super::slots::Tag;
use super::socket::Socket;
use crate::channel::Party;

/// A connection that the guest wants.
#[derive(Clone, Debug)]
pub(super) struct Dial {
    /// By which the answer is known.
    pub(super) tag: Tag,
    pub(super) cid: u32,
    pub(super) port: u32,
    pub(super) from_port: u32,
    pub(super) kind: Kind,
    /// Lives as long as the guest wants it.
    pub(super) wanted: Weak<()>,
}

/// Something that came by.
#[derive(Debug)]
pub(super) enum Delivery {
    /// The answer to a [`Dial`]: the socket, if it was not refused. The other device has not answered yet.
    Dialed { tag: Tag, socket: Option<Socket> },
    /// Another device's guest wants a connection.
    Arrived { socket: Socket, cid: u32, party: Party, port: u32, guest_port: u32, kind: Kind },
}

/// Who is at an identifier, as far as one knows here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Nobody,
    /// That is known elsewhere, and decided there.
    Unknown,
    Known(Party),
}

/// A place at a switch. It is called by the worker of its device alone.
pub(super) trait Fabric: Send + Sync {
    fn cid(&self) -> u32;

    /// Whether the right to be there is.
    fn is_live(&self) -> bool;

    fn who(&self, cid: u32) -> Who;

    /// The device has a driver from now on, or none any more.
    fn attend(&self, attended: bool);

    /// Begins a connection. `false` if that cannot be; else an answer comes, or none, for which the guest does not wait for ever.
    fn dial(&self, dial: Dial) -> bool;

    /// The next delivery. Each arrival at [`Fabric::source`] means to ask until there is none.
    fn next(&self) -> Option<Delivery>;

    /// Whether nobody is to be let in now, as too much of those who were is still to be closed. Nothing tells when that is over.
    fn is_full(&self) -> bool;

    /// Becomes readable when there is one.
    fn source(&self) -> BorrowedFd<'_>;
}
