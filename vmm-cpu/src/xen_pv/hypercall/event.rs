//! `event_channel_op`.

use super::super::abi::errno::Errno;
use super::super::abi::event::{AllocUnbound, BindInterdomain, BindVirq, Pair, Status, evtchnop};
use super::super::abi::{domid, nr};
use super::{Call, Done, Outcome};

impl Call<'_> {
    /// Arguments: command, structure.
    pub(super) fn event_channel_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        match command {
            evtchnop::ALLOC_UNBOUND => self.alloc_unbound(at),
            evtchnop::BIND_INTERDOMAIN => self.bind_interdomain(at),
            evtchnop::BIND_VIRQ => {
                let mut request: BindVirq = self.space().read(at)?;
                request.port = self.domain.ports.bind_virq(request.virq, request.vcpu)?;
                self.answer(at, &request, request.port)
            }
            evtchnop::BIND_IPI => {
                let mut request: Pair = self.space().read(at)?;
                request.second = self.domain.ports.bind_ipi(request.first)?;
                self.answer(at, &request, request.second)
            }
            // There are no physical interrupts.
            evtchnop::BIND_PIRQ => self.refused(nr::EVENT_CHANNEL_OP, Errno::EPERM),
            evtchnop::CLOSE => {
                let port: u32 = self.space().read(at)?;
                self.domain.close_port(port)?;
                Ok(Done::OK)
            }
            evtchnop::SEND => {
                let port: u32 = self.space().read(at)?;
                self.domain.send(port)?;
                Ok(Done::OK)
            }
            evtchnop::STATUS => {
                let request: Status = self.space().read(at)?;
                if request.dom != domid::SELF {
                    return Err(Errno::ESRCH.into());
                }
                let mut status = self.domain.ports.status(request.port)?;
                (status.dom, status.port) = (request.dom, request.port);
                self.space().write(at, &status)?;
                Ok(Done::OK)
            }
            evtchnop::BIND_VCPU => {
                let request: Pair = self.space().read(at)?;
                self.domain.ports.bind_vcpu(request.first, request.second)?;
                Ok(Done::OK)
            }
            evtchnop::UNMASK => {
                let port: u32 = self.space().read(at)?;
                self.domain.unmask(port)?;
                Ok(Done::OK)
            }
            evtchnop::RESET => {
                let dom: u16 = self.space().read(at)?;
                if dom != domid::SELF {
                    return Err(Errno::ESRCH.into());
                }
                for port in self.domain.ports.reset() {
                    self.domain.port_closed(port);
                }
                Ok(Done::OK)
            }
            // Among them the FIFO interface, without which guests use two levels.
            _ => self.unknown(nr::EVENT_CHANNEL_OP),
        }
    }

    /// Writes the answer. The port was made for nothing if the guest cannot take it.
    fn answer<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &self,
        at: u64,
        answer: &T,
        port: u32,
    ) -> Outcome {
        if let Err(errno) = self.space().write(at, answer) {
            self.domain.close_port(port)?;
            return Err(errno.into());
        }
        Ok(Done::OK)
    }

    fn alloc_unbound(&mut self, at: u64) -> Outcome {
        let mut request: AllocUnbound = self.space().read(at)?;
        if request.dom != domid::SELF {
            return Err(Errno::ESRCH.into());
        }
        if request.remote_dom != domid::SELF && !self.domain.gate.may_reach(request.remote_dom) {
            return Err(Errno::EPERM.into());
        }
        request.port = self.domain.ports.allocate_unbound(request.remote_dom)?;
        self.answer(at, &request, request.port)
    }

    fn bind_interdomain(&mut self, at: u64) -> Outcome {
        let mut request: BindInterdomain = self.space().read(at)?;
        request.local_port = if request.remote_dom == domid::SELF {
            self.domain.ports.bind_loop(request.remote_port)?
        } else {
            let sink = self.domain.gate.bind(request.remote_dom, request.remote_port).ok_or(Errno::ESRCH)?;
            self.domain.ports.allocate_outside(request.remote_dom, request.remote_port, true, sink)?
        };
        let outcome = self.answer(at, &request, request.local_port)?;
        // What the other side sent before is not lost.
        self.domain.set_pending(request.local_port);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests;
