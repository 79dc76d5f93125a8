//! Event channels with two-level bitmaps (public/event_channel.h).
//!
//! The table of ports is the ABI's own; the bitmaps lie in guest memory. They may hold any nonsense, which then is the
//! guest's own loss.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::errno::Errno;
use super::abi::event::{self, PORTS, status};
use super::abi::{domid, virq};
use super::gate::EventSink;

/// What a port is bound to.
#[derive(Clone, Debug, Default)]
pub(crate) enum Binding {
    #[default]
    Free,
    /// Waits for the other side.
    Unbound {
        remote: u16,
    },
    /// Connected with something outside of the domain.
    Outside {
        remote: u16,
        remote_port: u32,
        /// The guest asked for it; else it was a back end.
        #[cfg_attr(not(feature = "snapshot"), allow(dead_code, reason = "for saved domains"))]
        by_guest: bool,
        end: End,
    },
    /// Connected with another port of this domain.
    Loop {
        other: u32,
    },
    Virq {
        virq: u32,
    },
    Ipi,
}

/// Who is at the other end of a channel to the outside.
#[derive(Clone, Debug)]
pub(crate) enum End {
    Sink(Arc<dyn EventSink>),
    /// Nobody until the back end of a restored domain connects again; whether the guest sent something meanwhile.
    #[cfg_attr(not(feature = "snapshot"), allow(dead_code, reason = "there are no restored domains"))]
    Away {
        sent: bool,
    },
}

/// A port.
#[derive(Clone, Debug, Default)]
pub(crate) struct Port {
    pub(crate) binding: Binding,
    pub(crate) vcpu: u32,
}

/// What sending on a port does.
#[derive(Debug)]
pub(crate) enum Target {
    /// Sets this port pending.
    Port(u32),
    /// Tells somebody outside.
    Outside(Arc<dyn EventSink>),
    /// Nobody is there.
    Nobody,
}

/// The ports of a domain.
#[derive(Debug)]
pub(crate) struct Ports {
    inner: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Index 0 is never used.
    ports: Vec<Port>,
    /// Port of each virtual interrupt of each virtual processor, 0 for none.
    virqs: Vec<[u32; virq::COUNT as usize]>,
}

impl Table {
    fn port(&self, port: u32) -> Option<&Port> {
        self.ports.get(port as usize).filter(|_| port != 0)
    }

    fn bound(&mut self, port: u32) -> Result<&mut Port, Errno> {
        let port = self.ports.get_mut(port as usize).filter(|_| port != 0).ok_or(Errno::EINVAL)?;
        match port.binding {
            Binding::Free => Err(Errno::EINVAL),
            _ => Ok(port),
        }
    }

    fn allocate(&mut self, port: Port) -> Result<u32, Errno> {
        if self.ports.is_empty() {
            self.ports.push(Port::default());
        }
        let free = self.ports.iter().skip(1).position(|port| matches!(port.binding, Binding::Free));
        let number = match free {
            Some(at) => at + 1,
            None if self.ports.len() < PORTS as usize => {
                self.ports.push(Port::default());
                self.ports.len() - 1
            }
            None => return Err(Errno::ENOSPC),
        };
        *self.ports.get_mut(number).ok_or(Errno::ENOSPC)? = port;
        u32::try_from(number).map_err(|_| Errno::ENOSPC)
    }

    fn virq_slot(&mut self, vcpu: u32, virq: u32) -> Result<&mut u32, Errno> {
        let vcpu = self.virqs.get_mut(vcpu as usize).ok_or(Errno::ENOENT)?;
        vcpu.get_mut(virq as usize).ok_or(Errno::EINVAL)
    }
}

impl Ports {
    pub(crate) fn new(vcpus: u32) -> Self {
        let virqs = vec![[0; virq::COUNT as usize]; vcpus as usize];
        Self { inner: Mutex::new(Table { ports: Vec::new(), virqs }) }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A port that waits for `remote`.
    pub(crate) fn allocate_unbound(&self, remote: u16) -> Result<u32, Errno> {
        self.lock().allocate(Port { binding: Binding::Unbound { remote }, vcpu: 0 })
    }

    /// A port connected with something outside, by the guest or by a back end.
    pub(crate) fn allocate_outside(
        &self,
        remote: u16,
        remote_port: u32,
        by_guest: bool,
        sink: Arc<dyn EventSink>,
    ) -> Result<u32, Errno> {
        let binding = Binding::Outside { remote, remote_port, by_guest, end: End::Sink(sink) };
        self.lock().allocate(Port { binding, vcpu: 0 })
    }

    /// Connects something outside with a port that waits for it. Whether the guest sent something that nobody took.
    pub(crate) fn connect(&self, port: u32, from: u16, sink: Arc<dyn EventSink>) -> Result<bool, Errno> {
        let mut table = self.lock();
        let entry = table.bound(port)?;
        match &mut entry.binding {
            Binding::Unbound { remote } if *remote == from => {
                let (remote, end) = (*remote, End::Sink(sink));
                entry.binding = Binding::Outside { remote, remote_port: port, by_guest: false, end };
                Ok(false)
            }
            Binding::Outside { remote, end: end @ End::Away { .. }, .. } if *remote == from => {
                let away = std::mem::replace(end, End::Sink(sink));
                Ok(matches!(away, End::Away { sent: true }))
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Connects a new port with one of this domain that waits for it.
    pub(crate) fn bind_loop(&self, other: u32) -> Result<u32, Errno> {
        let mut table = self.lock();
        match table.bound(other)?.binding {
            Binding::Unbound { remote: domid::SELF } => {}
            _ => return Err(Errno::EINVAL),
        }
        let port = table.allocate(Port { binding: Binding::Loop { other }, vcpu: 0 })?;
        table.bound(other)?.binding = Binding::Loop { other: port };
        Ok(port)
    }

    pub(crate) fn bind_virq(&self, virq: u32, vcpu: u32) -> Result<u32, Errno> {
        if virq >= virq::COUNT || (!virq::is_per_vcpu(virq) && vcpu != 0) {
            return Err(Errno::EINVAL);
        }
        let mut table = self.lock();
        if *table.virq_slot(vcpu, virq)? != 0 {
            return Err(Errno::EEXIST);
        }
        let port = table.allocate(Port { binding: Binding::Virq { virq }, vcpu })?;
        *table.virq_slot(vcpu, virq)? = port;
        Ok(port)
    }

    pub(crate) fn bind_ipi(&self, vcpu: u32) -> Result<u32, Errno> {
        let mut table = self.lock();
        if vcpu as usize >= table.virqs.len() {
            return Err(Errno::ENOENT);
        }
        table.allocate(Port { binding: Binding::Ipi, vcpu })
    }

    /// The port of a virtual interrupt, if it is bound.
    pub(crate) fn virq_port(&self, vcpu: u32, virq: u32) -> Option<u32> {
        self.lock().virq_slot(vcpu, virq).ok().copied().filter(|port| *port != 0)
    }

    /// Closes a port. Its peer within the domain waits again.
    pub(crate) fn close(&self, port: u32) -> Result<(), Errno> {
        let mut table = self.lock();
        let closed = std::mem::take(table.bound(port)?);
        match closed.binding {
            Binding::Virq { virq } => *table.virq_slot(closed.vcpu_of_virq(virq), virq)? = 0,
            Binding::Loop { other } => {
                // A channel may be connected with itself in no way, so the peer is another port.
                table.bound(other)?.binding = Binding::Unbound { remote: domid::SELF };
            }
            _ => {}
        }
        Ok(())
    }

    /// Closes all ports and names them.
    pub(crate) fn reset(&self) -> Vec<u32> {
        let mut table = self.lock();
        for virqs in &mut table.virqs {
            virqs.fill(0);
        }
        let mut closed = Vec::new();
        for (number, port) in (0..).zip(&mut table.ports) {
            if !matches!(std::mem::take(port).binding, Binding::Free) {
                closed.push(number);
            }
        }
        closed
    }

    pub(crate) fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<(), Errno> {
        let mut table = self.lock();
        if vcpu as usize >= table.virqs.len() {
            return Err(Errno::ENOENT);
        }
        let entry = table.bound(port)?;
        match entry.binding {
            Binding::Ipi => Err(Errno::EINVAL),
            Binding::Virq { virq } if virq::is_per_vcpu(virq) => Err(Errno::EINVAL),
            _ => {
                entry.vcpu = vcpu;
                Ok(())
            }
        }
    }

    /// The virtual processor that a port notifies; `None` for a free port.
    pub(crate) fn vcpu(&self, port: u32) -> Option<u32> {
        let table = self.lock();
        table.port(port).filter(|port| !matches!(port.binding, Binding::Free)).map(|port| port.vcpu)
    }

    /// What an event sent by the guest on `port` reaches.
    pub(crate) fn target(&self, port: u32) -> Result<Target, Errno> {
        let mut table = self.lock();
        Ok(match &mut table.bound(port)?.binding {
            Binding::Outside { end: End::Sink(sink), .. } => Target::Outside(Arc::clone(sink)),
            Binding::Outside { end: End::Away { sent }, .. } => {
                *sent = true;
                Target::Nobody
            }
            Binding::Loop { other } => Target::Port(*other),
            Binding::Ipi => Target::Port(port),
            Binding::Unbound { .. } => Target::Nobody,
            Binding::Free | Binding::Virq { .. } => return Err(Errno::EINVAL),
        })
    }

    /// `EVTCHNOP_status`. A free port within range is closed, not an error.
    pub(crate) fn status(&self, port: u32) -> Result<event::Status, Errno> {
        if port >= PORTS {
            return Err(Errno::EINVAL);
        }
        let table = self.lock();
        let Some(entry) = table.port(port) else {
            return Ok(event::Status { status: status::CLOSED, ..Default::default() });
        };
        let (status, detail, remote_port) = match &entry.binding {
            Binding::Free => (status::CLOSED, 0, 0),
            Binding::Unbound { remote } => (status::UNBOUND, (*remote).into(), 0),
            Binding::Outside { remote, remote_port, .. } => {
                (status::INTERDOMAIN, (*remote).into(), *remote_port)
            }
            Binding::Loop { other } => (status::INTERDOMAIN, domid::SELF.into(), *other),
            Binding::Virq { virq } => (status::VIRQ, *virq, 0),
            Binding::Ipi => (status::IPI, 0, 0),
        };
        Ok(event::Status { status, vcpu: entry.vcpu, detail, remote_port, ..Default::default() })
    }
}

impl Port {
    /// The virtual processor under which a virtual interrupt is entered: per-domain ones stay with number 0 wherever they
    /// notify.
    fn vcpu_of_virq(&self, virq: u32) -> u32 {
        if virq::is_per_vcpu(virq) { self.vcpu } else { 0 }
    }
}

#[cfg(feature = "snapshot")]
mod saved;
