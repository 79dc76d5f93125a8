//! The ports of a saved domain.

use super::*;
use crate::error::{Error, Result};
use crate::xen_pv::saved::{PortKind, PortState, invalid};

impl Ports {
    pub(crate) fn save(&self) -> Vec<PortState> {
        self.lock().ports.iter().map(save).collect()
    }

    /// The ports that were saved, of a domain with so many virtual processors. At the other end of those that lead to the
    /// outside is nobody.
    pub(crate) fn restore(ports: &[PortState], vcpus: u32) -> Result<Self> {
        let restored = Self::new(vcpus);
        if ports.len() > PORTS as usize {
            return Err(problem(ports.len(), &format!("ports, allowed are up to {PORTS}")));
        }
        let mut table = restored.lock();
        for (number, port) in (0_u32..).zip(ports) {
            if port.vcpu >= vcpus {
                return Err(problem(number, &format!("virtual processor {} of {vcpus}", port.vcpu)));
            }
            let binding = match port.kind {
                PortKind::Free => Binding::Free,
                _ if number == 0 => return Err(problem(number, "in use, which port 0 never is")),
                PortKind::Unbound => Binding::Unbound { remote: port.remote },
                PortKind::Backend | PortKind::Bound => {
                    let by_guest = port.kind == PortKind::Bound;
                    let end = End::Away { sent: port.sent };
                    Binding::Outside { remote: port.remote, remote_port: port.other, by_guest, end }
                }
                PortKind::Loop => {
                    let peer = ports.get(port.other as usize).filter(|_| port.other != number);
                    if !peer.is_some_and(|peer| peer.kind == PortKind::Loop && peer.other == number) {
                        return Err(problem(
                            number,
                            &format!("connected with port {}, which is not", port.other),
                        ));
                    }
                    Binding::Loop { other: port.other }
                }
                PortKind::Virq => {
                    let virq = port.other;
                    let owner = if virq::is_per_vcpu(virq) { port.vcpu } else { 0 };
                    let slot = table.virq_slot(owner, virq);
                    match slot {
                        Ok(slot) if *slot == 0 => *slot = number,
                        Ok(_) => return Err(problem(number, &format!("a second one of VIRQ {virq}"))),
                        Err(_) => return Err(problem(number, &format!("VIRQ {virq}, which is none"))),
                    }
                    Binding::Virq { virq }
                }
                PortKind::Ipi => Binding::Ipi,
            };
            table.ports.push(Port { binding, vcpu: port.vcpu });
        }
        drop(table);
        Ok(restored)
    }
}

fn save(port: &Port) -> PortState {
    let (kind, remote, other) = match &port.binding {
        Binding::Free => (PortKind::Free, 0, 0),
        Binding::Unbound { remote } => (PortKind::Unbound, *remote, 0),
        Binding::Outside { remote, remote_port, by_guest: false, .. } => {
            (PortKind::Backend, *remote, *remote_port)
        }
        Binding::Outside { remote, remote_port, .. } => (PortKind::Bound, *remote, *remote_port),
        Binding::Loop { other } => (PortKind::Loop, 0, *other),
        Binding::Virq { virq } => (PortKind::Virq, 0, *virq),
        Binding::Ipi => (PortKind::Ipi, 0, 0),
    };
    let sent = matches!(port.binding, Binding::Outside { end: End::Away { sent: true }, .. });
    PortState { kind, remote, other, vcpu: port.vcpu, sent }
}

fn problem(number: impl std::fmt::Display, what: &str) -> Error {
    invalid("backend.ports", format!("{number}: {what}"))
}
