//! Devices of one process that have memory in common: no server, no descriptors. A ring is a call.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use super::bells::Bell;
use super::error::IvshmemError;
use super::port::Port;
use super::region::{Member, Region};
use super::{MAX_PEERS, MAX_VECTORS};
use crate::channel::{DoorbellRing, Grant, RegionMap};
use crate::interrupt::lock;

/// Brings devices of this process together at a [`Region`]. Clones are the same hub.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

struct Shared {
    region: Region,
    vectors: u16,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    /// Where the next one is to be: positions are not used again at once, so that a ring for one who left reaches nobody.
    next: u16,
    ports: BTreeMap<u16, Weak<Port>>,
}

impl Hub {
    /// With so many vectors for each member, 1 to [`MAX_VECTORS`].
    ///
    /// # Errors
    /// [`IvshmemError::Vectors`] for another number.
    pub fn new(region: Region, vectors: u16) -> Result<Self, IvshmemError> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(IvshmemError::Vectors { vectors, max: MAX_VECTORS });
        }
        Ok(Self(Arc::new(Shared { region, vectors, members: Mutex::default() })))
    }

    /// The memory.
    pub fn region(&self) -> &Region {
        &self.0.region
    }

    /// Positions of the members, ascending.
    pub fn members(&self) -> Vec<u16> {
        let members = lock(&self.0.members);
        // Where somebody is, not where one is about to be.
        let seated = members.ports.iter().filter(|(_, port)| port.strong_count() > 0);
        seated.map(|(position, _)| *position).collect()
    }

    /// A seat at the next position. Without `ring` the guest rings for nobody, and others ring for it.
    ///
    /// # Errors
    /// [`IvshmemError::Full`], and as [`Region::attach`].
    pub fn join(
        &self,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        let mut members = lock(&self.0.members);
        let next = members.next;
        let free = (next..=u16::MAX).chain(0..next).find(|position| !members.ports.contains_key(position));
        // Not reached: there are fewer members than positions.
        let position = free.unwrap_or(next);
        self.reserve(&mut members, position)?;
        members.next = position.wrapping_add(1);
        drop(members);
        self.sit(position, map, ring)
    }

    /// A seat at that position, for a device whose state was saved there.
    ///
    /// # Errors
    /// [`IvshmemError::Taken`], and as [`join`](Self::join).
    pub fn join_at(
        &self,
        position: u16,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        let mut members = lock(&self.0.members);
        if members.ports.contains_key(&position) {
            return Err(IvshmemError::Taken { position, region: Arc::clone(self.0.region.name()) });
        }
        self.reserve(&mut members, position)?;
        drop(members);
        self.sit(position, map, ring)
    }

    /// Nobody else has that position from now on.
    fn reserve(&self, members: &mut Members, position: u16) -> Result<(), IvshmemError> {
        if members.ports.len() >= MAX_PEERS {
            return Err(IvshmemError::Full { region: Arc::clone(self.0.region.name()), max: MAX_PEERS });
        }
        members.ports.insert(position, Weak::new());
        Ok(())
    }

    /// Takes a position that is reserved. Grants are dropped, of which the gate hears, with nothing locked.
    fn sit(
        &self,
        position: u16,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        let seated = self.0.region.seat((position, self.0.vectors), map, ring);
        let mut members = lock(&self.0.members);
        let member = match seated {
            Ok(member) => member,
            Err(error) => {
                members.ports.remove(&position);
                return Err(error);
            }
        };
        let bells = |port: &Arc<Port>| {
            let port = Arc::downgrade(port);
            (0..self.0.vectors).map(move |vector| Bell::Inside(Weak::clone(&port), vector))
        };
        for (&other, port) in &members.ports {
            if let Some(port) = port.upgrade() {
                bells(&member.port).for_each(|bell| port.add_bell(position, bell));
                bells(&port).for_each(|bell| member.port.add_bell(other, bell));
            }
        }
        bells(&member.port).for_each(|bell| member.port.add_bell(position, bell));
        members.ports.insert(position, Arc::downgrade(&member.port));
        drop(members);
        // It leaves when it closes, and may have closed by now. As long as there are members there is a hub, whoever else has let
        // go of it. It holds no port.
        let hub = Arc::clone(&self.0);
        member.port.on_leave(Box::new(move || hub.leave(position)));
        Ok(member)
    }
}

impl Shared {
    fn leave(&self, position: u16) {
        let mut members = lock(&self.members);
        members.ports.remove(&position);
        for port in members.ports.values().filter_map(Weak::upgrade) {
            port.remove_peer(position);
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("region", &self.0.region)
            .field("vectors", &self.0.vectors)
            .field("members", &self.members())
            .finish()
    }
}
