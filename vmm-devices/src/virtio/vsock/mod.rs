//! Socket device (Virtio 1.3, 5.10): connections between programs of the guest and programs of the host, or of other guests.
//!
//! | part | what |
//! |---|---|
//! | [`Vsock`], [`VsockBuilder`] | the device, for a transport |
//! | [`HostSockets`] | the host's side, as Unix sockets |
//! | [`Switch`], [`Seat`] | joins the devices of one process by their context identifiers (CID) |
//! | [`Broker`], [`Member`] | does so for devices of several processes |
//! | [`VsockHandle`] | the monitor's side: connects, resets after a restore, counts |
//! | [`Header`] | the packets themselves, for tests and tools |
//!
//! # Channels
//! Nothing opens without a grant of the device's [`Gatekeeper`], which refuses all unless told:
//!
//! | what | who asks | whom | for |
//! |---|---|---|---|
//! | the guest connects | the guest | the host, or the other guest | [`VsockConnect`] |
//! | a program of the host connects | the host | the guest | [`VsockConnect`] |
//! | another guest connects | the guest, to accept | the other guest | [`VsockListen`] |
//! | the guest can be reached by the host, or by a switch, at all | the guest, to accept | the host, or nobody named | [`VsockListen`], which [`HostSockets::listen`] and [`Switch::join`] take; [`Switch::join_to_connect`] does without, for who is not to be reached |
//!
//! Who is refused gets a reset, as where nobody listens. When a grant is revoked the sockets are cut before
//! [`Gatekeeper::revoke`] returns, and the guest gets its reset while it runs.
//!
//! # Flow
//! What the guest sends goes to a Unix socket at once; what that has no room for waits, as much as the guest has credit for
//! ([`VsockBuilder::buffer`]). What comes for the guest stays in the socket until there is credit and a buffer for it. So nothing grows
//! where nobody reads, on either side, and connections do not wait for each other: they take turns of 64 KiB.
//!
//! A message of SOCK_SEQPACKET is no longer than the buffer of who receives it: one that is can never arrive as a whole, and ends its connection.
//!
//! # Ends
//! Both halves close one by one, as with TCP. A connection whose both halves are closed has [`VsockBuilder::close_timeout`] to
//! confirm that, and what the guest left behind has as long to find a reader. One that dies is reset, which a guest at a switch
//! can tell from an end.
//!
//! # Threat model
//! The guest chooses packets, ports, lengths, credit, buffers and their order; programs of the host and other monitors choose what they
//! send, and when they read or die. What all of them can cost is bounded: [`VsockBuilder::connections`] connections, of which each side
//! leaves some to the others, each with a socket, twice its buffer in memory, and a message or record of up to 1 MiB; 256 calls of other guests that it
//! has not looked at, 32 of one, each with a socket; 256 resets for packets that belong to no connection, beyond which
//! the guest is not listened to until it takes some. Resets are never answered. A breach of the rules ends its connection, and
//! no other.
//!
//! Descriptors are not taken from programs of the host and other monitors, as the close of one can take as long as who made it likes. Since
//! Linux 6.16 programs cannot send any; else they end the connection that they are sent through, with what waits there. They are closed
//! on threads that nobody waits for, be it who drives the device or who revokes: one for programs of the host, four for what comes
//! through a broker, where each guest has one. While 64 of either are still to be closed, nobody of them is let in, nor called; what is
//! open goes on. A broker is trusted not to read from the sockets that it hands out; what it sends when the process has no room for
//! another descriptor is closed at once.
//!
//! ```
//! use std::io::{Read, Write};
//! use vmm_devices::channel::{AllowAll, Gatekeeper, Party, VmIdentity, VsockConnect};
//! use vmm_devices::testkit::{Driver, DriverQueue, MmioDriver, guest_memory};
//! use vmm_devices::virtio::vsock::{Header, Kind, Vsock, operation};
//!
//! let gatekeeper = Gatekeeper::new(AllowAll);
//! let guest = Party::Vm(VmIdentity::new(1, 1));
//! let vsock = Vsock::builder(3, || 0).gatekeeper(guest.clone(), gatekeeper.clone()).build()?;
//! let handle = vsock.handle();
//! let memory = guest_memory(1 << 20)?;
//! let (driver, _) = MmioDriver::of(vsock, &memory)?;
//! let mut queues = Vec::new();
//! for index in 0..3 {
//!     queues.push(DriverQueue::new(memory.clone(), 0x1000 * (index + 1), 16)?);
//! }
//! driver.start(0, &[(0, &queues[0]), (1, &queues[1]), (2, &queues[2])])?;
//!
//! // The monitor wants to speak with port 52 of the guest, which hears of that.
//! let grant = gatekeeper.open(Party::Host("monitor".into()), Some(guest), VsockConnect { port: 52 })?;
//! let mut stream = std::os::unix::net::UnixStream::from(handle.connect(grant, Kind::Stream)?);
//! queues[0].chain().writable(0x8000, 4096).submit()?;
//! driver.notify(0);
//! let request = Header::parse(&queues[0].get(0x8000, 44)?.try_into().unwrap());
//! assert_eq!((request.op, request.dst_port), (operation::REQUEST, 52));
//!
//! // The guest accepts, and sends something.
//! for (op, data) in [(operation::RESPONSE, &b""[..]), (operation::RW, &b"hello"[..])] {
//!     let header = Header {
//!         src_cid: 3, dst_cid: 2, src_port: 52, dst_port: request.src_port,
//!         len: data.len() as u32, kind: 1, op, buf_alloc: 65536, ..Header::default()
//!     };
//!     queues[1].put(0x9000, &[&header.to_bytes()[..], data].concat())?;
//!     queues[1].chain().readable(0x9000, 44 + header.len).submit()?;
//!     driver.notify(1);
//! }
//! let mut text = [0; 5];
//! stream.read_exact(&mut text)?;
//! assert_eq!(&text, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod backlog;
mod broker;
mod builder;
mod closing;
mod connection;
mod credit;
mod delivery;
mod door;
mod engine;
mod fabric;
mod far;
mod handle;
mod host;
mod member;
mod opening;
mod packet;
mod poll;
mod right;
mod shared;
mod slots;
mod socket;
mod switch;
mod sys;
mod wire;
mod worker;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use broker::{Broker, BrokerHandle, Credentials};
pub use builder::VsockBuilder;
pub use handle::{VsockCounters, VsockHandle};
pub use host::{HostSockets, MAX_PATH};
pub use member::Member;
pub use packet::{HEADER, Header, Kind, MAX_DATA, boundary, operation, shutdown};
pub use switch::{Seat, Switch};

use engine::Engine;
use shared::{Setup, Shared};
use worker::VsockWorker;

use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, VirtioDevice, Worker};
use super::state::DeviceState;
use crate::channel::Refusal;
#[cfg(doc)]
use crate::channel::{Gatekeeper, VsockConnect, VsockListen};
use crate::clock::Clock;
use crate::error::StateError;

/// The context identifier of the host (5.10.4).
pub const HOST_CID: u32 = 2;

/// Stands for all ports in a grant to be reached ([`HostSockets::listen`], [`Switch::join`]).
pub const ANY_PORT: u32 = u32::MAX;

/// Queues (5.10.2), and descriptors that each has at most.
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Feature bits (5.10.3).
mod feature {
    pub(super) const STREAM: u64 = 1 << 0;
    pub(super) const SEQPACKET: u64 = 1 << 1;
    pub(super) const NO_IMPLIED_STREAM: u64 = 1 << 2;
}

/// What is wrong with a device or a connection that was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// No guest can have that identifier.
    #[error("{cid} is no context identifier of a guest; those are 3 to {max}", max = u32::MAX - 1)]
    Cid {
        /// Which one.
        cid: u32,
    },
    /// The identifier of the device and of its place at the switch differ.
    #[error("the device has context identifier {cid}, and its place at the switch {seat}")]
    Seat {
        /// The device's.
        cid: u32,
        /// The place's.
        seat: u32,
    },
    /// Another device has it.
    #[error("context identifier {cid} is taken at the switch")]
    Taken {
        /// Which one.
        cid: u32,
    },
    /// The device cannot have so many connections.
    #[error("a device has 1 to {max} connections, not {connections}", max = builder::MAX_CONNECTIONS)]
    Connections {
        /// How many were asked for.
        connections: usize,
    },
    /// Connections cannot have such a buffer.
    #[error("a connection's buffer has {min} to {max} bytes, not {bytes}",
        min = builder::BUFFERS.start(), max = builder::BUFFERS.end())]
    Buffer {
        /// How many bytes were asked for.
        bytes: u32,
    },
    /// Unix sockets have no such paths.
    #[error("the path has {len} bytes; 1 to {MAX_PATH} are possible, as `_` and a port come behind it")]
    Path {
        /// Bytes of it.
        len: usize,
    },
    /// The host refuses a socket.
    #[error("listening at {path:?}")]
    Socket {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nobody to connect to.
    #[error("the guest with context identifier {cid} has no driver for its socket device now")]
    NoDriver {
        /// Which one.
        cid: u32,
    },
    /// The device has not looked at those who came before, or what they left behind is still to be closed.
    #[error(
        "too many connections to context identifier {cid} wait already, or are to be closed; try again later"
    )]
    Busy {
        /// Which one.
        cid: u32,
    },
    /// The broker says no.
    #[error("the broker refuses context identifier {cid}: {reason}")]
    Broker {
        /// Which one.
        cid: u32,
        /// Why.
        reason: &'static str,
    },
    /// A gate says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host refuses something else.
    #[error("the host refuses what a socket device needs")]
    Host(#[from] io::Error),
}

/// A socket device.
pub struct Vsock {
    setup: Arc<Setup>,
    shared: Arc<Shared>,
    /// The driver is somewhere else than it was, and is to hear of that.
    restored: bool,
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock").field("cid", &self.setup.cid).finish_non_exhaustive()
    }
}

impl Vsock {
    /// A device for the guest with context identifier `cid`, whose time is `clock`'s. It reaches nothing, and its gate refuses
    /// everything, until the builder is told otherwise.
    pub fn builder(cid: u32, clock: impl Clock + 'static) -> VsockBuilder {
        VsockBuilder::new(cid, Box::new(clock))
    }

    /// The monitor's side of it.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle { shared: Arc::clone(&self.shared), cid: self.setup.cid }
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::VSOCK
    }

    fn features(&self) -> u64 {
        feature::STREAM | feature::SEQPACKET | feature::NO_IMPLIED_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.setup.cid).to_le_bytes();
        let config = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(config).for_each(|(place, byte)| *place = *byte);
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let (rx, tx) = (activation.take_queue(RX)?, activation.take_queue(TX)?);
        // A driver that hears of no events can still connect.
        let event = activation.take_queue(EVENT).ok();
        let has = |bit| activation.features & bit != 0;
        // What does not say that it does without has them (5.10.3.1).
        let streams = has(feature::STREAM) || !has(feature::NO_IMPLIED_STREAM);
        let (setup, shared) = (Arc::clone(&self.setup), Arc::clone(&self.shared));
        let engine = Engine::new(setup, shared, streams, has(feature::SEQPACKET))?;
        if let Some(rate) = &self.setup.rate {
            rate.register(&activation.doorbells);
        }
        if std::mem::take(&mut self.restored) {
            self.shared.reset_due.store(true, Ordering::SeqCst);
        }
        self.shared.connect(Some(activation.doorbells));
        if let Some(fabric) = &self.setup.fabric {
            fabric.attend(true);
        }
        Ok(vec![Box::new(VsockWorker::new(engine, rx, tx, event))])
    }

    fn reset(&mut self, workers: Vec<Box<dyn Worker>>) {
        drop(workers);
        self.shared.connect(None);
        if let Some(fabric) = &self.setup.fabric {
            fabric.attend(false);
        }
        self.restored = false;
    }

    /// Sockets are this host's: where it goes on there is none of its connections.
    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Stateless)
    }

    /// The identifier may be another one, which the driver reads again when it is told of the reset.
    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<(), StateError> {
        if *state != DeviceState::Stateless {
            return Err(state.of_another("socket device"));
        }
        self.restored = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
