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
        lock(&self.0.members).ports.keys().copied().collect()
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
        let member = self.sit(&mut members, position, map, ring)?;
        members.next = position.wrapping_add(1);
        drop(members);
        self.watch(member)
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
        let member = self.sit(&mut members, position, map, ring)?;
        drop(members);
        self.watch(member)
    }

    fn sit(
        &self,
        members: &mut Members,
        position: u16,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        if members.ports.len() >= MAX_PEERS {
            return Err(IvshmemError::Full { region: Arc::clone(self.0.region.name()), max: MAX_PEERS });
        }
        let member = self.0.region.seat((position, self.0.vectors), map, ring)?;
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
        Ok(member)
    }

    /// Has a member leave when it closes. It may have closed by now.
    fn watch(&self, member: Member) -> Result<Member, IvshmemError> {
        // As long as there are members there is a hub, whoever else has let go of it. It holds no port.
        let (hub, position) = (Arc::clone(&self.0), member.position());
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
