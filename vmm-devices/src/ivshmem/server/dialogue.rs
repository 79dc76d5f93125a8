//! What a client makes of a server's messages: the protocol without sockets.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use super::message::Message;
use super::{MEMORY, VERSION};
use crate::ivshmem::eventfd;

/// What is wrong with a connection to a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A protocol of another time.
    #[error("it speaks version {found} of the protocol; known is 0")]
    Version {
        /// What it said.
        found: i64,
    },
    /// A number that is no position.
    #[error("it says {found} where {expected} is expected")]
    Number {
        /// What it said.
        found: i64,
        /// What was expected.
        expected: &'static str,
    },
    /// A message without its descriptor, or with one that it does not have.
    #[error("message {number} comes {with} a descriptor")]
    Descriptor {
        /// The number.
        number: i64,
        /// How it comes.
        with: &'static str,
    },
    /// More than one descriptor with a message.
    #[error("it sends several descriptors at once; one is allowed")]
    Descriptors,
    /// A descriptor that is no eventfd.
    #[error("what it sends for vector {vector} of peer {peer} is no eventfd")]
    NoEventfd {
        /// The peer.
        peer: u16,
        /// The vector.
        vector: u16,
    },
    /// It says nothing.
    #[error("it did not say {what} within {milliseconds} ms")]
    Silent {
        /// What it should have said.
        what: &'static str,
        /// How long that was waited for.
        milliseconds: u128,
    },
    /// It is gone.
    #[error("it has closed the connection")]
    Closed,
    /// The connection cannot be used.
    #[error("its socket")]
    Socket(#[source] io::Error),
}

/// What a message means.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// Nothing to be done yet.
    Version,
    /// This is the client's position.
    Position(u16),
    /// This is the memory.
    Memory(OwnedFd),
    /// By this a peer is rung for its next vector.
    Bell(u16, OwnedFd),
    /// By this the client is rung for that vector.
    Own(u16, OwnedFd),
    /// The peer is gone.
    Gone(u16),
    /// The client is: its right was taken back.
    Revoked,
    /// A peer or vector beyond what the client takes; its descriptor is closed.
    Beyond,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Version,
    Position,
    Memory,
    Peers,
}

/// The client's side of the protocol: hand it each message. After an error the connection is to be closed, and this dropped where
/// it may take time: it keeps the descriptor that it has refused, which may be one that the server lets nobody close (a file of
/// FUSE's).
#[derive(Debug)]
pub struct Dialogue {
    stage: Stage,
    /// What came with the last message, unless it was taken.
    descriptor: Option<OwnedFd>,
    position: u16,
    vectors: u16,
    max_peers: usize,
    own: u16,
    /// How many vectors each has told of.
    peers: BTreeMap<u16, u16>,
}

impl Dialogue {
    /// For a client with so many vectors, which takes so many peers.
    pub fn new(vectors: u16, max_peers: usize) -> Self {
        Self {
            stage: Stage::Version,
            descriptor: None,
            position: 0,
            vectors,
            max_peers,
            own: 0,
            peers: BTreeMap::new(),
        }
    }

    /// What is expected next.
    pub(super) fn expects(&self) -> &'static str {
        match self.stage {
            Stage::Version => "its version",
            Stage::Position => "the client's position",
            Stage::Memory => "the memory",
            Stage::Peers => "peers",
        }
    }

    /// Peers that are known of.
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    /// What `message` means.
    ///
    /// # Errors
    /// [`ProtocolError`] if it may not come now.
    pub fn hear(&mut self, message: Message) -> Result<Event, ProtocolError> {
        let number = message.number;
        self.descriptor = message.descriptor;
        match self.stage {
            Stage::Version => {
                self.without(number)?;
                if number != VERSION {
                    return Err(ProtocolError::Version { found: number });
                }
                self.stage = Stage::Position;
                Ok(Event::Version)
            }
            Stage::Position => {
                self.without(number)?;
                self.position = position(number)?;
                self.stage = Stage::Memory;
                Ok(Event::Position(self.position))
            }
            Stage::Memory => {
                if number != MEMORY {
                    return Err(ProtocolError::Number { found: number, expected: "-1, for the memory," });
                }
                let descriptor = self.descriptor.take();
                let descriptor = descriptor.ok_or(ProtocolError::Descriptor { number, with: "without" })?;
                self.stage = Stage::Peers;
                Ok(Event::Memory(descriptor))
            }
            Stage::Peers => self.hear_of_peer(position(number)?),
        }
    }

    fn hear_of_peer(&mut self, peer: u16) -> Result<Event, ProtocolError> {
        let Some(descriptor) = &self.descriptor else {
            if peer == self.position {
                return Ok(Event::Revoked);
            }
            // One that was beyond what the client takes is not known, and gone all the same.
            return Ok(if self.peers.remove(&peer).is_some() { Event::Gone(peer) } else { Event::Beyond });
        };
        let own = peer == self.position;
        let vector = if own { self.own } else { self.peers.get(&peer).copied().unwrap_or(0) };
        // Also if it is beyond what the client takes, so that what is closed now closes at once.
        if !eventfd::is_one(descriptor) {
            return Err(ProtocolError::NoEventfd { peer, vector });
        }
        let known = self.peers.len();
        let told = if own {
            &mut self.own
        } else if known < self.max_peers || self.peers.contains_key(&peer) {
            self.peers.entry(peer).or_insert(0)
        } else {
            return Ok(self.beyond());
        };
        if vector >= self.vectors {
            return Ok(self.beyond());
        }
        let Some(descriptor) = self.descriptor.take() else { return Ok(Event::Beyond) };
        *told += 1;
        Ok(if own { Event::Own(vector, descriptor) } else { Event::Bell(peer, descriptor) })
    }

    fn beyond(&mut self) -> Event {
        self.descriptor = None;
        Event::Beyond
    }

    fn without(&self, number: i64) -> Result<(), ProtocolError> {
        match self.descriptor {
            None => Ok(()),
            Some(_) => Err(ProtocolError::Descriptor { number, with: "with" }),
        }
    }
}

fn position(number: i64) -> Result<u16, ProtocolError> {
    u16::try_from(number)
        .map_err(|_| ProtocolError::Number { found: number, expected: "a position, 0 to 65535," })
}
