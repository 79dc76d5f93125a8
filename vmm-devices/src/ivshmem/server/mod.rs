//! Devices of several processes, brought together by a server, by the protocol of QEMU's `ivshmem-server` (QEMU
//! docs/specs/ivshmem-spec, "The ivshmem Client-Server Protocol").
//!
//! The server sends and the clients listen. Each message is a number of 8 bytes, little-endian, and may have a descriptor with it: version,
//! the client's position, the memory; then, at any time, a peer's position with one of its eventfds, or without one when it is gone.
//!
//! This is not in the protocol: a server that takes a client's right back sends it its own position without a descriptor, which
//! means that it is the one who is gone.
//!
//! # Threat model
//! A server is hostile to a client: what it sends is checked message by message ([`Dialogue`]), how many peers and vectors it
//! tells of is bounded, a descriptor that is not what it should be ends the connection, and memory whose size is not sealed is refused
//! unless the monitor says otherwise. So are clients to a server: they have nothing to say, so that whatever they send ends their
//! connection, as it does if they do not read. And so are clients to each other, who share eventfds: none of them is
//! waited for, unless the monitor trusts them ([`ClientConfig::rings_directly`]), nor does one keep rings from another. A descriptor
//! may also be a file of a file system that its sender serves (FUSE), and answers nothing: none is asked what it is, or closed,
//! where somebody would wait for that.
//!
//! # System calls
//! For a filter, once a client has joined: `epoll_wait` or `epoll_pwait`, `epoll_ctl`, `recvmsg`, `fstat`, `preadv2`, `write`, `close` and
//! `futex`, and what ends a thread. None of them maps memory, opens anything or starts a thread. Linux 5.8 or later is
//! needed, since eventfds are read without waiting from then on (`RWF_NOWAIT`).

mod client;
mod dialogue;
mod listener;
mod message;
mod roster;
mod serve;

pub use client::{Client, ClientConfig};
pub use dialogue::{Dialogue, Event, ProtocolError};
pub use message::{Message, Receiver};
pub use serve::{Credentials, PeerInfo, Server, ServerBuilder};

/// Of the protocol.
pub const VERSION: i64 = 0;

/// The number that comes with the memory.
const MEMORY: i64 = -1;
